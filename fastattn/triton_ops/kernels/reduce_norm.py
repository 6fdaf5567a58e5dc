"""All-reduce, residual and RMSNorm of one rank's share of the rows, in one pass (TokenWeave, 2505.11329).

Every rank's partial results lie in symmetric memory, which all ranks address. A row is read from all ranks by
the one that owns it, and its normalised form is written over it in all of them: between two barriers nobody
else touches that row, so no other buffer is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _normalised(s, residual, weight, at, column, eps, HIDDEN: tl.constexpr):
    """The row's RMSNorm, float32; ``residual`` becomes the sum, rounded once."""
    inside = column < HIDDEN
    s += tl.load(residual + at + column, inside, 0.0).to(tl.float32)
    rounded = s.to(residual.dtype.element_ty)
    tl.store(residual + at + column, rounded, inside)
    s = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s) / HIDDEN + eps)
    return s * scale * tl.load(weight + column, inside, 0.0).to(tl.float32)


@triton.jit
def reduce_norm_kernel(
    buffers, residual, weight, first_row, eps,
    DTYPE: tl.constexpr, WORLD: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row ``first_row + program`` of all ranks' buffers (addresses, int64), summed in the order of ranks."""
    column = tl.arange(0, WIDTH)
    inside = column < HIDDEN
    local = tl.program_id(0).to(tl.int64) * HIDDEN
    at = (tl.program_id(0).to(tl.int64) + first_row) * HIDDEN
    s = tl.zeros((WIDTH,), tl.float32)
    for rank in tl.static_range(WORLD):
        buffer = tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(DTYPE)), 16)
        s += tl.load(buffer + at + column, inside, 0.0).to(tl.float32)
    y = _normalised(s, residual, weight, local, column, eps, HIDDEN).to(DTYPE)
    for rank in tl.static_range(WORLD):
        buffer = tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(DTYPE)), 16)
        tl.store(buffer + at + column, y, inside)


@triton.jit
def _halves(word, DTYPE: tl.constexpr):
    """The two 16-bit floats of a word, float32 (..., 2)."""
    low = (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.join(low, high)


@triton.jit
def multicast_reduce_norm_kernel(
    buffer, residual, weight, first_row, eps,
    DTYPE: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The same through the switch (NVLink SHARP): it adds while reading and copies while writing.

    ``buffer`` is the multicast address. DTYPE is bfloat16 or float16; 8 divides HIDDEN.
    """
    local = tl.program_id(0).to(tl.int64) * HIDDEN
    at = (tl.program_id(0).to(tl.int64) + first_row) * HIDDEN
    chunk = tl.arange(0, WIDTH // 8)
    address = buffer + (at + tl.minimum(chunk * 8, HIDDEN - 8)) * 2
    kind: tl.constexpr = "bf16x2" if tl.bfloat16 == DTYPE else "f16x2"
    a, b, c, d = tl.inline_asm_elementwise(
        "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4." + kind + " {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    pairs = tl.join(
        tl.join(_halves(a, DTYPE), _halves(b, DTYPE)), tl.join(_halves(c, DTYPE), _halves(d, DTYPE))
    )
    column = tl.arange(0, WIDTH)
    s = tl.where(column < HIDDEN, tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), (WIDTH,)), 0.0)
    y = _normalised(s, residual, weight, local, column, eps, HIDDEN).to(DTYPE)
    bits = tl.reshape(y.to(tl.int16, bitcast=True), (WIDTH // 8, 2, 2, 2))
    low, high = tl.split(bits)  # (chunk, 2, 2): words of the chunk
    words = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    even, odd = tl.split(words)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    # Lanes past the row repeat its last chunk: they must not write.
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $6, 0; @p multimem.st.relaxed.sys.global.v4." + kind
        + " [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }",
        "=r,l,r,r,r,r,r", [address, a, b, c, d, (chunk * 8 < HIDDEN).to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
