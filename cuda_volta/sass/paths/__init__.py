"""The path of a launch through machine code: which instructions each warp issues, without executing the rest.

Only what decides a branch, the predicate of a memory access or its address is computed (`slices`), for the 32
lanes of a warp at once (`lanes`, `semantics`), with the parameters a real launch would get; tensor cores and
floating point are skipped. What depends on data in memory is unknown, unless the launch names that memory.
"""

from cuda_volta.sass.paths.launch import SKIPPED, Launch, Path, Program, follow
from cuda_volta.sass.paths.warp import PARAMETERS

__all__ = ["PARAMETERS", "SKIPPED", "Launch", "Path", "Program", "follow"]
