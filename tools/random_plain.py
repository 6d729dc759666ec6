"""The other architectures of make_model.py, Qwen3, SmolLM3, Llama and Gemma 3: presets, keys and tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
from gguf import GGMLQuantizationType as Type
from make_checkpoint import Spec


@dataclass(frozen=True)
class Plain:
    """Sizes of a model whose layers are all alike; of Gemma 3 five of six slide. Vectors are always F32."""

    arch: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int  # tokens
    chunk: int  # tokens in a chunk of the memory
    rope: float = 1e6
    window: int = 32  # tokens, of Gemma 3
    weights: Type = Type.F32

    @property
    def qk_norm(self) -> bool:
        return self.arch in ("qwen3", "gemma3")

    def dim(self, layer: int) -> int:
        return self.head_dim


_QWEN3_4B = Plain("qwen3", 2560, 36, 32, 8, 128, 9728, 8192, 262144, 1024, 5e6, weights=Type.Q8_0)

PRESETS = {
    "qwen3": {
        "tiny": Plain("qwen3", 64, 4, 4, 2, 32, 64, 448, 4096, 48),
        "small": Plain("qwen3", 256, 6, 4, 2, 64, 1024, 1024, 8192, 256),
        "wide": replace(_QWEN3_4B, layers=8),
        "4b": _QWEN3_4B,  # Qwen3-4B's layers, with a narrow vocabulary
    },
    "smollm3": {
        "tiny": Plain("smollm3", 64, 8, 4, 2, 16, 64, 448, 4096, 48, 5e6),
        "small": Plain("smollm3", 256, 8, 4, 2, 64, 1024, 1024, 8192, 256, 5e6),
    },
    "llama": {
        "tiny": Plain("llama", 64, 6, 4, 2, 16, 64, 448, 4096, 48, 1e5),
        "small": Plain("llama", 256, 6, 4, 2, 64, 1024, 1024, 8192, 256, 1e5),
    },
    "gemma3": {
        "tiny": Plain("gemma3", 64, 7, 4, 2, 16, 64, 448, 4096, 48),
        "small": Plain("gemma3", 256, 7, 4, 2, 64, 1024, 1024, 8192, 256, window=128),
    },
}


def metadata(writer: gguf.GGUFWriter, p: Plain) -> None:
    """The keys that llama.cpp's loaders want, as `convert_hf_to_gguf.py` writes them."""
    writer.add_block_count(p.layers)
    writer.add_context_length(p.context)
    writer.add_embedding_length(p.hidden)
    writer.add_feed_forward_length(p.ffn)
    writer.add_head_count(p.heads)
    writer.add_head_count_kv(p.kv_heads)
    writer.add_rope_freq_base(p.rope)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(p.head_dim)
    writer.add_value_length(p.head_dim)
    writer.add_vocab_size(p.vocab)
    if p.arch in ("smollm3", "llama"):
        writer.add_rope_dimension_count(p.head_dim)
    if p.arch == "gemma3":
        writer.add_rope_freq_base_swa(1e4)
        writer.add_sliding_window(p.window)


def base_tensors(p: Plain) -> Iterator[Spec]:
    """Every tensor of the base. Small q/k norms, and branches that grow less the more layers there are."""
    h, q, kv = p.hidden, p.heads * p.head_dim, p.kv_heads * p.head_dim
    calm = (2 * p.layers) ** -0.5
    yield "token_embd.weight", (p.vocab, h), 0.0, 1 / h**0.5
    yield "output_norm.weight", (h,), 1.0, 0.2
    for i in range(p.layers):
        blk = f"blk.{i}."
        yield blk + "attn_norm.weight", (h,), 1.0, 0.2
        yield blk + "attn_q.weight", (q, h), 0.0, 1 / h**0.5
        yield blk + "attn_k.weight", (kv, h), 0.0, 1 / h**0.5
        yield blk + "attn_v.weight", (kv, h), 0.0, 1 / h**0.5
        yield blk + "attn_output.weight", (h, q), 0.0, calm / q**0.5
        yield blk + "ffn_norm.weight", (h,), 1.0, 0.2
        yield blk + "ffn_gate.weight", (p.ffn, h), 0.0, 1 / h**0.5
        yield blk + "ffn_up.weight", (p.ffn, h), 0.0, 1 / h**0.5
        yield blk + "ffn_down.weight", (h, p.ffn), 0.0, calm / p.ffn**0.5
        if p.qk_norm:
            yield blk + "attn_q_norm.weight", (p.head_dim,), 0.5, 0.1
            yield blk + "attn_k_norm.weight", (p.head_dim,), 0.5, 0.1
        if p.arch == "gemma3":
            yield blk + "post_attention_norm.weight", (h,), 0.4, 0.1
            yield blk + "post_ffw_norm.weight", (h,), 0.4, 0.1
