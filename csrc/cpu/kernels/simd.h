/* The whole SIMD vocabulary of the kernels, in GCC/Clang vector extensions.
 *
 * DCN_VECTOR_BYTES (set by the file of each instruction set) is the only difference between
 * instruction sets here: 64 AVX-512, 32 AVX2, 16 SSE2 and NEON, 0 one lane at a time. Arithmetic is
 * written with + and *; the per-file flag -ffp-contract=fast fuses it where the machine can.
 */
#ifndef DCN_SIMD_H
#define DCN_SIMD_H

#include <stddef.h>
#include <stdint.h>

#define DCN_INLINE static inline __attribute__((always_inline))

namespace DCN_ISA {

#if DCN_VECTOR_BYTES
template <class A>
struct Vector;

template <>
struct Vector<float> {
  typedef float V __attribute__((vector_size(DCN_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(DCN_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Mask __attribute__((vector_size(DCN_VECTOR_BYTES)));
  static constexpr int lanes = DCN_VECTOR_BYTES / 4;
};

template <>
struct Vector<double> {
  typedef double V __attribute__((vector_size(DCN_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(DCN_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Mask __attribute__((vector_size(DCN_VECTOR_BYTES)));
  static constexpr int lanes = DCN_VECTOR_BYTES / 8;
};

/* Unsigned integers in the same lanes. */
template <class A>
struct Unsigned {
  typedef uint32_t V __attribute__((vector_size(DCN_VECTOR_BYTES)));
};
template <>
struct Unsigned<double> {
  typedef uint64_t V __attribute__((vector_size(DCN_VECTOR_BYTES)));
};

template <class A>
DCN_INLINE typename Vector<A>::V load(const A *p) {
  return *(const typename Vector<A>::Unaligned *)p;
}

template <class A>
DCN_INLINE void store(A *p, typename Vector<A>::V v) {
  *(typename Vector<A>::Unaligned *)p = v;
}

/* Lanes 0 .. count-1 set. */
template <class A>
DCN_INLINE typename Vector<A>::Mask first_lanes(int count) {
  typename Vector<A>::Mask mask;
  for (int i = 0; i < Vector<A>::lanes; i++) mask[i] = i < count ? -1 : 0;
  return mask;
}

/* Zero, not multiplied by zero: what is masked away may be inf or NaN. */
template <class A>
DCN_INLINE typename Vector<A>::V keep(typename Vector<A>::Mask mask, typename Vector<A>::V v) {
  return (typename Vector<A>::V)((typename Vector<A>::Mask)v & mask);
}

template <class A>
DCN_INLINE typename Vector<A>::V pick(typename Vector<A>::Mask mask, typename Vector<A>::V yes,
                                      typename Vector<A>::V no) {
  return mask ? yes : no;
}

/* a[i] where the bit `s` of i is clear, else b[i - s]; and a[i + s] where it is clear, else b[i]. */
template <class A>
DCN_INLINE void swap_blocks(typename Vector<A>::V &a, typename Vector<A>::V &b, int s) {
  constexpr int L = Vector<A>::lanes;
  typename Vector<A>::Mask low, high;
  for (int i = 0; i < L; i++) {
    low[i] = i & s ? L + i - s : i;
    high[i] = i & s ? L + i : i + s;
  }
#if defined(__clang__)
  const typename Vector<A>::V x = a, y = b;
  for (int i = 0; i < L; i++) {
    a[i] = low[i] < L ? x[low[i]] : y[low[i] - L];
    b[i] = high[i] < L ? x[high[i]] : y[high[i] - L];
  }
#else
  const typename Vector<A>::V x = __builtin_shuffle(a, b, low);
  b = __builtin_shuffle(a, b, high);
  a = x;
#endif
}

/* The sums over lanes of four vectors. */
template <class A>
DCN_INLINE void sum4(typename Vector<A>::V a, typename Vector<A>::V b, typename Vector<A>::V c,
                     typename Vector<A>::V d, A *out) {
  constexpr int L = Vector<A>::lanes;
  A lane[2 * L];
  swap_blocks<A>(a, b, 1);
  swap_blocks<A>(c, d, 1);
  a += b;
  c += d;
  if (L == 2) {
    store(lane, a);
    store(lane + L, c);
  } else {
    swap_blocks<A>(a, c, 2);
    a += c;
#pragma GCC unroll 4
    for (int s = 4; s < L; s *= 2) {
      b = a;
      c = a;
      swap_blocks<A>(b, c, s);
      a = b + c;
    }
    store(lane, a);
  }
  for (int i = 0; i < 4; i++) out[i] = lane[i];
}

/* Transposes lanes x lanes values in registers: log2(lanes) rounds that swap blocks of size s. */
template <class A>
DCN_INLINE void transpose(typename Vector<A>::V *row) {
  constexpr int L = Vector<A>::lanes;
#pragma GCC unroll 8
  for (int s = 1; s < L; s *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & s)) swap_blocks<A>(row[i], row[i + s], s);
  }
}

#else /* one lane at a time: the oracle within the family */

template <class A>
struct Vector {
  typedef A V;
  typedef bool Mask;
  static constexpr int lanes = 1;
};

template <class A>
DCN_INLINE A load(const A *p) {
  return *p;
}
template <class A>
DCN_INLINE void store(A *p, A v) {
  *p = v;
}
template <class A>
DCN_INLINE bool first_lanes(int count) {
  return count > 0;
}
template <class A>
DCN_INLINE A keep(bool mask, A v) {
  return mask ? v : A(0);
}
template <class A>
DCN_INLINE A pick(bool mask, A yes, A no) {
  return mask ? yes : no;
}
template <class A>
DCN_INLINE void sum4(A a, A b, A c, A d, A *out) {
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}
template <class A>
DCN_INLINE void transpose(A *) {}

#endif

template <class A>
DCN_INLINE typename Vector<A>::V splat(A x) {
  typename Vector<A>::V v = {};
  return v + x;
}

template <class T>
DCN_INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
DCN_INLINE T max(T a, T b) {
  return a > b ? a : b;
}
DCN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DCN_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace DCN_ISA
#endif
