"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

Two models exist for our families: "gpt2", byte-level BPE with a list of merges and a pre-tokenizer that is
only named (``tokenizer.ggml.pre``), and "llama", SentencePiece's BPE, whose merges follow from its scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .config import ModelConfig, pad_id
from .fields import Fields
from .gguf_header import Strings
from .tokenizer import Tokenizer, panics

if TYPE_CHECKING:
    import tokenizers

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_MAX_PIECE = 256  # characters of a SentencePiece token; its own trainer's default limit is 16
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


class _Pre(NamedTuple):
    """How text is cut before merging, as the model's own tokenizer.json has it."""

    patterns: tuple[str, ...]  # applied one after the other to the pieces
    whole_words: bool = False  # a piece that is a token is not merged together (ignore_merges)
    add_bos: bool = False  # where the file does not say
    nfc: bool = False


# Published definitions: each model's tokenizer.json; llama.cpp's src/llama-vocab.cpp for names and "default".
_LLAMA3 = _Pre((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), whole_words=True, add_bos=True)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRES = {
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Pre((_GPT2,)),
    "smollm": _Pre((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Pre((rf"{_WORDS}|\p{{N}}|{_REST}",), nfc=True),
    "deepseek-r1-qwen": _Pre((rf"{_WORDS}|\p{{N}}|{_REST}",)),
    "tekken": _Pre((_TEKKEN,), whole_words=True, add_bos=True),
}


def build_tokenizer(path: Path, fields: Mapping[str, Any], config: ModelConfig) -> Tokenizer:
    """The tokenizer of the ``tokenizer.*`` fields; `CheckpointError` where they cannot be followed."""
    f = Fields(path, fields)
    kind = f.string("tokenizer.ggml.model")
    tokens = list(_strings(f, "tokenizer.ggml.tokens"))
    if not tokens or len(tokens) > config.vocab_size:
        f.fail("tokenizer.ggml.tokens", f"has {len(tokens)} tokens, the model {config.vocab_size}")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        f.fail("tokenizer.ggml.tokens", "has the same token twice")
    types = _types(f, len(tokens))
    if kind == "gpt2":
        core, add_bos = _byte_level(f, tokens, vocab)
    elif kind == "llama":
        core, add_bos = _sentencepiece(f, tokens, vocab, types), True
    else:
        f.fail("tokenizer.ggml.model", f"is {kind[:40]!r}, supported are gpt2 and llama")
    _add_special_tokens(path, core, tokens, types)
    texts = _special_texts(f, tokens)
    _surround(
        f,
        core,
        tokens[config.bos_id]
        if f.flag("tokenizer.ggml.add_bos_token", add_bos) and config.bos_id is not None
        else None,
        texts.get("eos_token") if f.flag("tokenizer.ggml.add_eos_token", False) else None,
    )
    return Tokenizer(
        path,
        core,
        bos_id=config.bos_id,
        eos_ids=config.eos_ids,
        special_tokens=texts,
        chat_template=f.string("tokenizer.chat_template", None),
    )


def _strings(f: Fields, key: str) -> Strings | list[str]:
    value = f.values.get(key)
    if not isinstance(value, Strings | list):
        f.fail(key, "is missing or not an array of strings")
    return value


def _types(f: Fields, count: int) -> np.ndarray:
    value = f.values.get("tokenizer.ggml.token_type")
    if value is None:
        return np.ones(count, np.int32)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != count:
        f.fail("tokenizer.ggml.token_type", f"is not an array of {count} integers")
    return value


def _byte_level(f: Fields, tokens: list[str], vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether its texts begin with a bos token by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = f.string("tokenizer.ggml.pre", "default")
    if name not in _PRES:
        f.fail("tokenizer.ggml.pre", f"is {name[:40]!r}, supported are {', '.join(_PRES)}")
    pre = _PRES[name]
    merges = []
    for line in _strings(f, "tokenizer.ggml.merges"):
        # The parts are tokens, in which a space is written as another character: one space separates them.
        left, separator, right = line.partition(" ")
        if not (left and separator and right) or " " in right:
            f.fail("tokenizer.ggml.merges", f"has the line {line[:40]!r}, expected two tokens")
        if left not in vocab or right not in vocab:
            f.fail("tokenizer.ggml.merges", f"has the line {line[:40]!r}, which is not of tokens")
        merges.append((tokens[vocab[left]], tokens[vocab[right]]))  # not one more copy of each text
    with panics(f.path, "the merges do not fit the tokens", "tokenizer.ggml.merges"):
        core = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    if pre.nfc:
        core.normalizer = normalizers.NFC()
    return core, pre.add_bos


def _sentencepiece(
    f: Fields, tokens: list[str], vocab: dict[str, int], types: np.ndarray
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with byte fallback: the pair whose union scores highest merges first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = f.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.isfinite(scores).all():
        f.fail("tokenizer.ggml.scores", f"is not an array of {len(tokens)} finite numbers")
    special = np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))
    merges: list[tuple[str, str]] = []
    for i in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        token = tokens[i]
        if special[i] or len(token) < 2:
            continue
        if len(token) > _MAX_PIECE:
            f.fail(
                "tokenizer.ggml.tokens",
                f"has a token of {len(token)} characters, expected at most {_MAX_PIECE}",
            )
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        merges.extend(sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
    unknown = np.flatnonzero(types == _UNKNOWN)
    with panics(f.path, "the tokens do not make a vocabulary", "tokenizer.ggml.tokens"):
        core = Tokenizer(
            models.BPE(
                vocab=vocab,
                merges=merges,
                unk_token=tokens[unknown[0]] if len(unknown) else None,
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    prefix = f.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return core


def _add_special_tokens(path: Path, core: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray) -> None:
    """Control tokens and the user's own are found in a text before all else; only the former are hidden."""
    from tokenizers import AddedToken

    with panics(path, "the special tokens cannot be added", "tokenizer.ggml.token_type"):
        for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
            found = [tokens[i] for i in np.flatnonzero(types == kind)]
            added = [AddedToken(text, normalized=False, special=special) for text in found if text]
            (core.add_special_tokens if special else core.add_tokens)(added)


def _special_texts(f: Fields, tokens: list[str]) -> dict[str, str]:
    """The texts of the tokens that chat templates name."""
    texts = {}
    for name, key, read in (
        ("bos", "bos", Fields.token_id),
        ("eos", "eos", Fields.token_id),
        ("unk", "unknown", Fields.token_id),
        ("pad", "padding", pad_id),
    ):
        token = read(f, f"tokenizer.ggml.{key}_token_id", len(tokens))
        if token is not None:
            texts[f"{name}_token"] = tokens[token]
    return texts


def _surround(f: Fields, core: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Puts a first and a last token around every text."""
    from tokenizers import processors

    around = [token for token in (bos, eos) if token is not None]
    if not around:
        return
    with panics(f.path, "the begin and end tokens cannot be used", "tokenizer.ggml.add_bos_token"):
        core.post_processor = processors.TemplateProcessing(
            single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
            special_tokens=[(token, core.token_to_id(token)) for token in dict.fromkeys(around)],
        )
