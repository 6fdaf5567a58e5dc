"""Every environment variable of fastattn, declared, typed and parsed in one place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, cast


def _flag(text: str) -> bool:
    values = {"0": False, "": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
    return values[text.lower()]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _emulated(text: str) -> frozenset[str]:
    names = frozenset(name for name in text.split(",") if name)
    if not names <= {"volta", "triton", "ascend"}:
        raise ValueError(text)
    return names


def _ascend(text: str) -> str:
    if text not in ("auto", "kernels", "torch_npu"):
        raise ValueError(text)
    return text


def _variable(default: Any, name: str, parse: Callable[[str], Any], accepted: str, doc: str) -> Any:
    return field(default=default, metadata={"name": name, "parse": parse, "accepted": accepted, "doc": doc})


@dataclass(frozen=True)
class Settings:
    """Process-wide defaults; an argument of a call always wins over them."""

    backend: str = _variable(
        "",
        "FASTATTN_BACKEND",
        str,
        "backends' names, separated by commas",
        "use the first of these backends that can run an op, or refuse",
    )
    cpu_isa: str = _variable(
        "", "FASTATTN_CPU_ISA", str, "a name listed by `fastattn info`", "instruction set of the CPU kernels"
    )
    emulate: frozenset[str] = _variable(
        frozenset(),
        "FASTATTN_EMULATE",
        _emulated,
        "volta, triton, ascend, separated by commas",
        "these backends also take CPU tensors and run their kernels emulated there: correct, very slow",
    )
    volta_ptx: bool = _variable(
        False,
        "FASTATTN_VOLTA_PTX",
        _flag,
        "0 or 1",
        "run the Volta kernels on newer NVIDIA GPUs from their compute_70 PTX: for testing, not for speed",
    )
    ascend: str = _variable(
        "auto",
        "FASTATTN_ASCEND",
        _ascend,
        "auto, kernels or torch_npu",
        "who runs on Ascend NPUs: torch_npu's operators where they can, only our kernels, or only torch_npu",
    )
    strict: bool = _variable(
        False,
        "FASTATTN_STRICT",
        _flag,
        "0 or 1",
        "check indices that live on a device (page tables, lengths) before launch; costs a synchronisation",
    )
    shared_memory: bool = _variable(
        True,
        "FASTATTN_SHARED_MEMORY",
        _flag,
        "0 or 1",
        "let the ranks of one machine sum through memory that they share (1), or through sockets (0)",
    )
    timeout_s: float = _variable(
        60.0, "FASTATTN_TIMEOUT", _seconds, "seconds > 0", "how long a rank waits for another"
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Raises ValueError that names the variable, what it was and what is accepted."""
        values = {}
        for f in fields(cls):
            text = environ.get(f.metadata["name"])
            if text is None:
                continue
            try:
                values[f.name] = f.metadata["parse"](text)
            except (ValueError, KeyError):
                name, accepted = f.metadata["name"], f.metadata["accepted"]
                raise ValueError(f"environment variable {name}={text!r}: expected {accepted}") from None
        return cls(**values)

    @classmethod
    def describe(cls) -> list[tuple[str, str, str]]:
        """(variable, accepted values, meaning) of each setting."""
        return [(f.metadata["name"], f.metadata["accepted"], f.metadata["doc"]) for f in fields(cls)]


class _Environment:
    """This process's `Settings`, parsed when first asked for.

    Not at import: the command line has to be imported before it can say what is wrong.
    """

    def __getattr__(self, name: str) -> Any:
        self.__dict__ |= vars(Settings.from_env(os.environ))
        return object.__getattribute__(self, name)


settings = cast(Settings, _Environment())
