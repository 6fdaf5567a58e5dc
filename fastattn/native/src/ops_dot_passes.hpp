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
        GroupCursor groups(w);
        for (int64_t b = 0; b < blocks_; b++) {
            of_block_[b] = int32_t(count_);
            if (aligned_)
                add_whole(groups, b);
            else if (!add_all(w, b))
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
    // Plain loops over arrays here and below: compilers make vectors of them, and a call plans anew.
    static bool all_equal(const int32_t* g, int32_t group) {
        int32_t differ = 0;
        for (int i = 0; i < 16; i++) differ |= g[i] ^ group;
        return !differ;
    }
    void find_runs(const WeightArgs& w) {
        run_count_ = 0;
        for (int64_t c = 0; c < columns_;) {
            const int64_t begin = c, group = group_of(w, c++);
            while (w.g_idx && c + 16 <= columns_ && all_equal(w.g_idx + c, int32_t(group))) c += 16;
            while (c < columns_ && group_of(w, c) == group) c++;
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
    // of each lane.
    bool add_all(const WeightArgs& w, int64_t b) {
        constexpr int32_t DONE = INT32_MAX;
        int32_t left[4 * OPERANDS][W];  // the group of the column at each byte of each lane
        for (auto& lanes : left)
            for (int32_t& g : lanes) g = DONE;
        const int64_t begin = b * Codes::COLUMNS;
        for (int c = 0; c < Codes::COLUMNS && begin + c < columns_; c += 16) {  // 16 bytes, side by side
            const int at = Codes::place(c), n = columns_ - begin - c < 16 ? int(columns_ - begin - c) : 16;
            int32_t(*lanes)[W] = left + at / BLOCK_BYTES * 4;
            for (int i = 0; i < n; i++)
                lanes[i % 4][at % BLOCK_BYTES / 4 + i / 4] = int32_t(group_of(w, begin + c + i));
        }
        for (;;) {
            int32_t lowest[W], base = DONE;
            for (int lane = 0; lane < W; lane++) lowest[lane] = left[0][lane];
            for (int k = 1; k < 4 * OPERANDS; k++)
                for (int lane = 0; lane < W; lane++)
                    lowest[lane] = left[k][lane] < lowest[lane] ? left[k][lane] : lowest[lane];
            for (int lane = 0; lane < W; lane++) base = lowest[lane] < base ? lowest[lane] : base;
            if (base == DONE) return true;
            if (count_ == room(blocks_, false)) return false;
            block_[count_] = int32_t(b);
            first_[count_] = base;
            for (int lane = 0; lane < W; lane++) {
                const bool within = lowest[lane] - base < SPREAD;
                lanes_[count_ * W + lane] = within ? lowest[lane] - base : 0;
                lowest[lane] = within ? lowest[lane] : -1;  // no column's group
            }
            for (int operand = 0; operand < OPERANDS; operand++) {
                uint32_t mask[W] = {};
                for (int i = 0; i < 4; i++)
                    for (int lane = 0; lane < W; lane++) {
                        int32_t& g = left[4 * operand + i][lane];
                        const bool taken = g == lowest[lane];
                        mask[lane] |= taken ? 0xffu << byte_shift(i) : 0;
                        g = taken ? DONE : g;
                    }
                memcpy(masks_ + count_ * BYTES + operand * BLOCK_BYTES, mask, BLOCK_BYTES);
            }
            count_++;
        }
    }
    // Of byte i in memory.
    static constexpr int byte_shift(int i) {
        return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 8 * i : 24 - 8 * i;
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
