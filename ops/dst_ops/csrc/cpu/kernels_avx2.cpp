#include "../diagonal.h"
#define DST_OPS_ISA dst_ops_avx2
#define DST_OPS_VECTOR 32
#define DST_OPS_ROWS 4
#include "kernels.h"

namespace dst_ops {
const Kernels<float> avx2_f32 = DST_OPS_ISA::kernels<float>;
const Kernels<double> avx2_f64 = DST_OPS_ISA::kernels<double>;
}  // namespace dst_ops
