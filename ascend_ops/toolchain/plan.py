"""The vendor compiler's plan of a kernel: whether its tiles fit, where, and how often the cores synchronise.

``bishengir-compile`` splits a kernel into a Cube part and a Vector part, assigns addresses in every on-chip
memory, inserts the synchronisation, and only then calls ``hivmc``, which is CANN's and not here: its plan is
the module that it leaves behind.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

#: The compiler's names of the memories, and ours.
SPACES = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}
_OPTIONS = (
    "--enable-auto-multi-buffer=true",
    "--enable-auto-bind-sub-block=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
_ELEMENT_BITS = {"i1": 1, "i8": 8, "f16": 16, "bf16": 16, "i16": 16, "f32": 32, "i32": 32, "i64": 64}
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (\d+) : i64")
_ADDRESS = re.compile(r"pointer_cast\(([^)]*)\).*: memref<([^,>]+), #hivm\.address_space<(\w+)>>")
_WORKSPACE = re.compile(r"@\w+_infer_workspace_shape_function\(\).*?constant (\d+) : index", re.DOTALL)
_CHIP = re.compile(r'dl_entry<"(\w+)", (\d+) : i32>')
_SYNC = re.compile(r"sync_block_(?:set|wait)\[")


class Plan(NamedTuple):
    """What the compiler decided. Sizes are in bytes."""

    accepted: bool
    retried: bool  # accepted, or refused, only after it gave up code motion or double buffering
    overflow: Mapping[str, tuple[int, int]]  # memory -> (needed, available), when refused
    occupancy: Mapping[str, int]  # memory -> highest address used
    workspace: int  # of global memory, for each core
    syncs: Mapping[
        str, tuple[int, ...]
    ]  # core -> of each loop over blocks, Cube-Vector synchronisations a trip
    chip: Mapping[str, int]  # the compiler's own table: UB_SIZE (bits), CUBE_CORE_COUNT, ...
    error: str = ""  # of a refusal without an overflow


def plan(linalg: str, chip: str, options: tuple[str, ...] = ()) -> Plan:
    """Plans the linalg text of a kernel for ``chip`` ("Ascend910B3"); ``options`` go to the compiler.

    Raises RuntimeError when the compiler neither planned the kernel nor said why.
    """
    import ascendnpuir

    folder = Path(ascendnpuir.__file__).parent / "bin"
    compiler = folder / ("bishengir-compile-a5" if "950" in chip else "bishengir-compile")
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        source, dumps = temporary / "kernel.mlir", temporary / "dumps"
        source.write_text(linalg)
        dumps.mkdir()
        command = [
            str(compiler), str(source), f"--target={chip}", *_OPTIONS, f"--save-temps={dumps}",
            "-o", str(temporary / "kernel"), *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        planned = dumps / "module.hivm.opt.mlir"
        return read_plan(planned.read_text() if planned.exists() else "", done.stderr)


def read_plan(module: str, log: str) -> Plan:
    """The plan in the planned ``module`` ("" if there is none) and the compiler's ``log``."""
    retried = "retrying compilation" in log
    if not module:
        overflow = {
            SPACES.get(space.lower(), space): (int(needed) // 8, int(available) // 8)
            for space, needed, available in _OVERFLOW.findall(log)
        }
        errors = [line for line in log.splitlines() if "error:" in line]
        if not errors:
            raise RuntimeError(f"the compiler neither planned the kernel nor said why:\n{log[-2000:]}")
        return Plan(False, retried, overflow, {}, 0, {}, {}, "" if overflow else "\n".join(errors)[:2000])
    workspace = _WORKSPACE.search(module)
    return Plan(
        True,
        retried,
        {},
        _occupancy(module),
        int(workspace[1]) if workspace else 0,
        {core: tuple(_syncs(body)) for core, body in _functions(module) if core in ("aic", "aiv")},
        {name: int(value) for name, value in _CHIP.findall(module)},
    )


def _occupancy(module: str) -> dict[str, int]:
    """The end of the highest buffer in each memory; addresses are constants of their function."""
    highest: dict[str, int] = {}
    for _, body in _functions(module):
        constants = {name: int(value) for name, value in _CONSTANT.findall(body)}
        for addresses, shape, space in _ADDRESS.findall(body):
            if space not in SPACES:
                continue
            *dimensions, element = shape.split("x")
            bits = _ELEMENT_BITS[element]
            for dimension in dimensions:
                bits *= int(dimension)
            for address in addresses.split(","):
                end = constants[address.strip()] + (bits + 7) // 8
                highest[SPACES[space]] = max(highest.get(SPACES[space], 0), end)
    return highest


def _functions(module: str) -> Iterator[tuple[str, str]]:
    """(``aic``, ``aiv`` or another suffix, body) of the module's functions."""
    for text in module.split("func.func @")[1:]:
        yield text[: text.index("(")].rpartition("_")[2], text


def _syncs(body: str) -> Iterator[int]:
    """For each loop over blocks of keys, the synchronisations of one trip.

    Such a loop contains some, and lies in the loop over the core's work. The compiler may have split it into
    stages that are loops in it: each runs once for every block.
    """
    loops: list[tuple[int, int]] = []  # (indentation, synchronisations) of the open loops
    for line in body.splitlines():
        depth = len(line) - len(line.lstrip())
        if _SYNC.search(line):
            loops = [(at, count + 1) for at, count in loops]
        elif "scf.for" in line:
            loops.append((depth, 0))
        elif loops and depth == loops[-1][0] and line.lstrip().startswith("}"):
            _, count = loops.pop()
            if count and len(loops) == 1:
                yield count
