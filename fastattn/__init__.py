"""fastattn: LLM attention and tensor-parallel inference on the hardware that FlashAttention left behind."""

from .attention import attention
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

__version__ = "0.1.0"


def load(path, **options):  # type: ignore[no-untyped-def]
    """Loads a model for `Model.generate`; see `fastattn.models.load.load`, which is imported on first use."""
    from .models.load import load as load_model

    return load_model(path, **options)


__all__ = [
    "CacheFull",
    "CheckpointError",
    "SyncError",
    "UnsupportedError",
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "load",
    "use_backend",
]
