"""What the tests run in the process of a library variant, arrays and plain values out; and the random models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.native.layer import eval_layer
from llamamem.native.runtime import Context, Model, State, load_library
from llamamem.proof.fixtures import FixtureReport, check_fixtures
from llamamem.proof.model_fixtures import CaseReport, check_model_fixture

MAKE_MODEL = Path(__file__).parents[2] / "tools" / "make_model.py"


def load_variant(exact_gelu: bool) -> None:
    """What a process for one library variant starts with; here, because it is found by name in that process."""
    load_library(exact_gelu=exact_gelu)


def logits(
    base: Path, sidecar: Path | None, ids: np.ndarray, *, mode: str = "batched", untested: bool = False, **options: Any
) -> np.ndarray:
    """Logits of every id, fed from position 0 into a fresh context."""
    with Model.open(base, sidecar, mode, untested=untested) as model, _context(model, len(ids), options) as context:
        return context.decode(ids)


def logits_in_steps(base: Path, sidecar: Path | None, ids: np.ndarray, n_first: int) -> np.ndarray:
    """Logits of every id: the first ones in one batch, the others one at a time, as a server reads and answers."""
    with Model.open(base, sidecar) as model, _context(model, len(ids), {}) as context:
        out = [context.decode(ids[:n_first])]
        out += [context.decode([token], pos) for pos, token in enumerate(ids[n_first:], n_first)]
        return np.concatenate(out)


def logits_and_states(base: Path, sidecar: Path, ids: np.ndarray, **options: Any) -> tuple[np.ndarray, list[State]]:
    """The same, and the memory after the last id."""
    with Model.open(base, sidecar) as model, _context(model, len(ids), options) as context:
        return context.decode(ids), context.states()


def logits_after_kv_dropped(
    base: Path, sidecar: Path, first: np.ndarray, second: np.ndarray, path: Path, **options: Any
) -> tuple[np.ndarray, list[State]]:
    """Logits of the second ids on the memory of the first: saved alone, everything dropped, loaded, from position 0."""
    with (
        Model.open(base, sidecar) as model,
        _context(model, max(len(first), len(second)), options) as before,
        _context(model, max(len(first), len(second)), options) as after,
    ):
        before.decode(first)
        before.save_memory(path)
        after.decode(second[::-1])  # something to be dropped
        after.load_memory(path)
        return after.decode(second), after.states()


def saved_memory(base: Path, sidecar: Path, ids: np.ndarray, path: Path) -> None:
    """Writes the memory of some ids as a file of its own."""
    with Model.open(base, sidecar) as model, _context(model, len(ids), {}) as context:
        context.decode(ids)
        context.save_memory(path)


def base_refusal(base: Path, sidecar: Path) -> str:
    """Why the runtime does not give that base that sidecar; empty if it does."""
    try:
        Model.open(base, sidecar).close()
    except LlamamemError as e:
        return str(e)
    return ""


def logits_at_scale(
    base: Path, sidecar: Path, ids: np.ndarray, *, frozen: bool = False, scale: float = 1.0
) -> np.ndarray:
    """Logits with the memory's deltas multiplied, or with a memory that is not written to."""
    with Model.open(base, sidecar) as model, _context(model, len(ids), {}) as context:
        context.set_memory(frozen=frozen, scale=scale)
        return context.decode(ids)


def logits_frozen(
    base: Path, sidecar: Path, first: np.ndarray, second: np.ndarray, *, put_back: bool
) -> tuple[np.ndarray, list[State], list[State]]:
    """Logits of the second ids on the memory of the first, which is frozen, or put back after every token.

    Then the memory before and after.
    """
    with Model.open(base, sidecar) as model, _context(model, len(first) + len(second), {"n_ubatch": 1}) as context:
        context.decode(first)
        before = context.states()
        if not put_back:
            context.set_memory(frozen=True)
            return context.decode(second, len(first)), before, context.states()
        out = []
        for pos, token in enumerate(second, len(first)):
            out.append(context.decode([token], pos))
            for i, state in enumerate(before):
                context.set_state(0, i, state)
        return np.concatenate(out), before, context.states()


def continue_after(
    base: Path, sidecar: Path | None, ids: np.ndarray, n_before: int, how: str
) -> tuple[np.ndarray, np.ndarray, list[State], list[State]]:
    """Decodes n_before ids, saves, and goes on: the logits. Then loads as `how` says, and goes on again: the logits.

    `how`: `same` (into the same context, disturbed since), `other` (into another sequence), `fresh` (into another
    context) or `whole` (the whole context's state, into another context). Last, the states when saved and when loaded.
    """

    def states(context: Context, seq: int) -> list[State]:
        return context.states(seq) if sidecar else []

    options = {"n_seq_max": 2}
    before, after = ids[:n_before], ids[n_before:]
    with Model.open(base, sidecar) as model, _context(model, len(ids), options) as first:
        first.decode(before)
        saved, saved_states = first.save(None if how == "whole" else 0), states(first, 0)
        expected = first.decode(after, n_before)
        seq = 1 if how == "other" else 0
        with _context(model, len(ids), options) as second:
            context = first if how in ("same", "other") else second
            if context is second:
                context.decode(ids[::-1][: n_before // 2], seq=seq)  # something to be replaced
            context.load(saved, None if how == "whole" else seq)
            loaded_states = states(context, seq)
            return expected, context.decode(after, n_before, seq), saved_states, loaded_states


def interleaved(
    base: Path, sidecar: Path | None, prompts: list[np.ndarray], *, unified: bool
) -> tuple[list[np.ndarray], list[list[State]]]:
    """Prompts decoded together, token by token by turns in one batch: logits and memory of each."""
    n_seq = len(prompts)
    seq = np.concatenate([np.full(len(prompt), i) for i, prompt in enumerate(prompts)])
    pos = np.concatenate([np.arange(len(prompt)) for prompt in prompts])
    order = np.lexsort((seq, pos))
    n_ctx = n_seq * max(256, max(map(len, prompts)))
    with Model.open(base, sidecar) as model, Context(model, n_ctx, n_seq_max=n_seq, unified=unified) as context:
        out = context.decode(np.concatenate(prompts)[order], pos[order], seq[order])
        states = [context.states(i) for i in range(n_seq)] if sidecar else []
    return [out[seq[order] == i] for i in range(n_seq)], states


def sequence_operations(base: Path, sidecar: Path, ids: np.ndarray) -> dict[str, Any]:
    """What clear, removal, copy and keep do to the memory of two sequences."""
    result: dict[str, Any] = {}
    with Model.open(base, sidecar) as model, Context(model, 1024, n_seq_max=3) as context:
        context.decode(ids, seq=0)
        result["written"] = context.states(0)
        result["refused"] = context.seq_rm(0, len(ids) // 2, -1)
        result["after_refusal"] = context.states(0), context.seq_pos(0)[1]
        context.seq_cp(0, 1)
        result["copy"] = context.states(1)
        result["next_of_original"] = context.decode(ids[:5], len(ids), 0)
        result["next_of_copy"] = context.decode(ids[:5], len(ids), 1)
        context.decode(ids[5:9], len(ids) + 5, 1)
        result["diverged"] = context.states(0), context.states(1)
        context.seq_keep(1)
        result["kept"] = context.states(0), context.states(1)
        result["removed"] = context.seq_rm(1), context.states(1), context.seq_pos(1)
        result["again"] = context.decode(ids, seq=1)
        context.clear()
        result["cleared"] = context.states(1)
        result["zero"] = context.decode(ids, seq=0)
    return result


def set_and_get(base: Path, sidecar: Path, states: list[State], bad: list[State]) -> tuple[list[State], list[str]]:
    """The states read back after setting them, after which the bad ones are tried: read back again, and the reasons."""
    reasons = []
    with Model.open(base, sidecar) as model, Context(model, 256) as context:
        for i, state in enumerate(states):
            context.set_state(0, i, state)
        for state in bad:
            try:
                context.set_state(0, 0, state)
                reasons.append("")
            except LlamamemError as e:
                reasons.append(str(e))
        return context.states(0), reasons


def _context(model: Model, n_tokens: int, options: dict[str, Any]) -> Context:
    return Context(model, max(256, n_tokens) * options.get("n_seq_max", 1), **options)


def load_other_variant() -> None:
    """Tries to load the exact-GELU test build where the product build is loaded."""
    load_library(exact_gelu=True)


def run_layer(weights: dict[str, np.ndarray] | None, **arguments: Any) -> dict[str, np.ndarray]:
    """One layer through the compiled op."""
    return eval_layer(weights, **arguments)


def fixture_reports(path: Path, sidecar: Path | None = None) -> list[CaseReport]:
    """A whole-model fixture through the runtime, with the sidecar exported from it unless one is given."""
    return check_model_fixture(path, "native", sidecar=sidecar)


def layer_reports(paths: list[Path], atol: float) -> list[FixtureReport]:
    """Layer fixtures through the compiled op."""
    return check_fixtures(paths, ["native"], atol)


def make_model(folder: Path, preset: str, *args: str) -> tuple[Path, Path]:
    """A random base of the preset and a sidecar for it."""
    base, sidecar = folder / f"{preset}.gguf", folder / f"{preset}-memory.gguf"
    command: list[str | Path] = [
        sys.executable,
        MAKE_MODEL,
        "--preset",
        preset,
        "--output",
        base,
        "--sidecar",
        sidecar,
        *args,
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return base, sidecar
