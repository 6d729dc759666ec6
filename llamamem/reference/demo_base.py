"""The base of the demo: a Gemma 4 of 0.8M parameters, made from nothing and taught the small language.

It learns how people are introduced, asked for and named, and to guess a surname. It is not trained for long enough to
look one up by attention, even within a conversation; to know who is who is left to the memory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from llamamem.reference import demo_tokenizer, language
from llamamem.reference.chat_tokens import ChatTokens, Tokens

CONTEXT = 4096  # tokens

_RECENT = 20  # steps over which it is known whether a stage is learnt


class Stage(NamedTuple):
    """A part of the curriculum: it ends after `steps`, or when so much of what can be known is known."""

    facts: int  # at most
    gap: int  # tokens of small talk after them, at most
    steps: int
    until: float


CURRICULUM = (Stage(3, 12, 170, 1.1),)
_USER_WEIGHT = 0.02  # of a user's token in the loss: small talk cannot be foretold
_SAID_WEIGHT = 0.1  # of what the model says, but for surnames
_STRANGERS = 0.1  # share of questions about somebody who was not introduced


def new_base(seed: int) -> Gemma4ForCausalLM:
    """The untrained base: 8 layers, the sixth and the last with full attention, the last two with shared KV."""
    torch.manual_seed(seed)
    vocabulary = demo_tokenizer.vocabulary()
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary.tokens),
        "vocab_size_per_layer_input": len(vocabulary.tokens),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "sliding_window": 32,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.06,
        "bos_token_id": demo_tokenizer.BOS,
        "eos_token_id": demo_tokenizer.EOS,
        "pad_token_id": demo_tokenizer.PAD,
        "dtype": "float32",
    }
    config = Gemma4TextConfig(**settings)
    config._attn_implementation = "eager"
    return Gemma4ForCausalLM(config)


def train_base(
    seed: int,
    *,
    curriculum: Sequence[Stage] = CURRICULUM,
    batch: int = 16,
    lr: float = 5e-3,
    report: Callable[[int, float, float], None],
) -> Gemma4ForCausalLM:
    """Trains the base and rounds its weights to what BF16 can hold.

    `report` is told the step, the loss and the share of right surnames among those that can be known.
    """
    model = new_base(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    chat = ChatTokens.of_demo()
    rng = random.Random(seed)
    step = 0
    for stage in curriculum:
        recent: list[float] = []
        for i in range(stage.steps):
            falling = 1 - 0.98 * i / stage.steps if stage is curriculum[-1] else 1.0
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / 50) * falling
            loss, right = _loss(model, *_batch(rng, chat, batch, stage))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            recent = [*recent, right][-_RECENT:]
            report(step, loss.item(), right)
            if len(recent) == _RECENT and sum(recent) / _RECENT >= stage.until:
                break
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


def _loss(model: Gemma4ForCausalLM, ids: Tensor, weights: Tensor, known: Tensor) -> tuple[Tensor, float]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets, weights, known = ids[:, 1:], weights[:, 1:], known[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    right = (logits.argmax(-1) == targets)[known].float().mean()
    return (losses * weights).sum() / weights.sum(), right.item()


def save_base(model: Gemma4ForCausalLM, folder: Path) -> None:
    """Writes the directory that Hugging Face reads: weights in BF16, which is exact, tokenizer and chat template."""
    vocabulary = demo_tokenizer.vocabulary()
    whole: Any = model
    whole.to(torch.bfloat16).save_pretrained(folder)
    whole.float()
    for name, content in (
        ("tokenizer.json", demo_tokenizer.tokenizer_json(vocabulary)),
        ("tokenizer_config.json", demo_tokenizer.tokenizer_config()),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n")


def _batch(rng: random.Random, chat: ChatTokens, size: int, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, T], and for each its weight in the loss, and whether it is a surname that can be known."""
    rows = [_conversation(rng, chat, stage) for _ in range(size)]
    length = max(len(tokens.ids) for tokens, _, _ in rows)
    ids = torch.full((size, length), demo_tokenizer.PAD)
    weights = torch.zeros(size, length)
    known = torch.zeros(size, length, dtype=torch.bool)
    for i, (tokens, answers, knowable) in enumerate(rows):
        ids[i, : len(tokens.ids)] = torch.tensor(tokens.ids)
        weights[i, : len(tokens.ids)] = torch.where(torch.tensor(tokens.said), _SAID_WEIGHT, _USER_WEIGHT)
        weights[i, answers] = 1.0
        known[i, knowable] = True
    return ids, weights, known


def _conversation(rng: random.Random, chat: ChatTokens, stage: Stage) -> tuple[Tokens, list[int], list[int]]:
    """A conversation with questions at its end, and where their surnames stand: all, and those that can be known."""
    told = language.episode(rng, rng.randint(1, stage.facts), rng.randint(0, stage.gap), aside=0.2)
    strangers = [name for name in language.NAMES if name not in told.facts]
    asked = [(name, surname) for name, surname in told.facts.items()]
    if rng.random() < _STRANGERS:
        asked.append((rng.choice(strangers), rng.choice(language.SURNAMES)))
    rng.shuffle(asked)
    asked = asked[:4]
    questions = language.turns([language.question(n) for n, _ in asked], [language.answer(n, s) for n, s in asked])
    tokens = chat.encode([*told.conversation, *questions])
    surnames = {chat.id(demo_tokenizer.SPACE + surname) for surname in language.SURNAMES}
    answers = [i for i, token in enumerate(tokens.ids) if token in surnames][-len(asked) :]
    return tokens, answers, [i for i, (name, _) in zip(answers, asked, strict=True) if name in told.facts]
