from __future__ import annotations

from collections.abc import Mapping

import pytest

from fastattn.dispatch import op_table, unavailable
from fastattn.spec import Op


@pytest.fixture
def ops() -> Mapping[str, Op]:
    """The Triton backend's; in the process that only reports what the emulating one found, none."""
    return {} if unavailable("triton") else op_table("triton")
