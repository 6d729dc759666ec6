"""Conversations: text and memory in step over turns, and what starts a text anew."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError  # noqa: E402
from llamamem.reference.base import follow  # noqa: E402
from llamamem.reference.conversation import Conversation, sampler  # noqa: E402


def written(memory: Any) -> set[int]:
    return {int(state.n) for state in memory.state.values()}


def test_turns_go_on_and_equal_one_pass_over_the_whole(loaded: Any, memory: Any) -> None:
    conversation = Conversation(loaded, memory)
    for text in ("hello there", "and then?", "who is anna?"):
        answer = conversation.say(text, 12)
    assert conversation.tokens == conversation.ids[:-1] and written(memory) == {len(conversation.tokens)}
    whole = Conversation(loaded, memory)  # resets the memory
    logits = whole.feed(conversation.tokens, every=True)[-len(answer.ids) :]
    assert float((logits - answer.logits).abs().max()) <= 5e-5


def test_a_text_that_is_no_continuation_starts_anew_on_the_memory_it_was_given(
    loaded: Any, memory: Any, tmp_path: Any
) -> None:
    conversation = Conversation(loaded, memory)
    conversation.say("remember this", 4)
    conversation.save(tmp_path / "x.memory")
    conversation.load(tmp_path / "x.memory")
    n = written(memory).pop()
    messages = [{"role": "user", "content": "who is it?"}]
    first = conversation.ask(messages, 8)
    again = conversation.ask(messages, 8)  # the same question is no continuation of its answer
    assert first.ids == again.ids and torch.equal(first.logits, again.logits)
    assert written(memory) == {n + len(conversation.tokens)}
    conversation.reset()
    assert not torch.equal(conversation.ask(messages, 8).logits, first.logits)


def test_a_snapshot_brings_everything_back(loaded: Any, memory: Any) -> None:
    conversation = Conversation(loaded, memory)
    conversation.say("hello there", 6)
    snapshot = conversation.snapshot()
    first = conversation.say("go on", 6)
    for _ in range(2):
        conversation.restore(snapshot)
        again = conversation.say("go on", 6)
        assert again.ids == first.ids and torch.equal(again.logits, first.logits)


def test_a_model_run_by_somebody_else_is_noticed(loaded: Any, memory: Any) -> None:
    conversation = Conversation(loaded, memory)
    conversation.feed([300, 301])
    loaded.model(input_ids=torch.tensor([[302]]))
    with pytest.raises(LlamamemError, match=r"memory has \[4\] tokens written, the text 3"):
        conversation.feed([303])


def test_banned_tokens_are_not_chosen_and_a_stop_token_ends_the_answer(loaded: Any, memory: Any) -> None:
    conversation = Conversation(loaded, memory)
    free = conversation.answer([2, 300, 301], 4)
    ban = {*free.ids, *(set(range(loaded.vocabulary)) - loaded.stop - {300})}
    conversation.reset()
    banned = conversation.answer([2, 300, 301], 40, ban=ban - {300})
    assert set(banned.ids) <= loaded.stop | {300}
    conversation.reset()
    stopped = conversation.answer([2, 300, 301], 40, ban=set(range(loaded.vocabulary)) - loaded.stop)
    assert stopped.stopped and len(stopped.ids) == 1 and stopped.shown == []


def test_sampling_is_seeded_and_keeps_to_its_limits() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    assert sampler(0.0) is None and sampler(1.0, top_k=1) is None

    def drawn(**kwargs: Any) -> list[int]:
        choose = sampler(1.0, **kwargs)
        assert choose is not None
        return [choose(logits) for _ in range(200)]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert set(drawn(top_k=2)) == {1, 2}
    assert set(drawn(top_p=0.5)) == {1}
    assert set(drawn()) == {0, 1, 2, 3}


def test_what_follows_an_answer() -> None:
    def render(messages: Any) -> str:
        return "".join(f"<{m['role']}>{m['content']}<end>\n" for m in messages) + "<model>"

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert follow(render, turns[:1]) == "<user>a<end>\n<model>"
    assert follow(render, turns) == "<end>\n<user>c<end>\n<model>"
    assert follow(render, turns, "<end>") == "\n<user>c<end>\n<model>"
