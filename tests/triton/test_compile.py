"""Attention compiled for sm_75, sm_80, sm_89 and sm_90 without a GPU: instructions, shared memory, spills."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version

import pytest

from .compilation import Job, Outcome, call, run

pytestmark = pytest.mark.toolchain

#: Bytes of a thread's registers that ptxas may keep in local memory.
SPILLS = 128
CHIPS = ("T4", "A100", "L40", "H100")
WIDTHS = (64, 128, 256)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Processes that compile, whatever this one was told of Triton's interpreter."""
    before = {name: os.environ.pop(name, None) for name in ("TRITON_INTERPRET", "FASTATTN_EMULATE")}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1), mp_context=context) as workers:
        yield workers
    os.environ.update({name: value for name, value in before.items() if value is not None})


def check(job: Job, outcome: Outcome) -> None:
    """Asserts what holds of every compiled kernel."""
    from fastattn.triton_ops.device import CHIPS as KNOWN

    for report in outcome.reports:
        assert report.spills <= SPILLS, f"{job}: {report.spills} bytes spilled by {outcome.plan}"
        assert report.scratch_bytes == 0, f"{job}: a launch would allocate"
        assert report.shared_bytes <= KNOWN[job.chip].shared_bytes, f"{job}: {outcome.plan}"


@pytest.mark.parametrize("chip", CHIPS)
def test_every_tile_of_the_table(chip: str, pool: ProcessPoolExecutor) -> None:
    jobs = [Job(chip, kind, width, dtype) for kind in ("prefill", "decode")
            for width in WIDTHS for dtype in ("float16", "float32")]  # fmt: skip
    for job, outcome in zip(jobs, pool.map(run, jobs), strict=True):
        check(job, outcome)
        attend = outcome.reports[0]
        halves = job.dtype == "float16"
        if chip == "H100":
            assert outcome.plan.tma == halves
            assert ("cp.async.bulk.tensor" in attend.ptx) == halves, f"{job}: TMA"
            assert ("wgmma" in attend.ptx) == (halves and job.kind == "prefill"), f"{job}"
        elif outcome.plan.tile.num_stages > 1:
            assert "cp.async.cg" in attend.ptx, f"{job}: loads are not asynchronous"
        if chip != "T4" and halves:
            assert "mma" in attend.ptx, f"{job}: no tensor cores"
        if job.kind == "decode":
            assert outcome.plan.pack, f"{job}"
            assert len(outcome.reports) == 2, f"{job}: {outcome.plan}"  # the pieces and what merges them


FEATURES = (
    Job("A100", "prefill", 64, "bfloat16", ("window", "softcap", "sinks", "lse")),
    Job("A100", "prefill", 64, "float16", ("packed", "alibi", "positions", "lse")),
    Job("A100", "prefill", 80, "float16", ("bool mask",)),
    Job("A100", "prefill", 128, "float16", ("bias", "leftpad")),
    Job("A100", "paged", 128, "float16", ("int8", "sinks", "lse")),
    Job("A100", "prefill", 128, "float16", ("int8",)),
    Job("H100", "prefill", 128, "float16", ("int8",)),
    Job("H100", "prefill", 128, "bfloat16", ("packed", "window", "lse")),
    Job("H100", "prefill", 96, "float16", ("bool mask", "sinks")),
    Job("H100", "prefill", 128, "float16", ("float bias",)),
    Job("H100", "prefill", 256, "bfloat16", ("float bias", "full")),
    Job("A100", "prefill", 256, "bfloat16", ("float bias",)),
    Job("L40", "prefill", 128, "bfloat16", ("float bias",)),
    Job("H100", "prefill", 128, "float16", ("softcap", "alibi", "rows", "leftpad")),
    Job("H100", "paged", 128, "bfloat16", ("leftpad", "sinks", "window")),
    Job("T4", "prefill", 64, "float16", ("packed", "window", "softcap", "alibi", "sinks", "lse")),
    Job("T4", "paged", 128, "float16", ("leftpad", "sinks")),
    *(Job(chip, "paged prefill", width) for chip in ("A100", "H100") for width in WIDTHS),
    Job("A100", "decode", 64, "float16", ("float32 cache",)),
    Job("L40", "decode", 128, "float16", ("float32 cache",)),
    Job("H100", "prefill", 256, "float16", ("float32 cache",)),
)


def test_features(pool: ProcessPoolExecutor) -> None:
    for job, outcome in zip(FEATURES, pool.map(run, FEATURES), strict=True):
        check(job, outcome)


def test_strides_of_more_than_32_bits(pool: ProcessPoolExecutor) -> None:
    """Arguments that become 64 bits wide, in every expression that they enter."""
    jobs = [Job(chip, "decode", features=("long", "lse")) for chip in CHIPS[1:]]
    for job, outcome in zip(jobs, pool.map(run, jobs), strict=True):
        assert call(job).k.stride(0) > 1 << 31
        check(job, outcome)


def test_pages_keep_as_many_blocks_in_flight(pool: ProcessPoolExecutor) -> None:
    """Loads that wait for the page table must not cost the pipeline its depth."""
    jobs = [Job("A100", kind, 128, "float16") for kind in ("decode", "paged")]
    dense, paged = (outcome.reports[0] for outcome in pool.map(run, jobs))
    assert dense.shared_bytes <= paged.shared_bytes <= 1.1 * dense.shared_bytes


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("features", [(), ("full",)], ids=["causal", "full"])
def test_warp_specialization(head_dim: int, features: tuple[str, ...], pool: ProcessPoolExecutor) -> None:
    """Hopper: one warpgroup loads, two multiply, and registers move from the one to the others."""
    if version("triton").rpartition(".")[0] not in ("3.4", "3.5", "3.6"):
        pytest.skip(
            f"Triton {version('triton')} may not specialize the kernel's warps: 3.4 and 3.6 do, 3.9 fails"
        )
    job = Job("H100", "prefill", head_dim, "bfloat16", features, specialize=True)
    outcome = pool.submit(run, job).result()
    check(job, outcome)
    ptx = outcome.reports[0].ptx
    assert "setmaxnreg.inc" in ptx
    assert "setmaxnreg.dec" in ptx
    assert "wgmma" in ptx
