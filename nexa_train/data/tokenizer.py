"""A model folder's tokenizer and chat template, without transformers: starts in milliseconds, needs no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from nexa_train.errors import ConfigError, DataError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class ChatTokenizer:
    """Text -> ids with character offsets, messages -> text.

    Attributes:
        folder: where it was read from.
        fast: the tokenizers object; special tokens are added by the template, never by it.
        template: Jinja source of the chat template; None: the model has none.
        eos: the token that ends a turn or a text; bos: the one that begins a text, if any.
    """

    folder: Path
    fast: FastTokenizer
    template: str | None
    eos: str
    bos: str | None

    @property
    def eos_id(self) -> int:
        """Id of `eos`."""
        found = self.fast.token_to_id(self.eos)
        assert found is not None  # noqa: S101 - checked when the tokenizer was loaded
        return found

    @property
    def bos_id(self) -> int | None:
        """Id of `bos`, None where there is none."""
        return None if self.bos is None else self.fast.token_to_id(self.bos)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the files that decide what ids a text gets."""
        sha = hashlib.sha256()
        for name in FILES:
            if (path := self.folder / name).is_file():
                sha.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return sha.hexdigest()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # As Hugging Face renders them: sandboxed, blocks trimmed, `raise_exception` for refusals.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        return environment.from_string(self.template or "")

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> str:
        """Messages -> the text that the model sees.

        Raises:
            DataError: the template refuses these messages.
        """
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                eos_token=self.eos,
                bos_token=self.bos or "",
            )
        except jinja2.TemplateError as exc:
            raise DataError(f"the chat template refuses it: {exc}") from exc


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a model folder.

    Raises:
        ConfigError: a file is missing or names no end token.
    """
    try:
        fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the Rust library raises plain Exception
        raise ConfigError(f"model: {folder / 'tokenizer.json'} cannot be read: {exc}") from exc
    config = _json(folder / "tokenizer_config.json")
    eos = _token(config.get("eos_token"))
    if eos is None or fast.token_to_id(eos) is None:
        raise ConfigError(f"model: {folder / 'tokenizer_config.json'} names no eos_token that the tokenizer knows")
    # Long texts are cut by us, where it is counted, never by the tokenizer.
    fast.no_truncation()
    fast.no_padding()
    return ChatTokenizer(folder, fast, _template(folder, config), eos, _token(config.get("bos_token")))


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as exc:
        raise ConfigError(f"model: {path} is not valid JSON: {exc}") from exc


def _token(value: Any) -> str | None:
    found: str | None = value["content"] if isinstance(value, dict) else value
    return found


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template: Any = config.get("chat_template")
    if isinstance(template, list):  # Several named templates; the one for chat is called default.
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return None if template is None else str(template)
