#include "linear_call.hpp"

#include <algorithm>

#include "host.hpp"

namespace fastattn {

namespace {

// Rows of x from which the GEMM beats multiplying W as it is read, in floats or in integers of one to three
// bytes. Measured on Zen 4.
int64_t gemm_rows_of_floats(const LinearArgs& a) { return a.dtype == DType::bf16 ? 8 : 14; }
int64_t gemm_rows(const LinearArgs& a) {
    const bool bf16 = a.dtype == DType::bf16;
    if (a.w.kind == WeightKind::dense) return gemm_rows_of_floats(a);
    // Where the groups of a chunk differ: later in bf16 and fp32, since the GEMM decodes W; sooner with
    // act_int8 on fp32, since each pass over a block costs a block. fp16 has fp32's values (not measured).
    if (a.w.g_idx && a.act_int8) return bf16 ? 22 : 32;
    if (a.w.g_idx) return bf16 ? 14 : 18;
    if (a.act_int8) return bf16 ? 16 : 64;
    return bf16 ? 13 : a.dtype == DType::f16 ? 32 : 16;
}

}  // namespace

LinearCall::LinearCall(const LinearArgs& args, const int64_t* x_perm, const KernelTable& kernels, int threads)
    : args_(args), x_perm_(x_perm), ops_(kernels.ops) {
    const int64_t values = args.w.out * args.w.in;
    // Whether a g_idx suits integers shows when it is read; floats are the GEMM's sooner.
    const bool floats_lose = args.w.g_idx && args.rows >= gemm_rows_of_floats(args);
    kernel_ = args.rows >= gemm_rows(args) ? Kernel::gemm
              : floats_lose                ? Kernel::integers_or_gemm
                                           : Kernel::few_rows;
    threads_ = threads_for(kernel_ == Kernel::few_rows ? values : args.rows * values, CHEAP, threads);
}

size_t LinearCall::sorted_bytes() const {
    if (!x_perm_) return 0;
    const size_t item = args_.dtype == DType::f32 ? 4 : 2;
    return (size_t(args_.rows * args_.w.in) * item + 63) & ~size_t(63);
}

size_t LinearCall::workspace() const {
    size_t bytes = 0;
    if (kernel_ != Kernel::gemm) bytes = ops_.linear_workspace(args_, threads_);
    if (kernel_ != Kernel::few_rows) bytes = std::max(bytes, ops_.gemm_workspace(args_, threads_));
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
    void* scratch = static_cast<char*>(memory) + sorted_bytes();
    if (kernel_ == Kernel::few_rows) return ops_.linear(a, threads_, scratch);
    if (kernel_ == Kernel::integers_or_gemm && ops_.integer_linear(a, threads_, scratch)) return;
    ops_.gemm(a, threads_, scratch);
}

}  // namespace fastattn
