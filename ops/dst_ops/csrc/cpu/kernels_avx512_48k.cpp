// A tile of a vector of tokens takes one load of a weight for a multiply-add instead of half of one, where two loads a cycle can be had,
// and half of the first-level cache for rows of x.
#define DST_OPS_ISA avx512_48k
#define DST_OPS_VECTOR 64
#define DST_OPS_ROWS 8
#define DST_OPS_OUTPUTS 28
#define DST_OPS_TOKEN_VECTORS 1
#include "kernels.h"
