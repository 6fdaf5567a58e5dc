"""Many sequences through a decoder one layer at a time, so that no more than one layer's weights are held.

What is kept between layers is the residual of every token. The half-blocks are those of llama.py; a layer's
weights are dense and come from `DenseWeights`, so that a layer can be changed between looking at the
inputs of one of its linear layers and going on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..memory.paged import PagedKvCache
from ..ops import rms_norm
from ..parallel.linear import ColumnLinear, RowLinear
from ..quant import packed
from ..spec import PackedWeight, Pages
from .config import ModelConfig
from .dense import DenseWeights
from .llama import Attention, AttentionHalf, Forward, Mlp, MlpHalf, RmsNorm
from .perplexity import token_nll
from .rope import RopeTables

_PAGE = Pages().size


class Sequences:
    """The residuals (len, hidden), float32, of every sequence, before some layer."""

    def __init__(self, weights: DenseWeights, ids: Sequence[Sequence[int]]) -> None:
        """Before layer 0. ``ids``: token ids of each sequence, all within the vocabulary."""
        self.config = weights.config
        (table,) = weights.tensors("model.embed_tokens.").values()
        self.residuals = [table[torch.tensor(s)] for s in ids]
        self._rope = RopeTables(self.config.rope)

    def attention_inputs(self, layer: Layer) -> Iterator[Tensor]:
        """Inputs of q, k and v."""
        attention = layer.attention()
        return (attention.norm(x)[0] for x in self.residuals)

    def o_inputs(self, layer: Layer) -> Iterator[Tensor]:
        """Inputs of o."""
        attention = layer.attention()
        pages = -(-max(map(len, self.residuals), default=0) // _PAGE)
        cache = PagedKvCache(1, pages, _PAGE, attention.kv_heads, self.config.head_dim)
        for x in self.residuals:
            step = cache.reserve([0], [len(x)])
            cos, sin, rows = self._rope.of(step)
            forward = Forward(self.config, "prefill", cache, step._replace(positions=rows), cos, sin)
            yield AttentionHalf(attention, 0, attention.norm(x)[0], forward).gemm_input(0, len(x))
            cache.free(0)

    def mlp_inputs(self, layer: Layer) -> Iterator[Tensor]:
        """Inputs of gate and up, once attention's result was added."""
        mlp = layer.mlp()
        return (mlp.norm(x)[0] for x in self.residuals)

    def down_inputs(self, layer: Layer) -> Iterator[Tensor]:
        """Inputs of down, once attention's result was added."""
        mlp = layer.mlp()
        return (MlpHalf(mlp, 0, mlp.norm(x)[0]).gemm_input(0, len(x)) for x in self.residuals)

    def add_attention(self, layer: Layer) -> None:
        """Goes on to between attention and MLP."""
        self._add(layer.attention().o, self.o_inputs(layer))

    def add_mlp(self, layer: Layer) -> None:
        """Goes on to the next layer."""
        self._add(layer.mlp().down, self.down_inputs(layer))

    def nll(self, weights: DenseWeights, ids: Sequence[Sequence[int]]) -> Tensor:
        """After the last layer: `perplexity.nll` of the sequences, which are ``ids``."""
        c = self.config
        (norm,) = weights.tensors("model.norm.").values()
        name = "model.embed_tokens." if c.tie_embeddings else "lm_head."
        (head,) = weights.tensors(name).values()
        parts = []
        for x, s in zip(self.residuals, ids, strict=True):
            half = len(s) // 2
            hidden, _ = rms_norm(x[half - 1 : -1], norm, c.rms_norm_eps)
            parts.append(token_nll((hidden @ head.T).log_softmax(-1), torch.tensor(s[half:])))
        return torch.cat(parts)

    def _add(self, linear: RowLinear, inputs: Iterator[Tensor]) -> None:
        for residual, x in zip(self.residuals, inputs, strict=True):
            residual.add_(linear(x))
            if linear.bias is not None:
                residual.add_(linear.bias)


class Layer:
    """One decoder layer of dense tensors by their names within it ("self_attn.q_proj.weight")."""

    def __init__(self, config: ModelConfig, index: int, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.window, self.tensors = config, config.windows[index], dict(tensors)

    def attention(self) -> Attention:
        """With the weights as they are now."""
        c = self.config
        return Attention(
            norm=self._norm("input_layernorm"),
            qkv=ColumnLinear(*(self._matrix(f"self_attn.{part}_proj") for part in "qkv")),
            o=RowLinear(self._matrix("self_attn.o_proj")),
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            window=self.window,
            q_norm=self._norm("self_attn.q_norm") if c.qk_norm else None,
            k_norm=self._norm("self_attn.k_norm") if c.qk_norm else None,
        )

    def mlp(self) -> Mlp:
        """With the weights as they are now."""
        gate_up = (self._matrix(f"mlp.{part}_proj") for part in ("gate", "up"))
        down = RowLinear(self._matrix("mlp.down_proj"))
        return Mlp(self._norm("post_attention_layernorm"), ColumnLinear(*gate_up), down)

    def _norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.tensors[f"{name}.weight"], self.config.rms_norm_eps)

    def _matrix(self, name: str) -> PackedWeight:
        return packed.dense(self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))


@torch.inference_mode()
def layerwise_nll(
    weights: DenseWeights, ids: Sequence[Sequence[int]], on_layer: Callable[[], object] = lambda: None
) -> Tensor:
    """`perplexity.nll` in float32 of a model that need not fit in memory; ``on_layer``: after each layer."""
    sequences = Sequences(weights, ids)
    for i in range(weights.config.num_layers):
        layer = Layer(weights.config, i, weights.tensors(f"model.layers.{i}."))
        sequences.add_attention(layer)
        sequences.add_mlp(layer)
        on_layer()
    return sequences.nll(weights, ids)
