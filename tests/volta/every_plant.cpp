// Every case of planted.cu in a program of its own, for other compilers' flags and processors: prints its
// number and what the emulator found. Buffers are exactly as long as the kernel may use, so that nothing but
// the emulator's own check keeps a planted overrun from a sanitizer.
#include "planted.cu"

#include <cstdio>
#include <memory>
#include <utility>

#include "entry.hpp"

VOLTA_ENTRY(planted)

struct LaunchArguments {
    const void* params;
    const u64* readable;
    const u64* writable;
    u32 readable_count, writable_count;
    u32 grid[3];
    u32 threads;
    u32 shared_bytes;
    u32 workers;
    u32 blocks_may_collide;
};
extern "C" int volta_launch(const LaunchArguments* arguments);
extern "C" const char* volta_failure();

int main() {
    for (u32 plant = 0; plant <= LAST_BLOCK_WITHOUT_FENCE; plant++) {
        const std::unique_ptr<u32[]> in(new u32[64]), out(new u32[5 * 128 + 1]);
        for (u32 i = 0; i < 64; i++) in[i] = 3 * i;
        const Params params{out.get(), in.get(), nullptr, plant, 256};
        const u64 a = reinterpret_cast<u64>(in.get()), b = reinterpret_cast<u64>(out.get());
        u64 spans[4] = {a, a + 256, b, b + 5 * 512 + 4};
        if (b < a) std::swap(spans[0], spans[2]), std::swap(spans[1], spans[3]);
        const u64 written[2] = {b, b + 5 * 512 + 4};
        for (const u32 workers : {1u, 3u}) {
            out[5 * 128] = 0;
            const LaunchArguments arguments{&params, spans, written, 2, 1, {5, 1, 1}, 64, 256, workers, 0};
            const int failed = volta_launch(&arguments);
            if (workers == 1) std::printf("%u %s\n", plant, failed ? volta_failure() : "sound");
        }
    }
    return 0;
}
