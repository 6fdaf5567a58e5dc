"""Machines that reproduce what was published of xformers' kernels; together they give a range, not a point.

Nobody has published how Volta's sub-cores fetch instructions. Each machine below is one way that they may,
its fetch rate and latency chosen so that xformers 0.0.23's own kernels come out at the 28.8 and 33.4 TFLOP/s
that its authors published for head_dim 64 and 128 (docs/volta.md has the result). The kernel for head_dim
256 was kept out of that choice.
"""

from __future__ import annotations

from typing import NamedTuple

from cuda_volta.sass.simulate.machine import Latency, Machine


class Calibrated(NamedTuple):
    """One machine and its latencies."""

    name: str
    machine: Machine
    latency: Latency


#: The first is the most pessimistic about loops that the cache does not hold, the last about shared memory.
CALIBRATED = (
    Calibrated("on demand", Machine(), Latency()),
    Calibrated("random replacement", Machine(random_replacement=1, fetch_latency=25), Latency()),
    Calibrated(
        "prefetch",
        Machine(random_replacement=1, fetch_latency=40, fetch_interval=14, prefetch_lines=2),
        Latency(),
    ),
    Calibrated(
        "slow memory pipes",
        Machine(mio_interval=2, fetch_latency=16, fetch_interval=10),
        Latency(shared=30, shuffle=28, xu=24, global_load=500),
    ),
)
#: The same without an instruction cache's misses: what is left are pipes, dependencies, barriers and memory.
EVERY_FETCH_HITS = Calibrated("every fetch hits", Machine(l0_lines=0), Latency())
