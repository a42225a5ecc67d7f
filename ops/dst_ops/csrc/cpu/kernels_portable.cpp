#define DST_OPS_ISA portable
#define DST_OPS_VECTOR 16
#define DST_OPS_ROWS 4
#define DST_OPS_OUTPUTS 3
#define DST_OPS_TOKEN_VECTORS 4
#include "kernels.h"
