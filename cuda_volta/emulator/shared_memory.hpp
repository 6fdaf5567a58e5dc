// A block's shared memory with a shadow that knows who touched each half-word last, and when.
//
// Two accesses by different threads are ordered when a block barrier lies between them, or, within one warp,
// a warp barrier. Volta schedules threads independently: shuffles, votes and mma order no memory. Since
// these barriers span the whole block or warp, comparing two epochs decides order exactly.
//
// Most accesses are 16 bytes wide: a chunk of 16 whose half-words have one history keeps it once.
#pragma once

#include <algorithm>
#include <vector>

#include "types.hpp"

namespace volta::emulator {

// Who, and after how many barriers of the launch.
struct Stamp {
    u32 block_epoch = 0;  // 0: never
    u32 warp_epoch = 0;
    u16 thread = 0;
    u16 several = NO;  // of readers: ONE thread, more LANES of its warp, or more WARPS

    enum Several : u16 { NO, LANES, WARPS };

    u32 warp() const { return thread / 32u; }
    // Whether an access stamped `earlier` is ordered before this one.
    bool follows(const Stamp& earlier) const {
        if (earlier.block_epoch != block_epoch) return true;
        if (earlier.several == WARPS) return false;
        if (earlier.warp() != warp()) return false;
        if (earlier.warp_epoch != warp_epoch) return true;
        return earlier.thread == thread && earlier.several == NO;
    }
};

class SharedMemory {
public:
    static constexpr u32 BASE = 1024;  // shared_base() of primitives.hpp
    static constexpr u32 GRAIN = 2;    // bytes that one shadow covers: the narrowest store
    static constexpr u32 CHUNK = 16;   // the widest access

    struct Shadow {
        Stamp writer, reader;
    };
    // What is wrong with an access, if anything; `other` is the thread it collides with.
    enum class Verdict { FINE, MISALIGNED, OUT_OF_BOUNDS, UNINITIALISED, RACE_WITH_STORE, RACE_WITH_LOAD };
    struct Finding {
        Verdict verdict;
        u32 other;
    };

    void resize(u32 bytes) {
        bytes_ = bytes;
        memory_.resize((bytes + CHUNK - 1) / CHUNK);
        shadow_.assign(memory_.size() * CHUNK / GRAIN, Shadow{});
        split_.assign(memory_.size(), false);
    }
    // Forgets what an earlier block stored: its epochs are below `epoch`.
    void start_block(u32 epoch) { first_epoch_ = epoch; }
    u8* at(u32 address) { return reinterpret_cast<u8*>(memory_.data()) + (address - BASE); }

    Finding load(u32 address, u32 width, const Stamp& now) {
        if (const Verdict v = place(address, width); v != Verdict::FINE) return {v, 0};
        const Span span = split(address, width);
        for (u32 i = 0; i < span.count; i++) {
            const Stamp writer = span.first[i].writer;
            if (writer.block_epoch < first_epoch_) return {Verdict::UNINITIALISED, 0};
            if (!now.follows(writer)) return {Verdict::RACE_WITH_STORE, writer.thread};
            Stamp& reader = span.first[i].reader;
            const bool concurrent = !now.follows(reader);
            const bool same_warp = reader.warp() == now.warp() && reader.several != Stamp::WARPS;
            reader = now;
            if (concurrent) reader.several = same_warp ? Stamp::LANES : Stamp::WARPS;
        }
        return {Verdict::FINE, 0};
    }

    Finding store(u32 address, u32 width, const Stamp& now) {
        if (const Verdict v = place(address, width); v != Verdict::FINE) return {v, 0};
        const Span span = split(address, width);
        for (u32 i = 0; i < span.count; i++) {
            Shadow& shadow = span.first[i];
            if (!now.follows(shadow.writer)) return {Verdict::RACE_WITH_STORE, shadow.writer.thread};
            if (!now.follows(shadow.reader)) return {Verdict::RACE_WITH_LOAD, shadow.reader.thread};
            shadow.writer = now;
        }
        if (width == CHUNK) split_[(address - BASE) / CHUNK] = false;
        return {Verdict::FINE, 0};
    }

private:
    struct Span {
        Shadow* first;
        u32 count;
    };
    // The shadows of an access: of its chunk while that has one history, else of its half-words.
    Span split(u32 address, u32 width) {
        const u32 chunk = (address - BASE) / CHUNK;
        Shadow* shadow = &shadow_[chunk * (CHUNK / GRAIN)];
        if (width == CHUNK && !split_[chunk]) return {shadow, 1};
        if (!split_[chunk]) {
            std::fill(shadow + 1, shadow + CHUNK / GRAIN, *shadow);
            split_[chunk] = true;
        }
        return {shadow + (address - BASE) % CHUNK / GRAIN, width / GRAIN};
    }
    Verdict place(u32 address, u32 width) const {
        if (address % width) return Verdict::MISALIGNED;
        if (address < BASE || address - BASE > bytes_ || width > bytes_ - (address - BASE))
            return Verdict::OUT_OF_BOUNDS;
        return Verdict::FINE;
    }

    u32 bytes_ = 0;
    u32 first_epoch_ = 1;
    std::vector<Word4> memory_;
    std::vector<Shadow> shadow_;
    std::vector<u8> split_;
};

}  // namespace volta::emulator
