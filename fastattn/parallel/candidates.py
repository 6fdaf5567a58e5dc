"""What `fastattn plan` chooses from: policies and schedules that make sense for a phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from ..collectives.compressed import Compressed
from ..collectives.direct import Direct
from ..collectives.exact import Exact
from ..collectives.fused_norm import FusedNorm
from ..collectives.pairwise import Pairwise
from ..collectives.policy import Sum
from ..collectives.star import Star
from ..collectives.tiled import Tiled
from ..quant.codec import Codec
from ..spec import Phase, Point, Schedule, SyncPolicy, TPGroup
from .plan import with_item_bytes
from .policies import to_text
from .schedule import Plain, TokenWeave

#: Shares of the rows: equal tiles; a short one first, for a slow link; a short one last, for a fast one.
TILINGS: tuple[tuple[float, ...], ...] = tuple(
    tuple(map(float, tiles))
    for tiles in (
        (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 1, 1),
        (1, 3, 3, 3), (3, 3, 3, 1), (1,) * 8,
    )
)  # fmt: skip

#: Equal tiles that pass the whole stack.
WEAVES = (2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """The policy of each layer's two sync points, and the schedule, of one phase."""

    attn: tuple[SyncPolicy, ...]
    mlp: tuple[SyncPolicy, ...]
    schedule: Schedule = Plain()  # noqa: RUF009 - frozen

    @classmethod
    def uniform(cls, policy: SyncPolicy, schedule: Schedule, num_layers: int) -> Candidate:
        """One policy for all points."""
        return cls((policy,) * num_layers, (policy,) * num_layers, schedule)

    def policy(self, p: Point) -> SyncPolicy:
        """Of point ``p``."""
        return (self.attn if p.site == "attn" else self.mlp)[p.layer]

    @property
    def exact(self) -> bool:
        """Whether no point rounds to fewer bits."""
        return all(p.exact for p in (*self.attn, *self.mlp))

    @property
    def is_baseline(self) -> bool:
        """Whether it is `Exact` for all points, which everything is compared with."""
        return isinstance(self.schedule, Plain) and all(isinstance(p, Exact) for p in (*self.attn, *self.mlp))

    def __str__(self) -> str:
        """As `policies.parse` reads it where it is uniform."""
        sites = {s: _runs(p) for s, p in (("attn", self.attn), ("mlp", self.mlp))}
        text = sites["attn"]
        if sites["attn"] != sites["mlp"]:
            text = f"attn {sites['attn']} | mlp {sites['mlp']}"
        return text if isinstance(self.schedule, Plain) else f"{to_text(self.schedule)}+{text}"


def _runs(policies: Sequence[SyncPolicy]) -> str:
    return " or ".join(dict.fromkeys(map(_name, policies)))


def _name(policy: SyncPolicy) -> str:
    """Its text without the size of an activation, which is the model's, and with the number of outliers."""
    codec = codec_of(policy)
    if codec is None or not codec.outliers:
        return to_text(with_item_bytes(policy, 4))
    return f"{to_text(with_codec(policy, replace(codec, outliers=())))} ({len(codec.outliers)} outliers)"


def codec_of(policy: SyncPolicy) -> Codec | None:
    """In which format a policy sends; None: values as they are."""
    inner = getattr(policy, "of", policy)
    return inner.codec if isinstance(inner, Compressed) else None


def untiled(policy: SyncPolicy) -> SyncPolicy:
    """How the tiles of a policy are summed; other policies as they are."""
    return policy.of if isinstance(policy, Tiled) else policy


def with_codec(policy: SyncPolicy, codec: Codec) -> SyncPolicy:
    """A compressing policy that sends in that format instead."""
    if isinstance(policy, Tiled):
        return replace(policy, of=cast("Sum", with_codec(policy.of, codec)))
    if isinstance(policy, FusedNorm):
        return replace(policy, of=cast("Pairwise", with_codec(policy.of, codec)))
    assert isinstance(policy, Compressed)
    return replace(policy, codec=codec)


def candidates(
    phase: Phase, rows: int, num_layers: int, g: TPGroup, item_bytes: int, codecs: Sequence[Codec] = ()
) -> list[Candidate]:
    """Everything that could be the fastest for a forward of ``rows`` rows; `Exact` for all points is first.

    With ``codecs`` also what sends in these formats.
    """
    sums = list(_sums(rows, g, item_bytes, codecs))
    whole: list[SyncPolicy] = [*sums]
    if rows >= g.world:
        whole += [FusedNorm(replace(s, scheme="auto")) for s in sums if isinstance(s, Pairwise)]
    found: list[tuple[SyncPolicy, Schedule]] = [(p, Plain()) for p in whole]
    for count in (n for n in WEAVES if rows >= n * (1 if n == 2 else 16)):
        weave = TokenWeave(max(2, rows // 2), (1.0,) * count, multiple=16 if rows >= 64 else 1)
        found += [(p, weave) for p in whole]
    if phase == "prefill":
        fitting = [t for t in TILINGS if rows >= 16 * len(t)]
        found += [(Tiled(s, t), Plain()) for s in sums for t in fitting]
    return [Candidate.uniform(p, s, num_layers) for p, s in dict.fromkeys(found)]


def _sums(rows: int, g: TPGroup, item_bytes: int, codecs: Sequence[Codec]) -> Iterator[Sum]:
    yield Exact(item_bytes)
    schemes = ("one_step", "two_step") if g.world > 2 and rows >= g.world else ("auto",)
    for scheme in schemes:
        yield Direct(item_bytes=item_bytes, scheme=scheme)
    yield from (Star(hub, item_bytes) for hub in range(g.world))
    for codec in codecs:
        yield from (Compressed(codec=codec, scheme=scheme) for scheme in schemes)


def overlaps(c: Candidate) -> bool:
    """Whether some rows compute while the sums of others are under way."""
    return not isinstance(c.schedule, Plain) or any(isinstance(p, Tiled) for p in (*c.attn, *c.mlp))


def family(c: Candidate) -> tuple[str, ...]:
    """What kind of candidate it is: schedule, policies, inner policies, without their parameters.

    Under the plain schedule also a star's hub (the model takes all links for equal) and `Pairwise`'s scheme
    (posting a message costs time that its bytes do not show). Under a weave the number of tiles instead (the
    model takes computing and exchanging for independent, where cores carry the link). Of inner policies the
    name only.
    """
    policies = (c.attn[0], c.mlp[0])
    inner = [getattr(getattr(p, "of", None), "name", "") for p in policies]
    if isinstance(c.schedule, TokenWeave):
        own = str(len(c.schedule.tiles))
    elif isinstance(policies[0], Star):
        own = str(policies[0].hub)
    else:
        own = policies[0].scheme if isinstance(policies[0], Pairwise) else ""
    return (c.schedule.name, *(p.name for p in policies), *inner, own)
