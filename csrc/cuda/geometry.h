/* Where things lie: sizes that the kernels derive from the params, and one tap's sample.
 *
 * All products of sizes are 64 bits. Sizes themselves are below 2^31.
 */
#ifndef DCN_CUDA_GEOMETRY_H
#define DCN_CUDA_GEOMETRY_H

#include "device.h"

namespace dcn {

DCN_MATH int64_t plane_in(const dcn_params &p) { return p.in_h * p.in_w; }
DCN_MATH int64_t plane_out(const dcn_params &p) { return p.out_h * p.out_w; }
DCN_MATH int64_t taps_of(const dcn_params &p) { return p.kernel_h * p.kernel_w; }
DCN_MATH int64_t group_in(const dcn_params &p) { return p.in_channels / p.groups; }
DCN_MATH int64_t group_out(const dcn_params &p) { return p.out_channels / p.groups; }
DCN_MATH int64_t offset_group_in(const dcn_params &p) { return p.in_channels / p.offset_groups; }

/* One sample of all channels of an offset group. */
template <class A>
struct Sample {
  int64_t pixel; /* these four as in Position */
  A ly, lx;
  A mask; /* 1 without a mask */
  int32_t bits;

  /* The corners to read for the value, and to scatter to: none where there is no value. */
  DCN_MEMBER int32_t value_corners() const { return bits & HAS_VALUE ? bits & CORNERS : 0; }
  DCN_MEMBER bool is_nan() const { return ly != ly; }
};

/* An output pixel of the batch. */
struct Pixel {
  int64_t n, oh, ow;
};

DCN_DEVICE Pixel output_pixel(const dcn_params &p, int64_t index) {
  Pixel pixel;
  const int64_t row = index / p.out_w;
  pixel.ow = index - row * p.out_w;
  pixel.n = row / p.out_h;
  pixel.oh = row - pixel.n * p.out_h;
  return pixel;
}

/* Index of a tap's plane in the mask (N, G, taps, OH, OW); those of its offsets are 2 * it and 2 * it + 1. */
DCN_DEVICE int64_t mask_channel(const dcn_params &p, int64_t n, int64_t offset_group, int64_t tap) {
  return (n * p.offset_groups + offset_group) * taps_of(p) + tap;
}

template <class T>
DCN_DEVICE Sample<typename Storage<T>::A> sample_at(const dcn_params &p, const dcn_tensors &t,
                                                    const Pixel &o, int64_t offset_group,
                                                    int64_t tap) {
  typedef typename Storage<T>::A A;
  const int64_t channel = mask_channel(p, o.n, offset_group, tap), plane = plane_out(p);
  const int64_t pixel = o.oh * p.out_w + o.ow;
  const T *offset = (const T *)t.offset + 2 * channel * plane + pixel;
  const int64_t kh = tap / p.kernel_w, kw = tap - kh * p.kernel_w;
  const Position<A> at = locate<A>(o.oh * p.stride_h - p.pad_top + kh * p.dilation_h,
                                   o.ow * p.stride_w - p.pad_left + kw * p.dilation_w,
                                   widen(offset[0]), widen(offset[plane]), p.in_h, p.in_w);
  const A mask = t.mask ? widen(((const T *)t.mask)[channel * plane + pixel]) : A(1);
  return {at.pixel, at.ly, at.lx, mask, at.bits};
}

/* dL/dmask and dL/doffset of a sample from d_q = sum over channels of upstream * v_q; an outside sample
 * has none whatever the sums are, a NaN position makes all three NaN. */
template <class T, class A>
DCN_DEVICE void write_gradients(const dcn_params &p, const dcn_tensors &t, const Sample<A> &s,
                                const Quad<A> &d, const Pixel &o, int64_t offset_group,
                                int64_t tap) {
  const int64_t channel = mask_channel(p, o.n, offset_group, tap), plane = plane_out(p);
  const int64_t pixel = o.oh * p.out_w + o.ow;
  const A other = s.is_nan() ? s.ly : A(0);
  if (t.grad_mask) {
    const A value = weighted(weights(s.ly, s.lx), d);
    ((T *)t.grad_mask)[channel * plane + pixel] = narrow<T>(s.bits & HAS_VALUE ? value : other);
  }
  if (t.grad_offset) {
    const bool moves = !s.is_nan() && s.bits != 0;
    T *to = (T *)t.grad_offset + 2 * channel * plane + pixel;
    to[0] = narrow<T>(moves ? s.mask * slope_y(s.lx, d) : other);
    to[plane] = narrow<T>(moves ? s.mask * slope_x(s.ly, d) : other);
  }
}

}  // namespace dcn
#endif
