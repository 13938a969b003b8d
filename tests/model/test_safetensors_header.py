"""A converted file whose header contradicts itself or the file is loaded by nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert.checkpoint import open_checkpoint
from mlx_contentvec import ContentvecModel
from mlx_contentvec.errors import CheckpointError, WeightsError
from mlx_contentvec.json_text import JSON_BYTES
from mlx_contentvec.safetensors_header import LENGTH
from tests.checkpoint_files import safetensors
from tests.small_models import TINY, random_weights_file

Header = dict[str, Any]

#: two weights of one shape
ONE, OTHER = "encoder.layers.0.fc1.weight", "encoder.layers.1.fc1.weight"


def opened(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = LENGTH.unpack(content[: LENGTH.size])[0]
    begin = LENGTH.size + length
    return json.loads(content[LENGTH.size : begin]), content[begin:]


def entry(**changes: Any) -> Callable[[Header], bytes]:
    """A header that says something else of one tensor."""

    def changed(header: Header) -> bytes:
        header[ONE] |= changes
        return json.dumps(header).encode()

    return changed


def shared(header: Header) -> bytes:
    header[ONE]["data_offsets"] = header[OTHER]["data_offsets"]
    return json.dumps(header).encode()


def shifted(header: Header) -> bytes:
    begin, end = header[ONE]["data_offsets"]
    header[ONE]["data_offsets"] = [begin - 4, end - 4]
    return json.dumps(header).encode()


def named_twice(header: Header) -> bytes:
    again = json.dumps({ONE: header[OTHER]}).encode()
    return json.dumps(header).encode()[:-1] + b"," + again[1:]


def described_twice(header: Header) -> bytes:
    again = json.dumps({"__metadata__": header["__metadata__"]}).encode()
    return json.dumps(header).encode()[:-1] + b"," + again[1:]


#: what is wrong -> (what makes the header, what is said)
HEADERS: dict[str, tuple[Callable[[Header], bytes], str]] = {
    "two tensors in one place": (shared, "does not follow the one before it"),
    "a tensor begins within another": (shifted, "does not follow the one before it"),
    "a name twice": (named_twice, f"{ONE} occurs twice"),
    "metadata twice": (described_twice, "__metadata__ occurs twice"),
    "half as many bytes": (entry(dtype="F16"), "does not take"),
    "a shape of fractions": (entry(shape=[192.0, 96.0]), "impossible shape"),
    "an unknown dtype": (entry(dtype="F33"), "unknown dtype"),
    "a header too long": (lambda header: b"{" + b" " * JSON_BYTES, "header is too long"),
    "metadata of numbers": (lambda header: b'{"__metadata__":{"config":1}}', "not strings"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights_file(tmp_path_factory.mktemp("sound") / "model.safetensors", TINY)


def assert_refused(path: Path, message: str) -> None:
    """By whatever loads it, and by whatever reads it as a checkpoint."""
    with pytest.raises(WeightsError, match=message) as refused:
        ContentvecModel.from_file(path)
    said = "is no converted file" if message == "unknown dtype" else "is damaged"
    assert said in refused.value.problem and refused.value.hint
    with pytest.raises(WeightsError, match=message):
        ContentvecModel(TINY).load_weights(path, strict=False)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(
    sound: Path, tmp_path: Path, name: str
) -> None:
    change, message = HEADERS[name]
    header, data = opened(sound)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(change(header), data))
    assert_refused(path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content + b"1234", "goes on past its end"),
        (lambda content: content[:-4], "it lacks 4 bytes at its end"),
    ],
    ids=["longer", "shorter"],
)
def test_a_file_of_another_size_than_its_header_says_is_refused(
    sound: Path, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(change(sound.read_bytes()))
    assert_refused(path, message)


def test_a_file_that_ends_within_its_header_is_refused(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(sound.read_bytes()[:100])
    with pytest.raises(WeightsError, match="ends within its header"):
        ContentvecModel.from_file(path)


def test_the_file_that_the_wrong_ones_are_made_from_is_loaded(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header, data = opened(sound)
    path.write_bytes(safetensors(json.dumps(header).encode(), data))
    assert ContentvecModel.from_file(path).config == TINY
