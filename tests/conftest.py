"""What every test starts from: the same seed, two threads, hypothesis without random seeds, and Ctrl-C."""

from __future__ import annotations

import signal

import hypothesis
import pytest
import torch

from .emulation import pytest_collection_modifyitems  # noqa: F401 (a hook)

# Derandomized: a failure on one machine is a failure on every machine.
hypothesis.settings.register_profile("fastattn", derandomize=True, deadline=None, print_blob=False)
hypothesis.settings.load_profile("fastattn")

# A shell's background job ignores Ctrl-C, and so would the programs that tests end by it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
