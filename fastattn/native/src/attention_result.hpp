// From what rows accumulated to out and lse: directly, or merged from several ranges of keys.
#pragma once

#include "attention_gemm.hpp"
#include "attention_scores.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

// Hands out 64-byte aligned pieces of a buffer; with a null base it only measures.
struct Arena {
    char* base;
    size_t used = 0;

    template <class T>
    T* take(int64_t n) {
        T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (size_t(n) * sizeof(T) + 63) & ~size_t(63);
        return p;
    }
};

// One piece of work: the queries [first, first + count) of some heads, and a range of keys.
// Its rows are head-major: row r is head first_head + r / count, query first + r % count.
struct Item {
    int64_t first_head, heads, first, count;
    KeyRange keys;

    int64_t rows() const { return heads * count; }
    int64_t head(int64_t r) const { return first_head + r / count; }
    int64_t query(int64_t r) const { return first + r % count; }
};

// Where an item's rows lie while they accumulate: PANEL columns of row r at piece(r, panel).
struct Accumulator {
    float* base;
    int64_t tile_stride, row_stride, panel_stride;
    RowState* state;

    float* piece(int64_t r, int64_t panel) const {
        return base + (r / ROWS) * tile_stride + (r % ROWS) * row_stride + panel * panel_stride;
    }
};

// Multiplies by factor and rounds to T.
template <class T>
FA_INLINE void write_scaled(const float* from, float factor, int64_t n, T* to) {
    const vf f = set1(factor);
    int64_t c = 0;
    for (; c + W <= n; c += W) store(to + c, load(from + c) * f);
    if (c < n) store_n(to + c, load(from + c) * f, int(n - c));
}

// Takes the sink in, writes lse, and returns the factor that turns the accumulated row into the output.
FA_INLINE float finish_state(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t i,
                             RowState state) {
    float alpha = 1.0f;
    if (a.sinks && a.sinks[head] > -INF) {
        const float sink = a.sinks[head], now = sink > state.max ? sink : state.max;
        alpha = __builtin_expf(state.max - now);
        state = {now, state.sum * alpha + __builtin_expf(sink - now)};
    }
    const bool empty = state.max == -INF;
    if (a.lse)
        a.lse[s.lse_offset + head * a.lse_head + i] = empty ? -INF : state.max + __builtin_logf(state.sum);
    if (empty) return 0.0f;
    return alpha * (a.v_scale ? a.v_scale[head / (a.heads / a.kv_heads)] : 1.0f) / state.sum;
}

// Writes the finished rows of an item.
template <class T>
static void write_rows(const AttentionArgs& a, const Sequence& s, const Item& item, const Accumulator& acc) {
    for (int64_t r = 0; r < item.rows(); r++) {
        const int64_t head = item.head(r), i = item.query(r);
        const float factor = finish_state(a, s, head, i, acc.state[r]);
        T* to = static_cast<T*>(a.out) + s.out_offset + i * a.out_seq + head * a.out_head;
        for (int64_t c = 0; c < a.v_head_dim; c += PANEL)
            write_scaled(acc.piece(r, c / PANEL), factor, imin(PANEL, a.v_head_dim - c), to + c);
    }
}

// Keeps the rows of an item that covers a part of the keys: `rows` row-major rows of `stride` floats.
FA_INLINE void keep_rows(const Item& item, const Accumulator& acc, int64_t v_head_dim, int64_t stride,
                         float* out, RowState* state) {
    for (int64_t r = 0; r < item.rows(); r++) {
        for (int64_t c = 0; c < v_head_dim; c += PANEL)
            write_scaled(acc.piece(r, c / PANEL), 1.0f, imin(PANEL, v_head_dim - c), out + r * stride + c);
        state[r] = acc.state[r];
    }
}

// Merges `parts` kept ranges (each rows x stride floats, one after another) into the first one.
FA_INLINE void merge_parts(int64_t rows, int64_t parts, int64_t stride, float* out, RowState* state) {
    for (int64_t r = 0; r < rows; r++) {
        float most = -INF;
        for (int64_t p = 0; p < parts; p++)
            most = state[p * rows + r].max > most ? state[p * rows + r].max : most;
        float sum = 0.0f;
        float* to = out + r * stride;
        for (int64_t p = 0; p < parts; p++) {
            const RowState part = state[p * rows + r];
            const float weight = part.max == -INF ? 0.0f : __builtin_expf(part.max - most);
            sum += part.sum * weight;
            const float* from = out + (p * rows + r) * stride;
            const vf w = set1(weight);
            for (int64_t c = 0; c < stride; c += W)
                store(to + c, p ? fma(load(from + c), w, load(to + c)) : load(to + c) * w);
        }
        state[r] = {most, sum};
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
