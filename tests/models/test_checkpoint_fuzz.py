"""Damaged and hostile files: a CheckpointError soon, or a load where the damage is harmless; nothing else."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.models.checkpoint import open_checkpoint
from fastattn.spec import CheckpointError
from tests.models.builders import hf_model, save_gguf, save_hf
from tests.models.damage import cuts, flips, use


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    save_gguf(hf_model("llama", num_hidden_layers=1), path, "Q4_1")
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("qwen2", num_hidden_layers=1), tmp_path_factory.mktemp("hf"), shards=2)


def data_start(path: Path) -> int:
    from fastattn.models.gguf_header import read_header

    return min(t.offset for t in read_header(path).tensors.values())


def test_sound_files_load(gguf_file: Path, sharded: Path) -> None:
    assert use(gguf_file)
    assert use(sharded)


def test_gguf_cut_short(gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for data in cuts(gguf_file.read_bytes(), data_start(gguf_file), 60, seed=1):
        path.write_bytes(data)
        assert not use(path), f"loaded from its first {len(data)} bytes"


def test_gguf_bits_flipped(gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data, start = gguf_file.read_bytes(), data_start(gguf_file)
    # The key-values in front of the tokenizer, and the table of tensors, decide how the file is read.
    table = data.index(b"token_embd.weight") - 8
    for part in (data[: data.index(b"tokenizer.ggml.tokens")], data[:start]):
        for damaged in flips(data, len(part), 250, seed=len(part)):
            path.write_bytes(damaged)
            use(path)
    for damaged in flips(data[table:], start - table, 250, seed=3):
        path.write_bytes(data[:table] + damaged)
        use(path)


HUGE = struct.pack("<Q", (1 << 63) + 5)


@pytest.mark.parametrize("at", [8, 16, 24], ids=["tensors", "fields", "key"])
@pytest.mark.parametrize(
    "value", [HUGE, struct.pack("<Q", 1 << 33), b"\xff" * 8], ids=["2^63", "2^33", "max"]
)
def test_gguf_giant_counts(at: int, value: bytes, gguf_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    data = bytearray(gguf_file.read_bytes())
    data[at : at + 8] = value
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "0 bytes"), (b"GGUF" + b"\0" * 8, "12 bytes"), (b"GGML" + b"\0" * 30, "does not start with GGUF"),
     (b"GGUF\x01\0\0\0" + b"\0" * 30, "version 1"), (b"GGUF\0\0\0\x03" + b"\0" * 30, "big-endian"),
     (b"GGUF\x03\0\0\0" + b"\0" * 16, "general.architecture: is missing")],
    ids=["empty", "short", "magic", "version", "endian", "nothing"],
)  # fmt: skip
def test_gguf_headers(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "m.gguf")


FILES = {
    "config.json": 200,
    "generation_config.json": 40,
    "tokenizer.json": 120,
    "tokenizer_config.json": 120,
    "model.safetensors.index.json": 150,
    "model-00001-of-*.safetensors": 250,
}


@pytest.mark.parametrize("name", FILES, ids=FILES)
def test_directory_bits_flipped_and_cut(name: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    (file,) = folder.glob(name)
    data = file.read_bytes()
    upto = len(data)
    if file.suffix == ".safetensors":
        upto = 8 + struct.unpack("<Q", data[:8])[0]
    for damaged in flips(data, upto, FILES[name], seed=len(name)):
        file.write_bytes(damaged)
        use(folder)
    loads = 0
    for damaged in cuts(data, upto, 25, seed=5):
        file.write_bytes(damaged)
        loads += use(folder)
    assert loads == 0 or data[-1:] == b"\n", "a file cut short was loaded"


HEADERS = {
    "length": struct.pack("<Q", 1 << 62) + b"{}",
    "json": struct.pack("<Q", 4) + b"{{{{",
    "offsets": {"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 1 << 60]}},
    "negative": {"model.norm.weight": {"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]}},
    "shape": {"model.norm.weight": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 256]}},
    "overlap": {f"model.{n}.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]} for n in "ab"},
    "dtype": {"model.norm.weight": {"dtype": "OBJ", "shape": [64], "data_offsets": [0, 256]}},
}


@pytest.mark.parametrize("case", HEADERS, ids=HEADERS)
def test_safetensors_headers(case: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    head = HEADERS[case]
    if isinstance(head, dict):
        text = json.dumps(head).encode()
        head = struct.pack("<Q", len(text)) + text + b"\0" * 256
    (file,) = folder.glob("model-00001-of-*.safetensors")
    file.write_bytes(head)
    with pytest.raises(CheckpointError, match="model-00001-of-"):
        open_checkpoint(folder)


_CHILD = """
import resource, sys
from pathlib import Path
from tests.models.damage import cuts, flips, use
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for file in map(Path, sys.argv[1:]):
    data = file.read_bytes()
    for damaged in [*flips(data, len(data), 120, seed=9), *cuts(data, len(data), 12, seed=9)]:
        file.write_bytes(damaged)
        use(file if file.suffix == ".gguf" else file.parent)
    file.write_bytes(data)
    assert use(file if file.suffix == ".gguf" else file.parent)
print("survived")
"""


def test_no_crash_and_no_giant_allocation(gguf_file: Path, sharded: Path, tmp_path: Path) -> None:
    """In a process of its own that may take 1 GiB more than its imports: no signal, no MemoryError."""
    folder = Path(shutil.copytree(sharded, tmp_path / "m"))
    files = [shutil.copy(gguf_file, tmp_path / "m.gguf"), next(folder.glob("model-00001-of-*.safetensors"))]
    command = [sys.executable, "-c", _CHILD, *map(str, files), str(folder / "tokenizer.json")]
    child = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2]
    )
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stdout == "survived\n"
