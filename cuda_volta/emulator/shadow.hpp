// Who touched each piece of a memory last, and when: what races are found with.
//
// Two accesses by different threads of a block are ordered when a block barrier lies between them, or, within
// one warp, a warp barrier. Volta schedules threads independently: shuffles, votes and mma order no memory.
// Since these barriers span the whole block or warp, comparing two epochs decides order exactly.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "types.hpp"

namespace volta::emulator {

// An access: which block, after how many barriers of its worker, by which thread.
struct Stamp {
    enum Several : u32 { ONE, LANES, WARPS, BLOCKS };

    u32 block = 0;  // 1 + its number in the grid; 0: never
    u32 block_epoch = 0;
    u32 warp_epoch = 0;
    u32 thread : 10;
    u32 several : 2;  // of readers without order: more lanes of the warp, warps of the block, or blocks
    u32 fences : 20;  // that the block had run

    Stamp() : thread(0), several(ONE), fences(0) {}
    u32 warp() const { return thread / 32; }
    // Whether an access of the same block, stamped `earlier`, is ordered before this one.
    bool follows(const Stamp& earlier) const {
        if (earlier.block_epoch != block_epoch) return true;
        if (earlier.several >= WARPS || earlier.warp() != warp()) return false;
        if (earlier.warp_epoch != warp_epoch) return true;
        return earlier.thread == thread && earlier.several == ONE;
    }
};

// What an access collides with.
struct Collision {
    enum Kind : u32 { NONE, STORE, LOAD } kind;
    Stamp other;
};

// Stamps of a memory in half-words, the narrowest access that is followed; a chunk of 16 bytes, the widest
// access, keeps one history until its half-words differ. `ordered(earlier)` says whether an access came
// before the one that is checked; ordered(Stamp{}) must hold.
class Shadow {
public:
    static constexpr u64 GRAIN = 2, CHUNK = 16;

    struct History {
        Stamp writer, reader;
    };

    // All of `bytes` untouched; pages of the host are taken as they are used.
    void reset(u64 bytes) {
        const u64 chunks = (bytes + CHUNK - 1) / CHUNK;
        chunks_.reset(static_cast<Chunk*>(std::calloc(chunks ? chunks : 1, sizeof(Chunk))));
        if (!chunks_) throw std::bad_alloc();
        split_.clear();
    }

    template <class Ordered>
    Collision load(u64 offset, u32 width, const Stamp& now, const Ordered& ordered) {
        const Span span = histories(offset, width);
        for (u32 i = 0; i < span.count; i++) {
            if (!ordered(span.first[i].writer)) return {Collision::STORE, span.first[i].writer};
            Stamp& reader = span.first[i].reader;
            const u32 several = ordered(reader) ? Stamp::ONE : together(reader, now);
            reader = now;
            reader.several = several;
        }
        return {Collision::NONE, {}};
    }

    template <class Ordered>
    Collision store(u64 offset, u32 width, const Stamp& now, const Ordered& ordered) {
        const Span span = histories(offset, width);
        for (u32 i = 0; i < span.count; i++) {
            History& history = span.first[i];
            if (!ordered(history.writer)) return {Collision::STORE, history.writer};
            if (!ordered(history.reader)) return {Collision::LOAD, history.reader};
            history = History{now, Stamp{}};  // what is ordered after a later load is ordered after this
        }
        if (width == CHUNK) join(offset / CHUNK, History{now, Stamp{}});
        return {Collision::NONE, {}};
    }

    // Whether all of an access was stored by this block.
    bool stored_by(u32 block, u64 offset, u32 width) {
        const Span span = histories(offset, width);
        for (u32 i = 0; i < span.count; i++)
            if (span.first[i].writer.block != block) return false;
        return true;
    }

private:
    struct Chunk {
        History whole;
        u32 split;  // 1 + index into split_; 0: one history
    };
    struct Halves {
        History history[CHUNK / GRAIN];
    };
    struct Span {
        History* first;
        u32 count;
    };
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };

    static u32 together(const Stamp& reader, const Stamp& now) {
        if (reader.block != now.block || reader.several == Stamp::BLOCKS) return Stamp::BLOCKS;
        return reader.warp() == now.warp() && reader.several != Stamp::WARPS ? Stamp::LANES : Stamp::WARPS;
    }

    Span histories(u64 offset, u32 width) {
        Chunk& chunk = chunks_[offset / CHUNK];
        if (!chunk.split) {
            if (width == CHUNK) return {&chunk.whole, 1};
            split_.emplace_back();
            for (History& half : split_.back().history) half = chunk.whole;
            chunk.split = static_cast<u32>(split_.size());
        }
        return {split_[chunk.split - 1].history + offset % CHUNK / GRAIN, static_cast<u32>(width / GRAIN)};
    }
    // The halves that it leaves behind in split_ are not used again: few chunks are stored in both widths.
    void join(u64 index, const History& history) { chunks_[index] = Chunk{history, 0}; }

    std::unique_ptr<Chunk[], Free> chunks_;
    std::vector<Halves> split_;
};

}  // namespace volta::emulator
