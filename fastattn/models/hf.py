"""Hugging Face directories: config.json, safetensors (one file or sharded), tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..quant import grouped, packed
from ..quant.cuts import take
from ..spec import CheckpointError, Cut, PackedWeight, Shard
from .checkpoint import Checkpoint, check_shapes
from .config import tensor_shapes
from .fields import read_json
from .hf_config import read_config
from .hf_entries import Entry, PackedEntry, gather
from .hf_quant import read_format

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_INDEX_LIMIT = 64 << 20  # bytes
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")


class HfCheckpoint(Checkpoint[Entry | PackedEntry]):
    """A directory as `transformers` saves it.

    Weights are dense, in the dtype of the file, or quantized (`hf_quant`), in all layers or in some.
    """

    def __init__(self, directory: Path) -> None:
        self.path = str(directory)
        self._directory = directory
        self.config = read_config(directory)
        self._sizes: dict[str, int] = {}
        stored: dict[str, Entry] = {}
        for file, names in _weight_files(directory).items():
            stored |= self._read_header(file, names)
        if self.config.tie_embeddings:
            self._tie(stored)
        shapes = tensor_shapes(self.config)
        entries = gather(stored, shapes, read_format(directory))
        self._drop_zero_biases(entries, shapes)
        check_shapes(directory, self.config, {name: e.shape for name, e in entries.items()})
        wanted = [*shapes, *(["lm_head.weight"] if self.config.tie_embeddings else [])]
        self._entries = {name: entries[name] for name in wanted}
        for name, entry in self._entries.items():
            if isinstance(entry, Entry) and entry.dtype not in _FLOATS:
                reason = f"has dtype {entry.dtype}, supported are {', '.join(_FLOATS)}"
                raise CheckpointError(entry.file, reason, name)

    def groups(self, name: str) -> Tensor | None:
        entry = self._entry(name, 2)
        if not isinstance(entry, PackedEntry):
            return None
        with self._parts(name, entry) as tensors:
            found = entry.format.g_idx(tensors, entry.shape[1])
            return None if found is None else found.clone()

    def _tie(self, stored: dict[str, Entry]) -> None:
        """One matrix is embedding and head, whichever of the two names the file has; not two that differ."""
        embed, head = "model.embed_tokens.weight", "lm_head.weight"
        if embed in stored and head in stored:
            with self._mapped(embed, stored[embed]) as a, self._mapped(head, stored[head]) as b:
                if a.dtype != b.dtype or not torch.equal(a, b):
                    reason = "differs from the embedding, though tie_word_embeddings is true"
                    raise CheckpointError(stored[head].file, reason, head)
        if embed in stored:
            stored[head] = stored[embed]
        elif head in stored:
            stored[embed] = stored[head]

    def _drop_zero_biases(
        self, entries: dict[str, Entry | PackedEntry], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """AutoGPTQ gives every quantized layer a bias; those that the model has no place for are zero."""
        for name in [n for n, e in entries.items() if isinstance(e, PackedEntry)]:
            bias = name.removesuffix("weight") + "bias"
            entry = entries.get(bias)
            if bias in shapes or not isinstance(entry, Entry) or entry.dtype not in _FLOATS:
                continue
            with self._mapped(bias, entry) as values:
                if not bool(values.any()):
                    del entries[bias]

    def _read_header(self, file: Path, expected: set[str] | None) -> dict[str, Entry]:
        """The tensors of one file; ``expected`` are those the index says it holds."""
        entries = {}
        with _opened(file) as handle:
            self._sizes[file.name] = file.stat().st_size
            names = set(handle.keys())
            for name in sorted((expected or set()) - names):
                raise CheckpointError(file, f"is missing, though {_INDEX} says it is here", name)
            for name in sorted(names if expected is None else names & expected):
                piece = handle.get_slice(name)
                entries[name] = Entry(file, name, piece.get_dtype(), tuple(piece.get_shape()))
        return entries

    def _matrix(self, name: str, entry: Entry | PackedEntry, shard: Shard) -> PackedWeight:
        if isinstance(entry, PackedEntry):
            with self._parts(name, entry) as tensors:
                return grouped.pack(entry.format.read(tensors, shard.out, shard.inn))
        with self._mapped(name, entry) as matrix:
            piece = take(take(matrix, shard.out, 0), shard.inn, 1)
            return packed.dense(piece.clone(memory_format=torch.contiguous_format))

    def _vector(self, name: str, entry: Entry | PackedEntry, cut: Cut) -> Tensor:
        assert isinstance(entry, Entry)  # a vector
        with self._mapped(name, entry) as stored:
            return take(stored, cut).clone()

    def tokenizer(self) -> Tokenizer:
        from .hf_tokenizer import read_tokenizer

        return read_tokenizer(self._directory, self.config)

    def _table(self) -> Any:
        tensors = []
        for name, e in sorted(self._entries.items()):
            parts = e.parts if isinstance(e, PackedEntry) else {"": e}
            kind = repr(e.format) if isinstance(e, PackedEntry) else "dense"
            tensors += [[name, kind, n, p.file.name, p.dtype, p.shape] for n, p in sorted(parts.items())]
        return ["safetensors", tensors, self._sizes]

    def _files(self) -> Sequence[Path]:
        return [self._directory / name for name in sorted(self._sizes)]

    @contextmanager
    def _parts(self, name: str, entry: PackedEntry) -> Iterator[Mapping[str, Tensor]]:
        """The tensors of a quantized matrix as `_mapped`; what contradicts itself is a CheckpointError."""
        try:
            with ExitStack() as stack:
                yield {n: stack.enter_context(self._mapped(name, e)) for n, e in entry.parts.items()}
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(entry.file, str(error), name) from error

    @contextmanager
    def _mapped(self, name: str, entry: Entry) -> Iterator[Tensor]:
        """The whole tensor as a view of the mapped file: only what is copied out of it is read.

        The file is mapped for one tensor at a time, so that pages read do not stay in the process.
        """
        with _opened(entry.file, name) as handle:
            if entry.file.stat().st_size != self._sizes[entry.file.name]:
                raise CheckpointError(entry.file, "changed its size since it was opened", name)
            yield handle.get_slice(entry.stored)[:]


@contextmanager
def _opened(file: Path, tensor: str = "") -> Iterator[Any]:
    """`safe_open` of a file, whose errors, then or within the block, become CheckpointErrors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error.strerror or error}", tensor) from error
    except (SafetensorError, UnicodeDecodeError, RuntimeError, OverflowError, MemoryError) as error:
        raise CheckpointError(file, f"is not a valid safetensors file: {error}", tensor) from error


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a directory, each with the tensors the index puts there (None: all)."""
    if (directory / _INDEX).exists():
        return _indexed_files(directory)
    if (directory / _SINGLE).exists():
        return {directory / _SINGLE: None}
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:  # AutoGPTQ puts bits and group size into the name
        return {found[0]: None}
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt*")):
        reason = "holds only pickled weights, which can run code when loaded; save them as safetensors"
        raise CheckpointError(directory, reason)
    raise CheckpointError(directory, f"holds neither {_SINGLE} nor {_INDEX}")


def _indexed_files(directory: Path) -> dict[Path, set[str] | None]:
    path = directory / _INDEX
    mapping = read_json(path, _INDEX_LIMIT).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(path, "is missing or not an object", "weight_map")
    files: dict[str, set[str] | None] = {}
    for tensor, name in mapping.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or not _plain(name):
            reason = (
                f"is put into {str(name)[:80]!r}, expected the name of a .safetensors file of this directory"
            )
            raise CheckpointError(path, reason, tensor)
        held = files.setdefault(name, set())
        assert held is not None
        held.add(tensor)
    return {directory / name: tensors for name, tensors in sorted(files.items())}


def _plain(name: str) -> bool:
    """A file name that cannot leave its directory, on any system."""
    return not any(c in name for c in "/\\:\0") and not name.startswith(".")
