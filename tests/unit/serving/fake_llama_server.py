"""A stand-in for llama-server: the same calls for readiness, and on request the ways in which a server goes wrong.

Run as a script: `fake_llama_server.py --port N --fake MODE [other flags, ignored]`, MODE one of

    ok        ready at once, ends on SIGTERM
    crash     logs an error and exits with 1
    stall     logs one line and is never ready
    slow      logs for longer than a test's stall time-out, then is ready
    late      waits with all it does until the file $FAKE_GATE is there
    deaf      logs for ever and never opens its port
    chatty    is ready at once and logs more than any pipe holds
    stubborn  ignores SIGTERM
    dies      exits with 7 a moment after it was ready
    brood     starts a process of its own, which ignores SIGTERM
    litter    leaves behind a process that ends soon after
    unloads   logs as a server that does not find its model, and exits with 1

`--version` claims the identity in the environment variable FAKE_IDENTITY. Every start adds a line to the file
$FAKE_STARTED, when that is set.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    dies = False

    def do_GET(self) -> None:
        answers = {"/health": {"status": "ok"}, "/v1/models": {"data": [{"id": "fake"}]}}
        body = json.dumps(answers.get(self.path, {})).encode()
        self.send_response(200 if self.path in answers else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.dies and self.path == "/v1/models":
            threading.Timer(0.6, self.server.shutdown).start()

    def log_message(self, *args: object) -> None:
        pass


def say(line: str) -> None:
    print(line, flush=True)


def option(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main() -> None:
    if "--version" in sys.argv:
        say(f"llamamem: {os.environ['FAKE_IDENTITY']}")
        return
    if "FAKE_STARTED" in os.environ:
        with open(os.environ["FAKE_STARTED"], "a", encoding="utf-8") as file:
            file.write(" ".join(sys.argv) + "\n")
    mode = option("--fake", "ok")
    say("fake: started")
    if mode == "crash":
        say("loading model\nerror: tensor blk.0.x is missing\nfake: bye")
        sys.exit(1)
    if mode == "unloads":
        say(f"llama_model_load: error loading model: failed to open {option('--model', '')}")
        sys.exit(1)
    if mode == "stall":
        time.sleep(60)
    if mode == "slow":
        for i in range(15):
            say(f"loading {i}")
            time.sleep(0.1)
    while mode == "deaf" or (mode == "late" and not Path(os.environ["FAKE_GATE"]).exists()):
        say("loading")
        time.sleep(0.05)
    if mode == "chatty":
        for i in range(20000):
            print(f"line {i} of a server that has much to say, more than a pipe would hold")
        say("fake: that was all")
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "litter":
        subprocess.run(["sh", "-c", "sleep 0.5 &"], check=True)
    if mode == "brood":
        code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('brood', flush=True); time.sleep(600)"
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline()
            say(f"fake: child {child.pid}")
            serve(mode)
    serve(mode)


def serve(mode: str) -> None:
    try:
        server = ThreadingHTTPServer(("127.0.0.1", int(option("--port", "0"))), Handler)
    except OSError as e:
        say(f"error: couldn't bind HTTP server socket: {e.strerror}")
        sys.exit(1)
    Handler.dies = mode == "dies"
    say("fake: listening")
    server.serve_forever()
    sys.exit(7)


if __name__ == "__main__":
    main()
