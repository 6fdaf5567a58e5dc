"""The parameters of Volta's SM, each with its source; what no source gives is calibrated (docs/volta.md)."""

from __future__ import annotations

from typing import NamedTuple

SMS = 80  # of a V100
CLOCK_HZ = 1.53e9  # the highest of a V100 SXM2; 1.38e9: of the PCIe card
SHARED_BYTES = 96 * 1024  # of an SM, for blocks that opt in
REGISTERS = 64 * 1024
WARPS = 64
BLOCKS = 32
MACS_PER_CYCLE = 512  # of an SM's tensor cores


class Latency(NamedTuple):
    """Cycles from the start of an instruction's execution until its result may be used, by kind."""

    shared: int = 22  # 26.4 from issue to use (dependent LDS, 1Cat-vLLM's probe on a V100)
    shuffle: int = 20
    xu: int = 16
    global_load: int = 400  # calibrated; idle: 193 hit in L2 (Jia et al. 2018), 210 (1Cat-vLLM)
    local: int = 28  # hit in L1 (Jia et al.)
    constant: int = 24  # indexed constants
    special: int = 18  # S2R
    double: int = 8
    fixed: int = 6


class Machine(NamedTuple):
    """What the engine takes, in this order; engine.hpp explains each."""

    policy: int = 1  # Huerta et al. 2025, "Dissecting and Modeling the Architecture of Modern GPU Cores"
    mio_queue: int = 8
    global_queue: int = 8
    mio_interval: int = 1
    queue_latency: int = 4
    operand_latency: int = 6
    xu_blocks_queue: int = 1  # Nsight Compute counts special functions among the users of the MIO queue
    l2_sector: int = 1640  # 2155 GB/s of loads from L2 at 1.38 GHz over 80 SMs (Jia et al. 2018)
    memory_sector: int = 4700  # 830 GB/s, 92 % of HBM2's 900
    memory_latency: int = 180  # 375 in all, idle (Jia et al. 2018)
    miss_permille: int = 0  # of a launch: cache.py
    barrier_latency: int = 30  # calibrated
    branch_latency: int = 4
    launch_latency: int = 200
    l0_lines: int = 96  # 12 KiB (Jia et al. 2018) in lines of 128 bytes
    random_replacement: int = 0
    line_instructions: int = 8
    fetch_latency: int = 20  # calibrated, and the next two
    fetch_interval: int = 12
    prefetch_lines: int = 0
