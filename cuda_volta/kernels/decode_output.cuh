// Where a decoded row goes: the result itself, or a split's part of it that combine.cu merges.
#pragma once

#include "decode_softmax.cuh"

namespace volta {

// Maximum of a row's scores, and the sum of 2^(score - maximum); (-inf, 0) where it saw no key, (-inf, NaN)
// where it saw nothing else but NaN.
struct RowTotal {
    float max, sum;
};
VOLTA_DEVICE bool saw_nothing(RowTotal t) { return t.max == -infinity() && t.sum == 0.0f; }

// The log-sum-exp, base 2.
VOLTA_DEVICE float row_lse(RowTotal t) {
    return saw_nothing(t) ? -infinity() : t.max + log2_approx(t.sum);
}

// What a head's sink makes of a row of this lse: it takes part in the denominator only.
struct Sunk {
    float lse, factor;  // of the row's output
};
VOLTA_DEVICE Sunk add_sink(const AttentionParams& p, i32 head, float lse) {
    if (!p.sinks) return {lse, 1.0f};
    const float sink = ldg(p.sinks + head) * LOG2_E;
    const float top = sink > lse ? sink : lse;
    if (top == -infinity()) return {lse, 1.0f};
    const float both = top + log2_approx(exp2_approx(lse - top) + exp2_approx(sink - top));
    return {both, exp2_approx(lse - both)};
}

VOLTA_DEVICE i64 packed_place(const AttentionParams& p, const Sequence& s, i32 b, PackedRow at) {
    const i64 query = p.cu_seqlens_q ? s.q_begin + at.query : static_cast<i64>(b) * p.q_rows + at.query;
    return query * p.heads + at.head;
}

VOLTA_DEVICE u16* out_row(const AttentionParams& p, const Sequence& s, i32 b, PackedRow at) {
    return p.out + b * p.out_batch + (s.q_begin + at.query) * p.out_row + at.head * p.out_head;
}

VOLTA_DEVICE void write_lse(const AttentionParams& p, const Sequence& s, i32 b, PackedRow at, float lse) {
    if (p.lse) stg(p.lse + b * p.lse_batch + at.head * p.lse_head + s.q_begin + at.query, lse * LN_2);
}

// 4 columns of a row of the result.
VOLTA_DEVICE void write_halves(const AttentionParams& p, u16* row, i32 column, const float (&x)[4]) {
    if (p.v_head_dim % 4 == 0) {
        if (column < p.v_head_dim) {
            stg(reinterpret_cast<Word2*>(row + column),
                Word2{pack_half2(x[0], x[1]), pack_half2(x[2], x[3])});
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (column + i < p.v_head_dim) stg(row + column + i, to_half(x[i]));
    }
}

}  // namespace volta
