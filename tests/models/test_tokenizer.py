"""Tokenizers out of GGUF files and Hugging Face directories, detokenizing streams, chat templates."""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex

from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.gguf_tokenizer import build_tokenizer
from fastattn.models.tokenizer import Tokenizer
from fastattn.spec import CheckpointError
from tests.models.builders import SPECIALS
from tests.models.vocabularies import TEXTS, built, byte_level_fields, config_of, sentencepiece_fields


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_checkpoint("smollm2").tokenizer()


@pytest.fixture(scope="session")
def smollm2_of_transformers() -> Any:
    import transformers

    path = Path(open_checkpoint("smollm2").path)
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_of_transformers: Any) -> None:
    theirs = smollm2_of_transformers
    for text in TEXTS:
        ids = smollm2.encode(text)
        assert ids == theirs.encode(text), text
        assert smollm2.decode(ids, skip_special=False) == text
        assert smollm2.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why? é"}]
    for wanted in (True, False):
        prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=wanted)
        assert smollm2.chat(messages, wanted) == prompt
    assert (smollm2.bos_id, smollm2.eos_ids, smollm2.begin) == (1, (2,), [])


# -------------------------------------------------------------------- byte-level BPE against plain Python
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
UP, LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = rf"{START}{UP}*{LOW}+|{START}{UP}+{LOW}*|\p{{N}}" + TAIL.replace(r"[\r\n]*", r"[\r\n/]*", 1)
PRES = {
    "gpt-2": [GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "llama3": [LLAMA3],
    "qwen2": [QWEN2],
    "deepseek-r1-qwen": [QWEN2],
    "tekken": [TEKKEN],
}


def cut(text: str, pattern: str) -> list[str]:
    """The matches of a pattern and what lies between them."""
    pieces, at = [], 0
    for match in regex.finditer(pattern, text):
        pieces += [text[at : match.start()], match.group()]
        at = match.end()
    return [p for p in [*pieces, text[at:]] if p]


def byte_letters() -> dict[int, str]:
    """GPT-2's letter of each byte: itself where it prints, a letter past 255 where it does not."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printing]
    return {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(others)}


def bpe(word: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int], whole: bool) -> list[int]:
    letters = byte_letters()
    parts = [letters[b] for b in word.encode()]
    if whole and "".join(parts) in vocab:
        return [vocab["".join(parts)]]
    while len(parts) > 1:
        rank, i = min((ranks.get((a, b), 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts)))
        if rank == 1 << 30:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [vocab[p] for p in parts]


@pytest.mark.parametrize("pre", PRES, ids=PRES)
def test_byte_level_equals_plain_python(pre: str) -> None:
    fields = byte_level_fields(pre)
    tokenizer = built(fields)
    vocab = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"])}
    for text in [*TEXTS[1:], "The  lazy dog  12  345 , x\u00b2 ½ ٣٤", "HELLO World's END'S /\n\n a/b"]:
        if any(s in text for s in SPECIALS):
            continue
        # Qwen's own tokenizer composes characters first.
        pieces = [unicodedata.normalize("NFC", text) if pre == "qwen2" else text]
        for pattern in PRES[pre]:
            pieces = [p for piece in pieces for p in cut(piece, pattern)]
        whole = pre in ("llama-bpe", "llama3", "tekken")
        expected = [i for piece in pieces for i in bpe(piece, vocab, ranks, whole)]  # type: ignore[arg-type]
        assert tokenizer.encode(text, add_special=False) == expected, text
        assert tokenizer.encode(text) == ([0] if whole else []) + expected


def test_pre_tokenizer_without_a_name_is_default() -> None:
    text = "one1234two, three++"
    assert built(byte_level_fields(None)).encode(text) == built(byte_level_fields("default")).encode(text)


# ------------------------------------------------------------------------ SentencePiece against plain Python
def sentencepiece(text: str, fields: dict[str, Any], prefix: bool = True) -> list[int]:
    """SentencePiece's own procedure: join the neighbours whose union has the best score, leftmost first."""
    vocab = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = fields["tokenizer.ggml.scores"]
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        joined = [
            (-scores[vocab[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in vocab
        ]
        if not joined:
            break
        i = min(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for p in parts for i in ([vocab[p]] if p in vocab else [3 + b for b in p.encode()])]


SENTENCES = [
    "the quick brown fox",
    " the  the",
    "then, in thé 9 owls\n",
    "日本 the",
    "wn" * 40,
    "quick▁brown",
]


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "plain"])
def test_sentencepiece_equals_plain_python(prefix: bool) -> None:
    fields = sentencepiece_fields(add_space_prefix=prefix)
    tokenizer = built(fields, bos_id=1)
    for text in SENTENCES:
        expected = sentencepiece(text, fields, prefix)
        assert tokenizer.encode(text, add_special=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode([1, *expected]) == text.replace("▁", " ")
    tool = fields["tokenizer.ggml.tokens"].index("<tool>")
    assert tool in tokenizer.encode("the <tool> fox")
    assert "<tool>" in tokenizer.decode([tool])


def test_begin_and_end_tokens() -> None:
    fields = byte_level_fields()
    plain = built(fields).encode("the dog")
    for bos in (True, False):
        for eos in (True, False):
            flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
            tokenizer = built({**fields, **flags})
            assert tokenizer.encode("the dog") == [0] * bos + plain + [2] * eos
            assert tokenizer.encode("the dog", add_special=False) == plain
            # A chat template has written it already.
            assert tokenizer.encode(SPECIALS[0] + "the dog") == [0] + plain + [2] * eos
            # Nor is one lost of those that the text has.
            assert tokenizer.encode(SPECIALS[0] * 2 + "the dog") == [0, 0] + plain + [2] * eos
            assert tokenizer.encode(SPECIALS[0] * 2, add_special=False) == [0, 0]
            assert tokenizer.begin == [0] * bos


def test_a_token_that_begins_a_text_also_ends_it() -> None:
    fields = {**byte_level_fields(), "tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": 0}
    tokenizer = built(fields, eos_ids=(0,))
    assert tokenizer.begin == []
    assert tokenizer.encode(SPECIALS[0]) == [0, 0]


def test_padding_that_is_no_token() -> None:
    fields = {**byte_level_fields(), "tokenizer.ggml.padding_token_id": 0xFFFFFFFF}
    assert built(fields).encode("the dog") == built(byte_level_fields()).encode("the dog")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"tokenizer.ggml.model": "wordpiece"}, r"ggml.model: is 'wordpiece'"),
    "pre": ({"tokenizer.ggml.pre": "klingon"}, r"ggml.pre: is 'klingon', supported are"),
    "tokens": ({"tokenizer.ggml.tokens": None}, r"ggml.tokens: is missing"),
    "twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, r"ggml.tokens: has the same token twice"),
    "types": ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, r"token_type: is not an array of 340"),
    "merges": ({"tokenizer.ggml.merges": ["a b c"]}, r"ggml.merges: has the line 'a b c'"),
    "unknown": ({"tokenizer.ggml.merges": ["the the"]}, r"ggml.merges: the merges do not fit"),
    "unknown part": ({"tokenizer.ggml.merges": ["the qqqq"]}, r"has the line 'the qqqq', which is not"),
    "eos": ({"tokenizer.ggml.eos_token_id": 340}, r"eos_token_id: is 340, expected token ids from 0 to 339"),
    "flag": ({"tokenizer.ggml.add_bos_token": 1}, r"add_bos_token: is 1, expected true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED)
def test_refused_byte_level(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason):
        built({**byte_level_fields(), **changes})


def test_refused_sentencepiece() -> None:
    fields = sentencepiece_fields()
    with pytest.raises(CheckpointError, match=r"ggml.scores: is not an array"):
        built({**fields, "tokenizer.ggml.scores": np.full(len(fields["tokenizer.ggml.tokens"]), np.nan)})
    long = sentencepiece_fields()
    long["tokenizer.ggml.tokens"][300] = "x" * 5000
    with pytest.raises(CheckpointError, match="token of 5000 characters"):
        built(long)
    with pytest.raises(CheckpointError, match="has 312 tokens, the model 10"):
        build_tokenizer(Path("m.gguf"), fields, config_of(10))
