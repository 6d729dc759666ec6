"""Moves saved memories to another rounding of the base that they were made on, with a proof that it is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar import Sidecar, read_sidecar
from llamamem.formats.sidecar.base import hash_fault
from llamamem.formats.sidecar.compare import compare
from llamamem.formats.state import MADE_BY_TOOL, MEMORY, Identity, State, identity_of
from llamamem.proof.one_model import OneModel, check_one_model
from llamamem.serving import digests

__all__ = ["Move", "prove_move", "rebase"]


@dataclass(frozen=True)
class Move:
    """From one sidecar and base to another: the adapter is the same, the bases are roundings of one model."""

    old: Identity
    new: Identity
    bases: OneModel


def prove_move(
    sidecar: str | Path,
    base: str | Path,
    to_sidecar: str | Path,
    to_base: str | Path,
    progress: Callable[[int], None] | None = None,
) -> Move:
    """Raises LlamamemError for a sidecar that is not bound to its base, and where either pair is not one model.

    `progress` is told the bytes of both bases that were compared.
    """
    old, new = _bound(Path(sidecar), Path(base)), _bound(Path(to_sidecar), Path(to_base))
    compared = compare(old.path, new.path)
    if not compared.same:
        what = [f"tensor '{d.name}': {d}" for d in compared.tensors] + [f"{d.member}: {d}" for d in compared.config]
        raise LlamamemError(
            f"{old.path} and {new.path} are not one adapter ({what[0]}); make the second with `llamamem sidecar rebind"
            f" {old.path} --base {to_base}`"
        )
    if old.base_sha256 == new.base_sha256:
        bases = OneModel(0, 0.0, "")
    else:
        bases = check_one_model(base, to_base, progress)
    return Move(identity_of(old), identity_of(new), bases)


def rebase(state: State, move: Move) -> State:
    """The memory of a state as one of the new sidecar and base; its text and KV cache, if it has them, are left out."""
    found = Identity(state.sidecar_sha256, state.base_sha256)
    if found != move.old:
        raise LlamamemError(
            f"{state.path or 'the memory'}: [state-identity] belongs to sidecar {found.sidecar_sha256} and base"
            f" {found.base_sha256}, which are not those that it is to be moved from",
            reason="state-identity",
        )
    return replace(
        state,
        sidecar_sha256=move.new.sidecar_sha256,
        base_sha256=move.new.base_sha256,
        kind=MEMORY,
        flags=MADE_BY_TOOL,
        provenance=f"rebase from={move.old.fingerprint[:12]}",
    )


def _bound(path: Path, base: Path) -> Sidecar:
    sidecar = read_sidecar(path)
    sha256 = digests.base_sha256(base)
    if sha256 != sidecar.base_sha256:
        fault = hash_fault(path, sidecar.base_sha256, base, sha256)
        raise LlamamemError(f"[{fault.reason}] {fault}", reason=fault.reason)
    return sidecar
