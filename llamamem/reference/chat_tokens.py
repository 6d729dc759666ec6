"""Conversations as token ids, with a mark on what the model says: that is what it is trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from llamamem.errors import LlamamemError
from llamamem.reference import demo_tokenizer
from llamamem.reference.gguf_tokenizer import gguf_tokenizer


@dataclass(frozen=True)
class Tokens:
    """Ids, and for each whether the model says it."""

    ids: list[int]
    said: list[bool]


class ChatTokens:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        self._tokenizer = tokenizer
        self._template = environment.from_string(config["chat_template"])
        self._specials = {name: _content(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}

    @classmethod
    def of_demo(cls) -> ChatTokens:
        vocabulary = demo_tokenizer.vocabulary()
        tokenizer = Tokenizer.from_str(json.dumps(demo_tokenizer.tokenizer_json(vocabulary)))
        return cls(tokenizer, demo_tokenizer.tokenizer_config())

    @classmethod
    def read(cls, folder: Path) -> ChatTokens:
        """The tokenizer of a model's directory (tokenizer.json, tokenizer_config.json, maybe chat_template.jinja).

        Or of a base GGUF.
        """
        if folder.is_file():
            tokenizer, config = gguf_tokenizer(folder)
            if not isinstance(config["chat_template"], str):
                raise LlamamemError(f"{folder}: has no chat template; give its Hugging Face form with one")
            return cls(tokenizer, config)
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text())
            if (template := folder / "chat_template.jinja").is_file():
                config["chat_template"] = template.read_text()
        except Exception as e:  # the tokenizers package raises nothing narrower
            raise LlamamemError(f"{folder}: no tokenizer can be read there ({e})") from None
        if not isinstance(config.get("chat_template"), str):
            raise LlamamemError(f"{folder}: its tokenizer has no chat template; add chat_template.jinja")
        return cls(tokenizer, config)

    def render(self, messages: Sequence[dict[str, str]], *, reply: bool = False) -> str:
        """The conversation as text; with `reply` up to where the model is to speak."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=reply, **self._specials)
        except jinja2.TemplateError as e:
            raise LlamamemError(f"the chat template refuses the conversation: {e}") from None

    def encode(self, messages: Sequence[dict[str, str]]) -> Tokens:
        """The conversation with what the assistant says marked, up to and with the token that ends its turn."""
        whole = self.render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = len(self.render(messages[:i], reply=True)), len(self.render(messages[: i + 1]))
                spans.append((start, end))
        encoded = self._tokenizer.encode(whole, add_special_tokens=False)
        ids: list[int] = encoded.ids
        said = [False] * len(ids)
        position = 0
        for start, end in spans:
            last = None
            while position < len(ids) and encoded.offsets[position][0] < end:
                if encoded.offsets[position][0] >= start:
                    said[position], last = True, position
                position += 1
            # a template ends a turn with a line break that nobody generates
            while last is not None and not whole[slice(*encoded.offsets[last])].strip():
                said[last] = False
                last -= 1
        return Tokens(ids, said)

    def ids(self, text: str) -> list[int]:
        """Ids of a text, with nothing added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def id(self, token: str) -> int | None:
        """Id of one token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token or "")


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
