"""The texts of a quantization: what Hessians come from, and what perplexity is measured on, apart from it."""

from __future__ import annotations

from typing import NamedTuple

from .config import ModelConfig
from .perplexity import chunks
from .tokenizer import Tokenizer

SAMPLES = 128  # of calibration, where the text has so many
EVAL_CHUNKS = 16
_HELD_OUT = 10  # one part in so many of the text, its end, is for evaluation


class Texts(NamedTuple):
    """Token ids of chunks."""

    calibration: list[list[int]]
    evaluation: list[list[int]]


def cut_texts(
    tokenizer: Tokenizer,
    config: ModelConfig,
    text: str,
    eval_text: str | None,
    samples: int | None,
    seqlen: int,
) -> Texts:
    """The chunks that `quantize` takes; its arguments. Raises ValueError that names the one at fault."""
    if not 4 <= seqlen <= config.context:
        raise ValueError(f"seqlen: {seqlen}, expected 4 to the model's context, {config.context}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples: {samples}, expected at least 1")
    if eval_text is None:
        end = len(text) - len(text) // _HELD_OUT
        text, eval_text = text[:end], text[end:]
    cut = []
    for name, part, wanted, most in (
        ("text", text, samples, SAMPLES),
        ("eval_text", eval_text, None, EVAL_CHUNKS),
    ):
        room = len(tokenizer.encode(part, add_special=False)) // (seqlen - len(tokenizer.begin))
        if room < (wanted or 1):
            raise ValueError(f"{name}: too short for {wanted or 1} sequences of {seqlen} tokens, has {room}")
        made = chunks(tokenizer, part, seqlen, wanted or min(room, most))
        if max(map(max, made)) >= config.vocab_size:
            raise ValueError(f"{name}: has tokens outside the model's vocabulary of {config.vocab_size}")
        cut.append(made)
    return Texts(*cut)
