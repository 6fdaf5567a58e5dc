"""How the matrices of a Hugging Face directory are quantized, out of its JSON files.

In config.json under ``quantization_config`` (``compression_config`` in older compressed-tensors files), or
in quantize_config.json (GPTQ) or quant_config.json (AWQ) beside it. What is not understood is refused by
name: a setting that is ignored could change every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..quant import compressed, words
from ..quant.awq import Awq
from ..quant.compressed import Compressed
from ..quant.gptq import Gptq
from ..quant.grouped import Format
from .fields import Fields, read_json

_LIMIT = 4 << 20  # bytes
_MAX_GROUP = 1 << 20
_GPTQ_FORMATS = {"gptq": "v1", "gptq_v2": "v2"}


def read_format(directory: Path) -> Format | None:
    """The format of the quantized matrices; None where the files name none."""
    config = Fields(directory / "config.json", read_json(directory / "config.json", _LIMIT))
    for key in ("quantization_config", "compression_config"):
        if config.has(key):
            return parse_format(config.table(key))
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        path = directory / name
        if path.exists():
            return parse_format(Fields(path, {"quant_method": method, **read_json(path, _LIMIT)}))
    return None


def parse_format(f: Fields) -> Format:
    """The format that a quantization config describes; a `CheckpointError` names what is not supported."""
    method = f.string("quant_method")
    if method not in _METHODS:
        f.fail("quant_method", f"is {method[:40]!r}, supported are {', '.join(_METHODS)}")
    return _METHODS[method](f)


def _gptq(f: Fields) -> Gptq:
    bits = _one_of(f, "bits", words.BITS)
    group_size = _group_size(f, "group_size")
    named = {f.string(key) for key in ("checkpoint_format", "format") if f.has(key)} or {"gptq"}
    for name in sorted(named - set(_GPTQ_FORMATS)):
        f.fail("checkpoint_format", f"is {name[:40]!r}, supported are {', '.join(_GPTQ_FORMATS)}")
    if len(named) > 1:
        f.fail("checkpoint_format", "differs from format")
    zeros = _GPTQ_FORMATS[named.pop()]
    if zeros == "v1" and "gptqmodel" in str(f.table("meta").values.get("quantizer")):
        zeros = "words"
    if f.string("pack_dtype", "int32") != "int32":
        f.fail("pack_dtype", f"is {f.string('pack_dtype')[:40]!r}, supported is int32")
    if f.flag("is_marlin_format", False):
        f.fail("is_marlin_format", "weights in Marlin's order are not supported")
    for key in ("rotation", "adapter"):
        _refuse(f, key)
    # A rule "-:PATTERN" leaves layers dense, which their tensors tell.
    if any(not rule.startswith("-:") and changes for rule, changes in f.table("dynamic").values.items()):
        f.fail("dynamic", "quantizes some layers in another way, which is not supported")
    # With one group a row there is no order of groups.
    act_order = f.flag("desc_act", False) and group_size != -1
    return Gptq(bits, group_size, act_order, zeros)


def _awq(f: Fields) -> Awq:
    _one_of(f, "bits" if f.has("bits") else "w_bit", (4,))
    version = f.string("version", "gemm")
    if version.lower() != "gemm":
        f.fail("version", f"is {version[:40]!r}, supported is gemm")
    if not f.flag("zero_point", True):
        f.fail("zero_point", "is false, supported are weights with zero points")
    return Awq(_group_size(f, "group_size" if f.has("group_size") else "q_group_size"))


def _compressed(f: Fields) -> Compressed:
    name = f.string("format")
    if name != "pack-quantized":
        f.fail("format", f"is {name[:40]!r}, supported is pack-quantized")
    status = f.string("quantization_status", "compressed")
    if status != "compressed":
        f.fail("quantization_status", f"is {status[:40]!r}, expected 'compressed'")
    for key in ("kv_cache_scheme", "transform_config"):
        _refuse(f, key)
    if f.has("sparsity_config") and f.table("sparsity_config").string("format", "dense") != "dense":
        f.fail("sparsity_config", "sparse weights are not supported")
    groups = f.table("config_groups")
    schemes = {_scheme(groups.table(key)) for key in groups.values}
    if len(schemes) != 1:
        f.fail("config_groups", f"has {len(schemes)} kinds of weights, supported is one")
    return schemes.pop()


def _scheme(f: Fields) -> Compressed:
    for key in ("input_activations", "output_activations"):
        _refuse(f, key)
    w = f.table("weights")
    if w.string("type", "int") != "int":
        w.fail("type", f"is {w.string('type')[:40]!r}, supported is int")
    if w.flag("dynamic", False):
        w.fail("dynamic", "is true, expected false for weights")
    strategy = w.string("strategy", "group")
    if strategy not in ("group", "channel"):
        w.fail("strategy", f"is {strategy[:40]!r}, supported are group and channel")
    group_size = _group_size(w, "group_size") if strategy == "group" else -1
    order = w.values.get("actorder")
    if order not in (None, False, True, "group", "weight", "static"):
        w.fail("actorder", f"is {str(order)[:40]!r}, supported are group, weight and static")
    act_order = order in (True, "group") and group_size != -1
    bits = _one_of(w, "num_bits", compressed.BITS)
    return Compressed(bits, group_size, act_order, w.flag("symmetric", True))


_METHODS: dict[str, Callable[[Fields], Format]] = {
    "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed,
}  # fmt: skip


def _group_size(f: Fields, key: str) -> int:
    size = f.integer(key, -1, _MAX_GROUP)
    if size != -1 and (size < 1 or size % 16):
        f.fail(key, f"is {size}, supported are multiples of 16, and -1 for one group a row")
    assert isinstance(size, int)
    return size


def _one_of(f: Fields, key: str, allowed: tuple[int, ...]) -> int:
    value = f.integer(key, 0, 1 << 31)
    if value not in allowed:
        f.fail(key, f"is {value}, supported {'is' if len(allowed) == 1 else 'are'} {_list(allowed)}")
    assert isinstance(value, int)
    return value


def _refuse(f: Fields, key: str) -> None:
    if f.values.get(key):
        f.fail(key, "is not supported")


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))
