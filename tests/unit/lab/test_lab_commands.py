"""`llamamem lab dla` and `memory` as a user runs them, and what `mqar` says of runs that are there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import json_docs
import pytest

from llamamem.cli.lab import Preset
from llamamem.lab.dla_memory import Plan, features, measure
from llamamem.lab.mqar_plan import Run, training, validation
from llamamem.lab.mqar_presets import CPU, PRESETS, PUBLISHED, SMOKE
from llamamem.lab.mqar_report import Report
from llamamem.lab.mqar_results import FORMAT, Results, of_plan, read_lines
from llamamem.reference import require
from llamamem.reference.oracle import FEATURES, MemoryShape

Result = Any
DOCUMENTED = json_docs.sections()
SMALL = ("--sizes", "3:3:4", "--seeds", "2")


def test_dla_writes_its_files(llamamem: Callable[..., Result], tmp_path: Path) -> None:
    done = llamamem("lab", "dla", *SMALL, "--hola", "--output", tmp_path / "out")
    assert done.status == 0 and done.err == "" and "Over capacity (3 needles" in done.out
    names = {"EVAL.md", "dla_summary.json", "dla_trials.jsonl", "hola_trials.jsonl", "dla.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    trials = [json.loads(line) for line in (tmp_path / "out" / "dla_trials.jsonl").read_text().splitlines()]
    assert [sum(t["metric"] == name for t in trials) for name in ("bound", "recall", "state_only")] == [8, 2, 10]
    summary = json.loads((tmp_path / "out" / "dla_summary.json").read_text())
    row = summary["state_only"][0]
    assert row["policy"] == "oracle" and row["recall_linear_state"] == pytest.approx(1, abs=1e-6)
    assert "| oracle | 3 | 3 | 4 | 6.0 | 1.000 | 1.000 |" in (tmp_path / "out" / "EVAL.md").read_text()


def test_the_published_trials_have_their_names_and_numbers() -> None:
    from llamamem.lab import dla

    plan = dla.Plan(seeds=1)
    counts = [len(list(f(plan))) for f in (dla.bound_trials, dla.recall_trials, dla.state_trials)]
    assert [5 * count for count in counts] == [20, 15, 75]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("dla", "--check", "--seeds", "3"), "--check compares with the published figures"),
        (("dla", "--sizes", "8:12"), "--sizes 8:12: give NEEDLES:FILLER:K"),
        (("dla", "--sizes", "a:b:c"), "--sizes a:b:c: give"),
        (("dla", "--sizes", "0:1:1"), "--sizes 0:1:1: give"),
        (("memory", "--ranks", "8,x"), "--ranks 8,x: give numbers"),
        (("memory", "--chunks", "0"), "--chunks 0: give numbers"),
        (("mqar", "--output", "nowhere", "--table"), "runs.jsonl: cannot be read"),
    ],
    ids=lambda part: " ".join(part)[:24] if isinstance(part, tuple) else "",
)
def test_what_cannot_be_run_is_said_in_one_line(
    llamamem: Callable[..., Result], arguments: tuple[str, ...], reason: str
) -> None:
    done = llamamem("lab", *arguments)
    assert done.status == 2 and done.out == "" and reason in done.err and done.err.count("\n") == 1


def test_an_output_that_is_a_file_is_refused(llamamem: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for command in (("memory", "--seeds", "1", "--ranks", "4"), ("dla", *SMALL)):
        done = llamamem("lab", *command, "--output", tmp_path / "file")
        assert done.status == 2 and "cannot be made" in done.err and done.err.count("\n") == 1


def test_mqar_says_what_it_needs(
    llamamem: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(require, "find_spec", lambda name: None)
    done = llamamem("lab", "mqar", "--output", tmp_path / "x")
    assert done.status == 2 and "llamamem lab mqar needs torch: run `pip install -e '.[reference]'`" in done.err
    assert not (tmp_path / "x").exists()


# the memory as shipped


def test_the_memory_is_measured_by_rank_states_and_chunk(llamamem: Callable[..., Result], tmp_path: Path) -> None:
    some = ("--ranks", "8", "--states", "1,4", "--chunks", "8,1024", "--seeds", "2")
    done = llamamem("lab", "memory", *some, "--output", tmp_path)
    assert done.status == 0 and "The memory as shipped" in done.out
    trials = [json.loads(line) for line in (tmp_path / "memory_trials.jsonl").read_text().splitlines()]
    assert len(trials) == 2 * 2 * 3 * 2
    by = {(t["states"], t["chunk"], t["rule"], t["seed"]): t for t in trials}
    for seed in range(2):
        for rule in ("semantics 1", "semantics 2", "delta rule"):
            one, several = by[1, 1024, rule, seed], by[4, 1024, rule, seed]
            assert one["own"] == pytest.approx(one["told"], abs=1e-6), "there is one state to read"
            assert several["told"] == one["told"], "the others are empty until a chunk is full"
            assert by[4, 8, rule, seed]["told"] > one["told"] and by[4, 8, rule, seed]["written"] == 4


def test_a_needle_alone_is_read_back_by_the_reader_that_ships() -> None:
    found = measure(Plan(needles=1, fill=2), MemoryShape(rank=8, states=1, chunk=4), "semantics 2", 0)
    assert found["own"] == pytest.approx(found["told"], abs=1e-6) and found["told"] > 0.9
    assert found["own_right"] == found["route"] == 1.0


def test_features_are_the_oracles() -> None:
    from llamamem.lab.dla_data import Draws, needles
    from llamamem.lab.dla_memory import RULES

    keys, values, places = needles(Draws(0), 2, 2, 8)
    made = features(keys, values, places, "sharp", RULES["semantics 1"])
    assert tuple(made) == FEATURES and {array.shape for array in made.values()} == {keys.shape}
    assert made["write"][places[1], 0] == pytest.approx(0.95) and made["keep"][places[1], 0] == pytest.approx(0.05)


# --json


def test_what_is_printed_as_json_is_documented(llamamem: Callable[..., Result], runs: Path) -> None:
    def printed(*arguments: str | Path) -> Any:
        done = llamamem("lab", *arguments, "--json")
        assert done.out.count("\n") == 1, done.err
        return json.loads(done.out)

    few = ("--ranks", "4", "--states", "2", "--chunks", "8", "--seeds", "1")
    outputs = {
        "llamamem lab dla": [printed("dla", "--hola", *SMALL), printed("dla", "--check")],
        "llamamem lab memory": [printed("memory", *few)],
        "llamamem lab mqar": [printed("mqar", "--preset", "smoke", "--table", "--output", runs)],
    }
    faults = {name: json_docs.faults(given, DOCUMENTED[name]) for name, given in outputs.items()}
    faults["llamamem lab dla"] = [fault for fault in faults["llamamem lab dla"] if "differ" not in fault]  # none does
    assert not any(faults.values()), faults


# mqar's plans, files and tables, without PyTorch


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The results of a comparison in which only the arm and the seed count."""
    with Results(tmp_path / "runs.jsonl") as results:
        for run in SMOKE.runs():
            share = {"scalar-beta": 0.5, "vector-beta": 0.6}.get(run.mixer.arm, 0.4) + 0.1 * run.seed + run.lr
            results.append(SMOKE, run, _outcome(share))
    return tmp_path


def _outcome(share: float) -> dict[str, Any]:
    return {
        "parameters": 1000, "epochs": 2, "steps": 16, "stopped": "epochs", "loss": 1.0, "validation": [0.1, share],
        "accuracy": {part.name: share for part in SMOKE.test}, "seconds": 1.0,
    }  # fmt: skip


def test_the_table_compares_pair_by_pair(runs: Path) -> None:
    report = Report(SMOKE, read_lines(runs / "runs.jsonl"))
    vector = next(best for best in report.best if best.mixer.arm == "vector-beta")
    assert vector.lr == 2e-2 and report.missing == 0
    assert report.differences(vector, SMOKE.test[0]) == pytest.approx([0.1, 0.1])
    assert "| vector-beta | 128 | 0.02 | 2 | +0.100 ± 0.000 |" in report.markdown()
    assert "all 20 runs" in report.heading


def test_what_is_missing_is_said(runs: Path) -> None:
    lines = read_lines(runs / "runs.jsonl")
    assert "19 of 20 runs" in Report(SMOKE, lines[1:]).heading
    assert Report(SMOKE, []).tables() and Report(CPU, lines).missing == len(CPU.runs()), (
        "another plan's runs do not count"
    )


def test_a_torn_line_is_left_out_and_written_again(runs: Path) -> None:
    path = runs / "runs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert len(read_lines(path)) == 19
    with Results(path) as results:
        assert len(of_plan(results.lines, SMOKE)) == 19
        results.append(SMOKE, SMOKE.runs()[-1], _outcome(0.5))
        assert len(read_lines(path)) == 20


@pytest.mark.parametrize("text", ["hello\n", '{"format": "llamamem_mqar.v1", "run": 1}\n', "{"])
def test_a_file_of_something_else_is_refused(llamamem: Callable[..., Result], tmp_path: Path, text: str) -> None:
    (tmp_path / "runs.jsonl").write_text(text)
    done = llamamem("lab", "mqar", "--table", "--output", tmp_path)
    if text == "{":  # what a killed writer may leave behind
        assert done.status == 0
    else:
        assert done.status == 2 and "is not a run of" in done.err and done.err.count("\n") == 1


def test_two_do_not_write_one_file(runs: Path) -> None:
    with Results(runs / "runs.jsonl"), pytest.raises(Exception, match="another `llamamem lab mqar` writes it"):
        Results(runs / "runs.jsonl")


def test_recurrent_arms_have_the_same_state_at_each_size() -> None:
    for preset in PRESETS.values():
        sizes: dict[int, set[str]] = {}
        for mixer in preset.mixers:
            if mixer.arm != "attention":
                sizes.setdefault(mixer.state_floats(64), set()).add(mixer.arm)
        assert all(arms == {"scalar-beta", "vector-beta", "rwkv7", "rwkv-ms"} for arms in sizes.values()), preset.name
        assert all(len(lrs) >= 2 for lrs in preset.lrs.values())
        assert len({run.key for run in preset.runs()}) == len(preset.runs())
    assert {m.state_floats(64) for m in PUBLISHED.mixers} == {2048, 2 * 64 * 64}
    assert {preset.value for preset in Preset} == set(PRESETS)
    assert len(CPU.seeds) == 3 and {line["format"] for line in _committed()} == {FORMAT}


def test_the_committed_runs_are_all_of_the_cpu_preset() -> None:
    report = Report(CPU, _committed())
    assert report.missing == 0, "docs/data/mqar-cpu/runs.jsonl is what docs/lab.md shows"
    folder = Path(__file__).parents[3] / "docs" / "data" / "mqar-cpu"
    assert (folder / "mqar.md").read_text() == report.markdown()


def _committed() -> list[dict[str, Any]]:
    return read_lines(Path(__file__).parents[3] / "docs" / "data" / "mqar-cpu" / "runs.jsonl")


def test_every_arm_and_lr_of_a_seed_reads_the_same_data() -> None:
    first, again = (list(training(SMOKE, 0, 1)) for _ in range(2))
    assert all((a[0] == b[0]).all() for a, b in zip(first, again, strict=True))
    assert any((a[0] != b[0]).any() for a, b in zip(first, training(SMOKE, 0, 2), strict=True)), "fresh every epoch"
    assert any((a[0] != b[0]).any() for a, b in zip(first, training(SMOKE, 1, 1), strict=True))
    kinds = [batch[1][0] for batch in first]
    assert [int((labels >= 0).sum()) for labels in kinds] == [2, 4] * 4, "by turns"
    held_out = {part.name: batch for part, batch in validation(SMOKE, 0)}
    assert list(held_out) == ["2@16", "4@16"]


def test_the_published_data_are_the_same_every_epoch_and_in_order() -> None:
    small = PUBLISHED.__class__(
        **{**vars(PUBLISHED), "batch": 2, "train": tuple(p._replace(examples=4) for p in PUBLISHED.train)}
    )

    def tokens(seed: int, epoch: int) -> Iterator[bytes]:
        return (batch[0].tobytes() for batch in training(small, seed, epoch))

    assert list(tokens(0, 0)) == list(tokens(1, 5))
    lengths = [batch[0].shape[1] for batch in training(small, 0, 0)]
    assert lengths == [64, 64, 128, 128, 256, 256, 256, 256, 256, 256]


def test_a_run_is_named_by_all_that_tells_it_from_another() -> None:
    run = Run(CPU.mixers[0], 1.4e-2, 2)
    assert run.key == "scalar-beta 32 8 4 1 0 lr 0.014 seed 2"
