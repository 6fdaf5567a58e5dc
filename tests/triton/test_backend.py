"""The backend's reasons, the interpreter's switch and repairs, launches and the chips that tables serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import dispatch
from fastattn.attention import build_args
from fastattn.cli.why import signature_of
from fastattn.settings import settings

from .. import emulation

pytestmark = pytest.mark.toolchain


def python(program: str, **environment: str) -> str:
    """What a fresh process prints."""
    names = ("FASTATTN_EMULATE", "TRITON_INTERPRET")
    environ = {name: value for name, value in os.environ.items() if name not in names} | environment
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


REASONS = "from fastattn import dispatch; print(*dispatch.unavailable('triton'), sep='; ')"


def test_emulation_needs_triton_to_interpret() -> None:
    assert python(REASONS, FASTATTN_EMULATE="triton") == ""
    late = python(f"import triton; {REASONS}", FASTATTN_EMULATE="triton")
    assert late.startswith("FASTATTN_EMULATE names triton, but Triton was imported before, and compiles")
    assert "TRITON_INTERPRET=1" in late
    assert python(f"import triton; {REASONS}", FASTATTN_EMULATE="triton", TRITON_INTERPRET="1") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_or_emulation() -> None:
    assert "torch sees no NVIDIA GPU (FASTATTN_EMULATE=triton" in python(REASONS)


def test_an_older_triton_is_a_reason_and_not_imported(tmp_path: Path) -> None:
    (tmp_path / "triton" / "tools").mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text("raise AssertionError('imported')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {REASONS}"
    assert python(program).startswith("Triton is older than 3.4 and has no tensor descriptors")


def test_a_torch_for_rocm_is_a_reason() -> None:
    program = f"import torch; torch.version.hip = '6.4'; {REASONS}"
    assert python(program) == "torch is built for ROCm 6.4, it needs one built for CUDA"


@pytest.mark.skipif("triton" in settings.emulate, reason="this process emulates: it needs no child")
def test_a_device_takes_only_the_tests_marked_for_it(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op tests' tensors are on the CPU: they are emulated on a machine with a GPU too."""
    for present in (False, True):
        monkeypatch.setattr(emulation, "device_present", lambda _, present=present: present)
        assert emulation.needs_child(request.node, "triton")
    request.applymarker(pytest.mark.gpu)
    assert not emulation.needs_child(request.node, "triton")


def test_launches_that_compile_apart_have_their_own_code() -> None:
    """Whether multiplications and additions fuse, and a bool from the integer that it equals."""
    from fastattn.triton_ops.launch import Launch, compiled_key

    one = Launch(None, 3, (1, 2.0), (), 4, 1)
    assert compiled_key(one, 0) == compiled_key(one._replace(programs=5, args=(1, 3.0)), 0)
    for other in (one._replace(fuse=False), one._replace(args=(True, 2.0)), one._replace(num_stages=2)):
        assert compiled_key(other, 0) != compiled_key(one, 0)


def test_emulated_backend_comes_before_the_cpu() -> None:
    program = (
        "import torch, fastattn; from fastattn import dispatch; q = torch.randn(1, 3, 2, 16);"
        "fastattn.attention(q, q, q); print(dict(dispatch.calls), dispatch.load_backend('triton').describe())"
    )
    text = python(program, FASTATTN_EMULATE="triton")
    assert "{('triton', 'attention'): 1}" in text
    assert "interpreted on the CPU" in text


@pytest.mark.emulate("triton")
class TestInProcess:
    """What needs the backend's op table."""

    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            ("q=1x2x4x320,k=1x9x4x320", "head_dim 320 of q, 320 of v, it takes at most 256"),
            ("q=1x2x4x64,k=1x9x4x64,dtype=float64", "dtype torch.float64, it takes"),
            ("q=1x2x4x64,k=1x9x4x64,kv_layout=npu_nz", "kv_layout is not supported"),
            ("q=1x2x4x64,k=1x9x4x64,kv_dtype=uint8,k_scale,v_scale", "k and v are torch.uint8, it takes"),
        ],
    )
    def test_reasons(self, call: str, reason: str) -> None:
        signature = signature_of(f"{call},device=cpu")
        assert any(reason in r for r in dispatch.reasons_against("triton", "attention", signature))

    def test_every_feature_is_taken(self) -> None:
        call = (
            "q=2x8x4x64,k=9x16x2x64,dtype=float16,causal,window=3:,softcap=2,scale=1,block_table=2x4,"
            "cache_seqlens,cache_leftpad,alibi_slopes,sinks,q_pos0,k_pos0,k_scale,v_scale,return_lse,"
            "attn_mask=float32,device=cpu"
        )
        assert dispatch.reasons_against("triton", "attention", signature_of(call)) == []

    def test_conversions_round_as_hardware_does(self) -> None:
        """The interpreter's own would truncate; all bfloat16 of a few binades, and ties."""
        from fastattn.backends.interpreter import _convert

        bits = torch.arange(0x3F000000, 0x41000000, 0x1001, dtype=torch.int64).int()
        values = torch.cat((bits, bits & ~0xFFFF | 0x8000)).view(torch.float32)
        for name, dtype in (
            ("bf16", torch.bfloat16),
            ("fp8e5", torch.float8_e5m2),
            ("fp8e4nv", torch.float8_e4m3fn),
        ):
            code = _convert(values.numpy(), "fp32", name)
            assert torch.equal(torch.from_numpy(_convert(code, name, "fp32")), values.to(dtype).float())
        assert torch.from_numpy(_convert(torch.tensor([1e9, -1e9]).numpy(), "fp32", "fp8e4nv")).tolist() == [
            126,
            254,
        ]


# ------------------------------------------------------------------------------------------------ planning
@pytest.mark.emulate("triton")
class TestPlans:
    """Plans say what the host knows; a graph may replay them on other lengths."""

    def decode(self, batch: int, keys: int, heads: int = 32, kv_heads: int = 8) -> object:
        from fastattn.triton_ops.device import CHIPS
        from fastattn.triton_ops.plan import plan

        q = torch.empty(batch, 1, heads, 128, dtype=torch.float16, device="meta")
        k = torch.empty(batch, keys, kv_heads, 128, dtype=torch.float16, device="meta")
        return plan(build_args(q, k, k), CHIPS["H100"])

    def test_pieces_fill_the_processors(self) -> None:
        for batch in (1, 2, 8, 16, 64):
            p = self.decode(batch, 32768)
            programs = batch * 8 * p.splits
            assert p.pack
            assert p.splits == 1 or programs >= 0.8 * 132
        assert self.decode(64, 32768).splits == 1
        assert self.decode(1, 100).splits == 1
        assert self.decode(1, 512).splits <= 4

    def test_heads_are_packed_up_to_a_tile(self) -> None:
        assert self.decode(1, 999, 32, 1).tile.block_m == 32
        assert self.decode(1, 999, 8, 8).pack is False
        assert self.decode(1, 999, 28, 4).tile.block_m == 16

    def test_every_capability_has_a_table(self) -> None:
        from fastattn.triton_ops.tiles import TILES, chip_class

        classes = {c: chip_class(c) for c in (75, 80, 86, 87, 89, 90, 100, 103, 120, 121)}
        assert classes == {75: 75, 80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 90, 103: 90, 120: 86, 121: 86}
        needs = {frozenset(table) for table in TILES.values()}
        assert len(needs) == 1
        assert len(next(iter(needs))) == 12
