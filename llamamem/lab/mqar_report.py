"""What an MQAR comparison says: accuracy by arm, size and set, and differences of pairs with their intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.console import Console

from llamamem.lab.intervals import interval, shown
from llamamem.lab.mqar_plan import BASELINE, Mixer, Preset, Run, Segment
from llamamem.lab.mqar_results import Line, of_plan
from llamamem.lab.tables import Table


@dataclass(frozen=True)
class Best:
    """A mixer at the learning rate whose runs end best on the validation sets: its lines by seed."""

    mixer: Mixer
    lr: float
    lines: dict[int, Line]

    def mean(self, part: Segment) -> float:
        return fmean(line["accuracy"][part.name] for line in self.lines.values())


class Report:
    """Of the runs of a plan that are there, be they all or not; lines of other plans are left out."""

    def __init__(self, preset: Preset, lines: Iterable[Line]):
        self.preset = preset
        self.there = of_plan(list(lines), preset)
        self.missing = len(preset.runs()) - len(self.there)
        self.best = [best for mixer in preset.mixers if (best := self._best(mixer)) is not None]

    def at(self, mixer: Mixer, lr: float) -> dict[int, Line]:
        """The lines of a mixer at a learning rate, by seed."""
        keys = {seed: Run(mixer, lr, seed).key for seed in self.preset.seeds}
        return {seed: self.there[key] for seed, key in keys.items() if key in self.there}

    def _best(self, mixer: Mixer) -> Best | None:
        tried = [Best(mixer, lr, lines) for lr in self.preset.lrs[mixer.arm] if (lines := self.at(mixer, lr))]
        return max(tried, key=lambda best: (len(best.lines), _validated(best.lines)), default=None)

    def differences(self, best: Best, part: Segment) -> list[float]:
        """Accuracy less that of the baseline of the same size, seed by seed; attention's to that of the middle size."""
        base = self._baseline(best)
        if base is None:
            return []
        seeds = sorted(set(best.lines) & set(base.lines))
        return [best.lines[s]["accuracy"][part.name] - base.lines[s]["accuracy"][part.name] for s in seeds]

    def _baseline(self, best: Best) -> Best | None:
        size = self.preset.main if best.mixer.arm == "attention" else best.mixer.state_floats(0)
        found = [b for b in self.best if b.mixer.arm == BASELINE and b.mixer.state_floats(0) == size]
        return found[0] if found else None

    def tables(self) -> list[Table]:
        return [self._sizes(), self._accuracy(), self._paired(), self._by_lr()] if self.there else [self._sizes()]

    def _sizes(self) -> Table:
        longest = max(part.length for part in self.preset.test)
        rows = []
        for mixer in self.preset.mixers:
            lines = [
                line for line in self.there.values() if line["run"].startswith(Run(mixer, 0, 0).key.split(" lr")[0])
            ]
            count = f"{lines[0]['parameters']:,}" if lines else ""
            rows.append((mixer.arm, mixer.size, f"{mixer.state_floats(longest):,}", count))
        about = f"State floats after {longest} tokens. All of a recurrent arm's memory is its state; attention's grows."
        return Table("Sizes", ("arm", "heads x k x v", "state floats", "parameters"), tuple(rows), about)

    def _accuracy(self) -> Table:
        rows = []
        for best in self.best:
            shares = [f"{best.mean(part):.3f}" for part in self.preset.test]
            rows.append((*self._about(best), *shares, self._stopped(best)))
        head = ("arm", "state floats", "lr", "seeds", *(part.name for part in self.preset.test), "epochs")
        return Table("Accuracy at the better learning rate", head, tuple(rows), self._read_as())

    def _paired(self) -> Table:
        rows = []
        for best in self.best:
            if best.mixer.arm != BASELINE:
                cells = [self.differences(best, part) for part in self.preset.test]
                rows.append((*self._about(best), *(shown(cell) if cell else "" for cell in cells)))
        head = ("arm", "state floats", "lr", "seeds", *(part.name for part in self.preset.test))
        about = (
            f"Less {BASELINE} of the same state, both at their better learning rate, on the same data: mean and 95 % "
            "interval over seeds. An interval that contains 0 says nothing."
        )
        return Table(f"Paired differences to {BASELINE}", head, tuple(rows), about)

    def _by_lr(self) -> Table:
        hardest = self.hardest
        rows = []
        for mixer in self.preset.mixers:
            for lr in self.preset.lrs[mixer.arm]:
                if lines := self.at(mixer, lr):
                    shares = [line["accuracy"][hardest.name] for line in lines.values()]
                    each = ", ".join(f"{share:.3f}" for share in shares)
                    rows.append((mixer.arm, self._floats(mixer), f"{lr:g}", f"{fmean(shares):.3f}", each))
        head = ("arm", "state floats", "lr", "mean", "seed by seed")
        return Table(f"Every learning rate, at {hardest.name}", head, tuple(rows))

    @property
    def hardest(self) -> Segment:
        """The test set with most pairs that is no longer than the training data."""
        longest = max(part.length for part in self.preset.train)
        return max((part for part in self.preset.test if part.length <= longest), key=lambda part: part.pairs)

    def _about(self, best: Best) -> tuple[str, ...]:
        return best.mixer.arm, self._floats(best.mixer), f"{best.lr:g}", str(len(best.lines))

    def _floats(self, mixer: Mixer) -> str:
        return "grows" if mixer.arm == "attention" else f"{mixer.state_floats(0)}"

    @staticmethod
    def _stopped(best: Best) -> str:
        return f"{fmean(line['epochs'] for line in best.lines.values()):.1f}"

    def _read_as(self) -> str:
        train = ", ".join(part.name for part in self.preset.train)
        return (
            f"pairs@length; trained on {train}. The learning rate is the one whose runs end better on validation data. "
            f"Fewer epochs than {self.preset.epochs}: stopped at {self.preset.stop_at:g}."
        )

    @property
    def heading(self) -> str:
        """Which plan this is, and whether it is whole."""
        total = len(self.preset.runs())
        whole = f"{total - self.missing} of {total} runs" if self.missing else f"all {total} runs"
        return f"MQAR, preset {self.preset.name}: {whole}"

    def markdown(self) -> str:
        return "\n".join([f"## {self.heading}\n", *(table.markdown() for table in self.tables())])

    def show(self, console: Console) -> None:
        console.print(f"{self.heading}\n")
        for table in self.tables():
            table.show(console)

    def as_dict(self) -> dict[str, Any]:
        rows = []
        for best in self.best:
            pairs: dict[str, Any] = {}
            for part in self.preset.test:
                if best.mixer.arm != BASELINE and (cell := self.differences(best, part)):
                    mean, half = interval(cell)
                    pairs[part.name] = {"mean": mean, "half": half if len(cell) > 1 else None}
            rows.append(
                {
                    "arm": best.mixer.arm,
                    "state_floats": None if best.mixer.arm == "attention" else best.mixer.state_floats(0),
                    "parameters": next(iter(best.lines.values()))["parameters"],
                    "lr": best.lr,
                    "seeds": len(best.lines),
                    "accuracy": {part.name: best.mean(part) for part in self.preset.test},
                    "less_baseline": pairs,
                }
            )
        return {
            "preset": self.preset.name, "plan": self.preset.digest, "baseline": BASELINE,
            "done": len(self.there), "missing": self.missing, "rows": rows,
        }  # fmt: skip


def _validated(lines: dict[int, Line]) -> float:
    return fmean(line["validation"][-1] for line in lines.values())
