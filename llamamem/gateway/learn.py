"""What is learnt without an answer: texts and messages, read into a memory piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from llamamem.gateway.errors import Refusal
from llamamem.gateway.upstream import Served, Upstream, carried, memory_of
from llamamem.sessions.session import Memory

_ROOM = 8  # tokens of a context that are left free


async def pieces_of(upstream: Upstream, body: dict[str, Any], served: Served) -> list[list[int]]:
    """Token ids of what is to be learnt. Each text begins anew; one that no context holds is cut."""
    texts, messages = body.get("texts"), body.get("messages")
    if set(body) - {"texts", "messages", "stream"} or (texts is None) == (messages is None):
        raise Refusal(400, 'give {"texts": [...]} or {"messages": [...]}, and "stream": true for progress')
    special = messages is not None
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise Refusal(400, "messages: give a list of them")
        answer = await upstream.ask("POST", "/apply-template", {"messages": messages, "add_generation_prompt": False})
        texts = [answer["prompt"]]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise Refusal(400, "texts: give a list of texts that say something")
    pieces, most = [], served.n_ctx - _ROOM
    for text in texts:
        # what looks like a mark of the template is text, unless the template itself wrote it
        asked = {"content": text, "add_special": True, "parse_special": special}
        ids = (await upstream.ask("POST", "/tokenize", asked))["tokens"]
        pieces += [ids[at : at + most] for at in range(0, len(ids), most)]
    return pieces


async def read(
    upstream: Upstream, pieces: list[list[int]], origin: bytes | None, served: Served
) -> AsyncIterator[tuple[int, Memory]]:
    """Tokens of each piece, and the memory after it."""
    for ids in pieces:
        body = {"prompt": ids, "n_predict": 0, "cache_prompt": False, "rwkv_ms": carried(origin, {}, frozen=False)}
        answer = await upstream.ask("POST", "/completion", body)
        memory = memory_of(answer.get("rwkv_ms"), origin, served)
        origin = memory.data
        yield len(ids), memory
