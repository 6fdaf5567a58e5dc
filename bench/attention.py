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

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from lib import env
from lib.args import names, positive, sweep
from lib.limits import gemm_rate, read_bandwidth
from lib.llm_worker import DTYPES
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


def main() -> None:
    """Prints a row a case and rival."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    facts = env.capture(args.threads)
    print(f"{env.headline(facts)} | {args.threads} threads")
    table = Table(
        [
            Column("case", 34), Column("ours ms", 9, ".3f"), Column("peer", 17), Column("peer ms", 9, ".3f"),
            Column("ratio", 6, ".2f"), Column("rate", 7, ".1f"), Column("limit", 7, ".1f"), Column("unit", 7),
        ]
    )  # fmt: skip
    print(table.header(), flush=True)
    bandwidth = read_bandwidth() / 1e9
    shape = f"{args.heads}/{args.kv_heads}x{args.head_dim}"
    records: list[Record] = []
    for dtype_name in args.data_type:
        dtype = DTYPES[dtype_name]
        gemm = gemm_rate(dtype) / 1e9
        cases = [("decode", n) for n in args.decode_len] + [("prefill", n) for n in args.prefill_len]
        for kind, keys in cases:
            decode = kind == "decode"
            sets = operands(args, 1 if decode else keys, keys, dtype)
            rivals: Rivals = {
                "fastattn": partial(ours, causal=not decode),
                "sdpa enable_gqa": partial(enable_gqa, causal=not decode),
            }
            if decode:
                rivals["sdpa folded"] = folded
            with torch.inference_mode():
                timings = measure(rivals, sets, args.seconds)
            flops = 2 * 2 * args.batch_size * args.heads * keys * keys / 2 * args.head_dim
            nbytes = sum(t.numel() * t.element_size() for t in sets[0])
            work, metric, unit = (nbytes, "bandwidth", "GB/s") if decode else (flops, "rate", "GFLOP/s")
            limit = bandwidth if decode else gemm
            mine = timings.pop("fastattn")
            case = f"{kind} {dtype_name} {shape} keys={keys}"
            shared = {
                "bench": "attention", "case": case, "spread": mine.spread, "claim": "measured", "env": facts,
            }  # fmt: skip
            for peer, theirs in timings.items():
                rates = work / mine.median / 1e9, work / theirs.median / 1e9
                gain = ratio(*rates, higher_is_better=True)
                against, bound = (peer, rates[1], gain), ("measured " + unit, limit)
                records.append(Record.of(shared, metric, unit, rates[0], against, bound))
                cells = (1e3 * mine.median, peer, 1e3 * theirs.median, gain, rates[0], limit, unit)
                print(table.row(case, *cells), flush=True)
    if args.json:
        write(args.json, records)
    if args.plot:
        from lib.plot import attention

        attention(records, args.plot)


if __name__ == "__main__":
    main()
