/* The register kernel's product by the processor's matrix unit (AMX), as accurate as that.
 *
 *   C[m, n] (+)= sum_k A[m, k] * B[k, n]      m < rows, n < columns, k < depth
 *
 * The unit multiplies bfloat16 and adds in float32. Three of its numbers hold a float32 exactly:
 * a = a0 + a1 + a2 by cutting off 8 bits at a time, so that |a1| < 2^-7 |a| and |a2| < 2^-15 |a|. Of the
 * nine products of parts six are added; the others, a1 b2, a2 b1 and a2 b2, are below 2^-21 |a b| together.
 * (Henry, Tang, Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for
 * higher-precision computations".) The sums of a cut begin at zero and are added to C once: beside a large C
 * what the small parts give would be lost.
 *
 * What the unit would not do as float32 does - infinities, NaN, numbers whose products overflow or vanish;
 * it takes denormals for zeros - is left to the register kernel: rows of A's cuts and blocks of B that are
 * `hard`. Which those are depends on their values alone.
 *
 * A    split into strips of 32 rows, of blocks of 32 k: [part][half of the rows][row][k], k and k + 16 of
 *      a block side by side
 * B    split into blocks of 32 k and 32 columns: [part][half of the columns][k][column], the same pairs
 *      side by side; of a hard block float32
 * C    as the register kernel's
 *
 * k is cut into up to CUT_BLOCKS blocks: what a cut has of a strip and of two vectors of columns, 18 kB
 * each, meet in the first-level cache. Four of the eight tile registers hold 32 x 32 sums. A block: 24
 * products of 16 cycles, 14 loads of 16 lines; 73 % of the unit's peak, twice the register kernel's
 * speed. Splitting takes about 5 cycles a vector.
 */
#ifndef DCN_GEMM_SPLIT_H
#define DCN_GEMM_SPLIT_H

#include "gemm_tile.h"
#include "geometry.h"

namespace DCN_ISA {

/* Whether products of A's type can be split here. */
template <class A>
constexpr bool SPLITS = DCN_VECTOR_BYTES == 64 && sizeof(A) == 4;

/* Outputs of a group and pixels of an image from which on that is faster; channels fill whole vectors, or
 * most of them. */
constexpr int64_t SPLIT_OUTPUTS = 32, SPLIT_PIXELS = 64;
template <class A>
DCN_INLINE bool may_split(const dcn_params &p) {
  constexpr int64_t L = Vector<A>::lanes;
  const int64_t unit = min(group_in(p), offset_group_in(p)); /* channels that lie together */
  return SPLITS<A> && group_out(p) >= SPLIT_OUTPUTS && plane_out(p) >= SPLIT_PIXELS &&
         2 * round_up(unit, L) <= 3 * unit;
}

constexpr int64_t BLOCK = 32;     /* rows of a strip, k and columns of a block */
constexpr int64_t CUT_BLOCKS = 3; /* of k */
constexpr int64_t TILE = 512;     /* values of a tile register */
constexpr int64_t PART = 2 * TILE;

/* Of A's and of B's numbers; the others are zeros. */
struct Parts {
  int a, b;
};
constexpr int ALL_PARTS = 3;
DCN_INLINE int parts_of(const dcn_params &p) {
  return p.dtype == DCN_BFLOAT16 ? 1 : p.dtype == DCN_FLOAT16 ? 2 : ALL_PARTS;
}

struct SplitStrip {          /* a block of k of 32 rows of A */
  uint16_t part[3][2][TILE]; /* rows follow one another over the halves */
};
struct SplitBlock { /* of B */
  union {
    uint16_t part[3][2][TILE];
    float whole[BLOCK][BLOCK]; /* [k][column] */
  };
  int64_t hard, none[7];
};

#if DCN_VECTOR_BYTES == 64

DCN_INLINE __mmask16 lanes16(int64_t count) {
  return (__mmask16)((1u << max((int64_t)0, min((int64_t)16, count))) - 1);
}

typedef Unsigned<float>::V Words;
constexpr uint32_t HIGH = 0xffff0000;

/* Numbers of 2^60 and more are hard, and those below 2^-103, of which parts are denormal. So are those
 * below a limit where nothing larger stands beside them. Products of parts may still vanish, each less than
 * 2^-126, where what is large in a row of A and in a block of B does not meet: an error of at most twice
 * what a product that vanishes in AVX-512 leaves. As bfloat16. */
constexpr short TOO_LARGE = (60 + 127) << 7, TOO_SMALL = (-103 + 127) << 7;
constexpr short LEAST_OF_ROW = (-64 + 127) << 7, LEAST_OF_BLOCK = (-30 + 127) << 7;

/* What is known of numbers that were split. */
struct Magnitudes {
  __m512i most = {};
  __m512i least = _mm512_set1_epi32(-1); /* less one, that zeros do not count */
  Words left = {};                       /* the parts do not hold what its lower halves have */

  inline __attribute__((always_inline)) void add(const Magnitudes &other) {
    most = _mm512_max_epu16(most, other.most);
    least = _mm512_min_epu16(least, other.least);
    left |= other.left;
  }
  bool reaches(short limit) const {
    return _mm512_cmpge_epu16_mask(most, _mm512_set1_epi16(limit)) != 0;
  }
  bool too_small() const {
    return _mm512_cmplt_epu16_mask(least, _mm512_set1_epi16(TOO_SMALL - 1)) ||
           _mm512_test_epi32_mask((__m512i)left, _mm512_set1_epi32((int)~HIGH));
  }
};

/* Parts of v and w side by side, the parts' PART apart. */
DCN_INLINE void split_pair(__m512 v, __m512 w, uint16_t *to, Magnitudes &all) {
  Magnitudes pair;
#pragma GCC unroll 3
  for (int part = 0; part < 3; part++) {
    const Words x = (Words)v, y = (Words)w, both = x >> 16 | (y & HIGH);
    _mm512_storeu_si512(to + part * PART, (__m512i)both);
    if (part == 0) pair.most = (__m512i)(both & 0x7fff7fff);
    if (part == 2) pair.left = x | y;
    v -= (__m512)(x & HIGH);
    w -= (__m512)(y & HIGH);
  }
  pair.least = _mm512_sub_epi16(pair.most, _mm512_set1_epi16(1));
  all.add(pair);
}

/* What is known of a cut of a strip. */
struct Survey {
  Magnitudes all;
  uint32_t fit = 0; /* rows that have a number large enough */
  inline __attribute__((always_inline)) void add(const Magnitudes &row, int64_t m) {
    all.add(row);
    fit |= (uint32_t)row.reaches(LEAST_OF_ROW) << m;
  }
};

/* Which rows of a cut of a strip are hard; read(row, block, half) reads 16 values of one. */
template <class Read>
static void find_hard(int64_t rows, int64_t blocks, const Survey &survey, Read read,
                      uint8_t *hard) {
  const bool extreme = survey.all.reaches(TOO_LARGE) || survey.all.too_small();
  const uint32_t all = (uint32_t)(((uint64_t)1 << rows) - 1);
  for (int64_t m = 0; m < rows; m++) hard[m] = 0;
  if (!extreme && (survey.fit & all) == all) return;
  for (int64_t m = 0; m < rows; m++) {
    const bool fits = survey.fit >> m & 1;
    for (int64_t i = 0; i < 2 * blocks && !hard[m] && (extreme || !fits); i++) {
      const __m512 x = read(m, i / 2, i % 2), magnitude = (__m512)((Words)x & 0x7fffffff);
      const auto fine = (magnitude >= 0x1p-103f) & (magnitude < 0x1p60f);
      const auto bad = fits ? (x != 0) & ~fine : x != 0;
      hard[m] = _mm512_test_epi32_mask((__m512i)bad, (__m512i)bad) != 0;
    }
  }
}

/* A cut of A, split: strips of rows, `step` blocks apart; read(row, block, half) as above. */
template <class Read>
struct SplitRows {
  int64_t rows, blocks, step;
  const SplitStrip *strips;
  const uint8_t *hard;
  Read read;
};
template <class Read>
SplitRows(int64_t, int64_t, int64_t, const SplitStrip *, const uint8_t *, Read) -> SplitRows<Read>;

template <class Read>
static void split_rows(int64_t rows, int64_t blocks, SplitStrip *to, uint8_t *hard, Read read) {
  for (int64_t m = 0; m < rows; m += BLOCK, to += blocks) {
    const int64_t height = min(BLOCK, rows - m);
    const auto read_strip = [&](int64_t i, int64_t k, int64_t half) {
      return read(m + i, k, half);
    };
    Survey survey;
    for (int64_t i = 0; i < height; i++) {
      Magnitudes row;
      for (int64_t k = 0; k < blocks; k++)
        split_pair(read_strip(i, k, 0), read_strip(i, k, 1), to[k].part[0][0] + i * BLOCK, row);
      survey.add(row, i);
    }
    find_hard(height, blocks, survey, read_strip, hard + m);
  }
}

/* A block of B that is not hard, as it was before. */
DCN_COLD static void join_block(const SplitBlock &block, float (*to)[BLOCK]) {
  for (int64_t half = 0; half < 2; half++)
    for (int64_t k = 0; k < 16; k++) {
      __m512 v = {}, w = {};
      for (int part = 2; part >= 0; part--) {
        const Words both = (Words)_mm512_loadu_si512(block.part[part][half] + k * BLOCK);
        v += (__m512)(both << 16);
        w += (__m512)(both & HIGH);
      }
      store(to[k] + 16 * half, v);
      store(to[k + 16] + 16 * half, w);
    }
}

/* One block of B: `depth` rows, at most BLOCK. */
static void split_block(int64_t depth, int64_t columns, const float *b, int64_t ldb,
                        SplitBlock *to) {
  const auto read = [&](int64_t k, int64_t half) {
    return _mm512_maskz_loadu_ps(k < depth ? lanes16(columns - 16 * half) : 0,
                                 b + k * ldb + 16 * half);
  };
  Magnitudes all;
  for (int64_t half = 0; half < (columns > 16 ? 2 : 1); half++)
    for (int64_t k = 0; k < 16; k++)
      split_pair(read(k, half), read(k + 16, half), to->part[0][half] + k * BLOCK, all);
  to->hard = all.reaches(TOO_LARGE) || all.too_small();
  if (!to->hard && all.reaches(LEAST_OF_BLOCK)) return;
  float whole[BLOCK][BLOCK];
  for (int64_t k = 0; k < BLOCK; k++)
    for (int64_t half = 0; half < 2; half++) store(whole[k] + 16 * half, read(k, half));
  for (const auto &row : whole)
    for (float x : row) to->hard |= x != 0;
  if (to->hard) __builtin_memcpy(to->whole, whole, sizeof whole);
}

/* A cut of 32 columns of B. */
static void split_panel(int64_t depth, int64_t columns, const float *b, int64_t ldb,
                        SplitBlock *to) {
  for (int64_t k = 0; k < depth; k += BLOCK)
    split_block(min(BLOCK, depth - k), min(BLOCK, columns), b + k * ldb, ldb, to + k / BLOCK);
}

/* The unit's registers, while one exists: 0 to 3 sums [half of the rows][half of the columns], 4 and 5 A's
 * halves, 6 and 7 B's. */
struct TileRegisters {
  TileRegisters() { configure(BLOCK); }
  ~TileRegisters() { __asm__ volatile("tilerelease" ::: "memory"); }
  static void configure(int64_t rows) {
    struct {
      uint8_t palette, start, none[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } c = {};
    c.palette = 1;
    for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = 16;
    c.rows[0] = c.rows[1] = c.rows[4] = (uint8_t)min(rows, (int64_t)16);
    c.rows[2] = c.rows[3] = c.rows[5] = (uint8_t)max(rows - 16, (int64_t)1);
    __asm__ volatile("ldtilecfg %0" ::"m"(c));
  }
};
#define DCN_MOVE(text, at, bytes) __asm__ volatile(text::"r"(at), "r"((int64_t)(bytes)) : "memory")
#define DCN_LOAD(tile, from, bytes) DCN_MOVE("tileloadd (%0,%1,1), %%tmm" #tile, from, bytes)
#define DCN_STORE(tile, to, bytes) DCN_MOVE("tilestored %%tmm" #tile ", (%0,%1,1)", to, bytes)
#define DCN_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile::)
#define DCN_MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

/* M and N halves of a strip and of a block's columns. Sums begin at zero and are added to C once: it is large
 * beside what the small parts add. */
template <int M, int N>
static void multiply_tiles(int64_t rows, int64_t blocks, Parts parts, const SplitStrip *a,
                           const SplitBlock *b, float *c, int64_t ldc, bool accumulate) {
  alignas(LINE) float sums[BLOCK][BLOCK];
  float *const to = accumulate ? sums[0] : c;
  const int64_t pitch = accumulate ? BLOCK : ldc, line = pitch * (int64_t)sizeof(float);
  float *const below = to + 16 * pitch;
  DCN_ZERO(0);
  if (N > 1) DCN_ZERO(1);
  if (M > 1) DCN_ZERO(2);
  if (M > 1 && N > 1) DCN_ZERO(3);
  const auto load_a = [&a](int part) {
    DCN_LOAD(4, a->part[part][0], 64);
    if (M > 1) DCN_LOAD(5, a->part[part][1], 64);
  };
  const auto load_b = [&b](int part) {
    DCN_LOAD(6, b->part[part][0], 64);
    if (N > 1) DCN_LOAD(7, b->part[part][1], 64);
  };
  const auto multiply = [] {
    DCN_MULTIPLY(0, 4, 6);
    if (N > 1) DCN_MULTIPLY(1, 4, 7);
    if (M > 1) DCN_MULTIPLY(2, 5, 6);
    if (M > 1 && N > 1) DCN_MULTIPLY(3, 5, 7);
  };
  for (int64_t k = 0; k < blocks; k++, a++, b++) { /* the hot loop */
    load_b(0);
    if (parts.a > 1) {
      if (parts.a > 2) load_a(2), multiply();
      load_a(1), multiply();
      if (parts.b > 1) load_b(1), multiply();
    }
    load_a(0);
    if (parts.b > 1) {
      if (parts.a == 1) load_b(1);
      multiply();
      if (parts.b > 2) load_b(2), multiply();
      load_b(0);
    }
    multiply();
  }
  DCN_STORE(0, to, line);
  if (N > 1) DCN_STORE(1, to + 16, line);
  if (M > 1) DCN_STORE(2, below, line);
  if (M > 1 && N > 1) DCN_STORE(3, below + 16, line);
  for (int64_t m = 0; accumulate && m < rows; m++, c += ldc)
    for (int n = 0; n < 16 * N; n += 16) store(c + n, load(c + n) + load(sums[m] + n));
}
#undef DCN_MOVE
#undef DCN_LOAD
#undef DCN_STORE
#undef DCN_ZERO
#undef DCN_MULTIPLY

template <int N>
static void multiply_strips(int64_t rows, int64_t blocks, Parts parts, const SplitStrip *a,
                            int64_t step, const SplitBlock *b, float *c, int64_t ldc,
                            bool accumulate) {
  for (; rows >= BLOCK; rows -= BLOCK, a += step, c += BLOCK * ldc)
    multiply_tiles<2, N>(BLOCK, blocks, parts, a, b, c, ldc, accumulate);
  if (rows == 0) return;
  TileRegisters::configure(rows);
  if (rows > 16)
    multiply_tiles<2, N>(rows, blocks, parts, a, b, c, ldc, accumulate);
  else
    multiply_tiles<1, N>(rows, blocks, parts, a, b, c, ldc, accumulate);
  TileRegisters::configure(BLOCK);
}

/* The same where a row or a block is hard. Where no block is, the others' sums are those of the whole cut: no
 * row's sum depends on another row. */
template <class Read>
DCN_COLD static void multiply_hard(const SplitRows<Read> &a, Parts parts, int64_t halves,
                                   const SplitBlock *b, float *c, int64_t ldc, bool accumulate) {
  const auto copy = [halves](const float *from, float *to) {
    for (int64_t half = 0; half < halves; half++) store(to + 16 * half, load(from + 16 * half));
  };
  int64_t together = a.blocks;
  for (int64_t i = 0; i < a.blocks; i++)
    if (b[i].hard) together = 1;
  for (int64_t first = 0; first < a.blocks; first += together, accumulate = true)
    for (int64_t m = 0; m < a.rows; m += BLOCK) {
      const bool hard = b[first].hard;
      const int64_t height = min(BLOCK, a.rows - m);
      float rows[BLOCK][BLOCK], sums[BLOCK][BLOCK] = {}, whole[BLOCK][BLOCK];
      int64_t index[BLOCK], count = 0;
      for (int64_t j = m; j < m + height; j++) {
        if (!hard && !a.hard[j]) continue;
        if (accumulate) copy(c + j * ldc, sums[count]);
        index[count++] = j;
      }
      if (!hard)
        (halves == 2 ? multiply_strips<2>
                     : multiply_strips<1>)(height, together, parts,
                                           a.strips + m / BLOCK * a.step + first, 0, b + first,
                                           c + m * ldc, ldc, accumulate);
      for (int64_t i = first; count && i < first + together; i++) {
        for (int64_t j = 0; j < count; j++)
          for (int64_t half = 0; half < 2; half++)
            store(rows[j] + 16 * half, a.read(index[j], i, half));
        if (!hard) join_block(b[i], whole);
        gemm_rows<float, 2>(count, BLOCK, rows[0], BLOCK, hard ? b[i].whole[0] : whole[0], BLOCK,
                            sums[0], BLOCK, true);
      }
      for (int64_t j = 0; j < count; j++) copy(sums[j], c + index[j] * ldc);
    }
}

/* C's up to 32 columns (+)= a cut of A times its blocks of B. */
template <class Read>
static void multiply_cut(const SplitRows<Read> &a, Parts parts, int64_t columns,
                         const SplitBlock *b, float *c, int64_t ldc, bool accumulate) {
  bool any = __builtin_memchr(a.hard, 1, (size_t)a.rows);
  for (int64_t i = 0; i < a.blocks; i++) any |= b[i].hard;
  if (any)
    multiply_hard(a, parts, columns > 16 ? 2 : 1, b, c, ldc, accumulate);
  else
    (columns > 16 ? multiply_strips<2> : multiply_strips<1>)(a.rows, a.blocks, parts, a.strips,
                                                             a.step, b, c, ldc, accumulate);
}

/* do_it(first block, blocks, first k, depth) of each cut of k. */
template <class DoIt>
DCN_INLINE void for_cuts(int64_t depth, DoIt do_it) {
  const int64_t all = ceil_div(depth, BLOCK), cuts = ceil_div(all, CUT_BLOCKS);
  for (int64_t cut = 0; cut < cuts; cut++) {
    const int64_t first = all * cut / cuts, blocks = all * (cut + 1) / cuts - first;
    do_it(first, blocks, first * BLOCK, min(blocks * BLOCK, depth - first * BLOCK));
  }
}
#endif

/* What a product takes of a thread's scratch: a cut of `pass` rows and of a panel. */
struct SplitScratch {
  int64_t pass;
  SplitStrip *rows;
  uint8_t *hard;
  SplitBlock *blocks;
  SplitScratch(Arena &arena, int64_t pass_rows) : pass(pass_rows) {
    rows = arena.take<SplitStrip>(ceil_div(pass, BLOCK) * CUT_BLOCKS);
    hard = arena.take<uint8_t>(pass);
    blocks = arena.take<SplitBlock>(pass ? CUT_BLOCKS : 0);
  }
};

#if DCN_VECTOR_BYTES == 64
/* The product as `gemm` has it. float64's object has no use for it. */
[[maybe_unused]] static void gemm_split(int64_t rows, int64_t columns, int64_t depth,
                                        const float *a, int64_t lda, const float *b, int64_t ldb,
                                        int64_t panel_step, float *c, int64_t ldc, bool accumulate,
                                        Parts parts, const SplitScratch &s) {
  const TileRegisters registers;
  for (int64_t first_row = 0; first_row < rows; first_row += s.pass)
    for_cuts(depth, [&](int64_t first, int64_t blocks, int64_t k, int64_t length) {
      const int64_t height = min(s.pass, rows - first_row);
      const auto read = [&](int64_t m, int64_t block, int64_t half) {
        const float *from = a + (first_row + m) * lda + k + block * BLOCK + half * 16;
        const int64_t count = length - block * BLOCK - half * 16;
        return count >= 16 ? load(from) : _mm512_maskz_loadu_ps(lanes16(count), from);
      };
      split_rows(height, blocks, s.rows, s.hard, read);
      const SplitRows split = {height, blocks, blocks, s.rows, s.hard, read};
      for (int64_t n = 0; n < columns; n += BLOCK) {
        split_panel(length, columns - n, b + n / BLOCK * panel_step + k * ldb, ldb, s.blocks);
        multiply_cut(split, parts, columns - n, s.blocks, c + first_row * ldc + n, ldc,
                     accumulate || first);
      }
    });
}
#endif

}  // namespace DCN_ISA
#endif
