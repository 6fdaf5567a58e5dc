"""One rank of one configuration of bench/llm.py: loads the model once and measures every case with it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import ModuleType

import torch

import fastattn
from fastattn import dispatch
from fastattn.collectives.exchange import all_gather
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.generate import Model
from fastattn.models.sampling import SamplingParams
from fastattn.models.trial import deciding
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.settings import settings
from fastattn.spec import SyncPlan, TPGroup

from . import env
from .args import ACTS, DTYPES, link_name
from .llm_limits import Floor
from .llm_peers import Cpu, LlamaCpp, Peer, Sample, Transformers, completed
from .llm_rows import Rival, Row, Times, lines, same_tokens
from .llm_sync import read_plans, wire_ms
from .memory import peak_bytes, reset_peak, with_torch_bytes
from .text import TEXT, prompts
from .timing import interleave, summarize

PEER_TIMEOUT_S = 1800.0  # the other ranks wait while rank 0 runs a peer


Served = Counter[tuple[str, str]]  # how often each (backend, op) ran


def run(args: argparse.Namespace) -> None:
    """Measures every case with the group that the launcher's environment describes."""
    with fastattn.use_backend(args.backend) if args.backend else nullcontext():
        _run(args)


def _run(args: argparse.Namespace) -> None:
    group = init(timeout_s=PEER_TIMEOUT_S)
    threads = set_threads(group, args.threads).num
    (dtype,), (act,) = args.inference_data_type, args.act
    with env.device(args.device):
        device, facts = env.accelerator(), env.capture(threads)
    reset_peak(device)
    model = fastattn.load(args.model, dtype=DTYPES[dtype], device=args.device, act=ACTS[act], tp=group)
    loading = peak_bytes(device)
    tokens = model.tokenizer.encode(TEXT)
    cases = list(product(args.batch_size, args.input_len, args.output_len))
    # Memory first: later the limits' operands and the peers' weights would count.
    peaks = [_peaks_mb(model, prompts(tokens, b, i), o, loading, device) for b, i, o in cases]
    with env.device(args.device):
        floor = Floor.measure(model)
    peers = _peers(args, group, threads) if group.rank == 0 else {}
    plans = read_plans(args.model, model, args.sync)
    rows = []
    served: Served = Counter()
    for (batch, length, output), peak in zip(cases, peaks, strict=True):
        runs = _runs(model, plans, peers, prompts(tokens, batch, length), output, served)
        samples = interleave(runs, args.iterations, args.warmup)
        if group.rank != 0:
            continue
        ours = {text: samples.pop(text) for text in plans}
        (first, taken), base = next(iter(ours.items())), None
        rivals = {
            key: Rival(Times.of(theirs, batch, output), same_tokens(taken[0].tokens, theirs[0].tokens))
            for key, theirs in samples.items()
        }
        for text, taken in ours.items():
            # Integers may be multiplied faster than what the GEMM's rate was measured with.
            ttft = {} if ACTS[act] else {"GEMM rate": floor.ttft_ms(batch, length)}
            tpot = {"memory bandwidth": floor.tpot_ms(batch, length, output)}
            if args.link and group.world > 1:
                hidden, plan = model.config.hidden_size, plans[text]
                ttft["link"] = wire_ms(plan, "prefill", batch * length, hidden, args.link)
                tpot["link"] = wire_ms(plan, "decode", batch, hidden, args.link)
            ttft_by, tpot_by = (max(of, key=of.__getitem__, default="") for of in (ttft, tpot))
            times = Times.of(taken, batch, output)
            row = Row(
                batch, length, output, group.world, dtype, act, threads, times,
                spread=summarize([s.latency_s for s in taken]).spread,
                peak_mb=peak,
                ttft_limit_ms=ttft.get(ttft_by),
                tpot_limit_ms=tpot[tpot_by],
                peers=rivals if text == first else {},
                sync=text,
                link=link_name(args.link) if args.link and group.world > 1 else "",
                base=base,
                limits={"TTFT": ttft_by, "TPOT": tpot_by},
            )  # fmt: skip
            base = base or times
            rows.append(row)
            print(lines(row), flush=True)
    with _following(model, plans[args.sync[0]]):
        answer = _chat(model, args.chat) if args.chat else ""
    if group.rank == 0:
        result = {
            "rows": [asdict(row) for row in rows],
            "peers": {key: peer.name for key, peer in peers.items()},
            "torch_mb": with_torch_bytes() / 1e6 if device is None else 0.0,
            "file_mb": _file_bytes(Path(open_checkpoint(args.model).path)) / 1e6,
            "env": facts,
            "served": [[*key, count] for key, count in sorted(served.items())],
            "emulated": sorted(settings.emulate & {backend for backend, _ in served}),
            "device": args.device,
            "answer": answer,
        }
        Path(args.result).write_text(json.dumps(result))
    for peer in peers.values():
        peer.close()
    shutdown(group)


def _following(model: Model, plan: SyncPlan) -> AbstractContextManager[None]:
    return deciding(model, plan.points.__getitem__, plan.schedule)


def _runs(
    model: Model,
    plans: dict[str, SyncPlan],
    peers: dict[str, Peer],
    batch: list[list[int]],
    output: int,
    served: Served,
) -> dict[str, Callable[[], Sample]]:
    """Ours under each plan, which also count what served them, and the peers."""

    def ours(plan: SyncPlan) -> Callable[[], Sample]:
        def run() -> Sample:
            before = dispatch.calls.copy()
            with _following(model, plan):
                sample = completed(model, batch, output)
            served.update(dispatch.calls - before)
            return sample

        return run

    def rival(peer: Peer) -> Callable[[], Sample]:
        return lambda: peer.generate(batch, output)

    able = {key: rival(peer) for key, peer in peers.items() if not peer.reason_against(len(batch))}
    return {**{text: ours(plan) for text, plan in plans.items()}, **able}


def _peers(args: argparse.Namespace, group: TPGroup, threads: int) -> dict[str, Peer]:
    """The rivals, each with as many threads as all ranks together have."""
    path, total = Path(open_checkpoint(args.model).path), threads * group.world
    context = max(args.input_len) + max(args.output_len) + 1
    build: dict[str, Callable[[], Peer]] = {
        "transformers": lambda: Transformers(path, DTYPES[args.inference_data_type[0]], total),
        "llama.cpp": lambda: LlamaCpp(args.llama_python, path, total, context),
        "cpu": lambda: Cpu(path, DTYPES[args.inference_data_type[0]], ACTS[args.act[0]], total),
    }
    return {key: build[key]() for key in args.peer}


def _peaks_mb(
    model: Model, batch: list[list[int]], output: int, loading: int, device: ModuleType | None
) -> list[float]:
    """Peak memory of every rank while it loads and generates, in MB."""
    reset_peak(device)
    completed(model, batch, output)
    mine = torch.tensor([max(loading, peak_bytes(device)) / 1e6], dtype=torch.float64)
    return [float(x) for x in all_gather(model.group, mine, "peak memory")]


def _file_bytes(path: Path) -> int:
    """Bytes of a GGUF file, or of a directory's safetensors files."""
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.glob("*.safetensors")))


def _chat(model: Model, question: str) -> str:
    prompt = model.tokenizer.chat([{"role": "user", "content": question}])
    (completion,) = model.generate([prompt], SamplingParams(max_tokens=64))
    return completion.text
