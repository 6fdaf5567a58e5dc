"""One tile of queries over all keys, in blocks, for pypto's simulator: it prints the time that it models.

Runs where ``pypto`` is importable, not with the other benchmarks: ``pypto_attention.py BLOCK_K KEYS``.
The graph is FlashAttention's recurrence with the loop over blocks unrolled; the second level, cube tiles of
128 x 128 x 128 and vector tiles of 16 rows, is the same for all blocks.
"""

# pypto reads annotations as they stand, so they are not postponed, and takes names that the first trip sets.
# ruff: noqa: F821, F841

import sys

import pypto
import torch

QUERIES = HEAD_DIM = 128
BLOCK_K, KEYS = map(int, sys.argv[1:3])
HALF, SINGLE = pypto.DT_FP16, pypto.DT_FP32


@pypto.frontend.jit(runtime_options={"run_mode": pypto.RunMode.SIM})
def attention(
    q: pypto.Tensor([QUERIES, HEAD_DIM], HALF),
    k: pypto.Tensor([KEYS, HEAD_DIM], HALF),
    v: pypto.Tensor([KEYS, HEAD_DIM], HALF),
    out: pypto.Tensor([QUERIES, HEAD_DIM], SINGLE),
):
    """Softmax attention without a mask; the scale is left out."""
    pypto.set_cube_tile_shapes([128, 128], [128, 128], [128, 128])
    pypto.set_vec_tile_shapes(16, BLOCK_K)
    for _ in pypto.loop(1):
        for n in range(KEYS // BLOCK_K):
            keys = k[n * BLOCK_K : (n + 1) * BLOCK_K, :]
            values = v[n * BLOCK_K : (n + 1) * BLOCK_K, :]
            s = pypto.matmul(q, keys, SINGLE, b_trans=True)
            m_new = pypto.amax(s, dim=-1, keepdim=True)
            if n > 0:
                m_new = pypto.maximum(m, m_new)
            p = pypto.exp(pypto.sub(s, m_new))
            total = pypto.sum(p, dim=-1, keepdim=True)
            product = pypto.matmul(pypto.cast(p, HALF), values, SINGLE)
            if n > 0:
                alpha = pypto.exp(pypto.sub(m, m_new))
                denominator = pypto.add(pypto.mul(denominator, alpha), total)
                acc = pypto.add(pypto.mul(acc, alpha), product)
            else:
                denominator = total
                acc = product
            m = m_new
        pypto.assemble(pypto.div(acc, denominator), [0, 0], out)


def main() -> None:
    """Simulates one call; the values do not matter."""
    k = torch.zeros(KEYS, HEAD_DIM, dtype=torch.float16)
    q = torch.zeros(QUERIES, HEAD_DIM, dtype=torch.float16)
    attention(q, k, k.clone(), torch.zeros(QUERIES, HEAD_DIM))


if __name__ == "__main__":
    main()
