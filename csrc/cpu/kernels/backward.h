/* Backward: all five gradients, with the samples computed again and no stored columns.
 *
 * With g = grad_output, S a sample, q its corners with values v(q) and bilinear weights G(q):
 *
 *   h[c, k, p0]           = sum_o g[o, p0] w[o, c, k]                         gradient of the columns
 *   d[q]                  = sum_c h[c] v(q)[c]                                corner products
 *   grad_weight[o, c, k]  = sum_{n, p0} g[o, p0] m S[c]
 *   grad_input[c] at q   += G(q) m h[c]
 *   grad_mask[k, p0]      = sum_q G(q) d[q]
 *   grad_offset_y[k, p0]  = m ((1 - lx) (d[10] - d[00]) + lx (d[11] - d[01]))  right-hand at the kinks
 *   grad_offset_x[k, p0]  = m ((1 - ly) (d[01] - d[00]) + ly (d[11] - d[10]))
 *   grad_bias[o]          = sum_{n, p0} g[o, p0]
 *
 * Dai et al. 2017, equations 2 to 4 and appendix A; Zhu et al. 2019, equation 1.
 *
 * The batch is cut into series of images that follow one another. A series adds to one share of grad_weight
 * and of grad_bias, image by image; the shares are added up in their order. How many series there are
 * follows from the params; how many of them have a place in memory at once, from the threads as well. A
 * round is the series that are at work together, a wave one image of each of them.
 *
 * Phases of a wave
 *   0  weights -> panels (first wave), images -> slabs, grad_output -> [pixel][output], unless late,
 *      and, where its memory is not that already, [output][pixel]; grad_bias
 *   1  the work: a task owns (image, slab of channels, band of pixels) and with it a share of
 *      grad_input, of grad_weight and of the sums of grad_offset and grad_mask: no atomics
 *   2  bands -> grad_input; slabs' shares -> grad_offset, grad_mask
 *   3  (a round's last wave) shares -> grad_weight, grad_bias
 *
 * Many small images: a task takes a series, each image through phases 0 to 2, in memory of its thread, so
 * that nothing leaves the cache in between. Phase 0 has weights and grad_bias alone then, and there is one
 * wave.
 *
 * One image: a task packs its slab's weights before its work and finishes their gradients behind it
 * (`alone`), so that neither is written to memory in another form and read again.
 *
 * Few slabs, or depthwise: a task turns grad_output tile by tile into its scratch (`late_output`). A
 * copy of all of it would be written to memory and read again.
 *
 * grad_offset and grad_mask are summed where they belong if one slab alone has a share.
 *
 * Bands exist where slabs alone are too few to share between threads. Their number, like every cut that
 * decides the order of a sum, follows from the params alone: not from threads and, for the gradients
 * that belong to an image, not from the batch.
 *
 * With the matrix unit (`split`) both products are its own, each splits its operands, and tiles are larger.
 *
 * A task takes tile by tile, chunk by chunk, block by block: h by the register kernel from
 * [pixel][output]; then one loop over (tap, pixel) that loads each corner once for d, the sample (it
 * replaces h in place) and the scatter; then grad_weight by the register kernel from [output][pixel].
 */
#ifndef DCN_BACKWARD_H
#define DCN_BACKWARD_H

#include "forward.h"
#include "scatter.h"

namespace DCN_ISA {

/* Memory of a wave's images, but at least one; and for each thread, where more of them keep more threads
 * busy. */
constexpr int64_t BACKWARD_WAVE_BYTES = 8 << 20, BUSY_WAVE_BYTES = 16 << 20;
/* Series: of small images as many as fit into one thread's wave, at most so many; of large ones so many that
 * there are enough tasks for many threads, and that adding up shares is little beside the work. */
constexpr int64_t MOST_SERIES = 16, SERIES_TASKS = 32, SERIES_PIXELS = 1536;
constexpr int64_t SMALL_IMAGE = 1 << 20; /* bytes of an image's arrays that a cache holds */
struct TileLimits {
  int64_t bytes, pixels; /* of its columns, and of float32 */
};
constexpr TileLimits BACKWARD_TILE = {256 << 10, 112};
/* With many outputs the shares of grad_weight are large: larger tiles touch them less often. */
constexpr int64_t MANY_OUTPUTS = 256;
constexpr TileLimits LARGE_TILE = {480 << 10, 196};
/* The matrix unit is to have much to do at a time. */
constexpr TileLimits SPLIT_TILE = {480 << 10, 192};
static_assert(LARGE_TILE.pixels <= MOST_PIXELS, "the distance of the corners' weights");
constexpr int64_t SPLIT_LEAST = 128; /* columns of a block: grad_output is split for each of them */
constexpr int64_t SPLIT_PASS = 256;  /* rows of a product that are split together */
constexpr int64_t LATE_SLABS = 4;    /* up to which grad_output is turned for each of them */
/* Slabs times bands of an image, and pixels of a band: at most so many of so many. Bands beside each other
 * touch the same rows of grad_input, which counts less on large images. */
struct BandLimits {
  int64_t owners, pixels;
};
constexpr BandLimits BANDS = {4, 512}, LARGE_BANDS = {8, 3072};
constexpr int64_t SUM_RUN = 512; /* values of grad_bias summed in A before they go into a double */
constexpr int64_t BIAS_OUTPUTS = 16; /* outputs of one task of grad_bias, weights or grad_weight */

template <class A>
struct Backward {
  const dcn_params &p;
  bool need_input, need_samples_gradient, need_weight, need_bias;
  bool direct_output;  /* grad_output is [output][pixel] in A already */
  bool direct_pixels;  /* or [pixel][output] */
  bool need_lines;     /* it is not [output][pixel], and grad_weight wants it so */
  bool late_output;    /* it is turned tile by tile, by the tasks that read it */
  bool direct_samples; /* grad_offset and grad_mask are summed in place */
  bool together;       /* a task takes a series of images through phases 0 to 2 */
  bool alone;          /* a task takes a slab's weights through phases 0 to 3 */
  bool split;          /* products by the matrix unit */
  Slabs<A> slabs;
  Frame frame;
  bool small;          /* positions and indices fit into A's integers */
  int64_t plane;       /* values of a packed slab of an image */
  int64_t columns_row; /* values of a row of columns */
  int64_t output_row;  /* values of a pixel of the packed grad_output; depthwise: of a slab's */
  int64_t output_line; /* values of an output of the packed grad_output, if needed */
  int64_t chunk, tile, tiles, bands;
  int64_t series, length; /* of images; of the longest one */
  int64_t places;         /* images whose arrays there are */
  int64_t tile_pitch;     /* pixels between two taps' rows of corners */
  int64_t
      share_row; /* grad_weight share: values of one output's row; the packed weights' as well */
  int64_t pairs; /* of a slab and an offset group that meet: slab + offset_group numbers them */
  int64_t pack_tasks, output_tasks, bias_tasks; /* of an image, and of a series */
  int64_t pieces;                               /* of BIAS_OUTPUTS outputs, of a group */

  DCN_SMALL Backward(const dcn_params &params, int wanted, int num_threads, bool matrix)
      : p(params), slabs(params), frame(params) {
    split = matrix && may_split<A>(p) &&
            chunk_taps(p, slabs) * min(slabs.width, group_in(p)) >= SPLIT_LEAST;
    need_input = wanted & DCN_GRAD_INPUT;
    need_samples_gradient = wanted & (DCN_GRAD_OFFSET | DCN_GRAD_MASK);
    need_weight = wanted & DCN_GRAD_WEIGHT;
    need_bias = wanted & DCN_GRAD_BIAS;
    direct_output = p.layout == DCN_NCHW && p.dtype == (sizeof(A) == 4 ? DCN_FLOAT32 : DCN_FLOAT64);
    direct_pixels = is_direct<A>(p) && p.layout == DCN_NHWC && !is_depthwise(p) &&
                    p.out_channels % Vector<A>::lanes == 0;
    need_lines = need_weight && !is_depthwise(p) && !direct_output;
    late_output = is_depthwise(p) || (slabs.count <= LATE_SLABS && (!need_lines || direct_pixels));
    /* Whether an offset group lies in one slab. */
    const bool one_slab =
        slabs.count == 1 || (slabs.unit <= SLAB && slabs.width % offset_group_in(p) == 0);
    direct_samples = one_slab && is_direct<A>(p);
    small = is_small<A>(p, frame);
    plane = frame.pixels * slabs.pitch + LINE / (int64_t)sizeof(A);
    const int64_t pixels = plane_out(p), taps = taps_of(p), size = (int64_t)sizeof(A);
    output_row = is_depthwise(p) ? slabs.pitch : row_pitch<A>(p.out_channels - Vector<A>::lanes);
    columns_row = is_depthwise(p) ? 0 : columns_pitch(p, slabs);
    chunk = chunk_taps(p, slabs);
    const bool large = group_out(p) >= MANY_OUTPUTS;
    const TileLimits most = large ? LARGE_TILE : split ? SPLIT_TILE : BACKWARD_TILE;
    const int64_t most_bytes = most.bytes, most_pixels = most.pixels * 4 / size;
    tile = columns_row ? most_bytes / (columns_row * size) / ROWS * ROWS : most_pixels;
    tile = max((int64_t)2 * ROWS, min(tile, most_pixels));
    tile = ceil_div(pixels, ceil_div(pixels, tile));
    tiles = ceil_div(pixels, tile);
    bands = 1;
    for (const BandLimits &limits : {BANDS, LARGE_BANDS})
      bands = max(bands, min(limits.owners / slabs.count, pixels / limits.pixels));
    bands = min(bands / 2 * 2 + (bands == 1), tiles); /* as many for each of two threads */
    tile = ceil_div(pixels, round_up(tiles, bands));  /* bands that are equal */
    tiles = ceil_div(pixels, tile);
    tile_pitch = round_up(tile, Vector<A>::lanes);
    output_line = round_up(late_output ? tile : pixels, LINE / size);
    share_row = is_depthwise(p) ? taps * (slabs.pitch + Vector<A>::lanes) : widest_share();
    pairs = slabs.count + p.offset_groups - 1;
    /* The same for every layout, late or not, whatever is wanted: sums are cut by it. */
    int64_t values = slabs.count * plane + (is_depthwise(p) ? 0 : pixels * output_row) +
                     slabs.count * bands * plane;
    if (!direct_samples) values += pairs * 3 * taps * pixels;
    const bool is_small_image = values * size <= SMALL_IMAGE;
    values += slabs.count * bands * group_out(p) * share_row;
    const int64_t image_bytes = values * size;
    const int64_t large_enough = (p.batch * pixels + SERIES_PIXELS / 2) / SERIES_PIXELS;
    series = max(min(MOST_SERIES, BACKWARD_WAVE_BYTES / image_bytes),
                 min(ceil_div(SERIES_TASKS, owners()), large_enough));
    series = max((int64_t)1, min(p.batch, series));
    length = max((int64_t)1, ceil_div(p.batch, series)); /* others have one image less */
    together = is_small_image && (series >= 2 * num_threads || owners() == 1);
    places = together ? 1 : places_for(num_threads, image_bytes);
    alone =
        !together && !is_depthwise(p) && p.batch == 1 && bands == 1 && num_threads <= slabs.count;
    pack_tasks = ceil_div(plane_in(p), PACK_PIXELS) * slabs.count;
    output_tasks =
        late_output || (direct_pixels && !need_lines) ? 0 : ceil_div(pixels, PACK_PIXELS);
    pieces = ceil_div(group_out(p), BIAS_OUTPUTS);
    bias_tasks = need_bias ? ceil_div(p.out_channels, BIAS_OUTPUTS) : 0;
  }

  /* How many series are at work so that all are done first. */
  DCN_SMALL int64_t places_for(int64_t num_threads, int64_t image_bytes) const {
    const auto time = [&](int64_t count) {
      const auto of_wave = [&](int64_t images) { return ceil_div(images * owners(), num_threads); };
      return series / count * of_wave(count) + of_wave(series % count);
    };
    const int64_t most = num_threads * BUSY_WAVE_BYTES / image_bytes;
    int64_t best = max((int64_t)1, min(BACKWARD_WAVE_BYTES / image_bytes, series));
    int64_t least = time(best);
    for (int64_t count = best + 1; count <= min(most, series); count++)
      if (const int64_t one = time(count); one < least) best = count, least = one;
    return best;
  }
  int64_t first_image(int64_t s) const { return p.batch * s / series; } /* of a series */
  int64_t rounds() const { return together ? 1 : ceil_div(series, places); }
  int64_t waves() const { return together ? 1 : rounds() * length; }
  int64_t shares() const { return together ? series : places; } /* of a round */

  int64_t prepare_tasks() const { return pack_tasks + output_tasks; } /* of an image, as below */
  int64_t finish_tasks() const {
    return (need_input ? pack_tasks : 0) + (need_sums() ? p.offset_groups * taps_of(p) : 0);
  }
  bool need_sums() const { return need_samples_gradient && !direct_samples; }
  bool need_columns_gradient() const { return need_input || need_samples_gradient; }
  int64_t owners() const { return slabs.count * bands; }
  int64_t weight_tasks() const {
    return !need_columns_gradient() ? 0 : is_depthwise(p) ? 1 : weight_slabs() * pieces;
  }
  int64_t weight_slabs() const { return alone ? 1 : slabs.count; } /* whose weights there are */
  int64_t output_values() const {
    return late_output || direct_pixels ? 0 : plane_out(p) * output_row;
  }
  int64_t lines_values() const {
    return late_output || !need_lines ? 0 : p.out_channels * output_line;
  }
  int64_t weight_values() const {
    return is_depthwise(p) ? group_out(p) * taps_of(p) * (p.in_channels + Vector<A>::lanes)
                           : weight_slabs() * group_out(p) * share_row;
  }

  /* Columns of one chunk of a block in packed weights and shares: whole panels of two vectors. */
  int64_t chunk_columns(int64_t channels) const {
    return round_up(chunk * channels, 2 * Vector<A>::lanes);
  }
  int64_t block_columns(int64_t channels) const {
    return ceil_div(taps_of(p), chunk) * chunk_columns(channels);
  }
  int64_t widest_share() const {
    int64_t widest = 0;
    for (int64_t slab = 0; slab < slabs.count; slab++) {
      const int64_t end = slabs.end(p, slab);
      int64_t row = 0;
      for (int64_t c = slabs.begin(slab); c < end; c += block_at(p, c, end).count)
        row += block_columns(block_at(p, c, end).count);
      widest = max(widest, row);
    }
    return widest;
  }
};

/* begin .. end - 1: images; or the values of a share of grad_input that are there, the others being zeros
 * nobody wrote. */
struct Range {
  int64_t begin, end;
};

template <class A>
struct BackwardShared {
  A *weight, *slabs, *output, *lines, *input, *sums, *share;
  A *total;       /* grad_weight of earlier rounds, where its own memory is of another type */
  Range *touched; /* of each share of grad_input */
  double *bias;
  /* What no other task sees comes from the thread's scratch. */
  DCN_SMALL BackwardShared(const Backward<A> &b, Arena &arena, Arena &scratch) {
    const dcn_params &p = b.p;
    const int64_t pixels = plane_out(p), places = b.places;
    Arena &images = b.together ? scratch : arena, &weights = b.alone ? scratch : arena;
    weight = weights.take<A>(b.weight_values());
    slabs = images.take<A>(places * b.slabs.count * b.plane);
    output = images.take<A>(places * b.output_values());
    lines = images.take<A>(places * b.lines_values());
    input = images.take<A>(b.need_input ? places * b.owners() * b.plane : 0);
    sums = images.take<A>(b.need_sums() ? places * b.pairs * 3 * taps_of(p) * pixels : 0);
    touched = images.take<Range>(b.need_input ? places * b.owners() : 0);
    /* Transposed from where it is, in whole vectors: one more. */
    const int64_t shares = b.need_weight ? b.shares() * b.weight_slabs() * b.bands : 0;
    share = weights.take<A>(shares ? shares * group_out(p) * b.share_row + Vector<A>::lanes : 0);
    total = arena.take<A>(b.need_weight && b.rounds() > 1 && !is_direct<A>(p)
                              ? p.out_channels * group_in(p) * taps_of(p)
                              : 0);
    bias = arena.take<double>(b.need_bias ? b.series * 2 * p.out_channels : 0);
  }
};

template <class A>
struct BackwardScratch {
  Tile<A> tile;
  Corners<A> corners;
  A *row, *turned; /* an output's weights of a slab, before and behind a transposition */
  A *columns, *products;
  A *output; /* of a tile, if late; or its lines */
  SplitScratch product;
  DCN_SMALL BackwardScratch(const Backward<A> &b, Arena &arena)
      : tile(arena, b.tile_pitch),
        corners(arena, b.chunk * b.tile_pitch, true),
        product(arena, b.split ? SPLIT_PASS : 0) {
    const int64_t values = SLAB * taps_of(b.p) + Vector<A>::lanes;
    row = arena.take<A>(max(SUM_RUN, values));
    turned = arena.take<A>(values);
    columns = arena.take<A>(b.tile * b.columns_row);
    products = arena.take<A>(4 * b.chunk * b.tile_pitch);
    const int64_t late = b.direct_pixels ? b.p.out_channels * b.output_line : b.tile * b.output_row;
    output = arena.take<A>(b.late_output ? late + Vector<A>::lanes : 0);
  }
};

/* Weights of BIAS_OUTPUTS outputs of a slab's groups for h:
 * [block][chunk][panel][output][2 vectors of columns], zeros behind a chunk's last column. */
template <class A>
static void pack_slab_weights(const Backward<A> &b, const void *weight, int64_t slab, int64_t piece,
                              A *to, const BackwardScratch<A> &s) {
  const dcn_params &p = b.p;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t taps = taps_of(p), outputs = group_out(p), channels = group_in(p);
  const int64_t first = piece * BIAS_OUTPUTS, last = min(first + BIAS_OUTPUTS, outputs);
  const int64_t end = b.slabs.end(p, slab);
  for (int64_t c = b.slabs.begin(slab); c < end;) {
    const Block block = block_at(p, c, end);
    const int64_t values = block.count * taps, chunk_columns = b.chunk_columns(block.count);
    for (int64_t o = first; o < last; o++) {
      const int64_t at = ((block.group * outputs + o) * channels + c % channels) * taps;
      const A *row = (const A *)weight + at;
      if (is_direct<A>(p) && at + values + L <= p.out_channels * channels * taps) {
        if (o + 1 < last) /* the next output's weights lie far from these */
          for (int64_t i = 0; i < values; i += LINE / (int64_t)sizeof(A))
            prefetch(row + channels * taps + i);
      } else {
        read_row(weight, p.dtype, at, 1, values, s.row);
        row = s.row;
      }
      transpose_rows(row, block.count, taps, s.turned);
      for (int64_t tap = 0; tap < taps; tap += b.chunk) {
        const int64_t columns = min(b.chunk, taps - tap) * block.count;
        const A *from = s.turned + tap * block.count;
        A *panel = to + tap / b.chunk * chunk_columns * outputs + o * 2 * L;
        for (int64_t i = 0; i < chunk_columns; i += 2 * L, panel += outputs * 2 * L)
          for (int64_t j = 0; j < 2 * L; j += L)
            store(panel + j, keep<A>(first_lanes<A>((int)max((int64_t)0, min(L, columns - i - j))),
                                     load(from + min(i + j, columns))));
      }
    }
    to += b.block_columns(block.count) * outputs;
    c += block.count;
  }
}

/* Where one image's grad_output lies as [output][pixel], from pixel `first` on. */
template <class A>
struct Lines {
  const A *at;
  int64_t pitch;
  Lines(const Backward<A> &b, const dcn_tensors &tensors, const BackwardShared<A> &shared,
        int64_t image, int64_t place, int64_t first, const A *late) {
    pitch = b.direct_output ? plane_out(b.p) : b.output_line;
    at = b.direct_output ? (const A *)tensors.grad_output + image * b.p.out_channels * pitch + first
         : b.late_output ? late
                         : shared.lines + place * b.p.out_channels * pitch + first;
  }
};

/* Where grad_mask and grad_offset of an offset group are summed; null if nobody wants them. */
template <class A>
struct SampleSums {
  A *mask, *offset_y, *offset_x;
  int64_t mask_tap, offset_tap; /* values from one tap to the next */

  SampleSums(const Backward<A> &b, const dcn_tensors &tensors, const A *sums, int64_t image,
             int64_t place, int64_t slab, int64_t offset_group) {
    const int64_t plane = plane_out(b.p), all = taps_of(b.p) * plane;
    if (b.direct_samples) {
      const int64_t group = image * b.p.offset_groups + offset_group;
      mask = tensors.grad_mask ? (A *)tensors.grad_mask + group * all : nullptr;
      offset_y = tensors.grad_offset ? (A *)tensors.grad_offset + group * 2 * all : nullptr;
      offset_x = offset_y + plane;
      mask_tap = plane;
      offset_tap = 2 * plane;
    } else {
      mask = (A *)sums + (place * b.pairs + slab + offset_group) * 3 * all;
      offset_y = mask + all;
      offset_x = offset_y + all;
      mask_tap = offset_tap = plane;
    }
  }
};

/* The weighted sums over q: products [tap][tile][4] -> += grad_mask and grad_offset of taps tap .. from
 * pixel `first` on, whole vectors of pixels. */
template <class A>
static void add_sample_gradients(const Corners<A> &corners, const A *products, int64_t tap,
                                 int64_t taps, int64_t tile, int64_t first_pixel, int64_t pixels,
                                 const SampleSums<A> &sums, bool first) {
  typedef typename Vector<A>::V V;
  typedef typename Corners<A>::I I;
  constexpr int64_t L = Vector<A>::lanes;
  const auto add = [first](A *to, V v, int64_t count) {
    if (count >= L) return store(to, first ? v : load(to) + v);
    A part[L];
    store(part, v);
    for (int64_t j = 0; j < count; j++) to[j] = first ? part[j] : to[j] + part[j];
  };
  for (int64_t t = 0; t < taps; t++)
    for (int64_t i = 0; i < pixels; i += L) {
      const int64_t at = t * tile + i;
      const int64_t mask_at = (tap + t) * sums.mask_tap + first_pixel + i;
      const int64_t offset_at = (tap + t) * sums.offset_tap + first_pixel + i;
      V d[4];
      load_parts<A>(products + 4 * at, d);
      const V ly = load(corners.fraction[0] + at), lx = load(corners.fraction[1] + at);
      const V m = load(corners.mask + at), nan = load(corners.weight + at), one = splat(A(1));
      const V value = mixed<V>(ly, mixed<V>(lx, d[3], one - lx, d[2]), one - ly,
                               mixed<V>(lx, d[1], one - lx, d[0]));
      const V dy = m * mixed<V>(one - lx, d[2] - d[0], lx, d[3] - d[1]);
      const V dx = m * mixed<V>(one - ly, d[1] - d[0], ly, d[3] - d[2]);
      const auto inside = lanes_equal<A, I>(corners.state + at, INSIDE);
      const auto moves = inside | lanes_equal<A, I>(corners.state + at, EDGE);
      /* Weights are NaN in that state alone. */
      const V other = keep<A>(lanes_equal<A, I>(corners.state + at, NOT_A_NUMBER), nan);
      if (sums.mask) add(sums.mask + mask_at, pick<A>(inside, value, other), pixels - i);
      if (!sums.offset_y) continue;
      add(sums.offset_y + offset_at, pick<A>(moves, dy, other), pixels - i);
      add(sums.offset_x + offset_at, pick<A>(moves, dx, other), pixels - i);
    }
}

/* Makes the pixels around the corners of a chunk part of a share of grad_input. What lies outside
 * scatters to `nowhere`, whose pixels belong to no range and are read by nobody. */
template <class A>
static void touch(const Corners<A> &corners, int64_t taps, int64_t tile, int64_t pixels,
                  int64_t nowhere, int64_t length, A *input, Range &range) {
  int64_t first = nowhere, last = -1;
  for (int64_t t = 0; t < taps; t++)
    for (int64_t i = 0; i < pixels; i++) {
      const int64_t at = corners.at[t * tile + i], inside = at < nowhere ? at : -1;
      first = min(first, at);
      last = max(last, inside);
    }
  if (last < 0) return;
  if (range.begin == range.end) range.begin = range.end = first;
  for (; range.end < last + length; range.end++) input[range.end] = 0;
  if (first < range.begin) {
    for (int64_t i = first; i < range.begin; i++) input[i] = 0;
    range.begin = first;
  }
}

/* `gemm` of `columns` columns. */
template <class A>
static void multiply(const Backward<A> &b, int64_t rows, int64_t columns, int64_t depth, const A *a,
                     int64_t lda, const A *panels, int64_t ldb, int64_t panel_step, A *c,
                     int64_t ldc, bool accumulate, int b_parts, const BackwardScratch<A> &s) {
  if constexpr (SPLITS<A>)
    if (b.split)
      return gemm_split(rows, columns, depth, a, lda, panels, ldb, panel_step, c, ldc, accumulate,
                        {parts_of(b.p), b_parts}, s.product);
  gemm(rows, ceil_div(columns, (int64_t)Vector<A>::lanes), depth, a, lda, panels, ldb, panel_step,
       c, ldc, accumulate);
}

template <class A>
static void backward_band(const Backward<A> &b, const dcn_tensors &tensors,
                          const BackwardShared<A> &shared, int64_t image, int64_t place,
                          int64_t share_of, int64_t slab, int64_t band, bool first_of_series,
                          const BackwardScratch<A> &s) {
  const dcn_params &p = b.p;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t taps = taps_of(p), outputs = group_out(p), all_pixels = plane_out(p);
  const int64_t slab_begin = b.slabs.begin(slab), slab_end = b.slabs.end(p, slab);
  const int64_t owner = (place * b.slabs.count + slab) * b.bands + band;
  const int64_t weight_slab = b.alone ? 0 : slab;
  const int64_t sharer = (share_of * b.weight_slabs() + weight_slab) * b.bands + band;
  const bool depthwise = is_depthwise(p);
  const A *packed = shared.slabs + (place * b.slabs.count + slab) * b.plane;
  const A *weight = shared.weight + weight_slab * outputs * b.share_row;
  A *input = b.need_input ? shared.input + owner * b.plane : nullptr;
  A *share = b.need_weight ? shared.share + sharer * outputs * b.share_row : nullptr;
  const Steps steps(b.frame, b.slabs.pitch);
  const int64_t nowhere = b.frame.nowhere * b.slabs.pitch;
  Range touched = {0, 0};
  if (input)
    for (int64_t i = nowhere; i < b.plane; i++) input[i] = 0;
  if (share && depthwise && first_of_series)
    for (int64_t i = 0; i < outputs * b.share_row; i++) share[i] = 0;

  const int64_t first_tile = b.tiles * band / b.bands, last_tile = b.tiles * (band + 1) / b.bands;
  for (int64_t tile = first_tile; tile < last_tile; tile++) {
    const int64_t first = tile * b.tile, pixels = min(b.tile, all_pixels - first);
    tile_positions(p, first, pixels, s.tile);
    const Lines<A> lines(b, tensors, shared, image, place, first, s.output);
    const A *output = shared.output + (place * all_pixels + first) * b.output_row;
    int64_t output_row = b.output_row;
    if (b.direct_pixels) {
      output_row = p.out_channels;
      output = (const A *)tensors.grad_output + (image * all_pixels + first) * output_row;
      if (b.late_output && b.need_lines)
        turn_pixels(output, output_row, pixels, p.out_channels, s.output, b.output_line);
    } else if (b.late_output) {
      output = s.output;
      if (!depthwise)
        pack_pixels(tensors.grad_output, p, p.out_channels, all_pixels, image, 0, 1, p.out_channels,
                    first, pixels, s.output, output_row);
    }
    int64_t column =
        0; /* of the offset group's first block in the slab's packed weights and shares */
    for (int64_t c = slab_begin; c < slab_end;) {
      const int64_t offset_group = c / offset_group_in(p);
      const int64_t end = min(slab_end, (offset_group + 1) * offset_group_in(p));
      const SampleSums<A> sums(b, tensors, shared.sums, image, place, slab, offset_group);
      int64_t next_column = column;
      for (int64_t tap = 0; tap < taps; tap += b.chunk) {
        const int64_t count = min(b.chunk, taps - tap);
        const bool special =
            chunk_corners<A, true>(p, tensors, b.frame, b.small, image, offset_group, tap, count,
                                   first, pixels, b.tile_pitch, s.tile, b.slabs.pitch, s.corners);
        if (input)
          touch(s.corners, count, b.tile_pitch, pixels, nowhere, steps.both + b.slabs.pitch, input,
                touched);
        next_column = column;
        for (int64_t begin = c; begin < end;) {
          const Block block = block_at(p, begin, end);
          const int64_t rounds = depthwise ? outputs : 1;
          for (int64_t j = 0; j < rounds; j++) {
            Scatter<A> scatter;
            scatter.slab = packed + begin - slab_begin;
            scatter.input = input ? input + begin - slab_begin : nullptr;
            scatter.products = b.need_samples_gradient ? s.products : nullptr;
            scatter.channels = block.count;
            if (depthwise) {
              pack_pixels(tensors.grad_output, p, p.out_channels, all_pixels, image,
                          begin * outputs + j, outputs, block.count, first, pixels, s.output,
                          b.output_row);
              const int64_t weight_row = p.in_channels + L;
              const int64_t share_tap = b.slabs.pitch + L;
              scatter_depthwise(
                  scatter, steps, s.corners, special, count, b.tile_pitch, pixels, output,
                  b.output_row, shared.weight + (j * taps + tap) * weight_row + begin, weight_row,
                  share ? share + j * b.share_row + tap * share_tap + begin - slab_begin : nullptr,
                  share_tap);
            } else {
              const int64_t chunk_column =
                  next_column + tap / b.chunk * b.chunk_columns(block.count);
              if (b.need_columns_gradient())
                multiply(b, pixels, count * block.count, outputs, output + block.group * outputs,
                         output_row, weight + chunk_column * outputs, 2 * L, outputs * 2 * L,
                         s.columns, b.columns_row, false, parts_of(p), s);
              scatter_block(scatter, steps, s.corners, special, count, b.tile_pitch, pixels,
                            s.columns, b.columns_row, b.need_weight);
              if (share)
                multiply(b, outputs, count * block.count, pixels,
                         lines.at + block.group * outputs * lines.pitch, lines.pitch, s.columns,
                         b.columns_row, 2 * L, share + chunk_column, b.share_row,
                         !first_of_series || tile > first_tile, ALL_PARTS, s);
            }
            if (b.need_samples_gradient)
              add_sample_gradients(s.corners, s.products, tap, count, b.tile_pitch, first, pixels,
                                   sums, begin == c && j == 0);
          }
          begin += block.count;
          next_column += b.block_columns(block.count);
        }
      }
      column = next_column;
      c = end;
    }
  }
  if (input) shared.touched[owner] = touched;
}

/* The sum of a run: 32 interleaved sums, then a tree, so that errors hardly grow with the count. */
template <class A>
static A sum_run(const A *row, int64_t count) {
  constexpr int64_t L = Vector<A>::lanes, WAYS = 32;
  typename Vector<A>::V part[WAYS / L] = {};
  const auto add = [&part](const A *from) {
#pragma GCC unroll 32
    for (int64_t j = 0; j < WAYS / L; j++) part[j] += load(from + j * L);
  };
  int64_t i = 0;
  for (; i + WAYS <= count; i += WAYS) add(row + i);
  if (i < count) {
    A rest[WAYS] = {};
    for (int64_t j = 0; i + j < count; j++) rest[j] = row[i + j];
    add(rest);
  }
#pragma GCC unroll 32
  for (int64_t width = WAYS / L / 2; width; width /= 2)
#pragma GCC unroll 32
    for (int64_t j = 0; j < width; j++) part[j] += part[j + width];
  return fold<A>(part[0]);
}

/* The same of `width` outputs, from [pixel][output] in storage type: the same sums, side by side. */
template <class A>
static void sum_pixels(const void *memory, int dtype, int64_t index, int64_t step, int64_t count,
                       int64_t width, A *sums) {
  A part[32][BIAS_OUTPUTS] = {}, row[BIAS_OUTPUTS] = {};
  for (int64_t i = 0; i < count; i++) {
    read_row(memory, dtype, index + i * step, 1, width, row);
    for (int64_t j = 0; j < BIAS_OUTPUTS; j++) part[i % 32][j] += row[j];
  }
  for (int64_t ways = 16; ways; ways /= 2)
    for (int64_t i = 0; i < ways; i++)
      for (int64_t j = 0; j < BIAS_OUTPUTS; j++) part[i][j] += part[i + ways][j];
  for (int64_t j = 0; j < width; j++) sums[j] = part[0][j];
}

/* total += one, with the rounding error in `error`. */
DCN_INLINE void add_exactly(double one, double &total, double &error) {
  const double sum = total + one, kept = sum - total;
  error += (total - (sum - kept)) + (one - kept);
  total = sum;
}

/* grad_bias of BIAS_OUTPUTS outputs of some images of a series: runs in A, their total in double with its
 * rounding errors kept: `sums` holds total and error of every output. */
template <class A>
static void sum_bias(const Backward<A> &b, const dcn_tensors &tensors, double *sums, int64_t piece,
                     int64_t first_image, int64_t last_image, bool first_of_series, A *row) {
  const dcn_params &p = b.p;
  const int64_t begin = piece * BIAS_OUTPUTS, width = min(BIAS_OUTPUTS, p.out_channels - begin);
  const int64_t plane = plane_out(p);
  sums += 2 * begin;
  if (first_of_series)
    for (int64_t j = 0; j < 2 * width; j++) sums[j] = 0;
  for (int64_t image = first_image; image < last_image; image++)
    for (int64_t first = 0; first < plane; first += SUM_RUN) {
      const int64_t count = min(SUM_RUN, plane - first);
      A value[BIAS_OUTPUTS];
      if (p.layout == DCN_NHWC) {
        sum_pixels(tensors.grad_output, p.dtype, (image * plane + first) * p.out_channels + begin,
                   p.out_channels, count, width, value);
      } else {
        for (int64_t j = 0; j < width; j++) {
          const int64_t at = (image * p.out_channels + begin + j) * plane + first;
          const A *run = (const A *)tensors.grad_output + at;
          if (!b.direct_output)
            read_row(tensors.grad_output, p.dtype, at, 1, count, row), run = row;
          value[j] = sum_run(run, count);
        }
      }
      for (int64_t j = 0; j < width; j++)
        add_exactly((double)value[j], sums[2 * j], sums[2 * j + 1]);
    }
}

/* grad_bias of BIAS_OUTPUTS outputs: the sum of all series. */
template <class A>
DCN_COLD static void finish_bias(const Backward<A> &b, const dcn_tensors &tensors,
                                 const double *sums, int64_t piece) {
  const dcn_params &p = b.p;
  for (int64_t o = piece * BIAS_OUTPUTS; o < min((piece + 1) * BIAS_OUTPUTS, p.out_channels); o++) {
    double total = 0, error = 0;
    for (int64_t s = 0; s < b.series; s++) {
      const double *sum = sums + (s * p.out_channels + o) * 2;
      add_exactly(sum[0], total, error);
      error += sum[1];
    }
    /* An infinite or NaN total has no error to add. */
    const A rounded = (A)(total - total == 0 ? total + error : total);
    write_row(tensors.grad_bias, p.dtype, o, 1, 1, &rounded);
  }
}

/* grad_input of a piece of one slab: the sum of its bands, as far as they were touched. */
template <class A>
static void finish_input(const Backward<A> &b, const dcn_tensors &tensors, A *input,
                         const Range *touched, int64_t image, int64_t slab, int64_t piece) {
  const dcn_params &p = b.p;
  const int64_t first = piece * PACK_PIXELS, pixels = min(PACK_PIXELS, plane_in(p) - first);
  const int64_t from = FrameWalk(b.frame, first).at * b.slabs.pitch;
  const int64_t to = FrameWalk(b.frame, first + pixels - 1).at * b.slabs.pitch + b.slabs.pitch;
  for (int64_t i = from; i < min(to, touched[0].begin); i++) input[i] = 0;
  for (int64_t i = max(from, touched[0].end); i < to; i++) input[i] = 0;
  for (int64_t band = 1; band < b.bands; band++) {
    const A *other = input + band * b.plane;
    const int64_t end = min(to, touched[band].end);
    for (int64_t i = max(from, touched[band].begin); i < end; i++) input[i] += other[i];
  }
  const int64_t begin = b.slabs.begin(slab);
  write_frame(tensors.grad_input, p, b.frame, image, begin, b.slabs.end(p, slab) - begin, first,
              pixels, input, b.slabs.pitch);
}

/* grad_offset and grad_mask of one tap of one offset group: the sum of its slabs. */
template <class A>
static void finish_samples(const Backward<A> &b, const dcn_tensors &tensors, const A *sums,
                           int64_t image, int64_t offset_group, int64_t tap, A *row) {
  const dcn_params &p = b.p;
  const int64_t taps = taps_of(p), plane = plane_out(p);
  const int64_t begin = offset_group * offset_group_in(p), end = begin + offset_group_in(p);
  const int64_t k = (image * p.offset_groups + offset_group) * taps + tap;
  void *to[3] = {tensors.grad_mask, tensors.grad_offset, tensors.grad_offset};
  const int64_t index[3] = {k * plane, 2 * k * plane, (2 * k + 1) * plane};
  for (int part = 0; part < 3; part++) {
    if (!to[part]) continue;
    for (int64_t first = 0; first < plane; first += SUM_RUN) {
      const int64_t count = min(SUM_RUN, plane - first);
      bool started = false;
      for (int64_t slab = 0; slab < b.slabs.count; slab++) {
        if (b.slabs.end(p, slab) <= begin || b.slabs.begin(slab) >= end) continue;
        const A *from =
            sums + ((slab + offset_group) * 3 + part) * taps * plane + tap * plane + first;
        for (int64_t i = 0; i < count; i++) row[i] = started ? row[i] + from[i] : from[i];
        started = true;
      }
      write_row(to[part], p.dtype, index[part] + first, 1, count, row);
    }
  }
}

/* grad_weight of BIAS_OUTPUTS outputs per group of one slab: the sum of its owners' shares, added to that of
 * earlier rounds. */
template <class A>
static void finish_weight(const Backward<A> &b, const dcn_tensors &tensors,
                          const BackwardShared<A> &shared, int64_t round, int64_t slab,
                          int64_t piece, const BackwardScratch<A> &s) {
  const dcn_params &p = b.p;
  const int64_t taps = taps_of(p), outputs = group_out(p), channels = group_in(p);
  const int64_t slab_begin = b.slabs.begin(slab), slab_end = b.slabs.end(p, slab);
  const int64_t first = piece * BIAS_OUTPUTS, last = min(first + BIAS_OUTPUTS, outputs);
  const int64_t shares = p.batch ? min(b.shares(), b.series - round * b.shares()) : 0;
  const int64_t share_step = b.owners() * outputs * b.share_row;
  const bool depthwise = is_depthwise(p), unfinished = round < b.rounds() - 1;
  A *total = is_direct<A>(p) ? (A *)tensors.grad_weight : shared.total;
  const A *share = shared.share + (b.alone ? 0 : slab * b.bands * outputs * b.share_row);
  /* A run: columns that lie together in a share; runs of a row are `run_step` apart. */
  const int64_t run_taps = depthwise ? 1 : b.chunk;
  int64_t column = 0;
  for (int64_t c = slab_begin; c < slab_end;) {
    const Block block = block_at(p, c, slab_end);
    const int64_t run_step =
        depthwise ? b.slabs.pitch + Vector<A>::lanes : b.chunk_columns(block.count);
    /* Channels that lie together in grad_weight. */
    const int64_t together = depthwise ? 1 : block.count, values = together * taps;
    const size_t bytes = (size_t)values * sizeof(A);
    for (int64_t o = first; o < last; o++) {
      const auto weight_at = [&](int64_t i) {
        return depthwise ? ((c + i) * outputs + o) * taps
                         : ((block.group * outputs + o) * channels + c % channels) * taps;
      };
      const A *row = s.row;
      if (shares && b.series * b.bands == 1 && run_taps == taps)
        row = share + o * b.share_row + column;
      if (round) {
        for (int64_t i = 0; i < block.count; i += together)
          __builtin_memcpy(s.turned + i * taps, total + weight_at(i), bytes);
        transpose_rows(s.turned, block.count, taps, s.row);
      }
      for (int64_t k = 0; k < taps && row == s.row; k += run_taps) {
        const A *from = share + o * b.share_row + column + k / run_taps * run_step;
        const int64_t count = min(run_taps, taps - k) * block.count;
        A *sum = s.row + k * block.count;
        for (int64_t i = 0; i < count && !round; i++) sum[i] = 0;
        for (int64_t share_of = 0; share_of < shares; share_of++)
          for (int64_t band = 0; band < b.bands; band++) {
            const A *other = from + share_of * share_step + band * outputs * b.share_row;
            for (int64_t i = 0; i < count; i++) sum[i] += other[i];
          }
      }
      transpose_rows(row, taps, block.count, s.turned);
      for (int64_t i = 0; i < block.count; i += together)
        if (unfinished)
          __builtin_memcpy(total + weight_at(i), s.turned + i * taps, bytes);
        else
          write_row(tensors.grad_weight, p.dtype, weight_at(i), 1, values, s.turned + i * taps);
    }
    column += depthwise ? block.count : b.block_columns(block.count);
    c += block.count;
  }
}

template <class A>
DCN_COLD static void backward_plan(const dcn_params &p, int wanted, int num_threads, bool matrix,
                                   dcn_cpu_plan *plan) {
  const Backward<A> b(p, wanted, num_threads, matrix);
  Arena shared = {nullptr, 0}, scratch = {nullptr, 0};
  BackwardScratch<A>(b, scratch);
  BackwardShared<A>(b, shared, scratch);
  plan->waves = b.waves();
  plan->phases = 4;
  plan->tasks[0] = b.shares() * b.bias_tasks + (b.alone ? 0 : b.weight_tasks());
  plan->tasks[1] = b.shares();
  plan->tasks[2] = 0;
  plan->tasks[3] = (b.need_weight && !b.alone ? b.slabs.count * b.pieces : 0) + b.bias_tasks;
  if (!b.together) {
    plan->tasks[0] += b.places * b.prepare_tasks();
    plan->tasks[1] *= b.owners();
    plan->tasks[2] = b.places * b.finish_tasks();
  }
  plan->shared_bytes = shared.used;
  plan->scratch_bytes = scratch.used;
  plan->internal = (int64_t)num_threads << 9 | matrix << 8 | wanted;
}

/* A task of phase 0 that belongs to one image. */
template <class A>
static void prepare_image(const Backward<A> &b, const dcn_tensors &tensors,
                          const BackwardShared<A> &shared, int64_t image, int64_t place,
                          int64_t task) {
  const dcn_params &p = b.p;
  if (task < b.pack_tasks) {
    const int64_t slab = task % b.slabs.count;
    return pack_slab(p, b.slabs, b.frame, tensors.input, image, slab, task / b.slabs.count,
                     shared.slabs + (place * b.slabs.count + slab) * b.plane);
  }
  const int64_t first = (task - b.pack_tasks) * PACK_PIXELS;
  const int64_t pixels = min(PACK_PIXELS, plane_out(p) - first);
  const A *output = (const A *)tensors.grad_output;
  int64_t output_row = p.out_channels, at = image * plane_out(p) + first;
  if (!b.direct_pixels) {
    output = shared.output, output_row = b.output_row, at = place * plane_out(p) + first;
    pack_pixels(tensors.grad_output, p, p.out_channels, plane_out(p), image, 0, 1, p.out_channels,
                first, pixels, shared.output + at * output_row, output_row);
  }
  if (!b.need_lines) return;
  A *lines = shared.lines + place * p.out_channels * b.output_line + first;
  if (p.layout == DCN_NHWC)
    turn_pixels(output + at * output_row, output_row, pixels, p.out_channels, lines, b.output_line);
  else
    for (int64_t o = 0; o < p.out_channels; o++)
      read_row(tensors.grad_output, p.dtype, (image * p.out_channels + o) * plane_out(p) + first, 1,
               pixels, lines + o * b.output_line);
}

/* A task of phase 2, all of which belong to one image. */
template <class A>
static void finish_image(const Backward<A> &b, const dcn_tensors &tensors,
                         const BackwardShared<A> &shared, int64_t image, int64_t place,
                         int64_t task, A *row) {
  const int64_t input_tasks = b.need_input ? b.pack_tasks : 0, taps = taps_of(b.p);
  if (task < input_tasks) {
    const int64_t slab = task % b.slabs.count;
    const int64_t owner = place * b.owners() + slab * b.bands;
    return finish_input(b, tensors, shared.input + owner * b.plane, shared.touched + owner, image,
                        slab, task / b.slabs.count);
  }
  task -= input_tasks;
  finish_samples(b, tensors, shared.sums + place * b.pairs * 3 * taps * plane_out(b.p), image,
                 task / taps, task % taps, row);
}

template <class A>
static void backward_run(const dcn_cpu_call &call, int64_t wave, int64_t phase, int64_t task,
                         void *memory) {
  const dcn_params &p = *call.params;
  const dcn_tensors &tensors = *call.tensors;
  const int64_t internal = call.plan->internal;
  const Backward<A> b(p, (int)(internal & 0xff), (int)(internal >> 9), internal >> 8 & 1);
  Arena shared_arena = {(char *)call.shared, 0}, arena = {(char *)memory, 0};
  const BackwardScratch<A> s(b, arena);
  const BackwardShared<A> shared(b, shared_arena, arena);
  const int64_t round = wave / b.length, step = b.together ? 0 : wave % b.length;
  const bool round_ends = b.together || step == b.length - 1;
  /* The wave's images of the series in a place: none, one, or, together, all. */
  const auto series_at = [&](int64_t place) { return round * b.shares() + place; };
  const auto images_at = [&](int64_t place) {
    const int64_t s = series_at(place);
    if (s >= b.series) return Range{0, 0};
    const Range all = {b.first_image(s), b.first_image(s + 1)};
    return b.together ? all : Range{all.begin + step, min(all.begin + step + 1, all.end)};
  };
  switch (phase) {
    case 0: {
      if (task < b.shares() * b.bias_tasks) {
        const int64_t place = task / b.bias_tasks;
        const Range images = images_at(place);
        if (series_at(place) < b.series)
          sum_bias(b, tensors, shared.bias + series_at(place) * 2 * p.out_channels,
                   task % b.bias_tasks, images.begin, images.end, step == 0, s.row);
        return;
      }
      task -= b.shares() * b.bias_tasks;
      if (!b.alone && task < b.weight_tasks()) {
        if (wave > 0) return;
        if (is_depthwise(p)) return pack_depthwise_weight(p, tensors.weight, shared.weight);
        const int64_t slab = task / b.pieces;
        return pack_slab_weights(b, tensors.weight, slab, task % b.pieces,
                                 shared.weight + slab * group_out(p) * b.share_row, s);
      }
      if (!b.alone) task -= b.weight_tasks();
      const int64_t place = task / b.prepare_tasks();
      const Range images = images_at(place);
      if (images.begin < images.end)
        prepare_image(b, tensors, shared, images.begin, place, task % b.prepare_tasks());
      return;
    }
    case 1: {
      if (b.alone) {
        for (int64_t i = 0; i < b.weight_tasks(); i++)
          pack_slab_weights(b, tensors.weight, task, i, shared.weight, s);
        backward_band(b, tensors, shared, 0, 0, 0, task, 0, true, s);
        for (int64_t i = 0; b.need_weight && i < b.pieces; i++)
          finish_weight(b, tensors, shared, 0, task, i, s);
        return;
      }
      if (!b.together) {
        const int64_t place = task / b.owners(), slab = task % b.owners() / b.bands;
        const Range images = images_at(place);
        if (images.begin < images.end)
          backward_band(b, tensors, shared, images.begin, place, place, slab, task % b.bands,
                        step == 0, s);
        return;
      }
      const Range images = images_at(task);
      for (int64_t image = images.begin; image < images.end; image++) {
        for (int64_t i = 0; i < b.prepare_tasks(); i++)
          prepare_image(b, tensors, shared, image, 0, i);
        for (int64_t i = 0; i < b.owners(); i++)
          backward_band(b, tensors, shared, image, 0, task, i / b.bands, i % b.bands,
                        image == images.begin, s);
        for (int64_t i = 0; i < b.finish_tasks(); i++)
          finish_image(b, tensors, shared, image, 0, i, s.row);
      }
      return;
    }
    case 2: {
      const int64_t place = task / b.finish_tasks();
      const Range images = images_at(place);
      if (images.begin < images.end)
        finish_image(b, tensors, shared, images.begin, place, task % b.finish_tasks(), s.row);
      return;
    }
    default: {
      if (!round_ends) return;
      if (task >= b.bias_tasks) {
        task -= b.bias_tasks;
        finish_weight(b, tensors, shared, round, task / b.pieces, task % b.pieces, s);
      } else if (round == b.rounds() - 1) {
        finish_bias(b, tensors, shared.bias, task);
      }
    }
  }
}

}  // namespace DCN_ISA
#endif
