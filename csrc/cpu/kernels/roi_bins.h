/* Which pixels the samples of a RoI's bin touch, and with what weight.
 *
 * The bilinear weight of a pixel is a product of one weight per axis, and the samples of a bin
 * (roi_axis.h) are a grid. So the sum over the samples is one over touched rows and columns, with the
 * weights of all samples added up:
 *
 *   y = sum_r sum_c weight_y(r) weight_x(c) v(r, c)        dy/dp_y = the same with slope_y(r)
 *
 * The slope is the right-hand derivative: 0 where a sample is limited. Both are divided by the number
 * of samples here. Sums of weights are double. NaN positions make the bin NOT_A_BIN.
 */
#ifndef DCN_ROI_BINS_H
#define DCN_ROI_BINS_H

#include "../../roi_axis.h"
#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

/* One touched row or column. */
template <class A>
struct Touch {
  int64_t at; /* in values of the packed plane */
  A weight, slope;
};

using dcn::bin_origin;
using dcn::most_touches;
using dcn::NOT_A_BIN;
using dcn::roi_axis;
using dcn::RoiAxis;

/* The touches of the bin that begins at `origin`, among rows or columns begin .. end - 1, `step`
 * values apart; their number. They come in the order of the samples, each row once. `sums` is
 * scratch. */
template <class A>
static int64_t bin_touches(const RoiAxis &axis, double origin, int64_t begin, int64_t end,
                           int64_t step, Touch<double> *sums, Touch<A> *touches) {
  const bool falls = axis.spacing < 0;
  const dcn::SampleRange range = dcn::sample_range(axis, origin);
  int64_t count = 0, inside = 0;
  for (int64_t i = range.first; i <= range.last; i++) {
    const dcn::RoiSample sample = dcn::sample_of(axis, origin, i);
    if (!sample.inside) continue;
    inside++;
    const int64_t cell = sample.cell, next = min(cell + 1, axis.extent - 1);
    const double fraction = sample.fraction, slope = sample.moves ? 1 : 0;
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
