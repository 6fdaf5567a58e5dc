"""GGUF files: one file with metadata, tokenizer and quantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..quant import packed
from ..quant.cuts import spans_of, take
from ..spec import CheckpointError, Cut, PackedWeight, Shard
from . import gguf_blocks
from .checkpoint import Checkpoint, check_shapes
from .config import tensor_shapes
from .gguf_config import ROPE_FACTORS, parse_metadata
from .gguf_header import GgufTensor, read_header

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufCheckpoint(Checkpoint[GgufTensor]):
    """A GGUF file. Q4 and K types load as int4 or int8, F32, F16 and BF16 as they are, others dequantized.

    Rows of q and k of the architecture "llama" are stored for interleaved rotary embedding, and stay so
    (``config.rope.interleaved``).
    """

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._path = path
        self._header = read_header(path)
        factors = self._header.tensors.get(ROPE_FACTORS)
        divisors = None
        if factors is not None:
            if factors.type.name != "F32" or len(factors.shape) != 1:
                raise CheckpointError(path, f"is not a vector of F32 but {factors.type.name}", ROPE_FACTORS)
            divisors = np.array(self._map(factors)[0]).view(np.float32)
        self.config = parse_metadata(path, self._header, divisors)
        tensors = self._header.tensors.items()
        stored = {_canonical(path, name): t for name, t in tensors if name != ROPE_FACTORS}
        if self.config.tie_embeddings:
            stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
        check_shapes(path, self.config, {name: t.shape for name, t in stored.items()})
        wanted = [*tensor_shapes(self.config), *(["lm_head.weight"] if self.config.tie_embeddings else [])]
        self._entries = {name: stored[name] for name in wanted}
        for name, entry in self._entries.items():
            kind = entry.type.name
            if not (gguf_blocks.readable(kind) if len(entry.shape) == 2 else gguf_blocks.is_dense(kind)):
                raise CheckpointError(path, f"has type {kind}, which cannot be read here", name)

    def _matrix(self, name: str, entry: GgufTensor, shard: Shard) -> PackedWeight:
        kind, block, block_bytes = entry.type
        raw = self._map(entry)
        whole_blocks = shard.inn.order is None and all(
            lo == hi or (lo % block == 0 and hi % block == 0) for lo, hi in spans_of(shard.inn)
        )
        if whole_blocks:
            spans = tuple(
                (lo // block * block_bytes, hi // block * block_bytes) for lo, hi in spans_of(shard.inn)
            )
            return gguf_blocks.unpack(kind, _read(raw, shard.out, Cut(raw.shape[1], spans)), block_bytes)
        # The blocks that cover the columns, then the columns out of them.
        lo, hi = _extent(shard.inn)
        first, last = lo // block, -(-hi // block)
        cover = Cut(raw.shape[1], ((first * block_bytes, last * block_bytes),))
        weight = gguf_blocks.unpack(kind, _read(raw, shard.out, cover), block_bytes)
        return _columns(weight, shard.inn, first * block)

    def _vector(self, name: str, entry: GgufTensor, cut: Cut) -> Tensor:
        raw = np.array(self._map(entry))
        whole = gguf_blocks.unpack(entry.type.name, raw, entry.type.nbytes)
        return take(whole.tensors["weight"][0], cut)

    def tokenizer(self) -> Tokenizer:
        from .gguf_tokenizer import build_tokenizer

        return build_tokenizer(self._path, self._header.fields, self.config)

    def _table(self) -> Any:
        return ["gguf", [list(t) for t in self._header.tensors.values()], self._header.size]

    def _files(self) -> Sequence[Path]:
        return [self._path]

    def _map(self, entry: GgufTensor) -> np.ndarray:
        """The tensor's bytes (rows, bytes of a row) as a map of the file, one tensor at a time.

        A fresh map each time, so that pages read do not stay in the process.
        """
        rows = entry.shape[0] if len(entry.shape) == 2 else 1
        try:
            if self._path.stat().st_size != self._header.size:
                raise CheckpointError(self.path, "changed its size since it was opened", entry.name)
            return np.memmap(self.path, np.uint8, "r", entry.offset, (rows, entry.nbytes // rows))
        except OSError as error:
            raise CheckpointError(
                self.path, f"cannot be read: {error.strerror or error}", entry.name
            ) from error


def _read(raw: np.ndarray, rows: Cut, columns: Cut) -> np.ndarray:
    """A contiguous copy of the cut; of the file, only the cut is touched."""
    return np.array(take(take(raw, rows, 0), columns, 1), order="C")


def _extent(cut: Cut) -> tuple[int, int]:
    """The smallest range that holds a cut which is not empty."""
    if cut.order is not None:
        return (int(cut.order.min()), int(cut.order.max()) + 1) if cut.order.numel() else (0, 0)
    held = [span for span in spans_of(cut) if span[0] < span[1]]
    return min(lo for lo, _ in held), max(hi for _, hi in held)


def _columns(weight: PackedWeight, cut: Cut, start: int) -> PackedWeight:
    """The cut's columns of a weight whose first column is ``start`` of the cut's axis; exact for any cut."""
    spans = spans_of(cut)
    if cut.order is None and len(spans) == 1:
        return _compact(packed.slice_in(weight, spans[0][0] - start, spans[0][1] - start))
    parts = [torch.arange(lo, hi) for lo, hi in spans]
    index = (torch.cat(parts) if cut.order is None else cut.order.long()) - start
    if weight.format == "dense":
        return packed.dense(weight.tensors["weight"][:, index])
    q, scales = packed.quants(weight)[:, index], weight.tensors["scales"]
    groups = packed.column_groups(weight)[index]
    pack = (
        packed.pack_int4
        if weight.format == "int4" and index.numel() % packed.CHUNK == 0
        else packed.pack_int8
    )
    return pack(q, scales, weight.tensors.get("mins"), weight.group_size, g_idx=groups)  # type: ignore[arg-type]


def _compact(weight: PackedWeight) -> PackedWeight:
    """Without memory shared with columns that were cut away."""
    return weight._replace(tensors={name: t.contiguous() for name, t in weight.tensors.items()})


def _canonical(path: Path, name: str) -> str:
    """Hugging Face's name of a GGUF tensor; names that are not of our families stay as they are."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) != 3 or parts[0] != "blk":
        return name
    if not (parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 6):
        raise CheckpointError(path, "has no layer number", name)
    return f"model.layers.{int(parts[1])}.{_LAYER.get(parts[2], parts[2])}.{suffix}"
