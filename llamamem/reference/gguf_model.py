"""A Hugging Face model with the weights of a GGUF: all at once, or layer by layer for one that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llamamem.errors import LlamamemError
from llamamem.reference.gguf_config import config_of
from llamamem.reference.gguf_weights import GgufWeights


def load_gguf(path: str | Path, config: Any = None, *, stream: bool = False) -> Any:
    """The model of a GGUF in F32, attention computed step by step ("eager"). `config` is that of its HF form.

    `stream`: the weights of a layer are there while it runs, for a base larger than the memory; each pass reads them
    anew. Not for Gemma. Raises LlamamemError where file and config do not fit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    weights = GgufWeights(path)
    config = config_of(weights) if config is None else _text(config)
    device = "meta" if stream else "cpu"
    with torch.device(device), no_init_weights():  # drawing values to throw away takes longer than all the rest
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    names = weights.names()
    if stream:
        _stream(model, weights, names)
    else:
        _load(model, {name: _tensor(weights, source) for name, source in names.items()}, path)
    model.tie_weights()
    return model


def _text(config: Any) -> Any:
    """Of a multimodal model that of its text."""
    return config.get_text_config(decoder=True)


def _tensor(weights: GgufWeights, source: str) -> Tensor:
    return torch.from_numpy(weights.tensor(source).copy())


def _load(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    wanted = module.state_dict()
    for name, tensor in tensors.items():
        if name in wanted and wanted[name].shape != tensor.shape:
            raise LlamamemError(
                f"{path}: tensor of {name} is {list(tensor.shape)}, the config says {list(wanted[name].shape)}"
            )
    missing, extra = module.load_state_dict(tensors, strict=False, assign=True)
    missing = [name for name in missing if name != "lm_head.weight" or "model.embed_tokens.weight" not in tensors]
    # layers that reuse keys and values need none of their own, and may have them in a file
    extra = [name for name in extra if not name.endswith(("k_proj.weight", "v_proj.weight", "k_norm.weight"))]
    if missing or extra:
        raise LlamamemError(
            f"{path}: config and tensors differ: {', '.join([*missing, *extra][:3])}; give its own config"
        )


def _stream(model: Any, weights: GgufWeights, names: dict[str, str]) -> None:
    """Puts hooks on the layers that fill and empty them; all else is loaded."""
    config, decoder = model.config, model.model
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        raise LlamamemError(f"{weights.path}: {weights.arch} cannot be run layer by layer ({left[0]})")
    own = {name: source for name, source in names.items() if not name.startswith("model.layers.")}
    for name, source in own.items():
        module = model.get_submodule(name.rpartition(".")[0])
        _load(module, {name.rpartition(".")[2]: _tensor(weights, source)}, weights.path)
    for i, layer in enumerate(decoder.layers):
        prefix = f"model.layers.{i}."
        mine = {name.removeprefix(prefix): source for name, source in names.items() if name.startswith(prefix)}

        def fill(module: nn.Module, args: Any, mine: dict[str, str] = mine) -> None:
            _load(module, {name: _tensor(weights, source) for name, source in mine.items()}, weights.path)

        def empty(module: nn.Module, args: Any, out: Any) -> None:
            module.to("meta")

        layer.register_forward_pre_hook(fill)
        layer.register_forward_hook(empty)
