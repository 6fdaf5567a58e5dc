"""A cubin's functions as records of instructions, read from nvdisasm's listing and the encodings in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from cuda_volta.sass import tools

BYTES = 16  # of an instruction


class Control(NamedTuple):
    """What the compiler tells the issue logic, in bits 41..61 of an encoding's upper word.

    Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking" (2018), section 2.1.
    """

    stall: int  # cycles until the warp may issue its next instruction
    yields: bool  # a hint to prefer another warp next
    write_barrier: int | None  # scoreboard released when the result is written
    read_barrier: int | None  # scoreboard released when the operands have been read
    wait: int  # mask of the scoreboards to wait for
    reuse: int  # mask of the operand slots kept in the reuse cache

    @classmethod
    def decode(cls, upper: int) -> Control:
        """From the upper 64-bit word of an encoding."""
        bits = upper >> 41
        write, read = bits >> 5 & 7, bits >> 8 & 7
        return cls(
            stall=bits & 15,
            yields=not bits >> 4 & 1,
            write_barrier=None if write == 7 else write,
            read_barrier=None if read == 7 else read,
            wait=bits >> 11 & 63,
            reuse=bits >> 17 & 15,
        )


class Instruction(NamedTuple):
    """One instruction; ``opcode`` has its modifiers ("LDS.U.128"), ``guard`` is "", "P0" or "!P0"."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    control: Control
    target: int | None = None  # of a branch, or what a BSSY reconverges at

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """What follows the base, without the dots."""
        return tuple(self.opcode.split(".")[1:])


class Function(NamedTuple):
    """One kernel, in the order of its addresses, which begin at 0 and step by `BYTES`."""

    name: str
    instructions: tuple[Instruction, ...]
    registers: int  # of a thread
    shared_bytes: int  # static, of a block
    constants: bytes = b""  # bank 2: literals the compiler placed there


def read(cubin: Path | str) -> dict[str, Function]:
    """The functions of a cubin by mangled name. Raises ToolMissing; ValueError where nvdisasm refuses."""
    done = subprocess.run(
        [tools.find("nvdisasm"), "-hex", str(cubin)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"cubin: {str(cubin)!r}: {done.stderr.strip()}")
    return parse(done.stdout)


_SECTION = re.compile(r"\s*\.section\s+\"?([^\",\s]+)")
_REGISTERS = re.compile(r"\s*\.sectioninfo\s+@\"SHI_REGISTERS=(\d+)\"")
_LABEL = re.compile(r"([^\s/]\S*):$")
_FIRST = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_RELATIVE = re.compile(r"32@(lo|hi)\(\(\S+ \+ (\S+)@srel\)\)")
_GUARD = re.compile(r"@(!?U?P\w+)\s+(.*)", re.DOTALL)
_BYTES = re.compile(r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s*\.byte\s+(.*)")
_ZEROS = re.compile(r"\s*\.zero\s+(\d+)")


def parse(listing: str) -> dict[str, Function]:
    """The functions in the text that ``nvdisasm -hex`` prints."""
    code: dict[str, list[tuple[int, str, int]]] = {}
    labels: dict[str, dict[str, int]] = {}
    registers: dict[str, int] = {}
    shared: dict[str, int] = {}
    constants: dict[str, bytearray] = {}
    section = function = ""
    waiting: list[str] = []
    pending = (0, "")
    for line in listing.splitlines():
        if found := _SECTION.match(line):
            section = found[1]
            function = section.removeprefix(".text.") if section.startswith(".text.") else ""
            if function:
                code[function], labels[function], waiting = [], {}, []
        elif function:
            if found := _LABEL.match(line):
                waiting.append(found[1])
            elif found := _FIRST.match(line):
                pending = int(found[1], 16), found[2].strip()
                labels[function].update(dict.fromkeys(waiting, pending[0]))
                waiting = []
            elif found := _SECOND.match(line):
                code[function].append((*pending, int(found[1], 16)))
            elif found := _REGISTERS.match(line):
                registers[function] = int(found[1])
        elif section.startswith(".nv.shared.") and (found := _ZEROS.match(line)):
            name = section.removeprefix(".nv.shared.")
            shared[name] = shared.get(name, 0) + int(found[1])
        elif section.startswith(".nv.constant2.") and (found := _BYTES.match(line)):
            data = constants.setdefault(section.removeprefix(".nv.constant2."), bytearray())
            data += bytes(int(byte, 16) for byte in found[1].split(","))
    return {
        name: Function(
            name, tuple(_instruction(*item, labels[name]) for item in items), registers.get(name, 0),
            shared.get(name, 0), bytes(constants.get(name, b"")),
        )
        for name, items in code.items()
    }  # fmt: skip


def _instruction(address: int, text: str, upper: int, labels: dict[str, int]) -> Instruction:
    guard, text = "", _RELATIVE.sub(lambda found: _literal(found, labels), text)
    if found := _GUARD.fullmatch(text):
        guard, text = found[1], found[2]
    opcode, _, rest = text.strip().partition(" ")
    operands = tuple(item.strip() for item in rest.split(",")) if rest.strip() else ()
    named = re.search(r"`\((\S+)\)", rest)
    # A return's target is the address in its register; the listing names only the function.
    target = labels.get(named[1]) if named and not opcode.startswith("RET") else None
    return Instruction(address, guard, opcode, operands, Control.decode(upper), target)


def _literal(found: re.Match[str], labels: dict[str, int]) -> str:
    """A label's address where the listing writes "32@lo((kernel + label@srel))"; above 32 bits it is 0."""
    return hex(labels.get(found[2], 0) if found[1] == "lo" else 0)
