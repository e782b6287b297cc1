/* Which kernel tables are linked into this build, and which of them this processor can run.
 *
 * A tier is usable only if every feature that its file was compiled with is there (x86-64-v3 for
 * avx2, the AVX-512 part of v4 for avx512); baseline is what the ABI itself demands. Release wheels
 * have no scalar. */
#include "dcn_cpu.h"

extern "C" {

extern const dcn_cpu_kernels dcn_cpu_kernels_baseline;
#if !DCN_RELEASE
extern const dcn_cpu_kernels dcn_cpu_kernels_scalar;
#endif
#if defined(__x86_64__)
extern const dcn_cpu_kernels dcn_cpu_kernels_avx2, dcn_cpu_kernels_avx512;
#endif

static const dcn_cpu_kernels *const built[] = {
#if defined(__x86_64__)
    &dcn_cpu_kernels_avx512, &dcn_cpu_kernels_avx2,
#endif
    &dcn_cpu_kernels_baseline,
#if !DCN_RELEASE
    &dcn_cpu_kernels_scalar,
#endif
    nullptr};

const dcn_cpu_kernels *const *dcn_cpu_built(void) { return built; }

const dcn_cpu_kernels *const *dcn_cpu_usable(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return built + (avx512 ? 0 : avx2 ? 1 : 2);
#else
  return built;
#endif
}

}  // extern "C"
