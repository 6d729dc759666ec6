"""Conversations whose memory goes with them in the requests: no slot is theirs, no directory shared, servers change."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from http_client import chat, user
from server_runs import ServeDemo

from llamamem.reference import language

N_CONVERSATIONS, N_TURNS = 64, 3


def turns_of(i: int) -> list[str]:
    """Somebody is introduced, something else is said, and then it is asked who that was. Many begin in the same way."""
    rng = random.Random(f"conversation {i}")
    name = language.NAMES[i % 8]
    told = f"{language.introduction(rng, name, rng.choice(language.SURNAMES))} {language.small_talk(rng, 12)}"
    return [told, language.small_talk(random.Random(i % 5), 10), language.question(name)]


def turn(url: str, text: str, memory: str | None) -> dict[str, Any]:
    """One turn on a memory, in a conversation without history; the memory after it comes with the answer."""
    rwkv_ms = {"return_memory": True} | ({"memory": memory} if memory else {})
    return chat(url, user(text), rwkv_ms=rwkv_ms)


def test_64_conversations_over_4_slots_of_two_servers_are_each_as_if_alone(serve_demo: ServeDemo) -> None:
    urls = [serve_demo("batched", parallel=4, slot_dir=None).server.url for _ in range(2)]
    rng = random.Random(1)
    memories: list[str | None] = [None] * N_CONVERSATIONS
    said: dict[tuple[int, int], dict[str, Any]] = {}

    def go(i: int, n: int) -> None:
        answer = turn(urls[(i + n) % 2], turns_of(i)[n], memories[i])
        memories[i], said[i, n] = answer["rwkv_ms"]["memory"], answer

    with ThreadPoolExecutor(4) as pool:  # two at a time on each server
        for n in range(N_TURNS):
            order = rng.sample(range(N_CONVERSATIONS), N_CONVERSATIONS)
            list(pool.map(go, order, [n] * N_CONVERSATIONS))

    alone = serve_demo("fused", "--cache-ram", "0", slot_dir=None).server.url
    for i in range(N_CONVERSATIONS):
        memory = None
        for n in range(N_TURNS):
            answer = turn(alone, turns_of(i)[n], memory)
            assert answer["said"] == said[i, n]["said"], (i, n)
            assert answer["rwkv_ms"]["tokens_written"] == said[i, n]["rwkv_ms"]["tokens_written"], (i, n)
            memory = answer["rwkv_ms"]["memory"]
    names = [language.surname_in(said[i, 2]["said"], language.NAMES[i % 8]) for i in range(N_CONVERSATIONS)]
    right = [surname is not None and surname in turns_of(i)[0] for i, surname in enumerate(names)]
    assert sum(right) >= 0.95 * N_CONVERSATIONS  # and what was told is remembered
    assert len(set(names)) > 8
