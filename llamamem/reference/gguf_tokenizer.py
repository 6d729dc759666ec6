"""The tokenizer of a base GGUF, with its chat template, for a base that is there as GGUF only.

Byte-level BPE. How a text is cut before the merges is a name in the file, which llama.cpp gives its meaning
(llama-vocab.cpp); of those one is known here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import read_gguf_index

_PRE = {  # a digit at a time, then GPT-2's words
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def gguf_tokenizer(path: str | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and of a tokenizer_config.json the chat template and the special tokens' names.

    Raises LlamamemError for a kind that is not known here.
    """
    index = read_gguf_index(path, keep=[f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")])
    model, pre = index.get("tokenizer.ggml.model"), index.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE:
        raise LlamamemError(
            f"{path}: its tokenizer is {model!r} with {pre!r}; of a GGUF the reference reads gpt2 with"
            f" {', '.join(_PRE)}: for another give the base's Hugging Face form"
        )
    tokens, types, merges = (index.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type", "merges"))
    merges = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    known = zip(tokens, types, strict=True)
    specials = [token for token, kind in known if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    said = {"chat_template": index.get("tokenizer.chat_template")}
    for name, ours in _NAMES.items():
        if (i := index.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            said[ours] = tokens[i]
    return tokenizer, said
