"""Everything that can be refused before a server starts, so that nothing is started that would fail later.

Each refusal is a LlamamemError of one line: the file, flag or number at fault and what to do next.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from gguf.constants import GGML_QUANT_SIZES

from llamamem.errors import LlamamemError
from llamamem.formats.base import base_files, base_indexes
from llamamem.formats.gguf_file import GgufIndex, read_gguf_index
from llamamem.formats.private import private_directory
from llamamem.formats.sidecar import Sidecar, read_sidecar
from llamamem.formats.sidecar.base import base_faults, hash_fault, needs_of
from llamamem.native import vendor
from llamamem.native.build import ask_identity
from llamamem.native.cpu import check_cpu
from llamamem.serving import digests
from llamamem.serving.digests import Progress, file_sha256
from llamamem.serving.machine import available_memory, processors
from llamamem.serving.profiles import PROFILES, Plan, asked_threads, owner_of, owner_of_variable
from llamamem.serving.runs import live_runs

__all__ = ["Checked", "check", "file_sha256", "memory_need"]

_KV_BYTES = {  # bytes a value, by --cache-type-k/-v
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
_OVERHEAD = 256 << 20  # compute buffers and the process itself, bytes: a round figure


@dataclass(frozen=True)
class Checked:
    """What preflight found out: SHA-256 of base (only with a sidecar) and sidecar in hex, and what to warn of."""

    base_sha256: str | None
    sidecar_sha256: str | None
    warnings: tuple[str, ...]


def check(plan: Plan, *, memory_check: bool = True, on_cpu: bool = True, progress: Progress | None = None) -> Checked:
    """Refuses with LlamamemError, quick checks first; the base is hashed last (`progress` is told how far).

    `on_cpu` False turns a refusal for lack of main memory into a warning: weights may lie on a GPU.
    """
    check_binary(plan.bin_dir)
    with _saying("base {}"):
        index = read_gguf_index(plan.model)
        for part in base_indexes(index):
            check_whole(part)
    sidecar = None
    if plan.sidecar is not None:
        with _saying(f"sidecar {{}}; `llamamem sidecar validate {plan.sidecar}` names every fault"):
            sidecar = read_sidecar(plan.sidecar)
        with _saying("base {}; give the base that the sidecar was made for"):
            check_base(index, sidecar)
    check_config_files(plan)
    check_slot_dir(plan.slot_dir)
    check_port(plan.host, plan.port)
    header = {key: field.value for key, field in index.fields.items()}
    warnings = (
        *check_threads(plan),
        *check_context(plan, header),
        *check_memory(plan, header, refuse=memory_check and on_cpu),
        *check_open(plan),
    )
    if sidecar is None or plan.sidecar is None:
        return Checked(None, None, warnings)
    base_sha256 = digests.base_sha256(plan.model, progress)
    if base_sha256 != sidecar.base_sha256:
        fault = hash_fault(plan.sidecar, sidecar.base_sha256, plan.model, base_sha256)
        raise LlamamemError(f"[{fault.reason}] {fault}", reason=fault.reason)
    return Checked(base_sha256, file_sha256(plan.sidecar), warnings)


@contextmanager
def _saying(form: str) -> Iterator[None]:
    """Puts what a reader of files says into a line that also names the role of the file or the next step."""
    try:
        yield
    except LlamamemError as e:
        raise LlamamemError(form.replace("{}", str(e)), reason=e.reason) from e


def check_binary(bin_dir: Path) -> None:
    """That `llama-server` there runs and is a build of this pin and patch set: it is asked, whatever a note says."""
    binary = bin_dir / "llama-server"
    if not binary.is_file():
        raise LlamamemError(f"{binary}: no such binary; run `llamamem build`, or point --bin-dir at a build")
    check_cpu(bin_dir)
    if not os.access(binary, os.X_OK):
        raise LlamamemError(f"{binary}: is not executable; run `chmod +x` on it, or `llamamem build` again")
    said, wanted = ask_identity(bin_dir), vendor.identity()
    if said is None:
        raise LlamamemError(
            f"{binary}: does not run or is not llamamem's patched build (this needs {wanted}); run `llamamem build`"
        )
    if said != wanted:
        raise LlamamemError(f"{binary}: is build {said}, this package needs {wanted}; run `llamamem build`")


def check_whole(index: GgufIndex) -> None:
    """That the file is as long as its header says: a download that broke off would fail while it loads."""
    size = index.path.stat().st_size
    for tensor in index.tensors:
        per_block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        end = index.data_start + tensor.offset + math.prod(tensor.shape) // per_block * block_bytes
        if end > size:
            raise LlamamemError(
                f"{index.path}: is cut short: tensor '{tensor.name}' ends at byte {end}, the file at {size};"
                " fetch it again"
            )


def check_base(index: GgufIndex, sidecar: Sidecar) -> None:
    """Stage 4 of docs/sidecar.md but the hash: only headers are read."""
    for fault in base_faults(index, needs_of(sidecar)):
        raise fault


def check_config_files(plan: Plan) -> None:
    """llama.cpp reads `config.ini` before its command line: an owned option there is refused as one in `extra` is."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    for path in (Path("/etc/llama.cpp/config.ini"), Path(config_home) / "llama.cpp" / "config.ini"):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        keys = {line.partition("=")[0].strip() for line in lines if "=" in line and line.lstrip()[:1] not in "#;["}
        owned = PROFILES[plan.profile].owned
        faults = [key for key in sorted(keys) if any(owner_of(dash + key, owned) for dash in ("-", "--"))]
        faults += [key for key in sorted(keys) if owner_of_variable(key, owned)]
        if faults:
            raise LlamamemError(
                f"{path}: sets {', '.join(faults)}, owned by profile {plan.profile}; take the lines out, or choose a"
                " profile that allows them"
            )


def check_slot_dir(slot_dir: Path | None) -> None:
    """Makes the directory when it is missing."""
    if slot_dir is None:
        return
    try:
        private_directory(slot_dir)
        with tempfile.TemporaryFile(dir=slot_dir):
            pass
    except OSError as e:
        raise LlamamemError(f"--slot-dir {slot_dir}: not writable ({e.strerror}); give a directory of yours") from e


def check_open(plan: Plan) -> tuple[str, ...]:
    """A warning when everybody who reaches the machine gets at the memories."""
    local = plan.host == "localhost" or plan.host.startswith("127.") or plan.host.strip("[]") == "::1"
    given = {arg.partition("=")[0] for arg in plan.extra} & {"--api-key", "--api-key-file"}
    if local or given or os.environ.get("LLAMA_API_KEY") or "LLAMA_ARG_API_KEY_FILE" in dict(plan.env):
        return ()
    return (
        f"--host {plan.host} and no key: whoever reaches this machine can read, change and reset every memory that is"
        " served; give a key with `-- --api-key KEY`, or leave --host out",
    )


def check_port(host: str, port: int) -> None:
    if port == 0:
        return
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise LlamamemError(f"--host {host}: cannot be resolved ({e.strerror}); give an address of this machine") from e
    with socket.socket(family, kind, proto) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError as e:
            raise LlamamemError(f"--port {port}: needs privileges; give one above 1023, or 0 for a free one") from e
        except OSError as e:
            if e.errno == errno.EADDRINUSE:
                by = _listener(port)
                raise LlamamemError(f"--port {port}: taken{by}; stop it, or give another port (0: a free one)") from e
            raise LlamamemError(f"--host {host}: cannot listen there ({e.strerror}); give 127.0.0.1") from e


def _listener(port: int) -> str:
    for run in live_runs(starting=True):
        if run.port == port:
            return f" by the run {run.name} (`llamamem stop {run.name}`)"
    try:
        for connection in psutil.net_connections(kind="tcp"):
            listens = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
            if listens and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass  # other users' processes may be invisible to us
    return ""


def check_threads(plan: Plan) -> tuple[str, ...]:
    """A thread without a processor spins, and each token waits for the slowest one."""
    ours = processors()
    asked = asked_threads(plan.argv, dict(plan.env)) or ""
    if not asked.isdecimal() or int(asked) <= ours.usable:
        return ()
    by = f" ({ours.limit})" if ours.limit else ""
    return (f"--threads {asked}: {ours.usable} may be used here{by}; more only wait for each other",)


def check_context(plan: Plan, header: dict[str, Any]) -> tuple[str, ...]:
    """llama-server makes a longer context than the model's as long as the model's, and says so in its log alone."""
    longest = header.get(f"{header.get('general.architecture')}.context_length")
    if not plan.ctx_size or not isinstance(longest, int) or plan.ctx_size // (plan.parallel or 1) <= longest:
        return ()
    return (f"--ctx-size {plan.ctx_size}: the model's context has {longest} tokens, no more are used in a slot",)


def check_memory(plan: Plan, header: dict[str, Any], *, refuse: bool = True) -> tuple[str, ...]:
    """Weights + KV + sidecar against the memory that is available now: refused under 1.0x, a warning under 1.2x."""
    need = memory_need(plan, header)
    available, counted_by = available_memory()
    if available >= 1.2 * need:
        return ()
    found = (
        f"about {need / 2**30:.1f} GiB are needed for weights and KV cache, {available / 2**30:.1f} GiB {counted_by}"
    )
    if available < need and refuse:
        raise LlamamemError(f"{plan.model}: {found}; give a smaller --ctx-size, or --no-memory-check to try anyway")
    return (f"{plan.model}: {found}; a smaller --ctx-size needs less",)


def memory_need(plan: Plan, header: dict[str, Any]) -> int:
    """Bytes, an estimate. The KV cache is counted as llama.cpp's sliding-window cache allocates it."""
    parts = base_files(read_gguf_index(plan.model)) if "split.count" in header else [plan.model]
    weights = sum(part.stat().st_size for part in parts) + (plan.sidecar.stat().st_size if plan.sidecar else 0)
    arch = header.get("general.architecture", "")

    def field(name: str, default: Any = 0) -> Any:
        return header.get(f"{arch}.{name}", default)

    n_ctx = plan.ctx_size or field("context_length")
    n_seq = plan.parallel or 1
    window = field("attention.sliding_window")
    pattern = field("attention.sliding_window_pattern", None)
    heads = field("attention.head_count_kv") or field("attention.head_count")
    per_value = _kv_type(plan, "k"), _kv_type(plan, "v")
    kv = 0.0
    for il in range(field("block_count") - field("attention.shared_kv_layers")):
        slides = bool(window and (pattern[il] if isinstance(pattern, list) else False))
        suffix = "_swa" if slides else ""
        widths = (
            field(f"attention.key_length{suffix}") or field("attention.key_length"),
            field(f"attention.value_length{suffix}") or field("attention.value_length"),
        )
        cells = min(n_ctx, (window + 512) * n_seq) if slides else n_ctx
        n_heads = heads[il] if isinstance(heads, list) else heads or 0
        kv += cells * n_heads * sum(width * size for width, size in zip(widths, per_value, strict=True))
    return int(weights + kv + _OVERHEAD)


def _kv_type(plan: Plan, which: str) -> float:
    names = (f"-ct{which}", f"--cache-type-{which}")
    for arg, value in pairwise(plan.extra):
        if arg.replace("_", "-") in names:
            return _KV_BYTES.get(value, 2.0)
    return 2.0
