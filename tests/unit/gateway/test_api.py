"""`/v1/sessions`: what people and programs do with memories."""

from __future__ import annotations

import base64
import json
import time
from typing import Any
from urllib.parse import quote

import pytest
from entitled.fresh import Reference
from entitled.memory import EMPTY, PLAIN, Memory
from fake_llama import FakeModel, word_ids
from fronts import Front, MakeFront
from memory_store import MemoryStore

from llamamem.formats.state import decode_state
from llamamem.gateway.openapi import description
from llamamem.gateway.routes import GENERATES


def session(front: Front, name: str = "anna") -> dict[str, Any]:
    answer = front.http.get(f"/v1/sessions/{quote(name)}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def read(origin: bytes, *texts: tuple[int, ...]) -> bytes:
    """The memory after these texts, one after another, each on that of the one before."""
    reference, memory = Reference(FakeModel()), Memory(origin) if origin else EMPTY
    for ids in texts:
        memory = reference.memory(memory, PLAIN, ids)
    return memory.data


def test_a_session_is_shown_without_what_was_said(front: Front) -> None:
    front.told("this is anna baker.", headers={"X-Conversation-Id": "c1"})
    found = session(front)
    assert (found["name"], found["generation"], found["before"]) == ("anna", 1, {**found["before"], "generation": 0})
    assert found["conversation"] == {"id": "c1", "exchanges": 1} and found["tokens"] > 0
    assert not {"asked", "first", "exchanges"} & set(found)


def test_sessions_are_listed_in_pages(front: Front) -> None:
    names = [f"s{i:02}" for i in range(7)]
    for name in names:
        front.told("a", name=name)
    seen, after = [], ""
    while True:
        page = front.http.get(f"/v1/sessions?limit=3{after}").json()
        seen += [one["name"] for one in page["data"]]
        if not page["has_more"]:
            break
        after = f"&after={quote(page['after'])}"
    assert seen == names
    for limit in ("0", "1001", "x", "-1", "1" * 5000, "%C2%B2"):
        assert front.http.get(f"/v1/sessions?limit={limit}").status_code == 400


def test_a_memory_is_exported_and_imported(front: Front, make_front: MakeFront) -> None:
    front.told("this is anna baker.")
    memory = front.memory()
    elsewhere = make_front()
    assert elsewhere.http.put("/v1/sessions/anna/memory", content=memory).status_code == 201
    assert elsewhere.memory() == memory
    assert elsewhere.told("who is anna?")["text"] == front.told("who is anna?")["text"]
    assert elsewhere.http.put("/v1/sessions/anna/memory", content=memory).status_code == 200
    assert session(elsewhere)["conversation"] is None  # what is imported has nothing that goes on


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\0" * 500])
def test_what_is_no_memory_is_not_imported(front: Front, data: bytes) -> None:
    front.told("a")
    memory = front.memory()
    answer = front.http.put("/v1/sessions/anna/memory", content=data)
    assert answer.status_code == 400 and str(answer.json()["error"]["code"]).startswith("state-")
    damaged = memory[:-1] + bytes([memory[-1] ^ 1])
    assert front.http.put("/v1/sessions/anna/memory", content=damaged).status_code == 400
    assert front.memory() == memory


def test_a_fork_goes_its_own_way(front: Front) -> None:
    front.told("this is anna baker.")
    answer = front.http.post("/v1/sessions/anna/fork", json={"to": "bob"})
    assert answer.status_code == 201 and answer.json()["parent"] == "anna" and answer.json()["conversation"] is None
    assert front.memory("bob") == front.memory("anna")
    before = front.memory("anna")
    front.told("b", name="bob")
    assert front.memory("anna") == before != front.memory("bob")
    assert front.http.post("/v1/sessions/anna/fork", json={"to": "bob"}).status_code == 409
    assert front.http.post("/v1/sessions/none/fork", json={"to": "x"}).status_code == 404
    assert front.http.post("/v1/sessions/anna/fork", json={"to": "a/b"}).status_code == 400


def test_decay_and_blend_change_the_memory_and_the_conversation_goes_on(front: Front) -> None:
    a = front.told("a")["text"]
    whole = decode_state(front.memory())
    front.told("b", name="bob")
    assert front.http.post("/v1/sessions/anna/decay", json={"factor": 0.5}).status_code == 200
    half = decode_state(front.memory())
    assert (half.S == whole.S * 0.5).all()
    bob = decode_state(front.memory("bob"))
    assert front.http.post("/v1/sessions/anna/blend", json={"with": "bob", "alpha": 0.25}).status_code == 200
    mixed = decode_state(front.memory())
    assert abs(mixed.S - (0.75 * half.S + 0.25 * bob.S)).max() < 1e-6
    assert front.told("a", a, "c")["conversation"] == "goes on"


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("decay", {"factor": 2}),
        ("decay", {"factor": "x"}),
        ("decay", {"factor": True}),
        ("decay", {}),
        ("blend", {"with": "bob"}),
        ("blend", {"with": "none", "alpha": 0.5}),
        ("learn", {}),
        ("learn", {"texts": []}),
        ("learn", {"texts": ["a"], "messages": []}),
        ("learn", {"texts": [1]}),
        ("learn", {"text": "a"}),
        ("forget", {}),
    ],
)
def test_what_cannot_be_done_changes_nothing(front: Front, action: str, body: dict[str, Any]) -> None:
    front.told("a")
    assert front.http.post(f"/v1/sessions/anna/{action}", json=body).status_code in (400, 404)
    assert session(front)["generation"] == 1


def test_undo_brings_back_what_was_before_and_again(front: Front) -> None:
    a = front.told("a")["text"]
    first = front.memory()
    front.told("a", a, "b")
    second = front.memory()
    assert front.http.post("/v1/sessions/anna/undo").json()["generation"] == 3
    assert front.memory() == first
    assert front.told("a", a, "c")["conversation"] == "goes on"  # the conversation of then is open
    front.http.post("/v1/sessions/anna/undo")
    front.http.post("/v1/sessions/anna/undo")
    assert session(front)["generation"] == 6 and second
    assert front.http.post("/v1/sessions/none/undo").status_code == 404


def test_texts_are_learnt_once_and_whatever_goes_on(front: Front) -> None:
    a = front.told("a")["text"]
    memory = front.memory()
    answer = front.http.post("/v1/sessions/anna/learn", json={"texts": ["this is bob carl.", "ok fine"]})
    assert answer.status_code == 200, answer.text
    texts = [(2, *word_ids(text)) for text in ("this is bob carl.", "ok fine")]
    assert front.memory() == read(memory, *texts)
    told = front.told("a", a, "b")
    assert told["conversation"] == "goes on"
    assert told["origin"] == Memory(read(b"", *texts)).origin  # on what the conversation began on, and learnt since
    learnt = front.http.post("/v1/sessions/new/learn", json={"texts": ["ok"]}).json()
    assert learnt["generation"] == 1 and front.memory("new") == read(b"", (2, *word_ids("ok")))


def test_messages_are_learnt_as_the_template_has_them(front: Front) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    front.http.post("/v1/sessions/anna/learn", json={"messages": messages})
    text = "<bos><|turn>user\na<turn|>\n<|turn>model\nb<turn|>\n"
    assert front.memory() == read(b"", (2, *word_ids(text)))


def test_a_long_text_is_read_in_pieces_and_says_how_far_it_is(front: Front) -> None:
    body = {"texts": ["ok fine boat " * 60], "stream": True}
    with front.http.stream("POST", "/v1/sessions/anna/learn", json=body) as response:
        events = [line[5:].strip() for line in response.iter_lines() if line.startswith("data:")]
    progress = [json.loads(event) for event in events[:-2]]
    assert [one["tokens"] for one in progress] == [56, 112, 168, 181] and {one["of"] for one in progress} == {181}
    assert json.loads(events[-2])["name"] == "anna" and events[-1] == "[DONE]"
    ids = (2, *word_ids(body["texts"][0]))  # type: ignore[index]
    assert front.memory() == read(b"", *(ids[at : at + 56] for at in range(0, len(ids), 56)))


def test_what_is_learnt_halfway_is_not_saved(front: Front) -> None:
    from fake_llama import Died

    front.told("a")
    memory, asked = front.memory(), [0]

    def die(path: str, body: Any) -> None:
        asked[0] += path == "/completion"
        if asked[0] == 3:
            raise Died

    front.llama.before = die
    assert front.http.post("/v1/sessions/anna/learn", json={"texts": ["ok fine boat " * 60]}).status_code == 502
    assert front.memory() == memory


def test_delete_leaves_nothing_and_the_server_forgets(make_front: MakeFront) -> None:
    store = MemoryStore()
    front, other = make_front(store), make_front(store)
    front.told("this is anna baker.")
    front.told("who is anna?")
    assert front.http.delete("/v1/sessions/anna").json() == {"object": "session", "name": "anna", "deleted": True}
    assert store.shared.records == {} and front.http.get("/v1/sessions/anna").status_code == 404
    forgets = [path for method, path, _, _ in front.llama.asked if "action=forget" in path]
    assert {path.split("?")[0] for path in forgets} == {f"/slots/{i}" for i in range(4)}
    assert front.llama.model.cache == [] and not any(slot.live.ids for slot in front.llama.model.slots)
    until = time.monotonic() + 10  # both gateways look now and then, and have the one server forget
    while len([path for _, path, _, _ in other.llama.asked if "action=forget" in path]) < 3 * 4:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert front.http.delete("/v1/sessions/anna").status_code == 404
    assert front.told("who is anna?")["origin"] is None


def test_other_methods_are_refused(front: Front) -> None:
    assert front.http.post("/v1/sessions/anna").status_code == 405
    assert front.http.delete("/v1/sessions").status_code == 405
    assert front.http.get("/v1/sessions/anna/undo").status_code == 405
    assert front.http.get("/v1/sessions/anna/memory/more").status_code == 400


def test_the_description_has_every_call(front: Front) -> None:
    told = front.http.get("/openapi.json").json()
    assert told == json.loads(json.dumps(description())) and told["openapi"].startswith("3.1")
    assert set(GENERATES) < set(told["paths"])
    front.told("a")
    for path, calls in told["paths"].items():
        if not path.startswith("/v1/sessions"):
            continue
        for method in {"get", "put", "post", "delete", "patch"}:
            status = front.http.request(method, path.replace("{name}", "zz"), content=b"{}").status_code
            assert (status == 405) == (method not in calls), (method, path, status)


def test_metrics_count(front: Front) -> None:
    a = front.told("a")["text"]
    front.told("a", a, "b")
    front.http.post("/v1/sessions/anna/undo")
    text = front.http.get("/metrics").text
    for line in (
        'llamamem_gateway_turns_total{outcome="done"} 2.0',
        'llamamem_gateway_conversations_total{kind="new"} 1.0',
        'llamamem_gateway_conversations_total{kind="goes on"} 1.0',
        'llamamem_gateway_sessions_total{what="undone"} 1.0',
        'llamamem_gateway_requests_total{route="/v1/chat/completions",status="200"} 2.0',
    ):
        assert line in text, text
    assert "anna" not in text and base64.b64encode(b"anna").decode() not in text
