"""Bodies that cost a server as much as their size allows: many values, long ones, deep ones, and wrong ones."""

from __future__ import annotations

from collections.abc import Callable

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def filled(before: bytes, unit: bytes, after: bytes, size: int) -> bytes:
    """`before`, as many `unit` as there is room for with commas in between, `after`."""
    count = (size - len(before) - len(after) + 1) // (len(unit) + 1)
    return before + b",".join([unit] * count) + after


def numbered(before: bytes, unit: str, after: bytes, size: int) -> bytes:
    """The same with a number in each unit, so that no two keys are the same."""
    count = (size - len(before) - len(after)) // (len(unit) + 8)
    return before + ",".join(unit.replace("#", f"{number:08}") for number in range(count)).encode() + after


_USER = b'{"messages":[{"role":"user","content":'
_HI = _USER + b'"hi"}],'
_CALLS = b'{"messages":[{"role":"assistant","tool_calls":['
_TOOL = (
    _HI + b'"tool_choice":"required","tools":[{"type":"function","function":{"name":"f","parameters":{"properties":{'
)
_EMPTY = b'{"role":"user","content":""}'

WORST: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "empty messages": (CHAT, lambda n: filled(b'{"messages":[', _EMPTY, b"]}", n)),
    "numbers for messages": (CHAT, lambda n: filled(b'{"messages":[', b"1", b"]}", n)),
    "objects for messages": (CHAT, lambda n: filled(b'{"messages":[', b"{}", b"]}", n)),
    "numbers for parts": (CHAT, lambda n: filled(_USER + b"[", b"1", b"]}]}", n)),
    "empty parts": (CHAT, lambda n: filled(_USER + b"[", b'{"type":"text","text":""}', b"]}]}", n)),
    "fields of a message": (CHAT, lambda n: numbered(_USER + b'"",', '"f#":1', b"}]}", n)),
    "fields of a part": (CHAT, lambda n: numbered(_USER + b'[{"type":"x",', '"f#":1', b"}]}]}", n)),
    "one long message": (CHAT, lambda n: _USER + b'"' + b"a" * (n - len(_USER) - 5) + b'"}]}'),
    "as many messages as one may": (CHAT, lambda n: filled(b'{"messages":[', _EMPTY, b"]}", min(n, 470_000))),
    "small ids": (COMPLETIONS, lambda n: filled(b'{"prompt":[', b"7", b"]}", n)),
    "large ids": (COMPLETIONS, lambda n: filled(b'{"prompt":[', b"123456789", b"]}", n)),
    "as many ids as one may": (COMPLETIONS, lambda n: filled(b'{"prompt":[', b"1234567", b"]}", min(n, 4_300_000))),
    "lists of one id": (COMPLETIONS, lambda n: filled(b'{"prompt":[', b"[7]", b"]}", n)),
    "prompts": (COMPLETIONS, lambda n: filled(b'{"prompt":[', b'"a"', b"]}", n)),
    "stop strings": (COMPLETIONS, lambda n: filled(b'{"prompt":"a","stop":[', b'"a"', b"]}", n)),
    "stop ids": (COMPLETIONS, lambda n: filled(b'{"prompt":"a","stop_token_ids":[', b"true", b"]}", n)),
    "unknown fields": (COMPLETIONS, lambda n: numbered(b'{"prompt":"a",', '"f#":1', b"}", n)),
    "one field again and again": (COMPLETIONS, lambda n: filled(b'{"prompt":"a",', b'"n":1', b"}", n)),
    "labels": (COMPLETIONS, lambda n: numbered(b'{"prompt":"a","metadata":{', '"f#":1', b"}}", n)),
    "tools": (CHAT, lambda n: filled(b'{"tools":[', b"0.5", b"]}", n)),
    "parameters of a tool": (CHAT, lambda n: numbered(_TOOL, '"p#":{"type":"string"}', b"}}}}]}", n)),
    "tool calls": (CHAT, lambda n: filled(_CALLS, b'{"id":"1","function":{"name":"f"}}', b"]}]}", n)),
    "deep lists": (COMPLETIONS, lambda n: b'{"prompt":' + b"[" * (n - 10)),
    "a huge number": (COMPLETIONS, lambda n: b'{"prompt":"a","seed":' + b"9" * (n - 22) + b"}"),
    "a long key": (COMPLETIONS, lambda n: b'{"' + b"k" * (n - 6) + b'":1}'),
    "a long model name": (COMPLETIONS, lambda n: b'{"prompt":"a","model":"' + b"m" * (n - 25) + b'"}'),
    "wide characters": (COMPLETIONS, lambda n: b'{"prompt":"' + b"a" * (n - 17) + b"\xf0\x9f\x98\x80" + b'"}'),
    "escapes": (COMPLETIONS, lambda n: b'{"prompt":"' + b"\\u00e9" * ((n - 13) // 6) + b'"}'),
    "backslashes and quotes": (COMPLETIONS, lambda n: b'{"prompt":"' + b'\\\\\\",' * ((n - 13) // 5) + b'"}'),
    "not numbers": (COMPLETIONS, lambda n: filled(b'{"prompt":[', b"NaN", b"]}", n)),
    "cut off": (CHAT, lambda n: filled(b'{"messages":[', _EMPTY, b"", n)),
    "nothing but space": (COMPLETIONS, lambda n: b" " * n),
}
"""Name -> route, and the body of about so many bytes."""
