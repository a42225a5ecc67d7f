#define DST_OPS_ISA avx512
#define DST_OPS_VECTOR 64
#define DST_OPS_ROWS 8
#define DST_OPS_OUTPUTS 14
#define DST_OPS_TOKEN_VECTORS 2
#include "kernels.h"
