"""What a data type, and the permission to quantize activations, cost in quality: perplexity of a real model.

The text is the language documentation that comes with Python (pydoc_data.topics), English prose with some
code. Chunks of --context tokens lie evenly over it. Of each chunk the second half is scored, so that every
scored token has between half and all of the context before it. A forward takes --step tokens: a few, like
a step of generation, or all of a chunk, like a prompt. Only few are ever multiplied as integers, so with
many rows int8 shows no cost. One row a configuration:

  perplexity   exp of the mean negative log-likelihood per token; lower is better
  change       against the first configuration
  KL           mean Kullback-Leibler divergence from the first configuration's predictions, in nats
  same top     tokens for which both find the same next token the likeliest
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

import fastattn
from fastattn.models.generate import Model
from fastattn.models.perplexity import Perplexity, chunks, perplexity, predictions, token_nll
from fastattn.parallel.group import set_threads, single
from lib import env, text
from lib.args import ACTS, DTYPES, names, positive
from lib.records import Record, write
from lib.table import Column, Table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", help="a directory, a GGUF file, or smollm2 (default)")
    p.add_argument(
        "--inference_data_type", type=names(tuple(DTYPES)), default=("fp32", "bf16"), metavar="T,T",
        help=f"out of {', '.join(DTYPES)}; default: fp32,bf16",
    )  # fmt: skip
    p.add_argument(
        "--act", type=names(tuple(ACTS)), default=("none", "int8"), metavar="A,A",
        help="none: activations are never quantized; int8: they may be; default: both",
    )  # fmt: skip
    p.add_argument("--context", type=positive, default=512, help="tokens of a chunk; default: 512")
    p.add_argument("--chunks", type=positive, default=16, help="default: 16")
    p.add_argument("--step", type=positive, default=4, help="tokens a forward; default: 4")
    p.add_argument("--threads", type=positive, help="default: the cores of this machine")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    return p


@dataclass
class Score:
    """What the scored tokens of one configuration add up to."""

    dtype: str
    act: str
    losses: list[Tensor] = field(default_factory=list)  # of every token, by chunk
    kl: float = 0.0
    same_top: int = 0

    def add(self, logp: Tensor, exact: Tensor, targets: Tensor) -> None:
        """``logp``: log-probabilities (n, vocab) of this configuration; ``exact``: of the first one."""
        self.losses.append(token_nll(logp, targets))
        self.kl += float(kl_div(logp, exact, reduction="sum", log_target=True))
        self.same_top += int((logp.argmax(-1) == exact.argmax(-1)).sum())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.losses))

    @property
    def perplexity(self) -> Perplexity:
        return perplexity(torch.cat(self.losses))


def main() -> None:
    """Every configuration sees a chunk before the next chunk comes."""
    args = parser().parse_args()
    threads = set_threads(single(), args.threads).num
    configurations = list(product(args.inference_data_type, args.act))
    models = [fastattn.load(args.model, dtype=DTYPES[d], act=ACTS[a]) for d, a in configurations]
    scores = [Score(d, a) for d, a in configurations]
    machine = env.capture(threads)
    print(f"{args.model}: {env.headline(machine)}")
    try:
        pieces = chunks(models[0].tokenizer, text.reference(), args.context, args.chunks)
    except ValueError as error:
        raise SystemExit(f"--context, --chunks: {error}") from None
    for chunk in pieces:
        score(models, scores, chunk, args.step)
    report(scores)
    if args.json:
        what = f"context={args.context} chunks={args.chunks} step={args.step}"
        write(args.json, to_records(Path(args.model).name, what, scores, machine))


@torch.inference_mode()
def score(models: Sequence[Model], scores: Sequence[Score], chunk: list[int], step: int) -> None:
    """Adds one chunk's second half to the score of each model."""
    exact = None
    for model, sums in zip(models, scores, strict=True):
        found = predictions(model, chunk, step)
        assert found is not None, "this process is rank 0"
        logp, targets = found
        exact = logp if exact is None else exact
        sums.add(logp, exact, targets)


def report(scores: Sequence[Score]) -> None:
    """The table."""
    table = Table(
        [
            Column("dtype", 5),
            Column("act", 4),
            Column("tokens", 6, "d"),
            Column("perplexity", 10, ".4f"),
            Column("+-", 6, ".3f"),
            Column("change %", 8, "+.3f"),
            Column("KL", 9, ".6f"),
            Column("same top %", 10, ".2f"),
        ]
    )
    print(table.header())
    for s in scores:
        found = s.perplexity
        change = 100 * (found.value / scores[0].perplexity.value - 1)
        same = 100 * s.same_top / s.tokens
        print(table.row(s.dtype, s.act, s.tokens, *found, change, s.kl / s.tokens, same))


def to_records(model: str, what: str, scores: Sequence[Score], machine: dict[str, str | int]) -> list[Record]:
    """Three records a configuration, with the first one as the peer."""
    first = scores[0]
    name = f"fastattn {first.dtype} act={first.act}"
    records = []
    for s in scores:
        case = f"{model} {s.dtype} act={s.act} {what}"
        shared = {"bench": "perplexity", "case": case, "spread": 0.0, "claim": "measured", "env": machine}
        base, found = first.perplexity.value, s.perplexity.value
        records += [
            Record.of(shared, "perplexity", "", found, (name, base, base / found)),
            Record.of(shared, "KL divergence", "nats", s.kl / s.tokens),
            Record.of(shared, "same top token", "%", 100 * s.same_top / s.tokens),
        ]
    return records


if __name__ == "__main__":
    main()
