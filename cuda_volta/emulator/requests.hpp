// What a warp's loads and stores cost the memory pipes: lanes run one after another here, so the accesses of
// one instruction are gathered first, and counted when the warp meets.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "types.hpp"

namespace volta::emulator {

enum class Access : u32 { SHARED_LOAD, SHARED_STORE, GLOBAL_LOAD, GLOBAL_STORE, ATOMIC };

// Sums over the warp-wide requests of one source line. Layout known to report.py.
struct LineCounts {
    const char* file;
    u32 line;
    Access access;
    u64 requests;
    u64 bytes;       // that the lanes asked for
    u64 wavefronts;  // shared: passes through the 32 banks
    u64 ideal;       // shared: passes without conflicts
    u64 sectors;     // global: 32-byte sectors touched
};

// The accesses of a warp's lanes in one instruction.
struct Request {
    u32 counter;  // index into Counters
    u32 mask;     // lanes present
    u32 width;    // bytes a lane
    u64 address[32];
};

// Shared memory has 32 banks of 4 bytes. A 64-bit request passes in half-warps, a 128-bit one in quarters;
// within a pass, different words of one bank follow one another and equal words are broadcast.
struct Wavefronts {
    u32 taken, ideal;
};
Wavefronts shared_wavefronts(const Request& request);
// Distinct aligned 32-byte pieces of global memory.
u32 global_sectors(const Request& request);

class Counters {
public:
    u32 index(Site site, Access access);
    void count(const Request& request);
    void add_to(std::vector<LineCounts>& total) const;
    void clear();

private:
    std::vector<LineCounts> lines_;
    std::vector<u32> table_ = std::vector<u32>(64, 0);  // open addressing; 1 + index into lines_
};

// The accesses of one warp since it last met, in program order. A lane's next access belongs to the first
// request from its cursor on that has the same line and lacks the lane: lanes that took another branch or
// left a loop early stay apart, the turns of a loop are matched by their order.
class Gatherer {
public:
    void add(u32 lane, Site site, Access access, u64 address, u32 width, Counters& counters) {
        u32& at = cursor_[lane];
        if (at < used_ && fits(at, lane, site, access, width)) {
            join(at, lane, address);
            at++;
            return;
        }
        add_apart(lane, site, access, address, width, counters);
    }
    void flush(Counters& counters);
    void clear();

private:
    struct Key {
        Site site;
        Access access;
    };
    bool fits(u32 i, u32 lane, Site site, Access access, u32 width) const {
        return keys_[i].site.line == site.line && keys_[i].site.file == site.file &&
               keys_[i].access == access && requests_[i].width == width && !(requests_[i].mask >> lane & 1);
    }
    void join(u32 i, u32 lane, u64 address) {
        requests_[i].mask |= 1u << lane;
        requests_[i].address[lane] = address;
    }
    void add_apart(u32 lane, Site site, Access access, u64 address, u32 width, Counters& counters);

    std::vector<Request> requests_;
    std::vector<Key> keys_;
    u32 used_ = 0;
    u32 cursor_[32] = {};
};

}  // namespace volta::emulator
