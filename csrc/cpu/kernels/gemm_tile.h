/* Register kernel: a small dense product, the loop that costs the most.
 *
 *   C[m, n] (+)= sum_k A[m, k] * B[k, n]      m < rows, n < vectors * lanes, k < depth, k in order
 *
 * A    rows of `lda` values, read one value at a time and broadcast: pixel-major columns need no packing
 * B    rows of `ldb` values, read as whole vectors: a packed weight panel, or a tile of columns
 * C    rows of `ldc` values, whole vectors; added to when `accumulate`
 *
 * Accumulators: rows x vectors registers, at most ROWS x 2 (AVX-512 14x2 of 32, AVX2 6x2 of 16, SSE2
 * 6x2 of 16, NEON 14x2 of 32). One vector of B is used `rows` times, one value of A twice. AVX-512: 28
 * fused multiply-adds, 2 loads and 14 broadcasts a step of k, bound by the multiply-adds.
 * Every element sums each cut of its k in order and then the cuts, whatever block it falls into: results
 * do not depend on tiles.
 */
#ifndef DCN_GEMM_TILE_H
#define DCN_GEMM_TILE_H

#include "simd.h"

namespace DCN_ISA {

#if DCN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int ROWS = 14;
#else
constexpr int ROWS = 6;
#endif

/* k of one cut. AVX-512 machines have second-level caches that feed a panel of any depth. */
constexpr int64_t GEMM_DEPTH = DCN_VECTOR_BYTES == 64 ? 576 : 224;

template <class A, int M, int N>
static void gemm_registers(int64_t depth, const A *a, int64_t lda, const A *b, int64_t ldb, A *c,
                           int64_t ldc, bool accumulate) {
  typedef typename Vector<A>::V V;
  constexpr int L = Vector<A>::lanes;
  V acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) acc[m][n] = V{};
  if (accumulate) /* C comes from further away than A and B */
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) prefetch(c + m * ldc + n * L);
  constexpr int BASES = (M + 2) / 3; /* a register for every three rows, and one for the step */
  const A *base[BASES];
#pragma GCC unroll 5
  for (int i = 0; i < BASES; i++) base[i] = opaque(a + 3 * i * lda);
#if DCN_VECTOR_BYTES == 64
  /* Where the loop begins within a line of 64 bytes is worth 4 %, the line's start being the worst. */
  __asm__ volatile(".p2align 6\n\t.skip 48, 0x90");
#endif
  for (int64_t k = 0; k < depth; k++) { /* the hot loop */
    V row[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) row[n] = load(b + n * L);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const A value = factor(base[m / 3][m % 3 * lda]);
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) acc[m][n] += value * row[n];
    }
    b += ldb;
#pragma GCC unroll 5
    for (int i = 0; i < BASES; i++) base[i] = opaque(base[i] + 1);
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      A *at = c + m * ldc + n * L;
      store(at, accumulate ? load(at) + acc[m][n] : acc[m][n]);
    }
}

template <class A, int N>
static void gemm_rows(int64_t rows, int64_t depth, const A *a, int64_t lda, const A *b, int64_t ldb,
                      A *c, int64_t ldc, bool accumulate) {
  if (VARIANTS == ONE_VARIANT || (VARIANTS == SOME_VARIANTS && (N == 1 || rows < ROWS / 2))) {
    for (; rows >= ROWS; rows -= ROWS, a += ROWS * lda, c += ROWS * ldc)
      gemm_registers<A, ROWS, N>(depth, a, lda, b, ldb, c, ldc, accumulate);
    for (; rows >= 3; rows -= 3, a += 3 * lda, c += 3 * ldc)
      gemm_registers<A, 3, N>(depth, a, lda, b, ldb, c, ldc, accumulate);
    for (; rows; rows--, a += lda, c += ldc)
      gemm_registers<A, 1, N>(depth, a, lda, b, ldb, c, ldc, accumulate);
    return;
  }
  /* Equal parts: 49 rows are 12 + 12 + 12 + 13, not 14 + 14 + 14 + 7. Of 14 variants some are the even ones
   * (and ROWS / 2): an odd row is by itself. */
  constexpr int64_t STEP = ROWS > 6 ? 2 : 1;
  const int64_t parts = ceil_div(rows, ROWS);
  const auto begin = [&](int64_t part) {
    return part == parts ? rows : round_up(rows * part / parts, STEP);
  };
  for (int64_t part = 0; part < parts; part++) {
    const A *from = a + begin(part) * lda;
    A *to = c + begin(part) * ldc;
    int64_t count = begin(part + 1) - begin(part);
    if (VARIANTS == SOME_VARIANTS && count % STEP && count > ROWS / 2)
      count--, gemm_registers<A, 1, N>(depth, from + count * lda, lda, b, ldb, to + count * ldc,
                                       ldc, accumulate);
#define DCN_CASE(M)                                                               \
  case M:                                                                         \
    if constexpr (VARIANTS == ALL_VARIANTS ||                                     \
                  (N == 2 && (M == ROWS / 2 || (M > ROWS / 2 && M % STEP == 0)))) \
      gemm_registers<A, M, N>(depth, from, lda, b, ldb, to, ldc, accumulate);     \
    break;
    switch (count) {
      DCN_CASE(1)
      DCN_CASE(2)
      DCN_CASE(3)
      DCN_CASE(4)
      DCN_CASE(5)
      DCN_CASE(6)
#if DCN_VECTOR_BYTES == 64 || defined(__aarch64__)
      DCN_CASE(7)
      DCN_CASE(8)
      DCN_CASE(9)
      DCN_CASE(10)
      DCN_CASE(11)
      DCN_CASE(12)
      DCN_CASE(13)
      DCN_CASE(14)
#endif
    }
#undef DCN_CASE
  }
}

/* C (+)= A B for `vectors` vectors of columns; B's column panels lie `panel_step` values apart, each
 * two vectors wide (the last may be one). With B a plain row-major matrix, panel_step = 2 * lanes.
 * k is cut so that a panel's cut and the rows of A that meet it stay in the first-level cache. */
template <class A>
static void gemm(int64_t rows, int64_t vectors, int64_t depth, const A *a, int64_t lda, const A *b,
                 int64_t ldb, int64_t panel_step, A *c, int64_t ldc, bool accumulate) {
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t cuts = ceil_div(depth, GEMM_DEPTH);
  for (int64_t cut = 0; cut < cuts; cut++) {
    const int64_t first = depth * cut / cuts, count = depth * (cut + 1) / cuts - first;
    for (int64_t v = 0; v < vectors; v += 2) {
      const A *panel = b + v / 2 * panel_step + first * ldb;
      if (v + 1 < vectors)
        gemm_rows<A, 2>(rows, count, a + first, lda, panel, ldb, c + v * L, ldc, accumulate || cut);
      else
        gemm_rows<A, 1>(rows, count, a + first, lda, panel, ldb, c + v * L, ldc, accumulate || cut);
    }
  }
}

}  // namespace DCN_ISA
#endif
