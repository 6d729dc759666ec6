"""The demo: facts told in one conversation are recalled in another, after the server and its KV cache are gone.

On the small model that llamamem carries, with the commands and the server that a user has.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.formats.demo_files import DemoFiles
from llamamem.proof.recall import RecallReport, ask, recall, tell
from llamamem.proof.serve_run import LONGEST, ONE_THREAD, served
from llamamem.proof.smoke import smoke
from llamamem.reference import language
from llamamem.serving.client import Client

FACTS = {"anna": "baker", "tom": "fisher", "rosa": "swan", "hugo": "king"}
OTHERS = {"anna": "wolf", "tom": "mason", "rosa": "bell", "hugo": "page"}  # who the same names are to somebody else
ROWS = ((1, 64), (2, 64), (4, 64), (8, 64), (4, 16), (4, 250), (4, 500))

_SEED = 7


@dataclass(frozen=True)
class Step:
    """One thing that the demo shows: whether it holds, and what was seen."""

    what: str
    ok: bool
    seen: str


@dataclass(frozen=True)
class Asked:
    """A question of conversation two, the right surname, and those given on each memory."""

    name: str
    surname: str
    none: str | None
    foreign: str | None
    memory: str | None


@dataclass(frozen=True)
class DemoReport:
    steps: tuple[Step, ...]
    asked: tuple[Asked, ...]
    recall: RecallReport

    @property
    def ok(self) -> bool:
        return all(step.ok for step in self.steps) and self.recall.ok

    def as_dict(self) -> dict[str, Any]:
        steps = [vars(step) for step in self.steps]
        return {"ok": self.ok, "steps": steps, "asked": [vars(a) for a in self.asked], "recall": self.recall.as_dict()}


def demo(
    files: DemoFiles,
    *,
    bin_dir: Path,
    episodes: int = 10,
    show: Callable[[Step], None] = lambda step: None,
    say: Callable[[str, str], None] = lambda who, text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DemoReport:
    """Runs it all. `show` is called with each step, `say` with what is said in conversation one, as they happen.

    Raises LlamamemError when a step cannot be run.
    """
    steps: list[Step] = []

    def report(what: str, ok: bool, seen: str) -> None:
        steps.append(Step(what, ok, seen))
        show(steps[-1])

    serve = ["--model", str(files.model), "--sidecar", str(files.sidecar), "--port", "0", "--ctx-size", "2048"]
    serve += ["--profile", "fused", "--bin-dir", str(bin_dir), *ONE_THREAD]

    with served(serve) as first:
        report("a server with a memory", True, f"{first.url}, {files.model.name} and {files.sidecar.name}")
        with Client(first.url, timeout=LONGEST) as client:
            told = conversation(FACTS)
            for message in told[:-1]:
                say(message["role"], message["content"])
            said, memory = tell(client, told)
            say("assistant", said)
            report("its memory is kept", len(memory) < 10_000, f"{len(memory):,} bytes, whatever was said")
            _, other = tell(client, conversation(OTHERS))
            report("so is somebody else's", True, "the same names, other surnames: a control")
        status = first.stop()
    report("the server is stopped", status == 0, "its KV cache and all text are gone")

    with served(serve) as second:
        report("a new server", second.run["pid"] != first.run["pid"], f"{second.url}, process {second.run['pid']}")
        with Client(second.url, timeout=LONGEST) as client:
            asked = tuple(
                Asked(name, surname, *(ask(client, name, given) for given in (None, other, memory)))
                for name, surname in FACTS.items()
            )
            n = len(asked)
            with_it, without = (sum(getattr(a, how) == a.surname for a in asked) for how in ("memory", "none"))
            theirs = sum(a.foreign == OTHERS[a.name] for a in asked)
            report("with the memory", with_it == n, f"{with_it} of {n} answers are right")
            report("without", without < n, f"{without} of {n}, by guessing")
            report("with somebody else's", theirs == n, f"{theirs} of {n} answers are what that one was told")
            table = recall(client, rows=ROWS, episodes=episodes, show=progress)
    question = language.question("anna")
    control = smoke(files.model, files.sidecar, bin_dir=bin_dir, prompt=question, n_predict=8, ctx_size=512)
    report("a sidecar with its deltas zeroed is the base", control.zeroed_equals_base, "token for token")
    return DemoReport(tuple(steps), asked, table)


def conversation(facts: dict[str, str]) -> language.Messages:
    """Conversation one: people are introduced, then there is talk about something else."""
    rng = random.Random(_SEED)
    people = list(facts.items())
    texts = [" ".join(f"this is {name} {surname}." for name, surname in people[i : i + 2]) for i in (0, 2)]
    texts.append(language.small_talk(rng, 40))
    return language.turns(texts, [language.ACKNOWLEDGED] * len(texts))
