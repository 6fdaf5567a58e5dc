"""The contract of fastattn: the records and protocols that every system fits into.

Imports torch only, and everything may import it. Five ideas carry the package (docs/architecture.md):

1. one record describes a call (`AttentionArgs` and its smaller siblings);
2. a backend is a table of ops that says what it cannot do (`Backend`, `Op`);
3. policy per sync point x schedule per forward x layout per weight (`SyncPolicy`, `SyncPlan`, `Shard`);
4. a weight has one layout in memory, whatever its format on disk (`PackedWeight`);
5. a KV cache has parts, each with a home (`KvCache`, `KvPart`).

Conventions
-----------
- Tensors are (batch, seqlen, heads, head_dim); packed variable length is (total, heads, head_dim) with
  int32 ``cu_seqlens`` of shape (batch + 1,). Query head ``h`` reads KV head ``h // (H / Hkv)``.
- Causal is bottom-right aligned: key ``j`` is visible to query ``i`` iff
  ``i + Sk - Sq - left <= j <= i + Sk - Sq + right`` (inclusive; None: unbounded; causal: ``right = 0``).
- A query that sees no key gives output 0 and, without a sink, lse -inf; never NaN.
- ``lse`` is the float32 natural log of the softmax's denominator (a sink included).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# --------------------------------------------------------------------------------------------- errors
class UnsupportedError(ValueError):
    """The call is well formed, but no backend (or not the one named) can run it; says every reason."""


class CheckpointError(ValueError):
    """A model file is truncated, inconsistent, hostile or of an unknown kind.

    ``path`` is the file, ``tensor`` the tensor or key at fault ("" when it is the file as a whole).
    """

    def __init__(self, path: object, reason: str, tensor: str = "") -> None:
        self.path, self.tensor, self.reason = str(path), tensor, reason
        super().__init__(f"{path}: {tensor + ': ' if tensor else ''}{reason}")


class CacheFull(RuntimeError):
    """The KV cache cannot take the tokens asked for; raised before anything is written."""


class SyncError(RuntimeError):
    """An exchange between ranks failed or timed out; names the rank that saw it and the operation."""

    def __init__(self, rank: int, where: str, reason: str) -> None:
        self.rank, self.where, self.reason = rank, where, reason
        super().__init__(f"rank {rank}: {where}: {reason}")


#: Of the user or the machine: an application reports each by its message alone.
REPORTED = (SyncError, CacheFull, ValueError, OSError)


# ------------------------------------------------------------------------------------- records of calls
class OpArgs(Protocol):
    """One call of one op. `Op.reasons` sees `signature()`, `Op.run` sees the record itself."""

    def features(self) -> frozenset[str]:
        """Name of every optional field that is set."""
        ...

    def signature(self) -> Hashable:
        """Everything static about the call: all that `Op.reasons` may read."""
        ...


def _set_fields(record: Any, required: frozenset[str]) -> frozenset[str]:
    defaults = record._field_defaults
    return frozenset(
        name
        for name, value in zip(record._fields, record, strict=True)
        if name not in required
        # Identity first: it settles nearly every field, on every call.
        and value is not (default := defaults[name])
        and (isinstance(value, Tensor) or value != default)
    )


class AttentionSignature(NamedTuple):
    """Static facts of an attention call."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    num_heads: int
    num_kv_heads: int
    page_size: int  # 0: the KV cache is not paged
    mask_dtype: torch.dtype | None
    kv_layout: str
    features: frozenset[str]


class AttentionArgs(NamedTuple):
    """Everything one attention call can ask for. Built and validated by `fastattn.attention`.

    ``softmax(mask(softcap(scale * q @ k^T) + alibi + attn_mask), sinks) @ v``, with
    ``softcap(s) = softcap * tanh(s / softcap)`` and ALiBi ``-slope * |query position - key position|``.
    """

    q: Tensor  # (B, Sq, H, D) | packed (total_q, H, D)
    k: Tensor  # (B, Sk, Hkv, D) | packed (total_k, Hkv, D) | pages (P, page, Hkv, D)
    v: Tensor  # as k, with Dv for D
    scale: float
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)  # (left, right), None: unbounded
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # float32 (H,) | (B, H)
    sinks: Tensor | None = None  # float32 (H,): one logit per head in the denominator
    attn_mask: Tensor | None = None  # bool (True: keep) or additive, broadcastable to (B, H, Sq, Sk)
    cu_seqlens_q: Tensor | None = None  # int32 (B + 1,)
    cu_seqlens_k: Tensor | None = None  # int32 (B + 1,)
    max_seqlen_q: int = 0  # upper bounds for packed input
    max_seqlen_k: int = 0
    block_table: Tensor | None = None  # int32 (B, max_pages)
    seqused_k: Tensor | None = None  # int32 (B,): keys present of each sequence
    cache_batch_idx: Tensor | None = None  # int32 (B,): row of k and v that sequence b reads
    cache_leftpad: Tensor | None = None  # int32 (B,): index of the first valid key
    q_pos0: Tensor | None = None  # int32 (B,): position of the first query; None: bottom-right
    k_pos0: Tensor | None = None  # int32 (B,): position of the first key; None: 0
    kv_layout: str = "nhd"  # or "npu_nz"
    k_scale: Tensor | None = None  # float32 (Hkv,): k = k_scale * stored
    v_scale: Tensor | None = None
    return_lse: bool = False  # float32 (B, H, Sq) | packed (H, total_q)

    def bounds(self) -> tuple[int | None, int | None]:
        """(left, right) of the visible band around a query's position, causality included."""
        return self.window[0], 0 if self.causal else self.window[1]

    def features(self) -> frozenset[str]:
        return _set_fields(self, _ATTENTION_REQUIRED)

    def signature(self) -> AttentionSignature:
        return AttentionSignature(
            self.q.device,
            self.q.dtype,
            self.k.dtype,
            self.q.shape[-1],
            self.v.shape[-1],
            self.q.shape[-2],
            self.k.shape[-2],
            0 if self.block_table is None else self.k.shape[1],
            None if self.attn_mask is None else self.attn_mask.dtype,
            self.kv_layout,
            self.features(),
        )


_ATTENTION_REQUIRED = frozenset({"q", "k", "v", "scale", "max_seqlen_q", "max_seqlen_k"})


class OpSignature(NamedTuple):
    """Static facts of every op but attention: device, dtypes and last dimensions, and features."""

    device: torch.device
    dtype: torch.dtype
    other_dtypes: tuple[torch.dtype, ...]
    dims: tuple[int | str, ...]
    features: frozenset[str]


class AppendKvArgs(NamedTuple):
    """Writes new keys and values into a cache, in place: row ``n`` goes to slot ``slots[n]``.

    A cache (P, page, Hkv, D) has P * page slots; a contiguous cache (B, S, Hkv, D) is the same with
    ``page = S``. A negative slot is skipped. With ``cos`` and ``sin``, keys are rotated on the way.
    """

    k_cache: Tensor
    v_cache: Tensor
    k: Tensor  # (N, Hkv, D)
    v: Tensor  # (N, Hkv, Dv)
    slots: Tensor  # int64 (N,)
    cos: Tensor | None = None  # float32 (max_position, rotary_dim / 2)
    sin: Tensor | None = None
    positions: Tensor | None = None  # int64 (N,), needed with cos
    interleaved: bool = False
    kv_layout: str = "nhd"
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def features(self) -> frozenset[str]:
        return _set_fields(self, frozenset({"k_cache", "v_cache", "k", "v", "slots"}))

    def signature(self) -> OpSignature:
        # Not the rows of a page: a contiguous cache that grows would have a new signature each token.
        dims = (self.k.shape[-1], self.v.shape[-1], self.kv_layout)
        return OpSignature(self.k.device, self.k.dtype, (self.k_cache.dtype,), dims, self.features())


class RotaryArgs(NamedTuple):
    """Rotary position embedding of ``x`` (N, heads, D); dimensions past ``2 * cos.shape[1]`` pass through.

    Half-split style pairs (i, i + r/2), interleaved style (2i, 2i + 1). Returns a new tensor.
    """

    x: Tensor
    cos: Tensor  # float32 (max_position, rotary_dim / 2)
    sin: Tensor
    positions: Tensor  # int64 (N,)
    interleaved: bool = False

    def features(self) -> frozenset[str]:
        return _set_fields(self, frozenset({"x", "cos", "sin", "positions"}))

    def signature(self) -> OpSignature:
        dims = (self.x.shape[-1], self.cos.shape[-1])
        return OpSignature(self.x.device, self.x.dtype, (self.cos.dtype,), dims, self.features())


class RmsNormArgs(NamedTuple):
    """``weight * s / sqrt(mean(s^2) + eps)`` over the last dimension, ``s = x + residual``.

    Returns (normalised, s); s is computed in float32 and rounded once to x's dtype.
    Without a residual the second result is empty.
    """

    x: Tensor  # (..., hidden)
    weight: Tensor  # (hidden,)
    eps: float
    residual: Tensor | None = None

    def features(self) -> frozenset[str]:
        return _set_fields(self, frozenset({"x", "weight", "eps"}))

    def signature(self) -> OpSignature:
        others = (self.weight.dtype,) if self.residual is None else (self.weight.dtype, self.residual.dtype)
        return OpSignature(self.x.device, self.x.dtype, others, (self.x.shape[-1],), self.features())


class SwigluArgs(NamedTuple):
    """``silu(gate) * up`` of ``x`` (N, 2 F), gate first; returns (N, F)."""

    x: Tensor

    def features(self) -> frozenset[str]:
        return frozenset()

    def signature(self) -> OpSignature:
        return OpSignature(self.x.device, self.x.dtype, (), (self.x.shape[-1],), frozenset())


class LinearArgs(NamedTuple):
    """``y = x @ dequantize(weight)^T + bias`` for ``x`` (N, in); returns (N, out) in x's dtype."""

    x: Tensor
    weight: PackedWeight
    act: str = ""  # "int8": the caller allows activations to be quantized

    def features(self) -> frozenset[str]:
        names = [f for f in ("g_idx", "x_perm", "bias") if getattr(self.weight, f) is not None]
        if self.weight.group_offset:
            names.append("group_offset")
        if self.act:
            names.append("act")
        return frozenset(names)

    def signature(self) -> OpSignature:
        w = self.weight
        dims = (w.format, *w.shape, w.group_size)
        dtypes = tuple(t.dtype for t in w.tensors.values())
        return OpSignature(self.x.device, self.x.dtype, dtypes, dims, self.features())


class EmbeddingArgs(NamedTuple):
    """Rows ``ids`` (N,) of ``dequantize(weight)``, (N, in) in ``dtype``: reads those rows only."""

    ids: Tensor  # int64 (N,), each in [0, out)
    weight: PackedWeight
    dtype: torch.dtype

    def features(self) -> frozenset[str]:
        return frozenset(f for f in ("g_idx", "x_perm") if getattr(self.weight, f) is not None)

    def signature(self) -> OpSignature:
        w = self.weight
        dtypes = tuple(t.dtype for t in w.tensors.values())
        dims = (w.format, *w.shape, w.group_size)
        return OpSignature(self.ids.device, self.dtype, dtypes, dims, self.features())


class MxPackArgs(NamedTuple):
    """Quantizes ``x`` (..., n) in blocks along the last dimension; formats and scales are in quant/mx.py."""

    x: Tensor
    element: str  # "e1m1", "e2m1", "e2m2", "e2m3", "e3m2", "e4m3", "e5m2", "int4", "int8"
    block: int
    scale: str = "floor"  # or "even", "ceil"; "e4m3", "fp16"
    search: bool = False  # the scale of the least squared error, out of a few

    def features(self) -> frozenset[str]:
        return _mx_features(self.scale, search=self.search)

    def signature(self) -> OpSignature:
        dims = (self.element, self.block, self.scale)
        return OpSignature(self.x.device, self.x.dtype, (), dims, self.features())


class MxUnpackArgs(NamedTuple):
    """The inverse of `MxPackArgs`: codes and scales back to (..., n) of ``dtype``."""

    codes: Tensor  # uint8, elements packed little-endian along the last dimension
    scales: Tensor  # uint8, as quant/mx.py lays them out
    element: str
    block: int
    n: int
    dtype: torch.dtype
    scale: str = "floor"

    def features(self) -> frozenset[str]:
        return _mx_features(self.scale) - {"even", "ceil"}

    def signature(self) -> OpSignature:
        return OpSignature(self.codes.device, self.dtype, (), (self.element, self.block), self.features())


class EncodeArgs(NamedTuple):
    """One message (uint8, contiguous) of ``x`` (rows, hidden); its layout is in quant/codec.py."""

    x: Tensor
    element: str
    block: int
    scale: str = "floor"
    search: bool = False
    rotate: int = 0  # 0, or the length of the blocks that are rotated by a Hadamard matrix
    outliers: tuple[int, ...] = ()  # channels kept in bfloat16, ascending
    threads: int = 1

    def features(self) -> frozenset[str]:
        flags = {"search": self.search, "rotate": self.rotate, "outliers": self.outliers}
        return _mx_features(self.scale, **flags)

    def signature(self) -> OpSignature:
        return OpSignature(self.x.device, self.x.dtype, (), (self.element, self.block), self.features())


class DecodeSumArgs(NamedTuple):
    """The sum of messages of the same format, in the order given, as (rows, hidden) of ``dtype``."""

    messages: tuple[Tensor, ...]
    rows: int
    hidden: int
    dtype: torch.dtype
    element: str
    block: int
    scale: str = "floor"
    rotate: int = 0
    outliers: tuple[int, ...] = ()
    threads: int = 1
    out: Tensor | None = None  # contiguous; written and returned

    def features(self) -> frozenset[str]:
        flags = {"rotate": self.rotate, "outliers": self.outliers}
        return _mx_features(self.scale, **flags) - {"even", "ceil"}

    def signature(self) -> OpSignature:
        dims = (self.element, self.block)
        return OpSignature(self.messages[0].device, self.dtype, (), dims, self.features())


def _mx_features(scale: str, **flags: object) -> frozenset[str]:
    names = [name for name, value in flags.items() if value]
    return frozenset(names if scale == "floor" else [scale, *names])


# -------------------------------------------------------------------------------------------- backends
def no_reasons(signature: Any) -> list[str]:
    """For an op whose features are its only limits."""
    return []


class Op(NamedTuple):
    """One kernel of one backend."""

    run: Callable[[Any], Any]  # of the op's record
    features: frozenset[str] = frozenset()  # default deny: a feature not named is a reason
    reasons: Callable[[Any], list[str]] = no_reasons  # of signature(); reads no tensor values
    page_sizes: tuple[int, ...] = ()  # accepted page sizes; () = any


class Pages(NamedTuple):
    """How a backend wants the pages of a KV cache."""

    size: int = 32  # tokens
    layout: str = "nhd"  # or "npu_nz"


def small_pages(head_dim: int, dtype: torch.dtype, features: frozenset[str]) -> Pages:
    """Pages of a backend that takes any: small ones waste little behind a sequence's end."""
    return Pages()


class Backend(NamedTuple):
    """A table of ops for some devices."""

    name: str
    device_types: tuple[str, ...]
    available: Callable[[], list[str]]  # [] = usable here; heavy imports happen inside
    ops: Callable[[], Mapping[str, Op]]  # called once, only when available
    describe: Callable[[], Mapping[str, str]]  # versions, build flags, features, for `fastattn info`
    # Of a KV cache, by head_dim, dtype and features of the calls that read it; called only when available.
    pages: Callable[[int, torch.dtype, frozenset[str]], Pages] = small_pages


# --------------------------------------------------------------------------------------------- weights
class Cut(NamedTuple):
    """One axis of a weight: the union of spans, or an explicit order. Neither: the whole axis."""

    size: int  # length of the whole axis
    spans: tuple[tuple[int, int], ...] = ()  # half-open; may overlap (replicated KV heads)
    order: Tensor | None = None  # act-order, folded permutations, head grouping; excludes spans

    def length(self) -> int:
        """Number of rows or columns this cut selects."""
        if self.order is not None:
            return int(self.order.numel())
        return sum(hi - lo for lo, hi in self.spans) if self.spans else self.size


class Shard(NamedTuple):
    """This rank's piece of a weight (out, in)."""

    rank: int
    world: int
    out: Cut
    inn: Cut
    q_heads: tuple[int, ...] = ()
    kv_heads: tuple[int, ...] = ()


class PackedWeight(NamedTuple):
    """A weight in memory: the tensors of its format, already cut to this rank's shard."""

    format: str  # "dense", "int4", "int8"
    shape: tuple[int, int]  # (out, in) of this piece
    tensors: Mapping[str, Tensor]  # codes, scales, zeros, outliers...
    group_size: int = 0  # 0: not grouped
    group_offset: int = 0  # the first group may be cut: columns already consumed
    g_idx: Tensor | None = None  # only if groups are not contiguous
    x_perm: Tensor | None = None  # input order the kernel expects; None after folding
    bias: Tensor | None = None  # added once, after the sum


# ------------------------------------------------------------------------------------------- KV caches
class KvPart(NamedTuple):
    """What one attention call can read of a cache; its tensors are on one device."""

    k: Tensor
    v: Tensor
    block_table: Tensor | None
    seqused: Tensor  # int32 (B,)
    pos0: Tensor | None  # int32 (B,): position of the part's first key; None: 0
    heads: slice = slice(None)  # of the cache's KV heads, those that k and v hold
    layout: str = "nhd"
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class KvStep(NamedTuple):
    """One forward's view of a cache: which sequences, which new tokens, where they go."""

    seqs: tuple[int, ...]
    new: tuple[int, ...]  # new tokens of each sequence
    cu_seqlens: Tensor  # int32 (B + 1,) over the new tokens, packed
    positions: Tensor  # int64 (total,)
    slots: Tensor  # int64 (total,)
    seqused: Tensor  # int32 (B,): keys present after the append
    block_table: Tensor  # int32 (B, max_pages)
    max_new: int
    max_used: int


@runtime_checkable
class KvCache(Protocol):
    """Keys and values of many sequences over all layers."""

    page_size: int

    def reserve(self, seqs: Sequence[int], new: Sequence[int]) -> KvStep: ...
    def append(self, layer: int, step: KvStep, k: Tensor, v: Tensor) -> None: ...
    def parts(self, layer: int, step: KvStep) -> tuple[KvPart, ...]: ...
    def truncate(self, seq: int, length: int) -> None: ...
    def free(self, seq: int) -> None: ...


# ------------------------------------------------------------------------------------------ sync points
Site = Literal["attn", "mlp"]
Span = tuple[int, int]  # first and one past the last
Phase = Literal["prefill", "decode"]


#: A file may ask for: far above every published model, and no more than can be listed one by one.
MAX_LAYERS = 4096


class Point(NamedTuple):
    """A place where the ranks' partial results are summed."""

    layer: int
    site: Site
    phase: Phase

    def __str__(self) -> str:
        return f"layer {self.layer} {self.site} ({self.phase})"


class Stream(NamedTuple):
    """What flows from one sync point to the next."""

    residual: Tensor  # all rows, or only `rows` when scattered
    hidden: Tensor | None  # normalised input of the next half-block, all rows
    pending: Tensor | None = None  # unsummed local partial carried by a dropped point
    rows: tuple[int, int] | None = None


class Produce(Protocol):
    """A half-block up to its row-parallel GEMM, without bias."""

    rows: int
    row_parallel: PackedWeight

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        """This rank's partial result of rows [lo, hi); called with ascending lo (KV order)."""
        ...

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        """The input of the row-parallel GEMM, for a fused GEMM + all-reduce."""
        ...


class Epilogue(NamedTuple):
    """What follows the sum: the bias, once, and the next norm."""

    bias: Tensor | None
    norm: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None
    #   norm(x, residual) -> (normalised, x + residual), in one kernel


class TPGroup(NamedTuple):
    """The ranks that share one model. ``pg`` is None when world is 1."""

    pg: ProcessGroup | None
    rank: int
    world: int
    timeout_s: float
    weights: tuple[float, ...]  # share of the work of each rank


class Work(Protocol):
    """An exchange under way."""

    def overlap(self) -> Work:
        """Lets it go on in the background, because the caller computes before it waits; returns itself."""
        ...

    def wait(self) -> Stream:
        """Raises `SyncError` within the group's timeout."""
        ...

    def cancel(self) -> None:
        """Awaited on every error path."""
        ...


class SyncPolicy(Protocol):
    """How the partial results of one sync point are summed.

    ``sum(partial + pending) + residual + bias -> residual; norm -> hidden``.
    """

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def scatters(self) -> bool: ...
    @property
    def needs_full_residual(self) -> bool: ...

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]: ...
    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Work: ...
    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        """What the sync point adds to the time of its half-block."""
        ...

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        """Bytes that the rank which sends most sends."""
        ...


class Link(NamedTuple):
    """Alpha-beta model of one hop between two ranks."""

    latency_s: float
    bytes_per_s: float
    all_reduce_s: float | None = None  # latency of the backend's own all-reduce; None: of a ring's hops
    all_reduce_bytes_per_s: float | None = None  # at which its ring moves bytes; None: as every hop


class Rates(NamedTuple):
    """What a rank computes, measured."""

    fixed_s: float = 0.0  # of a half-block, whatever its rows
    row_s: float = 0.0  # of a half-block, each row
    value_s: float = 0.0  # to encode, decode or add one value of a message
    item_bytes: int = 4  # of an activation on the wire
    world: int = 1
    norm_row_s: float = 0.0  # of row_s, the residual's addition and the norm behind the sync point

    def half_block(self, rows: int) -> float:
        """Seconds."""
        return self.fixed_s + rows * self.row_s


class Schedule(Protocol):
    """Whether, and where, the rows of a forward are split into tiles that pass the layers in turn."""

    @property
    def name(self) -> str: ...

    def spans(self, rows: int) -> Sequence[Span]:
        """The tiles, in order; one: the forward is not split."""
        ...


class SyncPlan(NamedTuple):
    """Policies and schedule of a model, kept as JSON (`parallel.plan`)."""

    model_hash: str  # the checkpoint's fingerprint
    world: int
    split: tuple[float, ...]  # share of the work of each rank
    points: Mapping[Point, SyncPolicy]  # every one of the model
    schedule: Mapping[Phase, Schedule]
    quality: Mapping[str, Any]  # text, tokens, perplexity of the exact model and of this plan
    version: int = 1
