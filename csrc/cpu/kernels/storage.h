/* Storage types at the edges of the core: rows are widened when read and rounded when written.
 *
 * Inside, everything is float (float32 and the 16-bit types) or double (float64); only these few
 * functions know the storage type. Rounding is to nearest, ties to even; NaN stays NaN.
 */
#ifndef DCN_STORAGE_H
#define DCN_STORAGE_H

#include "../../dcn_params.h"
#include "simd.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace DCN_ISA {

union Bits {
  float f;
  uint32_t u;
};

DCN_INLINE float from_bfloat16(uint16_t h) {
  Bits bits;
  bits.u = (uint32_t)h << 16;
  return bits.f;
}

DCN_INLINE uint16_t to_bfloat16(float f) {
  Bits bits;
  bits.f = f;
  const uint32_t rounded = (bits.u + 0x7fff + ((bits.u >> 16) & 1)) >> 16;
  return (uint16_t)(f != f ? (bits.u >> 16) | 0x40 : rounded);
}

#if defined(__F16C__)
DCN_INLINE float from_float16(uint16_t h) { return _cvtsh_ss(h); }
DCN_INLINE uint16_t to_float16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
DCN_INLINE float from_float16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  Bits bits;
  if (magnitude >= 0x7c00) { /* inf, NaN */
    bits.u = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else { /* 2^112 moves the exponent's bias and makes subnormals right */
    bits.u = magnitude << 13;
    bits.f *= 0x1p112f;
    bits.u |= sign;
  }
  return bits.f;
}

DCN_INLINE uint16_t to_float16(float f) {
  Bits bits;
  bits.f = f;
  const uint32_t sign = bits.u >> 16 & 0x8000;
  bits.u &= 0x7fffffff;
  uint32_t half;
  if (bits.u > 0x7f800000) {
    half = 0x7e00 | (bits.u >> 13 & 0x3ff);
  } else if (bits.u >= 0x477ff000) { /* 65520 and more round to inf */
    half = 0x7c00;
  } else if (bits.u < 0x38800000) { /* below 2^-14: let the float unit round the subnormal */
    bits.f += 0.5f;
    half = bits.u - 0x3f000000;
  } else {
    half = (bits.u - 0x38000000 + 0xfff + (bits.u >> 13 & 1)) >> 13;
  }
  return (uint16_t)(sign | half);
}
#endif

#if DCN_VECTOR_BYTES
/* A vector of 16-bit values, widened and rounded. */
typedef uint16_t Halves __attribute__((vector_size(DCN_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef Vector<float>::V Floats;

DCN_INLINE Floats load_bfloat16(const uint16_t *from) {
  return (Floats)(__builtin_convertvector(*(const Halves *)from, Unsigned<float>::V) << 16);
}

DCN_INLINE void store_bfloat16(uint16_t *to, Floats v) {
  typedef Unsigned<float>::V U;
  const U bits = (U)v, high = bits >> 16;
  const U rounded = (bits + 0x7fff + (high & 1)) >> 16;
  *(Halves *)to = __builtin_convertvector(v != v ? high | 0x40 : rounded, Halves);
}

#if defined(__AVX512F__) /* masked with all set: GCC 12 warns of the plain ones */
DCN_INLINE Floats load_float16(const uint16_t *from) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i *)from));
}
DCN_INLINE void store_float16(uint16_t *to, Floats v) {
  _mm256_storeu_si256((__m256i *)to,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
DCN_INLINE Floats load_float16(const uint16_t *from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}
DCN_INLINE void store_float16(uint16_t *to, Floats v) {
  _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
DCN_INLINE Floats load_float16(const uint16_t *from) {
  float line[Vector<float>::lanes];
  for (int i = 0; i < Vector<float>::lanes; i++) line[i] = from_float16(from[i]);
  return load(line);
}
DCN_INLINE void store_float16(uint16_t *to, Floats v) {
  float line[Vector<float>::lanes];
  store(line, v);
  for (int i = 0; i < Vector<float>::lanes; i++) to[i] = to_float16(line[i]);
}
#endif
#endif

/* One element at `index` of memory of type `dtype`, in arithmetic type A. */
template <class A>
DCN_INLINE A read_one(const void *memory, int dtype, int64_t index) {
  switch (dtype) {
    case DCN_FLOAT32:
      return (A)((const float *)memory)[index];
    case DCN_FLOAT64:
      return (A)((const double *)memory)[index];
    case DCN_FLOAT16:
      return (A)from_float16(((const uint16_t *)memory)[index]);
    default:
      return (A)from_bfloat16(((const uint16_t *)memory)[index]);
  }
}

/* out[i] = memory[index + i * step], i < count, widened. */
template <class A>
static void read_row(const void *memory, int dtype, int64_t index, int64_t step, int64_t count,
                     A *out) {
  switch (dtype) {
    case DCN_FLOAT32: {
      const float *from = (const float *)memory + index;
      if (step == 1)
        for (int64_t i = 0; i < count; i++) out[i] = (A)from[i];
      else
        for (int64_t i = 0; i < count; i++) out[i] = (A)from[i * step];
      break;
    }
    case DCN_FLOAT64: {
      const double *from = (const double *)memory + index;
      for (int64_t i = 0; i < count; i++) out[i] = (A)from[i * step];
      break;
    }
    case DCN_FLOAT16: {
      const uint16_t *from = (const uint16_t *)memory + index;
      int64_t i = 0;
#if DCN_VECTOR_BYTES
      if constexpr (sizeof(A) == 4)
        if (step == 1)
          for (constexpr int64_t L = Vector<A>::lanes; i + L <= count; i += L)
            store(out + i, load_float16(from + i));
#endif
      for (; i < count; i++) out[i] = (A)from_float16(from[i * step]);
      break;
    }
    default: {
      const uint16_t *from = (const uint16_t *)memory + index;
      if (step == 1)
        for (int64_t i = 0; i < count; i++) out[i] = (A)from_bfloat16(from[i]);
      else
        for (int64_t i = 0; i < count; i++) out[i] = (A)from_bfloat16(from[i * step]);
    }
  }
}

/* memory[index + i * step] = row[i], i < count, rounded. */
template <class A>
static void write_row(void *memory, int dtype, int64_t index, int64_t step, int64_t count,
                      const A *row) {
  switch (dtype) {
    case DCN_FLOAT32: {
      float *to = (float *)memory + index;
      if (step == 1)
        for (int64_t i = 0; i < count; i++) to[i] = (float)row[i];
      else
        for (int64_t i = 0; i < count; i++) to[i * step] = (float)row[i];
      break;
    }
    case DCN_FLOAT64: {
      double *to = (double *)memory + index;
      for (int64_t i = 0; i < count; i++) to[i * step] = (double)row[i];
      break;
    }
    case DCN_FLOAT16: {
      uint16_t *to = (uint16_t *)memory + index;
      int64_t i = 0;
#if DCN_VECTOR_BYTES
      if constexpr (sizeof(A) == 4)
        if (step == 1)
          for (constexpr int64_t L = Vector<A>::lanes; i + L <= count; i += L)
            store_float16(to + i, load(row + i));
#endif
      for (; i < count; i++) to[i * step] = to_float16((float)row[i]);
      break;
    }
    default: {
      uint16_t *to = (uint16_t *)memory + index;
      if (step == 1)
        for (int64_t i = 0; i < count; i++) to[i] = to_bfloat16((float)row[i]);
      else
        for (int64_t i = 0; i < count; i++) to[i * step] = to_bfloat16((float)row[i]);
    }
  }
}

/* A whole vector at `index` of memory of type `dtype`, which is A's own or, for float, narrower. */
template <class A>
DCN_INLINE typename Vector<A>::V load_stored(const void *memory, int dtype, int64_t index) {
#if DCN_VECTOR_BYTES
  if constexpr (sizeof(A) == 4) {
    if (dtype == DCN_FLOAT16) return load_float16((const uint16_t *)memory + index);
    if (dtype == DCN_BFLOAT16) return load_bfloat16((const uint16_t *)memory + index);
  }
  return load((const A *)memory + index);
#else
  return read_one<A>(memory, dtype, index);
#endif
}

template <class A>
DCN_INLINE void store_stored(void *memory, int dtype, int64_t index, typename Vector<A>::V v) {
#if DCN_VECTOR_BYTES
  if constexpr (sizeof(A) == 4) {
    if (dtype == DCN_FLOAT16) return store_float16((uint16_t *)memory + index, v);
    if (dtype == DCN_BFLOAT16) return store_bfloat16((uint16_t *)memory + index, v);
  }
  store((A *)memory + index, v);
#else
  write_row<A>(memory, dtype, index, 1, 1, &v);
#endif
}

/* Whether tensors hold the arithmetic type itself. */
template <class A>
DCN_INLINE bool is_direct(const dcn_params &p) {
  return p.dtype == (sizeof(A) == 4 ? DCN_FLOAT32 : DCN_FLOAT64);
}

DCN_INLINE int64_t bytes_of(int dtype) {
  return dtype == DCN_FLOAT64 ? 8 : dtype == DCN_FLOAT32 ? 4 : 2;
}

}  // namespace DCN_ISA
#endif
