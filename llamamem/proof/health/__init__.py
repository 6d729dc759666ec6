"""Health: a proof by behaviour that the memory of a running server is live, complete, isolated and restorable."""

from __future__ import annotations

from llamamem.proof.health.evidence import Evidence, Fails
from llamamem.proof.health.table import CHECKS, Row, check_health
from llamamem.proof.health.target import Target, find_target, target_of

__all__ = ["CHECKS", "Evidence", "Fails", "Row", "Target", "check_health", "find_target", "target_of"]
