"""Profiles as data, and the plan: everything that a server run will be, as a value that can be printed.

A profile fixes flags of llama-server and *owns* the options behind them: passed again after `--`, in any spelling, or
set in the environment, an owned option is refused, since the last one on the command line would win silently.
`profiles.json` beside this file holds both; its spellings are those of `common/arg.cpp` of the pinned upstream (a test
compares them with `llama-server --help` of our build).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llamamem.errors import LlamamemError
from llamamem.formats.run import redacted
from llamamem.formats.validation import first_fault


class Option(BaseModel):
    """One thing that llama-server can be told: what it is called here, every spelling, every environment variable.

    A spelling or variable that ends in `*` is a prefix. `instead` names the flag of `llamamem serve` that sets it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    spellings: tuple[str, ...]
    env: tuple[str, ...] = ()
    instead: str | None = None


class Profile(BaseModel):
    """Flags that are always on the command line, the options that are owned, and how many slots it may have.

    `parallel` is the number of slots when --parallel is not given; None leaves it to llama-server.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    memory: bool
    parallel: int | None
    one_slot: bool
    flags: tuple[str, ...]
    owned: tuple[str, ...]


class Table(BaseModel):
    """The whole of profiles.json: the options by key, groups of them, and the profiles, which own groups.

    `gone` are options that llama-server had, and what replaced them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["llamamem_profiles.v1"]
    options: dict[str, Option]
    gone: dict[str, str]
    groups: dict[str, tuple[str, ...]]
    profiles: dict[str, Profile]

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """Puts each profile's name into it, and the options of a group in the place of its name."""
        groups = data["groups"]
        profiles = {
            name: {**given, "name": name, "owned": [key for group in given["owned"] for key in groups[group]]}
            for name, given in data["profiles"].items()
        }
        return {**data, "profiles": profiles}

    @model_validator(mode="after")
    def _consistent(self) -> Table:
        counts = Counter(name for option in self.options.values() for name in (*option.spellings, *option.env))
        if twice := [name for name, n in counts.items() if n > 1]:
            raise ValueError(f"{', '.join(twice)}: belongs to more than one option")
        for profile in self.profiles.values():
            if unknown := set(profile.owned) - set(self.options):
                raise ValueError(f"profile {profile.name} owns {', '.join(sorted(unknown))}, which is no option")
            owned = {key: self.options[key] for key in profile.owned}
            loose = [flag for flag in profile.flags if flag.startswith("-") and _owner(flag, owned) is None]
            if loose:  # whoever passed it again would win
                raise ValueError(f"profile {profile.name} sets {', '.join(loose)}, which it does not own")
        return self


def read_profiles(path: Path) -> Table:
    """Raises LlamamemError for a file that is missing or contradicts itself."""
    try:
        return Table.model_validate_json(path.read_bytes())
    except OSError as e:
        raise LlamamemError(f"{path}: cannot be read ({e.strerror}); install llamamem again") from e
    except KeyError as e:
        raise LlamamemError(f"{path}: has no {e}; install llamamem again") from e
    except ValidationError as e:
        raise LlamamemError(f"{path}: {first_fault(e)}; install llamamem again") from e


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
    threads: int | None = None,
    page: Path | None = None,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Plan:
    """The command line of a run. Without a sidecar the profile is `base`, with one it is `serial` unless named.

    `threads` is for a machine that is not all ours, `page` a directory for `GET /`: whoever sets them in `extra` or
    `environ` wins.

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
    if gone := [f"{arg} (now `{_TABLE.gone[arg]}`)" for arg in extra if arg in _TABLE.gone]:
        raise LlamamemError(f"llama-server has no such option any more: {', '.join(gone)}")

    argv = [str(bin_dir / "llama-server"), "--model", str(model), "--host", host, "--port", str(port)]
    if sidecar is not None:
        argv += ["--memory-adapter", str(sidecar), "--memory-mode", chosen.name]
    if parallel is not None:
        argv += ["--parallel", str(parallel)]
    if ctx_size is not None:
        argv += ["--ctx-size", str(ctx_size)]
    if slot_dir is not None:
        argv += ["--slot-save-path", str(slot_dir)]
    if threads is not None and asked_threads(extra, environ) is None:
        argv += ["--threads", str(threads)]
    if page is not None and "--path" not in extra and "LLAMA_ARG_STATIC_PATH" not in environ:
        argv += ["--path", str(page)]
    argv += chosen.flags
    if chosen.memory and not _names_origins(extra, environ):
        argv += ["--cors-origins", "localhost"]  # any web page that is open on this machine could read a memory else
    argv += extra
    env = tuple(sorted((name, value) for name, value in environ.items() if name.startswith("LLAMA_ARG_")))
    return Plan(
        chosen.name, tuple(argv), env, bin_dir, model, sidecar, slot_dir, host, port, parallel, ctx_size, tuple(extra)
    )


def _names_origins(extra: Sequence[str], environ: Mapping[str, str]) -> bool:
    return any(arg.partition("=")[0] == "--cors-origins" for arg in extra) or "LLAMA_ARG_CORS_ORIGINS" in environ


def asked_threads(extra: Sequence[str], environ: Mapping[str, str]) -> str | None:
    """What `extra`, else `environ`, gives llama-server as its number of threads."""
    given = [value for arg, value in pairwise(extra) if arg in ("-t", "--threads")]
    return given[-1] if given else environ.get("LLAMA_ARG_THREADS")


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
    return _owner(arg, {key: OPTIONS[key] for key in keys})


def owner_of_variable(name: str, keys: Iterable[str]) -> str | None:
    """The key of the option among `keys` that this environment variable sets."""
    return next((key for key in keys if _matches(name, OPTIONS[key].env)), None)


def _owner(arg: str, options: Mapping[str, Option]) -> str | None:
    name = arg.partition("=")[0]
    if name.startswith("--"):
        name = name.replace("_", "-")  # as llama.cpp's parser does
    return next((key for key, option in options.items() if _matches(name, option.spellings)), None)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def _remedy(key: str) -> str:
    option = OPTIONS[key]
    if option.instead:
        return f"{option.what}: set it with `llamamem serve {option.instead}`"
    allowed = [profile.name for profile in PROFILES.values() if key not in profile.owned]
    return f"{option.what}: " + (f"allowed by --profile {' or '.join(allowed)}" if allowed else "no profile allows it")


PAGE = Path(__file__).with_name("page")  # what `GET /` shows: this build has no page of upstream's
_TABLE = read_profiles(Path(__file__).with_name("profiles.json"))
OPTIONS = _TABLE.options
PROFILES = _TABLE.profiles
