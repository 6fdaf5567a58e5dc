"""Which of several variants runs a call: the model's choice, until a Volta has timed them itself.

Tables list the variants that can run a call with the one first that the model of the machine prefers
(docs/volta.md). On a real Volta the first call of its kind runs each of them a few times, on its own tensors,
and the fastest is remembered on disk. Nothing is timed while a CUDA graph is captured, on newer GPUs (which
run PTX) or in the emulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from .binary import ARCHITECTURES, source_key
from .cache import Cache, digest
from .variant import Variant

ROUNDS = 5
_CACHE = Cache("volta-tuned")
_chosen: dict[tuple[str, torch.device, tuple[Variant, ...]], Variant] = {}


def best(
    kind: str, candidates: Sequence[Variant], launch: Callable[[Variant], None], device: torch.device
) -> Variant:
    """The candidate to launch for calls of this ``kind`` on ``device``.

    ``kind`` names what decides which is fastest (op, features, a class of sizes). ``launch`` runs the call
    with a candidate and must be repeatable: its results are those of a later launch.
    """
    first, *others = candidates
    if not others or device.type != "cuda":
        return first
    key = (kind, device, tuple(candidates))
    if key not in _chosen:
        with torch.cuda.device(device):  # whose stream the events time, and which may capture
            if not _times_count(device):
                return first
            _chosen[key] = _remembered(kind, candidates, launch, device)
    return _chosen[key]


def _times_count(device: torch.device) -> bool:
    """Whether launches can be timed now, on the machine that they are meant for."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" in ARCHITECTURES and not torch.cuda.is_current_stream_capturing()


def _remembered(
    kind: str, candidates: Sequence[Variant], launch: Callable[[Variant], None], device: torch.device
) -> Variant:
    """The candidate that this machine chose before, or chooses now."""
    name = torch.cuda.get_device_name(device)
    key = digest(kind, name, *(source_key(v) + v.name for v in candidates))

    def choose() -> bytes:
        return str(_fastest(candidates, launch)).encode()

    text = _CACHE.fetch(key, choose)
    return candidates[int(text)]


def _fastest(candidates: Sequence[Variant], launch: Callable[[Variant], None]) -> int:
    """Index of the candidate with the least median time; rounds alternate, so that all see the same clock."""
    for variant in candidates:
        launch(variant)  # loads it, and warms what it reads
    rounds = [[_milliseconds(launch, v) for v in candidates] for _ in range(ROUNDS)]
    times = [median(column) for column in zip(*rounds, strict=True)]
    return times.index(min(times))


def _milliseconds(launch: Callable[[Variant], None], variant: Variant) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    launch(variant)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
