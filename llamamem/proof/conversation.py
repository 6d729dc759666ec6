"""Conversation parity: one conversation held with the PyTorch reference and with llama-server, compared turn by turn.

Both get the same token ids and choose greedily. After each turn the tokens, the log-probabilities behind each of them
and the memory of every layer are compared. Where they part, the turn is taken again token by token, and the first layer
and token that went wrong are named.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llamamem.errors import LlamamemError
from llamamem.formats.conversation import Script, Step
from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.state import State, encode_state
from llamamem.proof.conversation_native import NativeConversation, started
from llamamem.reference import language
from llamamem.reference.adapter import adapter_of
from llamamem.reference.attach import Attached, Fault, attach
from llamamem.reference.base import Base, follow, load_base
from llamamem.reference.conversation import Conversation

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_TALK = 400  # tokens of small talk a turn, at most
_FAR = 10  # times the bound: no rounding


@dataclass(frozen=True)
class Bounds:
    """Largest absolute differences that are rounding: of log-probabilities, and of the matrices and the source."""

    logits: float
    state: float

    @classmethod
    def of(cls, exact_gelu: bool, logits: float | None = None, state: float | None = None) -> Bounds:
        """This project's own, where none is given: with an exact GELU on both sides, or the fp16 table on both."""
        default = EXACT if exact_gelu else PRODUCT
        return cls(default.logits if logits is None else logits, default.state if state is None else state)


EXACT = Bounds(5e-5, 5e-6)
PRODUCT = Bounds(1.6e-2, 2e-3)


@dataclass(frozen=True)
class Turn:
    """One step of the script. Differences are absolute; those of a step that is no turn are of the memory alone."""

    step: int
    what: str
    ok: bool
    prompt_tokens: int = 0  # new ones
    new_tokens: int = 0
    text: str = ""  # the reference's answer
    tokens_equal: bool = True
    first_different: int | None = None  # of the new tokens
    logits: float = 0.0
    margin: float | None = None  # the least distance between first and second choice
    S: float = 0.0
    prev: float = 0.0
    counters_equal: bool = True
    written: int = 0  # tokens, afterwards


@dataclass(frozen=True)
class Location:
    """The first token after which a memory differs, and the lowest layer in which it does.

    `token` counts from 0 all that went through the reference, `in_step` those of the step. `what` is S, prev or
    counter; `states` are the matrices of S that differ, as [head, state].
    """

    step: int
    token: int
    in_step: int
    token_id: int
    layer: int
    what: str
    difference: float
    states: list[list[int]] = field(default_factory=list)

    def __str__(self) -> str:
        where = (
            f"layer {self.layer}, token {self.token} (id {self.token_id}, number {self.in_step} of step {self.step})"
        )
        matrices = f" in {', '.join(f'head {n} state {m}' for n, m in self.states)}" if self.states else ""
        return f"{where}: {self.what} differs by {self.difference:.2e}{matrices}"


@dataclass(frozen=True)
class Parity:
    """`location` is None when all agrees, and when the memories do although the answers do not."""

    ok: bool
    turns: list[Turn]
    bounds: Bounds
    location: Location | None = None
    injected: Fault | None = None

    @property
    def holds(self) -> bool:
        """Whether all agrees; of a conversation with a fault in it, whether the fault was found where it is."""
        if self.injected is None:
            return self.ok
        found = self.location
        return found is not None and (found.layer, found.token) == (self.injected.layer, self.injected.token)

    @property
    def largest(self) -> dict[str, float]:
        """The largest difference of each kind."""
        return {name: max(getattr(turn, name) for turn in self.turns) for name in ("logits", "S", "prev")}

    @property
    def margin(self) -> float | None:
        """The least distance between a first and a second choice, anywhere."""
        return min((turn.margin for turn in self.turns if turn.margin is not None), default=None)

    @property
    def summary(self) -> str:
        """What was found, in a few lines."""
        if self.ok:
            generated, prompt = (sum(getattr(t, n) for t in self.turns) for n in ("new_tokens", "prompt_tokens"))
            far = ", ".join(f"{name} {value:.1e}" for name, value in self.largest.items())
            said = (
                f"they agree: {len(self.turns)} steps, {prompt} + {generated} tokens, the same greedy tokens throughout"
            )
            said += f"\nlargest differences {far}; closest choice {self.margin or 0:.1e}"
            return said if self.injected is None else f"{said}\nthe injected fault makes no difference: {self.injected}"
        last = self.turns[-1]
        said = f"they part in step {last.step}"
        if not last.tokens_equal:
            said += f": another token at new token {last.first_different}"
        if self.location is not None:
            return f"{said}\n{self.location}"
        return f"{said}\nno memory differs before that: look at the base (weights, quantisation, templates)"

    def as_json(self) -> dict[str, Any]:
        found = asdict(self) | {"holds": self.holds, "largest": self.largest, "margin": self.margin}
        found["generated_tokens"] = sum(turn.new_tokens for turn in self.turns)
        found["prompt_tokens"] = sum(turn.prompt_tokens for turn in self.turns)
        return found


def standard_script(chunk: int, seed: int = 0, max_new_tokens: int = 16) -> Script:
    """A conversation of the small language that goes beyond one chunk, with everything that a script can do in it."""
    rng = random.Random(seed)
    facts = list(language.draw_facts(rng, 4).items())

    def say(text: str) -> Step:
        return Step(say=text, max_new_tokens=max_new_tokens)

    def tell(people: Sequence[tuple[str, str]]) -> Step:
        return say(" ".join(language.introduction(rng, *person) for person in people))

    ask = [say(language.question(name)) for name, _ in facts]
    steps = [tell(facts[:2]), ask[0], say(language.small_talk(rng, 48)), Step(save="early"), tell(facts[2:])]
    talked = 0
    while talked < chunk:
        steps.append(say(language.small_talk(rng, min(_TALK, chunk - talked))))
        talked += _TALK
    steps += [ask[2], Step(park=True), ask[3], Step(save="late")]
    steps += [Step(resume="late"), ask[1], say(language.small_talk(rng, 40)), ask[2]]
    steps += [Step(reset=True), ask[0], tell(facts[1:3]), Step(resume="early"), ask[1], Step(park=True), ask[0]]
    return Script(steps=tuple(steps))


def compare(
    base: Base,
    memory: Attached,
    native: NativeConversation,
    script: Script,
    bounds: Bounds,
    show: Callable[[Turn], None] = lambda turn: None,
) -> Parity:
    """Holds the conversation with both and compares; ends at the first step that does not agree.

    `memory` is attached to `base`. Raises LlamamemError when the two cannot be compared: other sidecars, other chat
    templates or tokenizers, a server that somebody else uses.
    """
    if memory.adapter.identity != native.identity:
        raise LlamamemError("the server serves another sidecar or base than the reference has; attach the same sidecar")
    run = _Run(base, memory, native, bounds)
    turns: list[Turn] = []
    location = None
    for i, step in enumerate(script.steps):
        turn, back = run.step(i, step)
        turns.append(turn)
        show(turn)
        if not turn.ok:
            location = None if back is None else run.locate(i, back)
            break
    injected = memory.faults[0] if memory.faults else None
    return Parity(all(turn.ok for turn in turns), turns, bounds, location, injected)


def hold(
    base: str,
    model: Path,
    sidecar: Path,
    *,
    script: Script | None = None,
    profile: str = "serial",
    ctx_size: int = 4096,
    exact_gelu: bool = False,
    dtype: str = "float32",
    bounds: Bounds | None = None,
    inject: Fault | None = None,
    bin_dir: Path | None = None,
    show: Callable[[Turn], None] = lambda turn: None,
) -> Parity:
    """Loads the reference, starts a server of its own, and compares them over a script (None: standard_script).

    `base` is the Hugging Face form of `model`. The reference's GELU is that of the server: exact, or ggml's table.
    """
    memory_of = read_sidecar(sidecar)
    reference = load_base(base, dtype=dtype, gelu="exact" if exact_gelu else "ggml")
    memory = attach(reference.model, adapter_of(memory_of))
    memory.faults = [] if inject is None else [inject]
    if inject is not None and inject.layer not in memory.adapter.layers:
        layers = ", ".join(map(str, memory.adapter.layers))
        raise LlamamemError(f"--inject: layer {inject.layer} has no memory; those that have: {layers}")
    script = script or standard_script(memory_of.chunk)
    with (
        tempfile.TemporaryDirectory(prefix="llamamem-parity-") as scratch,
        started(
            model,
            sidecar,
            Path(scratch),
            profile=profile,
            ctx_size=ctx_size,
            exact_gelu=exact_gelu,
            bin_dir=bin_dir,
        ) as (client, slots),
    ):
        native = NativeConversation(client, slots)
        return compare(reference, memory, native, script, bounds or Bounds.of(exact_gelu), show)


class _Run:
    """Both sides, and what was said since the text began."""

    def __init__(self, base: Base, memory: Attached, native: NativeConversation, bounds: Bounds):
        self.base, self.memory, self.native, self.bounds = base, memory, native, bounds
        self.reference = Conversation(base, memory)
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []  # of the text, the last one not through the model yet
        self.fed: list[int] = []  # what went through in the last turn
        self.saved: dict[str, tuple[bytes, bytes]] = {}  # the reference's file and the server's
        self.ban = frozenset(i for token, i in base.tokenizer.get_vocab().items() if _BYTE.fullmatch(token)) - base.stop
        self.layers = list(memory.adapter.layers)

    def step(self, i: int, step: Step) -> tuple[Turn, Callable[[], None] | None]:
        """Does it on both sides; how to take it back is None for a step that is no turn."""
        if step.say is not None:
            return self._say(i, step, step.say)
        if step.reset:
            self.reference.reset()
            self.native.reset()
            self.messages, self.ids = [], []
        elif step.park:
            self.reference.restore(self.reference.snapshot())
            self.native.park()
        elif step.save is not None:
            data = encode_state(self.memory.export_state(self.native.identity))
            self.saved[step.save] = (data, self.native.save().read_bytes())
        elif step.resume is not None:
            ours, theirs = self.saved[step.resume]
            self.reference.load_bytes(theirs, self.native.identity)  # each goes on with what the other one wrote
            self.native.resume(ours)
            self.messages, self.ids = [], []
        return Turn(i, str(step), **self._memory()), None

    def _say(self, i: int, step: Step, text: str) -> tuple[Turn, Callable[[], None]]:
        prompt = self._prompt(text)
        reference_back, native_back = self.reference.snapshot(), self.native.mark()
        n_before = len(self.reference.tokens)

        def back() -> None:
            self.reference.restore(reference_back)
            native_back()

        answer = self.reference.answer(prompt, step.max_new_tokens, ban=self.ban)
        got, found = self.native.answer(prompt, step.max_new_tokens, self.ban, self.base.vocabulary)
        first = next((k for k, (a, b) in enumerate(zip(answer.ids, got, strict=False)) if a != b), None)
        if first is None and len(answer.ids) != len(got):
            first = min(len(answer.ids), len(got))
        compared = min(len(got), len(answer.ids)) if first is None else first + 1
        ours = torch.log_softmax(answer.logits[:compared], dim=-1).numpy()
        # what is as good as impossible is compared as such: of it, -40 and -60 are the same
        apart = np.abs(np.maximum(ours, -40) - np.maximum(found[:compared], -40))
        logits = float(np.nanmax(apart, initial=0.0))
        state = self._memory() if first is None else {"ok": False}
        turn = Turn(
            i,
            str(step),
            prompt_tokens=len(prompt) - n_before,
            new_tokens=len(answer.ids),
            text=self.base.text(answer.shown),
            tokens_equal=first is None,
            first_different=first,
            logits=logits,
            margin=self._margin(answer.logits),
            **(state | {"ok": bool(state["ok"]) and logits <= self.bounds.logits}),
        )
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": turn.text}]
        self.ids = [*prompt, *answer.ids]
        self.fed = [*prompt[n_before:], *(got if first is None else got[: first + 1])][:-1]
        return turn, back

    def _prompt(self, text: str) -> list[int]:
        """The ids of the text so far and of what is new, made by both sides; they must be the same."""
        messages = [*self.messages, {"role": "user", "content": text}]
        end = self.base.end_of(self.ids)
        ours, theirs = follow(self.base.prompt_text, messages, end), follow(self.native.prompt_text, messages, end)
        start = "" if self.ids else self.base.tokenizer.bos_token or ""  # the server leaves it to its tokenizer
        if ours.removeprefix(start) != theirs.removeprefix(start):
            raise LlamamemError(f"the chat templates differ: the reference's gives {ours!r}, the server's {theirs!r}")
        our_ids, their_ids = self.base.tokenize(ours, special=True), self.native.tokenize(theirs, start=not self.ids)
        if our_ids != their_ids:
            raise LlamamemError(f"the tokenizers differ on {ours!r}: {our_ids} here, {their_ids} in the server")
        return [*self.ids, *our_ids]

    def _memory(self) -> dict[str, Any]:
        """How far the memories are apart."""
        ours, theirs = self.memory.export_state(self.native.identity), self.native.memory()
        S, prev = float(np.abs(ours.S - theirs.S).max()), float(np.abs(ours.prev - theirs.prev).max())
        same = bool((ours.tokens_written == theirs.tokens_written).all())
        return {
            "ok": same and max(S, prev) <= self.bounds.state,
            "S": S,
            "prev": prev,
            "counters_equal": same,
            "written": int(theirs.tokens_written.max()),
        }

    def _margin(self, logits: torch.Tensor) -> float | None:
        allowed = logits.index_fill(1, torch.tensor(sorted(self.ban), dtype=torch.long), -torch.inf)
        best = allowed.topk(2, dim=-1).values
        return float((best[:, 0] - best[:, 1]).min()) if len(best) else None

    def locate(self, i: int, back: Callable[[], None]) -> Location | None:
        """Takes the last turn again, token by token, up to the first one after which the memories differ.

        Token by token, sums are taken in another order than in the turn; so what is far beyond the bound goes before
        what is just above it.
        """
        back()
        near = None
        for k, token in enumerate(self.fed):
            at = next(iter(self.memory.seen.values()))
            self.reference.feed([token])
            self.native.feed(token)
            ours, theirs = self.memory.export_state(self.native.identity), self.native.memory()
            for row, layer in enumerate(self.layers):
                if (wrong := _difference(ours, theirs, row, _FAR * self.bounds.state)) is not None:
                    return Location(i, at, k, token, layer, *wrong)
                if near is None and (wrong := _difference(ours, theirs, row, self.bounds.state)) is not None:
                    near = Location(i, at, k, token, layer, *wrong)
        return near


def _difference(ours: State, theirs: State, row: int, bound: float) -> tuple[str, float, list[list[int]]] | None:
    """What differs in one layer by more than a bound: Location's last three."""
    counts = int(abs(ours.tokens_written[0, row] - theirs.tokens_written[0, row]))
    if counts:
        return "counter", float(counts), []
    S, prev = np.abs(ours.S[0, row] - theirs.S[0, row]), np.abs(ours.prev[0, row] - theirs.prev[0, row])
    if S.max() > bound:
        return "S", float(S.max()), np.argwhere(S.max(axis=(-1, -2)) > bound).tolist()
    if prev.max() > bound:
        return "prev", float(prev.max()), []
    return None
