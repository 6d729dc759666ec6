"""What the tests of this directory do with a running server."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamamem.native.build import Build
from llamamem.serving.client import Client
from llamamem.serving.process import Server, launch
from llamamem.serving.profiles import make_plan

TOKENS = range(263, 448)  # of model_a: neither special nor a single byte


@dataclass(frozen=True)
class Running:
    server: Server
    client: Client

    @property
    def log(self) -> str:
        return self.server.log_path.read_text(encoding="utf-8", errors="replace")


Serve = Callable[..., Running]
ServeDemo = Callable[..., Running]  # the same with the demo model, whose answers mean something


def started(
    stack: ExitStack,
    build: Build,
    tmp_path: Path,
    model: Path,
    sidecar: Path | None,
    profile: str,
    *extra: str,
    **kwargs: Any,
) -> Running:
    own = {"port": 0, "ctx_size": 1024, "slot_dir": tmp_path, "bin_dir": Path(build.bin_dir)}
    more = ["--threads", "1", *extra]
    plan = make_plan(model, sidecar=sidecar, profile=profile, extra=more, environ={}, **{**own, **kwargs})
    server = stack.enter_context(launch(plan, directory=tmp_path / "runs"))
    server.wait_ready(stall_timeout=60)
    return Running(server, stack.enter_context(Client(server.url, timeout=120)))


def random_prompt(seed: int, n: int) -> list[int]:
    """Token ids: <bos> and n - 1 ordinary ones."""
    return [2, *random.Random(seed).choices(TOKENS, k=n - 1)]


def generate(client: Client, prompt: list[int], n: int, **kwargs: Any) -> dict[str, Any]:
    """Exactly n greedy tokens, in slot 0 and on its memory unless another slot is named."""
    return client.completion(prompt, n_predict=n, ignore_eos=True, return_tokens=True, **{"id_slot": 0, **kwargs})


def generate_clear(client: Client, prompt: list[int], n: int, **kwargs: Any) -> tuple[list[int], float]:
    """n greedy tokens out of TOKENS, and the least distance in log-probability between a first and a second choice.

    Bytes and special tokens are banned: the server merges the probabilities of bytes that make up one character.
    """
    banned = [[token, False] for token in range(TOKENS.start)]
    answer = generate(client, prompt, n, n_probs=TOKENS.stop, logit_bias=banned, **kwargs)
    margins = []
    for token, entry in zip(answer["tokens"], answer["completion_probabilities"], strict=True):
        allowed = [top for top in entry["top_logprobs"] if top["id"] in TOKENS]
        assert allowed[0]["id"] == token
        margins.append(allowed[0]["logprob"] - allowed[1]["logprob"])
    return answer["tokens"], min(margins)
