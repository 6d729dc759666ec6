"""Reference traces: what is read, and what a comparison says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat_server import FakeChatServer, Refused

from llamamem.errors import LlamamemError
from llamamem.formats.trace import SCHEMA, read_trace
from llamamem.proof.trace import Difference, TraceComparison, compare_trace
from llamamem.serving.client import Client

PROMPT, SAID = "who?", "nobody at all"
PROMPT_IDS = [ord(c) for c in f"[user]{PROMPT}"]
SAID_IDS = [ord(c) for c in SAID]


def document(**changes: Any) -> dict[str, Any]:
    """A trace; `generation={...}` and so on change fields of that part, a part that is None is left out."""
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "generation": {
            "prompt": PROMPT,
            "max_new_tokens": 40,
            "do_sample": False,
            "sample_seed": 7,
            "temperature": 1.0,
            "top_p": 0.95,
            "top_k": 64,
        },
        "result": {"assistant_display": SAID},
        "session": {"processed_input_ids": PROMPT_IDS + SAID_IDS},
    }
    for part, change in changes.items():
        if isinstance(change, dict):
            value[part] |= change
        else:
            value[part] = change
    return {part: fields for part, fields in value.items() if fields is not None}


@pytest.fixture(autouse=True)
def no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs and the key of the user who runs the tests stay unread."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def write(value: Any) -> Path:
        path = tmp_path / "trace.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with FakeChatServer(lambda body: SAID) as running:
        yield running


@pytest.fixture
def compared(server: FakeChatServer, write: Callable[[Any], Path]) -> Callable[..., TraceComparison]:
    def compared(**changes: Any) -> TraceComparison:
        with Client(server.url, timeout=10) as client:
            return compare_trace(client, read_trace(write(document(**changes))))

    return compared


def test_what_else_was_recorded_is_kept(write: Callable[[Any], Path]) -> None:
    trace = read_trace(write(document(result={"n_tokens": 3}, layers=[{"delta_norm": 0.5}])))
    assert trace.result.model_extra == {"n_tokens": 3}
    assert trace.model_dump()["layers"] == [{"delta_norm": 0.5}]
    assert trace.session.processed_input_ids == tuple(PROMPT_IDS + SAID_IDS)


def test_ids_may_have_a_batch_axis(write: Callable[[Any], Path]) -> None:
    trace = read_trace(write(document(session={"processed_input_ids": [[5, 6]]})))
    assert trace.session.processed_input_ids == (5, 6)


@pytest.mark.parametrize(
    "value, said",
    [
        (document(schema="delta_mem_rwkv_ms_reference_trace.v2"), "reference_trace.v2"),
        (document(generation=None), "generation"),
        (document(generation={"prompt": ""}), "generation.prompt"),
        (document(generation={"max_new_tokens": 0}), "generation.max_new_tokens"),
        (document(result={"assistant_display": None}), "result.assistant_display"),
        (document(session={"processed_input_ids": [1, -1]}), "session.processed_input_ids.1"),
        (document(session={"processed_input_ids": [[1], [2]]}), "session.processed_input_ids"),
        ("[1]", "trace.json"),
        ("{", "trace.json"),
    ],
)
def test_what_is_no_trace_is_refused_by_field(write: Callable[[Any], Path], value: Any, said: str) -> None:
    with pytest.raises(LlamamemError) as refused:
        read_trace(write(value))
    assert said in str(refused.value) and "trace.json" in str(refused.value) and refused.value.exit_status == 2


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match=r"none\.json: cannot be read"):
        read_trace(tmp_path / "none.json")


def test_equal(compared: Callable[..., TraceComparison], server: FakeChatServer) -> None:
    found = compared()
    assert found.ok and found.text_equal and found.tokens_equal and found.first_difference is None
    assert "equal" in found.detail and found.got == SAID and found.hint is None
    (asked,) = server.asked
    assert (asked["temperature"], asked["top_k"], asked["seed"], asked["max_tokens"]) == (0.0, 1, 7, 40)
    assert asked["cache_prompt"] is False and asked["rwkv_ms"] == {"memory": None, "frozen": False, "scale": 1.0}


def test_text_alone_is_enough_where_no_ids_were_recorded(compared: Callable[..., TraceComparison]) -> None:
    found = compared(session=None)
    assert found.ok and found.tokens_equal is None and found.expected_ids is None


@pytest.mark.parametrize("text, index, got", [("nobody at home", 10, "a"), ("nobody at all!", 13, None)])
def test_another_text(compared: Callable[..., TraceComparison], text: str, index: int, got: str | None) -> None:
    found = compared(session=None, result={"assistant_display": text})
    assert not found.ok and not found.text_equal
    assert found.first_difference == Difference("character", index, text[index], got)
    assert found.differing_token == (None if got is None else index)
    assert str(index) in found.detail


def test_the_first_differing_token_is_named(compared: Callable[..., TraceComparison]) -> None:
    other = [*SAID_IDS[:4], 33, *SAID_IDS[5:]]
    found = compared(session={"processed_input_ids": PROMPT_IDS + other})
    assert not found.ok and found.text_equal and found.tokens_equal is False
    assert found.first_difference == Difference("new token", 4, 33, SAID_IDS[4])
    assert found.differing_token == 4 and "tokenizers" in str(found.hint)


def test_another_prompt_is_told_from_another_answer(compared: Callable[..., TraceComparison]) -> None:
    found = compared(session={"processed_input_ids": [1, *PROMPT_IDS, *SAID_IDS]}, result={"assistant_display": "no"})
    assert not found.ok and found.first_difference == Difference("prompt token", 0, 1, PROMPT_IDS[0])
    assert found.differing_token is None and "template" in str(found.hint)
    short = compared(session={"processed_input_ids": PROMPT_IDS[:3]})
    assert not short.ok and short.first_difference == Difference("prompt token", 3, None, PROMPT_IDS[3])


@pytest.mark.parametrize("ids, ok", [(SAID_IDS[:-1], True), ([*SAID_IDS, 1, 10], True), (SAID_IDS[:-3], False)])
def test_the_end_of_the_ids_is_open(compared: Callable[..., TraceComparison], ids: list[int], ok: bool) -> None:
    assert compared(session={"processed_input_ids": PROMPT_IDS + ids}).ok is ok


def test_white_space_counts_and_is_said(compared: Callable[..., TraceComparison]) -> None:
    found = compared(result={"assistant_display": f"{SAID}\n"})
    assert not found.ok and "white space" in str(found.hint)


def test_a_character_that_was_cut_off_is_not_compared(
    compared: Callable[..., TraceComparison], server: FakeChatServer
) -> None:
    cut = {"result": {"assistant_display": f"{SAID}\ufffd"}, "session": None}
    assert not compared(**cut).ok
    assert compared(**cut, generation={"max_new_tokens": len(SAID)}).ok


def test_a_sampled_trace_is_asked_as_it_was(compared: Callable[..., TraceComparison], server: FakeChatServer) -> None:
    found = compared(generation={"do_sample": True, "top_p": None}, result={"assistant_display": "no"}, session=None)
    (asked,) = server.asked
    assert (asked["temperature"], asked["top_k"], asked["top_p"], asked["min_p"]) == (1.0, 64, 1.0, 0.0)
    assert not found.ok and "do_sample" in str(found.hint)
    assert compared(generation={"do_sample": True, "top_k": 1}).ok
    assert server.asked[-1]["temperature"] == 0.0


def test_a_trace_is_asked_on_an_empty_memory_whatever_the_slot_was_given(
    compared: Callable[..., TraceComparison], server: FakeChatServer
) -> None:
    assert compared().ok
    assert server.asked[0]["rwkv_ms"] == {"memory": None, "frozen": False, "scale": 1.0} and server.erased == []


def test_a_base_server_is_not_told_of_memory(compared: Callable[..., TraceComparison], server: FakeChatServer) -> None:
    server.memory = None
    assert compared().ok and "rwkv_ms" not in server.asked[0]


def test_the_command(llamamem: Callable[..., Any], server: FakeChatServer, write: Callable[[Any], Path]) -> None:
    path = write(document())
    held = llamamem("trace", "compare", path, "--url", server.url)
    assert held.status == 0 and "equal" in held.out and held.err == ""
    server.reply = lambda body: SAID.replace("at", "AT")
    parted = llamamem("trace", "compare", path, "--url", server.url)
    assert parted.status == 1 and "new token 7" in parted.out and repr(SAID) in parted.out
    value = json.loads(llamamem("trace", "compare", path, "--url", server.url, "--json").out)
    assert value["ok"] is False and value["first_difference"]["index"] == 7 and value["differing_token"] == 7
    server.reply = lambda body: SAID
    assert llamamem("trace", "compare", path, "--url", server.url, "--erase").status == 0 and server.erased == [0]


def test_the_command_says_why_the_server_refused(
    llamamem: Callable[..., Any], server: FakeChatServer, write: Callable[[Any], Path]
) -> None:
    def refuse(_: dict[str, Any]) -> str:
        raise Refused(400, "the context is too small")

    server.reply = refuse
    refused = llamamem("trace", "compare", write(document()), "--url", server.url)
    assert refused.status == 2 and "the context is too small" in refused.err and refused.err.count("\n") == 1
