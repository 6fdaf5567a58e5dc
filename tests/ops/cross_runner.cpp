// Runs ops of one instruction set outside Python: reads cases from standard input, writes results to
// standard output. A case is its op and integers, then blobs, each a length and its bytes, all 64-bit.
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "ops_kernels.hpp"

using namespace fastattn;
using fastattn::FASTATTN_ISA::ops_table;

namespace {

constexpr int THREADS = 2;

bool read_exactly(void* p, size_t n) { return fread(p, 1, n, stdin) == n; }

int64_t number() {
    int64_t n;
    if (!read_exactly(&n, sizeof n)) exit(3);
    return n;
}

std::vector<char> blob() {
    const int64_t size = number();
    std::vector<char> bytes(static_cast<size_t>(size));
    if (!read_exactly(bytes.data(), bytes.size())) exit(3);
    return bytes;
}

size_t size_of(DType d) { return d == DType::f32 ? 4 : 2; }

void* data_or_null(std::vector<char>& b) { return b.empty() ? nullptr : b.data(); }

void answer(const std::vector<char>& bytes) { fwrite(bytes.data(), 1, bytes.size(), stdout); }

void run_rms_norm() {
    const DType dtype = DType(number()), weight_dtype = DType(number());
    const int64_t rows = number(), width = number();
    std::vector<char> x = blob(), weight = blob(), residual = blob();
    std::vector<char> out(x.size()), total(x.size());
    RmsNormArgs a = {};
    a.x = {x.data(), dtype, 0, width};
    a.residual = {data_or_null(residual), dtype, 0, width};
    a.weight = weight.data();
    a.weight_dtype = weight_dtype;
    a.out = out.data();
    a.total = total.data();
    a.outer = 1;
    a.inner = rows;
    a.width = width;
    a.eps = 1e-5f;
    ops_table.rms_norm(a, THREADS);
    answer(out);
}

void run_swiglu() {
    const DType dtype = DType(number());
    const int64_t rows = number(), width = number();
    std::vector<char> x = blob(), out(x.size() / 2);
    ops_table.swiglu({x.data(), out.data(), dtype, rows, width, 2 * width}, THREADS);
    answer(out);
}

void run_rotary() {
    const DType dtype = DType(number());
    RotaryArgs a = {};
    a.interleaved = number();
    a.n = number(), a.heads = number(), a.dim = number(), a.half = number();
    std::vector<char> x = blob(), cos = blob(), sin = blob(), positions = blob(), out(x.size());
    a.x = {x.data(), dtype, a.heads * a.dim, a.dim};
    a.cos = reinterpret_cast<const float*>(cos.data());
    a.sin = reinterpret_cast<const float*>(sin.data());
    a.cos_stride = a.sin_stride = a.half;
    a.positions = reinterpret_cast<const int64_t*>(positions.data());
    a.out = out.data();
    a.out_dtype = dtype;
    ops_table.rotary(a, THREADS);
    answer(out);
}

void run_linear(size_t (*workspace)(const LinearArgs&, int), void (*kernel)(const LinearArgs&, int, void*)) {
    LinearArgs a = {};
    a.dtype = DType(number());
    a.rows = number();
    a.w.kind = WeightKind(number());
    a.w.dtype = DType(number());
    a.w.scale_dtype = DType(number());
    a.w.out = number(), a.w.in = number();
    a.w.code_stride = a.w.kind == WeightKind::int4 ? a.w.in / 2 : a.w.in;
    a.w.groups = a.w.scale_stride = a.w.min_stride = number();
    a.w.group_size = number(), a.w.group_offset = number();
    std::vector<char> x = blob(), codes = blob(), scales = blob(), mins = blob(), g_idx = blob();
    std::vector<char> out(size_t(a.rows * a.w.out) * size_of(a.dtype));
    a.x = x.data();
    a.x_stride = a.w.in;
    a.out = out.data();
    a.w.codes = codes.data();
    a.w.scales = data_or_null(scales);
    a.w.mins = data_or_null(mins);
    a.w.g_idx = static_cast<const int32_t*>(data_or_null(g_idx));
    void* scratch = aligned_alloc(64, (workspace(a, THREADS) + 64) / 64 * 64);
    if (!scratch) exit(4);
    kernel(a, THREADS, scratch);
    free(scratch);
    answer(out);
}

}  // namespace

int main() {
    for (;;) {
        int64_t op;
        if (!read_exactly(&op, sizeof op)) return 0;
        if (op == 1) run_rms_norm();
        if (op == 2) run_swiglu();
        if (op == 3) run_rotary();
        if (op == 4) run_linear(ops_table.linear_workspace, ops_table.linear);
        if (op == 5) run_linear(ops_table.gemm_workspace, ops_table.gemm);
    }
}
