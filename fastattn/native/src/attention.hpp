// The attention call: plans the work, runs it on the threads, merges split sequences.
#pragma once

#include "attention_decode.hpp"
#include "attention_prefill.hpp"

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t DECODE_ROWS = 32;    // at most so many rows (query heads x queries) take the decode path
constexpr int64_t MEMORY_ROWS = 8;     // fewer rows wait for memory, not for arithmetic
constexpr int64_t MIN_SPLIT = 256;     // keys
constexpr int64_t ITEMS_A_THREAD = 4;  // enough to balance unequal items
constexpr double SMALL_CALL = 4e5;     // multiply-adds that one thread does sooner than two can be started

// How one sequence is cut into items: blocks of KV heads and of queries, ranges of keys.
struct Cut {
    bool decode;
    int64_t kv_block, kv_blocks;
    int64_t block, blocks;
    int64_t splits;
    int64_t first_item;     // of the call
    float* parts;           // with splits > 1: [block][kv block][split][row][stride]
    RowState* part_states;  // [block][kv block][split][row]
    int32_t* done;          // [block][kv block]: splits finished

    int64_t groups() const { return blocks * kv_blocks; }
};

struct Plan {
    int threads;
    int64_t block_rows;  // of a prefill item
    int64_t kv_block;    // KV heads of a decode item
    double target;       // cost of an item worth splitting beyond; 0: never split
    int64_t max_prefill_rows, max_decode_rows;
};

// Keys that a block of queries sees, at most.
FA_INLINE int64_t span(const AttentionArgs& a, const Sequence& s, int64_t block) {
    return a.left < 0 || a.right < 0 ? s.k_len : imin(s.k_len, a.left + a.right + block);
}

// Rows times keys.
FA_INLINE double item_cost(const AttentionArgs& a, const Sequence& s, const Cut& c) {
    const int64_t group = a.heads / a.kv_heads;
    return double(c.kv_block) * double(imax(group * c.block, MEMORY_ROWS)) * double(span(a, s, c.block));
}

FA_INLINE Cut cut_sequence(const AttentionArgs& a, const Sequence& s, const Plan& plan) {
    const int64_t group = a.heads / a.kv_heads;
    Cut c = {};
    c.decode = group * s.q_len <= DECODE_ROWS;
    c.kv_block = c.decode ? plan.kv_block : 1;
    c.kv_blocks = ceil_div(a.kv_heads, c.kv_block);
    c.block = c.decode ? s.q_len : imin(s.q_len, round_up(ceil_div(plan.block_rows, group), ROWS));
    c.blocks = s.q_len ? ceil_div(s.q_len, c.block) : 0;
    c.splits = 1;
    if (plan.target > 0.0) {
        const int64_t wanted = int64_t(item_cost(a, s, c) / plan.target + 0.5);
        c.splits = imax(1, imin(wanted, span(a, s, c.block) / MIN_SPLIT));
    }
    return c;
}

// Chooses the largest blocks that still give every thread enough items.
static Plan make_plan(const AttentionArgs& a, int threads) {
    const int64_t group = a.heads / a.kv_heads;
    const bool heads_together = a.k_head <= 2 * a.head_dim && a.v_head <= 2 * a.v_head_dim;
    const int64_t head_bytes = (a.head_dim + a.v_head_dim) * (a.dtype == DType::f32 ? 4 : 2);
    const int64_t most_heads = imax(1, imin(a.kv_heads, STEP_BYTES / (W * imax(head_bytes, 1))));
    Plan plan = {threads, 256, heads_together ? most_heads : 1, 0.0, 0, 0};
    for (;;) {
        double cost = 0.0;
        plan.target = 0.0;
        for (int64_t b = 0; b < a.batch; b++) {
            const Sequence s = sequence(a, b);
            const Cut c = cut_sequence(a, s, plan);
            cost += double(c.groups()) * item_cost(a, s, c);
        }
        if (cost * double(a.head_dim + a.v_head_dim) < SMALL_CALL) plan.threads = 1;
        const int64_t enough = plan.threads * ITEMS_A_THREAD;
        if (plan.threads > 1) plan.target = cost / double(enough);
        int64_t items = 0;
        plan.max_prefill_rows = plan.max_decode_rows = 0;
        for (int64_t b = 0; b < a.batch; b++) {
            const Cut c = cut_sequence(a, sequence(a, b), plan);
            items += c.groups() * c.splits;
            int64_t& most = c.decode ? plan.max_decode_rows : plan.max_prefill_rows;
            most = imax(most, group * c.kv_block * c.block);
        }
        if (plan.threads == 1 || items >= enough || (plan.kv_block == 1 && plan.block_rows <= 64))
            return plan;
        plan.kv_block = ceil_div(plan.kv_block, 2);
        plan.block_rows = imax(64, plan.block_rows / 2);
    }
}

// Cuts every sequence, with its memory from the arena (null base: only measures). Returns the items.
static int64_t cut_all(const AttentionArgs& a, const Plan& plan, Cut* cuts, Arena& arena) {
    const int64_t stride = round_up(a.v_head_dim, W), group = a.heads / a.kv_heads;
    int64_t items = 0;
    for (int64_t b = 0; b < a.batch; b++) {
        Cut c = cut_sequence(a, sequence(a, b), plan);
        c.first_item = items;
        const int64_t parts = c.groups() * c.splits, rows = group * c.kv_block * c.block;
        items += parts;
        if (c.splits > 1) {
            c.parts = arena.take<float>(parts * rows * stride);
            c.part_states = arena.take<RowState>(parts * rows);
            c.done = arena.take<int32_t>(c.groups());
            if (arena.base) memset(c.done, 0, sizeof(int32_t) * c.groups());
        }
        if (cuts) cuts[b] = c;
    }
    return items;
}

template <class Units, class T>
struct Attention {
    const AttentionArgs& a;
    const Cut* cuts;

    // Runs one item on this thread's memory.
    void run(int64_t index, const Plan& plan, char* memory) const {
        int64_t lo = 0, hi = a.batch;  // the last sequence whose first item is not past index
        while (hi - lo > 1) {
            const int64_t middle = (lo + hi) / 2;
            (cuts[middle].first_item <= index ? lo : hi) = middle;
        }
        const Cut& c = cuts[lo];
        const Sequence s = sequence(a, lo);
        index -= c.first_item;
        const int64_t group = a.heads / a.kv_heads, kv_index = index % c.kv_blocks;
        const int64_t split = index / c.kv_blocks % c.splits;
        const int64_t block = c.blocks - 1 - index / (c.kv_blocks * c.splits);  // causal: the longest first
        const int64_t kv_first = kv_index * c.kv_block, kv_count = imin(c.kv_block, a.kv_heads - kv_first);

        Item item = {kv_first * group, kv_count * group, block * c.block, 0, {}};
        item.count = imin(c.block, s.q_len - item.first);
        const KeyRange all = visible(a, s, item.first, item.first + item.count);
        const int64_t keys = imax(0, all.hi - all.lo);
        item.keys = {all.lo + keys * split / c.splits, all.lo + keys * (split + 1) / c.splits};

        Arena arena = {memory};
        if (c.decode) {
            Decode<Units, T> kernel(a, plan.max_decode_rows, arena);
            kernel.run(s, item);
            finish(s, item, c, block * c.kv_blocks + kv_index, split, kernel.accumulator());
        } else {
            Prefill<Units, T> kernel(a, plan.max_prefill_rows, arena);
            kernel.run(s, item);
            finish(s, item, c, block * c.kv_blocks + kv_index, split, kernel.accumulator());
        }
    }

    void finish(const Sequence& s, const Item& item, const Cut& c, int64_t group_index, int64_t split,
                const Accumulator& acc) const {
        if (c.splits == 1) return write_rows<T>(a, s, item, acc);
        const int64_t stride = round_up(a.v_head_dim, W), rows = item.rows();
        const int64_t first_row = group_index * c.splits * (a.heads / a.kv_heads) * c.kv_block * c.block;
        float* parts = c.parts + first_row * stride;
        RowState* states = c.part_states + first_row;
        keep_rows(item, acc, a.v_head_dim, stride, parts + split * rows * stride, states + split * rows);
        // Whoever finishes last has seen all the others' rows.
        if (__atomic_add_fetch(&c.done[group_index], 1, __ATOMIC_ACQ_REL) != c.splits) return;
        merge_parts(rows, c.splits, stride, parts, states);
        write_rows<T>(a, s, item, {parts, ROWS * stride, stride, PANEL, states});
    }
};

template <class Units, class T>
static size_t thread_memory(const AttentionArgs& a, const Plan& plan) {
    Arena prefill = {nullptr}, decode = {nullptr};
    Prefill<Units, T> p(a, plan.max_prefill_rows, prefill);
    Decode<Units, T> d(a, plan.max_decode_rows, decode);
    return prefill.used > decode.used ? prefill.used : decode.used;
}

template <class Units, class T>
static void run_attention(const AttentionArgs& a, const Plan& plan, const Cut* cuts, int64_t items,
                          char* memory) {
    const Attention<Units, T> call = {a, cuts};
    const size_t each = thread_memory<Units, T>(a, plan);
    parallel_for(items, plan.threads,
                 [&](int64_t i, int thread) { call.run(i, plan, memory + thread * each); });
}

#if defined(__AVX512BF16__)
using UnitsOfBf16 = Bf16Units;
#else
using UnitsOfBf16 = FloatUnits;
#endif

static size_t thread_memory(const AttentionArgs& a, const Plan& plan) {
    return a.dtype == DType::f32   ? thread_memory<FloatUnits, float>(a, plan)
           : a.dtype == DType::f16 ? thread_memory<FloatUnits, f16>(a, plan)
                                   : thread_memory<UnitsOfBf16, bf16>(a, plan);
}

static size_t attention_workspace(const AttentionArgs& a, int threads) {
    const Plan plan = make_plan(a, threads);
    Arena arena = {nullptr};
    arena.take<Cut>(a.batch);
    cut_all(a, plan, nullptr, arena);
    return arena.used + thread_memory(a, plan) * plan.threads;
}

static void attention(const AttentionArgs& a, int threads, void* workspace) {
    const Plan plan = make_plan(a, threads);
    Arena arena = {static_cast<char*>(workspace)};
    Cut* cuts = arena.take<Cut>(a.batch);
    const int64_t items = cut_all(a, plan, cuts, arena);
    char* memory = arena.base + arena.used;
    switch (a.dtype) {
        case DType::f32:
            return run_attention<FloatUnits, float>(a, plan, cuts, items, memory);
        case DType::f16:
            return run_attention<FloatUnits, f16>(a, plan, cuts, items, memory);
        default:
            return run_attention<UnitsOfBf16, bf16>(a, plan, cuts, items, memory);
    }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
