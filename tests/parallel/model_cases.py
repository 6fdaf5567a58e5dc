"""Cases that every rank of a group runs (run.py): a whole model, MODEL, under every policy and schedule."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.collectives import exchange
from fastattn.memory.paged import PagedKvCache
from fastattn.models.generate import Model
from fastattn.models.sampling import SamplingParams
from fastattn.parallel.schedule import TokenWeave
from fastattn.spec import CacheFull, SyncPlan, TPGroup
from tests.parallel.cases import same_bits
from tests.parallel.run import Case, run

EXACT = (
    "star", "star:hub=1", "direct:scheme=one_step", "direct:scheme=two_step", "tiled:tiles=1/2/1",
    "tiled+direct", "fused_norm", "token_weave:min_tokens=2+exact",
    "token_weave:min_tokens=2,tiles=3/7,multiple=1+fused_norm", "token_weave:min_tokens=2+tiled+star",
    "token_weave:min_tokens=2+direct:scheme=two_step", "token_weave:min_tokens=2,tiles=1/1/1/1+exact",
    "token_weave:min_tokens=4,tiles=1/3/2+fused_norm",
)  # fmt: skip
INT8 = "compressed:element=int8,scale=fp16"
LOSSY = (
    INT8, f"fused_norm+{INT8}", f"tiled+{INT8}", f"token_weave:min_tokens=2+{INT8}",
    f"{INT8},scheme=two_step",
)  # fmt: skip
LENGTHS = (1, 2, 3, 17, 33, 64, 130)


@cache
def model(sync: str, g: TPGroup) -> Model:
    return fastattn.load(os.environ["MODEL"], dtype="float32", tp=g, sync=sync)


def hidden_states(m: Model, batches: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """Of ragged prefills and decode steps of the same sequences, drawn from one seed."""
    generator = torch.Generator().manual_seed(5)
    attention = m.decoder.blocks[0][0]
    cache = PagedKvCache(m.config.num_layers, 64, 16, attention.kv_heads, m.config.head_dim)
    out = []
    for new in batches:
        step = cache.reserve(range(len(new)), new)
        ids = torch.randint(m.config.vocab_size, (sum(new),), generator=generator)
        out.append(m.decoder.forward(ids, step, cache))
    return out


# A long prompt alone; ragged prompts; decode steps; prefill of one sequence while others decode.
BATCHES = [
    *(((n,),) for n in LENGTHS),
    ((5, 1, 40), (1, 1, 1), (1, 9, 1), (1, 1, 1)),
    ((1,) * 7, (1,) * 7),
    ((30, 2, 31), (33, 1, 1)),
]


def every_exact_policy_computes_the_same_model(g: TPGroup) -> None:
    for sync in EXACT:
        if sync == "star:hub=1" and g.world == 1:
            continue
        for batches in BATCHES:
            wanted = hidden_states(model("exact", g), batches)
            for found, exact in zip(hidden_states(model(sync, g), batches), wanted, strict=True):
                assert (found - exact).abs().max() <= 2e-5 * exact.abs().max(), (sync, batches)
                assert same_bits(g, found)


def lossy_policies_stay_near(g: TPGroup) -> None:
    for sync in LOSSY:
        for batches in BATCHES:
            wanted = hidden_states(model("exact", g), batches)
            for found, exact in zip(hidden_states(model(sync, g), batches), wanted, strict=True):
                error = (found - exact).abs().max() / exact.abs().max()
                assert error <= (2e-5 if g.world == 1 else 0.06), (sync, batches)
                assert same_bits(g, found)


def policies_mix_by_layer_and_point(g: TPGroup) -> None:
    """Each point of a plan has another policy, scattering ones between those that need all rows."""
    plans = [_plan(model(sync, g)) for sync in ("fused_norm", "exact", "tiled+star", "direct")]
    points = {p: plans[(p.layer + (p.site == "mlp")) % len(plans)].points[p] for p in plans[0].points}
    mixed = fastattn.load(os.environ["MODEL"], dtype="float32", tp=g, sync=plans[0]._replace(points=points))
    woven = {"prefill": TokenWeave(min_tokens=2), "decode": TokenWeave(min_tokens=2)}
    for schedule in (mixed.decoder.schedule, woven):
        mixed.decoder.schedule = schedule
        for batches in BATCHES:
            wanted = hidden_states(model("exact", g), batches)
            for found, exact in zip(hidden_states(mixed, batches), wanted, strict=True):
                assert (found - exact).abs().max() <= 2e-5 * exact.abs().max(), batches


def _plan(m: Model) -> SyncPlan:
    from fastattn.models.checkpoint import open_checkpoint
    from fastattn.parallel import plan

    policies = {p: m.decoder.policy(p) for p in plan.points_of(m.config.num_layers)}
    found = open_checkpoint(os.environ["MODEL"]).fingerprint()
    return SyncPlan(found, m.group.world, m.group.weights, policies, m.decoder.schedule, {})


def generation_gives_the_same_tokens(g: TPGroup) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], list(range(40))]
    wanted = [c.token_ids for c in model("exact", g).generate(prompts if g.rank == 0 else [], params)]
    for sync in EXACT:
        if sync == "star:hub=1" and g.world == 1:
            continue
        found = model(sync, g).generate(prompts if g.rank == 0 else [], params)
        assert [c.token_ids for c in found] == wanted, sync


def an_error_of_the_caller_ends_the_call_on_every_rank(g: TPGroup) -> None:
    """And only the call: the ranks go on together."""
    m, prompts = model("exact", g), [[3, 1, 4], [1, 5]] if g.rank == 0 else []
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    wanted = [c.token_ids for c in m.generate(prompts, params)]

    for fails_at in (0, 5):
        seen: list[int] = []

        def on_token(_seq: int, token: int, _text: str, seen: list[int] = seen, at: int = fails_at) -> None:
            seen.append(token)
            if len(seen) > at:
                raise KeyError("the caller's")

        with pytest.raises(ValueError if g.rank else KeyError):
            m.generate(prompts, params, on_token=on_token)
        assert [c.token_ids for c in m.generate(prompts, params)] == wanted


def a_cache_without_room_on_one_rank_is_full_on_all(g: TPGroup) -> None:
    m, prompts = model("exact", g), [[3, 1, 4]] if g.rank == 0 else []
    before = m.decoder.blocks
    if g.rank == g.world - 1:  # as if this rank's machine had less memory
        attention, mlp = before[0]
        m.decoder.blocks = ((replace(attention, kv_heads=1 << 60), mlp), *before[1:])
    try:
        for call in (m.generate, m.logits):
            with pytest.raises(
                CacheFull, match="cannot be allocated" if m.decoder.blocks != before else "rank"
            ):
                call(prompts)
    finally:
        m.decoder.blocks = before
    assert len(m.generate(prompts)) == 1


def weaving_overlaps_each_tile_with_the_others_exchanges(g: TPGroup) -> None:
    """Between the start of a tile's sum and its end, the other tiles compute."""
    if g.world == 1:
        return
    events: list[str] = []
    m = model("exact", g)
    inner, policy = m.decoder.policy, None

    class Noting:
        def __init__(self, of, rows: int) -> None:  # type: ignore[no-untyped-def]
            self._of, self._rows = of, rows

        def overlap(self) -> Noting:
            self._of.overlap()
            return self

        def wait(self):  # type: ignore[no-untyped-def]
            out = self._of.wait()
            events.append(f"end {self._rows}")
            return out

        def cancel(self) -> None:
            self._of.cancel()

    class Traced:
        name = "exact"

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            return getattr(inner, name)

        def start(self, p, make, s, e, group):  # type: ignore[no-untyped-def]
            work = inner(p).start(p, make, s, e, group)
            events.append(f"start {make.rows}")
            return Noting(work, make.rows)

    before = m.decoder.schedule
    policy = Traced()
    points = 2 * m.config.num_layers
    for shares, tiles in (((2, 3), (4, 6)), ((1, 3, 5, 1), (1, 3, 5, 1))):
        events.clear()
        try:
            m.decoder.policy, m.decoder.schedule = (lambda p: policy), {"prefill": TokenWeave(2, shares, 1)}
            hidden_states(m, ((10,),))
        finally:
            m.decoder.policy, m.decoder.schedule = inner, before
        middle = [f"{what} {n}" for n in tiles for what in ("end", "start")] * (points - 1)
        assert events == [*(f"start {n}" for n in tiles), *middle, *(f"end {n}" for n in tiles)]


def an_error_in_one_tile_awaits_the_others(g: TPGroup) -> None:
    if g.world == 1:
        return
    m = model("token_weave:min_tokens=2+exact", g)
    attention, mlp = m.decoder.blocks[1]

    class Broken:
        act, weights, widths = mlp.gate_up.act, mlp.gate_up.weights, mlp.gate_up.widths
        calls = 0

        def __call__(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            if self.calls == 2:
                raise KeyError("broken")
            return mlp.gate_up(x)

    before, fused = m.decoder.blocks, m.decoder.fused
    m.decoder.blocks = (before[0], (attention, replace(mlp, gate_up=Broken())), *before[2:])
    m.decoder.fused = False
    try:
        hidden_states(m, ((10,),))
        raise AssertionError("the error was lost")
    except KeyError:
        pass
    finally:
        m.decoder.blocks, m.decoder.fused = before, fused
    y = torch.ones(10)
    exchange.all_reduce(g, y, "after the error").wait()
    assert torch.equal(y, torch.full_like(y, g.world))
    assert exchange.idle(5)


CASES: tuple[Case, ...] = (
    every_exact_policy_computes_the_same_model,
    lossy_policies_stay_near,
    policies_mix_by_layer_and_point,
    generation_gives_the_same_tokens,
    an_error_of_the_caller_ends_the_call_on_every_rank,
    a_cache_without_room_on_one_rank_is_full_on_all,
    weaving_overlaps_each_tile_with_the_others_exchanges,
    an_error_in_one_tile_awaits_the_others,
)

if __name__ == "__main__":
    run(CASES)
