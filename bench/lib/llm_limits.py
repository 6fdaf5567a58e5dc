"""What the machine allows for a case of bench/llm.py, from limits measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn.collectives.exchange import all_gather
from fastattn.models.generate import Model
from fastattn.models.llama import Decoder
from fastattn.spec import PackedWeight

from .limits import gemm_rate, read_bandwidth


@dataclass(frozen=True)
class Floor:
    """Of all ranks together."""

    bandwidth: float  # bytes per second
    gemm: float  # FLOP/s of a GEMM in the model's dtype
    layer_bytes: float
    head_bytes: float
    layer_weights: float  # numbers, each used once a token
    head_weights: float
    kv_bytes_per_token: int

    @classmethod
    def measure(cls, model: Model) -> Floor:
        """Collective: every rank measures at the same time, as every rank reads and computes."""
        layers, head = layer_matrices(model.decoder), [model.decoder.head.weight]
        mine = [
            read_bandwidth(), gemm_rate(model.dtype), nbytes(layers), nbytes(head), _numbers(layers),
            _numbers(head),
        ]  # fmt: skip
        gathered = all_gather(model.group, torch.tensor(mine, dtype=torch.float64, device="cpu"), "limits")
        c = model.config
        kv = 2 * c.num_layers * c.num_kv_heads * c.head_dim * model.dtype.itemsize
        bandwidth, gemm, *weights = torch.stack(list(gathered)).sum(0).tolist()
        return cls(bandwidth, gemm, weights[0], weights[1], weights[2], weights[3], kv)

    def tpot_ms(self, batch: int, length: int, output: int) -> float:
        """A step reads the weights once, and the KV cache as long as it is on average."""
        kv = batch * (length + output / 2) * self.kv_bytes_per_token
        return 1e3 * (self.layer_bytes + self.head_bytes + kv) / self.bandwidth

    def ttft_ms(self, batch: int, length: int) -> float:
        """The linear layers of every token, and the head of the last ones, at the rate of a GEMM."""
        return 2e3 * batch * (length * self.layer_weights + self.head_weights) / self.gemm


def layer_matrices(decoder: Decoder) -> list[PackedWeight]:
    """Of all blocks, in their order."""
    pairs = decoder.blocks
    return [w for a, m in pairs for w in (*a.qkv.weights, a.o.weight, *m.gate_up.weights, m.down.weight)]


def nbytes(weights: list[PackedWeight]) -> float:
    """What one pass over the matrices reads."""
    return float(sum(t.numel() * t.element_size() for w in weights for t in w.tensors.values()))


def _numbers(weights: list[PackedWeight]) -> float:
    return float(sum(w.shape[0] * w.shape[1] for w in weights))
