"""The gate of Llama's MLP."""

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(x, out, stride_x, rows, width, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of x (rows, 2 * width), gate first."""
    blocks = tl.cdiv(width, BLOCK)
    for item in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
        row = item // blocks
        columns = item % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        x_row = x + tl.cast(row, tl.int64) * stride_x
        gate = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_row + width + columns, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(-tl.abs(gate))  # of what is not positive, so that nothing overflows
        y = gate * tl.where(gate >= 0, 1.0, e) / (1.0 + e) * up
        tl.store(out + tl.cast(row, tl.int64) * width + columns, y.to(out.dtype.element_ty), mask=inside)
