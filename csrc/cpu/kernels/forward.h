/* Forward: sample a tile of columns, multiply it at once, add the bias, write the tile.
 *
 *   y[n, o, p0] = b[o] + sum_{c, k} w[o, c, k] m[n, k, p0] S(x[n, c]; p0 s - pad + k d + offset)
 *
 * Zhu et al. 2019, equation 1 (Dai et al. 2017, equation 2, where m = 1). Without offsets: a plain
 * convolution, equation 1 of Dai et al.
 *
 * Phases of a wave of images
 *   0  weights -> panels [group][panel][depth][2 vectors of outputs]   (first wave only)
 *      images  -> slabs  [image][slab][pixel of the frame][pitch]
 *   1  tiles: every channel and output of `tile` pixels of one image
 *
 * A tile is sampled and multiplied strip by strip: the columns of a strip are read again while they are
 * in the first-level cache or next to it, and the weights, which every strip reads, stay in the second.
 *
 * By the matrix unit (`split`): up to 288 columns of the whole tile are sampled, straight into the parts that
 * the unit takes, and then multiplied. Blocks have up to 32 channels there. Weights are packed as the unit
 * takes them, or, where that would take megabytes more, split each time.
 *
 * Weights that meet one tile only (two in float64) are not worth a copy in memory: each panel is packed
 * where its tile multiplies it, into the cache, after the whole tile is sampled (`late`). Threads share
 * the panels.
 *
 * Layouts, in the thread's scratch
 *   columns [strip, late: tile][columns_pitch]     up to 576 columns: tap-major, a block's channels innermost
 *   strips  [32 pixels of the tile][32 columns][part]   the same for the matrix unit
 *   result  [tile][groups * padded_out]
 *
 * Sums: per output element over (offset group, chunk, block, tap, channel), always in this order.
 * Scratch: (strip * columns + tile * outputs) * sizeof(A), plus the corners of a chunk. With the matrix
 * unit tile * 288 * 6 bytes, at most 390 kB, in place of the columns.
 */
#ifndef DCN_FORWARD_H
#define DCN_FORWARD_H

#include "layout.h"
#include "sample_split.h"

namespace DCN_ISA {

static_assert(MOST_PIXELS % BLOCK == 0,
              "a tile that is rounded up to the matrix unit's strips has room");

constexpr int64_t WAVE_SHARE = 512 << 10; /* packed images of a wave, for each thread */
constexpr int64_t PACK_PIXELS = 256;      /* pixels of one packing task */
/* The result of a tile, and its bytes a column. */
constexpr int64_t TILE_BYTES = 512 << 10;
constexpr int64_t TILE_COLUMN = MOST_PIXELS * 4;
constexpr int64_t STRIP = DCN_VECTOR_BYTES == 64 ? 2 * ROWS : 8 * ROWS; /* pixels */
constexpr int64_t TILE_COST = 16;       /* what a tile takes beside its pixels, in pixels */
constexpr int64_t LATE_BYTES = 1 << 20; /* weights from which on they may be packed late */
constexpr int PIECES = 16;              /* blocks that are multiplied together */
/* Weights that are split once for all tiles, to half as much again. */
constexpr int64_t SPLIT_WEIGHTS = 1 << 20;
constexpr int64_t SPLIT_COLUMNS = DEPTH / 2; /* that the matrix unit takes at a time */
/* Multiply-adds of a tile that keep the matrix unit busy for long enough: a larger tile takes memory alone,
 * unless all tiles read more weights than the second-level cache holds. */
constexpr int64_t SPLIT_WORK = 80 * 128 * SPLIT_COLUMNS, CACHED_WEIGHTS = 1 << 20;

template <class A>
struct Forward {
  const dcn_params &p;
  Slabs<A> slabs;
  Frame frame;
  bool small;           /* positions and indices fit into A's integers */
  int64_t plane;        /* values of one packed slab of one image, slack included */
  int64_t padded_out;   /* outputs of a group, rounded up to whole vectors */
  int64_t panels;       /* panels of a group: two vectors of outputs each */
  int64_t elements;     /* C/groups * KH * KW: weights of an output */
  int64_t depth;        /* rows of a panel: as many, or more for the matrix unit */
  int64_t columns_row;  /* values of a row of columns */
  int64_t result_row;   /* values of a row of the result */
  int64_t tile, tiles;  /* pixels of a tile; tiles of an image */
  bool split;           /* products by the matrix unit */
  bool split_weights;   /* packed weights are split already */
  bool late;            /* weights are packed by the tiles' tasks */
  int64_t parts;        /* tasks of a tile, by panels */
  int64_t tile_pitch;   /* pixels between two taps' rows of corners */
  int64_t wave;         /* images of a wave */
  int64_t chunk;        /* taps of a chunk */
  int64_t pack_tasks;   /* packing tasks of an image */
  int64_t panel_values; /* of a packed panel of weights */
  int64_t most_columns; /* that are multiplied together */

  /* Without a known tile it is chosen for a whole wave. */
  DCN_SMALL Forward(const dcn_params &params, int num_threads, bool matrix, int64_t known_tile = 0)
      : p(params), slabs(params), frame(params) {
    constexpr int64_t L = Vector<A>::lanes;
    small = is_small<A>(p, frame);
    plane = frame.pixels * slabs.pitch + LINE / (int64_t)sizeof(A);
    padded_out = round_up(group_out(p), L);
    panels = ceil_div(padded_out, 2 * L);
    elements = depth = group_in(p) * taps_of(p);
    chunk = chunk_taps(p, slabs);
    split = matrix && may_split<A>(p) && group_in(p) % slabs.unit == 0 &&
            offset_group_in(p) % slabs.unit == 0;
    most_columns = split ? SPLIT_COLUMNS : DEPTH;
    if (split) {
      chunk = min(chunk, SPLIT_COLUMNS / tap_rows(min(slabs.unit, BLOCK)));
      depth = group_in(p) / slabs.unit * unit_rows();
    }
    panel_values = depth * 2 * L;
    split_weights = split && p.groups * panels * panel_values <= SPLIT_WEIGHTS;
    if (split_weights) panel_values = depth / BLOCK * (int64_t)(sizeof(SplitBlock) / sizeof(A));
    if (is_depthwise(p)) {
      columns_row = 0;
      result_row = slabs.pitch;
    } else {
      columns_row = row_pitch<A>(min(DEPTH, depth));
      result_row = row_pitch<A>(p.groups * padded_out - L); /* nothing spills */
    }
    const int64_t pixels = plane_out(p);
    tile = most_tile();
    const int64_t batch = max(p.batch, (int64_t)1);
    /* What is one tile in float32 is two in float64. */
    late = !is_depthwise(p) && chunk == taps_of(p) &&
           ceil_div(pixels, tile) * batch <= (int64_t)(sizeof(A) / sizeof(float)) &&
           p.groups * panels * panel_values * (int64_t)sizeof(A) >= LATE_BYTES;
    parts = late ? min(panels, (int64_t)num_threads) : 1;
    wave = WAVE_SHARE * num_threads / (slabs.count * plane * (int64_t)sizeof(A));
    wave = max((int64_t)1, min(batch, wave));
    if (!late) tile = known_tile ? known_tile : tile_for(num_threads, wave);
    tiles = ceil_div(pixels, tile);
    tile_pitch = round_up(tile, L);
    pack_tasks = ceil_div(plane_in(p), PACK_PIXELS) * slabs.count;
  }

  int64_t most_tile() const {
    const int64_t fit = TILE_BYTES / (result_row * (int64_t)sizeof(A)) / ROWS * ROWS;
    int64_t most = min(fit, TILE_COLUMN / (int64_t)sizeof(A));
    if (split_weights && plane_out(p) > MOST_PIXELS &&
        weight_values() * (int64_t)sizeof(A) <= CACHED_WEIGHTS)
      most = min(most, max(2 * BLOCK, SPLIT_WORK / (padded_out * min(depth, SPLIT_COLUMNS))));
    return min(max((int64_t)2 * ROWS, most), plane_out(p));
  }
  /* The tile, the largest or a smaller one, or whole strips of the matrix unit, with which the busiest
   * thread is done first, of so many images. */
  DCN_SMALL int64_t tile_for(int64_t num_threads, int64_t images) const {
    const int64_t step = split ? BLOCK : ROWS, pixels = plane_out(p);
    int64_t most = most_tile();
    if (split) most = round_up(most, step); /* still no more than MOST_PIXELS */
    if (num_threads == 1) return most;
    const auto equal = [&](int64_t size) {
      return split ? size : ceil_div(pixels, ceil_div(pixels, size));
    };
    const auto time = [&](int64_t size) {
      const int64_t whole = images * (pixels / size), rest = pixels % size;
      const int64_t turns = ceil_div(whole, num_threads), idle = turns * num_threads - whole;
      const int64_t fit = (size + TILE_COST) / (rest + TILE_COST); /* of the images' last tiles */
      const int64_t more = rest ? max((int64_t)0, images - idle * fit) : 0;
      return turns * (size + TILE_COST) + ceil_div(more, num_threads) * (rest + TILE_COST);
    };
    int64_t best = equal(most), least = time(best);
    for (int64_t size = (most - 1) / step * step; size >= step; size -= step)
      if (const int64_t one = time(equal(size)); one < least) best = equal(size), least = one;
    return best;
  }

  int64_t weight_tasks() const { return is_depthwise(p) ? 1 : p.groups * panels; }
  int64_t weight_values() const {
    return is_depthwise(p) ? group_out(p) * taps_of(p) * (p.in_channels + Vector<A>::lanes)
                           : p.groups * panels * panel_values;
  }

  Block block(int64_t begin, int64_t slab_end) const {
    return block_at(p, begin, min(slab_end, begin + (split ? BLOCK : SLAB)));
  }
  /* Rows of a group's panel. A block's are [tap][channel]; for the matrix unit, [chunk][tap][channel] with
   * channels in whole vectors and chunks in whole blocks of k. */
  int64_t piece_rows(int64_t channels, int64_t taps) const {
    return split ? round_up(taps * tap_rows(channels), BLOCK) : taps * channels;
  }
  int64_t block_rows(int64_t channels) const {
    const int64_t taps = taps_of(p);
    return split ? ceil_div(taps, chunk) * piece_rows(channels, chunk) : taps * channels;
  }
  int64_t tap_rows(int64_t channels) const {
    return split ? round_up(channels, (int64_t)Vector<A>::lanes) : channels;
  }
  int64_t row_in_block(int64_t channels, int64_t tap, int64_t channel) const {
    if (!split) return tap * channels + channel;
    return tap / chunk * piece_rows(channels, chunk) + tap % chunk * tap_rows(channels) + channel;
  }
  /* Of the units that offset groups leave together, all blocks are BLOCK wide but the last. */
  int64_t unit_rows() const {
    const int64_t rest = slabs.unit % BLOCK;
    return slabs.unit / BLOCK * block_rows(BLOCK) + (rest ? block_rows(rest) : 0);
  }
  /* The first row of the block at a group's `channel`. */
  int64_t first_row(int64_t channel) const {
    if (!split) return channel * taps_of(p);
    return channel / slabs.unit * unit_rows() + channel % slabs.unit / BLOCK * block_rows(BLOCK);
  }
};

/* Where everything lies in the two workspaces. */
template <class A>
struct ForwardShared {
  A *weight, *slabs;
  ForwardShared(const Forward<A> &f, Arena &arena) {
    weight = arena.take<A>(f.late ? 0 : f.weight_values());
    slabs = arena.take<A>(f.wave * f.slabs.count * f.plane);
  }
};

template <class A>
struct ForwardScratch {
  Tile<A> tile;
  Corners<A> corners;
  A *columns, *result;
  A *panel;           /* weights packed late */
  SplitStrip *strips; /* columns for the matrix unit: a strip's, late: the tile's */
  SplitBlock *blocks; /* a late panel's */
  uint8_t *hard;      /* rows */
  DCN_SMALL ForwardScratch(const Forward<A> &f, Arena &arena)
      : tile(arena, f.tile_pitch), corners(arena, f.chunk * f.tile_pitch, false) {
    const int64_t strip_blocks = f.most_columns / BLOCK;
    const int64_t rows = f.split ? round_up(f.tile, BLOCK) : 0;
    columns = arena.take<A>(f.split ? 0 : (f.late ? f.tile : min(f.tile, STRIP)) * f.columns_row);
    panel = arena.take<A>(f.late ? f.most_columns * 2 * Vector<A>::lanes : 0);
    strips = arena.take<SplitStrip>(rows / BLOCK * strip_blocks);
    blocks = arena.take<SplitBlock>(f.split && (f.late || !f.split_weights) ? strip_blocks : 0);
    hard = arena.take<uint8_t>(rows);
    result = arena.take<A>(f.tile * f.result_row);
  }
};

/* Where in the rows of a group's panel the weights of one source element (channel, tap) go. */
template <class A>
struct PanelRows {
  const Forward<A> *forward;
  int64_t begin, end; /* the group's channels */
  int64_t slab, block_begin, block_count, block_row;
  int64_t channel, tap, taps;
  int64_t row;

  PanelRows(const Forward<A> &f, int64_t group, int64_t element)
      : forward(&f), begin(group * group_in(f.p)), end(begin + group_in(f.p)), slab(0) {
    taps = taps_of(f.p);
    channel = begin + element / taps;
    tap = element % taps;
    find_block(begin);
    row = block_row + f.row_in_block(block_count, tap, channel - block_begin);
  }
  void find_block(int64_t from) {
    const Forward<A> &f = *forward;
    for (block_begin = from;; block_begin += block_count) {
      while (f.slabs.end(f.p, slab) <= block_begin) slab++;
      block_count = f.block(block_begin, f.slabs.end(f.p, slab)).count;
      if (channel < block_begin + block_count) break;
    }
    block_row = f.first_row(block_begin - begin);
  }
  void step() {
    const Forward<A> &f = *forward;
    if (++tap < taps) {
      row += f.tap_rows(block_count);
      if (f.chunk < taps) row = block_row + f.row_in_block(block_count, tap, channel - block_begin);
      return;
    }
    tap = 0;
    if (++channel == block_begin + block_count && channel < end) find_block(channel);
    row = block_row + channel - block_begin;
  }
};

/* `count` elements of one panel from `first` on, to the rows from `first_row` on: [row][2 vectors of
 * outputs]. Where blocks begin and end, an element's row does as well. */
template <class A>
static void pack_weight_panel(const Forward<A> &f, const void *weight, int64_t group, int64_t panel,
                              int64_t first, int64_t count, int64_t first_row, A *to) {
  const dcn_params &p = f.p;
  constexpr int64_t L = Vector<A>::lanes, width = 2 * L;
  typedef typename Vector<A>::V V;
  const int64_t end = first + count;
  for (int64_t half = 0; half < 2; half++) {
    const int64_t first_out = panel * width + half * L;
    const int64_t lines = max((int64_t)0, min(L, group_out(p) - first_out));
    if (first_out >= f.padded_out) continue; /* nobody reads the second half of such a panel */
    const int64_t origin = (group * group_out(p) + first_out) * f.elements;
    A *rows_of_half = to + half * L - first_row * width;
    PanelRows<A> rows(f, group, first);
    for (int64_t i = first; i < end; i += L) {
      if (i + L > end && count >= L) rows = PanelRows<A>(f, group, i = end - L);
      const int64_t columns = min(L, end - i);
      V block[L];
      if (is_direct<A>(p) && lines == L && columns == L)
        turn_block((const A *)weight + origin + i, f.elements, block);
      else
        load_block<A>(weight, p, origin + i, f.elements, lines, columns, block);
      for (int64_t j = 0; j < columns; j++) {
        store(rows_of_half + rows.row * width, block[j]);
        rows.step();
      }
    }
  }
}

/* All rows of one panel, split where products are. */
template <class A>
static void pack_whole_panel(const Forward<A> &f, const void *weight, int64_t group, int64_t panel,
                             A *to) {
  if (f.depth > f.elements) /* rows without weights */
    for (int64_t i = 0; i < f.depth * BLOCK; i++) to[i] = 0;
  pack_weight_panel(f, weight, group, panel, 0, f.elements, 0, to);
  if constexpr (SPLITS<A>)
    if (f.split_weights) /* in place, from the end: a block takes more room than its rows do */
      for (int64_t i = f.depth / BLOCK - 1; i >= 0; i--) {
        A rows[BLOCK * BLOCK];
        __builtin_memcpy(rows, to + i * BLOCK * BLOCK, sizeof rows);
        split_block(BLOCK, min(BLOCK, f.padded_out - panel * BLOCK), rows, BLOCK,
                    (SplitBlock *)to + i);
      }
}

/* Depthwise: [output of a channel][tap][channel]. */
template <class A>
static void pack_depthwise_weight(const dcn_params &p, const void *weight, A *to) {
  const int64_t taps = taps_of(p), outputs = group_out(p);
  const int64_t row = p.in_channels + Vector<A>::lanes;
  for (int64_t j = 0; j < outputs; j++)
    for (int64_t k = 0; k < taps; k++)
      for (int64_t c = 0; c < row; c++)
        to[(j * taps + k) * row + c] =
            c < p.in_channels ? read_one<A>(weight, p.dtype, (c * outputs + j) * taps + k) : A(0);
}

/* One task of packing: PACK_PIXELS pixels of one slab of one image. */
template <class A>
static void pack_slab(const dcn_params &p, const Slabs<A> &slabs, const Frame &frame,
                      const void *input, int64_t image, int64_t slab, int64_t piece, A *to) {
  const int64_t first = piece * PACK_PIXELS, pixels = min(PACK_PIXELS, plane_in(p) - first);
  const int64_t begin = slabs.begin(slab);
  pack_frame(input, p, frame, p.in_channels, image, begin, slabs.end(p, slab) - begin, first,
             pixels, to, slabs.pitch);
}

/* Blocks that are sampled side by side and multiplied together, at the corners of one chunk. */
template <class A>
struct Pieces {
  const A *slab[PIECES]; /* the block's first channel of the frame's first pixel */
  int64_t channels[PIECES];
  int count;
  int64_t group, row, columns; /* they meet the group's weights from `row` on */
  int64_t element, elements;   /* which are these */
};

template <class A>
static void sample_pieces(const Forward<A> &f, const Pieces<A> &pieces, Sampling how, int64_t taps,
                          int64_t first, int64_t pixels, const ForwardScratch<A> &s) {
  const Steps steps(f.frame, f.slabs.pitch);
  A *columns = s.columns;
  for (int i = 0; i < pieces.count; columns += taps * pieces.channels[i++])
    sample_block(pieces.slab[i], steps, pieces.channels[i], s.corners.from(first), how, taps,
                 f.tile_pitch, pixels, columns, f.columns_row);
}

#if DCN_VECTOR_BYTES == 64
/* Where the vectors of a block of k of the pieces come from. */
static Pair source_pair(const Forward<float> &f, const Pieces<float> &pieces, int64_t taps,
                        int64_t block) {
  int i = 0;
  const auto blocks = [&] { return f.piece_rows(pieces.channels[i], taps) / BLOCK; };
  for (; block >= blocks(); i++) block -= blocks();
  const int64_t channels = pieces.channels[i], vectors = ceil_div(channels, (int64_t)16);
  Pair pair;
  for (int64_t j = 0; j < 2; j++) {
    const int64_t vector = 2 * block + j, tap = min(vector / vectors, taps - 1);
    const int64_t channel = vector < taps * vectors ? vector % vectors * 16 : channels;
    pair.of[j] = {pieces.slab[i] + channel, tap * f.tile_pitch, lanes16(channels - channel)};
  }
  return pair;
}

/* What multiply_pieces does, by the matrix unit. All of a tile is sampled, then all of it multiplied: the
 * unit works at half its speed for a thousand cycles where it had nothing to do for as long. */
[[maybe_unused]] static void multiply_pieces_split(const Forward<float> &f,
                                                   const dcn_tensors &tensors,
                                                   const Pieces<float> &pieces, const float *weight,
                                                   Sampling how, int64_t taps, int64_t pixels,
                                                   int64_t first_panel, int64_t last_panel,
                                                   const ForwardScratch<float> &s) {
  const int64_t step = pieces.columns / BLOCK;
  const Steps steps(f.frame, f.slabs.pitch);
  Pair pairs[SPLIT_COLUMNS / BLOCK];
  for (int64_t k = 0; k < step; k++) pairs[k] = source_pair(f, pieces, taps, k);
  const auto read_from = [&](int64_t pixel, int64_t block) {
    return [&, pixel, block](int64_t m, int64_t i, int64_t half) {
      return sample_again(how, pairs[block + i].of[half], steps, s.corners, pixel + m);
    };
  };
  for (int64_t first = 0; first < pixels; first += BLOCK) {
    const int64_t rows = min(BLOCK, pixels - first);
    SplitStrip *to = s.strips + first / BLOCK * step;
    Survey survey;
    sample_strip(how, pairs, step, steps, s.corners.from(first), rows, to, survey);
    find_hard(rows, step, survey, read_from(first, 0), s.hard + first);
  }
  float *result = s.result + pieces.group * f.padded_out;
  const TileRegisters registers;
  for (int64_t panel = first_panel; panel < last_panel; panel++) {
    const int64_t columns = min(BLOCK, f.padded_out - panel * BLOCK);
    const float *packed = s.panel;
    if (weight) {
      packed = weight + (pieces.group * f.panels + panel) * f.panel_values;
      if (!f.split_weights) packed += pieces.row * BLOCK;
    } else {
      for (int64_t i = 0; pieces.columns > pieces.elements && i < pieces.columns * BLOCK; i++)
        s.panel[i] = 0;
      pack_weight_panel(f, tensors.weight, pieces.group, panel, pieces.element, pieces.elements,
                        pieces.row, s.panel);
    }
    const SplitBlock *blocks = (const SplitBlock *)packed + pieces.row / BLOCK;
    if (!weight || !f.split_weights)
      split_panel(pieces.columns, columns, packed, BLOCK, s.blocks), blocks = s.blocks;
    for_cuts(pieces.columns, [&](int64_t block, int64_t count, int64_t, int64_t) {
      const SplitRows rows = {pixels, count, step, s.strips + block, s.hard, read_from(0, block)};
      multiply_cut(rows, {ALL_PARTS, parts_of(f.p)}, columns, blocks + block,
                   result + panel * BLOCK, f.result_row, pieces.row > 0 || block > 0);
    });
  }
}
#endif

/* result (+)= columns * weights, strip by strip; `weight` is null where they are packed late, panel by
 * panel. */
template <class A>
static void multiply_pieces(const Forward<A> &f, const dcn_tensors &tensors,
                            const Pieces<A> &pieces, const A *weight, Sampling how, int64_t taps,
                            int64_t pixels, int64_t first_panel, int64_t last_panel,
                            const ForwardScratch<A> &s) {
  if constexpr (SPLITS<A>)
    if (f.split)
      return multiply_pieces_split(f, tensors, pieces, weight, how, taps, pixels, first_panel,
                                   last_panel, s);
  constexpr int64_t L = Vector<A>::lanes, width = 2 * L;
  const int64_t row = pieces.row, vectors = min(2 * last_panel, f.padded_out / L);
  A *result = s.result + pieces.group * f.padded_out;
  if (!weight) {
    sample_pieces(f, pieces, how, taps, 0, pixels, s);
    for (int64_t panel = first_panel; panel < last_panel; panel++) {
      pack_weight_panel(f, tensors.weight, pieces.group, panel, row, pieces.columns, row, s.panel);
      gemm(pixels, min((int64_t)2, vectors - 2 * panel), pieces.columns, s.columns, f.columns_row,
           s.panel, width, width, result + panel * width, f.result_row, row > 0);
    }
    return;
  }
  weight += (pieces.group * f.panels + first_panel) * f.panel_values + row * width;
  result += first_panel * width;
  const int64_t strips = ceil_div(pixels, STRIP);
  for (int64_t strip = 0; strip < strips; strip++) {
    const int64_t first = pixels * strip / strips;
    const int64_t rows = pixels * (strip + 1) / strips - first;
    sample_pieces(f, pieces, how, taps, first, rows, s);
    gemm(rows, vectors - 2 * first_panel, pieces.columns, s.columns, f.columns_row, weight, width,
         f.panel_values, result + first * f.result_row, f.result_row, row > 0);
  }
}

template <class A>
static void forward_tile(const Forward<A> &f, const dcn_tensors &tensors, const A *weight,
                         const A *slabs, int64_t image, int64_t first, int64_t pixels, int64_t part,
                         const ForwardScratch<A> &s) {
  const dcn_params &p = f.p;
  const int64_t taps = taps_of(p), channels = group_in(p);
  const int64_t first_panel = f.panels * part / f.parts;
  const int64_t last_panel = f.panels * (part + 1) / f.parts;
  tile_positions(p, first, pixels, s.tile);
  for (int64_t offset_group = 0; offset_group < p.offset_groups; offset_group++) {
    const int64_t begin = offset_group * offset_group_in(p), end = begin + offset_group_in(p);
    for (int64_t tap = 0; tap < taps; tap += f.chunk) {
      const int64_t count = min(f.chunk, taps - tap);
      const bool special =
          chunk_corners<A, false>(p, tensors, f.frame, f.small, image, offset_group, tap, count,
                                  first, pixels, f.tile_pitch, s.tile, f.slabs.pitch, s.corners);
      Pieces<A> pieces = {};
      const auto multiply = [&] {
        multiply_pieces(f, tensors, pieces, weight, sampling(tensors, special), count, pixels,
                        first_panel, last_panel, s);
        pieces = {};
      };
      for (int64_t slab = 0; slab < f.slabs.count; slab++) {
        const int64_t slab_begin = f.slabs.begin(slab), slab_end = f.slabs.end(p, slab);
        for (int64_t c = max(begin, slab_begin); c < min(end, slab_end);) {
          const Block block = f.block(c, slab_end);
          const int64_t channel = c - block.group * channels;
          const int64_t row = f.first_row(channel) + f.row_in_block(block.count, tap, 0);
          const int64_t more = f.piece_rows(block.count, count);
          if (pieces.count && (block.group != pieces.group || row != pieces.row + pieces.columns ||
                               pieces.columns + more > f.most_columns || pieces.count == PIECES))
            multiply();
          if (!pieces.count)
            pieces.group = block.group, pieces.row = row, pieces.element = channel * taps;
          pieces.slab[pieces.count] = slabs + slab * f.plane + c - slab_begin;
          pieces.channels[pieces.count++] = block.count;
          pieces.columns += more;
          pieces.elements += block.count * count;
          c += block.count;
        }
      }
      multiply();
    }
  }
  const int64_t begin = first_panel * 2 * Vector<A>::lanes;
  const int64_t end = min(last_panel * 2 * Vector<A>::lanes, group_out(p));
  for (int64_t group = 0; group < p.groups; group++)
    write_tile(tensors.output, p, p.out_channels, plane_out(p), image, group * group_out(p) + begin,
               1, end - begin, first, pixels, s.result + group * f.padded_out + begin, f.result_row,
               tensors.bias);
}

/* One channel per group: accumulate over the taps in registers, no columns, no product.
 *   result[i][c] (+)= sum_t w[t, c] sum_q weight[q][t, i] slab[at[t, i] + step(q) + c]
 * VECTORS of channels at once: five loads and broadcasts a tap and pixel, five loads a vector. */
template <class A, int VECTORS, Sampling how>
static void depthwise_vectors(const A *slab, const Steps &steps, const Corners<A> &corners,
                              int64_t taps, int64_t tile, int64_t pixels, const A *weight,
                              int64_t weight_row, A *result, int64_t result_row, bool accumulate) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  for (int64_t i = 0; i < pixels; i++) {
    V acc[VECTORS];
    A *to = result + i * result_row;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) acc[v] = accumulate ? load(to + v * L) : V{};
    for (int64_t t = 0; t < taps; t++) { /* the hot loop */
      const int64_t at = t * tile + i;
      const A *v00 = slab + corners.at[at], *v01 = opaque(v00 + steps.right);
      const A *v10 = opaque(v00 + steps.down), *v11 = opaque(v10 + steps.right);
      const A *w = corners.weight + at;
      const V w00 = splat(w[0]), w01 = splat(w[corners.APART]);
      const V w10 = splat(w[2 * corners.APART]), w11 = splat(w[3 * corners.APART]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) {
        V s = load(v00 + v * L);
        if (how != COPIED)
          s = w00 * s + w01 * load(v01 + v * L) + w10 * load(v10 + v * L) + w11 * load(v11 + v * L);
        if (how == SCALED) s *= corners.rest[at];
        acc[v] += s * load(weight + t * weight_row + v * L);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(to + v * L, acc[v]);
  }
}

template <class A, Sampling how>
static void depthwise_taps(const A *slab, const Steps &steps, int64_t channels,
                           const Corners<A> &corners, int64_t taps, int64_t tile, int64_t pixels,
                           const A *weight, int64_t weight_row, A *result, int64_t result_row,
                           bool accumulate) {
  constexpr int64_t L = Vector<A>::lanes;
  int64_t c = 0;
#define DCN_BLOCK(V)                                                                     \
  for (; c + V * L <= round_up(channels, L); c += V * L)                                 \
  depthwise_vectors<A, V, how>(slab + c, steps, corners, taps, tile, pixels, weight + c, \
                               weight_row, result + c, result_row, accumulate)
  if constexpr (VARIANTS == ALL_VARIANTS || (VARIANTS == SOME_VARIANTS && how != SCALED)) {
    DCN_BLOCK(4);
    DCN_BLOCK(2);
  }
  DCN_BLOCK(1);
#undef DCN_BLOCK
}

template <class A>
static void depthwise_block(Sampling how, const A *slab, const Steps &steps, int64_t channels,
                            const Corners<A> &corners, int64_t taps, int64_t tile, int64_t pixels,
                            const A *weight, int64_t weight_row, A *result, int64_t result_row,
                            bool accumulate) {
  const auto taps_function = VARIANTS != ONE_VARIANT && how == BILINEAR
                                 ? depthwise_taps<A, BILINEAR>
                             : how != COPIED ? depthwise_taps<A, SCALED>
                                             : depthwise_taps<A, COPIED>;
  taps_function(slab, steps, channels, corners, taps, tile, pixels, weight, weight_row, result,
                result_row, accumulate);
}

template <class A>
static void forward_depthwise_tile(const Forward<A> &f, const dcn_tensors &tensors, const A *weight,
                                   const A *slabs, int64_t image, int64_t first, int64_t pixels,
                                   const ForwardScratch<A> &s) {
  const dcn_params &p = f.p;
  const int64_t taps = taps_of(p), outputs = group_out(p);
  const int64_t weight_row = p.in_channels + Vector<A>::lanes;
  const Steps steps(f.frame, f.slabs.pitch);
  int64_t known = -1; /* the offset group whose corners, all of them, are there */
  bool special = false;
  tile_positions(p, first, pixels, s.tile);
  for (int64_t slab = 0; slab < f.slabs.count; slab++) {
    const int64_t slab_end = f.slabs.end(p, slab);
    for (int64_t c = f.slabs.begin(slab); c < slab_end;) {
      const Block block = block_at(p, c, slab_end);
      const A *channel = slabs + slab * f.plane + c - f.slabs.begin(slab);
      for (int64_t j = 0; j < outputs; j++) {
        for (int64_t tap = 0; tap < taps; tap += f.chunk) {
          const int64_t count = min(f.chunk, taps - tap);
          if (block.offset_group != known) {
            special = chunk_corners<A, false>(p, tensors, f.frame, f.small, image,
                                              block.offset_group, tap, count, first, pixels,
                                              f.tile_pitch, s.tile, f.slabs.pitch, s.corners);
            known = count == taps ? block.offset_group : -1;
          }
          const A *w = weight + (j * taps + tap) * weight_row + c;
          depthwise_block(sampling(tensors, special), channel, steps, block.count, s.corners, count,
                          f.tile_pitch, pixels, w, weight_row, s.result, f.result_row, tap > 0);
        }
        write_tile(tensors.output, p, p.out_channels, plane_out(p), image, c * outputs + j, outputs,
                   block.count, first, pixels, s.result, f.result_row, tensors.bias);
      }
      c += block.count;
    }
  }
}

template <class A>
DCN_COLD static void forward_plan(const dcn_params &p, int num_threads, bool matrix,
                                  dcn_cpu_plan *plan) {
  const Forward<A> f(p, num_threads, matrix);
  const int64_t rest = p.batch % f.wave; /* images of the last wave, if it has less */
  const Forward<A> last(p, num_threads, matrix, rest ? f.tile_for(num_threads, rest) : f.tile);
  Arena shared = {nullptr, 0}, scratch = {nullptr, 0}, last_scratch = {nullptr, 0};
  ForwardShared<A>(f, shared);
  ForwardScratch<A>(f, scratch);
  ForwardScratch<A>(last, last_scratch);
  plan->waves = ceil_div(p.batch, f.wave);
  plan->phases = 2;
  plan->tasks[0] = f.weight_tasks() + f.wave * f.pack_tasks;
  plan->tasks[1] = max(f.wave * f.tiles, rest * last.tiles) * f.parts;
  plan->shared_bytes = shared.used;
  plan->scratch_bytes = max(scratch.used, last_scratch.used);
  plan->weight_tasks = f.weight_tasks();
  plan->weight_bytes = (size_t)f.weight_values() * sizeof(A);
  plan->weight_form = f.split;
  /* From the lowest bit on: matrix, 16 bits of a whole wave's tile, 16 of the last one's, threads. */
  plan->internal = (int64_t)num_threads << 33 | last.tile << 17 | f.tile << 1 | matrix;
}

template <class A>
static void forward_run(const dcn_cpu_call &call, int64_t wave, int64_t phase, int64_t task,
                        void *memory) {
  const dcn_params &p = *call.params;
  const int64_t note = call.plan->internal;
  const int64_t tile = note >> (wave == call.plan->waves - 1 ? 17 : 1) & 0xffff;
  const Forward<A> f(p, (int)(note >> 33), note & 1, tile);
  Arena shared_arena = {(char *)call.shared, 0}, arena = {(char *)memory, 0};
  const ForwardShared<A> shared(f, shared_arena);
  const A *weight = call.packed ? (const A *)call.packed : f.late ? nullptr : shared.weight;
  const int64_t first_image = wave * f.wave, images = min(f.wave, p.batch - first_image);
  if (phase == 0) {
    if (task < f.weight_tasks()) {
      /* Who packs weights for later calls wants no output. */
      if (wave > 0 || call.packed || (f.late && call.tensors->output)) return;
      if (is_depthwise(p))
        pack_depthwise_weight(p, call.tensors->weight, shared.weight);
      else
        pack_whole_panel(f, call.tensors->weight, task / f.panels, task % f.panels,
                         shared.weight + task * f.panel_values);
      return;
    }
    task -= f.weight_tasks();
    const int64_t image = task / f.pack_tasks, piece = task % f.pack_tasks;
    if (image >= images) return;
    const int64_t slab = piece % f.slabs.count;
    pack_slab(p, f.slabs, f.frame, call.tensors->input, first_image + image, slab,
              piece / f.slabs.count, shared.slabs + (image * f.slabs.count + slab) * f.plane);
    return;
  }
  const int64_t part = task % f.parts;
  task /= f.parts;
  const int64_t image = task / f.tiles, first = task % f.tiles * f.tile;
  if (image >= images) return;
  const int64_t pixels = min(f.tile, plane_out(p) - first);
  const A *slabs = shared.slabs + image * f.slabs.count * f.plane;
  const ForwardScratch<A> scratch(f, arena);
  if (is_depthwise(p))
    forward_depthwise_tile(f, *call.tensors, weight, slabs, first_image + image, first, pixels,
                           scratch);
  else
    forward_tile(f, *call.tensors, weight, slabs, first_image + image, first, pixels, part,
                 scratch);
}

}  // namespace DCN_ISA
#endif
