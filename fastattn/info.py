"""The report behind ``fastattn info``: what runs here, why the rest does not, and why a call would not."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from . import __version__, dispatch
from .attention import build_args
from .settings import Settings, settings
from .spec import AttentionSignature
from .threads import OPENMP_VARIABLES, Machine, machine

#: CPU features that the kernels, or torch's, make use of; as Linux names them.
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


class Row(NamedTuple):
    """One backend: usable here, or the reasons why not, and what it says of itself."""

    name: str
    usable: bool
    reasons: tuple[str, ...]
    details: Mapping[str, str]


def rows() -> list[Row]:
    """Every backend, in the order in which dispatch tries them."""
    found = []
    for name in dispatch.BACKENDS:
        reasons = dispatch.unavailable(name)
        details = {} if reasons else dict(dispatch.load_backend(name).describe())
        found.append(Row(name, not reasons, reasons, details))
    return found


def report() -> str:
    """The whole report: versions, machine, backends, environment variables in force."""
    here = machine()
    facts = {
        "fastattn": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpu features": " ".join(cpu_features()) or "unknown",
        "usable": f"{here} (the machine has {os.cpu_count()} hardware threads)",
        "threads": _threads(here),
        "huge pages": f"transparent: {here.huge_pages or 'unknown'}",
        "openmp": ", ".join(openmp_runtimes()) or "none mapped",
    }
    lines = [*_aligned(facts), "", "backends, in the order in which they are tried"]
    table = {}
    for row in rows():
        details = "; ".join(f"{name}: {text}" for name, text in row.details.items())
        table[row.name] = f"yes  {details}".rstrip() if row.usable else f"no   {'; '.join(row.reasons)}"
    lines += _aligned(table, indent="  ")
    lines += ["", "environment"]
    variables = {
        name: f"{_in_force(name)}  {doc} ({accepted})" for name, accepted, doc in Settings.describe()
    }
    lines += _aligned(variables | {name: _in_force(name) for name in OPENMP_VARIABLES}, "  ")
    return "\n".join(lines)


def _in_force(name: str) -> str:
    value = os.environ.get(name)
    return "(not set)" if value is None else repr(value)


def _threads(here: Machine) -> str:
    """What ops called from Python use, and what the command line takes."""
    now = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return f"{now} by OMP_NUM_THREADS, which fastattn generate obeys"
    text = f"{now} by torch.get_num_threads(); fastattn generate takes {here.threads} over its ranks here"
    if now > here.threads:
        text += "; more than can compute at once (torch.set_num_threads)"
    return text


def _aligned(facts: Mapping[str, str], indent: str = "") -> list[str]:
    width = max(map(len, facts), default=0)
    return [f"{indent}{name:<{width}}  {text}" for name, text in facts.items()]


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The features of this CPU, among those that matter here."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in _FEATURES if name in present]


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process; more than one is a fault."""
    path = Path("/proc/self/maps")
    text = path.read_text() if path.exists() else ""
    return sorted({Path(found).name for found in re.findall(r"/\S*lib(?:g|i|)omp\S*\.so\S*", text)})


# ----------------------------------------------------------------------------------------- why, for one call
class _Device(NamedTuple):
    """Stands for a device that this torch does not know, such as npu without torch_npu."""

    type: str


_SPEC_HELP = (
    "shapes of an attention call, such as 'q=1x1x32x128,k=1x4096x8x128,dtype=float16,device=cpu,causal'; "
    "also v, kv_dtype, window=LEFT:RIGHT, softcap, scale, kv_layout, attn_mask=bool|float32|..., "
    "block_table=BATCHxPAGES, cu_seqlens_q=BATCH, cu_seqlens_k=BATCH, and the bare words causal, return_lse, "
    "alibi_slopes, sinks, cache_seqlens, cache_batch_idx, cache_leftpad, q_pos0, k_pos0, k_scale, v_scale"
)


def why(spec: str) -> str:
    """Each backend's reasons against the call that ``spec`` describes, and which one would run it.

    Nothing is allocated, and no device needs to be present. Raises ValueError for a bad spec.
    """
    signature = signature_of(spec)
    try:
        chosen = dispatch.resolve("attention", signature, settings.backend)[0]
    except ValueError:
        chosen = ""
    against = {name: dispatch.reasons_against(name, "attention", signature) for name in dispatch.BACKENDS}
    by_name = {name: "" if name in dispatch.AUTOMATIC else " when named" for name in against}
    table = {
        name: "; ".join(reasons)
        or f"can run it{by_name[name]}{' <- and would be chosen' if name == chosen else ''}"
        for name, reasons in against.items()
    }
    forced = f" (FASTATTN_BACKEND={settings.backend})" if settings.backend else ""
    last = [] if chosen else [f"no backend would run it{forced}"]
    return "\n".join([f"attention {spec}", *_aligned(table, "  "), *last])


def signature_of(spec: str) -> AttentionSignature:
    """The signature of a call that is described in text; see ``fastattn info --help``."""
    given: dict[str, str] = {}
    for part in spec.replace(" ", "").split(","):
        name, _, text = part.partition("=")
        if name not in _WORDS and name not in _VALUES:
            accepted = ", ".join([*_VALUES, *_WORDS])
            raise ValueError(f"--why: {name!r}, expected one of {accepted}")
        if (name in _WORDS) == bool(text):
            raise ValueError(f"--why: {part!r}, expected {name if name in _WORDS else name + '=...'}")
        given[name] = text
    for name in ("q", "k"):
        if name not in given:
            raise ValueError(f"--why: {name}=BATCHxSEQLENxHEADSxHEAD_DIM is missing")
    dtype = _dtype("dtype", given.get("dtype", "float32"))
    kv_dtype = _dtype("kv_dtype", given["kv_dtype"]) if "kv_dtype" in given else dtype
    q = torch.empty(_shape("q", given["q"]), dtype=dtype, device="meta")
    k = torch.empty(_shape("k", given["k"]), dtype=kv_dtype, device="meta")
    v = torch.empty(_shape("v", given.get("v", given["k"])), dtype=kv_dtype, device="meta")
    batch = int(given["cu_seqlens_q"]) if given.get("cu_seqlens_q", "").isdigit() else q.shape[0]
    sizes = {"heads": q.shape[-2], "kv_heads": k.shape[-2], "batch": batch}
    options: dict[str, Any] = {}
    for name, text in given.items():
        if name in _WORDS:
            size = _WORDS[name]
            options[name] = True if size is None else _meta(name, sizes[size])
        elif (read := _VALUES[name]) is not None:
            options[name] = read(name, text)
    if "attn_mask" in given:
        keys = k.shape[1] * (options["block_table"].shape[1] if "block_table" in options else 1)
        options["attn_mask"] = torch.empty((q.shape[1], keys), dtype=options["attn_mask"], device="meta")
    signature = build_args(q, k, v, **options).signature()
    return signature._replace(device=_device(given.get("device", "cpu")))


def _meta(name: str, *shape: int) -> torch.Tensor:
    floating = name in ("alibi_slopes", "sinks", "k_scale", "v_scale")
    return torch.empty(shape, dtype=torch.float32 if floating else torch.int32, device="meta")


def _shape(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){1,3}", text):
        raise ValueError(f"--why: {name}={text}, expected sizes such as 1x4096x8x128")
    return tuple(map(int, text.split("x")))


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--why: {name}={text}, expected a number") from None


def _dtype(name: str, text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--why: {name}={text}, expected a torch dtype such as float16")  # noqa: TRY004
    return dtype


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        kinds = {kind for name in dispatch.BACKENDS for kind in dispatch.load_backend(name).device_types}
        kind = text.partition(":")[0]
        if kind not in kinds:
            raise ValueError(f"--why: device={text}, expected one of {', '.join(sorted(kinds))}") from None
        return cast(torch.device, _Device(kind))


def _window(name: str, text: str) -> tuple[int | None, int | None]:
    if not re.fullmatch(r"(-1|\d*):(-1|\d*)", text):
        raise ValueError(f"--why: {name}={text}, expected LEFT:RIGHT, a side empty or -1 when unbounded")
    left, right = text.split(":")
    return int(left) if left else None, int(right) if right else None


def _cumulative(name: str, text: str) -> torch.Tensor:
    if not text.isdigit():
        raise ValueError(f"--why: {name}={text}, expected the number of sequences")
    return _meta(name, int(text) + 1)


#: Words that take no value: the dimension of the tensor they stand for, None for a flag.
_WORDS: dict[str, str | None] = {
    "causal": None, "return_lse": None, "alibi_slopes": "heads", "sinks": "heads", "cache_seqlens": "batch",
    "cache_batch_idx": "batch", "cache_leftpad": "batch", "q_pos0": "batch", "k_pos0": "batch",
    "k_scale": "kv_heads", "v_scale": "kv_heads",
}  # fmt: skip
#: Words with a value, and how an option of `attention` reads it; None for those that say what tensors are.
_VALUES: dict[str, Callable[[str, str], Any] | None] = {
    "q": None, "k": None, "v": None, "dtype": None, "kv_dtype": None, "device": None,
    "window": _window, "softcap": _number, "scale": _number, "kv_layout": lambda name, text: text,
    "attn_mask": _dtype, "block_table": lambda name, text: _meta(name, *_shape(name, text)),
    "cu_seqlens_q": _cumulative, "cu_seqlens_k": _cumulative,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- command line
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn info``."""
    parser.description = "What runs on this machine, and why the rest does not."
    parser.add_argument("--why", metavar="CALL", help=_SPEC_HELP)


def main(args: argparse.Namespace) -> int:
    """Prints the report, or the answer to ``--why``; returns the exit status."""
    try:
        print(report() if args.why is None else why(args.why))
    except ValueError as error:
        print(f"fastattn info: {error}", file=sys.stderr)
        return 2
    return 0
