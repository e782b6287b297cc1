/* float16 and bfloat16 for the emulation: the CPU core's conversions under CUDA's names. */
#ifndef DCN_EMULATED_CUDA_FP16_H
#define DCN_EMULATED_CUDA_FP16_H

#if !defined(DCN_ISA)
#define DCN_ISA emulated
#endif
#include "../../../csrc/cpu/kernels/storage.h"

struct __half {
  uint16_t bits;
};
static inline float __half2float(__half v) { return DCN_ISA::from_float16(v.bits); }
static inline __half __float2half_rn(float v) { return {DCN_ISA::to_float16(v)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 v) { return DCN_ISA::from_bfloat16(v.bits); }
static inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {DCN_ISA::to_bfloat16(v)}; }

#endif
