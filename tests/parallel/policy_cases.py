"""Cases that every rank of a group runs (run.py): the sync policies on partial results that are known."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn import ops
from fastattn.collectives import exchange
from fastattn.collectives.compressed import Compressed
from fastattn.collectives.direct import Direct
from fastattn.collectives.dropped import Dropped
from fastattn.collectives.exact import Exact
from fastattn.collectives.fused_norm import FusedNorm
from fastattn.collectives.star import Star
from fastattn.collectives.sums import EAGER_BYTES, PIECES, Partial, pieces, row_spans
from fastattn.collectives.tiled import Tiled
from fastattn.collectives.wire import Plain
from fastattn.quant import packed
from fastattn.quant.codec import Codec
from fastattn.spec import Epilogue, Point, Stream, SyncPolicy, TPGroup
from tests.parallel.cases import DTYPES, close, rms, same_bits, within_rounding
from tests.parallel.run import Case, run

POINT = Point(3, "attn", "prefill")
HIDDEN = 96
INT8 = Codec(element="int8", block=32, scale="fp16")


class Given:
    """A half-block whose partial result is known; notes which rows were asked for."""

    def __init__(self, partial: Tensor) -> None:
        self.rows, self._partial = partial.shape[0], partial
        self.row_parallel = packed.dense(torch.zeros(partial.shape[1], 1))
        self.asked: list[tuple[int, int]] = []

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        self.asked.append((lo, hi))
        return self._partial[lo:hi].clone()

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        return self._partial.new_zeros(hi - lo, 1)


def exact_policies(world: int) -> list[SyncPolicy]:
    sums = [Exact(), Star(), Star(world - 1), Direct(scheme="one_step"), Direct(scheme="two_step")]
    return [*sums, *(Tiled(s, (1, 2, 1)) for s in sums), FusedNorm()]


def lossy_policies() -> list[SyncPolicy]:
    sums = [Compressed(codec=INT8, scheme=s) for s in ("one_step", "two_step")]
    return [*sums, *(Tiled(s, (2, 1)) for s in sums), FusedNorm(sums[0])]


class Problem:
    """Partial results of all ranks, residual and epilogue; the same on every rank."""

    def __init__(self, g: TPGroup, rows: int, dtype: torch.dtype, *, biased: bool, pending: bool) -> None:
        self.g, self.rows = g, rows
        self.partials = torch.randn(g.world, rows, HIDDEN).to(dtype)
        self.pending = torch.randn(g.world, rows, HIDDEN).to(dtype) if pending else None
        self.residual, self.bias = torch.randn(rows, HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype)
        self.weight = (torch.rand(HIDDEN) + 0.5).to(dtype)
        self.biased = biased

    def norm(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, self.weight, 1e-5, residual)

    def terms(self) -> list[Tensor]:
        pending = [] if self.pending is None else list(self.pending)
        bias = [self.bias.expand_as(self.residual)] if self.biased else []
        return [*self.partials, *pending, self.residual, *bias]

    def run(self, policy: SyncPolicy, *, scattered: bool = False) -> Stream:
        residual, rows = self.residual, None
        if scattered and self.g.world > 1:
            rows = row_spans(self.rows, self.g.world)[self.g.rank]
            residual = residual[rows[0] : rows[1]]
        stream = Stream(residual, None, None if self.pending is None else self.pending[self.g.rank], rows)
        epilogue = Epilogue(self.bias if self.biased else None, self.norm)
        make = Given(self.partials[self.g.rank])
        return policy.start(POINT, make, stream, epilogue, self.g).wait()

    def residual_of(self, out: Stream) -> Tensor:
        """All rows of a stream's residual."""
        if out.rows is None:
            return out.residual
        padded = torch.zeros(self.rows, HIDDEN, dtype=out.residual.dtype)
        padded[out.rows[0] : out.rows[1]] = out.residual
        shares = exchange.all_gather(self.g, padded, "residual of the test")
        return torch.stack(shares).sum(0)


def problems(g: TPGroup) -> Iterator[Problem]:
    for dtype in DTYPES:
        for rows, biased, pending in (
            (1, False, False),
            (2, True, True),
            (7, True, False),
            (33, False, True),
            (401, True, False),  # a star's travel in pieces
        ):
            yield Problem(g, rows, dtype, biased=biased, pending=pending)


# ------------------------------------------------------------------------------------------------ cases
def exact_policies_equal_float64(g: TPGroup) -> None:
    for problem in problems(g):
        terms = problem.terms()
        total = torch.stack([t.double() for t in terms]).sum(0)
        plain = terms[0]
        for term in terms[1:]:
            plain = plain + term
        for policy in exact_policies(g.world):
            for scattered in (False, True):
                out = problem.run(policy, scattered=scattered)
                assert out.hidden is not None
                assert out.pending is None
                assert (out.rows is not None) == (policy.scatters and g.world > 1)
                within_rounding(problem.residual_of(out), terms)
                weight = problem.weight
                close(out.hidden, rms(plain, weight), rms(total, weight.double()))
                assert same_bits(g, out.hidden)
                if out.rows is None:
                    assert same_bits(g, out.residual)


def lossy_policies_err_by_their_format_alone(g: TPGroup) -> None:
    """INT8 with a 16-bit scale errs by half a step, amax / 127 / 2 of a block, and each rank adds its own."""
    for problem in problems(g):
        total = torch.stack([t.double() for t in problem.terms()]).sum(0)
        for policy in lossy_policies():
            out = problem.run(policy)
            assert out.hidden is not None
            error = (problem.residual_of(out).double() - total).abs().max()
            eps = torch.finfo(problem.residual.dtype).eps
            largest = float(problem.partials.abs().max()) * (2 if problem.pending is not None else 1)
            step = largest / 127 * (1.01 + eps) if g.world > 1 else 0.0
            two_steps = (1 + 1.1 * g.world) * step
            assert error <= two_steps + 8 * eps * float(total.abs().max() + g.world * largest)
            assert same_bits(g, out.hidden)


def a_star_uses_both_directions_of_its_hubs_link(g: TPGroup) -> None:
    """The sums of the first rows leave while the hub waits for the last ones."""
    hub = g.world - 1
    if g.world == 1:
        return
    events: list[str] = []
    swap, wait = exchange.Lane.swap, exchange.Pending.wait

    def noted(lane, outgoing, incoming, step=0):  # type: ignore[no-untyped-def]
        pending = swap(lane, outgoing, incoming, step)
        if outgoing:
            events.append(f"send {step}")
        elif step < PIECES:
            arrivals.append(pending)
        return pending

    def waited(pending: exchange.Pending) -> None:
        wait(pending)
        if pending in arrivals:
            events.append(f"arrived {arrivals.index(pending)}")

    arrivals: list[exchange.Pending] = []
    problem = Problem(g, 401, torch.float32, biased=False, pending=False)
    exchange.Lane.swap, exchange.Pending.wait = noted, waited  # type: ignore[assignment,method-assign]
    try:
        problem.run(Star(hub))
    finally:
        exchange.Lane.swap, exchange.Pending.wait = swap, wait  # type: ignore[method-assign]
    if g.rank == hub:
        assert events.index(f"send {PIECES}") < events.index("arrived 1"), events


def tiles_are_summed_while_the_next_is_computed(g: TPGroup) -> None:
    """Each tile but the first is asked for after the sum of the one before was posted."""
    posted: list[int] = []

    class Noting(Exact):
        def steps(self, lane: exchange.Lane, x: Partial):  # type: ignore[no-untyped-def]
            going = super().steps(lane, x)
            first = next(going)
            posted.append(len(make.asked))
            yield first
            return (yield from going)

    partial = torch.randn(12, HIDDEN)
    make = Given(partial)
    out = Tiled(Noting(), (1, 1, 2)).start(POINT, make, Stream(partial, None), Epilogue(None, None), g).wait()
    if g.world > 1:
        assert make.asked == [(0, 3), (3, 6), (6, 12)]
        assert posted == [1, 2, 3]
    torch.testing.assert_close(out.residual, partial * (g.world + 1))


def short_receives_are_posted_before_computing_long_ones_after(g: TPGroup) -> None:
    """Announcements travel meanwhile: a message waits for its receiver's. Long ones are asked for afterwards,
    but from a star's hub, which answers only after this rank has sent.
    """
    few, many = 4 * g.world, g.world * (1 + EAGER_BYTES // (4 * HIDDEN))
    _receives_are_posted(g, few, before=True)
    _receives_are_posted(g, many, before=False)


def _receives_are_posted(g: TPGroup, rows: int, *, before: bool) -> None:
    posted: list[str] = []
    rank, world = g.rank, g.world
    expected = {
        "one_step": world - 1,
        "two_step": 2 * (world - 1),
        "star": (world - 1 if rank == 0 else 1) * len(pieces(rows, Plain(), HIDDEN)),
        "fused_norm": 2 * (world - 1),
    }
    policies: list[SyncPolicy] = [Direct(scheme="one_step"), Direct(scheme="two_step"), Star(), FusedNorm()]
    irecv = exchange.dist.irecv

    def noted(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        posted.append("irecv")
        return irecv(*arguments, **options)

    class Asked(Given):
        def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
            asked.append(len(posted))
            return super().partial(lo, hi, out)

    exchange.dist.irecv = noted
    try:
        for name, policy in zip(expected, policies, strict=True):
            asked: list[int] = []
            posted.clear()
            x = torch.ones(rows, HIDDEN)
            epilogue = Epilogue(None, lambda y, r: (y, y if r is None else y + r))
            policy.start(POINT, Asked(x), Stream(x, None), epilogue, g).wait()
            count = expected[name] if world > 1 else 0
            assert asked == [count if before or (name == "star" and rank) else 0], name
            assert len(posted) == count, name
    finally:
        exchange.dist.irecv = irecv


def an_error_in_computing_leaves_the_group_usable(g: TPGroup) -> None:
    """On all ranks, as of a call that no backend supports; the receives that were posted are given up."""

    class Failing(Given):
        def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
            raise ValueError("cannot compute")

    x = torch.ones(4 * g.world, HIDDEN)
    for policy in exact_policies(g.world):
        try:
            policy.start(POINT, Failing(x), Stream(x, None), Epilogue(None, None), g).wait()
        except ValueError as error:
            assert str(error) == "cannot compute"  # noqa: PT017 (no pytest among ranks)
        else:
            raise AssertionError(policy)
        out = policy.start(POINT, Given(x), Stream(x, None), Epilogue(None, None), g).wait()
        if out.rows is None:
            torch.testing.assert_close(out.residual, x * (1 + g.world))
    assert exchange.idle(1)


def tiles_of_no_rows_are_left_out(g: TPGroup) -> None:
    for rows in (1, 2, 3):
        partial = torch.randn(rows, HIDDEN)
        stream, epilogue = Stream(partial, None), Epilogue(None, None)
        out = Tiled(Exact(), (1, 100, 1, 1)).start(POINT, Given(partial), stream, epilogue, g).wait()
        torch.testing.assert_close(out.residual, partial * (g.world + 1))


def no_rows_are_summed_to_no_rows(g: TPGroup) -> None:
    x = torch.ones(0, HIDDEN)
    for policy in (Star(), Star(g.world - 1), Direct(scheme="one_step"), Direct(scheme="two_step")):
        out = policy.start(POINT, Given(x), Stream(x, None), Epilogue(None, None), g).wait()
        assert out.residual.shape == (0, HIDDEN), policy


def bytes_counted_are_the_formulas(g: TPGroup) -> None:
    rows = 4 * g.world  # shares are equal, so that every rank sends what the busiest one sends
    partial = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    codec = Codec(element="e2m1", block=32)
    policies: list[SyncPolicy] = [Direct(item_bytes=2, scheme=s) for s in ("one_step", "two_step")]
    policies += [Compressed(codec=codec, scheme=s) for s in ("one_step", "two_step")]
    policies += [Tiled(policies[0], (1, 1)), FusedNorm(policies[0]), FusedNorm(policies[2])]
    policies += [Star(g.rank, item_bytes=2)] if g.world == 1 else [Star(0, item_bytes=2)]
    for policy in policies:
        exchange.traffic.clear()
        stream, epilogue = Stream(partial, None), Epilogue(None, lambda x, r: (x, x if r is None else x + r))
        policy.start(POINT, Given(partial), stream, epilogue, g).wait()
        expected = policy.wire_bytes(rows, HIDDEN, g.world)
        if policy.name == "star" and g.rank:
            expected //= g.world - 1
        assert exchange.traffic.bytes["send"] == (expected if g.world > 1 else 0), policy


def dropped_point_keeps_the_residual_exact(g: TPGroup) -> None:
    """Y is dropped, Z summed: residual + b_o + b_down + sum(Y + Z), with each bias counted once."""
    for dtype in DTYPES:
        first = Problem(g, 9, dtype, biased=True, pending=False)
        view = first.run(Dropped())
        assert view.hidden is not None
        own = first.residual.double() + first.bias.double() + first.partials[g.rank].double()
        same = first.residual + first.bias + first.partials[g.rank]
        close(view.hidden, rms(same, first.weight), rms(own, first.weight.double()))
        second = Problem(g, 9, dtype, biased=True, pending=False)
        for policy in exact_policies(g.world):
            stream, make = view, Given(second.partials[g.rank])
            out = policy.start(
                POINT._replace(site="mlp"), make, stream, Epilogue(second.bias, second.norm), g
            ).wait()
            terms = [*first.terms(), *second.partials, second.bias.expand_as(first.residual)]
            within_rounding(second.residual_of(out), terms)


def exchanges_under_way_do_not_mix(g: TPGroup) -> None:
    """Several at once, waited for in another order than they were started, by both threads."""

    def start(i: int, policy: SyncPolicy):  # type: ignore[no-untyped-def]
        x = torch.full((5 + i, HIDDEN), float(i + g.rank))
        stream = Stream(torch.zeros_like(x), None)
        return policy.start(POINT, Given(x), stream, Epilogue(None, None), g)

    policies = [p for p in exact_policies(g.world) if p.name in ("star", "direct")]
    works = [start(i, p) for i, p in enumerate(policies)]
    for work in works[::2]:
        work.overlap()
    order = torch.randperm(len(works)).tolist()
    for i in order:
        expected = float(sum(i + r for r in range(g.world)))
        assert torch.equal(works[i].wait().residual, torch.full((5 + i, HIDDEN), expected))
        assert torch.equal(works[i].wait().residual, torch.full((5 + i, HIDDEN), expected))


def background_steps_keep_backend_and_inference_mode(g: TPGroup) -> None:
    seen = []

    def norm(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        from fastattn import dispatch

        seen.append((dispatch.named(), torch.is_inference_mode_enabled(), threading.current_thread().name))
        assert residual is not None
        return x, x + residual

    from fastattn.dispatch import use_backend

    with torch.inference_mode(), use_backend("sdpa"):
        x = torch.ones(6, HIDDEN)
        FusedNorm().start(POINT, Given(x), Stream(x, None), Epilogue(None, norm), g).overlap().wait()
    assert [s[:2] for s in seen] == [("sdpa", True)]


def a_cancelled_policy_leaves_the_group_usable(g: TPGroup) -> None:
    x = torch.ones(6, HIDDEN)
    for policy in [*exact_policies(g.world), *lossy_policies()]:
        epilogue = Epilogue(None, lambda y, r: (y, y if r is None else y + r))
        policy.start(POINT, Given(x), Stream(x, None), epilogue, g).cancel()
    y = torch.ones(10)
    exchange.all_reduce(g, y, "after cancelled ones").wait()
    assert torch.equal(y, torch.full_like(y, g.world))


def not_a_number_is_carried_through(g: TPGroup) -> None:
    """In one rank's partial result: exact policies keep it where it is, compressed ones lose its block."""
    partial = torch.ones(5, HIDDEN)
    if g.rank == g.world - 1:
        partial[2, 40] = float("nan")
    for policy in [*exact_policies(g.world), *lossy_policies()]:
        stream, epilogue = Stream(torch.zeros_like(partial), None), Epilogue(None, None)
        if policy.scatters:
            continue
        out = policy.start(POINT, Given(partial), stream, epilogue, g).wait().residual
        assert out[2, 40].isnan()
        assert same_bits(g, out)
        good = torch.ones_like(out, dtype=torch.bool)
        good[2, 40] = False
        if not policy.exact and g.world > 1:
            good[2, 32:64] = False
        torch.testing.assert_close(out[good], torch.full_like(out, g.world)[good], rtol=0.01, atol=0)
        assert out[~good].isnan().all()


CASES: tuple[Case, ...] = (
    exact_policies_equal_float64,
    lossy_policies_err_by_their_format_alone,
    a_star_uses_both_directions_of_its_hubs_link,
    tiles_are_summed_while_the_next_is_computed,
    tiles_of_no_rows_are_left_out,
    no_rows_are_summed_to_no_rows,
    short_receives_are_posted_before_computing_long_ones_after,
    an_error_in_computing_leaves_the_group_usable,
    bytes_counted_are_the_formulas,
    dropped_point_keeps_the_residual_exact,
    exchanges_under_way_do_not_mix,
    background_steps_keep_backend_and_inference_mode,
    a_cancelled_policy_leaves_the_group_usable,
    not_a_number_is_carried_through,
)

if __name__ == "__main__":
    run(CASES)
