/* Deformable RoI pooling on a device: the passes of dcn_cuda.h over some RoIs of a call.
 *
 *   touches   which rows and columns the samples of each bin touch, with weights and slopes
 *   pool      y = m sum_{r, c} weight_y(r) weight_x(c) x[r, c]
 *   sums      for each bin and class, over channels o and touches: g P, g dP/dp_y, g dP/dp_x
 *             grad_mask: sums over classes; grad_offset: scale size m sums, over the bins of a part
 *   spread    grad_input[r, c] += m g weight_y(r) weight_x(c)
 *
 * The samples of a bin are a grid and their weights products of one a row and one a column, so a bin is
 * two short lists however many samples it has (csrc/cpu/kernels/roi_bins.h says more).
 *
 * operands      touches: for (RoI, class, bin) lists of rows and columns, their lengths, and the bin's
 *               cell; sums [RoI][class][bin][3] and grad_input in the arithmetic type; rois double
 * work split    touches: a thread a bin and axis. pool: a thread a value of the output, in its memory
 *               order. sums: a warp a bin and class, lanes over channels and touches. grad_mask,
 *               grad_offset: a thread a value. spread: as pool, by reductions in memory; `ordered` a
 *               thread an (image, channel of the output), which nobody else writes to: RoI after RoI,
 *               the same bits on every run
 * memory        no shared memory
 * accumulators  float (double for float64) over touches and channels; double for weights and over bins
 * assumes       params checked by dcnlib/_problem_pool.py; image numbers are checked here, since
 *               nobody can look at them in time: a RoI on no image of the batch is NaN
 */
#include <math.h>

#include "../roi_axis.h"
#include "launch.h"

namespace dcn {
namespace {

constexpr int WARP = 32;

/* __launch_bounds__(THREADS, 1): divisions are calls, around which the compiler would rather spill than
 * take more registers. */

/* A touched row or column. */
template <class A>
struct Touch {
  int64_t at;
  A weight, slope;
};

/* The workspace of touches. */
template <class A>
struct Touches {
  Touch<A> *y, *x;
  int32_t *counts; /* three a bin: of y (or NOT_A_BIN), of x, and the bin's cell */

  DCN_MEMBER Touches(const dcn_roi_params &p, const dcn_cuda_rois &rois, void *memory) {
    const int64_t bins = rois.count * p.classes * p.out_h * p.out_w;
    y = (Touch<A> *)memory;
    x = y + bins * most_touches(p, p.in_h);
    counts = (int32_t *)(x + bins * most_touches(p, p.in_w));
  }
};

/* One bin of one class of one RoI. */
struct Bin {
  int64_t roi, k, number, index; /* number: of the RoI's; index: of all in the workspace */

  /* Of `roi` counted from the first RoI of the pass. */
  DCN_MEMBER Bin(const dcn_roi_params &p, const dcn_cuda_rois &rois, int64_t roi, int64_t k,
                 int64_t number)
      : roi(rois.first + roi), k(k), number(number) {
    index = (roi * p.classes + k) * p.out_h * p.out_w + number;
  }
};

/* Where a bin lies in its RoI: which maps it reads, whose offset it has. */
struct Place {
  int64_t ph, pw;

  DCN_MEMBER Place(const dcn_roi_params &p, int64_t number)
      : ph(number / p.out_w), pw(number - ph * p.out_w) {}
  DCN_MEMBER int64_t cell(const dcn_roi_params &p) const {
    return ph * p.group_h / p.out_h * p.group_w + pw * p.group_w / p.out_w;
  }
  DCN_MEMBER int64_t part(const dcn_roi_params &p) const {
    return ph * p.part_h / p.out_h * p.part_w + pw * p.part_w / p.out_w;
  }
};

/* Where x and y lie in memory. */
struct Strides {
  int64_t image, channel, pixel;         /* of input and grad_input */
  int64_t roi, out_channel, bin, planes; /* of the output; planes: bins of a RoI */

  DCN_MEMBER explicit Strides(const dcn_roi_params &p) {
    const bool rows = p.layout == DCN_NHWC;
    const int64_t plane = p.in_h * p.in_w;
    planes = p.out_h * p.out_w;
    image = p.in_channels * plane;
    channel = rows ? 1 : plane;
    pixel = rows ? p.in_channels : 1;
    roi = p.out_channels * planes;
    out_channel = rows ? 1 : planes;
    bin = rows ? p.out_channels : 1;
  }
};

DCN_DEVICE bool is_on_an_image(const dcn_roi_params &p, double number) {
  return number >= 0 && number < (double)p.batch && number == (double)(int64_t)number;
}

template <class A>
DCN_DEVICE Touch<A> finished(const Touch<double> &sum, int64_t number) {
  return {sum.at, (A)(sum.weight / (double)number), (A)(sum.slope / (double)number)};
}

/* The touches of one bin along one axis, as bin_touches of the CPU core has them; their number. Two
 * rows are open at a time: one that is left is done. */
template <class A>
DCN_DEVICE int32_t place_touches(const RoiAxis &axis, double origin, Touch<A> *touches) {
  const bool falls = axis.spacing < 0;
  const SampleRange range = sample_range(axis, origin);
  int64_t number = axis.samples;
  if (axis.counts_inside) {
    number = 0;
    for (int64_t i = range.first; i <= range.last; i++) number += sample_of(axis, origin, i).inside;
  }
  /* The two rows that are open, the newer one second; -1: none. */
  Touch<double> one = {-1, 0, 0}, two = {-1, 0, 0};
  int32_t count = 0;
  for (int64_t i = range.first; i <= range.last; i++) {
    const RoiSample sample = sample_of(axis, origin, i);
    if (!sample.inside) continue;
    const int64_t next = sample.cell + (sample.cell < axis.extent - 1);
    const double slope = sample.moves ? 1 : 0;
    for (int side = 0; side < 2; side++) {
      const bool lower = (side == 0) != falls;
      const Touch<double> share = {lower ? sample.cell : next,
                                   lower ? 1 - sample.fraction : sample.fraction,
                                   lower ? -slope : slope};
      if (two.at == share.at) {
        two.weight += share.weight;
        two.slope += share.slope;
      } else if (one.at == share.at) {
        one.weight += share.weight;
        one.slope += share.slope;
      } else {
        if (one.at >= 0) touches[count++] = finished<A>(one, number);
        one = two;
        two = share;
      }
    }
  }
  if (one.at >= 0) touches[count++] = finished<A>(one, number);
  if (two.at >= 0) touches[count++] = finished<A>(two, number);
  return count;
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    roi_touches(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
                int64_t units, void *memory) {
  typedef typename Storage<T>::A A;
  const Touches<A> touches(p, rois, memory);
  const int64_t bins = p.out_h * p.out_w, parts = p.part_h * p.part_w;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t both = unit >> 1, row = both / bins;
    const bool is_y = unit & 1;
    const int64_t roi = row / p.classes;
    const Bin b(p, rois, roi, row - roi * p.classes, both - row * bins);
    const Place at(p, b.number);
    const double *box = t.rois + 5 * b.roi;
    const RoiAxis y = roi_axis(p, box[2], box[4], p.out_h, p.in_h);
    const RoiAxis x = roi_axis(p, box[1], box[3], p.out_w, p.in_w);
    double move_x = 0, move_y = 0;
    if (t.offset) { /* the x plane, then the y plane */
      const T *offset = (const T *)t.offset + (b.roi * p.classes + b.k) * 2 * parts + at.part(p);
      move_x = widen(offset[0]);
      move_y = widen(offset[parts]);
    }
    const double at_y = bin_origin(p, y, move_y, at.ph), at_x = bin_origin(p, x, move_x, at.pw);
    int32_t count = NOT_A_BIN;
    if (is_on_an_image(p, box[0]) && y.finite && x.finite && at_y == at_y && at_x == at_x)
      count = is_y ? place_touches(y, at_y, touches.y + b.index * most_touches(p, p.in_h))
                   : place_touches(x, at_x, touches.x + b.index * most_touches(p, p.in_w));
    touches.counts[3 * b.index + !is_y] = count;
    if (is_y) touches.counts[3 * b.index + 2] = (int32_t)at.cell(p);
  }
}

/* A bin's lists and the first value of its image and channel. */
template <class A>
struct Lists {
  const Touch<A> *y, *x;
  int32_t count_y, count_x;
  bool is_nan;
  int64_t from;

  DCN_MEMBER Lists(const dcn_roi_params &p, const dcn_roi_tensors &t, const Touches<A> &touches,
                   const Strides &strides, const Bin &b, int64_t o) {
    y = touches.y + b.index * most_touches(p, p.in_h);
    x = touches.x + b.index * most_touches(p, p.in_w);
    count_y = touches.counts[3 * b.index];
    count_x = touches.counts[3 * b.index + 1];
    is_nan = count_y == NOT_A_BIN;
    if (is_nan) count_y = count_x = 0;
    const int64_t channel = o * p.group_h * p.group_w + touches.counts[3 * b.index + 2];
    from = is_nan ? 0 : (int64_t)t.rois[5 * b.roi] * strides.image + channel * strides.channel;
  }
};

/* A value of the output: which bin and channel it belongs to. */
struct Value {
  int64_t roi, o, bin;

  DCN_MEMBER Value(const dcn_roi_params &p, const Strides &strides, int64_t unit) {
    roi = unit / strides.roi;
    const int64_t rest = unit - roi * strides.roi;
    if (p.layout == DCN_NHWC) {
      bin = rest / p.out_channels;
      o = rest - bin * p.out_channels;
    } else {
      o = rest / strides.planes;
      bin = rest - o * strides.planes;
    }
  }
};

template <class T>
DCN_DEVICE typename Storage<T>::A mask_of(const dcn_roi_params &p, const dcn_roi_tensors &t,
                                          const Bin &b) {
  const int64_t at = b.roi * p.out_h * p.out_w + b.number;
  return t.mask ? widen(((const T *)t.mask)[at]) : typename Storage<T>::A(1);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    roi_pool(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
             int64_t units, void *memory) {
  typedef typename Storage<T>::A A;
  const Touches<A> touches(p, rois, memory);
  const Strides strides(p);
  const T *input = (const T *)t.input;
  T *output = (T *)t.output + rois.first * strides.roi;
  const int64_t per_class = p.out_channels / p.classes;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const Value v(p, strides, unit);
    const Bin b(p, rois, v.roi, v.o / per_class, v.bin);
    const Lists<A> lists(p, t, touches, strides, b, v.o);
    A sum = 0;
    for (int32_t i = 0; i < lists.count_y; i++) {
      const Touch<A> y = lists.y[i];
      const T *row = input + lists.from + y.at * p.in_w * strides.pixel;
      for (int32_t j = 0; j < lists.count_x; j++) {
        const Touch<A> x = lists.x[j];
        sum += y.weight * x.weight * widen(row[x.at * strides.pixel]);
      }
    }
    if (t.mask) sum *= mask_of<T>(p, t, b);
    output[unit] = narrow<T>(lists.is_nan ? A(NAN) : sum);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    roi_sums(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
             int64_t units, void *memory, typename Storage<T>::A *sums) {
  typedef typename Storage<T>::A A;
  const Touches<A> touches(p, rois, memory);
  const Strides strides(p);
  const T *input = (const T *)t.input, *grad_output = (const T *)t.grad_output;
  const int64_t per_class = p.out_channels / p.classes;
  const int lane = threadIdx.x % WARP;
  for (int64_t unit = first_unit() / WARP; unit < units; unit += unit_step() / WARP) {
    const int64_t row = unit / strides.planes, roi = row / p.classes;
    const Bin b(p, rois, roi, row - roi * p.classes, unit - row * strides.planes);
    const Lists<A> lists(p, t, touches, strides, b, b.k * per_class);
    const T *from = input + lists.from;
    const T *g = grad_output + b.roi * strides.roi + b.k * per_class * strides.out_channel +
                 b.number * strides.bin;
    const int64_t pixels = (int64_t)lists.count_y * lists.count_x;
    const int64_t channel = p.group_h * p.group_w * strides.channel;
    A mean = 0, down = 0, right = 0;
    for (int64_t i = lane; i < per_class * pixels; i += WARP) {
      /* Neighbouring lanes read neighbouring values. */
      const bool rows = p.layout == DCN_NHWC;
      const int64_t pixel = rows ? i / per_class : i % pixels;
      const int64_t c = rows ? i - pixel * per_class : i / pixels;
      const int64_t at_y = pixel / lists.count_x;
      const Touch<A> y = lists.y[at_y], x = lists.x[pixel - at_y * lists.count_x];
      const A product = widen(g[c * strides.out_channel]) *
                        widen(from[c * channel + (y.at * p.in_w + x.at) * strides.pixel]);
      mean += y.weight * x.weight * product;
      down += y.slope * x.weight * product;
      right += y.weight * x.slope * product;
    }
    for (int other = WARP / 2; other > 0; other /= 2) {
      mean += __shfl_xor_sync(0xffffffffu, mean, other);
      down += __shfl_xor_sync(0xffffffffu, down, other);
      right += __shfl_xor_sync(0xffffffffu, right, other);
    }
    if (lane == 0) {
      sums[3 * unit] = lists.is_nan ? A(NAN) : mean;
      sums[3 * unit + 1] = lists.is_nan ? A(NAN) : down;
      sums[3 * unit + 2] = lists.is_nan ? A(NAN) : right;
    }
  }
}

/* grad_mask: a thread a bin. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    roi_grad_mask(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
                  int64_t units, const typename Storage<T>::A *sums) {
  typedef typename Storage<T>::A A;
  const int64_t bins = p.out_h * p.out_w;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t roi = unit / bins;
    const A *of_bin = sums + 3 * (roi * (p.classes - 1) * bins + unit);
    double sum = 0;
    for (int64_t k = 0; k < p.classes; k++) sum += (double)of_bin[3 * k * bins];
    ((T *)t.grad_mask)[rois.first * bins + unit] = narrow<T>((A)sum);
  }
}

/* grad_offset: a thread a part, class and axis. */
template <class T>
__global__ void __launch_bounds__(THREADS)
    roi_grad_offset(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
                    int64_t units, void *memory, const typename Storage<T>::A *sums) {
  typedef typename Storage<T>::A A;
  const Touches<A> touches(p, rois, memory);
  const int64_t bins = p.out_h * p.out_w, parts = p.part_h * p.part_w;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t plane = unit / parts, part = unit - plane * parts;
    const int64_t row = plane >> 1, roi = row / p.classes;
    const bool is_y = plane & 1; /* the x plane, then the y plane */
    const double *box = t.rois + 5 * (rois.first + roi);
    const double size = is_y ? roi_axis(p, box[2], box[4], p.out_h, p.in_h).size
                             : roi_axis(p, box[1], box[3], p.out_w, p.in_w).size;
    double sum = 0;
    for (int64_t bin = 0; bin < bins; bin++) {
      if (Place(p, bin).part(p) != part) continue;
      const Bin b(p, rois, roi, row - roi * p.classes, bin);
      const int32_t *counts = touches.counts + 3 * b.index;
      if (counts[0] == NOT_A_BIN)
        sum = NAN;
      else if (counts[0] && counts[1]) /* else exactly 0, whatever the mask is */
        sum += p.offset_scale * size * (double)mask_of<T>(p, t, b) *
               (double)sums[3 * b.index + (is_y ? 1 : 2)];
    }
    ((T *)t.grad_offset)[2 * rois.first * p.classes * parts + unit] = narrow<T>((A)sum);
  }
}

/* One bin's share of one channel's gradient. */
template <class A, bool ORDERED>
DCN_DEVICE void spread_bin(const dcn_roi_params &p, const Strides &strides, const Lists<A> &lists,
                           A g, A *grad_input) {
  for (int32_t i = 0; i < lists.count_y; i++) {
    const Touch<A> y = lists.y[i];
    A *row = grad_input + lists.from + y.at * p.in_w * strides.pixel;
    for (int32_t j = 0; j < lists.count_x; j++) {
      const Touch<A> x = lists.x[j];
      const A share = y.weight * x.weight * g;
      if (ORDERED)
        row[x.at * strides.pixel] += share;
      else
        atomicAdd(row + x.at * strides.pixel, share);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    roi_spread(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
               int64_t units, void *memory, typename Storage<T>::A *grad_input) {
  typedef typename Storage<T>::A A;
  const Touches<A> touches(p, rois, memory);
  const Strides strides(p);
  const T *grad_output = (const T *)t.grad_output + rois.first * strides.roi;
  const int64_t per_class = p.out_channels / p.classes;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const Value v(p, strides, unit);
    const Bin b(p, rois, v.roi, v.o / per_class, v.bin);
    const Lists<A> lists(p, t, touches, strides, b, v.o);
    const A g = widen(grad_output[unit]) * mask_of<T>(p, t, b);
    spread_bin<A, false>(p, strides, lists, g, grad_input);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    roi_spread_ordered(const dcn_roi_params p, const dcn_roi_tensors t, const dcn_cuda_rois rois,
                       int64_t units, void *memory, typename Storage<T>::A *grad_input) {
  typedef typename Storage<T>::A A;
  const Touches<A> touches(p, rois, memory);
  const Strides strides(p);
  const int64_t per_class = p.out_channels / p.classes;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t image = unit / p.out_channels, o = unit - image * p.out_channels;
    const int64_t k = o / per_class;
    const T *from = (const T *)t.grad_output + rois.first * strides.roi + o * strides.out_channel;
    for (int64_t roi = 0; roi < rois.count; roi++, from += strides.roi) {
      if (t.rois[5 * (rois.first + roi)] != (double)image) continue;
      const T *g = from;
      for (int64_t bin = 0; bin < strides.planes; bin++, g += strides.bin) {
        const Bin b(p, rois, roi, k, bin);
        const Lists<A> lists(p, t, touches, strides, b, o);
        spread_bin<A, true>(p, strides, lists, widen(*g) * mask_of<T>(p, t, b), grad_input);
      }
    }
  }
}

template <class T>
struct RoiTouches {
  static void launch(const dcn_cuda_launch &where, const dcn_roi_params *p,
                     const dcn_roi_tensors *t, const dcn_cuda_rois *rois, void *memory) {
    const int64_t units = 2 * rois->count * p->classes * p->out_h * p->out_w;
    DCN_LAUNCH_FLAT(roi_touches<T>, blocks_for(units, where), THREADS, where.stream, *p, *t, *rois,
                    units, memory);
  }
};

template <class T>
struct RoiPool {
  static void launch(const dcn_cuda_launch &where, const dcn_roi_params *p,
                     const dcn_roi_tensors *t, const dcn_cuda_rois *rois, void *memory) {
    const int64_t units = rois->count * p->out_channels * p->out_h * p->out_w;
    DCN_LAUNCH_FLAT(roi_pool<T>, blocks_for(units, where), THREADS, where.stream, *p, *t, *rois,
                    units, memory);
  }
};

template <class T>
struct RoiSums {
  static void launch(const dcn_cuda_launch &where, const dcn_roi_params *p,
                     const dcn_roi_tensors *t, const dcn_cuda_rois *rois, void *memory,
                     void *sums) {
    typedef typename Storage<T>::A A;
    const int64_t bins = p->out_h * p->out_w, units = rois->count * p->classes * bins;
    DCN_LAUNCH(roi_sums<T>, blocks_for(units * WARP, where), THREADS, where.stream, *p, *t, *rois,
               units, memory, (A *)sums);
    const int64_t offsets = 2 * rois->count * p->classes * p->part_h * p->part_w;
    if (t->grad_offset)
      DCN_LAUNCH_FLAT(roi_grad_offset<T>, blocks_for(offsets, where), THREADS, where.stream, *p, *t,
                      *rois, offsets, memory, (const A *)sums);
    if (t->grad_mask)
      DCN_LAUNCH_FLAT(roi_grad_mask<T>, blocks_for(rois->count * bins, where), THREADS,
                      where.stream, *p, *t, *rois, rois->count * bins, (const A *)sums);
  }
};

template <class T>
struct RoiSpread {
  static void launch(const dcn_cuda_launch &where, const dcn_roi_params *p,
                     const dcn_roi_tensors *t, const dcn_cuda_rois *rois, void *memory, int ordered,
                     void *grad_input) {
    typedef typename Storage<T>::A A;
    if (ordered) {
      const int64_t units = p->batch * p->out_channels;
      DCN_LAUNCH_FLAT(roi_spread_ordered<T>, blocks_for(units, where), THREADS, where.stream, *p,
                      *t, *rois, units, memory, (A *)grad_input);
    } else {
      const int64_t units = rois->count * p->out_channels * p->out_h * p->out_w;
      DCN_LAUNCH_FLAT(roi_spread<T>, blocks_for(units, where), THREADS, where.stream, *p, *t, *rois,
                      units, memory, (A *)grad_input);
    }
  }
};

}  // namespace
}  // namespace dcn

int64_t dcn_cuda_roi_bytes(const dcn_roi_params *p) {
  const int64_t bins = p->classes * p->out_h * p->out_w;
  const int64_t touches = dcn::most_touches(*p, p->in_h) + dcn::most_touches(*p, p->in_w);
  const int64_t touch = p->dtype == DCN_FLOAT64 ? (int64_t)sizeof(dcn::Touch<double>)
                                                : (int64_t)sizeof(dcn::Touch<float>);
  return bins * (touches * touch + 3 * (int64_t)sizeof(int32_t));
}

int dcn_cuda_roi_touches(const dcn_roi_params *p, const dcn_roi_tensors *t,
                         const dcn_cuda_rois *rois, const dcn_cuda_launch *where, void *touches) {
  return dcn::launch<dcn::RoiTouches>(p->dtype, *where, p, t, rois, touches);
}

int dcn_cuda_roi_pool(const dcn_roi_params *p, const dcn_roi_tensors *t, const dcn_cuda_rois *rois,
                      const dcn_cuda_launch *where, void *touches) {
  return dcn::launch<dcn::RoiPool>(p->dtype, *where, p, t, rois, touches);
}

int dcn_cuda_roi_sums(const dcn_roi_params *p, const dcn_roi_tensors *t, const dcn_cuda_rois *rois,
                      const dcn_cuda_launch *where, void *touches, void *sums) {
  return dcn::launch<dcn::RoiSums>(p->dtype, *where, p, t, rois, touches, sums);
}

int dcn_cuda_roi_spread(const dcn_roi_params *p, const dcn_roi_tensors *t,
                        const dcn_cuda_rois *rois, const dcn_cuda_launch *where, void *touches,
                        int ordered, void *grad_input) {
  return dcn::launch<dcn::RoiSpread>(p->dtype, *where, p, t, rois, touches, ordered, grad_input);
}
