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
from mlx_contentvec.safetensors_header import (
    LENGTH,
    HeaderError,
    Place,
    UnknownDtype,
    check_file,
    looks_like_safetensors,
    metadata_of,
    places_of,
    require_length,
)
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


# ---- entries, one by one ------------------------------------------------------------


def tensor(**changes: Any) -> Header:
    """An entry of six numbers of two bytes, with changes."""
    return {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12], **changes}


@pytest.mark.parametrize(
    ("described", "said"),
    [
        *((other, "is not described by") for other in (7, [], None, "F16", {})),
        *(({**tensor(), field: 1}, "is not described by") for field in ("name", "offset")),
        ({"dtype": "F16", "shape": [6]}, "is not described by"),
        *((tensor(dtype=dtype), "unknown dtype") for dtype in ("f16", "F33", "", 7, None, ["F16"])),
        *(
            (tensor(shape=shape), "has an impossible shape")
            for shape in ((2, 3), 6, None, "6", [2, 3.0], [-2, -3], [True, 6], ["6"], {})
        ),
        (tensor(shape=[*([1] * 31), 2, 3]), "has too many axes"),
        *(
            (tensor(data_offsets=place), "has no place in the file")
            for place in (12, None, [12], [0, 6, 12], [0.0, 12], [False, 12], ["0", "12"], {})
        ),
        *(
            (tensor(data_offsets=place), "has an impossible place")
            for place in ([-12, 0], [-1, 11], [12, 0], [1, 0])
        ),
        *(
            (tensor(**changes), "does not take 12 bytes")
            for changes in ({"dtype": "F32"}, {"shape": [2, 2]}, {"shape": []}, {"shape": [0]})
        ),
        (tensor(data_offsets=[0, 11]), r"of shape \[2, 3\] does not take 11 bytes"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(described: Any, said: str) -> None:
    kind = UnknownDtype if said == "unknown dtype" else HeaderError
    with pytest.raises(kind, match=said) as refused:
        places_of({"t": described}, 100, 112)
    assert type(refused.value) is kind
    assert "the tensor t " in refused.value.problem


@pytest.mark.parametrize(
    ("described", "size"),
    [
        (tensor(), 12),
        (tensor(shape=[6, *([1] * 31)]), 12),
        (tensor(shape=[], data_offsets=[0, 2]), 2),
        (tensor(shape=[0, 3], data_offsets=[0, 0]), 0),
    ],
)
def test_a_tensor_of_any_possible_shape_has_its_place(described: Header, size: int) -> None:
    (place,) = places_of({"__metadata__": {}, "t": described}, 100, 100 + size)
    assert place == Place(0, size, "t", "float16", tuple(described["shape"]))


@pytest.mark.parametrize(
    ("size", "dtypes"),
    [
        (8, "F64 I64 U64 C64"),
        (4, "F32 I32 U32"),
        (2, "F16 BF16 I16 U16"),
        (1, "F8_E4M3 F8_E5M2 I8 U8 BOOL"),
    ],
)
def test_an_element_takes_the_bytes_that_safetensors_stores(size: int, dtypes: str) -> None:
    for dtype in dtypes.split():
        header = {"t": tensor(dtype=dtype, shape=[3], data_offsets=[0, 3 * size])}
        assert places_of(header, 0, 3 * size)[0].end == 3 * size


def test_every_byte_belongs_to_one_tensor() -> None:
    first, second, empty = tensor(), tensor(data_offsets=[12, 24]), tensor(shape=[0])
    empty["data_offsets"] = [12, 12]
    header = {"b": second, "nothing": empty, "a": first}
    assert [place.name for place in places_of(header, 8, 32)] == ["a", "nothing", "b"]
    for size, said in ((31, "it lacks 1 bytes at its end"), (33, "it goes on past its end")):
        with pytest.raises(HeaderError, match=said):
            places_of(header, 8, size)
    for begin in (0, 10, 13):
        header["b"] = tensor(data_offsets=[begin, begin + 12])
        with pytest.raises(HeaderError, match="does not follow the one before it"):
            places_of(header, 8, 20 + begin)
    with pytest.raises(HeaderError, match="the tensor a does not follow") as refused:
        places_of({"a": second}, 8, 32)
    assert (refused.value.found, refused.value.expected) == ("it begins at 12", "0")
    assert places_of({}, 8, 8) == []


@pytest.mark.parametrize("metadata", [7, [], "x", {"config": 1}, {"a": "b", "config": None}])
def test_metadata_are_texts_by_name(metadata: Any) -> None:
    with pytest.raises(HeaderError, match="the metadata in its header are not strings"):
        metadata_of({"__metadata__": metadata})


def test_metadata_may_lack() -> None:
    assert metadata_of({}) == metadata_of({"__metadata__": None}) == {}
    assert metadata_of({"__metadata__": {"format": "mlx"}}) == {"format": "mlx"}


def test_a_header_may_have_sixteen_megabytes() -> None:
    require_length(2**24)
    require_length(9, 9)
    for given, said in (((2**24 + 1,), "16,777,216"), ((10, 9), "9")):
        with pytest.raises(HeaderError, match="its header is too long") as refused:
            require_length(*given)
        assert refused.value.expected == f"at most {said}"


@pytest.mark.parametrize(
    ("head", "looks"),
    [
        (LENGTH.pack(2**40 - 1) + b"{", True),
        (LENGTH.pack(2**40) + b"{", False),
        (LENGTH.pack(2) + b"{}", True),
        (LENGTH.pack(2) + b"[", False),
        (LENGTH.pack(2), False),
        (b"", False),
    ],
)
def test_a_safetensors_file_begins_with_a_length_and_a_brace(head: bytes, looks: bool) -> None:
    assert looks_like_safetensors(head) == looks


def test_a_file_is_checked_from_its_length_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    sound = safetensors(json.dumps({"t": tensor()}).encode(), bytes(12))
    for content, said in (
        (sound, None),
        (b"PK\3\4 an archive", None),  # nothing is said of other kinds of files
        (sound[:-1], "it lacks 1 bytes"),
        (sound[:20], "it ends within its header"),
        (LENGTH.pack(2**24 + 1) + b"{", "its header is too long"),
        (safetensors(b'{"t": }'), "its header cannot be read: it is not JSON"),
        (safetensors(b'{"__metadata__": 7}'), "are not strings"),
    ):
        path.write_bytes(content)
        if said is None:
            check_file(path)
            continue
        with pytest.raises(HeaderError, match=said):
            check_file(path)


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("x" * 80, "x" * 80),
        ("x" * 81, "x" * 77 + "..."),
        ([1] * 26, str([1] * 26)),
        ([1] * 27, str([1] * 27)[:77] + "..."),
        ({"a": "x" * 71}, str({"a": "x" * 71})),
        ({"a": "x" * 72}, str({"a": "x" * 72})[:77] + "..."),
    ],
)
def test_what_a_header_says_is_shown_up_to_eighty_characters(found: object, shown: str) -> None:
    assert HeaderError("odd", found=found).found == shown
