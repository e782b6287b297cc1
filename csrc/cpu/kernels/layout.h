/* Between the caller's layouts and the core's channels-last slabs and tiles.
 *
 *   pack_pixels    every `step`-th channel of (C, H, W) or (H, W, C) in storage type -> [pixel][pitch]
 *   write_tile     [pixel][pitch] -> channels of (C, H, W) or (H, W, C) in storage type, plus bias
 *
 * Both go through lanes x lanes transposes in registers where the caller is channels-first. Channels
 * beyond `count` up to the pitch are written as zeros.
 */
#ifndef DCN_LAYOUT_H
#define DCN_LAYOUT_H

#include "geometry.h"
#include "storage.h"

namespace DCN_ISA {

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
  for (int64_t c = 0; c < pitch; c += L) {
    const int64_t lines = max((int64_t)0, min(L, count - c));
    for (int64_t i = 0; i < pixels; i += L) {
      const int64_t columns = min(L, pixels - i);
      V block[L];
      A line[L] = {};
      for (int64_t j = 0; j < L; j++) {
        if (j < lines) {
          read_row(memory, p.dtype, origin + (c + j) * step * plane + i, 1, columns, line);
          block[j] = load(line);
        } else {
          block[j] = V{};
        }
      }
      transpose<A>(block);
      for (int64_t j = 0; j < columns; j++) store(to + (i + j) * pitch + c, block[j]);
    }
  }
}

/* tile[pixel][pitch] -> memory[image][begin + c * step][first + pixel], c < count, plus bias. */
template <class A>
static void write_tile(void *memory, const dcn_params &p, int64_t channels, int64_t plane,
                       int64_t image, int64_t begin, int64_t step, int64_t count, int64_t first,
                       int64_t pixels, const A *tile, int64_t pitch, const void *bias) {
  constexpr int64_t L = Vector<A>::lanes;
  typedef typename Vector<A>::V V;
  if (p.layout == DCN_NHWC) {
    A row[SLAB];
    for (int64_t c = 0; c < count; c += SLAB) {
      const int64_t width = min(SLAB, count - c);
      A add[SLAB] = {};
      if (bias)
        read_row(bias, p.dtype, begin + c * step, step, width, add);
      for (int64_t i = 0; i < pixels; i++) {
        for (int64_t j = 0; j < width; j++) row[j] = tile[i * pitch + c + j] + add[j];
        write_row(memory, p.dtype, (image * plane + first + i) * channels + begin + c * step, step,
                  width, row);
      }
    }
    return;
  }
  for (int64_t c = 0; c < count; c += L) {
    const int64_t lines = min(L, count - c);
    A add[L] = {};
    if (bias) read_row(bias, p.dtype, begin + c * step, step, lines, add);
    for (int64_t i = 0; i < pixels; i += L) {
      V block[L];
      for (int64_t j = 0; j < L; j++) block[j] = load(tile + min(i + j, pixels - 1) * pitch + c);
      transpose<A>(block);
      const int64_t columns = min(L, pixels - i);
      for (int64_t j = 0; j < lines; j++) {
        A line[L];
        store(line, block[j] + add[j]);
        write_row(memory, p.dtype,
                  (image * channels + begin + (c + j) * step) * plane + first + i, 1, columns, line);
      }
    }
  }
}

}  // namespace DCN_ISA
#endif
