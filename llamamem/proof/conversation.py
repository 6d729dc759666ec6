"""Conversation parity: one conversation held with the PyTorch reference and with llama-server, compared turn by turn.

Both get the same token ids and choose greedily. After each turn the tokens, the log-probabilities behind each of them
and the memory of every layer are compared. Where they part, the turn is taken again token by token, and the first layer
and token that went wrong are named.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from llamamem.errors import LlamamemError
from llamamem.formats.conversation import Script, Step
from llamamem.formats.sidecar import read_sidecar
from llamamem.formats.sidecar.layout import DELTA_RULE
from llamamem.formats.state import State, encode_state
from llamamem.proof.conversation_native import NativeConversation, started
from llamamem.proof.conversation_report import Bounds, Location, Parity, Turn
from llamamem.reference import language
from llamamem.reference.adapter import adapter_of
from llamamem.reference.attach import Attached, Fault, attach
from llamamem.reference.base import Base, follow, load_base
from llamamem.reference.conversation import Conversation

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # of a token that is a part of a character
_TALK = 400  # tokens of small talk a turn, at most
_FAR = 5  # times the bound: no rounding


def standard_script(chunk: int, seed: int = 0, max_new_tokens: int = 16) -> Script:
    """A conversation of the small language that goes beyond `chunk` tokens, and has all that a script can do in it."""
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
    *,
    every_token: bool = False,
    show: Callable[[Turn], None] = lambda turn: None,
) -> Parity:
    """Holds the conversation with both and compares; ends at the first step that does not agree.

    What went wrong with one token may be forgotten before its turn ends, and without a trace in the answer: with
    `every_token` each turn is taken twice, the second time with a look at the memories after every token.

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
        if back is not None and (every_token or not turn.ok):
            location = run.locate(turn, back)
        if location is not None or not turn.ok:
            break
    injected = memory.faults[0] if memory.faults else None
    ok = location is None and all(turn.ok for turn in turns)
    return Parity(ok, turns, bounds, location, injected)


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
    every_token: bool = False,
    inject: Fault | None = None,
    bin_dir: Path | None = None,
    show: Callable[[Turn], None] = lambda turn: None,
) -> Parity:
    """Loads the reference, starts a server of its own, and compares them over a script (None: standard_script).

    `base` is the Hugging Face form of `model`: its config and tokenizer. The weights are the GGUF's, dequantised. The
    reference's GELU is that of the server: exact, or ggml's table.
    """
    memory_of = read_sidecar(sidecar)
    reference = load_base(base, weights=model, dtype=dtype, gelu="exact" if exact_gelu else "ggml")
    memory = attach(reference.model, adapter_of(memory_of))
    memory.faults = [] if inject is None else [inject]
    if inject is not None and inject.kind != "skip-write" and memory.adapter.kind == DELTA_RULE:
        raise LlamamemError(f"--inject {inject.kind}: a delta rule has no previous source and no chunks; skip-write")
    if inject is not None and inject.layer not in memory.adapter.layers:
        layers = ", ".join(map(str, memory.adapter.layers))
        raise LlamamemError(f"--inject: layer {inject.layer} has no memory; those that have: {layers}")
    script = script or standard_script(_TALK if memory_of.kind == DELTA_RULE else memory_of.chunk)
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
        return compare(
            reference, memory, native, script, bounds or Bounds.of(exact_gelu), every_token=every_token, show=show
        )


class _Run:
    """Both sides, and what was said since the text began."""

    def __init__(self, base: Base, memory: Attached, native: NativeConversation, bounds: Bounds):
        self.base, self.memory, self.native, self.bounds = base, memory, native, bounds
        self.reference = Conversation(base, memory)
        self.messages: list[dict[str, str]] = []
        self.ids: list[int] = []  # of the text, the last one not through the model yet
        self.fed: list[int] = []  # what went through in the last turn
        self.saved: dict[str, tuple[bytes, bytes]] = {}  # the reference's file and the server's
        self.ban = frozenset(i for i in range(len(base.tokenizer)) if _BROKEN in base.tokenizer.decode([i])) - base.stop
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
            self.saved[step.save] = (data, self.native.save())
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
        layers = [_apart(ours, theirs, row) for row in range(len(self.layers))]
        same = bool((ours.tokens_written == theirs.tokens_written).all())
        state = max(max(apart.S.max(), apart.prev.max(initial=0.0)) for apart in layers)
        return {
            "ok": same and float(state) <= self.bounds.state,
            "S": float(np.abs(ours.S - theirs.S).max()),
            "prev": float(np.abs(ours.prev - theirs.prev).max(initial=0.0)),
            "state": float(state),
            "counters_equal": same,
            "written": int(theirs.tokens_written.max()),
        }

    def _margin(self, logits: torch.Tensor) -> float | None:
        allowed = logits.index_fill(1, torch.tensor(sorted(self.ban), dtype=torch.long), -torch.inf)
        best = allowed.topk(2, dim=-1).values
        return float((best[:, 0] - best[:, 1]).min()) if len(best) else None

    def locate(self, turn: Turn, back: Callable[[], None]) -> Location | None:
        """Takes the last turn again, token by token, up to the first one after which the memories differ.

        Token by token, sums are taken in another order than in the turn: what is just above the bound is rounding,
        unless the turn itself ended with such a difference.
        """
        back()
        near = None
        ended_apart = not turn.counters_equal or turn.state > self.bounds.state
        for k, token in enumerate(self.fed):
            at = next(iter(self.memory.seen.values()))
            self.reference.feed([token])
            self.native.feed(token)
            ours, theirs = self.memory.export_state(self.native.identity), self.native.memory()
            for row, layer in enumerate(self.layers):
                if (wrong := _difference(ours, theirs, row, _FAR * self.bounds.state)) is not None:
                    return Location(turn.step, at, k, token, layer, *wrong)
                if near is None and (wrong := _difference(ours, theirs, row, self.bounds.state)) is not None:
                    near = Location(turn.step, at, k, token, layer, *wrong)
        return near if ended_apart else None


class _Apart(NamedTuple):
    """Differences in one layer: absolute while its values are at most 1, else in parts of the largest of its kind."""

    S: np.ndarray
    prev: np.ndarray
    counter: int


def _apart(ours: State, theirs: State, row: int) -> _Apart:
    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(a - b) / max(1.0, float(np.abs(b).max(initial=0.0))))

    counter = int(abs(ours.tokens_written[0, row] - theirs.tokens_written[0, row]))
    return _Apart(apart(ours.S[0, row], theirs.S[0, row]), apart(ours.prev[0, row], theirs.prev[0, row]), counter)


def _difference(ours: State, theirs: State, row: int, bound: float) -> tuple[str, float, list[list[int]]] | None:
    """What differs in one layer by more than a bound: Location's last three."""
    apart = _apart(ours, theirs, row)
    if apart.counter:
        return "counter", float(apart.counter), []
    if apart.S.max() > bound:
        return "S", float(apart.S.max()), np.argwhere(apart.S.max(axis=(-1, -2)) > bound).tolist()
    if (prev := float(apart.prev.max(initial=0.0))) > bound:
        return "prev", prev, []
    return None
