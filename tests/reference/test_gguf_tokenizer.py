"""A base that is there as GGUF only: its tokenizer, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError
from llamamem.reference.chat_tokens import ChatTokens
from llamamem.reference.gguf_model import load_gguf
from llamamem.reference.gguf_tokenizer import gguf_tokenizer

TOKENS = ["<|end|>", "<|im|>", *"abc12", "Ġ", "ab", "12", "Ġab"]
TEMPLATE = "{% for m in messages %}<|im|>{{ m['content'] }}<|end|>{% endfor %}"


def write(path: Path, model: str = "gpt2", pre: str = "smollm", template: str | None = TEMPLATE) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control, control, *[normal] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b", "1 2", "Ġ ab"])
    writer.add_eos_token_id(0)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_digits_stand_alone_and_special_tokens_are_one(tmp_path: Path) -> None:
    path = write(tmp_path / "base.gguf")
    tokenizer, said = gguf_tokenizer(path)
    tokens = tokenizer.encode("ab ab12<|im|>c", add_special_tokens=False).tokens
    assert tokens == ["ab", "Ġab", "1", "2", "<|im|>", "c"]  # "12" is in the vocabulary, and is never made
    assert tokenizer.decode(tokenizer.encode("ab ab12").ids) == "ab ab12"
    assert said == {"chat_template": TEMPLATE, "eos_token": "<|end|>"}
    assert ChatTokens.read(path).render([{"role": "user", "content": "ab"}]) == "<|im|>ab<|end|>"


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    for model, pre in (("llama", "smollm"), ("gpt2", "qwen2")):
        with pytest.raises(LlamamemError, match=f"its tokenizer is '{model}' with '{pre}'.*Hugging Face form"):
            gguf_tokenizer(write(tmp_path / "base.gguf", model, pre))
    with pytest.raises(LlamamemError, match="has no chat template"):
        ChatTokens.read(write(tmp_path / "base.gguf", template=None))


def test_weights_that_are_not_all_there_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    data = (models["llama_rwkv_ms"] / "model-f32.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-4096])
    with pytest.raises(LlamamemError, match=r"cut\.gguf: tensor '.+' is not all there; fetch it again"):
        load_gguf(tmp_path / "cut.gguf")
