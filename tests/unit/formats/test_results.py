"""Result files: whatever a killed writer left, the next one goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamamem.errors import LlamamemError
from llamamem.formats.results import Answer, ResultsFile, Served, read_results, request_sha256

SERVED = Served(run_id=None, url="http://x", model="m", base_sha256="b", sidecar_sha256="s", mode="serial")


def answer(id: str, text: str = "caf\u00e9 \U0001f41d") -> Answer:
    request = {"messages": [{"role": "user", "content": id}]}
    return Answer(
        id=id,
        ok=True,
        request=request,
        request_sha256=request_sha256(request),
        response=text,
        latency_ms=1.5,
        served=SERVED,
        time=2.0,
    )


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultsFile(path) as file:
        assert file.answers == {}
        file.append(answer("a"))
        file.append(answer("b", "old"))
        file.append(answer("b", "new"))
    assert read_results(path) == {"a": answer("a"), "b": answer("b", "new")}
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "b"]


def test_a_file_cut_at_any_byte_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultsFile(path) as file:
        file.append(answer("a"))
        first = path.stat().st_size
        file.append(answer("b"))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        expected = ["a"] if cut >= first else []
        assert list(read_results(path)) == expected
        with ResultsFile(path) as file:
            assert list(file.answers) == expected
            file.append(answer("c"))
        assert list(read_results(path)) == [*expected, "c"]
        assert path.read_bytes().startswith(whole[: first if expected else 0])


@pytest.mark.parametrize("data", [b"my notes", b"my notes\n", b'{"id": "a"}\n', b'{"format": "llamamem_eval.v2"'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(data)
    with pytest.raises(LlamamemError, match="not an answer"):
        ResultsFile(path)
    with pytest.raises(LlamamemError, match="not an answer"):
        read_results(path)
    assert path.read_bytes() == data


def test_a_spoilt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultsFile(path) as file:
        file.append(answer("a"))
        file.append(answer("b"))
    spoilt = path.read_bytes().replace(b'"latency_ms": 1.5', b'"latency_ms": "?"')
    path.write_bytes(spoilt)
    with pytest.raises(LlamamemError, match="line 1 is not an answer"):
        ResultsFile(path)
    assert path.read_bytes() == spoilt


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with ResultsFile(path), pytest.raises(LlamamemError, match="another `llamamem eval` writes it"):
        ResultsFile(path)
    with ResultsFile(path) as file:
        file.append(answer("a"))


def test_where_it_cannot_be(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "out.jsonl", tmp_path):
        with pytest.raises(LlamamemError, match="--output"):
            ResultsFile(path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"base_sha256": "c"}, "base_sha256 c instead of b"),
        ({"sidecar_sha256": None}, "sidecar_sha256 none instead of s"),
        ({"mode": "fused"}, "mode fused instead of serial"),
        ({"model": "n", "base_sha256": None}, "model n instead of m"),
        ({"model": "n", "url": "http://y", "run_id": "r"}, None),
        ({"base_sha256": None}, None),
    ],
)
def test_whose_answers_they_are(change: dict[str, str | None], said: str | None) -> None:
    assert SERVED.model_copy(update=change).other_than(SERVED) == said


def test_the_slot_is_no_part_of_the_question() -> None:
    asked = {"messages": [], "seed": 1, "id_slot": 0}
    assert request_sha256(asked) == request_sha256({"seed": 1, "messages": [], "id_slot": 3})
    assert request_sha256(asked) != request_sha256({**asked, "seed": 2})
