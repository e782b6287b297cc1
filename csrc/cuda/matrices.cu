/* Between the tensors of a call and the matrices of a chunk's products.
 *
 *   finish   output[n][o][oh][ow] = product[o][i] + bias[o]      i: pixel (n, oh, ow) of the chunk
 *   pack     packed[o][i] = grad_output[n][o][oh][ow]            NCHW; NHWC is such a matrix already
 *
 * operands      output NCHW with product [groups][O/groups][count], or NHWC with
 *               [groups][count][O/groups]; packed [O][count]
 * work split    a thread an element, in the order of the tensor's memory: whole lines both ways
 * memory        no shared memory; one value read, one written (and the bias)
 * accumulators  none; the sum is in the arithmetic type and rounded once
 * assumes       params checked by dcnlib/_problem.py; addresses aligned to their type
 */
#include "geometry.h"
#include "launch.h"

namespace dcn {
namespace {

/* Index in an NCHW tensor of channel o of the chunk's pixel i. */
DCN_DEVICE int64_t planar_index(const dcn_params &p, const dcn_cuda_chunk &chunk, int64_t o,
                                int64_t i) {
  const int64_t plane = plane_out(p), pixel = chunk.first + i, n = pixel / plane;
  return (n * p.out_channels + o) * plane + (pixel - n * plane);
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    finish_planar(const dcn_params p, const dcn_cuda_chunk chunk, int64_t units,
                  const typename Storage<T>::A *product, const T *bias, T *output) {
  typedef typename Storage<T>::A A;
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t o = unit / chunk.count, i = unit - o * chunk.count;
    const A sum = product[unit] + (bias ? widen(bias[o]) : A(0));
    output[planar_index(p, chunk, o, i)] = narrow<T>(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    finish_rows(const dcn_params p, const dcn_cuda_chunk chunk, int64_t units,
                const typename Storage<T>::A *product, const T *bias, T *output) {
  typedef typename Storage<T>::A A;
  const int64_t per_group = group_out(p);
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t i = unit / p.out_channels, o = unit - i * p.out_channels;
    const int64_t group = o / per_group;
    const A value = product[(group * chunk.count + i) * per_group + (o - group * per_group)];
    output[chunk.first * p.out_channels + unit] = narrow<T>(value + (bias ? widen(bias[o]) : A(0)));
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
    pack_planar(const dcn_params p, const dcn_cuda_chunk chunk, int64_t units, const T *grad_output,
                T *packed) {
  for (int64_t unit = first_unit(); unit < units; unit += unit_step()) {
    const int64_t o = unit / chunk.count, i = unit - o * chunk.count;
    packed[unit] = grad_output[planar_index(p, chunk, o, i)];
  }
}

template <class T>
struct Finish {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, const void *product) {
    typedef typename Storage<T>::A A;
    const int64_t units = p->out_channels * chunk->count;
    if (p->layout == DCN_NHWC)
      DCN_LAUNCH_FLAT(finish_rows<T>, blocks_for(units, where), THREADS, where.stream, *p, *chunk,
                      units, (const A *)product, (const T *)t->bias, (T *)t->output);
    else
      DCN_LAUNCH_FLAT(finish_planar<T>, blocks_for(units, where), THREADS, where.stream, *p, *chunk,
                      units, (const A *)product, (const T *)t->bias, (T *)t->output);
  }
};

template <class T>
struct PackPlanar {
  static void launch(const dcn_cuda_launch &where, const dcn_params *p, const dcn_tensors *t,
                     const dcn_cuda_chunk *chunk, void *packed) {
    const int64_t units = p->out_channels * chunk->count;
    DCN_LAUNCH_FLAT(pack_planar<T>, blocks_for(units, where), THREADS, where.stream, *p, *chunk,
                    units, (const T *)t->grad_output, (T *)packed);
  }
};

}  // namespace
}  // namespace dcn

int dcn_cuda_finish(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                    const dcn_cuda_launch *where, const void *product) {
  return dcn::launch<dcn::Finish>(p->dtype, *where, p, t, chunk, product);
}

int dcn_cuda_pack(const dcn_params *p, const dcn_tensors *t, const dcn_cuda_chunk *chunk,
                  const dcn_cuda_launch *where, void *packed) {
  return dcn::launch<dcn::PackPlanar>(p->dtype, *where, p, t, chunk, packed);
}
