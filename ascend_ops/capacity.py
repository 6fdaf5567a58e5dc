"""What a tile needs of the on-chip memories, as the vendor's planner counts it.

The model names the buffers that are alive together at each of a kernel's tightest moments and adds them up;
the few bytes a row or a key are statistics and masks, fitted to the planner's own figures (ascendnpu-ir
1.2.0). tests/ascend/plans.json holds those for 261 instantiations, docs/ascend.md how far the model is off.

The compiler tries twice. First with two buffers of everything that moves, and the scores of a full block cut
into two slices of rows; then, if any memory overflows, with one buffer and no slices. A tile that needs the
second try loses the overlap of transfer and computation: the planner takes none.

The 950's compiler (bishengir-compile-a5) does not halve a block's rows between the vector cores, and packs
their memory more tightly than a sum of buffers: `whole_rows` bounds it from above, but for tiles that need
more than twice the memory.
"""

from __future__ import annotations

from typing import NamedTuple

from .chips import Chip

HALF, SINGLE = 2, 4  # bytes of an operand of the Cube, and of a score


class Needs(NamedTuple):
    """Bytes of one core's memories."""

    ub: int
    l1: int
    l0c: int

    def overflows(self, chip: Chip) -> dict[str, tuple[int, int]]:
        """memory -> (needed, available), of those that are too small; as `toolchain.plan.Plan.overflow`."""
        found = {"UB": (self.ub, chip.ub)} if self.ub > chip.ub else {}
        # The Cube's memories are planned one after the other, and the plan ends with the first that is too
        # small.
        if self.l1 > chip.l1:
            found["L1"] = (self.l1, chip.l1)
        elif self.l0c > chip.l0c:
            found["L0C"] = (self.l0c, chip.l0c)
        return found


class PrefillShape(NamedTuple):
    """What the needs of `kernels.prefill` depend on."""

    block_q: int
    block_k: int
    edge_k: int
    block_d: int  # head_dim of q and k, padded
    block_dv: int
    #: How many score matrices are alive at once in an edge block; 0: a decoding kernel, which has none.
    edge_tiles: float = 0.0
    softcap: bool = False


def first_try(s: PrefillShape, chip: Chip) -> Needs:
    """What the tiles need to be accepted at the compiler's first try; on a 950 a bound (`whole_rows`)."""
    return whole_rows(s) if chip.whole_rows else double_buffered(s)


def whole_rows(s: PrefillShape) -> Needs:
    """The 950: scores and products come to the Unified Buffer, weights go to L1, none through memory."""
    scores, edge, acc = (s.block_q * n * SINGLE for n in (s.block_k, s.edge_k, s.block_dv))
    softmax = (3 if s.softcap else 2.5) * scores + 2 * acc  # float32 twice, and weights in half precision
    masked = max(s.edge_tiles, 1.5) * edge + max(edge + 3 * acc, 2 * edge + acc)
    keys, edge_keys = s.block_k * s.block_d * HALF, s.edge_k * (s.block_d + s.block_dv) * HALF
    operands = s.block_q * s.block_d * HALF + keys + s.block_q * s.block_k * HALF + edge_keys
    product = s.block_q * max(s.block_k, s.block_dv) * SINGLE
    # Keys and values of an edge block are zeros in the Unified Buffer first; decoding has no such block.
    filled = edge_keys if s.edge_tiles else 0
    return Needs(int(max(softmax, masked, filled)) + 36 * s.block_q + 4 * s.edge_k, operands, product)


def double_buffered(s: PrefillShape) -> Needs:
    """The compiler's first try: transfers have two buffers, a full block's softmax runs in two slices."""
    key, value = s.block_k * s.block_d * HALF, s.block_k * s.block_dv * HALF
    weights = s.block_q * s.block_k * HALF
    # K on its way to the scores, or V and the weights on theirs to the product: stages that do not overlap.
    operands = 2 * s.block_q * s.block_d * HALF + 2 * max(key, value + weights)
    return Needs(_vector_bytes(s, slices=2), operands, _product_bytes(s, slices=2))


def single_buffered(s: PrefillShape) -> Needs:
    """The last try, one buffer of each and no slices: what a tile needs to be accepted at all."""
    key, value = s.block_k * s.block_d * HALF, s.block_k * s.block_dv * HALF
    operands = s.block_q * s.block_d * HALF + max(key, value + s.block_q * s.block_k * HALF)
    return Needs(_vector_bytes(s, slices=1), operands, _product_bytes(s, slices=1))


def _product_bytes(s: PrefillShape, slices: int) -> int:
    """L0C: the scores, or the product with V, whichever is larger; they take turns when both do not fit."""
    return s.block_q * max(s.block_k // slices, s.block_dv) * SINGLE


def _vector_bytes(s: PrefillShape, slices: int) -> int:
    rows = s.block_q // 2  # of each of the two vector cores
    scores, edge, acc = (rows * n * SINGLE for n in (s.block_k, s.edge_k, s.block_dv))
    # Scores in float32 beside weights in half precision; capped scores beside the others, and then in one
    # piece.
    softmax = 2 * scores if s.softcap else 3 * scores // (2 * slices)
    moments = [
        # The softmax of a full block.
        softmax + 2 * acc + 32 * rows + 4 * s.edge_k,
        # The next scores, and a block's product joining the accumulator.
        scores + 3 * acc + 56 * rows + 4 * s.edge_k,
        # The division by the softmax's denominator.
        4 * acc + 20 * rows + 4 * s.edge_k,
        # An edge block, never sliced, with its mask.
        s.edge_tiles * edge + 2 * acc + 16 * rows + 8 * s.edge_k,
    ]
    return int(max(moments))
