"""One rank of one configuration of bench/llm.py: loads the model once and measures every case with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

import fastattn
from fastattn.collectives.exchange import all_gather
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.generate import Model
from fastattn.models.sampling import SamplingParams
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.spec import TPGroup

from . import env
from .args import ACTS, DTYPES
from .llm_limits import Floor
from .llm_peers import LlamaCpp, Peer, Sample, Transformers
from .llm_rows import Rival, Row, Times, lines, same_tokens
from .memory import peak_bytes, reset_peak, with_torch_bytes
from .text import TEXT, prompts
from .timing import interleave, summarize

PEER_TIMEOUT_S = 1800.0  # the other ranks wait while rank 0 runs a peer


def run(args: argparse.Namespace) -> None:
    """Measures every case with the group that the launcher's environment describes."""
    group = init(timeout_s=PEER_TIMEOUT_S)
    threads = set_threads(group, args.threads).num
    (dtype,), (act,) = args.inference_data_type, args.act
    model = fastattn.load(args.model, dtype=DTYPES[dtype], act=ACTS[act], group=group)
    loading = peak_bytes()
    tokens = model.tokenizer.encode(TEXT)
    cases = list(product(args.batch_size, args.input_len, args.output_len))
    # Memory first: later the limits' operands and the peers' weights would count.
    peaks = [_peaks_mb(model, prompts(tokens, b, i), o, loading) for b, i, o in cases]
    floor = Floor.measure(model)
    peers = _peers(args, group, threads) if group.rank == 0 else {}
    rows = []
    for (batch, length, output), peak in zip(cases, peaks, strict=True):
        runs = _runs(model, peers, prompts(tokens, batch, length), output)
        samples = interleave(runs, args.iterations, args.warmup)
        if group.rank != 0:
            continue
        ours = samples.pop("fastattn")
        row = Row(
            batch, length, output, group.world, dtype, act, threads, Times.of(ours, batch, output),
            spread=summarize([s.latency_s for s in ours]).spread,
            peak_mb=peak,
            # Integers may be multiplied faster than what the GEMM's rate was measured with.
            ttft_limit_ms=None if ACTS[act] else floor.ttft_ms(batch, length),
            tpot_limit_ms=floor.tpot_ms(batch, length, output),
            peers={
                key: Rival(Times.of(taken, batch, output), same_tokens(ours[0].tokens, taken[0].tokens))
                for key, taken in samples.items()
            },
        )  # fmt: skip
        rows.append(row)
        print(lines(row), flush=True)
    answer = _chat(model, args.chat) if args.chat else ""
    if group.rank == 0:
        result = {
            "rows": [asdict(row) for row in rows],
            "peers": {key: peer.name for key, peer in peers.items()},
            "torch_mb": with_torch_bytes() / 1e6,
            "file_mb": _file_bytes(Path(open_checkpoint(args.model).path)) / 1e6,
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


def _peers(args: argparse.Namespace, group: TPGroup, threads: int) -> dict[str, Peer]:
    """The rivals, each with as many threads as all ranks together have."""
    path, total = Path(open_checkpoint(args.model).path), threads * group.world
    context = max(args.input_len) + max(args.output_len) + 1
    build: dict[str, Callable[[], Peer]] = {
        "transformers": lambda: Transformers(path, DTYPES[args.inference_data_type[0]], total),
        "llama.cpp": lambda: LlamaCpp(args.llama_python, path, total, context),
    }
    return {key: build[key]() for key in args.peer}


def _peaks_mb(model: Model, batch: list[list[int]], output: int, loading: int) -> list[float]:
    """Peak resident memory of every rank while it loads and generates, in MB."""
    reset_peak()
    model.generate(batch, SamplingParams(max_tokens=output, ignore_eos=True))
    mine = torch.tensor([max(loading, peak_bytes()) / 1e6], dtype=torch.float64)
    return [float(x) for x in all_gather(model.group, mine, "peak memory")]


def _file_bytes(path: Path) -> int:
    """Bytes of a GGUF file, or of a directory's safetensors files."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.glob("*.safetensors")))


def _chat(model: Model, question: str) -> str:
    prompt = model.tokenizer.chat([{"role": "user", "content": question}])
    (completion,) = model.generate([prompt], SamplingParams(max_tokens=64))
    return completion.text
