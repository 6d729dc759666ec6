"""The models of the MQAR comparison: what they compute, and that a comparison goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llamamem.lab.mqar import compare
from llamamem.lab.mqar_model import MIXERS, Attention, Mqar, RwkvMs, ShortConv
from llamamem.lab.mqar_plan import ARMS, Mixer, Run
from llamamem.lab.mqar_presets import CPU, PUBLISHED, SMOKE
from llamamem.lab.mqar_recurrence import read_after_write
from llamamem.lab.mqar_results import read_lines
from llamamem.lab.mqar_train import accuracy, new_model, train_run
from llamamem.reference.oracle import MemoryShape, write_state
from llamamem.reference.recurrence import recurrence
from llamamem.reference.torch_memory import Memory

QUICK = replace(SMOKE, seeds=(0,), lrs=dict.fromkeys(ARMS, (1e-2,)))


def random_features(decays: bool) -> list[Any]:
    torch.manual_seed(0)
    made: list[Any] = [(0.4 * torch.randn(3, 7, 2, 4, dtype=torch.float64)).requires_grad_() for _ in range(6)]
    made[1] = torch.sigmoid(made[1].detach()).requires_grad_() if decays else None
    return made


def by_reference(q: Any, decay: Any, k: Any, v: Any, a: Any, b: Any) -> torch.Tensor:
    q, k, v, a, b = (x.transpose(0, 1) for x in (q, k, v, a, b))
    added = v[..., :, None] * k[..., None, :]
    kept = added.new_ones(()) if decay is None else decay.transpose(0, 1)[..., None, :]
    erased = b[..., None, :].expand(added.shape)
    before, last = recurrence(torch.zeros_like(added[0]), kept.expand(added.shape), added, a, erased)
    return torch.matmul(torch.cat([before[1:], last[None]]), q[..., None])[..., 0].transpose(0, 1)


@pytest.mark.parametrize("decays", [False, True])
def test_the_recurrence_and_its_gradients_are_the_references(decays: bool) -> None:
    features = random_features(decays)
    inputs = [x for x in features if x is not None]
    weight = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    ours, theirs = read_after_write(*features), by_reference(*features)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (ours, theirs)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_the_recurrence_is_the_oracles_write_and_reads_after_it() -> None:
    features = random_features(True)
    q, decay, k, v, a, b = (x.detach().numpy()[1, :, 0] for x in features)
    S, one = np.zeros((1, 4, 4)), np.ones((1, 4))
    for t in range(7):
        f = {"decay": decay[t], "k": k[t], "v": v[t], "a": a[t], "b": b[t]}
        gates = dict.fromkeys(("keep", "erase", "write"), one)
        S = write_state(S, {name: value[None] for name, value in f.items()} | gates, MemoryShape(rank=4))
        np.testing.assert_allclose(read_after_write(*features)[1, t, 0].detach().numpy(), S[0] @ q[t], atol=1e-12)


def test_scalar_beta_is_deltanet_and_vector_beta_is_it_with_a_beta_a_channel() -> None:
    mixer = Mixer("scalar-beta", 8, 2, 4)
    torch.manual_seed(0)
    scalar = MIXERS["scalar-beta"](mixer)
    vector = MIXERS["vector-beta"](replace(mixer, arm="vector-beta"))
    vector.load_state_dict({k: v for k, v in scalar.state_dict().items() if "beta" not in k}, strict=False)
    with torch.no_grad():
        for name, parameter in vector.beta.named_parameters():
            parameter.copy_(scalar.beta.get_parameter(name).repeat_interleave(4, dim=0))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(scalar(x), vector(x))

    q, k, v = scalar.heads(x)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = torch.sigmoid(scalar.beta(x))
    S, reads = torch.zeros(2, 2, 4, 4), []
    for t in range(5):
        key, b = k[:, t], beta[:, t, :, None]
        S = S + torch.einsum("bni,bnj->bnij", b * (v[:, t] - torch.einsum("bnij,bnj->bni", S, key)), key)
        reads.append(torch.einsum("bnij,bnj->bni", S, q[:, t]))
    torch.testing.assert_close(scalar(x), scalar.answer(torch.stack(reads, dim=1)))


def test_the_arm_that_ships_is_the_references_memory() -> None:
    mixer = next(m for m in CPU.mixers if m.arm == "rwkv-ms" and m.state_floats(0) == 256)
    torch.manual_seed(0)
    arm = RwkvMs(mixer)
    assert type(arm.memory) is Memory
    x = torch.randn(2, 20, mixer.width)
    deltas, after = arm.memory(x + arm.conv(x), arm.memory.fresh(2))
    assert torch.equal(arm(x), deltas["o"]) and after.S.abs().sum(dim=(3, 4)).gt(0).sum(dim=2).eq(3).all()


@pytest.mark.parametrize("preset", [CPU, PUBLISHED, SMOKE], ids=lambda preset: preset.name)
def test_states_are_as_large_as_is_said(preset: Any) -> None:
    for mixer in preset.mixers:
        model = MIXERS[mixer.arm](mixer)
        if isinstance(model, RwkvMs):
            assert model.memory.fresh(1).S.numel() == mixer.state_floats(0)
        elif not isinstance(model, Attention):
            _, k, v = model.heads(torch.zeros(1, 1, mixer.width))
            assert torch.einsum("btni,btnj->btnij", v, k).numel() == mixer.state_floats(0)


@pytest.mark.parametrize("arm", ARMS)
def test_no_token_sees_a_later_one_and_all_see_the_earlier(arm: str) -> None:
    mixer = next(m for m in SMOKE.mixers if m.arm == arm)
    torch.manual_seed(0)
    model = Mqar(mixer, 32, init=0.3).eval()
    tokens = torch.randint(0, 32, (1, 12))
    changed = tokens.clone()
    changed[0, 6] = (tokens[0, 6] + 1) % 32
    a, b = model(tokens), model(changed)
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.isclose(a[:, 6:], b[:, 6:]).all(dim=-1).any()
    at = torch.zeros(1, 12, dtype=torch.bool)
    at[0, [3, 9]] = True
    torch.testing.assert_close(model(tokens, at), a[at])


def test_a_short_convolution_is_torchs() -> None:
    conv = ShortConv(3, 4)
    x = torch.randn(2, 9, 3)
    weight = conv.taps.T[:, None]
    want = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), weight, groups=3).transpose(1, 2)
    torch.testing.assert_close(conv(x), want)


def test_a_seed_starts_every_arm_alike() -> None:
    models = [new_model(SMOKE, Run(mixer, 1e-2, 3)) for mixer in SMOKE.mixers]
    for model in models:
        assert torch.equal(model.embed.weight, models[0].embed.weight)
        assert torch.equal(model.gated_conv.taps, models[0].gated_conv.taps)


def test_accuracy_is_the_share_of_exact_answers() -> None:
    model = Mqar(SMOKE.mixers[0], 32, init=0.1)
    tokens = torch.randint(0, 32, (200, 4)).numpy()
    with torch.no_grad():
        answers = model.eval()(torch.from_numpy(tokens)).argmax(-1).numpy()
    labels = np.full((200, 4), -100)
    labels[:, 1], labels[:, 3] = answers[:, 1], (answers[:, 3] + 1) % 32
    assert accuracy(model, [(SMOKE.test[0], (tokens, labels))]) == {"2@16": 0.5}


def test_attention_learns_the_smallest_task_and_stops() -> None:
    easy = replace(
        SMOKE, train=(SMOKE.train[0]._replace(examples=640),), epochs=20, batch=32, stop_at=0.6, validation=128
    )  # fmt: skip
    outcome = train_run(easy, Run(SMOKE.mixers[-1], 1e-2, 0))
    assert outcome["stopped"] == "accuracy" and outcome["validation"][-1] >= 0.6 > outcome["validation"][0]
    assert outcome["epochs"] < 20 and outcome["steps"] == 20 * outcome["epochs"]


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = compare(QUICK, tmp_path / "a.jsonl")
    assert len(whole) == 5
    text = (tmp_path / "a.jsonl").read_bytes()
    cut = [text.index(b"\n", text.index(b"vector-beta")) + 1, len(text) - 9]
    for end in cut:
        (tmp_path / "b.jsonl").write_bytes(text[:end])
        done: list[str] = []
        compare(QUICK, tmp_path / "b.jsonl", done=lambda line, n, total: done.append(line["arm"]))  # noqa: B023
        assert done == (["rwkv7", "rwkv-ms", "attention"] if end == cut[0] else ["attention"])
        again = read_lines(tmp_path / "b.jsonl")
        assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in whole]


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    outcome = train_run(replace(SMOKE, clip=0.0), Run(SMOKE.mixers[0], float("inf"), 0))
    assert outcome["stopped"] == "diverged" and outcome["loss"] is None
    json.dumps(outcome, allow_nan=False)


def test_the_command(llamamem: Callable[..., Any], tmp_path: Path) -> None:
    command = ("lab", "mqar", "--preset", "smoke", "--output", tmp_path / "out")
    done = llamamem(*command, "--json")
    said = json.loads(done.out)
    assert done.status == 0 and said["done"] == 20 and said["missing"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs.jsonl", "mqar.md", "mqar.png"}
    again = llamamem(*command)
    assert again.status == 0 and again.err == "" and "all 20 runs" in again.out
    if not torch.cuda.is_available():
        refused = llamamem(*command, "--device", "cuda")
        assert refused.status == 2 and "PyTorch sees no GPU here" in refused.err
