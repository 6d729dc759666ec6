"""The Gemma 4 of make_model.py: presets, keys and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from make_checkpoint import Spec


@dataclass(frozen=True)
class Gemma4:
    """Sizes of a model; every sixth layer attends fully, the others slide. Vectors are always F32."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int  # sliding layers
    global_head_dim: int  # full layers
    ffn: int
    per_layer: int  # width of the per-layer input
    shared_kv: int  # last layers that reuse the KV cache of earlier ones
    window: int  # tokens
    vocab: int
    context: int  # tokens
    chunk: int  # tokens in a chunk of the memory
    weights: Type = Type.F32
    arch: str = "gemma4"

    def full(self, layer: int) -> bool:
        return layer % 6 == 5

    def dim(self, layer: int) -> int:
        return self.global_head_dim if self.full(layer) else self.head_dim


PRESETS = {
    "tiny": Gemma4(64, 12, 4, 2, 16, 32, 80, 8, 6, 32, 448, 4096, chunk=48),
    "small": Gemma4(256, 8, 4, 2, 64, 128, 1024, 32, 2, 128, 1024, 8192, chunk=256),
    "wide": Gemma4(2560, 8, 8, 2, 256, 512, 10240, 256, 2, 512, 4096, 8192, chunk=1024, weights=Type.Q8_0),
    "e4b": Gemma4(2560, 42, 8, 2, 256, 512, 10240, 256, 18, 512, 262144, 131072, chunk=1024, weights=Type.Q8_0),
}


def metadata(writer: gguf.GGUFWriter, p: Gemma4) -> None:
    """The keys that llama.cpp's Gemma 4 loader wants, as `convert_hf_to_gguf.py` writes them."""
    writer.add_block_count(p.layers)
    writer.add_context_length(p.context)
    writer.add_embedding_length(p.hidden)
    writer.add_feed_forward_length(p.ffn)
    writer.add_head_count(p.heads)
    writer.add_head_count_kv(p.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(p.global_head_dim)
    writer.add_value_length(p.global_head_dim)
    writer.add_key_length_swa(p.head_dim)
    writer.add_value_length_swa(p.head_dim)
    writer.add_rope_dimension_count(p.global_head_dim)
    writer.add_rope_dimension_count_swa(p.head_dim)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(p.window)
    writer.add_sliding_window_pattern([not p.full(layer) for layer in range(p.layers)])
    writer.add_shared_kv_layers(p.shared_kv)
    writer.add_embedding_length_per_layer_input(p.per_layer)


def base_tensors(p: Gemma4) -> Iterator[Spec]:
    """Every tensor of the base. Small q/k and post norms keep a random model from being chaotic."""
    h = p.hidden
    yield "token_embd.weight", (p.vocab, h), 0.0, 1 / h**0.5
    yield "per_layer_token_embd.weight", (p.vocab, p.per_layer * p.layers), 0.0, 0.3
    yield "per_layer_model_proj.weight", (p.per_layer * p.layers, h), 0.0, 1 / h**0.5
    yield "per_layer_proj_norm.weight", (p.per_layer,), 1.0, 0.1
    yield "output_norm.weight", (h,), 1.0, 0.2
    for i in range(p.layers):
        q, kv = p.heads * p.dim(i), p.kv_heads * p.dim(i)
        blk = f"blk.{i}."
        yield blk + "attn_norm.weight", (h,), 1.0, 0.2
        yield blk + "attn_q.weight", (q, h), 0.0, 1 / h**0.5
        yield blk + "attn_q_norm.weight", (p.dim(i),), 0.5, 0.1
        if i < p.layers - p.shared_kv:
            yield blk + "attn_k.weight", (kv, h), 0.0, 1 / h**0.5
            yield blk + "attn_k_norm.weight", (p.dim(i),), 0.5, 0.1
            yield blk + "attn_v.weight", (kv, h), 0.0, 1 / h**0.5
        yield blk + "attn_output.weight", (h, q), 0.0, 1 / q**0.5
        yield blk + "post_attention_norm.weight", (h,), 0.4, 0.1
        yield blk + "ffn_norm.weight", (h,), 1.0, 0.2
        yield blk + "ffn_gate.weight", (p.ffn, h), 0.0, 1 / h**0.5
        yield blk + "ffn_up.weight", (p.ffn, h), 0.0, 1 / h**0.5
        yield blk + "ffn_down.weight", (h, p.ffn), 0.0, 1 / p.ffn**0.5
        yield blk + "post_ffw_norm.weight", (h,), 0.4, 0.1
        yield blk + "inp_gate.weight", (p.per_layer, h), 0.0, 1 / h**0.5
        yield blk + "proj.weight", (h, p.per_layer), 0.0, 1 / p.per_layer**0.5
        yield blk + "post_norm.weight", (h,), 0.4, 0.1
        yield blk + "layer_output_scale.weight", (1,), 1.0, 0.1


def rope_freqs(p: Gemma4) -> np.ndarray:
    """Proportional rope of the full layers: a quarter of the frequencies turns, the rest (1e30) stands still."""
    half = p.global_head_dim // 2
    return np.array([1.0] * (half // 4) + [1e30] * (half - half // 4), np.float32)
