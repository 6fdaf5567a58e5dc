"""``fastattn info --why CALL``: each backend's reasons against a call that is described in text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch

from .. import dispatch
from ..attention import build_args
from ..spec import AttentionSignature, UnsupportedError

_MOST_VALUES = 1 << 56  # of a tensor: their bytes still fit into 64 bits


class _Device(NamedTuple):
    """Stands for a device that this torch does not know, such as npu without torch_npu."""

    type: str


HELP = (
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
    asked_for = dispatch.named()
    try:
        chosen = dispatch.resolve("attention", signature, asked_for)[0]
    except UnsupportedError:
        chosen = ""
    against = dispatch.explain("attention", signature)
    by_name = {name: "" if name in dispatch.AUTOMATIC else " when named" for name in against}
    table = {
        name: "; ".join(reasons)
        or f"can run it{by_name[name]}{' <- and would be chosen' if name == chosen else ''}"
        for name, reasons in against.items()
    }
    forced = f" (FASTATTN_BACKEND={asked_for})" if asked_for else ""
    last = [] if chosen else [f"no backend would run it{forced}"]
    return "\n".join([f"attention {spec}", *aligned(table, "  "), *last])


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
    q = _meta("q", _shape("q", given["q"]), dtype)
    k = _meta("k", _shape("k", given["k"]), kv_dtype)
    v = _meta("v", _shape("v", given.get("v", given["k"])), kv_dtype)
    batch = _count("cu_seqlens_q", given["cu_seqlens_q"]) if "cu_seqlens_q" in given else q.shape[0]
    sizes = {"heads": q.shape[-2], "kv_heads": k.shape[-2], "batch": batch}
    options: dict[str, Any] = {}
    for name, text in given.items():
        if name in _WORDS:
            size = _WORDS[name]
            options[name] = (
                True if size is None else _meta(name, (sizes[size],), _DTYPES.get(name, torch.int32))
            )
        elif (read := _VALUES[name]) is not None:
            options[name] = read(name, text)
    if "attn_mask" in given:
        keys = k.shape[1] * (options["block_table"].shape[1] if "block_table" in options else 1)
        shape = (batch, q.shape[-2], q.shape[1], keys)
        options["attn_mask"] = _meta("attn_mask", shape, options["attn_mask"])
    signature = build_args(q, k, v, **options).signature()
    return signature._replace(device=_device(given.get("device", "cpu")))


def _meta(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    if math.prod(max(1, n) for n in shape) > _MOST_VALUES:
        raise ValueError(f"--why: {name} of {'x'.join(map(str, shape))}, more than memory can address")
    return torch.empty(shape, dtype=dtype, device="meta")


def _shape(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+){1,3}", text):
        raise ValueError(f"--why: {name}={text}, expected sizes such as 1x4096x8x128")
    return tuple(map(int, text.split("x")))


def _cumulative(name: str, text: str) -> torch.Tensor:
    return _meta(name, (_count(name, text) + 1,))


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


def _count(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text):
        raise ValueError(f"--why: {name}={text}, expected the number of sequences")
    return int(text)


def aligned(facts: Mapping[str, str], indent: str = "") -> list[str]:
    """Lines of names and texts, the texts in one column."""
    width = max(map(len, facts), default=0)
    return [f"{indent}{name:<{width}}  {text}" for name, text in facts.items()]


#: Words that take no value: the dimension of the tensor they stand for, None for a flag.
_WORDS: dict[str, str | None] = {
    "causal": None, "return_lse": None, "alibi_slopes": "heads", "sinks": "heads", "cache_seqlens": "batch",
    "cache_batch_idx": "batch", "cache_leftpad": "batch", "q_pos0": "batch", "k_pos0": "batch",
    "k_scale": "kv_heads", "v_scale": "kv_heads",
}  # fmt: skip
#: Of the words' tensors; int32 for the rest.
_DTYPES = dict.fromkeys(("alibi_slopes", "sinks", "k_scale", "v_scale"), torch.float32)
#: Words with a value, and how an option of `attention` reads it; None for those that say what tensors are.
_VALUES: dict[str, Callable[[str, str], Any] | None] = {
    "q": None, "k": None, "v": None, "dtype": None, "kv_dtype": None, "device": None,
    "window": _window, "softcap": _number, "scale": _number, "kv_layout": lambda name, text: text,
    "attn_mask": _dtype, "block_table": lambda name, text: _meta(name, _shape(name, text)),
    "cu_seqlens_q": _cumulative, "cu_seqlens_k": _cumulative,
}  # fmt: skip
