"""What the comparison of two conversations found: turn by turn, and where they part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llamamem.reference.attach import Fault


@dataclass(frozen=True)
class Bounds:
    """Largest differences that are rounding: of log-probabilities, and of the memory's values.

    Those of the memory are absolute while the values are at most 1, else in parts of the largest one of a layer.
    """

    logits: float
    state: float

    @classmethod
    def of(cls, exact_gelu: bool, logits: float | None = None, state: float | None = None) -> Bounds:
        """This project's own, where none is given: with an exact GELU on both sides, or the fp16 table on both."""
        default = EXACT if exact_gelu else PRODUCT
        return cls(default.logits if logits is None else logits, default.state if state is None else state)


# As the whole-model parity tests of the runtime have it.
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
    state: float = 0.0  # the larger of both as the bound has it
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
        return {name: max(getattr(turn, name) for turn in self.turns) for name in ("logits", "S", "prev", "state")}

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
        if last.ok:
            said += ", although it ends alike"
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
