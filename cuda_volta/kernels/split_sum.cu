// Adds the partial products of a linear layer's splits in their order, and the bias.
#include "bias.cuh"

namespace volta {

struct SplitSumParams {
    const float* partial;  // (splits, rows, out)
    const void* bias;
    u16* out;  // (rows, out)
    i64 size;  // rows * out
    i32 width, splits, bias_is_float;
};

}  // namespace volta

using namespace volta;

// Grid: (width / threads, rows).
VOLTA_KERNEL(split_sum, 256, 4)(SplitSumParams p) {
    const i32 n = static_cast<i32>(block_x() * 256 + thread_index());
    if (n >= p.width) return;
    const i64 at = static_cast<i64>(block_y()) * p.width + n;
    float y = 0.0f;
    for (i32 i = 0; i < p.splits; ++i) y += ldg(p.partial + i * p.size + at);
    stg(p.out + at, to_half(y + bias(p.bias, p.bias_is_float, n)));
}
