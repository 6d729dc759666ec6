"""One conversation with the reference and with llama-server: they agree, and injected faults are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import json_docs
import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError  # noqa: E402
from llamamem.formats.conversation import Script, Step  # noqa: E402
from llamamem.formats.demo_files import demo_files  # noqa: E402
from llamamem.proof.conversation import compare, hold, standard_script  # noqa: E402
from llamamem.proof.conversation_native import NativeConversation, started  # noqa: E402
from llamamem.proof.conversation_report import EXACT, PRODUCT, Parity  # noqa: E402
from llamamem.reference import language  # noqa: E402
from llamamem.reference.attach import Fault, attach  # noqa: E402

MODEL_A = Path(__file__).parents[1] / "data" / "model_a"
BASE = MODEL_A / "model-f32.gguf"
CHUNK, WINDOW = 48, 32  # of model_a

# <= 60 tokens, a memory resumed, then some more
SHORT = Script(
    steps=(
        Step(say="this is anna fox. the dog sleeps by the river.", max_new_tokens=6),
        Step(save="a"),
        Step(resume="a"),
        Step(say="who is anna?", max_new_tokens=6),
    )
)


def test_the_standard_conversation_has_everything_in_it() -> None:
    steps = standard_script(1024).steps
    assert {step.act for step in steps} == {"say", "reset", "save", "resume", "park"}
    before_the_first_resume = [step.say for step in steps[: [s.act for s in steps].index("resume")] if step.say]
    assert sum(map(language.n_tokens, before_the_first_resume)) > 1024


@pytest.mark.parametrize(
    ("version", "exact", "profile"),
    [(1, True, "serial"), (2, True, "serial"), (1, False, "serial"), (1, True, "fused")],
)
def test_reference_and_server_agree(version: int, exact: bool, profile: str) -> None:
    found = hold(
        str(MODEL_A), BASE, MODEL_A / f"sidecar-v{version}.gguf", exact_gelu=exact, profile=profile
    )  # fmt: skip
    assert found.ok, found.summary
    bounds = EXACT if exact else PRODUCT
    assert found.largest["logits"] <= bounds.logits and found.largest["state"] <= bounds.state
    assert not exact or max(found.largest["S"], found.largest["prev"]) <= EXACT.state  # absolute
    assert all(turn.tokens_equal and turn.counters_equal for turn in found.turns)
    assert max(turn.written for turn in found.turns) > 10 * CHUNK > 10 * WINDOW
    assert sum(turn.new_tokens for turn in found.turns) > 200


@pytest.mark.parametrize("exact", [True, False])
def test_they_agree_on_the_demo_model(exact: bool) -> None:
    files = demo_files()
    found = hold(str(files.base), files.model, files.sidecar, exact_gelu=exact)
    assert found.ok, found.summary
    assert not exact or max(found.largest["S"], found.largest["prev"]) <= EXACT.state
    assert max(turn.written for turn in found.turns) > 1024 + 48  # more than a chunk, and than the window
    assert all(turn.tokens_equal and turn.counters_equal for turn in found.turns)


def short(fault: Fault, every_token: bool = True) -> Parity:
    sidecar = MODEL_A / "sidecar-v1.gguf"
    return hold(str(MODEL_A), BASE, sidecar, script=SHORT, exact_gelu=True, every_token=every_token, inject=fault)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("skip-write", 3, 20),
        Fault("skip-write", 0, 55),
        Fault("lost-source", 5, 1),
        Fault("lost-source", 2, 70),
        Fault("shift-counter", 4, 9),
        Fault("shift-counter", 1, 47),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.layer}-{fault.token}",
)
def test_a_fault_is_found_in_its_layer_and_token(fault: Fault) -> None:
    found = short(fault)
    assert not found.ok and found.holds, found.summary
    assert found.location is not None
    assert found.location.what == ("counter" if fault.kind == "shift-counter" else "S")
    assert f"layer {fault.layer}, token {fault.token}" in found.summary


def test_a_fault_that_is_forgotten_within_its_turn_is_found_by_looking_at_every_token() -> None:
    fault = Fault("lost-source", 5, 1)
    assert short(fault, every_token=False).ok
    found = short(fault)
    assert found.holds and "although it ends alike" in found.summary


def test_a_fault_that_changes_nothing_is_no_success() -> None:
    fault = Fault("lost-source", 2, 0)  # there is none before the first token
    found = short(fault)
    assert found.ok and not found.holds and "makes no difference" in found.summary


def test_another_base_parts_without_a_fault_of_the_memory(loaded: Any, memory: Any, tmp_path: Path) -> None:
    weight = loaded.model.model.norm.weight  # above all memories
    before = weight.clone()
    with started(BASE, MODEL_A / "sidecar-v1.gguf", tmp_path, exact_gelu=True) as (client, slots):
        try:
            weight.mul_(1.01)
            found = compare(loaded, memory, NativeConversation(client, slots), SHORT, EXACT)
        finally:
            weight.copy_(before)
    assert not found.ok and found.location is None and "look at the base" in found.summary


def test_another_sidecar_is_not_compared(loaded: Any, tmp_path: Path) -> None:
    other = attach(loaded.model, MODEL_A / "sidecar-v2.gguf")
    try:
        with started(BASE, MODEL_A / "sidecar-v1.gguf", tmp_path) as (client, slots):
            native = NativeConversation(client, slots)
            with pytest.raises(LlamamemError, match="another sidecar"):
                compare(loaded, other, native, SHORT, EXACT)
    finally:
        other.remove()


def test_the_command(llamamem: Any, tmp_path: Path) -> None:
    script = tmp_path / "short.json"
    script.write_text(SHORT.model_dump_json(exclude_unset=True) + "\n")
    files = ["--base", MODEL_A, "--model", BASE, "--sidecar", MODEL_A / "sidecar-v1.gguf", "--script", script]
    done = llamamem("reference", "parity", *files, "--exact-gelu", "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)
    assert found["ok"] and found["holds"] and len(found["turns"]) == 4 and found["generated_tokens"] == 12

    done = llamamem("reference", "parity", *files, "--exact-gelu", "--inject", "skip-write:3:20", "--json")
    faulty = json.loads(done.out)
    assert done.status == 0 and not faulty["ok"] and faulty["holds"]
    assert (faulty["location"]["layer"], faulty["location"]["token"]) == (3, 20)
    assert json_docs.faults([found, faulty], json_docs.sections()["llamamem reference parity"]) == []
    done = llamamem("reference", "parity", *files, "--logits", "0")
    assert done.status == 1 and "they part in step 0" in done.out
    for inject, said in (("nonsense", "KIND:LAYER:TOKEN"), ("skip-write:11:20", "layer 11 has no memory")):
        done = llamamem("reference", "parity", *files, "--inject", inject)
        assert done.status == 2 and said in done.err
