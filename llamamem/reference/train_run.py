"""A training run from a request: reads the base and the data, trains, writes checkpoints, resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamamem.errors import LlamamemError
from llamamem.formats.gguf_file import replacing
from llamamem.formats.sidecar.layout import RWKV_MS
from llamamem.reference.adapter import Adapter, read_adapter
from llamamem.reference.attach import attach
from llamamem.reference.base import load_base
from llamamem.reference.chat_tokens import ChatTokens
from llamamem.reference.starts import RECALL
from llamamem.reference.train import STATE, Plan, Progress, Trainer
from llamamem.reference.train_data import CURRICULUM, RecallTask, Stage, read_examples
from llamamem.reference.train_smoke import Check, train_smoke
from llamamem.reference.trainable import AdapterSpec, new_adapter, save_adapter


@dataclass(frozen=True)
class Request:
    """What the user asked for; the fields are the options of `llamamem train`."""

    base: Path
    output: Path | None = None
    data: Path | None = None
    steps: int = 200
    batch: int = 8
    lr: float = 5e-3
    weight_decay: float = 0.2
    segment: int = 256
    bptt: int = 0
    memory: str = RWKV_MS  # one of sidecar.layout.MEMORY_KINDS
    start: str = RECALL  # one of starts.STARTS
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    rank: int = 8
    heads: int = 1
    lora: int = 32
    states: int = 4
    chunk: int = 1024
    semantics: int = 1
    init: Path | None = None
    resume: bool = False
    save_every: int = 100
    seed: int = 0
    threads: int = 1
    stages: tuple[Stage, ...] = ()  # of the recall task; its own unless given


def run(request: Request, show: Callable[[Progress, int], None] = lambda progress, total: None) -> dict[str, Any]:
    """Trains to the end, writes `request.output` and says how it went. Raises LlamamemError."""
    output = request.output
    assert output is not None
    if not request.resume and output.exists() and any(output.iterdir()):
        raise LlamamemError(f"{output}: is not empty; give another --output, or --resume")
    trainer = trainer_of(request, output if request.resume else request.init)
    if request.resume:
        trainer.load_state(output / STATE)
    metadata = {"base_model": request.base.name, "trained_with": "llamamem train", "seed": request.seed}
    last: Progress | None = None

    def save() -> None:
        save_adapter(trainer.handle.adapter, output, {**metadata, "steps": trainer.step}, force=True)
        with replacing(output / STATE) as part:
            torch.save(trainer.state_dict(), part)

    for last in trainer.run():
        show(last, trainer.total)
        if last.step % request.save_every == 0:
            save()
    save()
    loss, recall = (last.loss, last.recall) if last is not None else (float("nan"), None)
    return {"steps": trainer.step, "loss": loss, "recall": recall, "output": str(output)}


def smoke(request: Request) -> list[Check]:
    """Two steps that must really train something. Nothing is written."""
    return train_smoke(trainer_of(request, request.init))


def trainer_of(request: Request, start: Path | None = None) -> Trainer:
    """A trainer at its first step, of a new adapter, or of that in the directory `start`."""
    torch.set_num_threads(request.threads)
    chat = ChatTokens.read(request.base)
    model = load_base(request.base).model
    spec = AdapterSpec(
        memory=request.memory,
        start=request.start,
        layers=request.layers,
        rank=request.rank,
        heads=request.heads,
        lora=request.lora,
        states=request.states,
        chunk=request.chunk,
        semantics=request.semantics,
    )
    adapter: Adapter = new_adapter(spec, model, request.seed) if start is None else read_adapter(start)
    source = RecallTask(chat) if request.data is None else read_examples(request.data, chat)
    stages = (request.stages or CURRICULUM) if request.data is None else (Stage(0, 0, request.steps, request.batch),)
    plan = Plan(
        stages,
        lr=request.lr,
        weight_decay=request.weight_decay,
        seed=request.seed,
        segment=request.segment,
        bptt=request.bptt,
    )
    return Trainer(model, attach(model, adapter), plan, source)
