"""Every field of a good document, each by a value that it cannot have."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from tests.attack_corpus import ESCAPE

#: what stands in a document where another text than ``json.dumps`` writes belongs
_LONG_INTEGER, _DEEP = "\x00integer", "\x00deep"
MISSING = object()

#: name -> what a field is exchanged for
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "true": True,
    "a long integer": _LONG_INTEGER,
    "an integer": 10**18,
    "below zero": -1,
    "1e308": 1e308,
    "NaN": float("nan"),
    "nan as a text": "nan",
    "no text": "",
    "a long text": "x" * 1_000_000,
    "many lines": "x\n" * 5_000,
    "escapes": f"{ESCAPE}[/red] [bold",
    "an empty list": [],
    "an empty object": {},
    "lists of lists": _DEEP,
}

Place = tuple[str | int, ...]


def places(value: Any, few: frozenset[str] = frozenset(), at: Place = ()) -> Iterator[Place]:
    """Where the fields of a document are; of a list those of the first item.

    few: names of objects that map many names to the same: their first is enough
    """
    if isinstance(value, dict):
        names = list(value)[: 1 if at and at[-1] in few else None]
    else:
        names = [0] if isinstance(value, list) and value else []
    for name in names:
        yield (*at, name)
        yield from places(value[name], few, (*at, name))


def exchanged(document: Any, place: Place, value: Any) -> str:
    """The document as JSON with another value in one place."""
    document = _with(document, place, value)
    text = json.dumps(document)
    for marker, by in ((_LONG_INTEGER, "1" + "0" * 400), (_DEEP, "[" * 1_000 + "]" * 1_000)):
        text = text.replace(json.dumps(marker), by)
    return text


def _with(part: Any, place: Place, value: Any) -> Any:
    name, rest = place[0], place[1:]
    made = copy.copy(part)
    if rest:
        made[name] = _with(part[name], rest, value)
    elif value is MISSING:
        del made[name]
    else:
        made[name] = value
    return made
