#include "../diagonal.h"
#define DST_OPS_ISA dst_ops_portable
#define DST_OPS_VECTOR 16
#define DST_OPS_ROWS 4
#include "kernels.h"

namespace dst_ops {
const Kernels<float> portable_f32 = DST_OPS_ISA::kernels<float>;
const Kernels<double> portable_f64 = DST_OPS_ISA::kernels<double>;
}  // namespace dst_ops
