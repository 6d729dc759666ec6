"""Scripts of conversations: what is refused, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.conversation import read_script


def written(path: Path, steps: list[dict[str, Any]], **members: Any) -> Path:
    path.write_text(json.dumps({"format": "llamamem_conversation.v1", "steps": steps, **members}))
    return path


def test_a_script_is_read(tmp_path: Path) -> None:
    steps = [{"say": "hello", "max_new_tokens": 3}, {"save": "a"}, {"reset": True}, {"resume": "a"}, {"park": True}]
    script = read_script(written(tmp_path / "s.json", steps))
    assert [step.act for step in script.steps] == ["say", "save", "reset", "resume", "park"]
    assert [str(step) for step in script.steps] == ["say hello", "save a", "reset", "resume a", "park"]


@pytest.mark.parametrize(
    ("steps", "members", "said"),
    [
        ([], {}, "steps"),
        ([{}], {}, "steps.0: a step has one of"),
        ([{"say": "a", "save": "b"}], {}, "steps.0: a step has one of"),
        ([{"sing": "a"}], {}, "steps.0"),
        ([{"resume": "a"}, {"save": "a"}], {}, "step 0 resumes 'a'"),
        ([{"save": "../a"}], {}, "steps.0.save"),
        ([{"reset": False}], {}, "steps.0.reset"),
        ([{"say": "a"}], {"format": "other"}, "format"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, steps: Any, members: dict[str, Any], said: str) -> None:
    with pytest.raises(LlamamemError, match=r"^conversation .*s\.json: ") as e:
        read_script(written(tmp_path / "s.json", steps, **members))
    assert said in str(e.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LlamamemError, match="cannot be read"):
        read_script(tmp_path / "none.json")
