"""The issue simulator: a launch's warps through one SM, cycle by cycle, as the control codes say."""

from cuda_volta.sass.simulate.machine import Latency, Machine
from cuda_volta.sass.simulate.sm import Outcome, Residency, run

__all__ = ["Latency", "Machine", "Outcome", "Residency", "run"]
