"""Whole models on one backend: what every backend's own test asks of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import cli, dispatch
from fastattn.dispatch import use_backend
from tests.quant.stored import Spec

from .builders import hf_model, save_hf
from .quantized import save_quantized

FORMS = ("float16", "int4-act-order")
OPS = {"attention", "append_kv", "rotary", "rms_norm", "swiglu", "linear", "embedding"}
PROMPTS = ("The quick brown fox jumps over the lazy dog", "In the")


def llama(form: str, folder: Path, head_dim: int = 16) -> Path:
    """A random Llama of two layers, its weights in one of `FORMS`."""
    model = hf_model("llama", seed=3, dtype=torch.float16, head_dim=head_dim)
    if form == "float16":
        return save_hf(model, folder)
    save_quantized(model, folder, Spec("gptq", 4, 32, act_order=True))
    return folder


def generates_as_the_cpu(
    directory: Path, backend: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fastattn generate`: the CPU's tokens, by every op of the backend and by no other's."""

    def tokens(*where: str) -> list[list[int]]:
        prompts = [word for p in PROMPTS for word in ("--prompt", p)]
        options = ["--dtype", "float16", "--max-tokens", "4", "--ignore-eos", "--json"]
        capsys.readouterr()
        assert cli.main(["generate", str(directory), *prompts, *options, *where]) == 0
        return [c["token_ids"] for c in json.loads(capsys.readouterr().out)["completions"]]

    expected = tokens("--backend", "cpu")
    dispatch.calls.clear()
    assert tokens("--device", device) == expected
    assert [len(t) for t in expected] == [4, 4]
    assert set(dispatch.calls) == {(backend, op) for op in OPS}


def logits_are_as_exact_as_the_cpus(directory: Path, backend: str, device: str) -> None:
    """Of a prompt and of one token: at most twice the CPU's error in float16, against float32."""

    def logits(name: str, dtype: str, where: str) -> list[torch.Tensor]:
        with use_backend(name):
            model = fastattn.load(directory, dtype=dtype, device=where)
            return [t.double().cpu() for t in model.logits([list(range(5, 42)), [7]])]

    exact, theirs = logits("cpu", "float32", "cpu"), logits("cpu", "float16", "cpu")
    for ours, b, oracle in zip(logits(backend, "float16", device), theirs, exact, strict=True):
        limit = 2 * (b - oracle).abs().max() + 2**-10 * oracle.abs().max()
        assert (ours - oracle).abs().max() <= limit
