"""Rotary position tables with every scaling the Llama family uses.

RoPE: arXiv 2104.09864. Scalings: linear (position interpolation, 2306.15595), dynamic NTK, Llama 3's
frequency bands, YaRN (2309.00071) and LongRoPE (2402.13753).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .config import RopeConfig


class RopeTables:
    """cos and sin (positions, rotary_dim / 2), float32, grown as sequences lengthen.

    Dynamic and LongRoPE frequencies depend on the longest sequence of a forward, so a table is asked for
    by that length.
    """

    def __init__(self, config: RopeConfig, max_position: int, device: torch.device | str = "cpu") -> None:
        self.config, self.max_position, self.device = config, max_position, device
        self._key: Any = None
        self._tables = (torch.empty(0, 0), torch.empty(0, 0))

    def upto(self, length: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) that cover positions [0, length)."""
        key = self._regime(length)
        if key != self._key or self._tables[0].shape[0] < length:
            rows = max(256, 1 << (max(length, 1) - 1).bit_length())
            frequencies, factor = inverse_frequencies(self.config, self.max_position, length)
            angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies)
            self._tables = tuple((f(angles) * factor).to(self.device) for f in (torch.cos, torch.sin))  # type: ignore[assignment]
            self._key = key
        return self._tables

    def _regime(self, length: int) -> Any:
        params: Any = self.config.params
        if self.config.kind == "dynamic":
            return max(length, self.max_position)
        if self.config.kind == "longrope":
            return length > params["original_max_position_embeddings"]
        return None


def inverse_frequencies(config: RopeConfig, max_position: int, length: int) -> tuple[Tensor, float]:
    """(frequencies (rotary_dim / 2,), factor on cos and sin) for sequences up to ``length``."""
    p: Any = config.params
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64).float() / config.rotary_dim
    plain = 1.0 / config.theta**exponents
    match config.kind:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / p["factor"], 1.0
        case "dynamic":
            return _dynamic(config, exponents, max(length, max_position) / max_position), 1.0
        case "llama3":
            return _llama3(plain, p), 1.0
        case "yarn":
            return _yarn(config, plain, max_position)
        case "longrope":
            return _longrope(config, exponents, max_position, length)
    raise ValueError(
        f"rope kind: {config.kind!r}, expected default, linear, dynamic, llama3, yarn or longrope"
    )


def _dynamic(config: RopeConfig, exponents: Tensor, ratio: float) -> Tensor:
    factor: Any = config.params["factor"]
    dim = config.rotary_dim
    theta = config.theta * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / theta**exponents


def _llama3(plain: Tensor, p: Any) -> Tensor:
    """Long wavelengths are divided by ``factor``, short ones kept, the band between interpolated."""
    low, high, original = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    turns = original * plain / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * keep + plain / p["factor"] * (1 - keep)


def _yarn(config: RopeConfig, plain: Tensor, max_position: int) -> tuple[Tensor, float]:
    p: Any = config.params
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or max_position / original
    dim = config.rotary_dim

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


def _longrope(config: RopeConfig, exponents: Tensor, max_position: int, length: int) -> tuple[Tensor, float]:
    p: Any = config.params
    original = p["original_max_position_embeddings"]
    factor = p.get("factor") or max_position / original
    rescale = torch.tensor(p["long_factor"] if length > original else p["short_factor"], dtype=torch.float32)
    if (attention_factor := p.get("attention_factor")) is None:
        grown = factor > 1
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    return 1.0 / (rescale * config.theta**exponents), float(attention_factor)
