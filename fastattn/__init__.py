"""fastattn: LLM attention and tensor-parallel inference on the hardware that FlashAttention left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attention import attention
from .check import check
from .dispatch import use_backend
from .flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from .spec import CacheFull, CheckpointError, SyncError, UnsupportedError

if TYPE_CHECKING:
    from .integrations.transformers import parallelize
    from .models.load import load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` brings tokenizers, safetensors and more, which model code that only calls ops does not need."""
    if name == "load":
        from .models.load import load

        return load
    if name == "parallelize":
        from .integrations.transformers import parallelize

        return parallelize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CacheFull",
    "CheckpointError",
    "SyncError",
    "UnsupportedError",
    "attention",
    "check",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "load",
    "parallelize",
    "use_backend",
]
