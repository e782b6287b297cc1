/* The emulation has both 16-bit types in one file. */
#include "cuda_fp16.h"
