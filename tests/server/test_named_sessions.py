"""Named sessions in the slots of a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_runs import Running, Serve, random_prompt

from llamamem.errors import LlamamemError
from llamamem.sessions import DirectoryStore, Memory, Sessions, SqliteStore

N_SESSIONS, N_TURNS = 64, 2


def play(sessions: Sessions, session: int, turn: int, slot: int) -> list[int]:
    name = f"session {session}"
    if turn == 0:
        sessions.start(name, "prefix" if session % 2 else None)
    prompt = random_prompt(1000 * session + turn, 12)
    answer = sessions.turn(name, prompt, slot, n_predict=6, ignore_eos=True, return_tokens=True)
    tokens: list[int] = answer["tokens"]
    return tokens


def begin(running: Running, tmp_path: Path, place: Path) -> Sessions:
    sessions = Sessions(running.client, DirectoryStore(place), tmp_path)
    sessions.start("prefix")
    sessions.turn("prefix", random_prompt(7, 40), 0, n_predict=4)
    return sessions


def test_64_sessions_over_4_slots_get_the_answers_that_they_get_alone(serve: Serve, tmp_path: Path) -> None:
    together = begin(serve("batched", parallel=4), tmp_path, tmp_path / "together")
    said: dict[tuple[int, int], list[int]] = {}
    for turn in range(N_TURNS):
        for i in range(N_SESSIONS):
            session = (i * 37 + turn * 11) % N_SESSIONS
            said[session, turn] = play(together, session, turn, (session + turn) % 4)
    assert len({tuple(tokens) for tokens in said.values()}) > N_SESSIONS, "they are not all the same"

    alone = begin(serve("batched", parallel=4), tmp_path, tmp_path / "alone")
    for session in range(N_SESSIONS):
        for turn in range(N_TURNS):
            assert play(alone, session, turn, 0) == said[session, turn], (session, turn)
    assert list(tmp_path.glob("llamamem-*")) == []


def test_turns_at_the_same_time_leave_each_session_its_own_memory(serve: Serve, tmp_path: Path) -> None:
    """Tokens may differ by rounding when sequences share a batch; what was written to whose memory may not."""
    sessions = begin(serve("batched", parallel=4), tmp_path, tmp_path / "store")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: [play(sessions, i, turn, i % 4) for turn in range(2)], range(16)))
    for i in range(16):
        session, _ = sessions.store.load(f"session {i}")
        assert (session.generation, session.tokens) == (2, 2 * (12 + 5) + (i % 2) * (40 + 3))


@pytest.mark.parametrize("profile", ["serial", "fused"])
def test_a_session_goes_on_in_another_server(serve: Serve, tmp_path: Path, profile: str) -> None:
    first, second = serve(profile), serve(profile)
    store = SqliteStore(tmp_path / "sessions.db")
    here, there = Sessions(first.client, store, tmp_path), Sessions(second.client, store, tmp_path)
    here.start("moved")
    here.turn("moved", random_prompt(1, 30), 0, n_predict=8, ignore_eos=True)
    here.start("stayed", "moved")
    options = {"n_predict": 16, "ignore_eos": True, "return_tokens": True}
    assert (
        there.turn("moved", random_prompt(2, 10), 0, **options)["tokens"]
        == here.turn("stayed", random_prompt(2, 10), 0, **options)["tokens"]
    )
    assert store.load("moved")[1] == store.load("stayed")[1]


def test_a_damaged_session_is_refused_by_the_server_with_its_reason(serve: Serve, tmp_path: Path) -> None:
    sessions = Sessions(serve("fused").client, DirectoryStore(tmp_path / "store"), tmp_path)
    sessions.start("anna")
    sessions.turn("anna", random_prompt(3, 20), 0, n_predict=4)
    session, state = sessions.store.load("anna")
    assert state is not None
    flipped = bytearray(state)
    flipped[500] ^= 1
    digests = (str(session.sidecar_sha256), str(session.base_sha256))
    damaged = sessions.store.save(session, Memory(bytes(flipped), session.tokens, *digests))
    for use in (lambda: sessions.resume("anna", 0), lambda: sessions.turn("anna", "hello", 0)):
        with pytest.raises(LlamamemError, match=r"answered 400: .*\[state-checksum\]"):
            use()
    assert sessions.store.load("anna")[0].generation == damaged.generation
    assert list(tmp_path.glob("llamamem-*")) == []
