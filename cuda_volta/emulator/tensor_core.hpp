// mma.sync.aligned.m8n8k4 with f16 operands and f32 accumulation, for the 32 lanes of a warp.
#pragma once

#include "types.hpp"

namespace volta::emulator {

// What each lane brought to the instruction.
struct MmaOperands {
    float* d[32];  // eight each; read and written
    Word2 a[32], b[32];
};

// Fragments as in PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f16 floating point type". A is a row
// operand; B a row or a column operand.
void mma_m8n8k4(const MmaOperands& operands, bool b_is_row);

}  // namespace volta::emulator
