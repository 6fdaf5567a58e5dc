"""Ascend chips by the operators they have.

Product names of CANN's documents: "Atlas training" is 910A, "Atlas inference" 310P, "Atlas A2" 910B,
"Atlas A3" 910_93. Support lists: the pages of torch_npu's custom operators and of the ATB operators, those
in CANN 9.1, where 910A has PagedAttentionOperation and ReshapeAndCacheOperation, but
SelfAttentionOperation "in certain scenarios" of which only the layout BNSD is named: torch_npu's binding asks
for another.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

Family = Literal["910a", "310p", "910b", "910_93", "950"]

# torch_npu.npu.get_soc_version(): its header NpuVariables.h numbers the chips in these ranges.
_SOC_VERSIONS: tuple[tuple[range, Family], ...] = (
    (range(100, 110), "910a"),
    (range(200, 210), "310p"),
    (range(220, 230), "910b"),
    (range(250, 260), "910_93"),
    (range(260, 270), "950"),
)
_OPERATORS: dict[Family, frozenset[str]] = {
    "910a": frozenset(
        {
            "_npu_paged_attention",
            "_npu_paged_attention_splitfuse",
            "_npu_reshape_and_cache",
            "npu_rms_norm",
            "npu_rotary_mul",
        }
    ),
    "310p": frozenset(
        {
            "_npu_flash_attention",
            "_npu_flash_attention_v3",
            "_npu_paged_attention",
            "_npu_paged_attention_splitfuse",
            "_npu_paged_attention_splitfuse_v2",
            "_npu_reshape_and_cache",
            "npu_rms_norm",
            "npu_add_rms_norm",
            "npu_rotary_mul",
        }
    ),
    "910b": frozenset(
        {
            "npu_fused_infer_attention_score",
            "npu_fused_infer_attention_score_v2",
            "npu_fusion_attention_v2",
            "npu_fusion_attention_v3",
            "npu_scatter_pa_kv_cache",
            "npu_rms_norm",
            "npu_add_rms_norm",
            "npu_rotary_mul",
            "npu_swiglu",
            "npu_weight_quant_batchmatmul",
            "npu_mm_all_reduce_base",
        }
    ),
    "910_93": frozenset(
        {
            "npu_fused_infer_attention_score",
            "npu_fused_infer_attention_score_v2",
            "npu_scatter_pa_kv_cache",
            "npu_rms_norm",
            "npu_add_rms_norm",
            "npu_rotary_mul",
            "npu_weight_quant_batchmatmul",
        }
    ),
    "950": frozenset({"npu_fusion_attention_v2", "npu_add_rms_norm"}),
}


class Chip(NamedTuple):
    """One kind of chip, and what of torch_npu runs on it."""

    family: Family
    operators: frozenset[str]

    @property
    def kv_layout(self) -> str:
        """Of the pages that its attention operators read."""
        return "npu_nz" if self.family in ("910a", "310p") else "nhd"

    @property
    def compiles_triton(self) -> bool:
        """Whether triton-ascend's release compiles our kernels for it: 910B and A3.

        Its settings for the 950 are switched off when the wheel is built (3.2.0).
        """
        return self.family in ("910b", "910_93")

    def lacks(self, operator: str) -> list[str]:
        return [] if operator in self.operators else [f"{operator} does not exist on {self.family}"]


def chip_of(family: Family) -> Chip:
    """The chip with every operator that CANN documents for it."""
    return Chip(family, _OPERATORS[family])


@cache
def current() -> Chip:
    """The chip of this process. Raises RuntimeError for one that is not known.

    An operator that the installed torch_npu does not have is left out.
    """
    import torch
    import torch_npu

    version = torch_npu.npu.get_soc_version()
    for numbers, family in _SOC_VERSIONS:
        if version in numbers:
            known = _OPERATORS[family]
            installed = {n for n in known if hasattr(torch.ops.atb if n[0] == "_" else torch.ops.npu, n)}
            return Chip(family, frozenset(installed))
    raise RuntimeError(f"torch_npu reports chip number {version}, known are 100 to 269")
