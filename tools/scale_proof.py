"""Sessions on replicas that are killed again and again: no answer is wrong, and a session goes on where it ends up.

    python tools/scale_proof.py --store DIR                     # three replicas of the demo under Ray
    python tools/scale_proof.py --store DIR --front nginx       # three plain gateways behind configs/nginx.conf
    python tools/scale_proof.py --store DIR --front litellm --litellm VENV/bin/litellm

First one session has a stream that is cut by the death of its replica, and is asked again. Then all sessions talk side
by side while a replica is killed every few seconds. Each answer and each memory is held against those of a server of
its own, which reads just what the rules of docs/service.md say. Prints what was wrong, how many turns found their text
in a KV cache, and exits 1 if anything was. Only processes that were started here are killed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from entitled.fresh import NEAR_TIE, Reference
from entitled.memory import Memory, differ, distance
from entitled.wire import HttpServer
from fronts import FRONTS, Cluster
from once.ask import CHAT, Answer, Refused, Way, ask
from once.rules import Fresher, Known, Said, Talk, with_answer

from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build
from llamamem.reference import language

PATIENCE = 120.0  # seconds until somebody answers again


class Wrong(Exception):
    pass


class WithModel(httpx.Client):
    """LiteLLM wants to be told the model."""

    def stream(self, method: str, url: Any, *, json: Any = None, **options: Any) -> Any:
        return super().stream(method, url, json={**json, "model": "llamamem"}, **options)


@dataclass
class Tally:
    turns: int = 0
    lost: int = 0  # turns that a death cut, and were asked again
    saved: int = 0  # of those: the memory had them all the same
    went_on: int = 0
    reused: int = 0
    undisturbed: int = 0  # turns that went on, in a session that saw no death since the turn before
    kept: int = 0  # of those: text was found in a KV cache
    furthest: float = 0.0
    ties: int = 0
    kills: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **more: int) -> None:
        with self.lock:
            for name, n in more.items():
                setattr(self, name, getattr(self, name) + n)


class Talker:
    """A session with one client, which asks again when it gets no answer."""

    def __init__(self, name: str, seed: str, cluster: Cluster, fresher: Fresher, tally: Tally) -> None:
        self.name, self.rng, self.fresher, self.tally = name, random.Random(seed), fresher, tally
        options: dict[str, Any] = {"trust_env": False, "timeout": PATIENCE}
        self.litellm = cluster.front == "litellm"  # which passes nothing on of what the gateway says of memory
        self.http = (WithModel if self.litellm else httpx.Client)(base_url=cluster.url, **options)
        self.api = httpx.Client(base_url=cluster.api, **options)
        self.way = Way(CHAT, "x-litellm-session-id" if self.litellm else "x-session-id", "x-conversation-id")
        self.known = Known()
        self.deaths = 0

    def converse(self, turns: int, id: str) -> None:
        talk: Talk = (Said("user", self.says()),)
        for _ in range(turns):
            answer = None
            while answer is None:
                answer = self.turn(id, talk)
            talk = (*with_answer(talk, answer or "ok."), Said("user", self.says()))

    def turn(self, id: str, talk: Talk, *, kill: Callable[[], None] | None = None) -> str | None:
        """The answer; None of one that was cut. `kill` is called when its first piece is there."""
        n = self.rng.choice((4, 12, 24))
        try:
            answer = self.asked(id, talk, n, kill)
        except (Refused, httpx.TransportError) as e:
            if isinstance(e, Refused) and e.status in (400, 401, 403, 404, 409, 413):
                raise Wrong(f"a turn was refused: {e}") from None
            self.cut(id, talk, n)
            return None
        on, origin = self.known.runs_on(id, talk, False)
        if not self.litellm and answer.told.get("origin") != origin.origin:
            raise Wrong(f"it ran on memory {str(answer.told.get('origin'))[:8]}, not on {origin}")
        fresh = self.fresher.answer(origin, talk, False, n)
        memory = self.memory(self.known.generation + 1)
        if answer.text == fresh.text:
            self.same(memory, fresh.memory)
        elif min(fresh.margins, default=1.0) < NEAR_TIE:
            self.tally.add(ties=1)
        else:
            raise Wrong(f"it said {answer.text!r}, a server alone says {fresh.text!r}")
        self.known = self.known.answered(id, talk, False, answer.text, memory)
        reused, seen = bool(answer.told.get("reused")), self.tally.kills
        quiet = on and seen == self.deaths
        self.deaths = seen
        self.tally.add(turns=1, went_on=on, reused=on and reused, undisturbed=quiet, kept=quiet and reused)
        return answer.text.strip()

    def asked(self, id: str, talk: Talk, n: int, kill: Callable[[], None] | None) -> Answer:
        if kill is None:
            stream = self.rng.random() < 0.5 and not self.litellm
            return ask(self.http, self.way, self.name, talk, id=id, n=n, stream=stream)
        body = {"messages": [vars(said) for said in talk], "stream": True, "max_tokens": 1500, "ignore_eos": True}
        headers = {self.way.named_by: self.name, "x-conversation-id": id}
        with self.http.stream("POST", CHAT, json=body, headers=headers) as response:
            for i, line in enumerate(response.iter_lines()):
                if i == 8:
                    kill()
                if line.endswith("[DONE]"):
                    raise Wrong("it was said whole before its replica died")
        raise Refused(0, "the stream ended before its end")

    def cut(self, id: str, talk: Talk, n: int) -> None:
        """The session is as before, or as after the whole answer, whoever reads it next."""
        self.tally.add(lost=1)
        time.sleep(0.3)  # what was on its way to the store is there
        found = self.found()
        more = (found["generation"] if found else 0) - self.known.generation
        if more not in (0, 1):
            raise Wrong(f"{more} generations were saved by a turn that was cut")
        if more == 0:
            if found:
                self.same(self.memory(self.known.generation), self.known.newest)
            return
        self.tally.add(saved=1)
        memory = self.memory(self.known.generation + 1)
        _, origin = self.known.runs_on(id, talk, False)
        fresh = self.fresher.answer(origin, talk, False, n)
        if min(fresh.margins, default=1.0) < NEAR_TIE and differ(memory, fresh.memory):
            self.tally.add(ties=1)
        else:
            self.same(memory, fresh.memory)
        self.known = self.known.answered(id, talk, False, fresh.text, memory)

    def found(self) -> dict[str, Any] | None:
        reply = self.get(f"/v1/sessions/{self.name}")
        return None if reply.status_code == 404 else dict(reply.json())

    def memory(self, generation: int) -> Memory:
        found = self.found()
        if found is None or found["generation"] != generation:
            raise Wrong(f"generation {generation} is not what is saved: {str(found)[:200]}")
        return Memory(self.get(f"/v1/sessions/{self.name}/memory").content)

    def get(self, path: str) -> httpx.Response:
        until = time.monotonic() + PATIENCE
        while True:
            with suppress(httpx.TransportError):
                reply = self.api.get(path, headers={"x-session-id": self.name})
                if reply.status_code < 500:
                    return reply
            if time.monotonic() > until:
                raise Wrong(f"{path}: nobody answered for {PATIENCE:g} s")
            time.sleep(0.1)

    def same(self, found: Memory, expected: Memory) -> None:
        if (fault := differ(found, expected)) is not None:
            raise Wrong(fault)
        with self.tally.lock:
            self.tally.furthest = max(self.tally.furthest, distance(found, expected))

    def says(self) -> str:
        name = self.rng.choice(language.NAMES)
        if self.rng.random() < 0.4:
            return language.question(name)
        return language.introduction(self.rng, name, self.rng.choice(language.SURNAMES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--store", required=True)
    parser.add_argument("--front", choices=FRONTS, default="ray")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--llamamem", help="the command, where Ray is in another environment")
    parser.add_argument("--litellm", default="litellm", help="the command")
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--workers", type=int, default=6, help="sessions that talk at a time")
    parser.add_argument("--every", type=float, default=8.0, help="seconds between kills; 0: none")
    parser.add_argument("--seed", default=str(time.time_ns()))
    args = parser.parse_args()
    tally, faults, stop = Tally(), list[str](), threading.Event()
    began = time.monotonic()
    draw = random.Random(args.seed)

    def kill() -> None:
        if found := cluster.replicas():
            tally.add(kills=1)
            with suppress(psutil.Error):
                draw.choice(found).kill()

    def the_busy_one_dies() -> None:
        tally.add(kills=1)
        cluster.busiest().kill()

    def killing() -> None:
        while not stop.wait(args.every):
            kill()

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llamamem-scale-")))
        os.environ["LLAMA_ARG_THREADS"] = "1"
        command = args.llamamem or f"{sys.executable} -m llamamem.cli"
        cluster = stack.enter_context(
            Cluster(args.front, args.store, place, args.replicas, command.split(), args.litellm)
        )
        print(f"{args.replicas} replicas behind {args.front}", flush=True)
        reference = HttpServer(demo_files(), find_build().bin_dir, place / "fresh", "fused", 2048)
        reference.start(["--cache-ram", "0"])
        stack.callback(reference.stop)
        fresher = Fresher(Reference(reference), reference)

        def talker(i: int) -> Talker:
            return Talker(f"proof-{args.seed}-{i}", f"{args.seed} {i}", cluster, fresher, tally)

        one = talker(-1)
        first = (Said("user", "hello."),)
        cut = one.turn("c", first, kill=the_busy_one_dies)
        assert cut is None and one.known.generation == 0
        one.converse(3, "c")
        one.converse(2, "d")
        print(f"a stream cut by the death of its replica: asked again, {one.known.generation} turns on", flush=True)

        queue = iter(range(args.sessions))

        def work() -> None:
            for i in queue:
                if faults:
                    return
                mine = talker(i)
                try:
                    mine.converse(args.turns // 2, "one")
                    mine.converse(args.turns - args.turns // 2, "two")
                except Exception as e:
                    faults.append(f"{mine.name}: {e!r}")

        workers = [threading.Thread(target=work) for _ in range(args.workers)]
        killer = threading.Thread(target=killing)
        if args.every:
            killer.start()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        stop.set()
    t = tally
    print(f"{args.sessions} sessions, {t.turns} turns, {t.kills} kills; {t.lost} turns were cut and asked again,")
    print(
        f"{t.saved} of them had been saved; {t.went_on} turns went on with a conversation, {t.reused} of them without a"
    )
    print(f"re-read of its text; of {t.undisturbed} with no death since the turn before, {t.kept};")
    print(f"furthest {t.furthest:.2f} of what rounding may do, {t.ties} answers that rounding may turn")
    print(f"{len(faults)} wrong, seed {args.seed}, {time.monotonic() - began:.0f} s")
    for fault in faults[:10]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
