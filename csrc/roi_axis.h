/* Where the samples of a RoI's bin lie along one axis, in plain scalar code, for both cores.
 *
 *                aligned (mmcv)                       position-sensitive (MXNet)
 *   start        x1 * scale - 0.5                     round(x1) * scale - 0.5
 *   end          x2 * scale - 0.5                     (round(x2) + 1) * scale - 0.5
 *   size         end - start                          the same, at least 0.1
 *   bin          size / bins                          size / bins
 *   n            samples, or ceil(bin) if that is 0   samples
 *   sample i     origin + (i + 0.5) * bin / n         origin + i * bin / n
 *   outside      beyond [-1, extent]: 0, but counts   beyond [-0.5, extent - 0.5]: does not count
 *   inside       limited to [0, extent - 1]           limited to [0, extent - 1]
 *
 * with origin = start + offset_scale * size * offset + index * bin. Everything is double without fused
 * multiply-adds: all instruction sets, the CUDA kernels and the reference agree to the last bit.
 */
#ifndef DCN_ROI_AXIS_H
#define DCN_ROI_AXIS_H

#include "bilinear.h"
#include "dcn_params.h"

namespace dcn {

/* A RoI along one axis. */
struct RoiAxis {
  double start, size, bin, spacing;
  double low, high; /* the limits of what is inside */
  double phase;     /* of a sample in its cell */
  int64_t samples, extent;
  bool counts_inside; /* the mean is over the samples inside, not over all */
  bool finite;        /* otherwise there are no positions */
};

/* Samples first .. last. */
struct SampleRange {
  int64_t first, last;
};

/* One sample: the two rows it touches are `cell` and the next, if there is one. */
struct RoiSample {
  int64_t cell;
  double fraction;
  bool inside, moves; /* moves: has a slope, is not limited */
};

enum { NOT_A_BIN = -1 }; /* in place of a number of touches: positions are NaN */

constexpr int64_t MOST_ADAPTIVE = INT32_MAX; /* samples of a bin along one axis */

/* a * b, rounded: not to be fused with a sum. */
DCN_MATH double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  double product = a * b;
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
#endif
}

/* To the nearest integer, halves away from 0. */
DCN_MATH double round_half_away(double x) {
  if (!(x < 4503599627370496.0 && x > -4503599627370496.0)) return x; /* whole already, or NaN */
  const double whole = (double)(int64_t)x, rest = x - whole;
  return whole + (rest >= 0.5 ? 1 : rest <= -0.5 ? -1 : 0);
}

DCN_MATH bool is_finite(double x) { return x - x == 0; }

DCN_MATH RoiAxis roi_axis(const dcn_roi_params &p, double first, double last, int64_t bins,
                          int64_t extent) {
  RoiAxis axis;
  axis.extent = extent;
  axis.counts_inside = p.position_sensitive;
  axis.samples = p.samples;
  if (p.position_sensitive) {
    axis.start = rounded_product(round_half_away(first), p.spatial_scale) - 0.5;
    axis.size = rounded_product(round_half_away(last) + 1, p.spatial_scale) - 0.5 - axis.start;
    axis.low = -0.5;
    axis.high = (double)extent - 0.5;
    axis.phase = 0;
  } else {
    axis.start = rounded_product(first, p.spatial_scale) - 0.5;
    axis.size = rounded_product(last, p.spatial_scale) - 0.5 - axis.start;
    axis.low = -1;
    axis.high = (double)extent;
    axis.phase = 0.5;
  }
  axis.finite = is_finite(axis.start) && is_finite(axis.size);
  if (p.position_sensitive && axis.size < 0.1) axis.size = 0.1;
  axis.bin = axis.size / (double)bins;
  if (!axis.samples && axis.bin > 0) {
    axis.samples = axis.bin < (double)MOST_ADAPTIVE ? (int64_t)axis.bin : MOST_ADAPTIVE;
    axis.samples += (double)axis.samples < axis.bin && axis.samples < MOST_ADAPTIVE;
  }
  axis.spacing = axis.bin / (double)(axis.samples > 1 ? axis.samples : 1);
  return axis;
}

/* Where bin `index` begins, moved by its offset. */
DCN_MATH double bin_origin(const dcn_roi_params &p, const RoiAxis &axis, double offset,
                           int64_t index) {
  const double moved =
      axis.start + rounded_product(rounded_product(p.offset_scale, axis.size), offset);
  return moved + rounded_product((double)index, axis.bin);
}

/* The most rows or columns that a bin can touch. */
DCN_MATH int64_t most_touches(const dcn_roi_params &p, int64_t extent) {
  return p.samples && 2 * p.samples < extent ? 2 * p.samples : extent;
}

/* The samples that may be inside, one to spare at both ends for rounding: a RoI can be as large as it
 * likes, and nobody looks at the others. */
DCN_MATH SampleRange sample_range(const RoiAxis &axis, double origin) {
  SampleRange range = {0, axis.samples - 1};
  if (axis.spacing == 0) return range;
  const double one = (axis.low - origin) / axis.spacing - axis.phase;
  const double other = (axis.high - origin) / axis.spacing - axis.phase;
  const double near = axis.spacing < 0 ? other : one, far = axis.spacing < 0 ? one : other;
  const double limit = (double)axis.samples;
  if (near > 1) range.first = (int64_t)(near < limit ? near : limit) - 1;
  const int64_t last = far > -2 ? (int64_t)(far < limit ? far : limit) + 1 : -1;
  if (last < range.last) range.last = last;
  return range;
}

DCN_MATH RoiSample sample_of(const RoiAxis &axis, double origin, int64_t i) {
  const double top = (double)(axis.extent - 1);
  const double p = origin + rounded_product((double)i + axis.phase, axis.spacing);
  RoiSample sample;
  sample.inside = p >= axis.low && p <= axis.high;
  sample.moves = p >= 0 && p < top;
  const double limited = p < 0 ? 0 : p < top ? p : top;
  sample.cell = sample.inside ? (int64_t)limited : 0;
  sample.fraction = limited - (double)sample.cell;
  return sample;
}

}  // namespace dcn
#endif
