// From raw dot products to probabilities, one row at a time, by online softmax.
#pragma once

#include "attention_sequence.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

// How raw dot products of one head become scores.
struct ScoreRule {
    float scale;    // of the dot product, k_scale included
    float softcap;  // 0: none
    bool plain;     // only a positive scale: the maximum can be taken before scaling
    float unit;     // what the numbers that the maximum is taken of must be multiplied by to be scores
};

FA_INLINE ScoreRule score_rule(const AttentionArgs& a, int64_t kv_head) {
    const float scale = a.k_scale ? a.scale * a.k_scale[kv_head] : a.scale;
    const bool plain = scale > 0.0f && a.softcap == 0.0f && !a.alibi && !a.mask;
    return {scale, a.softcap, plain, plain ? scale : 1.0f};
}

// What a row of scores accumulates.
struct RowState {
    float max;  // in the rule's units while keys are added, a score afterwards; -inf: no visible key yet
    float sum;  // of exp(score - max)
};

template <class M>
FA_INLINE vf load_mask(const M* p, int64_t stride, int n) {
    if (stride == 1) return n == W ? load(p) : load_n(p, n);
    if (stride == 0) return set1(to_float(*p));
    float lanes[W] = {};
    for (int i = 0; i < n; i++) lanes[i] = to_float(p[i * stride]);
    return load(lanes);
}

FA_INLINE vf load_keep(const uint8_t* p, int64_t stride, int n) {
    float lanes[W] = {};
    for (int i = 0; i < n; i++) lanes[i] = p[i * stride];
    return load(lanes);
}

// Additive mask of n keys; a bool mask gives 0 and -inf.
FA_INLINE vf mask_values(const AttentionArgs& a, int64_t offset, int n) {
    switch (a.mask_dtype) {
        case DType::f32:
            return load_mask(static_cast<const float*>(a.mask) + offset, a.mask_k, n);
        case DType::f16:
            return load_mask(static_cast<const f16*>(a.mask) + offset, a.mask_k, n);
        case DType::bf16:
            return load_mask(static_cast<const bf16*>(a.mask) + offset, a.mask_k, n);
        default: {
            const vf keep = load_keep(static_cast<const uint8_t*>(a.mask) + offset, a.mask_k, n);
            return select(lt(zero(), keep), zero(), set1(-INF));
        }
    }
}

// Replaces the dot products of keys [key, key + n) at x by scores: scale, softcap, ALiBi, mask.
static void apply_rule(const AttentionArgs& a, const Sequence& s, const ScoreRule& rule, int64_t head,
                       int64_t i, int64_t key, int64_t n, float* x) {
    const float slope = a.alibi ? a.alibi[s.index * a.alibi_batch + head] : 0.0f;
    const float inverse_cap = rule.softcap > 0.0f ? 1.0f / rule.softcap : 0.0f;
    const int64_t mask_row = s.index * a.mask_batch + head * a.mask_head + i * a.mask_q;
    float lane_index[W];
    for (int lane = 0; lane < W; lane++) lane_index[lane] = float(lane);
    const vf lanes = load(lane_index);
    for (int64_t j = 0; j < n; j += W) {
        const int left = int(imin(W, n - j));
        vf y = (left == W ? load(x + j) : load_n(x + j, left)) * set1(rule.scale);
        if (rule.softcap > 0.0f) y = tanh(y * set1(inverse_cap)) * set1(rule.softcap);
        if (a.alibi) {
            const vf distance = set1(float(key + j - i - s.shift)) + lanes;
            y = fnma(set1(slope), abs(distance), y);
        }
        if (a.mask) y = y + mask_values(a, mask_row + (s.first_key + key + j) * a.mask_k, left);
        if (left == W)
            store(x + j, y);
        else
            store_n(x + j, y, left);
    }
}

FA_INLINE void store_p(float* p, vf v) { store(p, v); }

// Turns the row x[c0, c1) of dot products, of which only [lo, hi) are visible, into exp(score - max) at p.
// c0 and c1 are multiples of W; key0 is the key of column 0. Returns the factor by which everything
// accumulated for this row before must be multiplied.
template <class P>
FA_INLINE float softmax_row(const AttentionArgs& a, const Sequence& s, const ScoreRule& rule, int64_t head,
                            int64_t i, int64_t key0, int64_t c0, int64_t c1, int64_t lo, int64_t hi, float* x,
                            P* p, RowState& state) {
    if (lo > hi) lo = hi = c0;
    if (!rule.plain) apply_rule(a, s, rule, head, i, key0 + lo, hi - lo, x + lo);
    for (int64_t c = c0; c < lo; c++) x[c] = -INF;
    for (int64_t c = hi; c < c1; c++) x[c] = -INF;

    vf most = set1(-INF);
    for (int64_t c = c0; c < c1; c += W) most = max(load(x + c), most);
    const float before = state.max, row_most = reduce_max(most), now = row_most > before ? row_most : before;
    // A row that has seen no key keeps -inf; 0 stands in below so that -inf - -inf never occurs.
    const float reference = now == -INF ? 0.0f : now, factor = rule.unit * LOG2E;
    const vf f = set1(factor), r = set1(reference);
    vf sum = zero();
    for (int64_t c = c0; c < c1; c += W) {
        const vf e = exp2((load(x + c) - r) * f);
        sum = sum + e;
        store_p(p + c, e);
    }
    const float alpha = before == now ? 1.0f : __builtin_exp2f((before - reference) * factor);
    state.max = now;
    state.sum = state.sum * alpha + reduce_add(sum);
    return alpha;
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
