"""Quantizing a model with GPTQ: layer by layer, from real text, into a Hugging Face directory.

A layer's matrices are quantized in the order in which its inputs depend on them: q, k and v; o; gate and up;
down. The inputs of each come from the matrices before it as they were quantized, so that later ones make up
for errors of earlier ones. Held at one time are one layer's weights, one Hessian and the residuals of the
calibration text; everything else is on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..quant import gptq, words
from ..quant.gptq_solver import Hessian, Quantized
from ..quant.recipe import Heads, Recipe
from ..spec import CheckpointError
from . import hf_write
from .calibration import cut_texts
from .checkpoint import Checkpoint, open_checkpoint
from .config import ModelConfig, tensor_shapes
from .dense import DenseWeights
from .layerwise import Layer, Sequences, layerwise_nll
from .load import parse_dtype
from .perplexity import Perplexity, change, perplexity
from .quantized_files import QuantizedFiles


@dataclass(frozen=True)
class Report:
    """What came out. ``change``: of the perplexity, as a fraction of the dense model's."""

    out: str
    weights: int  # that were quantized
    bits_per_weight: float  # of these, with scales, zero points and g_idx
    nbytes: int  # of all shards
    tokens: int  # that were scored
    dense: Perplexity
    quantized: Perplexity
    change: Perplexity

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON values."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: v._asdict() if isinstance(v, Perplexity) else v for k, v in found.items()}


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    text: str,
    *,
    eval_text: str | None = None,
    samples: int | None = None,
    seqlen: int = 512,
    dtype: str = "auto",
    progress: bool = False,
) -> Report:
    """Quantizes every matrix of every decoder layer; embedding, norms and head stay dense.

    Args:
        model: as for `load`; any checkpoint, quantized ones are dequantized first.
        out: a directory that is new, empty, or holds an unfinished run with the same arguments, which goes
            on after its last finished layer and comes to the same result (with the same thread count).
        recipe: how.
        text: for calibration; without ``eval_text`` its last tenth is kept out and evaluated on.
        samples: calibration sequences, evenly over the text; None: 128, or as many as it has.
        seqlen: their tokens.
        dtype: of what stays dense; "auto": what the checkpoint names.
        progress: show bars.

    Raises CheckpointError, ValueError, OSError.
    """
    checkpoint = open_checkpoint(model)
    texts = cut_texts(checkpoint.tokenizer(), checkpoint.config, text, eval_text, samples, seqlen)
    files = write_quantized(checkpoint, out, recipe, texts.calibration, dtype=dtype, progress=progress)
    both = [DenseWeights(c) for c in (checkpoint, open_checkpoint(out))]
    layers = checkpoint.config.num_layers
    with tqdm(total=2 * layers, desc="perplexity", unit="layer", disable=not progress) as bar:
        base, after = (layerwise_nll(weights, texts.evaluation, bar.update) for weights in both)
    shapes = tensor_shapes(checkpoint.config)
    matrices = [shape for name, shape in shapes.items() if _is_quantized(name, shape)]
    return Report(
        str(out), sum(a * b for a, b in matrices), _bits_per_weight(matrices, recipe), files.nbytes(),
        len(base), perplexity(base), perplexity(after), change(after, base),
    )  # fmt: skip


def write_quantized(
    checkpoint: Checkpoint[Any],
    out: str | Path,
    recipe: Recipe,
    calibration: Sequence[Sequence[int]],
    *,
    dtype: str = "auto",
    progress: bool = False,
) -> QuantizedFiles:
    """`quantize` without the perplexities; ``calibration``: token ids of sequences."""
    weights = DenseWeights(checkpoint)
    _check_packable(checkpoint.path, weights.config, recipe)
    seen = hashlib.sha256(repr(calibration).encode()).hexdigest()
    config = replace(weights.config, dtype=parse_dtype(dtype, checkpoint))
    hf_write.config_values(checkpoint, config)  # what has none is refused before the work
    run = {"model": checkpoint.fingerprint(), "calibration": seen, "dtype": str(config.dtype)}
    files = QuantizedFiles(Path(out), config, recipe, run)
    if not files.has_dense():
        dense = [name for name in tensor_shapes(weights.config) if ".layers." not in name]
        files.write_dense({name: weights.tensor(name) for name in dense})
    _quantize_layers(checkpoint.path, weights, files, calibration, progress)
    files.finish(checkpoint)
    return files


class _Site(NamedTuple):
    """Matrices of a layer that share their input, in the order of `_SITES`."""

    names: tuple[str, ...]
    inputs: Callable[[Sequences, Layer], Iterator[Tensor]]
    advance: Callable[[Sequences, Layer], None] | None = None  # once they are quantized


_SITES = (
    _Site(tuple(f"self_attn.{p}_proj.weight" for p in "qkv"), Sequences.attention_inputs),
    _Site(("self_attn.o_proj.weight",), Sequences.o_inputs, Sequences.add_attention),
    _Site(("mlp.gate_proj.weight", "mlp.up_proj.weight"), Sequences.mlp_inputs),
    _Site(("mlp.down_proj.weight",), Sequences.down_inputs, Sequences.add_mlp),
)


@torch.inference_mode()
def _quantize_layers(
    path: str, weights: DenseWeights, files: QuantizedFiles, ids: Sequence[Sequence[int]], progress: bool
) -> None:
    config = files.config
    finished = files.finished()
    looks = files.recipe.method != "rtn"
    sequences = Sequences(weights, ids if looks else [])
    with tqdm(
        total=config.num_layers * len(_SITES), desc="quantize", unit="site", disable=not progress
    ) as bar:
        for i in range(config.num_layers):
            prefix = f"model.layers.{i}."
            if i < finished:
                layer = Layer(config, i, files.layer(i))
                sequences.add_attention(layer)
                sequences.add_mlp(layer)
                bar.update(len(_SITES))
                continue
            # Vectors as they will be read back: a run that goes on sees no others.
            tensors = weights.tensors(prefix).items()
            layer = Layer(
                config, i, {n: t if t.ndim == 2 else t.to(config.dtype).float() for n, t in tensors}
            )
            quantized: dict[str, Quantized] = {}
            for site in _SITES:
                try:
                    quantized |= _quantize_site(config, files.recipe, sequences, layer, site)
                except ValueError as error:
                    raise CheckpointError(path, str(error), prefix + site.names[0]) from error
                if site.advance is not None:
                    site.advance(sequences, layer)
                bar.update()
            dense = {n: t for n, t in layer.tensors.items() if n not in quantized}
            files.write_layer(i, quantized, dense)


def _quantize_site(
    config: ModelConfig, recipe: Recipe, sequences: Sequences, layer: Layer, site: _Site
) -> dict[str, Quantized]:
    """Quantizes the matrices of a site as one, and puts the result into the layer."""
    sizes = [layer.tensors[name].shape[0] for name in site.names]
    weight = torch.cat([layer.tensors[name] for name in site.names])
    moments = None
    if sequences.residuals:
        hessian = Hessian(weight.shape[1])
        for x in site.inputs(sequences, layer):
            hessian.add(x)
        moments = hessian.matrix()
        del hessian  # as large, and factoring needs the room
    heads = Heads(config.num_heads, config.num_kv_heads) if "self_attn.o_proj.weight" in site.names else None
    parts = recipe.quantize(weight, moments, heads).split(sizes)
    for name, q in zip(site.names, parts, strict=True):
        layer.tensors[name] = q.dequantize()
    return dict(zip(site.names, parts, strict=True))


def _check_packable(path: str, config: ModelConfig, recipe: Recipe) -> None:
    """Readers of GPTQ files want whole 32-bit words."""
    for name, shape in tensor_shapes(config).items():
        if not _is_quantized(name, shape):
            continue
        for axis, size in zip(("out", "in"), shape, strict=True):
            if size * recipe.bits % 32 or (recipe.bits == 3 and size % 32):
                unit = words.unit(recipe.bits)[0]
                reason = f"has {size} {axis} features, {recipe.bits} bits need a multiple of {unit}"
                raise CheckpointError(path, reason, name)


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the model is: the matrices of the layers."""
    return ".layers." in name and len(shape) == 2


def _bits_per_weight(matrices: Sequence[tuple[int, ...]], recipe: Recipe) -> float:
    size = {"qweight": 32, "qzeros": 32, "scales": 16, "g_idx": 32}
    bits = 0
    for out, inn in matrices:
        for name, shape in gptq.shapes(out, inn, recipe.bits, recipe.group_size).items():
            bits += size[name] * torch.Size(shape).numel()
    return bits / sum(out * inn for out, inn in matrices)
