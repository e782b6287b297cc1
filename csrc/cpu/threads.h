/* Teams of threads: the process hazards of OpenMP, each answered by a function that the caller asks
 * before every team, and the one parallel region. */
#ifndef DCN_THREADS_H
#define DCN_THREADS_H

#include "dcn_cpu.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Call once, before the first team: from then on a forked child is known to be one. */
void dcn_threads_init(void);

/* From now on as in a forked child: for who has been forked before the library was loaded. */
void dcn_threads_alone(void);

/* Whether either has happened. */
int dcn_threads_forked(void);

/* How many threads a team may have now, at most `wanted`:
 *   1 in a forked child    libgomp's threads do not survive a fork, a team would wait for ever
 *   1 inside a region      whoever opened it has shared the cores already
 *   OMP_THREAD_LIMIT */
int dcn_threads_allowed(int wanted);

/* How large a team for so many workers is to be: as large as the calling thread's last one, if that is
 * allowed, since libgomp ends the threads that a smaller team has no use for, and would create them anew for
 * the next layer of a network. Fewer than the workers if no more can be created: libgomp would end the
 * process, so this tries first, when a team grows. Call it last, with all memory of the call in hand, and
 * open that team. (If somebody else opened a smaller one since, libgomp has ended threads unseen.) */
int dcn_threads_team(int workers, int allowed);

/* Runs a call on `workers` threads of a team, whose others idle; `scratch` has room for plan.scratch_bytes
 * of each worker.
 *
 * A thread begins with its own share of a phase's tasks, always the same part of the image, and then
 * helps the others: what it packed or summed in one phase is in its own cache in the next, and nobody
 * waits for a thread that has lost its core. */
void dcn_threads_run(const dcn_cpu_operator *kernel, const dcn_cpu_call *call, void *scratch,
                     int workers, int team);

/* Whether OpenMP was compiled in. */
int dcn_threads_openmp(void);

/* Cores that OpenMP sees: where it has bound this thread to one (OMP_PROC_BIND), those of before. */
int dcn_threads_cores(void);

#ifdef __cplusplus
}
#endif
#endif
