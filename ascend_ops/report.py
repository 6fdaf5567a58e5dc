"""The report of an NPU's owner on attention: what ran, how exact it was, how long it took; a table to send.

Each case runs on torch_npu's operator, if the router finds one, and on our kernel, if there is a compiler for
the chip; both are compared with torch's own attention in float64 on the CPU. What raises is a line too.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import router
from .attention import attention
from .router import AttentionCall, Chip, chip_of
from .router import lengths as lengths_of
from .router.atlas_310p import nz_view

RUNS = 20


class Case(NamedTuple):
    """A causal call, if ``right`` is 0."""

    name: str
    lengths: tuple[tuple[int, int], ...]  # (queries, keys) of each sequence
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    dtype: torch.dtype = torch.float16
    left: int | None = None
    right: int | None = 0
    page: int = 0  # 0: dense if lengths are equal, packed otherwise


def cases(*, full: bool, emulate: bool) -> Iterator[Case]:
    """The matrix. Emulated, the same kinds of calls at sizes that an interpreter can do."""
    n = 96 if emulate else 1024
    shape: dict[str, Any] = {"heads": (4, 2), "head_dim": 64} if emulate else {}
    for dtype in (torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        yield Case(f"causal, {kind}", ((n, n),) * 2, dtype=dtype, **shape)
        yield Case(f"full, {kind}", ((n, n),), dtype=dtype, right=None, **shape)
        yield Case(f"window of 64, {kind}", ((n, n),), dtype=dtype, left=64, **shape)
        yield Case(f"packed, {kind}", ((n, n), (n // 3, n // 3), (1, 7)), dtype=dtype, **shape)
        yield Case(f"paged prefill, {kind}", ((n // 2, n), (5, 77)), dtype=dtype, page=128, **shape)
        yield Case(f"paged decode, {kind}", ((1, n), (1, 77), (1, 1)), dtype=dtype, page=128, **shape)
        yield Case(f"decode with a window, {kind}", ((1, n),) * 2, dtype=dtype, page=128, left=50, **shape)
    for head_dim in (40, 64, 80, 256):
        yield Case(f"causal, head_dim {head_dim}", ((n // 2, n // 2),), head_dim=head_dim, heads=(4, 2))
    yield Case("more queries than keys", ((n, n // 2),), **shape)
    for length in (4096, 8192, 16384, 32768) if full else ():
        yield Case(f"causal, {length}", ((length, length),), heads=(8, 8))


def build(case: Case, chip: Chip, device: torch.device, seed: int = 0) -> AttentionCall:
    """The case's call with random values."""
    g = torch.Generator().manual_seed(seed)
    heads, kv_heads = case.heads

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(case.dtype).to(device)

    def ends(counts: list[int]) -> Tensor:
        return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)

    q_lens, k_lens = ([pair[i] for pair in case.lengths] for i in (0, 1))
    options: dict[str, Any] = {"left": case.left, "right": case.right, "scale": case.head_dim**-0.5}
    dense = len(set(case.lengths)) == 1
    if dense:
        q = values(len(q_lens), q_lens[0], heads, case.head_dim)
    else:
        q = values(sum(q_lens), heads, case.head_dim)
        options["cu_seqlens_q"] = ends(q_lens)
    if case.page:
        each = -(-max(k_lens) // case.page)
        shape: tuple[int, ...] = (len(k_lens) * each, case.page)
        order = torch.randperm(shape[0], generator=g).to(torch.int32)
        options |= {"block_table": order.view(-1, each).to(device)}
        options["seqused_k"] = torch.tensor(k_lens, dtype=torch.int32, device=device)
        options["kv_layout"] = "npu_nz" if chip.family == "310p" else "nhd"
    elif dense:
        shape = (len(k_lens), k_lens[0])
    else:
        shape = (sum(k_lens),)
        options["cu_seqlens_k"] = ends(k_lens)
    k, v = (values(*shape, kv_heads, case.head_dim) for _ in range(2))
    return AttentionCall(q, k, v, **options)


def exact(call: AttentionCall) -> Tensor:
    """torch's attention in float64 on the CPU, sequence by sequence: (T, H, D)."""
    lens = lengths_of(call)
    group = call.heads // call.kv_heads
    queries = call.q.flatten(0, -3).cpu().double().split(lens.q)
    out = []
    for b, q in enumerate(queries):
        if call.block_table is not None:
            pages = [t[call.block_table[b].long()] for t in (call.k, call.v)]
            if call.kv_layout == "npu_nz":
                pages = [nz_view(t).transpose(1, 2).reshape(t.shape) for t in pages]
            k, v = (t.flatten(0, 1)[: lens.k[b]] for t in pages)
        else:
            k, v = (t.flatten(0, -3).split(lens.k)[b] for t in (call.k, call.v))
        k, v = (t.cpu().double().repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        offset = torch.arange(k.shape[1]) - torch.arange(len(q))[:, None] - (k.shape[1] - len(q))
        seen = torch.ones_like(offset, dtype=torch.bool)
        if call.left is not None:
            seen &= offset >= -call.left
        if call.right is not None:
            seen &= offset <= call.right
        found = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen, scale=call.scale)
        out.append(found.transpose(0, 1).masked_fill(~seen.any(-1)[:, None, None], 0.0))
    return torch.cat(out)


def by_kernels(call: AttentionCall) -> Tensor:
    """The call on our Triton kernels."""
    own: dict[str, Any] = {
        n: getattr(call, n) for n in ("scale", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k")
    }
    lens = lengths_of(call)
    own |= {"max_seqlen_q": max(lens.q), "max_seqlen_k": max(lens.k)}
    return attention(call.q, call.k, call.v, window=(call.left, call.right), **own)[0]


def measure(run: Callable[[], Tensor], expected: Tensor, device: torch.device, runs: int) -> tuple[str, bool]:
    """(error and time, whether the error is one of the dtype)."""
    try:
        out = run()
        error = float((out.flatten(0, -3).cpu().double() - expected).abs().max())
        limit = 4 * torch.finfo(out.dtype).eps * max(1.0, float(expected.abs().max()))
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            run()
            if device.type == "npu":
                torch.get_device_module(device).synchronize()
            times.append(time.perf_counter() - start)
    except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
        text = str(failure).strip().split("\n")[0][:120]
        return f"FAILED {type(failure).__name__}: {text}", False
    right = error <= limit
    timed = f", {statistics.median(times) * 1e6:.0f} us" if times else ""
    return f"{'' if right else 'WRONG '}{error:.1e}{timed}", right


def versions() -> Iterator[str]:
    """Lines that say what this machine is."""
    yield f"{platform.platform()}, Python {platform.python_version()}"
    for package in ("fastattn", "torch", "torch-npu", "triton", "triton-ascend"):
        yield f"{package} {next((d.version for d in distributions(name=package)), 'is not installed')}"


def npu(torch_npu: Any, chip: Chip) -> Iterator[str]:
    """Lines that say what the NPU and its software are."""
    cann = getattr(torch.version, "cann", "unknown")  # where torch_npu notes it
    yield f"{torch_npu.npu.get_device_name()} ({chip.family}), CANN {cann}"
    yield f"operators: {', '.join(sorted(chip.operators))}"


def run(*, full: bool = False, emulate: bool = False) -> int:
    """Prints the report; 0 if everything that ran was right.

    ``emulate``: our kernels alone and on CPU tensors, in a process where Triton interprets.
    """
    print("# ascend_ops report\n")
    print("\n".join(f"- {line}" for line in versions()))
    if emulate:
        device, chip = torch.device("cpu"), chip_of("910b")
        print("- EMULATED: our kernels interpreted on the CPU, no operator of torch_npu\n")
    else:
        try:
            import torch_npu
        except ImportError as error:
            print(f"\nThere is no NPU to report on: {error}")
            return 1
        if not torch_npu.npu.is_available():
            print("\nThere is no NPU to report on: torch_npu sees none")
            return 1
        device, chip = torch.device("npu"), router.current()
        print("\n".join(f"- {line}" for line in npu(torch_npu, chip)), end="\n\n")
    print("| case | torch_npu | error, time | our kernel |")
    print("|---|---|---|---|")
    everything = True
    for case in cases(full=full, emulate=emulate):
        call = build(case, chip, device)
        expected = exact(call)
        name, vendor, ours = "", "", "no compiler for this chip"
        if not emulate:
            against = router.unsupported(call, chip)
            invocation = None if against else router.choose(call, chip)
            vendor = "; ".join(against)
            if invocation is not None:
                name = invocation.name
                vendor, right = measure(lambda: router.choose(call, chip)()[0], expected, device, RUNS)  # type: ignore[misc]  # noqa: B023
                everything &= right
        if chip.compiles_triton:
            ours, right = measure(lambda: by_kernels(call), expected, device, 0 if emulate else RUNS)  # noqa: B023
            everything &= right
        print(f"| {case.name} | {name} | {vendor} | {ours} |", flush=True)
    print("\nAll right." if everything else "\nSOMETHING IS WRONG: see WRONG and FAILED above.")
    return 0 if everything else 1
