"""What strangers try: other people's keys and names, pages of other sites, endless requests, paths and headers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fronts import Front, MakeFront
from json_docs import faults, sections
from memory_store import MemoryStore

from llamamem.gateway import connection
from llamamem.gateway.access import Access, is_loopback, new_key
from llamamem.gateway.errors import Refusal

SECRET = "this is anna baker, and nobody else knows it."


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def key(store: MemoryStore, **options: Any) -> str:
    told, kept = new_key(options.pop("namespace", None), **options)
    store.add_key(kept)
    return told


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# -- keys


def test_two_keys_never_see_each_others_sessions(make_front: MakeFront, store: MemoryStore) -> None:
    anna, bob = key(store), key(store)
    front = make_front(store)
    first = front.told(SECRET, headers=bearer(anna))
    assert first["origin"] is None
    memory = front.http.get("/v1/sessions/anna/memory", headers=bearer(anna)).content
    assert front.told("who is anna?", headers=bearer(bob))["origin"] is None  # the same name, another session
    assert front.told("who is anna?", headers=bearer(anna))["origin"] is not None
    front.http.delete("/v1/sessions/anna", headers=bearer(bob))
    for method, path, body in [
        ("GET", "/v1/sessions/anna", None),
        ("GET", "/v1/sessions/anna/memory", None),
        ("DELETE", "/v1/sessions/anna", None),
        ("POST", "/v1/sessions/anna/undo", None),
        ("POST", "/v1/sessions/anna/decay", {"factor": 0}),
        ("POST", "/v1/sessions/anna/fork", {"to": "mine"}),
        ("POST", "/v1/sessions/mine/blend", {"with": "anna", "alpha": 1}),
    ]:
        assert front.http.request(method, path, json=body, headers=bearer(bob)).status_code == 404, path
    assert front.http.get("/v1/sessions", headers=bearer(bob)).json()["data"] == []
    assert front.http.get("/v1/sessions/anna", headers=bearer(anna)).json()["generation"] == 2 and memory


def test_keys_of_one_namespace_share_it(make_front: MakeFront, store: MemoryStore) -> None:
    one, two, plain = key(store, namespace="team"), key(store, namespace="team"), key(store, namespace="")
    front = make_front(store)
    front.told("a", headers=bearer(one))
    assert front.told("b", headers=bearer(two))["generation"] == 2
    assert front.told("b", headers={"x-api-key": one})["generation"] == 3  # as Anthropic's clients send it
    for others in ({"authorization": f"bearer {one}"}, {"authorization": "", "x-api-key": one}):
        assert front.http.get("/v1/sessions/anna", headers=others).json()["generation"] == 3
    assert front.told("b", headers=bearer(plain))["generation"] == 1


def wrong_keys(right: str) -> list[str]:
    head, id, secret = right.split("_", 2)
    swapped = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    return [
        "",
        "x",
        right[:-1],
        right + "x",
        f"{head}_{id}_{swapped}",
        f"{head}_{'0' * 16}_{secret}",
        right.upper(),
        "é",
    ]


def test_without_a_key_that_is_known_nothing_is_answered(make_front: MakeFront, store: MemoryStore) -> None:
    right = key(store)
    front = make_front(store)
    asked = len(front.llama.asked)
    paths = [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/props"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/slots"),
        ("GET", "/v1/sessions"),
        ("GET", "/v1/sessions/anna/memory"),
        ("POST", "/session/anna/v1/messages"),
        ("GET", "/none"),
    ]
    for wrong in wrong_keys(right):
        for method, path in paths:
            headers = [(b"authorization", f"Bearer {wrong}".strip().encode())]
            answer = front.http.request(method, path, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", (path, wrong)
    assert len(front.llama.asked) == asked
    assert front.http.get("/health").status_code == 200


def test_a_key_that_is_taken_back_opens_nothing_more(make_front: MakeFront, store: MemoryStore) -> None:
    one, other = key(store), key(store)
    front = make_front(store)
    assert front.chat("a", headers=bearer(one)).status_code == 200
    store.remove_key(one.split("_")[1])
    until = time.monotonic() + 10
    while front.chat("a", headers=bearer(one)).status_code != 401:
        assert time.monotonic() < until
        time.sleep(0.1)
    store.remove_key(other.split("_")[1])  # the last one: it is not open to all then
    time.sleep(1.0)
    assert front.chat("a").status_code == 401
    added = key(store)
    time.sleep(1.0)
    assert front.chat("a", headers=bearer(added)).status_code == 200


def test_keys_are_compared_in_constant_time_whether_there_is_one_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[str, str]] = []
    plain = hmac.compare_digest
    monkeypatch.setattr(
        "llamamem.gateway.access.hmac.compare_digest", lambda a, b: compared.append((a, b)) or plain(a, b)
    )
    right, kept = new_key()
    access = Access([kept])
    for given in wrong_keys(right):
        with pytest.raises(Refusal):
            access.caller({"authorization": [f"Bearer {given}".encode()]})
    assert access.caller({"authorization": [f"Bearer {right}".encode()]}).key == kept.id
    assert len(compared) == len(wrong_keys(right)) + 1 and {len(b) for _, b in compared} == {64}
    assert right.split("_", 2)[2] not in kept.model_dump_json()


def test_what_is_the_servers_own_is_for_operators(make_front: MakeFront, store: MemoryStore) -> None:
    plain, operator = key(store), key(store, operator=True)
    front = make_front(store)
    asked = [
        ("GET", "/slots"),
        ("POST", "/slots/0?action=memory-save"),
        ("POST", "/props"),
        ("POST", "/lora-adapters"),
        ("GET", "/v1/stream?conv_id=1"),
        ("POST", "/models/load"),
        ("POST", "/v1/chat/completions/control"),
        ("GET", "/anything"),
    ]
    for method, path in asked:
        assert front.http.request(method, path, headers=bearer(plain)).status_code == 403, path
        assert front.http.request(method, path, headers=bearer(operator), json={}).status_code != 403, path
    assert front.chat("a", headers=bearer(plain), id_slot=0).status_code == 403
    assert front.chat("a", name=None, headers=bearer(plain), id_slot=0).status_code == 403
    assert front.chat("a", headers=bearer(operator), id_slot=0).status_code == 200
    assert front.http.get("/v1/models", headers=bearer(plain)).status_code == 200


def test_the_server_sees_neither_keys_nor_names(make_front: MakeFront, store: MemoryStore) -> None:
    told = key(store)
    front = make_front(store)
    front.chat(
        "a", headers={**bearer(told), "X-Conversation-Id": "secret-1", "Cookie": "secret-2", "X-Other": "secret-3"}
    )
    front.http.get(
        "/session/secret-4/v1/models?memory=off", headers={**bearer(told), "X-OpenWebUI-Chat-Id": "secret-5"}
    )
    seen = json.dumps(front.llama.asked)
    assert told not in seen and "secret" not in seen and "anna" not in seen


def test_neither_keys_nor_texts_nor_names_are_logged(
    make_front: MakeFront, store: MemoryStore, capfd: pytest.CaptureFixture[str]
) -> None:
    told = key(store, label="label")
    front = make_front(store)
    sent = [SECRET, "zebra-session", "zebra-chat", told, told.split("_", 2)[2]]
    front.chat(SECRET, name="zebra-session", headers={**bearer(told), "X-Conversation-Id": "zebra-chat"})
    front.chat(SECRET, name="zebra-session", headers=bearer(told), stream=True)
    front.chat(SECRET, name="zebra/session", headers=bearer(told))
    front.chat(SECRET, name="zebra-session", headers=bearer(told[:-1]))
    front.http.post("/v1/chat/completions", content=SECRET.encode(), headers=bearer(told))
    front.http.post("/session/zebra-session/v1/chat/completions", json={"messages": SECRET}, headers=bearer(told))
    front.http.get("/v1/sessions/zebra-session", headers=bearer(told))
    front.http.get(f"/zebra-session/{SECRET.replace(' ', '-')}", headers=bearer(told))
    front.http.get("/v1/sessions/anna/zebra-session", headers=bearer(told))
    front.http.put("/v1/sessions/zebra-session/memory", content=SECRET.encode(), headers=bearer(told))
    front.http.post("/v1/sessions/zebra-session/learn", json={"texts": [SECRET]}, headers=bearer(told))
    front.llama.before = lambda *_: 1 / 0
    front.chat(SECRET, name="zebra-session", headers=bearer(told))
    store.shared.fault = lambda _: (_ for _ in ()).throw(ValueError(SECRET))
    assert front.chat(SECRET, name="zebra-session", headers=bearer(told)).status_code == 500
    out, err = capfd.readouterr()
    log = front.out.getvalue()
    assert len(front.lines()) == 13
    out += front.http.get("/metrics", headers=bearer(told)).text
    for secret in sent:
        assert secret not in log + out and (secret not in err or ("Error" in err and secret == SECRET and False))
    assert {"time", "event", "method", "status", "ms", "route"} <= set(front.lines()[0])


# -- pages


def test_pages_of_other_sites_may_not_ask(front: Front) -> None:
    for origin in ("https://evil.example", "null", "http://[", "http://127.0.0.1:1", "http://localhost.evil.example"):
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/sessions"),
            ("DELETE", "/v1/sessions/anna"),
        ):
            answer = front.http.request(method, path, headers={"Origin": origin}, content=b"{}")
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin"
            assert "access-control-allow-origin" not in answer.headers
        preflight = front.http.options("/v1/chat/completions", headers={"Origin": origin})
        assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers
    own = {"Origin": str(front.http.base_url).rstrip("/")}
    assert front.http.get("/v1/sessions", headers=own).status_code == 200


def test_nobody_is_let_in_by_what_the_server_says(front: Front) -> None:
    assert "access-control-allow-origin" not in front.http.get("/v1/models").headers  # the server sent one


def test_pages_that_are_named_may_ask(make_front: MakeFront) -> None:
    front = make_front(origins=("https://chat.example",))
    page = {"Origin": "https://chat.example"}
    preflight = front.http.options("/v1/chat/completions", headers=page)
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == "https://chat.example"
    assert front.chat("a", headers=page).headers["access-control-allow-origin"] == "https://chat.example"
    assert front.chat("a", headers={"Origin": "https://chat.example.evil"}).status_code == 403


def test_without_keys_a_name_of_another_site_leads_nowhere(front: Front) -> None:
    """A page may have its own name point to this machine; its requests have that name as their host."""
    assert front.http.get("/v1/sessions", headers={"Host": "evil.example"}).status_code == 403
    for host in ("localhost", "127.0.0.1:99", "[::1]:1", "LOCALHOST:8080"):
        assert front.http.get("/v1/sessions", headers={"Host": host}).status_code == 200


def test_addresses_of_this_machine() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.1.2.3", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", "")))


# -- sizes and times


def talk(front: Front, *pieces: bytes, wait: float = 5.0) -> bytes:
    """What is answered to these bytes, until the connection is closed."""
    url = front.http.base_url
    with socket.create_connection((url.host, url.port), timeout=wait) as client:
        for piece in pieces:
            client.sendall(piece)
        received = b""
        try:
            while data := client.recv(1 << 16):
                received += data
        except OSError:
            pass
        return received


def test_a_body_that_is_too_large_is_refused_unread(make_front: MakeFront) -> None:
    front = make_front(max_body=1000)
    assert front.chat("x" * 1000).status_code == 413
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    told = talk(front, head + b"Content-Length: 99999999999\r\n\r\n{")
    assert b" 413 " in told
    chunks = b"".join(b"400\r\n" + b"x" * 1024 + b"\r\n" for _ in range(4))
    assert b" 413 " in talk(front, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    assert front.http.put("/v1/sessions/anna/memory", content=b"x" * 1001).status_code == 413


def test_whoever_is_slow_is_hung_up_on(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.4)

    def closed_after(send: Callable[[socket.socket], Any]) -> float:
        began = time.monotonic()
        with socket.create_connection((front.http.base_url.host, front.http.base_url.port), timeout=10) as client:
            while time.monotonic() < began + 8:
                try:
                    send(client)
                    client.settimeout(0.05)
                    if not client.recv(1):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
        return time.monotonic() - began

    first = iter([b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"])
    assert closed_after(lambda client: None) < 3  # nothing at all
    assert closed_after(lambda client: client.sendall(b"G")) < 3
    started = iter([b"GET /health HTTP/1.1\r\n"])
    assert closed_after(lambda client: client.sendall(next(started, b"a: b\r\n"))) < 3
    assert closed_after(lambda client: client.sendall(next(first, b"x"))) < 3
    assert front.chat("a").status_code == 200


def test_a_client_that_takes_nothing_is_hung_up_on(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    from test_turns import _long_reply

    front.llama.model.generate = lambda route, body: _long_reply()  # type: ignore[method-assign]
    body = b'{"messages":[{"role":"user","content":"a"}],"stream":true,"user":"anna"}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((front.http.base_url.host, front.http.base_url.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(head + body)
        until = time.monotonic() + 10
        while not [line for line in front.lines() if line.get("turn") == "cancelled"]:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert front.store.shared.records == {} and front.store.shared.leases == {}


def test_a_head_without_an_end_is_cut_off(front: Front) -> None:
    assert talk(front, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a: " + b"x" * 200_000) == b""
    many = b"".join(b"h%d: x\r\n" % i for i in range(20_000))
    assert talk(front, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n") == b""
    body = b'{"messages":[{"role":"user","content":"' + b"x" * 300_000 + b'"}]}'  # a body may be long
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert talk(front, head + body).startswith(b"HTTP/1.1 ")


# -- paths and headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../slots",
        "/v1/%2e%2e/slots",
        "/v1/models/..%2f..%2fslots",
        "//slots",
        "/v1//models",
        "/%2fslots",
        "/slots%00",
        "/v1/models%0d%0aX-Injected:%201",
        "/v1/models%3faction=memory-save",
        "/v1/models%23",
        "/v1\\models",
        "/v1/models;x",
        "/session/anna/../../slots",
        "/session/../slots",
        "/session/%2e%2e/v1/models",
        "/session/a%2fb/v1/models",
        "/session/%ff/v1/models",
        "/session/" + "x" * 300 + "/v1/models",
        "/session//v1/models",
        "/v1/sessions/../keys",
        "/v1/sessions/%2e%2e",
        "/v1/sessions/a%2fb",
        "/v1/sessions/a%00b",
        "/v1/sessions/" + "x" * 300,
    ],
)
def test_paths_that_two_programs_could_read_in_two_ways(refusing: Front, path: str) -> None:
    asked = len(refusing.llama.asked)
    head = b"GET " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    told = talk(refusing, head)
    assert told.startswith(b"HTTP/1.1 400"), told[:200]
    assert len(refusing.llama.asked) == asked


def test_percents_are_the_servers_only_as_they_are_read_here(make_front: MakeFront, store: MemoryStore) -> None:
    plain = key(store)
    front = make_front(store)
    assert front.http.get("/%73lots", headers=bearer(plain)).status_code == 403
    assert front.http.get("/v1/m%6fdels", headers=bearer(plain)).json()["path"] == "/v1/models"


@pytest.mark.parametrize(
    "line",
    [
        b"X-Session-Id: a\r\nX-Session-Id: b",
        b"X-Session-Id: a\r\n\tb",
        b"X-Session-Id : a",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"X-Session-Id: a\x00b",
        b"X-Session-Id: \x80",
    ],
)
def test_headers_that_two_programs_could_read_in_two_ways(refusing: Front, line: bytes) -> None:
    asked = len(refusing.llama.asked)
    body = b'{"messages":[{"role":"user","content":"a"}]}'
    length = b"" if b"Content-Length" in line else b"Content-Length: %d\r\n" % len(body)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + length + line
    told = talk(refusing, head + b"\r\n\r\n" + body)
    assert told.startswith(b"HTTP/1.1 400") or told == b"", told[:200]
    assert len(refusing.llama.asked) == asked and refusing.store.shared.records == {}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"1", b'{"a":' * 100_000, b"\xff", b'{"messages": NaN'])
def test_bodies_that_are_no_object(refusing: Front, body: bytes) -> None:
    answer = refusing.http.post("/v1/chat/completions", content=body, headers={"X-Session-Id": "anna"})
    assert answer.status_code == 400 and refusing.store.shared.records == {}


@pytest.mark.parametrize(
    "body", [b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "b']
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion", "/tokenize", "/v1/embeddings"])
def test_what_is_no_json_the_server_cannot_quote_in_its_log(refusing: Front, path: str, body: bytes) -> None:
    asked = len(refusing.llama.asked)
    for headers in ({}, {"X-Session-Id": "anna"}):
        assert refusing.http.post(path, content=body, headers=headers).status_code == 400
    assert len(refusing.llama.asked) == asked


def test_headers_that_the_server_does_not_take(front: Front) -> None:
    assert front.chat("a", headers={"Accept": "a,\tb"}).status_code == 200
    assert front.llama.asked[-1][2]["accept"] == "a, b"


def test_a_head_alone_is_no_server_that_died(front: Front) -> None:
    assert front.http.head("/v1/models").status_code == 200
    assert front.http.get("/v1/models").status_code == 200  # the log has the line of the one before by now
    assert "error" not in front.lines()[0]


# -- the command line


def test_the_world_is_not_let_in_without_a_key(llamamem: Any, tmp_path: Path) -> None:
    given = ("serve", "--demo", "--sessions", str(tmp_path / "s"), "--port", "0", "--dry-run")
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        result = llamamem(*given, "--host", host)
        assert result.status == 2 and "llamamem key add" in result.err and host in result.err
    assert llamamem("key", "add", "--store", str(tmp_path / "s")).status == 0
    assert "key add" not in llamamem(*given, "--host", "0.0.0.0").err  # all else is as without a gateway


def test_keys_are_kept_as_hashes_in_files_of_their_owner(llamamem: Any, tmp_path: Path) -> None:
    store = tmp_path / "s"
    told = llamamem("key", "add", "--store", str(store), "--label", "laptop").out.strip()
    assert told.startswith("llamamem_")
    id, secret = told.split("_", 2)[1:]
    listed = llamamem("key", "list", "--store", str(store)).out
    assert id in listed and "laptop" in listed and secret not in listed
    for path in [store, *store.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0 or path.suffix == ".lock", path  # which is empty
        assert path.is_dir() or secret.encode() not in path.read_bytes()
    assert llamamem("key", "rm", id, "--store", str(store)).status == 0
    assert llamamem("key", "rm", id, "--store", str(store)).status == 2
    assert id not in llamamem("key", "list", "--store", str(store)).out


def test_keys_as_json_are_as_documented(llamamem: Any, tmp_path: Path) -> None:
    store = str(tmp_path / "s")
    added = json.loads(llamamem("key", "add", "--store", store, "--operator", "--json").out)
    listed = json.loads(llamamem("key", "list", "--store", store, "--json").out)
    documented = sections()
    assert faults([added], documented["llamamem key add"]) == []
    assert faults([listed], documented["llamamem key list"]) == []
