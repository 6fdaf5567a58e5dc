"""Where a model's tensors live: all of them on the device that was asked for, or the reason why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.backends import volta
from fastattn.memory.paged import PagedKvCache
from fastattn.models.sampling import SamplingParams
from fastattn.quant.packed import to_device
from tests.ops.weights import make
from tests.quant.stored import Spec

from .builders import hf_model, save_hf
from .quantized import save_quantized


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = hf_model("qwen2", dtype=torch.float16)  # which has biases
    return save_hf(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    save_quantized(hf_model("llama", dtype=torch.float16), folder, Spec("gptq", 4, 32, act_order=True))
    return folder


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of records, mappings and sequences inside ``value``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for v in value.values() for t in tensors(v))
    elif isinstance(value, (list, tuple)):
        yield from (t for v in value for t in tensors(v))
    elif dataclasses.is_dataclass(value) or type(value).__module__.startswith("fastattn.parallel"):
        yield from tensors(vars(value))


def test_every_weight_moves(directory: Path) -> None:
    on_cpu, elsewhere = (fastattn.load(directory, device=device).decoder for device in ("cpu", "meta"))
    parts = [[d.blocks, d.norm, d.embedding.weight, d.head.weight] for d in (on_cpu, elsewhere)]
    here, there = (list(tensors(p)) for p in parts)
    assert len(here) == len(there) == 2 * 7 + 3
    assert {t.device.type for t in here} == {"cpu"}
    assert {t.device.type for t in there} == {"meta"}
    assert [(t.shape, t.dtype) for t in here] == [(t.shape, t.dtype) for t in there]
    cache = PagedKvCache(1, 1, 16, 1, 16, device="meta")
    assert {t.device.type for t in elsewhere.rope.of(cache.reserve([0], [10]))} == {"meta"}


def test_every_tensor_of_a_packed_weight_moves() -> None:
    packed = make("int4", 8, 64, g_idx=True, x_perm=True, bias=torch.float32)
    moved = to_device(packed, torch.device("meta"))
    assert {t.device.type for t in tensors(moved)} == {"meta"}
    assert len(list(tensors(moved))) == 6
    assert moved._replace(tensors={}, g_idx=None, x_perm=None, bias=None) == packed._replace(
        tensors={}, g_idx=None, x_perm=None, bias=None
    )
    assert to_device(packed, torch.device("cpu")).tensors["codes"] is packed.tensors["codes"]


def test_a_device_that_is_not_there_is_named(directory: Path) -> None:
    for device in ("cuda:63", "abacus"):
        with pytest.raises(ValueError, match=f"device: '{device}', expected one that torch sees: "):
            fastattn.load(directory, device=device)
    if find_spec("torch_npu") is None:
        with pytest.raises(ValueError, match=r"device: 'npu:1', .* torch_npu is not installed"):
            fastattn.load(directory, device="npu:1")


def test_the_ranks_join_for_the_device_that_computes(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device: meta, tensor parallelism runs on cpu, cuda, npu"):
        fastattn.load(directory, tp="auto", device="meta")
    with torch.device("meta"):
        model = hf_model("llama")
    with pytest.raises(ValueError, match="device: meta, tensor parallelism runs on cpu, cuda, npu"):
        fastattn.parallelize(model)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["directory", "quantized"])
def test_a_gpu_gives_the_same_tokens(model: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(model)
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    prompts, params = [list(range(5, 42)), [7]], SamplingParams(max_tokens=6, ignore_eos=True)
    expected = fastattn.load(directory, dtype="float16").generate(prompts, params)
    on_gpu = fastattn.load(directory, dtype="float16", device="cuda")
    for backend in ("", "volta"):  # the latter on a Volta, or with FASTATTN_VOLTA_PTX=1 on a newer GPU
        if backend and volta.BACKEND.available():
            continue
        dispatch.calls.clear()
        with fastattn.use_backend(backend or "sdpa"):
            found = on_gpu.generate(prompts, params)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert {name for name, _ in dispatch.calls} == {backend or "sdpa"}
