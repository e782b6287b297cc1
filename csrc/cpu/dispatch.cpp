/* Which kernel tables are linked into this build, and which of them this processor can run.
 *
 * A tier is usable only if every feature that its file was compiled with is there (x86-64-v3 for
 * avx2, the AVX-512 part of v4 for avx512); baseline is what the ABI itself demands. amx is avx512 with
 * a matrix unit, whose registers a process has to ask Linux for. Release wheels have no scalar. */
#include "dcn_cpu.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether there is a matrix unit for bfloat16, and this process may use it. */
static bool matrix_unit(void) {
  constexpr unsigned BFLOAT16 = 1 << 22, TILES = 1 << 24;
  constexpr long ASK = 0x1023, TILE_DATA = 18; /* ARCH_REQ_XCOMP_PERM, Linux 5.16 */
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (BFLOAT16 | TILES))) return false;
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#else
static bool matrix_unit(void) { return false; }
#endif

extern "C" {

extern const dcn_cpu_kernels dcn_cpu_kernels_baseline;
#if !DCN_RELEASE
extern const dcn_cpu_kernels dcn_cpu_kernels_scalar;
#endif
#if defined(__x86_64__)
extern const dcn_cpu_kernels dcn_cpu_kernels_avx2, dcn_cpu_kernels_avx512, dcn_cpu_kernels_amx;
#endif

static const dcn_cpu_kernels *const built[] = {
#if defined(__x86_64__)
    &dcn_cpu_kernels_amx,
    &dcn_cpu_kernels_avx512,
    &dcn_cpu_kernels_avx2,
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
  return built + (avx512 && matrix_unit() ? 0 : avx512 ? 1 : avx2 ? 2 : 3);
#else
  return built;
#endif
}

}  // extern "C"
