// The words of the machine, and a place in the kernel's source.
#pragma once

namespace volta {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

// Two or four packed 32-bit words; halves are packed in pairs, the lower index in the lower 16 bits.
struct alignas(8) Word2 {
    u32 x, y;
};
struct alignas(16) Word4 {
    u32 x, y, z, w;
};

namespace emulator {

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

// As a default argument it names the caller's line.
struct Site {
    const char* file;
    u32 line;

    static Site here(const char* file = __builtin_FILE(), u32 line = __builtin_LINE()) {
        return {file, line};
    }
};

}  // namespace emulator
}  // namespace volta
