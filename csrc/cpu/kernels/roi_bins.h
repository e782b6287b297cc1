/* Which pixels the samples of a RoI's bin touch, and with what weight: the geometry of RoI pooling.
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
 * with origin = start + offset_scale * size * offset + index * bin, and the same for y. The bilinear
 * weight of a pixel is a product of one weight per axis, and the samples of a bin are a grid. So the
 * sum over the samples is one over touched rows and columns, with the weights of all samples added up:
 *
 *   y = sum_r sum_c weight_y(r) weight_x(c) v(r, c)        dy/dp_y = the same with slope_y(r)
 *
 * The slope is the right-hand derivative: 0 where a sample is limited. Both are divided by the number
 * of samples here. Positions and sums of weights are double without fused multiply-adds: all
 * instruction sets and the reference agree on them to the last bit. A sample is looked at only if it
 * may be inside: a RoI can be as large as it likes. NaN positions make the bin NOT_A_BIN.
 */
#ifndef DCN_ROI_BINS_H
#define DCN_ROI_BINS_H

#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

/* One touched row or column. */
template <class A>
struct Touch {
  int64_t at; /* in values of the packed plane */
  A weight, slope;
};

/* A RoI along one axis. */
struct RoiAxis {
  double start, size, bin, spacing;
  double low, high; /* the limits of what is inside */
  double phase;     /* of a sample in its cell */
  int64_t samples, extent;
  bool counts_inside; /* the mean is over the samples inside, not over all */
  bool finite;        /* otherwise there are no positions */
};

enum { NOT_A_BIN = -1 };

constexpr int64_t MOST_ADAPTIVE = INT32_MAX; /* samples of a bin along one axis */

/* a * b, rounded: not to be fused with a sum. */
DCN_INLINE double rounded_product(double a, double b) {
  double product = a * b;
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#else
  __asm__("" : "+m"(product));
#endif
  return product;
}

/* To the nearest integer, halves away from 0. */
DCN_INLINE double round_half_away(double x) {
  if (!(x < 0x1p52 && x > -0x1p52)) return x; /* whole already, or NaN */
  const double whole = (double)(int64_t)x, rest = x - whole;
  return whole + (rest >= 0.5 ? 1 : rest <= -0.5 ? -1 : 0);
}

DCN_INLINE bool is_finite(double x) { return x - x == 0; }

static RoiAxis roi_axis(const dcn_roi_params &p, double first, double last, int64_t bins,
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
  axis.spacing = axis.bin / (double)max(axis.samples, (int64_t)1);
  return axis;
}

/* The most rows or columns that a bin can touch. */
DCN_INLINE int64_t most_touches(const dcn_roi_params &p, int64_t extent) {
  return p.samples ? min(2 * p.samples, extent) : extent;
}

/* The touches of the bin that begins at `origin`, among rows or columns begin .. end - 1, `step`
 * values apart; their number. They come in the order of the samples, each row once. `sums` is
 * scratch. */
template <class A>
static int64_t bin_touches(const RoiAxis &axis, double origin, int64_t begin, int64_t end,
                           int64_t step, Touch<double> *sums, Touch<A> *touches) {
  /* Samples first .. last may be inside; one to spare at both ends for rounding. */
  int64_t first = 0, last = axis.samples - 1;
  if (axis.spacing != 0) {
    double near = (axis.low - origin) / axis.spacing - axis.phase;
    double far = (axis.high - origin) / axis.spacing - axis.phase;
    if (axis.spacing < 0) {
      const double swap = near;
      near = far;
      far = swap;
    }
    const double limit = (double)axis.samples;
    first = near > 1 ? (int64_t)(near < limit ? near : limit) - 1 : 0;
    last = min(last, far > -2 ? (int64_t)(far < limit ? far : limit) + 1 : (int64_t)-1);
  }
  const bool falls = axis.spacing < 0;
  const double top = (double)(axis.extent - 1);
  int64_t count = 0, inside = 0;
  for (int64_t i = first; i <= last; i++) {
    const double p = origin + rounded_product((double)i + axis.phase, axis.spacing);
    if (!(p >= axis.low && p <= axis.high)) continue;
    inside++;
    const bool moves = p >= 0 && p < top;
    const double limited = p < 0 ? 0 : p < top ? p : top;
    const int64_t cell = (int64_t)limited, next = min(cell + 1, axis.extent - 1);
    const double fraction = limited - (double)cell, slope = moves ? 1 : 0;
    /* The rows come in order, up or down: a row touched before is one of the last two. */
    for (int side = 0; side < 2; side++) {
      const bool lower = (side == 0) != falls;
      const int64_t at = lower ? cell : next;
      int64_t to = count;
      if (count > 0 && sums[count - 1].at == at)
        to = count - 1;
      else if (count > 1 && sums[count - 2].at == at)
        to = count - 2;
      if (to == count) {
        sums[to].at = at;
        sums[to].weight = sums[to].slope = 0;
        count++;
      }
      sums[to].weight += lower ? 1 - fraction : fraction;
      sums[to].slope += lower ? -slope : slope;
    }
  }
  const double number = (double)(axis.counts_inside ? inside : axis.samples);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; i++) {
    if (sums[i].at < begin || sums[i].at >= end) continue;
    touches[kept].at = (sums[i].at - begin) * step;
    touches[kept].weight = (A)(sums[i].weight / number);
    touches[kept].slope = (A)(sums[i].slope / number);
    kept++;
  }
  return kept;
}

/* Whether samples from `low` to `high` cannot touch rows begin .. end - 1. What is limited touches
 * rows 0 and 1, or the last one. */
DCN_INLINE bool misses(double low, double high, int64_t extent, int64_t begin, int64_t end) {
  return (begin > 1 && high < (double)begin - 1) || (end < extent && low > (double)end);
}

/* The same for the bin that begins at `origin`; all of its samples lie between its ends. */
DCN_INLINE bool misses(const RoiAxis &axis, double origin, int64_t begin, int64_t end) {
  const double other = origin + axis.bin;
  return misses(min(origin, other), max(origin, other), axis.extent, begin, end);
}

}  // namespace DCN_ISA
#endif
