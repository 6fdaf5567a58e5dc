"""The table of tilings: its form, and that the model still prefers what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import volta_tilings
from cuda_volta import prefill, tilings
from cuda_volta.tilings import TILINGS, Tiling

from .sass_code import needs_cuda_12


def test_every_kernel_that_is_tuned_has_a_row() -> None:
    features = (prefill.PLAIN, prefill.SOFTCAP, prefill.ALIBI)
    assert set(TILINGS) == {(d, f) for d in prefill.HEAD_DIMS for f in features}
    for (head_dim, _), tiling in TILINGS.items():
        assert tiling in set(volta_tilings.candidates(head_dim))


def test_rows_are_replaced_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tilings.py"
    before = Path(tilings.__file__).read_text()
    file.write_text(before)
    monkeypatch.setattr(tilings, "__file__", str(file))
    volta_tilings.write({})
    assert file.read_text() == before
    volta_tilings.write({(64, 1): Tiling(0, 4, 0, 3)})
    changed = [line for line in file.read_text().splitlines() if line not in before.splitlines()]
    assert changed == ["    (64, 1): Tiling(0, 4, 0, 3),"]


@pytest.mark.slow
@pytest.mark.toolchain
@needs_cuda_12
def test_the_model_prefers_the_table_s_row() -> None:
    """Softcap at 64, where the instruction cache decides: against less and against more unrolled code."""
    row = TILINGS[64, prefill.SOFTCAP]
    speeds = {t: volta_tilings.lowest(64, prefill.SOFTCAP, t) for t in (row, row._replace(roll=0))}
    ours, unrolled = speeds.values()
    assert ours > unrolled
