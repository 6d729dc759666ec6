from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.serving import profiles
from llamamem.serving.profiles import OPTIONS, PROFILES, Plan, make_plan, read_profiles

MODEL, SIDECAR, BIN = Path("/m/base.gguf"), Path("/m/side.gguf"), Path("/b")


def plan(**kwargs: Any) -> Plan:
    return make_plan(MODEL, **{"bin_dir": BIN, "environ": {}, **kwargs})


def value(argv: tuple[str, ...], flag: str) -> str:
    assert argv.count(flag) == 1, f"{flag} in {argv}"
    return argv[argv.index(flag) + 1]


def test_serial_is_the_default_with_a_sidecar_and_carries_every_flag_of_the_reference_path() -> None:
    argv = plan(sidecar=SIDECAR).argv
    assert argv[0] == "/b/llama-server"
    for flag, expected in {
        "--model": "/m/base.gguf",
        "--memory-adapter": "/m/side.gguf",
        "--memory-mode": "serial",
        "--batch-size": "2",
        "--ubatch-size": "1",
        "--parallel": "1",
        "--cache-ram": "0",
        "--ctx-checkpoints": "0",
        "--host": "127.0.0.1",
    }.items():
        assert value(argv, flag) == expected
    for flag in ("--no-cont-batching", "--no-context-shift", "--no-cache-prompt", "--no-cache-idle-slots"):
        assert flag in argv
    assert "--no-mmproj" in argv and "--no-warmup" in argv


def test_base_is_the_default_without_one_and_adds_nothing() -> None:
    assert plan(port=0).argv == ("/b/llama-server", "--model", "/m/base.gguf", "--host", "127.0.0.1", "--port", "0")


def test_fused_and_batched_keep_upstream_batches_and_caches() -> None:
    fused, batched = plan(sidecar=SIDECAR, profile="fused"), plan(sidecar=SIDECAR, profile="batched", parallel=3)
    assert value(fused.argv, "--parallel") == "1" and value(batched.argv, "--parallel") == "3"
    for made in (fused, batched):
        assert value(made.argv, "--memory-mode") == made.profile
        assert not {"--ubatch-size", "--batch-size", "--no-cache-prompt", "--cache-ram"} & set(made.argv)
        assert value(made.argv, "--cache-reuse") == "0"


@pytest.mark.parametrize(
    "args, key",
    [
        (["-ub", "8"], "-ub"),
        (["-ub=8"], "-ub=8"),
        (["--ubatch-size=8"], "--ubatch-size=8"),
        (["--ubatch_size", "8"], "--ubatch_size"),  # llama.cpp takes underscores for dashes
        (["-b", "512"], "-b"),
        (["-np", "4"], "-np"),
        (["-cb"], "-cb"),
        (["--cache-prompt"], "--cache-prompt"),
        (["--swa-checkpoints", "4"], "--swa-checkpoints"),
        (["--cache-reuse", "64"], "--cache-reuse"),
        (["-md", "d.gguf"], "-md"),
        (["--spec-type", "ngram-simple"], "--spec-type"),
        (["--device-draft", "x"], "--device-draft"),
        (["-mm", "p.gguf"], "-mm"),
        (["-hf", "a/b"], "-hf"),
        (["--rwkv-ms-mode", "batched"], "--rwkv-ms-mode"),
        (["--memory-mode", "batched"], "--memory-mode"),
        (["--warmup"], "--warmup"),
    ],
)
def test_serial_refuses_what_it_owns_in_any_spelling(args: list[str], key: str) -> None:
    with pytest.raises(LlamamemError, match="owns these options") as caught:
        plan(sidecar=SIDECAR, extra=args)
    assert f" {key} (" in str(caught.value)


def test_all_refused_at_once_with_the_profile_that_would_allow_each() -> None:
    with pytest.raises(LlamamemError) as caught:
        plan(sidecar=SIDECAR, extra=["-t", "2", "-ub", "8", "-np", "2"], environ={"LLAMA_ARG_CACHE_REUSE": "1"})
    text = str(caught.value)
    assert "-ub (the microbatch size: allowed by --profile fused or batched or base)" in text
    assert "-np (" in text and "--parallel N --profile batched" in text
    assert "LLAMA_ARG_CACHE_REUSE in the environment" in text
    assert "-t (" not in text


def test_what_went_upstream_is_named_with_what_replaced_it() -> None:
    for sidecar in (SIDECAR, None):
        with pytest.raises(
            LlamamemError, match=r"--mlock \(now `--load-mode mlock`\), --no-mmap \(now `--load-mode none`\)"
        ):
            plan(sidecar=sidecar, extra=["--mlock", "--no-mmap"])
    assert plan(extra=["--load-mode", "mlock"]).argv[-1] == "mlock"


def test_threads_are_those_that_are_ours_unless_they_are_named() -> None:
    assert value(plan(threads=3).argv, "--threads") == "3"
    for named in ({"extra": ["-t", "5"]}, {"extra": ["--threads", "5"]}, {"environ": {"LLAMA_ARG_THREADS": "5"}}):
        assert "3" not in plan(threads=3, **named).argv


@pytest.mark.parametrize(
    "name", ["LLAMA_ARG_UBATCH", "LLAMA_ARG_NO_CACHE_PROMPT", "LLAMA_ARG_SPEC_TYPE", "LLAMA_ARG_ROPE_SCALE"]
)
def test_environment_variables_are_options_too(name: str) -> None:
    with pytest.raises(LlamamemError, match=f"{name} in the environment"):
        plan(sidecar=SIDECAR, environ={name: "1"})


def test_fused_allows_what_is_only_slow_or_unneeded_but_not_what_is_wrong() -> None:
    allowed = ["-ub", "64", "--ctx-checkpoints", "4", "--context-shift"]
    assert plan(sidecar=SIDECAR, profile="fused", extra=allowed).argv[-5:] == tuple(allowed)
    wrongs = (
        ["--cache-reuse", "8"],
        ["--mmproj", "x"],
        ["--spec-default"],
        ["--lora", "x"],
        ["--control-vector", "x"],
        ["--override-kv", "gemma4.rope.freq_base=float:1e4"],
        ["--rope-scaling", "yarn"],
        ["--yarn-orig-ctx", "8192"],
    )
    for wrong in wrongs:
        with pytest.raises(LlamamemError):
            plan(sidecar=SIDECAR, profile="fused", extra=wrong)
        assert plan(extra=wrong).argv[-len(wrong) :] == tuple(wrong)  # base: the user's own business


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"profile": "turbo"}, "no such profile"),
        ({"profile": "serial"}, "--sidecar"),
        ({"profile": "base", "sidecar": SIDECAR}, "without a memory"),
        ({"sidecar": SIDECAR, "parallel": 2}, "--profile batched"),
        ({"sidecar": SIDECAR, "profile": "fused", "parallel": 2}, "--profile batched"),
        ({"sidecar": SIDECAR, "profile": "batched", "parallel": 0}, "--parallel 0"),
        ({"port": 70000}, "--port 70000"),
        ({"host": "127.0.0.1,::1"}, "one TCP address"),
    ],
)
def test_contradictions_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamamemError, match=message) as caught:
        plan(**kwargs)
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)


def test_the_printed_plan_hides_secrets() -> None:
    shown = plan(extra=["--api-key", "hunter2", "--hf-token=abc"]).as_dict()
    assert "hunter2" not in str(shown) and "abc" not in str(shown["argv"])


@pytest.fixture
def table() -> Any:
    return json.loads(Path(profiles.__file__).with_name("profiles.json").read_text(encoding="utf-8"))


def set_twice(table: Any) -> None:
    table["options"]["batch"]["spellings"].append("-ub")


def own_nothing_known(table: Any) -> None:
    table["groups"]["serial"].append("turbo")


def set_without_owning(table: Any) -> None:
    table["profiles"]["fused"]["flags"].append("--no-warmup")


def misspell(table: Any) -> None:
    table["profiles"]["fused"]["one_slots"] = True


def be_from_the_future(table: Any) -> None:
    table["format"] = "llamamem_profiles.v2"


def lose_the_groups(table: Any) -> None:
    del table["groups"]


@pytest.mark.parametrize(
    "change, said",
    [
        (set_twice, "-ub: belongs to more than one option"),
        (own_nothing_known, "profile serial owns turbo, which is no option"),
        (set_without_owning, "profile fused sets --no-warmup, which it does not own"),
        (misspell, "profiles.fused.one_slots: Extra inputs"),
        (be_from_the_future, "format: Input should be 'llamamem_profiles.v1'"),
        (lose_the_groups, "has no 'groups'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(table: Any, tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(table))
    assert read_profiles(path).profiles == PROFILES and read_profiles(path).options == OPTIONS
    change(table)
    path.write_text(json.dumps(table))
    with pytest.raises(LlamamemError) as caught:
        read_profiles(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_web_pages_of_other_origins_are_kept_out_of_a_server_with_a_memory() -> None:
    assert value(plan(sidecar=SIDECAR).argv, "--cors-origins") == "localhost"
    mine = plan(sidecar=SIDECAR, extra=["--cors-origins", "https://chat.example"]).argv
    assert value(mine, "--cors-origins") == "https://chat.example"
    assert "--cors-origins" not in plan(sidecar=SIDECAR, environ={"LLAMA_ARG_CORS_ORIGINS": "*"}).argv
