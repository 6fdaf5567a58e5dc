// Few queries: every key and value is read once, straight from the cache, and converted in registers.
//
// The bound is memory bandwidth. Where the heads of a cache row lie together one item takes several of them,
// so that memory is read in whole rows. A step takes its keys, then the softmax of all scores, then its
// values. While the keys are read the values are prefetched, and while these are read the next step's keys.
// Within a step a few rows are finished for all heads before the next ones are touched: rows that are a page
// apart compete for the same cache lines, and hardware prefetchers follow few of them.
#pragma once

#include "attention_ahead.hpp"
#include "attention_pack.hpp"
#include "attention_result.hpp"
#include "attention_values.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t STEP_BYTES = 512 << 10;  // of a step's keys and values, unless fewer than W keys
constexpr int VALUE_KEYS = 32;             // values that are added to all heads' rows before the next ones
constexpr int ACCUMULATORS = REGISTERS == 32 ? 16 : 8;  // vectors of the products below
constexpr int MAX_BLOCK = ACCUMULATORS / 4;             // rows that go over a key or value together

// A block of R rows, as an argument.
template <int R>
struct RowBlock {
    static constexpr int rows = R;
};

template <class Units, class T>
struct Decode {
    using P = typename Units::Probability;
    using Stored = typename Units::Stored;
    static constexpr int WIDE = W * Units::STEP;  // elements of a vector of keys
    static constexpr int COLUMNS = Values<Units>::COLUMNS;

    const AttentionArgs& a;
    int64_t q_stride, out_stride;
    Stored* q;
    float *out, *scores;
    P* probabilities;  // the scores' own memory when both are floats
    RowState* state;
    const T **k_rows, **v_rows;  // rows of the item's first head

    Decode(const AttentionArgs& args, int64_t max_rows, Arena& arena)
        : a(args), q_stride(round_up(args.head_dim, WIDE)), out_stride(round_up(args.v_head_dim, PANEL)) {
        q = arena.take<Stored>(max_rows * q_stride);
        out = arena.take<float>(max_rows * out_stride);
        scores = arena.take<float>(max_rows * DECODE_KEYS);
        probabilities = sizeof(P) == sizeof(float) ? (P*)scores : arena.take<P>(max_rows * DECODE_KEYS);
        state = arena.take<RowState>(max_rows);
        k_rows = arena.take<const T*>(DECODE_KEYS);
        v_rows = arena.take<const T*>(DECODE_KEYS);
    }

    Accumulator accumulator() const { return {out, ROWS * out_stride, out_stride, PANEL, state}; }

    void run(const Sequence& s, const Item& item) {
        start(s, item);
        const int64_t group = a.heads / a.kv_heads, kv_first = item.first_head / group,
                      kv_count = item.heads / group;
        const int64_t n = group * item.count;  // rows of one KV head
        const int64_t k_bytes = ((kv_count - 1) * a.k_head + a.head_dim) * int64_t(sizeof(T));
        const int64_t v_bytes = ((kv_count - 1) * a.v_head + a.v_head_dim) * int64_t(sizeof(T));
        const int64_t step = imax(W, imin(DECODE_KEYS, STEP_BYTES / (k_bytes + v_bytes) / W * W));

        // Odd groups of rows need more keys at a time to fill the accumulators.
        const int64_t few = n % MAX_BLOCK == 0 ? ACCUMULATORS / MAX_BLOCK : ACCUMULATORS;
        int64_t count = imin(step, item.keys.hi - item.keys.lo);
        if (count > 0) key_rows(a, s, kv_first, item.keys.lo, item.keys.lo + count, k_rows);
        for (int64_t j = item.keys.lo; j < item.keys.hi; j += step) {
            value_rows(a, s, kv_first, j, j + count, v_rows);
            Ahead<T> values(v_rows, count, v_bytes);
            for (int64_t i = 0; i < count; i += few)
                for (int64_t kv = 0; kv < kv_count; kv++)
                    dot_products(kv * n, n, kv * a.k_head, i, imin(few, count - i), values);
            for (int64_t kv = 0; kv < kv_count; kv++) softmax(s, item, kv_first + kv, kv * n, n, j, count);
            const int64_t next = imin(step, item.keys.hi - j - count);
            if (next > 0) key_rows(a, s, kv_first, j + step, j + step + next, k_rows);
            Ahead<T> keys(k_rows, imax(next, 1), k_bytes);
            for (int64_t i = 0; i < count; i += VALUE_KEYS)
                for (int64_t kv = 0; kv < kv_count; kv++)
                    weighted_values(kv * n, n, kv * a.v_head, i, imin(VALUE_KEYS, count - i), keys);
            count = next;
        }
        for (int64_t r = 0; r < item.rows(); r++) state[r].max *= score_rule(a, kv_first + r / n).unit;
        for (int64_t c = 0; c < item.rows() * out_stride; c += COLUMNS) Values<Units>::restore(out + c);
    }

private:
    void start(const Sequence& s, const Item& item) {
        const T* base = static_cast<const T*>(a.q) + s.q_offset;
        for (int64_t r = 0; r < item.rows(); r++) {
            const T* row = base + item.query(r) * a.q_seq + item.head(r) * a.q_head;
            for (int64_t d = 0; d < a.head_dim; d += WIDE)
                Units::store_query(q + r * q_stride + d, Units::load_row(row + d, a.head_dim - d));
            state[r] = {-INF, 0.0f};
        }
        memset(out, 0, sizeof(float) * item.rows() * out_stride);
    }

    // The rows of one KV head, [r0, r0 + n), from dot products to probabilities; rescales out where a maximum
    // grew.
    void softmax(const Sequence& s, const Item& item, int64_t kv_head, int64_t r0, int64_t n, int64_t key,
                 int64_t count) {
        const ScoreRule rule = score_rule(a, kv_head);
        for (int64_t r = r0; r < r0 + n; r++) {
            const KeyRange range = visible(a, s, item.query(r));
            const float alpha =
                softmax_row(a, s, rule, item.head(r), item.query(r), key, 0, round_up(count, W),
                            imax(range.lo - key, 0), imin(range.hi - key, count), scores + r * DECODE_KEYS,
                            probabilities + r * DECODE_KEYS, state[r]);
            float* row = out + r * out_stride;
            if (alpha != 1.0f) write_scaled(row, alpha, out_stride, row);
        }
    }

    // Covers the rows [r0, r0 + n).
    template <class Body>
    FA_INLINE_MEMBER static void row_blocks(int64_t r0, int64_t n, const Body& body) {
        int64_t r = r0;
        const int64_t end = r0 + n;
        for (; r + MAX_BLOCK <= end; r += MAX_BLOCK) body(RowBlock<MAX_BLOCK>(), r);
        if (MAX_BLOCK > 2 && r + 2 <= end) {
            body(RowBlock<2>(), r);
            r += 2;
        }
        if (r < end) body(RowBlock<1>(), r);
    }

    // scores[r][j] = q[r] . key j for rows [r0, r0 + n) and keys [j, j + count) of this step.
    void dot_products(int64_t r0, int64_t n, int64_t offset, int64_t j, int64_t count, Ahead<T>& ahead) {
        row_blocks(r0, n, [&](auto block, int64_t r) {
            for (int64_t i = 0; i < count; i += ACCUMULATORS / block.rows)
                dot_block(block, r, offset, j + i, count - i, r == r0, ahead);
        });
    }

    // Rows [r, r + R) against the next ACCUMULATORS / R keys, of which `left` exist; the last one stands in
    // for those past the end. Only the first rows that read a key fetch ahead: as many bytes as are read.
    template <int R>
    FA_INLINE_MEMBER void dot_block(RowBlock<R>, int64_t r, int64_t offset, int64_t j, int64_t left,
                                    bool first, Ahead<T>& shared) {
        constexpr int K = ACCUMULATORS / R;
        const T* key[K];
        for (int i = 0; i < K; i++) key[i] = k_rows[j + imin(i, left - 1)] + offset;
        const Stored* query = q + r * q_stride;
        Ahead<T> ahead = shared;
        vf acc[ACCUMULATORS];
#pragma GCC unroll 16
        for (int i = 0; i < ACCUMULATORS; i++) acc[i] = zero();
        int64_t d = 0;
        for (; d + WIDE <= a.head_dim; d += WIDE) {
            if (first) ahead.template fetch<K * WIDE * sizeof(T)>();
            dot_step<R, K>(query + d, key, d, WIDE, acc);
        }
        if (d < a.head_dim) dot_step<R, K>(query + d, key, d, a.head_dim - d, acc);
        shared = ahead;
        float sums[ACCUMULATORS];
#pragma GCC unroll 4
        for (int i = 0; i < ACCUMULATORS; i += W) store(sums + i, transpose_sum(acc + i));
        for (int row = 0; row < R; row++)
            memcpy(scores + (r + row) * DECODE_KEYS + j, sums + row * K, K * sizeof(float));
    }

    template <int R, int K>
    FA_INLINE_MEMBER void dot_step(const Stored* query, const T* const* key, int64_t d, int64_t n, vf* acc) {
        typename Units::Vector k[K];
#pragma GCC unroll 16
        for (int i = 0; i < K; i++) k[i] = Units::load_row(key[i] + d, n);
#pragma GCC unroll 16
        for (int row = 0; row < R; row++) {
            const typename Units::Vector x = Units::load_query(query + row * q_stride);
#pragma GCC unroll 16
            for (int i = 0; i < K; i++) acc[row * K + i] = Units::dot(x, k[i], acc[row * K + i]);
        }
    }

    // out += probabilities . values for rows [r0, r0 + n) and values [j, j + count) of this step.
    void weighted_values(int64_t r0, int64_t n, int64_t offset, int64_t j, int64_t count, Ahead<T>& ahead) {
        row_blocks(r0, n, [&](auto block, int64_t r) {
            constexpr int V = block.rows == 1 ? 8 : 4;
            int64_t c = 0;
            for (; c + V * W <= a.v_head_dim; c += V * W)
                value_block<V>(block, r, offset, c, j, count, r == r0, ahead);
            if (V > 4 && c + 4 * W <= a.v_head_dim) {
                value_block<4>(block, r, offset, c, j, count, r == r0, ahead);
                c += 4 * W;
            }
            for (; c < a.v_head_dim; c += COLUMNS)
                value_block<COLUMNS / W>(block, r, offset, c, j, count, r == r0, ahead);
        });
    }

    // V vectors of columns from c on, of rows [r, r + R).
    template <int V, int R>
    void value_block(RowBlock<R>, int64_t r, int64_t offset, int64_t c, int64_t j, int64_t count, bool first,
                     Ahead<T>& shared) {
        Ahead<T> ahead = shared;
        vf acc[R][V];
#pragma GCC unroll 8
        for (int row = 0; row < R; row++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[row][v] = zero();
        Values<Units>::template add<R, V>(probabilities + r * DECODE_KEYS + j, v_rows + j, offset + c, count,
                                          a.v_head_dim - c, acc,
                                          [&] {
                                              if (first) ahead.template fetch<V * W * sizeof(T)>();
                                          });
        shared = ahead;
        const int64_t stride = out_stride;
        float* to = out + r * stride + c;
#pragma GCC unroll 8
        for (int row = 0; row < R; row++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                float* at = to + row * stride + v * W;
                store(at, load(at) + acc[row][v]);
            }
    }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
