// Issues the paths of the warps of one SM cycle by cycle, as the control codes of the machine code and the
// resources of the SM allow. Four sub-cores, each with its warps, pipes, queues and instruction cache; shared
// memory, the way to L2 and the second level of the instruction cache serve all of them.
#include "engine.hpp"

#include <algorithm>
#include <array>
#include <deque>
#include <vector>

#include "instruction_cache.hpp"

namespace volta::sass {
namespace {

constexpr int sub_cores = 4, scoreboards = 6, pipes = 8;

struct Warp {
    const std::int32_t* indices = nullptr;
    const std::int16_t* costs = nullptr;
    std::int64_t at = 0, length = 0;
    std::int64_t ready = 0;    // stall count and taken branches
    std::int64_t fetched = 0;  // its next instruction is in the cache near it
    std::int64_t age = 0;
    std::array<std::int32_t, scoreboards> pending{};
    int slot = 0;
    bool waits = false;  // at a barrier
    bool active = false;
};

struct Access {  // in a queue
    int warp;
    std::int64_t age;
    const Instruction* instruction;
    std::int32_t cost;
    std::int64_t arrives;
};

struct Release {
    std::int64_t when, age;
    int warp, scoreboard;
    bool operator<(const Release& other) const { return when > other.when; }
};

struct SubCore {
    std::vector<int> warps;
    std::array<std::int64_t, pipes> free{};  // when each pipe takes its next instruction
    std::deque<Access> mio, global;
    int last = -1;  // the warp that issued last
    bool greedy = false;
    InstructionCache cache;
};

struct Slot {  // of a resident block
    int arrived = 0, alive = 0;
    std::int64_t starts = 0;
};

class Sm {
public:
    Sm(const Machine& machine, const Instruction* code, int instructions, const Paths& paths, int resident,
       const std::int32_t* kinds, int blocks, std::int64_t* finished, Result& result)
        : m(machine), code(code), paths(paths), kinds(kinds), blocks(blocks), finished(finished),
          result(result), slots(resident), warps(resident * paths.warps) {
        for (int w = 0; w < static_cast<int>(warps.size()); ++w) {
            warps[w].slot = w / paths.warps;
            cores[w % sub_cores].warps.push_back(w);
        }
        for (SubCore& core : cores) core.cache.prepare(m, instructions);
        slot_block.resize(slots.size());
    }

    // Returns false where nothing can go on: the paths disagree about their barriers.
    bool run() {
        while (done < blocks) {
            start_blocks();
            release();
            serve_queues();
            bool moved = false;
            for (SubCore& core : cores) moved |= issue(core);
            quiet = moved ? 0 : quiet + 1;
            if (quiet > 1000000) return false;
            ++now;
        }
        result.cycles = now;
        result.fetched_lines = port.lines;
        return true;
    }

private:
    void start_blocks() {
        for (int s = 0; s < static_cast<int>(slots.size()); ++s) {
            Slot& slot = slots[s];
            if (slot.starts > now || slot.alive) continue;
            if (next_block == blocks) {
                slot.starts = never;
                continue;
            }
            slot_block[s] = next_block;
            slot.alive = paths.warps;
            slot.arrived = 0;
            for (int w = 0; w < paths.warps; ++w) {
                Warp& warp = warps[s * paths.warps + w];
                const std::int64_t* bounds = paths.offsets + kinds[next_block] * paths.warps + w;
                warp.indices = paths.indices + bounds[0];
                warp.costs = paths.costs + bounds[0];
                warp.length = bounds[1] - bounds[0];
                warp.at = 0;
                warp.ready = now;
                warp.age = static_cast<std::int64_t>(next_block) * paths.warps + w;
                warp.pending.fill(0);
                warp.waits = false;
                warp.active = true;
                SubCore& core = cores[(s * paths.warps + w) % sub_cores];
                warp.fetched = core.cache.fetch(m, port, now, warp.indices[0]);
            }
            ++next_block;
        }
    }

    void release() {
        while (!releases.empty() && releases.front().when <= now) {
            const Release r = releases.front();
            std::pop_heap(releases.begin(), releases.end());
            releases.pop_back();
            // The warp's place may hold the next block's by now.
            if (warps[r.warp].age == r.age) --warps[r.warp].pending[r.scoreboard];
        }
    }

    void release_at(std::int64_t when, int warp, std::int64_t age, int scoreboard) {
        if (scoreboard < 0) return;
        releases.push_back({when, age, warp, scoreboard});
        std::push_heap(releases.begin(), releases.end());
    }

    // Executes the access at the head of a queue from `start` on: its operands have been read soon after, its
    // result comes with the latency.
    void execute(const Access& access, std::int64_t start, std::int64_t end) {
        release_at(start + m.operand_latency, access.warp, access.age, access.instruction->read_barrier);
        const std::int64_t done = end + access.instruction->latency;
        release_at(done, access.warp, access.age, access.instruction->write_barrier);
    }

    void serve_queues() {
        for (SubCore& core : cores) {  // each sub-core has its own XU
            if (!core.mio.empty() && core.mio.front().instruction->pipe == Pipe::xu) {
                const Access& head = core.mio.front();
                std::int64_t& free = core.free[static_cast<int>(Pipe::xu)];
                if (head.arrives <= now && free <= now) {
                    free = now + head.instruction->busy;
                    execute(head, now, now);
                    core.mio.pop_front();
                }
            }
        }
        if (port_free > now) return;
        for (int n = 0; n < 2 * sub_cores; ++n) {  // in turns: each sub-core's shared and its global queue
            const int turn = (next_turn + n) % (2 * sub_cores);
            SubCore& core = cores[turn % sub_cores];
            std::deque<Access>& queue = turn < sub_cores ? core.mio : core.global;
            if (queue.empty() || queue.front().arrives > now) continue;
            if (queue.front().instruction->pipe == Pipe::xu) continue;
            const Access head = queue.front();
            queue.pop_front();
            next_turn = turn + 1;
            if (head.instruction->pipe == Pipe::global) {
                const int wavefronts = (head.cost + 3) / 4;  // a cycle of L1 carries four sectors
                port_free = now + std::max(m.mio_interval, wavefronts);
                execute(head, now, transfer(head.cost));
            } else {
                const int wavefronts = std::max(1, head.cost);
                port_free = now + std::max(m.mio_interval, wavefronts);
                execute(head, now, now + wavefronts - 1);
            }
            return;
        }
    }

    // When the last of some sectors arrives, on top of the latency: they follow one another on the way from
    // L2, and those that L2 lacks on this SM's share of the memory's bandwidth.
    std::int64_t transfer(std::int32_t sectors) {
        way_free = std::max(way_free, now * 1000) + static_cast<std::int64_t>(sectors) * m.l2_sector;
        missed += static_cast<std::int64_t>(sectors) * m.miss_permille;
        const std::int64_t missing = missed / 1000;
        missed %= 1000;
        if (!missing) return way_free / 1000;
        memory_free = std::max(memory_free, now * 1000) + missing * m.memory_sector;
        return std::max(way_free, memory_free) / 1000 + m.memory_latency;
    }

    bool issue(SubCore& core) {
        Reason why = idle;
        int chosen = -1;
        if (core.greedy && warps[core.last].active && can_issue(core, core.last) == issued) {
            chosen = core.last;
        } else {
            const int count = static_cast<int>(core.warps.size());
            int start = 0;
            if (m.policy == 2)
                for (int n = 0; n < count; ++n)
                    if (core.warps[n] == core.last) start = n + 1;
            for (int n = 0; n < count; ++n) {
                const int w = core.warps[(start + n) % count];
                if (!warps[w].active) continue;
                const Reason reason = can_issue(core, w);
                if (reason != issued) {
                    if (why == idle || warps[w].age < oldest) why = reason, oldest = warps[w].age;
                    continue;
                }
                if (m.policy == 2) {
                    chosen = w;
                    break;
                }
                const bool older = chosen < 0 || warps[w].age < warps[chosen].age;
                if (chosen < 0 || older == (m.policy == 0)) chosen = w;
            }
        }
        if (chosen < 0) {
            ++result.by_reason[why];
            return false;
        }
        ++result.by_reason[issued];
        go(core, chosen);
        return true;
    }

    bool queued(const Instruction& i) const {
        return i.pipe == Pipe::shared || (i.pipe == Pipe::xu && m.xu_blocks_queue);
    }

    Reason can_issue(SubCore& core, int w) const {
        const Warp& warp = warps[w];
        if (warp.waits) return at_barrier;
        const Instruction& i = code[warp.indices[warp.at]];
        for (int s = 0; s < scoreboards; ++s)
            if ((i.wait >> s & 1) && warp.pending[s]) return scoreboard;
        if (i.kind == Kind::depbar && warp.pending[i.depbar_index] > i.depbar_count) return scoreboard;
        if (warp.ready > now) return stalled;
        if (warp.fetched > now) return fetching;
        if (warp.costs[warp.at] < 0) return issued;
        if (queued(i)) return static_cast<int>(core.mio.size()) < m.mio_queue ? issued : queue_full;
        if (i.pipe == Pipe::global)
            return static_cast<int>(core.global.size()) < m.global_queue ? issued : queue_full;
        return core.free[static_cast<int>(i.pipe)] <= now || i.pipe == Pipe::none ? issued : pipe_busy;
    }

    void go(SubCore& core, int w) {
        Warp& warp = warps[w];
        const std::int32_t index = warp.indices[warp.at];
        const Instruction& i = code[index];
        const std::int32_t cost = warp.costs[warp.at];
        core.last = w;
        core.greedy = m.policy != 2 && !i.yields;
        warp.ready = now + std::max(1, i.stall) + i.bank_conflict;
        if (cost >= 0) {
            for (const int barrier : {i.write_barrier, i.read_barrier})
                if (barrier >= 0) ++warp.pending[barrier];
            if (queued(i)) {
                core.mio.push_back({w, warp.age, &i, cost, now + m.queue_latency});
            } else if (i.pipe == Pipe::global) {
                core.global.push_back({w, warp.age, &i, cost, now + m.queue_latency});
            } else {
                const int pipe = static_cast<int>(i.pipe);
                if (i.pipe != Pipe::none) core.free[pipe] = now + i.busy + i.bank_conflict;
                if (i.pipe == Pipe::tensor) result.tensor_busy += i.busy;
                release_at(now + i.latency, w, warp.age, i.write_barrier);
                release_at(now + m.operand_latency, w, warp.age, i.read_barrier);
            }
        }
        if (i.kind == Kind::barrier) arrive(warp);
        ++warp.at;
        if (warp.at == warp.length) {
            leave(warp);
            return;
        }
        const std::int32_t next = warp.indices[warp.at];
        if (next != index + 1) warp.ready += m.branch_latency;
        warp.fetched = core.cache.fetch(m, port, now, next);
    }

    void arrive(Warp& warp) {
        warp.waits = true;
        ++slots[warp.slot].arrived;
        open(warp.slot);
    }

    void open(int s) {
        Slot& slot = slots[s];
        if (!slot.arrived || slot.arrived < slot.alive) return;
        slot.arrived = 0;
        for (int w = s * paths.warps; w < (s + 1) * paths.warps; ++w) {
            if (!warps[w].waits) continue;
            warps[w].waits = false;
            warps[w].ready = std::max(warps[w].ready, now + m.barrier_latency);
        }
    }

    void leave(Warp& warp) {
        warp.active = false;
        Slot& slot = slots[warp.slot];
        if (--slot.alive) {
            open(warp.slot);
            return;
        }
        finished[slot_block[warp.slot]] = now;
        ++done;
        slot.starts = now + m.launch_latency;
    }

    const Machine& m;
    const Instruction* code;
    const Paths& paths;
    const std::int32_t* kinds;
    const int blocks;
    std::int64_t* finished;
    Result& result;

    std::array<SubCore, sub_cores> cores;
    std::vector<Slot> slots;
    std::vector<int> slot_block;
    std::vector<Warp> warps;
    std::vector<Release> releases;
    std::int64_t now = 0, oldest = 0, quiet = 0;
    std::int64_t port_free = 0;
    FetchPort port;
    std::int64_t way_free = 0, memory_free = 0, missed = 0;  // in thousandths
    int next_turn = 0, next_block = 0, done = 0;
};

}  // namespace
}  // namespace volta::sass

extern "C" __attribute__((visibility("default"))) int volta_sass_simulate(
    const volta::sass::Machine* machine, const volta::sass::Instruction* code, int instructions,
    const volta::sass::Paths* paths, int resident, const std::int32_t* kinds, int blocks,
    std::int64_t* finished, volta::sass::Result* result) {
    volta::sass::Sm sm(*machine, code, instructions, *paths, resident, kinds, blocks, finished, *result);
    return sm.run() ? 0 : 1;
}
