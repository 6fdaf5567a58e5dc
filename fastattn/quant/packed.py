"""The one in-memory layout of weights, and the exact conversions on it.

A `PackedWeight` of shape (out, in) is one of

``dense``  ``weight`` (out, in), float32, float16 or bfloat16.
``int4``   ``codes`` uint8 (out, in / 2), ``scales`` and ``mins`` (out, groups): ``w = scales * q + mins``
           with q in 0..15. Along ``in``, each 32 values take 16 bytes: byte j holds value j in its low
           nibble and value j + 16 in its high one. ``in`` is a multiple of 32.
``int8``   ``codes`` int8 (out, in), ``scales`` (out, groups) and optionally ``mins``:
           ``w = scales * q (+ mins)``.

``scales`` and ``mins`` share a dtype, float16 (where that is exact) or float32. Column c belongs to group
``(c + group_offset) // group_size``, or to ``g_idx[c]`` where groups are not contiguous; ``group_size``
is a multiple of 16. With ``x_perm`` the columns are those of ``x[:, x_perm]``; `dequantize` and `rows`
undo that. ``bias`` (out,) is carried along and is not part of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import PackedWeight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (torch.float32, torch.float16)
CHUNK = 32  # values whose nibbles share 16 bytes
_TENSORS = {"dense": ("weight",), "int4": ("codes", "scales", "mins"), "int8": ("codes", "scales")}


# ------------------------------------------------------------------------------------------ building
def dense(weight: Tensor, bias: Tensor | None = None) -> PackedWeight:
    """A float matrix (out, in) as it is; shares its memory."""
    return check(PackedWeight("dense", _shape2(weight, "weight"), {"weight": weight}, bias=bias))


def pack_int4(
    q: Tensor, scales: Tensor, mins: Tensor, group_size: int, *, group_offset: int = 0,
    g_idx: Tensor | None = None, x_perm: Tensor | None = None, bias: Tensor | None = None,
) -> PackedWeight:  # fmt: skip
    """Packs ``q`` (out, in), integers 0..15, with ``w = scales * q + mins``; scales, mins (out, groups)."""
    shape = _shape2(q, "q")
    if shape[1] % CHUNK:
        raise ValueError(f"q: {shape[1]} columns, int4 needs a multiple of {CHUNK}; use pack_int8")
    _check_range(q, 0, 15)
    tensors = {"codes": _pack_nibbles(q.to(torch.uint8)), "scales": scales, "mins": mins}
    return check(PackedWeight("int4", shape, tensors, group_size, group_offset, g_idx, x_perm, bias))


def pack_int8(
    q: Tensor, scales: Tensor, mins: Tensor | None, group_size: int, *, group_offset: int = 0,
    g_idx: Tensor | None = None, x_perm: Tensor | None = None, bias: Tensor | None = None,
) -> PackedWeight:  # fmt: skip
    """Packs ``q`` (out, in), integers -128..127, with ``w = scales * q (+ mins)``."""
    shape = _shape2(q, "q")
    _check_range(q, -128, 127)
    tensors = {"codes": q.to(torch.int8).contiguous(), "scales": scales}
    if mins is not None:
        tensors["mins"] = mins
    return check(PackedWeight("int8", shape, tensors, group_size, group_offset, g_idx, x_perm, bias))


def check(w: PackedWeight) -> PackedWeight:
    """Returns ``w``. Raises ValueError that names the field when its tensors contradict each other."""
    if w.format not in _TENSORS:
        raise ValueError(f"format: {w.format!r}, expected one of {', '.join(_TENSORS)}")
    missing = [n for n in _TENSORS[w.format] if n not in w.tensors]
    if missing:
        raise ValueError(f"tensors: {w.format} lacks {', '.join(missing)}")
    out, inn = w.shape
    if w.format == "dense":
        _expect(w.tensors["weight"], "weight", (out, inn), FLOATS)
    else:
        if w.format == "int4":
            if inn % CHUNK:
                raise ValueError(f"shape: {inn} columns, int4 needs a multiple of {CHUNK}")
            _expect(w.tensors["codes"], "codes", (out, inn // 2), (torch.uint8,))
        else:
            _expect(w.tensors["codes"], "codes", (out, inn), (torch.int8,))
        if w.group_size < 16 or w.group_size % 16:
            raise ValueError(f"group_size: {w.group_size}, expected a positive multiple of 16")
        if not 0 <= w.group_offset < w.group_size:
            raise ValueError(f"group_offset: {w.group_offset}, expected 0 <= offset < {w.group_size}")
        scales = w.tensors["scales"]
        groups = scales.shape[-1] if w.g_idx is not None else num_groups(w)
        _expect(scales, "scales", (out, groups), SCALES)
        if "mins" in w.tensors:
            _expect(w.tensors["mins"], "mins", (out, groups), (scales.dtype,))
        if w.g_idx is not None:
            _expect(w.g_idx, "g_idx", (inn,), (torch.int32,))
            _check_range(w.g_idx, 0, groups - 1, "g_idx")
    if w.x_perm is not None:
        _expect(w.x_perm, "x_perm", (inn,), (torch.int32, torch.int64))
        if not torch.equal(w.x_perm.long().sort().values, torch.arange(inn, device=w.x_perm.device)):
            raise ValueError(f"x_perm: expected a permutation of 0..{inn - 1}")
    if w.bias is not None:
        _expect(w.bias, "bias", (out,), FLOATS)
    return w


# ----------------------------------------------------------------------------------------- unpacking
def num_groups(w: PackedWeight) -> int:
    """Columns of ``scales`` when groups are contiguous."""
    return (w.shape[1] + w.group_offset + w.group_size - 1) // w.group_size


def column_groups(w: PackedWeight) -> Tensor:
    """Group of each stored column, int32 (in,)."""
    if w.g_idx is not None:
        return w.g_idx
    columns = torch.arange(w.shape[1], dtype=torch.int32, device=w.tensors["scales"].device)
    return (columns + w.group_offset) // w.group_size


def quants(w: PackedWeight) -> Tensor:
    """The integers of an int4 or int8 weight, int8 (out, in), in stored column order."""
    return _unpack_nibbles(w.tensors["codes"]) if w.format == "int4" else w.tensors["codes"]


def dequantize(w: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix W (out, in) with ``y = x @ W^T``, in the order of x's own columns.

    Computed in float32 (float64 when ``dtype`` is), rounded once.
    """
    stored = _dequantize_stored(w, dtype)
    if w.x_perm is None:
        return stored
    out = torch.empty_like(stored)
    out[:, w.x_perm.long()] = stored
    return out


def rows(w: PackedWeight, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows ``ids`` (n,) of the matrix, (n, in): an embedding lookup that reads only those rows."""
    tensors = {name: t.index_select(0, ids) for name, t in w.tensors.items()}
    return dequantize(w._replace(shape=(ids.numel(), w.shape[1]), tensors=tensors, bias=None), dtype)


def _dequantize_stored(w: PackedWeight, dtype: torch.dtype) -> Tensor:
    if w.format == "dense":
        return w.tensors["weight"].to(dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    groups = column_groups(w).long()
    out = quants(w).to(work) * w.tensors["scales"].to(work)[:, groups]
    if "mins" in w.tensors:
        out += w.tensors["mins"].to(work)[:, groups]
    return out.to(dtype)


def _pack_nibbles(q: Tensor) -> Tensor:
    pairs = q.reshape(q.shape[0], q.shape[1] // CHUNK, 2, 16)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1).contiguous()


def _unpack_nibbles(codes: Tensor) -> Tensor:
    half = codes.unflatten(1, (codes.shape[1] // 16, 16))
    return torch.stack((half & 15, half >> 4), dim=2).flatten(1).view(torch.int8)


def to_device(w: PackedWeight, device: torch.device) -> PackedWeight:
    """The weight with all its tensors on ``device``; shares those that are there already."""
    tensors = {name: t.to(device) for name, t in w.tensors.items()}
    g_idx, x_perm, bias = (None if t is None else t.to(device) for t in (w.g_idx, w.x_perm, w.bias))
    return w._replace(tensors=tensors, g_idx=g_idx, x_perm=x_perm, bias=bias)


# ------------------------------------------------------------------------------- joining and cutting
def concat_out(parts: Sequence[PackedWeight]) -> PackedWeight:
    """Stacks weights along ``out`` (q, k, v or gate, up as one matrix).

    Where only some have a bias, the others get zeros. Raises ValueError when anything that decides how
    columns are stored differs: format, tensors and their dtypes, in, groups, g_idx, x_perm.
    """
    if not parts:
        raise ValueError("parts: empty, expected at least one weight")
    first = parts[0]
    for i, w in enumerate(parts[1:], 1):
        for what, a, b in (
            ("format", first.format, w.format),
            ("in", first.shape[1], w.shape[1]),
            ("group_size", first.group_size, w.group_size),
            ("group_offset", first.group_offset, w.group_offset),
            ("tensors", _kinds(first), _kinds(w)),
        ):
            if a != b:
                raise ValueError(f"parts[{i}]: {what} {b}, parts[0] has {a}")
        for what in ("g_idx", "x_perm"):
            if not _same(getattr(first, what), getattr(w, what)):
                raise ValueError(f"parts[{i}]: {what} differs from that of parts[0]")
    tensors = {name: torch.cat([w.tensors[name] for w in parts]) for name in first.tensors}
    return first._replace(
        shape=(sum(w.shape[0] for w in parts), first.shape[1]), tensors=tensors, bias=_join_bias(parts)
    )


def slice_out(w: PackedWeight, lo: int, hi: int) -> PackedWeight:
    """Rows [lo, hi) of the matrix, with their bias; shares memory."""
    _check_span(lo, hi, w.shape[0])
    tensors = {name: t[lo:hi] for name, t in w.tensors.items()}
    bias = None if w.bias is None else w.bias[lo:hi]
    return w._replace(shape=(hi - lo, w.shape[1]), tensors=tensors, bias=bias)


def slice_in(w: PackedWeight, lo: int, hi: int) -> PackedWeight:
    """Columns [lo, hi) of the matrix, exactly: ``x[:, lo:hi] @ W[:, lo:hi]^T``.

    A cut inside a group sets ``group_offset``; an int4 slice that is no multiple of 32 wide becomes int8
    with the same values. Slices are summed by the caller and the bias belongs to the sum, so a slice has
    none. Copies only where bytes cannot be shared.
    """
    _check_span(lo, hi, w.shape[1])
    if w.x_perm is not None:
        inside = (w.x_perm >= lo) & (w.x_perm < hi)
        keep = inside.nonzero().flatten()
        return _select_stored(w, keep)._replace(x_perm=w.x_perm[keep] - lo)
    shape = (w.shape[0], hi - lo)
    if w.format == "dense":
        return w._replace(shape=shape, tensors={"weight": w.tensors["weight"][:, lo:hi]}, bias=None)
    if w.g_idx is not None:
        groups, offset, g_idx = slice(None), 0, w.g_idx[lo:hi]
    elif lo == hi:
        groups, offset, g_idx = slice(0), 0, None
    else:
        begin, end = lo + w.group_offset, hi + w.group_offset
        groups = slice(begin // w.group_size, -(-end // w.group_size))
        offset, g_idx = begin % w.group_size, None
    tensors = {n: w.tensors[n][:, groups] for n in ("scales", "mins") if n in w.tensors}
    piece = w._replace(shape=shape, tensors=tensors, group_offset=offset, g_idx=g_idx, bias=None)
    if w.format == "int4" and lo % CHUNK == 0 and hi % CHUNK == 0:
        return piece._replace(tensors={"codes": w.tensors["codes"][:, lo // 2 : hi // 2], **tensors})
    return _with_quants(piece, _columns(w, lo, hi))


def _columns(w: PackedWeight, lo: int, hi: int) -> Tensor:
    """quants(w)[:, lo:hi], unpacking only the chunks that hold them."""
    if w.format == "int8":
        return w.tensors["codes"][:, lo:hi]
    start, stop = lo // CHUNK * CHUNK, -(-hi // CHUNK) * CHUNK
    return _unpack_nibbles(w.tensors["codes"][:, start // 2 : stop // 2])[:, lo - start : hi - start]


def _select_stored(w: PackedWeight, index: Tensor) -> PackedWeight:
    """Stored columns ``index``, in that order; groups are then named column by column."""
    shape = (w.shape[0], index.numel())
    if w.format == "dense":
        return w._replace(shape=shape, tensors={"weight": w.tensors["weight"][:, index]}, bias=None)
    tensors = {name: w.tensors[name] for name in ("scales", "mins") if name in w.tensors}
    g_idx = column_groups(w)[index]
    piece = w._replace(shape=shape, tensors=tensors, group_offset=0, g_idx=g_idx, bias=None)
    return _with_quants(piece, quants(w)[:, index])


def _with_quants(piece: PackedWeight, q: Tensor) -> PackedWeight:
    """``piece`` with the codes of ``q``; int4 falls back to int8 when the width is no multiple of 32."""
    if piece.format == "int4" and q.shape[1] % CHUNK == 0:
        return piece._replace(tensors={"codes": _pack_nibbles(q.view(torch.uint8)), **piece.tensors})
    return piece._replace(format="int8", tensors={"codes": q, **piece.tensors})


# ------------------------------------------------------------------------------------------- checking
def _shape2(t: Tensor, name: str) -> tuple[int, int]:
    if t.ndim != 2:
        raise ValueError(f"{name}: {t.ndim} dimensions, expected (out, in)")
    return t.shape[0], t.shape[1]


def _expect(t: Tensor, name: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {shape}")
    if t.dtype not in dtypes:
        raise ValueError(f"{name}: {t.dtype}, expected {' or '.join(str(d) for d in dtypes)}")


def _check_range(t: Tensor, lo: int, hi: int, name: str = "q") -> None:
    if t.numel() and (int(t.min()) < lo or int(t.max()) > hi):
        raise ValueError(f"{name}: values {int(t.min())}..{int(t.max())}, expected {lo}..{hi}")


def _check_span(lo: int, hi: int, size: int) -> None:
    if not 0 <= lo <= hi <= size:
        raise ValueError(f"lo, hi: {lo}, {hi}, expected 0 <= lo <= hi <= {size}")


def _kinds(w: PackedWeight) -> dict[str, str]:
    return {name: str(t.dtype) for name, t in w.tensors.items()}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _join_bias(parts: Sequence[PackedWeight]) -> Tensor | None:
    known = next((w.bias for w in parts if w.bias is not None), None)
    if known is None:
        return None
    return torch.cat([known.new_zeros(w.shape[0]) if w.bias is None else w.bias for w in parts])
