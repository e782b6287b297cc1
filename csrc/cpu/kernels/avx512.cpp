#define DCN_ISA avx512
#define DCN_VECTOR_BYTES 64
#include "kernel_table.inc"
