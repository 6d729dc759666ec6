"""Layer fixtures as JSON, the form of the memory's first implementation: `delta_mem_rwkv_ms_math_fixture.v1`.

Inputs and expected tensors are records `{shape, dtype, sha256, data}`; the weights are elsewhere. So what can be
checked is all that comes after the features: reads, routes, writes, the final state.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.json_text import parse_json

__all__ = ["SCHEMA", "read_json_fixture"]

SCHEMA = "delta_mem_rwkv_ms_math_fixture.v1"

# our names -> theirs, in the two sections
_INPUTS = {"S0": "initial_state", "pos0": "initial_positions", "token_mask": "token_mask"}
_EXPECTED = {
    **{name: f"{name}_heads" for name in "rkvab"},
    "decay": "w_decay",
    **{name: name for name in ("keep", "erase", "write")},
    "raw_read": "raw_reads",
    "routes": "read_routes_per_head",
    "final_S": "final_state",
    "final_pos": "final_positions",
}
_TYPES = {"float32": "<f4", "float16": "<f2", "int64": "<i8", "int32": "<i4", "bool": "?"}
_FIXED = {"rwkv_ms_boundary_mode": "fixed_chunk", "rwkv_ms_read_top_k": 0}


def read_json_fixture(path: Path, text: bytes) -> dict[str, np.ndarray]:
    """The arrays that an .npz fixture of features has, `meta` included. A LlamamemError names the member at fault."""
    data = parse_json(str(path), text.decode("utf-8", "replace"))
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise LlamamemError(f"{path}: is JSON, but not a fixture: its schema must be {SCHEMA}")
    scan, memory = _section(path, data, "scan_config"), _section(path, data, "delta_mem_config")
    for name, want in _FIXED.items():
        if scan.get(name, want) != want:
            raise LlamamemError(f"{path}: scan_config: {name} is {scan[name]!r}, but only {want!r} is implemented")
    arrays = {}
    for section, names in (("inputs", _INPUTS), ("expected", _EXPECTED)):
        records = _section(path, data, section)
        for ours, theirs in names.items():
            if theirs in records:
                arrays[ours] = _array(path, f"{section}.{theirs}", records[theirs])
    meta = {
        **{name: scan.get(name) for name in ("rwkv_ms_num_states", "rwkv_ms_chunk_size", "rwkv_ms_erase_gate")},
        "semantics_version": scan.get("rwkv_ms_semantics_version", 1),
        "num_state_heads": _section(path, data, "config").get("num_state_heads", 1),
        "alpha": memory.get("alpha"),
        "state_update_mode": memory.get("state_update_mode"),
    }
    return arrays | {"meta": np.array(json.dumps(meta))}


def _section(path: Path, data: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(found := data.get(name), dict):
        raise LlamamemError(f"{path}: member '{name}' is missing or not an object")
    return found


def _array(path: Path, name: str, record: Any) -> np.ndarray:
    if not isinstance(record, dict) or record.get("dtype") not in _TYPES:
        raise LlamamemError(f"{path}: {name} is not a record of {', '.join(_TYPES)}")
    try:
        array = np.array(record["data"], _TYPES[record["dtype"]]).reshape(record["shape"])
    except (KeyError, ValueError, TypeError, OverflowError) as e:
        raise LlamamemError(f"{path}: {name} is damaged ({e})") from None
    if record.get("sha256") not in (None, hashlib.sha256(array.tobytes()).hexdigest()):
        raise LlamamemError(f"{path}: {name} is damaged: its values do not have the hash that it names")
    return array
