"""Draws the steps of a run from a seed: few texts under many origins, so that what must not be mixed up lies close."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entitled.memory import Memory
from entitled.oracle import Oracle
from entitled.routes import ABSENT, COMPLETION, COMPLETIONS, RESPONSES, ROUTES, SEVERAL, Ask, Text
from entitled.steps import Action, Continue, Look, Poison, Refused, Sleep, Step, Together, WhileBusy
from llamamem.reference import language


@dataclass
class Draw:
    """`step` is the next one; `remember` and `keep` are told what came of the last."""

    rng: random.Random
    oracle: Oracle
    limit: int = 110  # words of a text, so that a slot of 512 tokens holds it with an answer
    sleeps: bool = False
    talks: list[tuple[Text, Ask]] = field(default_factory=list)  # conversations, and how each was asked last
    memories: list[Memory] = field(default_factory=list)
    zeros: Memory | None = None  # the file of an empty memory
    huge: Memory | None = None
    planned: list[Step] = field(default_factory=list)
    saved: dict[str, Text] = field(default_factory=dict)  # what was said in the slots of slot files, as far as known

    def __post_init__(self) -> None:
        self.names = self.rng.sample(language.NAMES, 5)
        self.surnames = self.rng.sample(language.SURNAMES, 8)
        self.beginnings = [self.said() for _ in range(3)]

    # what is learnt from the answers

    def remember(self, ask: Ask, answer: str) -> None:
        """A conversation to go on with, or to change."""
        self.talks = [*self.talks, ((*ask.text, answer.strip() or "ok."), ask)][-10:]

    def keep(self, memory: Memory) -> None:
        if memory.origin and len(self.memories) < 8:
            self.memories.append(memory)
        elif memory.origin:
            self.memories[self.rng.randrange(len(self.memories))] = memory

    # texts

    def said(self) -> str:
        rng = self.rng
        if rng.random() < 0.4:
            return language.question(rng.choice(self.names))
        facts = [
            language.introduction(rng, rng.choice(self.names), rng.choice(self.surnames))
            for _ in range(rng.randint(1, 3))
        ]
        aside = [language.small_talk(rng, rng.randint(4, 24))] if rng.random() < 0.3 else []
        return " ".join([*facts, *aside])

    def text(self) -> tuple[Text, Ask | None]:
        """A new one, one that goes on, one said again, one edited, one cut; and how it was asked last."""
        rng = self.rng
        if not self.talks or rng.random() < 0.12:
            return (rng.choice(self.beginnings) if rng.random() < 0.7 else self.said(),), None
        known, before = rng.choice(self.talks[-4:] if rng.random() < 0.6 else self.talks)
        kind = rng.choices(("on", "again", "edit", "cut"), (6, 2, 2, 1))[0]
        text = (*known, self.said())
        if kind == "again":
            text = known[:-1]
        elif kind == "edit":
            at = 2 * rng.randrange((len(known) + 1) // 2)
            text = (*known[:at], edited(rng, known[at]))
        elif kind == "cut":
            text = known[: 2 * rng.randrange((len(known) + 1) // 2) + 1]
        return (text if sum(map(language.n_tokens, text)) + 6 * len(text) < self.limit else text[:1]), before

    # requests

    def ask(self, *, slot: int | None = None, plain: bool = False) -> Ask:
        rng = self.rng
        text, before = self.text()
        if before is not None and rng.random() < 0.5:  # by the same client
            fields = {name: getattr(before, name) for name in ("slot", "memory", "frozen", "scale")}
        else:
            fields = self.whose()
        if slot is not None:
            fields |= {"slot": slot, "memory": ABSENT}
        route = rng.choices(ROUTES, (6, 2, 4, 1, 1))[0]
        if route in (COMPLETION, COMPLETIONS):
            fields |= {"as_ids": rng.random() < 0.3, "ignore_eos": rng.random() < 0.3}
        if not plain and rng.random() < 0.08 and route in SEVERAL and self.oracle.n_slots > 1:
            fields["n"] = rng.randint(2, self.oracle.n_slots)
        else:
            fields["return_memory"] = rng.random() < 0.6
        if rng.random() < 0.15:
            fields["cache"] = rng.random() < 0.3
        if rng.random() < 0.3:
            fields["stream"] = True
            if not plain and "n" not in fields and rng.random() < 0.2:
                fields["cancel_after"] = rng.randint(1, 6)
        n_predict = rng.randint(1, 8) if "cancel_after" not in fields else 40
        return Ask(route, text, n_predict, report=rng.random() < 0.3, **fields)

    def whose(self) -> dict[str, Any]:
        """Whose memory a request names, and under which setting."""
        rng, fields = self.rng, dict[str, Any]()
        kind = rng.choices(("nobody's", "carried", "null", "slot", "slot and carried"), (30, 22, 5, 33, 10))[0]
        if "slot" in kind:
            fields["slot"] = rng.randrange(self.oracle.n_slots)
        elif rng.random() < 0.1:
            fields["slot"] = -1
        if kind == "null":
            fields["memory"] = None
        elif "carried" in kind:
            fields["memory"] = rng.choice((self.zeros, None)) if rng.random() < 0.25 else rng.choice(self.memories)
        if rng.random() < 0.2:
            fields["frozen"] = rng.random() < 0.8
        if rng.random() < 0.2:
            fields["scale"] = rng.choice((0, 0.5, 1, 2, -1.5))
        return fields

    # everything

    def step(self) -> Step:
        if self.planned:
            step = self.planned.pop(0)
            if isinstance(step, Action) and step.action == "save" and self.talks:
                self.saved[str(step.body["filename"])] = self.talks[-1][0]
            return step
        rng, n = self.rng, self.oracle.n_slots
        slot = rng.randrange(n)
        kinds: dict[str, float] = {"ask": 60, "save": 5, "continue": 4, "restore": 5, "reset": 1.5, "erase": 1.5}
        kinds |= {"set": 4, "slot save": 3, "slot restore": 3, "busy": 2, "refused": 5, "look": 1.5, "poison": 0.6}
        kinds |= {"together": 6 if n > 1 else 1, "sleep": 1.5 if self.sleeps else 0}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        if kind == "together":
            return self.together()
        if kind == "busy":
            return self.while_busy(slot)
        if kind == "refused":
            return self.refused(slot)
        if kind == "poison":
            return Poison(Ask(rng.choice(ROUTES), self.text()[0], 4, slot=rng.choice((None, slot)), memory=self.huge))
        if kind == "look":
            return Look()
        if kind == "sleep":
            return Sleep()
        if kind == "continue":
            wrong = rng.choice((None, "another origin", "another text", "more text", "an older text"))
            return Continue(slot, rng.choice((0.0, rng.random(), 1.0)), wrong, rng.choice((None, "c0", "c1")))
        action = self.action(slot, kind)
        if action is None:
            return self.ask()
        self.planned = self.after(slot, kind, action)
        return self.planned.pop(0)

    def after(self, slot: int, kind: str, action: Action) -> list[Step]:
        """An action and what makes it matter: a text before it, the use of what it changed."""
        rng, ask = self.rng, self.ask(slot=slot, plain=True)
        if kind == "slot save":  # of its own text, since it is the last that ran there
            return [replace(ask, scale=rng.choice((None, 0, 2)), frozen=None), action]
        if kind == "slot restore" and (said := self.saved.get(str(action.body["filename"]))):
            return [action, replace(ask, text=(*said, self.said()), scale=rng.choice((None, None, 0)))]
        if (
            kind == "set"
            and rng.random() < 0.4
            and (other := self.action(slot, rng.choice(("erase", "reset", "restore"))))
        ):
            return [action, other, ask]
        return [action, ask] if rng.random() < 0.5 else [action]

    def action(self, slot: int, kind: str) -> Action | None:
        rng, oracle = self.rng, self.oracle
        if kind == "save":
            name = rng.choice((None, "m0", "m1", "m2"))
            return Action(slot, "memory-save", (("filename", name) if name else ("return_memory", True),))
        if kind == "restore" and oracle.memories and rng.random() < 0.4:
            return Action(slot, "memory-restore", (("filename", rng.choice(sorted(oracle.memories))),))
        if kind == "restore" and self.memories:
            return Action(slot, "memory-restore", (), rng.choice(self.memories))
        if kind in ("reset", "erase"):
            return Action(slot, "memory-reset" if kind == "reset" else "erase")
        if kind == "set":
            # absent is as it was
            frozen = (("frozen", rng.random() < 0.4),) if rng.random() < 0.6 else ()
            scale = (("scale", rng.choice((0, 0.5, 1, 2))),) if not frozen or rng.random() < 0.5 else ()
            return Action(slot, "memory-set", (*frozen, *scale))
        if kind == "slot save":
            return Action(slot, "save", (("filename", rng.choice(("s0", "s1"))),))
        if kind == "slot restore" and oracle.slot_files:
            return Action(slot, "restore", (("filename", rng.choice(sorted(oracle.slot_files))),))
        return None

    def together(self) -> Together:
        rng, n = self.rng, self.oracle.n_slots
        asks = [self.ask(plain=True) for _ in range(rng.randint(2, n + 2))]
        named: set[int] = set()
        for i, ask in enumerate(asks):
            if ask.memory is ABSENT and ask.slot is not None and ask.slot >= 0:
                if ask.slot in named:  # which of two is the last would be chance
                    asks[i] = Ask(ask.route, ask.text, ask.n_predict, memory=None, return_memory=True)
                named.add(ask.slot)
        return Together(tuple(asks))

    def while_busy(self, slot: int) -> WhileBusy:
        rng = self.rng
        before = Ask(COMPLETION, self.text()[0], 120, slot=slot, stream=True, ignore_eos=True)
        kinds = ("save", "restore", "reset", "erase", "set")
        action = self.action(slot, rng.choice(kinds)) or Action(slot, "memory-reset")
        after = self.ask(slot=slot, plain=True)
        return WhileBusy(before, action, after, rng.choices(("waits", "hangs up", "in time"), (3, 1, 1))[0])

    def refused(self, slot: int) -> Refused:
        rng, n = self.rng, self.oracle.n_slots
        nowhere = rng.choice((n, n + 3, 99, -1))
        memory = rng.choice(self.memories)
        bits = bytearray(memory.data)
        bits[rng.randrange(len(bits))] ^= 1 << rng.randrange(8)
        flipped = Memory(bytes(bits)).base64
        if rng.random() < 0.4:
            actions: list[tuple[int, str, dict[str, Any]]] = [
                (nowhere, "memory-reset", {}),
                (nowhere, "erase", {}),
                (nowhere, "memory-set", {"frozen": True}),
                (nowhere, "memory-save", {"return_memory": True}),
                (nowhere, "memory-restore", {"memory": memory.base64}),
                (nowhere, "save", {"filename": "s0"}),
                (slot, "memory-restore", {"memory": flipped}),
                (slot, "memory-restore", {"memory": "%%%"}),
                (slot, "memory-restore", {"filename": "missing"}),
                (slot, "memory-save", {"filename": "../m0"}),
                (slot, "memory-set", {"scale": 17}),
                (slot, "restore", {"filename": "missing"}),
            ]
            where, action, told = rng.choice(actions)
            return Refused(f"/slots/{where}?action={action}", tuple(told.items()))
        settings: list[Any] = [{"scale": 1e38}, {"scale": -16.5}, {"scale": "1"}, {"frozen": 1}, {"other": 1}, 3, "x"]
        settings += [{"memory": 3}, {"memory": "%%%"}, {"memory": flipped}, {"memory": memory.base64[:-8]}]
        body: dict[str, Any] = {"id_slot": slot, "rwkv_ms": rng.choice(settings)}
        route = rng.choice(ROUTES)
        if rng.random() < 0.3:
            body = {"id_slot": rng.choice((n, 99, -2, "0"))}
        elif rng.random() < 0.15 and n > 1 and route in SEVERAL:
            body = {"id_slot": slot, "rwkv_ms": {"return_memory": True}, "n": 2}
        words = "hello " * (3000 if rng.random() < 0.1 else 1)  # more than any context holds
        said: Any = [{"role": "user", "content": words}]
        if "rwkv_ms" in body and len(words) > 99:
            body = {"id_slot": slot}
        prompt = {COMPLETION: "prompt", COMPLETIONS: "prompt", RESPONSES: "input"}.get(route, "messages")
        return Refused(route, tuple({prompt: said if prompt == "messages" else words, "max_tokens": 2, **body}.items()))


def edited(rng: random.Random, said: str) -> str:
    """One word of it is another."""
    words: Sequence[str] = said.split()
    at = [
        i for i, word in enumerate(words) if word.strip(".?") in language.NAMES or word.strip(".") in language.SURNAMES
    ]
    if not at:
        return f"{said} it is cold now."
    i = rng.choice(at)
    kind = language.NAMES if words[i].strip(".?") in language.NAMES else language.SURNAMES
    end = words[i][-1] if words[i][-1] in ".?" else ""
    return " ".join([*words[:i], rng.choice(kind) + end, *words[i + 1 :]])
