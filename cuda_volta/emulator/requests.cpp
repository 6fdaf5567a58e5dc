#include "requests.hpp"

#include <algorithm>
#include <cstring>

namespace volta::emulator {

namespace {

// The largest number of different words that one bank has to give to these lanes.
u32 most_words_of_a_bank(const Request& request, u32 lanes) {
    u32 words[32][64];
    u32 count[32] = {};
    u32 most = 0;
    for (; lanes; lanes &= lanes - 1) {
        const u32 lane = static_cast<u32>(__builtin_ctz(lanes));
        const u32 first = static_cast<u32>(request.address[lane] / 4);
        const u32 last = static_cast<u32>((request.address[lane] + request.width - 1) / 4);
        for (u32 word = first; word <= last; word++) {
            u32& n = count[word % 32];
            u32* known = words[word % 32];
            if (std::find(known, known + n, word) != known + n) continue;
            known[n++] = word;
            most = std::max(most, n);
        }
    }
    return most;
}

// Whether no two lanes meet in a bank at all, the usual case and quick to see.
bool in_different_banks(const Request& request, u32 lanes) {
    if (request.width < 4) return false;
    const u32 bank_groups = 128 / request.width;
    u32 taken = 0;
    for (u32 left = lanes; left; left &= left - 1)
        taken |= 1u << (request.address[__builtin_ctz(left)] / request.width % bank_groups);
    return __builtin_popcount(taken) == __builtin_popcount(lanes);
}

}  // namespace

Wavefronts shared_wavefronts(const Request& request) {
    const u32 phases = request.width <= 4 ? 1 : request.width / 4;
    const u32 phase_lanes = 32 / phases;
    Wavefronts result{0, 0};
    for (u32 i = 0; i < phases; i++) {
        const u32 lanes = request.mask & (0xffffffffu >> (32 - phase_lanes) << (i * phase_lanes));
        if (!lanes) continue;
        result.ideal++;
        result.taken += in_different_banks(request, lanes) ? 1 : most_words_of_a_bank(request, lanes);
    }
    return result;
}

u32 global_sectors(const Request& request) {
    u64 sectors[32];
    u32 n = 0;
    for (u32 lane = 0; lane < 32; lane++) {
        if (!(request.mask >> lane & 1)) continue;
        const u64 sector = request.address[lane] / 32;  // accesses are aligned: none spans two
        if (n && sectors[n - 1] == sector) continue;
        if (std::find(sectors, sectors + n, sector) == sectors + n) sectors[n++] = sector;
    }
    return n;
}

u32 Counters::index(Site site, Access access) {
    const size_t size = table_.size();
    size_t slot =
        (reinterpret_cast<size_t>(site.file) / 8 + site.line * 8u + static_cast<u32>(access)) % size;
    for (; table_[slot]; slot = (slot + 1) % size) {
        const LineCounts& known = lines_[table_[slot] - 1];
        if (known.line == site.line && known.file == site.file && known.access == access)
            return table_[slot] - 1;
    }
    lines_.push_back(LineCounts{site.file, site.line, access, 0, 0, 0, 0, 0});
    table_[slot] = static_cast<u32>(lines_.size());
    if (lines_.size() * 2 > size) {
        table_.assign(size * 2, 0);
        const std::vector<LineCounts> known = std::move(lines_);
        lines_.clear();
        for (const LineCounts& counts : known)
            lines_[index({counts.file, counts.line}, counts.access)] = counts;
    }
    return static_cast<u32>(lines_.size() - 1);
}

void Counters::count(const Request& request) {
    LineCounts& counts = lines_[request.counter];
    counts.requests++;
    counts.bytes += static_cast<u64>(__builtin_popcount(request.mask)) * request.width;
    if (counts.access == Access::SHARED_LOAD || counts.access == Access::SHARED_STORE) {
        const Wavefronts w = shared_wavefronts(request);
        counts.wavefronts += w.taken;
        counts.ideal += w.ideal;
    } else {
        counts.sectors += global_sectors(request);
    }
}

void Counters::add_to(std::vector<LineCounts>& total) const {
    for (const LineCounts& counts : lines_) {
        const auto same = [&](const LineCounts& t) {
            return t.line == counts.line && t.access == counts.access &&
                   std::strcmp(t.file, counts.file) == 0;
        };
        auto known = std::find_if(total.begin(), total.end(), same);
        if (known == total.end()) {
            total.push_back(counts);
            continue;
        }
        known->requests += counts.requests;
        known->bytes += counts.bytes;
        known->wavefronts += counts.wavefronts;
        known->ideal += counts.ideal;
        known->sectors += counts.sectors;
    }
}

void Counters::clear() {
    lines_.clear();
    std::fill(table_.begin(), table_.end(), 0);
}

void Gatherer::add_apart(u32 lane, Site site, Access access, u64 address, u32 width, Counters& counters) {
    constexpr u32 HORIZON = 256;  // requests looked at: bounds the work where lanes run far apart
    for (u32 i = cursor_[lane] + 1; i < std::min(used_, cursor_[lane] + HORIZON); i++) {
        if (!fits(i, lane, site, access, width)) continue;
        join(i, lane, address);
        cursor_[lane] = i + 1;
        return;
    }
    const bool at_end = cursor_[lane] == used_;
    if (used_ == requests_.size()) {
        requests_.emplace_back();
        keys_.emplace_back();
    }
    keys_[used_] = Key{site, access};
    requests_[used_].counter = counters.index(site, access);
    requests_[used_].mask = 0;
    requests_[used_].width = width;
    join(used_, lane, address);
    used_++;
    if (at_end) cursor_[lane] = used_;
}

void Gatherer::flush(Counters& counters) {
    for (u32 i = 0; i < used_; i++) counters.count(requests_[i]);
    clear();
}

void Gatherer::clear() {
    used_ = 0;
    std::memset(cursor_, 0, sizeof(cursor_));
}

}  // namespace volta::emulator
