"""The demo's language: what is told can be asked for, a gap is as long as it says, a word is a token."""

from __future__ import annotations

import random

import pytest

from llamamem.reference import demo_tokenizer, language


def pieces(text: str) -> list[str]:
    """A text as the demo's tokenizer splits it, by its merges alone."""
    vocabulary = demo_tokenizer.vocabulary()
    ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
    split = demo_tokenizer._split(text.replace(" ", demo_tokenizer.SPACE), ranks)
    assert set(split) <= set(vocabulary.tokens)
    return split


@pytest.mark.parametrize("text", ["who is anna?", "that is tom fisher.", "ok.", *language.INTRODUCTIONS])
def test_a_word_is_one_token_and_so_is_a_mark(text: str) -> None:
    assert len(pieces(text)) == language.n_tokens(text)


def test_every_word_is_a_token_with_and_without_a_space() -> None:
    for word in language.words():
        if word.isalpha():
            assert pieces(word) == [word]
            assert pieces(f"a {word}")[-1] == demo_tokenizer.SPACE + word


@pytest.mark.parametrize(("facts", "gap"), [(1, 0), (4, 16), (8, 64), (4, 500)])
def test_a_gap_is_at_least_as_long_as_asked_and_as_long_as_said(facts: int, gap: int) -> None:
    for seed in range(20):
        episode = language.episode(random.Random(seed), facts, gap)
        last = max(
            i for i, message in enumerate(episode.conversation) if message["content"].startswith(language.INTRODUCTIONS)
        )
        after = episode.conversation[last + 1 :]
        # a turn is <|turn> role \n ... <turn|> \n, and the turn of the last introduction has its last two left
        tokens = 2 + sum(5 + language.n_tokens(message["content"]) for message in after)
        assert tokens == episode.gap >= gap
        assert episode.gap < gap + 40


def test_the_same_seed_tells_the_same_and_every_fact_is_told_once() -> None:
    episode = language.episode(random.Random(5), 8, 64)
    assert episode == language.episode(random.Random(5), 8, 64) != language.episode(random.Random(6), 8, 64)
    text = " ".join(message["content"] for message in episode.conversation)
    assert all(text.count(f"{name} {surname}.") == 1 for name, surname in episode.facts.items())
    assert not set(language.NAMES) & set(language.SURNAMES)


@pytest.mark.parametrize(
    ("text", "surname"), [("that is anna baker.", "baker"), ("that is tom baker.", None), ("that is anna.", None)]
)
def test_an_answer_counts_for_the_person_that_was_asked_for(text: str, surname: str | None) -> None:
    assert language.surname_in(text, "anna") == surname
