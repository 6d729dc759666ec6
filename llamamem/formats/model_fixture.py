"""Whole-model fixtures: a base in Hugging Face's form and as GGUF, an adapter's checkpoint, and what came of them.

`logits.npz` has the ids of each prompt (`p0_ids`) and logits [n, V]: `p0_base`; `p0_mem`, or `p0_mem_v1` and `_v2`
where there is a config for each semantics; `_step`, in pieces; `_after_p1_kvdrop`, on the memory of another prompt with
the KV cache dropped; `_frozen_after_p1`, the same with nothing written. The memory after it is in `p0_S`, `p0_prev`,
`p0_pos` (`p0_v1_S`, `p0_after_p1_S`).
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llamamem.errors import LlamamemError

LOGITS, CONFIG = "logits.npz", "delta_mem_config.json"
STATE = ("S", "prev", "pos")

_CASE = re.compile(
    r"(?P<prompt>p\d+)_(?:base|mem(?:_(?P<version>v\d+))?)"
    r"(?:_(?P<step>step)|_after_(?P<after>p\d+)_kvdrop|_frozen_after_(?P<frozen>p\d+))?"
)


@dataclass(frozen=True)
class Case:
    """One array of logits and how to come by it. Without a config it is the base."""

    name: str
    ids: np.ndarray  # [n]
    logits: np.ndarray  # [n, V]
    config: str | None  # file of the adapter's config
    before: np.ndarray | None = None  # ids that the memory was written with before, their text dropped
    frozen: bool = False  # nothing is written
    step: bool = False  # token by token
    state: dict[str, np.ndarray] = field(default_factory=dict)  # of STATE, by target layer first


@dataclass(frozen=True)
class ModelFixture:
    path: Path
    gguf: Path | None
    cases: tuple[Case, ...]

    @property
    def configs(self) -> list[str]:
        """The adapter's config files that cases need."""
        return list(dict.fromkeys(case.config for case in self.cases if case.config is not None))


def read_model_fixture(path: str | Path) -> ModelFixture:
    """Reads the folder of a fixture. Raises LlamamemError for what is missing, by file or array."""
    path = Path(path)
    arrays = _load(path / LOGITS)
    cases = tuple(_case(path, name, arrays) for name in arrays if _CASE.fullmatch(name))
    if not cases:
        raise LlamamemError(f"{path / LOGITS}: no array is named as a case, such as p0_base or p0_mem")
    found = sorted(path.glob("*.gguf"))
    models = [file for file in found if file.name.startswith("model")] or found
    if len(models) > 1:
        raise LlamamemError(f"{path}: {models[0].name} and {models[1].name} may both be the base; keep one model*.gguf")
    return ModelFixture(path, models[0] if models else None, cases)


def _case(path: Path, name: str, arrays: dict[str, np.ndarray]) -> Case:
    match = _CASE.fullmatch(name)
    assert match is not None
    prompt, version, after, frozen = (match[group] for group in ("prompt", "version", "after", "frozen"))
    ids, logits, other = _ids(path, prompt, arrays), arrays[name], after or frozen
    if logits.ndim != 2 or len(logits) != len(ids) or not np.isfinite(logits).all():
        raise LlamamemError(
            f"{path / LOGITS}: array '{name}' of shape {list(logits.shape)} is not finite logits of {len(ids)} tokens"
        )
    if "_base" in name:
        return Case(name, ids, logits, None)
    config = CONFIG if version in (None, "v1") else CONFIG.replace(".json", f"_{version}.json")
    if not (path / config).is_file():
        raise LlamamemError(f"{path}: {config} is missing, which array '{name}' of {LOGITS} is of")
    # a frozen memory stays as the other prompt left it; in pieces it becomes what it does in one pass
    prefix = "_".join(part for part in (frozen or prompt, version, after and f"after_{after}") if part)
    state = {key: arrays[f"{prefix}_{key}"] for key in STATE if f"{prefix}_{key}" in arrays}
    before = None if other is None else _ids(path, other, arrays)
    return Case(name, ids, logits, config, before, frozen is not None, match["step"] is not None, state)


def _ids(path: Path, prompt: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    ids = arrays.get(f"{prompt}_ids")
    if ids is None or ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0:
        raise LlamamemError(f"{path / LOGITS}: array '{prompt}_ids' is missing, or no list of token ids")
    return ids


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "meta"}
    except FileNotFoundError:
        raise LlamamemError(f"{path}: no such file; a fixture of a whole model is a folder with it") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, KeyError, zipfile.BadZipFile) as e:
        raise LlamamemError(f"{path}: not a readable .npz file ({e})") from None
