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
 * pixels at once, whole vectors of pixels: 2 to 3 cycles a position with AVX-512. The forward pass wants
 * corners and weights only, and leaves the weights of what is `nowhere` as they come: finite, or NaN.
 * Rows of a tile are `tile` values apart, a multiple of the vector. 8 + 9 * sizeof(A) bytes a position
 * and tap.
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
  int64_t *at;    /* top left, in values from the slab's start; the others are fixed steps away */
  A *weight[4];   /* top left, top right, bottom left, bottom right; the mask is in them */
  A *rest;        /* the mask where it is not finite, else 1 */
  A *mask;        /* as it came; 1 without one */
  A *fraction[2]; /* y, x */
  I *state;       /* OUTSIDE, INSIDE, EDGE, NOT_A_NUMBER */

  Corners(Arena &arena, int64_t count, bool backward) {
    at = arena.take<int64_t>(count);
    for (auto &array : weight) array = arena.take<A>(count);
    rest = arena.take<A>(count);
    mask = arena.take<A>(backward ? count : 0);
    for (auto &array : fraction) array = arena.take<A>(backward ? count : 0);
    state = arena.take<I>(backward ? count : 0);
  }

  /* What sampling reads, from pixel `first` of the tile on. */
  Corners from(int64_t first) const {
    Corners later = *this;
    later.at += first;
    for (auto &array : later.weight) array += first;
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

/* A tile of output pixels as the positions of tap (0, 0), and a tap's offsets and mask. */
template <class A>
struct Tile {
  typedef typename Integer<A>::type I;
  int64_t *y, *x;
  I *small_y, *small_x; /* the same, where positions are small enough for I */
  A *offset_y, *offset_x, *mask;

  Tile(Arena &arena, int64_t count) {
    y = arena.take<int64_t>(count);
    x = arena.take<int64_t>(count);
    small_y = arena.take<I>(count);
    small_x = arena.take<I>(count);
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

/* Whether all positions and all indices into a slab fit into I with room to spare. */
template <class A>
DCN_INLINE bool is_small(const dcn_params &p, const Frame &frame, int64_t pitch) {
  const int64_t span = 1 << 24, all = (int64_t)1 << 31;
  return sizeof(A) == 8 ||
         (p.in_h < span && p.in_w < span && p.pad_top < span && p.pad_left < span &&
          (p.out_h - 1) * p.stride_h < span && (p.out_w - 1) * p.stride_w < span &&
          (p.kernel_h - 1) * p.dilation_h < span && (p.kernel_w - 1) * p.dilation_w < span &&
          frame.pixels < all / pitch);
}

/* Output pixels first .. first + count - 1 of an image. */
template <class A>
static void tile_positions(const dcn_params &p, int64_t first, int64_t count, const Tile<A> &tile) {
  typedef typename Integer<A>::type I;
  int64_t oh = first / p.out_w, ow = first % p.out_w;
  for (int64_t i = 0; i < count; i++) {
    tile.y[i] = oh * p.stride_h - p.pad_top;
    tile.x[i] = ow * p.stride_w - p.pad_left;
    tile.small_y[i] = (I)tile.y[i];
    tile.small_x[i] = (I)tile.x[i];
    if (++ow == p.out_w) ow = 0, oh++;
  }
  /* The rest of the last vector is computed too, and used by nobody. */
  for (int64_t i = count; i < round_up(count, Vector<A>::lanes); i++) {
    tile.small_y[i] = tile.small_x[i] = 0;
    tile.offset_y[i] = tile.offset_x[i] = 0;
    tile.mask[i] = 1;
  }
}

/* Fills row `row` of `corners` for one tap; whether some mask is not finite. With `backward`, positions
 * exactly at -1 keep the corners that the right-hand derivative needs; without, they are outside. */
template <class A, bool backward>
static bool tap_corners(const dcn_params &p, const Frame &frame, int64_t tap, const Tile<A> &tile,
                        const Moves<A> &moves, int64_t count, int64_t pitch,
                        const Corners<A> &corners, int64_t row) {
  typedef typename Integer<A>::type I;
  const int64_t shift_y = tap / p.kernel_w * p.dilation_h,
                shift_x = tap % p.kernel_w * p.dilation_w;
  const int64_t H = p.in_h, W = p.in_w, nowhere = frame.nowhere * pitch;
  const A far = A(1099511627776.0); /* 2^40: beyond any position, exact in an int64 */
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
    const int64_t y = tile.y[i] + shift_y + iy, x = tile.x[i] + shift_x + ix;
    const bool cell = (y >= -1) & (y < H) & (x >= -1) & (x < W);
    const bool edge = ((y == -1) & (ly == 0)) | ((x == -1) & (lx == 0));
    const bool value = cell & !edge, read = backward ? cell : value;
    const bool nan = (oy != oy) | (ox != ox), finite = m - m == 0;
    const A bad = oy + ox; /* NaN if either is */
    const A fold = finite ? m : A(1);
    const A top = (1 - ly) * fold, bottom = ly * fold;
    const int64_t at = row + i;
    corners.at[at] = read & !nan ? frame.at(y, x) * pitch : nowhere;
    corners.weight[0][at] = nan ? bad : value ? top * (1 - lx) : A(0);
    corners.weight[1][at] = nan ? bad : value ? top * lx : A(0);
    corners.weight[2][at] = nan ? bad : value ? bottom * (1 - lx) : A(0);
    corners.weight[3][at] = nan ? bad : value ? bottom * lx : A(0);
    corners.rest[at] = finite ? A(1) : m;
    special |= !finite;
    if (backward) {
      corners.mask[at] = m;
      corners.fraction[0][at] = ly;
      corners.fraction[1][at] = lx;
      corners.state[at] = (I)(nan ? NOT_A_NUMBER : value ? INSIDE : cell ? EDGE : OUTSIDE);
    }
  }
  return special;
}

#if DCN_VECTOR_BYTES
/* The same for whole vectors of pixels, positions and indices in I. */
template <class A, bool backward>
static bool tap_corners_small(const dcn_params &p, const Frame &frame, int64_t tap,
                              const Tile<A> &tile, const Moves<A> &moves, int64_t count,
                              int64_t pitch, const Corners<A> &corners, int64_t row) {
  typedef typename Integer<A>::type I;
  typedef typename Vector<A>::V V;
  typedef typename Vector<A>::Mask M;
  typedef typename Unsigned<A>::V U; /* products wrap where they are not used */
  typedef int64_t Wide __attribute__((vector_size(Vector<A>::lanes * 8)));
  typedef int64_t WideUnaligned
      __attribute__((vector_size(Vector<A>::lanes * 8), aligned(8), may_alias));
  typedef I MaskUnaligned
      __attribute__((vector_size(DCN_VECTOR_BYTES), aligned(sizeof(I)), may_alias));
  constexpr int64_t L = Vector<A>::lanes;
  const I shift_y = (I)(tap / p.kernel_w * p.dilation_h);
  const I shift_x = (I)(tap % p.kernel_w * p.dilation_w);
  const I H = (I)p.in_h, W = (I)p.in_w;
  const U frame_row = U{} + (unsigned)frame.row, step = U{} + (unsigned)pitch;
  const U below = (U)(M{} + shift_y + 1), right = (U)(M{} + shift_x + 1);
  const A limit = sizeof(A) == 8 ? A(1099511627776.0) : A(67108864.0); /* 2^40, 2^26 */
  const V far = splat(limit), one = splat(A(1)), zero = V{};
  const M nowhere = M{} + (I)(frame.nowhere * pitch);
  M special = M{};
  for (int64_t i = 0; i < count; i += L) {
    const V oy = load(moves.y + i), ox = load(moves.x + i), m = load(moves.mask + i);
    const M finite = (m - m) == zero;
    const V fold = finite ? m : one;
    const int64_t at = row + i;
    store(corners.rest + at, finite ? one : m);
    special |= i + L <= count ? ~finite : ~finite & first_lanes<A>((int)(count - i));
    if (!backward) {
      V cy = oy > far ? far : oy, cx = ox > far ? far : ox; /* NaN stays NaN */
      cy = cy < -far ? -far : cy;
      cx = cx < -far ? -far : cx;
      M iy = __builtin_convertvector(cy, M), ix = __builtin_convertvector(cx, M);
      iy += __builtin_convertvector(iy, V) > cy; /* true is -1 */
      ix += __builtin_convertvector(ix, V) > cx;
      const V ly = cy - __builtin_convertvector(iy, V), lx = cx - __builtin_convertvector(ix, V);
      const V hx = one - lx, top = (one - ly) * fold, bottom = ly * fold;
      /* Rows and columns counted from -1 on, which with a fraction of 0 is outside. */
      const U y = (U) * (const MaskUnaligned *)(tile.small_y + i) + (U)iy + below;
      const U x = (U) * (const MaskUnaligned *)(tile.small_x + i) + (U)ix + right;
      const M inside = (y <= (unsigned)H) & (x <= (unsigned)W) & ((y != 0) | (ly != zero)) &
                       ((x != 0) | (lx != zero));
      const M index = inside ? (M)((y * frame_row + x) * step) : nowhere;
      *(WideUnaligned *)(corners.at + at) = __builtin_convertvector(index, Wide);
      store(corners.weight[0] + at, top * hx);
      store(corners.weight[1] + at, top * lx);
      store(corners.weight[2] + at, bottom * hx);
      store(corners.weight[3] + at, bottom * lx);
      continue;
    }
    V cy = oy < far ? oy : far, cx = ox < far ? ox : far;
    cy = cy > -far ? cy : -far;
    cx = cx > -far ? cx : -far;
    M iy = __builtin_convertvector(cy, M), ix = __builtin_convertvector(cx, M);
    iy += __builtin_convertvector(iy, V) > cy; /* true is -1 */
    ix += __builtin_convertvector(ix, V) > cx;
    const V ly = cy - __builtin_convertvector(iy, V), lx = cx - __builtin_convertvector(ix, V);
    const M y = *(const MaskUnaligned *)(tile.small_y + i) + shift_y + iy;
    const M x = *(const MaskUnaligned *)(tile.small_x + i) + shift_x + ix;
    const M cell = (y >= -1) & (y < H) & (x >= -1) & (x < W);
    const M edge = ((y == -1) & (ly == zero)) | ((x == -1) & (lx == zero));
    const M value = cell & ~edge;
    const M nan = (oy != oy) | (ox != ox);
    const V bad = oy + ox;
    const V hx = one - lx, top = (one - ly) * fold, bottom = ly * fold;
    const M inside = (M)((((U)y + 1) * frame_row + ((U)x + 1)) * step);
    const M index = cell & ~nan ? inside : nowhere;
    *(WideUnaligned *)(corners.at + at) = __builtin_convertvector(index, Wide);
    store(corners.weight[0] + at, nan ? bad : value ? top * hx : zero);
    store(corners.weight[1] + at, nan ? bad : value ? top * lx : zero);
    store(corners.weight[2] + at, nan ? bad : value ? bottom * hx : zero);
    store(corners.weight[3] + at, nan ? bad : value ? bottom * lx : zero);
    store(corners.mask + at, m);
    store(corners.fraction[0] + at, ly);
    store(corners.fraction[1] + at, lx);
    const M inside_state = M{} + (I)INSIDE, edge_state = M{} + (I)EDGE;
    const M state = value ? inside_state : cell ? edge_state : M{};
    *(MaskUnaligned *)(corners.state + at) = nan ? M{} + (I)NOT_A_NUMBER : state;
  }
  for (int64_t i = 1; i < L; i++) special[0] |= special[i];
  return special[0] != 0;
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
                channel = (image * p.offset_groups + offset_group) * taps_of(p);
  (void)small;
  bool special = false;
  if (!tensors.mask)
    for (int64_t i = 0; i < tile_pitch; i++) tile.mask[i] = 1;
  if (!tensors.offset)
    for (int64_t i = 0; i < tile_pitch; i++) tile.offset_y[i] = tile.offset_x[i] = 0;
  /* In place, if they have the type and behind the last one there is something to read. */
  const int64_t all = p.batch * p.offset_groups * taps_of(p) * plane;
  const auto row = [&](const void *tensor, int64_t index, int64_t values, A *copy) -> const A * {
    if (is_direct<A>(p) && index + round_up(count, Vector<A>::lanes) <= values)
      return (const A *)tensor + index;
    read_row(tensor, p.dtype, index, 1, count, copy);
    return copy;
  };
  Moves<A> moves = {tile.offset_y, tile.offset_x, tile.mask};
  for (int64_t t = 0; t < taps; t++) {
    const int64_t k = channel + tap + t;
    if (tensors.offset) {
      moves.y = row(tensors.offset, 2 * k * plane + first, 2 * all, tile.offset_y);
      moves.x = row(tensors.offset, (2 * k + 1) * plane + first, 2 * all, tile.offset_x);
    }
    if (tensors.mask) moves.mask = row(tensors.mask, k * plane + first, all, tile.mask);
#if DCN_VECTOR_BYTES
    if (small) {
      special |= tap_corners_small<A, backward>(p, frame, tap + t, tile, moves, count, pitch,
                                                corners, t * tile_pitch);
      continue;
    }
#endif
    special |= tap_corners<A, backward>(p, frame, tap + t, tile, moves, count, pitch, corners,
                                        t * tile_pitch);
  }
  return special;
}

}  // namespace DCN_ISA
#endif
