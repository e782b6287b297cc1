/* Forward: sample a tile of columns, multiply it at once, add the bias, write the tile.
 *
 *   y[n, o, p0] = b[o] + sum_{c, k} w[o, c, k] m[n, k, p0] S(x[n, c]; p0 s - pad + k d + offset)
 *
 * Zhu et al. 2019, equation 1 (Dai et al. 2017, equation 2, where m = 1).
 *
 * Phases of a wave of images
 *   0  weights -> panels [group][panel][depth][2 vectors of outputs]   (first wave only)
 *      images  -> slabs  [image][slab][pixel][pitch], a zero pixel at the end of each
 *   1  tiles: every channel and output of `tile` pixels of one image
 *
 * Layouts of a tile, in the thread's scratch
 *   columns [tile][columns_pitch]      up to 576 columns: tap-major, a block's channels innermost
 *   result  [tile][groups * padded_out]
 *
 * Sums: per output element over (offset group, chunk, block, tap, channel), always in this order.
 * Scratch: tile * (columns + outputs) * sizeof(A), below half a megabyte, plus the corners of a chunk.
 */
#ifndef DCN_FORWARD_H
#define DCN_FORWARD_H

#include "gemm_tile.h"
#include "layout.h"
#include "sample.h"

namespace DCN_ISA {

constexpr int64_t WAVE_BYTES = 4 << 20;   /* packed images of a wave, but at least one image */
constexpr int64_t PACK_PIXELS = 1024;     /* pixels of one packing task */
constexpr int64_t TILE_BYTES = 512 << 10; /* columns and result of a tile */

template <class A>
struct Forward {
  const dcn_params &p;
  Slabs<A> slabs;
  int64_t plane;       /* values of one packed slab of one image, zero pixel and slack included */
  int64_t padded_out;  /* outputs of a group, rounded up to whole vectors */
  int64_t panels;      /* panels of a group: two vectors of outputs each */
  int64_t depth;       /* C/groups * KH * KW */
  int64_t columns_row; /* values of a row of columns */
  int64_t result_row;  /* values of a row of the result */
  int64_t tile, tiles; /* pixels of a tile; tiles of an image */
  int64_t wave;        /* images of a wave */
  int64_t chunk;       /* taps of a chunk */
  int64_t pack_tasks;  /* packing tasks of an image */

  Forward(const dcn_params &params, int num_threads) : p(params), slabs(params) {
    constexpr int64_t L = Vector<A>::lanes;
    plane = (plane_in(p) + 1) * slabs.pitch + LINE / (int64_t)sizeof(A);
    padded_out = round_up(group_out(p), L);
    panels = ceil_div(padded_out, 2 * L);
    depth = group_in(p) * taps_of(p);
    chunk = chunk_taps(p, slabs);
    if (is_depthwise(p)) {
      columns_row = 0;
      result_row = slabs.pitch;
    } else {
      columns_row = columns_pitch(p, slabs);
      result_row = row_pitch<A>(p.groups * padded_out);
    }
    const int64_t pixels = plane_out(p);
    const int64_t row_bytes = (columns_row + result_row) * (int64_t)sizeof(A);
    tile = TILE_BYTES / row_bytes / ROWS * ROWS;
    tile = max((int64_t)2 * ROWS, min(tile, (int64_t)112 * 4 / (int64_t)sizeof(A)));
    tiles = ceil_div(pixels, tile);
    const int64_t wanted = ceil_div(num_threads, max(p.batch, (int64_t)1));
    if (tiles < wanted) tiles = min(wanted, ceil_div(pixels, (int64_t)ROWS));
    tile = ceil_div(pixels, tiles);
    tiles = ceil_div(pixels, tile);
    const int64_t image_bytes = slabs.count * plane * (int64_t)sizeof(A);
    wave = max((int64_t)1, min(p.batch, WAVE_BYTES / image_bytes));
    pack_tasks = ceil_div(plane_in(p), PACK_PIXELS) * slabs.count;
  }

  int64_t weight_tasks() const { return is_depthwise(p) ? 1 : p.groups * panels; }
  int64_t weight_values() const {
    return is_depthwise(p) ? group_out(p) * taps_of(p) * (p.in_channels + Vector<A>::lanes)
                           : p.groups * panels * depth * 2 * Vector<A>::lanes;
  }
};

/* Where everything lies in the two workspaces. */
template <class A>
struct ForwardShared {
  A *weight, *slabs;
  ForwardShared(const Forward<A> &f, Arena &arena) {
    weight = arena.take<A>(f.weight_values());
    slabs = arena.take<A>(f.wave * f.slabs.count * f.plane);
  }
};

template <class A>
struct ForwardScratch {
  int64_t *y, *x;
  A *row, *columns, *result;
  Corners<A> corners;
  ForwardScratch(const Forward<A> &f, Arena &arena) : corners(arena, f.chunk * f.tile) {
    y = arena.take<int64_t>(f.tile);
    x = arena.take<int64_t>(f.tile);
    row = arena.take<A>(2 * f.tile);
    columns = arena.take<A>(f.tile * f.columns_row);
    result = arena.take<A>(f.tile * f.result_row);
  }
};

/* One panel: [depth][2 vectors of outputs], depth = blocks of a group, each [tap][channel]. */
template <class A>
static void pack_weight_panel(const Forward<A> &f, const void *weight, int64_t group, int64_t panel,
                              A *to) {
  const dcn_params &p = f.p;
  constexpr int64_t width = 2 * Vector<A>::lanes;
  const int64_t taps = taps_of(p), outputs = group_out(p), channels = group_in(p);
  const int64_t count = min(width, outputs - panel * width);
  for (int64_t i = 0; i < f.depth * width; i++) to[i] = 0;
  const int64_t begin = group * channels, end = begin + channels;
  for (int64_t o = 0; o < count; o++) {
    const int64_t row = (group * outputs + panel * width + o) * channels * taps;
    for (int64_t slab = 0; slab < f.slabs.count; slab++) {
      const int64_t slab_end = f.slabs.end(p, slab);
      if (slab_end <= begin || f.slabs.begin(slab) >= end) continue;
      for (int64_t c = max(begin, f.slabs.begin(slab)); c < min(end, slab_end);) {
        const Block block = block_at(p, c, slab_end);
        A *at = to + (c - begin) * taps * width + o;
        for (int64_t i = 0; i < block.count; i++)
          for (int64_t k = 0; k < taps; k++)
            at[(k * block.count + i) * width] =
                read_one<A>(weight, p.dtype, row + (c - begin + i) * taps + k);
        c += block.count;
      }
    }
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

/* One task of packing: PACK_PIXELS pixels of one slab of one image; the last one adds the zero pixel. */
template <class A>
static void pack_slab(const dcn_params &p, const Slabs<A> &slabs, const void *input, int64_t image,
                      int64_t slab, int64_t piece, A *to) {
  const int64_t first = piece * PACK_PIXELS, pixels = min(PACK_PIXELS, plane_in(p) - first);
  const int64_t begin = slabs.begin(slab);
  pack_pixels(input, p, p.in_channels, plane_in(p), image, begin, 1,
              slabs.end(p, slab) - begin, first, pixels, to + first * slabs.pitch, slabs.pitch);
  if (first + pixels == plane_in(p))
    for (int64_t i = 0; i < slabs.pitch + LINE / (int64_t)sizeof(A); i++)
      to[plane_in(p) * slabs.pitch + i] = 0;
}

template <class A>
static void forward_tile(const Forward<A> &f, const dcn_tensors &tensors, const A *weight,
                         const A *slabs, int64_t image, int64_t first, int64_t pixels,
                         const ForwardScratch<A> &s) {
  const dcn_params &p = f.p;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t taps = taps_of(p), channels = group_in(p);
  tile_positions(p, first, pixels, s.y, s.x);
  for (int64_t offset_group = 0; offset_group < p.offset_groups; offset_group++) {
    const int64_t begin = offset_group * offset_group_in(p), end = begin + offset_group_in(p);
    for (int64_t tap = 0; tap < taps; tap += f.chunk) {
      const int64_t count = min(f.chunk, taps - tap);
      chunk_corners<A, false>(p, tensors, image, offset_group, tap, count, first, pixels, f.tile, s.y,
                              s.x, f.slabs.pitch, s.corners, s.row);
      for (int64_t slab = 0; slab < f.slabs.count; slab++) {
        const int64_t slab_begin = f.slabs.begin(slab), slab_end = f.slabs.end(p, slab);
        for (int64_t c = max(begin, slab_begin); c < min(end, slab_end);) {
          const Block block = block_at(p, c, slab_end);
          sample_block(slabs + slab * f.plane + c - slab_begin, block.count, s.corners, count, f.tile,
                       pixels, s.columns, f.columns_row);
          const int64_t inside = c - block.group * channels; /* channels of the group before this */
          const A *panel = weight + block.group * f.panels * f.depth * 2 * L +
                           (inside * taps + tap * block.count) * 2 * L;
          gemm(pixels, f.padded_out / L, count * block.count, s.columns, f.columns_row, panel, 2 * L,
               f.depth * 2 * L, s.result + block.group * f.padded_out, f.result_row,
               inside > 0 || tap > 0);
          c += block.count;
        }
      }
    }
  }
  for (int64_t group = 0; group < p.groups; group++)
    write_tile(tensors.output, p, p.out_channels, plane_out(p), image, group * group_out(p), 1,
               group_out(p), first, pixels, s.result + group * f.padded_out, f.result_row,
               tensors.bias);
}

/* One channel per group: accumulate over the taps in registers, no columns, no product.
 *   result[i][c] (+)= sum_t w[j, t, c] mask[t, i] sum_q weight[q][t, i] slab[at[q][t, i] + c] */
template <class A>
static void depthwise_block(const A *slab, int64_t channels, const Corners<A> &corners, int64_t taps,
                            int64_t tile, int64_t pixels, const A *weight, int64_t weight_row,
                            A *result, int64_t result_row, bool accumulate) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  for (int64_t c = 0; c < channels; c += L) {
    for (int64_t i = 0; i < pixels; i++) {
      V acc = V{};
      for (int64_t t = 0; t < taps; t++) { /* the hot loop */
        const int64_t at = t * tile + i;
        const V s = corners.weight[0][at] * load(slab + corners.at[0][at] + c) +
                    corners.weight[1][at] * load(slab + corners.at[1][at] + c) +
                    corners.weight[2][at] * load(slab + corners.at[2][at] + c) +
                    corners.weight[3][at] * load(slab + corners.at[3][at] + c);
        acc += corners.mask[at] * s * load(weight + t * weight_row + c);
      }
      A *to = result + i * result_row + c;
      store(to, accumulate ? load(to) + acc : acc);
    }
  }
}

template <class A>
static void forward_depthwise_tile(const Forward<A> &f, const dcn_tensors &tensors, const A *weight,
                                   const A *slabs, int64_t image, int64_t first, int64_t pixels,
                                   const ForwardScratch<A> &s) {
  const dcn_params &p = f.p;
  const int64_t taps = taps_of(p), outputs = group_out(p);
  const int64_t weight_row = p.in_channels + Vector<A>::lanes;
  tile_positions(p, first, pixels, s.y, s.x);
  for (int64_t slab = 0; slab < f.slabs.count; slab++) {
    const int64_t slab_end = f.slabs.end(p, slab);
    for (int64_t c = f.slabs.begin(slab); c < slab_end;) {
      const Block block = block_at(p, c, slab_end);
      const A *channel = slabs + slab * f.plane + c - f.slabs.begin(slab);
      for (int64_t j = 0; j < outputs; j++) {
        for (int64_t tap = 0; tap < taps; tap += f.chunk) {
          const int64_t count = min(f.chunk, taps - tap);
          if (j == 0 || f.chunk < taps)
            chunk_corners<A, false>(p, tensors, image, block.offset_group, tap, count, first, pixels,
                                    f.tile, s.y, s.x, f.slabs.pitch, s.corners, s.row);
          depthwise_block(channel, block.count, s.corners, count, f.tile, pixels,
                          weight + (j * taps + tap) * weight_row + c, weight_row, s.result,
                          f.result_row, tap > 0);
        }
        write_tile(tensors.output, p, p.out_channels, plane_out(p), image, c * outputs + j, outputs,
                   block.count, first, pixels, s.result, f.result_row, tensors.bias);
      }
      c += block.count;
    }
  }
}

template <class A>
static void forward_plan(const dcn_params &p, int num_threads, dcn_cpu_plan *plan) {
  const Forward<A> f(p, num_threads);
  Arena shared = {nullptr, 0}, scratch = {nullptr, 0};
  ForwardShared<A>(f, shared);
  ForwardScratch<A>(f, scratch);
  plan->waves = ceil_div(p.batch, f.wave);
  plan->phases = 2;
  plan->tasks[0] = f.weight_tasks() + f.wave * f.pack_tasks;
  plan->tasks[1] = f.wave * f.tiles;
  plan->shared_bytes = shared.used;
  plan->scratch_bytes = scratch.used;
  plan->internal = num_threads;
}

template <class A>
static void forward_run(const dcn_cpu_call &call, int64_t wave, int64_t phase, int64_t task,
                        void *memory) {
  const dcn_params &p = *call.params;
  const Forward<A> f(p, (int)call.plan->internal);
  Arena shared_arena = {(char *)call.shared, 0}, arena = {(char *)memory, 0};
  const ForwardShared<A> shared(f, shared_arena);
  const int64_t first_image = wave * f.wave, images = min(f.wave, p.batch - first_image);
  if (phase == 0) {
    if (task < f.weight_tasks()) {
      if (wave > 0) return;
      if (is_depthwise(p))
        pack_depthwise_weight(p, call.tensors->weight, shared.weight);
      else
        pack_weight_panel(f, call.tensors->weight, task / f.panels, task % f.panels,
                          shared.weight + task * f.depth * 2 * Vector<A>::lanes);
      return;
    }
    task -= f.weight_tasks();
    const int64_t image = task / f.pack_tasks, piece = task % f.pack_tasks;
    if (image >= images) return;
    const int64_t slab = piece % f.slabs.count;
    pack_slab(p, f.slabs, call.tensors->input, first_image + image, slab, piece / f.slabs.count,
              shared.slabs + (image * f.slabs.count + slab) * f.plane);
    return;
  }
  const int64_t image = task / f.tiles, first = task % f.tiles * f.tile;
  if (image >= images) return;
  const int64_t pixels = min(f.tile, plane_out(p) - first);
  const A *slabs = shared.slabs + image * f.slabs.count * f.plane;
  const ForwardScratch<A> scratch(f, arena);
  if (is_depthwise(p))
    forward_depthwise_tile(f, *call.tensors, shared.weight, slabs, first_image + image, first, pixels,
                           scratch);
  else
    forward_tile(f, *call.tensors, shared.weight, slabs, first_image + image, first, pixels, scratch);
}

}  // namespace DCN_ISA
#endif
