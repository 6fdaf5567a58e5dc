"""A Hugging Face directory of GPTQ weights while it grows: a shard for each layer that is finished.

The first shard holds what stays dense, embedding, final norm and head; then each decoder layer is one. So a
killed run goes on after its last finished layer. ``quantize.json`` says what run that is; it goes when
config.json, written last, makes the directory a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .. import __version__
from ..quant.gptq_solver import Quantized
from ..quant.recipe import Recipe
from . import hf_write
from .checkpoint import Checkpoint
from .config import ModelConfig
from .fields import read_json

_STATE = "quantize.json"
_STATE_LIMIT = 1 << 20  # bytes


class QuantizedFiles:
    """The directory ``out`` for ``recipe``; begins it, or goes on with an unfinished one of the same run.

    Raises ValueError when it holds anything else, OSError when it cannot be written.
    """

    def __init__(self, out: Path, config: ModelConfig, recipe: Recipe, run: Mapping[str, Any]) -> None:
        """``run``: JSON values that tell this run from others, beside the recipe."""
        self.directory, self.config, self.recipe = out, config, recipe
        state = {"fastattn": __version__, "recipe": asdict(recipe), **run}
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            _check_same_run(out, state)
        out.mkdir(parents=True, exist_ok=True)
        hf_write.remove_unfinished(out)
        hf_write.write_json(out / _STATE, state)

    def finished(self) -> int:
        """How many layers, from the first, are on the disk."""
        there = (self._shard(i + 1).exists() for i in range(self.config.num_layers))
        return next((i for i, found in enumerate(there) if not found), self.config.num_layers)

    def has_dense(self) -> bool:
        """Whether `write_dense` is done."""
        return self._shard(0).exists()

    def write_dense(self, tensors: Mapping[str, Tensor]) -> None:
        """Everything outside the decoder layers, by whole names, in the model's dtype."""
        hf_write.write_tensors(self._shard(0), {n: t.to(self.config.dtype) for n, t in tensors.items()})

    def write_layer(self, layer: int, matrices: Mapping[str, Quantized], dense: Mapping[str, Tensor]) -> None:
        """One layer: ``matrices`` and the ``dense`` rest by names within it ("mlp.up_proj.weight")."""
        prefix = f"model.layers.{layer}."
        held = {prefix + name: t.to(self.config.dtype) for name, t in dense.items()}
        for name, q in matrices.items():
            for kind, tensor in self.recipe.pack(q)._asdict().items():
                held[f"{prefix}{name.removesuffix('weight')}{kind}"] = tensor
        hf_write.write_tensors(self._shard(layer + 1), held)

    def layer(self, layer: int) -> dict[str, Tensor]:
        """Of a finished layer, as `DenseWeights.tensors`: float32, quantized matrices dequantized."""
        stored = _read(self._shard(layer + 1), f"model.layers.{layer}.")
        dense = {}
        for name, tensor in stored.items():
            if name.endswith(".qweight"):
                stem = name.removesuffix("qweight")
                parts = [stored[stem + kind] for kind in ("qweight", "qzeros", "scales", "g_idx")]
                dense[stem + "weight"] = self.recipe.unpack(*parts).dequantize()
            elif name.rpartition(".")[2] in ("weight", "bias"):
                dense[name] = tensor.float()
        return dense

    def finish(self, checkpoint: Checkpoint[Any]) -> None:
        """Index, tokenizer and, last, config.json."""
        shards = [self._shard(i).name for i in range(self.config.num_layers + 1)]
        hf_write.write_index(self.directory, shards)
        hf_write.write_companions(self.directory, checkpoint)
        values = hf_write.config_values(checkpoint, self.config)
        made_by = {"meta": {"quantizer": [f"fastattn:{__version__}"]}}
        values["quantization_config"] = self.recipe.quantization_config() | made_by
        hf_write.write_json(self.directory / "config.json", values)
        (self.directory / _STATE).unlink()

    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(self._shard(i).stat().st_size for i in range(self.config.num_layers + 1))

    def _shard(self, index: int) -> Path:
        return self.directory / hf_write.shard_name(index + 1, self.config.num_layers + 1)


def _check_same_run(out: Path, state: Mapping[str, Any]) -> None:
    if not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a directory")
    if not (out / _STATE).exists():
        raise ValueError(f"out: {out} is not empty and holds no unfinished quantization; give another")
    found = read_json(out / _STATE, _STATE_LIMIT)
    for key in state.keys() | found.keys():
        if found.get(key) != state.get(key):
            raise ValueError(
                f"out: {out} holds an unfinished run of another {key} ({found.get(key)!r:.200}); "
                "repeat its settings or give another directory"
            )


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin with ``prefix``, by the rest of their names."""
    with safe_open(str(path), framework="pt") as file:
        names = [n for n in list(file.keys()) if n.startswith(prefix)]
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
