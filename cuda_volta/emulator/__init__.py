"""Runs the kernel sources on a CPU, every access checked and counted: see README.md beside this file."""

from cuda_volta.emulator.build import BuildError
from cuda_volta.emulator.kernel import EmulatedKernel, EmulationError, blocks_may_collide, load
from cuda_volta.emulator.report import Line, Report, record

__all__ = [
    "BuildError",
    "EmulatedKernel",
    "EmulationError",
    "Line",
    "Report",
    "blocks_may_collide",
    "load",
    "record",
]
