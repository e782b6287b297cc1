/* How a call is cut: slabs and blocks of channels, tiles of output pixels, chunks of taps.
 *
 *   slab    up to 64 consecutive channels, packed channels-last: [pixel of the frame][pitch]; owned
 *           by one task in the backward direction. Slabs follow the groups where they can.
 *   frame   the image with zeros around it: rows -1 .. H of W + 1 pixels each (the zero at -1 of a row
 *           is the zero at W of the row before), and two more zeros, so that the four corners of any
 *           position inside are one index and three fixed steps, and the four corners at `nowhere`
 *           are zeros all
 *   block   the channels of a slab that share one weight group and one offset group
 *   tile    `tile` consecutive output pixels of one image
 *   chunk   as many taps as fill `depth` columns of a block: a tile of columns stays in L2
 *
 * Everything here depends on the params alone. How many images are in memory at once, and the forward tile,
 * follow from the threads, too: no result depends on those.
 */
#ifndef DCN_GEOMETRY_H
#define DCN_GEOMETRY_H

#include "../dcn_cpu.h"
#include "simd.h"

namespace DCN_ISA {

constexpr int64_t SLAB = 64;      /* channels of a slab */
constexpr int64_t DEPTH = 576;    /* columns of a chunk: 9 taps of 64 channels */
constexpr int64_t MOST_TAPS = 64; /* taps of a chunk of few channels: bounds the corners' memory */
constexpr int64_t MOST_PIXELS = 224; /* of a tile */
constexpr int64_t LINE = 64;         /* bytes of a cache line */

DCN_INLINE int64_t plane_in(const dcn_params &p) { return p.in_h * p.in_w; }
DCN_INLINE int64_t plane_out(const dcn_params &p) { return p.out_h * p.out_w; }
DCN_INLINE int64_t taps_of(const dcn_params &p) { return p.kernel_h * p.kernel_w; }
DCN_INLINE int64_t group_in(const dcn_params &p) { return p.in_channels / p.groups; }
DCN_INLINE int64_t group_out(const dcn_params &p) { return p.out_channels / p.groups; }
DCN_INLINE int64_t offset_group_in(const dcn_params &p) { return p.in_channels / p.offset_groups; }

/* One channel per weight group: no product to speak of, its own kernels. */
DCN_INLINE bool is_depthwise(const dcn_params &p) { return group_in(p) == 1; }

template <class A>
struct Slabs {
  int64_t unit;  /* channels that groups leave together: min(C/groups, C/offset_groups) */
  int64_t parts; /* slabs per unit where a unit is wider than a slab, else 1 */
  int64_t width; /* channels of a slab but the last of a unit (or of all) */
  int64_t count;
  int64_t pitch; /* values per packed pixel: width rounded up to whole vectors */

  explicit Slabs(const dcn_params &p) {
    constexpr int64_t L = Vector<A>::lanes;
    /* Slabs of a wider unit, but the last, are whole blocks of the matrix unit. */
    constexpr int64_t WHOLE = DCN_VECTOR_BYTES == 64 && sizeof(A) == 4 ? 2 * L : L;
    /* A depthwise call has no weight groups to respect: any channels go together. */
    unit = is_depthwise(p) ? offset_group_in(p) : min(group_in(p), offset_group_in(p));
    if (unit > SLAB) {
      parts = ceil_div(unit, SLAB);
      width = min(round_up(ceil_div(unit, parts), WHOLE), unit);
      parts = ceil_div(unit, width);
      count = p.in_channels / unit * parts;
    } else {
      parts = 1;
      width = min(SLAB / unit * unit, p.in_channels);
      count = ceil_div(p.in_channels, width);
    }
    pitch = round_up(width, L);
  }

  int64_t begin(int64_t slab) const {
    return unit > SLAB ? slab / parts * unit + slab % parts * width : slab * width;
  }
  int64_t end(const dcn_params &p, int64_t slab) const {
    const int64_t limit = unit > SLAB ? (slab / parts + 1) * unit : p.in_channels;
    return min(begin(slab) + width, limit);
  }
};

/* Pixels of one packed slab of one image; indices count pixels. */
struct Frame {
  int64_t width, height, row;
  int64_t pixels;  /* all of them */
  int64_t nowhere; /* the four corners here are zeros: what lies outside reads them */

  explicit Frame(const dcn_params &p)
      : width(p.in_w),
        height(p.in_h),
        row(p.in_w + 1),
        pixels((p.in_h + 2) * row + 2),
        nowhere((p.in_h + 1) * row) {}

  int64_t at(int64_t y, int64_t x) const { return (y + 1) * row + x + 1; }
};

/* Walks over the image's pixels in order, as indices into the frame. */
struct FrameWalk {
  int64_t width, x, at;

  /* Over pixels without a frame, that is a row without an end. */
  explicit FrameWalk(int64_t pixel) : width(INT64_MAX), x(0), at(pixel) {}
  FrameWalk(const Frame &frame, int64_t pixel)
      : width(frame.width), x(pixel % width), at(frame.at(pixel / width, x)) {}

  /* Whether the pixel was the last of its row: the next index is the zero behind it. */
  bool step() {
    at++;
    if (++x < width) return false;
    x = 0;
    at++;
    return true;
  }
};

struct Block {
  int64_t group, offset_group;
  int64_t begin, count; /* channels */
};

/* The block that starts at channel `begin` of a slab ending at `slab_end`. */
DCN_INLINE Block block_at(const dcn_params &p, int64_t begin, int64_t slab_end) {
  Block block;
  block.begin = begin;
  block.offset_group = begin / offset_group_in(p);
  block.group = begin / group_in(p);
  int64_t end = min(slab_end, (block.offset_group + 1) * offset_group_in(p));
  if (!is_depthwise(p)) end = min(end, (block.group + 1) * group_in(p));
  block.count = end - begin;
  return block;
}

/* Taps of one chunk, the same for every block of the call. */
template <class A>
DCN_INLINE int64_t chunk_taps(const dcn_params &p, const Slabs<A> &slabs) {
  const int64_t fit = DEPTH / min(slabs.width, group_in(p));
  return min(taps_of(p), min(fit, MOST_TAPS));
}

/* Values between the rows of a tile of columns: whole lines plus one vector that the last tap may
 * spill into, and never a power of two, whose rows would share a few sets of the first-level cache. */
template <class A>
DCN_INLINE int64_t row_pitch(int64_t columns) {
  constexpr int64_t per_line = LINE / (int64_t)sizeof(A);
  const int64_t lines = ceil_div(columns + Vector<A>::lanes, per_line);
  return (lines | 1) * per_line;
}

/* A tile of columns is `tile` rows of this many values. */
template <class A>
DCN_INLINE int64_t columns_pitch(const dcn_params &p, const Slabs<A> &slabs) {
  return row_pitch<A>(min(slabs.width, group_in(p)) * chunk_taps(p, slabs));
}

/* Carves aligned arrays out of one workspace; with base null it only counts bytes. */
struct Arena {
  char *base;
  size_t used;

  template <class T>
  T *take(int64_t count) {
    const size_t bytes = ((size_t)count * sizeof(T) + LINE - 1) / LINE * LINE;
    T *at = base ? (T *)(base + used) : nullptr;
    used += bytes;
    return at;
  }
};

}  // namespace DCN_ISA
#endif
