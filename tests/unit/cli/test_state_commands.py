"""`llamamem state` as a user meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import state_files

from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.state import State, identity_of, read_state, write_state

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """The memories of model_a after its two prompts, as files."""
    model_a = Path(__file__).parents[2] / "data/model_a"
    sidecar = read_sidecar(model_a / "sidecar-v1.gguf")
    arrays, folder = np.load(model_a / "logits.npz"), tmp_path_factory.mktemp("states")
    shape = (1, len(sidecar.layers), sidecar.heads, sidecar.states, sidecar.rank, sidecar.rank)
    return {
        name: write_state(
            folder / f"{name}.state",
            State(
                arrays[f"{name}_v1_S"].reshape(shape),
                arrays[f"{name}_v1_prev"][None],
                arrays[f"{name}_v1_pos"][None],
                sidecar.chunk,
                sidecar.semantics,
                *identity_of(sidecar),
            ),
        )
        for name in ("p0", "p1")
    }


@pytest.fixture
def p0(recorded: dict[str, State]) -> Path:
    assert recorded["p0"].path
    return recorded["p0"].path


@pytest.fixture
def p1(recorded: dict[str, State]) -> Path:
    assert recorded["p1"].path
    return recorded["p1"].path


def one_line(result: Any, *words: str) -> None:
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("llamamem: error: ") and result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_show_fits_a_screen(llamamem: Run, p1: Path, recorded: dict[str, State]) -> None:
    result = llamamem("state", "show", p1)
    assert (result.status, result.err) == (0, "")
    first, *lines = result.out.splitlines()
    assert first == f"{p1}: memory, 6764 bytes"
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for words in (recorded["p1"].sha256, recorded["p1"].sidecar_sha256, recorded["p1"].base_sha256, "M 4, R 8, C 48"):
        assert words in result.out
    assert "103 tokens written, next in chunk 2, state 2" in result.out
    layers = [line for line in lines if line.endswith("empty")]
    assert len(layers) == 6 and all(line.count("*") == 1 for line in layers)
    largest = np.abs(recorded["p1"].S[0, 5, 0, 1]).max()
    assert f"{largest:.3f}" in layers[5]


def test_show_as_json(llamamem: Run, p1: Path) -> None:
    said = json.loads(llamamem("state", "show", p1, "--json").out)
    assert said["kind"] == "memory" and said["states"] == 4
    layer = said["sequences"][0]["layers"][5]
    assert layer["base_layer"] is None and layer["current_state"] == 2
    assert [state["live"] for state in layer["states"]] == [True, True, True, False]


def test_show_with_the_sidecar(llamamem: Run, model_a: Path, p1: Path) -> None:
    said = json.loads(llamamem("state", "show", p1, "--json", "--sidecar", model_a / "sidecar-v1.gguf").out)
    assert [layer["base_layer"] for layer in said["sequences"][0]["layers"]] == list(range(6))
    one_line(llamamem("state", "show", p1, "--sidecar", model_a / "sidecar-v2.gguf"), "[state-identity]", str(p1))


@pytest.mark.parametrize("states", [8, 64])
def test_show_of_many_states(states: int, llamamem: Run, recorded: dict[str, State], tmp_path: Path) -> None:
    state = recorded["p0"]
    many = np.concatenate([state.S] * (states // 4), axis=3)
    many[:, :, :, 5:] = 0
    path = write_state(tmp_path / "many.state", replace(state, S=many)).path
    result = llamamem("state", "show", path)
    assert f"5 of {states}" in result.out and max(map(len, result.out.splitlines()[1:])) <= 80
    assert ("#####..." in result.out) == (states == 8)


def test_show_of_a_whole_context(llamamem: Run, recorded: dict[str, State], tmp_path: Path) -> None:
    path = tmp_path / "context.state"
    path.write_bytes(state_files.CONTEXT.bytes())
    out = llamamem("state", "show", path).out
    assert "context" in out and "3 of 3 sequences written to" in out and "2 token ids, 100 bytes of KV cache" in out
    assert len(out.splitlines()) == 12
    one_line(llamamem("state", "show", path, "--png", tmp_path / "c.png"), "holds 3")
    path.write_bytes(state_files.SEQUENCE.bytes())
    assert "began from a memory of 19 tokens" in llamamem("state", "show", path).out


def test_a_picture(llamamem: Run, model_a: Path, p1: Path, tmp_path: Path) -> None:
    from matplotlib import image

    png = tmp_path / "p1.png"
    assert llamamem("state", "show", p1, "--png", png, "--sidecar", model_a / "sidecar-v1.gguf").status == 0
    first = png.read_bytes()
    pixels = image.imread(png)[..., :3]
    assert pixels.shape[0] > 600 and pixels.shape[1] > 600
    red, blue = pixels[..., 0] - pixels[..., 2] > 0.3, pixels[..., 2] - pixels[..., 0] > 0.3
    assert red.mean() > 0.005 and blue.mean() > 0.005  # both signs, on a white page
    assert llamamem("state", "show", p1, "--png", png, "--sidecar", model_a / "sidecar-v1.gguf").status == 0
    assert png.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["p1.png"]


def test_too_much_for_a_picture(llamamem: Run, recorded: dict[str, State], tmp_path: Path) -> None:
    state = recorded["p0"]
    path = write_state(tmp_path / "many.state", replace(state, S=np.concatenate([state.S] * 32, axis=3))).path
    one_line(llamamem("state", "show", path, "--png", tmp_path / "p.png"), "768 matrices are too many")


def test_a_picture_without_matplotlib(llamamem: Run, p1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    one_line(llamamem("state", "show", p1, "--png", tmp_path / "p.png"), "matplotlib", ".[plots]")
    assert not list(tmp_path.iterdir())
    assert llamamem("state", "show", p1).status == 0


def test_matplotlib_is_only_imported_for_a_picture(llamamem: Run, p1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    llamamem("state", "show", p1)
    assert "matplotlib" not in sys.modules


def test_diff(llamamem: Run, p0: Path, p1: Path, tmp_path: Path) -> None:
    equal, different = llamamem("state", "diff", p0, p0), llamamem("state", "diff", p0, p1)
    assert (equal.status, equal.out.splitlines()[-1]) == (0, "equal")
    assert (different.status, different.out.splitlines()[-1]) == (1, "different")
    assert len(different.out.splitlines()) == 8 and max(map(len, different.out.splitlines())) <= 80
    said = llamamem("state", "diff", p0, p1, "--json")
    rows = json.loads(said.out)["layers"]
    assert said.status == 1 and [row["layer"] for row in rows] == list(range(6))
    assert all(row["tokens"] == 103 - 165 and -1 <= row["cosine"] <= 1 for row in rows)
    assert json.loads(llamamem("state", "diff", p0, p0, "--json").out)["equal"] is True
    empty = read_state(p0)
    write_state(tmp_path / "empty", replace(empty, S=empty.S * 0, prev=empty.prev * 0))
    said = llamamem("state", "diff", p0, tmp_path / "empty", "--json")
    assert json.loads(said.out)["layers"][0]["cosine"] is None
    assert llamamem("state", "diff", p0, tmp_path / "empty").status == 1


def test_states_of_other_sidecars_do_not_go_together(llamamem: Run, p0: Path, tmp_path: Path) -> None:
    write_state(tmp_path / "other", replace(read_state(p0), sidecar_sha256="00" * 32))
    one_line(llamamem("state", "diff", p0, tmp_path / "other"), "[state-identity]", "00" * 32)
    out = tmp_path / "out"
    one_line(llamamem("state", "blend", p0, tmp_path / "other", "--alpha", "0.5", "--output", out), "[state-identity]")
    assert not out.exists()


def test_blend_and_decay(llamamem: Run, p0: Path, p1: Path, recorded: dict[str, State], tmp_path: Path) -> None:
    out = tmp_path / "out.state"
    assert llamamem("state", "blend", p0, p1, "--alpha", "0.25", "--output", out).status == 0
    a, b = recorded["p0"], recorded["p1"]
    assert np.allclose(read_state(out).S, 0.75 * a.S + 0.25 * b.S, rtol=0, atol=1e-6)
    assert f"blend alpha=0.25 a={a.sha256[:12]} b={b.sha256[:12]}" in llamamem("state", "show", out).out
    result = llamamem("state", "decay", p0, "--factor", "0.5", "--output", out)
    assert (result.status, result.out) == (0, "") and f"decay factor=0.5 a={a.sha256[:12]}" in result.err
    assert np.array_equal(read_state(out).S, a.S * np.float32(0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]


@pytest.mark.parametrize("number", ["1.5", "-0.5", "nan"])
def test_a_share_out_of_range(number: str, llamamem: Run, p0: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.state"
    one_line(llamamem("state", "blend", p0, p0, f"--alpha={number}", "--output", out), "alpha")
    one_line(llamamem("state", "decay", p0, f"--factor={number}", "--output", out), "factor")
    assert not out.exists()


def test_nothing_else_is_written_over(llamamem: Run, p0: Path, tmp_path: Path) -> None:
    notes, before = tmp_path / "notes.txt", p0.read_bytes()
    notes.write_text("keep")
    one_line(llamamem("state", "decay", p0, "--factor", "0.5", "--output", p0), "is the input itself")
    one_line(llamamem("state", "blend", notes, p0, "--alpha", "0.5", "--output", p0), "is the input itself")
    one_line(llamamem("state", "decay", p0, "--factor", "0.5", "--output", notes), "not a memory-only state")
    one_line(llamamem("state", "show", p0, "--png", notes), "not a PNG")
    one_line(llamamem("state", "show", p0, "--png", p0), "is the input itself")
    one_line(llamamem("state", "decay", p0, "--factor", "0.5", "--output", tmp_path / "none/out"), "directory")
    assert notes.read_text() == "keep" and p0.read_bytes() == before


def test_verify(llamamem: Run, model_a: Path, p0: Path, p1: Path, tmp_path: Path) -> None:
    result = llamamem("state", "verify", p0, p1, "--sidecar", model_a / "sidecar-v1.gguf")
    assert result.status == 0 and [line.split(",")[0] for line in result.out.splitlines()] == [
        f"{p0}: ok",
        f"{p1}: ok",
    ]
    cut, none = tmp_path / "cut.state", tmp_path / "none.state"
    cut.write_bytes(p0.read_bytes()[:-1])
    result = llamamem("state", "verify", cut, p0, none)
    assert (result.status, result.err) == (2, "")
    lines = result.out.splitlines()
    assert len(lines) == 3 and lines[1].startswith(f"{p0}: ok")
    assert lines[0].startswith(f"{cut}: [state-truncated] ") and lines[2].startswith(f"{none}: [state-unreadable] ")


def test_verify_as_json(llamamem: Run, model_a: Path, p0: Path) -> None:
    said = json.loads(llamamem("state", "verify", p0, "--json").out)
    assert said["ok"] and said["files"][0]["reason"] is None and said["files"][0]["kind"] == "memory"
    result = llamamem("state", "verify", p0, "--json", "--sidecar", model_a / "sidecar-v2.gguf")
    said = json.loads(result.out)
    assert result.status == 2 and not said["ok"] and said["files"][0]["reason"] == "state-identity"


def test_a_damaged_file_is_one_line_from_every_verb(llamamem: Run, p0: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.state"
    data = bytearray(p0.read_bytes())
    data[1000] ^= 1
    bad.write_bytes(data)
    out = ("--output", tmp_path / "out")
    for arguments in (
        ("show", bad),
        ("diff", p0, bad),
        ("blend", p0, bad, "--alpha", "0.5", *out),
        ("decay", bad, "--factor", "0.5", *out),
    ):
        one_line(llamamem("state", *arguments), f"{bad}: [state-checksum] ")
