"""Attention on the CPU against torch's scaled_dot_product_attention, with this machine's limits beside.

  decode    one query a sequence over a long KV cache: bound by the memory that K and V come from. Calls
            cycle through caches of 8 times the last-level cache, so that nothing is read twice from it.
  prefill   causal self-attention: bound by FLOP/s (a causal mask halves the work that is counted).

Peers: "enable_gqa" is what models call today; "folded" views the query heads of a KV head as rows of one
matrix, which is several times faster for decode. Calls of all rivals alternate; medians are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from lib import env
from lib.args import DTYPES, names, positive, sweep
from lib.limits import gemm_rate, read_bandwidth
from lib.records import Record, ratio, write
from lib.table import Column, Table
from lib.timing import Timing, time_calls

Qkv = tuple[Tensor, Tensor, Tensor]  # (B, Sq, H, D), (B, Sk, Hkv, D) twice
Rivals = dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch_size", type=positive, default=1)
    p.add_argument("--heads", type=positive, default=32, help="query heads; default: 32")
    p.add_argument("--kv_heads", type=positive, default=8, help="default: 8")
    p.add_argument("--head_dim", type=positive, default=128, help="default: 128")
    p.add_argument("--decode_len", type=sweep, default=(2048, 8192), metavar="N,N", help="keys of decode")
    p.add_argument("--prefill_len", type=sweep, default=(1024,), metavar="N,N", help="tokens of prefill")
    p.add_argument("--data_type", type=names(tuple(DTYPES)), default=("fp32", "bf16"), metavar="T,T")
    p.add_argument("--seconds", type=float, default=2.0, help="spent on each row; default: 2")
    p.add_argument("--threads", type=positive, default=env.cores(), help="default: all cores")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--plot", metavar="FILE.png", help="draw the rates over the number of keys")
    return p


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """fastattn's call."""
    out = fastattn.attention(q, k, v, causal=causal)
    assert isinstance(out, Tensor)
    return out


def enable_gqa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch as models call it; is_causal is top-left aligned, which is the same when Sq = Sk."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch for one query a sequence, with the query heads of a KV head as rows."""
    batch, _, heads, dim = q.shape
    rows = q.view(batch, k.shape[2], heads // k.shape[2], dim)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(batch, 1, heads, v.shape[-1])


def operands(args: argparse.Namespace, queries: int, keys: int, dtype: torch.dtype) -> list[Qkv]:
    """Enough sets of q, k and v that the caches together are 8 times the last-level cache; 2 for prefill."""
    kv_bytes = 2 * args.batch_size * keys * args.kv_heads * args.head_dim * dtype.itemsize
    sets = max(2, -(-8 * env.last_level_cache() // kv_bytes)) if queries == 1 else 2

    def tensor(rows: int, heads: int) -> Tensor:
        return torch.randn(args.batch_size, rows, heads, args.head_dim).to(dtype)

    return [
        (tensor(queries, args.heads), tensor(keys, args.kv_heads), tensor(keys, args.kv_heads))
        for _ in range(sets)
    ]


def measure(rivals: Rivals, sets: list[Qkv], seconds: float) -> dict[str, Timing]:
    """Checks that the rivals agree, then times them in turn, each on the next set of operands."""
    q, k, v = sets[0]
    expected = rivals["fastattn"](q, k, v)
    for name, rival in rivals.items():
        torch.testing.assert_close(rival(q, k, v), expected, atol=0.02, rtol=0.02, msg=f"{name} differs")
    turn: Iterator[Qkv] = cycle(sets)
    calls = {name: (lambda rival=rival: rival(*next(turn))) for name, rival in rivals.items()}
    return time_calls(calls, seconds)


class Limits(NamedTuple):
    """What this machine can do, in GB/s and GFLOP/s."""

    bandwidth: float
    gemm: float


def case(
    args: argparse.Namespace, kind: str, keys: int, dtype_name: str, limits: Limits, table: Table,
    facts: dict[str, str | int],
) -> list[Record]:  # fmt: skip
    """Measures one case, prints a row and returns a record for each peer."""
    decode = kind == "decode"
    sets = operands(args, 1 if decode else keys, keys, DTYPES[dtype_name])
    rivals: Rivals = {
        "fastattn": partial(ours, causal=not decode),
        "sdpa enable_gqa": partial(enable_gqa, causal=not decode),
    }
    if decode:
        rivals["sdpa folded"] = folded
    timings = measure(rivals, sets, args.seconds)
    if decode:
        work, metric, unit = sum(t.numel() * t.element_size() for t in sets[0]), "bandwidth", "GB/s"
        bound = ("memory bandwidth", limits.bandwidth)
    else:
        # Two GEMMs of 2 * Sq * Sk * D FLOP a head, of which the causal mask leaves half.
        work, metric, unit = 2 * args.batch_size * args.heads * keys * keys * args.head_dim, "rate", "GFLOP/s"
        bound = (f"{dtype_name} GEMM", limits.gemm)
    name = f"{kind} {dtype_name} {args.heads}/{args.kv_heads}x{args.head_dim} keys={keys}"
    mine = timings.pop("fastattn")
    shared = {"bench": "attention", "case": name, "spread": mine.spread, "claim": "measured", "env": facts}
    records = []
    for peer, theirs in timings.items():
        rate, their_rate = work / mine.median / 1e9, work / theirs.median / 1e9
        gain = ratio(rate, their_rate, higher_is_better=True)
        records.append(Record.of(shared, metric, unit, rate, (peer, their_rate, gain), bound))
        cells = (1e3 * mine.median, peer, 1e3 * theirs.median, gain, rate, bound[1], unit)
        print(table.row(name, *cells), flush=True)
    return records


@torch.inference_mode()
def main() -> None:
    """Measures the limits, then every case."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    facts = env.capture(args.threads)
    print(f"{env.headline(facts)} | {args.threads} threads")
    table = Table(
        [
            Column("case", 34), Column("ours ms", 9, ".3f"), Column("peer", 15), Column("peer ms", 9, ".3f"),
            Column("ratio", 6, ".2f"), Column("rate", 7, ".1f"), Column("limit", 7, ".1f"), Column("unit", 7),
        ]
    )  # fmt: skip
    print(table.header(), flush=True)
    bandwidth = read_bandwidth() / 1e9
    records: list[Record] = []
    for dtype_name in args.data_type:
        limits = Limits(bandwidth, gemm_rate(DTYPES[dtype_name]) / 1e9)
        for kind, lengths in (("decode", args.decode_len), ("prefill", args.prefill_len)):
            for keys in lengths:
                records += case(args, kind, keys, dtype_name, limits, table, facts)
    if args.json:
        write(args.json, records)
    if args.plot:
        from lib.plot import attention

        attention(records, args.plot)


if __name__ == "__main__":
    main()
