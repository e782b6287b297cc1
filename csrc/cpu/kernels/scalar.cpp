#define DCN_ISA scalar
#define DCN_VECTOR_BYTES 0
#include "kernel_table.inc"
