"""JSON from files nobody vouches for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_contentvec import json_text
from mlx_contentvec.json_text import (
    NUMBER,
    JsonError,
    count_values,
    parse_object,
    read_object,
    require,
)


def test_an_object_is_what_it_says() -> None:
    text = '{"a": [1, -2.5, true, null, "\\u00e4"], "b": {"c": {}}}'
    assert parse_object(text) == json.loads(text) == parse_object(text.encode())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is not JSON"),
        ("{", "it is not JSON"),
        ("nul", "it is not JSON"),
        ("[]", "it is not an object"),
        ("1", "it is not an object"),
        (b'{"a": "\xff"}', "it is not UTF-8"),
        ('{"a": "\udc80"}', "it is not UTF-8"),
        ('{"a": NaN}', "it has a NaN"),
        ('{"a": -Infinity}', "it has a -Infinity"),
        ('{"a": 1, "a": 1}', "the name a occurs twice in it"),
        ('{"b": {"a": 1, "c": 2, "c": 3}}', "the name c occurs twice in it"),
        ('{"a": 123456789012345678901}', "an integer that is too long"),
        ("[" * 100_000, "it nests too deeply"),
    ],
)
def test_what_is_none_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(JsonError, match=said):
        parse_object(text)


def test_a_long_name_twice_is_shown_shortened() -> None:
    name = "\x1b" + "x" * 1000
    with pytest.raises(JsonError) as refused:
        parse_object(json.dumps({name: 1})[:-1] + f", {json.dumps(name)}: 2}}")
    assert len(str(refused.value)) < 120
    assert str(refused.value).isprintable()


def test_integers_have_twenty_digits_at_most() -> None:
    assert parse_object('{"a": 12345678901234567890}') == {"a": 12345678901234567890}


def test_64_levels_are_taken_and_no_more() -> None:
    assert parse_object('{"a": ' * 64 + "1" + "}" * 64)
    assert parse_object('{"a": ' + "[" * 63 + "]" * 63 + "}")
    for text in ('{"a": ' * 65 + "1" + "}" * 65, '{"a": ' + "[" * 64 + "]" * 64 + "}"):
        with pytest.raises(JsonError, match="nests too deeply"):
            parse_object(text)


def test_sizes_are_bounded() -> None:
    text = json.dumps({"a": [1, 2, 3]})
    assert parse_object(text, size=len(text))
    with pytest.raises(JsonError, match="too large"):
        parse_object(text, size=len(text) - 1)
    needed = count_values(text.encode())
    assert needed == 6
    assert parse_object(text, values=needed)
    with pytest.raises(JsonError, match="too large"):
        parse_object(text, values=needed - 1)


def test_the_limits_are_those_of_real_headers() -> None:
    assert json_text.JSON_BYTES == 16 * 2**20
    assert json_text.JSON_VALUES == 1_000_000


def test_a_file_is_read_no_further_than_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}
    assert read_object(path, size=8) == {"a": 1}
    with pytest.raises(JsonError, match="too large"):
        read_object(path, size=7)
    with path.open("r+b") as file:
        file.truncate(3 << 30)
    with pytest.raises(JsonError, match="too large"):
        read_object(path)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(JsonError, match="not a regular file"):
            read_object(path)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "nothing")


def test_halves_of_characters_are_refused_and_whole_ones_are_not() -> None:
    assert parse_object('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    for text in ('{"a": "\\ud83d"}', '{"\\ude00": 1}'):
        with pytest.raises(JsonError, match="half of a character"):
            parse_object(text)
    assert parse_object('{"a": "\\udc82.wav"}', surrogates=True) == {"a": "\udc82.wav"}


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (1, int),
        (True, bool),
        (1.5, NUMBER),
        (None, (str, None)),
        ("a", (str, None)),
        ({"a": 1, "b": 2}, {"a": int}),
        ({"a": [1, 2]}, {"a": [int]}),
        ({"a": 1}, {"a?": int, "b?": int}),
        ([], [int]),
        ({"x": {"a": 1}, "y": {"a": 2}}, {...: {"a": int}}),
    ],
)
def test_what_has_a_form_is_taken(value: Any, form: Any) -> None:
    require(value, form)


@pytest.mark.parametrize(
    ("value", "form", "said"),
    [
        ("1", int, "it: str instead of int"),
        (True, int, "it: bool instead of int"),
        (True, NUMBER, "it: bool instead of int or float"),
        (None, int, "it: NoneType instead of int"),
        (1, (str, None), "it: int instead of str"),
        ([], {"a": int}, "it: list instead of dict"),
        ({"b": 1}, {"a": int}, "it has no a"),
        ({"a": "1"}, {"a": int}, "it, a: str instead of int"),
        ({"a": "1"}, {"a?": int}, "it, a: str instead of int"),
        ({}, [int], "it: dict instead of list"),
        ([1, "2"], [int], "it, 1: str instead of int"),
        ({"x": {"a": 1}, "y": {}}, {...: {"a": int}}, "it, y has no a"),
    ],
)
def test_what_has_another_form_is_refused_and_its_part_named(
    value: Any, form: Any, said: str
) -> None:
    with pytest.raises(JsonError) as refused:
        require(value, form)
    assert str(refused.value) == said
