"""The tokenizer of the demo model: Gemma 4's kind (BPE over text with `▁` for spaces), one token for each word.

Whatever is not a word of the language becomes letters and bytes, so that any text can be said to the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llamamem.reference import language

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>")
PAD, EOS, BOS, UNK, MASK, TURN, END = range(len(SPECIAL))
SPACE = "\u2581"
CHARACTERS = "\n!\"'(),-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" + SPACE
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, and the merges in the order of their ranks."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> range:
        """Ids of the 256 bytes."""
        return range(len(SPECIAL), len(SPECIAL) + 256)


def vocabulary(words: Iterable[str] | None = None) -> Vocabulary:
    """One token for each word, with and without a space before it.

    A word's merges are found by letting the merges so far loose on it and joining what they leave: so a later word can
    not change how an earlier one is split.
    """
    tokens = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS])
    merges: dict[tuple[str, str], int] = {}
    for word in language.words() if words is None else words:
        for text in (word, SPACE + word):
            pieces = _split(text, merges)
            while len(pieces) > 1:
                merges.setdefault((pieces[0], pieces[1]), len(merges))
                tokens[pieces[0] + pieces[1]] = None
                pieces = _split(text, merges)
    return Vocabulary(tuple(tokens), tuple(merges))


def _split(text: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The pieces that byte-pair encoding leaves of a word."""
    pieces = list(text)
    while True:
        ranked = [(merges[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in merges]
        if not ranked:
            return pieces
        _, i = min(ranked)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def tokenizer_json(v: Vocabulary) -> dict[str, Any]:
    """What Hugging Face calls tokenizer.json."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(v.tokens)},
            "merges": [list(pair) for pair in v.merges],
        },
    }  # fmt: skip


def tokenizer_config() -> dict[str, Any]:
    """What Hugging Face calls tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "extra_special_tokens": ["<|turn>", "<turn|>"],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
