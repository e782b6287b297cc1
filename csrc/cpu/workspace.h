/* Memory of a call, kept for the next one: fresh pages cost more than a microsecond each, up to a
 * third of a depthwise call. One block in the process, of DCN_KEPT bytes at most; calls at the same time
 * allocate their own. */
#ifndef DCN_WORKSPACE_H
#define DCN_WORKSPACE_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { DCN_LINE = 64, DCN_KEPT = 64 << 20 };

/* At least `bytes`, aligned to a cache line, holding anything; null if there is no memory. */
void *dcn_workspace_take(size_t bytes);
void dcn_workspace_give(void *memory);

/* From now on keep at most `bytes` between calls. */
void dcn_workspace_keep(size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
