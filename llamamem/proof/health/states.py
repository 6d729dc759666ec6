"""Checks of behaviour: what a saved state brings back, what a refused one leaves alone, what the memory does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llamamem.formats.state import SEQUENCE, decode_state, read_state
from llamamem.proof.health import forge
from llamamem.proof.health.evidence import Evidence, Fails
from llamamem.proof.health.slot import FIRST, NEXT, OTHER, Answer, Choices, SlotProbe
from llamamem.serving.client import encoded_memory

_HELD_OUT = "the patched runtime is not at work, or another client used the slot meanwhile: try again on a quiet server"

# Other slots in the same batch change the rounding: on a busy server the log-probabilities of equal answers part by up
# to _NOISE, and the memory must do more than _SEEN. A quiet server must give the same bits.
_NOISE = 0.25
_SEEN = 0.05


def slot_roundtrip(e: Evidence) -> str:
    slot, watch = e.slot, _Watch(e.slot)
    follow_up = _begin(slot, 8)
    saved, memory = slot.save("saved.state"), slot.take()
    state, live = read_state(saved, kinds=(SEQUENCE,)), slot.memory()
    n_saved = len(state.token_ids)
    if not state.tokens_written.any():
        raise Fails(f"{n_saved} tokens were read and none was written to the memory", _setting(live))
    undisturbed = slot.generate(follow_up, 16)

    slot.generate(slot.ids(OTHER), 8)
    if slot.take() == memory:
        raise Fails("another text leaves the memory as it was", _setting(live))
    slot.restore(saved)
    if slot.take() != memory or slot.memory() != live:
        raise Fails("the memory after the restore is not the one that was saved", _HELD_OUT)
    restored = slot.generate(follow_up, 16)
    if restored.processed >= n_saved:
        raise Fails(
            f"{restored.processed} prompt tokens were processed after {n_saved} were restored: they were thrown away",
            "stock llama.cpp does that: start the server with `llamamem serve`",
        )
    if (difference := _differs(undisturbed, restored, watch.noise)) is not None:
        raise Fails(f"after the restore the continuation differs {difference}", _HELD_OUT)
    same = "the same tokens" if watch.noise == 0 else "the same continuation, as far as a busy server tells"
    return f"{n_saved} tokens restored, {restored.processed} processed, {same}"


def corrupt_restore(e: Evidence) -> str:
    slot, watch = e.slot, _Watch(e.slot)
    undisturbed = slot.generate(_begin(slot, 1), 16)
    follow_up = _begin(slot, 1)
    cases = forge.damaged(*_saved(slot))
    _refuses(slot, cases)
    answer = slot.generate(follow_up, 16)
    if answer.processed != undisturbed.processed:
        raise Fails(f"after refused restores {answer.processed} tokens were processed, not {undisturbed.processed}")
    if (difference := _differs(undisturbed, answer, watch.noise)) is not None:
        raise Fails(f"after refused restores the continuation differs {difference}", _HELD_OUT)
    return f"{len(cases)} damaged files refused, nothing changed"


def foreign_restore(e: Evidence) -> str:
    slot = e.slot
    _begin(slot, 1)
    cases = forge.foreign(*_saved(slot))
    for case in cases:  # sound but for whose it is, or the test would prove nothing
        if case.memory_only:
            decode_state(case.data)
        else:
            path = slot.file("forged.state")
            path.write_bytes(case.data)
            read_state(path, kinds=(SEQUENCE,))
    _refuses(slot, cases)
    return f"{len(cases)} states of other models refused"


def causal(e: Evidence) -> str:
    slot, watch = e.slot, _Watch(e.slot)
    _begin(slot, 1)
    memory, token = encoded_memory(slot.take()), slot.ids(FIRST)[:1]
    setting = _setting(slot.memory())

    def first_logits(memory: str | None, **options: Any) -> Answer:
        return slot.generate(token, 1, cache_prompt=False, rwkv_ms={"memory": memory, **options})

    live, again = first_logits(memory), first_logits(memory)
    zeroed = first_logits(None)
    base = first_logits(memory, scale=0)
    noise = watch.noise
    if (difference := _differs(live, again, noise)) is not None:
        raise Fails(f"the same memory gives other logits the second time, {difference}", _HELD_OUT)
    effect, rounding = _gap(live, zeroed), max(_gap(live, again), _gap(base, zeroed))
    if live.choices == zeroed.choices or (noise > 0 and effect <= max(_SEEN, 4 * rounding)):
        raise Fails("the logits with a live memory are those with none", setting)
    if (difference := _differs(base, zeroed, noise)) is not None:
        raise Fails(
            f"with a memory that is zero the first token's logits are not the base's, {difference}",
            "does a request without a memory begin on none, and does scale 0 silence one?",
        )
    size = f"by {effect:.2g} in log-probability" if effect < float("inf") else "in most of the likeliest tokens"
    return f"live and zeroed memory part {size}, zeroed equals the base"


class _Watch:
    """Whether other slots were at work since it was made."""

    def __init__(self, slot: SlotProbe) -> None:
        self._slot, self._before = slot, slot.others()

    @property
    def noise(self) -> float:
        """Log-probability by which equal answers may part; 0 when nothing else was computed."""
        after = self._slot.others()
        return _NOISE if after != self._before or any(busy for _, busy, _ in after) else 0.0


def _begin(slot: SlotProbe, n: int) -> list[int]:
    """Reads a text in the empty slot, with n tokens of an answer; the text that goes on from there."""
    slot.erase()
    prompt = slot.ids(FIRST)
    return [*prompt, *slot.generate(prompt, n).tokens[: n - 1], *slot.ids(NEXT, special=False)]


def _saved(slot: SlotProbe) -> tuple[bytes, bytes]:
    """The whole state of the slot, and its memory alone."""
    return slot.save("good.state").read_bytes(), slot.take()


def _refuses(slot: SlotProbe, cases: tuple[forge.Forged, ...]) -> None:
    """HTTP 400 and the exact reason for each, on every way in, and the memory stays as it was."""
    before = slot.memory()
    for case in cases:
        for status, message in _tried(slot, case):
            if status == 200:
                raise Fails(f"{case.what}: was accepted, must be refused as {case.reason}", "do not load states here")
            reason = re.search(r"\[(state-[a-z-]+)\]", message)  # the first: a path may hold anything
            if status != 400 or reason is None or reason[1] != case.reason:
                raise Fails(f"{case.what}: answered {status} {message}, must be 400 [{case.reason}]")
            if slot.memory() != before:
                raise Fails(f"{case.what}: was refused, and yet the slot changed", _HELD_OUT)


def _tried(slot: SlotProbe, case: forge.Forged) -> Iterator[tuple[int, str]]:
    if case.memory_only:
        yield slot.try_memory(case.data, in_request=True)
        yield slot.try_memory(case.data, in_request=False)
        return
    path = slot.file("forged.state")
    path.write_bytes(case.data)
    yield slot.try_restore(path)


def _differs(a: Answer, b: Answer, noise: float) -> str | None:
    """Where two answers part: bit for bit without noise, else up to the first tie that the noise decides."""
    if noise == 0:
        for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
            if x != y:
                return f"at new token {i} ({x}, {y})"
    # of plain text there is a list for each token; the likeliest one need not be the token, which is plain text
    for i, (p, q) in enumerate(zip(a.choices, b.choices, strict=False)):
        gap = _parted(p, q)
        if gap > noise or (noise == 0 and p != q):
            return f"in what is likely, list {i}, by {gap:.2g} in log-probability"
        if p[0][0] != q[0][0] or a.tokens[i] != b.tokens[i]:
            break
    return None


def _gap(a: Answer, b: Answer) -> float:
    """The largest difference in log-probability at the first new token."""
    return _parted(a.choices[0], b.choices[0])


def _parted(p: Choices, q: Choices) -> float:
    """The same of two lists of the likeliest tokens; infinite when less than half of them is in both."""
    x, y = dict(p), dict(q)
    common = x.keys() & y.keys()
    if 2 * len(common) < max(len(x), len(y)):
        return float("inf")
    return max((abs(x[token] - y[token]) for token in common), default=0.0)


def _setting(memory: dict[str, Any]) -> str:
    """What to do when the memory has no effect."""
    if memory["frozen"] or memory["scale"] != 1:
        now = f"frozen {memory['frozen']}, scale {memory['scale']}"
        return f"the slot is set to {now}, although it was erased"
    return "is the sidecar a zeroed one? the memory is not connected to the graph"
