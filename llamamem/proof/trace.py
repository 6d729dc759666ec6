"""A reference trace against a running server: the same text, and the same tokens where the trace has them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Literal

from llamamem.errors import LlamamemError
from llamamem.formats.trace import Generation, Trace
from llamamem.serving.client import Client

# Neither side need have processed the last token that it sampled, and a session may add what closes the turn.
_OPEN_END = 2


@dataclass(frozen=True)
class Difference:
    """`index` counts from 0 among the prompt's tokens, the new tokens or the characters of the text.

    `expected` and `got` are a token id or a character; None where that side has ended.
    """

    where: Literal["prompt token", "new token", "character"]
    index: int
    expected: int | str | None
    got: int | str | None

    def __str__(self) -> str:
        def show(value: int | str | None) -> str:
            return "nothing more" if value is None else repr(value)

        return f"{self.where} {self.index}: expected {show(self.expected)}, got {show(self.got)}"


@dataclass(frozen=True)
class TraceComparison:
    """`expected` and `got` are texts; token ids are those of the new tokens, None where the trace has none.

    `first_difference` is the earliest that is known: of the prompt, else of the new tokens, else of the text.
    `differing_token` is the index of the server's new token in which they part, None if that is not known.
    """

    ok: bool
    text_equal: bool
    tokens_equal: bool | None
    first_difference: Difference | None
    differing_token: int | None
    expected: str
    got: str
    expected_ids: tuple[int, ...] | None
    got_ids: tuple[int, ...]
    n_prompt: int
    hint: str | None

    @property
    def detail(self) -> str:
        if self.ok:
            ids = "text and token ids are equal" if self.tokens_equal else "the text is equal (the trace has no ids)"
            return f"{ids}: {self.n_prompt} prompt tokens, {len(self.got_ids)} new"
        by_character = self.first_difference is not None and self.first_difference.where == "character"
        at = f" (in the server's new token {self.differing_token})" if self.differing_token is not None else ""
        return f"{self.first_difference}{at if by_character else ''}"


def compare_trace(client: Client, trace: Trace, *, slot: int = 0) -> TraceComparison:
    """Asks the server what the trace was asked, in `slot`, on a memory that is empty, whatever the slot was given.

    Raises LlamamemError when the server cannot answer.
    """
    messages = [{"role": "user", "content": trace.generation.prompt}]
    prompt = _post(client, "/apply-template", {"messages": messages, **_NO_THINKING})["prompt"]
    prompt_ids = tuple(client.tokenize(prompt, add_special=True, parse_special=True))
    body: dict[str, Any] = {**_sampling(trace.generation), **_NO_THINKING}
    memory = client.props().get("rwkv_ms") is not None
    if memory:
        body["rwkv_ms"] = {"memory": None, "frozen": False, "scale": 1.0}
    answer = client.chat(
        messages,
        max_tokens=trace.generation.max_new_tokens,
        id_slot=slot,
        cache_prompt=False,
        return_tokens=True,
        verbose=True,
        **body,
    )
    try:
        got = answer["choices"][0]["message"]["content"] or ""
        got_ids = tuple(int(token) for token in answer["__verbose"]["tokens"])
        n_prompt = int(answer["usage"]["prompt_tokens"])
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise LlamamemError(f"{client.url}: the answer has no {e}; is this this project's llama-server?") from e
    if n_prompt != len(prompt_ids):
        raise LlamamemError(
            f"{client.url}: the chat prompt has {n_prompt} tokens, /apply-template and /tokenize give"
            f" {len(prompt_ids)}; is this this project's llama-server?"
        )
    return _compare(client, trace, got, got_ids, prompt_ids)


# Gemma's own default, which llama-server turns round for templates that know the switch.
_NO_THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}


def _sampling(generation: Generation) -> dict[str, Any]:
    seed = {} if generation.sample_seed is None else {"seed": generation.sample_seed}
    if generation.greedy:
        return {**seed, "temperature": 0.0, "top_k": 1}
    # Hugging Face's defaults; llama-server's would cut off more.
    settings = {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    return {**seed, **defaults, **{key: value for key, value in settings.items() if value is not None}}


def _post(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.request("POST", path, json=body)
    if not response.is_success:
        raise LlamamemError(f"{client.url}: POST {path} answered {response.status_code}: {response.text[:200]}")
    answer: dict[str, Any] = response.json()
    return answer


def _compare(
    client: Client,
    trace: Trace,
    got: str,
    got_ids: tuple[int, ...],
    prompt_ids: tuple[int, ...],
) -> TraceComparison:
    expected = trace.result.assistant_display
    # Cut off in the middle of a character, one side shows a replacement and the other nothing.
    cut = "\ufffd" if len(got_ids) >= trace.generation.max_new_tokens else ""
    text = _first_difference("character", _without(expected, cut), _without(got, cut))
    processed = trace.session.processed_input_ids
    expected_ids, tokens, differing = None, None, None
    if processed is not None:
        tokens = _first_difference("prompt token", processed[: len(prompt_ids)], prompt_ids)
        expected_ids = processed[len(prompt_ids) :]
        if tokens is None:
            tokens = _first_difference("new token", expected_ids, got_ids)
            if tokens is not None and None in (tokens.expected, tokens.got):
                tokens = tokens if abs(len(expected_ids) - len(got_ids)) > _OPEN_END else None
            differing = None if tokens is None else tokens.index
    if text is not None and differing is None and (tokens is None or tokens.where == "new token"):
        differing = _token_of(client, got_ids, got, text.index)
    first = tokens or text
    return TraceComparison(
        ok=first is None,
        text_equal=text is None,
        tokens_equal=None if processed is None else tokens is None,
        first_difference=first,
        differing_token=differing,
        expected=expected,
        got=got,
        expected_ids=expected_ids,
        got_ids=got_ids,
        n_prompt=len(prompt_ids),
        hint=_hint(trace, first, got),
    )


def _hint(trace: Trace, first: Difference | None, got: str) -> str | None:
    if first is None:
        return None
    if not trace.generation.greedy:
        return "the trace was sampled, and no other random generator repeats it; record it with do_sample false"
    if first.where == "prompt token":
        return "the prompt was put together differently: compare the chat templates and the tokenizers"
    if got == trace.result.assistant_display:
        return "the text is the same, of other tokens: compare the tokenizers"
    if got.strip() == trace.result.assistant_display.strip():
        return "the texts differ in white space at their ends only"
    return "is the base, the sidecar and the quantisation that of the trace? near ties may fall either way"


def _first_difference(where: Literal["prompt token", "new token", "character"], a: Any, b: Any) -> Difference | None:
    """Of two strings or two tuples of ids."""
    if a == b:
        return None
    n = min(len(a), len(b))
    i = next((i for i in range(n) if a[i] != b[i]), n)
    return Difference(where, i, a[i] if i < len(a) else None, b[i] if i < len(b) else None)


def _without(text: str, end: str) -> str:
    return text.rstrip(end) if end else text


def _token_of(client: Client, tokens: tuple[int, ...], text: str, character: int) -> int | None:
    """Index of the token that the character of the text comes from; None when the text is not the tokens' own."""

    def shown(n: int) -> str:
        return str(_post(client, "/detokenize", {"tokens": tokens[:n]})["content"])

    if not tokens or character >= len(text) or not shown(len(tokens)).startswith(text):
        return None
    return bisect_right(range(1, len(tokens) + 1), character, key=lambda n: len(shown(n)))
