"""Hugging Face directories: config.json, safetensors (one file or sharded), tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..quant import packed
from ..quant.cuts import take
from ..spec import CheckpointError, Cut, PackedWeight, Shard
from .checkpoint import Checkpoint, check_shapes
from .config import tensor_shapes
from .fields import read_json
from .hf_config import read_config

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_INDEX_LIMIT = 64 << 20  # bytes
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Entry(NamedTuple):
    file: Path
    stored: str  # name within the file
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]


class HfCheckpoint(Checkpoint[_Entry]):
    """A directory as `transformers` saves it. Weights are dense, in the dtype of the file."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory)
        self._directory = directory
        self.config = read_config(directory)
        self._sizes: dict[str, int] = {}
        stored: dict[str, _Entry] = {}
        for file, names in _weight_files(directory).items():
            stored |= self._read_header(file, names)
        if self.config.tie_embeddings:
            _tie(stored)
        check_shapes(directory, self.config, {name: e.shape for name, e in stored.items()})
        wanted = [*tensor_shapes(self.config), *(["lm_head.weight"] if self.config.tie_embeddings else [])]
        self._entries = {name: stored[name] for name in wanted}
        for name, entry in self._entries.items():
            if entry.dtype not in _DTYPES:
                raise CheckpointError(
                    entry.file, f"has dtype {entry.dtype}, supported are {', '.join(_DTYPES)}", name
                )

    def _read_header(self, file: Path, expected: set[str] | None) -> dict[str, _Entry]:
        """The tensors of one file; ``expected`` are those the index says it holds."""
        entries = {}
        with _opened(file) as handle:
            self._sizes[file.name] = file.stat().st_size
            names = set(handle.keys())
            for name in sorted((expected or set()) - names):
                raise CheckpointError(file, f"is missing, though {_INDEX} says it is here", name)
            for name in sorted(names if expected is None else names & expected):
                piece = handle.get_slice(name)
                entries[name] = _Entry(file, name, piece.get_dtype(), tuple(piece.get_shape()))
        return entries

    def _matrix(self, name: str, entry: _Entry, shard: Shard) -> PackedWeight:
        with self._mapped(name, entry) as matrix:
            piece = take(take(matrix, shard.out, 0), shard.inn, 1)
            return packed.dense(piece.clone(memory_format=torch.contiguous_format))

    def _vector(self, name: str, entry: _Entry, cut: Cut) -> Tensor:
        with self._mapped(name, entry) as stored:
            return take(stored, cut).clone()

    def tokenizer(self) -> Tokenizer:
        from .hf_tokenizer import read_tokenizer

        return read_tokenizer(self._directory, self.config)

    def _table(self) -> Any:
        tensors = [[name, e.file.name, e.dtype, e.shape] for name, e in sorted(self._entries.items())]
        return ["safetensors", tensors, self._sizes]

    @contextmanager
    def _mapped(self, name: str, entry: _Entry) -> Iterator[Tensor]:
        """The whole tensor as a view of the mapped file: only what is copied out of it is read.

        The file is mapped for one tensor at a time, so that pages read do not stay in the process.
        """
        with _opened(entry.file, name) as handle:
            if entry.file.stat().st_size != self._sizes[entry.file.name]:
                raise CheckpointError(entry.file, "changed its size since it was opened", name)
            yield handle.get_slice(entry.stored)[:]


def _tie(stored: dict[str, _Entry]) -> None:
    """One matrix is embedding and head, whichever of the two names the file has."""
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if embed in stored:
        stored[head] = stored[embed]
    elif head in stored:
        stored[embed] = stored[head]


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
