"""What `llamamem lab dla` prints and writes: tables, verdicts, and what the verdicts leave out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import replacing
from llamamem.lab.dla import Results, Trial, grouped, rows
from llamamem.lab.dla_check import Finding, hypotheses, verdicts, wins
from llamamem.lab.intervals import interval, shown
from llamamem.lab.tables import Table

_TABLE_OF_CACHES = ("ms", "ms+hola", "ms+hola-plain", "ms+recency", "ms+hola-flat", "single", "single+hola")
_INTERVAL = "± is the 95 % interval of the mean over {seeds} seeds, of the difference on the same data."


def tables(results: Results) -> list[Table]:
    made = [_bound(results), _recall(results), _states(results)]
    return [*made, _caches(results), _backbones(results)] if results.caches else made


def _bound(results: Results) -> Table:
    made = []
    for row, trials in _with_trials(results.bound):
        lower = 1 - row["bound_dla"] / row["bound_fixed"]
        difference = [trial["bound_fixed"] - trial["bound_dla"] for trial in trials]
        place = (row["config"], f"{row['nseg']}", f"{row['K']}", f"{row['m_dla']:.1f}")
        figures = (f"{row['bound_fixed']:.3f}", f"{row['bound_dla']:.3f}", f"{100 * lower:.1f} %")
        made.append((*place, *figures, shown(difference, 2)))
    head = ("config", "segments", "K", "states", "fixed", "DLA", "lower by", "difference")
    about = f"Deviation bound of a partition, lower is better. {_seeds(results)}"
    return Table("Deviation bound", head, tuple(made), about)


def _recall(results: Results) -> Table:
    names = ("recall_fixed", "recall_hrm_delta", "recall_hrm_rwkv7", "recall_hrm_rwkv7_multi", "recall_dla")
    made = []
    for row, trials in _with_trials(results.recall):
        place = (f"{row['nseg']}", f"{row['nfill']}", f"{row['K']}", f"{row['m_dla']:.1f}")
        difference = [trial["recall_dla"] - trial["recall_fixed"] for trial in trials]
        made.append((*place, *(f"{row[name]:.3f}" for name in names), shown(difference)))
    head = ("needles", "filler/seg", "K", "states", "fixed", "delta rule", "rwkv7", "rwkv7 multi-state", "DLA")
    about = (
        "Cosine of what a needle's key reads and its value, 1 is perfect. fixed and DLA: a sum in each block; delta "
        f"rule and rwkv7: one state for all. {_seeds(results)}"
    )
    return Table("Recall of needles", (*head, "DLA - fixed"), tuple(made), about)


def _states(results: Results) -> Table:
    made = []
    for row, trials in _with_trials(results.states):
        place = (row["policy"], f"{row['nseg']}", f"{row['nfill']}", f"{row['K']}", f"{row['states']:.1f}")
        figures = (f"{row['recall_linear_state']:.3f}", f"{row['recall_rwkv7_state']:.3f}")
        made.append((*place, *figures, shown([trial["rwkv_minus_linear"] for trial in trials])))
    head = ("policy", "needles", "filler/seg", "K", "states", "linear", "RWKV-7", "difference")
    return Table("The same blocks, two updates of the state", head, tuple(made), f"Recall as above. {_seeds(results)}")


def _caches(results: Results) -> Table:
    made = []
    for row, trials in _with_trials(results.caches):
        place = (f"{row['width']}", f"{row['nseg']}", f"{row['K']}", row["policy"], f"{row['states']:.0f}")
        gain = [trial["ms+hola"] - trial["ms"] for trial in trials]
        figures = tuple(f"{row[name]:.3f}" for name in _TABLE_OF_CACHES)
        made.append((*place, *figures, f"{row['needle-in-cache']:.2f}", shown(gain)))
    head = ("w", "needles", "K", "policy", "states", *_TABLE_OF_CACHES, "needle in cache", "ms+hola - ms")
    about = (
        "A cache of w exact tokens beside the states. ms: a state a block; single: one for all; hola, plain and "
        f"recency choose what the cache keeps; flat reads it with hardly a preference. {_seeds(results)}"
    )
    return Table("A cache beside the states (HOLA)", head, tuple(made), about)


def _backbones(results: Results) -> Table:
    names = ("gdn", "gdn+hola", "rwkv7", "rwkv7+hola", "linear", "linear+hola")
    widest = max(results.plan.caches)
    made = []
    for row in rows(results.caches):
        if row["width"] == widest:
            held = "/".join(f"{row[f'{name}-in-cache']:.2f}" for name in ("gdn", "rwkv7", "linear"))
            figures = tuple(f"{row[name]:.3f}" for name in names)
            made.append((f"{row['nseg']}", f"{row['K']}", row["policy"], *figures, held))
    head = ("needles", "K", "policy", *names, "in cache g/r/l")
    return Table(f"Other updates, with a cache of {widest}", head, tuple(made))


def remarks(results: Results) -> list[str]:
    """What the verdicts do not say, from these figures."""
    said = []
    for row in rows(results.states):
        if row["policy"] == "dla" and row["K"] < 2 * row["nseg"]:
            fixed = next(
                other
                for other in rows(results.states)
                if other["policy"] == "fixed" and other["nseg"] == row["nseg"] and other["nfill"] == row["nfill"]
            )
            figures = ", ".join(
                f"{state} {row[name]:.3f} against {fixed[name]:.3f}"
                for state, name in (("linear", "recall_linear_state"), ("RWKV-7", "recall_rwkv7_state"))
            )
            said.append(
                f"Over capacity ({row['nseg']} needles and their filler in K {row['K']} blocks): recall on DLA's "
                f"blocks against as many fixed ones: {figures}."
            )
    if said:
        said.append(
            "So a lower deviation bound is not better recall: DLA beats fixed blocks where there are as many blocks as "
            "segments, and there the threshold finds the segments exactly."
        )
    n = results.plan.seeds
    return [
        *said,
        "The reader is told which block a needle is in; nothing here routes by content.",
        "The delta rule's row is weak by its constants, not by its form: it keeps 1 - beta = .82 of a state with each "
        "token and is read at the end. With a decay of .98 and beta 1 (gdn, --hola) it is as good as RWKV-7's update.",
        f"{n} seeds a row; the published tables have no intervals.",
    ]


def _with_trials(trials: list[Trial]) -> Iterable[tuple[Trial, list[Trial]]]:
    return zip(rows(trials), grouped(trials).values(), strict=True)


def _seeds(results: Results) -> str:
    return _INTERVAL.format(seeds=results.plan.seeds)


def summary(results: Results) -> dict[str, Any]:
    """What dla_summary.json has: the rows, with the names of the published file, and the verdicts."""
    better, worse, ties = wins(results)
    bound = [{**row, "bound_reduction": 1 - row["bound_dla"] / row["bound_fixed"]} for row in rows(results.bound)]
    made: dict[str, Any] = {
        "smoke_test_pass": results.smoke,
        "bound": _bare(bound),
        "recall": _bare(rows(results.recall)),
        "state_only": _bare(rows(results.states)),
        "state_only_wins": {"rwkv7": better, "linear": worse, "tie": ties},
        "verdicts": verdicts(results),
        "intervals": {
            "recall_dla_minus_fixed": _intervals(results.recall, "recall_dla", "recall_fixed"),
            "rwkv_minus_linear": _intervals(results.states, "recall_rwkv7_state", "recall_linear_state"),
        },
    }
    if results.caches:
        made["hola"] = _bare(rows(results.caches))
        made["hypotheses"] = {
            name: {"value": value, "passes": passes} for name, (value, passes, _) in _hypotheses(results).items()
        }
    return made


def _bare(trials: list[Trial]) -> list[Trial]:
    return [{name: value for name, value in trial.items() if name != "metric"} for trial in trials]


def _intervals(trials: list[Trial], one: str, other: str) -> list[dict[str, float | None]]:
    made = []
    for group in grouped(trials).values():
        mean, half = interval([trial[one] - trial[other] for trial in group])
        made.append({"mean": mean, "half": half if len(group) > 1 else None})
    return made


def _hypotheses(results: Results) -> dict[str, tuple[float, bool, bool]]:
    return hypotheses(rows(results.caches))


def verdict_lines(results: Results) -> list[str]:
    better, worse, ties = wins(results)
    holds = {"log-linear attention, materialised and recurrent, is the same": results.smoke, **verdicts(results)}
    made = [f"{name}: {'yes' if ok else 'NO'}" for name, ok in holds.items()]
    made.append(f"on the same blocks RWKV-7's update / a sum / neither recalls more in {better}/{worse}/{ties} rows")
    if results.caches:
        made += [
            f"{name}: {value:+.4f}, {'yes' if ok else 'NO'}" for name, (value, ok, _) in _hypotheses(results).items()
        ]
    return made


def document(results: Results, findings: list[Finding] | None) -> str:
    """EVAL.md."""
    plan = results.plan
    parts = [
        "# DLA, measured",
        f"{plan.seeds} seeds, d {plan.width}, tau {plan.tau:g}. docs/lab.md says what the figures are.\n",
        *(table.markdown() for table in tables(results)),
        "### Verdicts\n",
        "\n".join(f"- {line}" for line in verdict_lines(results)),
        "\n### What the verdicts do not say\n",
        "\n".join(f"- {line}" for line in remarks(results)),
    ]
    if findings is not None:
        parts.append("\n### Against the published figures\n")
        parts.append("\n".join(f"- {finding_line(finding)}" for finding in findings))
    return "\n".join(parts) + "\n"


def finding_line(finding: Finding) -> str:
    if finding.ok:
        return f"ok: {finding.what} ({finding.figures})"
    more = f"; and {len(finding.differ) - 1} more" if len(finding.differ) > 1 else ""
    return f"DIFFERS: {finding.what}: {finding.differ[0]}{more}"


def write(results: Results, findings: list[Finding] | None, folder: Path) -> None:
    """EVAL.md, dla_summary.json, dla_trials.jsonl and, with caches, hola_trials.jsonl. Raises LlamamemError."""
    texts = {
        "EVAL.md": document(results, findings),
        "dla_summary.json": json.dumps(summary(results), indent=1) + "\n",
        "dla_trials.jsonl": lines([*results.bound, *results.recall, *results.states]),
    }
    save(folder, texts | ({"hola_trials.jsonl": lines(results.caches)} if results.caches else {}))


def save(folder: Path, texts: dict[str, str]) -> None:
    """Files of a directory, which is made. Raises LlamamemError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise LlamamemError(f"--output {folder}: cannot be made ({e.strerror}); give another") from None
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")


def lines(trials: list[Trial]) -> str:
    return "".join(json.dumps(trial) + "\n" for trial in trials)
