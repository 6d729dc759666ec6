"""What `/metrics` tells of a gateway: counts and times, of nobody in particular."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """One set a gateway, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"llamamem_gateway_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llamamem_gateway_{name}", what, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        self.turns = counter("turns", "Turns of sessions: done, read, cancelled, refused, failed.", "outcome")
        self.conversations = counter("conversations", "Turns that were done: goes on, or new.", "kind")
        self.reused_tokens = counter("reused_tokens", "Tokens of prompts of turns that were in a KV cache.")
        self.rereads = counter("rereads", "Turns that went on and found nothing of their text in a KV cache.")
        self.sessions = counter("sessions", "Sessions that were made, changed, undone or removed.", "what")
        self.conflicts = counter("conflicts", "Requests answered 409 for another writer: lease, generation.", "what")
        self.store_errors = counter("store_errors", "Calls that the store did not answer.", "call")
        self.in_flight = Gauge("llamamem_gateway_in_flight", "Requests that are answered now.", registry=registry)
        self.first_seconds = histogram("first_seconds", "Of a turn, to the head of the answer.", buckets=_LONG)
        self.turn_seconds = histogram("turn_seconds", "Of a turn, to its end.", buckets=_LONG)
        self.store_seconds = histogram("store_seconds", "Calls of the store.", "call", buckets=_FAST)

    def text(self) -> bytes:
        return generate_latest(self.registry)
