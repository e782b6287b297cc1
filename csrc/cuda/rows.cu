/* The passes for channels-last inputs: 16 bytes of channels at a time.
 *
 *   sample     columns[i][tap][c] = mask S(input[c]; position of tap at pixel i)
 *   backward   d_q = sum_c grad_columns[i][tap][c] v_q[c]  ->  grad_offset, grad_mask (geometry.h)
 *              grad_input[q][c] += weight_q mask grad_columns[i][tap][c]
 *
 * operands      input, grad_input NHWC; columns, grad_columns DCN_ROWS
 * work split    a block: a patch of up to 16 x 8 output pixels of one offset group. It computes the
 *               positions of up to TAPS taps once, into shared memory, then `lanes` threads share a
 *               sample, each with 16 bytes of channels.
 *               sample: channels outer, taps and pixels inner, so that the patch's corners of some
 *               128 bytes of channels stay in the first-level cache over all taps
 *               backward: one visit to each sample; d_q is summed over the lanes by shuffles, so
 *               grad_offset and grad_mask have one writer
 * memory        shared: PIXELS slots of 24 bytes and TAPS * PIXELS samples of 24 (A = double: 40)
 *               bytes, 30 KiB (33 KiB). A sample and 16 bytes of channels: 4 loads, 1 store for each
 *               piece; backward 1 or 2 loads of grad_columns and 4 or 8 16-byte reductions more
 * accumulators  float, double for float64; d_q: channels / (lanes * values in 16 bytes) terms a lane,
 *               then a tree; grad_input by reductions in memory, in no particular order
 * assumes       C/groups and C/offset_groups divisible by the values in 16 bytes; input and grad_input
 *               16-byte aligned (dcnlib/backends/cuda/_plan.py decides both)
 */
#include "geometry.h"
#include "launch.h"
#include "passes.h"

namespace dcn {
namespace {

constexpr int PATCH_WIDTH = 16;
constexpr int PIXELS = 128; /* of a patch: PATCH_WIDTH columns, or all of a narrower image */
constexpr int NEAR = 8;     /* lanes of `sample`: 128 bytes, a line of the cache */
constexpr int WARP = 32;

/* Taps whose positions are held at once: a 3 x 3 kernel in float. */
template <class A>
struct Table {
  enum { TAPS = sizeof(A) == 4 ? 9 : 6 };
};

/* How the chunk's pixels are cut into patches. Rows count over all images: a patch may cover two. */
struct Patches {
  int64_t first_row, end_row;
  int64_t across, count;
  int32_t width, height; /* of a whole patch */

  static Patches of(const dcn_params &p, const dcn_cuda_chunk &chunk) {
    Patches patches;
    patches.width = (int32_t)(p.out_w < PATCH_WIDTH ? p.out_w : PATCH_WIDTH);
    patches.height = PIXELS / patches.width;
    patches.first_row = chunk.first / p.out_w;
    patches.end_row = (chunk.first + chunk.count - 1) / p.out_w + 1;
    const int64_t rows = patches.end_row - patches.first_row;
    patches.across = (p.out_w + patches.width - 1) / patches.width;
    patches.count = patches.across * ((rows + patches.height - 1) / patches.height);
    return patches;
  }
};

/* One output pixel of a block's patch. */
struct Slot {
  int64_t i; /* pixel of the chunk, -1: before its first or behind its last */
  int32_t n, oh, ow;
};

/* The patch's pixels, row by row; how many slots there are, a number that all threads get. */
DCN_DEVICE int fill_slots(const dcn_params &p, const dcn_cuda_chunk &chunk, const Patches &patches,
                          int64_t patch, Slot *slots) {
  const int64_t patch_row = patch / patches.across;
  const int64_t top = patches.first_row + patch_row * patches.height;
  const int64_t left = (patch - patch_row * patches.across) * patches.width;
  const int height = (int)least<int64_t>(patches.height, patches.end_row - top);
  const int width = (int)least<int64_t>(patches.width, p.out_w - left);
  const int j = threadIdx.x;
  if (j < width * height) {
    const int64_t row = top + j / width, ow = left + j % width;
    const int64_t i = row * p.out_w + ow - chunk.first;
    Slot slot;
    slot.i = i >= 0 && i < chunk.count ? i : -1;
    slot.n = (int32_t)(row / p.out_h);
    slot.oh = (int32_t)(row - slot.n * p.out_h);
    slot.ow = (int32_t)ow;
    slots[j] = slot;
  }
  return width * height;
}

/* samples[t][slot] of taps first .. first + taps - 1; their pixels count from the image chunk.image. */
template <class T, class A>
DCN_DEVICE void fill_samples(const dcn_params &p, const dcn_tensors &t, const dcn_cuda_chunk &chunk,
                             int64_t offset_group, int64_t first, int taps, const Slot *slots,
                             int pixels, Sample<A> *samples) {
  for (int j = threadIdx.x; j < taps * PIXELS; j += THREADS) {
    if (j % PIXELS >= pixels) continue;
    const Slot slot = slots[j % PIXELS];
    if (slot.i < 0) continue;
    const Pixel o = {slot.n, slot.oh, slot.ow};
    Sample<A> s = sample_at<T>(p, t, o, offset_group, first + j / PIXELS);
    s.pixel += (slot.n - chunk.image) * plane_in(p);
    samples[j] = s;
  }
}

/* The four corners' 16 bytes of channels from index `at` on, zeros where there is no corner. */
template <class T>
struct Corners {
  Pack<T> at[4];

  DCN_MEMBER Corners(const T *input, int64_t from, int64_t right, int64_t down, int32_t bits) {
    at[0] = bits & TOP_LEFT ? load16(input + from) : Pack<T>{};
    at[1] = bits & TOP_RIGHT ? load16(input + from + right) : Pack<T>{};
    at[2] = bits & BOTTOM_LEFT ? load16(input + from + down) : Pack<T>{};
    at[3] = bits & BOTTOM_RIGHT ? load16(input + from + down + right) : Pack<T>{};
  }

  DCN_MEMBER Quad<typename Storage<T>::A> channel(int v) const {
    return {{widen(at[0].at[v]), widen(at[1].at[v]), widen(at[2].at[v]), widen(at[3].at[v])}};
  }
};

/* Writes 16 bytes of samples as one or two pieces. */
template <class T>
DCN_DEVICE void write_columns(T *to, int64_t piece, int32_t pieces,
                              const typename Storage<T>::A *values) {
  Pack<T> high;
  if (pieces == 1) {
    for (int v = 0; v < Pack<T>::size; v++) high.at[v] = narrow<T>(values[v]);
  } else {
    Pack<T> low;
    for (int v = 0; v < Pack<T>::size; v++) split(values[v], &high.at[v], &low.at[v]);
    store16(to + piece, low);
  }
  store16(to, high);
}

/* The weight group of a channel; 32-bit divisions are a quarter of 64-bit ones. */
DCN_DEVICE int64_t group_of(const dcn_params &p, int64_t c) {
  return p.groups == 1 ? 0 : (uint32_t)c / (uint32_t)group_in(p);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 3) /* blocks a multiprocessor: at most 80 registers */
    rows_sample(const dcn_params p, const dcn_tensors t, const dcn_cuda_chunk chunk,
                const Patches patches, int64_t units, int lanes, T *columns) {
  typedef typename Storage<T>::A A;
  constexpr int V = Pack<T>::size, TAPS = Table<A>::TAPS;
  DCN_SHARED(Slot, slots, PIXELS);
  DCN_SHARED(Sample<A>, samples, TAPS * PIXELS);
  const T *input = (const T *)t.input;
  const int lane = threadIdx.x & (lanes - 1), worker = threadIdx.x / lanes,
            workers = THREADS / lanes;
  const int64_t right = p.in_channels, down = p.in_w * right, taps = taps_of(p);
  const int64_t piece = taps * group_in(p), row = chunk.pieces * piece;
  const int64_t vectors = offset_group_in(p) / V;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t offset_group = unit / patches.count;
    __syncthreads(); /* the last unit's slots and samples have been read */
    const int pixels = fill_slots(p, chunk, patches, unit - offset_group * patches.count, slots);
    for (int64_t tap = 0; tap < taps; tap += TAPS) {
      const int held = (int)least<int64_t>(TAPS, taps - tap);
      __syncthreads(); /* slots are filled, the last taps' samples have been read */
      fill_samples<T>(p, t, chunk, offset_group, tap, held, slots, pixels, samples);
      __syncthreads();
      for (int64_t v = lane; v < vectors; v += lanes) {
        const int64_t c = offset_group * offset_group_in(p) + v * V, group = group_of(p, c);
        T *to = columns + group * chunk.count * row + tap * group_in(p) + (c - group * group_in(p));
        for (int h = 0; h < held; h++, to += group_in(p)) {
          for (int j = worker; j < pixels; j += workers) { /* the hot loop */
            const int64_t i = slots[j].i;
            if (i < 0) continue;
            const Sample<A> s = samples[h * PIXELS + j];
            const Quad<A> w = weights(s.ly, s.lx);
            const Corners<T> from(input, s.pixel * right + c, right, down, s.value_corners());
            A values[V];
            for (int k = 0; k < V; k++) values[k] = s.mask * weighted(w, from.channel(k));
            write_columns(to + i * row, piece, chunk.pieces, values);
          }
        }
      }
    }
  }
}

/* to[0 .. V) += factor * values, V a multiple of 16 bytes. */
template <int V, class A>
DCN_DEVICE void scatter(A *to, A factor, const A *values) {
  for (int k = 0; k < V; k += 16 / sizeof(A)) {
    A share[16 / sizeof(A)];
    for (unsigned j = 0; j < 16 / sizeof(A); j++) share[j] = factor * values[k + j];
    reduce16(to + k, share);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) /* at most 128 registers */
    rows_backward(const dcn_params p, const dcn_tensors t, const dcn_cuda_chunk chunk,
                  const Patches patches, int64_t units, int lanes,
                  const typename Storage<T>::A *grad_columns, T *columns,
                  typename Storage<T>::A *grad_input) {
  typedef typename Storage<T>::A A;
  constexpr int V = Pack<T>::size, TAPS = Table<A>::TAPS;
  DCN_SHARED(Slot, slots, PIXELS);
  DCN_SHARED(Sample<A>, samples, TAPS * PIXELS);
  const T *input = (const T *)t.input;
  const int lane = threadIdx.x & (lanes - 1), worker = threadIdx.x / lanes,
            workers = THREADS / lanes;
  const int64_t right = p.in_channels, down = p.in_w * right, taps = taps_of(p);
  const int64_t row = taps * group_in(p);
  const int64_t vectors = offset_group_in(p) / V;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t offset_group = unit / patches.count;
    __syncthreads(); /* the last unit's slots and samples have been read */
    const int pixels = fill_slots(p, chunk, patches, unit - offset_group * patches.count, slots);
    for (int64_t first = 0; first < taps; first += TAPS) {
      const int held = (int)least<int64_t>(TAPS, taps - first);
      __syncthreads(); /* slots are filled, the last taps' samples have been read */
      fill_samples<T>(p, t, chunk, offset_group, first, held, slots, pixels, samples);
      __syncthreads();
      const int steps = (pixels + workers - 1) / workers;
      /* All threads of a warp make the same number of steps: they meet in the shuffles. */
      for (int step = 0; step < held * steps; step++) {
        const int h = step / steps, j = (step - h * steps) * workers + worker;
        const int64_t i = j < pixels ? slots[j].i : -1, tap = first + h;
        Sample<A> s = {};
        Quad<A> d = {};
        if (i >= 0) {
          s = samples[h * PIXELS + j];
          const Quad<A> w = weights(s.ly, s.lx);
          const int32_t reached = s.value_corners();
          const bool value = (s.bits & HAS_VALUE) != 0 || s.is_nan();
          for (int64_t v = lane; v < vectors; v += lanes) { /* the hot loop */
            const int64_t c = offset_group * offset_group_in(p) + v * V, group = group_of(p, c);
            const int64_t place =
                (group * chunk.count + i) * row + tap * group_in(p) + (c - group * group_in(p));
            alignas(16) A g[V];
            for (int k = 0; k < V; k += Pack<A>::size)
              *reinterpret_cast<Pack<A> *>(g + k) = load16(grad_columns + place + k);
            const int64_t at = s.pixel * right + c;
            const Corners<T> from(input, at, right, down, s.bits);
            A values[V];
            for (int k = 0; k < V; k++) {
              const Quad<A> x = from.channel(k);
              for (int q = 0; q < 4; q++) d.at[q] += g[k] * x.at[q];
              values[k] = s.mask * (value ? weighted(w, x) : A(0));
              g[k] *= s.mask;
            }
            if (grad_input) {
              if (reached & TOP_LEFT) scatter<V>(grad_input + at, w.at[0], g);
              if (reached & TOP_RIGHT) scatter<V>(grad_input + at + right, w.at[1], g);
              if (reached & BOTTOM_LEFT) scatter<V>(grad_input + at + down, w.at[2], g);
              if (reached & BOTTOM_RIGHT) scatter<V>(grad_input + at + down + right, w.at[3], g);
            }
            if (columns) {
              const int64_t skipped = (chunk.pieces - 1) * row;
              write_columns(columns + place + (group * chunk.count + i) * skipped, row,
                            chunk.pieces, values);
            }
          }
        }
        for (int q = 0; q < 4; q++)
          for (int apart = lanes / 2; apart > 0; apart /= 2)
            d.at[q] += __shfl_xor_sync(0xffffffffu, d.at[q], apart);
        if (i >= 0 && lane == 0) {
          const Slot slot = slots[j];
          write_gradients<T>(p, t, s, d, {slot.n, slot.oh, slot.ow}, offset_group, tap);
        }
      }
    }
  }
}

}  // namespace

template <class T>
struct RowsSample {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, void *columns) {
    const Patches patches = Patches::of(*p, *chunk);
    const int64_t units = p->offset_groups * patches.count;
    const int lanes = power_of_two(offset_group_in(*p) / Pack<T>::size, NEAR);
    DCN_LAUNCH(rows_sample<T>, blocks_for(units * THREADS, where), THREADS, where.stream, *p, *t,
               *chunk, patches, units, lanes, (T *)columns);
  }
};

template <class T>
struct RowsBackward {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, const void *grad_columns, void *columns,
                     void *grad_input) {
    typedef typename Storage<T>::A A;
    const Patches patches = Patches::of(*p, *chunk);
    const int64_t units = p->offset_groups * patches.count;
    const int lanes = power_of_two(offset_group_in(*p) / Pack<T>::size, WARP);
    DCN_LAUNCH(rows_backward<T>, blocks_for(units * THREADS, where), THREADS, where.stream, *p, *t,
               *chunk, patches, units, lanes, (const A *)grad_columns, (T *)columns,
               (A *)grad_input);
  }
};

int sample_rows(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                const dcn_cuda_launch *where, void *columns) {
  return launch<RowsSample>(p->dtype, *where, p, t, chunk, columns);
}

int backward_rows(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                  const dcn_cuda_launch *where, const void *grad_columns, void *columns,
                  void *grad_input) {
  return launch<RowsBackward>(p->dtype, *where, p, t, chunk, grad_columns, columns, grad_input);
}

}  // namespace dcn
