"""The smallest sound sidecars of version 3, as raw.py has those of versions 1 and 2."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hostile.raw import STRING, U32, WIDTH, H, Key, Sidecar, attention_entry, new_tensor, sound

PREFIX = "memory_adapter."
NORM_WIDTH = WIDTH | {"q": 4, "k": 2}  # heads of two rows


def sound_3(
    kind: str = "delta_rule",
    *,
    layers: Sequence[int] = (0,),
    heads: Sequence[str] = ("q",),
    norm: bool = False,
    couple_lambda: bool = True,
    scale: str = "",
    o_norm: bool = False,
    optional: bool = False,
    head: bool = False,
) -> Sidecar:
    """A sound sidecar of version 3; `norm`: with permuted rows; `scale`: layer or head, with a trained scale."""
    width = NORM_WIDTH if norm else WIDTH
    source = sound(layers=layers, heads=heads, couple_lambda=couple_lambda, optional=optional)
    is_delta = kind == "delta_rule"
    gone = {"general.architecture", "delta_mem.memory_backend"}
    keys = [key for key in source.keys if key.name not in gone and not (is_delta and ".rwkv_ms_" in str(key.name))]
    for key in keys:
        key.name = str(key.name).replace("delta_mem.", PREFIX)
    sidecar = Sidecar([Key("general.architecture", STRING, "memory_adapter"), *keys])
    sidecar.key("schema").value = "memory_adapter_gguf_sidecar.v3"
    sidecar.key("format_version").value = 3
    more = {"kind": kind, "base_architecture": "qwen3", "source_prefix": "model.layers.", "qk_row_order": "hf"}
    if norm:
        more |= {"base_architecture": "llama", "qk_row_order": "norm"}
    at = sidecar.keys.index(sidecar.key("format_version")) + 1
    sidecar.keys[at:at] = [Key(PREFIX + name, STRING, value) for name, value in more.items()]
    if norm:
        sidecar.keys.insert(at + 4, Key(f"{PREFIX}rope_head_dim", U32, 2))
    if optional:
        sidecar.keys.append(Key(f"{PREFIX}omitted_tensors_json", STRING, "["))
    sidecar.key("base_gguf_sha256").value = hashlib.sha256(b"base").hexdigest()
    sidecar.key("per_layer_attention_json").value = [attention_entry(layer, heads, width) for layer in layers]
    if is_delta:
        config = sidecar.config
        for name in [name for name in config if name.startswith("rwkv_ms_") or name == "memory_backend"]:
            del config[name]
        if scale:
            config |= {"trainable_delta_scale": True, "delta_scale_granularity": scale, "delta_scale_max": 3}
        if o_norm:
            config |= {"delta_o_rmsnorm": True, "delta_o_rmsnorm_eps": 0}
    shapes = {}
    for tensor in source.tensors:
        layer, short = str(tensor.name).split(".", 2)[1:]
        if not (is_delta and short.startswith(("rwkv.", "delta_"))):
            shapes[f"blk.{layer}.{short}"] = tensor.dims[::-1]
    for layer in layers:
        blk = f"blk.{layer}."
        idle = "qkvo" if optional and not is_delta else heads
        shapes |= {f"{blk}delta_{x}": [width[x], 1] for x in idle}
        if is_delta:
            shapes |= {f"{blk}mem_q": [1, H], f"{blk}mem_k": [1, H]}
            if scale:
                shapes[f"{blk}delta_scale"] = [4 if scale == "head" else 1]
            if o_norm:
                shapes[f"{blk}delta_o_norm"] = [H]
    sidecar.tensors = [new_tensor(name, shape) for name, shape in sorted(shapes.items())]
    if head:
        del sidecar.tensors[3:]
    sidecar.settle()
    if head:
        sidecar.manifest.clear()
    return sidecar
