/* Between the caller's layouts and the core's channels-last slabs and tiles.
 *
 *   pack_frame     channels of (C, H, W) or (H, W, C) in storage type -> frame [pixel][pitch]
 *   pack_pixels    every `step`-th channel of the same -> [pixel][pitch], no frame
 *   turn_pixels    [pixel][pitch] -> [channel][line]
 *   transpose_rows [row][column] -> [column][row]
 *   write_tile     [pixel][pitch] -> channels of (C, H, W) or (H, W, C) in storage type, plus bias
 *
 * All go through lanes x lanes transposes in registers where the caller is channels-first, and load and
 * store whole vectors. Channels beyond `count` up to the pitch are written as zeros.
 */
#ifndef DCN_LAYOUT_H
#define DCN_LAYOUT_H

#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

/* Whether whole vectors of A can be loaded from tensors and stored to them: their type is A's or, for
 * float, one of 16 bits. */
template <class A>
DCN_INLINE bool is_stored(const dcn_params &p) {
  return is_direct<A>(p) || (sizeof(A) == 4 && p.dtype != DCN_FLOAT64);
}

/* do_it(type of the tensors), a constant in each of its copies: no branch is left inside of its loops. */
template <class A, class DoIt>
DCN_INLINE void with_type(const dcn_params &p, DoIt do_it) {
  if (is_direct<A>(p))
    do_it(sizeof(A) == 4 ? DCN_FLOAT32 : DCN_FLOAT64);
  else if (p.dtype == DCN_FLOAT16)
    do_it(DCN_FLOAT16);
  else
    do_it(DCN_BFLOAT16);
}

/* block[j] = values j of lanes rows `step` apart. */
template <class A>
DCN_INLINE void turn_block(const A *from, int64_t step, typename Vector<A>::V *block) {
  constexpr int64_t L = Vector<A>::lanes;
#pragma GCC unroll 16
  for (int64_t j = 0; j < L; j++) block[j] = load(from + j * step);
  transpose<A>(block);
}

/* block[j] = pixels index + j .. of `lines` channels `plane` apart, as [pixel][channel]; lanes of
 * absent channels are 0, of absent pixels anything. */
template <class A>
DCN_OUT_OF_LINE static void load_block(const void *memory, const dcn_params &p, int64_t index,
                                       int64_t plane, int64_t lines, int64_t columns,
                                       typename Vector<A>::V *block) {
  constexpr int64_t L = Vector<A>::lanes;
  typedef typename Vector<A>::V V;
  if (is_stored<A>(p) && columns == L) {
    with_type<A>(p, [&](int dtype) {
      if (lines == L)
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; j++) block[j] = load_stored<A>(memory, dtype, index + j * plane);
      else
        for (int64_t j = 0; j < L; j++)
          block[j] = j < lines ? load_stored<A>(memory, dtype, index + j * plane) : V{};
    });
  } else {
    A line[L] = {};
    for (int64_t j = 0; j < L; j++) {
      block[j] = V{};
      if (j < lines) {
        read_row(memory, p.dtype, index + j * plane, 1, columns, line);
        block[j] = load(line);
      }
    }
  }
  transpose<A>(block);
}

/* to[c][r] = from[r][c], r < rows, c < columns. A vector behind either end may be read and written. */
template <class A>
static void transpose_rows(const A *from, int64_t rows, int64_t columns, A *to) {
  constexpr int64_t L = Vector<A>::lanes;
  for (int64_t r = 0; r < rows; r += L) {
    if (r + L > rows && rows >= L) r = rows - L;
    const int64_t height = min(L, rows - r);
    for (int64_t c = 0; c < columns; c += L) {
      if (c + L > columns && columns >= L) c = columns - L;
      const int64_t width = min(L, columns - c);
      typename Vector<A>::V block[L];
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; j++)
        block[j] = load(from + (r + min(j, height - 1)) * columns + c);
      transpose<A>(block);
      /* In order: where rows are shorter than a vector, the next one overwrites what spills. */
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; j++)
        if (j < width) store(to + (c + j) * rows + r, block[j]);
    }
  }
}

/* memory[image][begin + c][first + i] -> the frame's pixels, c < count, with the zeros around those
 * rows that begin or end among them. `memory` is a tensor of (N, channels, H, W). */
template <class A>
static void pack_frame(const void *memory, const dcn_params &p, const Frame &frame,
                       int64_t channels, int64_t image, int64_t begin, int64_t count, int64_t first,
                       int64_t pixels, A *to, int64_t pitch) {
  constexpr int64_t L = Vector<A>::lanes;
  typedef typename Vector<A>::V V;
  const int64_t plane = plane_in(p);
  const auto zero = [&](int64_t at, int64_t rows) {
    for (int64_t i = 0; i < rows * pitch; i++) to[at * pitch + i] = 0;
  };
  if (first == 0) zero(0, frame.row + 1);
  if (first + pixels == plane) {
    zero(frame.nowhere, frame.pixels - frame.nowhere);
    for (int64_t i = 0; i < LINE / (int64_t)sizeof(A); i++) to[frame.pixels * pitch + i] = 0;
  }
  FrameWalk ends(frame, first);
  for (int64_t i = 0; i < pixels; i++)
    if (ends.step()) zero(ends.at - 1, 1);

  if (p.layout == DCN_NHWC) {
    FrameWalk walk(frame, first);
    for (int64_t i = 0; i < pixels; i++) {
      A *row = to + walk.at * pitch;
      read_row(memory, p.dtype, (image * plane + first + i) * channels + begin, 1, count, row);
      for (int64_t c = count; c < pitch; c++) row[c] = 0;
      walk.step();
    }
    return;
  }
  const int64_t origin = (image * channels + begin) * plane + first;
  const bool direct = is_direct<A>(p);
  for (int64_t c = 0; c < pitch; c += L) {
    FrameWalk walk(frame, first);
    for (int64_t i = 0; i < pixels; i += L) {
      if (i + L > pixels && pixels >= L) walk = FrameWalk(frame, first + (i = pixels - L));
      const int64_t columns = min(L, pixels - i);
      if (direct && c + L <= count && columns == L && walk.x + L < frame.width) {
        V turned[L]; /* an array of its own stays in registers */
        turn_block((const A *)memory + origin + c * plane + i, plane, turned);
        A *row = to + walk.at * pitch + c;
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; j++) store(row + j * pitch, turned[j]);
        walk.at += L;
        walk.x += L;
        continue;
      }
      V block[L];
      load_block<A>(memory, p, origin + c * plane + i, plane, min(L, count - c), columns, block);
      for (int64_t j = 0; j < columns; j++) {
        store(to + walk.at * pitch + c, block[j]);
        walk.step();
      }
    }
  }
}

/* memory[image][begin + c * step][first + i] -> to[i][c], i < pixels, c < count; `memory` is a tensor of
 * (N, channels, plane). */
template <class A>
static void pack_pixels(const void *memory, const dcn_params &p, int64_t channels, int64_t plane,
                        int64_t image, int64_t begin, int64_t step, int64_t count, int64_t first,
                        int64_t pixels, A *to, int64_t pitch) {
  constexpr int64_t L = Vector<A>::lanes;
  typedef typename Vector<A>::V V;
  if (p.layout == DCN_NHWC) {
    for (int64_t i = 0; i < pixels; i++) {
      A *row = to + i * pitch;
      read_row(memory, p.dtype, (image * plane + first + i) * channels + begin, step, count, row);
      for (int64_t c = count; c < pitch; c++) row[c] = 0;
    }
    return;
  }
  const int64_t origin = (image * channels + begin) * plane + first;
  const bool direct = is_direct<A>(p);
  for (int64_t c = 0; c < pitch; c += L)
    for (int64_t i = 0; i < pixels; i += L) {
      if (i + L > pixels && pixels >= L) i = pixels - L; /* some once more: no partial vector */
      const int64_t columns = min(L, pixels - i);
      if (direct && c + L <= count && columns == L) {
        V turned[L]; /* an array of its own stays in registers */
        turn_block((const A *)memory + origin + c * step * plane + i, step * plane, turned);
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; j++) store(to + (i + j) * pitch + c, turned[j]);
        continue;
      }
      V block[L];
      load_block<A>(memory, p, origin + c * step * plane + i, step * plane, min(L, count - c),
                    columns, block);
      for (int64_t j = 0; j < columns; j++) store(to + (i + j) * pitch + c, block[j]);
    }
}

/* to[c][i] = from[i][c], i < pixels, c < count; rows of `from` are whole vectors. */
template <class A>
static void turn_pixels(const A *from, int64_t pitch, int64_t pixels, int64_t count, A *to,
                        int64_t line) {
  constexpr int64_t L = Vector<A>::lanes;
  for (int64_t c = 0; c < count; c += L)
    for (int64_t i = 0; i < pixels; i += L) {
      if (i + L > pixels && pixels >= L) i = pixels - L;
      if (i + L > pixels) { /* less than a vector of them */
        for (int64_t j = c; j < min(c + L, count); j++)
          for (int64_t k = 0; k < pixels; k++) to[j * line + k] = from[k * pitch + j];
        break;
      }
      typename Vector<A>::V block[L];
      turn_block(from + i * pitch + c, pitch, block);
#pragma GCC unroll 16
      for (int64_t j = 0; j < L; j++)
        if (c + j < count) store(to + (c + j) * line + i, block[j]);
    }
}

/* tile[at(pixel)][pitch] -> memory[image][begin + c * step][first + pixel], c < count, plus bias; pixels
 * lie at their places in the frame if there is one, else one after the other. */
template <class A>
static void write_walked(void *memory, const dcn_params &p, int64_t channels, int64_t plane,
                         int64_t image, int64_t begin, int64_t step, int64_t count, int64_t first,
                         int64_t pixels, const A *tile, const Frame *frame, int64_t pitch,
                         const void *bias) {
  const auto walk_from = [&](int64_t pixel) {
    return frame ? FrameWalk(*frame, first + pixel) : FrameWalk(pixel);
  };
  constexpr int64_t L = Vector<A>::lanes;
  typedef typename Vector<A>::V V;
  if (p.layout == DCN_NHWC) {
    A row[SLAB];
    for (int64_t c = 0; c < count; c += SLAB) {
      const int64_t width = min(SLAB, count - c);
      const int64_t whole = step == 1 && is_stored<A>(p) ? width / L * L : 0;
      A add[SLAB] = {};
      if (bias) read_row(bias, p.dtype, begin + c * step, step, width, add);
      auto walk = walk_from(0);
      for (int64_t i = 0; i < pixels; i++) {
        const A *from = tile + walk.at * pitch + c;
        const int64_t at = (image * plane + first + i) * channels + begin + c * step;
        with_type<A>(p, [&](int dtype) {
          for (int64_t j = 0; j < whole; j += L)
            store_stored<A>(memory, dtype, at + j, load(from + j) + load(add + j));
        });
        if (whole < width) {
          for (int64_t j = whole; j < width; j++) row[j] = from[j] + add[j];
          write_row(memory, p.dtype, at + whole * step, step, width - whole, row + whole);
        }
        walk.step();
      }
    }
    return;
  }
  for (int64_t c = 0; c < count; c += L) {
    const int64_t lines = min(L, count - c);
    A add[L] = {};
    if (bias) read_row(bias, p.dtype, begin + c * step, step, lines, add);
    const int64_t origin = (image * channels + begin + c * step) * plane + first;
    auto walk = walk_from(0);
    for (int64_t i = 0; i < pixels; i += L) {
      if (i + L > pixels && pixels >= L) walk = walk_from(i = pixels - L);
      const int64_t columns = min(L, pixels - i);
      V block[L];
      for (int64_t j = 0; j < L; j++) {
        block[j] = load(tile + walk.at * pitch + c);
        if (j + 1 < columns) walk.step();
      }
      walk.step();
      transpose<A>(block);
      A *to = (A *)memory + origin + i;
      if (is_direct<A>(p) && lines == L && columns == L) {
        /* The lines of the next block: stores wait in order, prefetches do not. */
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; j++) prefetch_to_write(to + j * step * plane + L);
#pragma GCC unroll 16
        for (int64_t j = 0; j < L; j++) store(to + j * step * plane, block[j] + add[j]);
      } else if (is_stored<A>(p) && columns == L) {
        with_type<A>(p, [&](int dtype) {
          for (int64_t j = 0; j < lines; j++)
            store_stored<A>(memory, dtype, origin + i + j * step * plane, block[j] + add[j]);
        });
      } else {
        for (int64_t j = 0; j < lines; j++) {
          A line[L];
          store(line, block[j] + add[j]);
          write_row(memory, p.dtype, origin + j * step * plane + i, 1, columns, line);
        }
      }
    }
  }
}

template <class A>
static void write_tile(void *memory, const dcn_params &p, int64_t channels, int64_t plane,
                       int64_t image, int64_t begin, int64_t step, int64_t count, int64_t first,
                       int64_t pixels, const A *tile, int64_t pitch, const void *bias) {
  write_walked<A>(memory, p, channels, plane, image, begin, step, count, first, pixels, tile,
                  nullptr, pitch, bias);
}

/* The same from a frame: pixels first .. of the image lie at their places in it. */
template <class A>
static void write_frame(void *memory, const dcn_params &p, const Frame &frame, int64_t image,
                        int64_t begin, int64_t count, int64_t first, int64_t pixels, const A *slab,
                        int64_t pitch) {
  write_walked<A>(memory, p, p.in_channels, plane_in(p), image, begin, 1, count, first, pixels,
                  slab, &frame, pitch, nullptr);
}

}  // namespace DCN_ISA
#endif
