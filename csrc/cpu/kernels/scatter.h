/* The loop between the two products of the backward direction: one visit to each sample's corners.
 *
 *   products[t][i][q]  = sum_c h[i][t, c] slab[at[t, i] + step(q) + c]     for grad_offset, grad_mask
 *   input[at + step(q) + c] += weight[q][t, i] h[i][t, c]                  grad_input's share
 *   columns[i][t, c]   = sum_q weight[q][t, i] slab[at + step(q) + c]      replaces h, for grad_weight
 *
 * The weights hold the mask (bilinear.h). Each is optional. Per vector of channels at most nine loads,
 * twelve multiply-adds and five stores: 6 cycles at least. Samples outside scatter zeros into the frame
 * of grad_input, which nobody reads. Where the block's channels do not fill the last vector its spare
 * lanes belong to the next tap or to a neighbour: they are masked, never multiplied by zero.
 */
#ifndef DCN_SCATTER_H
#define DCN_SCATTER_H

#include "sample.h"

namespace DCN_ISA {

/* A sample. It begins with 0 so that each addition has one product to fuse with: whatever else a loop
 * computes, for whichever gradients are wanted, the compiler has no choice and rounds alike. */
template <class V>
DCN_INLINE V blend(V w00, V x00, V w01, V x01, V w10, V x10, V w11, V x11) {
  return V{} + w00 * x00 + w01 * x01 + w10 * x10 + w11 * x11;
}

template <class A>
struct Scatter {
  const A *slab;    /* the block's first channel of pixel 0 */
  A *input;         /* the same place in grad_input's share, or null */
  A *products;      /* [tap][tile][4], or null */
  int64_t channels; /* of the block */
};

/* One sample exactly at -1: no value, nothing to scatter, but a derivative. */
template <class A>
static void edge_products(const Scatter<A> &s, const Steps &steps, int64_t corner, const A *h,
                          A *products) {
  const int64_t step[4] = {0, steps.right, steps.down, steps.both};
  for (int q = 0; q < 4; q++) {
    const A *v = s.slab + corner + step[q];
    A sum = 0;
    for (int64_t c = 0; c < s.channels; c++) sum += h[c] * v[c];
    products[q] = sum;
  }
}

template <class A, bool PRODUCTS, bool INPUT, bool COLUMNS>
static void scatter_tap(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                        bool special, int64_t row, int64_t pixels, A *columns, int64_t pitch,
                        A *products) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t whole = s.channels / L * L;
  const typename Vector<A>::Mask tail = first_lanes<A>((int)(s.channels - whole));
  for (int64_t i = 0; i < pixels; i++) {
    const int64_t at = row + i, corner = corners.at[at];
    A *h = columns + i * pitch;
    if (corners.state[at] == EDGE) {
      if (PRODUCTS) edge_products(s, steps, corner, h, products + 4 * i);
      if (COLUMNS)
        for (int64_t c = 0; c < s.channels; c++) h[c] = 0 * corners.rest[at];
      continue;
    }
    const A *v00 = s.slab + corner, *v01 = v00 + steps.right;
    const A *v10 = v00 + steps.down, *v11 = v00 + steps.both;
    A *g00 = s.input + corner, *g01 = g00 + steps.right;
    A *g10 = g00 + steps.down, *g11 = g00 + steps.both;
    const V w00 = splat(corners.weight[0][at]), w01 = splat(corners.weight[1][at]);
    const V w10 = splat(corners.weight[2][at]), w11 = splat(corners.weight[3][at]);
    V d00 = V{}, d01 = V{}, d10 = V{}, d11 = V{};
    for (int64_t c = 0; c < whole; c += L) { /* the hot loop */
      const V x00 = load(v00 + c), x01 = load(v01 + c), x10 = load(v10 + c), x11 = load(v11 + c);
      const V hc = load(h + c);
      if (PRODUCTS) {
        d00 += hc * x00;
        d01 += hc * x01;
        d10 += hc * x10;
        d11 += hc * x11;
      }
      if (INPUT) {
        const V hm = special ? corners.rest[at] * hc : hc;
        const V y00 = load(g00 + c) + w00 * hm, y01 = load(g01 + c) + w01 * hm;
        const V y10 = load(g10 + c) + w10 * hm, y11 = load(g11 + c) + w11 * hm;
        store(g00 + c, y00);
        store(g01 + c, y01);
        store(g10 + c, y10);
        store(g11 + c, y11);
      }
      if (COLUMNS) {
        const V sample = blend(w00, x00, w01, x01, w10, x10, w11, x11);
        store(h + c, special ? corners.rest[at] * sample : sample);
      }
    }
    if (whole < s.channels) {
      const int64_t c = whole;
      const V x00 = keep<A>(tail, load(v00 + c)), x01 = keep<A>(tail, load(v01 + c));
      const V x10 = keep<A>(tail, load(v10 + c)), x11 = keep<A>(tail, load(v11 + c));
      const V old = load(h + c), hc = keep<A>(tail, old);
      if (PRODUCTS) {
        d00 += hc * x00;
        d01 += hc * x01;
        d10 += hc * x10;
        d11 += hc * x11;
      }
      if (INPUT) {
        const V hm = special ? corners.rest[at] * hc : hc;
        const V y00 = load(g00 + c) + keep<A>(tail, w00 * hm);
        const V y01 = load(g01 + c) + keep<A>(tail, w01 * hm);
        const V y10 = load(g10 + c) + keep<A>(tail, w10 * hm);
        const V y11 = load(g11 + c) + keep<A>(tail, w11 * hm);
        store(g00 + c, y00);
        store(g01 + c, y01);
        store(g10 + c, y10);
        store(g11 + c, y11);
      }
      if (COLUMNS) {
        const V sample = blend(w00, x00, w01, x01, w10, x10, w11, x11);
        store(h + c, pick<A>(tail, special ? corners.rest[at] * sample : sample, old));
      }
    }
    if (PRODUCTS) sum4<A>(d00, d01, d10, d11, products + 4 * i);
  }
}

/* `columns` holds h where products or input are wanted, and the samples afterwards if `samples`. */
template <class A>
static void scatter_block(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                          bool special, int64_t taps, int64_t tile, int64_t pixels, A *columns,
                          int64_t pitch, bool samples) {
  for (int64_t t = 0; t < taps; t++) {
    A *at = columns + t * s.channels;
    A *products = s.products ? s.products + 4 * t * tile : nullptr;
    const int64_t row = t * tile;
#define DCN_TAP(P, I, C) \
  scatter_tap<A, P, I, C>(s, steps, corners, special, row, pixels, at, pitch, products)
    if (samples) {
      if (s.products)
        s.input ? DCN_TAP(true, true, true) : DCN_TAP(true, false, true);
      else
        s.input ? DCN_TAP(false, true, true) : DCN_TAP(false, false, true);
    } else {
      if (s.products)
        s.input ? DCN_TAP(true, true, false) : DCN_TAP(true, false, false);
      else if (s.input)
        DCN_TAP(false, true, false);
    }
#undef DCN_TAP
  }
}

/* The same with one channel per weight group: h = output * weight on the spot, and grad_weight's share
 * (share[t][c] += output mask S) without a product. */
template <class A>
static void scatter_depthwise(const Scatter<A> &s, const Steps &steps, const Corners<A> &corners,
                              int64_t taps, int64_t tile, int64_t pixels, const A *output,
                              int64_t output_row, const A *weight, int64_t weight_row, A *share,
                              int64_t share_row) {
  typedef typename Vector<A>::V V;
  constexpr int64_t L = Vector<A>::lanes;
  for (int64_t t = 0; t < taps; t++)
    for (int64_t i = 0; i < pixels; i++) {
      const int64_t at = t * tile + i;
      const bool edge = corners.state[at] == EDGE;
      const A *v00 = s.slab + corners.at[at], *v01 = v00 + steps.right;
      const A *v10 = v00 + steps.down, *v11 = v00 + steps.both;
      const V w00 = splat(corners.weight[0][at]), w01 = splat(corners.weight[1][at]);
      const V w10 = splat(corners.weight[2][at]), w11 = splat(corners.weight[3][at]);
      const V rest = splat(corners.rest[at]);
      V d00 = V{}, d01 = V{}, d10 = V{}, d11 = V{};
      for (int64_t c = 0; c < s.channels; c += L) { /* the hot loop */
        const typename Vector<A>::Mask lanes = first_lanes<A>((int)min(L, s.channels - c));
        const V x00 = keep<A>(lanes, load(v00 + c)), x01 = keep<A>(lanes, load(v01 + c));
        const V x10 = keep<A>(lanes, load(v10 + c)), x11 = keep<A>(lanes, load(v11 + c));
        const V g = keep<A>(lanes, load(output + i * output_row + c));
        const V h = g * keep<A>(lanes, load(weight + t * weight_row + c));
        if (s.products) {
          d00 += h * x00;
          d01 += h * x01;
          d10 += h * x10;
          d11 += h * x11;
        }
        if (s.input && !edge) {
          const V hm = rest * h;
          A *g00 = s.input + corners.at[at] + c, *g01 = g00 + steps.right;
          A *g10 = g00 + steps.down, *g11 = g00 + steps.both;
          const V y00 = load(g00) + keep<A>(lanes, w00 * hm);
          const V y01 = load(g01) + keep<A>(lanes, w01 * hm);
          const V y10 = load(g10) + keep<A>(lanes, w10 * hm);
          const V y11 = load(g11) + keep<A>(lanes, w11 * hm);
          store(g00, y00);
          store(g01, y01);
          store(g10, y10);
          store(g11, y11);
        }
        if (share) {
          const V value = blend(w00, x00, w01, x01, w10, x10, w11, x11);
          const V sample = rest * (edge ? V{} : value);
          A *to = share + t * share_row + c;
          store(to, load(to) + keep<A>(lanes, g * sample));
        }
      }
      if (s.products) sum4<A>(d00, d01, d10, d11, s.products + 4 * at);
    }
}

}  // namespace DCN_ISA
#endif
