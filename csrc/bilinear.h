/* Where one tap samples, in plain scalar code: the four corners, their weights, and the border rule.
 *
 *   py = y + offset_y,  y = oh * stride_h - pad_top + kh * dilation_h       (x likewise)
 *   S(py, px) = sum over the corners q of g(q_y, py) g(q_x, px) x(q),  g(a, b) = max(0, 1 - |a - b|)
 *
 * The integer part is y + floor(offset) in 64-bit integers and the fraction comes from the offset
 * alone, so precision does not depend on where in the image a tap lands. Offsets are compared as
 * floating-point numbers before any conversion: NaN and 1e30 are as safe as 0.5.
 *
 *   (-1, H) x (-1, W)   bilinear; corners outside the image count as 0
 *   further out         no corners: the value and both slopes are exactly 0
 *   exactly at -1       no value either, but the right-hand slope sees row 0 (column 0)
 *   NaN                 fractions NaN, no corners: value and slopes are NaN, nothing is scattered
 *
 * Dai et al. 2017, equations 2 to 4; Zhu et al. 2019, equation 1. The CUDA kernels and their emulation
 * compile this file; csrc/cpu/kernels/bilinear.h is the same rule for a tile of pixels at once.
 * Every function is static: nothing here may be merged over instruction sets by the linker.
 */
#ifndef DCN_SCALAR_BILINEAR_H
#define DCN_SCALAR_BILINEAR_H

#include <stdint.h>

#if defined(__CUDACC__)
#define DCN_MATH static __host__ __device__ __forceinline__
#else
#define DCN_MATH static inline __attribute__((always_inline))
#endif

namespace dcn {

/* Bits of Position::bits. */
enum {
  TOP_LEFT = 1, /* this corner lies in the image and in the cell of a sample that has slopes */
  TOP_RIGHT = 2,
  BOTTOM_LEFT = 4,
  BOTTOM_RIGHT = 8,
  CORNERS = 15,
  HAS_VALUE = 16, /* strictly inside (-1, H) x (-1, W): reads a value and scatters a gradient */
};

template <class A>
struct Position {
  int64_t pixel; /* y * W + x of the top left corner; only corners with their bit exist */
  A ly, lx;      /* fractions */
  int32_t bits;
};

template <class A>
struct Quad {
  A at[4]; /* top left, top right, bottom left, bottom right */
};

/* The sample of a tap whose place without an offset is row `y`, column `x`. */
template <class A>
DCN_MATH Position<A> locate(int64_t y, int64_t x, A offset_y, A offset_x, int64_t H, int64_t W) {
  const A far = A(1099511627776.0); /* 2^40: beyond any position, exact in an int64 */
  A cy = offset_y < far ? offset_y : far, cx = offset_x < far ? offset_x : far; /* NaN too */
  cy = cy > -far ? cy : -far;
  cx = cx > -far ? cx : -far;
  int64_t iy = (int64_t)cy, ix = (int64_t)cx;
  iy -= (A)iy > cy;
  ix -= (A)ix > cx;
  Position<A> at;
  at.ly = cy - (A)iy;
  at.lx = cx - (A)ix;
  y += iy;
  x += ix;
  const bool cell = (y >= -1) & (y < H) & (x >= -1) & (x < W);
  const bool edge = ((y == -1) & (at.ly == 0)) | ((x == -1) & (at.lx == 0));
  const bool top = cell & (y >= 0), bottom = cell & (y < H - 1);
  const bool left = x >= 0, right = x < W - 1;
  at.bits = ((top & left) ? TOP_LEFT : 0) | ((top & right) ? TOP_RIGHT : 0) |
            ((bottom & left) ? BOTTOM_LEFT : 0) | ((bottom & right) ? BOTTOM_RIGHT : 0) |
            ((cell & !edge) ? HAS_VALUE : 0);
  at.pixel = cell ? y * W + x : 0;
  if ((offset_y != offset_y) | (offset_x != offset_x)) at.ly = at.lx = offset_y + offset_x;
  return at;
}

/* The corners' weights; of use only with HAS_VALUE or for a NaN. */
template <class A>
DCN_MATH Quad<A> weights(A ly, A lx) {
  const A hy = 1 - ly, hx = 1 - lx;
  return Quad<A>{{hy * hx, hy * lx, ly * hx, ly * lx}};
}

/* sum_q weight_q v_q. */
template <class A>
DCN_MATH A weighted(const Quad<A> &weight, const Quad<A> &v) {
  return weight.at[0] * v.at[0] + weight.at[1] * v.at[1] + weight.at[2] * v.at[2] +
         weight.at[3] * v.at[3];
}

/* dS/dpy and dS/dpx, right-hand where the position is whole: the cell of floor decides. */
template <class A>
DCN_MATH A slope_y(A lx, const Quad<A> &v) {
  return (1 - lx) * (v.at[2] - v.at[0]) + lx * (v.at[3] - v.at[1]);
}
template <class A>
DCN_MATH A slope_x(A ly, const Quad<A> &v) {
  return (1 - ly) * (v.at[1] - v.at[0]) + ly * (v.at[3] - v.at[2]);
}

}  // namespace dcn
#endif
