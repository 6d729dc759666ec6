"""A model and a context, driven in process through libllama.

    with Model.open("base.gguf", sidecar="memory.gguf") as model, Context(model, n_ctx=512) as context:
        logits = context.decode(ids)        # [n_tokens, n_vocab]
        S, prev, n = context.state(seq=0, i=0)

Needs the pure Python bindings and a patched build; without a sidecar a stock libllama does as well.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamamem.errors import LlamamemError
from llamamem.native.bindings import (
    N_ERR,
    AdapterMemInfo,
    Library,
    begin_call,
    floats,
    load_library,
    loaded_library,
    log_lines,
    logged_error,
    logged_since,
)

__all__ = ["Context", "Model", "State", "load_library", "loader_refusal", "log_lines"]

Floats = NDArray[np.float32]

MODES = ("serial", "fused", "batched")

OnNode = Callable[[str, bool], None]

_STATE_BUFFER = re.compile(r"(\S+) memory state buffer size")


class State(NamedTuple):
    """One target layer's memory of one sequence: S [N, M, R, R], prev [N*R], n tokens written."""

    S: Floats
    prev: Floats
    n: int


class Model:
    """A base GGUF, with or without a sidecar. `Model.open(...)` is a context manager; `close` frees the weights."""

    def __init__(self, library: Library, handle: Any, path: Path, mode: str):
        self.library = library
        self.handle = handle
        self.path = path
        self.mode = mode
        api = library.api
        self.n_vocab: int = api.llama_vocab_n_tokens(api.llama_model_get_vocab(handle))
        self.info: AdapterMemInfo | None = None  # None without a sidecar
        self.layers: list[int] = []  # the target layers
        info = AdapterMemInfo()
        get_info = library.adapter_mem.get("llama_model_adapter_mem_info")
        if get_info is not None and get_info(handle, ctypes.byref(info)):
            self.info = info
            layer = library.function("llama_model_adapter_mem_layer")
            self.layers = [layer(handle, i) for i in range(info.n_layer)]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        sidecar: str | os.PathLike[str] | None = None,
        mode: str = "batched",
        *,
        gpu_layers: int = -1,
        untested: bool = False,
        library: Library | None = None,
    ) -> Model:
        """Loads a base GGUF and gives it the sidecar's memory; `gpu_layers` lie on the GPU, if there is one (-1: all).

        `untested` tries architectures that no test is about, which are refused otherwise.
        The sidecar is read and checked first, the base's hash is computed while its weights load. Raises LlamamemError
        with the loader's own reason.
        """
        library = library or loaded_library()
        api = library.api
        if mode not in MODES:
            raise LlamamemError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        path = _readable(path, "base model")
        err = ctypes.create_string_buffer(N_ERR)
        side = None
        if sidecar is not None:
            side = library.function("llama_adapter_mem_sidecar_init")(
                os.fsencode(_readable(sidecar, "sidecar")), os.fsencode(path), err, N_ERR
            )
            if not side:
                raise LlamamemError(err.value.decode("utf-8", "replace"))
        try:
            begin_call()
            params = api.llama_model_default_params()
            params.n_gpu_layers = gpu_layers
            handle = api.llama_model_load_from_file(os.fsencode(path), params)
            if not handle:
                raise LlamamemError(f"{path}: the model does not load: {logged_error()}")
            if side is not None:
                set_memory = library.function("llama_model_set_adapter_mem")
                if not set_memory(handle, side, MODES.index(mode), untested, err, N_ERR):
                    api.llama_model_free(handle)
                    raise LlamamemError(err.value.decode("utf-8", "replace"))
        finally:
            if side is not None:
                library.function("llama_adapter_mem_sidecar_free")(side)
        return cls(library, handle, path, mode)

    def close(self) -> None:
        """Frees the weights; every context of the model must be closed before."""
        if self.handle is not None:
            self.library.api.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Context:
    """A llama_context: KV cache and memory state for up to `n_seq_max` sequences.

    `kv` is the type of both caches (f32, f16 or q8_0); q8_0 needs `flash_attn`. `n_ctx` is the whole size in tokens;
    llama.cpp rounds it up and, unless `unified`, divides it among the sequences. `on_node` has every node of the graph
    computed alone, and is called before (True) and after (False) each with its name. `devices` are those on which the
    memory's states lie. Raises LlamamemError when the runtime refuses (for one a context outside the mode that the
    memory was loaded with).
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        kv: str = "f32",
        flash_attn: bool = False,
        threads: int = 1,
        unified: bool = False,
        on_node: OnNode | None = None,
    ):
        api = model.library.api
        types = {"f32": api.GGML_TYPE_F32, "f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}
        if kv not in types:
            raise LlamamemError(f"KV cache type {kv!r} is not one of {', '.join(types)}")
        self.model = model
        params = api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = max(2048, n_ubatch)
        params.n_ubatch = n_ubatch
        params.n_seq_max = n_seq_max
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = types[kv]
        params.kv_unified = unified
        params.no_perf = True
        if on_node is not None:
            params.cb_eval = self._on_node = _node_callback(api, on_node)
        begin_call()
        self._api = api
        self.handle = api.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise LlamamemError(f"{model.path}: no context: {logged_error()}")
        self.devices = tuple(m[1] for line in logged_since() if (m := _STATE_BUFFER.search(line)))
        self.memory = api.llama_get_memory(self.handle)
        n_batch = api.llama_n_batch(self.handle)  # not more than the context
        self.n_batch = n_batch // n_ubatch * n_ubatch or n_batch  # a multiple, so that pieces split as the whole does

    # decoding

    def decode(self, ids: ArrayLike, pos: ArrayLike = 0, seq: ArrayLike = 0, all_logits: bool = True) -> Floats:
        """Runs tokens and returns the logits of every one, [n_tokens, n_vocab] (of the last one only, [1, n_vocab]).

        `pos` is the position of the first token, or one for each; `seq` the sequence of all tokens, or one for each.
        """
        tokens = np.ascontiguousarray(ids, np.int32)
        n = len(tokens)
        positions = np.ascontiguousarray(np.arange(n) + np.asarray(pos) if np.ndim(pos) == 0 else pos, np.int32)
        seqs = np.ascontiguousarray(np.broadcast_to(seq, (n,)), np.int32)
        out = np.zeros(n, np.int8)
        out[:] = all_logits
        out[-1:] = 1
        logits = np.empty((int(out.sum()), self.model.n_vocab), np.float32)
        n_out = 0
        for i in range(0, n, self.n_batch):
            part = slice(i, i + self.n_batch)
            self._decode(tokens[part], positions[part], seqs[part], out[part])
            n_part = int(out[part].sum())
            if n_part:
                rows = np.ctypeslib.as_array(self._api.llama_get_logits(self.handle), (n_part, self.model.n_vocab))
                logits[n_out : n_out + n_part] = rows
                n_out += n_part
        return logits

    def feed(self, ids: ArrayLike, pos: int = 0, seq: int = 0) -> None:
        """Runs tokens of one sequence for their effect on KV cache and memory only: no logits are computed."""
        tokens = np.ascontiguousarray(ids, np.int32)
        positions = np.arange(pos, pos + len(tokens), dtype=np.int32)
        for i in range(0, len(tokens), self.n_batch):
            part = tokens[i : i + self.n_batch]
            n = len(part)
            self._decode(part, positions[i : i + n], np.full(n, seq, np.int32), np.zeros(n, np.int8))

    def _decode(self, tokens: Any, pos: Any, seq: Any, out: Any) -> None:
        n_seq = np.ones(len(tokens), np.int32)
        # llama.cpp takes one pointer a token to its list of sequences
        seq_ptr = seq.ctypes.data + np.arange(len(tokens), dtype=np.uintp) * np.uintp(seq.itemsize)
        fields = dict(self._api.llama_batch._fields_)
        batch = self._api.llama_batch(
            n_tokens=len(tokens),
            token=tokens.ctypes.data_as(fields["token"]),
            pos=pos.ctypes.data_as(fields["pos"]),
            n_seq_id=n_seq.ctypes.data_as(fields["n_seq_id"]),
            seq_id=seq_ptr.ctypes.data_as(fields["seq_id"]),
            logits=out.ctypes.data_as(fields["logits"]),
        )
        begin_call()
        status = self._api.llama_decode(self.handle, batch)
        if status != 0:
            reason = "no room in the KV cache: give a larger n_ctx" if status == 1 else logged_error()
            raise LlamamemError(f"decoding {len(tokens)} tokens failed with status {status}: {reason}")
        self._api.llama_synchronize(self.handle)

    # the memory, and what llama.cpp does to sequences

    def state(self, seq: int, i: int) -> State:
        """The memory of a sequence at target layer i (its index among the target layers)."""
        info = self._info(i)
        S = np.zeros((info.n_head, info.n_state, info.rank, info.rank), np.float32)
        prev = np.zeros(info.n_head * info.rank, np.float32)
        n = self.model.library.function("llama_adapter_mem_get_state")(self.handle, seq, i, floats(S), floats(prev))
        if n < 0:
            raise LlamamemError(f"no memory state of sequence {seq} at target layer {i}")
        return State(S, prev, n)

    def set_state(self, seq: int, i: int, state: State) -> None:
        """Replaces it. Raises LlamamemError, with nothing changed, for values that are not finite or a wrong shape."""
        info = self._info(i)
        S = np.ascontiguousarray(state.S, np.float32)
        prev = np.ascontiguousarray(state.prev, np.float32)
        shapes = ((info.n_head, info.n_state, info.rank, info.rank), (info.n_head * info.rank,))
        if (S.shape, prev.shape) != shapes:
            raise LlamamemError(
                f"a state has S {list(shapes[0])} and prev {list(shapes[1])}, not {S.shape}, {prev.shape}"
            )
        begin_call()
        set_state = self.model.library.function("llama_adapter_mem_set_state")
        if not set_state(self.handle, seq, i, floats(S), floats(prev), state.n):
            raise LlamamemError(f"the state of sequence {seq} at target layer {i} is refused: {logged_error()}")

    def states(self, seq: int = 0) -> list[State]:
        """The memory of a sequence at every target layer."""
        return [self.state(seq, i) for i in range(len(self.model.layers))]

    def reset_memory(self, seq: int = 0) -> None:
        """Empties the memory of a sequence; its text stays."""
        self._memory_call("llama_adapter_mem_seq_reset", seq)

    def set_memory(self, seq: int = 0, *, frozen: bool = False, scale: float = 1.0) -> None:
        """From now on: writes nothing if `frozen`, and the deltas are multiplied by `scale` (0: the base)."""
        self._memory_call("llama_adapter_mem_seq_set", seq, frozen, scale)

    def clear(self) -> None:
        """Forgets everything: KV cache and memory of all sequences."""
        self._api.llama_memory_clear(self.memory, True)

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        """Removes positions [p0, p1) of a sequence (-1: from the start, to the end); False when that is refused."""
        return bool(self._api.llama_memory_seq_rm(self.memory, seq, p0, p1))

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Copies positions [p0, p1) of a sequence, and its memory, to another."""
        self._api.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def seq_keep(self, seq: int) -> None:
        """Removes every other sequence."""
        self._api.llama_memory_seq_keep(self.memory, seq)

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        """Adds `delta` to the positions [p0, p1) of a sequence (context shift)."""
        self._api.llama_memory_seq_add(self.memory, seq, p0, p1, delta)

    def seq_pos(self, seq: int) -> tuple[int, int]:
        """The smallest and the largest position of a sequence, (-1, -1) when it is empty."""
        api = self._api
        return api.llama_memory_seq_pos_min(self.memory, seq), api.llama_memory_seq_pos_max(self.memory, seq)

    # saving and loading

    def save(self, seq: int | None = None, flags: int = 0) -> bytes:
        """The state of a sequence, or of the whole context, as llama.cpp's own bytes."""
        api = self._api
        args = () if seq is None else (seq, flags)
        size = (api.llama_state_get_size if seq is None else api.llama_state_seq_get_size_ext)(self.handle, *args)
        data = (ctypes.c_uint8 * size)()
        get = api.llama_state_get_data if seq is None else api.llama_state_seq_get_data_ext
        begin_call()
        n = get(self.handle, data, size, *args)
        if n == 0:
            raise LlamamemError(f"the state cannot be saved: {logged_error()}")
        return bytes(data[:n])

    def load(self, data: bytes, seq: int | None = None, flags: int = 0) -> None:
        """Puts back what `save` returned, into the same or another sequence. Raises LlamamemError when refused."""
        api = self._api
        args = () if seq is None else (seq, flags)
        source = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        put = api.llama_state_set_data if seq is None else api.llama_state_seq_set_data_ext
        begin_call()
        if put(self.handle, source, len(data), *args) == 0:
            raise LlamamemError(f"the state is refused: {logged_error()}")

    def save_memory(self, path: str | os.PathLike[str], seq: int = 0) -> int:
        """Writes the memory of a sequence, without its text, to a file; returns the bytes. See docs/state-format.md."""
        return self._memory_call("llama_adapter_mem_state_save_file", os.fsencode(path), seq)

    def load_memory(self, path: str | os.PathLike[str], seq: int = 0) -> None:
        """Puts it into a sequence, whose text is removed: it goes on at position 0, with what is remembered.

        Raises LlamamemError with the exact reason, and nothing changed, for a file that is damaged or another model's.
        """
        self._memory_call("llama_adapter_mem_state_load_file", os.fsencode(path), seq)

    def close(self) -> None:
        """Frees the caches."""
        if self.handle is not None:
            self._api.llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _memory_call(self, name: str, *args: Any) -> int:
        library = self.model.library
        self._info(0)
        library.function("llama_adapter_mem_state_error_clear")()
        result: int = library.function(name)(self.handle, *args)
        if not result:
            reason = library.function("llama_adapter_mem_state_error")().decode("utf-8", "replace")
            raise LlamamemError(reason or f"{name}: refused: no such sequence, or a value that is not finite")
        return result

    def _info(self, i: int) -> AdapterMemInfo:
        info = self.model.info
        if info is None:
            raise LlamamemError(f"{self.model.path}: loaded without a sidecar, so it has no memory")
        if not 0 <= i < info.n_layer:
            raise LlamamemError(f"target layer {i} is out of range: the sidecar has {info.n_layer}")
        return info


def loader_refusal(path: str | os.PathLike[str], *, library: Library | None = None) -> str | None:
    """The line with which the runtime's own loader refuses a sidecar, whatever its base; None if it loads."""
    library = library or loaded_library()
    err = ctypes.create_string_buffer(N_ERR)
    sidecar = library.function("llama_adapter_mem_sidecar_init")(os.fsencode(path), None, err, N_ERR)
    if not sidecar:
        return err.value.decode("utf-8", "replace")
    library.function("llama_adapter_mem_sidecar_free")(sidecar)
    return None


def _node_callback(api: Any, on_node: OnNode) -> Any:
    """As llama.cpp calls it: asked of each node whether it is wanted, and called again when it was computed."""
    name_of = api._lib.ggml_get_name
    name_of.argtypes, name_of.restype = [ctypes.c_void_p], ctypes.c_char_p

    def call(tensor: int, ask: bool, _: Any) -> bool:
        on_node(name_of(tensor).decode("utf-8", "replace"), ask)
        return True

    return api.ggml_backend_sched_eval_callback(call)


def _readable(path: str | os.PathLike[str], what: str) -> Path:
    path = Path(path)
    try:
        with path.open("rb"):
            return path
    except OSError as e:
        raise LlamamemError(f"{path}: the {what} cannot be read: {e.strerror}") from e
