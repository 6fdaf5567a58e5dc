// A block's shared memory: bounds, alignment, initialisation and races of every access.
#pragma once

#include <vector>

#include "shadow.hpp"

namespace volta::emulator {

class SharedMemory {
public:
    static constexpr u32 BASE = 1024;  // shared_base() of primitives.hpp

    // What is wrong with an access, if anything; `other` is the thread it collides with.
    enum class Verdict { FINE, MISALIGNED, OUT_OF_BOUNDS, UNINITIALISED, RACE_WITH_STORE, RACE_WITH_LOAD };
    struct Finding {
        Verdict verdict;
        u32 other;
    };

    void reset(u32 bytes) {
        bytes_ = bytes;
        memory_.resize((bytes + sizeof(Word4) - 1) / sizeof(Word4));
        shadow_.reset(bytes);
    }
    u8* at(u32 address) { return reinterpret_cast<u8*>(memory_.data()) + (address - BASE); }

    Finding load(u32 address, u32 width, const Stamp& now) {
        if (const Verdict v = place(address, width); v != Verdict::FINE) return {v, 0};
        if (!shadow_.stored_by(now.block, address - BASE, width)) return {Verdict::UNINITIALISED, 0};
        return finding(shadow_.load(address - BASE, width, now, Order{now}));
    }
    Finding store(u32 address, u32 width, const Stamp& now) {
        if (const Verdict v = place(address, width); v != Verdict::FINE) return {v, 0};
        return finding(shadow_.store(address - BASE, width, now, Order{now}));
    }

private:
    // Blocks that ran here before are over.
    struct Order {
        const Stamp& now;
        bool operator()(const Stamp& earlier) const {
            return earlier.block != now.block || now.follows(earlier);
        }
    };

    static Finding finding(const Collision& collision) {
        if (collision.kind == Collision::NONE) return {Verdict::FINE, 0};
        const bool store = collision.kind == Collision::STORE;
        return {store ? Verdict::RACE_WITH_STORE : Verdict::RACE_WITH_LOAD, collision.other.thread};
    }
    Verdict place(u32 address, u32 width) const {
        if (address % width) return Verdict::MISALIGNED;
        if (address < BASE || address - BASE > bytes_ || width > bytes_ - (address - BASE))
            return Verdict::OUT_OF_BOUNDS;
        return Verdict::FINE;
    }

    u32 bytes_ = 0;
    std::vector<Word4> memory_;
    Shadow shadow_;
};

}  // namespace volta::emulator
