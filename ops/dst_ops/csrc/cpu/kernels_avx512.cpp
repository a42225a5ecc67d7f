#include "../diagonal.h"
#define DST_OPS_ISA dst_ops_avx512
#define DST_OPS_VECTOR 64
#define DST_OPS_ROWS 8
#include "kernels.h"

namespace dst_ops {
const Kernels<float> avx512_f32 = DST_OPS_ISA::kernels<float>;
const Kernels<double> avx512_f64 = DST_OPS_ISA::kernels<double>;
}  // namespace dst_ops
