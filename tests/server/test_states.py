"""States over HTTP: refused ones change nothing, a memory goes on without its text, a killed server loses none."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from server_runs import TOKENS, Running, Serve, generate, random_prompt
from state_files import edited, u32

from llamamem.errors import LlamamemError
from llamamem.native.build import Build
from llamamem.serving.client import Client

KILLS = int(os.environ.get("LLAMAMEM_TEST_KILLS", "4"))  # 100 take some minutes


def post(running: Running, action: str, slot: int = 0, **body: object) -> httpx.Response:
    return running.client.request("POST", f"/slots/{slot}", params={"action": action}, json=body)


def reason_of(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    message: str = answer.json()["error"]["message"]
    return message[message.index("[") + 1 : message.index("]")]


def refused(running: Running, action: str, filename: str) -> str:
    """The reason with which the server refuses a file."""
    reason = reason_of(post(running, action, filename=filename))
    wait_for_log(running, Counter([reason]))
    return reason


def wait_for_log(running: Running, reasons: Counter[str]) -> None:
    """The log has a line for each refusal; the server writes it in a thread of its own."""
    deadline = time.monotonic() + 10
    while True:
        said = Counter(re.findall(r"rolled back, nothing is changed: \[(.*?)\]", running.log))
        if reasons <= said or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    assert reasons <= said


@pytest.mark.parametrize(("save", "restore"), [("save", "restore"), ("memory-save", "memory-restore")])
def test_a_damaged_file_is_refused_and_both_slots_go_on_as_if_nothing_had_been_tried(
    serve: Serve, tmp_path: Path, save: str, restore: str
) -> None:
    prompts = [random_prompt(seed, 60) for seed in (1, 2)]

    def start() -> tuple[Running, list[list[int]]]:
        running = serve("batched", parallel=2)
        answers = [generate(running.client, p, 8, id_slot=i, cache_prompt=True) for i, p in enumerate(prompts)]
        return running, [[*p, *a["tokens"]] for p, a in zip(prompts, answers, strict=True)]

    def go_on(running: Running, texts: list[list[int]]) -> list[Any]:
        """Tokens, and the log-probabilities of all others at each of them."""
        found = []
        for i, text in enumerate(texts):
            prompt = [*text, *random_prompt(9, 6)[1:]]
            answer = generate(running.client, prompt, 24, id_slot=i, cache_prompt=True, n_probs=TOKENS.stop)
            assert answer["timings"]["prompt_n"] == 6
            found += [answer["tokens"], answer["completion_probabilities"]]
        return found

    undisturbed = go_on(*start())
    running, texts = start()
    assert post(running, save, filename="good.bin").status_code == 200
    good = (tmp_path / "good.bin").read_bytes()
    block, end = good.index(b"RMVS"), len(good) - 48
    rng = random.Random(3)
    found: Counter[str] = Counter()

    def try_it(data: bytes) -> str:
        (tmp_path / "bad.bin").write_bytes(data)
        reason = reason_of(post(running, restore, filename="bad.bin"))
        found[reason] += 1
        return reason

    def flip(at: int) -> str:
        bad = bytearray(good)
        bad[at] ^= 1 << rng.randrange(8)
        return try_it(bytes(bad))

    # headers: of the file, of the block, of the trailer
    assert {flip(at) for at in range(8)} == {"state-format"}
    assert {flip(at) for at in range(8, 12)} <= {"state-checksum", "state-truncated"}
    assert {flip(at) for at in range(12, block + 320)} == {"state-checksum"}
    assert {flip(at) for at in (*range(end, end + 4), *range(end + 8, end + 16))} == {"state-truncated"}
    assert {flip(at) for at in range(end + 4, end + 8)} == {"state-version"}
    assert {flip(at) for at in range(end + 16, len(good))} == {"state-checksum"}
    # payload
    assert {flip(rng.randrange(block + 320, end)) for _ in range(2000)} == {"state-checksum"}
    # cut, and more behind it
    assert {try_it(good[: rng.randrange(len(good))]) for _ in range(200)} == {"state-truncated"}
    assert {try_it(good + more) for more in (b"j", b"junk" * 12, good)} == {"state-truncated"}
    # honest files of another sidecar, of another base, of a later version
    assert try_it(edited(good, {128: bytes(32)})) == "state-identity"
    assert try_it(edited(good, {160: bytes(32)})) == "state-identity"
    assert try_it(edited(good, {4: u32(2)})) == "state-version"
    wait_for_log(running, found)
    assert refused(running, restore, "missing.bin") == "state-unreadable"
    assert post(running, restore, filename="../good.bin").status_code == 400
    assert go_on(running, texts) == undisturbed
    (tmp_path / "bad.bin").write_bytes(edited(good, {}))  # what is edited above is refused for nothing else
    assert post(running, restore, filename="bad.bin").status_code == 200


def test_a_state_of_another_kind_of_server_is_refused(serve: Serve, tmp_path: Path) -> None:
    memory, base = serve("serial"), serve("base", parallel=1)
    generate(memory.client, random_prompt(1, 30), 2, cache_prompt=True)
    memory.client.save_slot(0, "with.bin")
    memory.client.save_memory(0, "alone.bin")
    generate(base.client, random_prompt(1, 30), 2, cache_prompt=True)
    base.client.save_slot(0, "without.bin")
    assert refused(memory, "restore", "without.bin") == "state-no-memory"
    assert refused(memory, "restore", "alone.bin") == "state-kind"
    assert refused(memory, "memory-restore", "with.bin") == "state-kind"
    for name in ("with.bin", "alone.bin"):
        assert refused(base, "restore", name) == "state-has-memory"
    answer = post(base, "memory-save", filename="x.bin")
    assert answer.status_code == 400 and "--memory-adapter" in answer.json()["error"]["message"]


def test_a_slot_file_with_tokens_that_cannot_be_is_refused_with_its_reason(serve: Serve, tmp_path: Path) -> None:
    running = serve("serial")
    generate(running.client, random_prompt(1, 30), 2, cache_prompt=True)
    before = running.client.save_slot(0, "good.bin"), running.client.slots()[0]["rwkv_ms"]
    good = bytearray((tmp_path / "good.bin").read_bytes())
    good[12 + 4 * 3 : 12 + 4 * 4] = u32(1 << 20)  # the first token: behind the vocabulary
    (tmp_path / "bad.bin").write_bytes(edited(bytes(good), {}))
    assert refused(running, "restore", "bad.bin") == "state-kv"
    assert running.client.slots()[0]["rwkv_ms"] == before[1]


@pytest.mark.parametrize("profile", ["serial", "fused", "batched"])
def test_a_memory_goes_on_without_its_text(serve: Serve, tmp_path: Path, profile: str) -> None:
    running = serve(profile, parallel=1)
    client = running.client
    first, second = random_prompt(1, 80), random_prompt(2, 40)
    blank = generate(client, second, 16)["tokens"]
    generate(client, first, 1)
    saved = client.save_memory(0, "memory.bin")
    assert saved["tokens_written"] == 80 and saved["n_bytes"] == (tmp_path / "memory.bin").stat().st_size
    state = client.slots()[0]["rwkv_ms"]

    client.erase_slot(0)
    assert client.slots()[0]["rwkv_ms"]["tokens_written"] == 0
    client.restore_memory(0, "memory.bin")
    restored = client.slots()[0]["rwkv_ms"]
    assert {name: restored[name] for name in ("tokens_written", "current_state", "norms")}.items() <= state.items()
    assert restored["origin"] and restored["given"] and restored["n_text"] == 0
    remembering = generate(client, second, 16)
    assert remembering["timings"]["prompt_n"] == 40
    assert client.slots()[0]["rwkv_ms"]["tokens_written"] == 80 + 40 + 15
    assert remembering["tokens"] != blank
    # another request without common text starts on the same memory
    assert generate(client, second, 16)["tokens"] == remembering["tokens"]
    # the memory alone emptied, with the text in place or without
    client.reset_memory(0)
    assert client.slots()[0]["rwkv_ms"]["tokens_written"] == 0
    assert generate(client, second, 16, cache_prompt=False)["tokens"] == blank


def test_a_second_conversation_has_the_logits_of_the_reference(
    serve: Serve, build: Build, model: Path, tmp_path: Path
) -> None:
    """On the build with an exact GELU, as the reference has it: what a slot says on the memory of another prompt."""
    exact = Path(build.bin_dir).parent / "bin-exact"
    (tmp_path / "bin").mkdir()
    for library in exact.iterdir():
        (tmp_path / "bin" / library.name).symlink_to(library)
    shutil.copy(Path(build.bin_dir) / "llama-server", tmp_path / "bin")  # it loads the libraries beside it
    with np.load(model.with_name("logits.npz")) as file:
        first, second = file["p0_ids"].tolist(), file["p1_ids"].tolist()
        expected, forgetful = file["p1_mem_v1_after_p0_kvdrop"], file["p1_mem_v1"]
    client = serve("fused", "-fa", "off", "-ctk", "f32", "-ctv", "f32", bin_dir=tmp_path / "bin").client
    generate(client, first, 1)
    client.save_memory(0, "memory.bin")
    far = 0.0
    for n in (1, 2, 40, len(second)):
        client.erase_slot(0)
        client.restore_memory(0, "memory.bin")
        answer = generate(client, second[:n], 1, n_probs=expected.shape[1])
        found = {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}
        got = np.array([found[token] for token in range(expected.shape[1])])
        assert np.abs(got - log_softmax(expected[n - 1])).max() < 5e-5
        far = max(far, np.abs(got - log_softmax(forgetful[n - 1])).max())
    assert far > 0.05


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())


def test_frozen_and_scaled_by_request_and_by_slot(serve: Serve) -> None:
    running, base = serve("serial"), serve("base", parallel=1)
    client = running.client
    first, second = random_prompt(1, 80), random_prompt(2, 40)
    without = generate(base.client, second, 16)["tokens"]
    generate(client, first, 1)
    client.save_memory(0, "memory.bin")
    client.restore_memory(0, "memory.bin")
    remembering = generate(client, second, 16)["tokens"]
    assert remembering != without

    frozen = {"frozen": True, "scale": 0}
    client.restore_memory(0, "memory.bin")
    state = client.slots()[0]["rwkv_ms"]
    assert generate(client, second, 16, rwkv_ms=frozen)["tokens"] == without
    assert client.slots()[0]["rwkv_ms"]["norms"] == state["norms"]
    # for that request only
    assert generate(client, second, 16)["tokens"] == remembering
    # for the slot, until it is changed; the request has the last word
    assert client.set_memory(0, frozen=False, scale=0.0)["scale"] == 0
    assert generate(client, second, 16)["tokens"] == without
    assert generate(client, second, 16, rwkv_ms={"scale": 1})["tokens"] == remembering
    client.set_memory(0)
    assert generate(client, second, 16)["tokens"] == remembering

    for wrong in ("no", {"frozen": 1}, {"scale": "1"}, {"other": 1}):
        answer = client.request("POST", "/completion", json={"prompt": first, "n_predict": 1, "rwkv_ms": wrong})
        assert answer.status_code == 400 and "rwkv_ms" in answer.json()["error"]["message"]


def test_a_memory_survives_what_makes_room(serve: Serve) -> None:
    """Other slots and the prompt cache of the server take text away, never a memory that a slot was given."""
    running = serve("batched", "--cache-ram", "64", parallel=2)
    client = running.client
    first, second = random_prompt(1, 80), random_prompt(2, 40)
    generate(client, first, 1, id_slot=0)
    client.save_memory(0, "memory.bin")
    client.erase_slot(0)
    client.restore_memory(0, "memory.bin")
    alone = generate(client, second, 16, id_slot=0)["tokens"]
    for seed in range(3, 9):
        generate(client, random_prompt(seed, 300), 4, id_slot=1, cache_prompt=True)
        generate(client, random_prompt(seed, 300), 4, cache_prompt=True)
    generate(client, random_prompt(20, 300), 4, id_slot=0, cache_prompt=True)
    assert generate(client, second, 16, id_slot=0, cache_prompt=True)["tokens"] == alone
    # another slot with the same text has its own, empty memory
    fresh = serve("batched", parallel=2)
    assert (
        generate(client, second, 16, id_slot=1, cache_prompt=True)["tokens"]
        == generate(fresh.client, second, 16, id_slot=1)["tokens"]
    )


def test_sessions_take_turns_over_slots(serve: Serve, tmp_path: Path) -> None:
    """64 memories over 4 slots: each conversation gets exactly the answers that it gets alone."""
    n_sessions, n_turns = 64, 2
    turns = {(s, t): random_prompt(1000 * s + t, 12) for s in range(n_sessions) for t in range(n_turns)}

    def answer(client: Client, session: int, turn: int, slot: int) -> list[int]:
        if turn == 0:
            client.erase_slot(slot)
        else:
            client.restore_memory(slot, f"s{session}.bin")
        tokens: list[int] = generate(client, turns[session, turn], 6, id_slot=slot)["tokens"]
        client.save_memory(slot, f"s{session}.bin")
        return tokens

    running = serve("batched", parallel=4)
    rng = np.random.default_rng(1)
    together: dict[tuple[int, int], list[int]] = {}
    for turn in range(n_turns):
        for session in rng.permutation(n_sessions):
            together[int(session), turn] = answer(running.client, int(session), turn, int(rng.integers(4)))
    assert len({tuple(tokens) for tokens in together.values()}) > n_sessions  # they are not all the same

    alone = serve("batched", parallel=4)
    for session in range(n_sessions):
        for turn in range(n_turns):
            assert answer(alone.client, session, turn, 0) == together[session, turn], (session, turn)


@pytest.mark.parametrize("action", ["save", "memory-save"])
def test_a_server_killed_while_it_saves_leaves_a_file_that_loads(serve: Serve, action: str) -> None:
    rng = random.Random(5)
    running = serve("serial")
    generate(running.client, random_prompt(1, 60), 1, cache_prompt=True)
    assert post(running, action, filename="kept.bin").status_code == 200
    for _ in range(KILLS):
        # while saves follow one another, at a random moment
        killer = threading.Timer(rng.uniform(0.0, 0.05), os.kill, (running.server.process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(LlamamemError):
            while True:
                post(running, action, filename="kept.bin")
        running = serve("serial")
        assert post(running, action.replace("save", "restore"), filename="kept.bin").status_code == 200


def test_an_unwritable_target_is_an_error_and_nothing_is_left(serve: Serve, tmp_path: Path) -> None:
    running = serve("serial")
    generate(running.client, random_prompt(1, 30), 1, cache_prompt=True)
    (tmp_path / "taken.bin").mkdir()
    for action in ("save", "memory-save"):
        answer = post(running, action, filename="taken.bin")
        assert answer.status_code in (400, 500) and "[state-unwritable]" in answer.json()["error"]["message"]
    with pytest.raises(LlamamemError, match="state-unwritable"):
        running.client.save_memory(0, "taken.bin")
    assert not list(tmp_path.glob("taken.bin.*"))


def test_a_page_of_another_site_can_do_nothing_to_a_slot(serve: Serve) -> None:
    """A browser sends such a request without asking first, and only hides the answer from the page."""
    client = serve("serial").client
    generate(client, random_prompt(1, 30), 1)
    before = client.slots()[0]["rwkv_ms"]
    for origin in ("https://evil.example", "http://localhost.evil.example", "null"):
        for action in ("memory-reset", "erase", "memory-set"):
            answer = client.request(
                "POST", "/slots/0", params={"action": action}, headers={"Origin": origin}, content="{}"
            )
            assert answer.status_code == 403 and "--cors-origins" in answer.json()["error"]["message"]
    assert client.slots()[0]["rwkv_ms"] == before
    own = client.request(
        "POST", "/slots/0", params={"action": "memory-reset"}, headers={"Origin": "http://127.0.0.1:80"}, content="{}"
    )
    assert own.status_code == 200
