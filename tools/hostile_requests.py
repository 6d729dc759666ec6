"""Can a request end a server, or change what others get? Seeded hostile requests, and an ordinary one after each.

    python tools/hostile_requests.py --bodies 20000 --seed 1
    python tools/hostile_requests.py --bodies 20000 --seed 1 --server build/cpu-1a2b3c4d/bin/llama-server
    python tools/hostile_requests.py --bodies 500 --url http://127.0.0.1:8080

Half of them go to a server with a KV cache for each slot, half to one with a common cache; 4 slots, the demo model.
After each (or each `--every`) an ordinary request must get the answer that it got at the start, and leave the same
memory: on an empty one and on one that it brings, by turns; and /health is ok. `--server` is a build with sanitizers:

    F="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    llamamem build -D CMAKE_BUILD_TYPE=RelWithDebInfo -D CMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
        -D CMAKE_C_FLAGS_RELWITHDEBINFO="-O1 -g1" -D CMAKE_CXX_FLAGS="$F" -D CMAKE_C_FLAGS="$F" \
        -D CMAKE_SHARED_LINKER_FLAGS="$F" -D CMAKE_EXE_LINKER_FLAGS="$F"

Exit status: 0 nothing was wrong, 1 an answer was another, or none (the body is kept), 2 it could not be run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entitled.memory import Memory, differ
from hostile_bodies import Request, World, draw

from llamamem.errors import LlamamemError
from llamamem.formats.demo_files import demo_files
from llamamem.native.build import find_build
from llamamem.serving.profiles import make_plan

SLOTS, CONTEXT = 4, {"batched": 4 * 512, "batched-unified": 1024}
STARTS, ANSWERS = 300, 120  # seconds at most; with sanitizers on a busy machine
TOLD = "this is anna baker. this is kate wolf."  # in a memory that a client keeps
ASKED = "who is anna?"
ALONE = [
    "this is anna page. this is gina fisher.",
    "ok.",
    ASKED,
]  # without one; an answer without a doubt, as the other
# what is known of upstream, of which nothing is ours; a line of UBSAN_OPTIONS' suppressions each
KNOWN_UB: list[str] = []


class Wrong(Exception):
    """What a server did that it may not."""


class Server:
    """A running one, over one connection that is made anew when it breaks."""

    def __init__(self, host: str, port: int, process: subprocess.Popen[bytes] | None = None) -> None:
        self.host, self.port, self.process = host, port, process
        self._connection: http.client.HTTPConnection | None = None

    def send(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer; whoever hangs up on an old connection is asked once more on a new one."""
        for fresh in (self._connection is None, True):
            if fresh:
                self.hang_up()
                self._connection = http.client.HTTPConnection(self.host, self.port, timeout=ANSWERS)
            assert self._connection is not None
            try:
                self._connection.request(method, path, body, {"Content-Type": "application/json"})
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException) as e:
                self.hang_up()
                if fresh:
                    raise Wrong(f"no answer: {type(e).__name__}: {e}{self._ended()}") from e
        raise AssertionError

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        status, data = self.send(method, path, b"" if body is None else json.dumps(body).encode())
        if status != 200:
            raise Wrong(f"{method} {path}: {status} {data[:300]!r}")
        return json.loads(data)

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ended(self) -> str:
        if self.process is None:
            return ""
        try:
            return f"; the server ended with {self.process.wait(timeout=20)}"
        except subprocess.TimeoutExpired:
            return "; the server still runs"


class Ordinary:
    """A client that does nothing unusual. Its answers, and the memory after them, are the same all the time."""

    def __init__(self, server: Server) -> None:
        self.server = server
        _, self.memory = self._chat([TOLD], None)
        self.asks = [(ALONE, None), ([ASKED], self.memory.base64)]
        self.expected = [self._chat(*ask) for ask in self.asks]
        if [said for said, _ in self.expected] != ["that is anna page.", "that is anna baker."]:
            raise LlamamemError(f"the demo model answers {self.expected}")
        self.turn = 0

    def _chat(self, turns: list[str], memory: str | None) -> tuple[str, Memory]:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 8}
        answer = self.server.ask(
            "POST", "/v1/chat/completions", {**body, "rwkv_ms": {"memory": memory, "return_memory": True}}
        )
        return answer["choices"][0]["message"]["content"].strip(), Memory.of(answer["rwkv_ms"]["memory"])

    def check(self) -> None:
        if self.server.ask("GET", "/health") != {"status": "ok"}:
            raise Wrong("/health is not ok")
        i = self.turn % len(self.asks)
        self.turn += 1
        (said, memory), (expected, after) = self._chat(*self.asks[i]), self.expected[i]
        if said != expected:
            raise Wrong(f"the ordinary request {self.asks[i][0]!r} got {said!r}, at the start {expected!r}")
        if fault := differ(memory, after):
            raise Wrong(f"the memory after the ordinary request {self.asks[i][0]!r}: {fault}")


def lay_out(slots: Path, memory: bytes) -> None:
    """What somebody who can write there may have put into the slot directory."""
    (slots / "good.bin").write_bytes(memory)
    os.mkfifo(slots / "pipe")
    (slots / "device").symlink_to("/dev/zero")
    (slots / "directory").mkdir()
    (slots / "link").symlink_to(slots / "none.bin")
    for name, begin in (("sparse", b""), ("big", memory[:332])):
        (slots / name).write_bytes(begin)
        os.truncate(slots / name, 2 << 30)


def attack(
    server: Server,
    profile: str,
    bodies: int,
    every: int,
    rng: random.Random,
    tally: Counter[tuple[str, int]],
    slots: Path | None,
) -> None:
    ordinary = Ordinary(server)
    world = World(ordinary.memory.data, SLOTS)
    if slots is not None:
        lay_out(slots, world.memory)
    request = Request("nothing yet", "", "", b"")
    faults: Counter[str] = Counter()
    began = time.monotonic()
    for i in range(bodies):
        request = draw(rng, world)
        try:
            status, answer = server.send(request.method, request.path, request.body)
            tally[request.kind, status] += 1
            if status >= 500:
                faults[message(answer)] += 1
            if i % every == every - 1 or i == bodies - 1:
                ordinary.check()
        except Wrong as e:
            kept = Path(tempfile.mkstemp(prefix="hostile-", suffix=".body")[1])
            kept.write_bytes(request.body)
            raise Wrong(
                f"{profile}, body {i} ({request.kind}, {request.method} {request.path[:100]}, kept in {kept}): {e}"
            ) from e
        if i % 500 == 499:
            print(f"{profile}: {i + 1} of {bodies}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for text, n in faults.most_common(12):
        print(f"{profile}: {n:5}  {text}")


def message(answer: bytes) -> str:
    try:
        text = str(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        text = repr(answer[-200:])
    return text.splitlines()[0][:110] if text else ""


@contextmanager
def started(binary: Path, profile: str, place: Path) -> Iterator[tuple[Server, Path]]:
    """llama-server as that profile starts it. It must end well when it is asked to."""
    files, slots = demo_files(), place / "slots"
    plan = make_plan(
        files.model,
        bin_dir=binary.parent,
        sidecar=files.sidecar,
        profile="batched",
        parallel=SLOTS,
        ctx_size=CONTEXT[profile],
        port=0,
        slot_dir=slots,
        extra=["--threads", "1", *(["--kv-unified"] if profile == "batched-unified" else [])],
        environ={},
    )
    suppressions = place / "ubsan.txt"
    suppressions.write_text("\n".join(KNOWN_UB))
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    env["UBSAN_OPTIONS"] = f"print_stacktrace=1:halt_on_error=1:suppressions={suppressions}"
    log = place / "server.log"
    slots.mkdir(mode=0o700)
    with (
        log.open("wb") as out,
        subprocess.Popen([str(binary), *plan.argv[1:]], stdout=out, stderr=out, env=env) as process,
    ):
        try:
            server = Server("127.0.0.1", listening(log, process), process)
            yield server, slots
            server.hang_up()
            process.send_signal(signal.SIGTERM)
            if (code := process.wait(timeout=60)) != 0:
                raise Wrong(f"{profile}: the server ended with {code}")
        except Wrong as e:
            lines = log.read_text(errors="replace").splitlines()
            found = [
                i for i, line in enumerate(lines) if "runtime error: " in line or "ERROR: AddressSanitizer" in line
            ]
            raise Wrong("\n".join([*(lines[found[0] :][:25] if found else lines[-40:]), str(e)])) from e
        finally:
            process.kill()


def listening(log: Path, process: subprocess.Popen[bytes]) -> int:
    """The port that it took, once it answers."""
    end = time.monotonic() + STARTS
    port = None
    while time.monotonic() < end and process.poll() is None:
        if port is None and "listening on http" in (text := log.read_text(errors="replace")):
            port = int(text.partition("listening on http")[2].split()[0].rpartition(":")[2])
        if port is not None:
            try:
                if Server("127.0.0.1", port).send("GET", "/health", b"")[0] == 200:
                    return port
            except Wrong:
                pass
        time.sleep(0.1)
    raise LlamamemError(f"the server did not get ready: {log.read_text(errors='replace')[-2000:]}")


def run(args: argparse.Namespace) -> int:
    tally: Counter[tuple[str, int]] = Counter()
    try:
        if args.url:
            host, _, port = args.url.removeprefix("http://").rstrip("/").partition(":")
            attack(Server(host, int(port)), args.url, args.bodies, args.every, random.Random(args.seed), tally, None)
        else:
            binary = args.server or find_build().bin_dir / "llama-server"
            for i, profile in enumerate(args.profile or CONTEXT):
                bodies = args.bodies // len(args.profile or CONTEXT)
                with tempfile.TemporaryDirectory() as place, started(binary, profile, Path(place)) as (server, slots):
                    attack(server, profile, bodies, args.every, random.Random(args.seed * 1000 + i), tally, slots)
    except Wrong as e:
        print(e, file=sys.stderr)
        return 1
    finally:
        report(tally)
    return 0


def report(tally: Counter[tuple[str, int]]) -> None:
    statuses = sorted({status for _, status in tally})
    print(f"{'':14}" + "".join(f"{status:>8}" for status in statuses))
    for kind in sorted({kind for kind, _ in tally}):
        print(f"{kind:14}" + "".join(f"{tally[kind, status]:8}" for status in statuses))
    print(f"{sum(tally.values())} hostile requests")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--bodies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="an ordinary request after so many")
    parser.add_argument("--profile", choices=CONTEXT, action="append", help="only this one")
    parser.add_argument("--server", type=Path, help="a llama-server, for one with sanitizers")
    parser.add_argument("--url", help="a server that runs already, with the demo model")
    try:
        sys.exit(run(parser.parse_args()))
    except LlamamemError as e:
        print(f"hostile_requests: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
