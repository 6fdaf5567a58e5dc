// The tensors of a launch: what its blocks may touch, and races between any of their threads.
//
// Blocks are ordered by nothing but what they do themselves: one that stores, then runs memory_fence(), then
// is noticed by another through an atomic. The emulator takes any atomic of the later block after the
// earlier one's fence for that; it does not follow the values.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "shadow.hpp"

namespace volta::emulator {

// Layout known to kernel.py.
struct Region {
    u64 begin, end;

    bool holds(u64 address) const { return address >= begin && address < end; }
};

class GlobalMemory {
public:
    GlobalMemory(const Region* readable, u32 readable_count, const Region* writable, u32 writable_count,
                 u32 blocks, bool blocks_may_collide);

    // The region of an address; empty when there is none. Loads may be anywhere, stores in writable tensors.
    Region region(u64 address, bool store) const;

    // Notes an access that lies in a region of its kind; what it races with, if anything. `acquired`: the
    // block has run an atomic. Only what the launch may store can race.
    Collision access(u64 address, u32 width, bool store, Stamp now, bool acquired);

    // Fences that a block has run: what it stored before the last of them, others may come to know.
    void count_fence(u32 block) { fences_[block - 1]++; }
    u32 fences(u32 block) const { return fences_[block - 1]; }

private:
    struct Tracked {
        Region region;
        Shadow shadow;
    };

    std::vector<Region> readable_;
    std::vector<Tracked> writable_;
    std::unique_ptr<std::atomic<u32>[]> fences_;
    bool blocks_may_collide_;
    std::mutex mutex_;
};

}  // namespace volta::emulator
