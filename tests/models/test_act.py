"""The precision policy of activations: what `load` is told reaches every linear layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fastattn
from fastattn import dispatch
from fastattn.spec import LinearArgs

from .builders import hf_model, save_hf


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", seed=3), tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("act", ["", "int8"])
def test_every_linear_layer_gets_it(directory: Path, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LinearArgs] = []
    run = dispatch.run

    def record(op: str, args: Any, backend: str) -> Any:
        if op == "linear":
            seen.append(args)
        return run(op, args, backend)

    monkeypatch.setattr(dispatch, "run", record)
    model = fastattn.load(directory, act=act)
    with fastattn.use_backend("sdpa"):  # op by op
        model.logits([[1, 2, 3]])
    assert len(seen) == 4 * model.config.num_layers + 1  # qkv, o, gate and up, down; the head
    assert {args.act for args in seen} == {act}


def test_default_is_never(directory: Path) -> None:
    decoder = fastattn.load(directory).decoder
    layers = [layer for a, m in decoder.blocks for layer in (a.qkv, a.o, m.gate_up, m.down)]
    assert {layer.act for layer in (*layers, decoder.head)} == {""}


@pytest.mark.parametrize("act", ["int4", "none", "INT8", " "])
def test_unknown_values_are_refused_before_anything_is_read(act: str) -> None:
    with pytest.raises(ValueError, match=r"act: .*, expected '' or 'int8'"):
        fastattn.load("/nonexistent", act=act)
