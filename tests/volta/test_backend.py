"""The adapter: when the backend is usable, which calls it takes, what it refuses before any launch."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastattn
from cuda_volta import driver, nvrtc, runtime
from fastattn import UnsupportedError, devices, dispatch, ops
from fastattn.attention import build_args
from fastattn.backends import volta
from fastattn.spec import (
    AppendKvArgs,
    AttentionArgs,
    EmbeddingArgs,
    LinearArgs,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)
from tests.api.cases import int32
from tests.ops.weights import make

PAGED = {"block_table": int32([[0, 1], [2, 3]]), "cache_seqlens": int32([20, 32])}


def half(*shape: int) -> torch.Tensor:
    return torch.randn(shape).half()


def reasons(dtype: torch.dtype = torch.float16, k: int = 64, v: int = 64, **options: Any) -> list[str]:
    """Why the backend would refuse a call with these head dims."""
    q, key, value = (torch.zeros(1, 2, 2, d, dtype=dtype) for d in (k, k, v))
    signature = build_args(q, key, value, **options).signature()
    return dispatch.reasons_against("volta", "attention", signature)


# ------------------------------------------------------------------------------------------ availability
def test_without_a_gpu_it_says_what_would_emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(volta, "_EMULATED", False)
    expected = "torch sees no NVIDIA GPU (FASTATTN_EMULATE=volta runs the kernels on the CPU)"
    assert volta.BACKEND.available() == [expected]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that torch sees; their driver is CUDA 12.2."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(volta, "_EMULATED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found[device.index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_50", "sm_70", "sm_80", "sm_90"])
    monkeypatch.setattr(driver, "driver", lambda: SimpleNamespace(version_text="12.2"))
    monkeypatch.setattr(runtime, "nvrtc", lambda: SimpleNamespace(version=(12, 9), path="libnvrtc.so.12"))
    return found


def test_the_gpus_that_it_runs_on(gpus: list[tuple[int, int]]) -> None:
    for capability in ((7, 0), (7, 2), (7, 5)):
        gpus[:] = [capability]
        assert volta.BACKEND.available() == []
    gpus[:] = [(6, 1)]
    old = "compute capability 6.1, the Volta kernels are for 7.0, 7.2 and 7.5"
    assert volta.BACKEND.available() == [f"cuda:0: {old}"]
    gpus[:] = [(6, 1), (9, 0)]
    newer = "compute capability 9.0, the Volta kernels are for 7.0, 7.2 and 7.5"
    hint = "(newer GPUs can run their PTX, for testing)"
    assert volta.BACKEND.available() == [f"cuda:0: {old}", f"cuda:1: {newer} {hint}"]
    gpus.append((7, 0))
    assert volta.BACKEND.available() == []
    assert volta.device_reasons(torch.device("cuda", 0)) == [old]
    assert volta.device_reasons(torch.device("cuda", 2)) == []


def test_a_torch_without_code_for_volta_is_named(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus[:] = [(7, 0)]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_90"])
    (why,) = volta.BACKEND.available()
    assert why.startswith(f"cuda:0: torch {torch.__version__} has no code for compute capability 7.0, only ")
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    with pytest.raises(ValueError, match=r"device: 'cuda:0': torch .* has no code for .* 7\.0"):
        devices.usable_device("cuda:0")


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_70"], (7, 0), True),
        (["sm_70"], (7, 2), True),
        (["sm_75"], (7, 2), False),
        (["sm_70"], (8, 0), False),
        (["compute_60"], (7, 0), True),
        (["sm_90a", "gfx90a"], (9, 0), True),
        (["sm_100", "compute_120"], (9, 0), False),
        ([], (7, 0), True),  # a build that does not say
    ],
)
def test_what_a_build_of_torch_runs_on(
    built_for: list[str],
    capability: tuple[int, int],
    runs: bool,
    gpus: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpus[:] = [capability]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    assert (devices.lacks_code(torch.device("cuda", 0)) == "") == runs


def test_a_build_for_amd_names_its_architectures_otherwise(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus[:] = [(9, 4)]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["gfx90a", "gfx942"])
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert devices.lacks_code(torch.device("cuda", 0)) == ""


def test_a_setting_allows_newer_gpus(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volta, "settings", SimpleNamespace(volta_ptx=True))
    gpus[:] = [(9, 0), (6, 1), (7, 5), (8, 0)]
    assert volta.BACKEND.available() == []
    assert volta.device_reasons(torch.device("cuda", 1)) != []
    assert volta.device_reasons(torch.device("cuda", 2)) == []
    assert volta.device_reasons(torch.device("cuda", 3)) == []
    gpus.remove((7, 5))
    monkeypatch.setattr(volta, "settings", SimpleNamespace(volta_ptx=False))
    assert len(volta.BACKEND.available()) == 3


def test_turing_takes_the_heads_that_its_shared_memory_holds(gpus: list[tuple[int, int]]) -> None:
    gpus[:] = [(7, 5), (7, 0)]
    for index, widest in enumerate((160, 256)):
        for size in (64, 160, 161, 256):
            signature = build_args(*(torch.zeros(1, 2, 2, size, dtype=torch.float16),) * 3).signature()
            against = volta.BACKEND.ops()["attention"].reasons(
                signature._replace(device=torch.device("cuda", index))
            )
            assert against == [] or f"head_dim {size}, it takes at most {widest}" in against
            assert bool(against) == (size > widest)


def test_neither_kernels_nor_compiler(gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise nvrtc.NvrtcMissing("only NVRTC 13.1 was found")

    monkeypatch.setattr(runtime, "nvrtc", missing)
    gpus[:] = [(7, 0)]
    assert volta.BACKEND.available() == ["cuda:0: only NVRTC 13.1 was found"]
    monkeypatch.setattr(runtime, "has_shipped", lambda arch: arch == "sm_70")
    assert volta.BACKEND.available() == []
    facts = volta.BACKEND.describe()
    assert facts["kernels"] == "shipped for sm_70"
    assert "NVRTC" not in facts


def test_info_says_where_kernels_come_from(gpus: list[tuple[int, int]]) -> None:
    gpus[:] = [(7, 0)]
    expected = {"kernels": "compiled at first use", "NVRTC": "12.9 (libnvrtc.so.12)", "driver": "CUDA 12.2"}
    assert volta.BACKEND.describe() == expected | {"PTX on newer GPUs": "no"}


def test_info_of_an_emulated_backend() -> None:
    environment = {**os.environ, "FASTATTN_EMULATE": "volta"}
    command = [sys.executable, "-m", "fastattn", "info"]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    (line,) = (line.split() for line in out.splitlines() if line.startswith("  volta "))
    assert " ".join(line).startswith("volta yes kernels: emulated on the CPU, built by ")


# ------------------------------------------------------------------------------------------ what it takes
@pytest.mark.usefixtures("emulated")
def test_every_field_but_the_layout_is_taken() -> None:
    features = dispatch.op_table("volta")["attention"].features
    assert features == set(AttentionArgs._field_defaults) - {"kv_layout"}
    assert reasons() == []
    assert reasons(k=256, v=8) == []
    assert reasons(kv_layout="npu_nz") == ["kv_layout is not supported"]


@pytest.mark.usefixtures("emulated")
def test_what_it_refuses_says_why() -> None:
    (bfloat16,) = reasons(torch.bfloat16)
    assert "Volta has no bfloat16" in bfloat16
    assert ".half()" in bfloat16
    assert reasons(torch.float32) == ["dtype torch.float32, it takes torch.float16"]
    assert reasons(k=257) == ["head_dim 257, it takes at most 256"]
    assert reasons(v=264) == ["head_dim of v 264, it takes at most 256"]
    narrow = torch.zeros(1, 2, 2, 64, dtype=torch.int8)
    scaled = build_args(half(1, 2, 2, 64), narrow, narrow, k_scale=torch.ones(2), v_scale=torch.ones(2))
    expected = ["k and v are torch.int8, it takes torch.float16"]
    assert dispatch.reasons_against("volta", "attention", scaled.signature()) == expected


@pytest.mark.usefixtures("emulated")
def test_bfloat16_is_refused_to_the_caller_with_the_way_out() -> None:
    q = torch.zeros(1, 2, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"Volta has no bfloat16; convert with \.half\(\)"):
        fastattn.attention(q, q, q, backend="volta")


def _calls(dtype: torch.dtype) -> dict[str, Any]:
    """One call of each small op with activations of ``dtype``."""
    x, cache, weight = (
        torch.zeros(2, 64, dtype=dtype),
        torch.zeros(2, 4, 2, 32, dtype=dtype),
        make("int4", 8, 64),
    )
    heads, table, at = x.view(2, 2, 32), torch.zeros(9, 16), torch.tensor([0, 1])
    return {
        "append_kv": AppendKvArgs(cache, cache, heads, heads, at),
        "rotary": RotaryArgs(heads, table, table, at),
        "rms_norm": RmsNormArgs(x, x[0], 1e-5, x),
        "swiglu": SwigluArgs(x),
        "linear": LinearArgs(x, weight),
        "embedding": EmbeddingArgs(at, weight, dtype),
    }


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("op", _calls(torch.float16))
def test_small_ops_take_float16_alone(op: str) -> None:
    def against(dtype: torch.dtype) -> list[str]:
        return dispatch.reasons_against("volta", op, _calls(dtype)[op].signature())

    assert against(torch.float16) == []
    assert "dtype torch.float32, it takes torch.float16" in against(torch.float32)
    assert any("Volta has no bfloat16; convert with .half()" in why for why in against(torch.bfloat16))


@pytest.mark.usefixtures("emulated")
def test_small_ops_refuse_other_types_of_their_tables() -> None:
    calls = _calls(torch.float16)
    table = torch.zeros(9, 16, dtype=torch.float16)
    rotary = calls["rotary"]._replace(cos=table, sin=table).signature()
    expected = ["cos and sin are torch.float16, it takes torch.float32"]
    assert dispatch.reasons_against("volta", "rotary", rotary) == expected
    norm = calls["rms_norm"]._replace(weight=torch.zeros(64, dtype=torch.bfloat16)).signature()
    expected = ["weight is torch.bfloat16, it takes torch.float16 and torch.float32"]
    assert dispatch.reasons_against("volta", "rms_norm", norm) == expected
    append = calls["append_kv"]._replace(kv_layout="npu_nz").signature()
    assert dispatch.reasons_against("volta", "append_kv", append) == ["kv_layout is not supported"]


# ------------------------------------------------------------------------------------------ bad input
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({**PAGED, "block_table": int32([[0, 4], [2, 3]])}, r"block_table\[0\]: values 0..4, expected 0..3"),
        ({**PAGED, "block_table": int32([[0, 1], [-1, 3]])}, r"block_table\[1\]: values -1..3"),
        ({**PAGED, "cache_seqlens": int32([20, 33])}, r"cache_seqlens: values 20..33, expected 0..32"),
        ({**PAGED, "cache_seqlens": int32([-1, 3])}, r"cache_seqlens: values -1..3"),
        ({**PAGED, "cache_leftpad": int32([0, -3])}, r"cache_leftpad: values -3..0"),
        ({"cache_seqlens": int32([17, 2])}, r"cache_seqlens: values 2..17, expected 0..16"),
        ({"cache_batch_idx": int32([0, 4])}, r"cache_batch_idx: values 0..4, expected 0..3"),
    ],
    ids=lambda value: value[:14] if isinstance(value, str) else "",
)
def test_indices_outside_are_refused_before_a_launch(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a kernel was loaded")

    monkeypatch.setattr("cuda_volta.decode.load", never)
    monkeypatch.setattr("cuda_volta.prefill.load", never)
    k = half(4, 16, 1, 8) if "cache_seqlens" not in options or "block_table" in options else half(2, 16, 1, 8)
    with pytest.raises(ValueError, match=message):
        fastattn.attention(half(2, 3, 2, 8), k, k, backend="volta", **options)


@pytest.mark.usefixtures("emulated")
def test_tensors_on_several_devices_are_refused() -> None:
    q, elsewhere = half(1, 3, 2, 8), torch.zeros(1, 3, 2, 8, dtype=torch.float16, device="meta")
    with pytest.raises(ValueError, match="k: on meta, q is on cpu"):
        fastattn.attention(q, elsewhere, q, backend="volta")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_without_unit_stride_is_refused(name: str) -> None:
    caches = {n: half(2, 4, 2, 8) for n in ("k_cache", "v_cache")}
    caches[name] = half(2, 4, 2, 16)[..., ::2]
    new, slots = half(1, 2, 8), torch.tensor([0])
    with pytest.raises(ValueError, match=f"{name}: stride 2 in the last dimension, expected 1"):
        ops.append_kv(*caches.values(), new, new, slots, backend="volta")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("slots", [[0, 8], [1 << 40, 0]])
def test_a_slot_past_the_cache_is_refused_and_nothing_written(slots: list[int]) -> None:
    cache, new = torch.zeros(2, 4, 2, 8).half(), half(2, 2, 8)
    with pytest.raises(ValueError, match=r"slots: values 0\.\.\d+, expected .*\.\.7"):
        ops.append_kv(cache, cache, new, new, torch.tensor(slots), backend="volta")
    assert not cache.any()


@pytest.mark.usefixtures("emulated")
def test_positions_and_ids_outside_are_refused() -> None:
    calls = _calls(torch.float16)
    outside = torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"positions: values 0\.\.9, expected 0\.\.8"):
        dispatch.run("rotary", calls["rotary"]._replace(positions=outside), "volta")
    with pytest.raises(ValueError, match=r"ids: values 0\.\.9, expected 0\.\.7"):
        dispatch.run("embedding", calls["embedding"]._replace(ids=outside), "volta")


@pytest.mark.toolchain
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("shift", [1, 3, 4])
def test_misaligned_tensors_are_read_right(rows: int, shift: int) -> None:
    """Rows that begin between 16-byte boundaries: another kernel reads them, none faults."""

    def misaligned(*shape: int) -> torch.Tensor:
        n = torch.Size(shape).numel()
        return half(n + shift)[shift:].view(shape)

    q, k, v = misaligned(1, rows, 2, 64), misaligned(1, 50, 1, 64), misaligned(1, 50, 1, 64)
    assert q.data_ptr() % 16
    expected = fastattn.attention(q, k, v, causal=True, backend="reference")
    out = fastattn.attention(q, k, v, causal=True, backend="volta")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)
