"""Prompt reuse, slots on disk and edits: with a memory the server does neither more work than without nor less."""

from __future__ import annotations

import pytest
from server_runs import Running, Serve, generate, random_prompt

ALL = ["base", "serial", "fused", "batched"]


def written(running: Running) -> int:
    return int(running.client.slots()[0]["rwkv_ms"]["tokens_written"])


@pytest.mark.parametrize("profile", ALL)
def test_a_follow_up_turn_processes_only_its_new_tokens(serve: Serve, profile: str) -> None:
    running = serve(profile, parallel=1)
    first = random_prompt(1, 300)
    answer = generate(running.client, first, 16, cache_prompt=True)
    assert answer["timings"]["prompt_n"] == 300
    if profile != "base":
        assert written(running) == 315  # the last token sampled has not been through the model

    follow_up = [*first, *answer["tokens"], *random_prompt(2, 41)[1:]]
    second = generate(running.client, follow_up, 4, cache_prompt=True)
    assert second["timings"]["prompt_n"] == 41  # 40 new ones and that last token
    assert second["timings"]["cache_n"] == 315


@pytest.mark.parametrize("profile", ALL)
def test_a_saved_and_restored_slot_continues_with_the_same_tokens(serve: Serve, profile: str) -> None:
    running = serve(profile, parallel=1)
    client = running.client
    first = random_prompt(3, 120)
    answer = generate(client, first, 8, cache_prompt=True)
    saved = client.save_slot(0, "turn.bin")
    assert saved["n_saved"] == 127
    state = client.slots()[0].get("rwkv_ms")

    follow_up = [*first, *answer["tokens"], *random_prompt(4, 12)[1:]]
    undisturbed = generate(client, follow_up, 24, cache_prompt=True)
    generate(client, random_prompt(5, 90), 8, cache_prompt=True)
    assert client.slots()[0].get("rwkv_ms") != state or profile == "base"

    assert client.restore_slot(0, "turn.bin")["n_restored"] == 127
    assert client.slots()[0].get("rwkv_ms") == state
    continued = generate(client, follow_up, 24, cache_prompt=True)
    assert continued["tokens"] == undisturbed["tokens"]
    assert undisturbed["timings"]["prompt_n"] == 12
    # stock throws a restored sliding-window cache away and processes everything again, which is right, only slow
    assert continued["timings"]["prompt_n"] == (139 if profile == "base" else 12)


def test_a_restored_slot_in_another_process_continues_with_the_same_tokens(serve: Serve) -> None:
    before = serve("serial")
    first = random_prompt(6, 80)
    answer = generate(before.client, first, 8, cache_prompt=True)
    before.client.save_slot(0, "kept.bin")
    follow_up = [*first, *answer["tokens"], *random_prompt(7, 10)[1:]]
    expected = generate(before.client, follow_up, 24, cache_prompt=True)["tokens"]
    before.server.stop()

    after = serve("serial")
    after.client.restore_slot(0, "kept.bin")
    continued = generate(after.client, follow_up, 24, cache_prompt=True)
    assert continued["timings"]["prompt_n"] == 10
    assert continued["tokens"] == expected


@pytest.mark.parametrize("edit_at", [1, 60, 118])
def test_an_edited_prompt_gives_what_a_fresh_server_gives(serve: Serve, edit_at: int) -> None:
    # A state cannot be rolled back to an earlier token: whatever the server does, nothing of the old text may remain.
    original = random_prompt(8, 120)
    edited = [*original[:edit_at], *random_prompt(9, 121 - edit_at)[1:]]
    running = serve("serial")
    generate(running.client, original, 8, cache_prompt=True)
    after_edit = generate(running.client, edited, 24, cache_prompt=True)
    assert written(running) == len(edited) + 23

    fresh = generate(serve("serial").client, edited, 24)
    assert after_edit["tokens"] == fresh["tokens"]


def test_without_the_prompt_cache_the_serial_profile_starts_every_request_afresh(serve: Serve) -> None:
    running = serve("serial")
    prompt = random_prompt(10, 50)
    first = generate(running.client, prompt, 16)
    second = generate(running.client, [*prompt, *first["tokens"]], 1)
    assert second["timings"]["prompt_n"] == 66
    again = generate(running.client, prompt, 16)
    assert again["tokens"] == first["tokens"] and again["timings"]["prompt_n"] == 50


def test_a_conversation_over_turns_is_the_same_with_reuse_and_without(serve: Serve) -> None:
    reusing, fresh = serve("serial"), serve("serial")
    messages: list[dict[str, str]] = []
    for question in ("hello there", "what is the colour of the garden?", "and the name of the river?"):
        messages.append({"role": "user", "content": question})
        kept = reusing.client.chat(messages, max_tokens=12, cache_prompt=True)
        anew = fresh.client.chat(messages, max_tokens=12)
        text = anew["choices"][0]["message"]["content"]
        assert kept["choices"][0]["message"]["content"] == text
        assert written(reusing) == written(fresh) == anew["usage"]["total_tokens"] - 1
        messages.append({"role": "assistant", "content": text})
