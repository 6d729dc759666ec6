"""Makes a tiny random model of an architecture that transformers and llama.cpp's converter know, and a random adapter.

    python tools/make_tiny_model.py starcoder2 FOLDER --set sliding_window=null

FOLDER gets all that a whole-model fixture has but the logits: the base in Hugging Face's form (config, tokenizer of the
fixtures, weights in F32), the same as model-f32.gguf, and a checkpoint with deltas of q, k, v and o in every layer that
attends. No weight is as transformers begins with it: norms are not 1 and biases not 0, or one that is left out would
not show. tools/make_fixture.py goes on from there. Needs llamamem[reference], and the tree that `llamamem build`
makes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from make_checkpoint import Memory, write_checkpoint

from llamamem.errors import LlamamemError
from llamamem.formats.base import read_base
from llamamem.formats.sidecar.layout import MEMORY_KINDS, RWKV_MS
from llamamem.native.vendor import tree_path
from llamamem.reference.require import require_torch

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_CHUNK = 20  # tokens: the states wrap round in a fixture's prompts
_TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "models" / "llama_rwkv_ms"  # of 300 tokens

# The converter, with the tokenizer above for every architecture: it knows those of published models alone.
_CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
real = TextModel.__init__

def init(self, *args, **kwargs):
    type(self).set_vocab = TextModel._set_vocab_gpt2
    real(self, *args, **kwargs)

TextModel.__init__ = init
sys.argv = [sys.argv[1] + "/convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_base(folder: Path, model_type: str, settings: dict[str, Any], seed: int) -> None:
    """The base in Hugging Face's form."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(model_type, **_SIZES | settings)
        model = AutoModelForCausalLM.from_config(config).float()
    except (ValueError, TypeError) as e:
        why = str(e).partition(". ")[0]  # it goes on with all the names that there are
        raise LlamamemError(
            f"transformers makes no {model_type} of these sizes ({why}); change them with --set"
        ) from None
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.dim() == 1:  # a norm or a bias, about what it begins with
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    for file in _TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, folder)


def convert(folder: Path) -> Path:
    """Its GGUF, by llama.cpp's own converter."""
    tree, gguf = tree_path(), folder / "model-f32.gguf"
    if not tree.is_dir():
        raise LlamamemError(f"{tree} is not there; run `llamamem build` first")
    # a name of its own: from one with phi-3 in it llama.cpp takes what its tokens are
    options = ["--outtype", "f32", "--model-name", "tiny", "--outfile", str(gguf)]
    command = [sys.executable, "-c", _CONVERT, str(tree), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        why = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise LlamamemError(f"llama.cpp's converter does not take it ({why}); --set what it asks for")
    return gguf


def write_adapter(folder: Path, gguf: Path, kind: str, seed: int) -> None:
    """An adapter's checkpoint beside the base, with the widths that its GGUF says."""
    base = read_base(gguf)
    widths = {}
    for layer in base.layers:
        if layer.k_out is not None and layer.v_out is not None:
            widths[layer.layer] = (layer.q_out, layer.k_out, layer.v_out, layer.o_out)
    if not widths:
        raise LlamamemError(f"no layer of {base.arch} has keys and values of its own")
    heads = ("q", "k", "v", "o")
    memory = Memory(base.name, base.hidden, widths, chunk=_CHUNK, delta_heads=heads, kind=kind, prefix="model.layers.")
    with tempfile.TemporaryDirectory() as made:
        write_checkpoint(Path(made) / "adapter", memory, seed, format="pt")
        for file in (Path(made) / "adapter").iterdir():
            shutil.copy(file, folder)


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE of a config; the value is JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text}: give KEY=VALUE, such as sliding_window=null")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a tiny random model, its GGUF and a random adapter for it.")
    parser.add_argument("model_type", metavar="MODEL_TYPE", help="as a config.json has it, such as starcoder2")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write; empty or new")
    parser.add_argument("--kind", choices=MEMORY_KINDS, default=RWKV_MS, help="kind of memory (default: %(default)s)")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="a member of config.json, as JSON"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    require_torch("make_tiny_model")
    if args.folder.is_dir() and any(args.folder.iterdir()):
        raise LlamamemError(f"{args.folder} is not empty; give a new folder")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        write_base(folder, args.model_type, dict(args.set), args.seed)
        gguf = convert(folder)
        write_adapter(folder, gguf, args.kind, args.seed)
        shutil.copytree(folder, args.folder, dirs_exist_ok=True)
        print(f"{args.folder}: {read_base(gguf).arch}, with {args.kind}")


if __name__ == "__main__":
    try:
        main()
    except (LlamamemError, OSError) as e:
        print(f"make_tiny_model: error: {e}", file=sys.stderr)
        sys.exit(2)
