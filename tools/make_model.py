"""Writes a random Gemma 4 GGUF and a random memory sidecar for it: models to test and to time, which say nothing.

    python tools/make_model.py --preset wide --output wide.gguf --sidecar wide-memory.gguf

`wide` has the layer shape of Gemma 4 E4B (hidden 2560, Q8_0, 0.8 GB) in 8 layers, `tiny` and `small` are F32 and made
in a moment. The same preset and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from make_checkpoint import Memory, Spec, normal, write_checkpoint

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar.export import export_sidecar


@dataclass(frozen=True)
class Preset:
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

    def full(self, layer: int) -> bool:
        return layer % 6 == 5

    def dim(self, layer: int) -> int:
        return self.global_head_dim if self.full(layer) else self.head_dim


PRESETS = {
    "tiny": Preset(64, 12, 4, 2, 16, 32, 80, 8, 6, 32, 448, 4096, chunk=48),
    "small": Preset(256, 8, 4, 2, 64, 128, 1024, 32, 2, 128, 1024, 8192, chunk=256),
    "wide": Preset(2560, 8, 8, 2, 256, 512, 10240, 256, 2, 512, 4096, 8192, chunk=1024, weights=Type.Q8_0),
    "e4b": Preset(2560, 42, 8, 2, 256, 512, 10240, 256, 18, 512, 262144, 131072, chunk=1024, weights=Type.Q8_0),
}

TARGET_LAYERS = 6

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>")
CHARACTERS = "\n!\"'(),-./0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\u2581"
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not"
    " what all were we when your can said there use an each which she do how their if will up other about out many then"
    " them these so some her would make like him into time has look two more write go see number no way could people my"
    " than first water been call who oil its now find long down day did get come made may part remember question answer"
).split()
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn>{{ m['role'] }}\n{{ m['content'] }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and BPE merges: specials, bytes, characters, then whole words built letter by letter."""
    kind = gguf.TokenType
    tokens = dict.fromkeys(SPECIAL, kind.CONTROL)
    tokens.update((f"<0x{byte:02X}>", kind.BYTE) for byte in range(256))
    tokens.update(dict.fromkeys(CHARACTERS, kind.NORMAL))
    merges: dict[str, None] = {}
    for word in WORDS:
        left = "\u2581"
        steps = []
        for letter in word:
            steps.append((left, letter))
            left += letter
        if len(tokens) + len(steps) > size:
            break
        for left, letter in steps:
            merges[f"{left} {letter}"] = None
            tokens[left + letter] = kind.NORMAL
    tokens.update((f"<unused{i}>", kind.UNUSED) for i in range(size - len(tokens)))
    return list(tokens), [int(k) for k in tokens.values()], list(merges)


def metadata(writer: gguf.GGUFWriter, p: Preset, name: str) -> None:
    """The keys that llama.cpp's Gemma 4 loader wants, as `convert_hf_to_gguf.py` writes them."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
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
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if p.weights == Type.Q8_0 else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    tokens, types, merges = vocabulary(p.vocab)
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_mask_token_id(4)
    writer.add_add_bos_token(True)
    writer.add_add_sep_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def base_tensors(p: Preset) -> Iterator[Spec]:
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


def rope_freqs(p: Preset) -> np.ndarray:
    """Proportional rope of the full layers: a quarter of the frequencies turns, the rest (1e30) stands still."""
    half = p.global_head_dim // 2
    return np.array([1.0] * (half // 4) + [1e30] * (half - half // 4), np.float32)


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], mean: float, std: float, kind: Type) -> np.ndarray:
    """Normal values as F32, or raw Q8_0 blocks (as bytes) with one scale and uniform quants: 50 times as fast."""
    if kind == Type.F32 or len(shape) == 1:
        return normal(rng, shape, mean, std)
    blocks = np.empty((shape[0], shape[1] // 32, 34), np.uint8)  # an fp16 scale and 32 quants
    blocks[:, :, 2:] = rng.integers(-127, 128, (shape[0], shape[1] // 32, 32), np.int8).view(np.uint8)
    blocks[:, :, :2] = np.array([std / 73.6], np.float16).view(np.uint8)  # 73.6: deviation of the quants
    return blocks.reshape(shape[0], -1)


def _make_improbable(embedding: np.ndarray, rows: np.ndarray) -> None:
    """The output is tied to the embedding: a sixteenth of it never wins, so that what the model says is text."""
    if embedding.dtype == np.float32:
        embedding[rows] /= 16
    else:
        blocks = embedding.reshape(embedding.shape[0], -1, 34)
        scales = blocks[:, :, :2].copy().view(np.float16)
        scales[rows] /= 16
        blocks[:, :, :2] = scales.view(np.uint8)


def write_base(path: Path, p: Preset, name: str, seed: int) -> None:
    """Writes the base, one tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, "gemma4")
    metadata(writer, p, name)
    specs = list(base_tensors(p))
    writer.add_tensor_info("rope_freqs.weight", (p.global_head_dim // 2,), np.dtype(np.float32), p.global_head_dim * 2)
    for tensor, shape, _, _ in specs:
        kind = p.weights if len(shape) == 2 else Type.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_tensor_data(rope_freqs(p))
    rng = np.random.default_rng(seed)
    quiet = np.array([kind != gguf.TokenType.NORMAL for kind in vocabulary(p.vocab)[1]])
    for tensor, shape, mean, std in specs:
        data = random_tensor(rng, shape, mean, std, p.weights)
        if tensor == "token_embd.weight":
            _make_improbable(data, quiet)
        writer.write_tensor_data(data)
    writer.close()


def memory(p: Preset, name: str) -> Memory:
    """A memory in the first layers."""
    widths = {}
    for i in range(TARGET_LAYERS):
        kv = p.kv_heads * p.dim(i)
        widths[i] = (p.heads * p.dim(i), kv, kv, p.hidden)
    return Memory(base=name, hidden=p.hidden, widths=widths, chunk=p.chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a random Gemma 4 GGUF and a memory sidecar for it.")
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="base GGUF to write")
    parser.add_argument("--sidecar", type=Path, help="sidecar GGUF to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--semantics", type=int, choices=(1, 2), default=1)
    parser.add_argument("--zero-deltas", action="store_true", help="a sidecar that must change nothing")
    args = parser.parse_args()
    preset, name = PRESETS[args.preset], f"random-gemma4-{args.preset}"
    write_base(args.output, preset, name, args.seed)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    if args.sidecar is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), memory(preset, name), args.seed, args.semantics, args.zero_deltas)
        export_sidecar(folder, args.output, args.sidecar)
    print(f"{args.sidecar}: {args.sidecar.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, OSError) as e:
        print(f"make_model: error: {e}", file=sys.stderr)
        sys.exit(2)
