"""What kernels and their tiles need to know of a GPU."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Chip(NamedTuple):
    """A GPU, or one that kernels are compiled for without having it."""

    name: str
    capability: int  # 10 * major + minor: 90 is Hopper
    processors: int  # streaming multiprocessors
    shared_bytes: int  # that a block may have

    @property
    def tma(self) -> bool:
        """Whether it has the tensor memory accelerator, which Triton's descriptors need."""
        return self.capability >= 90

    @property
    def tensor_cores(self) -> bool:
        """Whether Triton compiles products for its tensor cores: since 3.3 not for Turing's."""
        return self.capability >= 80

    @property
    def warpgroups(self) -> bool:
        """Whether it has warpgroup MMA (wgmma), sm_90 alone."""
        return self.capability == 90


#: NVIDIA's data sheets, and the CUDA programming guide's table of compute capabilities for shared memory.
CHIPS = {
    "T4": Chip("T4", 75, 40, 64 << 10),
    "A100": Chip("A100", 80, 108, 163 << 10),
    "L40": Chip("L40", 89, 142, 99 << 10),
    "H100": Chip("H100", 90, 132, 227 << 10),
}
_SHARED_BYTES = {
    75: 64,
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}


@cache
def chip(device: torch.device) -> Chip:
    """Of the device that a call's tensors are on; for an interpreted call, an H100."""
    if device.type != "cuda":
        return CHIPS["H100"]
    facts = torch.cuda.get_device_properties(device)
    capability = 10 * facts.major + facts.minor
    shared = _SHARED_BYTES.get(capability, 64) << 10
    return Chip(facts.name, capability, facts.multi_processor_count, shared)
