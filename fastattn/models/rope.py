"""Rotary position tables with every scaling the Llama family uses.

RoPE: arXiv 2104.09864. Scalings: linear (position interpolation, 2306.15595), dynamic NTK, Llama 3's
frequency bands, YaRN (2309.00071) and LongRoPE (2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..spec import KvStep
from .config import RopeConfig

_KEPT = 4096  # lengths whose frequencies are


class RopeTables:
    """cos and sin, float32, by which a forward turns queries and keys.

    Frequencies of dynamic and LongRoPE scaling depend on how long a sequence is. They follow the length that
    it will reach, so that all its keys are turned alike, whatever chunks it comes in and whatever else is in
    the batch. All others share one table of positions, which grows as sequences lengthen.
    """

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, device
        self._by_length = _by_length(config)
        self._frequencies = lru_cache(_KEPT)(lambda length: inverse_frequencies(config, length))
        self._table = (torch.empty(0, 0), torch.empty(0, 0))

    def of(self, step: KvStep, lengths: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(cos (n, rotary_dim / 2), sin, rows int64 (total,): where in them each new token of ``step`` is).

        ``lengths``: that each sequence of the step will reach; by default the one it has now.
        """
        if self._by_length:
            return self._of_rows(step, lengths or step.seqused.tolist())
        return *self._upto(step.max_used), step.positions

    def _upto(self, length: int) -> tuple[Tensor, Tensor]:
        """The table of all positions, [0, length) at least."""
        if self._table[0].shape[0] < length:
            rows = max(256, 1 << (length - 1).bit_length())
            frequencies, factor = self._frequencies(0)
            angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
            self._table = ((angles.cos() * factor).to(self.device), (angles.sin() * factor).to(self.device))
        return self._table

    def _of_rows(self, step: KvStep, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A table with a row for each new token, made by the frequencies of its sequence."""
        found = [self._frequencies(n) for n in lengths]
        frequencies = torch.stack([f for f, _ in found]).repeat_interleave(torch.tensor(step.new), 0)
        angles = step.positions[:, None] * frequencies.to(self.device)
        rows = torch.arange(len(angles), device=self.device)
        return angles.cos() * found[0][1], angles.sin() * found[0][1], rows


def _by_length(config: RopeConfig) -> bool:
    """Whether the frequencies depend on the length of the sequence."""
    p = config.params
    return config.kind == "dynamic" or (config.kind == "longrope" and p["short_factor"] != p["long_factor"])


def inverse_frequencies(config: RopeConfig, length: int) -> tuple[Tensor, float]:
    """(frequencies (rotary_dim / 2,) for sequences of ``length``, factor on cos and sin at any length)."""
    p: Any = config.params
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    plain = 1.0 / config.theta**exponents
    match config.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / p["factor"], 1.0
        case "dynamic":
            return _dynamic(config, exponents, length), 1.0
        case "llama3":
            return _llama3(plain, p), 1.0
        case "yarn":
            return _yarn(config, plain)
        case "longrope":
            return _longrope(config, exponents, length)
    raise ValueError(
        f"rope kind: {config.kind!r}, expected default, linear, dynamic, llama3, yarn or longrope"
    )


def _dynamic(config: RopeConfig, exponents: Tensor, length: int) -> Tensor:
    p: Any = config.params
    factor, dim = p["factor"], config.rotary_dim
    ratio = max(1.0, length / p["original_max_position_embeddings"])
    theta = config.theta * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / theta**exponents


def _llama3(plain: Tensor, p: Any) -> Tensor:
    """Long wavelengths are divided by ``factor``, short ones kept, the band between interpolated."""
    low, high, original = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    turns = original * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / p["factor"] * (1 - keep)


def _yarn(config: RopeConfig, plain: Tensor) -> tuple[Tensor, float]:
    p: Any = config.params
    original, factor, dim = p["original_max_position_embeddings"], p["factor"], config.rotary_dim

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    if (attention_factor := p.get("attention_factor")) is None:
        attention_factor = _mscale(factor, 1.0)
        if p.get("mscale") and p.get("mscale_all_dim"):
            attention_factor = _mscale(factor, p["mscale"]) / _mscale(factor, p["mscale_all_dim"])
    return frequencies, float(attention_factor)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(config: RopeConfig, exponents: Tensor, length: int) -> tuple[Tensor, float]:
    p: Any = config.params
    original, factor = p["original_max_position_embeddings"], p["factor"]
    rescale = torch.tensor(p["long_factor"] if length > original else p["short_factor"], dtype=torch.float32)
    if (attention_factor := p.get("attention_factor")) is None:
        grown = factor > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    return 1.0 / (rescale * config.theta**exponents), float(attention_factor)
