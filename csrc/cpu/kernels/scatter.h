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

/* What a call wants, known to the compiler; columns are the samples, or grad_weight's share. */
template <bool PRODUCTS, bool INPUT, bool COLUMNS>
struct Wanted {
  static constexpr bool products = PRODUCTS, input = INPUT, columns = COLUMNS;
};
/* The same, known to the call. */
struct AnyWanted {
  bool products, input, columns;
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
    const int64_t to_input = s.input - s.slab;
    value[0] = opaque(s.slab + corners.at[at]);
    value[1] = opaque(value[0] + steps.right);
    value[2] = opaque(value[0] + steps.down);
    value[3] = opaque(value[2] + steps.right);
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      input[q] = opaque((A *)value[q] + to_input);
      weight[q] = splat(corners.weight[q * corners.APART + at]);
      products[q] = V{};
    }
    rest = splat(corners.rest[at]);
  }

  /* The vector of channels at c, with gradient h; gives its sample. TAIL: only `lanes` of it. */
  template <bool SPECIAL, bool TAIL, class Want>
  inline __attribute__((always_inline)) V channels(Want wanted, int64_t c, V h,
                                                   typename Vector<A>::Mask lanes) {
    V x[4];
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
      x[q] = load(value[q] + c);
      if (TAIL) x[q] = keep<A>(lanes, x[q]);
      if (wanted.products) products[q] += h * x[q];
    }
    if (wanted.input) {
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

/* One sample exactly at -1: no value, nothing to scatter, but a derivative. The gradient of its columns
 * is h, or h times w where that is not null. */
template <class A>
__attribute__((noinline, cold)) static void edge_products(const Scatter<A> &s, const Steps &steps,
                                                          int64_t corner, const A *h, const A *w,
                                                          A *products) {
  const int64_t step[4] = {0, steps.right, steps.down, steps.both};
  for (int q = 0; q < 4; q++) {
    const A *v = s.slab + corner + step[q];
    A sum = 0;
    for (int64_t c = 0; c < s.channels; c++) sum += (w ? h[c] * w[c] : h[c]) * v[c];
    products[q] = sum;
  }
}

#if DCN_VECTOR_BYTES == 64
/* Whether some sample of a chunk is exactly at -1. */
template <class A>
static bool has_edges(const Corners<A> &corners, int64_t taps, int64_t tile, int64_t pixels) {
  typename Corners<A>::I states = 0;
  for (int64_t t = 0; t < taps; t++)
    for (int64_t i = 0; i < pixels; i++) states |= corners.state[t * tile + i];
  return states & EDGE;
}

/* All three for a block of one vector and finite masks, no sample exactly at -1: the same operations in
 * the same order, but those that sum two taps' products over lanes are shared, and addresses are made
 * for one vector. Per sample 12 multiply-adds, 12 other operations on vectors, nine loads. */
template <class A>
static void scatter_vector(const Scatter<A> &block, const Steps &block_steps,
                           const Corners<A> &block_corners, int64_t taps, int64_t tile,
                           int64_t pixels, A *columns, int64_t pitch) {
  typedef typename Vector<A>::V V;
  const Scatter<A> s = block; /* copies, which no store can change */
  const Steps steps = block_steps;
  const Corners<A> corners = block_corners;
  constexpr int64_t L = Vector<A>::lanes, APART = Corners<A>::APART;
  const int64_t right = steps.right, down = steps.down;
  const auto visit = [&](int64_t at, A *column, V *products) {
    const A *upper = s.slab + corners.at[at], *lower = upper + down;
    A *upper_input = s.input + corners.at[at], *lower_input = upper_input + down;
    const A *weight = corners.weight + at;
    const V h = load(column),
            x[4] = {load(upper), load(upper + right), load(lower), load(lower + right)};
    const V w[4] = {splat(weight[0]), splat(weight[APART]), splat(weight[2 * APART]),
                    splat(weight[3 * APART])};
    store(upper_input, load(upper_input) + w[0] * h);
    store(upper_input + right, load(upper_input + right) + w[1] * h);
    store(lower_input, load(lower_input) + w[2] * h);
    store(lower_input + right, load(lower_input + right) + w[3] * h);
    store(column, V{} + w[0] * x[0] + w[1] * x[1] + w[2] * x[2] + w[3] * x[3]);
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) products[q] = V{} + h * x[q];
  };
  for (int64_t i = 0; i < pixels; i++) {
    A *h = columns + i * pitch;
    int64_t t = 0, at = i;
    V products[8];
    for (; t + 1 < taps; t += 2, at += 2 * tile, h += 2 * L) { /* the hot loop */
      visit(at, h, products);
      visit(at + tile, h + L, products + 4);
      sum4_twice<A>(products, products + 4, s.products + 4 * at, s.products + 4 * (at + tile));
    }
    if (t == taps) continue;
    visit(at, h, products);
    sum4<A>(products[0], products[1], products[2], products[3], s.products + 4 * at);
  }
}
#endif

/* VECTORS whole vectors of channels, -1: as many as there are; SPECIAL: some mask is not finite. */
template <class A, int VECTORS, bool SPECIAL, class Want>
static void scatter_pixels(const Want wanted, const Scatter<A> &block, const Steps &block_steps,
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
#if DCN_VECTOR_BYTES == 64
  if constexpr (VECTORS == 1 && sizeof(A) == 4)
    if (!tail && !has_edges(corners, taps, tile, pixels))
      return scatter_vector(s, steps, corners, taps, tile, pixels, columns, pitch);
#endif
  for (int64_t i = 0; i < pixels; i++) {
    A *h = columns + i * pitch;
    for (int64_t t = 0, at = i; t < taps; t++, at += tile, h += s.channels) {
      if (corners.state[at] == EDGE) {
        if (wanted.products)
          edge_products<A>(s, steps, corners.at[at], h, nullptr, s.products + 4 * at);
        if (wanted.columns)
          for (int64_t c = 0; c < s.channels; c++) h[c] = 0 * corners.rest[at];
        continue;
      }
      Visit<A> visit(s, steps, corners, at);
      DCN_UNROLLED
      for (int64_t v = 0; v < whole; v++) { /* the hot loop */
        const V sample =
            visit.template channels<SPECIAL, false>(wanted, v * L, load(h + v * L), lanes);
        if (wanted.columns) store(h + v * L, sample);
      }
      if (tail) {
        const V old = load(h + whole * L);
        const V sample =
            visit.template channels<SPECIAL, true>(wanted, whole * L, keep<A>(lanes, old), lanes);
        if (wanted.columns) store(h + whole * L, pick<A>(lanes, sample, old));
      }
      if (wanted.products)
        sum4<A>(visit.products[0], visit.products[1], visit.products[2], visit.products[3],
                s.products + 4 * at);
    }
  }
}

/* Calls `scatter(wanted, vectors, special)` with the variant's numbers as types. The mask that is
 * finite is 1 in `rest`, so that SPECIAL is right for all. */
template <int N>
struct Number {
  static constexpr int value = N;
};

template <class A, class Function>
static void with_variant(const Scatter<A> &s, bool special, bool columns, Function scatter) {
  const bool products = s.products, input = s.input;
  const AnyWanted any = {products, input, columns};
  if constexpr (VARIANTS == ONE_VARIANT) {
    return scatter(any, Number<-1>(), Number<true>());
  } else {
    const auto scatter_special = [&]() DCN_COLD { scatter(any, Number<-1>(), Number<true>()); };
    if (special) return scatter_special();
    if (products && input && columns) {
      const Wanted<true, true, true> all;
      const int64_t vectors = s.channels / Vector<A>::lanes;
      if (vectors == 1) return scatter(all, Number<1>(), Number<false>());
      if constexpr (VARIANTS == ALL_VARIANTS) {
        if (vectors == 2) return scatter(all, Number<2>(), Number<false>());
        if (vectors == 3) return scatter(all, Number<3>(), Number<false>());
        if (vectors == 4) return scatter(all, Number<4>(), Number<false>());
      }
      return scatter(all, Number<-1>(), Number<false>());
    }
    if constexpr (VARIANTS == SOME_VARIANTS) return scatter(any, Number<-1>(), Number<false>());
#define DCN_WANTED(P, I, C) return scatter(Wanted<P, I, C>(), Number<-1>(), Number<false>())
    if (products && columns) DCN_WANTED(true, false, true); /* a first layer */
    if (products && input) DCN_WANTED(true, true, false);   /* frozen weights */
    if (columns) {
      if (input) DCN_WANTED(false, true, true);
      DCN_WANTED(false, false, true);
    }
    if (products) DCN_WANTED(true, false, false);
    if (input) DCN_WANTED(false, true, false);
#undef DCN_WANTED
  }
}

/* `columns` holds h where products or input are wanted, and the samples afterwards if `samples`. */
template <class A>
static void scatter_block(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                          bool special, int64_t taps, int64_t tile, int64_t pixels, A *columns,
                          int64_t pitch, bool samples) {
  with_variant(s, special, samples, [&](auto wanted, auto vectors, auto is_special) {
    scatter_pixels<A, decltype(vectors)::value, decltype(is_special)::value>(
        wanted, s, steps, corners, taps, tile, pixels, columns, pitch);
  });
}

/* One channel per weight group: h = output * weight on the spot, and grad_weight's share
 * (share[t][c] += output mask S) without a product. One vector of output stays in a register over the
 * taps; per vector of channels ten loads, 14 multiply-adds and five stores. */
template <class A, int VECTORS, bool SPECIAL, class Want>
static void scatter_depthwise_pixels(const Want wanted, const Scatter<A> &block,
                                     const Steps &block_steps, const Corners<A> &block_corners,
                                     int64_t taps, int64_t tile, int64_t pixels, const A *output,
                                     int64_t output_row, const A *weight, int64_t weight_row,
                                     A *share, int64_t share_row) {
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
    for (int64_t t = 0, at = i; t < taps; t++, at += tile, w += weight_row, sum += share_row) {
      if (corners.state[at] == EDGE) {
        if (wanted.products)
          edge_products<A>(s, steps, corners.at[at], output, w, s.products + 4 * at);
        if (wanted.columns)
          for (int64_t c = 0; c < s.channels; c++) sum[c] += output[c] * (0 * corners.rest[at]);
        continue;
      }
      Visit<A> visit(s, steps, corners, at);
      DCN_UNROLLED
      for (int64_t v = 0; v < whole; v++) { /* the hot loop */
        const V g = load(output + v * L);
        const V sample =
            visit.template channels<SPECIAL, false>(wanted, v * L, g * load(w + v * L), lanes);
        if (wanted.columns) store(sum + v * L, load(sum + v * L) + g * sample);
      }
      if (tail) {
        const int64_t c = whole * L;
        const V g = keep<A>(lanes, load(output + c));
        const V sample = visit.template channels<SPECIAL, true>(
            wanted, c, g * keep<A>(lanes, load(w + c)), lanes);
        if (wanted.columns) store(sum + c, load(sum + c) + keep<A>(lanes, g * sample));
      }
      if (wanted.products)
        sum4<A>(visit.products[0], visit.products[1], visit.products[2], visit.products[3],
                s.products + 4 * at);
    }
  }
}

template <class A>
static void scatter_depthwise(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                              bool special, int64_t taps, int64_t tile, int64_t pixels,
                              const A *output, int64_t output_row, const A *weight,
                              int64_t weight_row, A *share, int64_t share_row) {
  with_variant(s, special, share, [&](auto wanted, auto vectors, auto is_special) {
    scatter_depthwise_pixels<A, decltype(vectors)::value, decltype(is_special)::value>(
        wanted, s, steps, corners, taps, tile, pixels, output, output_row, weight, weight_row,
        share, share_row);
  });
}

}  // namespace DCN_ISA
#endif
