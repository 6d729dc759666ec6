"""A small Gemma 4 in Hugging Face's form as an F32 GGUF, as llama.cpp's convert_hf_to_gguf.py would write it.

No torch: the directory is read as files. Text only, one safetensors file, a BPE tokenizer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.checkpoint import read_safetensors
from llamamem.formats.sidecar.layout import values

_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    "model.norm.weight": "output_norm.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_STANDS_STILL = 1e30  # divides a rope frequency that must not turn


def convert_base(folder: Path, output: Path, name: str) -> None:
    """Writes `folder` as `output`. The same inputs give the same bytes."""
    config = _json(folder / "config.json")
    if config.get("model_type") != "gemma4_text" or config.get("enable_moe_block"):
        raise LlamamemError(f"{folder}: not a dense Gemma 4 text model; convert it with llama.cpp's own script")
    weights = read_safetensors(folder / "model.safetensors")
    tensors = {_name(source): values(tensor) for source, tensor in weights.items()}
    writer = gguf.GGUFWriter(output, "gemma4")
    _hyperparameters(writer, config, name)
    _tokenizer(writer, _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json"), config)
    writer.add_tensor("rope_freqs.weight", _rope_frequencies(config))
    for tensor in sorted(tensors):
        writer.add_tensor(tensor, np.ascontiguousarray(tensors[tensor], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(source: str) -> str:
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", source)
    found = _MODEL.get(source) if layer is None else _LAYER.get(layer.group(2))
    if found is None:
        raise LlamamemError(f"tensor {source!r} has no place in a Gemma 4 GGUF")
    return found if layer is None else f"blk.{layer.group(1)}.{found}"


def _hyperparameters(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    wide = _full_head_dim(config)
    rope = config["rope_parameters"]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(wide)
    writer.add_value_length(wide)
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count(wide)
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _full_head_dim(config: dict[str, Any]) -> int:
    """The head size of the layers with full attention."""
    if "global_head_dim" in config:
        return int(config["global_head_dim"])
    full = config["layer_types"].index("full_attention")
    return next(int(each["head_dim"]) for layer, each in config["per_layer_config"].items() if int(layer) == full)


def _rope_frequencies(config: dict[str, Any]) -> np.ndarray:
    """Proportional rope of the full layers: the first part of the frequencies turns, the rest stands still."""
    half = _full_head_dim(config) // 2
    turning = int(half * config["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return np.array([1.0] * turning + [_STANDS_STILL] * (half - turning), np.float32)


def _tokenizer(
    writer: gguf.GGUFWriter, tokenizer: dict[str, Any], chat: dict[str, Any], config: dict[str, Any]
) -> None:
    model = tokenizer["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {entry["content"] for entry in tokenizer["added_tokens"] if entry["special"]}
    kind = gguf.TokenType
    types = [
        kind.CONTROL if token in special else kind.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else kind.NORMAL
        for token in tokens
    ]
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types([int(each) for each in types])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    for add, token in ((writer.add_unk_token_id, "unk_token"), (writer.add_mask_token_id, "mask_token")):
        if chat.get(token) in model["vocab"]:
            add(model["vocab"][chat[token]])
    writer.add_add_bos_token(True)
    writer.add_add_sep_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat["chat_template"])


def _json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise LlamamemError(f"{path}: cannot be read ({e})") from None
    return content
