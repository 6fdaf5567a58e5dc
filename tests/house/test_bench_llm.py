"""Whole models in the benchmarks: random ones, on other backends than the CPU's, and one decode step."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import decode_step as bench_decode_step
import fastattn
import llm as bench_llm
from fastattn.models import random_llama
from fastattn.models.generate import Model
from fastattn.models.random_llama import RandomLlama
from fastattn.models.sampling import SamplingParams
from lib.args import model
from lib.llm_limits import layer_matrices, nbytes

from .markdown import ROOT

BACKENDS = ("volta", "ascend", "triton")
OPS = {"attention", "append_kv", "rotary", "rms_norm", "swiglu", "linear", "embedding"}


def test_llama_7b_has_its_published_sizes() -> None:
    c = RandomLlama(32, 4096).config()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size")
    assert [c[n] for n in names] == [4096, 11008, 32, 128, 32000]


@pytest.mark.parametrize("form", random_llama.FORMS)
def test_a_random_model_loads_and_generates(form: str, tmp_path: Path) -> None:
    folder = random_llama.write(RandomLlama(2, 64, form), tmp_path)
    model = fastattn.load(folder)
    (qkv,) = model.decoder.blocks[1][0].qkv.weights
    # One matrix: q, k and v have one act-order, as the same input gives them.
    assert (qkv.format, qkv.x_perm is None) == (("dense", True) if form == "fp16" else ("int4", False))
    prompts = [model.tokenizer.encode("canal"), [7]]
    tokens = [c.token_ids for c in model.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))]
    assert [len(t) for t in tokens] == [4, 4]
    assert model.tokenizer.decode(prompts[0]).endswith("canal")
    logits = model.logits(prompts)
    assert all(bool(torch.isfinite(x).all()) and float(x.std()) > 0.1 for x in logits)


@pytest.mark.parametrize("hidden", [576, pytest.param(2176, marks=pytest.mark.slow)])
def test_groups_of_4_bits_fill_its_matrices(hidden: int, tmp_path: Path) -> None:
    made = RandomLlama(1, hidden, "int4")
    assert made.config()["intermediate_size"] % made.group_size == 0
    (out,) = fastattn.load(random_llama.write(made, tmp_path)).logits([[3]])
    assert bool(torch.isfinite(out).all())


def test_a_random_model_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again, other = (
        random_llama.write(RandomLlama(2, 64), tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1))
    )
    names = sorted(p.name for p in first.iterdir())
    assert [n for n in names if n.endswith(".safetensors")] == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    assert all((first / n).read_bytes() == (again / n).read_bytes() for n in names)
    assert not torch.equal(*(fastattn.load(f).logits([[3, 4]])[0] for f in (first, other)))


@pytest.mark.parametrize("text", ["random:2", "random:0x64", "random:2x65", "random:2x64:int8"])
def test_other_random_models_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected random:LAYERSxHIDDEN"):
        model(text)
    assert model("smollm2") == "smollm2"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--device cuda --tensor_para_size 1,2", "expected 1 with --device cuda"),
        ("--device npu --peer transformers", "expected cpu with --device npu"),
        ("--backend cuda", "invalid choice"),
        ("--model random:2", "expected random:LAYERSxHIDDEN"),
    ],
)
def test_llm_refuses(
    line: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llm.py", *line.split()])
    with pytest.raises(SystemExit):
        bench_llm.arguments()
    assert said in capsys.readouterr().err


def emulated(backend: str, program: str, *words: str) -> str:
    """What a program prints whose kernels are emulated."""
    if backend != "volta":
        pytest.importorskip("triton")
    environ = os.environ | {"FASTATTN_EMULATE": backend, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / program), *words],
        env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def served(out: str) -> dict[str, set[str]]:
    """The ops that each backend ran, as the program says."""
    lines = re.findall(r"ops served by (\w+): (.*)", out)
    return {backend: {word.split()[0] for word in ops.split(", ")} for backend, ops in lines}


@pytest.mark.toolchain
@pytest.mark.parametrize("weights", ["", ":int4"], ids=["fp16", "int4-act-order"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_model_runs_on_each_backend_alone(backend: str, weights: str, tmp_path: Path) -> None:
    """Llama of two layers, through bench/llm.py: no op fell back, and the tokens are the CPU's."""
    records = tmp_path / "records.json"
    line = f"--model random:2x64{weights} --backend {backend} --peer cpu --inference_data_type fp16"
    sizes = "--batch_size 2 --input_len 9 --output_len 3 --tensor_para_size 1 --iterations 1"
    out = emulated(backend, "llm.py", *line.split(), *sizes.split(), "--json", str(records))
    assert served(out) == {backend: OPS}
    assert "fastattn's cpu: 6 of 6 greedy tokens equal ours" in out
    assert {r["claim"] for r in json.loads(records.read_text())} == {"emulated"}


@pytest.mark.toolchain
@pytest.mark.parametrize("backend", ["volta", "triton"])
def test_decode_step_program(backend: str, tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    line = f"--layers 2 --hidden 64 --keys 40 --device cpu --backend {backend} --seconds 0.01"
    out = emulated(backend, "decode_step.py", *line.split(), "--json", str(records))
    assert served(out) == {backend: OPS}
    written = json.loads(records.read_text())
    assert [r["case"].split()[2] for r in written] == list(random_llama.FORMS)
    assert all(r["ours"] > r["limit_value"] > 0 and r["claim"] == "emulated" for r in written)


def tensors(model: Model) -> Iterator[Tensor]:
    for weight in layer_matrices(model.decoder):
        yield from weight.tensors.values()


@pytest.mark.parametrize("form", random_llama.FORMS)
def test_a_decode_step_reads_weights_of_its_own_in_every_layer(form: str) -> None:
    shallow, deep = (bench_decode_step.deepened(RandomLlama(n, 64, form), "cpu") for n in (1, 3))
    assert len({t.data_ptr() for t in tensors(deep)}) == 3 * len(list(tensors(shallow)))
    assert nbytes(layer_matrices(deep.decoder)) == 3 * nbytes(layer_matrices(shallow.decoder))


@pytest.mark.slow
def test_a_decode_step_never_waits_for_the_device() -> None:
    """Tensors without data refuse to be read: nothing between the ops would break a graph's capture."""
    model = bench_decode_step.deepened(RandomLlama(2, 64), "meta")
    with torch.inference_mode():
        assert bench_decode_step.decode_step(model, 40)().device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("form", random_llama.FORMS)
def test_a_captured_step_gives_the_token_of_its_ops(form: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    with torch.inference_mode():
        model = bench_decode_step.deepened(RandomLlama(2, 512, form), "cuda")
        step = bench_decode_step.decode_step(model, 100)
        expected = step()
        replay, found = bench_decode_step.captured(step)
        found.zero_()
        replay()
        assert torch.equal(found, expected)
