"""One slot of a running llama-server, driven for the comparison of whole conversations."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llamamem.errors import LlamamemError
from llamamem.formats.state import Identity, State, decode_state
from llamamem.native.build import find_build
from llamamem.serving.client import Client
from llamamem.serving.process import launch
from llamamem.serving.profiles import make_plan

_GREEDY: dict[str, Any] = {"temperature": 0.0, "top_k": 1, "cache_prompt": True, "return_tokens": True}


@contextlib.contextmanager
def started(
    model: Path,
    sidecar: Path,
    directory: Path,
    *,
    profile: str = "serial",
    ctx_size: int = 4096,
    exact_gelu: bool = False,
    bin_dir: Path | None = None,
) -> Iterator[tuple[Client, Path]]:
    """A server for one comparison, with an F32 KV cache and no flash attention, and its slot directory.

    `exact_gelu` runs it on the test build's CPU library, which lacks the fp16 table of GELU.
    """
    build = find_build(exact_gelu=exact_gelu, bin_dir=bin_dir)
    slots = directory / "slots"
    slots.mkdir(parents=True, exist_ok=True)
    plan = make_plan(
        model,
        sidecar=sidecar,
        profile=profile,
        bin_dir=Path(build.bin_dir),
        ctx_size=ctx_size,
        port=0,
        slot_dir=slots,
        extra=["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--threads", "1"],
    )
    with _libraries(Path(build.lib_dir) if exact_gelu else None):
        server = launch(plan, directory=directory / "runs")
    with server:
        server.wait_ready()
        with Client(server.url) as client:
            yield client, slots


@contextlib.contextmanager
def _libraries(directory: Path | None) -> Iterator[None]:
    """The child's libraries come from there first."""
    before = os.environ.get("LD_LIBRARY_PATH")
    if directory is not None:
        os.environ["LD_LIBRARY_PATH"] = f"{directory}:{before}" if before else str(directory)
    try:
        yield
    finally:
        if before is not None:
            os.environ["LD_LIBRARY_PATH"] = before
        else:
            os.environ.pop("LD_LIBRARY_PATH", None)


class NativeConversation:
    """`slot` of the server behind `client`, whose --slot-save-path is `slot_dir`. Leave the slot to it alone."""

    def __init__(self, client: Client, slot_dir: Path, slot: int = 0):
        self.client = client
        self.slot_dir = slot_dir
        self.slot = slot
        memory = client.props().get("rwkv_ms")
        if memory is None:
            raise LlamamemError(f"{client.url}: serves no memory; start it with --sidecar")
        self.identity = Identity(memory["sidecar_sha256"], memory["base_sha256"])
        self.tokens: list[int] = []  # what the KV cache holds
        self._origin: bytes | None = None
        self._files: list[Path] = []
        self.reset()

    def prompt_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation by the server's chat template, up to where the model is to answer."""
        body = {"messages": list(messages), "chat_template_kwargs": {"enable_thinking": False}}
        answer = self.client.request("POST", "/apply-template", json=body)
        if not answer.is_success:
            raise LlamamemError(
                f"{self.client.url}: /apply-template answered {answer.status_code}: {answer.text[:200]}"
            )
        text: str = answer.json()["prompt"]
        return text

    def tokenize(self, text: str, *, start: bool) -> list[int]:
        """`start`: with the start token of a whole text."""
        return self.client.tokenize(text, add_special=start, parse_special=True)

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, ban: Collection[int], vocabulary: int
    ) -> tuple[list[int], np.ndarray]:
        """Greedy new tokens, and the log-probabilities [n, V] that each was chosen by; NaN where none were given."""
        answer = self._complete(
            prompt,
            n_predict=max_new_tokens,
            n_probs=vocabulary,
            logit_bias=[[token, False] for token in sorted(ban)],
        )
        ids = [int(token) for token in answer["tokens"]]
        rows = answer.get("completion_probabilities", [])
        if len(rows) != len(ids):
            raise LlamamemError(
                f"{self.client.url}: {len(ids)} tokens came with the probabilities of {len(rows)}; tokens that are"
                " parts of a character have none, so ban them"
            )
        found = np.full((len(ids), vocabulary), np.nan, np.float32)
        for i, row in enumerate(rows):
            for top in row["top_logprobs"]:
                found[i, top["id"]] = top["logprob"]
        self.tokens = [*prompt, *ids[:-1]]
        return ids, found

    def feed(self, token: int) -> None:
        """One more token, and nothing generated."""
        text = [*self.tokens, token]
        self._complete(text, n_predict=0)
        self.tokens = text

    def _complete(self, prompt: Sequence[int], **kwargs: Any) -> dict[str, Any]:
        cached = len(self.tokens)
        answer = self.client.completion(list(prompt), id_slot=self.slot, **_GREEDY, **kwargs)
        if (got := answer["timings"]["cache_n"]) != cached and prompt[:cached] == self.tokens:
            raise LlamamemError(
                f"{self.client.url}: slot {self.slot} went on from {got} tokens, {cached} went through it; is somebody"
                " else using it?"
            )
        return answer

    def memory(self) -> State:
        """What it remembers now."""
        return decode_state(self.save(), identity=self.identity)

    def save(self) -> bytes:
        """The memory alone, as the bytes of its file."""
        return self.client.take_memory(self.slot)[0]

    def resume(self, data: bytes) -> None:
        """Text gone, and the memory of those bytes."""
        self.client.give_memory(self.slot, data)
        self.tokens, self._origin = [], data

    def reset(self) -> None:
        """Text and memory gone."""
        self.client.erase_slot(self.slot)
        self.tokens, self._origin = [], None

    def park(self) -> None:
        """Saves text, KV cache and memory, drops them all and restores them."""
        back = self.mark()
        self.client.erase_slot(self.slot)
        back()

    def mark(self) -> Callable[[], None]:
        """Notes where the conversation is; what is returned goes back there."""
        tokens, origin = list(self.tokens), self._origin
        path = self._file("slot") if tokens else None
        if path is not None:
            self.client.save_slot(self.slot, path.name)

        def back() -> None:
            if path is not None:
                self.client.restore_slot(self.slot, path.name)
            elif origin is not None:
                self.client.give_memory(self.slot, origin)
            else:
                self.client.erase_slot(self.slot)
            self.tokens, self._origin = list(tokens), origin

        return back

    def close(self) -> None:
        """Removes every file that it made."""
        for path in self._files:
            path.unlink(missing_ok=True)

    def _file(self, what: str) -> Path:
        path = self.slot_dir / f"llamamem-{os.getpid()}-{secrets.token_hex(4)}.{what}"
        self._files.append(path)
        return path
