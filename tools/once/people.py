"""Clients that talk to their sessions as people's programs do, and what each memory must be after each turn."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from entitled.fresh import NEAR_TIE
from entitled.memory import Memory, differ, distance

from llamamem.reference import language
from once.ask import PATIENCE, Answer, HungUp, Refused, Way, ask
from once.rules import Fresher, Known, Said, Talk, with_answer

MOST = 300  # words of a conversation, which a slot holds with an answer


class Wrong(Exception):
    """What a gateway did that the rules do not allow."""


@dataclass
class Tally:
    turns: int = 0
    conversations: int = 0
    went_on: int = 0
    reused: int = 0
    furthest: float = 0.0  # of a memory from what it must be, in units of what rounding may do
    ties: int = 0  # answers that nobody heard and rounding may have turned
    did: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        for name in ("turns", "conversations", "went_on", "reused", "ties"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.furthest = max(self.furthest, other.furthest)
        self.did.update(other.did)


@dataclass
class Person:
    """One client with a session of its own, which it does not share. `gateways` are asked by turns, at random."""

    name: str
    rng: random.Random
    gateways: list[httpx.Client]
    fresher: Fresher
    tally: Tally
    settled: Callable[[], Any] = lambda: None  # between turns; a server may be started again there
    known: Known = field(default_factory=Known)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.way = Way.drawn(rng)
        self.has_ids = rng.random() < 0.4
        self.only_new = not self.has_ids and not self.way.raw and rng.random() < 0.2
        self.system = (Said("system", "you are kind."),) if not self.way.raw and rng.random() < 0.3 else ()
        self.first = self.said()

    def converse(self) -> None:
        """One conversation, of some turns. Raises Wrong."""
        rng = self.rng
        id = f"c{rng.randrange(10**6)}" if self.has_ids else None
        first = self.first if rng.random() < 0.4 else self.said()  # the same words on another day
        talk: Talk = (Said("user", first),)
        before: list[Talk] = []  # where one may branch off
        self.tally.conversations += 1
        for _ in range(rng.randint(1, 6)):
            self.settled()
            answer = self.turn(id, talk)
            if answer is None:  # it was given up: the client goes on with what it has, or asks once more
                self.note("once more" if rng.random() < 0.6 else "otherwise")
                if self.log[-1] != "once more":
                    talk = (*talk[:-1], Said("user", self.said()))
                continue
            if rng.random() < 0.15:
                self.title()
            talk = with_answer(talk, answer or "ok.")
            before.append(talk)
            talk = self.goes_on(talk, before)
            if sum(len(said.text.split()) + 6 for said in talk) > MOST:
                return

    def goes_on(self, talk: Talk, before: list[Talk]) -> Talk:
        """What the client asks next, which has all that was said, or what its owner made of it."""
        rng = self.rng
        if self.only_new:
            return (Said("user", self.said()),)
        kind = rng.choices(
            ("on", "again", "edit", "edit answer", "trim", "trim middle", "branch"), (9, 2, 2, 1, 2, 1, 1)
        )[0]
        self.note(kind)
        users = [i for i, said in enumerate(talk) if said.role == "user"]
        if kind == "again":
            return talk[:-1]
        if kind == "edit":
            at = rng.choice(users)
            return (*talk[:at], Said("user", self.said()))
        if kind == "edit answer":
            return (*talk[:-1], Said("assistant", "no."), Said("user", self.said()))
        if kind == "trim" and len(users) > 1:
            talk = talk[rng.choice(users[1:]) :]
        if kind == "trim middle" and len(users) > 2:
            talk = (*talk[:2], *talk[users[-1] :])
        if kind == "branch":
            talk = rng.choice(before)
        return (*talk, Said("user", self.said()))

    def turn(self, id: str | None, talk: Talk) -> str | None:
        """The answer; None of one that was given up."""
        rng = self.rng
        whole = (*self.system, *talk)
        n = rng.choice((1, 2, 4, 12, 12, 24))
        options: dict[str, Any] = {"id": id, "n": n, "stream": rng.random() < 0.5}
        kind = rng.choices(("plain", "cancel", "time out"), (10, 1, 1))[0]
        if kind == "cancel":
            options["cancel_after"] = rng.randint(0, 3)
        elif kind == "time out":
            options |= {"stream": False, "hang_up": rng.choice((0.002, 0.01, 0.03, 0.08))}
        self.note(f"{kind}: {self.way.route} by {self.way.named_by}, id {id}, {' / '.join(s.text for s in whole)}")
        try:
            answer = ask(rng.choice(self.gateways), self.way, self.name, whole, **options)
        except HungUp:
            self.given_up(id, whole, n)
            return None
        except Refused as e:
            raise Wrong(f"a turn was refused: {e}") from None
        self.took(id, whole, answer, n)
        return answer.text.strip()

    def took(self, id: str | None, talk: Talk, answer: Answer, n: int) -> None:
        """Holds what the gateway says against the rules, and what it saved against a fresh server."""
        told, raw = answer.told, self.way.raw
        on, origin = self.known.runs_on(id, talk, raw)
        self.tally.turns += 1
        self.tally.went_on += on
        self.tally.reused += on and bool(told.get("reused"))
        if (kind := told.get("conversation")) != ("goes on" if on else "new"):
            raise Wrong(f"the gateway says {kind!r}, by the rules it goes on: {on}")
        if told.get("origin") != origin.origin:
            raise Wrong(f"it ran on memory {str(told.get('origin'))[:8]}, not on {origin}")
        cut = answer.cut
        if cut is None:
            whole = self.fresher.n_tokens(talk, raw, answer.text)
            cut = told.get("tokens_written") == origin.written + whole - 1
        memory = self.saved(self.known.generation + 1)
        expected = self.fresher.after(origin, talk, raw, answer.text, cut)
        if memory.written != expected.written:
            # a token without a text is not in what was heard: the fresh server has to say it, too
            fresh = self.fresher.answer(origin, talk, raw, n)
            if fresh.text == answer.text:
                self.tally.did["unheard tokens"] += 1
                expected = fresh.memory
        self.same(memory, expected, "after a turn")
        # what the answer's own memory is by then is the origin of the next: it was just found to be right
        self.known = self.known.answered(id, talk, raw, answer.text, memory)

    def given_up(self, id: str | None, talk: Talk, n: int) -> None:
        """The session is as before, or as after the whole answer. A change that changes nothing comes after it."""
        self.tally.did["given up"] += 1
        http, until = self.rng.choice(self.gateways), time.monotonic() + PATIENCE
        reply = http.post(f"/v1/sessions/{self.name}/decay", json={"factor": 1.0}, timeout=PATIENCE)
        while reply.status_code == 503 and time.monotonic() < until:  # its server is started again
            time.sleep(0.1)
            reply = http.post(f"/v1/sessions/{self.name}/decay", json={"factor": 1.0}, timeout=PATIENCE)
        if reply.status_code in (404, 409) and self.known.generation == 0:
            return
        if reply.status_code != 200:
            raise Wrong(f"decay was refused: {reply.status_code} {reply.text[:200]}")
        more = reply.json()["generation"] - self.known.generation
        if more not in (1, 2):
            raise Wrong(f"{more} generations were saved by a turn that was given up")
        memory = self.saved(self.known.generation + more)
        if more == 2:
            self.tally.did["given up, saved"] += 1
            _, origin = self.known.runs_on(id, talk, self.way.raw)
            fresh = self.fresher.answer(origin, talk, self.way.raw, n)
            if min(fresh.margins, default=1.0) < NEAR_TIE and differ(memory, fresh.memory):
                self.tally.ties += 1
            else:
                self.same(memory, fresh.memory, "after a turn that was given up and saved")
            self.known = self.known.answered(id, talk, self.way.raw, fresh.text, memory)
        else:
            self.same(memory, self.known.newest, "after a turn that was given up")
        self.known = replace(self.known, generation=self.known.generation + 1)

    def title(self) -> None:
        """A request beside the conversation, which leaves nothing."""
        mode = self.rng.choice(("off", "read"))
        self.note(f"title, memory {mode}")
        talk = (Said("user", "what was this about?"),)
        ask(self.rng.choice(self.gateways), self.way, self.name, talk, n=4, mode=mode)
        if self.rng.random() < 0.3:
            self.same(self.saved(self.known.generation), self.known.newest, "after a title")

    def saved(self, generation: int) -> Memory:
        """What the session remembers now."""
        http = self.rng.choice(self.gateways)
        found = http.get(f"/v1/sessions/{self.name}", timeout=60).json()
        if found.get("generation") != generation:
            raise Wrong(f"generation {found.get('generation')} is saved, not {generation}: {str(found)[:200]}")
        return Memory(http.get(f"/v1/sessions/{self.name}/memory", timeout=60).content)

    def same(self, found: Memory, expected: Memory, when: str) -> None:
        if (fault := differ(found, expected)) is not None:
            raise Wrong(f"{when}: {fault}")
        self.tally.furthest = max(self.tally.furthest, distance(found, expected))

    def said(self) -> str:
        rng = self.rng
        name = rng.choice(language.NAMES)
        if rng.random() < 0.4:
            return language.question(name)
        return language.introduction(rng, name, rng.choice(language.SURNAMES))

    def note(self, what: str) -> None:
        self.log.append(what)
        self.tally.did[what.split(":")[0].split(",")[0]] += 1
