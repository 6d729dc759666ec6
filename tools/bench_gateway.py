"""What a gateway costs: time to the first token and throughput against the bare server, and its memory over many turns.

    python tools/bench_gateway.py                       # 1, 16 and 64 streams
    python tools/bench_gateway.py --turns 10000         # and the gateway's own memory over so many turns

One llama-server with the demo model is asked directly and through a gateway in a process of its own, in rounds that
alternate. Bare requests have no memory; those through the gateway are turns of sessions, loaded from the store and
saved to it. Every request is a new conversation, streamed, of as many tokens. Figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build
from llamamem.reference import language
from llamamem.serving.client import Client
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan

_numbers = itertools.count()


async def ask(port: int, body: dict[str, Any], headers: str = "") -> tuple[float, float, int]:
    """Seconds to the first token and to the end, and how many events had a token."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    first, received, tail = 0.0, 0, b""
    while piece := await reader.read(1 << 16):
        text = tail + piece
        n = text.count(b'"delta":{"content":"')
        if n and not first:
            first = time.perf_counter() - began
        received += n
        cut = text.rfind(b"\n\n")
        tail = text[cut:] if cut >= 0 else text
        if b'"error"' in piece:
            raise RuntimeError(text[:300].decode())
    writer.close()
    if not first:
        raise RuntimeError(f"no token came: {text[:300]!r}")
    return first, time.perf_counter() - began, received


async def round_of(port: int, streams: int, each: int, tokens: int, *, sessions: bool) -> tuple[list[float], float]:
    """So many streams at a time, each some requests in a row: seconds to the first token, and tokens a second."""
    firsts, total = [], 0
    began = time.perf_counter()

    async def one(stream: int) -> None:
        nonlocal total
        for _ in range(each):
            number = next(_numbers)
            body = {
                "messages": [{"role": "user", "content": said(number)}],
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "temperature": 0.0,
            }
            first, _, n = await ask(port, body, f"X-Session-Id: s{stream}\r\n" if sessions else "")
            firsts.append(first)
            total += n

    await asyncio.gather(*(one(stream) for stream in range(streams)))
    return firsts, total / (time.perf_counter() - began)


def said(number: int) -> str:
    rng = random.Random(number)
    return language.introduction(rng, rng.choice(language.NAMES), rng.choice(language.SURNAMES))


def compare(server: int, gateway: int, streams: int, rounds: int, each: int, tokens: int) -> dict[str, Any]:
    firsts: dict[bool, list[float]] = {False: [], True: []}
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for sessions in (False, True) if number % 2 else (True, False):
            port = gateway if sessions else server
            found, speed = asyncio.run(round_of(port, streams, each, tokens, sessions=sessions))
            if number:  # the first warms up
                firsts[sessions] += found
                speeds[sessions].append(speed)

    def quantile(values: list[float], q: float) -> float:
        return 1000 * sorted(values)[min(len(values) - 1, int(q * len(values)))]

    return {
        "streams": streams,
        "first_ms": {"bare": quantile(firsts[False], 0.5), "gateway": quantile(firsts[True], 0.5)},
        "first_p99_ms": {"bare": quantile(firsts[False], 0.99), "gateway": quantile(firsts[True], 0.99)},
        "tokens_per_s": {"bare": statistics.median(speeds[False]), "gateway": statistics.median(speeds[True])},
    }


def resident(gateway: int, pid: int, turns: int) -> list[tuple[int, float]]:
    """MB of the gateway after so many turns."""
    found, done, process = [], 0, psutil.Process(pid)
    while done < turns:
        each = min(turns // 10, turns - done)
        asyncio.run(round_of(gateway, 8, each // 8 or 1, 2, sessions=True))
        done += each
        found.append((done, process.memory_info().rss / 1e6))
        print(f"  {done} turns: {found[-1][1]:.1f} MB", flush=True)
    return found


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
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument("--parallel", type=int, default=8, help="slots of the server")
    parser.add_argument("--turns", type=int, default=0, help="over which the gateway's memory is watched")
    parser.add_argument("--store", default=None, help="a place as --sessions takes it; a directory unless given")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", metavar="URL", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.store)
        return 0
    files, build = demo_files(), find_build()
    with tempfile.TemporaryDirectory() as directory:
        plan = make_plan(
            files.model,
            bin_dir=build.bin_dir,
            sidecar=files.sidecar,
            profile="batched",
            parallel=given.parallel,
            ctx_size=512 * given.parallel,
            port=0,
            extra=["--threads", "1", "--threads-http", "72"],
            environ={},
        )
        with launch(plan, directory=Path(directory) / "runs") as server:
            server.wait_ready()
            store = given.store or str(Path(directory) / "sessions")
            command = [sys.executable, (__import__("os").environ.get("GWPROF") or __file__), "--serve", server.url, "--store", store]
            with (
                (Path(directory) / "log").open("w") as log,
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                ) as gateway,
            ):
                try:
                    assert gateway.stdout is not None and gateway.stdin is not None
                    port = int(gateway.stdout.readline())
                    with Client(server.url) as client:
                        client.health()
                    found = []
                    for streams in map(int, given.streams.split(",")):
                        each = max(1, 24 // streams)
                        found.append(compare(server.record.port, port, streams, given.rounds, each, given.tokens))
                        if not given.json:
                            print(told(found[-1]), flush=True)
                    memory = resident(port, gateway.pid, given.turns) if given.turns else []
                finally:
                    gateway.stdin.close()
                    gateway.wait(30)
    if given.json:
        print(json.dumps({"streams": found, "resident_mb": memory}))
    return 0


def told(found: dict[str, Any]) -> str:
    first, p99, speed = found["first_ms"], found["first_p99_ms"], found["tokens_per_s"]
    return (
        f"{found['streams']} streams: first token {first['bare']:.1f} ms bare, {first['gateway']:.1f} with the gateway"
        f" ({first['gateway'] - first['bare']:+.1f}); p99 {p99['bare']:.1f}, {p99['gateway']:.1f}; tokens a second"
        f" {speed['bare']:.0f}, {speed['gateway']:.0f} ({100 * (speed['gateway'] / speed['bare'] - 1):+.1f} %)"
    )


if __name__ == "__main__":
    sys.exit(main())
