"""Takes steps on a server and holds every answer, and every memory, against a fresh computation of the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from entitled.draw import Draw
from entitled.fresh import NEAR_TIE, Fresh, Reference
from entitled.memory import EMPTY, PLAIN, Memory, Setting, differ, distance, text_hash
from entitled.oracle import Oracle, Own, Run
from entitled.routes import Ask, Said, answers, body_of, rendered
from entitled.steps import Action, Continue, Look, Poison, Refused, Sleep, Step, Together, WhileBusy
from entitled.wire import NoAnswer, Reply


class Wrong(Exception):
    """An answer or a memory that is not the one it must be."""


@dataclass
class Tally:
    """How many checks of which kind; a check may be of several kinds."""

    checks: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    read: int = 0  # prompt tokens
    reused: int = 0
    furthest: float = 0.0  # of a memory that is the right one, in units of what rounding may do

    def add(self, *kinds: str) -> None:
        self.checks += 1
        self.kinds.update(kinds)


class Driver:
    """`take` takes one step and raises Wrong. `draw`, where there is one, learns from the answers."""

    def __init__(
        self, server: Any, reference: Reference, oracle: Oracle, tally: Tally, draw: Draw | None = None
    ) -> None:
        self.server, self.reference, self.oracle, self.tally, self.draw = server, reference, oracle, tally, draw
        self.strange: set[int] = set()  # slots that may hold another text than their own, since somebody else ran there
        self.strangers: list[tuple[Setting, tuple[int, ...]]] = []  # the last texts on no memory

    def take(self, step: Step) -> None:
        try:
            if isinstance(step, Ask):
                self._asked([step])
            elif isinstance(step, Together):
                self._asked(step.asks)
            elif isinstance(step, Action):
                if self._possible(step):
                    self._acted(step, self.server.call("POST", *self._request(step)))
            elif isinstance(step, Continue):
                self._continued(step)
            elif isinstance(step, WhileBusy):
                self._while_busy(step)
            elif isinstance(step, Refused):
                reply = self.server.call("POST", step.path, dict(step.body))
                self._expect(reply.status == 400, f"answered {reply.status}, not 400: {reply.body}")
                self.tally.add("refused, and nothing changed")
            elif isinstance(step, Poison):
                self._poisoned(step.ask)
            elif isinstance(step, Look):
                self.look()
            else:
                assert isinstance(step, Sleep)
                self.server.wait(1.8)
                self.look("after a sleep")
        except (NoAnswer, KeyError, IndexError, TypeError, ValueError) as e:
            raise Wrong(f"{type(e).__name__}: {e}") from e

    # -- requests

    def _asked(self, asks: Sequence[Ask]) -> None:
        """Sends them all before the first answer is waited for."""
        many = len(asks) > 1
        sent = [(ask, self.oracle.run_of(ask), self._begin(ask)) for ask in asks]
        for ask, _, pending in sent:
            if ask.cancel_after is not None:
                pending.events(ask.cancel_after)
                pending.close()
        for ask, run, pending in sent:
            if ask.cancel_after is None:
                self._answered(ask, run, pending.result(), many)
            elif run.names_slot:
                self._cancelled(ask, run)
            else:
                self._fresh(ask, run)
        for ask, run, _ in sent:
            if not run.names_slot:
                self.strange |= (
                    {ask.slot} if ask.slot is not None and ask.slot >= 0 else set(range(self.oracle.n_slots))
                )

    def _begin(self, ask: Ask) -> Any:
        return self.server.begin("POST", ask.route, body_of(ask, self._ids(ask)))

    def _ids(self, ask: Ask) -> tuple[int, ...]:
        return self.reference.ids(rendered(ask.text))

    def _fresh(self, ask: Ask, run: Run) -> Fresh:
        ids = self._ids(ask)
        fresh = self.reference.answer(run.origin, run.setting, ids, ask.n_predict, ignore_eos=ask.ignore_eos)
        if not run.origin.origin:
            self.strangers = [*self.strangers, (run.setting, (*fresh.ids, *fresh.tokens[-1:]))][-40:]
        return fresh

    def _answered(self, ask: Ask, run: Run, reply: Reply, many: bool) -> None:
        if reply.error and ask.n > 1 and self._taken(ask) + ask.n > self.oracle.n_slots:
            self.tally.add("n refused for want of slots")
            return
        self._expect(not reply.error and reply.status == 200, f"refused ({reply.status}): {reply.error}")
        said = answers(ask, reply)
        self._expect(len(said) == ask.n, f"{len(said)} answers instead of {ask.n}")
        fresh = self._fresh(ask, run)
        for i, one in enumerate(said):
            found = self._judge(ask, run, one, fresh)
            if i == 0:
                kept = found
        if run.names_slot:
            slot = int(ask.slot or 0)
            self.oracle.own[slot] = self.oracle.own[slot].after(run.setting, kept.ids)
            (self.strange.add if run.setting.frozen else self.strange.discard)(slot)
        kinds = [
            "memory of the slot" if run.names_slot else "memory in the request" if run.origin.origin else "no memory"
        ]
        kinds += [f"answer of {ask.route}"]
        kinds += ["frozen"] if run.setting.frozen else []
        kinds += ["scaled"] if run.setting.scale != 1 else []
        kinds += ["n > 1"] if ask.n > 1 else []
        kinds += ["streamed"] if ask.stream else []
        kinds += ["at the same time as others"] if many else []
        kinds += ["memory returned"] if said[0].memory else []
        self.tally.add(*kinds)
        if self.draw:
            self.draw.remember(ask, said[0].text)

    def _taken(self, ask: Ask) -> int:
        """Slots that were given a memory, and so are nobody else's."""
        return sum(own.given is not False for k, own in enumerate(self.oracle.own) if k != ask.slot)

    def _judge(self, ask: Ask, run: Run, said: Said, fresh: Fresh) -> Fresh:
        """Compares one answer; returns the fresh computation of what was really said, which a near tie may change."""
        report = said.rwkv_ms
        if ask.settles and ask.n == 1:
            self._expect(report is not None, "the last object has no rwkv_ms")
            assert report is not None
            self._expect(report["origin"] == run.origin.origin, f"ran on {report['origin']}, not on {run.origin}")
        same = said.tokens == fresh.tokens if said.tokens is not None else said.text.strip() == fresh.text.strip()
        if not same:
            fresh = self._near_tie(ask, run, said, fresh)
        if report is None:
            return fresh
        n_prompt = len(self._ids(ask))
        self.tally.read, self.tally.reused = self.tally.read + n_prompt, self.tally.reused + int(report["reused"])
        self._expect(0 <= report["reused"] <= n_prompt, f"reused {report['reused']} of {n_prompt} tokens")
        written = fresh.memory.written
        self._expect(report["tokens_written"] == written, f"{report['tokens_written']} tokens written, not {written}")
        self._expect(ask.return_memory == ("memory" in report), "a memory is returned if and only if it is asked for")
        if (memory := said.memory) is not None:
            self._same(memory, fresh.memory, "the returned memory")
            if self.draw:
                self.draw.keep(memory)
        return fresh

    def _near_tie(self, ask: Ask, run: Run, said: Said, fresh: Fresh) -> Fresh:
        """Other words are right only from where the reference itself was all but undecided."""
        tokens = said.tokens if said.tokens is not None else self.reference.ids(said.text)
        at = next((i for i, (a, b) in enumerate(zip(tokens, fresh.tokens, strict=False)) if a != b), None)
        at = min(len(tokens), len(fresh.tokens)) if at is None else at
        margin = fresh.margins[at] if at < len(fresh.margins) else 0.0
        told = f"said {said.text[:80]!r}, not {fresh.text[:80]!r} (token {at}, margin {margin:.3f})"
        self._expect(margin < NEAR_TIE, f"{told}{self._whose(ask, said)}")
        self.tally.kinds["near ties, not counted"] += 1
        ids = (*self._ids(ask), *tokens)
        # the last token is not written; an end of turn after it is not told, but what was written is
        if said.rwkv_ms and not run.setting.frozen:
            ids = ids[: said.rwkv_ms["tokens_written"] - run.origin.written]
        else:
            ids = ids[:-1] if len(tokens) == ask.n_predict else ids
        return replace(fresh, text=said.text, ids=ids, memory=self.reference.memory(run.origin, run.setting, ids))

    def _whose(self, ask: Ask, said: Said) -> str:
        """For a wrong answer: on whose memory it is the right one."""
        known = [own.origin for own in self.oracle.own] + (self.draw.memories if self.draw else []) + [EMPTY]
        for origin in known:
            if self.reference.answer(origin, PLAIN, self._ids(ask), ask.n_predict).text.strip() == said.text.strip():
                return f"; that is what {origin} says"
        return ""

    def _cancelled(self, ask: Ask, run: Run) -> None:
        """The prompt, of which an answer was seen, and whatever the slot said until it noticed, are its text now."""
        slot = int(ask.slot or 0)
        fresh = self._fresh(ask, run)
        saved = self._saved(slot, {"return_memory": True})
        own = self.oracle.own[slot]
        if run.setting.frozen:
            self._is_own(slot, saved)
            self.strange.add(slot)
            self.tally.add("cancelled midway")
            return
        text = (*fresh.ids, *fresh.tokens[-1:])[: saved["n_text"]]
        if saved["text"] == text_hash(text) and len(text) >= len(self._ids(ask)):
            own = own.after(run.setting, text)
        elif min(fresh.margins) < NEAR_TIE:  # and what it said from there on nobody has seen
            self._acted(reset := Action(slot, "memory-reset"), self.server.call("POST", *self._request(reset)))
            return
        self.oracle.own[slot] = own
        self._is_own(slot, saved)
        self.strange.discard(slot)
        self.tally.add("cancelled midway")

    def _poisoned(self, ask: Ask) -> None:
        reply = self.server.call("POST", ask.route, body_of(ask, self._ids(ask)))
        self._expect(not reply.error or "state-values" in reply.error, f"refused for another reason: {reply.error}")
        self.strange |= set(range(self.oracle.n_slots))
        plain = Ask("/completion", ask.text, 4, slot=ask.slot, memory=None, return_memory=True)
        self._asked([plain])
        self.tally.add("huge values, and the next one right")

    # -- slot actions

    def _possible(self, step: Action) -> bool:
        """Whether its file is there: in a history that was shortened, the step that saved it may be missing."""
        name = str(step.body.get("filename"))
        if step.action == "restore":
            return name in self.oracle.slot_files
        return step.action != "memory-restore" or step.memory is not None or name in self.oracle.memories

    def _request(self, step: Action) -> tuple[str, dict[str, Any]]:
        return f"/slots/{step.slot}?action={step.action}", step.body

    def _acted(self, step: Action, reply: Reply) -> None:
        if step.action == "save" and step.slot in self.strange and reply.status == 409 and "[slot-text]" in reply.error:
            self.tally.add("save of a text that is not there")
            return
        self._expect(reply.status == 200, f"refused ({reply.status}): {reply.error}")
        oracle, slot, body = self.oracle, step.slot, step.body
        own, name = oracle.own[slot], str(body.get("filename", ""))
        self._expect(reply.body["id_slot"] == slot, f"done to slot {reply.body['id_slot']}")
        if step.action == "memory-save":
            self._saved_as(slot, name or None, reply.body)
        elif step.action == "memory-restore":
            memory = step.memory or oracle.memories[name]
            oracle.restored(slot, memory)
            self._expect(reply.body["tokens_written"] == memory.written, f"{reply.body}, not {memory.written} tokens")
        elif step.action in ("memory-reset", "erase"):
            oracle.emptied(slot)
        elif step.action == "memory-set":
            oracle.told(slot, own.setting.under(body.get("frozen"), body.get("scale")))
        elif step.action == "save":
            if slot in self.strange:
                oracle.slot_files.pop(name, None)  # as in stock: what the slot holds, whoever it is
                self.tally.kinds["slot files of others, not counted"] += 1
            else:
                oracle.slot_files[name] = own
        elif step.action == "restore":
            oracle.slot_restored(slot, oracle.slot_files[name])
            self._is_own(slot, self._saved(slot, {"return_memory": True}))
        if step.action != "save":
            self.strange.discard(slot)
        self.tally.add(step.action)

    def _saved(self, slot: int, body: dict[str, Any]) -> dict[str, Any]:
        reply = self.server.call("POST", f"/slots/{slot}?action=memory-save", body)
        self._expect(reply.status == 200, f"memory-save of slot {slot} refused ({reply.status}): {reply.error}")
        saved: dict[str, Any] = reply.body
        return saved

    def _saved_as(self, slot: int, name: str | None, saved: dict[str, Any]) -> None:
        """Holds a save against the slot's own memory, and knows its file from now on."""
        if name is not None:
            memory = Memory(self.server.file(name))
            saved = {**saved, "memory": memory.base64}
            self._expect(saved["filename"] == name, f"saved as {saved['filename']}")
        memory = self._is_own(slot, saved)
        if name is not None:
            self.oracle.memories[name] = memory
        if self.draw:
            self.draw.keep(memory)

    def _is_own(self, slot: int, saved: dict[str, Any]) -> Memory:
        own = self.oracle.own[slot]
        if self._is_open(slot):
            own = self._strangers_own(slot, saved)
        for field_, value in own.continues.items():
            self._expect(
                saved[field_] == value, f"slot {slot}: {field_} is {saved[field_]}, not {value} ({own.origin})"
            )
        memory, expected = Memory.of(saved["memory"]), self._expected(own)
        self._same(memory, expected, f"the memory saved of slot {slot}")
        told = (saved["tokens_written"], saved["n_bytes"])
        self._expect(told == (expected.written, len(memory.data)), f"slot {slot}: says {told} of tokens and bytes")
        return memory

    def _expected(self, own: Own) -> Memory:
        return self.reference.memory(own.origin, own.read, own.text)

    def _is_open(self, slot: int) -> bool:
        """Whether nobody has named the slot and somebody ran there: it shows a text on no memory, or none."""
        return slot in self.strange and not self.oracle.own[slot].named

    def _strangers_own(self, slot: int, saved: dict[str, Any]) -> Own:
        for setting, ids in [*self.strangers[::-1], (PLAIN, ())]:
            if saved["text"] == text_hash(text := ids[: saved["n_text"]]):
                own = Own(text=text, read=setting)
                if differ(Memory.of(saved["memory"]), self._expected(own)) is None:
                    return own
        raise Wrong(f"slot {slot}, which nobody named, has a text of {saved['n_text']} that nobody said on no memory")

    def _continued(self, step: Continue) -> None:
        own = self.oracle.own[step.slot]
        if self._is_open(step.slot):
            return
        n = round(step.share * len(own.text))
        says = {"origin": own.origin.origin, "n_text": n, "text": text_hash(own.text[:n])}
        if step.wrong == "another origin":
            says["origin"] = "0" * 64 if own.origin.origin is None else None
        elif step.wrong == "another text":
            n = max(1, n)
            last = 5 if own.text[n - 1 : n] != (5,) else 6
            says |= {"n_text": n, "text": text_hash((*own.text[: n - 1], last))}
        elif step.wrong == "more text":
            says |= {"n_text": len(own.text) + 1, "text": text_hash((*own.text, 5))}
        elif step.wrong == "an older text":
            says |= {"n_text": len(own.text) + 3, "text": text_hash((2, *own.text, 7, 8))}
        old = self.oracle.memories.get(step.filename or "")
        body = {"continues": says} | ({"filename": step.filename} if step.filename else {"return_memory": True})
        reply = self.server.call("POST", f"/slots/{step.slot}?action=memory-save", body)
        if step.wrong is None:
            self._expect(reply.status == 200, f"refused ({reply.status}): {reply.error}")
            self._saved_as(step.slot, step.filename, reply.body)
            self.tally.add("a save that continues")
            return
        refused = reply.status == 409 and "[state-continues]" in reply.error
        self._expect(refused, f"a save that does not continue is answered {reply.status}: {reply.error}")
        if old is not None:
            self._expect(self.server.file(step.filename) == old.data, "a refused save changed its file")
        self.tally.add("a save that does not continue")

    def _while_busy(self, step: WhileBusy) -> None:
        """The action comes between the request that runs and the one that was sent after it."""
        if not self._possible(step.action):
            return
        before_run = self.oracle.run_of(step.before)
        before = self._begin(step.before)
        before.first()
        path, body = self._request(step.action)
        acting = self.server.begin("POST", path, body | ({"timeout": 0.05} if step.how == "in time" else {}))
        self.server.wait(0.03)
        if step.how == "hangs up":
            acting.close()
            self.server.wait(0.03)
            undone = not before.ended()  # else the action may have had its turn
            self._answered(step.before, before_run, before.result(), True)
            if undone:
                self._look_at(step.action.slot)
                self.tally.add("an action given up")
            else:
                self._acted(step.action, self.server.call("POST", path, body))
            self._asked([step.after])
            return
        # sent at once: the server has both before it can answer either
        after = self._begin(step.after) if step.how == "waits" else None
        self._answered(step.before, before_run, before.result(), True)
        reply = acting.result()
        if step.how == "in time" and reply.status == 409:
            self._expect("[slot-busy]" in reply.error, f"refused for another reason: {reply.error}")
            self._look_at(step.action.slot)
            self.tally.add("an action out of time")
        else:
            self._acted(step.action, reply)
        run = self.oracle.run_of(step.after)
        self._answered(step.after, run, (after or self._begin(step.after)).result(), True)
        self.tally.add("an action for a busy slot")

    # -- slots as they say they are

    def look(self, when: str = "") -> None:
        for slot in range(self.oracle.n_slots):
            self._look_at(slot)
            self.tally.kinds.update([when] if when else [])

    def _look_at(self, slot: int) -> None:
        own = self.oracle.own[slot]
        memory = self._is_own(slot, self._saved(slot, {"return_memory": True}))
        said = self.server.call("GET", "/slots").body[slot]["rwkv_ms"]
        expected: dict[str, Any] = own.setting._asdict()
        if not self._is_open(slot):
            expected |= {"tokens_written": memory.written, **own.continues}
        expected |= {} if own.given is None else {"given": own.given}
        for name, value in expected.items():
            self._expect(said[name] == value, f"/slots says {name} {said[name]} of slot {slot}, not {value}")
        self.tally.add("the slot's own memory")

    # -- small things

    def _same(self, found: Memory, expected: Memory, what: str) -> None:
        if fault := differ(found, expected):
            raise Wrong(f"{what}: {fault}")
        self.tally.furthest = max(self.tally.furthest, distance(found, expected))

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Wrong(otherwise)
