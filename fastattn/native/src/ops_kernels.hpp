// The small ops and linear of one instruction set.
#pragma once

#include "ops_argmax.hpp"
#include "ops_gather.hpp"
#include "ops_gemm.hpp"
#include "ops_linear.hpp"
#include "ops_mx.hpp"
#include "ops_rotary.hpp"
#include "ops_small.hpp"
#include "ops_sum.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

static constexpr OpsTable ops_table = {
    rms_norm,         swiglu,       rotary,     gather,         argmax, sum,
    linear_workspace, linear,       dot_linear, gemm_workspace, gemm,   dequantize_workspace,
    dequantize,       mx_workspace, mx_encode,  mx_decode_sum};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
