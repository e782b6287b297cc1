/* grad_input with the same bits on every run: each pixel's shares in a fixed order, by one owner.
 *
 *   keys     for (offset group, tap, pixel of the chunk, corner): the input pixel it scatters to, and
 *            weight = mask * bilinear weight
 *   gather   grad_input[q][c] += sum over the entries e of q, ascending: weight_e grad_columns_e[c]
 *
 * Between the two the caller sorts the keys, stably. What is added to what, and in which order, then
 * depends on the params and the chunks alone.
 *
 * operands      keys int32 or int64, weights in the arithmetic type, 4 * G * taps * count entries;
 *               grad_columns, grad_input as for dcn_cuda_backward
 * work split    keys: a thread a sample. gather: `lanes` threads an entry, each with 16 bytes of
 *               channels (planar: one value); only the first entry of a run of equal keys works, and
 *               it walks along its run, so no table of runs is needed
 * memory        no shared memory; gather reads each grad_column at most 4 times, 16 bytes a time
 * accumulators  float, double for float64, sequential over a run
 * assumes       params checked by dcnlib/_problem.py; for DCN_ROWS as in rows.cu
 */
#include "geometry.h"
#include "launch.h"

namespace dcn {
namespace {

constexpr int WARP = 32;

template <class T, class Key>
__global__ void __launch_bounds__(THREADS)
    corner_keys(const dcn_params p, const dcn_tensors t, const dcn_cuda_chunk chunk, int64_t units,
                Key *keys, typename Storage<T>::A *entry_weights) {
  typedef typename Storage<T>::A A;
  const int64_t taps = taps_of(p);
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t row = unit / chunk.count, i = unit - row * chunk.count;
    const int64_t offset_group = row / taps, tap = row - offset_group * taps;
    const Pixel o = output_pixel(p, chunk.first + i);
    const Sample<A> s = sample_at<T>(p, t, o, offset_group, tap);
    const Quad<A> w = weights(s.ly, s.lx);
    const int32_t reached = s.value_corners();
    const int64_t top_left = (o.n - chunk.image) * plane_in(p) + s.pixel;
    for (int q = 0; q < 4; q++) {
      const int64_t pixel = top_left + (q & 1) + (q >> 1) * p.in_w;
      keys[4 * unit + q] =
          reached >> q & 1 ? (Key)(pixel * p.offset_groups + offset_group) : Key(-1);
      entry_weights[4 * unit + q] = s.mask * w.at[q];
    }
  }
}

/* V values of channels c .. c + V - 1 of an entry's grad_columns; V is 1 in DCN_PLANAR. */
template <int V, class A>
DCN_DEVICE Pack<A> entry_columns(const dcn_params &p, const dcn_cuda_chunk &chunk, int64_t entry,
                                 int64_t c, const A *grad_columns) {
  const int64_t row = entry >> 2, channel = row / chunk.count, i = row - channel * chunk.count;
  const int64_t taps = taps_of(p), tap = channel % taps;
  if (V == 1) {
    Pack<A> one = {};
    one.at[0] = grad_columns[(c * taps + tap) * chunk.count + i];
    return one;
  }
  const int64_t group = c / group_in(p), rest = c - group * group_in(p);
  return load16(grad_columns + ((group * chunk.count + i) * taps + tap) * group_in(p) + rest);
}

template <class A, class Key, int V>
__global__ void __launch_bounds__(THREADS)
    gather(const dcn_params p, const dcn_cuda_chunk chunk, int64_t entries, int lanes,
           const Key *keys, const int64_t *entry_at, const A *entry_weights, const A *grad_columns,
           A *grad_input) {
  const int64_t vectors = offset_group_in(p) / V, plane = plane_in(p);
  const int lane = threadIdx.x & (lanes - 1);
  const int64_t step = unit_step() / lanes;
  for (int64_t first = first_unit() / lanes; first < entries; first += step) {
    const Key key = keys[first];
    if (key < 0 || (first > 0 && keys[first - 1] == key)) continue;
    const int64_t pixel = (int64_t)key / p.offset_groups;
    const int64_t offset_group = (int64_t)key - pixel * p.offset_groups;
    for (int64_t v = lane; v < vectors; v += lanes) {
      const int64_t c = offset_group * offset_group_in(p) + v * V;
      A sum[V] = {};
      for (int64_t e = first; e < entries && keys[e] == key; e++) {
        const int64_t entry = entry_at[e];
        const A weight = entry_weights[entry];
        const Pack<A> from = entry_columns<V>(p, chunk, entry, c, grad_columns);
        for (int k = 0; k < V; k++) sum[k] += weight * from.at[k];
      }
      const int64_t n = pixel / plane;
      A *to = grad_input + (p.layout == DCN_NHWC
                                ? pixel * p.in_channels + c
                                : (n * p.in_channels + c) * plane + (pixel - n * plane));
      if (V == 1) {
        to[0] += sum[0];
      } else { /* nobody else writes here: one wide load and store */
        Pack<A> total;
        memcpy(&total, to, sizeof(total));
        for (int k = 0; k < V; k++) total.at[k] += sum[k];
        store16(to, total);
      }
    }
  }
}

template <class T>
struct Keys {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, int wide, void *keys, void *weights) {
    typedef typename Storage<T>::A A;
    const int64_t units = p->offset_groups * taps_of(*p) * chunk->count;
    if (wide)
      DCN_LAUNCH_FLAT((corner_keys<T, int64_t>), blocks_for(units, where), THREADS, where.stream,
                      *p, *t, *chunk, units, (int64_t *)keys, (A *)weights);
    else
      DCN_LAUNCH_FLAT((corner_keys<T, int32_t>), blocks_for(units, where), THREADS, where.stream,
                      *p, *t, *chunk, units, (int32_t *)keys, (A *)weights);
  }
};

template <class A, class Key, int V>
void launch_gather(const dcn_cuda_launch &where, const dcn_params *p, const dcn_cuda_chunk *chunk,
                   const void *keys, const int64_t *entry_at, const void *weights,
                   const void *grad_columns, void *grad_input) {
  const int64_t entries = 4 * p->offset_groups * taps_of(*p) * chunk->count;
  const int lanes = power_of_two(offset_group_in(*p) / V, WARP);
  DCN_LAUNCH_FLAT((gather<A, Key, V>), blocks_for(entries * lanes, where), THREADS, where.stream,
                  *p, *chunk, entries, lanes, (const Key *)keys, entry_at, (const A *)weights,
                  (const A *)grad_columns, (A *)grad_input);
}

template <class A, class... Arguments>
void choose_gather(int order, int wide, Arguments... arguments) {
  constexpr int V = Pack<A>::size;
  if (order == DCN_ROWS)
    wide ? launch_gather<A, int64_t, V>(arguments...) : launch_gather<A, int32_t, V>(arguments...);
  else
    wide ? launch_gather<A, int64_t, 1>(arguments...) : launch_gather<A, int32_t, 1>(arguments...);
}

}  // namespace
}  // namespace dcn

int dcn_cuda_keys(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                  const dcn_cuda_launch *where, int wide, void *keys, void *weights) {
  return dcn::launch<dcn::Keys>(p->dtype, *where, p, t, chunk, wide, keys, weights);
}

int dcn_cuda_gather(const dcn_params *p, const dcn_cuda_chunk *chunk, const dcn_cuda_launch *where,
                    int wide, const void *keys, const int64_t *entries, const void *weights,
                    const void *grad_columns, void *grad_input) {
  dcn::OnDevice guard(where->device);
  if (guard.error) return guard.error;
  if (p->dtype == DCN_FLOAT64)
    dcn::choose_gather<double>(chunk->order, wide, *where, p, chunk, keys, entries, weights,
                               grad_columns, grad_input);
  else
    dcn::choose_gather<float>(chunk->order, wide, *where, p, chunk, keys, entries, weights,
                              grad_columns, grad_input);
  return cudaGetLastError();
}
