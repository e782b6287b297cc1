/* Deformable resampling: every channel of every pixel moves by an offset of its own.
 *
 *   y[n, c, i, j] = S(x[n, c]; i + offset[n, 2c, i, j], j + offset[n, 2c + 1, i, j])
 *
 * S is bilinear between floor and floor + 1. With `border` positions are limited to the image, else
 * zeros lie around it as for the convolution (bilinear.h). Slopes are right-hand derivatives; 0 where
 * a position is limited.
 *
 *   grad_offset     = g dS/dp
 *   grad_input[q]  += g G(q)      the four pixels around each position
 *
 * Channels share no position, so no other layout helps: a task works on planes as they are. Forward:
 * a piece of a plane. Backward: a whole plane, which the task alone writes; for the 16-bit types it is
 * summed in scratch. RESAMPLE_TILE pixels at a time go through loops of one kind each: positions, which
 * the compiler vectorises; the four corners, one load each; the interpolation, vectorised again.
 * Scratch: 26 arrays of a tile's values.
 */
#ifndef DCN_RESAMPLE_H
#define DCN_RESAMPLE_H

#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

constexpr int64_t RESAMPLE_TILE = 256;
constexpr int64_t RESAMPLE_LANES = 16;   /* vectorised loops run over a multiple, without a rest */
constexpr int64_t RESAMPLE_PIECE = 4096; /* pixels of a forward task */
constexpr int64_t WORK_OF_A_POSITION = 200; /* multiply-adds that a position is worth */

/* A tile of positions. I is the type of places in a plane: int32_t where they fit. */
template <class A, class I>
struct Positions {
  A *offset_y, *offset_x, *fraction_y, *fraction_x, *grad, *out_y, *out_x;
  A *corner[4]; /* pixel values, 0 for one that does not exist */
  I *row, *column;
  I *at[4];     /* places of the corners: top left, top right, bottom left, bottom right */
  I *exists[4]; /* 1, or 0 for a corner outside, whose place is any one; not with BORDER */
  I *number, *has_value, *moves_y, *moves_x; /* 1 or 0; all 0 for NaN */
  void *raw;                                 /* corners of a 16-bit type */
  A *plane;                                  /* backward, 16-bit types: the sum of grad_input */

  Positions(const dcn_resample_params &p, int direction, Arena &arena) {
    A **const reals[] = {&offset_y, &offset_x,  &fraction_y, &fraction_x, &grad,     &out_y,
                         &out_x,    &corner[0], &corner[1],  &corner[2],  &corner[3]};
    for (A **array : reals) *array = arena.take<A>(RESAMPLE_TILE);
    I **const places[] = {&row,    &column,    &at[0],     &at[1],     &at[2],
                          &at[3],  &exists[0], &exists[1], &exists[2], &exists[3],
                          &number, &has_value, &moves_y,   &moves_x};
    for (I **array : places) *array = arena.take<I>(RESAMPLE_TILE);
    raw = arena.take<uint16_t>(RESAMPLE_TILE);
    const bool sums = direction == DCN_BACKWARD && bytes_of(p.dtype) == 2;
    plane = arena.take<A>(sums && p.batch ? p.in_h * p.in_w : 0);
  }
};

/* Values that the vectorised loops of a tile compute; the last ones are nobody's. */
DCN_INLINE int64_t in_lanes(int64_t count) {
  return (count + RESAMPLE_LANES - 1) & -RESAMPLE_LANES;
}

/* Whether 32 bits hold every place and every position that is not far outside. */
DCN_INLINE bool places_are_short(const dcn_resample_params &p) {
  constexpr int64_t most = 1 << 29;
  return p.in_h < most && p.in_w < most && p.in_h * p.in_w < most;
}

DCN_INLINE float magnitude(float x) { return __builtin_fabsf(x); }
DCN_INLINE double magnitude(double x) { return __builtin_fabs(x); }
DCN_INLINE float with_sign(float x, float sign) { return __builtin_copysignf(x, sign); }
DCN_INLINE double with_sign(double x, double sign) { return __builtin_copysign(x, sign); }

/* floor(offset) and the rest; beyond +-2^29 (2^40), NaN included, somewhere far outside. */
template <class A, class I>
DCN_INLINE I split(A offset, A &fraction) {
  const A far = sizeof(I) == 4 ? A(1 << 29) : A(1099511627776.0);
  /* One choice only: two in a row would not be vectorised. */
  const A near = magnitude(offset) < far ? offset : with_sign(far, offset);
  I whole = (I)near;
  whole -= (A)whole > near;
  fraction = near - (A)whole;
  return whole;
}

/* Pixels first .. first + count - 1 of plane `plane`. With SLOPES the corners are wanted where there is
 * a slope but no value, too: exactly at -1. */
template <class A, class I, bool BORDER, bool SLOPES>
static void place_tile(const dcn_resample_params &p, const void *offset, int64_t plane,
                       int64_t first, int64_t count, const Positions<A, I> &s) {
  const I H = (I)p.in_h, W = (I)p.in_w;
  read_row(offset, p.dtype, 2 * plane * p.in_h * p.in_w + first, 1, count, s.offset_y);
  read_row(offset, p.dtype, (2 * plane + 1) * p.in_h * p.in_w + first, 1, count, s.offset_x);
  I row = (I)(first / p.in_w), column = (I)(first % p.in_w);
  for (int64_t i = 0; i < count;) {
    const int64_t end = min(count, i + (int64_t)(W - column));
    for (; i < end; i++) {
      s.row[i] = row;
      s.column[i] = column++;
    }
    row++;
    column = 0;
  }
  const int64_t computed = in_lanes(count);
  for (int64_t i = count; i < computed; i++) {
    s.offset_y[i] = s.offset_x[i] = 0;
    s.row[i] = s.column[i] = 0;
  }
  DCN_INDEPENDENT
  for (int64_t i = 0; i < computed; i++) { /* vectorised */
    const A oy = s.offset_y[i], ox = s.offset_x[i];
    A ly, lx;
    I y = s.row[i] + split<A, I>(oy, ly), x = s.column[i] + split<A, I>(ox, lx);
    /* 0 or 1 each, and no choices: they would not be vectorised. */
    const I number = (I)(oy == oy) & (I)(ox == ox);
    s.number[i] = number;
    if (BORDER) {
      const I free_y = (I)(y >= 0) & (I)(y < H - 1), free_x = (I)(x >= 0) & (I)(x < W - 1);
      y = min(max(y, (I)0), (I)(H - 1));
      x = min(max(x, (I)0), (I)(W - 1));
      s.fraction_y[i] = ly * (A)free_y;
      s.fraction_x[i] = lx * (A)free_x;
      const I at = y * W + x, down = W * (I)(y < H - 1), right = (I)(x < W - 1);
      s.at[0][i] = at;
      s.at[1][i] = at + right;
      s.at[2][i] = at + down;
      s.at[3][i] = at + down + right;
      s.has_value[i] = number;
      s.moves_y[i] = free_y & number;
      s.moves_x[i] = free_x & number;
    } else {
      const I cell = (I)(y >= -1) & (I)(y < H) & (I)(x >= -1) & (I)(x < W) & number;
      const I edge = ((I)(y == -1) & (I)(ly == 0)) | ((I)(x == -1) & (I)(lx == 0));
      const I value = cell & (1 - edge), read = SLOPES ? cell : value;
      const I top = read & (I)(y >= 0), bottom = read & (I)(y < H - 1);
      const I left = (I)(x >= 0), right = (I)(x < W - 1);
      s.fraction_y[i] = ly;
      s.fraction_x[i] = lx;
      const I at = (y & -read) * W + (x & -read); /* far positions would overflow */
      const I there[4] = {top & left, top & right, bottom & left, bottom & right};
      s.exists[0][i] = there[0];
      s.exists[1][i] = there[1];
      s.exists[2][i] = there[2];
      s.exists[3][i] = there[3];
      s.at[0][i] = at & -there[0];
      s.at[1][i] = (at + 1) & -there[1];
      s.at[2][i] = (at + W) & -there[2];
      s.at[3][i] = (at + W + 1) & -there[3];
      s.has_value[i] = value;
      s.moves_y[i] = s.moves_x[i] = cell;
    }
  }
}

/* to[i] = plane[at[i]], one by one: vectors of emulated gathers are slower. */
template <class T, class I>
DCN_INLINE void load_places(const T *plane, const I *at, int64_t count, T *to) {
  for (int64_t i = 0; i < count; i++) {
    I place = at[i];
    __asm__("" : "+r"(place));
    to[i] = plane[place];
  }
}

/* Corner values of a tile. No branch on what exists: no processor could foresee it. */
template <class A, class I, bool BORDER>
static void load_corners(const dcn_resample_params &p, const void *input, int64_t plane,
                         int64_t count, const Positions<A, I> &s) {
  const int64_t base = plane * p.in_h * p.in_w, computed = in_lanes(count);
  for (int q = 0; q < 4; q++) {
    A *to = s.corner[q];
    if (bytes_of(p.dtype) == 2) {
      load_places((const uint16_t *)input + base, s.at[q], count, (uint16_t *)s.raw);
      read_row(s.raw, p.dtype, 0, 1, count, to);
    } else {
      load_places((const A *)input + base, s.at[q], count, to);
    }
    if (!BORDER)
      for (int64_t i = 0; i < computed; i++) to[i] = s.exists[q][i] ? to[i] : A(0);
  }
}

template <class A, class I, bool BORDER>
static void resample_piece(const dcn_resample_params &p, const dcn_resample_tensors &t,
                           int64_t plane, int64_t first, int64_t pixels, const Positions<A, I> &s) {
  for (int64_t end = first + pixels; first < end; first += RESAMPLE_TILE) {
    const int64_t count = min(RESAMPLE_TILE, end - first), computed = in_lanes(count);
    place_tile<A, I, BORDER, false>(p, t.offset, plane, first, count, s);
    load_corners<A, I, BORDER>(p, t.input, plane, count, s);
    DCN_INDEPENDENT
    for (int64_t i = 0; i < computed; i++) { /* vectorised */
      const A ly = s.fraction_y[i], lx = s.fraction_x[i];
      const A value = (1 - ly) * ((1 - lx) * s.corner[0][i] + lx * s.corner[1][i]) +
                      ly * ((1 - lx) * s.corner[2][i] + lx * s.corner[3][i]);
      const A other = s.number[i] ? A(0) : (A)__builtin_nan("");
      s.out_y[i] = s.has_value[i] ? value : other;
    }
    write_row(t.output, p.dtype, plane * p.in_h * p.in_w + first, 1, count, s.out_y);
  }
}

template <class A, class I, bool BORDER>
static void differentiate_plane(const dcn_resample_params &p, const dcn_resample_tensors &t,
                                int64_t plane, const Positions<A, I> &s) {
  const int64_t pixels = p.in_h * p.in_w, base = plane * pixels;
  const bool direct = bytes_of(p.dtype) != 2;
  A *sum = !t.grad_input ? nullptr : direct ? (A *)t.grad_input + base : s.plane;
  if (sum)
    for (int64_t i = 0; i < pixels; i++) sum[i] = 0;
  for (int64_t first = 0; first < pixels; first += RESAMPLE_TILE) {
    const int64_t count = min(RESAMPLE_TILE, pixels - first), computed = in_lanes(count);
    place_tile<A, I, BORDER, true>(p, t.offset, plane, first, count, s);
    read_row(t.grad_output, p.dtype, base + first, 1, count, s.grad);
    if (t.grad_offset) {
      load_corners<A, I, BORDER>(p, t.input, plane, count, s);
      DCN_INDEPENDENT
      for (int64_t i = 0; i < computed; i++) { /* vectorised */
        const A v00 = s.corner[0][i], v01 = s.corner[1][i];
        const A v10 = s.corner[2][i], v11 = s.corner[3][i];
        const A ly = s.fraction_y[i], lx = s.fraction_x[i];
        const A down = s.grad[i] * ((1 - lx) * (v10 - v00) + lx * (v11 - v01));
        const A right = s.grad[i] * ((1 - ly) * (v01 - v00) + ly * (v11 - v10));
        const A other = s.number[i] ? A(0) : (A)__builtin_nan("");
        s.out_y[i] = s.moves_y[i] ? down : other;
        s.out_x[i] = s.moves_x[i] ? right : other;
      }
      write_row(t.grad_offset, p.dtype, 2 * base + first, 1, count, s.out_y);
      write_row(t.grad_offset, p.dtype, 2 * base + pixels + first, 1, count, s.out_x);
    }
    if (!sum) continue;
    DCN_INDEPENDENT
    for (int64_t i = 0; i < computed; i++) { /* vectorised */
      const A ly = s.fraction_y[i], lx = s.fraction_x[i];
      const A top = (1 - ly) * s.grad[i], bottom = ly * s.grad[i];
      const I has = s.has_value[i];
      const A none = 0; /* selected, not multiplied: the gradient may be infinite */
      s.corner[0][i] = (BORDER ? has : has & s.exists[0][i]) ? (1 - lx) * top : none;
      s.corner[1][i] = (BORDER ? has : has & s.exists[1][i]) ? lx * top : none;
      s.corner[2][i] = (BORDER ? has : has & s.exists[2][i]) ? (1 - lx) * bottom : none;
      s.corner[3][i] = (BORDER ? has : has & s.exists[3][i]) ? lx * bottom : none;
    }
    for (int64_t i = 0; i < count; i++)
      for (int q = 0; q < 4; q++) sum[s.at[q][i]] += s.corner[q][i];
  }
  if (sum && !direct) write_row(t.grad_input, p.dtype, base, 1, pixels, sum);
}

template <class A, class I>
static void resample_plan(const dcn_resample_params &p, int direction, dcn_cpu_plan *plan) {
  const int64_t planes = p.batch * p.channels, pixels = p.in_h * p.in_w;
  Arena scratch = {nullptr, 0};
  Positions<A, I>(p, direction, scratch);
  plan->waves = plan->phases = 1;
  plan->tasks[0] = planes * (direction == DCN_FORWARD ? ceil_div(pixels, RESAMPLE_PIECE) : 1);
  plan->shared_bytes = 0;
  plan->scratch_bytes = scratch.used;
  const __int128 work = (__int128)planes * pixels * WORK_OF_A_POSITION;
  plan->work = work > INT64_MAX ? INT64_MAX : (int64_t)work;
}

template <class A, class I>
static void resample_run(const dcn_resample_params &p, const dcn_resample_tensors &t, int direction,
                         int64_t task, void *memory) {
  Arena arena = {(char *)memory, 0};
  const Positions<A, I> s(p, direction, arena);
  if (direction == DCN_FORWARD) {
    const int64_t pixels = p.in_h * p.in_w, pieces = ceil_div(pixels, RESAMPLE_PIECE);
    const int64_t first = task % pieces * RESAMPLE_PIECE,
                  count = min(RESAMPLE_PIECE, pixels - first);
    p.border ? resample_piece<A, I, true>(p, t, task / pieces, first, count, s)
             : resample_piece<A, I, false>(p, t, task / pieces, first, count, s);
  } else {
    p.border ? differentiate_plane<A, I, true>(p, t, task, s)
             : differentiate_plane<A, I, false>(p, t, task, s);
  }
}

}  // namespace DCN_ISA
#endif
