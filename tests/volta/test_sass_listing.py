"""Machine code as records: against the disassembler's other output, and the tools that read it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cuda_volta.sass import listing, tools
from cuda_volta.sass.listing import Control

from .sass_code import compiled, needs_cuda_12

SOURCE = """
#include "primitives.cuh"
using namespace volta;
struct Params { const u32* x; u32* y; float* z; u32 n, divisor; };
extern "C" __global__ void __launch_bounds__(128) kernel(Params p) {
    __shared__ float held[128];
    float d[8] = {};
    const Word4 q = ldg128_stream(p.x + 4 * thread_index());
    mma_rc(d, Word2{q.x, q.y}, Word2{q.z, q.w});
    held[thread_index()] = d[0] * d[5];
    barrier();
    for (u32 i = thread_index() / p.divisor; i < p.n; i += 32)
        stg(p.z + i, held[i & 127] + exp2_approx(d[2]));
    if (thread_index() < p.n % p.divisor) stg(p.y + thread_index(), shuffle_xor(q.x, 5));
}
"""


def test_control_bits() -> None:
    # IADD3 ... of Jia et al. 2018, listing 2.1: the fields as that report reads them.
    fields = 0b0010 << 17 | 0b000101 << 11 | 7 << 8 | 2 << 5 | 1 << 4 | 6
    assert Control.decode(fields << 41 | 0x3FF) == Control(6, False, 2, None, 5, 2)
    assert Control.decode(0x000FCA00078E00FF) == Control(5, True, None, None, 0, 0)


LISTING = """
	.section	.text.one,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=40"
one:
.text.one:
        /*0000*/                   MOV R20, 32@lo((one + .L_x_1@srel)) ;   /* 0x0000a00000147802 */
                                                                           /* 0x000fe40000000f00 */
.L_x_0:
        /*0010*/              @!P0 BRA P1, `(.L_x_0) ;                     /* 0x0000000000000947 */
                                                                           /* 0x001fea0003800000 */
.L_x_1:
        /*0020*/                   CALL.REL.NOINC `($one$helper) ;         /* 0x0000000000000947 */
                                                                           /* 0x001fea0003800000 */
$one$helper:
        /*0030*/                   RET.REL.NODEC R20 `(one) ;              /* 0x0000000000000950 */
                                                                           /* 0x001fea0003800000 */
	.section	.nv.constant2.one,"a",@progbits
        /*0000*/ 	.byte	0x01, 0x02, 0xff
	.section	.nv.shared.one,"aw",@nobits
	.zero		512
"""


def test_listing_by_hand() -> None:
    (one,) = listing.parse(LISTING).values()
    assert (one.name, one.registers, one.shared_bytes, one.constants) == ("one", 40, 512, b"\x01\x02\xff")
    move, branch, call, back = one.instructions
    assert move.operands == ("R20", "0x20")
    assert (branch.guard, branch.opcode, branch.target) == ("!P0", "BRA", 0x10)
    assert branch.control.wait == 1
    assert call.target == 0x30
    assert back.target is None


@pytest.mark.toolchain
@needs_cuda_12
def test_records_equal_what_cuobjdump_prints(tmp_path: Path) -> None:
    cubin, function = compiled(tmp_path, SOURCE)
    said = subprocess.run(
        [tools.find("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    pattern = r"/\*([0-9a-f]{4})\*/\s+(?:@(!?P\w) +)?([A-Z]\S*)([^;]*);\s+/\*.*\*/\s+/\* (0x[0-9a-f]{16}) \*/"
    lines = re.findall(pattern, said)
    assert len(lines) == len(function.instructions) > 60
    for item, (address, guard, opcode, operands, upper) in zip(function.instructions, lines, strict=True):
        assert (item.address, item.guard, item.opcode) == (int(address, 16), guard, opcode)
        if item.target is not None:
            assert operands.split()[-1] == hex(item.target)
        else:
            assert "".join(item.operands).replace(" ", "") == operands.replace(",", "").replace(" ", "")
        bits = f"{int(upper, 16):064b}"[::-1]  # bit n is bits[n]
        value = {name: int(bits[a:b][::-1], 2) for name, a, b in (("stall", 41, 45), ("wait", 52, 58))}
        assert (item.control.stall, item.control.wait) == (value["stall"], value["wait"])
        assert item.control.yields == (bits[45] == "0")
        assert (item.control.write_barrier is None) == (bits[46:49] == "111")
        assert (item.control.read_barrier is None) == (bits[49:52] == "111")
    assert {i.base for i in function.instructions} >= {"HMMA", "MUFU", "SHFL", "BAR", "LDG", "STG", "STS"}
    assert function.shared_bytes == 512
    assert function.registers > 8


@pytest.mark.toolchain
@needs_cuda_12
def test_a_file_that_is_no_cubin(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not machine code")
    with pytest.raises(ValueError, match=r"cubin: .*text"):
        listing.read(tmp_path / "text")


@pytest.mark.parametrize(("release", "found"), [("12.8", True), ("13.0", False), (None, False)])
def test_tools_of_cuda_13_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str | None, found: bool
) -> None:
    tool = tmp_path / "nvdisasm"
    said = f"Cuda compilation tools, release {release}, V{release}.90" if release else "what?"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("NVDISASM", str(tool))
    tools.find.cache_clear()
    try:
        if found:
            assert tools.find("nvdisasm") == str(tool)
        else:
            known = "13" if release else "unknown"
            with pytest.raises(
                tools.ToolMissing, match=rf"CUDA 13 dropped; found {tool} \(release {known}\)"
            ):
                tools.find("nvdisasm")
    finally:
        tools.find.cache_clear()
