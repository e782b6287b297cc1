/* Deformable resampling on a device: the two passes of dcn_cuda.h.
 *
 *   resample            y = S(x; i + offset_y, j + offset_x), each channel with its own offsets
 *   resample_backward   grad_offset = g dS/dp; grad_input[q] += g weight_q
 *
 * operands      input, output, offset and their gradients (N, C, H, W), contiguous; grad_input in the
 *               arithmetic type, zeroed
 * work split    a thread a value, neighbours in a row; `ordered` a thread a plane, which nobody else
 *               writes to: pixel after pixel, the same bits on every run
 * memory        no shared memory; four reads near the thread's own place a value
 * accumulators  none but grad_input
 * assumes       params checked by dcnlib/_problem_resample.py
 */
#include <math.h>

#include "launch.h"

namespace dcn {
namespace {

/* A sample: where its corners are, which of them count, and what it is good for. */
template <class A>
struct Corners {
  int64_t at[4]; /* in the plane */
  bool there[4];
  A ly, lx;
  bool has_value, moves_y, moves_x, is_nan;
};

/* One axis with `border`: limited to the image. */
template <class A>
DCN_DEVICE void limit(int64_t place, A offset, int64_t extent, int64_t &low, int64_t &high,
                      A &fraction, bool &moves) {
  const A far = A(1099511627776.0);     /* 2^40: beyond any position, exact in an int64 */
  A near = offset < far ? offset : far; /* NaN too */
  near = near > -far ? near : -far;
  int64_t whole = (int64_t)near;
  whole -= (A)whole > near;
  const int64_t cell = place + whole;
  moves = cell >= 0 && cell < extent - 1;
  fraction = moves ? near - (A)whole : A(0);
  low = cell < 0 ? 0 : cell < extent - 1 ? cell : extent - 1;
  high = low < extent - 1 ? low + 1 : low;
}

template <class A>
DCN_DEVICE Corners<A> corners_at(const dcn_resample_params &p, int64_t pixel, A offset_y,
                                 A offset_x) {
  Corners<A> c;
  const int64_t i = pixel / p.in_w, j = pixel - i * p.in_w;
  c.is_nan = offset_y != offset_y || offset_x != offset_x;
  if (p.border) {
    int64_t top, bottom, left, right;
    limit(i, offset_y, p.in_h, top, bottom, c.ly, c.moves_y);
    limit(j, offset_x, p.in_w, left, right, c.lx, c.moves_x);
    c.at[0] = top * p.in_w + left;
    c.at[1] = top * p.in_w + right;
    c.at[2] = bottom * p.in_w + left;
    c.at[3] = bottom * p.in_w + right;
    for (int q = 0; q < 4; q++) c.there[q] = true;
    c.has_value = !c.is_nan;
    c.moves_y = c.moves_y && !c.is_nan;
    c.moves_x = c.moves_x && !c.is_nan;
  } else {
    const Position<A> s = locate<A>(i, j, offset_y, offset_x, p.in_h, p.in_w);
    for (int q = 0; q < 4; q++) {
      c.there[q] = s.bits >> q & 1;
      c.at[q] = c.there[q] ? s.pixel + (q & 1) + (q >> 1) * p.in_w : 0;
    }
    c.ly = s.ly;
    c.lx = s.lx;
    c.has_value = !c.is_nan && (s.bits & HAS_VALUE);
    c.moves_y = c.moves_x = !c.is_nan && s.bits;
  }
  return c;
}

template <class T>
DCN_DEVICE Quad<typename Storage<T>::A> values(const T *plane,
                                               const Corners<typename Storage<T>::A> &c) {
  typedef typename Storage<T>::A A;
  Quad<A> v;
  for (int q = 0; q < 4; q++) v.at[q] = c.there[q] ? widen(plane[c.at[q]]) : A(0);
  return v;
}

template <class T>
DCN_DEVICE Corners<typename Storage<T>::A> sample_at(const dcn_resample_params &p,
                                                     const dcn_resample_tensors &t, int64_t plane,
                                                     int64_t pixel) {
  const int64_t pixels = p.in_h * p.in_w;
  const T *offset = (const T *)t.offset + 2 * plane * pixels + pixel;
  return corners_at(p, pixel, widen(offset[0]), widen(offset[pixels]));
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    resample(const dcn_resample_params p, const dcn_resample_tensors t, int64_t units) {
  typedef typename Storage<T>::A A;
  const int64_t pixels = p.in_h * p.in_w;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t plane = unit / pixels;
    const Corners<A> c = sample_at<T>(p, t, plane, unit - plane * pixels);
    const Quad<A> v = values((const T *)t.input + plane * pixels, c);
    const A other = c.is_nan ? A(NAN) : A(0);
    ((T *)t.output)[unit] = narrow<T>(c.has_value ? weighted(weights(c.ly, c.lx), v) : other);
  }
}

/* Both gradients of pixel `pixel` of a plane. */
template <class T, bool ORDERED>
DCN_DEVICE void differentiate(const dcn_resample_params &p, const dcn_resample_tensors &t,
                              int64_t plane, int64_t pixel, typename Storage<T>::A *grad_input) {
  typedef typename Storage<T>::A A;
  const int64_t pixels = p.in_h * p.in_w, begin = plane * pixels;
  const Corners<A> c = sample_at<T>(p, t, plane, pixel);
  const A g = widen(((const T *)t.grad_output)[begin + pixel]);
  if (t.grad_offset) {
    const Quad<A> v = values((const T *)t.input + begin, c);
    const A other = c.is_nan ? A(NAN) : A(0);
    T *to = (T *)t.grad_offset + 2 * begin + pixel;
    to[0] = narrow<T>(c.moves_y ? g * slope_y(c.lx, v) : other);
    to[pixels] = narrow<T>(c.moves_x ? g * slope_x(c.ly, v) : other);
  }
  if (!grad_input || !c.has_value) return;
  const Quad<A> w = weights(c.ly, c.lx);
  for (int q = 0; q < 4; q++) {
    if (!c.there[q]) continue;
    if (ORDERED)
      grad_input[begin + c.at[q]] += w.at[q] * g;
    else
      atomicAdd(grad_input + begin + c.at[q], w.at[q] * g);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    resample_backward(const dcn_resample_params p, const dcn_resample_tensors t, int64_t units,
                      typename Storage<T>::A *grad_input) {
  const int64_t pixels = p.in_h * p.in_w;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t plane = unit / pixels;
    differentiate<T, false>(p, t, plane, unit - plane * pixels, grad_input);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    resample_backward_ordered(const dcn_resample_params p, const dcn_resample_tensors t,
                              int64_t units, typename Storage<T>::A *grad_input) {
  for (int64_t plane = first_unit(); plane < units; plane += unit_step())
    for (int64_t pixel = 0; pixel < p.in_h * p.in_w; pixel++)
      differentiate<T, true>(p, t, plane, pixel, grad_input);
}

template <class T>
struct Resample {
  static void launch(const dcn_cuda_launch &where, const dcn_resample_params *p,
                     const dcn_resample_tensors *t) {
    const int64_t units = p->batch * p->channels * p->in_h * p->in_w;
    DCN_LAUNCH_FLAT(resample<T>, blocks_for(units, where), THREADS, where.stream, *p, *t, units);
  }
};

template <class T>
struct ResampleBackward {
  static void launch(const dcn_cuda_launch &where, const dcn_resample_params *p,
                     const dcn_resample_tensors *t, int ordered, void *grad_input) {
    typedef typename Storage<T>::A A;
    const int64_t planes = p->batch * p->channels, units = planes * p->in_h * p->in_w;
    if (ordered && grad_input)
      DCN_LAUNCH_FLAT(resample_backward_ordered<T>, blocks_for(planes, where), THREADS,
                      where.stream, *p, *t, planes, (A *)grad_input);
    else
      DCN_LAUNCH_FLAT(resample_backward<T>, blocks_for(units, where), THREADS, where.stream, *p, *t,
                      units, (A *)grad_input);
  }
};

}  // namespace
}  // namespace dcn

int dcn_cuda_resample(const dcn_resample_params *p, const dcn_resample_tensors *t,
                      const dcn_cuda_launch *where) {
  return dcn::launch<dcn::Resample>(p->dtype, *where, p, t);
}

int dcn_cuda_resample_backward(const dcn_resample_params *p, const dcn_resample_tensors *t,
                               const dcn_cuda_launch *where, int ordered, void *grad_input) {
  return dcn::launch<dcn::ResampleBackward>(p->dtype, *where, p, t, ordered, grad_input);
}
