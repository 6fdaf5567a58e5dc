// What the machine says of a failed check.
#include <cstdio>
#include <cstring>

#include "machine.hpp"

namespace volta::emulator {

namespace {

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

}  // namespace

// Ends the launch; the first failure is the one that is told.
void Machine::describe(const char* check, Site site, const std::string& what) {
    const std::lock_guard<std::mutex> guard(launch_->mutex);
    if (launch_->failed.exchange(true)) return;
    launch_->failure = std::string(check) + " in block (" + std::to_string(block_[0]) + ", " +
                       std::to_string(block_[1]) + ", " + std::to_string(block_[2]) + "), thread " +
                       std::to_string(thread()) + place(site) + ": " + what;
}

void Machine::describe_divergence(const char* check, Wait mine, Wait other, const char* whose) {
    describe(check, mine.site,
             "came to " + name(mine.meeting) + place(mine.site) + ", but to " + name(other.meeting) +
                 place(other.site) + " came another " + whose);
}

void Machine::describe_global(u64 address, u32 width, bool stores, const Region& region, Site site) {
    const std::string what =
        (stores ? "stores " : "loads ") + std::to_string(width) + " bytes at global " + hex(address);
    const u64 size = region.end - region.begin;
    if (address % width)
        describe("misaligned access", site, what);
    else if (size == 0)
        describe("global memory out of bounds", site,
                 what + ", which is in no tensor that the launch may touch so");
    else
        describe(
            "global memory out of bounds", site,
            what + ", which runs over the end of " + std::to_string(size) + " bytes at " + hex(region.begin));
}

void Machine::describe_race(u64 address, u32 width, bool stores, const Collision& collision, Site site) {
    const std::string what =
        (stores ? "stores " : "loads ") + std::to_string(width) + " bytes at global " + hex(address);
    const bool elsewhere = collision.other.block != lane().now.block;
    const std::string other =
        "thread " + std::to_string(collision.other.thread) + " of " +
        (elsewhere ? "block " + std::to_string(collision.other.block - 1) : "its block");
    describe("race", site,
             what + ", which " + other + (collision.kind == Collision::STORE ? " stored" : " loaded") +
                 (elsewhere ? " without a fence and an atomic in between" : " without a barrier in between"));
}

void Machine::describe_shared(SharedMemory::Finding finding, const char* verb, u32 address, u32 width,
                              Site site) {
    using Verdict = SharedMemory::Verdict;
    const std::string what =
        std::string(verb) + " " + std::to_string(width) + " bytes at shared " + hex(address);
    const std::string other = "thread " + std::to_string(finding.other);
    switch (finding.verdict) {
        case Verdict::FINE:
            break;
        case Verdict::MISALIGNED:
            describe("misaligned access", site, what);
            break;
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

}  // namespace volta::emulator
