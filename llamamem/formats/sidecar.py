"""The sidecar GGUF: what it holds, and everything a reader refuses. Both format versions, semantics 1 and 2.

Tensors are named `blk.{layer}.{short}`; shapes are torch's. See sidecar_export.py for writing one.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from llamamem.errors import LlamamemError
from llamamem.formats import sidecar_config as cfg
from llamamem.formats.base import FULL, SLIDING, AttentionLayer
from llamamem.formats.gguf_file import ALIGNMENT, GgufField, GgufTensor, read_gguf_index, read_gguf_tensors

ARCHITECTURE = "rwkv_ms_memory"
SCHEMA = "delta_mem_rwkv_ms_memory_gguf_sidecar"
NAME_FORMAT = "compact_with_source_name_manifest"
PREFIX = "delta_mem."
HEADS = ("q", "k", "v", "o")
VECTORS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight", "ln_x.bias")

# keys of the file, without the prefix, and their types; those for people may be absent
FOR_PEOPLE = (
    *("status", "memory_type", "base_model", "checkpoint_repo", "base_gguf", "mmproj_gguf", "mmproj_gguf_sha256"),
    *("adapter_metadata_json", "required_runtime_hooks_json"),
)
STRINGS = (
    *FOR_PEOPLE,
    *("schema", "memory_backend", "memory_readout_mode", "base_gguf_sha256", "tensor_name_format"),
    *("rwkv_ms_boundary_mode", "rwkv_ms_state_dtype", "target_layers_json", "delta_heads_json"),
    *("per_layer_attention_json", "config_json", "tensor_manifest_json"),
)
U32 = (
    *("format_version", "rwkv_ms_semantics_version", "tensor_count", "rank", "num_state_heads", "rwkv_ms_num_states"),
    "rwkv_ms_chunk_size",
)
TYPES = (
    dict.fromkeys(STRINGS, GGUFValueType.STRING)
    | dict.fromkeys(U32, GGUFValueType.UINT32)
    | dict.fromkeys(("total_numel", "total_bytes"), GGUFValueType.UINT64)
    | {"alpha": GGUFValueType.FLOAT32}
)

_MAX_FILE = 1 << 30  # bytes; the published file has 1.7 MB
_MAX_PERIOD = 1 << 24  # chunk * states: the runtime keeps the counter modulo this in fp32
_MAX_STATE = 1 << 24  # values of one layer's state
_SHORT = {
    "memory_q_proj": "mem_q",
    "memory_k_proj": "mem_k",
    "memory_v_proj": "mem_v",
    "beta_proj": "beta",
    "beta_bias": "beta_b",
    "lambda_proj": "lambda",
    "lambda_bias": "lambda_b",
} | {f"delta_{head}_proj": f"delta_{head}" for head in HEADS}
_SOURCE = re.compile(r"model\.language_model\.layers\.(0|[1-9][0-9]{0,4})\.self_attn\.(.+)")


@dataclass(frozen=True)
class Sidecar:
    """A valid sidecar. `fields` and `tensors` are the file's own, in its order."""

    path: Path
    format_version: int
    semantics: int
    rank: int
    heads: int  # N, state heads
    states: int  # M, states a head
    chunk: int  # C, tokens
    alpha: float
    erase_gate: float
    update_mode: str
    couple_lambda: bool
    hidden: int
    delta_heads: tuple[str, ...]
    layers: tuple[AttentionLayer, ...]
    base_sha256: str
    config: dict[str, Any]
    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]

    def weights(self, layer: int) -> dict[str, np.ndarray]:
        """The tensors of one base layer by short name, up-converted to fp32."""
        prefix = f"blk.{layer}."
        return {name.removeprefix(prefix): values(t) for name, t in self.tensors.items() if name.startswith(prefix)}


def read_sidecar(path: str | Path) -> Sidecar:
    """Reads and checks a sidecar file. Raises LlamamemError naming the file and the key or tensor at fault."""
    path = Path(path)
    if path.is_file() and path.stat().st_size > _MAX_FILE:
        raise LlamamemError(f"{path}: larger than {_MAX_FILE >> 20} MiB, which no sidecar is; is it the base model?")
    index = read_gguf_index(path)
    arch = index.get("general.architecture")
    if arch != ARCHITECTURE:
        raise LlamamemError(f"{path}: architecture is {arch!r}, a sidecar has '{ARCHITECTURE}'; is it the base model?")
    if index.get("general.alignment", ALIGNMENT) != ALIGNMENT:
        raise LlamamemError(f"{path}: key 'general.alignment' is not {ALIGNMENT}")
    tensors = {tensor.name: tensor for tensor in read_gguf_tensors(index)}
    ends = [info.offset + len(tensors[info.name].data) for info in index.tensors]
    end = index.data_start + -(-max(ends, default=0) // ALIGNMENT) * ALIGNMENT
    if path.stat().st_size > end:
        raise LlamamemError(f"{path}: {path.stat().st_size - end} bytes follow its last tensor; export it again")
    return check_sidecar(path, index.fields, tensors)


def check_sidecar(path: Path, fields: dict[str, GgufField], tensors: dict[str, GgufTensor]) -> Sidecar:
    """Everything that can be checked without the base. `path` is only named in errors."""
    keys = _Keys(path, fields)
    version = keys.get("format_version")
    if version not in (1, 2):
        raise LlamamemError(f"{path}: key '{PREFIX}format_version' is {version}; 1 and 2 are known")
    keys.expect("schema", f"{SCHEMA}.v{version}")
    keys.expect("tensor_name_format", NAME_FORMAT)
    if PREFIX + "rwkv_ms_state_dtype" in fields:
        keys.expect("rwkv_ms_state_dtype", "f32")
    semantics = keys.get("rwkv_ms_semantics_version", default=1 if version == 1 else None)
    if not 1 <= semantics <= version:
        known = "1" if version == 1 else "1 or 2"
        raise LlamamemError(f"{path}: key '{PREFIX}rwkv_ms_semantics_version' is {semantics}, must be {known}")

    where, config = f"{path}: config_json", keys.json("config_json", dict)
    cfg.check_config(where, config)
    for key, want in (("memory_backend", "rwkv_ms"), ("memory_readout_mode", "delta")):
        keys.expect(key, cfg.choice(where, config, key, (want,)))
    keys.expect("rwkv_ms_boundary_mode", cfg.choice(where, config, "rwkv_ms_boundary_mode", ("fixed_chunk",)))
    if config.get("rwkv_ms_semantics_version", 1) != semantics:
        raise LlamamemError(f"{where}: rwkv_ms_semantics_version differs from the key of the file, {semantics}")
    if config.get("rwkv_ms_state_dtype", "f32") != "f32":
        raise LlamamemError(f"{where}: rwkv_ms_state_dtype is not f32, which alone is implemented")
    limits = {"rank": 256, "num_state_heads": 64, "rwkv_ms_num_states": 1024, "rwkv_ms_chunk_size": _MAX_PERIOD}
    size = {key: keys.equal(key, cfg.integer(where, config, key, 1, high)) for key, high in limits.items()}
    if size["rwkv_ms_chunk_size"] * size["rwkv_ms_num_states"] > _MAX_PERIOD:
        raise LlamamemError(f"{where}: rwkv_ms_chunk_size * rwkv_ms_num_states is over {_MAX_PERIOD}")
    alpha = keys.equal("alpha", float(np.float32(cfg.number(where, config, "alpha"))))
    if size["num_state_heads"] * size["rwkv_ms_num_states"] * size["rank"] ** 2 > _MAX_STATE:
        raise LlamamemError(f"{where}: rank, heads and states give a state of over {_MAX_STATE} values a layer")
    base_sha256 = keys.get("base_gguf_sha256").lower()
    if not re.fullmatch("[0-9a-f]{64}", base_sha256):
        raise LlamamemError(f"{path}: key '{PREFIX}base_gguf_sha256' is not 64 hex digits")

    delta_heads = keys.json("delta_heads_json", list)
    if not delta_heads or any(h not in HEADS for h in delta_heads) or len(set(delta_heads)) != len(delta_heads):
        raise LlamamemError(f"{path}: key '{PREFIX}delta_heads_json' is {delta_heads}; the heads are {' '.join(HEADS)}")
    layers = _layers(keys, delta_heads)
    for key, value in (("delta_heads", delta_heads), ("target_layers", [layer.layer for layer in layers])):
        if config.get(key) != value:
            raise LlamamemError(f"{where}: {key} differs from key '{PREFIX}{key}_json'")
    keys.refuse_unknown()

    hidden = next((t.shape[-1] for t in tensors.values() if t.name.endswith(".mem_v")), 0)
    sidecar = Sidecar(
        path=path,
        format_version=version,
        semantics=semantics,
        rank=size["rank"],
        heads=size["num_state_heads"],
        states=size["rwkv_ms_num_states"],
        chunk=size["rwkv_ms_chunk_size"],
        alpha=alpha,
        erase_gate=cfg.number(where, config, "rwkv_ms_erase_gate"),
        update_mode=cfg.choice(where, config, "state_update_mode", cfg.UPDATE_MODES),
        couple_lambda=cfg.boolean(where, config, "couple_lambda"),
        hidden=hidden,
        delta_heads=tuple(delta_heads),
        layers=layers,
        base_sha256=base_sha256,
        config=config,
        fields=fields,
        tensors=tensors,
    )
    _check_shapes(sidecar, rankwise=cfg.boolean(where, config, "rankwise_gates"))
    _check_manifest(sidecar, keys)
    return sidecar


def short_name(source: str) -> str:
    """A tensor's name in the file, of its name in the checkpoint."""
    match = _SOURCE.fullmatch(source)
    if match:
        layer, tail = match.groups()
        if tail in _SHORT:
            return f"blk.{layer}.{_SHORT[tail]}"
        if tail.startswith("hrm_rwkv7_core."):
            return f"blk.{layer}.rwkv.{tail.removeprefix('hrm_rwkv7_core.')}"
    return f"tensor.{hashlib.sha1(source.encode()).hexdigest()[:16]}"


def values(tensor: GgufTensor) -> np.ndarray:
    """A tensor as fp32, in its torch shape."""
    if tensor.dtype == "BF16":
        raw = np.frombuffer(tensor.data, "<u2").astype("<u4") << 16
        return raw.view("<f4").reshape(tensor.shape)
    return np.frombuffer(tensor.data, {"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype("<f4").reshape(tensor.shape)


def _layers(keys: _Keys, delta_heads: list[str]) -> tuple[AttentionLayer, ...]:
    targets, entries = keys.json("target_layers_json", list), keys.json("per_layer_attention_json", list)
    ascending = all(type(t) is int for t in targets) and targets == sorted(set(targets))
    if not targets or not ascending or targets[0] < 0 or targets[-1] >= 4096:
        raise LlamamemError(f"{keys.path}: key '{PREFIX}target_layers_json' is not an ascending list of layers")
    if len(entries) != len(targets):
        raise LlamamemError(f"{keys.path}: key '{PREFIX}per_layer_attention_json' needs {len(targets)} entries")
    layers = []
    for target, entry in zip(targets, entries, strict=True):
        where = f"{keys.path}: per_layer_attention_json, layer {target}"
        if not isinstance(entry, dict) or entry.get("layer") != target:
            raise LlamamemError(f"{where}: this entry is of another layer or no object")
        kind = cfg.choice(where, entry, "attention_kind", (SLIDING, FULL, "sliding", "full"))
        active = entry.get("active_delta_heads", delta_heads)
        if not isinstance(active, list) or sorted(map(str, active)) != sorted(delta_heads):
            raise LlamamemError(f"{where}: active_delta_heads differ from delta_heads_json, which is not implemented")
        width = {
            head: None if entry.get(f"{head}_out") is None else cfg.integer(where, entry, f"{head}_out", 0, 1 << 20)
            for head in HEADS
        }
        for head in delta_heads:
            if not width[head]:
                raise LlamamemError(f"{where}: {head}_out is missing, but delta head {head} is active")
        layers.append(
            AttentionLayer(
                layer=target,
                attention_kind=SLIDING if kind.startswith("sliding") else FULL,
                q_out=width["q"] or 0,
                k_out=width["k"],
                v_out=width["v"],
                o_out=width["o"] or 0,
            )
        )
    return tuple(layers)


def _check_shapes(sidecar: Sidecar, rankwise: bool) -> None:
    D, H = sidecar.heads * sidecar.rank, sidecar.hidden
    gates = D if rankwise else sidecar.heads
    expected: dict[str, tuple[int | str, ...]] = {}
    optional = set()
    for layer in sidecar.layers:
        n = f"blk.{layer.layer}."
        expected |= {f"{n}{x}": (D, H) for x in ("mem_q", "mem_k", "mem_v")}
        optional |= {f"{n}mem_q", f"{n}mem_k"}  # unused by this backend
        for gate in ("beta",) if sidecar.couple_lambda else ("beta", "lambda"):
            expected |= {f"{n}{gate}": (gates, H), f"{n}{gate}_b": (gates,)}
        expected |= {f"{n}rwkv.{x}": (D,) for x in VECTORS}
        expected |= {f"{n}rwkv.{x}.weight": (D, D) for x in ("receptance", "key", "value", "output")}
        for x in "wag":
            expected |= {f"{n}rwkv.{x}1": (D, "L"), f"{n}rwkv.{x}2": ("L", D)}
        for head in HEADS:
            if width := layer.width(head):
                expected[f"{n}delta_{head}"] = (width, D)
            if head not in sidecar.delta_heads:
                optional.add(f"{n}delta_{head}")
        if layer.o_out not in (0, H):
            raise LlamamemError(f"{sidecar.path}: per_layer_attention_json, layer {layer.layer}: o_out is not {H}")
    lora = next((t.shape[-1] for name, t in sidecar.tensors.items() if name.endswith(".rwkv.w1")), 0)
    for name, shape in expected.items():
        want = tuple(lora if n == "L" else int(n) for n in shape)
        tensor = sidecar.tensors.get(name)
        if tensor is None:
            if name not in optional:
                raise LlamamemError(f"{sidecar.path}: tensor '{name}' {list(want)} is missing")
        elif _plain(tensor.shape) != _plain(want):
            raise LlamamemError(f"{sidecar.path}: tensor '{name}' has shape {list(tensor.shape)}, must be {list(want)}")
    for name, tensor in sidecar.tensors.items():
        if name not in expected:
            raise LlamamemError(f"{sidecar.path}: tensor '{name}' is unknown or of a layer that is not a target")
        if not np.isfinite(values(tensor)).all():
            raise LlamamemError(f"{sidecar.path}: tensor '{name}' holds NaN or infinity")


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading ones, which some writers of GGUF leave out."""
    return _plain(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def _check_manifest(sidecar: Sidecar, keys: _Keys) -> None:
    path, entries = sidecar.path, keys.json("tensor_manifest_json", list)
    manifest: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in manifest:
            raise LlamamemError(f"{path}: tensor_manifest_json has an entry without a name, or {name!r} twice")
        manifest[name] = entry
    if manifest.keys() != sidecar.tensors.keys():
        odd = sorted(manifest.keys() ^ sidecar.tensors.keys())[0]
        raise LlamamemError(f"{path}: tensor '{odd}' is in the manifest or in the file, but not in both")
    for name, tensor in sidecar.tensors.items():
        entry, said = manifest[name], manifest_entry(tensor, str(manifest[name].get("source_name")))
        if short_name(said["source_name"]) != name:
            raise LlamamemError(f"{path}: manifest entry '{name}' has another tensor's source_name")
        # the type's name may stand behind that of its enum
        found = entry | {"gguf_type": str(entry.get("gguf_type")).rpartition(".")[2].upper()}
        if isinstance(found.get("shape"), list) and _plain(tuple(found["shape"])) == _plain(tensor.shape):
            found["shape"] = said["shape"]
        for key in ("sha256_raw", "shape", "gguf_type", "numel", "bytes"):
            if found.get(key) != said[key]:
                raise LlamamemError(
                    f"{path}: tensor '{name}': {key} is {said[key]}, its manifest entry says {entry.get(key)}; "
                    "fetch or export the file again"
                )
    keys.equal("tensor_count", len(sidecar.tensors))
    keys.equal("total_numel", sum(prod(t.shape) for t in sidecar.tensors.values()))
    keys.equal("total_bytes", sum(len(t.data) for t in sidecar.tensors.values()))


def manifest_entry(tensor: GgufTensor, source: str) -> dict[str, Any]:
    """What the manifest says of a tensor."""
    torch_dtype = {"BF16": "torch.bfloat16", "F16": "torch.float16", "F32": "torch.float32"}[tensor.dtype]
    return {
        "name": tensor.name,
        "source_name": source,
        "shape": list(tensor.shape),
        "torch_dtype": torch_dtype,
        "gguf_type": tensor.dtype,
        "numel": prod(tensor.shape),
        "bytes": len(tensor.data),
        "sha256_raw": hashlib.sha256(tensor.data).hexdigest(),
    }


@dataclass(frozen=True)
class _Keys:
    """The keys of a file; every getter checks the type first."""

    path: Path
    fields: Mapping[str, GgufField]

    def get(self, key: str, default: Any = None) -> Any:
        field = self.fields.get(PREFIX + key)
        if field is None:
            if default is None:
                raise LlamamemError(f"{self.path}: key '{PREFIX}{key}' is missing")
            return default
        if field.type != TYPES[key]:
            raise LlamamemError(
                f"{self.path}: key '{PREFIX}{key}' has type {field.type.name}, must be {TYPES[key].name}"
            )
        if isinstance(field.value, float) and not math.isfinite(field.value):
            raise LlamamemError(f"{self.path}: key '{PREFIX}{key}' is {field.value}, must be finite")
        return field.value

    def expect(self, key: str, want: str) -> None:
        if (value := self.get(key)) != want:
            raise LlamamemError(f"{self.path}: key '{PREFIX}{key}' is {value!r}, but only '{want}' is implemented")

    def equal(self, key: str, want: Any) -> Any:
        if (value := self.get(key)) != want:
            raise LlamamemError(f"{self.path}: key '{PREFIX}{key}' is {value}, the rest of the file says {want}")
        return want

    def json(self, key: str, kind: type) -> Any:
        value = cfg.parse_json(f"{self.path}: key '{PREFIX}{key}'", self.get(key))
        if not isinstance(value, kind):
            raise LlamamemError(f"{self.path}: key '{PREFIX}{key}' is not a JSON {kind.__name__}")
        return value

    def refuse_unknown(self) -> None:
        for key in self.fields:
            name = key.removeprefix(PREFIX)
            if key.startswith(PREFIX) and name in TYPES:
                if name in FOR_PEOPLE:
                    self.get(name)
            elif not key.startswith("general."):
                raise LlamamemError(f"{self.path}: unknown key '{key}': it may change the maths, so it is refused")
