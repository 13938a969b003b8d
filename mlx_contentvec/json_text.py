"""JSON from files nobody vouches for: bounded, without duplicate keys, without surprises.

Every JSON text that comes from outside is parsed here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NoReturn

from .files import read_regular

#: bytes of a text: a safetensors header of the largest models has some megabytes
JSON_BYTES = 16 * 1024 * 1024
#: values and keys: about 10 for each tensor of a safetensors header
JSON_VALUES = 1_000_000
#: objects and lists inside each other
NESTING = 64
_INTEGER_DIGITS = 20
#: a pair of these is one character; one alone is none, and cannot be written again
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Why a text is not taken, as a clause: "it nests too deeply"."""


def count_values(raw: bytes) -> int:
    """An upper bound of the values and keys in a JSON text, without parsing it."""
    return 1 + sum(map(raw.count, (b",", b":", b"[", b"{")))


def parse_object(
    text: str | bytes,
    *,
    size: int = JSON_BYTES,
    values: int = JSON_VALUES,
    surrogates: bool = False,
) -> dict[str, Any]:
    """The JSON object that a text, or its UTF-8 bytes, holds.

    size, values: bytes, and values and keys, that it may have at most
    surrogates: take half of a character too, which stands for a byte of a name that is no UTF-8

    Raises JsonError for one that is no JSON or no object, beyond a limit of
    this module, uses a key twice, or has NaN or infinity, which JSON has not.
    """
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(raw) > size or count_values(raw) > values:
        raise JsonError("it is too large")
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_constant=_constant,
        )
    except JsonError:
        raise
    except UnicodeDecodeError:
        raise JsonError("it is not UTF-8") from None
    except RecursionError:
        raise JsonError("it nests too deeply") from None
    except ValueError:
        raise JsonError("it is not JSON") from None
    if type(value) is not dict:
        raise JsonError("it is not an object")
    if _depth(value) > NESTING:
        raise JsonError("it nests too deeply")
    if not surrogates and _ESCAPED_SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonError("it has half of a character") from None
    return value


def read_object(path: Path, *, size: int = JSON_BYTES, values: int = JSON_VALUES) -> dict[str, Any]:
    """The JSON object in a file, within the limits of :func:`parse_object`.

    Raises JsonError for one that :func:`parse_object` does not take or that is
    no regular file, OSError for one that cannot be read.
    """
    try:
        raw = read_regular(path, size + 1)
    except ValueError as error:
        raise JsonError(f"it is {error}") from None
    return parse_object(raw, size=size, values=values)


#: what :func:`require` takes for a number; JSON has one kind
NUMBER = (int, float)


def require(value: Any, form: Any, name: str = "it") -> None:
    """Raise JsonError, which names the part, unless a parsed text has a form.

    form: a type or a tuple of types (None: null is among what fits); ``[form]`` for a list
          of such; ``{name: form}`` for an object with at least these names, of which
          ``{"name?": form}`` may be missing; ``{...: form}`` for one whose every value fits
    """
    if isinstance(form, dict):
        _require_type(value, (dict,), name)
        for key, part in form.items():
            if key is ...:
                for own, inner in value.items():
                    require(inner, part, f"{name}, {own[:40]}")
                continue
            optional = key.endswith("?")
            key = key.removesuffix("?")
            if key in value:
                require(value[key], part, f"{name}, {key}")
            elif not optional:
                raise JsonError(f"{name} has no {key}")
    elif isinstance(form, list):
        _require_type(value, (list,), name)
        for index, inner in enumerate(value):
            require(inner, form[0], f"{name}, {index}")
    else:
        _require_type(value, form if isinstance(form, tuple) else (form,), name)


def _require_type(value: Any, kinds: tuple[type | None, ...], name: str) -> None:
    if value is None and None in kinds:
        return
    plain = tuple(kind for kind in kinds if kind is not None)
    if not isinstance(value, plain) or (isinstance(value, bool) and bool not in plain):
        wanted = " or ".join(kind.__name__ for kind in plain)
        raise JsonError(f"{name}: {type(value).__name__} instead of {wanted}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                shown = ascii(key[:80])[1:-1][:80]
                raise JsonError(f"the name {shown} occurs twice in it")
            seen.add(key)
    return made


def _integer(digits: str) -> int:
    if len(digits) > _INTEGER_DIGITS:
        raise JsonError("it has an integer that is too long")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise JsonError(f"it has a {name}")


def _depth(value: Any) -> int:
    """Levels of dicts and lists in ``value``, counted no further than the limit."""
    depth, level = 0, [value]
    while level and depth <= NESTING:
        depth += 1
        level = [
            part
            for container in level
            for part in (container.values() if isinstance(container, dict) else container)
            if isinstance(part, (dict, list))
        ]
    return depth
