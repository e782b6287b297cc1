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

#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define DCN_INLINE static inline __attribute__((always_inline))

/* How many variants of a hot loop are compiled; setup.py says it for each part of a release wheel. */
#ifndef DCN_VARIANTS
#define DCN_VARIANTS 2
#endif

namespace DCN_ISA {

enum {
  ONE_VARIANT,   /* that does everything, a little slower */
  SOME_VARIANTS, /* those of common layers; one for the rest */
  ALL_VARIANTS,
};
constexpr int VARIANTS = DCN_VARIANTS; /* all of them give the same bits */

/* Where wheels have to be small: what hardly any call needs; what every task does, but once (who calls a
 * cold function gets cold itself); what several functions call; and a loop over the vectors of a pixel, of
 * which there are four at most. */
#if DCN_VARIANTS < 2
#define DCN_COLD __attribute__((cold, noinline))
#ifdef __clang__
#define DCN_SMALL __attribute__((minsize, noinline))
#else
#define DCN_SMALL __attribute__((optimize("Os"), noinline))
#endif
#define DCN_OUT_OF_LINE __attribute__((noinline))
#define DCN_UNROLLED
#else
#define DCN_COLD
#define DCN_SMALL
#define DCN_OUT_OF_LINE __attribute__((always_inline)) inline
#define DCN_UNROLLED _Pragma("GCC unroll 4")
#endif

/* Iterations of the loop behind it do not meet in memory. None adds to a sum: Clang would change its order. */
#ifdef __clang__
#define DCN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DCN_INDEPENDENT _Pragma("GCC ivdep")
#endif

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

/* The largest integers that are not larger. */
template <class A>
DCN_INLINE typename Vector<A>::V floor_of(typename Vector<A>::V v) {
  constexpr bool narrow = sizeof(A) == 4;
#if defined(__AVX512F__)
  if constexpr (narrow)
    return _mm512_floor_ps(v);
  else
    return _mm512_floor_pd(v);
#elif defined(__AVX2__)
  if constexpr (narrow)
    return _mm256_floor_ps(v);
  else
    return _mm256_floor_pd(v);
#elif defined(__aarch64__)
  if constexpr (narrow)
    return (typename Vector<A>::V)vrndmq_f32((float32x4_t)v);
  else
    return (typename Vector<A>::V)vrndmq_f64((float64x2_t)v);
#else
  typedef typename Vector<A>::V V;
  const A most = narrow ? A(8388608.0) : A(4503599627370496.0); /* 2^23, 2^52 */
  V whole = __builtin_convertvector(__builtin_convertvector(v, typename Vector<A>::Mask), V);
  whole = whole > v ? whole - 1 : whole;
  return ((v < most) & (v > -most)) ? whole : v; /* others are integers, infinite or NaN */
#endif
}

/* Lanes where from[i] == x, in integers as wide as A. */
template <class A, class I>
DCN_INLINE typename Vector<A>::Mask lanes_equal(const I *from, I x) {
  typename Vector<A>::Mask v;
  __builtin_memcpy(&v, from, sizeof v);
  return v == x;
}

/* Lanes index(0), index(1), ... of a and b, b's counted on from a's. `index` is a type with a constant
 * function: lane numbers must be constants, or they are computed every time. */
template <class A, class Index, size_t... I>
DCN_INLINE typename Vector<A>::V shuffle(typename Vector<A>::V a, typename Vector<A>::V b,
                                         std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::at(I)...);
#else
  return __builtin_shuffle(a, b, typename Vector<A>::Mask{Index::at(I)...});
#endif
}
template <class A, class Index>
DCN_INLINE typename Vector<A>::V shuffle(typename Vector<A>::V a, typename Vector<A>::V b) {
  return shuffle<A, Index>(a, b, std::make_index_sequence<Vector<A>::lanes>());
}

template <int L, int S> /* a[i] where the bit S of i is clear, else b[i - S] */
struct LowBlocks {
  static constexpr int at(int i) { return i & S ? L + i - S : i; }
};
template <int L, int S> /* a[i + S] where the bit S of i is clear, else b[i] */
struct HighBlocks {
  static constexpr int at(int i) { return i & S ? L + i : i + S; }
};
template <int L, int B, int ODD> /* every other lane of each block of B lanes, a's and then b's */
struct EveryOther {
  static constexpr int at(int i) {
    return i / B * B + (i % B < B / 2 ? i % B * 2 : L + i % B * 2 - B) + ODD;
  }
};
template <int S>
struct Crossed {
  static constexpr int at(int i) { return i ^ S; }
};

template <class A, int S>
DCN_INLINE void swap_blocks(typename Vector<A>::V &a, typename Vector<A>::V &b) {
  constexpr int L = Vector<A>::lanes;
  const typename Vector<A>::V low = shuffle<A, LowBlocks<L, S>>(a, b);
  b = shuffle<A, HighBlocks<L, S>>(a, b);
  a = low;
}

/* In every 16 bytes: the sums of a's neighbouring lanes, then of b's. */
template <class A>
DCN_INLINE typename Vector<A>::V add_pairs(typename Vector<A>::V a, typename Vector<A>::V b) {
  constexpr int L = Vector<A>::lanes, B = 16 / sizeof(A);
  return shuffle<A, EveryOther<L, B, 0>>(a, b) + shuffle<A, EveryOther<L, B, 1>>(a, b);
}

/* part[q][i] = from[4 i + q]. */
template <class A>
DCN_INLINE void load_parts(const A *from, typename Vector<A>::V *part) {
  constexpr int L = Vector<A>::lanes;
  typedef EveryOther<L, L, 0> Even;
  typedef EveryOther<L, L, 1> Odd;
  const typename Vector<A>::V a = load(from), b = load(from + L);
  const typename Vector<A>::V c = load(from + 2 * L), d = load(from + 3 * L);
  part[0] = shuffle<A, Even>(shuffle<A, Even>(a, b), shuffle<A, Even>(c, d));
  part[1] = shuffle<A, Even>(shuffle<A, Odd>(a, b), shuffle<A, Odd>(c, d));
  part[2] = shuffle<A, Odd>(shuffle<A, Even>(a, b), shuffle<A, Even>(c, d));
  part[3] = shuffle<A, Odd>(shuffle<A, Odd>(a, b), shuffle<A, Odd>(c, d));
}

/* v + v with blocks of S lanes crossed, and so on for larger S: the sum of all parts of S lanes. */
template <class A, int S>
DCN_INLINE typename Vector<A>::V add_blocks(typename Vector<A>::V v) {
  if constexpr (S < Vector<A>::lanes)
    return add_blocks<A, 2 * S>(v + shuffle<A, Crossed<S>>(v, v));
  else
    return v;
}

/* The sums over lanes of four vectors: eight shuffles and five additions with AVX-512. */
template <class A>
DCN_INLINE void sum4(typename Vector<A>::V a, typename Vector<A>::V b, typename Vector<A>::V c,
                     typename Vector<A>::V d, A *out) {
  constexpr int L = Vector<A>::lanes;
  a = add_pairs<A>(a, b);
  c = add_pairs<A>(c, d);
  if constexpr (L == 2) {
    store(out, a);
    store(out + 2, c);
  } else {
    if constexpr (sizeof(A) == 4) {
      a = add_pairs<A>(a, c);
    } else {
      swap_blocks<A, 2>(a, c);
      a += c;
    }
    a = add_blocks<A, 4>(a);
    __builtin_memcpy(out, &a, 4 * sizeof(A));
  }
}

/* The same of two times four vectors, bit by bit, in fewer steps with AVX-512. */
template <class A>
DCN_INLINE void sum4_twice(const typename Vector<A>::V *a, const typename Vector<A>::V *b, A *of_a,
                           A *of_b) {
  static_assert(Vector<A>::lanes == 16, "another width has other steps");
  typename Vector<A>::V v = add_pairs<A>(add_pairs<A>(a[0], a[1]), add_pairs<A>(a[2], a[3]));
  typename Vector<A>::V w = add_pairs<A>(add_pairs<A>(b[0], b[1]), add_pairs<A>(b[2], b[3]));
  swap_blocks<A, 4>(v, w);
  v = add_blocks<A, 8>(v + w);
  A sums[8];
  __builtin_memcpy(sums, &v, sizeof sums);
  __builtin_memcpy(of_a, sums, 4 * sizeof(A));
  __builtin_memcpy(of_b, sums + 4, 4 * sizeof(A));
}

/* The sum of the lanes: halves added to each other until one is left. */
template <class A, int S = Vector<A>::lanes / 2>
DCN_INLINE A fold(typename Vector<A>::V v) {
  if constexpr (S > 0)
    return fold<A, S / 2>(v + shuffle<A, Crossed<S>>(v, v));
  else
    return v[0];
}

/* Transposes lanes x lanes values in registers: log2(lanes) rounds that swap blocks of size S. */
template <class A, int S = 1>
DCN_INLINE void transpose(typename Vector<A>::V *row) {
  constexpr int L = Vector<A>::lanes;
  if constexpr (S < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & S)) swap_blocks<A, S>(row[i], row[i + S]);
    transpose<A, 2 * S>(row);
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
template <class A>
DCN_INLINE A fold(A v) {
  return v;
}
template <class A>
DCN_INLINE void load_parts(const A *from, A *part) {
  for (int q = 0; q < 4; q++) part[q] = from[q];
}
template <class A, class I>
DCN_INLINE bool lanes_equal(const I *from, I x) {
  return *from == x;
}

#endif

template <class A>
DCN_INLINE typename Vector<A>::V splat(A x) {
  const typename Vector<A>::V zero = {};
  return x - zero; /* x whatever it is, which x + 0 is not: no addition is left */
}

/* The same address, of which the compiler knows nothing: it keeps one register for it and constant
 * distances, not one for each combination of steps. */
template <class T>
DCN_INLINE T *opaque(T *p) {
  __asm__("" : "+r"(p));
  return p;
}

/* A factor of whole vectors. On ARM a multiply-add takes it from a lane; read as a vector of copies, as the
 * compiler likes to, it takes a place among the multiply-adds. */
template <class A>
DCN_INLINE A factor(A value) {
#if defined(__aarch64__)
  __asm__("" : "+w"(value));
#endif
  return value;
}

/* a x + b y with b y rounded: of two products the compiler would fuse either with the sum, and not the
 * same one under all options. */
template <class V>
DCN_INLINE V mixed(V a, V x, V b, V y) {
  V rounded = b * y;
#if defined(__aarch64__)
  __asm__("" : "+w"(rounded));
#elif defined(__x86_64__)
  __asm__("" : "+v"(rounded));
#endif
  return a * x + rounded;
}

DCN_INLINE void prefetch(const void *p) { __builtin_prefetch(p); }
DCN_INLINE void prefetch_to_write(void *p) { __builtin_prefetch(p, 1); }

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
