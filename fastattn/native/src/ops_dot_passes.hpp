// In which passes the blocks of a row of W are read, when every lane of a pass has one scale.
//
// Where groups are runs of whole lanes, a block is one pass. Otherwise (g_idx, cuts inside a group) a lane's
// columns belong to several groups: its block is read several times, each time with the columns of one group
// of each lane, x being zero elsewhere.
#pragma once

#include "ops_decode.hpp"
#include "simd_dot.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int BLOCK_BYTES = 4 * W;

// The group of each 16 columns in turn.
class GroupCursor {
public:
    FA_INLINE_MEMBER explicit GroupCursor(const WeightArgs& w)
        : size_(w.group_size), last_(w.groups - 1), left_(w.group_size - w.group_offset) {}
    FA_INLINE_MEMBER int64_t next() {
        if (left_ == 0) {
            group_ += group_ < last_;  // columns past the end belong to the last group
            left_ = size_;
        }
        left_ -= 16;
        return group_;
    }

private:
    int64_t size_, last_, left_, group_ = 0;
};

// `n` of T from p on, which moves on.
template <class T>
static T* take(uintptr_t& p, int64_t n) {
    T* r = reinterpret_cast<T*>(p);
    p += aligned(size_t(n) * sizeof(T));
    return r;
}

// Columns [begin, end) are of one group.
struct Run {
    int32_t begin, end, group;
};

template <class Codes>
class Passes {
    static constexpr int OPERANDS = Codes::OPERANDS, BYTES = OPERANDS * BLOCK_BYTES;

public:
    // More passes than this would cost more than decoding W to floats.
    static int64_t room(int64_t blocks, bool aligned) { return aligned ? blocks : 2 * blocks + 2; }

    Passes(int64_t blocks, int64_t columns, bool aligned, uintptr_t& p)
        : blocks_(blocks), columns_(columns), aligned_(aligned) {
        const int64_t n = room(blocks, aligned);
        of_block_ = take<int32_t>(p, blocks + 1);
        block_ = take<int32_t>(p, n);
        first_ = take<int32_t>(p, n);
        lanes_ = take<int32_t>(p, n * W);
        masks_ = take<int8_t>(p, aligned ? 0 : n * BYTES);
        runs_ = take<Run>(p, aligned ? 0 : columns);
    }

    // False when there is no room.
    bool plan(const WeightArgs& w) {
        if (!aligned_) find_runs(w);
        count_ = 0;
        int64_t run = 0;
        GroupCursor groups(w);
        for (int64_t b = 0; b < blocks_; b++) {
            of_block_[b] = int32_t(count_);
            if (aligned_)
                add_whole(groups, b);
            else if (!add_all(b, run))
                return false;
        }
        of_block_[blocks_] = int32_t(count_);
        return true;
    }

    int64_t count() const { return count_; }
    int64_t begin_of(int64_t block) const { return of_block_[block]; }
    const int32_t* block() const { return block_; }
    const int32_t* first() const { return first_; }
    const int32_t* lanes() const { return lanes_; }
    const int8_t* mask(int64_t pass, int operand) const {
        return masks_ + pass * BYTES + operand * BLOCK_BYTES;
    }
    const Run* runs() const { return runs_; }
    int64_t run_count() const { return run_count_; }

private:
    static int64_t group_of(const WeightArgs& w, int64_t column) {
        return w.g_idx ? w.g_idx[column] : (column + w.group_offset) / w.group_size;
    }
    void find_runs(const WeightArgs& w) {
        run_count_ = 0;
        for (int64_t c = 0; c < columns_;) {
            const int64_t begin = c, group = group_of(w, c);
            while (++c < columns_ && group_of(w, c) == group) {}
            runs_[run_count_++] = {int32_t(begin), int32_t(c), int32_t(group)};
        }
    }

    void add_whole(GroupCursor& groups, int64_t b) {
        int32_t group[Codes::COLUMNS / 16];
        for (int32_t& g : group) g = int32_t(groups.next());
        block_[count_] = int32_t(b);
        first_[count_] = group[0];
        for (int i = 0; i < W; i++)
            lanes_[count_ * W + i] = group[Codes::column_of_lane(i) / 16] - group[0];
        count_++;
    }

    // Passes until each column of the block has been in one: groups in order, SPREAD of them at a time, one
    // of each lane. `run`: that of the block's first column; moves on to the next block's.
    bool add_all(int64_t b, int64_t& run) {
        constexpr int32_t DONE = INT32_MAX;
        int32_t left[BYTES];  // the group of the column at each byte of the operands
        for (int32_t& g : left) g = DONE;
        const int64_t begin = b * Codes::COLUMNS;
        for (int c = 0; c < Codes::COLUMNS && begin + c < columns_; c++) {
            while (runs_[run].end <= begin + c) run++;
            left[Codes::place(c)] = runs_[run].group;
        }
        for (;;) {
            int32_t lowest[W], base = DONE;
            for (int lane = 0; lane < W; lane++) {
                lowest[lane] = DONE;
                for (int i = 0; i < 4 * OPERANDS; i++) {
                    const int32_t g = left[i / 4 * BLOCK_BYTES + 4 * lane + i % 4];
                    lowest[lane] = g < lowest[lane] ? g : lowest[lane];
                }
                base = lowest[lane] < base ? lowest[lane] : base;
            }
            if (base == DONE) return true;
            if (count_ == room(blocks_, false)) return false;
            int8_t* mask = masks_ + count_ * BYTES;
            block_[count_] = int32_t(b);
            first_[count_] = base;
            for (int lane = 0; lane < W; lane++) {
                const bool within = lowest[lane] != DONE && lowest[lane] - base < SPREAD;
                lanes_[count_ * W + lane] = within ? lowest[lane] - base : 0;
                for (int i = 0; i < 4 * OPERANDS; i++) {
                    const int at = i / 4 * BLOCK_BYTES + 4 * lane + i % 4;
                    const bool taken = within && left[at] == lowest[lane];
                    mask[at] = taken ? -1 : 0;
                    if (taken) left[at] = DONE;
                }
            }
            count_++;
        }
    }

    int64_t blocks_, columns_, count_ = 0, run_count_ = 0;
    bool aligned_;
    int32_t* of_block_;  // [blocks + 1]: the first pass of each block
    int32_t* block_;     // [pass]
    int32_t* first_;     // [pass]: the lowest group
    int32_t* lanes_;     // [pass][W]: the group of each lane, less that
    int8_t* masks_;      // [pass][OPERANDS][BLOCK_BYTES]: -1 where x counts
    Run* runs_;
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
