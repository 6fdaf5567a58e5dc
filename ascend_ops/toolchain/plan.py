"""The vendor compiler's plan of a kernel: whether its tiles fit, where, and how often the cores synchronise.

``bishengir-compile`` splits a kernel into a Cube part and a Vector part, assigns addresses in every on-chip
memory, inserts the synchronisation, and only then calls ``hivmc``, which is CANN's and not here: its plan is
the module that it leaves behind.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

#: The compiler's names of the memories, and ours.
SPACES = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}
_OPTIONS = (
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
# What triton-ascend asks for: on a 950 neither two buffers nor rows split over the Vector cores.
_OVERLAP = "--enable-auto-multi-buffer={0}", "--enable-auto-bind-sub-block={0}"
_ELEMENT_BITS = {"i1": 1, "i8": 8, "f16": 16, "bf16": 16, "i16": 16, "f32": 32, "i32": 32, "i64": 64}
_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")
# bishengir-compile writes addresses in the one way, bishengir-compile-a5 in the other.
_CONSTANT = re.compile(r"(%\w+) = (?:arith\.constant (\d+)|llvm\.mlir\.constant\((\d+)) : i64")
_ADDRESS = re.compile(r"pointer_cast\(([^)]*)\).*: memref<([^,>]+), #hivm\.address_space<(\w+)>>")
_WORKSPACE = re.compile(r"@\w+_infer_workspace_shape_function\(\).*?constant (\d+) : index", re.DOTALL)
_CHIP = re.compile(r'dl_entry<"(\w+)", (\d+) : i32>')
_LABEL = re.compile(r"\^bb(\d+)")
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
    if is_950(chip):
        return _plan_950(linalg, folder / "bishengir-compile-a5", chip, options)
    overlap = [option.format("true") for option in _OVERLAP]
    module, log = _compile(linalg, folder / "bishengir-compile", [f"--target={chip}", *overlap, *options])
    return read_plan(module, log, retried="retrying compilation" in log)


def is_950(chip: str) -> bool:
    """Whether a chip has a compiler, and a front end's settings, of its own."""
    return chip.startswith("Ascend950")


def _plan_950(linalg: str, compiler: Path, chip: str, options: tuple[str, ...]) -> Plan:
    """This compiler does not say that it tried again: one try is asked for first, then what tries there are.

    Nor does it leave its plan behind and stop when CANN's last step is absent, but starts over with less:
    `true` stands in for that step.
    """
    settings = [f"--target={chip}", *(option.format("false") for option in _OVERLAP), *options]
    with tempfile.TemporaryDirectory() as last_step:
        Path(last_step, "hivmc-a5").symlink_to(shutil.which("true") or "/bin/true")
        path = f"{last_step}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        module, log = _compile(linalg, compiler, [*settings, "--enable-tuning-mode"], path)
        if module:
            return read_plan(module, log, retried=False)
        return read_plan(*_compile(linalg, compiler, settings, path), retried=True)


def _compile(
    linalg: str, compiler: Path, settings: Sequence[str], path: str | None = None
) -> tuple[str, str]:
    """(planned module or "", log); ``path`` is the PATH of the compiler's process, None: this one's."""
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        source, dumps = temporary / "kernel.mlir", temporary / "dumps"
        source.write_text(linalg)
        dumps.mkdir()
        command = [
            str(compiler), str(source), *_OPTIONS, f"--save-temps={dumps}", "-o", str(temporary / "kernel"),
            *settings,
        ]  # fmt: skip
        environ = None if path is None else {**os.environ, "PATH": path}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environ)
        planned = dumps / "module.hivm.opt.mlir"
        return planned.read_text() if planned.exists() else "", done.stderr


def read_plan(module: str, log: str, *, retried: bool) -> Plan:
    """The plan in the planned ``module`` ("" if there is none) and the compiler's ``log``."""
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
        constants = {name: int(one or other) for name, one, other in _CONSTANT.findall(body)}
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
    stages that are loops in it: each runs once for every block. The 950's has branches instead of loops.
    """
    if "scf.for" not in body:
        yield from _syncs_of_branches(body)
        return
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


def _syncs_of_branches(body: str) -> Iterator[int]:
    """As `_syncs`, of basic blocks: a branch to an earlier block closes a loop.

    Of loops with synchronisations the innermost count; of the ways through one, that with the most.
    """
    at, counts, branches = 0, {0: 0}, list[tuple[int, int]]()
    for line in body.splitlines():
        text = line.strip()
        if text.startswith("^bb"):
            at = int(text[3:].partition("(")[0].partition(":")[0])
            counts[at] = 0
        elif _SYNC.search(text):
            counts[at] += 1
        elif text.startswith("cf."):
            branches += [(at, int(to)) for to in _LABEL.findall(text)]
    loops = {(to, end): _longest(to, end, counts, branches) for end, to in branches if to <= end}
    some = {span: count for span, count in loops.items() if count}
    for (first, last), count in some.items():
        if not any(first <= to and end <= last and (to, end) != (first, last) for to, end in some):
            yield count


def _longest(first: int, last: int, counts: Mapping[int, int], branches: Sequence[tuple[int, int]]) -> int:
    """The most synchronisations on a way from block ``first`` forwards to ``last``."""
    most = {first: counts[first]}
    for block, to in sorted(branches):
        if block in most and block < to <= last:
            most[to] = max(most.get(to, 0), most[block] + counts[to])
    return most.get(last, 0)
