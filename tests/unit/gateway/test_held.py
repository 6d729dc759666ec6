"""A session is one request's: leases are renewed while it lasts, and given back for good."""

from __future__ import annotations

import asyncio
import threading

from memory_store import MemoryStore
from store_places import memory

from llamamem.gateway.held import HeldSessions
from llamamem.gateway.metrics import Metrics


def test_a_renewal_that_is_under_way_does_not_take_the_lease_again() -> None:
    store, began, go_on = MemoryStore(), threading.Event(), threading.Event()
    leases: list[str] = []

    def slow(call: str) -> None:
        leases.extend(["lease"] * (call == "lease"))
        if call == "lease" and len(leases) == 2:
            began.set()
            assert go_on.wait(10)

    async def turn() -> None:
        sessions = HeldSessions(store, Metrics(), lease=0.3)
        async with sessions.held("", "anna") as held:
            assert await asyncio.to_thread(began.wait, 10)
            saving = asyncio.ensure_future(held.save(memory(2)))
            await asyncio.sleep(0.05)
            assert not saving.done()
            go_on.set()
            await saving
        sessions.close()

    store.shared.fault = slow
    asyncio.run(turn())
    assert len(leases) == 2 and store.shared.leases == {}
