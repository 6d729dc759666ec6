"""Named sessions in the slots of a real server."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_runs import Running, Serve, random_prompt

from llamamem.errors import LlamamemError
from llamamem.sessions import DirectoryStore, Memory, Sessions, SqliteStore
from llamamem.sessions.resumed import release

N_SESSIONS, N_TURNS = 64, 2


def play(sessions: Sessions, session: int, turn: int) -> list[int]:
    name = f"session {session}"
    if turn == 0:
        sessions.start(name, "prefix" if session % 2 else None)
    prompt = random_prompt(1000 * session + turn, 12)
    answer = sessions.turn(name, prompt, n_predict=6, ignore_eos=True, return_tokens=True)
    tokens: list[int] = answer["tokens"]
    return tokens


def begin(running: Running, place: Path) -> Sessions:
    sessions = Sessions(running.client, DirectoryStore(place))
    sessions.start("prefix")
    sessions.turn("prefix", random_prompt(7, 40), n_predict=4)
    return sessions


def test_64_sessions_on_two_servers_get_the_answers_that_they_get_alone(serve: Serve, tmp_path: Path) -> None:
    """No shared directory, no slot of one's own: the memory goes with each request."""
    together = begin(serve("batched", parallel=4), tmp_path / "together")
    other = Sessions(serve("batched", parallel=4).client, together.store)
    said: dict[tuple[int, int], list[int]] = {}
    for turn in range(N_TURNS):
        for i in range(N_SESSIONS):
            session = (i * 37 + turn * 11) % N_SESSIONS
            said[session, turn] = play((together, other)[(i + turn) % 2], session, turn)
    assert len({tuple(tokens) for tokens in said.values()}) > N_SESSIONS, "they are not all the same"

    alone = begin(serve("batched", parallel=4), tmp_path / "alone")
    for session in range(N_SESSIONS):
        for turn in range(N_TURNS):
            assert play(alone, session, turn) == said[session, turn], (session, turn)
    assert list(tmp_path.glob("*.bin")) == list(tmp_path.glob("llamamem-*")) == []


def test_turns_at_the_same_time_leave_each_session_its_own_memory(serve: Serve, tmp_path: Path) -> None:
    """Tokens may differ by rounding when sequences share a batch; what was written to whose memory may not."""
    sessions = begin(serve("batched", parallel=4), tmp_path / "store")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: [play(sessions, i, turn) for turn in range(2)], range(16)))
    for i in range(16):
        session, _ = sessions.store.load(f"session {i}")
        assert (session.generation, session.tokens) == (2, 2 * (12 + 5) + (i % 2) * (40 + 3))


@pytest.mark.parametrize("profile", ["serial", "fused"])
def test_a_session_goes_on_in_another_server(serve: Serve, tmp_path: Path, profile: str) -> None:
    first, second = serve(profile), serve(profile)
    store = SqliteStore(tmp_path / "sessions.db")
    here, there = Sessions(first.client, store), Sessions(second.client, store)
    here.start("moved")
    here.turn("moved", random_prompt(1, 30), n_predict=8, ignore_eos=True)
    here.start("stayed", "moved")
    options = {"n_predict": 16, "ignore_eos": True, "return_tokens": True}
    assert (
        there.turn("moved", random_prompt(2, 10), **options)["tokens"]
        == here.turn("stayed", random_prompt(2, 10), **options)["tokens"]
    )
    assert store.load("moved")[1] == store.load("stayed")[1]


def test_a_damaged_session_is_refused_by_the_server_with_its_reason(serve: Serve, tmp_path: Path) -> None:
    sessions = Sessions(serve("fused").client, DirectoryStore(tmp_path / "store"))
    sessions.start("anna")
    sessions.turn("anna", random_prompt(3, 20), n_predict=4)
    session, state = sessions.store.load("anna")
    assert state is not None
    flipped = bytearray(state)
    flipped[500] ^= 1
    digests = (str(session.sidecar_sha256), str(session.base_sha256))
    damaged = sessions.store.save(session, Memory(bytes(flipped), session.tokens, *digests))
    for use in (lambda: sessions.resume("anna", 0), lambda: sessions.turn("anna", "hello")):
        with pytest.raises(LlamamemError, match=r"answered 400: .*\[state-checksum\]"):
            use()
    assert sessions.store.load("anna")[0].generation == damaged.generation


OPTIONS = {"n_predict": 4, "ignore_eos": True}


def test_only_what_goes_on_is_saved_from_a_slot(serve: Serve, tmp_path: Path) -> None:
    running = serve("batched", parallel=2)
    client, sessions = running.client, Sessions(running.client, DirectoryStore(tmp_path / "store"))
    sessions.start("solo")
    sessions.resume("solo", 0)
    first = random_prompt(1, 20)
    client.completion(first, id_slot=0, **OPTIONS)
    saved = sessions.save("solo", 0)
    assert saved.tokens == 20 + 3
    client.completion(random_prompt(2, 60), **OPTIONS)  # somebody who names no slot is in no save
    on = client.completion([*first, *random_prompt(3, 10)[1:]], id_slot=0, **OPTIONS)
    assert on["timings"]["prompt_n"] < 20 + 9
    for disturb in (
        lambda: client.completion(random_prompt(4, 90), id_slot=0, **OPTIONS),  # a new chat
        lambda: client.erase_slot(0),
        lambda: client.reset_memory(0),
    ):
        disturb()
        client.completion(random_prompt(4, 90), id_slot=0, **OPTIONS)
        with pytest.raises(LlamamemError, match="nothing was saved") as told:
            sessions.save("solo", 0)
        assert told.value.reason == "state-continues"
        assert sessions.store.load("solo")[0].generation == saved.generation
        sessions.resume("solo", 0)
    assert sessions.save("solo", 0).tokens == saved.tokens


@pytest.mark.parametrize("begun", [True, False], ids=["with a memory", "with none yet"])
def test_a_stranger_on_a_restarted_server_is_not_saved(serve: Serve, tmp_path: Path, begun: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = DirectoryStore(tmp_path / "store")
    first = serve("fused", port=port)
    sessions = Sessions(first.client, store)
    sessions.start("anna")
    if begun:
        sessions.turn("anna", random_prompt(1, 20), **OPTIONS)
    sessions.resume("anna", 0)
    first.server.stop()
    second = serve("fused", port=port)
    second.client.completion(random_prompt(2, 90), id_slot=0, **OPTIONS)
    before = store.load("anna")[1]
    with pytest.raises(LlamamemError, match="nothing was saved"):
        Sessions(second.client, store).save("anna", 0)
    assert store.load("anna")[1] == before


def test_rm_leaves_no_copy_in_the_slot(serve: Serve, tmp_path: Path) -> None:
    running = serve("batched", parallel=2)
    sessions = Sessions(running.client, DirectoryStore(tmp_path / "store"))
    sessions.start("anna")
    sessions.turn("anna", random_prompt(1, 20), **OPTIONS)
    sessions.resume("anna", 1)
    running.client.completion(random_prompt(2, 20), id_slot=1, **OPTIONS)
    sessions.store.remove("anna")
    assert release(sessions.store.location, "anna") == []
    state = running.client.slots()[1]["rwkv_ms"]
    assert (state["tokens_written"], state["given"], state["origin"]) == (0, False, None)
