"""What a gateway costs: time to the first token and throughput against the bare server, and its memory over many turns.

    python tools/bench_gateway.py                       # 1, 16 and 64 streams
    python tools/bench_gateway.py --turns 10000         # and the gateway's own memory over so many turns

One llama-server with the demo model, which has a slot for every stream, is asked in three ways, in rounds that take
turns: bare, without a memory; by hand, where the client keeps the memory, sends it along and takes the next one out of
the answer; and through a gateway in a process of its own, where it is loaded from the store and saved there. Every
request is a new conversation, streamed; answers are of drawn lengths, the same in all three, so that streams do not go
in step. Times to the first token are medians of all requests, throughputs of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build
from llamamem.reference import language
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan

TOKEN = b'"delta":{"content":"'
WAYS = {"bare": "bare", "hand": "memory by hand", "gateway": "gateway"}


async def ask(port: int, body: dict[str, Any], headers: str = "") -> tuple[float, int, str | None]:
    """Seconds to the first token, how many events had a token, and the memory that the answer brings."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    first, pieces = 0.0, []
    while piece := await reader.read(1 << 16):
        pieces.append(piece)
        if not first and TOKEN in b"".join(pieces):
            first = time.perf_counter() - began
    writer.close()
    text = b"".join(pieces)
    if not first or b'"error"' in text or b"[DONE]" not in text:
        raise RuntimeError(f"no whole answer came: {text[-300:]!r}")
    memory = text.partition(b'"memory":"')[2].partition(b'"')[0]
    return first, text.count(TOKEN), memory.decode() or None


class Rounds:
    """Requests of one server, asked in one way."""

    def __init__(self, way: str, port: int, tokens: int) -> None:
        self.way, self.port, self.tokens = way, port, tokens
        self.firsts: list[float] = []  # seconds
        self.speeds: list[float] = []  # tokens a second
        self._memories: dict[int, str | None] = {}

    def run(self, streams: int, each: int, *, counts: bool = True) -> None:
        """So many streams at a time, each some requests in a row."""
        firsts, total, began = list[float](), 0, time.perf_counter()

        async def one(stream: int) -> None:
            nonlocal total
            for number in range(each):
                first, n = await self._ask(stream, number)
                firsts.append(first)
                total += n

        async def all_() -> None:
            await asyncio.gather(*(one(stream) for stream in range(streams)))

        asyncio.run(all_())
        if counts:
            self.firsts += firsts
            self.speeds.append(total / (time.perf_counter() - began))

    async def _ask(self, stream: int, number: int) -> tuple[float, int]:
        rng = random.Random(f"{stream} {number}")
        text = language.introduction(rng, rng.choice(language.NAMES), rng.choice(language.SURNAMES))
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": rng.randint(self.tokens // 2, self.tokens * 3 // 2),
            "ignore_eos": True,
            "stream": True,
            "temperature": 0.0,
        }
        if self.way == "hand":
            body["rwkv_ms"] = {"memory": self._memories.get(stream), "return_memory": True}
        first, n, memory = await ask(self.port, body, f"X-Session-Id: s{stream}\r\n" if self.way == "gateway" else "")
        self._memories[stream] = memory
        return first, n


def compare(server: int, gateway: int, streams: int, rounds: int, each: int, tokens: int) -> dict[str, Any]:
    ways = [Rounds(way, gateway if way == "gateway" else server, tokens) for way in WAYS]
    for number in range(rounds + 1):
        for way in ways if number % 2 else ways[::-1]:
            way.run(streams, each, counts=number > 0)  # the first warms up

    def quantile(values: list[float], q: float) -> float:
        return 1000 * sorted(values)[min(len(values) - 1, int(q * len(values)))]

    return {
        "streams": streams,
        "first_ms": {way.way: quantile(way.firsts, 0.5) for way in ways},
        "first_p99_ms": {way.way: quantile(way.firsts, 0.99) for way in ways},
        "tokens_per_s": {way.way: statistics.median(way.speeds) for way in ways},
    }


def resident(gateway: int, pid: int, turns: int) -> list[tuple[int, float]]:
    """MB of the gateway after so many turns."""
    found, done, process = [], 0, psutil.Process(pid)
    talk = Rounds("gateway", gateway, 2)
    while done < turns:
        each = max(1, min(turns // 10, turns - done) // 8)
        talk.run(8, each, counts=False)
        done += 8 * each
        found.append((done, process.memory_info().rss / 1e6))
        print(f"  {done} turns: {found[-1][1]:.1f} MB", file=sys.stderr, flush=True)
    return found


@contextmanager
def gateways(streams: int, store: str | None) -> Iterator[tuple[int, int, int]]:
    """A server with so many slots and a gateway in front of it: their ports, and the gateway's process."""
    files, build = demo_files(), find_build()
    with tempfile.TemporaryDirectory() as directory:
        plan = make_plan(
            files.model,
            bin_dir=build.bin_dir,
            sidecar=files.sidecar,
            profile="batched",
            parallel=streams,
            ctx_size=256 * streams,
            port=0,
            extra=["--threads", "1", "--threads-http", str(streams + 8)],
            environ={},
        )
        with launch(plan, directory=Path(directory) / "runs") as server:
            server.wait_ready()
            place = store or str(Path(directory) / "sessions")
            command = [sys.executable, __file__, "--serve", server.url, "--store", place]
            with (
                (Path(directory) / "log").open("w") as log,
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                ) as gateway,
            ):
                assert gateway.stdout is not None and gateway.stdin is not None
                try:
                    yield server.record.port, int(gateway.stdout.readline()), gateway.pid
                finally:
                    gateway.stdin.close()
                    gateway.wait(30)


def serve(url: str, store: str) -> None:
    """The gateway alone, in front of a server that is there; its port is printed."""
    from llamamem.gateway import Gateway, Running, Upstream, listen
    from llamamem.sessions import open_store

    with Running(Gateway(open_store(store), Upstream(url)), listen("127.0.0.1", 0)) as running:
        print(running.port, flush=True)
        sys.stdin.read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,16,64", help="at a time, with commas")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=128, help="of a round")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, in the mean")
    parser.add_argument("--turns", type=int, default=0, help="over which the gateway's memory is watched")
    parser.add_argument("--store", default=None, help="a place as --sessions takes it; a directory unless given")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.store)
        return 0
    found = []
    for streams in map(int, filter(None, given.streams.split(","))):
        each = max(2, given.requests // max(streams, 4))
        with gateways(streams, given.store) as (server, gateway, _):
            found.append(compare(server, gateway, streams, given.rounds, each, given.tokens))
        if not given.json:
            print(told(found[-1]), flush=True)
    memory = []
    if given.turns:
        with gateways(8, given.store) as (_, gateway, pid):
            memory = resident(gateway, pid, given.turns)
    if given.json:
        print(json.dumps({"streams": found, "resident_mb": memory}))
    return 0


def told(found: dict[str, Any]) -> str:
    lines = [f"{found['streams']} streams"]
    first, p99, speed = found["first_ms"], found["first_p99_ms"], found["tokens_per_s"]
    for way, name in WAYS.items():
        line = f"  {name:15} first token {first[way]:7.1f} ms, p99 {p99[way]:7.1f}; {speed[way]:6.0f} tokens a second"
        if way != "bare":
            line += f"; to bare {first[way] - first['bare']:+.1f} ms, {100 * (speed[way] / speed['bare'] - 1):+.1f} %"
        lines.append(line)
    more, less = first["gateway"] - first["hand"], 100 * (speed["gateway"] / speed["hand"] - 1)
    return "\n".join([*lines, f"  the gateway to by hand: {more:+.1f} ms, {less:+.1f} %"])


if __name__ == "__main__":
    sys.exit(main())
