"""Each rank touches its own slices of the file: counted by the kernel, in pages mapped while it loads."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn.models.checkpoint import open_checkpoint
from fastattn.parallel import shard
from fastattn.quant import packed
from tests.models.builders import hf_model, save_gguf, save_hf

WORLD = 4
WINDOW = 64 << 10  # bytes that Linux maps around a page that is touched
SIZES = {"hidden_size": 32, "intermediate_size": 131072, "num_hidden_layers": 1, "tie_word_embeddings": True}
MEMORY = Path("/dev/shm")  # noqa: S108 - a disk's cache would map larger pieces than WINDOW

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="needs Linux's /dev/shm")


def mapped(file: Path) -> int:
    """Bytes of ``file`` that this process has mapped pages of."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@pytest.fixture(scope="module", params=["safetensors", "F32", "Q8_0"])
def model(request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path]]:
    """What to open, and the file with the weights."""
    folder = Path(tempfile.mkdtemp(dir=MEMORY))
    source = hf_model("llama", **SIZES)
    if request.param == "safetensors":
        yield save_hf(source, folder, tokenizer=False), folder / "model.safetensors"
    else:
        save_gguf(source, folder / "model.gguf", request.param)
        yield folder / "model.gguf", folder / "model.gguf"
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_a_rank_touches_its_part_of_a_matrix(
    model: tuple[Path, Path], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, file = model
    checkpoint = open_checkpoint(opened)
    mine = shard.plan(checkpoint.config, WORLD)[2]
    name, cut = {
        "rows": ("model.layers.0.mlp.up_proj.weight", shard.ffn_rows),
        "columns": ("model.layers.0.mlp.down_proj.weight", shard.ffn_columns),
    }[part]
    touched: list[int] = []
    check = packed.check
    # The last step of a load: the file is still mapped.
    monkeypatch.setattr(packed, "check", lambda w: touched.append(mapped(file)) or check(w))
    piece = checkpoint.load(name, cut(mine, checkpoint.config))
    held = sum(t.numel() * t.element_size() for t in piece.tensors.values())
    runs = 1 if part == "rows" else SIZES["hidden_size"]
    assert held <= touched[0] <= held + (runs + 1) * WINDOW
    # Quarter rows of Q8_0 are shorter than a window: there the bound says nothing, only the rows do.
    if part == "rows" or piece.format == "dense":
        assert touched[0] < WORLD * held / 2
    monkeypatch.undo()
    assert mapped(file) == 0, "nothing stays mapped"
