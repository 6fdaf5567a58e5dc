"""RMSNorm, with the residual added on the way (2 reads and 2 writes of the stream instead of 4)."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x,
    residual,  # as x, or None
    weight,
    out,
    total,  # x + residual, as out
    stride_x,
    stride_residual,
    rows,
    hidden,
    eps,
    BLOCK: tl.constexpr,
):
    """Rows are dealt out to the vector cores; each is read twice, the second time from L2."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        x_row = x + tl.cast(row, tl.int64) * stride_x
        out_offset = tl.cast(row, tl.int64) * hidden
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < hidden
            s = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
            if residual is not None:
                residual_row = residual + tl.cast(row, tl.int64) * stride_residual
                s += tl.load(residual_row + columns, mask=inside, other=0.0).to(tl.float32)
                tl.store(total + out_offset + columns, s.to(total.dtype.element_ty), mask=inside)
            squares += s * s
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / hidden + eps)
        for start in range(0, hidden, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < hidden
            s = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
            if residual is not None:
                residual_row = residual + tl.cast(row, tl.int64) * stride_residual
                s += tl.load(residual_row + columns, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + out_offset + columns, (s * scale * w).to(out.dtype.element_ty), mask=inside)
