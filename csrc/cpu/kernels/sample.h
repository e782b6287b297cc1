/* Samples a block of channels at the corners of a chunk of taps: the columns of the product.
 *
 *   columns[i][t * count + c] = mask[t, i] * sum_q weight[q][t, i] * slab[at[q][t, i] + c]
 *
 * Four loads, four multiply-adds, one multiply and one store per vector of channels; on a machine that
 * loads one vector a cycle about 5 cycles from the first-level cache, 7 to 9 from the second. Whole
 * vectors are stored: what spills over `count` is overwritten by the next tap, hence taps in order.
 */
#ifndef DCN_SAMPLE_H
#define DCN_SAMPLE_H

#include "bilinear.h"

namespace DCN_ISA {

template <class A, int VECTORS>
static void sample_vectors(const A *slab, const Corners<A> &corners, int64_t row, int64_t pixels,
                           int64_t vectors, A *columns, int64_t pitch) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t count = VECTORS ? VECTORS : vectors;
  for (int64_t i = 0; i < pixels; i++) {
    const A *v00 = slab + corners.at[0][row + i], *v01 = slab + corners.at[1][row + i];
    const A *v10 = slab + corners.at[2][row + i], *v11 = slab + corners.at[3][row + i];
    const V w00 = splat(corners.weight[0][row + i]), w01 = splat(corners.weight[1][row + i]);
    const V w10 = splat(corners.weight[2][row + i]), w11 = splat(corners.weight[3][row + i]);
    const V mask = splat(corners.mask[row + i]);
    A *to = columns + i * pitch;
#pragma GCC unroll 4
    for (int64_t v = 0; v < count; v++) { /* the hot loop */
      const V s = w00 * load(v00 + v * L) + w01 * load(v01 + v * L) + w10 * load(v10 + v * L) +
                  w11 * load(v11 + v * L);
      store(to + v * L, mask * s);
    }
  }
}

/* `slab` points at the block's first channel of pixel 0. */
template <class A>
static void sample_block(const A *slab, int64_t channels, const Corners<A> &corners, int64_t taps,
                         int64_t tile, int64_t pixels, A *columns, int64_t pitch) {
  const int64_t vectors = ceil_div(channels, Vector<A>::lanes);
  for (int64_t t = 0; t < taps; t++) {
    A *to = columns + t * channels;
    switch (vectors) {
      case 1: sample_vectors<A, 1>(slab, corners, t * tile, pixels, 1, to, pitch); break;
      case 2: sample_vectors<A, 2>(slab, corners, t * tile, pixels, 2, to, pitch); break;
      case 4: sample_vectors<A, 4>(slab, corners, t * tile, pixels, 4, to, pitch); break;
      default: sample_vectors<A, 0>(slab, corners, t * tile, pixels, vectors, to, pitch);
    }
  }
}

}  // namespace DCN_ISA
#endif
