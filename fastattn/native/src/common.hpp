// Plain types shared by every translation unit. Nothing here has a function body: the same header is
// compiled with different instruction sets, and a function emitted by two of them would be merged by the
// linker, which may then pick one that the running CPU cannot execute.
#pragma once

#include <stdint.h>

namespace fastattn {

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

enum class DType : int { f32, f16, bf16, boolean, u8, i8, i32, i64 };

}  // namespace fastattn
