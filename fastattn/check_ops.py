"""What `check` compares of each small op: a sample of its result, beside plain torch's and the oracle's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_ops.router.atb import nz_view

from .quant import packed
from .spec import (
    AppendKvArgs,
    DecodeSumArgs,
    EmbeddingArgs,
    EncodeArgs,
    LinearArgs,
    MxPackArgs,
    MxUnpackArgs,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)


class Sample(NamedTuple):
    """How much of each op's result is compared; drawn anew for each call, from ``seed``."""

    sequences: int = 2
    kv_heads: int = 2
    rows: int = 32  # queries of a sequence, and rows of every other op
    columns: int = 256  # output features of a matrix
    seed: int = 0


class Draw:
    """Draws of a sample."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.random = random.Random(sample.seed)  # noqa: S311 (a sample, not a secret)

    def some(self, size: int, most: int) -> list[int]:
        """At most that many of ``range(size)``, ascending."""
        return sorted(self.random.sample(range(size), min(size, most)))


Compared = tuple[str, Tensor, Tensor, Tensor]  # what, ours, plain torch's, exact


def _cpu(record: Any) -> Any:
    """A record with its tensors, and those of its weight, on the CPU."""
    if isinstance(record, Tensor):
        return record.cpu()
    if isinstance(record, PackedWeight):
        record = record._replace(tensors={n: t.cpu() for n, t in record.tensors.items()})
    fields = record._asdict() if hasattr(record, "_asdict") else {}
    moved = {n: _cpu(v) for n, v in fields.items() if isinstance(v, (Tensor, PackedWeight))}
    return record._replace(**moved) if moved else record


def _oracles() -> tuple[ModuleType, ModuleType]:
    from . import reference_ops
    from .backends import torch_ops

    return reference_ops, torch_ops


def _rows_of(x: Tensor, index: Sequence[int]) -> Tensor:
    return x.reshape(-1, x.shape[-1])[list(index)] if x.numel() else x.reshape(0, x.shape[-1])


def _rms_norm(a: RmsNormArgs, result: tuple[Tensor, Tensor], draw: Draw) -> list[Compared]:
    exact, plain = _oracles()
    rows = draw.some(a.x.numel() // max(a.x.shape[-1], 1), draw.sample.rows)
    residual = None if a.residual is None else _rows_of(a.residual, rows)
    part = _cpu(a._replace(x=_rows_of(a.x, rows), residual=residual))
    names = ("normalised",) if residual is None else ("normalised", "sum")
    triples = zip(names, result, plain.rms_norm(part), exact.rms_norm(part), strict=False)
    return [(n, _rows_of(ours, rows).cpu(), p, e.double()) for n, ours, p, e in triples]


def _swiglu(a: SwigluArgs, result: Tensor, draw: Draw) -> list[Compared]:
    exact, plain = _oracles()
    rows = draw.some(a.x.numel() // max(a.x.shape[-1], 1), draw.sample.rows)
    part = SwigluArgs(_rows_of(a.x, rows).cpu())
    return [("rows", _rows_of(result, rows).cpu(), plain.swiglu(part), exact.swiglu(part))]


def _rotary(a: RotaryArgs, result: Tensor, draw: Draw) -> list[Compared]:
    exact, plain = _oracles()
    rows = draw.some(a.x.shape[0], draw.sample.rows)
    part = _cpu(a._replace(x=a.x[rows], positions=a.positions[rows]))
    return [("rows", result[rows].cpu(), plain.rotary(part), exact.rotary(part))]


def _append_kv(a: AppendKvArgs, result: None, draw: Draw) -> list[Compared]:
    """Some of the rows that are still there: each slot's last one, into a cache that has only them."""
    exact, plain = _oracles()
    last = {slot: n for n, slot in enumerate(a.slots.tolist()) if slot >= 0}
    slots = sorted(draw.random.sample(sorted(last), min(len(last), draw.sample.rows)))
    rows = [last[s] for s in slots]
    if not rows:
        return []

    def written(cache: Tensor) -> Tensor:
        where = torch.tensor(slots, device=cache.device)
        page, line = where // cache.shape[1], where % cache.shape[1]
        if a.kv_layout == "nhd":
            return cache[page, line].cpu()
        return nz_view(cache)[page, :, line].reshape(-1, *cache.shape[2:]).cpu()

    caches: dict[str, Any] = {
        n: torch.zeros_like(written(getattr(a, n)))[None] for n in ("k_cache", "v_cache")
    }
    positions = None if a.positions is None else a.positions[rows]
    part = a._replace(
        k=a.k[rows],
        v=a.v[rows],
        slots=torch.arange(len(rows)),
        positions=positions,
        kv_layout="nhd",
        **caches,
    )
    part = _cpu(part)
    wide = exact.append_kv(part)
    plain.append_kv(part)
    return [
        (name, written(cache), mine[0], true[0])
        for name, cache, mine, true in zip(
            ("keys", "values"), (a.k_cache, a.v_cache), (part.k_cache, part.v_cache), wide, strict=True
        )
    ]


def _linear(a: LinearArgs, result: Tensor, draw: Draw) -> list[Compared]:
    exact, plain = _oracles()
    rows = draw.some(a.x.shape[0], draw.sample.rows)
    width = min(a.weight.shape[0], draw.sample.columns)
    lo = draw.random.randint(0, a.weight.shape[0] - width)
    part = _cpu(a._replace(x=a.x[rows], weight=packed.slice_out(a.weight, lo, lo + width)))
    ours = result[rows, lo : lo + width].cpu()
    usual = plain.linear(part)
    if a.act and a.weight.format != "dense":
        usual = exact.linear(part._replace(x=_in_8_bits(part))).to(ours.dtype)
    return [(f"outputs {lo} to {lo + width}", ours, usual, exact.linear(part))]


def _in_8_bits(a: LinearArgs) -> Tensor:
    """x as ``act="int8"`` allows: 32 columns of the weight's at a time, to 127ths of the largest."""
    x, columns = a.x.float().clone(), a.x.shape[1]
    order = slice(None) if a.weight.x_perm is None else a.weight.x_perm.long()
    chunks = F.pad(x[:, order], (0, -columns % 32)).unflatten(1, (-1, 32))
    step = chunks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(step > 0, (chunks / step).round() * step, chunks)
    x[:, order] = rounded.flatten(1)[:, :columns]
    return x


def _embedding(a: EmbeddingArgs, result: Tensor, draw: Draw) -> list[Compared]:
    exact, plain = _oracles()
    rows = draw.some(a.ids.shape[0], draw.sample.rows)
    tensors = {n: t[a.ids[rows]] for n, t in a.weight.tensors.items()}
    weight = a.weight._replace(tensors=tensors, shape=(len(rows), a.weight.shape[1]), bias=None)
    part = _cpu(a._replace(ids=torch.arange(len(rows)), weight=weight))
    return [("rows", result[rows].cpu(), plain.embedding(part), exact.embedding(part))]


def _bytes(what: str, ours: Tensor, exact: Tensor) -> Compared:
    """Of a codec, which is the oracle's bit for bit: any other byte is an error of 1 or more."""
    return what, ours.cpu().float(), exact.float(), exact.double()


def _mx_pack(a: MxPackArgs, result: tuple[Tensor, Tensor], draw: Draw) -> list[Compared]:
    from . import reference_mx

    rows = draw.some(a.x.shape[:-1].numel(), draw.sample.rows)
    exact = reference_mx.mx_pack(a._replace(x=_rows_of(a.x, rows).cpu()))
    triples = zip(("codes", "scales"), result, exact, strict=True)
    return [_bytes(what, _rows_of(ours, rows), true) for what, ours, true in triples]


def _mx_unpack(a: MxUnpackArgs, result: Tensor, draw: Draw) -> list[Compared]:
    from . import reference_mx

    rows = draw.some(a.codes.shape[:-1].numel(), draw.sample.rows)
    part = a._replace(codes=_rows_of(a.codes, rows).cpu(), scales=_rows_of(a.scales, rows).cpu())
    exact = reference_mx.mx_unpack(part)
    return [("rows", _rows_of(result, rows).cpu(), exact.to(a.dtype), exact)]


def _encode(a: EncodeArgs, result: Tensor, draw: Draw) -> list[Compared]:
    """All of it, or the first rows' codes: a message has those of all rows before scales and outliers."""
    from . import reference_mx

    few = min(a.x.shape[0], draw.sample.rows)
    exact = reference_mx.encode(a._replace(x=a.x[:few].cpu()))
    if few == a.x.shape[0]:
        return [_bytes("message", result, exact)]
    bits = (a.x.shape[1] - len(a.outliers)) * reference_mx.mx_bits(a.element)
    codes = few * -(-bits // 8)
    return [_bytes("codes of the first rows", result[:codes], exact[:codes])]


def _decode_sum(a: DecodeSumArgs, result: Tensor, draw: Draw) -> list[Compared]:
    """Rows of the sum; the oracle decodes whole messages, which have no rows of their own."""
    from . import reference_mx

    exact = reference_mx.decode_sum(a._replace(messages=tuple(m.cpu() for m in a.messages), out=None))
    rows = draw.some(a.rows, draw.sample.rows)
    return [("rows", result[rows].cpu(), exact[rows].to(a.dtype), exact[rows].double())]


SAMPLES: dict[str, Callable[[Any, Any, Draw], list[Compared]]] = {
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "append_kv": _append_kv,
    "linear": _linear,
    "embedding": _embedding,
    "mx_pack": _mx_pack,
    "mx_unpack": _mx_unpack,
    "encode": _encode,
    "decode_sum": _decode_sum,
}
