"""The OpenAPI description of what the gateway adds to llama-server: `GET /openapi.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamamem import __version__
from llamamem.gateway.routes import GENERATES

_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 200}}
_SESSION_HEADER = {
    "name": "X-Session-Id",
    "in": "header",
    "description": "The session whose memory the request runs on. Other headers and members of the body name it too.",
    "schema": {"type": "string"},
}
_CONVERSATION_HEADER = {
    "name": "X-Conversation-Id",
    "in": "header",
    "description": "The conversation of the session that this is a turn of.",
    "schema": {"type": "string"},
}
_MEMORY = {
    "name": "memory",
    "in": "query",
    "description": "off: no session is named; read: its memory is read and stays as it is.",
    "schema": {"type": "string", "enum": ["on", "read", "off"]},
}


def description() -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {"title": "llamamem gateway", "version": __version__},
        "security": [{"key": []}],
        "paths": {**_sessions(), **_generating(), "/health": {"get": _call("Ready, or not", {200: None, 503: None})}},
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Session": _SESSION, "Error": _ERROR},
        },
    }


def _sessions() -> dict[str, Any]:
    at = "/v1/sessions/{name}"
    number = {"type": "number", "minimum": 0, "maximum": 1}
    text = {"type": "string"}
    session = {200: "Session"}
    file = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    page = [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
        {"name": "after", "in": "query", "schema": text},
    ]
    exported = _call("The memory as a file", {404: "Error"})
    exported["responses"]["200"] = {"description": "docs/state-format.md has it by byte", **file}
    imported = _call("Make the file its memory", session | {201: "Session", 409: "Error"})
    texts, messages = {"type": "array", "items": text}, {"type": "array", "items": {"type": "object"}}
    learnt = {"texts": texts, "messages": messages, "stream": {"type": "boolean"}}
    paths: dict[str, Any] = {
        "/v1/sessions": {"get": {**_call("A page of the sessions", {200: None}), "parameters": page}},
        at: {
            "get": _call("What is known of a session", session | {404: "Error"}),
            "delete": _call("Forget it: no copy is left", {200: None, 404: "Error"}),
        },
        f"{at}/memory": {"get": exported, "put": {**imported, "requestBody": file}},
        f"{at}/fork": {"post": _call("A new session with a copy of its memory", {201: "Session"}, to=text)},
        f"{at}/blend": {"post": _call("Mix the memory of another into it", session, **{"with": text, "alpha": number})},
        f"{at}/decay": {"post": _call("Let it fade: its matrices times a factor", session, factor=number)},
        f"{at}/learn": {"post": _call("Read texts or messages into it, without an answer", session, **learnt)},
        f"{at}/undo": {"post": _call("Bring back the generation before", session | {409: "Error"})},
    }
    for path, calls in paths.items():
        if path.startswith(at):
            calls["parameters"] = [_NAME]
    return paths


def _generating() -> dict[str, Any]:
    parameters = [_SESSION_HEADER, _CONVERSATION_HEADER, _MEMORY]
    what = "llama.cpp's, on the memory of the session that is named"
    call = _call(what, {200: None, 400: "Error", 409: "Error", 502: "Error", 503: "Error"})
    return {path: {"post": {**call, "parameters": parameters}} for path in GENERATES}


def _call(summary: str, answers: Mapping[int, str | None], **members: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"summary": summary, "responses": {}}
    for status, name in {**answers, 401: "Error"}.items():
        said: dict[str, Any] = {"description": "done" if status < 400 else "refused, with the reason"}
        if name is not None:
            said["content"] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        call["responses"][str(status)] = said
    if members:
        required = [] if "texts" in members else list(members)
        schema = {"type": "object", "properties": members, "required": required, "additionalProperties": False}
        call["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return call


_GENERATION = {
    "generation": {"type": "integer"},
    "tokens": {"type": "integer", "description": "written to its memory"},
    "n_bytes": {"type": "integer"},
    "saved": {"type": ["string", "null"]},
    "state_sha256": {"type": ["string", "null"]},
}
_SESSION = {
    "type": "object",
    "properties": {
        "object": {"const": "session"},
        "name": {"type": "string"},
        **_GENERATION,
        "created": {"type": "string"},
        "used": {"type": "string"},
        "parent": {"type": ["string", "null"]},
        "sidecar_sha256": {"type": ["string", "null"]},
        "base_sha256": {"type": ["string", "null"]},
        "conversation": {
            "type": ["object", "null"],
            "properties": {"id": {"type": ["string", "null"]}, "exchanges": {"type": "integer"}},
        },
        "before": {"type": ["object", "null"], "properties": _GENERATION},
    },
}
_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "code": {}},
        },
    },
}
