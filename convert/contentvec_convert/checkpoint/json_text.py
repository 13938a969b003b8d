"""JSON from files nobody vouches for: bounded, without duplicate keys, without surprises."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from . import limits
from .source_file import SourceFile
from .tensors import brief

_INTEGER_DIGITS = 20


def parse_object(file: SourceFile, raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object that ``raw`` holds; ``what`` names it in messages.

    Raises CorruptCheckpoint if it is no JSON, no object, nested deeper than
    the limit, or uses a key twice.
    """

    def refuse(reason: str) -> NoReturn:
        raise file.corrupt(f"{what} cannot be read: {reason}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise file.corrupt(f"the name {brief(key)} occurs twice in {what}")
                seen.add(key)
        return made

    def integer(digits: str) -> int:
        if len(digits) > _INTEGER_DIGITS:
            refuse("it has an integer that is too long")
        return int(digits)

    def constant(name: str) -> NoReturn:
        refuse(f"it has a {name}")

    file.budget.json_bytes -= len(raw)
    file.budget.json_values -= sum(map(raw.count, (b",", b":", b"[", b"{")))
    if file.budget.json_bytes < 0 or file.budget.json_values < 0:
        refuse("it is too large")
    try:
        text = raw.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant
        )
    except UnicodeDecodeError:
        refuse("it is not UTF-8")
    except RecursionError:
        refuse("it nests too deeply")
    except ValueError:
        refuse("it is not JSON")
    if type(value) is not dict:
        refuse("it is not an object")
    if _depth(value) > limits.NESTING:
        refuse("it nests too deeply")
    return value


def _depth(value: Any) -> int:
    """Levels of dicts and lists in ``value``, counted no further than the limit."""
    depth, level = 0, [value]
    while level and depth <= limits.NESTING:
        depth += 1
        level = [
            part
            for container in level
            for part in (container.values() if isinstance(container, dict) else container)
            if isinstance(part, (dict, list))
        ]
    return depth
