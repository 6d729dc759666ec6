"""The suite that we ship: each line can be answered rightly, and takes no likely wrong answer for right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from llamamem.formats.suite import Suite, read_suite
from llamamem.proof.expect import failures

SUITE = Path(__file__).parents[3] / "configs" / "suites" / "memory.jsonl"

ANSWERS = {  # id: a right one, wrong ones
    "format-one-word": ("green", ["Green.", "Your boat is green", "blue"]),
    "format-number": ("22", ["22 trees", "twenty-two", "23"]),
    "format-json": (
        '{"name": "Ines Moreau", "age": 41, "city": "Porto"}',
        ['```json\n{"name": "Ines Moreau", "age": 41, "city": "Porto"}\n```', '{"name": "Ines", "age": "41"}'],
    ),
    "format-list": ("- goat\n- heron\n- mule", ["- goat\n- mule\n- heron", "Here:\n- goat\n- heron\n- mule", "goat"]),
    "format-standing-order": ("Your call sign is Lima Four. OVER", ["It is Lima Four.", "OVER"]),
    "correction-day": ("Friday", ["Tuesday", "Tuesday, then Friday"]),
    "correction-twice": ("46", ["31", "12", "Room 12, 31 or 46?"]),
    "correction-one-of-two": ("Anna white, Bram blue.", ["Anna red, Bram blue", "Anna blue, Bram white"]),
    "correction-taken-back": ("Your hint is \u201cthe lighthouse\u201d.", ["the old mill", "I do not know."]),
    "distractors-names": ("Odile", ["Odette", "Odile or Odette"]),
    "distractors-numbers": ("4082", ["4028", "8042", "4208"]),
    "distractors-other-topics": ("No, it has hazelnuts in it.", ["Yes, enjoy it!", "Note: hazelnuts are healthy."]),
    "distractors-who-said": ("9:45", ["9:15", "9:30", "9:45, or 9:15"]),
    "isolation-tell": ("7391", ["I cannot say."]),
    "isolation-code": ("not told", ["7391", "Your code is 1234."]),
    "isolation-word": ("No word.", ["The quillwort grows in ponds.", "no word but quillwort"]),
    "isolation-other-user": ("5528", ["7391", "5528 or 7391"]),
    "marker-begin": ("TANAGER-58", ["TANAGER-85", "The marker is TANAGER-58"]),
    "marker-middle": ("OSPREY-27", ["OSPREY"]),
    "marker-turns": ("CURLEW-914", ["go on"]),
    "marker-long": ("PLOVER-306", ["PLOVER-603"]),
    "marker-two": ("WREN-12, ROOK-90", ["ROOK-90, WREN-12", "WREN-12"]),
    "refusal-yesterday": (
        "I don\u2019t know where the key is.",
        ["It is under the mat.", "You hid it, not I: in the flower pot."],
    ),
    "refusal-never-told": ("not told", ["Your sister is called Marie.", "She is a cellist"]),
    "refusal-last-week": ("I have no record of it.", ['You said: "Hello!"']),
    "refusal-false-premise": ("You did not say how deep it is.", ["It is twelve metres deep."]),
    "refusal-not-a-trick": ("Mireille", ["not told", "I do not know."]),
}


@pytest.fixture(scope="module")
def suite() -> Suite:
    return read_suite(SUITE)


def test_it_covers_what_it_is_for(suite: Suite) -> None:
    groups = Counter(line.group for line in suite.lines)
    assert set(groups) == {"format", "correction", "distractors", "isolation", "marker", "refusal"}
    assert min(groups.values()) >= 4 and {line.id for line in suite.lines} == ANSWERS.keys()


def test_what_one_tells_is_asked_only_afterwards(suite: Suite) -> None:
    ids = [line.id for line in suite.lines]
    assert ids.index("isolation-tell") < min(ids.index(f"isolation-{name}") for name in ("code", "word", "other-user"))


def test_the_longest_is_longer_than_a_chunk_of_memory(suite: Suite) -> None:
    """In words, and no tokenizer makes fewer tokens than that: 1024 a chunk, and 512 in the sliding window."""
    words = {line.id: sum(len(m["content"].split()) for m in line.conversation()) for line in suite.lines}
    assert words["marker-long"] > 1024 and all(n > 512 for name, n in words.items() if name.startswith("marker"))


@pytest.mark.parametrize("name", ANSWERS)
def test_right_and_wrong_answers(suite: Suite, name: str) -> None:
    expect = next(line.expect for line in suite.lines if line.id == name)
    assert expect is not None
    right, wrong = ANSWERS[name]
    assert failures(expect, right) == ()
    assert [answer for answer in wrong if not failures(expect, answer)] == []
