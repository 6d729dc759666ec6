"""The adapter checkpoint that a sidecar is exported from: a directory with tensors, config and metadata.

`delta_mem_adapter.safetensors` or `delta_mem_adapter.pt` (a flat `{source name: tensor}` dict as torch.save writes it:
a zip with a pickle and one raw file a storage), `delta_mem_config.json`, `adapter_metadata.json`. The pickle is read
without torch, and only the few names that such a dict is made of are ever looked up; nothing in it can run.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import TYPE_SIZE, GgufTensor
from llamamem.formats.json_text import parse_json
from llamamem.formats.regular import open_regular

ADAPTER = "delta_mem_adapter"
CONFIG = "delta_mem_config.json"
METADATA = "adapter_metadata.json"

_MAX_PICKLE = 64 << 20  # bytes; the dict of a checkpoint of 186 tensors has 26 kB
_MAX_BYTES = 1 << 30  # of a file, and of all its tensors: a sidecar may not be larger
_MAX_JSON = 16 << 20  # bytes
_STORAGES = {"FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16"}


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by source name, the whole config, and the metadata ({} without a metadata file)."""

    path: Path
    adapter: Path
    config_path: Path
    tensors: dict[str, GgufTensor]
    config: dict[str, Any]
    metadata: dict[str, Any]

    @property
    def files(self) -> list[Path]:
        """What it was read from."""
        return [self.adapter, self.config_path, self.path / METADATA]


def read_checkpoint(path: str | Path, config: str | None = None) -> Checkpoint:
    """Reads a checkpoint directory. `config` is another config file: a name inside the directory, or a path.

    Raises LlamamemError if a file is missing or malformed, or if the pickle names anything but tensors.
    """
    path = Path(path)
    if not path.is_dir():
        raise LlamamemError(f"{path}: no such checkpoint directory; give the one that holds {ADAPTER}.pt")
    found = [file for suffix in (".safetensors", ".pt") if (file := path / f"{ADAPTER}{suffix}").is_file()]
    if not found:
        raise LlamamemError(f"{path}: holds neither {ADAPTER}.safetensors nor {ADAPTER}.pt")
    if len(found) > 1:
        raise LlamamemError(f"{path}: holds {found[0].name} and {found[1].name}; move away the one that is not meant")
    adapter = found[0]
    tensors = read_safetensors(adapter) if adapter.suffix == ".safetensors" else read_torch_zip(adapter)
    if not tensors:
        raise LlamamemError(f"{adapter}: holds no tensors")
    config_path = path / (config or CONFIG)
    if config is not None and not config_path.is_file():
        config_path = Path(config)
    metadata = _read_json(path / METADATA) if (path / METADATA).exists() else {}
    return Checkpoint(path, adapter, config_path, tensors, _read_json(config_path), metadata)


def read_safetensors(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a .safetensors file."""
    try:
        entries = deserialize(_read_bytes(path, _MAX_BYTES))  # type: ignore[no-untyped-call,unused-ignore]
    except SafetensorError as e:
        raise LlamamemError(f"{path}: not a safetensors file ({e})") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in TYPE_SIZE:
            raise LlamamemError(f"{path}: tensor '{name}' has type {entry['dtype']}; BF16, F16 and F32 are legal")
        tensors[name] = GgufTensor(name, entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return tensors


def read_torch_zip(path: Path) -> dict[str, GgufTensor]:
    """The tensors of a .pt file that torch.save wrote from a flat dict."""
    try:
        with zipfile.ZipFile(path) as archive:
            if path.stat().st_size > _MAX_BYTES:
                raise LlamamemError(f"{path}: over {_MAX_BYTES >> 20} MiB; no adapter is that large")
            return _read_torch_archive(path, archive)
    except FileNotFoundError:
        raise LlamamemError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError) as e:
        raise LlamamemError(f"{path}: not a zip of the kind that torch.save writes ({e})") from None


def _read_torch_archive(path: Path, archive: zipfile.ZipFile) -> dict[str, GgufTensor]:
    names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise LlamamemError(f"{path}: has {len(names)} data.pkl, one is expected; save it with torch.save")
    root = names[0].removesuffix("data.pkl")

    def member(name: str, limit: int | None = None) -> bytes:
        try:
            info = archive.getinfo(root + name)
        except KeyError:
            raise LlamamemError(f"{path}: '{root + name}' is missing in the zip") from None
        # torch.save compresses nothing, and a stored member cannot be larger than the file
        if info.compress_type != zipfile.ZIP_STORED or (limit is not None and info.file_size > limit):
            raise LlamamemError(f"{path}: '{root + name}' is compressed or too large; save it with torch.save")
        return archive.read(info)

    if root + "byteorder" in archive.namelist() and member("byteorder", 16) != b"little":
        raise LlamamemError(f"{path}: tensors are not little-endian; save it on a little-endian machine")
    try:
        found = _TensorUnpickler(member("data.pkl", _MAX_PICKLE), lambda key: member(f"data/{key}")).load()
    except pickle.UnpicklingError as e:
        raise LlamamemError(f"{path}: refused: {e}") from None
    except LlamamemError:
        raise
    except Exception as e:  # a damaged pickle may fail in any way; it cannot have run anything
        raise LlamamemError(f"{path}: its pickle is damaged ({type(e).__name__}: {e})") from None
    if not isinstance(found, dict):
        raise LlamamemError(f"{path}: holds a {type(found).__name__}, expected a flat dict of tensors")
    tensors = {}
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise LlamamemError(f"{path}: entry {name!r} is not a named tensor; expected a flat dict of tensors")
        tensors[name] = GgufTensor(name, value.dtype, value.shape, value.data)
    return tensors


@dataclass(frozen=True)
class _Storage:
    dtype: str
    data: bytes


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class _TensorUnpickler(pickle.Unpickler):
    """Looks up nothing but what a dict of tensors is made of; every other name is refused before it is imported."""

    def __init__(self, data: bytes, read_storage: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(data))
        self._read_storage = read_storage
        self._storages: dict[str, bytes] = {}
        self._n_bytes = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"its pickle asks for '{module}.{name}', which a dict of tensors never needs")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str() as dtype, str() as key, str(), int()) if dtype in TYPE_SIZE and key.isalnum():
                if key not in self._storages:
                    self._storages[key] = self._read_storage(key)
                    self._count(len(self._storages[key]))
                return _Storage(dtype, self._storages[key])
        raise pickle.UnpicklingError(f"its pickle has an unknown kind of storage: {str(pid)[:60]!r}")

    def _rebuild_tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
        """What torch's function of that name does; numpy refuses a view that reaches beyond the storage."""
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("its pickle makes a tensor without a storage")
        size = TYPE_SIZE[storage.dtype]
        self._count(prod(shape) * size)
        kind = np.dtype(f"<u{size}")
        view: np.ndarray = np.ndarray(shape, kind, storage.data, offset * size, tuple(step * size for step in stride))
        return _Tensor(storage.dtype, tuple(int(n) for n in shape), view.tobytes())

    def _count(self, n_bytes: int) -> None:
        """A step of 0, or many views of one storage, make any amount of a small file."""
        self._n_bytes += n_bytes
        if n_bytes < 0 or self._n_bytes > 2 * _MAX_BYTES:  # a storage and its tensor
            raise pickle.UnpicklingError(f"its tensors are over {_MAX_BYTES >> 20} MiB")


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise LlamamemError(f"{path}: over {limit >> 20} MiB; no such file of a checkpoint is that large")
        with open_regular(path) as file:
            return file.read()
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = _read_bytes(path, _MAX_JSON).decode("utf-8")
    except UnicodeDecodeError:
        raise LlamamemError(f"{path}: not UTF-8 text") from None
    value = parse_json(str(path), text)
    if not isinstance(value, dict):
        raise LlamamemError(f"{path}: not a JSON object")
    return value
