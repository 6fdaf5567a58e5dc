"""The tokenizer of a Hugging Face directory: tokenizer.json and what describes its special tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..spec import CheckpointError
from .config import ModelConfig
from .fields import read_json
from .tokenizer import Tokenizer, panics

_FILE_LIMIT = 256 << 20  # bytes
_TEMPLATE_LIMIT = 4 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """Reads tokenizer.json; ids that tokenizer_config.json does not give come from the model's config."""
    path = directory / "tokenizer.json"
    if not path.exists():
        hint = "tokenizer.model alone is not supported; " if (directory / "tokenizer.model").exists() else ""
        raise CheckpointError(path, f"{hint}no such file: save the tokenizer with transformers to get it")
    import tokenizers

    if (size := path.stat().st_size) > _FILE_LIMIT:
        raise CheckpointError(path, f"has {size} bytes, expected at most {_FILE_LIMIT}")
    with panics(path, "is not a valid tokenizer"):
        core = tokenizers.Tokenizer.from_file(str(path))
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).exists():
            settings |= read_json(directory / name, _FILE_LIMIT)
    texts = {key: text for key in _SPECIAL if (text := _token_text(settings.get(key))) is not None}
    with panics(directory, "names special tokens that are not Unicode"):
        ids = {key: core.token_to_id(text) for key, text in texts.items()}
    eos = ids.get("eos_token")
    return Tokenizer(
        path,
        core,
        # A null says that there is none.
        bos_id=ids.get("bos_token") if "bos_token" in settings else config.bos_id,
        eos_ids=config.eos_ids if eos is None or eos in config.eos_ids else (*config.eos_ids, eos),
        special_tokens=texts,
        chat_template=_chat_template(directory, settings),
    )


def _token_text(value: Any) -> str | None:
    """A special token is written as its text or as an object with the text as "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            if file.stat().st_size > _TEMPLATE_LIMIT:
                raise CheckpointError(file, f"is larger than {_TEMPLATE_LIMIT} bytes")
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(file, f"cannot be read: {error}") from error
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
