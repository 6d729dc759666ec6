"""Checks of what a server is: its build, files, model, profile, and that it talks. Each returns what it found."""

from __future__ import annotations

from pathlib import Path

from llamamem.formats.state import decode_state
from llamamem.native import vendor
from llamamem.proof.health.evidence import START_WITH, Evidence, Fails
from llamamem.proof.health.slot import FIRST, PLAIN_TEXT
from llamamem.proof.trace import compare_trace


def binary(e: Evidence) -> str:
    said, wanted = e.props.get("llamamem_build"), vendor.identity()
    if said is None:
        raise Fails(
            f"/props has no llamamem_build: not the patched llama-server ({e.props.get('build_info')})", START_WITH
        )
    if said != wanted:
        raise Fails(f"is build {said}, this package is {wanted}", "`llamamem build`, then start the server again")
    if e.target.build not in (None, said):
        raise Fails(f"says {said}; the binary that was started said {e.target.build}", "start the server again")
    return f"build {said}"


def binding(e: Evidence) -> str:
    bound = e.sidecar.base_sha256
    if e.base_sha256 != bound:
        raise Fails(
            f"{e.target.model} has SHA-256 {e.base_sha256}, {e.sidecar.path} is bound to {bound}",
            "the file was changed since the start, or was never the right one: serve the base that the sidecar is for",
        )
    return f"base {bound}"


def models(e: Evidence) -> str:
    listed, name = e.client.models(), e.props["model_alias"]
    if name not in listed:
        raise Fails(f"serves {name}, /v1/models lists {', '.join(listed) or 'none'}")
    path = Path(e.props["model_path"])
    if e.target.model is not None and path.is_absolute() and path.resolve() != e.target.model.resolve():
        raise Fails(f"has loaded {path}, was started with {e.target.model}", "is another server at this address?")
    return str(name)


def constraints(e: Evidence) -> str:
    profile, total, slots = e.profile, e.props["total_slots"], e.slots
    mode = e.memory["mode"] if e.has_memory else "base"
    wanted = 1 if profile in ("serial", "fused") else e.target.parallel
    faults = []
    if mode != profile:
        faults.append(f"runs as {mode}")
    if wanted not in (None, total):
        faults.append(f"has {total} slots, not {wanted}")
    if len(slots) != total:
        faults.append(f"lists {len(slots)} slots of {total}")
    if profile != "base":
        faults += [f"slot {slot['id']} speculates" for slot in slots if slot["speculative"]]
        faults += [f"slot {slot['id']} has no memory" for slot in slots if not slot.get("rwkv_ms")]
        faults += [f"takes {kind}" for kind, on in e.props["modalities"].items() if on]
    if profile == "serial" and not faults:
        faults += _reuse_unasked(e)
    if faults:
        raise Fails(f"profile {profile}: {'; '.join(faults)}", "start the server again with `llamamem serve`")
    return f"profile {profile}, {total} slot{'s' if total != 1 else ''}"


def _reuse_unasked(e: Evidence) -> list[str]:
    """`serial` promises that a request that does not ask for it reuses nothing."""
    slot, none = e.slot, {"memory": None}
    prompt = slot.ids(FIRST)
    answer = slot.generate(prompt, 2, cache_prompt=None, rwkv_ms=none)
    follow_up = slot.generate([*prompt, *answer.tokens], 1, cache_prompt=None, rwkv_ms=none)
    return [f"{follow_up.reused} prompt tokens were reused unasked"] if follow_up.reused else []


def props(e: Evidence) -> str:
    said, sidecar, wanted = e.memory, e.sidecar, e.identity
    expected = {
        "sidecar_sha256": wanted.sidecar_sha256,
        "base_sha256": wanted.base_sha256,
        "fingerprint": wanted.fingerprint,
        "layers": [layer.layer for layer in sidecar.layers],
        "rank": sidecar.rank,
        "state_heads": sidecar.heads,
        "states": sidecar.states,
        "chunk": sidecar.chunk,
        "semantics": sidecar.semantics,
    }
    for name, value in expected.items():
        if said.get(name) != value:
            raise Fails(
                f"/props says {name} {said.get(name)}, the files say {value}",
                f"is {sidecar.path} the sidecar that was started, and unchanged? start the server again",
            )
    # what it says and what it does: a saved memory names what made it
    saved = decode_state(e.slot.take())
    if (saved.sidecar_sha256, saved.base_sha256) != wanted:
        raise Fails(
            f"a memory that it saves is of sidecar {saved.sidecar_sha256} and base {saved.base_sha256},"
            f" /props says {wanted.sidecar_sha256} and {wanted.base_sha256}"
        )
    return f"sidecar {wanted.sidecar_sha256}, fingerprint {wanted.fingerprint}"


def chat(e: Evidence) -> str:
    e.answers()
    none = {"rwkv_ms": {"memory": None}} if e.has_memory else {}
    # the second time for a base that was never taught to answer
    for more in ({}, {"ignore_eos": True, "grammar": PLAIN_TEXT}):
        answer = e.client.chat([{"role": "user", "content": "Say hello."}], max_tokens=32, **none, **more)
        message = answer["choices"][0]["message"]
        text = message.get("content") or message.get("reasoning_content")
        if isinstance(text, str) and text.strip():
            return repr(text if len(text) <= 40 else f"{text[:40]}...")
    raise Fails("the answer to a chat has no text")


def trace(e: Evidence) -> str:
    if e.reference is None:
        return "no reference trace was given (--trace)"
    e.answers()
    found = compare_trace(e.client, e.reference, slot=e.slot.id if e.has_memory else 0)
    if not found.ok:
        raise Fails(found.detail, found.hint)
    return found.detail
