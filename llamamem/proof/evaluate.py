"""A suite of prompts put to a running server, and two evaluations side by side.

Every line begins a conversation of its own: no text of another one is reused, and with a memory each begins on an empty
one, which it names. That is the proof that no conversation leaks into the next.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from llamamem.errors import LlamamemError
from llamamem.formats.results import Answer, ResultsFile, Served, request_sha256
from llamamem.formats.run import RunRecord
from llamamem.formats.suite import Line, Suite
from llamamem.proof.expect import failures
from llamamem.serving.client import Client

Progress = Callable[[Answer], None]


@dataclass(frozen=True)
class Settings:
    """How every line is asked. None leaves a value to the server, but a temperature of 0 is greedy throughout."""

    system: str | None = None
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 123
    max_tokens: int = 256

    def request(self, line: Line) -> dict[str, Any]:
        """The body of the chat completion."""
        body: dict[str, Any] = {
            "messages": line.conversation(self.system),
            "max_tokens": line.max_tokens or self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "cache_prompt": False,
        }
        if self.temperature == 0:
            return {**body, "top_k": 1}
        given = {"top_p": self.top_p, "top_k": self.top_k}
        return {**body, **{name: value for name, value in given.items() if value is not None}}


@dataclass(frozen=True)
class Evaluation:
    """`answers` in the order of the suite; `n_kept` of them were in the output file already."""

    served: Served
    answers: tuple[Answer, ...]
    n_kept: int

    @property
    def ok(self) -> bool:
        """Everything was answered, and every expectation holds."""
        return all(answer.error is None and answer.ok is not False for answer in self.answers)

    def summary(self) -> dict[str, Any]:
        """Counts, per group too; latencies in ms and tokens over the lines that were answered."""
        answered = [answer for answer in self.answers if answer.error is None]
        groups: dict[str, list[Answer]] = {}
        for answer in self.answers:
            if answer.group is not None:
                groups.setdefault(answer.group, []).append(answer)
        latencies = sorted(answer.latency_ms for answer in answered)
        used = [answer.usage or {} for answer in answered]
        return {
            **_counts(self.answers),
            "kept": self.n_kept,
            "groups": {name: _counts(members) for name, members in groups.items()},
            "latency_ms": {
                "median": statistics.median(latencies) if latencies else None,
                "max": latencies[-1] if latencies else None,
            },
            "prompt_tokens": sum(usage.get("prompt_tokens", 0) for usage in used),
            "completion_tokens": sum(usage.get("completion_tokens", 0) for usage in used),
        }


@dataclass(frozen=True)
class Pair:
    """One line, answered by both. `parted` is the first character where the texts differ, None where they do not."""

    id: str
    ok: bool | None
    base_ok: bool | None
    response: str | None
    base_response: str | None
    parted: int | None


@dataclass(frozen=True)
class Comparison:
    """Ids of the lines that only this run, or only the base run, answered as expected; how many texts are the same."""

    base: Served
    pairs: tuple[Pair, ...]

    @property
    def better(self) -> list[str]:
        return [pair.id for pair in self.pairs if pair.ok is True and pair.base_ok is False]

    @property
    def worse(self) -> list[str]:
        return [pair.id for pair in self.pairs if pair.ok is False and pair.base_ok is True]

    @property
    def same_text(self) -> int:
        return sum(pair.response is not None and pair.response == pair.base_response for pair in self.pairs)


def identify(client: Client, record: RunRecord | None) -> tuple[Served, int]:
    """Who is asked, from its own mouth where it tells, and how many slots it has."""
    props = client.props()
    memory = props.get("rwkv_ms") or {}
    served = Served(
        run_id=None if record is None else record.run_id,
        url=str(client.url).rstrip("/"),
        model=str(props.get("model_path") or (record.model if record else "")),
        base_sha256=memory.get("base_sha256") or (record.base_sha256 if record else None),
        sidecar_sha256=memory.get("sidecar_sha256"),
        mode=memory.get("mode"),
    )
    return served, int(props.get("total_slots", 1))


def evaluate(
    client: Client,
    suite: Suite,
    settings: Settings,
    *,
    record: RunRecord | None = None,
    output: Path | None = None,
    concurrency: int = 1,
    progress: Progress | None = None,
) -> Evaluation:
    """Asks what `output` does not answer yet, `concurrency` lines at a time.

    An answer is in the file before the next is waited for. Raises LlamamemError when the server goes away, and when
    the file holds answers of another model or to other questions.
    """
    served, n_slots = identify(client, record)
    if concurrency > n_slots:
        raise LlamamemError(
            f"--concurrency {concurrency}: the server has {n_slots} slot{'s' * (n_slots > 1)}; give no more than that,"
            " or serve with --profile batched --parallel N"
        )
    report = progress or _nothing
    if output is None:
        return _evaluate(client, suite, settings, served, concurrency, {}, _nothing, report)
    with ResultsFile(output) as file:
        kept = _usable(file, suite, settings, served)
        try:
            return _evaluate(client, suite, settings, served, concurrency, kept, file.append, report)
        except (LlamamemError, KeyboardInterrupt) as e:
            said = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e)
            raise LlamamemError(f"{said}; what was answered is in {output}: the same command goes on there") from e


def compare(evaluation: Evaluation, base: Mapping[str, Answer], name: str) -> Comparison:
    """Side by side with the answers of a base run. `name` is what an error calls it.

    Raises LlamamemError when the base run was asked otherwise, or has not answered everything.
    """
    pairs = []
    for answer in evaluation.answers:
        other = base.get(answer.id)
        if other is None:
            raise LlamamemError(f"--compare {name}: has no answer to {answer.id!r}; run the same suite there")
        if other.request_sha256 != answer.request_sha256:
            raise LlamamemError(
                f"--compare {name}: {answer.id!r} was asked with other words or other settings; run it again with those"
                " of this run"
            )
        parted = _parted(answer.response, other.response)
        pairs.append(Pair(answer.id, answer.ok, other.ok, answer.response, other.response, parted))
    return Comparison(next(iter(base.values())).served, tuple(pairs))


def _usable(file: ResultsFile, suite: Suite, settings: Settings, served: Served) -> dict[str, Answer]:
    """The answers that need not be asked for again; what the server refused is."""
    kept = {}
    for line in suite.lines:
        answer = file.answers.get(line.id)
        if answer is None:
            continue
        other = answer.served.other_than(served)
        if answer.request_sha256 != request_sha256(settings.request(line)):
            other = "other words or other settings"
        if other is not None:
            raise LlamamemError(
                f"--output {file.path}: {line.id!r} was answered with {other}; give another file, or remove this one"
            )
        if answer.error is None:
            kept[line.id] = answer
    return kept


def _evaluate(
    client: Client,
    suite: Suite,
    settings: Settings,
    served: Served,
    concurrency: int,
    kept: Mapping[str, Answer],
    keep: Progress,
    progress: Progress,
) -> Evaluation:
    answers = {}
    for line in suite.lines:
        if line.id in kept:
            answers[line.id] = judged = _judged(line, kept[line.id])
            if judged != kept[line.id]:
                keep(judged)
            progress(judged)
    todo = [line for line in suite.lines if line.id not in kept]
    for answer in _asked(client, todo, settings, served, concurrency):
        answers[answer.id] = answer
        keep(answer)
        progress(answer)
    return Evaluation(served, tuple(answers[line.id] for line in suite.lines), len(kept))


def _asked(client: Client, lines: Sequence[Line], settings: Settings, served: Served, concurrency: int) -> Any:
    """The answers as they come. Threads are daemons, so that Ctrl-C need not wait for a long answer."""
    todo: SimpleQueue[Line] = SimpleQueue()
    done: SimpleQueue[Answer | Exception] = SimpleQueue()
    stopped = threading.Event()
    for line in lines:
        todo.put(line)

    def work() -> None:
        try:
            while not stopped.is_set():
                done.put(_ask(client, todo.get_nowait(), settings, served))
        except Empty:
            pass
        except Exception as e:
            done.put(e)

    for _ in range(min(concurrency, len(lines))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in lines:
            answer = done.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        stopped.set()


def _ask(client: Client, line: Line, settings: Settings, served: Served) -> Answer:
    request = settings.request(line)
    if served.sidecar_sha256:
        request["rwkv_ms"] = {"memory": None}
    asked, start = time.time(), time.perf_counter()
    response = client.request("POST", "/v1/chat/completions", json=request)
    latency_ms = (time.perf_counter() - start) * 1000
    known: dict[str, Any] = {
        "id": line.id,
        "group": line.group,
        "request": request,
        "request_sha256": request_sha256(request),
        "latency_ms": round(latency_ms, 3),
        "served": served,
        "time": asked,
    }
    if response.status_code in (401, 403):
        raise LlamamemError(f"{client.url}: the server wants a key (HTTP {response.status_code}); give --api-key")
    unmet = None if line.expect is None else False
    try:
        value = response.json()
        if not response.is_success:
            return Answer(ok=unmet, error=f"HTTP {response.status_code}: {value['error']['message']}", **known)
        choice = value["choices"][0]
        answer = Answer(
            ok=None,
            response=choice["message"].get("content") or "",
            reasoning=choice["message"].get("reasoning_content"),
            finish_reason=choice.get("finish_reason"),
            usage=value.get("usage"),
            timings=value.get("timings"),
            memory=_memory(value.get("rwkv_ms")),
            **known,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer(ok=unmet, error=f"HTTP {response.status_code}: {response.text[:200]!r}", **known)
    return _judged(line, answer)


def _memory(said: dict[str, Any] | None) -> dict[str, Any] | None:
    return said and {name: said.get(name) for name in ("tokens_written", "origin")}


def _judged(line: Line, answer: Answer) -> Answer:
    """By the suite as it is now: its expectations may have changed since the answer was kept."""
    found = failures(line.expect, answer.response or "") if line.expect else ()
    return answer.model_copy(update={"group": line.group, "ok": not found if line.expect else None, "failures": found})


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "lines": len(answers),
        "checked": sum(answer.ok is not None for answer in answers),
        "passed": sum(answer.ok is True for answer in answers),
        "failed": sum(answer.ok is False for answer in answers),
        "errors": sum(answer.error is not None for answer in answers),
    }


def _parted(a: str | None, b: str | None) -> int | None:
    if a is None or b is None or a == b:
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _nothing(_: Answer) -> None:
    pass
