/* The passes for any number of channels and both layouts: one value at a time.
 *
 *   sample     columns[c][tap][i] = mask S(input[c]; position of tap at pixel i)
 *   backward   d_q = sum_c grad_columns[c][tap][i] v_q[c]  ->  grad_offset, grad_mask (geometry.h)
 *              grad_input[c][q] += weight_q mask grad_columns[c][tap][i]
 *
 * operands      input, grad_input NCHW or NHWC; columns, grad_columns DCN_PLANAR
 * work split    a thread: one (offset group, tap, pixel), pixels fastest, so that a warp reads offsets
 *               and writes columns in whole lines. It computes the position once and loops over
 *               channels: SLAB of them in `sample`, all of the offset group in `backward`, which
 *               therefore needs no reductions for grad_offset and grad_mask
 * memory        no shared memory; 4 values read a sample and channel, scattered over lines in NCHW
 * accumulators  float, double for float64; sums over channels in blocks of BLOCK; grad_input by
 *               reductions in memory, in no particular order
 * assumes       params checked by dcnlib/_problem.py; addresses aligned to their type
 */
#include "geometry.h"
#include "launch.h"
#include "passes.h"

namespace dcn {
namespace {

constexpr int64_t SLAB = 16;  /* channels of a thread of `sample` */
constexpr int64_t BLOCK = 32; /* terms that are summed on their own */

/* What unit number `unit` of a launch is about; `parts` threads share an offset group's channels. */
struct Task {
  int64_t i, tap, part, offset_group; /* i: pixel of the chunk */

  static DCN_MEMBER Task of(const dcn_params &p, const dcn_cuda_chunk &chunk, int64_t parts,
                            int64_t unit) {
    Task task;
    const int64_t taps = taps_of(p);
    const int64_t row = unit / chunk.count, rest = row / taps;
    task.i = unit - row * chunk.count;
    task.tap = row - rest * taps;
    task.offset_group = rest / parts;
    task.part = rest - task.offset_group * parts;
    return task;
  }
};

/* Steps between neighbours in the input and in the columns. */
struct Steps {
  int64_t channel, pixel; /* of input and grad_input */
  int64_t column, piece;  /* of columns: channels, pieces */

  DCN_MEMBER Steps(const dcn_params &p, const dcn_cuda_chunk &chunk) {
    const bool rows = p.layout == DCN_NHWC;
    channel = rows ? 1 : plane_in(p);
    pixel = rows ? p.in_channels : 1;
    column = taps_of(p) * chunk.count;
    piece = group_in(p) * column;
  }

  /* Index of channel c of a sample's top left corner. */
  DCN_MEMBER int64_t corner(const dcn_params &p, const dcn_cuda_chunk &chunk, int64_t n, int64_t at,
                            int64_t c) const {
    return (n - chunk.image) * p.in_channels * plane_in(p) + at * pixel + c * channel;
  }

  /* Index of a column's first piece; grad_columns have one. */
  DCN_MEMBER int64_t at(const dcn_params &p, const dcn_cuda_chunk &chunk, const Task &task,
                        int64_t c, int64_t pieces) const {
    const int64_t skipped = pieces == 1 ? 0 : c / group_in(p) * (pieces - 1) * piece;
    return c * column + skipped + task.tap * chunk.count + task.i;
  }
};

template <class T>
DCN_DEVICE Quad<typename Storage<T>::A> corners(const dcn_params &p, const T *input, int64_t at,
                                                int64_t right, int32_t bits) {
  typedef typename Storage<T>::A A;
  const int64_t down = p.in_w * right;
  Quad<A> v;
  v.at[0] = bits & TOP_LEFT ? widen(input[at]) : A(0);
  v.at[1] = bits & TOP_RIGHT ? widen(input[at + right]) : A(0);
  v.at[2] = bits & BOTTOM_LEFT ? widen(input[at + down]) : A(0);
  v.at[3] = bits & BOTTOM_RIGHT ? widen(input[at + down + right]) : A(0);
  return v;
}

template <class T>
DCN_DEVICE void write_column(T *columns, int64_t at, const Steps &steps, int32_t pieces,
                             typename Storage<T>::A value) {
  if (pieces == 1) {
    columns[at] = narrow<T>(value);
  } else {
    split(value, columns + at, columns + at + steps.piece);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    planar_sample(const dcn_params p, const dcn_tensors t, const dcn_cuda_chunk chunk,
                  int64_t parts, int64_t units, T *columns) {
  typedef typename Storage<T>::A A;
  const Steps steps(p, chunk);
  const T *input = (const T *)t.input;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const Task task = Task::of(p, chunk, parts, unit);
    const Pixel o = output_pixel(p, chunk.first + task.i);
    const Sample<A> s = sample_at<T>(p, t, o, task.offset_group, task.tap);
    const Quad<A> w = weights(s.ly, s.lx);
    const int32_t bits = s.value_corners();
    const int64_t begin = task.offset_group * offset_group_in(p);
    int64_t c = begin + task.part * SLAB;
    const int64_t end = least(c + SLAB, begin + offset_group_in(p));
    int64_t from = steps.corner(p, chunk, o.n, s.pixel, c);
    for (; c < end; c++, from += steps.channel) {
      const A value = s.mask * weighted(w, corners(p, input, from, steps.pixel, bits));
      write_column(columns, steps.at(p, chunk, task, c, chunk.pieces), steps, chunk.pieces, value);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    planar_backward(const dcn_params p, const dcn_tensors t, const dcn_cuda_chunk chunk,
                    int64_t units, const typename Storage<T>::A *grad_columns, T *columns,
                    typename Storage<T>::A *grad_input) {
  typedef typename Storage<T>::A A;
  const Steps steps(p, chunk);
  const T *input = (const T *)t.input;
  const int64_t right = steps.pixel, down = p.in_w * right;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const Task task = Task::of(p, chunk, 1, unit);
    const Pixel o = output_pixel(p, chunk.first + task.i);
    const Sample<A> s = sample_at<T>(p, t, o, task.offset_group, task.tap);
    const Quad<A> w = weights(s.ly, s.lx);
    const int32_t reached = s.value_corners();
    int64_t c = task.offset_group * offset_group_in(p);
    const int64_t end = c + offset_group_in(p);
    int64_t at = steps.corner(p, chunk, o.n, s.pixel, c);
    Quad<A> d = {};
    while (c < end) {
      Quad<A> sum = {};
      for (const int64_t stop = least(c + BLOCK, end); c < stop; c++, at += steps.channel) {
        const A g = grad_columns[steps.at(p, chunk, task, c, 1)];
        const Quad<A> v = corners(p, input, at, right, s.bits);
        for (int q = 0; q < 4; q++) sum.at[q] += g * v.at[q];
        if (grad_input) {
          const A share = s.mask * g;
          if (reached & TOP_LEFT) atomicAdd(grad_input + at, w.at[0] * share);
          if (reached & TOP_RIGHT) atomicAdd(grad_input + at + right, w.at[1] * share);
          if (reached & BOTTOM_LEFT) atomicAdd(grad_input + at + down, w.at[2] * share);
          if (reached & BOTTOM_RIGHT) atomicAdd(grad_input + at + down + right, w.at[3] * share);
        }
        if (columns) {
          const bool value = (s.bits & HAS_VALUE) != 0 || s.is_nan();
          write_column(columns, steps.at(p, chunk, task, c, chunk.pieces), steps, chunk.pieces,
                       s.mask * (value ? weighted(w, v) : A(0)));
        }
      }
      for (int q = 0; q < 4; q++) d.at[q] += sum.at[q];
    }
    write_gradients<T>(p, t, s, d, o, task.offset_group, task.tap);
  }
}

}  // namespace

template <class T>
struct PlanarSample {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, void *columns) {
    const int64_t parts = (offset_group_in(*p) + SLAB - 1) / SLAB;
    const int64_t units = p->offset_groups * parts * taps_of(*p) * chunk->count;
    DCN_LAUNCH_FLAT(planar_sample<T>, blocks_for(units, where), THREADS, where.stream, *p, *t,
                    *chunk, parts, units, (T *)columns);
  }
};

template <class T>
struct PlanarBackward {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, const void *grad_columns, void *columns,
                     void *grad_input) {
    typedef typename Storage<T>::A A;
    const int64_t units = p->offset_groups * taps_of(*p) * chunk->count;
    DCN_LAUNCH_FLAT(planar_backward<T>, blocks_for(units, where), THREADS, where.stream, *p, *t,
                    *chunk, units, (const A *)grad_columns, (T *)columns, (A *)grad_input);
  }
};

int sample_planar(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                  const dcn_cuda_launch *where, void *columns) {
  return launch<PlanarSample>(p->dtype, *where, p, t, chunk, columns);
}

int backward_planar(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                    const dcn_cuda_launch *where, const void *grad_columns, void *columns,
                    void *grad_input) {
  return launch<PlanarBackward>(p->dtype, *where, p, t, chunk, grad_columns, columns, grad_input);
}

}  // namespace dcn
