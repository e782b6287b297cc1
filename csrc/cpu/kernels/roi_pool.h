/* Deformable RoI pooling: means over the bins of regions of interest, and their gradients.
 *
 *   P                 = sum_{r, c} weight_y(r) weight_x(c) x[image, channel(o, bin), r, c]
 *   y[roi, o, bin]    = m[roi, bin] P
 *   grad_mask         = sum_o g P
 *   grad_offset_y     = offset_scale height sum_o m g sum_{r, c} slope_y(r) weight_x(c) x
 *   grad_input[r, c] += m g weight_y(r) weight_x(c)
 *
 * Dai et al. 2017, equation 5; Zhu et al. 2019, equation 2. Touches r, c and their weights: roi_bins.h.
 *
 *   cell     (ph * group_h / out_h, ...): which of group_h * group_w maps a bin reads; aligned: one
 *   slab     up to 128 output channels of a cell, packed channels-last: [cell][slab][pixel][pitch]
 *   block    the channels of a slab that share one class of offsets
 *   chunk    bins of a RoI whose touches are in scratch at the same time
 *   band     rows of the image that one task of grad_input owns, [pixel][pitch] in its scratch
 *
 * Phases of a wave of images (a wave takes the RoIs that lie on its images)
 *   0  images -> slabs, unless only grad_input is wanted; for that, the rows that each RoI can touch
 *   1  forward: ROIS RoIs a task. Backward: a task owns a band of (image, cell, slab), visits all
 *      RoIs of the image in order and writes the band; ROIS RoIs a task for grad_offset, grad_mask
 *
 * A pixel of grad_input is summed over (RoI, class, bin, touch) whatever the bands are, so they may
 * follow num_threads. grad_offset and grad_mask: over (touch, vector) per block in A, over blocks and
 * bins in double. Scratch: CHUNK_BYTES for touches and a tile, BAND_BYTES, and some 24 bytes a bin.
 */
#ifndef DCN_ROI_POOL_H
#define DCN_ROI_POOL_H

#include "layout.h"
#include "roi_bins.h"

namespace DCN_ISA {

constexpr int64_t ROI_SLAB = 128;            /* channels of a slab */
constexpr int64_t ROI_WAVE_BYTES = 16 << 20; /* packed images of a wave, but at least one image */
constexpr int64_t ROI_PACK_PIXELS = 1024;    /* pixels of one packing task */
constexpr int64_t CHUNK_BYTES = 128 << 10;   /* touches and tile of a chunk, but at least one bin */
constexpr int64_t BAND_BYTES = 1024 << 10;   /* a band, but at least one row */
constexpr int64_t ROIS = 4;                  /* of a task */
constexpr int64_t WORK_OF_A_VALUE = 80;      /* multiply-adds that a bin and channel is worth */

template <class A>
struct RoiPool {
  const dcn_roi_params &p;
  dcn_params form; /* dtype and layout, for layout.h */
  bool samples_gradient, input_gradient, packs;
  int64_t cells, width, slabs, pitch;
  int64_t plane; /* values of a packed slab of an image */
  int64_t bins, parts, per_class;
  int64_t touches_y, touches_x, chunk;
  int64_t rows, bands; /* rows of a band; bands of an image */
  int64_t wave, waves, pieces;

  RoiPool(const dcn_roi_params &params, int direction, int wanted, int64_t band_rows) : p(params) {
    constexpr int64_t L = Vector<A>::lanes, size = (int64_t)sizeof(A);
    form = {};
    form.dtype = p.dtype;
    form.layout = p.layout;
    samples_gradient = direction == DCN_BACKWARD && (wanted & (DCN_GRAD_OFFSET | DCN_GRAD_MASK));
    input_gradient = direction == DCN_BACKWARD && (wanted & DCN_GRAD_INPUT);
    packs = direction == DCN_FORWARD || samples_gradient;
    cells = p.group_h * p.group_w;
    width = round_up(ceil_div(p.out_channels, ceil_div(p.out_channels, ROI_SLAB)), L);
    slabs = ceil_div(p.out_channels, width);
    pitch = width;
    plane = round_up(p.in_h * p.in_w * pitch + L, LINE / size);
    bins = p.out_h * p.out_w;
    parts = p.part_h * p.part_w;
    per_class = p.out_channels / p.classes;
    touches_y = most_touches(p, p.in_h);
    touches_x = most_touches(p, p.in_w);
    const int64_t bin_bytes =
        (touches_y + touches_x) * (int64_t)sizeof(Touch<A>) + pitch * size + 40;
    chunk = min(bins, max((int64_t)1, CHUNK_BYTES / bin_bytes));
    rows = band_rows ? band_rows : p.in_h;
    bands = ceil_div(p.in_h, rows);
    const int64_t image_bytes = cells * slabs * plane * size;
    wave = max((int64_t)1, packs ? min(p.batch, ROI_WAVE_BYTES / image_bytes) : p.batch);
    waves = ceil_div(p.batch, wave);
    pieces = ceil_div(p.in_h * p.in_w, ROI_PACK_PIXELS);
  }

  int64_t planes() const { return cells * slabs; }
  int64_t slab_end(int64_t slab) const { return min((slab + 1) * width, p.out_channels); }
  int64_t cell_of(int64_t bin) const {
    const int64_t ph = bin / p.out_w, pw = bin % p.out_w;
    return ph * p.group_h / p.out_h * p.group_w + pw * p.group_w / p.out_w;
  }
  int64_t part_of(int64_t bin) const {
    const int64_t ph = bin / p.out_w, pw = bin % p.out_w;
    return ph * p.part_h / p.out_h * p.part_w + pw * p.part_w / p.out_w;
  }
  /* The first input channel of a slab in its cell; the next ones are `cells` apart. */
  int64_t input_channel(int64_t cell, int64_t slab) const { return slab * width * cells + cell; }
  int64_t pack_tasks() const { return packs ? wave * planes() * pieces : 0; }
  int64_t band_tasks() const { return input_gradient ? wave * planes() * bands : 0; }
  int64_t roi_tasks() const { return ceil_div(p.rois, ROIS); }
};

/* The workspace of the call. */
template <class A>
struct RoiShared {
  A *planes;   /* [image of the wave][cell][slab][pixel][pitch] */
  double *low; /* backward: where the first and the last sample row of each RoI can be */
  double *high;

  RoiShared(const RoiPool<A> &r, Arena &arena) {
    const bool any = r.p.batch > 0; /* an empty batch may have sizes that no workspace could have */
    planes = arena.take<A>(r.packs && any ? r.wave * r.planes() * r.plane : 0);
    low = arena.take<double>(r.input_gradient ? r.p.rois : 0);
    high = arena.take<double>(r.input_gradient ? r.p.rois : 0);
  }
};

/* A chunk of bins: touches [bin][touches_y or touches_x], and how many. */
template <class A>
struct RoiScratch {
  Touch<A> *y, *x;
  Touch<double> *sums;
  int64_t *count_y, *count_x;  /* NOT_A_BIN in count_y: the bin is NaN */
  int64_t any_first, any_last; /* bins of the chunk that touch something */
  A *mask, *tile, *row, *band;
  double *offset_sums, *mask_sums;

  RoiScratch(const RoiPool<A> &r, Arena &arena) {
    constexpr int64_t L = Vector<A>::lanes;
    const bool any = r.p.rois > 0; /* otherwise parts and bins may be as many as they like */
    y = arena.take<Touch<A>>(r.chunk * r.touches_y);
    x = arena.take<Touch<A>>(r.chunk * r.touches_x);
    sums = arena.take<Touch<double>>(max(r.touches_y, r.touches_x));
    count_y = arena.take<int64_t>(r.chunk);
    count_x = arena.take<int64_t>(r.chunk);
    mask = arena.take<A>(r.chunk);
    tile = arena.take<A>(r.chunk * r.pitch + L);
    row = arena.take<A>(r.samples_gradient && any ? max(2 * r.parts, r.bins) : 0);
    offset_sums = arena.take<double>(r.samples_gradient && any ? 2 * r.parts : 0);
    mask_sums = arena.take<double>(r.samples_gradient && any ? r.bins : 0);
    band = arena.take<A>(r.input_gradient && r.p.batch ? r.rows * r.p.in_w * r.pitch + L : 0);
  }
};

DCN_INLINE int64_t image_of(const dcn_roi_tensors &t, int64_t roi) {
  return (int64_t)t.rois[5 * roi];
}

/* A RoI, and the offsets of one class. */
template <class A>
struct Region {
  RoiAxis y, x;
  bool finite;

  Region(const RoiPool<A> &r, const dcn_roi_tensors &t, int64_t roi) {
    const double *box = t.rois + 5 * roi;
    y = roi_axis(r.p, box[2], box[4], r.p.out_h, r.p.in_h);
    x = roi_axis(r.p, box[1], box[3], r.p.out_w, r.p.in_w);
    finite = y.finite && x.finite;
  }

  /* Where a bin begins, moved by its offset; NaN if it is not anywhere. */
  void origin(const RoiPool<A> &r, const dcn_roi_tensors &t, int64_t roi, int64_t k, int64_t bin,
              double &origin_y, double &origin_x) const {
    double move_x = 0, move_y = 0;
    if (t.offset) { /* the x plane, then the y plane */
      const int64_t at = (roi * r.p.classes + k) * 2 * r.parts + r.part_of(bin);
      move_x = read_one<double>(t.offset, r.p.dtype, at);
      move_y = read_one<double>(t.offset, r.p.dtype, at + r.parts);
    }
    origin_y = bin_origin(r.p, y, move_y, bin / r.p.out_w);
    origin_x = bin_origin(r.p, x, move_x, bin % r.p.out_w);
  }
};

/* Touches of bins first .. first + count - 1 of a RoI for one class, in rows begin .. end - 1 of the
 * image. With `cell` not negative bins of other cells touch nothing. Notes the first and the last bin
 * that touches something. */
template <class A>
static void place_bins(const RoiPool<A> &r, const dcn_roi_tensors &t, int64_t roi,
                       const Region<A> &region, int64_t k, int64_t first, int64_t count,
                       int64_t cell, int64_t begin, int64_t end, RoiScratch<A> &s) {
  const dcn_roi_params &p = r.p;
  s.any_first = count;
  s.any_last = -1;
  for (int64_t i = 0; i < count; i++) {
    s.count_y[i] = s.count_x[i] = 0;
    if (cell >= 0 && r.cell_of(first + i) != cell) continue;
    double y, x;
    region.origin(r, t, roi, k, first + i, y, x);
    if (!region.finite || y != y || x != x) {
      s.count_y[i] = NOT_A_BIN;
      continue;
    }
    if (misses(region.y, y, begin, end)) continue;
    s.count_y[i] =
        bin_touches(region.y, y, begin, end, p.in_w * r.pitch, s.sums, s.y + i * r.touches_y);
    if (!s.count_y[i]) continue;
    s.count_x[i] = bin_touches(region.x, x, 0, p.in_w, r.pitch, s.sums, s.x + i * r.touches_x);
    if (!s.count_x[i]) continue;
    s.any_first = min(s.any_first, i);
    s.any_last = i;
  }
}

template <class A>
static void read_masks(const RoiPool<A> &r, const dcn_roi_tensors &t, int64_t roi, int64_t first,
                       int64_t count, A *mask) {
  if (t.mask)
    read_row(t.mask, r.p.dtype, roi * r.bins + first, 1, count, mask);
  else
    for (int64_t i = 0; i < count; i++) mask[i] = 1;
}

template <class A, int VECTORS>
static void pool_vectors(const A *plane, const Touch<A> *y, int64_t count_y, const Touch<A> *x,
                         int64_t count_x, A *to) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  V sum[VECTORS];
  for (int v = 0; v < VECTORS; v++) sum[v] = V{};
  for (int64_t i = 0; i < count_y; i++)
    for (int64_t j = 0; j < count_x; j++) { /* the hot loop */
      const A *at = plane + y[i].at + x[j].at;
      const V weight = splat<A>(y[i].weight * x[j].weight);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sum[v] += weight * load(at + v * L);
    }
  for (int v = 0; v < VECTORS; v++) store(to + v * L, sum[v]);
}

/* The mean of one bin for `vectors` vectors of channels. */
template <class A>
static void pool_bin(const A *plane, const Touch<A> *y, int64_t count_y, const Touch<A> *x,
                     int64_t count_x, int64_t vectors, A *to) {
  constexpr int64_t L = Vector<A>::lanes;
  int64_t v = 0;
#define DCN_POOL(N)                \
  for (; v + N <= vectors; v += N) \
  pool_vectors<A, N>(plane + v * L, y, count_y, x, count_x, to + v * L)
  DCN_POOL(8);
  DCN_POOL(4);
  DCN_POOL(2);
  DCN_POOL(1);
#undef DCN_POOL
}

/* y of one RoI. `packed` holds the planes of its image. */
template <class A>
static void pool_roi(const RoiPool<A> &r, const dcn_roi_tensors &t, const A *packed, int64_t roi,
                     RoiScratch<A> &s) {
  const dcn_roi_params &p = r.p;
  constexpr int64_t L = Vector<A>::lanes;
  const Region<A> region(r, t, roi);
  for (int64_t k = 0; k < p.classes; k++)
    for (int64_t first = 0; first < r.bins; first += r.chunk) {
      const int64_t count = min(r.chunk, r.bins - first);
      place_bins(r, t, roi, region, k, first, count, -1, 0, p.in_h, s);
      read_masks(r, t, roi, first, count, s.mask);
      for (int64_t c = k * r.per_class; c < (k + 1) * r.per_class;) {
        const int64_t slab = c / r.width, end = min(r.slab_end(slab), (k + 1) * r.per_class);
        const int64_t vectors = ceil_div(end - c, L);
        for (int64_t i = 0; i < count; i++) {
          A *to = s.tile + i * r.pitch;
          const A *plane =
              packed + (r.cell_of(first + i) * r.slabs + slab) * r.plane + c - slab * r.width;
          pool_bin(plane, s.y + i * r.touches_y, max(s.count_y[i], (int64_t)0),
                   s.x + i * r.touches_x, s.count_x[i], vectors, to);
          const A factor = s.count_y[i] == NOT_A_BIN ? (A)__builtin_nan("") : s.mask[i];
          if (t.mask || factor != factor)
            for (int64_t o = 0; o < end - c; o++) to[o] *= factor;
        }
        write_tile(t.output, r.form, p.out_channels, r.bins, roi, c, 1, end - c, first, count,
                   s.tile, r.pitch, nullptr);
        c = end;
      }
    }
}

/* sums[0] = sum over o, r, c of g(o) weight_y weight_x x, [1] with slope_y, [2] with slope_x. Spare
 * lanes of the last vector belong to others: they are masked, never multiplied by zero. */
template <class A>
static void differentiate_bin(const A *plane, const Touch<A> *y, int64_t count_y, const Touch<A> *x,
                              int64_t count_x, const A *g, int64_t channels, A *sums) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t whole = channels / L * L;
  const typename Vector<A>::Mask tail = first_lanes<A>((int)(channels - whole));
  V mean = V{}, down = V{}, right = V{};
  for (int64_t i = 0; i < count_y; i++)
    for (int64_t j = 0; j < count_x; j++) {
      const A *at = plane + y[i].at + x[j].at;
      V even = V{}, odd = V{};
      int64_t c = 0;
      for (; c + 2 * L <= whole; c += 2 * L) { /* the hot loop */
        even += load(g + c) * load(at + c);
        odd += load(g + c + L) * load(at + c + L);
      }
      if (c < whole) even += load(g + c) * load(at + c);
      if (whole < channels) odd += keep<A>(tail, load(g + whole)) * keep<A>(tail, load(at + whole));
      const V product = even + odd;
      mean += splat<A>(y[i].weight * x[j].weight) * product;
      down += splat<A>(y[i].slope * x[j].weight) * product;
      right += splat<A>(y[i].weight * x[j].slope) * product;
    }
  A four[4];
  sum4<A>(mean, down, right, V{}, four);
  for (int i = 0; i < 3; i++) sums[i] = four[i];
}

template <class A>
static void write_sums(const double *sums, int64_t count, void *memory, int dtype, int64_t index,
                       A *row) {
  for (int64_t i = 0; i < count; i++) row[i] = (A)sums[i];
  write_row(memory, dtype, index, 1, count, row);
}

/* grad_offset and grad_mask of one RoI. */
template <class A>
static void differentiate_roi(const RoiPool<A> &r, const dcn_roi_tensors &t, const A *packed,
                              int64_t roi, RoiScratch<A> &s) {
  const dcn_roi_params &p = r.p;
  const Region<A> region(r, t, roi);
  const double scale_y = p.offset_scale * region.y.size, scale_x = p.offset_scale * region.x.size;
  const double nan = __builtin_nan("");
  for (int64_t i = 0; i < r.bins; i++) s.mask_sums[i] = 0;
  for (int64_t k = 0; k < p.classes; k++) {
    for (int64_t i = 0; i < 2 * r.parts; i++) s.offset_sums[i] = 0;
    for (int64_t first = 0; first < r.bins; first += r.chunk) {
      const int64_t count = min(r.chunk, r.bins - first);
      place_bins(r, t, roi, region, k, first, count, -1, 0, p.in_h, s);
      read_masks(r, t, roi, first, count, s.mask);
      for (int64_t i = 0; i < count; i++)
        if (s.count_y[i] == NOT_A_BIN) {
          s.mask_sums[first + i] = nan;
          double *sums = s.offset_sums + r.part_of(first + i);
          sums[0] = sums[r.parts] = nan;
        }
      for (int64_t c = k * r.per_class; c < (k + 1) * r.per_class;) {
        const int64_t slab = c / r.width, end = min(r.slab_end(slab), (k + 1) * r.per_class);
        pack_pixels(t.grad_output, r.form, p.out_channels, r.bins, roi, c, 1, end - c, first, count,
                    s.tile, r.pitch);
        for (int64_t i = 0; i < count; i++) {
          if (s.count_y[i] <= 0 || !s.count_x[i]) continue; /* exactly 0, or NaN already */
          const A *plane =
              packed + (r.cell_of(first + i) * r.slabs + slab) * r.plane + c - slab * r.width;
          A sums[3];
          differentiate_bin(plane, s.y + i * r.touches_y, s.count_y[i], s.x + i * r.touches_x,
                            s.count_x[i], s.tile + i * r.pitch, end - c, sums);
          s.mask_sums[first + i] += (double)sums[0];
          double *to = s.offset_sums + r.part_of(first + i);
          to[0] += scale_x * (double)s.mask[i] * (double)sums[2];
          to[r.parts] += scale_y * (double)s.mask[i] * (double)sums[1];
        }
        c = end;
      }
    }
    if (t.grad_offset)
      write_sums(s.offset_sums, 2 * r.parts, t.grad_offset, p.dtype,
                 (roi * p.classes + k) * 2 * r.parts, s.row);
  }
  if (t.grad_mask) write_sums(s.mask_sums, r.bins, t.grad_mask, p.dtype, roi * r.bins, s.row);
}

template <class A, int VECTORS>
static void spread_vectors(const A *g, const Touch<A> *y, int64_t count_y, const Touch<A> *x,
                           int64_t count_x, A *band) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  V grad[VECTORS];
  for (int v = 0; v < VECTORS; v++) grad[v] = load(g + v * L);
  for (int64_t i = 0; i < count_y; i++)
    for (int64_t j = 0; j < count_x; j++) { /* the hot loop */
      A *to = band + y[i].at + x[j].at;
      const V weight = splat<A>(y[i].weight * x[j].weight);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) store(to + v * L, load(to + v * L) + weight * grad[v]);
    }
}

/* band += the gradient `g` of one bin; whole vectors, lanes that belong to others hold 0 in g. */
template <class A>
static void spread_bin(const A *g, const Touch<A> *y, int64_t count_y, const Touch<A> *x,
                       int64_t count_x, int64_t vectors, A *band) {
  constexpr int64_t L = Vector<A>::lanes;
  int64_t v = 0;
#define DCN_SPREAD(N)              \
  for (; v + N <= vectors; v += N) \
  spread_vectors<A, N>(g + v * L, y, count_y, x, count_x, band + v * L)
  DCN_SPREAD(8);
  DCN_SPREAD(4);
  DCN_SPREAD(2);
  DCN_SPREAD(1);
#undef DCN_SPREAD
}

/* Where the samples of a RoI can be along y, for `misses`. */
template <class A>
static void bound_roi(const RoiPool<A> &r, const dcn_roi_tensors &t, int64_t roi, double &low,
                      double &high) {
  const Region<A> region(r, t, roi);
  low = __builtin_inf();
  high = -low;
  for (int64_t k = 0; k < r.p.classes; k++)
    for (int64_t bin = 0; bin < r.bins; bin++) {
      double y, x;
      region.origin(r, t, roi, k, bin, y, x);
      const double end = y + region.y.bin;
      if (!region.finite || end != end) continue; /* the bin spreads nothing */
      low = min(low, min(y, end));
      high = max(high, max(y, end));
    }
}

/* grad_input of one band of one slab. */
template <class A>
static void spread_band(const RoiPool<A> &r, const dcn_roi_tensors &t, const RoiShared<A> &shared,
                        int64_t image, int64_t cell, int64_t slab, int64_t band, RoiScratch<A> &s) {
  const dcn_roi_params &p = r.p;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t begin = band * r.rows, end = min(begin + r.rows, p.in_h);
  const int64_t pixels = (end - begin) * p.in_w, slab_begin = slab * r.width;
  for (int64_t i = 0; i < pixels * r.pitch + L; i++) s.band[i] = 0;
  const int64_t first_class = slab_begin / r.per_class;
  const int64_t last_class = (r.slab_end(slab) - 1) / r.per_class;
  for (int64_t roi = 0; roi < p.rois; roi++) {
    if (image_of(t, roi) != image) continue;
    if (misses(shared.low[roi], shared.high[roi], p.in_h, begin, end)) continue;
    const Region<A> region(r, t, roi);
    for (int64_t k = first_class; k <= last_class; k++) {
      const int64_t c = max(slab_begin, k * r.per_class);
      const int64_t channels = min(r.slab_end(slab), (k + 1) * r.per_class) - c;
      for (int64_t first = 0; first < r.bins; first += r.chunk) {
        const int64_t count = min(r.chunk, r.bins - first);
        place_bins(r, t, roi, region, k, first, count, cell, begin, end, s);
        if (s.any_last < 0) continue;
        read_masks(r, t, roi, first, count, s.mask);
        pack_pixels(t.grad_output, r.form, p.out_channels, r.bins, roi, c, 1, channels,
                    first + s.any_first, s.any_last - s.any_first + 1,
                    s.tile + s.any_first * r.pitch, r.pitch);
        for (int64_t i = s.any_first; i <= s.any_last; i++) {
          if (s.count_y[i] <= 0 || !s.count_x[i]) continue;
          A *g = s.tile + i * r.pitch;
          if (t.mask)
            for (int64_t o = 0; o < channels; o++) g[o] *= s.mask[i];
          spread_bin(g, s.y + i * r.touches_y, s.count_y[i], s.x + i * r.touches_x, s.count_x[i],
                     ceil_div(channels, L), s.band + c - slab_begin);
        }
      }
    }
  }
  write_tile(t.grad_input, r.form, p.in_channels, p.in_h * p.in_w, image,
             r.input_channel(cell, slab), r.cells, r.slab_end(slab) - slab_begin, begin * p.in_w,
             pixels, s.band, r.pitch, nullptr);
}

/* A packing task: ROI_PACK_PIXELS pixels of one slab. */
template <class A>
static void pack_image(const RoiPool<A> &r, const void *input, int64_t image, int64_t task,
                       A *packed) {
  const dcn_roi_params &p = r.p;
  const int64_t plane = task / r.pieces, first = task % r.pieces * ROI_PACK_PIXELS;
  const int64_t cell = plane / r.slabs, slab = plane % r.slabs;
  const int64_t pixels = min(ROI_PACK_PIXELS, p.in_h * p.in_w - first);
  A *to = packed + plane * r.plane + first * r.pitch;
  pack_pixels(input, r.form, p.in_channels, p.in_h * p.in_w, image, r.input_channel(cell, slab),
              r.cells, r.slab_end(slab) - slab * r.width, first, pixels, to, r.pitch);
  if (first + pixels == p.in_h * p.in_w)
    for (int64_t i = 0; i < Vector<A>::lanes; i++) to[pixels * r.pitch + i] = 0;
}

template <class A>
static void roi_pool_plan(const dcn_roi_params &p, int direction, int wanted, int num_threads,
                          dcn_cpu_plan *plan) {
  const RoiPool<A> whole(p, direction, wanted, 0);
  int64_t rows =
      min(p.in_h, max((int64_t)1, BAND_BYTES / (p.in_w * whole.pitch * (int64_t)sizeof(A))));
  /* Two tasks a thread at least: bands do not change results. */
  const int64_t bands = ceil_div(2 * num_threads, max((int64_t)1, p.batch * whole.planes()));
  rows = min(rows, ceil_div(p.in_h, min(p.in_h, bands)));
  const RoiPool<A> r(p, direction, wanted, rows);
  Arena shared = {nullptr, 0}, scratch = {nullptr, 0};
  RoiShared<A>(r, shared);
  RoiScratch<A>(r, scratch);
  plan->waves = r.waves;
  plan->phases = 2;
  plan->tasks[0] = r.pack_tasks() + (r.input_gradient ? r.roi_tasks() : 0);
  plan->tasks[1] = r.band_tasks() + (r.packs ? r.roi_tasks() : 0);
  plan->shared_bytes = shared.used;
  plan->scratch_bytes = scratch.used;
  plan->internal = rows * 256 + wanted;
  __int128 work = (__int128)p.rois * r.bins * p.out_channels * WORK_OF_A_VALUE;
  if (direction == DCN_BACKWARD) work *= 2;
  plan->work = work > INT64_MAX ? INT64_MAX : (int64_t)work;
}

template <class A>
static void roi_pool_run(const dcn_cpu_call &call, int64_t wave, int64_t phase, int64_t task,
                         void *memory) {
  const dcn_roi_params &p = *(const dcn_roi_params *)(const void *)call.params;
  const dcn_roi_tensors &t = *(const dcn_roi_tensors *)(const void *)call.tensors;
  const RoiPool<A> r(p, call.direction, (int)(call.plan->internal % 256),
                     call.plan->internal / 256);
  Arena shared_arena = {(char *)call.shared, 0}, arena = {(char *)memory, 0};
  const RoiShared<A> shared(r, shared_arena);
  RoiScratch<A> s(r, arena);
  const int64_t first_image = wave * r.wave, images = min(r.wave, p.batch - first_image);
  if (phase == 0 && task < r.pack_tasks()) {
    const int64_t tasks = r.planes() * r.pieces, slot = task / tasks;
    if (slot < images)
      pack_image(r, t.input, first_image + slot, task % tasks,
                 shared.planes + slot * r.planes() * r.plane);
    return;
  }
  if (phase == 1 && task < r.band_tasks()) {
    const int64_t tasks = r.planes() * r.bands, slot = task / tasks;
    if (slot >= images) return;
    const int64_t plane = task % tasks / r.bands;
    return spread_band(r, t, shared, first_image + slot, plane / r.slabs, plane % r.slabs,
                       task % r.bands, s);
  }
  task -= phase == 0 ? r.pack_tasks() : r.band_tasks();
  for (int64_t roi = task * ROIS; roi < min((task + 1) * ROIS, p.rois); roi++) {
    const int64_t slot = image_of(t, roi) - first_image;
    if (slot < 0 || slot >= images) continue;
    const A *planes = shared.planes + slot * r.planes() * r.plane;
    if (phase == 0)
      bound_roi(r, t, roi, shared.low[roi], shared.high[roi]);
    else if (call.direction == DCN_FORWARD)
      pool_roi(r, t, planes, roi, s);
    else
      differentiate_roi(r, t, planes, roi, s);
  }
}

}  // namespace DCN_ISA
#endif
