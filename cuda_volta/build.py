"""Building variants into a folder, several at once, and reading such a folder back.

The folder holds ``NAME.cubin`` of each variant, ``NAME.ptx`` for sm_70 and ``index.json``, a list of objects:

    cubin, ptx                       file names; "": no PTX
    kernel, op, defines              entry point, op, macros
    head_dim, block_q, block_k, causal, warps, threads
    registers, spill_bytes, stack_bytes, shared_bytes    as ptxas reports them, dynamic shared memory included
    arch, compiler, key              what it was built for, with, and from (`binary.source_key`)
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

from .binary import PTX_OF, Binary, binary, source_key
from .nvrtc import nvrtc, version_text
from .variant import Variant

#: Where a wheel carries what was built with it: a folder for each architecture.
SHIPPED = Path(__file__).parent / "cubins"


def build(
    variants: Sequence[Variant],
    arch: str,
    folder: Path,
    jobs: int,
    progress: Callable[[int, Variant, Binary, float], None] | None = None,
) -> list[dict[str, Any]]:
    """Compiles ``variants`` for ``arch`` into ``folder``, ``jobs`` at a time; returns the index.

    ``progress`` hears (how many are done, variant, its binary, seconds) of each. Raises CompileError for
    the first that the compiler refuses, NvrtcMissing without a compiler.
    """
    compiler = version_text(nvrtc())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)  # of another build; ours follows when all is done
    done: dict[Variant, Binary] = {}
    # Spawned, since the caller may have threads (torch's), which a fork would leave half way.
    with ProcessPoolExecutor(max(1, jobs), multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(_timed, variant, arch): variant for variant in variants}
        try:
            for count, task in enumerate(as_completed(tasks), 1):
                variant = tasks[task]
                done[variant], seconds = task.result()
                (folder / f"{variant.name}.cubin").write_bytes(done[variant].cubin)
                if arch == PTX_OF:
                    (folder / f"{variant.name}.ptx").write_text(done[variant].ptx)
                if progress is not None:
                    progress(count, variant, done[variant], seconds)
        except BaseException:  # Ctrl-C too: compilations that wait must not start
            pool.shutdown(cancel_futures=True)
            raise
    made_with = {"arch": arch, "compiler": compiler}
    index = [{**_entry(v, done[v], arch), **made_with, "key": source_key(v)} for v in variants]
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    return index


def _timed(variant: Variant, arch: str) -> tuple[Binary, float]:
    begin = time.perf_counter()
    return binary(variant, arch), time.perf_counter() - begin


def _entry(v: Variant, built: Binary, arch: str) -> dict[str, Any]:
    return {
        "cubin": f"{v.name}.cubin",
        "ptx": f"{v.name}.ptx" if arch == PTX_OF else "",
        "kernel": v.entry,
        "op": v.op,
        "head_dim": v.head_dim,
        "block_q": v.block_q,
        "block_k": v.block_k,
        "warps": v.threads // 32,
        "causal": v.causal,
        "registers": built.registers,
        "spill_bytes": built.spill_bytes,
        "shared_bytes": built.shared_bytes,
        "stack_bytes": built.stack_bytes,
        "threads": v.threads,
        "defines": dict(v.defines),
    }


def shipped(variant: Variant, arch: str, folder: Path = SHIPPED) -> Binary | None:
    """The variant as the installed wheel carries it; None where it does not, or from other sources."""
    entry = _index(folder / arch).get(source_key(variant))
    if entry is None:
        return None
    cubin = (folder / arch / entry["cubin"]).read_bytes()
    ptx = (folder / arch / entry["ptx"]).read_text() if entry["ptx"] else ""
    return Binary(cubin, ptx, *(entry[name] for name in Binary._fields[2:]))


def has_shipped(arch: str) -> bool:
    """Whether the installed wheel carries kernels for ``arch``."""
    return bool(_index(SHIPPED / arch))


@cache
def _index(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / "index.json"
    return {entry["key"]: entry for entry in json.loads(file.read_text())} if file.is_file() else {}
