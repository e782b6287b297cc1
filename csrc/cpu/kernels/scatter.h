/* The loop between the two products of the backward direction: one visit to each sample's corners.
 *
 *   products[t][i][q]  = sum_c h[i][t, c] slab[at[t, i] + step(q) + c]     for grad_offset, grad_mask
 *   input[at + step(q) + c] += weight[q][t, i] h[i][t, c]                  grad_input's share
 *   columns[i][t, c]   = sum_q weight[q][t, i] slab[at[t, i] + step(q) + c]  replaces h, for grad_weight
 *
 * The weights hold the mask (bilinear.h). Each is optional. Taps innermost: all taps of a pixel, and
 * those of the next one, lie within a few rows and columns of each other, which the first-level cache
 * holds. Per vector of channels at most nine loads, twelve multiply-adds and five stores: 6 cycles at
 * least. Samples outside scatter zeros into the frame of grad_input, which nobody reads. Where the
 * block's channels do not fill the last vector its spare lanes belong to the next tap or to a neighbour:
 * they are masked, never multiplied by zero.
 */
#ifndef DCN_SCATTER_H
#define DCN_SCATTER_H

#include "sample.h"

namespace DCN_ISA {

template <class A>
struct Scatter {
  const A *slab;    /* the block's first channel of pixel 0 */
  A *input;         /* the same place in grad_input's share, or null */
  A *products;      /* [tap][tile][4], or null */
  int64_t channels; /* of the block */
};

/* One sample: where its corners are and what they weigh. */
template <class A>
struct Visit {
  typedef typename Vector<A>::V V;
  const A *value[4];
  A *input[4];
  V weight[4], rest;
  V products[4]; /* not yet summed over lanes */

  inline __attribute__((always_inline)) Visit(const Scatter<A> &s, const Steps &steps,
                                              const Corners<A> &corners, int64_t at) {
    const int64_t corner = corners.at[at], step[4] = {0, steps.right, steps.down, steps.both};
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      value[q] = opaque(s.slab + corner + step[q]);
      input[q] = opaque(s.input + corner + step[q]);
      weight[q] = splat(corners.weight[q][at]);
      products[q] = V{};
    }
    rest = splat(corners.rest[at]);
  }

  /* The vector of channels at c, with gradient h; gives its sample. TAIL: only `lanes` of it. */
  template <bool PRODUCTS, bool INPUT, bool SPECIAL, bool TAIL>
  inline __attribute__((always_inline)) V channels(int64_t c, V h, typename Vector<A>::Mask lanes) {
    V x[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      x[q] = load(value[q] + c);
      if (TAIL) x[q] = keep<A>(lanes, x[q]);
      if (PRODUCTS) products[q] += h * x[q];
    }
    if (INPUT) {
      const V hm = SPECIAL ? rest * h : h;
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        const V more = weight[q] * hm;
        store(input[q] + c, load(input[q] + c) + (TAIL ? keep<A>(lanes, more) : more));
      }
    }
    /* Begun with 0, each addition has one product to fuse with: whichever gradients are wanted, the
     * compiler has no choice and rounds alike. */
    const V sample =
        V{} + weight[0] * x[0] + weight[1] * x[1] + weight[2] * x[2] + weight[3] * x[3];
    return SPECIAL ? rest * sample : sample;
  }
};

/* One sample exactly at -1: no value, nothing to scatter, but a derivative. `h` is a function of c. */
template <class A, class H>
static void edge_products(const Scatter<A> &s, const Steps &steps, int64_t corner, H h,
                          A *products) {
  const int64_t step[4] = {0, steps.right, steps.down, steps.both};
  for (int q = 0; q < 4; q++) {
    const A *v = s.slab + corner + step[q];
    A sum = 0;
    for (int64_t c = 0; c < s.channels; c++) sum += h(c) * v[c];
    products[q] = sum;
  }
}

/* VECTORS whole vectors of channels, -1: as many as there are; SPECIAL: some mask is not finite. */
template <class A, bool PRODUCTS, bool INPUT, bool COLUMNS, int VECTORS, bool SPECIAL>
static void scatter_pixels(const Scatter<A> &block, const Steps &block_steps,
                           const Corners<A> &block_corners, int64_t taps, int64_t tile,
                           int64_t pixels, A *columns, int64_t pitch) {
  typedef typename Vector<A>::V V;
  const Scatter<A> s = block; /* copies, which no store can change */
  const Steps steps = block_steps;
  const Corners<A> corners = block_corners;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t whole = VECTORS >= 0 ? VECTORS : s.channels / L;
  const bool tail = s.channels % L;
  const typename Vector<A>::Mask lanes = first_lanes<A>((int)(s.channels % L));
  for (int64_t i = 0; i < pixels; i++) {
    A *h = columns + i * pitch;
    for (int64_t t = 0, at = i; t < taps; t++, at += tile, h += s.channels) {
      if (corners.state[at] == EDGE) {
        if (PRODUCTS)
          edge_products(
              s, steps, corners.at[at], [h](int64_t c) { return h[c]; }, s.products + 4 * at);
        if (COLUMNS)
          for (int64_t c = 0; c < s.channels; c++) h[c] = 0 * corners.rest[at];
        continue;
      }
      Visit<A> visit(s, steps, corners, at);
#pragma GCC unroll 4
      for (int64_t v = 0; v < whole; v++) { /* the hot loop */
        const V sample =
            visit.template channels<PRODUCTS, INPUT, SPECIAL, false>(v * L, load(h + v * L), lanes);
        if (COLUMNS) store(h + v * L, sample);
      }
      if (tail) {
        const V old = load(h + whole * L);
        const V sample = visit.template channels<PRODUCTS, INPUT, SPECIAL, true>(
            whole * L, keep<A>(lanes, old), lanes);
        if (COLUMNS) store(h + whole * L, pick<A>(lanes, sample, old));
      }
      if (PRODUCTS)
        sum4<A>(visit.products[0], visit.products[1], visit.products[2], visit.products[3],
                s.products + 4 * at);
    }
  }
}

template <class A, bool PRODUCTS, bool INPUT, bool COLUMNS>
static void scatter_vectors(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                            bool special, int64_t taps, int64_t tile, int64_t pixels, A *columns,
                            int64_t pitch) {
#define DCN_CASE(V, SPECIAL)                                                                    \
  return scatter_pixels<A, PRODUCTS, INPUT, COLUMNS, V, SPECIAL>(s, steps, corners, taps, tile, \
                                                                 pixels, columns, pitch)
  if (special) DCN_CASE(-1, true);
  if (PRODUCTS && INPUT && COLUMNS) switch (s.channels / Vector<A>::lanes) {
      case 1:
        DCN_CASE(1, false);
      case 2:
        DCN_CASE(2, false);
      case 3:
        DCN_CASE(3, false);
      case 4:
        DCN_CASE(4, false);
    }
  DCN_CASE(-1, false);
#undef DCN_CASE
}

/* `columns` holds h where products or input are wanted, and the samples afterwards if `samples`. */
template <class A>
static void scatter_block(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                          bool special, int64_t taps, int64_t tile, int64_t pixels, A *columns,
                          int64_t pitch, bool samples) {
#define DCN_WANTED(P, I, C) \
  scatter_vectors<A, P, I, C>(s, steps, corners, special, taps, tile, pixels, columns, pitch)
  if (samples) {
    if (s.products)
      s.input ? DCN_WANTED(true, true, true) : DCN_WANTED(true, false, true);
    else
      s.input ? DCN_WANTED(false, true, true) : DCN_WANTED(false, false, true);
  } else {
    if (s.products)
      s.input ? DCN_WANTED(true, true, false) : DCN_WANTED(true, false, false);
    else if (s.input)
      DCN_WANTED(false, true, false);
  }
#undef DCN_WANTED
}

/* One channel per weight group: h = output * weight on the spot, and grad_weight's share
 * (share[t][c] += output mask S) without a product. One vector of output stays in a register over the
 * taps; per vector of channels ten loads, 14 multiply-adds and five stores. */
template <class A, bool PRODUCTS, bool INPUT, bool SHARE, int VECTORS, bool SPECIAL>
static void scatter_depthwise_pixels(const Scatter<A> &block, const Steps &block_steps,
                                     const Corners<A> &block_corners, int64_t taps, int64_t tile,
                                     int64_t pixels, const A *output, int64_t output_row,
                                     const A *weight, int64_t weight_row, A *share,
                                     int64_t share_row) {
  typedef typename Vector<A>::V V;
  const Scatter<A> s = block; /* copies, which no store can change */
  const Steps steps = block_steps;
  const Corners<A> corners = block_corners;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t whole = VECTORS >= 0 ? VECTORS : s.channels / L;
  const bool tail = s.channels % L;
  const typename Vector<A>::Mask lanes = first_lanes<A>((int)(s.channels % L));
  for (int64_t i = 0; i < pixels; i++, output += output_row) {
    const A *w = weight;
    A *sum = share;
    /* Rows of grad_output lie further apart than the processor foresees. */
    for (int64_t c = 0; c < s.channels; c += LINE / (int64_t)sizeof(A))
      prefetch(output + 2 * output_row + c);
    for (int64_t t = 0, at = i; t < taps; t++, at += tile, w += weight_row, sum += share_row) {
      if (corners.state[at] == EDGE) {
        if (PRODUCTS)
          edge_products(
              s, steps, corners.at[at], [output, w](int64_t c) { return output[c] * w[c]; },
              s.products + 4 * at);
        if (SHARE)
          for (int64_t c = 0; c < s.channels; c++) sum[c] += output[c] * (0 * corners.rest[at]);
        continue;
      }
      Visit<A> visit(s, steps, corners, at);
#pragma GCC unroll 4
      for (int64_t v = 0; v < whole; v++) { /* the hot loop */
        const V g = load(output + v * L);
        const V sample = visit.template channels<PRODUCTS, INPUT, SPECIAL, false>(
            v * L, g * load(w + v * L), lanes);
        if (SHARE) store(sum + v * L, load(sum + v * L) + g * sample);
      }
      if (tail) {
        const int64_t c = whole * L;
        const V g = keep<A>(lanes, load(output + c));
        const V sample = visit.template channels<PRODUCTS, INPUT, SPECIAL, true>(
            c, g * keep<A>(lanes, load(w + c)), lanes);
        if (SHARE) store(sum + c, load(sum + c) + keep<A>(lanes, g * sample));
      }
      if (PRODUCTS)
        sum4<A>(visit.products[0], visit.products[1], visit.products[2], visit.products[3],
                s.products + 4 * at);
    }
  }
}

template <class A, bool PRODUCTS, bool INPUT, bool SHARE>
static void scatter_depthwise_vectors(const Scatter<A> &s, const Steps &steps,
                                      const Corners<A> &corners, bool special, int64_t taps,
                                      int64_t tile, int64_t pixels, const A *output,
                                      int64_t output_row, const A *weight, int64_t weight_row,
                                      A *share, int64_t share_row) {
#define DCN_CASE(V, SPECIAL)                                                                \
  return scatter_depthwise_pixels<A, PRODUCTS, INPUT, SHARE, V, SPECIAL>(                   \
      s, steps, corners, taps, tile, pixels, output, output_row, weight, weight_row, share, \
      share_row)
  if (special) DCN_CASE(-1, true);
  if (PRODUCTS && INPUT && SHARE) switch (s.channels / Vector<A>::lanes) {
      case 1:
        DCN_CASE(1, false);
      case 2:
        DCN_CASE(2, false);
      case 3:
        DCN_CASE(3, false);
      case 4:
        DCN_CASE(4, false);
    }
  DCN_CASE(-1, false);
#undef DCN_CASE
}

template <class A>
static void scatter_depthwise(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                              bool special, int64_t taps, int64_t tile, int64_t pixels,
                              const A *output, int64_t output_row, const A *weight,
                              int64_t weight_row, A *share, int64_t share_row) {
#define DCN_WANTED(P, I, S)                                                                     \
  scatter_depthwise_vectors<A, P, I, S>(s, steps, corners, special, taps, tile, pixels, output, \
                                        output_row, weight, weight_row, share, share_row)
  if (share) {
    if (s.products)
      s.input ? DCN_WANTED(true, true, true) : DCN_WANTED(true, false, true);
    else
      s.input ? DCN_WANTED(false, true, true) : DCN_WANTED(false, false, true);
  } else {
    if (s.products)
      s.input ? DCN_WANTED(true, true, false) : DCN_WANTED(true, false, false);
    else if (s.input)
      DCN_WANTED(false, true, false);
  }
#undef DCN_WANTED
}

}  // namespace DCN_ISA
#endif
