#include "linear_call.hpp"

#include "host.hpp"

namespace fastattn {

// Measured on Zen 4. By what the kernel for few rows computes with: floats, bytes, integers of two or three.
int64_t gemm_rows(const LinearArgs& a) {
    const bool bf16 = a.dtype == DType::bf16;
    if (a.w.kind == WeightKind::dense || a.w.g_idx) return bf16 ? 8 : 14;
    if (a.act_int8) return bf16 ? 16 : 64;
    return bf16 ? 13 : a.dtype == DType::f16 ? 32 : 16;
}

LinearCall::LinearCall(const LinearArgs& args, const int64_t* x_perm, const KernelTable& kernels, int threads)
    : args_(args), x_perm_(x_perm), ops_(kernels.ops), by_gemm_(args.rows >= gemm_rows(args)) {
    const int64_t values = args.w.out * args.w.in;
    threads_ = threads_for(by_gemm_ ? args.rows * values : values, CHEAP, threads);
}

size_t LinearCall::sorted_bytes() const {
    if (!x_perm_) return 0;
    const size_t item = args_.dtype == DType::f32 ? 4 : 2;
    return (size_t(args_.rows * args_.w.in) * item + 63) & ~size_t(63);
}

size_t LinearCall::workspace() const {
    const size_t bytes = (by_gemm_ ? ops_.gemm_workspace : ops_.linear_workspace)(args_, threads_);
    return sorted_bytes() + ((bytes + 63) & ~size_t(63));
}

void LinearCall::run(void* memory) const {
    LinearArgs a = args_;
    if (x_perm_) {
        const GatherArgs g = {a.x, x_perm_, memory, a.dtype, a.rows, a.w.in, a.x_stride};
        ops_.gather(g, threads_for(a.rows * a.w.in, CHEAP, threads_));
        a.x = memory;
        a.x_stride = a.w.in;
    }
    (by_gemm_ ? ops_.gemm : ops_.linear)(a, threads_, static_cast<char*>(memory) + sorted_bytes());
}

}  // namespace fastattn
