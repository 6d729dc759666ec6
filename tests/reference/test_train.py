"""The trainer, on the demo's base untrained: gradients, truncation, resuming, its files, and a smoke that can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs llamamem[reference]")
pytest.importorskip("transformers", reason="needs llamamem[reference]")

from llamamem.errors import LlamamemError  # noqa: E402
from llamamem.formats.checkpoint import read_checkpoint  # noqa: E402
from llamamem.formats.sidecar.export import export_sidecar  # noqa: E402
from llamamem.reference import demo_base, train_run  # noqa: E402
from llamamem.reference.adapter import read_adapter  # noqa: E402
from llamamem.reference.chat_tokens import ChatTokens  # noqa: E402
from llamamem.reference.gguf_base import convert_base  # noqa: E402
from llamamem.reference.recurrence import recurrence  # noqa: E402
from llamamem.reference.train_data import Stage, read_examples  # noqa: E402
from llamamem.reference.train_smoke import train_smoke  # noqa: E402

CHAT = {
    "messages": [{"role": "user", "content": "who is anna?"}, {"role": "assistant", "content": "that is anna fox."}]
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    demo_base.save_base(demo_base.new_base(0), folder)
    return folder


@pytest.fixture
def request_(base: Path, tmp_path: Path) -> train_run.Request:
    stages = (Stage(2, 8, 3, 2), Stage(3, 24, 3, 2))
    return train_run.Request(base=base, output=tmp_path / "adapter", stages=stages, save_every=2)


def tensors(folder: Path) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in read_checkpoint(folder).tensors.items()}


def test_the_recurrence_is_what_autograd_says_of_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)

    given = (
        random(2, 1, 3, 3),
        random(4, 2, 1, 3, 3),
        random(4, 2, 1, 3, 3),
        random(4, 2, 1, 3),
        random(4, 2, 1, 3, 3),
    )
    assert torch.autograd.gradcheck(recurrence, given)
    S, kept, added, a, erased = given
    history = []
    for t in range(4):
        history.append(S)
        S = kept[t] * S + added[t] + (S @ a[t][..., None]) * erased[t]
    found, last = recurrence(*given)
    assert torch.allclose(found, torch.stack(history)) and torch.allclose(last, S)


@pytest.mark.parametrize("start", ["recall", "original"])
@pytest.mark.parametrize("memory", ["rwkv_ms", "delta_rule"])
def test_smoke_holds(request_: train_run.Request, memory: str, start: str) -> None:
    checks = train_run.smoke(replace(request_, memory=memory, start=start))
    assert all(check.ok for check in checks), checks
    assert not request_.output.exists()


def test_smoke_fails_when_the_memory_is_not_heard(request_: train_run.Request) -> None:
    trainer = train_run.trainer_of(request_)
    trainer.handle.scale = 0.0
    failed = {check.what for check in train_smoke(trainer) if not check.ok}
    assert {"every tensor in use has a gradient", "every tensor in use moved"} <= failed


def test_smoke_fails_when_nothing_is_written(request_: train_run.Request) -> None:
    trainer = train_run.trainer_of(request_)
    trainer.handle.frozen = True
    assert "the memory was written" in {check.what for check in train_smoke(trainer) if not check.ok}


def test_a_run_that_was_cut_off_and_resumed_is_the_run(request_: train_run.Request, tmp_path: Path) -> None:
    whole = train_run.run(request_)
    assert whole["steps"] == 6

    class Cut(Exception):
        pass

    def cut(progress: Any, total: int) -> None:
        if progress.step == 5:  # one after a checkpoint, in the second stage
            raise Cut

    again = replace(request_, output=tmp_path / "again")
    with pytest.raises(Cut):
        train_run.run(again, cut)
    assert train_run.run(replace(again, resume=True))["steps"] == 6
    assert tensors(request_.output) == tensors(again.output)
    with pytest.raises(LlamamemError, match="another plan"):
        train_run.run(replace(again, resume=True, lr=1e-3))
    with pytest.raises(LlamamemError, match="not empty"):
        train_run.run(again)


def test_the_same_seed_gives_the_same_adapter_and_another_another(request_: train_run.Request, tmp_path: Path) -> None:
    short = replace(request_, stages=(Stage(2, 8, 2, 2),))
    outputs = [tmp_path / name for name in ("a", "b", "c")]
    for output, seed in zip(outputs, (1, 1, 2), strict=True):
        train_run.run(replace(short, output=output, seed=seed))
    a, b, c = (tensors(output) for output in outputs)
    assert a == b != c


def test_segments_change_what_is_attended_to_and_not_what_is_remembered(request_: train_run.Request) -> None:
    """A gradient over two segments is not that of each alone; with one in sight it is cut and training still goes."""
    trainers = [train_run.trainer_of(replace(request_, segment=16, bptt=bptt)) for bptt in (0, 1)]
    losses = [trainer.train_step().loss for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradients = [[p.grad.clone() for p in trainer.parameters if p.grad is not None] for trainer in trainers]
    assert any(not torch.allclose(x, y, atol=1e-9) for x, y in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("memory", "files"),
    [
        ("rwkv_ms", ["adapter_metadata.json", "delta_mem_adapter.safetensors"]),
        ("delta_rule", ["delta_mem_adapter.pt"]),  # as delta-mem has it
    ],
)
def test_the_checkpoint_becomes_a_sidecar_and_comes_back_exactly(
    request_: train_run.Request, tmp_path: Path, memory: str, files: list[str]
) -> None:
    train_run.run(replace(request_, memory=memory, stages=(Stage(2, 8, 1, 2),)))
    made = sorted(path.name for path in request_.output.iterdir())
    assert made == [*files, "delta_mem_config.json", "trainer_state.pt"]
    model = tmp_path / "base.gguf"
    convert_base(request_.base, model, "base")
    export_sidecar(request_.output, model, tmp_path / "memory.gguf")
    trained, exported = (read_adapter(path) for path in (request_.output, tmp_path / "memory.gguf"))
    assert trained.kind == exported.kind == memory
    for layer, module in trained.layers.items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, exported.layers[layer].state_dict()[name])


def test_chats_of_ones_own_are_learnt(request_: train_run.Request, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    sessions = {"sessions": [CHAT["messages"], CHAT["messages"]]}
    data.write_text(json.dumps(CHAT) + "\n\n" + json.dumps(sessions) + "\n")
    first, second = read_examples(data, ChatTokens.read(request_.base))
    assert len(first) == 1 and len(second) == 2
    chat = ChatTokens.read(request_.base)
    learnt = [i for i, weight in zip(first[0].ids, first[0].weights, strict=True) if weight]
    assert learnt == [*chat.ids("that is anna fox."), chat.id("<turn|>")]
    losses: list[float] = []
    request = replace(request_, data=data, steps=12, batch=2)
    train_run.run(request, lambda progress, total: losses.append(progress.loss))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: expected"),
        ('{"messages": []}', ":1: expected"),
        ('{"messages": [{"role": "user"}]}', ":1: expected"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        ("", "no conversation"),
    ],
)
def test_a_line_that_is_no_chat_is_refused_by_number(base: Path, tmp_path: Path, line: str, reason: str) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(line + "\n")
    with pytest.raises(LlamamemError, match=reason):
        read_examples(data, ChatTokens.read(base))


def test_the_command(llamamem: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    assert llamamem("train", "--base", base, "--smoke").status == 0
    assert llamamem("train", "--base", base).status == 2
    bad = llamamem("train", "--base", base, "--output", tmp_path / "x", "--layers", "0,99")
    assert bad.status == 2 and "99" in bad.err
    assert llamamem("train", "--base", tmp_path, "--smoke").status == 2


def test_weight_decay_is_of_matrices_alone(request_: train_run.Request) -> None:
    def after_a_step(weight_decay: float) -> tuple[dict[str, torch.Tensor], float]:
        trainer = train_run.trainer_of(replace(request_, weight_decay=weight_decay))
        trainer.train_step()
        named = dict(trainer.handle.layers.named_parameters())
        return {name: p.detach().clone() for name, p in named.items()}, trainer.optimizer.param_groups[0]["lr"]

    (without, lr), (decayed, _) = after_a_step(0.0), after_a_step(0.5)
    start = dict(train_run.trainer_of(request_).handle.layers.named_parameters())
    for name, p in without.items():
        trained = not torch.equal(p, start[name])  # what is read by nothing has no gradient
        expected = p - lr * 0.5 * start[name].detach() if trained and p.ndim > 1 else p
        torch.testing.assert_close(decayed[name], expected, rtol=1e-6, atol=1e-8)
