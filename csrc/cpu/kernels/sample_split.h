/* Samples a block of channels at the corners of a chunk of taps, as sample.h does, straight into the parts
 * that the matrix unit multiplies (gemm_split.h): the columns themselves are never in memory.
 *
 * k runs over the taps and, innermost, the block's channels, whole vectors of them; two vectors are one
 * block of k. Lanes beyond the block's channels are zeros.
 *
 * Eight loads, eight multiply-adds, five loads and broadcasts a position, 18 operations and three stores to
 * split: about 14 cycles for two vectors from the first-level cache.
 */
#ifndef DCN_SAMPLE_SPLIT_H
#define DCN_SAMPLE_SPLIT_H

#include "gemm_split.h"
#include "sample.h"

#if DCN_VECTOR_BYTES == 64
namespace DCN_ISA {

/* A vector of channels of a block, at one tap. */
struct Source {
  const float *channels; /* of the frame's first pixel */
  int64_t row;           /* of the corners */
  __mmask16 mask;
};

template <Sampling how>
DCN_INLINE __m512 sample_one(const float *v00, const Steps &steps, const Corners<float> &corners,
                             int64_t at, __mmask16 mask) {
  if (how == COPIED) return _mm512_maskz_loadu_ps(mask, v00);
  const float *weight = corners.weight + at;
  const auto w = [weight](int q) { return _mm512_set1_ps(weight[q * Corners<float>::APART]); };
  const float *v10 = opaque(v00 + steps.down);
  __m512 s = w(0) * load(v00);
  s = _mm512_fmadd_ps(w(1), load(v00 + steps.right), s);
  s = _mm512_fmadd_ps(w(2), load(v10), s);
  s = _mm512_maskz_fmadd_ps(mask, w(3), load(v10 + steps.right), s);
  if (how == SCALED) s = _mm512_maskz_mul_ps(mask, s, _mm512_set1_ps(corners.rest[at]));
  return s;
}

/* A block of k: two vectors. */
struct Pair {
  Source of[2];
  bool alike() const { return of[0].row == of[1].row && of[0].channels + 16 == of[1].channels; }
};

/* `pixels` rows of a strip, all blocks of k. ALIKE: the second vector of a pair is the next one at the same
 * tap. Taps innermost: those of a pixel and of the next one lie within a few rows and columns of each
 * other, which the first-level cache holds. */
template <Sampling how, bool ALIKE>
static void sample_pixels(const Pair *pairs, int64_t blocks, Steps steps, Corners<float> corners,
                          int64_t pixels, SplitStrip *to, Survey &survey) {
  Survey all;
  for (int64_t i = 0; i < pixels; i++) {
    uint16_t *row = to->part[0][0] + i * BLOCK;
    Magnitudes values;
    for (int64_t k = 0; k < blocks; k++, row += 3 * PART) { /* the hot loop */
      const Source &v = pairs[k].of[0], &w = pairs[k].of[1];
      const float *at = opaque(v.channels + corners.at[v.row + i]);
      const float *other = ALIKE ? at + 16 : w.channels + corners.at[w.row + i];
      const __m512 a = sample_one<how>(at, steps, corners, v.row + i, v.mask);
      const __m512 b = sample_one<how>(other, steps, corners, (ALIKE ? v.row : w.row) + i, w.mask);
      split_pair(a, b, row, values);
    }
    all.add(values, i);
  }
  survey = all;
}

static void sample_strip(Sampling how, const Pair *pairs, int64_t blocks, const Steps &steps,
                         const Corners<float> &corners, int64_t pixels, SplitStrip *to,
                         Survey &survey) {
  bool alike = true;
  for (int64_t k = 0; k < blocks; k++) alike &= pairs[k].alike();
  const auto sample = how == COPIED   ? sample_pixels<COPIED, false>
                      : how == SCALED ? sample_pixels<SCALED, false>
                      : alike         ? sample_pixels<BILINEAR, true>
                                      : sample_pixels<BILINEAR, false>;
  sample(pairs, blocks, steps, corners, pixels, to, survey);
}

/* One vector of one pixel's columns. */
DCN_COLD static __m512 sample_again(Sampling how, const Source &from, const Steps &steps,
                                    const Corners<float> &corners, int64_t pixel) {
  const auto sample = how == COPIED     ? sample_one<COPIED>
                      : how == BILINEAR ? sample_one<BILINEAR>
                                        : sample_one<SCALED>;
  const int64_t at = from.row + pixel;
  return sample(from.channels + corners.at[at], steps, corners, at, from.mask);
}

}  // namespace DCN_ISA
#endif
#endif
