"""``x @ W^T`` for many rows of x: W's codes become operands in registers beside the tensor cores' work.

W is the first operand of the product, which Hopper's wgmma and Ampere's mma both take from registers: the
codes are dequantized in the layout of their product and never written to shared memory. Each is dequantized
once for every BLOCK_M rows of x.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _integer(byte, BIAS: tl.constexpr, DTYPE: tl.constexpr):
    """``byte - BIAS`` by its bits: 0x6400 | q is 1024 + q, in float32 0x4B000000 | q is 2^23 + q."""
    if tl.float16 == DTYPE:
        number = (byte.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + BIAS)
    else:
        number = (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + BIAS)
    return number


@triton.jit
def linear_many_kernel(
    x, codes, scales, mins, bias, out, rows, out_features, x_stride, codes_stride, scales_stride, mins_stride,
    COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_OFFSET: tl.constexpr, INT4: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_N, BLOCK_M) tile of W @ x^T; all columns of a step of BLOCK_K are of one group.

    A step is two halves, as in `linear_few.linear_kernel`. Weights are formed in float16 where x, scales and
    mins are (two a lane at once; the sum is fused and rounds once), else in float32.
    """
    same: tl.constexpr = x.dtype.element_ty == scales.dtype.element_ty
    form: tl.constexpr = tl.float16 if same and tl.float16 == x.dtype.element_ty else tl.float32
    tiles_m = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0)
    # Programs of the same rows of W are neighbours: its codes come from memory once.
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last one, and are not stored.
    x_at = x + tl.minimum(m, rows - 1).to(tl.int64)[None, :] * x_stride
    row_of_w = tl.minimum(n, out_features - 1).to(tl.int64)
    codes_at = codes + row_of_w[:, None] * codes_stride
    half = tl.arange(0, BLOCK_K // 2)
    low = half // 16 * 32 + half % 16 if INT4 else half
    high = low + 16 if INT4 else half + BLOCK_K // 2
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(tl.cdiv(COLUMNS, BLOCK_K)):
        begin = step * BLOCK_K
        # Not loaded a step ahead: carried scales change their layout through shared memory, which costs four
        # barriers a step, and all but one load in 16 groups come from L1 anyway.
        group = (begin + GROUP_OFFSET) // GROUP_SIZE
        scale = tl.load(scales + row_of_w * scales_stride + group).to(form)[:, None]
        if mins is not None:
            least = tl.load(mins + row_of_w * mins_stride + group).to(form)[:, None]
        if INT4:
            byte = begin // 2 + half[None, :]
            if COLUMNS % BLOCK_K == 0:
                packed = tl.load(codes_at + byte)
            else:
                packed = tl.load(codes_at + byte, byte < COLUMNS // 2, 0)
        for part in tl.static_range(2):
            column = begin + (low if part == 0 else high)
            if COLUMNS % BLOCK_K == 0:
                values = tl.load(x_at + column[:, None])
            else:
                values = tl.load(x_at + column[:, None], (column < COLUMNS)[:, None], 0.0)
            if INT4:
                w = _integer((packed & 15) if part == 0 else (packed >> 4), 0, form)
            else:
                if COLUMNS % BLOCK_K == 0:
                    code = tl.load(codes_at + column[None, :])
                else:
                    code = tl.load(codes_at + column[None, :], (column < COLUMNS)[None, :], 0)
                w = _integer(code.to(tl.uint8, bitcast=True) ^ 128, 128, form)
            w = w * scale
            if mins is not None:
                w += least
            total = tl.dot(w.to(x.dtype.element_ty), values, total)
    stored = (n < out_features)[:, None]
    if bias is not None:
        total += tl.load(bias + n[:, None], stored, 0.0).to(tl.float32)
    at = out + m[None, :].to(tl.int64) * out_features + n[:, None]
    tl.store(at, total.to(out.dtype.element_ty), (m < rows)[None, :] & stored)
