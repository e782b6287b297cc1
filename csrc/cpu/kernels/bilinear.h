/* Where a tap samples: the four corners around it, their weights, and the border rule.
 *
 *   py = base_y + offset_y,  base_y = oh * stride_h - pad_top + kh * dilation_h     (x likewise)
 *   S(py, px) = sum over the corners q of g(q_y, py) g(q_x, px) x(q),  g(a, b) = max(0, 1 - |a - b|)
 *
 * The integer part is base + floor(offset) in 64-bit integers and the fraction comes from the offset
 * alone, so precision does not depend on where in the image a tap lands. Offsets are compared as
 * floating-point numbers before any conversion: NaN and 1e30 are as safe as 0.5.
 *
 *   (-1, H) x (-1, W)   bilinear against zeros; corners outside read the zero pixel
 *   further out         all corners read the zero pixel, weights 0: the value is exactly 0
 *   exactly at -1       the value is 0 as well, but the right-hand derivative sees row 0 (column 0)
 *   NaN                 weights NaN, corners the zero pixel: the sample is NaN, nothing is scattered
 *
 * Dai et al. 2017, equations 2 to 4; Zhu et al. 2019, equation 1. Computed for one tap and a tile of
 * pixels at once, so that the loop over pixels vectorises. 4 * 8 + 7 * sizeof(A) bytes a pixel and tap.
 */
#ifndef DCN_BILINEAR_H
#define DCN_BILINEAR_H

#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

/* Corners of one chunk of taps: arrays [tap][tile], one after the other. */
template <class A>
struct Corners {
  int64_t *at[4]; /* top left, top right, bottom left, bottom right, in values from the slab's start */
  A *weight[4];
  A *mask;        /* 1 without a mask */
  A *fraction[2]; /* y, x */
  int32_t *state; /* OUTSIDE, INSIDE, EDGE, NOT_A_NUMBER */

  Corners(Arena &arena, int64_t count) {
    for (auto &array : at) array = arena.take<int64_t>(count);
    for (auto &array : weight) array = arena.take<A>(count);
    mask = arena.take<A>(count);
    for (auto &array : fraction) array = arena.take<A>(count);
    state = arena.take<int32_t>(count);
  }
};

enum {
  OUTSIDE = 0,
  INSIDE = 1,
  EDGE = 2, /* exactly at -1: value 0, but with an offset gradient */
  NOT_A_NUMBER = 3,
};

/* Output pixels first .. first + count - 1 of an image, as the positions of tap (0, 0). */
DCN_INLINE void tile_positions(const dcn_params &p, int64_t first, int64_t count, int64_t *y,
                               int64_t *x) {
  int64_t oh = first / p.out_w, ow = first % p.out_w;
  for (int64_t i = 0; i < count; i++) {
    y[i] = oh * p.stride_h - p.pad_top;
    x[i] = ow * p.stride_w - p.pad_left;
    if (++ow == p.out_w) ow = 0, oh++;
  }
}

/* Fills row `row` of `corners` for one tap. With `edges`, positions exactly at -1 keep the corners that
 * the right-hand derivative needs (backward); without, they are outside (forward). */
template <class A, bool edges>
static void tap_corners(const dcn_params &p, int64_t tap, const int64_t *tile_y, const int64_t *tile_x,
                        int64_t count, const A *offset_y, const A *offset_x, int64_t pitch,
                        const Corners<A> &corners, int64_t row) {
  const int64_t shift_y = tap / p.kernel_w * p.dilation_h, shift_x = tap % p.kernel_w * p.dilation_w;
  const int64_t H = p.in_h, W = p.in_w, zero = H * W * pitch;
  const A far = A(1099511627776.0); /* 2^40: beyond any position, exact in an int64 */
  int64_t *at00 = corners.at[0] + row, *at01 = corners.at[1] + row;
  int64_t *at10 = corners.at[2] + row, *at11 = corners.at[3] + row;
  A *w00 = corners.weight[0] + row, *w01 = corners.weight[1] + row;
  A *w10 = corners.weight[2] + row, *w11 = corners.weight[3] + row;
  A *fy = corners.fraction[0] + row, *fx = corners.fraction[1] + row;
  int32_t *state = corners.state + row;
  for (int64_t i = 0; i < count; i++) {
    const A oy = offset_y[i], ox = offset_x[i];
    A cy = oy < far ? oy : far, cx = ox < far ? ox : far; /* NaN goes far out too */
    cy = cy > -far ? cy : -far;
    cx = cx > -far ? cx : -far;
    int64_t iy = (int64_t)cy, ix = (int64_t)cx;
    iy -= (A)iy > cy;
    ix -= (A)ix > cx;
    const A ly = cy - (A)iy, lx = cx - (A)ix;
    const int64_t y = tile_y[i] + shift_y + iy, x = tile_x[i] + shift_x + ix;
    const bool cell = (y >= -1) & (y < H) & (x >= -1) & (x < W);
    const bool edge = ((y == -1) & (ly == 0)) | ((x == -1) & (lx == 0));
    const bool value = cell & !edge;
    const bool read = edges ? cell : value;
    const bool top = read & (y >= 0), bottom = read & (y < H - 1);
    const bool left = x >= 0, right = x < W - 1;
    const int64_t origin = (y * W + x) * pitch;
    at00[i] = top & left ? origin : zero;
    at01[i] = top & right ? origin + pitch : zero;
    at10[i] = bottom & left ? origin + W * pitch : zero;
    at11[i] = bottom & right ? origin + (W + 1) * pitch : zero;
    const bool nan = (oy != oy) | (ox != ox);
    const A bad = oy + ox; /* NaN if either is */
    const A hy = 1 - ly, hx = 1 - lx;
    w00[i] = nan ? bad : value ? hy * hx : A(0);
    w01[i] = nan ? bad : value ? hy * lx : A(0);
    w10[i] = nan ? bad : value ? ly * hx : A(0);
    w11[i] = nan ? bad : value ? ly * lx : A(0);
    if (edges) {
      fy[i] = ly;
      fx[i] = lx;
      state[i] = nan ? NOT_A_NUMBER : value ? INSIDE : cell ? EDGE : OUTSIDE;
    }
  }
}

/* Corners of taps tap .. tap + taps - 1 of one offset group; rows of `corners` are `tile` apart.
 * `row` is scratch for 2 * count values. */
template <class A, bool edges>
static void chunk_corners(const dcn_params &p, const dcn_tensors &tensors, int64_t image,
                          int64_t offset_group, int64_t tap, int64_t taps, int64_t first,
                          int64_t count, int64_t tile, const int64_t *tile_y, const int64_t *tile_x,
                          int64_t pitch, const Corners<A> &corners, A *row) {
  const int64_t plane = plane_out(p), channel = (image * p.offset_groups + offset_group) * taps_of(p);
  for (int64_t t = 0; t < taps; t++) {
    const int64_t k = channel + tap + t;
    read_row(tensors.offset, p.dtype, 2 * k * plane + first, 1, count, row);
    read_row(tensors.offset, p.dtype, (2 * k + 1) * plane + first, 1, count, row + count);
    tap_corners<A, edges>(p, tap + t, tile_y, tile_x, count, row, row + count, pitch, corners,
                          t * tile);
    if (tensors.mask)
      read_row(tensors.mask, p.dtype, k * plane + first, 1, count, corners.mask + t * tile);
    else
      for (int64_t i = 0; i < count; i++) corners.mask[t * tile + i] = 1;
  }
}

}  // namespace DCN_ISA
#endif
