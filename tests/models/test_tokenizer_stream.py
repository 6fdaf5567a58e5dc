"""Detokenizing tokens as they arrive."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.models.tokenizer import Stream, Tokenizer
from tests.models.vocabularies import built, byte_level_fields, sentencepiece_fields

BYTES = built(byte_level_fields())
PIECES = built(sentencepiece_fields(), bos_id=1)


def streamed(tokenizer: Tokenizer, ids: list[int], before: list[int] | None = None) -> list[str]:
    stream = tokenizer.stream(before or [])
    return [*(stream.push(i) for i in ids), stream.flush()]


@given(st.text(max_size=60))
@settings(max_examples=150)
def test_stream_gives_the_text(text: str) -> None:
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in p for p in pieces)


@given(st.lists(st.integers(0, 339), max_size=40))
@settings(max_examples=150)
def test_stream_of_any_bytes(ids: list[int]) -> None:
    """Tokens that are no valid UTF-8 together come out as the whole decodes."""
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


def test_stream_holds_back_half_characters() -> None:
    ids = BYTES.encode("é😀x")
    assert len(ids) == 7  # a token a byte
    assert streamed(BYTES, ids) == ["", "é", "", "", "", "😀", "x", ""]
    assert streamed(BYTES, ids[:4]) == ["", "é", "", "", "\ufffd"]


@given(st.text(max_size=40), st.integers(0, 40))
@settings(max_examples=150)
def test_stream_goes_on_after_other_text(text: str, at: int) -> None:
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer.encode(text)
        at = min(at, len(ids))
        before = tokenizer.decode(ids[:at])
        if "\ufffd" not in before:
            assert before + "".join(streamed(tokenizer, ids[at:], ids[:at])) == tokenizer.decode(ids)


def test_a_completion_keeps_its_first_space() -> None:
    prompt, whole = PIECES.encode("the quick"), PIECES.encode("the quick brown")
    assert whole[: len(prompt)] == prompt
    assert "".join(streamed(PIECES, whole[len(prompt) :], prompt)) == " brown"
    assert "".join(streamed(PIECES, PIECES.encode("the"), [1])) == "the"  # nothing was before
    # The tokens of a prompt of rare characters are bytes, and its last ones begin within a character.
    assert (
        "".join(streamed(PIECES, PIECES.encode("語", add_special=False)[1:], PIECES.encode("日本"))) == "語"
    )


def test_a_long_prompt_is_not_decoded_for_its_end() -> None:
    longest = 0

    def decode(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTES.decode(ids)

    Stream(decode, BYTES.encode("the dog sleeps, and then 😀" * 500))
    assert longest <= 8


def test_stream_costs_the_same_for_every_token() -> None:
    """A piece is decoded from the last one on, not from the beginning."""
    longest = 0

    def decode(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(chr(97 + i) for i in ids)

    stream = Stream(decode)
    text = "".join(stream.push(i % 26) for i in range(500)) + stream.flush()
    assert text == "".join(chr(97 + i % 26) for i in range(500))
    assert longest == 2


def test_ids_without_text() -> None:
    assert BYTES.decode([10_000]) == ""
    with pytest.raises(ValueError, match="ids: from -1"):
        BYTES.decode([3, -1])
    with pytest.raises(ValueError, match="text: not Unicode"):
        BYTES.encode("\ud800")
