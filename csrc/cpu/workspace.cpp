/* See workspace.h. */
#include "workspace.h"

#include <stdlib.h>

#include <atomic>

namespace {

struct alignas(DCN_LINE) Block { /* right before its memory */
  size_t bytes;
};

std::atomic<Block *> kept{nullptr};
std::atomic<size_t> most{DCN_KEPT};

} /* namespace */

void *dcn_workspace_take(size_t bytes) {
  Block *block = kept.exchange(nullptr);
  if (!block || block->bytes < bytes) {
    free(block); /* first: room for the larger one */
    void *memory = nullptr;
    if (posix_memalign(&memory, DCN_LINE, sizeof(Block) + bytes) != 0) return nullptr;
    block = (Block *)memory;
    block->bytes = bytes;
  }
  return block + 1;
}

void dcn_workspace_give(void *memory) {
  Block *block = (Block *)memory - 1;
  if (block->bytes <= most) block = kept.exchange(block); /* another call's, or none */
  free(block);
}

void dcn_workspace_keep(size_t bytes) {
  most = bytes;
  free(kept.exchange(nullptr));
}
