"""Which backend runs a call: the first of the device's list with no reason against it.

A backend that the caller names (argument, `use_backend`, FASTATTN_BACKEND) is used or refused, never
replaced; of several, "volta,triton", the first that can. Resolution happens inside the torch op and is
cached per static signature, so that tracing never sees it. An exception inside a kernel is a bug and
propagates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

import torch

from .settings import settings
from .spec import Backend, Op, OpArgs, Pages, UnsupportedError, small_pages

# In the order in which dispatch tries them. `reference` is the float64 oracle: correct, slow, and
# therefore only ever used by name.
AUTOMATIC = ("volta", "ascend", "triton", "cpu", "sdpa")
BACKENDS = (*AUTOMATIC, "reference")

#: How often each (backend, op) ran in this process.
calls: Counter[tuple[str, str]] = Counter()

_forced: ContextVar[str] = ContextVar("fastattn_backend", default="")
_resolved: dict[tuple[str, Any, str], tuple[str, Op]] = {}

#: Runs an op in place of `run` and returns its result: (op, args, backend, kernel).
Observer = Callable[[str, Any, str, Op], Any]
_observer: ContextVar[Observer | None] = ContextVar("fastattn_observer", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, every op runs on the backend ``name`` or is refused with the reason.

    Several names, ``"volta,triton,sdpa"``, are tried in that order. Raises ValueError when there is no such
    backend. The ``backend=`` argument of a call wins over it.
    Compiled code obeys the block that it is called in; the block itself cannot be inside a function that
    is compiled with ``fullgraph=True`` (torch says so), where ``backend=`` does the same.
    """
    # Not by `order`: torch.compile, which may trace this, warns of functions with a cache.
    names = name.split(",") if isinstance(name, str) else [name]
    token = _forced.set(",".join(map(_known, names)))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the block, ``observer`` runs the ops of this thread."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def by_op() -> bool:
    """Whether every op has to pass through `run`: one observes, or CPU tensors are not the CPU backend's."""
    # An emulated backend comes before `cpu` for tensors on the CPU.
    return (named() or ("emulated" if settings.emulate else "cpu")) != "cpu" or _observer.get() is not None


def cpu_comes_first(backend: str) -> bool:
    """Whether an op on CPU tensors is the CPU backend's if that takes it.

    Ops whose kernel takes everything skip the record and the signature then, a third of the cost of a call.
    """
    return not backend and not by_op() and not unavailable("cpu")


@cache
def order(name: str) -> tuple[str, ...]:
    """The backends to try for a name, or several joined by commas; ``""``: the automatic ones."""
    return tuple(map(_known, name.split(","))) if name else AUTOMATIC


@cache
def load_backend(name: str) -> Backend:
    """The record of backend ``name``; importing it imports no toolkit."""
    backend: Backend = import_module(f"fastattn.backends.{_known(name)}").BACKEND
    return backend


@cache
def unavailable(name: str) -> tuple[str, ...]:
    """Why backend ``name`` cannot run in this process; empty when it can."""
    return tuple(load_backend(name).available())


@cache
def op_table(name: str) -> Mapping[str, Op]:
    """The ops of an available backend."""
    return load_backend(name).ops()


def reasons_against(name: str, op: str, signature: Any) -> list[str]:
    """Every reason why backend ``name`` cannot run this call; empty when it can."""
    backend = load_backend(name)
    reasons = list(unavailable(name))
    if signature.device.type not in backend.device_types:
        accepted = ", ".join(backend.device_types)
        reasons.insert(0, f"tensors are on {signature.device.type!r}, it runs on {accepted}")
    if unavailable(name):
        return reasons
    kernel = op_table(name).get(op)
    if kernel is None:
        return [*reasons, f"it has no op {op!r}"]
    reasons += [f"{f} is not supported" for f in sorted(signature.features - kernel.features)]
    page_size = getattr(signature, "page_size", 0)
    if page_size and kernel.page_sizes and page_size not in kernel.page_sizes:
        reasons.append(f"page size {page_size}, it takes {', '.join(map(str, kernel.page_sizes))}")
    return reasons + kernel.reasons(signature)


def pages(
    device_type: str, head_dim: int, dtype: torch.dtype, features: frozenset[str] = frozenset()
) -> Pages:
    """How the first backend that runs on such a device wants the pages of a KV cache of ``dtype``.

    ``features`` are those of the attention calls that will read it, beside causality and pages.
    """
    for name in order(named()):
        if device_type in load_backend(name).device_types and not unavailable(name):
            return load_backend(name).pages(head_dim, dtype, features)
    return small_pages(head_dim, dtype, features)


def explain(op: str, signature: Any) -> dict[str, list[str]]:
    """Reasons of every backend against this call, in dispatch order."""
    return {name: reasons_against(name, op, signature) for name in BACKENDS}


def resolve(op: str, signature: Any, backend: str = "") -> tuple[str, Op]:
    """(backend name, kernel) for a call. Raises UnsupportedError with every backend's reasons."""
    against = {}
    for name in order(backend):
        against[name] = reasons_against(name, op, signature)
        if not against[name]:
            return name, op_table(name)[op]
    lines = [f"  {name}: {'; '.join(why)}" for name, why in against.items()]
    asked = f"backend {backend!r} was asked for" if backend else "no backend is left"
    hint = "" if backend else "\n(backend='reference' computes any call in float64, slowly)"
    raise UnsupportedError(f"{op}: {asked}, and cannot run this call:\n" + "\n".join(lines) + hint)


def named() -> str:
    """What `use_backend` or FASTATTN_BACKEND asks for, as `order` takes it; "" when neither does."""
    return _forced.get() or _in_environment()


@cache
def _in_environment() -> str:
    try:
        order(settings.backend)
    except ValueError as error:
        raise ValueError(f"environment variable FASTATTN_BACKEND={settings.backend!r}: {error}") from None
    return settings.backend


def run(op: str, args: OpArgs, backend: str = "") -> Any:
    """Runs the call on the backend that `resolve` picks."""
    name = backend or named()
    key = (op, args.signature(), name)
    found = _resolved.get(key)
    if found is None:
        found = _resolved[key] = resolve(*key)
    calls[found[0], op] += 1
    observer = _observer.get()
    return found[1].run(args) if observer is None else observer(op, args, *found)


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; there are: {', '.join(BACKENDS)}")
    return name
