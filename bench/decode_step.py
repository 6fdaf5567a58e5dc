"""One decode step of a Llama with random weights: how near it comes to reading its weights once.

Batch 1, by default in the shape of Llama 7B. On a GPU the step (embedding, every layer, head, argmax) is
captured as a CUDA graph and replayed, so that no time is Python's; elsewhere its ops are launched one by one.
The yardstick is the bytes of the weights that a step reads, over the bandwidth of a copy, measured between
the steps; reading alone can be a little faster. Layers have weights of their own, but equal ones: speed does
not depend on values.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.dispatch import BACKENDS
from fastattn.models import random_llama
from fastattn.models.generate import Model
from fastattn.models.llama import Attention, Decoder, Mlp
from fastattn.models.random_llama import RandomLlama
from fastattn.parallel.linear import ColumnLinear, RowLinear
from fastattn.settings import settings
from fastattn.spec import PackedWeight, Point, SyncPolicy
from lib import env
from lib.args import names, positive
from lib.limits import reading
from lib.llm_limits import layer_matrices, nbytes
from lib.llm_rows import served_by
from lib.records import Record, write
from lib.table import Column, Table
from lib.timing import time_calls

WARMUP = 3  # steps before a capture: kernels compile, and torch's allocator fills its pools


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=positive, default=32, help="default: 32")
    p.add_argument("--hidden", type=positive, default=4096, help="a multiple of 64; default: 4096")
    p.add_argument(
        "--weights", type=names(random_llama.FORMS), default=random_llama.FORMS, metavar="F,F",
        help=f"out of {', '.join(random_llama.FORMS)}; default: both",
    )  # fmt: skip
    p.add_argument("--keys", type=positive, default=128, help="tokens in the KV cache; default: 128")
    p.add_argument("--device", choices=env.DEVICES, default="cuda", help="default: cuda")
    p.add_argument("--backend", choices=BACKENDS, help="for every op, or refuse (see fastattn info)")
    p.add_argument("--seconds", type=float, default=3.0, help="of measuring each; default: 3")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    return p


TABLE = Table(
    [
        Column("weights", 7), Column("MB read", 8, ".1f"), Column("launch", 6), Column("step ms", 9, ".3f"),
        Column("GB/s", 7, ".1f"), Column("limit ms", 9, ".3f"), Column("limit GB/s", 10, ".1f"),
        Column("% of it", 7, ".1f"),
    ]
)  # fmt: skip


@torch.inference_mode()
def main() -> None:
    """Measures every form of the weights."""
    args = parser().parse_args()
    with env.device(args.device):
        facts = env.capture(torch.get_num_threads())
    print(f"Llama {args.layers}x{args.hidden}, batch 1, {args.keys} keys: {env.headline(facts)}")
    print(TABLE.header(), flush=True)
    records: list[Record] = []
    for form in args.weights:
        with fastattn.use_backend(args.backend) if args.backend else nullcontext():
            records += measure(RandomLlama(args.layers, args.hidden, form), args, facts)
    if args.json:
        write(args.json, records)


def measure(made: RandomLlama, args: argparse.Namespace, facts: dict[str, str | int]) -> list[Record]:
    """One row: the step between copies, and its record."""
    model = deepened(made, args.device)
    read = nbytes([*layer_matrices(model.decoder), model.decoder.head.weight])
    dispatch.calls.clear()
    step = decode_step(model, args.keys)
    step()
    served = sorted(dispatch.calls.items())
    graph = args.device == "cuda"
    with env.device(args.device):
        copy = reading()
        run = captured(step)[0] if graph else step
        timed = time_calls({"step": run, "copy": copy.call}, args.seconds)
    mine, bandwidth = timed["step"], copy.amount / timed["copy"].median
    least = read / bandwidth
    launch = "graph" if graph else "ops"
    print(
        TABLE.row(
            made.form, read / 1e6, launch, 1e3 * mine.median, read / mine.median / 1e9, 1e3 * least,
            bandwidth / 1e9, 100 * least / mine.median,
        )
    )  # fmt: skip
    print(
        *(f"  {line}" for line in served_by([(*key, count) for key, count in served])), sep="\n", flush=True
    )
    emulated = settings.emulate & {backend for (backend, _), _ in served}
    if emulated:
        print(f"  {', '.join(emulated)} emulated: no time here is that of a device")
    shared: dict[str, Any] = {
        "bench": "decode_step",
        "case": f"llama {made.layers}x{made.hidden} {made.form} keys={args.keys} launch={launch}",
        "spread": mine.spread,
        "claim": "emulated" if emulated else "measured",
        "env": facts,
    }
    limit = ("weights' bytes over the bandwidth of a copy", 1e3 * least)
    return [Record.of(shared, "decode step", "ms", 1e3 * mine.median, bound=limit)]


def deepened(made: RandomLlama, device: str) -> Model:
    """The model, of which one layer went through a file; the others are copies of it in memory."""
    with tempfile.TemporaryDirectory() as folder:
        shallow = random_llama.write(made._replace(layers=1), Path(folder))
        model = fastattn.load(shallow, dtype="float16", device=device)
    one, block = model.decoder, model.decoder.blocks[0]
    config = replace(model.config, num_layers=made.layers, windows=model.config.windows * made.layers)

    def policy(point: Point) -> SyncPolicy:
        return one.policy(point._replace(layer=0))

    blocks = [block, *(_copied(block) for _ in range(1, made.layers))]
    decoder = Decoder(config, one.embedding, blocks, one.norm, one.head, one.group, policy, one.schedule)
    return replace(model, config=config, decoder=decoder)


def _copied(block: tuple[Attention, Mlp]) -> tuple[Attention, Mlp]:
    """The block with matrices of its own."""
    attention, mlp = block

    def columns(layer: ColumnLinear) -> ColumnLinear:
        return ColumnLinear(*map(_clone, layer.weights), act=layer.act)

    def rows(layer: RowLinear) -> RowLinear:
        return RowLinear(_clone(layer.weight), layer.act)

    return (
        replace(attention, qkv=columns(attention.qkv), o=rows(attention.o)),
        replace(mlp, gate_up=columns(mlp.gate_up), down=rows(mlp.down)),
    )


def _clone(w: PackedWeight) -> PackedWeight:
    return w._replace(tensors={name: t.clone() for name, t in w.tensors.items()})


def decode_step(model: Model, keys: int) -> Callable[[], Tensor]:
    """A step behind ``keys`` tokens, the same at every call: its key and value go to the same place."""
    cache = model.kv_cache([keys + 1])
    cache.keys.normal_()
    cache.values.normal_()
    cache.reserve([0], [keys])
    step = cache.reserve([0], [1])
    token = torch.ones(1, dtype=torch.int64, device=model.device)

    def run() -> Tensor:
        logits = model.decoder.head(model.decoder.forward(token, step, cache))
        assert logits is not None  # of the only rank
        return logits.argmax(-1)

    return run


def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """The step as a CUDA graph: what replays it, and its result, which every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = step()
    return graph.replay, token


if __name__ == "__main__":
    main()
