// Few queries: every key and value is read once, straight from the cache, and converted in registers.
//
// The bound is memory bandwidth. Hardware prefetchers lose track of rows that are taken several at a time, so
// the next step's rows are prefetched into the second-level cache in the order in which they lie in memory,
// evenly spread over this step's work: measured, twice the bandwidth of no prefetching. Where the heads of a
// cache row lie together one item takes several of them, so that memory is read in whole rows.
#pragma once

#include "attention_pack.hpp"
#include "attention_result.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int DECODE_KEYS = 64;            // of a step, at most
constexpr int64_t STEP_BYTES = 128 << 10;  // of a step's keys and values, unless fewer than W keys
constexpr int ACCUMULATORS = REGISTERS == 32 ? 16 : 8;  // vectors of the products below
constexpr int MAX_BLOCK = ACCUMULATORS / 4;             // rows that go over a key or value together

// Rows still to be prefetched, at a steady rate.
template <class T>
struct Ahead {
    const T* const* rows;
    int64_t bytes;  // of a row
    int64_t at, end;
    int64_t credit = 0, rate;  // in 1/256 rows, a key

    Ahead(const T* const* all, int64_t row_bytes, int64_t first, int64_t past, int64_t keys)
        : rows(all), bytes(row_bytes), at(first), end(past), rate((256 * (past - first) + keys - 1) / keys) {}

    FA_INLINE_MEMBER void step(int64_t keys) {
        for (credit += rate * keys; credit >= 256 && at < end; credit -= 256) fetch(rows[at++]);
    }
    FA_INLINE_MEMBER void rest() {
        while (at < end) fetch(rows[at++]);
    }

private:
    FA_INLINE_MEMBER void fetch(const T* row) const {
        const char* p = reinterpret_cast<const char*>(row);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
    }
};

// Weighted sums of value rows. Columns accumulate in an order that suits the instructions: restore() puts
// STEP * W of them back.
template <class Units>
struct Values;

template <>
struct Values<FloatUnits> {
    static constexpr int COLUMNS = W;
    FA_INLINE void restore(float*) {}

    // acc[r][v] += sum over keys j of p[r][j] * columns of rows[j]; `each` runs once a key.
    template <int R, int V, class T, class Each>
    FA_INLINE void add(const float* p, const T* const* rows, int64_t c, int64_t n, int64_t columns,
                       vf (&acc)[R][V], const Each& each) {
        for (int64_t j = 0; j < n; j++) {
            each();
            vf x[V];
            const T* from = rows[j] + c;
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) x[v] = FloatUnits::load_row(from + v * W, V > 1 ? W : columns);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vf weight = set1(p[r * DECODE_KEYS + j]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) acc[r][v] = fma(weight, x[v], acc[r][v]);
            }
        }
    }
};

#if defined(__AVX512BF16__)
// Pairs of rows are interleaved within 128-bit lanes: of 32 columns, the first vector accumulates
// 0-3, 8-11, 16-19, 24-27 and the second one the others.
template <>
struct Values<Bf16Units> {
    static constexpr int COLUMNS = 2 * W;
    FA_INLINE void restore(float* p) {
        float t[2 * W];
        memcpy(t, p, sizeof(t));
        for (int i = 0; i < 4; i++) {
            memcpy(p + 8 * i, t + 4 * i, 16);
            memcpy(p + 8 * i + 4, t + W + 4 * i, 16);
        }
    }

    template <int R, int V, class Each>
    FA_INLINE void add(const bf16* p, const bf16* const* rows, int64_t c, int64_t n, int64_t columns,
                       vf (&acc)[R][V], const Each& each) {
        for (int64_t j = 0; j < n; j += 2) {
            each();
            each();
            __m512i x[V];
#pragma GCC unroll 4
            for (int v = 0; v < V / 2; v++) {
                const int64_t here = V > 2 ? 2 * W : columns;
                const __m512i even = Bf16Units::load_row(rows[j] + c + v * 2 * W, here);
                const __m512i odd = j + 1 < n ? Bf16Units::load_row(rows[j + 1] + c + v * 2 * W, here)
                                              : _mm512_setzero_si512();
                x[2 * v] = _mm512_unpacklo_epi16(even, odd);
                x[2 * v + 1] = _mm512_unpackhi_epi16(even, odd);
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const __m512i weight =
                    Bf16Units::spread(reinterpret_cast<const uint32_t*>(p + r * DECODE_KEYS + j));
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) acc[r][v] = Bf16Units::dot(weight, x[v], acc[r][v]);
            }
        }
    }
};
#endif

template <class Units, class T>
struct Decode {
    using P = typename Units::Probability;
    using Stored = typename Units::Stored;
    static constexpr int WIDE = W * Units::STEP;  // elements of a vector of keys
    static constexpr int COLUMNS = Values<Units>::COLUMNS;

    const AttentionArgs& a;
    int64_t q_stride, out_stride;
    Stored* q;
    float *out, *scores, *alpha;
    P* probabilities;  // the scores' own memory when both are floats
    RowState* state;
    const T **k_rows, **v_rows, **next_k, **next_v;  // rows of the item's first head

    Decode(const AttentionArgs& args, int64_t max_rows, Arena& arena)
        : a(args), q_stride(round_up(args.head_dim, WIDE)), out_stride(round_up(args.v_head_dim, PANEL)) {
        q = arena.take<Stored>(max_rows * q_stride);
        out = arena.take<float>(max_rows * out_stride);
        scores = arena.take<float>(max_rows * DECODE_KEYS);
        probabilities = sizeof(P) == sizeof(float) ? (P*)scores : arena.take<P>(max_rows * DECODE_KEYS);
        alpha = arena.take<float>(max_rows);
        state = arena.take<RowState>(max_rows);
        k_rows = arena.take<const T*>(DECODE_KEYS);
        v_rows = arena.take<const T*>(DECODE_KEYS);
        next_k = arena.take<const T*>(DECODE_KEYS);
        next_v = arena.take<const T*>(DECODE_KEYS);
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

        int64_t count = imin(step, item.keys.hi - item.keys.lo);
        if (count > 0) {
            rows_at(s, kv_first, item.keys.lo, count);
            Ahead<T>(next_k, k_bytes, 0, count, 1).rest();
            Ahead<T>(next_v, v_bytes, 0, count, 1).rest();
        }
        for (int64_t j = item.keys.lo; j < item.keys.hi; j += step) {
            swap(k_rows, next_k);
            swap(v_rows, next_v);
            const int64_t next = imin(step, imax(item.keys.hi - j - step, 0));
            if (next > 0) rows_at(s, kv_first, j + step, next);
            for (int64_t kv = 0; kv < kv_count; kv++) {
                const int64_t lo = next * kv / kv_count, hi = next * (kv + 1) / kv_count;
                Ahead<T> keys(next_k, k_bytes, lo, hi, count), values(next_v, v_bytes, lo, hi, count);
                dot_products(kv * n, n, kv * a.k_head, count, keys);
                keys.rest();
                softmax(s, item, kv_first + kv, kv * n, n, j, count);
                weighted_values(kv * n, n, kv * a.v_head, count, values);
                values.rest();
            }
            count = next;
        }
        for (int64_t r = 0; r < item.rows(); r++) state[r].max *= score_rule(a, kv_first + r / n).unit;
        for (int64_t c = 0; c < item.rows() * out_stride; c += COLUMNS) Values<Units>::restore(out + c);
    }

private:
    static void swap(const T**& x, const T**& y) {
        const T** t = x;
        x = y;
        y = t;
    }

    void rows_at(const Sequence& s, int64_t kv_head, int64_t key, int64_t count) {
        key_rows(a, s, kv_head, key, key + count, next_k);
        value_rows(a, s, kv_head, key, key + count, next_v);
    }

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

    // The rows of one KV head, [r0, r0 + n), from dot products to probabilities.
    void softmax(const Sequence& s, const Item& item, int64_t kv_head, int64_t r0, int64_t n, int64_t key,
                 int64_t count) {
        const ScoreRule rule = score_rule(a, kv_head);
        for (int64_t r = r0; r < r0 + n; r++) {
            const KeyRange range = visible(a, s, item.query(r));
            alpha[r] = softmax_row(a, s, rule, item.head(r), item.query(r), key, 0, round_up(count, W),
                                   imax(range.lo - key, 0), imin(range.hi - key, count),
                                   scores + r * DECODE_KEYS, probabilities + r * DECODE_KEYS, state[r]);
        }
    }

    // scores[r][j] = q[r] . key j for rows [r0, r0 + n) and the keys of this step.
    void dot_products(int64_t r0, int64_t n, int64_t offset, int64_t count, Ahead<T>& ahead) {
        constexpr int FEW = ACCUMULATORS / MAX_BLOCK;  // keys that MAX_BLOCK rows take together
        for (int64_t j = 0; j < count; j += ACCUMULATORS) {
            const int64_t keys = imin(ACCUMULATORS, count - j), end = r0 + n;
            int64_t r = r0;
            for (; r + MAX_BLOCK <= end; r += MAX_BLOCK) {
                for (int64_t i = 0; i < keys; i += FEW) {
                    if (r == r0) ahead.step(FEW);
                    dot_block<MAX_BLOCK>(r, offset, j + i, keys - i);
                }
            }
            if (r == r0) ahead.step(keys);
            if (MAX_BLOCK > 2 && r + 2 <= end) {
                for (int64_t i = 0; i < keys; i += ACCUMULATORS / 2) dot_block<2>(r, offset, j + i, keys - i);
                r += 2;
            }
            if (r < end) dot_block<1>(r, offset, j, keys);
        }
    }

    // Rows [r, r + R) against the next ACCUMULATORS / R keys, of which `left` exist; the last one stands in
    // for those past the end.
    template <int R>
    void dot_block(int64_t r, int64_t offset, int64_t j, int64_t left) {
        constexpr int K = ACCUMULATORS / R;
        const T* key[K];
        for (int i = 0; i < K; i++) key[i] = k_rows[j + imin(i, left - 1)] + offset;
        const Stored* query = q + r * q_stride;
        vf acc[ACCUMULATORS];
#pragma GCC unroll 16
        for (int i = 0; i < ACCUMULATORS; i++) acc[i] = zero();
        int64_t d = 0;
        for (; d + WIDE <= a.head_dim; d += WIDE) dot_step<R, K>(query + d, key, d, WIDE, acc);
        if (d < a.head_dim) dot_step<R, K>(query + d, key, d, a.head_dim - d, acc);
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

    // out = alpha * out + probabilities . values for rows [r0, r0 + n) and the keys of this step.
    void weighted_values(int64_t r0, int64_t n, int64_t offset, int64_t count, Ahead<T>& ahead) {
        int64_t r = r0;
        const int64_t end = r0 + n;
        for (; r + MAX_BLOCK <= end; r += MAX_BLOCK) value_rows_block<MAX_BLOCK, 4>(r, offset, count, ahead);
        if (MAX_BLOCK > 2 && r + 2 <= end) {
            value_rows_block<2, 4>(r, offset, count, ahead);
            r += 2;
        }
        if (r < end) value_rows_block<1, 8>(r, offset, count, ahead);
    }

    template <int R, int V>
    void value_rows_block(int64_t r, int64_t offset, int64_t count, Ahead<T>& ahead) {
        int64_t c = 0;
        for (; c + V * W <= a.v_head_dim; c += V * W) value_block<R, V>(r, offset, c, count, ahead);
        if (V > 4 && c + 4 * W <= a.v_head_dim) {
            value_block<R, 4>(r, offset, c, count, ahead);
            c += 4 * W;
        }
        for (; c < a.v_head_dim; c += COLUMNS) value_block<R, COLUMNS / W>(r, offset, c, count, ahead);
    }

    // V vectors of columns from c on, of rows [r, r + R).
    template <int R, int V>
    void value_block(int64_t r, int64_t offset, int64_t c, int64_t count, Ahead<T>& ahead) {
        vf acc[R][V];
        float* to = out + r * out_stride + c;
#pragma GCC unroll 8
        for (int row = 0; row < R; row++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[row][v] = zero();
        Values<Units>::template add<R, V>(probabilities + r * DECODE_KEYS, v_rows, offset + c, count,
                                          a.v_head_dim - c, acc, [&] { ahead.step(1); });
#pragma GCC unroll 8
        for (int row = 0; row < R; row++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                float* at = to + row * out_stride + v * W;
                store(at, fma(load(at), set1(alpha[r + row]), acc[row][v]));
            }
    }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
