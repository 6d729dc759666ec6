"""What the checks look at: files, and what a server says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from llamamem.errors import LlamamemError
from llamamem.formats.sidecar import Sidecar, read_sidecar
from llamamem.formats.state import Identity
from llamamem.formats.trace import Trace
from llamamem.proof.health.slot import SlotProbe
from llamamem.proof.health.target import Target
from llamamem.serving.client import Client
from llamamem.serving.digests import Progress, base_sha256, file_sha256

NO_MEMORY = "serves no memory"
START_WITH = "start it with `llamamem serve --model BASE --sidecar SIDECAR`"


class Fails(Exception):
    """A check does not hold: what was found, and what to do next."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__(detail)
        self.detail, self.hint = detail, hint


@dataclass
class Evidence:
    """What a check gets. A fact that cannot be had raises `Fails` or LlamamemError in each check that asks for it."""

    client: Client
    target: Target
    reference: Trace | None = None
    progress: Progress | None = None  # of hashing the base
    kept: SlotProbe | None = None  # the slot that is tested, while what it holds is kept aside
    unkept: Fails | None = None  # why it is not
    hung: str | None = None  # the check in which the server did not answer in time

    @cached_property
    def props(self) -> dict[str, Any]:
        return self.client.props()

    @property
    def slots(self) -> list[dict[str, Any]]:
        return self.client.slots()

    @property
    def has_memory(self) -> bool:
        return isinstance(self.props.get("rwkv_ms"), dict)

    @property
    def memory(self) -> dict[str, Any]:
        """The `rwkv_ms` object of /props."""
        if not self.has_memory:
            raise Fails(f"{NO_MEMORY}: /props has no rwkv_ms", START_WITH)
        memory: dict[str, Any] = self.props["rwkv_ms"]
        return memory

    @property
    def profile(self) -> str:
        """What the server was started as; of one that nothing is known of, what it says itself."""
        return self.target.profile or str(self.memory.get("mode"))

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the base file as it is now."""
        if self.target.model is None:
            raise Fails("the base file is not known", "give --model BASE.gguf")
        return base_sha256(self.target.model, self.progress)

    @cached_property
    def sidecar(self) -> Sidecar:
        if self.target.sidecar is None:
            if self.target.profile == "base":
                raise Fails(f"{NO_MEMORY}: it was started without a sidecar", START_WITH)
            raise Fails("the sidecar file is not known", "give --sidecar SIDECAR.gguf")
        return read_sidecar(self.target.sidecar)

    @cached_property
    def identity(self) -> Identity:
        """What the server should serve: the sidecar file as it is now, and the base that it is bound to."""
        return Identity(file_sha256(self.sidecar.path), self.sidecar.base_sha256)

    @property
    def slot(self) -> SlotProbe:
        """The slot, for a check that needs a memory in it."""
        _ = self.memory
        self.answers()
        if self.kept is None:
            raise self.unkept or Fails("no slot can be used")
        return self.kept

    def answers(self) -> None:
        """A server that hangs is waited for once."""
        if self.hung is not None:
            raise Fails(f"not tried: the server did not answer in time in `{self.hung}`")


def is_timeout(error: BaseException) -> bool:
    return isinstance(error, LlamamemError) and isinstance(error.__cause__, httpx.TimeoutException)
