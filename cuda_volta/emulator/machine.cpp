#include "machine.hpp"

#include <cstdio>
#include <cstring>
#include <new>

extern "C" void volta_invoke(const void* params);

namespace volta::emulator {

namespace {

thread_local Machine* machine = nullptr;

std::string hex(u64 value) {
    char text[24];
    std::snprintf(text, sizeof(text), "0x%llx", value);
    return text;
}

std::string name(Meeting meeting) {
    static const char* const names[] = {"barrier()", "warp_barrier()", "a shuffle",
                                        "a vote",    "an mma",         "the end of the kernel"};
    return names[static_cast<u32>(meeting)];
}

std::string place(Site site) {
    if (!site.file) return "";
    const char* base = std::strrchr(site.file, '/');
    return " at " + std::string(base ? base + 1 : site.file) + ":" + std::to_string(site.line);
}

void thread_main();

}  // namespace

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
        launch.failure = "the host has no memory for a block of " + std::to_string(launch.threads) + " threads";
        return;
    }
    machine = this;
    const u32 blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    while (!launch.failed) {
        const u32 number = launch.next_block++;
        if (number >= blocks) break;
        run_block(number);
    }
    machine = nullptr;
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
        describe("divergence", site,
                 "this lane came to " + name(meeting) + place(site) + ", another one of its warp to " +
                     name(warp.meeting) + place(warp.site) + "; all 32 must meet at the same operation");
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
        describe("barrier divergence", site,
                 "this warp came to " + name(meeting) + place(site) + ", another one of its block to " +
                     name(block_meeting_) + place(block_site_) + "; all must meet at the same barrier");
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

// ------------------------------------------------------------------------------------------------ failures

void Machine::describe_global(u64 address, u32 width, bool stores, const Region& region, Site site) {
    const std::string what = (stores ? "stores " : "loads ") + std::to_string(width) + " bytes at global " + hex(address);
    const u64 size = region.end - region.begin;
    if (address % width)
        describe("misaligned access", site, what);
    else if (size == 0)
        describe("global memory out of bounds", site, what + ", which is in no tensor that the launch may touch so");
    else
        describe("global memory out of bounds", site,
                 what + ", which runs over the end of " + std::to_string(size) + " bytes at " + hex(region.begin));
}

void Machine::describe_race(u64 address, u32 width, bool stores, const Collision& collision, Site site) {
    const std::string what = (stores ? "stores " : "loads ") + std::to_string(width) + " bytes at global " + hex(address);
    const bool elsewhere = collision.other.block != lane().now.block;
    const std::string other = "thread " + std::to_string(collision.other.thread) + " of " +
                              (elsewhere ? "block " + std::to_string(collision.other.block - 1) : "its block");
    describe("race", site,
             what + ", which " + other + (collision.kind == Collision::STORE ? " stored" : " loaded") +
                 (elsewhere ? " without a fence and an atomic in between" : " without a barrier in between"));
}

void Machine::describe_shared(SharedMemory::Finding finding, const char* verb, u32 address, u32 width, Site site) {
    using Verdict = SharedMemory::Verdict;
    const std::string what = std::string(verb) + " " + std::to_string(width) + " bytes at shared " + hex(address);
    const std::string other = "thread " + std::to_string(finding.other);
    switch (finding.verdict) {
        case Verdict::FINE: break;
        case Verdict::MISALIGNED: describe("misaligned access", site, what); break;
        case Verdict::OUT_OF_BOUNDS:
            describe("shared memory out of bounds", site,
                     what + "; the block has [" + hex(SharedMemory::BASE) + ", " +
                         hex(SharedMemory::BASE + launch_->shared_bytes) + ")");
            break;
        case Verdict::UNINITIALISED:
            describe("uninitialised shared memory", site, what + ", which no thread of the block has stored");
            break;
        case Verdict::RACE_WITH_STORE:
            describe("race", site, what + ", which " + other + " stored without a barrier in between");
            break;
        case Verdict::RACE_WITH_LOAD:
            describe("race", site, what + ", which " + other + " loaded without a barrier in between");
            break;
    }
}

// Ends the launch; the first failure is the one that is told.
void Machine::describe(const char* check, Site site, const std::string& what) {
    const std::lock_guard<std::mutex> guard(launch_->mutex);
    if (launch_->failed.exchange(true)) return;
    launch_->failure = std::string(check) + " in block (" + std::to_string(block_[0]) + ", " +
                       std::to_string(block_[1]) + ", " + std::to_string(block_[2]) + "), thread " +
                       std::to_string(thread()) + place(site) + ": " + what;
}

// Leaves the block's fibers where they are, so no frame below may own anything: kernels never do, and the
// machine's own functions describe the failure first.
void Machine::abandon() {
    switch_fiber(lane().fiber, worker_);
    __builtin_unreachable();
}

// ------------------------------------------------------------------------- the machine, as kernels see it

namespace {

void thread_main() {
    fiber_entered(machine->lane_fiber());
    volta_invoke(machine->launch().params);
    machine->exit_thread();
    __builtin_unreachable();
}

}  // namespace

u32 thread_index() { return machine->thread(); }
u32 block_index(int axis) { return machine->block(axis); }
u32 grid_size(int axis) { return machine->launch().grid[axis]; }
const void* shared_load(u32 address, u32 bytes, Site site) { return machine->shared_load(address, bytes, site); }
void shared_store(u32 address, const void* value, u32 bytes, Site site) {
    machine->shared_store(address, value, bytes, site);
}
void global_load(const void* address, u32 bytes, Site site) {
    machine->global(address, bytes, Access::GLOBAL_LOAD, site);
}
void global_store(void* address, u32 bytes, Site site) {
    machine->global(address, bytes, Access::GLOBAL_STORE, site);
}
u32 global_atomic_add(u32* address, u32 value, Site site) {
    machine->global(address, sizeof(u32), Access::ATOMIC, site);
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
void memory_fence() {
    machine->memory_fence();
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void block_barrier(Site site) { machine->block_barrier(site); }
void warp_barrier(Site site) { machine->warp_barrier(site); }
u32 exchange_xor(u32 value, u32 mask, Site site) {
    return machine->exchange(value, machine->thread() ^ mask, site);
}
u32 exchange(u32 value, u32 lane, Site site) { return machine->exchange(value, lane, site); }
bool vote_any(bool value, Site site) { return machine->vote_any(value, site); }
void mma(float (&d)[8], Word2 a, Word2 b, bool b_is_row, Site site) { machine->mma(d, a, b, b_is_row, site); }

}  // namespace volta::emulator
