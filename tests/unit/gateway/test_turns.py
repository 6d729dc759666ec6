"""A turn, as a client sees it: whose memory it runs on, what it leaves, and what becomes of it when things go wrong."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fake_llama import Died, FakeLlama
from fronts import Front, MakeFront
from memory_store import MemoryStore

from llamamem.formats.state import State, decode_state, encode_state, origin_sha256
from llamamem.gateway import wire
from llamamem.gateway.routes import Kind, asked
from llamamem.sessions.session import Memory, new_session
from llamamem.sessions.store import Unreachable


def down(*_: Any) -> None:
    raise Unreachable("the store is away")


def settled(front: Front, turns: int) -> list[dict[str, Any]]:
    """The log's lines of turns, once there are so many."""
    until = time.monotonic() + 10
    while len(lines := [line for line in front.lines() if "turn" in line]) < turns:
        assert time.monotonic() < until, front.lines()
        time.sleep(0.01)
    return lines


# -- whose memory


def test_a_conversation_goes_on_on_the_memory_that_it_began_on(front: Front) -> None:
    first = front.told("this is anna baker.")
    assert (first["conversation"], first["origin"], first["generation"]) == ("new", None, 1)
    second = front.told("this is anna baker.", first["text"], "who is anna?")
    assert (second["conversation"], second["origin"], second["generation"]) == ("goes on", None, 2)
    memory = front.memory()
    third = front.told("who is anna?")
    assert third["conversation"] == "new" and third["origin"] == origin_sha256(memory)


@pytest.mark.parametrize("said", [("a", "no.", "c"), ("b",), ("a", "b"), ("b", "no.", "a")])
def test_another_text_is_another_conversation(front: Front, said: tuple[str, ...]) -> None:
    front.told("a")
    assert front.told(*said)["conversation"] == "new"


def test_the_only_exchange_once_more_is_no_new_one_but_on_another_day_it_is(front: Front) -> None:
    answer = front.told("a")["text"]
    assert front.told("a")["conversation"] == "goes on"
    front.told("a", answer, "b")
    assert front.told("a")["conversation"] == "new"


def test_what_was_trimmed_at_its_beginning_goes_on(front: Front) -> None:
    a = front.told("a")["text"]
    b = front.told("a", a, "b")["text"]
    assert front.told("b", b, "c")["conversation"] == "goes on"


def test_ids_decide_where_there_are_any(front: Front) -> None:
    one, two = {"X-Conversation-Id": "1"}, {"X-OpenWebUI-Chat-Id": "2"}
    front.told("a", headers=one)
    assert front.told("whatever", headers=one)["conversation"] == "goes on"
    assert front.told("whatever", headers=two)["conversation"] == "new"
    assert front.told("whatever")["conversation"] == "new"
    assert front.told("whatever", rwkv_ms={"conversation": "3"})["conversation"] == "new"


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("/session/anna/v1/chat/completions", {"X-Session-Id": "other"}, {"user": "other"}),
        ("/session/an%6Ea/v1/chat/completions", {}, {}),
        ("/v1/chat/completions", {"X-Session-Id": "anna", "x-litellm-session-id": "other"}, {"user": "other"}),
        ("/v1/chat/completions", {"x-litellm-session-id": "anna"}, {"rwkv_ms": {"session": "other"}}),
        ("/v1/chat/completions", {"X-OpenClaw-Session-Key": "anna"}, {}),
        ("/v1/chat/completions", {"X-OpenWebUI-User-Id": "anna"}, {}),
        ("/v1/chat/completions", {}, {"rwkv_ms": {"session": "anna"}, "metadata": {"session_id": "other"}}),
        ("/v1/chat/completions", {}, {"metadata": {"session_id": "anna", "user_id": "other"}}),
        ("/v1/chat/completions", {}, {"metadata": {"user_id": "anna"}, "prompt_cache_key": "other"}),
        ("/v1/chat/completions", {}, {"prompt_cache_key": "anna", "user": "other"}),
        ("/v1/chat/completions", {}, {"user": "anna"}),
    ],
)
def test_the_first_name_that_is_there_counts(
    front: Front, path: str, headers: dict[str, str], body: dict[str, Any]
) -> None:
    assert front.told("a", name=None, path=path, headers=headers, **body)["session"] == "anna"
    assert "rwkv_ms" not in front.llama.turns()[-1] or "session" not in front.llama.turns()[-1]["rwkv_ms"]


def test_a_header_of_the_configuration_names_a_session_too(make_front: MakeFront) -> None:
    from llamamem.gateway.naming import Headers

    front = make_front(headers=Headers(("x-my-user",), ("x-my-chat",)))
    headers = {"X-My-User": "anna", "X-My-Chat": "1"}
    assert front.told("a", name=None, headers=headers)["session"] == "anna"
    assert front.told("b", name=None, headers=headers)["conversation"] == "goes on"
    assert "rwkv_ms" not in front.chat("a", name="anna").json()  # that list alone is known


def test_without_a_name_nothing_is_remembered_and_nothing_is_told(front: Front) -> None:
    front.told("this is anna baker.")
    before = front.http.get("/v1/sessions").json()
    assert "rwkv_ms" not in front.chat("who is anna?", name=None).json()
    assert front.http.get("/v1/sessions").json() == before
    assert "rwkv_ms" not in front.llama.turns()[-1]


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [("?memory=off", {}, {}), ("", {"X-Memory": "off"}, {}), ("", {}, {"rwkv_ms": {"mode": "off"}})],
)
def test_memory_off_names_nobody(front: Front, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
    front.told("a")
    answer = front.chat("title?", path=f"/v1/chat/completions{path}", headers=headers, **body)
    assert answer.status_code == 200 and "rwkv_ms" not in answer.json()
    assert "rwkv_ms" not in front.llama.turns()[-1]
    assert front.http.get("/v1/sessions/anna").json()["generation"] == 1


@pytest.mark.parametrize(
    ("path", "headers", "body"),
    [
        ("?memory=read", {}, {}),
        ("", {"X-Memory": "read"}, {}),
        ("", {}, {"rwkv_ms": {"mode": "read"}}),
        ("", {}, {"rwkv_ms": {"frozen": True}}),
    ],
)
def test_memory_read_leaves_it_as_it_is(front: Front, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
    front.told("a")
    memory = front.memory()
    told = front.chat("title?", path=f"/v1/chat/completions{path}", headers=headers, **body).json()["rwkv_ms"]
    assert told["origin"] == origin_sha256(memory) and "memory" not in told
    assert front.memory() == memory and front.http.get("/v1/sessions/anna").json()["generation"] == 1
    read = front.chat("a", path=f"/v1/chat/completions{path}", headers=headers, n=2, **body)
    assert read.status_code == 200 and read.json()["rwkv_ms"]["origin"] is None  # it goes on


@pytest.mark.parametrize(
    "name",
    [
        b"a" * 300,
        b"a/b",
        b"/etc/passwd",
        b"..",
        b"a/../b",
        b"a\\b",
        b"..\\x",
        b"\xc2\x85x",
        b"a\tb",
        b"\xff\xfe",
        b".",
    ],
)
def test_names_that_cannot_be_are_refused(refusing: Front, name: bytes) -> None:
    answer = refusing.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "a"}]},
        headers=[(b"x-session-id", name)],
    )
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "session-name", answer.text
    assert refusing.store.shared.records == {} and refusing.llama.turns() == []


@pytest.mark.parametrize("name", ["a\0b", "a/b", "..", "x" * 300, 7, ["a"], {"a": 1}, "a\nb"])
def test_names_in_a_body_likewise(refusing: Front, name: Any) -> None:
    answer = refusing.chat("a", name=None, user=name)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "session-name", answer.text


def test_a_name_that_is_no_unicode(front: Front) -> None:
    body = b'{"messages": [{"role": "user", "content": "a"}], "user": "\\ud800"}'
    answer = front.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400 and not front.llama.asked


def test_odd_names_that_can_be(front: Front) -> None:
    for name in ("Anna Baker", "日本語", "a%2Fb", "a?b#c", "é", "a;b", "x" * 200):
        assert front.told("a", name=None, user=name)["session"] == name
        quoted = quote(name, safe="")
        assert front.http.get(f"/v1/sessions/{quoted}").json()["name"] == name
        assert front.told("b", name=None, path=f"/session/{quoted}/v1/chat/completions")["session"] == name


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"rwkv_ms": {"memory": None}},
        {"rwkv_ms": []},
        {"rwkv_ms": {"mode": "on"}, "_query": "?memory=off"},
        {"rwkv_ms": {"mode": "sideways"}},
        {"_query": "?memory=never"},
    ],
)
def test_what_contradicts_itself_is_refused(refusing: Front, body: dict[str, Any]) -> None:
    answer = refusing.chat("a", path=f"/v1/chat/completions{body.pop('_query', '')}", **body)
    assert answer.status_code == 400 and refusing.store.shared.records == {}


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [5]},
        {"role": "user", "content": [None, [1]]},
        {"role": "assistant", "content": "a", "tool_calls": 5},
        {"role": "assistant", "content": "a", "tool_calls": True},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
        {"type": "function_call", "name": "f", "arguments": DEEP},
    ],
)
def test_what_is_no_message_is_the_servers_to_refuse(front: Front, turn: dict[str, Any]) -> None:
    front.llama.before = lambda path, _: path != "/props" and 1 / 0
    body = {"messages": [{"role": "user", "content": "a"}, turn], "input": [turn]}
    for path in ("/v1/chat/completions", "/v1/responses"):
        answer = front.http.post(path, json=body, headers={"X-Session-Id": "anna"})
        assert answer.status_code == 502, answer.text  # it was asked


@pytest.mark.parametrize("kind", ["completion", "completions"])
def test_one_prompt_in_a_list_is_that_prompt(kind: Kind) -> None:
    assert asked(kind, {"prompt": ["a b"]}) == asked(kind, {"prompt": "a b"})
    assert asked(kind, {"prompt": [1, 2]}) == asked(kind, {"prompt": [[1, 2]]}) != asked(kind, {"prompt": [1, 3]})


def test_what_the_server_refuses_leaves_nothing(front: Front) -> None:
    answer = front.chat("a", rwkv_ms={"scale": 99})
    assert answer.status_code == 400 and front.store.shared.records == {}
    assert settled(front, 1)[0]["turn"] == "refused"


# -- streams


def test_pieces_come_as_they_are_said(front: Front) -> None:
    said = threading.Event()
    front.llama.piece = lambda number: said.wait(10) if number == 1 else None
    body = {"messages": [{"role": "user", "content": "who is eric?"}], "max_tokens": 6, "stream": True}
    with front.http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Session-Id": "anna"}) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines)[5:])["choices"][0]["delta"]["content"]  # nobody said the second one yet
        said.set()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][5:])["rwkv_ms"]["generation"] == 1


def test_the_end_is_told_once_the_memory_is_saved(front: Front) -> None:
    may = threading.Event()
    front.store.shared.fault = lambda call: may.wait(10) if call == "save" else None
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "stream": True}
    got: list[str] = []

    def read() -> None:
        with front.http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Session-Id": "anna"}) as response:
            got.extend(line for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    reader.join(0.5)
    assert reader.is_alive() and not [line for line in got if '"finish_reason":"' in line or "DONE" in line]
    may.set()
    reader.join(10)
    assert got[-1] == "data: [DONE]"


def test_a_client_that_takes_nothing_holds_the_server_back(front: Front) -> None:
    """Back-pressure: what was said is neither piled up in the gateway nor read from the server."""
    import socket

    said = [0]

    def long(number: int) -> None:
        said[0] = number

    front.llama.piece = long
    front.llama.model.generate = lambda route, body: _long_reply()  # type: ignore[method-assign]
    with socket.create_connection((front.http.base_url.host, front.http.base_url.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = b'{"messages":[{"role":"user","content":"a"}],"stream":true}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        client.sendall(head + body)
        until, stopped = time.monotonic() + 30, -1
        while said[0] != stopped:  # it comes to a halt, and not at the end: of 3,000 pieces of 10 kB
            assert time.monotonic() < until
            stopped = said[0]
            time.sleep(2.0)
        assert 0 < stopped < 2900


def _long_reply() -> Any:
    from entitled.wire import Reply

    piece = {"choices": [{"index": 0, "delta": {"content": "x" * 10_000}}]}
    return Reply(200, None, [*[piece] * 3000, {"choices": []}])


# -- what goes wrong


def test_a_turn_that_is_cancelled_leaves_the_session_as_before(front: Front) -> None:
    answer = front.told("a")["text"]
    memory = front.memory()
    front.llama.piece = lambda number: time.sleep(0.05)
    body = {"messages": [{"role": "user", "content": "b"}], "max_tokens": 9, "stream": True}
    with front.http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Session-Id": "anna"}) as response:
        next(response.iter_lines())
    assert settled(front, 2)[1]["turn"] == "cancelled"
    front.llama.piece = lambda number: None
    assert front.memory() == memory
    assert front.told("a", answer, "b")["conversation"] == "goes on"


def test_a_client_that_waits_no_longer_for_a_whole_answer_likewise(front: Front) -> None:
    front.llama.before = lambda path, body: time.sleep(0.3) if body else None
    with pytest.raises(httpx.ReadTimeout):
        front.http.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}]},
            headers={"X-Session-Id": "anna"},
            timeout=0.1,
        )
    assert settled(front, 1)[0]["turn"] == "cancelled" and front.store.shared.records == {}


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/messages"])
def test_a_server_that_dies_in_a_stream_ends_it_with_an_error(front: Front, route: str) -> None:
    front.told("a")
    memory = front.memory()

    def die(number: int) -> None:
        if number == 1:
            raise Died

    front.llama.piece = die
    answer = front.chat("b", path=route, stream=True)
    *_, event = [line for line in answer.text.splitlines() if line.startswith("data:")]
    assert json.loads(event[5:])["error"]["code"] == "server-gone" and "DONE" not in answer.text
    assert front.memory() == memory


def test_who_hangs_up_while_the_server_is_connected_to_is_not_forgotten() -> None:
    """At whatever step of it; nobody answers here."""

    async def cancelled_after(steps: int, url: str) -> bool:
        asking = asyncio.ensure_future(wire.ask("GET", url))
        for _ in range(steps):
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait((asking,), timeout=0.2)
        return asking.cancelled()

    async def all_steps(url: str) -> list[bool]:
        return [await cancelled_after(steps, url) for steps in range(1, 20)]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert all(asyncio.run(all_steps(f"http://127.0.0.1:{listener.getsockname()[1]}/")))


def test_a_server_that_dies_before_its_answer_is_a_502(front: Front) -> None:
    front.told("a")
    memory = front.memory()

    def die(path: str, body: Any) -> None:
        raise Died

    front.llama.before = die
    answer = front.chat("b")
    assert answer.status_code == 502 and answer.json()["error"]["code"] == "server-gone"
    front.llama.before = lambda path, body: None
    assert front.memory() == memory and front.told("b")["conversation"] == "new"


def test_a_server_that_is_not_there_yet_is_a_503(make_front: MakeFront) -> None:
    front = make_front(url="http://127.0.0.1:9")
    answer = front.chat("a")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert front.http.get("/health").status_code == 503


@pytest.mark.parametrize("call", ["lease", "save"])
def test_a_store_that_is_away_is_a_503_and_never_an_empty_memory(front: Front, call: str) -> None:
    front.told("this is anna baker.")
    memory = front.memory()
    front.store.shared.fault = lambda what: down() if what == call else None
    answer = front.chat("who is anna?")
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert len(front.llama.turns()) == (1 if call == "lease" else 2)
    streamed = front.chat("who is anna?", stream=True)
    if call == "lease":
        assert streamed.status_code == 503
    else:
        assert "store-unreachable" in streamed.text and "DONE" not in streamed.text
        assert '"finish_reason":"' not in streamed.text
    front.store.shared.fault = lambda what: None
    assert front.memory() == memory


def test_of_two_gateways_at_one_session_one_waits(make_front: MakeFront) -> None:
    store = MemoryStore()
    one, two = make_front(store, lease=10.0), make_front(store, lease=10.0)
    one.llama.before = lambda path, body: time.sleep(0.4) if body and body.get("messages") else None
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda f=f: answers.append(f.chat("a"))) for f in (one, two, one)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert sorted(answer.json()["rwkv_ms"]["generation"] for answer in answers) == [1, 2, 3]


def test_past_its_lease_the_one_that_waits_is_a_409(make_front: MakeFront) -> None:
    store = MemoryStore()
    front = make_front(store, lease=0.5)
    store.lease("anna", "another gateway", 30)
    began = time.monotonic()
    answer = front.chat("a")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "session-busy"
    assert time.monotonic() - began > 0.4


def test_a_gateway_that_died_keeps_others_away_for_its_lease_alone(make_front: MakeFront) -> None:
    store = MemoryStore()
    store.lease("anna", "a dead one", 0.3)
    assert make_front(store, lease=5.0).told("a")["generation"] == 1


def test_a_lease_is_renewed_while_a_turn_goes_on(make_front: MakeFront) -> None:
    store = MemoryStore()
    one, two = make_front(store, lease=0.6), make_front(store, lease=0.6)
    one.llama.before = lambda path, body: time.sleep(2.5) if body and body.get("user") == "slow" else None
    slow = threading.Thread(target=lambda: one.told("a", user="slow"))
    slow.start()
    time.sleep(0.9)  # past the lease, had it not been renewed
    assert two.chat("b").status_code == 409
    slow.join()
    assert two.told("b")["generation"] == 2


def test_who_lost_its_lease_and_another_saved_is_a_409(make_front: MakeFront) -> None:
    store = MemoryStore()
    front = make_front(store, lease=30.0)
    front.told("a")

    def meanwhile(path: str, body: Any) -> None:
        if body and body.get("messages"):
            record = store.read("anna")
            assert record.state is not None
            memory = Memory(record.state, record.session.tokens, "0" * 64, "1" * 64)
            store.save(record.session, memory)

    front.llama.before = meanwhile
    answer = front.chat("b")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "session-conflict"
    assert "session-conflict" in front.chat("b", stream=True).text


def test_a_session_that_is_removed_in_a_turn_stays_removed(make_front: MakeFront) -> None:
    store = MemoryStore()
    front = make_front(store)
    front.told("a")
    front.llama.before = lambda path, body: store.remove("anna") if body and body.get("messages") else None
    assert front.chat("b").status_code == 409
    assert store.shared.records == {}


def test_a_memory_of_other_files_is_a_409_that_names_both(make_front: MakeFront) -> None:
    store = MemoryStore()
    front = make_front(store)
    front.told("a")
    state = decode_state(front.memory())
    other = State(state.S, state.prev, state.tokens_written, state.chunk, state.semantics, "2" * 64, "3" * 64)
    session = new_session("other", None)
    store.save(session, Memory(encode_state(other), 1, "2" * 64, "3" * 64), new=True)
    answer = front.chat("a", name="other")
    assert answer.status_code == 409 and answer.json()["error"]["code"] == "state-identity"
    assert all(hash * 64 in answer.text for hash in "0123")
    assert front.http.put("/v1/sessions/new/memory", content=encode_state(other)).status_code == 409


def test_a_server_that_answers_on_another_memory_is_not_believed(front: Front) -> None:
    front.told("a")
    memory = front.memory()
    front.llama.model.fault = "wrong report"
    assert front.chat("b").status_code == 502
    front.llama.model.fault = "nan"
    assert any(front.chat("b").status_code == 502 for _ in range(6))
    assert len(front.store.shared.records) == 1 and memory


def test_an_end_in_order_waits_for_what_is_being_answered(llama: FakeLlama) -> None:
    from llamamem.gateway import Gateway, Running, Settings, Upstream, listen

    store, answers, asked = MemoryStore(), list[httpx.Response](), threading.Event()

    def before(path: str, body: Any) -> None:
        if body and body.get("messages"):
            asked.set()
            time.sleep(0.5)

    llama.before = before
    with Running(Gateway(store, Upstream(llama.url), Settings()), listen("127.0.0.1", 0), grace=5) as running:
        url = f"http://127.0.0.1:{running.port}/session/anna/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "a"}]}
        asks = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, trust_env=False)))
        asks.start()
        assert asked.wait(10)
    asks.join()
    assert answers[0].status_code == 200 and store.read("anna").session.generation == 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
