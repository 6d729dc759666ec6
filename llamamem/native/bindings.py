"""libllama in this process: which build is loaded, our C functions on top of the stock bindings, and its log.

The pure Python bindings (`llama-cpp-python`, installed with nothing compiled) load whatever directory
`LLAMA_CPP_LIB_PATH` names when they are first imported, so a process has exactly one libllama for its whole life.
Our own functions are declared here as `patches/src/llama-adapter-mem.h` declares them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.native.build import find_build

BINDINGS_REQUIREMENT = "llama-cpp-python==0.3.36"
INSTALL_BINDINGS = (
    f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install --no-deps --no-binary llama-cpp-python {BINDINGS_REQUIREMENT}"
    " && pip install numpy typing-extensions diskcache jinja2"
)

N_ERR = 1024  # bytes for one line of error text

_c_float_p = ctypes.POINTER(ctypes.c_float)
_c_int32_p = ctypes.POINTER(ctypes.c_int32)
_c_int64_p = ctypes.POINTER(ctypes.c_int64)


def floats(array: np.ndarray) -> Any:
    """A C pointer to the values of a contiguous float32 array."""
    return array.ctypes.data_as(_c_float_p)


class AdapterMemInfo(ctypes.Structure):
    """`struct llama_adapter_mem_info`."""

    _fields_ = [
        ("sidecar_sha256", ctypes.c_char * 65),
        ("base_sha256", ctypes.c_char * 65),
        ("fingerprint", ctypes.c_char * 65),
        ("n_layer", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
        ("n_head", ctypes.c_uint32),
        ("n_state", ctypes.c_uint32),
        ("n_chunk", ctypes.c_uint32),
        ("semantics", ctypes.c_uint32),
        ("alpha", ctypes.c_float),
        ("mode", ctypes.c_int),
        ("kind", ctypes.c_char * 16),
    ]


class AdapterMemEvalParams(ctypes.Structure):
    """`struct llama_adapter_mem_eval_params`."""

    _fields_ = [
        ("n_embd", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
        ("n_head", ctypes.c_uint32),
        ("n_state", ctypes.c_uint32),
        ("n_chunk", ctypes.c_uint32),
        ("semantics", ctypes.c_uint32),
        ("alpha", ctypes.c_float),
        ("erase_gate", ctypes.c_float),
        ("update_mode", ctypes.c_int32),
        ("couple_lambda", ctypes.c_bool),
        ("n_tensors", ctypes.c_uint32),
        ("names", ctypes.POINTER(ctypes.c_char_p)),
        ("data", ctypes.POINTER(_c_float_p)),
        ("ne", _c_int64_p),
        ("n_tokens", ctypes.c_uint32),
        ("h", _c_float_p),
        ("features", _c_float_p),
        ("mask", _c_int32_p),
        ("S", _c_float_p),
        ("prev", _c_float_p),
        ("n_past", _c_int64_p),
        ("trace", _c_float_p),
        ("delta", _c_float_p * 4),
    ]


# name -> (argument types, result type); opaque structs are void pointers, as in the stock bindings
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "llama_adapter_mem_mode_from_name": ([ctypes.c_char_p], ctypes.c_int32),
    "llama_adapter_mem_mode_name": ([ctypes.c_int], ctypes.c_char_p),
    "llama_adapter_mem_build_id": ([], ctypes.c_char_p),
    "llama_adapter_mem_sidecar_init": (
        [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t],
        ctypes.c_void_p,
    ),
    "llama_adapter_mem_sidecar_free": ([ctypes.c_void_p], None),
    "llama_model_set_adapter_mem": (
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_bool, ctypes.c_char_p, ctypes.c_size_t],
        ctypes.c_bool,
    ),
    "llama_model_adapter_mem_info": ([ctypes.c_void_p, ctypes.POINTER(AdapterMemInfo)], ctypes.c_bool),
    "llama_model_adapter_mem_layer": ([ctypes.c_void_p, ctypes.c_uint32], ctypes.c_int32),
    "llama_adapter_mem_get_state": (
        [ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, _c_float_p, _c_float_p],
        ctypes.c_int64,
    ),
    "llama_adapter_mem_set_state": (
        [ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32, _c_float_p, _c_float_p, ctypes.c_int64],
        ctypes.c_bool,
    ),
    "llama_adapter_mem_state_save_file": ([ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32], ctypes.c_size_t),
    "llama_adapter_mem_state_load_file": ([ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32], ctypes.c_size_t),
    "llama_adapter_mem_state_error": ([], ctypes.c_char_p),
    "llama_adapter_mem_state_error_clear": ([], None),
    "llama_adapter_mem_seq_reset": ([ctypes.c_void_p, ctypes.c_int32], ctypes.c_bool),
    "llama_adapter_mem_seq_set": ([ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_float], ctypes.c_bool),
    "llama_adapter_mem_eval": ([ctypes.POINTER(AdapterMemEvalParams), ctypes.c_char_p, ctypes.c_size_t], ctypes.c_bool),
}


@dataclass(frozen=True)
class Library:
    """The libllama of this process.

    `api` is the stock low-level binding module; `adapter_mem` our functions by name, empty for a stock library;
    `build_id` the identity compiled into a patched library, None for a stock one.
    """

    lib_dir: Path
    exact_gelu: bool
    api: ModuleType
    adapter_mem: dict[str, Any]
    build_id: str | None

    def function(self, name: str) -> Any:
        """One of our C functions. Raises LlamamemError for a stock library."""
        if name not in self.adapter_mem:
            raise LlamamemError(
                f"{self.lib_dir}: this libllama is not the patched build (no {name}): run `llamamem build`,"
                " or point LLAMAMEM_BIN_DIR at a patched build"
            )
        return self.adapter_mem[name]


class _Log:
    """The last lines that llama.cpp logged, and all lines and the errors among them since the last call began."""

    def __init__(self, n_lines: int = 256):
        self.lines: deque[str] = deque(maxlen=n_lines)
        self.since: list[str] = []
        self.errors: list[str] = []
        self._partial = ""
        self._level = 0

    def write(self, level: int, text: str) -> None:
        if level != 5:  # 5 continues the line before
            self._level = level
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if line.strip():
                self.lines.append(line)
                self.since.append(line)
                if self._level == 4:
                    self.errors.append(line.strip())


_log = _Log()
_library: Library | None = None
_log_callback: Any = None  # ctypes needs the callback object to stay alive


def load_library(
    exact_gelu: bool = False, bin_dir: str | Path | None = None, *, lib_dir: str | Path | None = None
) -> Library:
    """Loads libllama into this process, once; a later call returns the same one.

    `exact_gelu` takes the test variant (same sources, the CPU's fp16 GELU table compiled out). `bin_dir` names a build
    made elsewhere, whose identity is checked; without it the build is looked up. `lib_dir` is a directory of libllama
    that is taken as it is, for one a stock one to compare with.
    Raises LlamamemError when the bindings or the library are missing, and when this process has already loaded a
    different one: the choice is for the life of a process.
    """
    global _library, _log_callback
    lib_dir = Path(lib_dir or find_build(exact_gelu=exact_gelu, bin_dir=bin_dir).lib_dir).absolute()
    if _library is not None:
        if _library.lib_dir != lib_dir:
            raise LlamamemError(
                f"this process has already loaded libllama from {_library.lib_dir}, it cannot load the one in {lib_dir}"
                " too: one process, one variant; use a second process"
            )
        return _library
    if "llama_cpp" in sys.modules:
        raise LlamamemError(
            "llama_cpp was imported before llamamem chose its library: load llamamem's first, or use a second process"
        )
    os.environ["LLAMA_CPP_LIB_PATH"] = str(lib_dir)
    try:
        from llama_cpp import llama_cpp as api
    except ModuleNotFoundError as e:
        raise LlamamemError(f"the Python bindings are missing ({e.name}): {INSTALL_BINDINGS}") from e
    except (RuntimeError, OSError, AttributeError) as e:  # AttributeError: a symbol of another llama.cpp version
        raise LlamamemError(
            f"{lib_dir}: libllama does not load ({e}): build it again with `llamamem build`,"
            f" and check that the bindings are {BINDINGS_REQUIREMENT}"
        ) from e

    adapter_mem: dict[str, Any] = {}
    for name, (argtypes, restype) in _FUNCTIONS.items():
        function = getattr(api._lib, name, None)
        if function is not None:
            function.argtypes, function.restype = argtypes, restype
            adapter_mem[name] = function
    _log_callback = api.llama_log_callback(lambda level, text, _: _log.write(level, text.decode("utf-8", "replace")))
    api.llama_log_set(_log_callback, ctypes.c_void_p(0))
    api.llama_backend_init()
    build_id = (
        adapter_mem["llama_adapter_mem_build_id"]().decode() if "llama_adapter_mem_build_id" in adapter_mem else None
    )
    _library = Library(lib_dir, exact_gelu, api, adapter_mem, build_id)
    return _library


def loaded_library() -> Library:
    """The library that this process has loaded; without one, the default build is loaded."""
    return _library or load_library()


def log_lines() -> list[str]:
    """The last 256 lines that llama.cpp logged in this process, oldest first."""
    return list(_log.lines)


def begin_call() -> None:
    """Forgets the errors so far, so that a failure quotes its own reason and not an older one."""
    _log.errors.clear()
    _log.since.clear()


def logged_since() -> list[str]:
    """The lines logged since `begin_call`."""
    return list(_log.since)


def logged_error() -> str:
    """The first error since `begin_call`: llama.cpp logs the cause first, what came of it after."""
    return (_log.errors or list(_log.lines)[-1:] or ["no reason was logged"])[0]
