"""Ascend NPUs: torch_npu's operators where one can run the call, our Triton-Ascend kernels for the rest.

310P and 910A have no compiler for the kernels, and elsewhere triton-ascend may not be installed: a call that
torch_npu cannot run is refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ascend_ops import launch, router
from ascend_ops.attention import DTYPES, MAX_HEAD_DIM
from ascend_ops.capture import capturing

from ..indices import check_indices
from ..settings import settings
from ..spec import AttentionArgs, AttentionSignature, Backend, Op, Pages, UnsupportedError
from .interpreter import reasons_against_emulating

_EMULATED = "ascend" in settings.emulate
#: Keys on the left of a window in a call that stands for all of its signature.
_BITES_LATE = 1 << 30


def _available() -> list[str]:
    if _EMULATED:
        if find_spec("triton") is None:
            return [
                "Triton is not installed, whose interpreter runs the kernels (pip install fastattn[triton])"
            ]
        return reasons_against_emulating("ascend")
    if find_spec("torch_npu") is None:
        return ["torch_npu is not installed (FASTATTN_EMULATE=ascend interprets the kernels on the CPU)"]
    import torch_npu  # registers the device

    return [] if torch_npu.npu.is_available() else ["torch_npu sees no NPU"]


def router_call(a: AttentionArgs) -> router.AttentionCall:
    """The call as `ascend_ops.router` sees it."""
    left, right = a.bounds()
    shared = {name: getattr(a, name) for name in router.AttentionCall._fields if name in a._fields}
    return router.AttentionCall(**shared | {"left": left, "right": right})


def _run_attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    """(out, lse), lse empty unless asked for. Raises UnsupportedError with the reasons of both ways."""
    if emulated():
        check_indices(a)
        return _by_kernels(a)
    chip = router.current()
    route = router.route(router_call(a), chip, capturing=capturing(a.q.device))
    against = route.unsupported()
    if settings.ascend != "kernels" and not against:
        return _by_torch_npu(route)
    why_not = kernel_reasons(a.signature())
    if settings.ascend != "torch_npu" and not why_not:
        return _by_kernels(a)
    lines = [f"torch_npu, {line}" for line in against] + [f"our kernels: {line}" for line in why_not]
    raise UnsupportedError(
        f"attention on {chip.family}, FASTATTN_ASCEND={settings.ascend}:\n" + "\n".join(lines)
    )


def _by_torch_npu(route: router.Route) -> tuple[Tensor, Tensor]:
    invocation = route.invocation()
    out, lse = router.empty(route.call) if invocation is None else invocation()
    return out, out.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _by_kernels(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    from ascend_ops.attention import attention

    options = a._asdict()
    q, k, v = (options.pop(name) for name in ("q", "k", "v"))
    del options["kv_layout"]
    return attention(q, k, v, **options)


def kernel_reasons(s: AttentionSignature) -> list[str]:
    """Why our kernels cannot run the call."""
    out = no_compiler()
    if out:
        return out
    if s.dtype not in DTYPES:
        out.append(f"dtype {s.dtype}, they take float16 and bfloat16")
    elif s.kv_dtype != s.dtype:
        out.append(f"k and v are {s.kv_dtype}, they take q's {s.dtype}")
    if max(s.head_dim, s.v_head_dim) > MAX_HEAD_DIM:
        out.append(f"head_dim {s.head_dim} of q, {s.v_head_dim} of v, they take at most {MAX_HEAD_DIM}")
    if s.kv_layout != "nhd":
        out.append(f"kv_layout {s.kv_layout!r}, they take nhd")
    return out


def emulated() -> bool:
    """Whether tensors are the CPU's, our kernels interpreted and torch_npu's operators absent."""
    return _EMULATED


def no_compiler() -> list[str]:
    """Why our kernels do not run in this process; empty where they are compiled or interpreted."""
    why_not = "" if _EMULATED else launch.no_compiler(router.current())
    return [why_not] if why_not else []


def compiles_kernels() -> bool:
    """Whether Triton kernels run on this process's NPU, or are interpreted."""
    return not no_compiler()


def attention_reasons(s: AttentionSignature) -> list[str]:
    """What no operator of torch_npu and no kernel of ours can do, whatever the call's shapes.

    The rest depends on shapes and lengths, which a signature does not have: `_run_attention` raises for it.
    """
    why_not = kernel_reasons(s)
    if not why_not or _EMULATED:
        return why_not
    against = router.route(_stand_in(s), router.current()).unsupported()
    return [*why_not, *against] if against else []


def _stand_in(s: AttentionSignature) -> router.AttentionCall:
    """A call of this signature that is otherwise as easy as can be."""

    def values(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    page = s.page_size
    q = values(1, 16, s.num_heads, s.head_dim)
    k = values(1, page or 16, s.num_kv_heads, s.head_dim, dtype=s.kv_dtype)
    v = values(1, page or 16, s.num_kv_heads, s.v_head_dim, dtype=s.kv_dtype)
    o: dict[str, Any] = {"right": 0} if "causal" in s.features else {}
    if page:
        o["block_table"], o["seqused_k"] = values(1, 1), torch.tensor([page])
    elif "seqused_k" in s.features:
        o["seqused_k"] = torch.tensor([16])
    for name in s.features & {"cache_batch_idx", "cache_leftpad", "q_pos0", "k_pos0", "k_scale", "v_scale"}:
        o[name] = values(1)
    if "window" in s.features:
        o["left"] = _BITES_LATE
    if "softcap" in s.features:
        o["softcap"] = 1.0
    for name in s.features & {"alibi_slopes", "sinks"}:
        o[name] = values(s.num_heads, dtype=torch.float32)
    if s.mask_dtype is not None:
        o["attn_mask"] = values(1, 1, 16, page or 16, dtype=s.mask_dtype)
    return router.AttentionCall(
        q, k, v, 1.0, kv_layout=s.kv_layout, return_lse="return_lse" in s.features, **o
    )


def _ops() -> Mapping[str, Op]:
    from . import ascend_small

    features = frozenset(AttentionArgs._field_defaults)
    return {"attention": Op(_run_attention, features, attention_reasons), **ascend_small.OPS}


def _pages(head_dim: int, dtype: torch.dtype, features: frozenset[str]) -> Pages:
    """128 tokens: FIA takes no less, and no block of our kernels that fits is cut short.

    In NZ, which no other backend reads, where ATB can fill the pages and run all of the calls that read them.
    """
    if _EMULATED or router.current().kv_layout == "nhd" or settings.ascend == "kernels":
        return Pages(128)
    size = max(16, min(128, 128 * 128 // head_dim // 16 * 16))
    asked = features | {"causal", "block_table", "seqused_k"}
    signature = AttentionSignature(
        torch.device("meta"), dtype, dtype, head_dim, head_dim, 1, 1, size, None, "npu_nz", asked
    )
    chip = router.current()
    against = router.route(_stand_in(signature), chip).unsupported() + chip.lacks("_npu_reshape_and_cache")
    return Pages(128) if against else Pages(size, "npu_nz")


def _describe() -> Mapping[str, str]:
    if _EMULATED:
        import triton

        return {"triton": triton.__version__, "kernels": "interpreted on the CPU (FASTATTN_EMULATE)"}
    import torch_npu

    chip = router.current()
    return {
        "torch_npu": torch_npu.__version__,
        "chip": f"{torch_npu.npu.get_device_name()} ({chip.family})",
        "kernels": launch.no_compiler(chip) or "compiled",
        "operators": ", ".join(sorted(chip.operators)),
    }


BACKEND = Backend("ascend", ("npu", "cpu") if _EMULATED else ("npu",), _available, _ops, _describe, _pages)
