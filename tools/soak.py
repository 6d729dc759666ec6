"""Wears the launcher and the server out: start/stop cycles, then a long mix of requests; what is left, what has grown.

    tools/soak.py --model M.gguf --sidecar S.gguf --cycles 200 --requests 2000
    tools/soak.py --model M.gguf --sidecar S.gguf --cycles 0 --profile batched -- --cache-ram 0

The second one without upstream's cache of prompts in RAM, which may fill 8 GiB and is meant to.

Each cycle is a `llamamem serve` of its own, ended in another way by turns (Ctrl-C, SIGTERM, `llamamem stop`, SIGKILL of
launcher or server, a signal while it loads); afterwards no process, no port and no file may be left. The requests are
streamed and not, cancelled midway, malformed and oversized, and the server's resident memory is read as they go.

Prints one JSON object. Exit status: 0 nothing was left and nothing grew, 1 something did, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

LLAMAMEM = [sys.executable, "-m", "llamamem.cli"]
ENDINGS = (
    *("interrupt", "terminate", "stop", "kill launcher", "kill server"),
    *("interrupt while loading", "interrupt while generating"),
)
STATUS = {"kill launcher": -signal.SIGKILL, "kill server": 1}  # else 0
FILES = {".json", ".log", ".lock"}  # of a state directory that is left in order
GROWN = 0.05  # of the resident memory after the first fifth of the requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sidecar", type=Path, required=True)
    parser.add_argument("--profile", default="serial")
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="of the server; more than the machine has to spare spin")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--health", action="store_true", help="end the requests with `llamamem health`, which must hold"
    )
    parser.add_argument("extra", nargs="*", help="after --: for llama-server")
    args = parser.parse_args()
    report: dict[str, Any] = {"profile": args.profile, "extra": args.extra}
    with tempfile.TemporaryDirectory(prefix="llamamem-soak-") as name:
        scratch = Path(name)
        for variable in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "TMPDIR"):
            os.environ[variable] = str(scratch / variable)
            (scratch / variable).mkdir()
        faults: list[str] = []
        if args.cycles:
            report["cycles"] = cycles(args, scratch, faults)
        if args.requests:
            report["requests"] = requests(args, scratch, faults)
    report |= {"ok": not faults, "faults": faults[:20]}
    print(json.dumps(report, indent=2))
    return 1 if faults else 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- start and stop


@contextmanager
def served(args: argparse.Namespace, port: int, talk: Path) -> Iterator[subprocess.Popen[str]]:
    line = [*LLAMAMEM, "serve", "--json", "--model", str(args.model), "--sidecar", str(args.sidecar)]
    line += ["--profile", args.profile, "--ctx-size", str(args.ctx_size), "--port", str(port)]
    line += ["--", "--threads", str(args.threads), *args.extra]
    with talk.open("w") as err:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def ready(process: subprocess.Popen[str], talk: Path) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"soak: llamamem serve did not get ready: {talk.read_text()[-400:]}")
    run: dict[str, Any] = json.loads(line)
    return run


def cycles(args: argparse.Namespace, scratch: Path, faults: list[str]) -> dict[str, Any]:
    port, talk, done = free_port(), scratch / "talk", Counter[str]()
    started, seconds = time.monotonic(), []
    pids: set[int] = set()
    for i in range(args.cycles):
        ending, at = ENDINGS[i % len(ENDINGS)], time.monotonic()
        with served(args, port, talk) as launcher:
            pid = end(ending, launcher, talk)
            status = launcher.wait(60)
        pids.add(pid)
        seconds.append(time.monotonic() - at)
        done[ending] += 1
        if status != STATUS.get(ending, 0):
            faults.append(f"cycle {i} ({ending}): exit status {status}: {talk.read_text()[-200:]}")
        if not soon(lambda pid=pid: not psutil.pid_exists(pid)):
            faults.append(f"cycle {i} ({ending}): the server {pid} lives on")
        if not soon(lambda: is_free(port)):
            faults.append(f"cycle {i} ({ending}): port {port} is not free")
        if i % 20 == 19:
            say(f"soak: {i + 1} cycles, {len(faults)} faults")
    runs = scratch / "XDG_STATE_HOME" / "llamamem" / "runs"
    left = [path.name for path in runs.iterdir() if path.suffix not in FILES and path.name not in FILES]
    left += [path.name for path in (scratch / "TMPDIR").iterdir()]
    faults += [f"file left: {name}" for name in left]
    left_over = [*psutil.Process().children(recursive=True), *(pid for pid in pids if psutil.pid_exists(pid))]
    faults += [f"process left: {process}" for process in left_over]
    return {
        "n": args.cycles,
        "endings": dict(done),
        "processes_left": len(left_over),
        "files_left": left,
        "records_kept": len(list(runs.glob("*.json"))),
        "seconds": round(time.monotonic() - started, 1),
        "seconds_a_cycle_median": round(sorted(seconds)[len(seconds) // 2], 2),
    }


def end(ending: str, launcher: subprocess.Popen[str], talk: Path) -> int:
    """Ends it in that way; the pid that the server had."""
    if ending == "interrupt while loading":
        runs = Path(os.environ["XDG_STATE_HOME"]) / "llamamem" / "runs"
        run = None
        while run is None and launcher.poll() is None:
            for path in runs.glob("*.json"):
                with suppress(FileNotFoundError):  # an old one is pruned just now
                    record = json.loads(path.read_text())
                    run = record if record["launcher_pid"] == launcher.pid else run
        if run is None:
            sys.exit(f"soak: llamamem serve ended: {talk.read_text()[-400:]}")
        launcher.send_signal(signal.SIGINT)
        return int(run["pid"])
    run = ready(launcher, talk)
    pid = int(run["pid"])
    if ending == "interrupt while generating":
        body = {"prompt": "hello", "n_predict": 10_000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{run['url']}/completion", json=body, timeout=60, trust_env=False) as answer:
            with suppress(httpx.HTTPError):
                for i, _ in enumerate(answer.iter_lines()):
                    if i == 0:
                        launcher.send_signal(signal.SIGINT)
    elif ending == "interrupt":
        launcher.send_signal(signal.SIGINT)
    elif ending == "terminate":
        launcher.terminate()
    elif ending == "stop":
        subprocess.run([*LLAMAMEM, "stop", run["name"]], check=True, capture_output=True, timeout=60)
    elif ending == "kill launcher":
        launcher.kill()
    else:
        os.kill(pid, signal.SIGKILL)
    return pid


# -- requests


def requests(args: argparse.Namespace, scratch: Path, faults: list[str]) -> dict[str, Any]:
    rng, talk, done, memory = random.Random(args.seed), scratch / "talk", Counter[str](), []
    started = time.monotonic()
    with served(args, 0, talk) as launcher:
        run = ready(launcher, talk)
        server = psutil.Process(run["pid"])
        # a connection each: the server closes one after a stream, and whoever reuses it in that moment is cut off
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(base_url=run["url"], timeout=60, trust_env=False, limits=limits) as http:
            for i in range(args.requests):
                try:
                    kind, fault = request(http, rng, args.ctx_size)
                except httpx.HTTPError as e:
                    kind, fault = "broken off", f"{type(e).__name__}: {e}"
                done[kind] += 1
                if not server.is_running() or server.status() == psutil.STATUS_ZOMBIE:
                    sys.exit(f"soak: the server ended at request {i} ({kind}): {talk.read_text()[-800:]}")
                if fault:
                    faults.append(f"request {i} ({kind}): {fault}")
                if i % max(1, args.requests // 20) == 0 or i == args.requests - 1:
                    memory.append((i, server.memory_info().rss, server.num_threads(), server.num_fds()))
                    say(f"soak: {i} requests, {memory[-1][1] / 2**20:.1f} MiB, {len(faults)} faults")
            soon(lambda: not any(slot["is_processing"] for slot in http.get("/slots").json()))
            green = health(run) if args.health else None
        after = server.memory_info().rss
    warm = [entry for entry in memory if entry[0] >= args.requests // 5]
    grown = warm[-1][1] / warm[0][1] - 1
    if grown > GROWN:
        faults.append(f"resident memory grew by {grown:.1%}")
    if warm[-1][3] > warm[0][3] + 8:
        faults.append(f"open files grew from {warm[0][3]} to {warm[-1][3]}")
    if green is False:
        faults.append("llamamem health does not hold")
    return {
        "n": args.requests,
        "kinds": dict(done),
        "resident_mib": [[i, round(rss / 2**20, 2)] for i, rss, _, _ in memory],
        "resident_mib_at_the_end": round(after / 2**20, 2),
        "grown_after_the_first_fifth": round(grown, 4),
        "threads": [memory[0][2], memory[-1][2]],
        "open_files": [memory[0][3], memory[-1][3]],
        "health": green,
        "seconds": round(time.monotonic() - started, 1),
    }


def request(http: httpx.Client, rng: random.Random, ctx_size: int) -> tuple[str, str | None]:
    """One request of a random kind; what was wrong with the answer."""
    kinds = {"plain": 4, "chat": 3, "streamed": 4, "cancelled": 3, "malformed": 2, "oversized": 2, "impossible": 2}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    text = "".join(rng.choices("abcdefgh ijklmnop", k=rng.randint(1, 80)))
    body: dict[str, Any] = {"prompt": text, "n_predict": rng.randint(1, 16), "cache_prompt": rng.random() < 0.5}
    if kind == "plain":
        return kind, expect(http.post("/completion", json=body), 200)
    if kind == "chat":
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": rng.randint(1, 12)}
        return kind, expect(http.post("/v1/chat/completions", json=chat), 200)
    if kind == "malformed":
        wrong = rng.choice([b"{", b'{"prompt": ', b"[1, 2", b"\xff\xfe", b'{"prompt": "x", "n_predict": "y"}', b""])
        answer = http.post("/completion", content=wrong, headers={"Content-Type": "application/json"})
        return kind, None if 400 <= answer.status_code < 600 else f"answered {answer.status_code} to {wrong!r}"
    if kind == "oversized":
        body["prompt"] = [rng.randrange(263, 400) for _ in range(ctx_size * rng.randint(1, 8) + 1)]
        return kind, expect(http.post("/completion", json=body), 400)
    if kind == "impossible":
        body |= rng.choice([{"rwkv_ms": {"scale": "x"}}, {"rwkv_ms": 3}, {"rwkv_ms": {"unknown": 1}}])
        return kind, expect(http.post("/completion", json=body), 400)
    body |= {"stream": True, "n_predict": 16 if kind == "streamed" else 400, "ignore_eos": kind == "cancelled"}
    lines = 0
    with http.stream("POST", "/completion", json=body) as answer:
        if answer.status_code != 200:
            return kind, f"answered {answer.status_code}"
        for line in answer.iter_lines():
            lines += bool(line)
            if kind == "cancelled" and lines > rng.randint(1, 5):
                return kind, None  # the connection is closed midway
    return kind, None if lines else "nothing was streamed"


def expect(answer: httpx.Response, status: int) -> str | None:
    return None if answer.status_code == status else f"answered {answer.status_code}: {answer.text[:200]}"


def health(run: dict[str, Any]) -> bool:
    line = [*LLAMAMEM, "health", "--json", "--run", run["name"]]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    with suppress(ValueError, KeyError):
        failed = [check["id"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
        say(f"soak: health: {', '.join(failed) or 'all'} {'failed' if failed else 'hold'}")
        return done.returncode == 0
    say(f"soak: health: {done.stderr[-300:]}")
    return False


# -- small things


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def soon(what: Any, timeout: float = 15.0) -> bool:
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    sys.exit(main())
