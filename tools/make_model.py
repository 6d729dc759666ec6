"""Writes a random base GGUF and a random memory sidecar for it: models to test and to time, which say nothing.

    python tools/make_model.py --preset wide --output wide.gguf --sidecar wide-memory.gguf
    python tools/make_model.py --arch qwen3 --preset 4b --memory delta_rule --output 4b.gguf --sidecar 4b-memory.gguf

`tiny` and `small` are F32 and made in a moment. `wide` has a real layer shape in 8 layers, Gemma 4 E4B's or Qwen3-4B's
(hidden 2560, Q8_0, 0.8 GB); `e4b` and `4b` have all of its layers. The same options and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import random_gemma4
import random_plain
from gguf import GGMLQuantizationType as Type
from make_checkpoint import Memory, normal, write_checkpoint
from random_gemma4 import Gemma4
from random_plain import Plain

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar.export import export_sidecar
from llamamem.formats.sidecar.layout import DELTA_RULE, MEMORY_KINDS, RWKV_MS, SOURCE_PREFIX

Preset = Gemma4 | Plain

PRESETS: dict[str, dict[str, Preset]] = {"gemma4": {**random_gemma4.PRESETS}} | {
    arch: {**presets} for arch, presets in random_plain.PRESETS.items()
}

TARGET_LAYERS = 6  # of RWKV-MS; a delta rule has all

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
    """All keys; the tokenizer is Gemma 4's whatever the architecture."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    if isinstance(p, Gemma4):
        random_gemma4.metadata(writer, p)
    else:
        random_plain.metadata(writer, p)
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


@cache
def _quants() -> np.ndarray:
    """Random blocks of 32, of which tensors are made: a prime number, so that no two rows of one are the same."""
    return np.random.default_rng(0).integers(-127, 128, (524309, 32), np.int8).view(np.uint8)


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], mean: float, std: float, kind: Type) -> np.ndarray:
    """Normal values as F32, or raw Q8_0 blocks (as bytes) with one scale and uniform quants: 200 times as fast."""
    if kind == Type.F32 or len(shape) == 1:
        return normal(rng, shape, mean, std)
    n, quants = shape[0] * shape[1] // 32, _quants()
    blocks = np.empty((n, 34), np.uint8)  # an fp16 scale and 32 quants
    blocks[:, :2] = np.array([std / 73.6], np.float16).view(np.uint8)  # 73.6: deviation of the quants
    at = int(rng.integers(len(quants)))
    for start in range(0, n, len(quants)):
        piece = blocks[start : start + len(quants), 2:]
        first = quants[at:][: len(piece)]
        piece[: len(first)] = first
        piece[len(first) :] = quants[: len(piece) - len(first)]
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
    writer = gguf.GGUFWriter(path, p.arch)
    metadata(writer, p, name)
    freqs = None
    if isinstance(p, Gemma4):
        specs, freqs = list(random_gemma4.base_tensors(p)), random_gemma4.rope_freqs(p)
        writer.add_tensor_info("rope_freqs.weight", freqs.shape, freqs.dtype, freqs.nbytes)
    else:
        specs = list(random_plain.base_tensors(p))
    for tensor, shape, _, _ in specs:
        kind = p.weights if len(shape) == 2 else Type.F32
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if freqs is not None:
        writer.write_tensor_data(freqs)
    rng = np.random.default_rng(seed)
    tokens, kinds, _ = vocabulary(p.vocab)
    spoken = [
        kind == gguf.TokenType.NORMAL and text.strip("\u2581 \n") for text, kind in zip(tokens, kinds, strict=True)
    ]
    quiet = ~np.array(spoken, bool)
    for tensor, shape, mean, std in specs:
        data = random_tensor(rng, shape, mean, std, p.weights)
        if tensor == "token_embd.weight":
            _make_improbable(data, quiet)
        writer.write_tensor_data(data)
    writer.close()


def memory(p: Preset, name: str, kind: str) -> Memory:
    """A memory in the first layers, or a delta rule in all."""
    widths = {}
    for i in range(min(TARGET_LAYERS, p.layers) if kind == RWKV_MS else p.layers):
        kv = p.kv_heads * p.dim(i)
        widths[i] = (p.heads * p.dim(i), kv, kv, p.hidden)
    prefix = SOURCE_PREFIX if p.arch == "gemma4" else "model.layers."
    return Memory(base=name, hidden=p.hidden, widths=widths, chunk=p.chunk, kind=kind, prefix=prefix)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a random base GGUF and a memory sidecar for it.")
    parser.add_argument("--arch", choices=PRESETS, default="gemma4")
    parser.add_argument("--preset", required=True, help="tiny, small, wide; e4b of gemma4, 4b of qwen3")
    parser.add_argument("--output", type=Path, required=True, help="base GGUF to write")
    parser.add_argument("--sidecar", type=Path, help="sidecar GGUF to write")
    parser.add_argument("--checkpoint", type=Path, help="directory to write the sidecar's checkpoint to")
    parser.add_argument("--memory", choices=MEMORY_KINDS, default=RWKV_MS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--semantics", type=int, choices=(1, 2), default=1, help="of RWKV-MS")
    parser.add_argument("--zero-deltas", action="store_true", help="a sidecar that must change nothing")
    args = parser.parse_args()
    if args.preset not in PRESETS[args.arch]:
        parser.error(f"--preset {args.preset}: {args.arch} has {', '.join(PRESETS[args.arch])}")
    preset, name = PRESETS[args.arch][args.preset], f"random-{args.arch}-{args.preset}"
    write_base(args.output, preset, name, args.seed)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
    if args.sidecar is None and args.checkpoint is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or Path(scratch)
        own, format = memory(preset, name, args.memory), "pt" if args.memory == DELTA_RULE else "safetensors"
        write_checkpoint(folder, own, args.seed, args.semantics, args.zero_deltas, format)
        if args.sidecar is None:
            return
        export_sidecar(folder, args.output, args.sidecar)
    print(f"{args.sidecar}: {args.sidecar.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, OSError) as e:
        print(f"make_model: error: {e}", file=sys.stderr)
        sys.exit(2)
