#include "machine.hpp"

#include <cstring>
#include <new>

namespace volta::emulator {

// ------------------------------------------------------------------------------------------------- blocks

void Machine::prepare(Launch& launch) {
    launch_ = &launch;
    const u32 warps = launch.threads / 32;
    if (!stacks_.reserve(launch.threads)) throw std::bad_alloc();
    warps_.resize(warps);
    for (u32 w = 0; w < warps; w++) {
        if (!warps_[w]) warps_[w] = std::make_unique<Warp>();
        Warp& warp = *warps_[w];
        warp.index = w;
        warp.epoch = 0;
        for (u32 i = 0; i < 32; i++) {
            warp.lanes[i].fiber.stack = stacks_.lowest(w * 32 + i);
            warp.lanes[i].fiber.stack_bytes = Stacks::BYTES;
            warp.lanes[i].now.thread = w * 32 + i;
        }
    }
    shared_.reset(launch.shared_bytes);
    block_epoch_ = 0;
    last_read_ = last_written_ = Region{};
    counters_.clear();
    counts_ = WarpCounts{};
}

void Machine::work(Launch& launch) {
    try {
        prepare(launch);
    } catch (const std::bad_alloc&) {
        const std::lock_guard<std::mutex> guard(launch.mutex);
        launch.failed = true;
        launch.failure =
            "the host has no memory for a block of " + std::to_string(launch.threads) + " threads";
        return;
    }
    enter_machine(this);
    const u32 blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    while (!launch.failed) {
        const u32 number = launch.next_block++;
        if (number >= blocks) break;
        run_block(number);
    }
    enter_machine(nullptr);
}

void Machine::run_block(u32 number) {
    block_[0] = number % launch_->grid[0];
    block_[1] = number / launch_->grid[0] % launch_->grid[1];
    block_[2] = number / launch_->grid[0] / launch_->grid[1];
    block_epoch_++;
    acquired_ = false;
    warps_arrived_ = 0;
    for (auto& warp : warps_) {
        warp->arrived = 0;
        warp->running = 0;
        warp->gatherer.clear();
        std::memset(warp->parity, 0, sizeof(warp->parity));
        for (u32 i = 0; i < 32; i++) {
            constexpr size_t COLOURS = 61, COLOUR_BYTES = 320;
            warp->lanes[i].fiber.prepare(thread_main, (warp->index * 32 + i) % COLOURS * COLOUR_BYTES);
            warp->lanes[i].now.block = number + 1;
            warp->lanes[i].now.block_epoch = block_epoch_;
            warp->lanes[i].now.warp_epoch = warp->epoch;
        }
    }
    warp_ = warps_[0].get();
    switch_fiber(worker_, lane().fiber);
}

// ----------------------------------------------------------------------------------------------- meetings

void Machine::switch_lane(u32 from, u32 to) {
    warp_->running = to;
    switch_fiber(warp_->lanes[from].fiber, warp_->lanes[to].fiber);
}

// Waits for all lanes of the warp; true in the one that came last, which runs on first. Lanes run in a
// circle that begins with the one that ended the meeting before, so the next has never arrived yet.
bool Machine::meet(Meeting meeting, Site site) {
    Warp& warp = *warp_;
    if (warp.arrived == 0) {
        warp.meeting = meeting;
        warp.site = site;
    } else if (warp.meeting != meeting || warp.site.line != site.line || warp.site.file != site.file) {
        describe_divergence("divergence", {meeting, site}, {warp.meeting, warp.site},
                            "lane of the warp; all 32 must meet at the same operation");
        abandon();
    }
    if (++warp.arrived < 32) {
        const u32 self = warp.running;
        switch_lane(self, (self + 1) % 32);
        return false;
    }
    warp.arrived = 0;
    warp.gatherer.flush(counters_);
    return true;
}

// For the last lane of each warp: waits for all warps of the block.
void Machine::meet_block(Meeting meeting, Site site) {
    if (warps_arrived_ == 0) {
        block_meeting_ = meeting;
        block_site_ = site;
    } else if (block_meeting_ != meeting || block_site_.line != site.line || block_site_.file != site.file) {
        describe_divergence("barrier divergence", {meeting, site}, {block_meeting_, block_site_},
                            "warp of the block; all must meet at the same barrier");
        abandon();
    }
    if (++warps_arrived_ < warps_.size()) {
        Fiber& self = lane().fiber;
        warp_ = warps_[(warp_->index + 1) % warps_.size()].get();
        switch_fiber(self, lane().fiber);
        return;
    }
    warps_arrived_ = 0;
    if (meeting == Meeting::EXIT) {
        switch_fiber(lane().fiber, worker_);
        return;
    }
    block_epoch_++;
}

void Machine::enter_epoch() {
    Stamp& now = lane().now;
    now.block_epoch = block_epoch_;
    now.warp_epoch = warp_->epoch;
}

void Machine::block_barrier(Site site) {
    if (meet(Meeting::BLOCK_BARRIER, site)) {
        counts_.block_barriers++;
        meet_block(Meeting::BLOCK_BARRIER, site);
        warp_->epoch++;
    }
    enter_epoch();
}

void Machine::warp_barrier(Site site) {
    if (meet(Meeting::WARP_BARRIER, site)) {
        counts_.warp_barriers++;
        warp_->epoch++;
    }
    enter_epoch();
}

void Machine::exit_thread() {
    if (meet(Meeting::EXIT, Site{})) meet_block(Meeting::EXIT, Site{});
}

u32 Machine::exchange(u32 value, u32 source, Site site) {
    Warp& warp = *warp_;
    u32(&row)[32] = warp.values[warp.parity[warp.running] ^= 1];
    row[warp.running] = value;
    if (meet(Meeting::SHUFFLE, site)) counts_.shuffles++;
    return row[source % 32];
}

bool Machine::vote_any(bool value, Site site) {
    Warp& warp = *warp_;
    u32(&row)[32] = warp.values[warp.parity[warp.running] ^= 1];
    row[warp.running] = value;
    if (meet(Meeting::VOTE, site)) counts_.votes++;
    for (const u32 other : row)
        if (other) return true;
    return false;
}

void Machine::mma(float* d, Word2 a, Word2 b, bool b_is_row, Site site) {
    Warp& warp = *warp_;
    warp.mma.d[warp.running] = d;
    warp.mma.a[warp.running] = a;
    warp.mma.b[warp.running] = b;
    if (meet(Meeting::MMA, site)) {
        counts_.mma++;
        mma_m8n8k4(warp.mma, b_is_row);
    }
}

// ------------------------------------------------------------------------------------------------- memory

const void* Machine::shared_load(u32 address, u32 width, Site site) {
    const SharedMemory::Finding finding = shared_.load(address, width, lane().now);
    if (finding.verdict != SharedMemory::Verdict::FINE) {
        describe_shared(finding, "loads", address, width, site);
        abandon();
    }
    warp_->gatherer.add(warp_->running, site, Access::SHARED_LOAD, address, width, counters_);
    return shared_.at(address);
}

void Machine::shared_store(u32 address, const void* value, u32 width, Site site) {
    const SharedMemory::Finding finding = shared_.store(address, width, lane().now);
    if (finding.verdict != SharedMemory::Verdict::FINE) {
        describe_shared(finding, "stores", address, width, site);
        abandon();
    }
    warp_->gatherer.add(warp_->running, site, Access::SHARED_STORE, address, width, counters_);
    std::memcpy(shared_.at(address), value, width);
}

void Machine::global(const void* pointer, u32 width, Access access, Site site) {
    const u64 address = reinterpret_cast<u64>(pointer);
    const bool stores = access != Access::GLOBAL_LOAD;
    Region& last = stores ? last_written_ : last_read_;
    if (!last.holds(address)) last = launch_->memory->region(address, stores);
    if (!last.holds(address) || width > last.end - address || address % width) {
        describe_global(address, width, stores, last, site);
        abandon();
    }
    if (access == Access::ATOMIC) {
        acquired_ = true;
    } else {
        const Collision collision = launch_->memory->access(address, width, stores, lane().now, acquired_);
        if (collision.kind != Collision::NONE) {
            describe_race(address, width, stores, collision, site);
            abandon();
        }
    }
    warp_->gatherer.add(warp_->running, site, access, address, width, counters_);
}

// Leaves the block's fibers where they are, so no frame below may own anything: kernels never do, and the
// machine's own functions describe the failure first.
void Machine::abandon() {
    switch_fiber(lane().fiber, worker_);
    __builtin_unreachable();
}

}  // namespace volta::emulator
