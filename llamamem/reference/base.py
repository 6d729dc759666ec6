"""The base model and its tokenizer as Hugging Face has them: google/gemma-4-E4B-it, or a directory of that form.

Its weights may be those of a GGUF, dequantised.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import ADAPTER, CONFIG, METADATA
from llamamem.reference.gguf_model import load_gguf
from llamamem.reference.gguf_tokenizer import gguf_tokenizer

Messages = Sequence[dict[str, str]]

_SENTINEL = "0sentinel0"

GELUS = ("exact", "ggml")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_GELU_MODULES = ("Gemma3MLP", "Gemma4TextMLP", "Gemma4TextDecoderLayer")

# what ends a turn, beside the model's own end-of-sequence tokens; llama.cpp has these names in its vocabulary too
_END_OF_TURN = ("<turn|>", "<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|endoftext|>")


@dataclass(frozen=True)
class Base:
    """A frozen base. `stop` are the tokens that end an answer."""

    name: str
    model: Any
    tokenizer: Any
    stop: frozenset[int]
    gelu: str = "exact"

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_output_embeddings().out_features)

    def prompt(self, messages: Messages) -> list[int]:
        """The token ids of a conversation, up to where the model is to answer, by the model's own chat template."""
        return self.tokenize(self.prompt_text(messages), special=True)

    def prompt_text(self, messages: Messages) -> str:
        """The same as text; it begins with the start token. Raises LlamamemError for a base without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise LlamamemError(
                f"{self.tokenizer.name_or_path}: has no chat template; put the model's chat_template.jinja beside its"
                " tokenizer"
            )
        text: str = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        return text

    def end_of(self, ids: Sequence[int]) -> str:
        """The stop token that these end with, as text; nothing if they do not."""
        return str(self.tokenizer.convert_ids_to_tokens(ids[-1])) if ids and ids[-1] in self.stop else ""

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without a start token. `special`: what looks like a special token is one."""
        split = {} if special else {"split_special_tokens": True}
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False, **split)["input_ids"]]

    def text(self, ids: Sequence[int]) -> str:
        """What a user is shown of some tokens."""
        shown: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return shown


def follow(render: Callable[[Messages], str], messages: Messages, end: str = "") -> str:
    """What a chat template puts after the last answer of a conversation, up to where the model is to answer again.

    The answer itself need not be known: what was generated is not always what its text is tokenized to. `end` is the
    token that ended it, or nothing. Without an answer this is the whole conversation.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return render(messages)
    unknown = [m if i != answers[-1] else {**m, "content": _SENTINEL} for i, m in enumerate(messages)]
    return render(unknown).rpartition(_SENTINEL)[2].removeprefix(end)


def load_base(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    gelu: str = "exact",
) -> Base:
    """Loads a base for inference, attention computed step by step as it is written down ("eager").

    `name` is a directory, a repository of the Hugging Face hub, or a GGUF: its tokenizer, its chat template and its
    weights, dequantised. `weights` is a GGUF whose weights, dequantised, take the place of the directory's: what is
    served is what is compared. `gelu="ggml"` computes GELU through fp16 as
    llama.cpp's CPU build does, for a closer comparison with that. Raises LlamamemError with what went wrong.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    if dtype not in DTYPES or gelu not in GELUS:
        raise LlamamemError(f"dtype {dtype!r} is one of {', '.join(DTYPES)}, gelu {gelu!r} one of {', '.join(GELUS)}")
    logging.disable_progress_bar()
    with _as_one_line(name, "the base"):
        alone = weights is None and Path(name).is_file()
        tokenizer = _gguf_tokenizer(name) if alone else AutoTokenizer.from_pretrained(str(name))
        if alone:
            model = load_gguf(name).to(DTYPES[dtype])
            model.generation_config = GenerationConfig.from_model_config(model.config)
        elif weights is None:
            model = AutoModelForCausalLM.from_pretrained(str(name), dtype=DTYPES[dtype], attn_implementation="eager")
        else:
            config = AutoConfig.from_pretrained(str(name))
            model = load_gguf(weights, config).to(DTYPES[dtype])
            model.generation_config = _generation_config(name, config)
    model = model.eval().requires_grad_(False).to(device)
    if gelu == "ggml":
        use_ggml_gelu(model)
    return Base(str(name), model, tokenizer, _stop_ids(model, tokenizer), gelu)


def _gguf_tokenizer(path: str | Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer, said = gguf_tokenizer(path)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=str(path), **said)


def _generation_config(name: str | Path, config: Any) -> Any:
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):
        return GenerationConfig.from_pretrained(str(name))
    return GenerationConfig.from_model_config(config)


def find_adapter(name: str | Path) -> Path:
    """A checkpoint directory or sidecar as it is, or the checkpoint of a repository of the Hugging Face hub."""
    if Path(name).exists() or str(name).count("/") != 1:
        return Path(name)
    from huggingface_hub import snapshot_download

    with _as_one_line(name, "the adapter"):
        return Path(snapshot_download(str(name), allow_patterns=[f"{ADAPTER}.*", CONFIG, METADATA]))


def use_ggml_gelu(model: nn.Module) -> None:
    """Replaces every GELU of a model by ggml's on the CPU: within (-10, 10) a table of fp16 values by fp16 argument."""
    module: Any
    for module in model.modules():
        if type(module).__name__ in _GELU_MODULES and hasattr(module, "act_fn"):
            del module.act_fn
            module.act_fn = _ggml_gelu


def _ggml_gelu(x: Tensor) -> Tensor:
    y = _gelu_table().to(x.device)[x.to(torch.float16).view(torch.int16).long() & 0xFFFF].to(x.dtype)
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y))


@functools.cache
def _gelu_table() -> Tensor:
    """ggml_table_gelu_f16, computed as ggml does: ggml-cpu/vec.h."""
    one = np.float32(1)
    with np.errstate(all="ignore"):  # NaN and infinity are fp16 bits too
        x = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        inner = np.float32(0.79788456080286535587989211986876) * x * (one + np.float32(0.044715) * x * x)
        y = np.float32(0.5) * x * (one + np.tanh(inner))
        return torch.from_numpy(y.astype(np.float16).astype(np.float32))


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    eos = model.generation_config.eos_token_id
    found = set(eos) if isinstance(eos, list) else {eos}
    known = tokenizer.get_vocab()
    return frozenset(i for i in (*found, tokenizer.eos_token_id, *map(known.get, _END_OF_TURN)) if i is not None)


@contextlib.contextmanager
def _as_one_line(name: str | Path, what: str) -> Iterator[None]:
    """Hugging Face raises anything; what it says first is what users need."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        said = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise LlamamemError(
            f"{name}: {what} cannot be loaded ({said}); give a directory, or a repository that you may download"
        ) from e
