/* The CPU core's C ABI: one table of functions per instruction set.
 *
 * A call is cut into phases and tasks by the kernels; whoever calls owns memory and threads:
 *
 *     operator = one of a table's
 *     operator->plan(params, direction, wanted, num_threads, &plan)    sizes and task counts, no work
 *     allocate plan.shared_bytes once and plan.scratch_bytes per thread
 *     for wave, for phase:
 *         for task in parallel:  operator->run(call, wave, phase, task, my scratch)
 *         barrier
 *
 * Rules: run() allocates nothing, calls no OpenMP, touches no global state, and any task order on
 * any thread gives the same bits: tasks of a phase write disjoint memory, and whatever decides the
 * order of a sum depends on the params alone, never on num_threads.
 */
#ifndef DCN_CPU_H
#define DCN_CPU_H

#include "../dcn_params.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { DCN_FORWARD = 0, DCN_BACKWARD = 1 } dcn_direction;

/* Which gradients are wanted: bits of `wanted`, ignored in the forward direction. */
enum {
  DCN_GRAD_INPUT = 1,
  DCN_GRAD_OFFSET = 2,
  DCN_GRAD_WEIGHT = 4,
  DCN_GRAD_BIAS = 8,
  DCN_GRAD_MASK = 16,
};

enum { DCN_PHASES = 4 }; /* the most there are */

typedef struct {
  int64_t waves;             /* images are taken in waves so that the workspace stays bounded */
  int64_t phases;            /* phases of one wave, a barrier after each */
  int64_t tasks[DCN_PHASES]; /* tasks of each phase (of the largest wave) */
  size_t shared_bytes;       /* workspace of the call, 64-byte aligned by the caller */
  size_t scratch_bytes;      /* workspace of each thread, 64-byte aligned by the caller */
  int64_t weight_tasks;      /* forward: the first tasks of phase 0, which pack the weights ... */
  size_t weight_bytes;       /* ... into the first bytes of the workspace and need no scratch */
  int64_t weight_form;       /* how they lie there, of several ways that a table may have */
  int64_t work;              /* multiply-adds of the whole call: too few are not worth a team */
  int64_t internal;          /* the kernels' own note */
} dcn_cpu_plan;

/* Operators other than the convolution pass addresses of their own structs (dcn_roi_params, ...) as
 * `params` and `tensors`; whoever reads them casts back. */
typedef struct {
  const dcn_params *params;
  const dcn_tensors *tensors;
  const dcn_cpu_plan *plan;
  int direction;
  void *shared;
  /* Forward: weights packed by those tasks of an earlier call on the same instruction set, with the
   * same channels, kernel, groups, offset groups, dtype and form; null to pack them now. */
  const void *packed;
} dcn_cpu_call;

typedef struct {
  const char *name;
  void (*plan)(const dcn_params *params, int direction, int wanted, int num_threads,
               dcn_cpu_plan *plan);
  void (*run)(const dcn_cpu_call *call, int64_t wave, int64_t phase, int64_t task, void *scratch);
} dcn_cpu_operator;

typedef struct {
  const char *isa;
  dcn_cpu_operator deform_conv2d, deform_roi_pool, deform_resample2d;
} dcn_cpu_kernels;

/* The tables linked into this build, best first, null-terminated; and those this CPU can run. */
const dcn_cpu_kernels *const *dcn_cpu_built(void);
const dcn_cpu_kernels *const *dcn_cpu_usable(void);

#ifdef __cplusplus
}
#endif
#endif
