"""A Hugging Face config of a base GGUF's keys, for a base that is there as GGUF only."""

from __future__ import annotations

from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.reference.gguf_weights import GgufWeights

_FAR = 1e20  # divides a rope frequency that stands still


def config_of(weights: GgufWeights) -> Any:
    """The config of the text model, in transformers' class."""
    from transformers import AutoConfig

    n = weights.number
    if "rope_freqs.weight" in weights and weights.arch != "gemma4":
        raise LlamamemError(f"{weights.path}: its rope is scaled; give the base's Hugging Face form for its config")
    layers, hidden, heads = n("block_count"), n("embedding_length"), n("attention.head_count")
    said: dict[str, Any] = {
        "vocab_size": weights.shape("token_embd.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": n("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": n("attention.head_count_kv", heads),
        "head_dim": n("attention.key_length", hidden // heads),
        "max_position_embeddings": n("context_length"),
        "rms_norm_eps": n("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in weights,
        "rope_parameters": {"rope_type": "default", "rope_theta": n("rope.freq_base", 10000.0)},
        "attention_bias": False,
    }
    for name in ("bos", "eos", "padding"):
        said[f"{name.removesuffix('ding')}_token_id"] = weights.get(f"tokenizer.ggml.{name}_token_id")
    more = {"gemma3": _gemma3, "gemma4": _gemma4, "smollm3": _smollm3}.get(weights.arch)
    if more is not None:
        said |= more(weights, layers)
    return AutoConfig.for_model(weights.architecture.model_type, **said)


def _smollm3(weights: GgufWeights, layers: int) -> dict[str, Any]:
    return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in range(layers)], "use_sliding_window": False}


def _gemma3(weights: GgufWeights, layers: int) -> dict[str, Any]:
    n = weights.number
    full, local = n("rope.freq_base", 1e6), n("rope.freq_base_swa", 1e4)
    return {
        "sliding_window": n("attention.sliding_window"),
        "layer_types": _layer_types([(layer + 1) % 6 != 0 for layer in range(layers)]),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": full},
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "query_pre_attn_scalar": n("attention.key_length"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma4(weights: GgufWeights, layers: int) -> dict[str, Any]:
    n = weights.number
    turning = 1.0
    if "rope_freqs.weight" in weights:
        turning = float(np.mean(weights.tensor("rope_freqs.weight") < _FAR))
    return {
        "vocab_size_per_layer_input": weights.shape("token_embd.weight")[0],
        "head_dim": n("attention.key_length_swa"),
        "global_head_dim": n("attention.key_length"),
        "hidden_size_per_layer_input": n("embedding_length_per_layer_input"),
        "num_kv_shared_layers": n("attention.shared_kv_layers", 0),
        "sliding_window": n("attention.sliding_window"),
        "layer_types": _layer_types(weights.get("gemma4.attention.sliding_window_pattern")),
        "final_logit_softcapping": n("final_logit_softcapping"),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": n("rope.freq_base"),
                "partial_rotary_factor": turning,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": n("rope.freq_base_swa")},
        },
    }


def _layer_types(sliding: list[Any]) -> list[str]:
    return ["sliding_attention" if each else "full_attention" for each in sliding]
