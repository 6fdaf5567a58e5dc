"""Collectives of a `TPGroup`, by `torch.distributed`, which only this module calls, or through memory.

Every failure becomes a `SyncError` that names this rank, what it was doing and why: at once when another
rank's process ended (its sockets close), within ``timeout_s`` when it is stopped or the link is cut.
After a `SyncError` the group is unusable: end the process (`parallel.group.abort`), which in turn frees
the ranks that wait for this one.

With one rank every function returns at once and nothing is counted. gloo does not compare the ranks'
shapes (a mismatch gives wrong sums, not an error), so callers settle shapes first: `agree` at start-up.
Memory that the ranks share (`shared_memory`) does.
"""

from __future__ import annotations

import hashlib
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import SyncError, TPGroup

if TYPE_CHECKING:
    from .shared_memory import SharedMemory


class Traffic:
    """What this process exchanged, by kind of collective ("all_reduce", "broadcast", ...)."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()  # of the tensors this rank handed in, not of the wire

    def add(self, kind: str, x: Tensor, times: int = 1) -> None:
        self.calls[kind] += times
        self.bytes[kind] += times * x.numel() * x.element_size()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


traffic = Traffic()

#: Who may know which rank ended first, within so many seconds (`parallel.watch`): those that notice it in an
#: exchange end too, and whoever waits for one of these would name a victim.
witnesses: list[Callable[[float], int | None]] = []
_WITNESS_S = 0.5


def first_lost(seconds: float) -> int | None:
    """The rank whose process ended first, if somebody knows of one within ``seconds``."""
    return next((rank for ask in witnesses if (rank := ask(seconds)) is not None), None)


def reason_of(error: BaseException, timeout_s: float) -> str:
    """A backend's message in our words, with its own behind."""
    text = re.sub(r"^\[\S+\.cc:\d+\]\s*", "", str(error).strip().split("\n")[0])
    own = re.split(r"\. (?:This is typically|Check the logs)", text)[0]
    if re.search(r"Connection (was likely )?closed|Connection reset|Broken pipe", text):
        lost = first_lost(_WITNESS_S)
        return f"{'another rank' if lost is None else f'rank {lost}'} ended ({own})"
    if "imed out" in text or "timeout" in text:
        return f"no answer within {timeout_s:g} s: another rank is stopped or the link is cut ({own})"
    return own


@contextmanager
def _errors(g: TPGroup, where: str) -> Iterator[None]:
    try:
        yield
    except SyncError:
        raise
    except RuntimeError as error:
        raise SyncError(g.rank, where, reason_of(error, g.timeout_s)) from error


class Pending:
    """Exchanges under way: a backend's works, each with the peer it waits for (None: all of them)."""

    def __init__(
        self,
        g: TPGroup,
        where: str,
        works: Sequence[tuple[int | None, Any]] = (),
        *,
        goes_on: bool | None = None,
    ) -> None:
        """``goes_on``: the attribute; None: as the group's device has it."""
        self._group, self._where, self._works = g, where, list(works)
        #: Whether nothing is gained by a thread that waits: a device's stream does (NCCL, HCCL), or the other
        #: ranks read this one's memory.
        self.goes_on = device_of(g).type != "cpu" if goes_on is None else goes_on

    def wait(self) -> None:
        """Returns when the results are there; raises `SyncError`. A second call returns at once."""
        while self._works:
            peer, work = self._works.pop(0)
            with _errors(self._group, self._where if peer is None else f"{self._where}, with rank {peer}"):
                work.wait()

    def cancel(self) -> None:
        """Waits for what is under way and ignores how it ended: gloo cannot withdraw an exchange."""
        while self._works:
            with suppress(RuntimeError):
                self._works.pop()[1].wait()


# gloo's threads release an exchange's tensors a little after `wait` returned, and need the interpreter for
# that: a process whose interpreter ends in between aborts. So they get aliases whose end can be seen.
_lent: set[weakref.ref[Tensor]] = set()


def _lend(x: Tensor) -> Tensor:
    alias = x.detach()
    _lent.add(weakref.ref(alias, _lent.discard))
    return alias


def idle(seconds: float) -> bool:
    """Waits until no thread of the backend holds a tensor of ours; False if one does after that time."""
    end = time.monotonic() + seconds
    while _lent:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def device_of(g: TPGroup) -> torch.device:
    """Where this group's backend expects small tensors."""
    backend = dist.get_backend(g.pg) if g.pg is not None else "gloo"
    return torch.device({"nccl": "cuda", "hccl": "npu"}.get(backend, "cpu"))


#: Of the groups whose ranks share memory (`parallel.local`): it takes the place of the backend's collectives.
memories: weakref.WeakKeyDictionary[Any, SharedMemory] = weakref.WeakKeyDictionary()


def shares_memory(g: TPGroup) -> bool:
    """Whether this group's collectives go through memory, where one of them costs less than one message."""
    return g.pg in memories


def against_messages(g: TPGroup) -> list[str]:
    """Why a `Lane` does not work in this group: NCCL and HCCL know no tags and post no receive early."""
    if g.world == 1 or device_of(g).type == "cpu":
        return []
    return [f"messages between pairs of ranks travel over gloo, not {dist.get_backend(g.pg)}"]


def all_reduce(g: TPGroup, x: Tensor, where: str) -> Pending:
    """Starts the sum of the ranks' ``x`` (one shape and dtype), in place; every rank gets the same bits.

    What travels is x's dtype: 16-bit models send 16-bit values. gloo and NCCL also add in it; in memory that
    the ranks share, float32 sums are formed and rounded once.
    """
    if g.world == 1:
        return Pending(g, where)
    if not x.is_contiguous():
        raise ValueError(f"all_reduce: x has strides {x.stride()}, expected a contiguous tensor")
    traffic.add("all_reduce", x)
    if (memory := memories.get(g.pg)) and memory.sums(x):
        return Pending(g, where, [(None, memory.sum(x, where))], goes_on=True)
    with _errors(g, where):
        return Pending(g, where, [(None, dist.all_reduce(_lend(x), group=g.pg, async_op=True))])


LAST_STEP = 15  # of a lane, from 0
_STEPS = LAST_STEP + 1
_lanes: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()  # of each group


class Lane:
    """Messages between pairs of ranks that belong to one exchange of several steps.

    Every rank opens its lanes in the same order. What two ranks send each other in a step of a lane finds its
    receiver among everything else under way, whichever thread posts it and when.
    """

    def __init__(self, g: TPGroup, where: str) -> None:
        self.group, self.where = g, where
        self._number = next(_lanes.setdefault(g.pg, count())) % (1 << 27)  # tags have 31 bits
        self.others = [r for r in range(g.world) if r != g.rank]

    def swap(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], step: int = 0) -> Pending:
        """Starts to send ``outgoing[r]`` to each rank r and to fill ``incoming[r]`` by what r sends: one hop.

        All are contiguous and of equal size on both ends; those without elements do not travel. What goes
        out must stay as it is until the `Pending` has been waited for.
        """
        if not 0 <= step < _STEPS:
            raise ValueError(f"step: {step}, expected 0 to {_STEPS - 1}")
        if reasons := against_messages(self.group):
            raise SyncError(self.group.rank, self.where, reasons[0])
        g, tag = self.group, self._number * _STEPS + step
        works: list[tuple[int | None, Any]] = []
        with _errors(g, self.where):
            for r, x in incoming.items():
                if x.numel():
                    works.append((r, dist.irecv(_lend(x), src=_global(g, r), group=g.pg, tag=tag)))
            for r, x in outgoing.items():
                if x.numel():
                    traffic.add("send", x)
                    works.append((r, dist.isend(_lend(x), dst=_global(g, r), group=g.pg, tag=tag)))
        return Pending(g, self.where, works)


def broadcast(g: TPGroup, x: Tensor, where: str, src: int = 0) -> None:
    """Overwrites ``x`` of every rank by rank ``src``'s."""
    if g.world == 1:
        return
    traffic.add("broadcast", x)
    if (memory := memories.get(g.pg)) and memory.carries(x):
        memory.broadcast(x, where, src)
        return
    with _errors(g, where):
        work = dist.broadcast(_lend(x), src=_global(g, src), group=g.pg, async_op=True)
    Pending(g, where, [(None if g.rank == src else src, work)]).wait()


def all_gather(g: TPGroup, x: Tensor, where: str) -> list[Tensor]:
    """Every rank's ``x`` (one shape and dtype), in rank order."""
    if g.world == 1:
        return [x]
    traffic.add("all_gather", x)
    if (memory := memories.get(g.pg)) and memory.carries(x):
        return memory.gather(x.contiguous(), where)
    parts = [torch.empty_like(x) for _ in range(g.world)]
    with _errors(g, where):
        outputs, own = [_lend(p) for p in parts], _lend(x.contiguous())
        work = dist.all_gather(outputs, own, group=g.pg, async_op=True)
        del outputs, own
    Pending(g, where, [(None, work)]).wait()
    return parts


def gather_last(
    g: TPGroup, x: Tensor, sizes: Sequence[int], where: str, *, everywhere: bool = False
) -> Tensor | None:
    """Concatenates the ranks' ``x`` (..., sizes[rank]) along the last dimension.

    Returns (..., sum(sizes)) on rank 0 and None elsewhere, or the same bits on every rank with
    ``everywhere``. As gloo's messages only the values themselves travel to rank 0; otherwise they are padded
    to the widest and travel to all.
    """
    if len(sizes) != g.world or x.shape[-1] != sizes[g.rank]:
        raise ValueError(f"sizes: {tuple(sizes)}, expected {g.world} with {x.shape[-1]} for rank {g.rank}")
    if g.world == 1:
        return x
    if everywhere or against_messages(g) or shares_memory(g):
        padded = torch.nn.functional.pad(x, (0, max(sizes) - x.shape[-1]))
        parts = all_gather(g, padded, where)
        whole = torch.cat([p[..., :n] for p, n in zip(parts, sizes, strict=True)], dim=-1)
        return whole if everywhere or g.rank == 0 else None
    if g.rank:
        Lane(g, where).swap({0: x.contiguous()}, {}).wait()
        return None
    incoming = {r: x.new_empty((*x.shape[:-1], n)) for r, n in enumerate(sizes) if r}
    Lane(g, where).swap({}, incoming).wait()
    return torch.cat([x, *incoming.values()], dim=-1)


def agree(g: TPGroup, what: str, value: bytes) -> None:
    """Checks that every rank holds the same ``value``; raises `SyncError` on every rank if not.

    Compares SHA-256 digests, so the values may have any length. The error names which ranks differ.
    """
    digest = hashlib.sha256(what.encode() + b"\0" + value).digest()
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=device_of(g))
    parts = all_gather(g, mine, f"start-up check of {what}")
    ranks: dict[bytes, list[int]] = {}
    for rank, part in enumerate(parts):
        ranks.setdefault(bytes(part.tolist()), []).append(rank)
    if len(ranks) > 1:
        camps = "; ".join(f"{_ranks(who)}: {d.hex()[:12]}" for d, who in ranks.items())
        raise SyncError(g.rank, f"start-up check of {what}", f"the ranks differ ({camps})")


def _ranks(who: Sequence[int]) -> str:
    return f"rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"


def _global(g: TPGroup, rank: int) -> int:
    assert g.pg is not None
    return dist.get_global_rank(g.pg, rank)
