"""The other ops on an NPU: norm, gate, rotary, KV append, linear, embedding; both ways, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..router import small_ops
from ..router.atb import plain_pages
from .measure import Row, Setting, row, same

_NONE = "torch_npu has no operator for it"


def rows(setting: Setting) -> Iterator[Row]:
    """The sizes of Llama-7B, or of a toy when ``setting.quick``."""
    for dtype in (torch.float16, torch.bfloat16):
        made = _Values(setting, dtype)
        kind = str(dtype).removeprefix("torch.")
        for rows_of in (_norms, _gate, _rotary, _append, _matrices):
            for found in rows_of(setting, made):
                yield found._replace(name=f"{found.name}, {kind}")


class _Values:
    """Random tensors of one dtype on the device."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.device, self.dtype = setting.device, dtype
        self.generator = torch.Generator().manual_seed(0)
        self.tokens, self.hidden, self.heads, self.head_dim = (
            (6, 96, 4, 64) if setting.quick else (64, 4096, 32, 128)
        )

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device)


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.cpu().double() for t in tensors]


def _joined(found: tuple[Tensor, Tensor | None]) -> Tensor:
    """Both results of a norm, or the only one."""
    normalised, total = found
    return normalised if total is None or not total.numel() else torch.stack((normalised, total))


def _norms(setting: Setting, made: _Values) -> Iterator[Row]:
    x, other, weight = made(made.tokens, made.hidden), made(made.tokens, made.hidden), made(made.hidden)

    def ours(residual: Tensor | None) -> Tensor:
        return _joined(ops.rms_norm(x, weight, 1e-5, residual))

    for name, residual in (("RMSNorm", None), ("residual + RMSNorm", other)):
        total = sum(_wide(x) if residual is None else _wide(x, residual))
        assert isinstance(total, Tensor)
        exact = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * _wide(weight)[0]

        yield row(
            setting, name, exact if residual is None else torch.stack((exact, total)),
            partial(small_ops.rms_norm, x, weight, 1e-5, residual, setting.chip),
            _joined,
            partial(ours, residual),
        )  # fmt: skip


def _gate(setting: Setting, made: _Values) -> Iterator[Row]:
    x = made(made.tokens, 2 * made.hidden)
    gate, up = _wide(x)[0].chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    yield row(
        setting, "SwiGLU", exact, lambda: small_ops.swiglu(x, setting.chip), same, lambda: ops.swiglu(x)
    )


def _angles(made: _Values) -> tuple[Tensor, Tensor]:
    half = made.head_dim // 2
    phase = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return phase.cos().to(made.device), phase.sin().to(made.device)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    x, c, s = _wide(x, cos[positions][:, None], sin[positions][:, None])
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def _rotary(setting: Setting, made: _Values) -> Iterator[Row]:
    x, (cos, sin) = made(made.tokens, made.heads, made.head_dim), _angles(made)
    where = made.integers(50, made.tokens)
    for interleaved in (False, True):
        exact = _turned(x, cos, sin, where, interleaved=interleaved)
        yield row(
            setting, f"rotary{' of pairs' * interleaved}", exact,
            partial(small_ops.rotary, x, cos, sin, where, interleaved, setting.chip),
            same,
            partial(ops.rotary, x, cos, sin, where, interleaved=interleaved),
        )  # fmt: skip


def _append(setting: Setting, made: _Values) -> Iterator[Row]:
    """Into empty pages; one slot is negative and skipped. The caches are compared whole."""
    page, shape = 16, (made.tokens, made.heads, made.head_dim)
    k, v, (cos, sin) = made(*shape), made(*shape), _angles(made)
    pages = -(-2 * made.tokens // page)
    slots = made.permutation(pages * page)[: made.tokens]
    slots[0] = -1
    where = made.integers(50, made.tokens)
    layout = setting.chip.kv_layout

    def empty() -> tuple[Tensor, Tensor]:
        return k.new_zeros(pages, page, *shape[1:]), k.new_zeros(pages, page, *shape[1:])

    def filled(keys: Tensor) -> Tensor:
        caches = torch.zeros(2, pages * page, *shape[1:], dtype=torch.float64)
        caches[:, slots[1:].cpu()] = torch.stack((keys, *_wide(v)))[:, 1:]
        return caches

    caches = empty()

    def vendor() -> small_ops.Choice:
        return small_ops.append_kv(caches[0], caches[1], k, v, slots, layout, setting.chip)

    def stored(found: None) -> Tensor:
        return torch.stack([plain_pages(c) if layout == "npu_nz" else c for c in caches])

    def ours(**rotation: Any) -> Tensor:
        keys, values = empty()
        ops.append_kv(keys, values, k, v, slots, **rotation)
        return torch.stack((keys, values))

    yield row(setting, "KV append", filled(_wide(k)[0]), vendor, stored, ours)
    for pairs in (False, True):
        rotation = {"cos": cos, "sin": sin, "positions": where, "interleaved": pairs}
        yield row(
            setting, f"KV append with rotary{' of pairs' * pairs}",
            filled(_turned(k, cos, sin, where, interleaved=pairs)),
            lambda: _NONE, same, partial(ours, **rotation),
        )  # fmt: skip


def weights(made: _Values, out: int, inn: int, group: int) -> Iterator[tuple[str, ops.Weight, Tensor]]:
    """(name, weight, its float64 values) of each format that `ops.linear` takes."""
    groups = inn // group
    scales, mins = made(out, groups) / 16, made(out, groups)
    act_order = (made.permutation(inn) // group).to(torch.int32)
    dense = made(out, inn)
    yield "dense", ops.Weight(16, (out, inn), dense), _wide(dense)[0]
    codes = (made.integers(256, out, inn) - 128).to(torch.int8)
    wide, (s, m) = codes.cpu().double(), _wide(scales, mins)
    spread = wide * s.repeat_interleave(group, 1) / 16
    yield "W8A16", ops.Weight(8, (out, inn), codes, scales / 16, None, group), spread
    nibbles = made.integers(16, out, inn)
    # Each 32 columns take 16 bytes: column j in the low nibble of byte j, column j + 16 in its high one.
    low, high = nibbles.unflatten(1, (-1, 2, 16)).unbind(2)
    packed = (low | high << 4).flatten(1).to(torch.uint8)
    for name, g_idx in (("W4A16", None), ("W4A16 act-order", act_order)):
        of = (torch.arange(inn) // group if g_idx is None else g_idx.cpu()).long()
        values = nibbles.cpu().double() * s[:, of] + m[:, of]
        yield name, ops.Weight(4, (out, inn), packed, scales, mins, group, g_idx=g_idx), values


def _matrices(setting: Setting, made: _Values) -> Iterator[Row]:
    out, inn, group = (72, 256, 32) if setting.quick else (4096, 4096, 128)
    ids = made.integers(out, made.tokens)
    for name, weight, exact in weights(made, out, inn, group):
        for tokens in (1, made.tokens):
            x = made(tokens, inn) / inn**0.5

            def vendor(x: Tensor = x, w: ops.Weight = weight) -> small_ops.Choice:
                if w.bits != 8 or w.scales is None:
                    return _NONE if w.bits == 4 else "torch's own matmul is CANN's"
                return small_ops.int8_linear(x, w.codes, w.scales, w.mins, w.group_size, None, setting.chip)

            yield row(
                setting, f"{name} linear, {tokens} rows", _wide(x)[0] @ exact.T,
                vendor, same, partial(ops.linear, x, weight),
            )  # fmt: skip
        yield row(
            setting, f"{name} embedding", exact[ids.cpu()], lambda: _NONE, same,
            partial(ops.embedding, ids, weight, made.dtype),
        )  # fmt: skip
