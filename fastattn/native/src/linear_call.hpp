// One linear layer: the kernel that multiplies, and the order of x's columns that W is stored in.
#pragma once

#include <cstddef>

#include "isa.hpp"

namespace fastattn {

class LinearCall {
public:
    // x_perm: column i of W multiplies column x_perm[i] of x; null: column i. `threads`: at most.
    LinearCall(const LinearArgs& args, const int64_t* x_perm, const KernelTable& kernels, int threads);

    int threads() const { return threads_; }
    // Bytes that `run` needs, aligned to 64.
    size_t workspace() const;
    void run(void* memory) const;

private:
    size_t sorted_bytes() const;

    LinearArgs args_;
    const int64_t* x_perm_;
    const OpsTable& ops_;
    enum class Kernel { few_rows, integers_or_gemm, gemm } kernel_ = Kernel::few_rows;
    int threads_;
};

}  // namespace fastattn
