/* Where a tap samples: the four corners around it, their weights, and the border rule.
 *
 *   py = base_y + offset_y,  base_y = oh * stride_h - pad_top + kh * dilation_h     (x likewise)
 *   S(py, px) = sum over the corners q of g(q_y, py) g(q_x, px) x(q),  g(a, b) = max(0, 1 - |a - b|)
 *
 * The integer part is base + floor(offset) in integers and the fraction comes from the offset alone,
 * so precision does not depend on where in the image a tap lands. Offsets are compared as
 * floating-point numbers before any conversion: NaN and 1e30 are as safe as 0.5.
 *
 *   (-1, H) x (-1, W)   bilinear against the frame's zeros
 *   further out         the corners are `nowhere`, weights 0: the value is exactly 0
 *   exactly at -1       the value is 0 as well, but the right-hand derivative sees row 0 (column 0)
 *   NaN                 weights NaN, corners `nowhere`: the sample is NaN, nothing is scattered
 *
 * The mask is folded into the weights. A mask that is infinite or NaN is not: it would turn a weight of
 * 0 into NaN. It stays in `rest` (1 elsewhere), and who samples multiplies by it if there is one.
 *
 * Dai et al. 2017, equations 2 to 4; Zhu et al. 2019, equation 1. Computed for one tap and a tile of
 * pixels at once, whole vectors of pixels: 1 to 2 cycles a position with AVX-512, while all offsets and
 * masks are finite; a chunk where one is not is computed again, position by position. The forward pass
 * wants corners and weights only, and leaves the weights of what is `nowhere` as they come: finite.
 * Rows of a tile are `tile` values apart, a multiple of the vector. 8 + 9 * sizeof(A) bytes a position
 * and tap, and what lies unused between the four arrays of weights.
 */
#ifndef DCN_BILINEAR_H
#define DCN_BILINEAR_H

#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

/* Signed integers as wide as A: lanes of the same vector. */
template <class A>
struct Integer {
  typedef int32_t type;
};
template <>
struct Integer<double> {
  typedef int64_t type;
};

/* Corners of one chunk of taps: arrays [tap][tile], one after the other. */
template <class A>
struct Corners {
  typedef typename Integer<A>::type I;
  /* From one corner's weights to the next one's: the compiler knows it, so that one register is enough
   * for the four. Not a multiple of what shares a set of the first-level cache. */
  static constexpr int64_t APART = MOST_TAPS * MOST_PIXELS + 3 * LINE / (int64_t)sizeof(A);
  int64_t *at;    /* top left, in values from the slab's start; the others are fixed steps away */
  A *weight;      /* top left, top right, bottom left, bottom right; the mask is in them */
  A *rest;        /* the mask where it is not finite, else 1 */
  A *mask;        /* as it came; 1 without one */
  A *fraction[2]; /* y, x */
  I *state;       /* OUTSIDE, INSIDE, EDGE, NOT_A_NUMBER */

  Corners(Arena &arena, int64_t count, bool backward) {
    at = arena.take<int64_t>(count);
    weight = arena.take<A>(3 * APART + count);
    rest = arena.take<A>(count);
    mask = arena.take<A>(backward ? count : 0);
    for (auto &array : fraction) array = arena.take<A>(backward ? count : 0);
    state = arena.take<I>(backward ? count : 0);
  }

  /* What sampling reads, from pixel `first` of the tile on. */
  Corners from(int64_t first) const {
    Corners later = *this;
    later.at += first;
    later.weight += first;
    later.rest += first;
    return later;
  }
};

enum {
  OUTSIDE = 0,
  INSIDE = 1,
  EDGE = 2, /* exactly at -1: value 0, but with an offset gradient */
  NOT_A_NUMBER = 3,
};

/* A tile of output pixels: where its taps lie without offsets, and a tap's offsets and mask. */
template <class A>
struct Tile {
  A *least_y, *least_x; /* offsets that lead tap (0, 0) to -1; where positions are small */
  A *offset_y, *offset_x, *mask;

  Tile(Arena &arena, int64_t count) {
    least_y = arena.take<A>(count + Vector<A>::lanes);
    least_x = arena.take<A>(count + Vector<A>::lanes);
    offset_y = arena.take<A>(count);
    offset_x = arena.take<A>(count);
    mask = arena.take<A>(count);
  }
};

/* A tap's offsets and mask: whole vectors can be read. */
template <class A>
struct Moves {
  const A *y, *x, *mask;
};

/* Whether A's numbers hold all positions and pixels of the frame exactly, and I all indices. */
template <class A>
DCN_INLINE bool is_small(const dcn_params &p, const Frame &frame) {
  const int64_t span = 1 << 22, most = 1 << 24;
  return p.in_h < span && p.in_w < span && p.pad_top < span && p.pad_left < span &&
         (p.out_h - 1) * p.stride_h < span && (p.out_w - 1) * p.stride_w < span &&
         (p.kernel_h - 1) * p.dilation_h < span && (p.kernel_w - 1) * p.dilation_w < span &&
         frame.pixels < most;
}

/* Output pixels first .. first + count - 1 of an image, row by row. */
template <class A>
static void tile_positions(const dcn_params &p, int64_t first, int64_t count, const Tile<A> &tile) {
#if DCN_VECTOR_BYTES
  constexpr int64_t L = Vector<A>::lanes;
  typename Vector<A>::V lane;
  for (int64_t j = 0; j < L; j++) lane[j] = (A)(j * p.stride_w);
  int64_t oh = first / p.out_w, ow = first % p.out_w;
  for (int64_t i = 0; i < count; oh++, ow = 0) {
    const int64_t length = min(p.out_w - ow, count - i);
    const A y = (A)(p.pad_top - 1 - oh * p.stride_h);
    const int64_t x = p.pad_left - 1 - ow * p.stride_w;
    for (int64_t j = 0; j < length; j += L) { /* the next row overwrites what spills */
      store(tile.least_y + i + j, splat(y));
      store(tile.least_x + i + j, splat((A)(x - j * p.stride_w)) - lane);
    }
    i += length;
  }
#else
  (void)p, (void)first;
#endif
  /* The rest of the last vector is computed too, and used by nobody. */
  for (int64_t i = count; i < round_up(count, Vector<A>::lanes); i++) {
    tile.offset_y[i] = tile.offset_x[i] = 0;
    tile.mask[i] = 1;
  }
}

/* Fills row `row` of `corners` for one tap and output pixels first ..; whether some mask is not finite.
 * With `backward`, positions exactly at -1 keep the corners that the right-hand derivative needs;
 * without, they are outside. */
template <class A, bool backward>
DCN_COLD static bool tap_corners(const dcn_params &p, const Frame &frame, int64_t tap,
                                 int64_t first, const Moves<A> &moves, int64_t count, int64_t pitch,
                                 const Corners<A> &corners, int64_t row) {
  typedef typename Integer<A>::type I;
  const int64_t shift_y = tap / p.kernel_w * p.dilation_h - p.pad_top,
                shift_x = tap % p.kernel_w * p.dilation_w - p.pad_left;
  const int64_t H = p.in_h, W = p.in_w, nowhere = frame.nowhere * pitch;
  const A far = A(1099511627776.0); /* 2^40: beyond any position, exact in an int64 */
  int64_t oh = first / p.out_w, ow = first % p.out_w;
  bool special = false;
  for (int64_t i = 0; i < count; i++) {
    const A oy = moves.y[i], ox = moves.x[i], m = moves.mask[i];
    A cy = oy < far ? oy : far, cx = ox < far ? ox : far; /* NaN goes far out too */
    cy = cy > -far ? cy : -far;
    cx = cx > -far ? cx : -far;
    int64_t iy = (int64_t)cy, ix = (int64_t)cx;
    iy -= (A)iy > cy;
    ix -= (A)ix > cx;
    const A ly = cy - (A)iy, lx = cx - (A)ix;
    const int64_t y = oh * p.stride_h + shift_y + iy, x = ow * p.stride_w + shift_x + ix;
    const bool cell = (y >= -1) & (y < H) & (x >= -1) & (x < W);
    const bool edge = ((y == -1) & (ly == 0)) | ((x == -1) & (lx == 0));
    const bool value = cell & !edge, read = backward ? cell : value;
    const bool nan = (oy != oy) | (ox != ox), finite = m - m == 0;
    const A bad = oy + ox; /* NaN if either is */
    const A fold = finite ? m : A(1);
    const A top = (1 - ly) * fold, bottom = ly * fold;
    const int64_t at = row + i;
    corners.at[at] = (read & !nan) ? frame.at(y, x) * pitch : nowhere;
    const A w[4] = {top * (1 - lx), top * lx, bottom * (1 - lx), bottom * lx};
    for (int q = 0; q < 4; q++)
      corners.weight[q * corners.APART + at] = nan ? bad : value ? w[q] : A(0);
    corners.rest[at] = finite ? A(1) : m;
    special |= !finite;
    if (backward) {
      corners.mask[at] = m;
      corners.fraction[0][at] = ly;
      corners.fraction[1][at] = lx;
      corners.state[at] = (I)(nan ? NOT_A_NUMBER : value ? INSIDE : cell ? EDGE : OUTSIDE);
    }
    if (++ow == p.out_w) ow = 0, oh++;
  }
  return special;
}

#if DCN_VECTOR_BYTES
/* The same for whole vectors of pixels of a small problem whose offsets and masks are finite. A lane of the
 * result is 0 if those of its pixels are, and NaN if one is not. */
template <class A, bool backward>
static typename Vector<A>::V tap_corners_small(const dcn_params &p, const Frame &frame, int64_t tap,
                                               const Tile<A> &tile, const Moves<A> &moves,
                                               int64_t count, int64_t pitch,
                                               const Corners<A> &corners, int64_t row) {
  typedef typename Integer<A>::type I;
  typedef typename Vector<A>::V V;
  typedef typename Vector<A>::Mask M;
  typedef typename Unsigned<A>::V U;
  typedef int64_t Wide __attribute__((vector_size(Vector<A>::lanes * 8)));
  typedef int64_t WideUnaligned
      __attribute__((vector_size(Vector<A>::lanes * 8), aligned(8), may_alias));
  typedef I MaskUnaligned
      __attribute__((vector_size(DCN_VECTOR_BYTES), aligned(sizeof(I)), may_alias));
  constexpr int64_t L = Vector<A>::lanes;
  const V shift_y = splat((A)(tap / p.kernel_w * p.dilation_h));
  const V shift_x = splat((A)(tap % p.kernel_w * p.dilation_w));
  const V H = splat((A)p.in_h), W = splat((A)p.in_w), frame_row = splat((A)frame.row);
  const V nowhere = splat((A)frame.nowhere), one = splat(A(1)), zero = V{};
  V finite = zero;
  for (int64_t i = 0; i < count; i += L) {
    const V oy = load(moves.y + i), ox = load(moves.x + i), m = load(moves.mask + i);
    const V floor_y = floor_of<A>(oy), floor_x = floor_of<A>(ox);
    const V ly = oy - floor_y, lx = ox - floor_x;
    /* Rows and columns counted from -1 on; exactly there it is outside. */
    const V least_y = load(tile.least_y + i) - shift_y;
    const V least_x = load(tile.least_x + i) - shift_x;
    const V y = floor_y - least_y, x = floor_x - least_x;
    const M value = (oy > least_y) & (y <= H) & (ox > least_x) & (x <= W);
    const M cell = backward ? (y >= zero) & (y <= H) & (x >= zero) & (x <= W) : value;
    const V pixel = cell ? y * frame_row + x : nowhere;
    const M index = (M)((U) __builtin_convertvector(pixel, M) * (I)pitch);
    const V hx = one - lx, top = (one - ly) * m, bottom = ly * m;
    const V w[4] = {top * hx, top * lx, bottom * hx, bottom * lx};
    finite += zero * w[3];
    const int64_t at = row + i;
    *(WideUnaligned *)(corners.at + at) = __builtin_convertvector(index, Wide);
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++)
      store(corners.weight + q * corners.APART + at, backward ? keep<A>(value, w[q]) : w[q]);
    if (backward || VARIANTS == ONE_VARIANT) store(corners.rest + at, one);
    if (backward) {
      store(corners.mask + at, m);
      store(corners.fraction[0] + at, ly);
      store(corners.fraction[1] + at, lx);
      const M inside_state = M{} + (I)INSIDE, edge_state = M{} + (I)EDGE;
      *(MaskUnaligned *)(corners.state + at) = value ? inside_state : cell & edge_state;
    }
  }
  return finite;
}
#endif

/* Corners of taps tap .. tap + taps - 1 of one offset group, rows `tile_pitch` apart; whether some
 * mask is not finite. No offsets are offsets of 0. */
template <class A, bool backward>
static bool chunk_corners(const dcn_params &p, const dcn_tensors &tensors, const Frame &frame,
                          bool small, int64_t image, int64_t offset_group, int64_t tap,
                          int64_t taps, int64_t first, int64_t count, int64_t tile_pitch,
                          const Tile<A> &tile, int64_t pitch, const Corners<A> &corners) {
  const int64_t plane = plane_out(p),
                channel = (image * p.offset_groups + offset_group) * taps_of(p) + tap;
  if (!tensors.mask)
    for (int64_t i = 0; i < tile_pitch; i++) tile.mask[i] = 1;
  if (!tensors.offset)
    for (int64_t i = 0; i < tile_pitch; i++) tile.offset_y[i] = tile.offset_x[i] = 0;
  /* In place, if they have the type and behind the last one there is something to read. */
  const int64_t all = p.batch * p.offset_groups * taps_of(p) * plane;
  const auto row = [&](const void *tensor, int64_t index, int64_t values, A *copy) -> const A * {
    if (!tensor) return copy;
    if (is_direct<A>(p) && index + round_up(count, Vector<A>::lanes) <= values)
      return (const A *)tensor + index;
    read_row(tensor, p.dtype, index, 1, count, copy);
    return copy;
  };
  const auto moves = [&](int64_t t) {
    const int64_t k = channel + t;
    return Moves<A>{row(tensors.offset, 2 * k * plane + first, 2 * all, tile.offset_y),
                    row(tensors.offset, (2 * k + 1) * plane + first, 2 * all, tile.offset_x),
                    row(tensors.mask, k * plane + first, all, tile.mask)};
  };
#if DCN_VECTOR_BYTES
  if (small) {
    typename Vector<A>::V finite = {};
    for (int64_t t = 0; t < taps; t++)
      finite += tap_corners_small<A, backward>(p, frame, tap + t, tile, moves(t), count, pitch,
                                               corners, t * tile_pitch);
    if (fold<A>(finite) == 0) return false;
  }
#endif
  (void)small;
  bool special = false;
  for (int64_t t = 0; t < taps; t++)
    special |= tap_corners<A, backward>(p, frame, tap + t, first, moves(t), count, pitch, corners,
                                        t * tile_pitch);
  return special;
}

}  // namespace DCN_ISA
#endif
