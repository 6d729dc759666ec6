"""What is lost when a gateway is killed in the middle of turns? Seeded kill -9 of gateway, server, store, and of all.

    python tools/gateway_kills.py --kills 200 --seed 1
    python tools/gateway_kills.py --kills 60 --store valkey    # and postgres: a store that can be killed, too

Two `llamamem serve --sessions` with the demo model share a store, and clients talk to their sessions all the time. At
random moments something is killed and started again. After each kill every session is loaded and compared: it must be
byte for byte as after the last turn that was acknowledged, or be the whole of one that was under way, with that one as
its generation before. The stores are those that promise to lose nothing that was acknowledged. Killing all takes the
processes and not the machine's power: what a kernel was given stays.

Exit status: 0 nothing was wrong, 1 something was, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from once.served import Served
from store_servers import SERVERS, NotHere

from llamamem.errors import LlamamemError
from llamamem.formats.state import decode_state
from llamamem.reference import language
from llamamem.sessions import SessionStore, open_store
from llamamem.sessions.session import Missing


@dataclass
class Client:
    """One session's turns. `acknowledged` is its generation when it was last told that a turn was over, and `hash` that
    of its memory; `asked` is how many turns were begun since."""

    name: str
    rng: random.Random
    urls: list[str]
    acknowledged: int = 0
    asked: int = 0
    hash: str | None = None
    turns: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def talk(self, going: threading.Event) -> None:
        with httpx.Client(timeout=30, trust_env=False) as http:
            while going.is_set():
                self.turn(http)

    def turn(self, http: httpx.Client) -> None:
        rng = self.rng
        text = language.introduction(rng, rng.choice(language.NAMES), rng.choice(language.SURNAMES))
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": rng.choice((2, 12, 40)),
            "ignore_eos": True,
        }
        body |= {"rwkv_ms": {"session": self.name, "return_memory": True}, "stream": True}
        with self.lock:
            self.asked += 1
        try:
            told = None
            with http.stream("POST", f"{rng.choice(self.urls)}/v1/chat/completions", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        told = event.get("rwkv_ms") or told
                        if event.get("error"):
                            self.failed[str(event["error"]["code"])] += 1
                    elif line == "data: [DONE]" and told is not None:
                        with self.lock:
                            self.acknowledged, self.asked = told["generation"], 0
                            self.hash, self.turns = hash_of(told["memory"]), self.turns + 1
                if answer.status_code != 200:
                    self.failed[str(answer.status_code)] += 1
                    time.sleep(0.1)
        except httpx.TransportError as e:
            self.failed[type(e).__name__] += 1
            time.sleep(0.1)


def check(store: SessionStore, client: Client) -> str | None:
    """What is wrong with a session, None if nothing is. No turn runs meanwhile."""
    try:
        record = store.read(client.name)
    except Missing:
        return None if client.acknowledged == 0 else f"{client.name}: gone, acknowledged was {client.acknowledged}"
    except LlamamemError as e:
        return f"{client.name}: {e}"
    session, known = record.session, client.acknowledged
    if not known <= session.generation <= known + client.asked:
        return f"{client.name}: generation {session.generation}; {known} was acknowledged, {client.asked} begun since"
    assert record.state is not None
    if int(decode_state(record.state).tokens_written.max()) != session.tokens:  # it is whole, by its hashes
        return f"{client.name}: {session.tokens} tokens, and its memory says otherwise"
    if session.generation == known and session.state_sha256 != client.hash:
        return f"{client.name}: generation {known} is another memory than the one that was acknowledged"
    before = session.before
    if session.generation == known + 1 and known and (before is None or before.state_sha256 != client.hash):
        return f"{client.name}: generation {known}, which was acknowledged, is not the one before {known + 1}"
    if session.conversation is None or (record.origin is None) != (session.origin_sha256 is None):
        return f"{client.name}: its open conversation is not whole"
    client.acknowledged, client.asked, client.hash = session.generation, 0, session.state_sha256
    return None


def hash_of(memory: str) -> str:
    return hashlib.sha256(base64.b64decode(memory)).hexdigest()


def settle(clients: list[Client], served: list[Served], store: SessionStore) -> None:
    """All is there again, and nothing is under way: leases of the dead have ended."""
    for one in served:
        one.wait_ready()
    until = time.monotonic() + 60
    while True:
        try:
            store.removals()
            return
        except LlamamemError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", default="1")
    parser.add_argument(
        "--store", default=None, help="a place as --sessions takes it, valkey or postgres; else a directory"
    )
    parser.add_argument("--clients", type=int, default=6)
    given = parser.parse_args()
    rng, began = random.Random(given.seed), time.monotonic()
    faults: list[str] = []
    killed: Counter[str] = Counter()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server, where = store_of(given.store, place, stack)
        served = [Served(where, place, name, "--lease", "2") for name in ("a", "b")]
        for one in served:
            stack.callback(one.stop)
            one.start()
        store = open_store(where).within("")
        urls = [one.url for one in served]
        clients = [Client(f"client-{i}", random.Random(f"{given.seed} {i}"), urls) for i in range(given.clients)]
        while sum(killed.values()) < given.kills and not faults:
            going = threading.Event()
            going.set()
            threads = [threading.Thread(target=client.talk, args=(going,)) for client in clients]
            for thread in threads:
                thread.start()
            time.sleep(rng.uniform(0.1, 1.5))
            kinds = ["gateway", "server", "all", *(["store"] if server is not None else [])]
            kind = rng.choice(kinds)
            kill(kind, rng, served, server)
            killed[kind] += 1
            going.clear()
            for thread in threads:
                thread.join()
            settle(clients, served, store)
            faults += [fault for client in clients if (fault := check(store, client))]
    failed: Counter[str] = sum((client.failed for client in clients), Counter())
    of = ", ".join(f"{n} {what}" for what, n in sorted(killed.items()))
    print(f"{sum(killed.values())} kills ({of}), store {given.store or 'directory'}")
    print(
        f"{sum(client.turns for client in clients)} turns acknowledged, {sum(failed.values())} failed: {dict(failed)}"
    )
    print(f"{len(faults)} wrong, seed {given.seed}, {time.monotonic() - began:.0f} s")
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def kill(kind: str, rng: random.Random, served: list[Served], server: Any) -> None:
    """And starts it again."""
    one = rng.choice(served)
    if kind == "server":
        one.kill_server()
    elif kind == "gateway":
        one.restart()
    elif kind == "store":
        server.kill()
        server.start()
    else:
        for each in served:
            each.kill()
        if server is not None:
            server.kill()
            server.start()
        for each in served:
            each.start(wait=False)
        for each in served:
            each.wait_ready()


def store_of(given: str | None, place: Path, stack: ExitStack) -> tuple[Any, str]:
    """A store that can be killed, where it is a server of its own, and its place."""
    if given not in SERVERS:
        return None, given or str(place / "sessions")
    server = stack.enter_context(SERVERS[given]())
    return server, server.url


if __name__ == "__main__":
    os.environ.setdefault("LLAMA_ARG_THREADS", "1")
    try:
        sys.exit(main())
    except (LlamamemError, NotHere, RuntimeError, OSError) as e:
        print(f"gateway_kills: {e}", file=sys.stderr)
        sys.exit(2)
