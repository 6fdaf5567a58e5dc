"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress
from typing import TYPE_CHECKING, Any

from ..spec import CheckpointError

if TYPE_CHECKING:
    import tokenizers

    from .chat import ChatTemplate

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are not (yet) UTF-8


class Tokenizer:
    """The tokenizer of a model, on top of a `tokenizers.Tokenizer`."""

    def __init__(
        self,
        path: object,
        core: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: tuple[int, ...],
        special_tokens: Mapping[str, str],
        chat_template: str | None,
    ) -> None:
        """``eos_ids``: that end a completion. ``special_tokens``: the texts that a chat template may name
        (bos_token, eos_token, ...).
        """
        self.path = path
        self.bos_id, self.eos_ids = bos_id, eos_ids
        self._core = core
        # A file may ask for padding to a billion tokens; neither belongs to encoding one text.
        core.no_padding()
        core.no_truncation()
        with panics(path, "the tokenizer failed to encode"):
            probe = core.encode("a")
        #: What it puts before a text.
        self.begin: list[int] = list(compress(probe.ids, accumulate(probe.special_tokens_mask, min)))
        self._special_tokens = dict(special_tokens)
        self._template_source = chat_template
        self._template: ChatTemplate | None = None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens written out in the text are recognized.

        ``add_special`` adds what the tokenizer puts around a text, such as a beginning-of-text token; it does
        not add that one to a text that, as those of chat templates often do, begins with it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: not Unicode, {error}") from error
        with panics(self.path, "the tokenizer failed to encode"):
            ids: list[int] = self._core.encode(text, add_special_tokens=add_special).ids
        doubled = add_special and self.begin[:1] == [self.bos_id] and ids[:2] == [self.bos_id] * 2
        return ids[1:] if doubled else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; ids beyond the vocabulary have none."""
        listed = [int(i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < 1 << 32:
            raise ValueError(f"ids: from {min(listed)} to {max(listed)}, expected token ids")
        with panics(self.path, "the tokenizer failed to decode"):
            text: str = self._core.decode(listed, skip_special_tokens=skip_special)
        return text

    def files(self) -> dict[str, str]:
        """Names and contents of the files of which `hf_tokenizer.read_tokenizer` makes the same one."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special_tokens,
            **({"chat_template": self._template_source} if self._template_source is not None else {}),
        }
        return {
            "tokenizer.json": self._core.to_str(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        }

    def stream(self, before: Sequence[int] = ()) -> Stream:
        """A detokenizer for ids that arrive one by one, after ``before``."""
        return Stream(self.decode, before)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation, by the model's own chat template.

        ``messages``: mappings with "role" and "content". Raises `CheckpointError` when the model has no
        template or a broken one, ValueError with the template's words when it refuses the messages.
        """
        if self._template is None:
            if self._template_source is None:
                raise CheckpointError(self.path, "has no chat template; give a plain prompt instead")
            from .chat import ChatTemplate

            self._template = ChatTemplate(self.path, self._template_source)
        return self._template.render(messages, add_generation_prompt, self._special_tokens)


class Stream:
    """Incremental detokenizer: the text that comes after ``before``, cut where characters are complete.

    A token may end inside a character, and a decoder may treat a token by the ones before it: SentencePiece's
    drops the space that begins a text. So the new text is the difference of two decodings that begin at the
    tokens of the last piece. Of bytes that are not UTF-8, SentencePiece's decoder makes U+FFFD of a whole run
    once it sees one that is not; here characters before that one have been given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = _end(decode, before)  # of the last piece, then those not given out yet
        self._given = len(self._ids)  # how many of them belong to the last piece

    def push(self, token: int) -> str:
        """The text that ``token`` completes, often "" within a character of several bytes."""
        self._ids.append(token)
        return self._next(final=False)

    def flush(self) -> str:
        """What is left at the end; bytes that never became a character come out as U+FFFD."""
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        before = self._decode(self._ids[: self._given])
        text = self._decode(self._ids)
        piece = text[len(before) :]
        if not piece or (piece.endswith(_INCOMPLETE) and not final):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return piece


def _end(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[int]:
    """A few ids at the end that are text of whole characters; all where none are."""
    count = 1
    while count < len(ids):
        text = decode(ids[-count:])
        if text and _INCOMPLETE not in text:
            return list(ids[-count:])
        count *= 2
    return list(ids)


@contextmanager
def panics(path: object, what: str, tensor: str = "") -> Iterator[None]:
    """Turns every failure of the `tokenizers` library, a Rust panic too, into a CheckpointError.

    The library raises plain Exception for bad files and pyo3's PanicException, a BaseException, for the rest.
    """
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(path, f"{what}: {str(error)[:300]}", tensor) from error
