// One linear layer: the kernel that multiplies, and the order of x's columns that W is stored in.
#pragma once

#include <cstddef>

#include "isa.hpp"

namespace fastattn {

// Rows of x from which the GEMM beats the kernel that multiplies W as it is read.
int64_t gemm_rows(const LinearArgs& a);

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
    bool by_gemm_;
    int threads_;
};

}  // namespace fastattn
