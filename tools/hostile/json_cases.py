"""Faults of the JSON texts, before anything is asked of what they hold."""

from __future__ import annotations

from collections.abc import Iterator

from hostile.case import Case, case, early, member, put
from hostile.raw import dumps, sound

READ_JSON = (
    "config_json",
    "delta_heads_json",
    "target_layers_json",
    "per_layer_attention_json",
    "tensor_manifest_json",
)

# what may stand for a member of an object or an item of a list, and is no JSON that a sidecar may have
NOT_JSON = {
    "nan": "NaN",
    "infinity": "Infinity",
    "minus-infinity": "-Infinity",
    "1e400": "1e400",
    "integer-of-400-digits": "9" * 400,
    "control-character": '"\x01"',
    "raw-newline": '"a\nb"',
    "raw-nul": '"a\0b"',
    "high-surrogate": '"\\ud800"',
    "low-surrogate": '"\\udc00"',
    "surrogates-reversed": '"\\udc00\\ud800"',
    "high-surrogate-and-letter": '"\\ud800x"',
    "two-high-surrogates": '"\\ud800\\ud800"',
    "bad-escape": '"\\x41"',
    "bad-unicode-escape": '"\\u12g4"',
    "single-quotes": "'x'",
    "unterminated": '"x',
    "leading-zero": "01",
    "leading-plus": "+1",
    "no-fraction": "1.",
    "no-integer": ".5",
    "no-exponent": "1e",
    "hexadecimal": "0x10",
    "underscore": "1_0",
    "python-true": "True",
    "undefined": "undefined",
    "comment": "1 // one",
    "block-comment": "1 /* one */",
    "form-feed": "\f1",
    "no-break-space": "\u00a01",
    "full-width-digit": "\uff11",
    "nothing": "",
}


def cases() -> Iterator[Case]:
    """All of them."""
    for key in READ_JSON:
        yield from _texts(key)
    yield from _syntax()


def _texts(key: str) -> Iterator[Case]:
    """Faults of a JSON text as a whole."""
    opening, closing, other = ("{", "}", []) if key == "config_json" else ("[", "]", {})

    def text(what: str, reason: str, edited: str, why: str) -> Case:
        return (case if key == "tensor_manifest_json" else early)(f"{key}-{what}", reason, key, why, put(key, edited))

    good = dumps(sound().key(key).value)
    # a member or an item in front of those that are there
    front = opening + ('"x":%s,' if opening == "{" else "%s,")
    for what, edited in {
        "empty": "",
        "space": " ",
        "open": opening,
        "cut": good[:-1],
        "closed-twice": good + closing,
        "twice": good + good,
        "junk-after": good + "x",
        "nul-after": good + "\0",
        "trailing-comma": good[:-1] + "," + closing,
        "byte-order-mark": "\ufeff" + good,
        "nan": front % "NaN" + good[1:],
        "1e400": front % "1e400" + good[1:],
        "lone-surrogate": front % '"\\ud800"' + good[1:],
        "duplicate-and-invalid": front % '{"a":1,"a":2}' + good[1:-1],
    }.items():
        yield text(what, "json-invalid", edited, "not JSON")
    for what, edited in {"other": dumps(other), "null": "null", "number": "1", "string": dumps(good)}.items():
        yield text(f"is-{what}", "json-type", edited, "not the object or list that it must be")
    deep = 100_000 if key == "config_json" else 2_000
    for what, edited in {
        "9-deep": front % ("[" * 8 + "]" * 8) + good[1:],
        f"{deep}-deep": "[" * deep,
        "2000-objects-deep": '{"a":' * 2_000,
    }.items():
        yield text(what, "json-depth", edited, "nested deeper than 8 levels")
    yield text("duplicate", "json-duplicate", front % '{"a":1,"b":1,"a":1}' + good[1:], "a member stands twice")
    yield text("duplicate-escaped", "json-duplicate", front % '{"a":1,"\\u0061":1}' + good[1:], "in another spelling")


def _syntax() -> Iterator[Case]:
    """Each way not to be JSON, once, in the place of a member that says nothing."""
    good = dumps(sound().config)[:-1]
    for what, text in NOT_JSON.items():
        yield early(
            f"json-{what}",
            "json-invalid",
            "config_json",
            "no JSON",
            put("config_json", f'{good},"beta_bias_init":{text}}}'),
        )
    for what, text in {
        "unquoted-name": "{a:1}",
        "no-colon": '{"a" 1}',
        "no-comma": '{"a":1 "b":2}',
        "mixed": '["a":1]',
    }.items():
        yield early(f"json-{what}", "json-invalid", "config_json", "no JSON", put("config_json", text))
    yield early(
        "json-deep-in-string-only",
        "config-unknown",
        "config_json",
        "brackets in strings have no depth, and behind an escaped quote one is still in the string",
        member('x"[[[[[[[[[[', "[[[[[[[[[\\"),
    )
    yield early(
        "json-duplicate-rank",
        "json-duplicate",
        "config_json",
        "a later one would win",
        put("config_json", f'{good},"rank":1}}'),
    )
