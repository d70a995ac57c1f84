"""A model folder's tokenizer and chat template, without transformers: starts in milliseconds, needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from nexa_train.errors import ConfigError, DataError, NexaError, is_for_good

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")

BEGIN, END = "\ufdd0", "\ufdd1"
"""Around what a template marks as the assistant's; code points that Unicode leaves to programs and out of texts."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CONTROL_TOKEN = re.compile(r"<\|[^\s|<>]+\|>|<(?:start|end)_of_\w+>")


@dataclass(frozen=True)
class ChatTokenizer:
    """Text -> ids with character offsets, messages -> text.

    Attributes:
        folder: where it was read from.
        fast: the tokenizers object; special tokens are added by the template, never by it.
        template: Jinja source of the chat template; None: the model has none.
        eos: the token that ends a turn or a text; bos: the one that a template may begin with, if any.
        begins: what this tokenizer puts before a plain text: `bos`, or nothing.
    """

    folder: Path
    fast: FastTokenizer
    template: str | None
    eos: str
    bos: str | None
    begins: str = ""

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
    def marks_turns(self) -> bool:
        """Whether the template says itself what the assistant speaks, by `{% generation %}`."""
        return _GENERATION.search(self.template or "") is not None

    @cached_property
    def unknown_tokens(self) -> list[str]:
        """What the template writes as control tokens and this tokenizer would cut in pieces, sorted."""
        written = set(_CONTROL_TOKEN.findall(self.template or ""))
        return sorted(token for token in written if self.fast.token_to_id(token) is None)

    def reads(self, name: str) -> bool:
        """Whether the template mentions a variable or a key of a message; one that it does not changes no text."""
        return re.search(rf"\b{re.escape(name)}\b", self.template or "") is not None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Messages -> the text that the model sees; with BEGIN and END in it where the template marks turns.

        Raises:
            DataError: the template refuses these messages.
        """
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            # As Template.render, but for copying the globals into each text's variables, which takes half its time.
            context = self._compiled.new_context({**self._globals, **given}, shared=True)
            return "".join(self._compiled.root_render_func(context))
        except NexaError:
            raise
        except Exception as exc:  # a template's own arithmetic may raise anything
            raise DataError(f"the chat template refuses it: {exc}") from exc

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        # As Hugging Face renders them: sandboxed, blocks trimmed, `raise_exception` for refusals. Without
        # `strftime_now`: templates that ask whether it is there take a fixed date, and bytes do not change overnight.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = _to_json
        return environment

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return self._environment.from_string(self.template or "")

    @cached_property
    def _globals(self) -> dict[str, Any]:
        return {**self._environment.globals, "eos_token": self.eos, "bos_token": self.bos or ""}


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers knows it: what is within, the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a model folder.

    Raises:
        ConfigError: a file is missing or names no end token.
        NexaError: its disk or server fails.
    """
    try:
        fast = FastTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except OSError as exc:
        kind = ConfigError if is_for_good(exc) else NexaError
        raise kind(f"model: {folder / 'tokenizer.json'} cannot be read: {exc.strerror}") from exc
    except Exception as exc:  # the Rust library raises plain Exception
        raise ConfigError(f"model: {folder / 'tokenizer.json'} cannot be read: {exc}") from exc
    path = folder / "tokenizer_config.json"
    config = read_object(path) if path.is_file() else {}
    eos = _token(config.get("eos_token"))
    if eos is None or fast.token_to_id(eos) is None:
        raise ConfigError(f"model: {path} names no eos_token that the tokenizer knows")
    fast = _without_tokens_beyond(fast, folder)
    # Long texts are cut by us, where it is counted, never by the tokenizer.
    fast.no_truncation()
    fast.no_padding()
    bos = _token(config.get("bos_token"))
    begins = bos if bos is not None and _puts_in_front(fast, bos) else ""
    return ChatTokenizer(folder, fast, _template(folder, config), eos, bos, begins)


def _puts_in_front(fast: FastTokenizer, bos: str) -> bool:
    """Whether texts begin with it; many models name a token that only their chat template writes.

    As transformers 5, which goes by tokenizer.json and ignores `add_bos_token` beside it.
    """
    try:
        return fast.encode("x").tokens[:1] == [bos]
    except Exception:  # noqa: BLE001 - the Rust library's, of one that lacks a token for what it does not know
        return False


def _without_tokens_beyond(fast: FastTokenizer, folder: Path) -> FastTokenizer:
    """Of added tokens those alone that the model embeds, for Gemma 3's text models: theirs knows one for images.

    Any other model with such tokens lacks the embeddings of what its texts are to hold.
    """
    path = folder / "config.json"
    model = read_object(path) if path.is_file() else {}
    known = model.get("vocab_size") if model.get("model_type") == "gemma3_text" else None
    if type(known) is not int or all(token < known for token in fast.get_added_tokens_decoder()):
        return fast
    content = json.loads(fast.to_str())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["id"] < known]
    return FastTokenizer.from_str(json.dumps(content))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def read_object(path: Path) -> dict[str, Any]:
    """A file of a model folder that holds one JSON object.

    Raises:
        ConfigError: it does not.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"model: {path} is not valid JSON: {exc}; fetch the model again") from exc
    if not isinstance(found, dict):
        raise ConfigError(f"model: {path} holds {type(found).__name__}, expected a JSON object")
    return found


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
