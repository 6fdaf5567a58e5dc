#include "global_memory.hpp"

#include <algorithm>

namespace volta::emulator {

GlobalMemory::GlobalMemory(const Region* readable, u32 readable_count, const Region* writable,
                           u32 writable_count, u32 blocks, bool blocks_may_collide)
    : readable_(readable, readable + readable_count),
      writable_(writable_count),
      fences_(new std::atomic<u32>[blocks]()),
      blocks_may_collide_(blocks_may_collide) {
    for (u32 i = 0; i < writable_count; i++) {
        writable_[i].region = writable[i];
        writable_[i].shadow.reset(writable[i].end - writable[i].begin + Shadow::CHUNK);
    }
}

Region GlobalMemory::region(u64 address, bool store) const {
    if (store) {
        for (const Tracked& tracked : writable_)
            if (tracked.region.holds(address)) return tracked.region;
    } else {
        for (const Region& region : readable_)
            if (region.holds(address)) return region;
    }
    return Region{0, 0};
}

Collision GlobalMemory::access(u64 address, u32 width, bool store, Stamp now, bool acquired) {
    const auto tracked = std::find_if(writable_.begin(), writable_.end(),
                                      [&](const Tracked& t) { return t.region.holds(address); });
    if (tracked == writable_.end()) return {Collision::NONE, {}};
    now.fences = fences(now.block);
    const auto ordered = [&](const Stamp& earlier) {
        if (earlier.block == now.block) return now.follows(earlier);
        if (earlier.block == 0 || blocks_may_collide_) return true;
        return acquired && earlier.several != Stamp::BLOCKS && earlier.fences < fences(earlier.block);
    };
    // Chunks of the shadow are aligned as addresses are.
    const u64 offset = address - tracked->region.begin / Shadow::CHUNK * Shadow::CHUNK;
    const std::lock_guard<std::mutex> guard(mutex_);
    return store ? tracked->shadow.store(offset, width, now, ordered)
                 : tracked->shadow.load(offset, width, now, ordered);
}

}  // namespace volta::emulator
