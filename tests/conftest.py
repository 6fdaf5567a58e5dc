"""What every test starts from: the same seed, two threads, and hypothesis without random seeds."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from .emulation import pytest_collection_modifyitems  # noqa: F401 (a hook)

# Derandomized: a failure on one machine is a failure on every machine.
hypothesis.settings.register_profile("fastattn", derandomize=True, deadline=None, print_blob=False)
hypothesis.settings.load_profile("fastattn")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
