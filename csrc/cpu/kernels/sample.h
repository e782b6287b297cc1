/* Samples a block of channels at the corners of a chunk of taps: the columns of the product.
 *
 *   columns[i][t * count + c] = sum_q weight[q][t, i] * slab[at[t, i] + step(q) + c]
 *
 * Without offsets (a plain convolution) taps lie on pixels and samples are copies of the top left
 * corner: no 0 times infinity from a neighbour.
 *
 * Four loads, four multiply-adds and one store per vector of channels, five loads and broadcasts a
 * position: about 3 cycles a vector from the first-level cache, 5 to 8 from the second. Whole vectors
 * are stored: what spills over `count` is overwritten by the next tap, hence taps in order.
 */
#ifndef DCN_SAMPLE_H
#define DCN_SAMPLE_H

#include "bilinear.h"

namespace DCN_ISA {

/* From the top left corner to the others, in values. */
struct Steps {
  int64_t right, down, both;
  Steps(const Frame &frame, int64_t pitch)
      : right(pitch), down(frame.row * pitch), both((frame.row + 1) * pitch) {}
};

enum Sampling {
  BILINEAR,
  SCALED, /* some mask is not finite and multiplies the sample */
  COPIED, /* no offsets */
};

DCN_INLINE Sampling sampling(const dcn_tensors &tensors, bool special) {
  return !tensors.offset ? COPIED : special ? SCALED : BILINEAR;
}

/* VECTORS of channels, 0: as many as `vectors`. */
template <class A, int VECTORS, Sampling how>
static void sample_vectors(const A *slab, const Steps &steps, const Corners<A> &corners,
                           int64_t row, int64_t pixels, int64_t vectors, A *columns,
                           int64_t pitch) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes, APART = Corners<A>::APART;
  const int64_t count = VECTORS ? VECTORS : vectors;
  const int64_t *at = corners.at + row;
  const A *weight = corners.weight + row, *rest = corners.rest + row;
  for (int64_t i = 0; i < pixels; i++) {
    const A *v00 = slab + at[i], *v01 = opaque(v00 + steps.right);
    const A *v10 = opaque(v00 + steps.down), *v11 = opaque(v10 + steps.right);
    const V w00 = splat(weight[i]), w01 = splat(weight[i + APART]);
    const V w10 = splat(weight[i + 2 * APART]), w11 = splat(weight[i + 3 * APART]);
    A *to = columns + i * pitch;
#pragma GCC unroll 4
    for (int64_t v = 0; v < count; v++) { /* the hot loop */
      V s = load(v00 + v * L);
      if (how != COPIED)
        s = w00 * s + w01 * load(v01 + v * L) + w10 * load(v10 + v * L) + w11 * load(v11 + v * L);
      if (how == SCALED) s *= rest[i];
      store(to + v * L, s);
    }
  }
}

/* `slab` points at the block's first channel of the frame's first pixel. */
template <class A, Sampling how>
static void sample_taps(const A *slab, const Steps &steps, int64_t channels,
                        const Corners<A> &corners, int64_t taps, int64_t tile, int64_t pixels,
                        A *columns, int64_t pitch) {
  const int64_t vectors = ceil_div(channels, Vector<A>::lanes);
  for (int64_t t = 0; t < taps; t++) {
    A *to = columns + t * channels;
    const int64_t row = t * tile;
#define DCN_CASE(V)                                                             \
  case V:                                                                       \
    sample_vectors<A, V, how>(slab, steps, corners, row, pixels, V, to, pitch); \
    break;
    switch (how == BILINEAR ? vectors : 0) {
      DCN_CASE(1)
      DCN_CASE(2)
      DCN_CASE(3)
      DCN_CASE(4)
      default:
        sample_vectors<A, 0, how>(slab, steps, corners, row, pixels, vectors, to, pitch);
    }
#undef DCN_CASE
  }
}

template <class A>
static void sample_block(const A *slab, const Steps &steps, int64_t channels,
                         const Corners<A> &corners, Sampling how, int64_t taps, int64_t tile,
                         int64_t pixels, A *columns, int64_t pitch) {
  if (VARIANTS != ONE_VARIANT && how == BILINEAR)
    sample_taps<A, BILINEAR>(slab, steps, channels, corners, taps, tile, pixels, columns, pitch);
  else if (how != COPIED) /* what multiplies is 1 otherwise */
    sample_taps<A, SCALED>(slab, steps, channels, corners, taps, tile, pixels, columns, pitch);
  else
    sample_taps<A, COPIED>(slab, steps, channels, corners, taps, tile, pixels, columns, pitch);
}

}  // namespace DCN_ISA
#endif
