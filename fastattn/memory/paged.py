"""A paged KV cache: fixed-size pages from one pool, a page list per sequence.

Pages make memory follow the tokens that exist, whatever the mix of sequence lengths (PagedAttention,
arXiv 2309.06180). All layers share one page numbering, so a forward computes its slots once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ..ops import append_kv
from ..spec import CacheFull, KvPart, KvStep


@dataclass
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)


class PagedKvCache:
    """Keys and values of many sequences over all layers, resident on one device.

    Args:
        num_layers: of the model.
        num_pages: pages in the pool; the memory is committed as pages are first written.
        page_size: tokens a page.
        kv_heads: KV heads of this rank. head_dim, v_head_dim: of keys and values.
        layout: of a page: "nhd", or "npu_nz" (Ascend's fractal format; multiples of 16 values a token).

    Raises `CacheFull` when the system does not give so much address space.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: str = "nhd",
    ) -> None:
        if page_size < 1 or num_pages < 0:
            raise ValueError(f"page_size, num_pages: {page_size}, {num_pages}, expected at least 1 and 0")
        shape = (num_layers, num_pages, page_size, kv_heads)
        self.page_size, self.layout = page_size, layout
        dims = (head_dim, v_head_dim or head_dim)
        if layout not in ("nhd", "npu_nz") or (layout == "npu_nz" and any(kv_heads * d % 16 for d in dims)):
            given = f"{layout!r} of {kv_heads} heads of {dims}"
            raise ValueError(
                f"layout: {given}, expected 'nhd', or 'npu_nz' of multiples of 16 values a token"
            )
        try:
            self.keys, self.values = (torch.empty((*shape, d), dtype=dtype, device=device) for d in dims)
        except RuntimeError as error:
            gib = math.prod(shape) * sum(dims) * dtype.itemsize / 2**30
            raise CacheFull(
                f"a KV cache of {num_pages * page_size} tokens needs {gib:.1f} GiB, which cannot be allocated"
            ) from error
        self._free = list(range(num_pages - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def length(self, seq: int) -> int:
        """Tokens present of sequence ``seq``; 0 when it is unknown."""
        known = self._sequences.get(seq)
        return known.length if known else 0

    def reserve(self, seqs: Sequence[int], new: Sequence[int]) -> KvStep:
        """Room for ``new[b]`` more tokens of each sequence; unknown sequences begin here.

        Raises CacheFull, with nothing changed, when the pool has too few free pages.
        """
        if len(seqs) != len(new) or len(set(seqs)) != len(seqs) or any(n < 0 for n in new):
            given = f"{list(seqs)}, {list(new)}"
            raise ValueError(f"seqs, new: {given}, expected distinct sequences and counts >= 0")
        lengths = [self.length(s) for s in seqs]
        wanted = [
            -(-(have + n) // self.page_size) - len(self._pages(s))
            for s, have, n in zip(seqs, lengths, new, strict=True)
        ]
        if sum(wanted) > self.free_pages:
            tokens = self.keys.shape[1] * self.page_size
            raise CacheFull(
                f"the KV cache of {tokens} tokens has {self.free_pages} free pages of {self.page_size}, "
                f"{sum(wanted)} are needed"
            )
        for seq, pages, n in zip(seqs, wanted, new, strict=True):
            entry = self._sequences.setdefault(seq, _Sequence())
            entry.pages += [self._free.pop() for _ in range(pages)]
            entry.length += n
        return self._step(seqs, lengths, new)

    def append(self, layer: int, step: KvStep, k: Tensor, v: Tensor) -> None:
        """Writes the step's new keys and values (total, Hkv, D) of one layer."""
        append_kv(self.keys[layer], self.values[layer], k, v, step.slots, kv_layout=self.layout)

    def parts(self, layer: int, step: KvStep) -> tuple[KvPart, ...]:
        """One part: everything is here."""
        keys, values = self.keys[layer], self.values[layer]
        return (KvPart(keys, values, step.block_table, step.seqused, None, layout=self.layout),)

    def truncate(self, seq: int, length: int) -> None:
        """Forgets the tokens of ``seq`` from ``length`` on."""
        entry = self._sequences.get(seq)
        if entry is None:
            raise ValueError(f"seq: {seq}, the cache has no such sequence")
        if not 0 <= length <= entry.length:
            raise ValueError(f"length: {length}, sequence {seq} has {entry.length} tokens")
        keep = -(-length // self.page_size)
        self._free += reversed(entry.pages[keep:])
        del entry.pages[keep:]
        entry.length = length

    def free(self, seq: int) -> None:
        """Forgets ``seq``; its pages return to the pool."""
        self.truncate(seq, 0)
        del self._sequences[seq]

    def _pages(self, seq: int) -> list[int]:
        known = self._sequences.get(seq)
        return known.pages if known else []

    def _step(self, seqs: Sequence[int], lengths: Sequence[int], new: Sequence[int]) -> KvStep:
        used = [have + n for have, n in zip(lengths, new, strict=True)]
        size, pages = self.page_size, [self._pages(s) for s in seqs]
        spans = [range(lo, hi) for lo, hi in zip(lengths, used, strict=True)]
        slots = [
            own[p // size] * size + p % size for own, span in zip(pages, spans, strict=True) for p in span
        ]
        width = max(map(len, pages), default=0)
        table = [own + [0] * (width - len(own)) for own in pages]
        return KvStep(
            seqs=tuple(seqs),
            new=tuple(new),
            cu_seqlens=self._tensor([0, *accumulate(new)], np.int32),
            positions=self._tensor([p for span in spans for p in span], np.int64),
            slots=self._tensor(slots, np.int64),
            seqused=self._tensor(used, np.int32),
            block_table=self._tensor(table, np.int32).view(len(seqs), width),
            max_new=max(new, default=0),
            max_used=max(used, default=0),
        )

    def _tensor(self, values: list[int] | list[list[int]], dtype: type[np.integer]) -> Tensor:
        # Through numpy: torch.tensor takes three times as long for a few values.
        # Not an inference tensor, which has no version: backends read lengths back once for each.
        with torch.inference_mode(False):
            on_host = torch.from_numpy(np.array(values, dtype))
            return on_host if self.keys.device.type == "cpu" else on_host.to(self.keys.device)
