"""`llamamem eval` against a stand-in: what is asked, kept, gone on with, counted and compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_chat_server import MEMORY, Died, FakeChatServer, Refused

from llamamem.errors import LlamamemError
from llamamem.formats.results import read_results
from llamamem.formats.suite import read_suite
from llamamem.proof.evaluate import Evaluation, Settings, compare, evaluate
from llamamem.serving.client import Client

LINES = [
    {"id": "one", "prompt": "first", "expect": {"contains": "yes"}, "group": "g"},
    {"id": "two", "prompt": "second", "expect": {"exact": "no"}, "group": "g"},
    {"id": "three", "prompt": "third"},
]


@pytest.fixture(autouse=True)
def no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs and the key of the user who runs the tests stay unread."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with FakeChatServer() as running:
        yield running


def write_suite(tmp_path: Path, lines: list[dict[str, Any]] = LINES) -> Path:
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def run(server: FakeChatServer, tmp_path: Path) -> Callable[..., Evaluation]:
    def run(
        lines: list[dict[str, Any]] = LINES, settings: Settings | None = None, at: FakeChatServer = server, **kw: Any
    ) -> Evaluation:
        with Client(at.url, timeout=20) as client:
            return evaluate(client, read_suite(write_suite(tmp_path, lines)), settings or Settings(), **kw)

    return run


def test_each_line_is_a_conversation_of_its_own(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    done = run(settings=Settings(system="be brief", max_tokens=9))
    assert [answer.ok for answer in done.answers] == [True, False, None] and not done.ok
    assert done.answers[1].failures == ("exact: is not 'no'",)
    assert [body["messages"] for body in server.asked] == [
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": prompt}]
        for prompt in ("first", "second", "third")
    ]
    for body in server.asked:
        assert body["cache_prompt"] is False and body["rwkv_ms"] == {"memory": None}
        assert (body["temperature"], body["top_k"], body["seed"], body["max_tokens"]) == (0, 1, 123, 9)


def test_an_answer_says_who_was_asked_what(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    before = time.time()
    answer = run().answers[0]
    assert answer.request == server.asked[0] and answer.response == "yes" and answer.finish_reason == "stop"
    assert answer.usage == {"prompt_tokens": 11, "completion_tokens": 3} and answer.latency_ms > 0
    assert answer.memory == {"tokens_written": 13, "origin": None}
    assert (answer.served.sidecar_sha256, answer.served.url) == (MEMORY["sidecar_sha256"], server.url)
    assert before <= answer.time <= time.time()


def test_sampling_is_passed_on(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    run(settings=Settings(temperature=0.7, top_p=0.9, top_k=40, seed=5))
    asked = server.asked[0]
    assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["seed"]) == (0.7, 0.9, 40, 5)
    server.asked.clear()
    run(settings=Settings(temperature=0.7))
    assert "top_k" not in server.asked[0] and "top_p" not in server.asked[0]


def test_what_is_answered_is_not_asked_again(
    run: Callable[..., Evaluation], server: FakeChatServer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    first = run(output=out)
    again = run(output=out)
    assert len(server.asked) == 3 and again.answers == first.answers and again.n_kept == 3
    longer = run([*LINES, {"id": "four", "prompt": "fourth"}], output=out)
    assert server.questions[3:] == ["fourth"] and (longer.n_kept, len(longer.answers)) == (3, 4)


def test_kept_answers_are_judged_by_the_suite_of_now(
    run: Callable[..., Evaluation], server: FakeChatServer, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(output=out)
    eased = [LINES[0], {**LINES[1], "expect": {"exact": "yes"}, "group": "h"}, LINES[2]]
    done = run(eased, output=out)
    assert done.ok and len(server.asked) == 3
    kept = read_results(out)["two"]
    assert kept.ok and kept.failures == () and kept.group == "h"


@pytest.mark.parametrize(
    "change, said",
    [
        ({"settings": Settings(seed=7)}, "other words or other settings"),
        ({"lines": [{**LINES[0], "prompt": "else"}]}, "other words or other settings"),
        ({"memory": {**MEMORY, "sidecar_sha256": "99" * 32}}, "sidecar_sha256 5c"),
        ({"memory": {**MEMORY, "base_sha256": "99" * 32}}, "base_sha256 ba"),
        ({"memory": {**MEMORY, "mode": "fused"}}, "mode serial"),
        ({"memory": None}, "sidecar_sha256 5c"),
    ],
)
def test_answers_of_another_model_or_question_are_not_mixed_in(
    run: Callable[..., Evaluation], server: FakeChatServer, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = tmp_path / "out.jsonl"
    run(output=out)
    before = out.read_bytes()
    server.memory = change.pop("memory", server.memory)
    with pytest.raises(LlamamemError) as refused:
        run(output=out, **change)
    assert said in str(refused.value) and "'one'" in str(refused.value)
    assert out.read_bytes() == before and len(server.asked) == 3


def test_a_refusal_is_an_answer_that_is_asked_for_again(
    run: Callable[..., Evaluation], server: FakeChatServer, tmp_path: Path
) -> None:
    def refuse(body: dict[str, Any]) -> str:
        if body["messages"][0]["content"] != "first":
            raise Refused(400, "the context is too small")
        return "yes"

    server.reply, out = refuse, tmp_path / "out.jsonl"
    done = run(output=out)
    assert not done.ok and done.answers[1].error == "HTTP 400: the context is too small"
    assert [answer.ok for answer in done.answers] == [True, False, None]
    summary = done.summary()
    assert (summary["errors"], summary["failed"], summary["groups"]["g"]["checked"]) == (2, 1, 2)
    server.reply = lambda body: "no"
    healed = run(output=out)
    assert healed.ok and server.questions == ["first", "second", "third", "second", "third"]


def test_an_answer_that_is_none_is_an_error(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    server.chat = lambda body: {"choices": []}  # type: ignore[method-assign, assignment]
    done = run()
    assert not done.ok and all("HTTP 200" in str(answer.error) for answer in done.answers)


def test_when_the_server_dies_what_was_answered_is_kept(
    run: Callable[..., Evaluation], server: FakeChatServer, tmp_path: Path
) -> None:
    def die(body: dict[str, Any]) -> str:
        if body["messages"][0]["content"] == "second":
            raise Died
        return "yes"

    server.reply, out = die, tmp_path / "out.jsonl"
    with pytest.raises(LlamamemError, match=r"is the server running\?.*out\.jsonl: the same command goes on") as died:
        run(output=out)
    assert died.value.exit_status == 2 and list(read_results(out)) == ["one"]
    server.reply = lambda body: "no"
    assert run(output=out).ok


def test_a_key_that_is_missing_stops_it(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    def refuse(_: dict[str, Any]) -> str:
        raise Refused(401, "no")

    server.reply = refuse
    with pytest.raises(LlamamemError, match="--api-key"):
        run()
    assert len(server.asked) == 1


def test_as_many_at_a_time_as_wished_each_in_its_slot(run: Callable[..., Evaluation]) -> None:
    together = threading.Barrier(3, timeout=20)  # none is answered until three are asked

    def reply(_: dict[str, Any]) -> str:
        together.wait()
        return "yes"

    with FakeChatServer(reply, slots=3) as server:
        done = run([{"id": f"{i}", "prompt": f"{i}"} for i in range(6)], at=server, concurrency=3)
        assert [answer.id for answer in done.answers] == ["0", "1", "2", "3", "4", "5"] and done.ok
        assert not any("id_slot" in body for body in server.asked)


def test_more_at_a_time_than_slots_is_refused(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    with pytest.raises(LlamamemError, match=r"--concurrency 2: the server has 1 slot; .*--parallel"):
        run(concurrency=2)
    assert not server.asked


def test_a_base_is_asked_the_same_without_a_word_of_memory(
    run: Callable[..., Evaluation], server: FakeChatServer
) -> None:
    before = run().answers[0].request_sha256
    server.memory = None
    assert run().answers[0].request_sha256 == before and "rwkv_ms" not in server.asked[-1]


def test_two_runs_side_by_side(run: Callable[..., Evaluation], server: FakeChatServer) -> None:
    base = {answer.id: answer for answer in run().answers}
    server.reply = lambda body: "yes" if body["messages"][0]["content"] == "third" else "no"
    sides = compare(run(), base, "base")
    assert (sides.better, sides.worse, sides.same_text) == (["two"], ["one"], 1)
    assert [pair.parted for pair in sides.pairs] == [0, 0, None]


def test_what_was_asked_otherwise_is_not_compared(run: Callable[..., Evaluation]) -> None:
    base = {answer.id: answer for answer in run().answers}
    with pytest.raises(LlamamemError, match=r"--compare base: 'one' was asked with other words or other settings"):
        compare(run(settings=Settings(max_tokens=3)), base, "base")
    del base["two"]
    with pytest.raises(LlamamemError, match="--compare base: has no answer to 'two'"):
        compare(run(), base, "base")


def test_the_command(
    llamamem: Callable[..., Any], server: FakeChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, out = write_suite(tmp_path), tmp_path / "out.jsonl"
    shown = llamamem("eval", suite, "--url", server.url, "--output", out)
    assert shown.status == 1 and shown.err == "" and "1 of 2 as expected, 3 lines" in shown.out
    assert "exact: is not 'no'" in shown.out and "g: 1 of 2" in shown.out
    value = json.loads(llamamem("eval", suite, "--url", server.url, "--output", out, "--json").out)
    assert (value["ok"], value["summary"]["kept"], value["compare"]) == (False, 3, None)
    assert [line["response"] for line in value["results"]] == ["yes", "yes", "yes"]
    assert len(server.asked) == 3


def test_the_command_compares(llamamem: Callable[..., Any], server: FakeChatServer, tmp_path: Path) -> None:
    suite, base = write_suite(tmp_path), tmp_path / "base.jsonl"
    llamamem("eval", suite, "--url", server.url, "--output", base)
    server.reply = lambda body: "no \x1b[31m[red]"
    shown = llamamem("eval", suite, "--url", server.url, "--compare", base)
    assert shown.status == 1 and "only in the base run: one" in shown.out and "base answer" in shown.out
    assert "\x1b" not in shown.out and "no ·[31m[red]" in shown.out
    value = json.loads(llamamem("eval", suite, "--url", server.url, "--compare", base, "--json").out)
    assert value["compare"]["worse"] == ["one"] and value["compare"]["lines"][0]["base_response"] == "yes"
    nobody = llamamem("eval", suite, "--url", server.url, "--compare", "nobody")
    assert nobody.status == 2 and nobody.err.count("\n") == 1 and "nobody" in nobody.err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["none.jsonl"], "none.jsonl: cannot be read"),
        (["suite.jsonl"], "no server runs"),
        (["suite.jsonl", "--url", "http://127.0.0.1:9"], "is the server running?"),
        (["suite.jsonl", "--url", "URL", "--output", "suite.jsonl"], "not an answer"),
        (["suite.jsonl", "--url", "URL", "--run", "x"], "--run and --url"),
    ],
)
def test_errors_are_one_line_with_status_2(
    llamamem: Callable[..., Any],
    server: FakeChatServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    write_suite(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused = llamamem("eval", *(server.url if word == "URL" else word for word in arguments))
    assert refused.status == 2 and refused.out == "" and said in refused.err
    assert refused.err.startswith("llamamem: error: ") and refused.err.count("\n") == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_evaluation_goes_on(server: FakeChatServer, tmp_path: Path, how: signal.Signals) -> None:
    let_go = threading.Event()

    def reply(body: dict[str, Any]) -> str:
        if body["messages"][0]["content"] == "third":
            let_go.wait(20)
        return "no"

    server.reply = reply
    suite, out = write_suite(tmp_path, [{**line, "expect": {"exact": "no"}} for line in LINES]), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "llamamem.cli", "eval", str(suite), "--url", server.url, "--output", str(out)]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        end = time.monotonic() + 60
        while len(server.asked) < 3:
            assert first.poll() is None and time.monotonic() < end, "the third line was never asked"
            time.sleep(0.01)
        first.send_signal(how)
        said = first.communicate(timeout=60)[1]
    finally:
        first.kill()
        let_go.set()
    assert list(read_results(out)) == ["one", "two"]
    if how == signal.SIGINT:
        assert first.returncode == 2 and "interrupted; what was answered is in" in said and said.count("\n") == 1
    out.write_bytes(out.read_bytes()[:-9])  # as if it had died while it wrote the second
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert second.returncode == 0 and "3 of 3 as expected" in second.stdout and "1 kept from before" in second.stdout
    assert server.questions == ["first", "second", "third", "second", "third"]
    assert list(read_results(out)) == ["one", "two", "three"]
