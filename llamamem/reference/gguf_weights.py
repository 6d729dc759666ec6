"""The weights of a GGUF as a Hugging Face model has them, dequantised: what is served is what is compared.

Of the five architectures that a memory was tried on. llama.cpp's converter renames tensors, adds 1 to Gemma 3's norms,
and stores the rows of q and k of a base with NORM rope permuted; here all that is undone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.base import base_indexes
from llamamem.formats.gguf_file import read_gguf_index

_ATTENTION = {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn_output": "self_attn.o_proj"}
_MLP = {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
_QK_NORMS = {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}


@dataclass(frozen=True)
class Architecture:
    """How an architecture's tensors are named in Hugging Face's form, without `.weight`, and stored in a GGUF."""

    model_type: str
    layer: dict[str, str]
    model: dict[str, str] = field(default_factory=lambda: _MODEL)
    norm_rope: bool = False
    norms_of_1: bool = False  # a norm multiplies by 1 + weight


ARCHITECTURES = {
    "qwen3": Architecture("qwen3", _ATTENTION | _MLP | _QK_NORMS | _TWO_NORMS),
    "llama": Architecture("llama", _ATTENTION | _MLP | _TWO_NORMS, norm_rope=True),
    "smollm3": Architecture("smollm3", _ATTENTION | _MLP | _TWO_NORMS, norm_rope=True),
    "gemma3": Architecture("gemma3_text", _ATTENTION | _MLP | _QK_NORMS | _FOUR_NORMS, norms_of_1=True),
    "gemma4": Architecture(
        "gemma4_text",
        _ATTENTION | _MLP | _QK_NORMS | _FOUR_NORMS | _PER_LAYER,
        _MODEL
        | {
            "per_layer_token_embd": "model.embed_tokens_per_layer",
            "per_layer_model_proj": "model.per_layer_model_projection",
            "per_layer_proj_norm": "model.per_layer_projection_norm",
        },
    ),
}


class GgufWeights:
    """The tensors of a base GGUF, one file or several, read and dequantised one by one."""

    def __init__(self, path: str | Path):
        index = read_gguf_index(path)
        self.path = Path(path)
        self.arch = str(index.get("general.architecture"))
        if self.arch not in ARCHITECTURES:
            raise LlamamemError(
                f"{path}: architecture is {self.arch!r}; the reference reads {', '.join(ARCHITECTURES)} from a GGUF:"
                " for another give its Hugging Face form"
            )
        self.architecture = ARCHITECTURES[self.arch]
        self.get = index.get
        self._tensors = {info.name: (part, info) for part in base_indexes(index) for info in part.tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def number(self, key: str, default: Any = None) -> Any:
        """A key of the architecture; of a list its first value."""
        value = self.get(f"{self.arch}.{key}", default)
        return value[0] if isinstance(value, list) else value

    def names(self) -> dict[str, str]:
        """The tensors' names in the file by those in Hugging Face's form."""
        return dict(self._names())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the file, in Hugging Face's order of axes."""
        return self._tensors[name][1].shape

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the file by its name there, F32, in Hugging Face's shape and order of rows."""
        part, info = self._tensors[name]
        size = gguf.quants.quant_shape_to_byte_shape(info.shape, info.type)
        try:
            data = np.memmap(part.path, np.uint8, "r", part.data_start + info.offset, size)
        except ValueError:  # it would end behind the file
            raise LlamamemError(f"{part.path}: tensor '{name}' is not all there; fetch it again") from None
        values = gguf.quants.dequantize(np.asarray(data), info.type).reshape(info.shape).astype(np.float32, copy=False)
        short = name.removesuffix(".weight").rpartition(".")[2]
        if self.architecture.norm_rope and short in ("attn_q", "attn_k"):
            kind = "head_count" if short == "attn_q" else "head_count_kv"
            values = _unpermuted(values, self.number(f"attention.{kind}"))
        if self.architecture.norms_of_1 and short.endswith("norm"):
            values = values - np.float32(1)
        return values

    def _names(self) -> Iterator[tuple[str, str]]:
        known = self.architecture
        for name in self._tensors:
            if name == "rope_freqs.weight":  # what a config says
                continue
            match = re.fullmatch(r"blk\.(\d+)\.(.+?)(?:\.(weight|bias))", name)
            if match is None:
                found, tail = known.model.get(name.removesuffix(".weight")), "weight"
            else:
                layer, short, tail = match.groups()
                found = known.layer.get(short) and f"model.layers.{layer}.{known.layer[short]}"
                if short == "layer_output_scale":
                    yield f"model.layers.{layer}.layer_scalar", name
                    continue
            if found is None:
                raise LlamamemError(f"{self.path}: tensor '{name}' has no place in a Hugging Face {self.arch} model")
            yield f"{found}.{tail}", name


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as Hugging Face has them: of a head of width d its row j d/2 + i is the GGUF's row 2 i + j."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
