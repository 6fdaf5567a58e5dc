"""One rank of one configuration of bench/llm.py: loads the model once and measures every case with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

import fastattn
from fastattn.collectives.exchange import all_gather
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.generate import Model
from fastattn.models.sampling import SamplingParams
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.spec import PackedWeight, TPGroup

from . import env
from .args import DTYPES
from .limits import read_bandwidth
from .llm_peers import LlamaCpp, Peer, Sample, Transformers
from .memory import peak_bytes, reset_peak
from .table import Column, Table
from .text import TEXT, prompts
from .timing import interleave, summarize

PEER_TIMEOUT_S = 1800.0  # the other ranks wait while rank 0 runs a peer


@dataclass(frozen=True)
class Row:
    """What one case gave; times are medians in milliseconds."""

    batch: int
    input: int
    output: int
    world: int
    dtype: str
    threads: int
    latency_ms: float
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    spread: float  # of the latency
    peak_mb: list[float]  # of each rank
    tpot_limit_ms: float  # weights and KV cache read once at the measured bandwidth
    peers: dict[str, PeerRow]


@dataclass(frozen=True)
class PeerRow:
    """The same of a peer, and how many of its greedy tokens equal ours before the first that differs."""

    latency_ms: float
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    same_tokens: int


def columns(peers: Sequence[str]) -> Table:
    """The table of bench/llm.py; two columns for each peer."""
    fixed = [
        Column("batch", 5, "d"),
        Column("input", 5, "d"),
        Column("output", 6, "d"),
        Column("TP", 2, "d"),
        Column("dtype", 5),
        Column("thr", 3, "d"),
        Column("latency ms", 10, ".1f"),
        Column("TTFT ms", 8, ".1f"),
        Column("TPOT ms", 7, ".2f"),
        Column("limit", 6, ".2f"),
        Column("tokens/s", 8, ".1f"),
        Column("peak MB/rank", 12),
    ]
    rivals = [(Column(f"{p} ms", 10, ".1f"), Column("ratio", 5, ".2f")) for p in peers]
    return Table([*fixed, *(column for pair in rivals for column in pair)])


def run(args: argparse.Namespace) -> None:
    """Measures every case with the group that the launcher's environment describes."""
    group = init(timeout_s=PEER_TIMEOUT_S)
    threads = set_threads(group, args.threads).num
    dtype_name = args.inference_data_type[0]
    model = fastattn.load(args.model, dtype=DTYPES[dtype_name], group=group)
    tokens = model.tokenizer.encode(TEXT)
    cases = list(product(args.batch_size, args.input_len, args.output_len))
    # Memory first: later the peers' weights would count.
    peaks = [_peak_mb(model, prompts(tokens, b, i), o) for b, i, o in cases]
    bandwidth = float(sum(all_gather(group, torch.tensor([read_bandwidth()]), "read bandwidth")))
    weights = _weight_bytes(model)
    peers = _peers(args, group, threads) if group.rank == 0 else {}
    table, rows = columns(args.peer), []
    for (batch, length, output), peak in zip(cases, peaks, strict=True):
        runs = _runs(model, peers, prompts(tokens, batch, length), output)
        samples = interleave(runs, args.iterations, args.warmup)
        if group.rank != 0:
            continue
        ours = samples.pop("fastattn")
        # Tokens in the cache on average over the decode steps.
        kv = batch * (length + output / 2) * _kv_bytes_per_token(model)
        limit = 1e3 * (weights + kv) / bandwidth
        row = _row(model, (batch, length, output), ours, samples, peak, limit, threads, dtype_name)
        rows.append(row)
        rivals = [v for p in args.peer for v in _peer_cells(row, p)]
        print(
            table.row(
                batch, length, output, group.world, dtype_name, threads, row.latency_ms, row.ttft_ms,
                row.tpot_ms, limit, row.tokens_per_s, "+".join(f"{mb:.0f}" for mb in peak), *rivals,
            ),
            flush=True,
        )  # fmt: skip
    answer = _chat(model, args.chat) if args.chat else ""
    if group.rank == 0:
        result = {
            "rows": [asdict(row) for row in rows],
            "peers": {key: peer.name for key, peer in peers.items()},
            "bandwidth": bandwidth,
            "env": env.capture(threads),
            "answer": answer,
        }
        Path(args.result).write_text(json.dumps(result))
    for peer in peers.values():
        peer.close()
    shutdown(group)


def _runs(
    model: Model, peers: dict[str, Peer], batch: list[list[int]], output: int
) -> dict[str, Callable[[], Sample]]:
    def ours() -> Sample:
        done = model.generate(batch, SamplingParams(max_tokens=output, ignore_eos=True))
        return Sample(
            max(c.latency_s for c in done), max(c.ttft_s for c in done), [c.token_ids for c in done]
        )

    def rival(peer: Peer) -> Callable[[], Sample]:
        return lambda: peer.generate(batch, output)

    able = {key: rival(peer) for key, peer in peers.items() if not peer.reason_against(len(batch))}
    return {"fastattn": ours, **able}


def _row(
    model: Model,
    case: tuple[int, int, int],
    ours: list[Sample],
    rivals: dict[str, list[Sample]],
    peak: list[float],
    limit_ms: float,
    threads: int,
    dtype: str,
) -> Row:
    batch, _, output = case
    return Row(
        *case,
        model.group.world,
        dtype,
        threads,
        *_times(ours, batch, output),
        spread=summarize([s.latency_s for s in ours]).spread,
        peak_mb=peak,
        tpot_limit_ms=limit_ms,
        peers={
            key: PeerRow(*_times(taken, batch, output), _same_tokens(ours[0].tokens, taken[0].tokens))
            for key, taken in rivals.items()
        },
    )


def _times(samples: list[Sample], batch: int, output: int) -> tuple[float, float, float, float]:
    """Latency, TTFT and TPOT in ms, and tokens/s: medians."""
    latency = summarize([s.latency_s for s in samples]).median
    ttft = summarize([s.ttft_s for s in samples]).median
    tpot = summarize([(s.latency_s - s.ttft_s) / max(1, output - 1) for s in samples]).median
    return 1e3 * latency, 1e3 * ttft, 1e3 * tpot, batch * output / latency


def _same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Over the batch, the tokens before the first difference."""
    total = 0
    for a, b in zip(ours, theirs, strict=True):
        same = [x == y for x, y in zip(a, b, strict=True)]
        total += same.index(False) if False in same else len(same)
    return total


def _peer_cells(row: Row, key: str) -> tuple[float | None, float | None]:
    rival = row.peers.get(key)
    return (None, None) if rival is None else (rival.latency_ms, rival.latency_ms / row.latency_ms)


def _peers(args: argparse.Namespace, group: TPGroup, threads: int) -> dict[str, Peer]:
    """The rivals, each with as many threads as all ranks together have."""
    path, total = Path(open_checkpoint(args.model).path), threads * group.world
    context = max(args.input_len) + max(args.output_len) + 1
    build: dict[str, Callable[[], Peer]] = {
        "transformers": lambda: Transformers(path, DTYPES[args.inference_data_type[0]], total),
        "llama.cpp": lambda: LlamaCpp(args.llama_python, path, total, context),
    }
    return {key: build[key]() for key in args.peer}


def _peak_mb(model: Model, batch: list[list[int]], output: int) -> list[float]:
    """Peak resident memory of every rank while it generates, in MB."""
    reset_peak()
    model.generate(batch, SamplingParams(max_tokens=output, ignore_eos=True))
    mine = torch.tensor([peak_bytes() / 1e6], dtype=torch.float64)
    return [float(x) for x in all_gather(model.group, mine, "peak memory")]


def _weight_bytes(model: Model) -> float:
    """Bytes of all ranks' matrices that one decode step reads."""
    d = model.decoder
    matrices: list[PackedWeight] = [d.head.weight]
    for attention, mlp in d.blocks:
        matrices += [*attention.qkv.weights, attention.o.weight, *mlp.gate_up.weights, mlp.down.weight]
    mine = sum(t.numel() * t.element_size() for w in matrices for t in w.tensors.values())
    gathered = all_gather(model.group, torch.tensor([mine], dtype=torch.float64), "bytes of the weights")
    return float(sum(gathered))


def _kv_bytes_per_token(model: Model) -> int:
    c = model.config
    return 2 * c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize


def _chat(model: Model, question: str) -> str:
    prompt = model.tokenizer.chat([{"role": "user", "content": question}])
    (completion,) = model.generate([prompt], SamplingParams(max_tokens=64))
    return completion.text
