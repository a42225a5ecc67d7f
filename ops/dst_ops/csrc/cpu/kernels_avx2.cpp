#define DST_OPS_ISA avx2
#define DST_OPS_VECTOR 32
#define DST_OPS_ROWS 4
#define DST_OPS_OUTPUTS 6
#define DST_OPS_TOKEN_VECTORS 2
#include "kernels.h"
