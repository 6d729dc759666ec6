"""Profiles as data, and the plan: everything that a server run will be, as a value that can be printed.

A profile fixes flags of llama-server and *owns* the options behind them: passed again after `--`, in any spelling, or
set in the environment, an owned option is refused, since the last one on the command line would win silently.
The spellings are those of `common/arg.cpp` of the pinned upstream (a test compares them with `llama-server --help`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.run import redacted


@dataclass(frozen=True)
class Option:
    """One thing that llama-server can be told: what it is called here, every spelling, every environment variable.

    A spelling or variable that ends in `*` is a prefix. `instead` names the flag of `llamamem serve` that sets it.
    """

    what: str
    spellings: tuple[str, ...]
    env: tuple[str, ...] = ()
    instead: str | None = None


_DRAFT_SHORT = "-md -hfd -hfrd -td -tbd -Cd -Crd -Cbd -ctkd -ctvd -otd -cmoed -ncmoed -devd -ngld -lcs -lcd".split()
_DRAFT_LONG = (
    "threads threads-batch cpu-mask cpu-range cpu-strict prio poll cpu-mask-batch cpu-strict-batch "
    "prio-batch poll-batch cache-type-k cache-type-v override-tensor n-cpu-moe device gpu-layers n-gpu-layers model "
    "hf-repo"
).split()

OPTIONS: dict[str, Option] = {
    "model": Option(
        "the model",
        (
            *("-m", "--model", "-mu", "--model-url", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo"),
            *("-hff", "--hf-file", "--models-dir", "--models-preset", "--embd-gemma-default", "--fim-*"),
            *("--gpt-oss-*", "--vision-gemma-*"),
        ),
        (
            *("LLAMA_ARG_MODEL", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO", "LLAMA_ARG_HF_REPO"),
            *("LLAMA_ARG_HF_FILE", "LLAMA_ARG_MODELS_DIR", "LLAMA_ARG_MODELS_PRESET"),
        ),
        "--model",
    ),
    "sidecar": Option("the sidecar", ("--rwkv-ms-sidecar",), ("LLAMA_ARG_RWKV_MS_SIDECAR",), "--sidecar"),
    "mode": Option("the memory mode", ("--rwkv-ms-mode",), ("LLAMA_ARG_RWKV_MS_MODE",), "--profile"),
    "host": Option("the address", ("--host",), ("LLAMA_ARG_HOST",), "--host"),
    "port": Option("the port", ("--port", "--reuse-port"), ("LLAMA_ARG_PORT", "LLAMA_ARG_REUSE_PORT"), "--port"),
    "url": Option(
        "the URL that the launcher asks for readiness",
        ("--api-prefix", "--ssl-key-file", "--ssl-cert-file"),
        ("LLAMA_ARG_API_PREFIX", "LLAMA_ARG_SSL_KEY_FILE", "LLAMA_ARG_SSL_CERT_FILE"),
    ),
    "ctx": Option("the context size", ("-c", "--ctx-size"), ("LLAMA_ARG_CTX_SIZE",), "--ctx-size"),
    "slot_dir": Option("the slot directory", ("--slot-save-path",), (), "--slot-dir"),
    "parallel": Option(
        "the number of slots", ("-np", "--parallel"), ("LLAMA_ARG_N_PARALLEL",), "--parallel N --profile batched"
    ),
    "log": Option("the log that carries the evidence", ("--log-disable",)),
    "batch": Option("the batch size", ("-b", "--batch-size"), ("LLAMA_ARG_BATCH",)),
    "ubatch": Option("the microbatch size", ("-ub", "--ubatch-size"), ("LLAMA_ARG_UBATCH",)),
    "cont_batching": Option(
        "continuous batching",
        ("-cb", "--cont-batching", "-nocb", "--no-cont-batching"),
        ("LLAMA_ARG_CONT_BATCHING", "LLAMA_ARG_NO_CONT_BATCHING"),
    ),
    "context_shift": Option(
        "context shift",
        ("--context-shift", "--no-context-shift"),
        ("LLAMA_ARG_CONTEXT_SHIFT", "LLAMA_ARG_NO_CONTEXT_SHIFT"),
    ),
    "cache_prompt": Option(
        "the prompt cache",
        ("--cache-prompt", "--no-cache-prompt"),
        ("LLAMA_ARG_CACHE_PROMPT", "LLAMA_ARG_NO_CACHE_PROMPT"),
    ),
    "cache_ram": Option("the prompt cache in RAM", ("-cram", "--cache-ram"), ("LLAMA_ARG_CACHE_RAM",)),
    "checkpoints": Option(
        "context checkpoints",
        ("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints", "-cms", "--checkpoint-min-step"),
        ("LLAMA_ARG_CTX_CHECKPOINTS", "LLAMA_ARG_CHECKPOINT_MIN_SPACING_NT"),
    ),
    "idle_slots": Option(
        "the cache of idle slots",
        ("--cache-idle-slots", "--no-cache-idle-slots"),
        ("LLAMA_ARG_CACHE_IDLE_SLOTS", "LLAMA_ARG_NO_CACHE_IDLE_SLOTS"),
    ),
    "warmup": Option("the warm-up run", ("--warmup", "--no-warmup")),
    "cache_reuse": Option("reuse by KV shifting", ("--cache-reuse",), ("LLAMA_ARG_CACHE_REUSE",)),
    "mmproj": Option(
        "multimodal input",
        (
            *("-mm", "--mmproj", "-mmu", "--mmproj-url", "--mmproj-auto", "--no-mmproj", "--no-mmproj-auto"),
            *("--mmproj-offload", "--no-mmproj-offload", "-mmdev", "--mmproj-device"),
        ),
        ("LLAMA_ARG_MMPROJ*", "LLAMA_ARG_NO_MMPROJ*"),
    ),
    "speculation": Option(
        "speculative decoding",
        (
            *("--spec-*", "--no-spec-*", "--draft*", "--lookup-cache-static", "--lookup-cache-dynamic"),
            *_DRAFT_SHORT,
            *(f"--{name}-draft" for name in _DRAFT_LONG),
            *("--cpu-moe-draft",),
        ),
        ("LLAMA_ARG_SPEC_*", "LLAMA_ARG_NO_SPEC_*", "LLAMA_ARG_DRAFT_*", "LLAMA_ARG_N_GPU_LAYERS_DRAFT"),
    ),
}


@dataclass(frozen=True)
class Profile:
    """Flags that are always on the command line, the options that are owned, and how many slots it may have."""

    name: str
    memory: bool
    parallel: int | None  # slots when --parallel is not given; None: llama-server's default
    one_slot: bool
    flags: tuple[str, ...]
    owned: tuple[str, ...]


_LAUNCHER = ("model", "sidecar", "mode", "host", "port", "url", "ctx", "slot_dir", "parallel", "log")
_INCORRECT = ("cache_reuse", "mmproj", "speculation")  # wrong with a memory whatever the mode
_SERIAL = (
    *("batch", "ubatch", "cont_batching", "context_shift", "cache_prompt", "cache_ram", "checkpoints"),
    *("idle_slots", "warmup"),
)
_SERIAL_FLAGS = (
    "--batch-size 2 --ubatch-size 1 --no-cont-batching --no-context-shift --no-cache-prompt --cache-ram 0 "
    "--ctx-checkpoints 0 --no-cache-idle-slots --cache-reuse 0 --no-mmproj --no-warmup"
)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("serial", True, 1, True, tuple(_SERIAL_FLAGS.split()), (*_LAUNCHER, *_INCORRECT, *_SERIAL)),
        Profile("fused", True, 1, True, ("--cache-reuse", "0", "--no-mmproj"), (*_LAUNCHER, *_INCORRECT)),
        Profile("batched", True, 4, False, ("--cache-reuse", "0", "--no-mmproj"), (*_LAUNCHER, *_INCORRECT)),
        Profile("base", False, None, False, (), _LAUNCHER),
    )
}


@dataclass(frozen=True)
class Plan:
    """One server run before it runs. Nothing was looked up on disk to make it; preflight does that.

    `env` holds the variables that llama-server will read its options from beside `argv`, as they were found.
    """

    profile: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    bin_dir: Path
    model: Path
    sidecar: Path | None
    slot_dir: Path | None
    host: str
    port: int
    parallel: int | None
    ctx_size: int | None
    extra: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--dry-run --json`; values of secrets are left out."""
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return {**fields, "argv": redacted(self.argv), "extra": redacted(self.extra), "env": dict(self.env)}


def make_plan(
    model: Path,
    *,
    bin_dir: Path,
    sidecar: Path | None = None,
    profile: str | None = None,
    parallel: int | None = None,
    ctx_size: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    slot_dir: Path | None = None,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Plan:
    """The command line of a run. Without a sidecar the profile is `base`, with one it is `serial` unless named.

    Raises LlamamemError for a contradiction: an unknown profile, a profile without its sidecar (or the reverse), more
    slots than the profile has, an owned option in `extra` or `environ`.
    """
    environ = os.environ if environ is None else environ
    chosen = _choose(profile, sidecar)
    parallel = _slots(chosen, parallel)
    if not 0 <= port <= 65535:
        raise LlamamemError(f"--port {port}: not a port; give 0 for a free one, or 1 to 65535")
    if ctx_size is not None and ctx_size < 0:
        raise LlamamemError(f"--ctx-size {ctx_size}: give 0 for the model's own, or a number of tokens")
    if "," in host or host.endswith(".sock"):
        raise LlamamemError(f"--host {host}: one TCP address is supported; give a single one, such as 127.0.0.1")
    refuse_owned(chosen, extra, environ)

    argv = [str(bin_dir / "llama-server"), "--model", str(model), "--host", host, "--port", str(port)]
    if sidecar is not None:
        argv += ["--rwkv-ms-sidecar", str(sidecar), "--rwkv-ms-mode", chosen.name]
    if parallel is not None:
        argv += ["--parallel", str(parallel)]
    if ctx_size is not None:
        argv += ["--ctx-size", str(ctx_size)]
    if slot_dir is not None:
        argv += ["--slot-save-path", str(slot_dir)]
    argv += [*chosen.flags, *extra]
    env = tuple(sorted((name, value) for name, value in environ.items() if name.startswith("LLAMA_ARG_")))
    return Plan(
        chosen.name, tuple(argv), env, bin_dir, model, sidecar, slot_dir, host, port, parallel, ctx_size, tuple(extra)
    )


def _choose(name: str | None, sidecar: Path | None) -> Profile:
    name = name or ("base" if sidecar is None else "serial")
    if name not in PROFILES:
        raise LlamamemError(f"--profile {name}: no such profile; choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if profile.memory and sidecar is None:
        raise LlamamemError(f"--profile {name}: needs a memory; give --sidecar FILE, or leave --profile out")
    if sidecar is not None and not profile.memory:
        raise LlamamemError(f"--profile {name}: runs without a memory; leave --sidecar out, or choose serial")
    return profile


def _slots(profile: Profile, parallel: int | None) -> int | None:
    if parallel is None:
        return profile.parallel
    if parallel < 1:
        raise LlamamemError(f"--parallel {parallel}: give the number of slots, 1 or more")
    if profile.one_slot and parallel != 1:
        raise LlamamemError(
            f"--parallel {parallel}: profile {profile.name} has one slot; use --profile batched for more"
        )
    return parallel


def refuse_owned(profile: Profile, extra: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raises LlamamemError that names everything in `extra` and `environ` which the profile owns."""
    faults = []
    for arg in extra:
        if (key := owner_of(arg, profile.owned)) is not None:
            faults.append(f"{arg} ({_remedy(key)})")
    for name in sorted(environ):
        if (key := owner_of_variable(name, profile.owned)) is not None:
            faults.append(f"{name} in the environment ({_remedy(key)})")
    if faults:
        raise LlamamemError(f"profile {profile.name} owns these options, take them out: " + "; ".join(faults))


def owner_of(arg: str, keys: Iterable[str]) -> str | None:
    """The key of the option among `keys` that this command line argument spells (`-ub`, `--ubatch_size=8`, ...)."""
    name = arg.partition("=")[0]
    if name.startswith("--"):
        name = name.replace("_", "-")  # as llama.cpp's parser does
    return next((key for key in keys if _matches(name, OPTIONS[key].spellings)), None)


def owner_of_variable(name: str, keys: Iterable[str]) -> str | None:
    """The key of the option among `keys` that this environment variable sets."""
    return next((key for key in keys if _matches(name, OPTIONS[key].env)), None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def _remedy(key: str) -> str:
    option = OPTIONS[key]
    if option.instead:
        return f"{option.what}: set it with `llamamem serve {option.instead}`"
    allowed = [profile.name for profile in PROFILES.values() if key not in profile.owned]
    return f"{option.what}: " + (f"allowed by --profile {' or '.join(allowed)}" if allowed else "no profile allows it")
