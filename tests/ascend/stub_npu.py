"""torch_npu without an NPU and without CANN: its real schemas and meta kernels, on generated stub symbols.

    python stub_npu.py SITE CALLS RESULTS

imports torch_npu from the folder SITE and runs the calls of the JSON file CALLS on meta tensors. Its
libraries want about a hundred symbols of CANN's, which none of these calls reaches: a function that returns 0
stands for each. A test's tool: nothing of it works on, or belongs near, a device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_CANN = (
    "libhccl",
    "libascendcl",
    "libacl_op_compiler",
    "libge_runner",
    "libgraph",
    "libatb",
    "libacl_tdt_channel",
)
_SYSTEM = (
    "libc.so.6",
    "libstdc++.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libgcc_s.so.1",
)
_READY = "STUB_NPU_READY"


def symbols(library: Path, *, defined: bool) -> set[str]:
    """Names of dynamic symbols; weak ones that may stay undefined are not wanted."""
    kind = "--defined-only" if defined else "--undefined-only"
    lines = subprocess.run(["nm", "-D", kind, library], check=True, capture_output=True, text=True).stdout
    found = (line.split() for line in lines.splitlines())
    return {f[-1].split("@")[0] for f in found if defined or f[0] not in ("w", "v")}


def missing(package: Path, torch_lib: Path) -> list[str]:
    """What torch_npu's libraries want of CANN's."""
    own = [*package.glob("lib/*.so"), *package.glob("_C*.so")]
    there = [*own, *torch_lib.glob("lib*.so*")]
    for name in _SYSTEM:
        printed = subprocess.run(
            ["gcc", f"-print-file-name={name}"], check=True, capture_output=True, text=True
        )
        there += [Path(printed.stdout.strip())] * (printed.stdout.strip() != name)
    wanted = set().union(*(symbols(p, defined=False) for p in own))
    known = set().union(*(symbols(p, defined=True) for p in there))
    loader = {"__tls_get_addr", "_dl_find_object"}
    return sorted(s for s in wanted - known - loader if not s.startswith(("Py", "_Py")))


def build(names: list[str], folder: Path) -> None:
    """One library with all the symbols, and empty ones of the other names that are asked for."""
    code = "".join(f".globl {n}\n.type {n},@function\n{n}:\n" for n in names)
    source = folder / "stub.s"
    ret = {"x86_64": "xor %eax,%eax\nret", "aarch64": "mov x0,#0\nret"}[os.uname().machine]
    source.write_text(f'.text\n{code}{ret}\n.section .note.GNU-stack,"",%progbits\n')
    for name in _CANN:
        what = [source] if name == "libhccl" else ["-x", "c", "/dev/null"]
        target = folder / f"{name}.so"
        subprocess.run(["gcc", "-shared", "-o", target, f"-Wl,-soname,{name}.so", *what], check=True)


def main() -> None:
    site, calls, results = (Path(a) for a in sys.argv[1:])
    if _READY not in os.environ:
        import torch

        folder = Path(tempfile.mkdtemp(dir=results.parent))
        build(missing(site / "torch_npu", Path(torch.__file__).parent / "lib"), folder)
        environ = os.environ | {_READY: "1", "LD_LIBRARY_PATH": str(folder)}
        os.execve(sys.executable, [sys.executable, *sys.argv], environ)
    sys.path.insert(0, str(site))
    import torch
    import torch_npu  # noqa: F401

    answers = [run(torch, call) for call in json.loads(calls.read_text())]
    results.write_text(json.dumps(answers))


def run(torch: Any, call: dict[str, Any]) -> dict[str, Any]:
    """``{"outputs": [[shape, dtype], ...]}``, or ``{"error": text}``.

    ``"meta": False`` and no outputs: the arguments match the schema, and there is no meta kernel.
    """

    def value(x: Any) -> Any:
        if isinstance(x, dict):
            shape, strides, dtype = x["tensor"]
            return torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device="meta")
        return x

    args = [value(a) for a in call["args"]]
    kwargs = {name: value(a) for name, a in call["kwargs"].items()}
    try:
        outputs = getattr(getattr(torch.ops, call["namespace"]), call["name"])(*args, **kwargs)
    except NotImplementedError as error:
        if "Meta" in str(error):
            return {"meta": False, "outputs": []}
        return {"error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001 (whatever the operator says is the answer)
        return {"error": f"{type(error).__name__}: {error}"}
    if not isinstance(outputs, (tuple, list)):
        outputs = () if outputs is None else (outputs,)
    tensors = (o for o in outputs if isinstance(o, torch.Tensor))
    return {"meta": True, "outputs": [[list(o.shape), str(o.dtype).removeprefix("torch.")] for o in tensors]}


if __name__ == "__main__":
    main()
