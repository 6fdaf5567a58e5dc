"""What compressed communication costs in quality: perplexity of a real model, compressed against exact sums.

Every partial result, at every sync point, passes through the wire codec. Tensor parallelism is simulated in
one process, with the cuts and the messages of real ranks. The text is Python's language reference; all tokens
of a chunk but the first are scored. Outlier channels are chosen on another text, the docstrings of the
standard library. One row a configuration:

  bits       of a value on the wire, everything counted
  fewer      bytes of 16-bit values over bytes of messages
  change     of the perplexity against exact sums, in percent
  95 %       confidence interval of the change: differences are paired token by token, and chunks are the
             independent samples (Student's t)

A configuration is JSON: the fields of `fastattn.quant.codec.Codec`, but ``outliers`` is how many. ``at`` is a
list of exceptions, each with ``layers`` and ``sites`` (absent: all) and the fields that differ there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastattn
from fastattn.models.generate import Model
from fastattn.models.perplexity import chunks
from fastattn.parallel.calibrate import ChannelShares
from fastattn.parallel.group import set_threads, single
from fastattn.quant.codec import Codec
from fastattn.spec import Point
from lib import env, text
from lib.args import DTYPES, positive
from lib.records import Record, write
from lib.simulated_ranks import SimulatedRanks
from lib.table import Column, Table

# Plain MX, and what was found for 3.4, 3.0 and 2.5 times fewer bytes. Layer 0 gets more bits: with 3-bit
# codes in one layer alone, perplexity rises by 4.0 % if that is layer 0, by 0.6 % if it is layer 1 or 2.
DEFAULT: tuple[dict[str, Any], ...] = (
    {"element": "e2m1"},
    {
        "element": "e2m1", "scale": "e4m3", "search": True, "outliers": 16,
        "at": [{"layers": [0], "element": "e2m3", "scale": "fp16"}],
    },
    {
        "element": "e2m2", "block": 64, "scale": "e4m3", "search": True, "outliers": 8,
        "at": [{"layers": [0], "element": "e2m3"}],
    },
    {
        "element": "e2m3", "block": 64, "scale": "fp16", "search": True, "outliers": 3,
        "at": [{"layers": [0], "element": "int8", "search": False}],
    },
)  # fmt: skip
# 97.5 % quantile of Student's t, by degrees of freedom; beyond the last that of the normal distribution.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
           2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
           2.045, 2.042, 2.040, 2.037, 2.035, 2.032, 2.030, 2.028, 2.026, 2.024, 2.023, 2.021)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", help="a directory, a GGUF file, or smollm2 (default)")
    p.add_argument("--inference_data_type", choices=tuple(DTYPES), default="bf16", help="default: bf16")
    p.add_argument("--ranks", type=positive, default=2, help="simulated; default: 2")
    p.add_argument(
        "--codec", type=configuration, action="append", metavar="JSON",
        help="may be given several times; default: four of about 3.8, 3.4, 3.0 and 2.5 times fewer bytes",
    )  # fmt: skip
    p.add_argument("--context", type=positive, default=512, help="tokens of a chunk; default: 512")
    p.add_argument("--chunks", type=positive, default=8, help="default: 8; 41 for 20,000 tokens")
    p.add_argument("--calibration_chunks", type=positive, default=12, help="default: 12")
    p.add_argument("--threads", type=positive, help="default: the cores of this machine")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    return p


def configuration(text: str) -> dict[str, Any]:
    """A configuration from the command line, checked with channels 0, 1, 2 ... as outliers."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError(f"{text!r}, expected a JSON object")  # noqa: TRY004 - from the command line
        for fields in (value, *({**value, **e} for e in value.get("at", []))):
            codec(fields, range(4096))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def codec(fields: dict[str, Any], channels: Sequence[int]) -> Codec:
    """The codec of some point: the first of ``channels`` (the largest first) are its outliers."""
    plain = {k: v for k, v in fields.items() if k not in ("at", "layers", "sites")}
    return Codec.from_json({**plain, "outliers": sorted(channels[: plain.get("outliers", 0)])})


def codecs(config: dict[str, Any], shares: ChannelShares, layers: int) -> dict[tuple[int, str], Codec]:
    """The codec of every point."""
    result = {}
    for layer in range(layers):
        for site in ("attn", "mlp"):
            fields = dict(config)
            for exception in config.get("at", []):
                if layer in exception.get("layers", [layer]) and site in exception.get("sites", [site]):
                    fields |= exception
            ranked = shares.share(layer, site).sort(descending=True, stable=True).indices.tolist()
            result[layer, site] = codec(fields, ranked)
    return result


def codec_at(codecs: dict[tuple[int, str], Codec], p: Point) -> Codec:
    """The codec of a point, whatever its phase."""
    return codecs[p.layer, p.site]


@dataclass(frozen=True)
class Change:
    """Of the perplexity, in percent, with a 95 % confidence interval."""

    percent: float
    low: float
    high: float

    @classmethod
    def between(cls, exact: Tensor, ours: Tensor) -> Change:
        """From log-likelihood losses (chunks, tokens) of the same tokens."""
        means = (ours.double() - exact.double()).mean(1)
        count, mean = len(means), float(means.mean())
        quantile = STUDENT[count - 2] if 2 <= count <= len(STUDENT) + 1 else 1.96 if count > 1 else math.nan
        half = quantile * float(means.std()) / math.sqrt(count) if count > 1 else math.nan
        return cls(*(100 * math.expm1(d) for d in (mean, mean - half, mean + half)))


def pieces(model: Model, long: str, context: int, count: int) -> list[list[int]]:
    """``count`` chunks of a text; SystemExit when it has too few tokens."""
    try:
        return chunks(model.tokenizer, long, context, count)
    except ValueError as error:
        raise SystemExit(f"--context, --chunks, --calibration_chunks: {error}") from None


@torch.inference_mode()
def losses(
    model: Model,
    ranks: SimulatedRanks,
    pick: Callable[[Point], Codec | None],
    texts: Sequence[Sequence[int]],
) -> Tensor:
    """Negative log-likelihood (chunks, tokens) of every token but the first of each text."""
    ranks.codec = pick
    rows = []
    for ids in texts:
        (logits,) = model.logits([ids])
        rows.append(cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none"))
    return torch.stack(rows)


def main() -> None:
    """Exact sums first, then every configuration on the same chunks."""
    args = parser().parse_args()
    threads = set_threads(single(), args.threads).num
    model = fastattn.load(args.model, dtype=DTYPES[args.inference_data_type])
    ranks = SimulatedRanks(model.config, args.ranks)
    model.decoder.policy = lambda p: ranks
    machine = env.capture(threads)
    hidden, layers = model.config.hidden_size, model.config.num_layers
    print(f"{args.model}, {args.ranks} simulated ranks, {args.inference_data_type}: {env.headline(machine)}")

    ranks.shares = shares = ChannelShares()
    calibration = pieces(model, text.docstrings(), args.context, args.calibration_chunks)
    losses(model, ranks, lambda p: None, calibration)
    ranks.shares = None

    texts = pieces(model, text.reference(), args.context, args.chunks)
    exact = losses(model, ranks, lambda p: None, texts)
    perplexity = float(exact.double().mean().exp())
    print(f"exact sums: perplexity {perplexity:.4f} over {exact.numel()} tokens")
    table = Table([Column("bits", 5, ".2f"), Column("fewer", 6, ".3f"), Column("change %", 8, "+.2f"),
                   Column("95 %", 16), Column("codec", 60)])  # fmt: skip
    print(table.header())
    records = []
    for config in args.codec or DEFAULT:
        by_site = codecs(config, shares, layers)
        bits = sum(c.bits(hidden) for c in by_site.values()) / len(by_site)
        change = Change.between(exact, losses(model, ranks, partial(codec_at, by_site), texts))
        name, interval = json.dumps(config), f"{change.low:+.2f} .. {change.high:+.2f}"
        print(table.row(bits, 16 / bits, change.percent, interval, name), flush=True)
        case = f"{Path(args.model).name} ranks={args.ranks} tokens={exact.numel()} {name}"
        spread = (change.high - change.low) / 2 / 100
        shared = {"bench": "compression", "case": case, "spread": spread, "claim": "measured", "env": machine}
        records += [
            Record.of(shared, "perplexity change", "%", change.percent, ("exact sums", 0.0, None)),
            Record.of(shared, "effective bits", "", bits, ("16-bit values", 16.0, 16 / bits)),
        ]
    if args.json:
        write(args.json, records)


if __name__ == "__main__":
    main()
