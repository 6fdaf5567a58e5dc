// The instruction cache of a sub-core and the port through which all four fill theirs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "engine.hpp"

namespace volta::sass {

constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

// The next level's side: one line every fetch_interval cycles for the whole SM.
struct FetchPort {
    std::int64_t free = 0;
    std::int64_t lines = 0;  // given out
    std::uint64_t random = 1;
};

class InstructionCache {
public:
    void prepare(const Machine& m, int instructions) {
        const int lines = m.l0_lines ? instructions / m.line_instructions + 2 + m.prefetch_lines : 0;
        ready.assign(lines, never);
        used.assign(lines, -1);
    }

    // When the line of an instruction is here; asks for it and for those after it.
    std::int64_t fetch(const Machine& m, FetchPort& port, std::int64_t now, std::int32_t index) {
        if (!m.l0_lines) return now;
        const int line = index / m.line_instructions;
        used[line] = now;
        for (int n = 0; n <= m.prefetch_lines; ++n)
            if (ready[line + n] == never) ask(m, port, now, line + n);
        return ready[line];
    }

private:
    void ask(const Machine& m, FetchPort& port, std::int64_t now, int line) {
        if (held == m.l0_lines)
            ready[victim(m, port, now)] = never;
        else
            ++held;
        port.free = std::max(port.free, now) + m.fetch_interval;
        ready[line] = std::max(now + m.fetch_latency, port.free);
        used[line] = now;
        ++port.lines;
    }

    // The line to give up: the one used longest ago, or any but those used in this very cycle.
    int victim(const Machine& m, FetchPort& port, std::int64_t now) const {
        const int lines = static_cast<int>(ready.size());
        while (m.random_replacement) {
            port.random = port.random * 6364136223846793005u + 1442695040888963407u;
            const int line = static_cast<int>((port.random >> 33) % lines);
            if (ready[line] != never && used[line] != now) return line;
        }
        int found = -1;
        for (int line = 0; line < lines; ++line)
            if (ready[line] != never && (found < 0 || used[line] < used[found])) found = line;
        return found;
    }

    std::vector<std::int64_t> ready, used;  // by line: when it is here (never: it is not), when it was used
    int held = 0;
};

}  // namespace volta::sass
