"""Tokenizers of Hugging Face directories, and chat templates."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastattn.models import chat as chat_module
from fastattn.models.checkpoint import open_checkpoint
from fastattn.spec import CheckpointError
from tests.models.builders import CHAT_TEMPLATE, SPECIALS, byte_level_tokenizer, hf_model, save_gguf, save_hf
from tests.models.vocabularies import TEXTS, built, byte_level_fields


# --------------------------------------------------------------------------------- Hugging Face directories
@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", num_hidden_layers=1), tmp_path_factory.mktemp("hf"))


def test_directory(directory: Path) -> None:
    tokenizer = open_checkpoint(directory).tokenizer()
    core = byte_level_tokenizer()
    for text in TEXTS:
        assert tokenizer.encode(text) == core.encode(text).ids
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.begin) == (0, (2,), [])
    assert tokenizer.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_same_tokenizer_from_gguf(directory: Path, tmp_path: Path) -> None:
    save_gguf(hf_model("llama", num_hidden_layers=1), tmp_path / "m.gguf")
    ours, theirs = open_checkpoint(tmp_path / "m.gguf").tokenizer(), open_checkpoint(directory).tokenizer()
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_templates_of_a_directory(directory: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(directory, tmp_path / "m"))
    messages = [{"role": "user", "content": "Hi"}]

    def write(template: Any) -> None:
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": {"content": SPECIALS[0]}, "chat_template": template})
        )

    write([{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}])
    assert open_checkpoint(folder).tokenizer().chat(messages) == "<|endoftext|>yes"
    (folder / "chat_template.jinja").write_text("from the file {{ messages[0].content }}")
    assert open_checkpoint(folder).tokenizer().chat(messages) == "from the file Hi"
    (folder / "chat_template.jinja").unlink()
    write(None)
    with pytest.raises(CheckpointError, match="has no chat template"):
        open_checkpoint(folder).tokenizer().chat(messages)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(folder).tokenizer()
    (folder / "tokenizer.model").write_bytes(b"sp")
    with pytest.raises(CheckpointError, match=r"tokenizer.model alone is not supported"):
        open_checkpoint(folder).tokenizer()


def test_padding_and_truncation_of_the_file_are_ignored(directory: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(directory, tmp_path / "m"))
    core = byte_level_tokenizer()
    core.enable_padding(length=1 << 40)
    core.enable_truncation(1)
    core.save(str(folder / "tokenizer.json"))
    assert (
        open_checkpoint(folder).tokenizer().encode("the dog") == byte_level_tokenizer().encode("the dog").ids
    )


def test_special_tokens_of_the_settings(directory: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(directory, tmp_path / "m"))

    def tokens(settings: dict[str, Any]) -> tuple[int | None, tuple[int, ...]]:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = open_checkpoint(folder).tokenizer()
        return tokenizer.bos_id, tokenizer.eos_ids

    assert tokens({}) == (0, (2,))  # config.json's
    assert tokens({"bos_token": None}) == (None, (2,))
    assert tokens({"bos_token": SPECIALS[1], "eos_token": SPECIALS[1]}) == (1, (2, 1))
    with pytest.raises(CheckpointError, match="special tokens that are not Unicode"):
        tokens({"bos_token": "\ud800"})


# ---------------------------------------------------------------------------------------- chat templates
def chat(template: str, messages: list[dict[str, Any]] | None = None) -> str:
    fields = {**byte_level_fields(), "tokenizer.chat_template": template}
    return built(fields).chat([{"role": "user", "content": "<é>"}] if messages is None else messages)


def test_template_environment() -> None:
    assert chat("{{ messages | tojson }}") == '[{"role": "user", "content": "<é>"}]'
    assert chat("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert chat("{{ strftime_now('%Y') }}").isdigit()
    assert chat("{% if tools is not none or documents is not none %}tools{% endif %}") == ""
    assert chat("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "a<é>b"
    assert chat("{% if true %}\n  {% if true %}\nx\n{% endif %}{% endif %}") == "x\n"  # trimmed blocks
    assert chat("{{ bos_token }}{{ eos_token }}{{ missing }}") == "<|endoftext|><|im_end|>"
    assert chat("{{ messages[0].content }}", [{"role": "user", "content": "😀\ud800"}]) == "😀\ud800"


def test_template_refuses_messages() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="messages: refused by the chat template: roles must alternate"):
        chat(template)
    for bad in ([{"content": "x"}], [{"role": "user"}], ["text"]):
        with pytest.raises(ValueError, match=r"messages\[0\]"):
            chat(CHAT_TEMPLATE, bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"messages\[0\].*expected JSON values"):
        chat(CHAT_TEMPLATE, [{"role": "user", "content": {1, 2}}])


@pytest.mark.parametrize(
    "template",
    ["{% for", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
     "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ messages[7].content }}", "{% include 'a' %}",
     "{{ range(10 ** 9) }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 1 | nothing }}",
     "{{ raise_exception() }}"],
    ids=["syntax", "zero", "subclasses", "mutate", "globals", "index", "include", "range", "recursion",
         "filter", "arguments"],
)  # fmt: skip
def test_broken_templates(template: str) -> None:
    with pytest.raises(CheckpointError, match="chat_template"):
        chat(template)


HUGE = {
    "times": "{{ 'a' * 10 ** 12 }}",
    "list": "{{ [messages] * 10 ** 12 }}",
    "ljust": "{{ ''.ljust(300000000) }}",
    "percent": "{{ '%300000000d' % 1 }}",
    "percent filter": "{{ '%300000000d' | format(1) }}",
    "format": "{{ '{:>300000000}'.format(1) }}",
    "center": "{{ 'a' | center(300000000) }}",
    "replace": "{% set a = 'a' * 30000 %}{{ a.replace('a', a) }}",
    "join": "{% set a = 'a' * 30000 %}{{ range(100000) | join(a) }}",
    "doubling": "{% set n = namespace(a='a') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "text": "{% for i in range(99999) %}{{ 'spam ' * 999 }}{% endfor %}",
    "power": "{{ 7 ** (7 ** (7 ** 7)) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("case", HUGE)
def test_hostile_templates(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end within the limits, and take nothing of this process."""
    monkeypatch.setattr(chat_module, "_SECONDS", 1)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="chat_template"):
        chat(HUGE[case])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < resident + 20_000  # KiB
