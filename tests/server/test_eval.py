"""`llamamem trace compare` and `llamamem eval` against the real server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_runs import Running, Serve

from llamamem.formats.run import runs_dir, write_run
from llamamem.formats.suite import read_suite
from llamamem.formats.trace import SCHEMA, Trace, read_trace
from llamamem.proof.evaluate import Settings, compare, evaluate
from llamamem.proof.trace import compare_trace
from llamamem.serving.client import Client

PROMPT = "hello there what is the colour of the garden"
ONE_THREAD = ("--threads", "1")  # at one token a microbatch, a second one mostly waits
SUITE = Path(__file__).parents[2] / "configs" / "suites" / "memory.jsonl"


def record_trace(client: Client, path: Path, n: int = 24) -> Trace:
    """As a reference would write it, by another road than the one that is compared: ids fed to /completion."""
    template = client.request("POST", "/apply-template", json={"messages": [{"role": "user", "content": PROMPT}]})
    prompt = client.tokenize(template.json()["prompt"], add_special=True, parse_special=True)
    said = client.completion(prompt, n_predict=n, return_tokens=True, cache_prompt=False)
    value = {
        "schema": SCHEMA,
        "generation": {"prompt": PROMPT, "max_new_tokens": n, "do_sample": False, "sample_seed": 0, "temperature": 1.0},
        "result": {"assistant_display": said["content"]},
        "session": {"processed_input_ids": [*prompt, *said["tokens"][:-1]]},
    }
    path.write_text(json.dumps(value), encoding="utf-8")
    return read_trace(path)


def test_a_trace_holds_for_its_own_memory_only(serve: Serve, tmp_path: Path) -> None:
    client = serve("serial", *ONE_THREAD).client
    trace = record_trace(client, tmp_path / "trace.json")
    held = compare_trace(client, trace)
    assert held.ok and held.tokens_equal and len(held.got_ids) == 24, held.detail

    base = compare_trace(serve("base", *ONE_THREAD).client, trace)
    assert not base.ok and base.first_difference is not None
    assert base.first_difference.where == "new token" and base.differing_token == base.first_difference.index
    i = base.first_difference.index
    assert base.got_ids[:i] == held.got_ids[:i] and base.got_ids[i] != held.got_ids[i]

    spoilt = trace.model_copy(update={"result": trace.result.model_copy(update={"assistant_display": held.got[:-1]})})
    assert not compare_trace(client, spoilt).ok


def test_a_trace_is_compared_on_an_empty_memory_whatever_the_slot_was_given(serve: Serve, tmp_path: Path) -> None:
    client = serve("serial", *ONE_THREAD).client
    trace = record_trace(client, tmp_path / "trace.json")
    client.give_memory(0, client.take_memory(0)[0])
    before = client.slots()[0]["rwkv_ms"]
    assert compare_trace(client, trace).ok
    assert client.slots()[0]["rwkv_ms"] == before, "and what the slot was given is not touched"


def test_a_slot_s_setting_does_not_spoil_a_trace(serve: Serve, tmp_path: Path) -> None:
    client = serve("serial", *ONE_THREAD).client
    trace = record_trace(client, tmp_path / "trace.json")
    client.set_memory(0, scale=0.0)
    assert compare_trace(client, trace).ok


def test_our_suite_is_answered_whatever_was_asked_before(serve: Serve) -> None:
    """A line's text, with memory, is the same in any order of the lines: nothing of one is left in the next."""
    running = serve("serial", *ONE_THREAD, ctx_size=4096)
    suite = read_suite(SUITE)
    # of the long texts one: this model has some four tokens a word
    lines = tuple(line for line in suite.lines if line.group != "marker" or line.id == "marker-begin")
    suite = suite.model_copy(update={"lines": lines})
    settings = Settings(max_tokens=8)
    there = evaluate(running.client, suite, settings)
    back = evaluate(running.client, suite.model_copy(update={"lines": suite.lines[::-1]}), settings)
    assert [answer.error for answer in there.answers if answer.error] == []
    said = {answer.id: answer.response for answer in there.answers}
    assert {answer.id: answer.response for answer in back.answers} == said
    assert len(set(said.values())) > len(said) // 2
    for answer in (*there.answers, *back.answers):
        assert answer.usage is not None and answer.memory is not None
        written = answer.usage["prompt_tokens"] + answer.usage["completion_tokens"] - 1
        assert answer.memory == {"tokens_written": written, "origin": None}
        assert answer.usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert there.served.mode == "serial"


def test_several_slots_at_a_time(serve: Serve, tmp_path: Path) -> None:
    client = serve("batched", *ONE_THREAD, ctx_size=4096, parallel=2).client
    suite = read_suite(SUITE).first(13)
    done = evaluate(client, suite, Settings(max_tokens=8), concurrency=2, output=tmp_path / "out.jsonl")
    assert [answer.error for answer in done.answers if answer.error] == []
    assert [answer.id for answer in done.answers] == [line.id for line in suite.lines]


def test_a_prompt_that_does_not_fit_is_refused_and_the_rest_goes_on(serve: Serve) -> None:
    suite = read_suite(SUITE)
    lines = tuple(line for line in suite.lines if line.id in ("format-number", "marker-long", "refusal-yesterday"))
    done = evaluate(
        serve("serial", *ONE_THREAD).client, suite.model_copy(update={"lines": lines}), Settings(max_tokens=8)
    )
    first, refused, last = done.answers
    assert first.response and last.response and not done.ok
    assert refused.ok is False and "HTTP 400" in str(refused.error) and "exceeds" in str(refused.error)


def test_a_memory_that_a_slot_was_given_is_in_no_answer(serve: Serve) -> None:
    client = serve("serial", *ONE_THREAD).client
    suite, settings = read_suite(SUITE).first(2), Settings(max_tokens=4)
    before = evaluate(client, suite, settings)
    client.completion(PROMPT, n_predict=4, id_slot=0)
    client.give_memory(0, client.take_memory(0)[0])
    after = evaluate(client, suite, settings)
    assert [answer.response for answer in after.answers] == [answer.response for answer in before.answers]
    assert [(answer.memory or {})["origin"] for answer in after.answers] == [None, None]


def test_the_commands_with_two_runs(
    serve: Serve, llamamem: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(running: Running) -> str:
        """Found by name, as a run that `llamamem serve` started."""
        record = running.server.record
        write_run(record, runs_dir() / f"{record.run_id}.json")
        return record.run_id

    memory, base = recorded(serve("serial", *ONE_THREAD)), recorded(serve("base", *ONE_THREAD))
    out = tmp_path / "out.jsonl"
    line = ["eval", SUITE, "--limit", "6", "--max-tokens", "8", "--run", memory, "--output", out]
    compared = llamamem(*line, "--compare", base, "--json")
    assert compared.status == 1 and compared.err == ""
    value = json.loads(compared.out)
    assert value["served"]["run_id"] == memory and value["compare"]["base"]["run_id"] == base
    assert value["served"]["sidecar_sha256"] and value["compare"]["base"]["sidecar_sha256"] is None
    assert value["summary"]["lines"] == 6 and value["compare"]["same_text"] < 6
    assert len((tmp_path / "out.base.jsonl").read_text().splitlines()) == 6
    again = json.loads(llamamem(*line, "--compare", tmp_path / "out.base.jsonl", "--json").out)
    assert again["summary"]["kept"] == 6 and again["compare"]["lines"] == value["compare"]["lines"]

    trace = tmp_path / "trace.json"
    with Client(value["served"]["url"]) as client:
        record_trace(client, trace)
    assert llamamem("trace", "compare", trace, "--run", memory).status == 0
    assert llamamem("trace", "compare", trace, "--run", base).status == 1


def test_side_by_side_a_silenced_memory_is_the_base(serve: Serve) -> None:
    suite, settings = read_suite(SUITE).first(6), Settings(max_tokens=8)
    # one token a microbatch, as in serial: sums in another order could part what is equal
    base = evaluate(serve("base", *ONE_THREAD, "-ub", "1", parallel=1).client, suite, settings)
    theirs = {answer.id: answer for answer in base.answers}
    client = serve("serial", *ONE_THREAD).client
    assert compare(evaluate(client, suite, settings), theirs, "base").same_text < 6

    class Silenced(Client):
        def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
            if path == "/v1/chat/completions":
                kwargs["json"] = {**kwargs["json"], "rwkv_ms": {"scale": 0}}
            return super().request(method, path, **kwargs)

    with Silenced(str(client.url)) as silenced:
        assert compare(evaluate(silenced, suite, settings), theirs, "base").same_text == 6
