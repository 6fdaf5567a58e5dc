"""The vendor-lowered IR of the attention kernels, run on this CPU against the float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ascend_ops.toolchain.client import Worker

from .conftest import ROOT

pytestmark = pytest.mark.toolchain

CHECK = "tests.ascend.lowered:check"


def shapes(
    batch: int, q_len: int, k_len: int, heads: tuple[int, int], head_dim: int, v_dim: int = 0
) -> dict[str, Any]:
    q = [batch, q_len, heads[0], head_dim] if batch else [q_len, heads[0], head_dim]
    k = [batch, k_len, heads[1], head_dim] if batch else [k_len, heads[1], head_dim]
    return {"q": q, "k": k, "v": [*k[:-1], v_dim or head_dim]}


#: name -> (shapes, dtype, options, tiles); no tiles: the planner's.
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any], list[int] | None]] = {
    "full": (shapes(1, 200, 333, (2, 2), 64), "float16", {}, None),
    "causal_gqa": (shapes(1, 300, 700, (4, 2), 64), "float16", {"causal": True}, None),
    "causal_d128": (shapes(1, 140, 650, (1, 1), 128), "float16", {"causal": True}, None),
    "causal_d256": (shapes(1, 70, 400, (1, 1), 256), "float16", {"causal": True}, None),
    "bfloat16_padded": (shapes(1, 90, 260, (2, 1), 80, 48), "bfloat16", {"causal": True}, None),
    "window": (shapes(1, 200, 300, (1, 1), 32), "float16", {"window": [40, 7]}, [32, 64, 32]),
    "packed": (
        shapes(0, 150, 330, (4, 2), 64),
        "float16",
        {"cu_seqlens_q": [0, 100, 100, 150], "cu_seqlens_k": [0, 200, 290, 330], "causal": True},
        [64, 128, 64],
    ),
    "softcap_alibi_sinks": (
        shapes(1, 70, 140, (2, 1), 32),
        "float16",
        {"causal": True, "softcap": 20.0, "alibi_slopes": "random", "sinks": "random"},
        [32, 64, 32],
    ),
    "mask": (shapes(1, 70, 140, (2, 1), 32), "float16", {"attn_mask": "bool"}, [32, 64, 64]),
    "decode_gqa": (
        shapes(2, 1, 700, (8, 2), 128),
        "float16",
        {"cache_seqlens": [700, 37], "sinks": "random"},
        None,
    ),
    "decode_queries": (shapes(1, 3, 300, (4, 2), 64), "bfloat16", {"causal": True, "window": [100, 0]}, None),
    "decode_pages": (
        {"q": [2, 1, 4, 64], "k": [6, 32, 2, 64], "v": [6, 32, 2, 64]},
        "float16",
        {"block_table": [[5, 1, 0], [2, 4, 3]], "cache_seqlens": [80, 5]},
        None,
    ),
    "pages": (
        {"q": [2, 40, 2, 64], "k": [6, 32, 2, 64], "v": [6, 32, 2, 64]},
        "float16",
        {
            "block_table": [[5, 1, 0], [2, 4, 3]],
            "cache_seqlens": [90, 45],
            "cache_leftpad": [5, 0],
            "causal": True,
        },
        None,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def worker(vendor_python: Path) -> Any:
    with Worker(vendor_python, [ROOT]) as started:
        yield started


@pytest.mark.parametrize("name", CASES)
def test_lowered_ir(worker: Worker, name: str) -> None:
    shape, dtype, options, tiles = CASES[name]
    found = worker.call(CHECK, shape=shape, dtype=dtype, options=options, tiles=tiles)
    assert found["error"] < 0.05, found
