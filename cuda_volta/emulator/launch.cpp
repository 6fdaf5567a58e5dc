// The C interface that kernel.py calls: one launch at a time of the one kernel in this library.
#include <algorithm>
#include <new>
#include <system_error>
#include <thread>

#include "machine.hpp"

namespace volta::emulator {

namespace {

#define VOLTA_EXPORT extern "C" __attribute__((visibility("default")))

// Layout known to kernel.py.
struct LaunchArguments {
    const void* params;
    const Region* readable;
    const Region* writable;
    u32 readable_count, writable_count;
    u32 grid[3];
    u32 threads;
    u32 shared_bytes;
    u32 workers;
    u32 blocks_may_collide;
};

std::mutex launching;
std::vector<std::unique_ptr<Machine>> machines;
std::string failure;
std::vector<LineCounts> lines;
WarpCounts warp_counts;

// Runs all blocks of the launch on as many workers, this thread among them.
void run(Launch& launch, u32 workers) {
    while (machines.size() < workers) machines.push_back(std::make_unique<Machine>());
    std::vector<std::thread> threads;
    try {
        for (u32 i = 1; i < workers; i++) threads.emplace_back([&launch, i] { machines[i]->work(launch); });
    } catch (const std::system_error&) {  // the host has no more threads: those that run do the work
    }
    machines[0]->work(launch);
    for (std::thread& thread : threads) thread.join();
    lines.clear();
    warp_counts = WarpCounts{};
    for (u32 i = 0; i <= threads.size(); i++) {
        machines[i]->counters().add_to(lines);
        warp_counts += machines[i]->warp_counts();
    }
}

}  // namespace

// Zero, or one with the reason in volta_failure(). The counts are those of this launch, complete only when it
// succeeded.
VOLTA_EXPORT int volta_launch(const LaunchArguments* arguments) {
    const std::lock_guard<std::mutex> guard(launching);
    Launch launch;
    std::copy(arguments->grid, arguments->grid + 3, launch.grid);
    launch.threads = arguments->threads;
    launch.shared_bytes = arguments->shared_bytes;
    launch.params = arguments->params;
    const u32 blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
    try {
        GlobalMemory memory(arguments->readable, arguments->readable_count, arguments->writable,
                            arguments->writable_count, blocks, arguments->blocks_may_collide);
        launch.memory = &memory;
        run(launch, std::max(1u, std::min(arguments->workers, blocks)));
    } catch (const std::bad_alloc&) {
        launch.failed = true;
        launch.failure = "the host has no memory to follow the launch's tensors";
    }
    // Each stack is two mappings, and every kernel is a library of its own: kept, they would use up what Linux
    // allows a process.
    machines.clear();
    failure = launch.failure;
    return launch.failed;
}

VOLTA_EXPORT const char* volta_failure() { return failure.c_str(); }
VOLTA_EXPORT const WarpCounts* volta_warp_counts() { return &warp_counts; }
VOLTA_EXPORT const LineCounts* volta_lines(size_t* count) {
    *count = lines.size();
    return lines.data();
}

}  // namespace volta::emulator
