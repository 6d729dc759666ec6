"""A stand-in for llama-server: the same calls for readiness, and on request the ways in which a server goes wrong.

Run as a script: `fake_llama_server.py --port N --fake ok|crash|stall|slow|stubborn|dies [other flags, ignored]`.
`--version` claims the identity in the environment variable FAKE_IDENTITY.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers = {"/health": {"status": "ok"}, "/v1/models": {"data": [{"id": "fake"}]}}
        body = json.dumps(answers.get(self.path, {})).encode()
        self.send_response(200 if self.path in answers else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    def option(name: str, default: str) -> str:
        return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default

    if "--version" in sys.argv:
        print(f"llamamem: {os.environ['FAKE_IDENTITY']}")
        return
    mode = option("--fake", "ok")
    print("fake: started", flush=True)
    if mode == "crash":
        print("loading model\nerror: tensor blk.0.x is missing\nfake: bye", flush=True)
        sys.exit(1)
    if mode == "stall":
        time.sleep(60)
    if mode == "slow":  # logs for longer than the stall time-out of the test
        for i in range(15):
            print(f"loading {i}", flush=True)
            time.sleep(0.1)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = ThreadingHTTPServer(("127.0.0.1", int(option("--port", "0"))), Handler)
    if mode == "dies":
        threading.Timer(0.6, lambda: server.shutdown()).start()
    print("fake: listening", flush=True)
    server.serve_forever()
    sys.exit(7)


if __name__ == "__main__":
    main()
