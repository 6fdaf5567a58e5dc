// One block at a time on one worker: its threads are fibers that run until their warp or block must meet.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "global_memory.hpp"
#include "requests.hpp"
#include "shared_memory.hpp"
#include "tensor_core.hpp"

namespace volta::emulator {

// Operations at which the lanes of a warp wait for one another.
enum class Meeting : u32 { BLOCK_BARRIER, WARP_BARRIER, SHUFFLE, VOTE, MMA, EXIT };

// Sums over all warps. Layout known to report.py.
struct WarpCounts {
    u64 mma = 0, shuffles = 0, votes = 0, warp_barriers = 0, block_barriers = 0;

    WarpCounts& operator+=(const WarpCounts& other) {
        mma += other.mma;
        shuffles += other.shuffles;
        votes += other.votes;
        warp_barriers += other.warp_barriers;
        block_barriers += other.block_barriers;
        return *this;
    }
};

// What all blocks of a launch share.
struct Launch {
    u32 grid[3];
    u32 threads;
    u32 shared_bytes;
    const void* params;
    GlobalMemory* memory;

    std::atomic<u32> next_block{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string failure;  // of the first that failed
};

struct Lane {
    Fiber fiber;
    Stamp now;
};

struct Warp {
    u32 index = 0;
    u32 arrived = 0;  // lanes that wait at the meeting
    Meeting meeting{};
    Site site{};
    u32 epoch = 0;        // warp and block barriers passed
    u32 running = 0;      // the lane that runs, or that continues this warp
    u32 parity[32] = {};  // which of the two rows of `values` the lane uses next
    u32 values[2][32];    // of shuffles: two rows, as a lane may be one meeting ahead of the others
    MmaOperands mma;
    Gatherer gatherer;
    Lane lanes[32];
};

class Machine;

// Of this worker, for the kernels that it runs; primitives.cpp.
void enter_machine(Machine* machine);
// What every fiber runs: the kernel, then the end of the thread.
void thread_main();

class Machine {
public:
    // Runs blocks of the launch until none is left or one failed.
    void work(Launch& launch);
    const Counters& counters() const { return counters_; }
    const WarpCounts& warp_counts() const { return counts_; }

    u32 thread() const { return warp_->index * 32 + warp_->running; }
    u32 block(int axis) const { return block_[axis]; }
    const Launch& launch() const { return *launch_; }

    const void* shared_load(u32 address, u32 width, Site site);
    void shared_store(u32 address, const void* value, u32 width, Site site);
    void global(const void* address, u32 width, Access access, Site site);
    void memory_fence() { launch_->memory->count_fence(lane().now.block); }
    void block_barrier(Site site);
    void warp_barrier(Site site);
    u32 exchange(u32 value, u32 source, Site site);
    bool vote_any(bool value, Site site);
    void mma(float* d, Word2 a, Word2 b, bool b_is_row, Site site);
    void exit_thread();
    Fiber& lane_fiber() { return lane().fiber; }

private:
    void prepare(Launch& launch);
    void run_block(u32 number);
    bool meet(Meeting meeting, Site site);
    void meet_block(Meeting meeting, Site site);
    void switch_lane(u32 from, u32 to);
    void enter_epoch();
    Lane& lane() { return warp_->lanes[warp_->running]; }

    struct Wait {
        Meeting meeting;
        Site site;
    };
    void describe(const char* check, Site site, const std::string& what);
    void describe_divergence(const char* check, Wait mine, Wait other, const char* whose);
    void describe_shared(SharedMemory::Finding finding, const char* verb, u32 address, u32 width, Site site);
    void describe_global(u64 address, u32 width, bool stores, const Region& region, Site site);
    void describe_race(u64 address, u32 width, bool stores, const Collision& collision, Site site);
    [[noreturn]] void abandon();

    Launch* launch_ = nullptr;
    u32 block_[3] = {};
    Stacks stacks_;
    Fiber worker_;
    std::vector<std::unique_ptr<Warp>> warps_;
    Warp* warp_ = nullptr;
    u32 warps_arrived_ = 0;
    Meeting block_meeting_{};
    Site block_site_{};
    u32 block_epoch_ = 0;
    bool acquired_ = false;                // the block has run an atomic
    Region last_read_{}, last_written_{};  // where the access before was
    SharedMemory shared_;
    Counters counters_;
    WarpCounts counts_;
};

}  // namespace volta::emulator
