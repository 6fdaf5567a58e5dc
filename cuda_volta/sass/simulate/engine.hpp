// The seam of the issue simulator: what Python hands in, all in cycles of the SM's clock.
#pragma once

#include <cstdint>

namespace volta::sass {

enum class Pipe : std::int32_t { none, fma, alu, tensor, fp64, xu, shared, global };
enum class Kind : std::int32_t { plain, barrier, depbar, exit };

// One instruction of a function, as the issue logic sees it; mirrored in engine.py.
struct Instruction {
    Pipe pipe;
    Kind kind;
    std::int32_t busy;     // of its pipe; a memory access takes it from its path
    std::int32_t latency;  // from the start of its execution until its write barrier is released
    std::int32_t stall;
    std::int32_t yields;
    std::int32_t write_barrier;  // -1: none
    std::int32_t read_barrier;
    std::int32_t wait;             // mask of scoreboards
    std::int32_t depbar_index;     // DEPBAR waits until this scoreboard
    std::int32_t depbar_count;     // is at most this
    std::int32_t bank_conflict;    // extra cycles to read its operands
};

// The parameters of an SM; machine.py says where each comes from.
struct Machine {
    std::int32_t policy;           // among ready warps: 0 greedy then oldest, 1 then youngest, 2 in turns
    std::int32_t mio_queue;        // entries of a sub-core's queue before shared memory and the XU
    std::int32_t global_queue;     // entries of a sub-core's queue before the L1 cache
    std::int32_t mio_interval;     // cycles between two accesses that the SM takes from its sub-cores
    std::int32_t queue_latency;    // from issue to the head of an empty queue
    std::int32_t operand_latency;  // from leaving the queue until the read barrier is released
    std::int32_t xu_blocks_queue;  // do XU instructions wait in the MIO queue?
    std::int32_t l2_sector;        // thousandths of a cycle for 32 bytes between this SM and L2
    std::int32_t memory_sector;    // and for 32 bytes of this SM's share of the memory's bandwidth
    std::int32_t memory_latency;   // on top of L2's
    std::int32_t miss_permille;    // of the sectors asked for, what L2 lacks
    std::int32_t barrier_latency;
    std::int32_t branch_latency;   // on top of the stall count, where a branch is taken
    std::int32_t launch_latency;   // from the end of a block to the start of the next in its place
    std::int32_t l0_lines;         // of the instruction cache of a sub-core; 0: everything hits
    std::int32_t random_replacement;  // of its lines; 0: the least recently used goes
    std::int32_t line_instructions;
    std::int32_t fetch_latency;    // from the next level
    std::int32_t fetch_interval;   // cycles between two lines that the next level gives to the SM's sub-cores
    std::int32_t prefetch_lines;   // that follow a missing line
};

// The paths of the warps of each kind of block, one after another.
struct Paths {
    const std::int32_t* indices;
    const std::int16_t* costs;      // -1: skipped; else wavefronts or sectors of a memory access
    const std::int64_t* offsets;    // kinds * warps + 1
    std::int32_t warps;             // of a block
};

// Why a sub-core issued nothing in a cycle, by its oldest warp; the last is the number of issues.
enum Reason { idle, stalled, scoreboard, at_barrier, fetching, pipe_busy, queue_full, issued, reasons };

struct Result {
    std::int64_t cycles;
    std::int64_t by_reason[reasons];
    std::int64_t tensor_busy;
    std::int64_t fetched_lines;
};

}  // namespace volta::sass
