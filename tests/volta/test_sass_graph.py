"""Basic blocks and loops of code written by hand."""

from __future__ import annotations

from cuda_volta.sass import graph

from .sass_code import assemble


def test_straight_line_is_one_block() -> None:
    blocks = graph.blocks(assemble("MOV R0, R1", "IADD3 R0, R0, R1, RZ", "EXIT").instructions)
    assert blocks == [graph.Block(0, 2, ())]
    assert graph.loops(blocks) == []


def test_nested_loops() -> None:
    code = assemble(
        "MOV R0, RZ",
        "IADD3 R0, R0, 0x1, RZ",  # 1: outer header
        "FADD R1, R1, R1",  # 2: inner header
        "@P0 BRA 2",
        "@P2 BRA 6",
        "FMUL R2, R2, R2",
        "@P1 BRA 1",
        "EXIT",
    ).instructions
    blocks = graph.blocks(code)
    assert [(b.first, b.last) for b in blocks] == [(0, 0), (1, 1), (2, 3), (4, 4), (5, 5), (6, 6), (7, 7)]
    outer, inner = graph.loops(blocks)
    assert outer.instructions(blocks) == [1, 2, 3, 4, 5, 6]
    assert inner.instructions(blocks) == [2, 3]


def test_two_back_edges_to_one_header_are_one_loop() -> None:
    code = assemble("NOP", "NOP", "@P0 BRA 1", "NOP", "@P1 BRA 1", "EXIT").instructions
    blocks = graph.blocks(code)
    (loop,) = graph.loops(blocks)
    assert loop.instructions(blocks) == [1, 2, 3, 4]


def test_a_branch_with_a_second_condition_falls_through() -> None:
    blocks = graph.blocks(assemble("BRA P1, 2", "NOP", "EXIT").instructions)
    assert blocks[0].successors == (2, 1)
    assert graph.blocks(assemble("BRA 2", "NOP", "EXIT").instructions)[0].successors == (2,)


def test_the_endless_loop_that_pads_a_kernel_is_unreachable() -> None:
    blocks = graph.blocks(assemble("EXIT", "BRA 1", "NOP").instructions)
    assert [loop for loop in graph.loops(blocks) if 0 in loop.blocks] == []
