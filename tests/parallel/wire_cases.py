"""What travels between 8 ranks, counted. Run by test_ranks.py; see run.py."""

from __future__ import annotations

import pytest
import torch

from fastattn.collectives import exchange
from fastattn.collectives.compressed import Compressed
from fastattn.quant.codec import Codec
from fastattn.spec import Epilogue, Stream, TPGroup
from tests.parallel.policy_cases import HIDDEN, POINT, Given, bytes_counted_are_the_formulas
from tests.parallel.run import Case, run


def two_steps_send_less_than_gathering_all(g: TPGroup) -> None:
    """arXiv 2411.09510 gathers every rank's codes; a reduce-scatter and a gather send 2/N of that."""
    sent = {}
    for scheme in ("one_step", "two_step"):
        policy = Compressed(codec=Codec(element="e2m1", block=32), scheme=scheme)
        partial = torch.randn(16 * g.world, HIDDEN, dtype=torch.bfloat16)
        exchange.traffic.clear()
        policy.start(POINT, Given(partial), Stream(partial, None), Epilogue(None, None), g).wait()
        sent[scheme] = exchange.traffic.bytes["send"]
    assert sent["one_step"] / sent["two_step"] == pytest.approx(g.world / 2)


CASES: tuple[Case, ...] = (bytes_counted_are_the_formulas, two_steps_send_less_than_gathering_all)

if __name__ == "__main__":
    run(CASES)
