// Many queries at once: blocks of keys and values are packed once for all query heads of a KV head, then
// tiles of ROWS queries go over them: scores, online softmax, weighted values.
#pragma once

#include "attention_pack.hpp"
#include "attention_result.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Units, class T>
struct Prefill {
    using Unit = typename Units::Unit;
    using P = typename Units::Probability;

    const AttentionArgs& a;
    int64_t depth;   // units of a query or key
    int64_t panels;  // of a value
    Unit *q, *k, *v;
    float *out, *scores;
    P* probabilities;  // the scores' own memory when both are floats
    float* alpha;
    RowState* state;
    const T** rows;

    Prefill(const AttentionArgs& args, int64_t max_rows, Arena& arena)
        : a(args), depth(ceil_div(args.head_dim, Units::STEP)), panels(ceil_div(args.v_head_dim, PANEL)) {
        const int64_t padded = round_up(max_rows, ROWS);
        q = arena.take<Unit>(padded * depth);
        k = arena.take<Unit>(KEYS * depth);
        v = arena.take<Unit>(KEYS / Units::STEP * panels * PANEL);
        out = arena.take<float>(padded * panels * PANEL);
        scores = arena.take<float>(ROWS * KEYS);
        probabilities = sizeof(P) == 4 ? (P*)scores : arena.take<P>(ROWS * KEYS);
        alpha = arena.take<float>(ROWS);
        state = arena.take<RowState>(padded);
        rows = arena.take<const T*>(KEYS);
    }

    Accumulator accumulator() const { return {out, ROWS * panels * PANEL, PANEL, ROWS * PANEL, state}; }

    void run(const Sequence& s, const Item& item) {
        const int64_t n = item.rows(), tiles = ceil_div(n, ROWS);
        const int64_t kv_head = item.first_head / (a.heads / a.kv_heads);
        const ScoreRule rule = score_rule(a, kv_head);
        start(s, item, tiles);
        for (int64_t j = item.keys.lo; j < item.keys.hi; j += KEYS) {
            const int64_t count = imin(KEYS, item.keys.hi - j);
            key_rows(a, s, kv_head, j, j + count, rows);
            Packer<Units>::keys(rows, count, a.head_dim, k);
            value_rows(a, s, kv_head, j, j + count, rows);
            Packer<Units>::values(rows, count, a.v_head_dim, v);
            for (int64_t t = 0; t < tiles; t++) tile(s, item, rule, t, j, count);
        }
        for (int64_t r = 0; r < n; r++) state[r].max *= rule.unit;
    }

private:
    void start(const Sequence& s, const Item& item, int64_t tiles) {
        const int64_t n = item.rows();
        const T* base = static_cast<const T*>(a.q) + s.q_offset;
        if (n % ROWS) memset(q + (tiles - 1) * depth * ROWS, 0, sizeof(Unit) * depth * ROWS);
        for (int64_t r = 0; r < n; r++)
            Packer<Units>::query(base + item.query(r) * a.q_seq + item.head(r) * a.q_head, a.head_dim, r, q);
        memset(out, 0, sizeof(float) * tiles * ROWS * panels * PANEL);
        memset((void*)probabilities, 0, sizeof(P) * ROWS * KEYS);
        for (int64_t r = 0; r < n; r++) state[r] = {-INF, 0.0f};
        for (int r = 0; r < ROWS; r++) alpha[r] = 1.0f;
    }

    // ROWS rows against keys [key0, key0 + count), which are packed.
    void tile(const Sequence& s, const Item& item, const ScoreRule& rule, int64_t t, int64_t key0,
              int64_t count) {
        const int64_t first = t * ROWS, n = imin(ROWS, item.rows() - first);
        KeyRange seen[ROWS];
        int64_t lo = count, hi = 0;
        for (int64_t r = 0; r < n; r++) {
            const KeyRange range = visible(a, s, item.query(first + r));
            seen[r] = {imax(range.lo - key0, 0), imin(range.hi - key0, count)};
            if (seen[r].lo >= seen[r].hi) continue;
            lo = imin(lo, seen[r].lo);
            hi = imax(hi, seen[r].hi);
        }
        if (lo >= hi) return;
        const int64_t c0 = lo / W * W, c1 = round_up(hi, W);

        const Unit* qt = q + t * depth * ROWS;
        for (int64_t c = c0; c < c1;) {
            const int64_t end = imin((c / PANEL + 1) * PANEL, c1);
            tile_product<Units, 1, ROWS, KEYS, false>(int((end - c) / W), qt,
                                                      k + c / PANEL * depth * PANEL + c % PANEL, scores + c,
                                                      depth, nullptr);
            c = end;
        }
        for (int64_t r = 0; r < n; r++)
            alpha[r] =
                softmax_row(a, s, rule, item.head(first + r), item.query(first + r), key0, c0, c1, seen[r].lo,
                            seen[r].hi, scores + r * KEYS, probabilities + r * KEYS, state[first + r]);
        const Unit* p = reinterpret_cast<const Unit*>(probabilities) + c0 / Units::STEP;
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t columns = imin(PANEL, a.v_head_dim - panel * PANEL);
            tile_product<Units, KEYS / Units::STEP, 1, PANEL, true>(
                int(ceil_div(columns, W)), p, v + (panel * KEYS + c0) / Units::STEP * PANEL,
                out + (t * panels + panel) * ROWS * PANEL, (c1 - c0) / Units::STEP, alpha);
        }
    }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
