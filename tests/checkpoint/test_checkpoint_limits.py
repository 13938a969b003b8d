"""Every limit of the readers: what just keeps to it is read, and one more is refused."""

from __future__ import annotations

import io
import json
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert.checkpoint import StoredTensor, limits, open_checkpoint
from contentvec_convert.checkpoint.limits import Budget
from mlx_contentvec.errors import CorruptCheckpoint, UnsupportedCheckpoint
from tests.checkpoint_files import (
    SIX_FLOATS,
    Call,
    Name,
    Raw,
    assemble,
    instructions,
    safetensors,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
)

Spend = Callable[..., Budget]


@pytest.fixture
def spend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spend:
    """``spend(content, tensors=5, ...)``: what is left after a file of that content was opened."""

    def opened(content: bytes, **numbers: int) -> Budget:
        budget = Budget(**numbers)
        monkeypatch.setattr(limits, "Budget", lambda: budget)
        path = tmp_path / "model.pt"
        path.write_bytes(content)
        open_checkpoint(path).close()
        return budget

    return opened


def beside(code: bytes) -> bytes:
    """A checkpoint of one tensor, and beside it the value that ``code`` makes."""
    return torch_zip(assemble({"w": tensor(), "x": Raw(code)}))


#: field of the budget -> (files that spend some of it, what is said of less)
SPENDERS: dict[str, tuple[list[bytes], str]] = {
    "operations": ([beside(b"N")], "endless"),
    "containers": ([beside(b"N")], "builds without end"),
    "names": ([beside(b"ca\nB\n")], "too many classes"),
    "text_bytes": ([beside(b"N")], "too long"),
    "tensors": ([beside(b"N")], "too many tensors"),
    "values": ([beside(b"N"), beside(b"](NNe")], "the same values again and again"),
    "zip_entries": ([beside(b"N")], "too many entries"),
    "json_bytes": ([safetensors(b"{}")], "header is too long"),
    "json_values": ([safetensors(b'{"__metadata__":{"a":"b"}}')], "too large"),
}


@pytest.mark.parametrize("field", SPENDERS)
def test_a_budget_may_be_spent_to_the_last_and_no_further(spend: Spend, field: str) -> None:
    contents, fragment = SPENDERS[field]
    for content in contents:
        spent = getattr(Budget(), field) - getattr(spend(content), field)
        assert spent > 0
        assert getattr(spend(content, **{field: spent}), field) == 0
        with pytest.raises(CorruptCheckpoint, match=fragment):
            spend(content, **{field: spent - 1})


def test_what_a_checkpoint_may_cost_is_what_was_measured() -> None:
    """The files in test_checkpoint_attacks.py that are made to harm were, under these limits."""
    assert Budget() == Budget(
        operations=2_000_000,
        containers=300_000,
        names=10_000,
        text_bytes=64 * 2**20,
        tensors=50_000,
        values=1_000_000,
        zip_entries=100_000,
        json_bytes=16 * 2**20,
        json_values=1_000_000,
    )
    assert limits.ZIP_TABLE_BYTES == 32 * 2**20


def test_a_safetensors_file_spends_its_tensors(spend: Spend) -> None:
    entry = '"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    content = safetensors(("{" + ",".join(entry % name for name in "abc") + "}").encode())
    assert spend(content, tensors=3).tensors == 0
    with pytest.raises(CorruptCheckpoint, match="too many tensors"):
        spend(content, tensors=2)


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_every_instruction_is_counted(spend: Spend, write: Callable[..., bytes]) -> None:
    """All but the one that ends each pickle."""
    value = assemble({"w": tensor(), "x": [1, 2.5, None, "text"]})
    content = write(value)
    pickles = [value]
    if write is torch_legacy:
        stream = io.BytesIO(content)
        pickles = []
        for _ in range(5):
            start = stream.tell()
            list(pickletools.genops(stream))
            pickles.append(content[start : stream.tell()])
    expected = sum(len(list(pickletools.genops(pickle))) - 1 for pickle in pickles)
    assert Budget().operations - spend(content).operations == expected


def test_the_last_call_of_a_pickle_is_counted_as_well(spend: Spend) -> None:
    """Nothing comes after it that would find the budget overdrawn."""
    content = torch_zip(assemble(Call("collections", "OrderedDict", ([("w", tensor())],))))
    spent = Budget().operations - spend(content).operations
    assert spend(content, operations=spent).operations == 0
    with pytest.raises(CorruptCheckpoint, match="endless"):
        spend(content, operations=spent - 1)


#: instructions -> how many lists, tuples, dicts, sets and records they make
MADE: dict[str, tuple[bytes, int]] = {
    "nothing": (b"K\x01", 0),
    "an empty tuple, of which Python has one": (b")", 0),
    "a list": (b"]", 1),
    "a list of protocol 0": (b"(l", 1),
    "a dict": (b"}", 1),
    "a dict of protocol 0": (b"(d", 1),
    "a set": (b"\x8f", 1),
    "a frozen set": (b"(\x91", 1),
    "a tuple of protocol 0": (b"(K\x01t", 1),
    "a tuple of one": (b"K\x01\x85", 1),
    "a tuple of two": (b"K\x01K\x01\x86", 1),
    "a tuple of three": (b"K\x01K\x01K\x01\x87", 1),
    "an object": (b"ca\nB\n)R", 1),
    "an object of protocol 0": (b"(ia\nB\n", 1),
}


@pytest.mark.parametrize("name", MADE)
def test_every_container_is_counted(spend: Spend, name: str) -> None:
    code, made = MADE[name]
    nothing = spend(beside(b"N")).containers
    assert nothing - spend(beside(code)).containers == made


@pytest.mark.parametrize(
    ("code", "taken"),
    [
        (text("a" * 1000), 1000),
        (b"U\x64" + b"a" * 100, 100),
        (b"C\x64" + b"a" * 100, 100),
        (b"V" + b"a" * 1000 + b"\n", 1000),
        # four bytes for each of what may be as many characters as bytes
        (text("a" * 998 + "é"), 4000),
        (b"\x8c\x06" + "éé€".encode()[:6], 24),
    ],
)
def test_texts_are_counted_with_what_they_take(spend: Spend, code: bytes, taken: int) -> None:
    assert spend(beside(b"N")).text_bytes - spend(beside(code)).text_bytes == taken


def test_a_name_is_counted_once(spend: Spend) -> None:
    one, two = instructions(Name("a", "B")), instructions(Name("a", "C"))
    base = spend(beside(b"N")).names
    assert base - spend(beside(b"(" + one * 9 + b"t")).names == 1
    assert base - spend(beside(b"(" + one + two + b"t")).names == 2


@pytest.mark.parametrize("kind", ["a tuple", "a float"])
def test_keys_whose_hash_can_be_chosen_are_counted_as_compared_with_all_before(
    spend: Spend, kind: str
) -> None:
    keys = [((i,) if kind == "a tuple" else i + 0.5) for i in range(100)]
    pickle = assemble({"w": tensor(), "x": dict.fromkeys(keys)})
    written = len(list(pickletools.genops(pickle))) - 1
    spent = Budget().operations - spend(torch_zip(pickle)).operations
    assert spent >= written + 100 * 99 // 2
    pickle = assemble({"w": tensor(), "x": dict.fromkeys(map(str, range(100)))})
    spent = Budget().operations - spend(torch_zip(pickle)).operations
    assert spent == len(list(pickletools.genops(pickle))) - 1


@pytest.mark.parametrize(
    ("code", "values"),
    [
        (b"N", 1),
        (text("a" * 255), 1),
        (text("a" * 1024), 5),
        (b"](NNe", 3),
        (b"](K\x01(K\x02K\x03te", 5),
        (b"}(K\x01K\x02K\x03K\x04u", 3),
        (b"\x8f(K\x01K\x02\x90", 3),
        (b"ca\nB\n", 1),
        (b"ca\nB\n)R", 1),
        (b"ca\nB\nK\x01\x85R", 3),
        # as often as it is reachable
        (b"](](K\x01K\x02eq\x05h\x05h\x05e", 10),
    ],
)
def test_values_are_counted_as_often_as_they_are_reachable(
    spend: Spend, code: bytes, values: int
) -> None:
    assert Budget().values - spend(beside(code)).values == values


# ---- single values


def in_dict(key: Any) -> bytes:
    return instructions({key: None})


#: what is limited -> (the last that is read, the first that is not, what is said)
ENDS: dict[str, tuple[bytes, bytes, str]] = {
    "values in a key": (in_dict((1,) * 64), in_dict((1,) * 65), "a key that is too large"),
    "values in a key, below": (
        in_dict(((1,) * 31, (1,) * 31)),
        in_dict(((1,) * 31, (1,) * 32)),
        "a key that is too large",
    ),
    "characters of a key": (in_dict("a" * 4096), in_dict("a" * 4097), "a key that is too long"),
    "characters in a key": (
        in_dict(("a" * 4096,)),
        in_dict(("a" * 4097,)),
        "a key that is too long",
    ),
    "a key that is a large integer": (in_dict(2**64 - 1), in_dict(2**64), "cannot be one"),
    "a key that is a small integer": (in_dict(-(2**63)), in_dict(-(2**63) - 1), "cannot be one"),
    "digits of an integer": (
        b"I" + b"9" * 100 + b"\n",
        b"I" + b"9" * 101 + b"\n",
        "an integer that is none",
    ),
    "bytes of an integer": (
        b"\x8a\x20" + b"\x01" * 32,
        b"\x8a\x21" + b"\x01" * 33,
        "an integer of impossible length",
    ),
    "digits of a number": (
        b"F" + b"1" * 100 + b"\n",
        b"F" + b"1" * 101 + b"\n",
        "a number that is none",
    ),
    "a place in the memory": (b"Np4294967295\n", b"Np4294967296\n", "an impossible number"),
    "levels of lists": (
        b"]" * 64 + b"K\x01" + b"a" * 64,
        b"]" * 65 + b"K\x01" + b"a" * 65,
        "nests too deeply",
    ),
    "levels of lists, far beyond": (
        b"]" * 64 + b"K\x01" + b"a" * 64,
        b"]" * 5000 + b"K\x01" + b"a" * 5000,
        "nests too deeply",
    ),
    "levels below a value that is there already": (
        b"](" + b"]" * 32 + b"K\x01" + b"a" * 32 + b"q\x05" + b"]" * 31 + b"h\x05" + b"a" * 31
        + b"e",
        b"](" + b"]" * 32 + b"K\x01" + b"a" * 32 + b"q\x05" + b"]" * 32 + b"h\x05" + b"a" * 32
        + b"e",
        "nests too deeply",
    ),
    "characters of a name": (
        instructions(Name("a" * 256, "b" * 256)),
        instructions(Name("a" * 256, "b" * 257)),
        "too long a name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_a_value_may_reach_its_limit(spend: Spend, name: str) -> None:
    last, beyond, fragment = ENDS[name]
    spend(beside(last))
    with pytest.raises(CorruptCheckpoint, match=fragment):
        spend(beside(beyond))


def test_the_first_place_in_the_memory_has_the_number_zero(spend: Spend) -> None:
    spend(beside(b"Np0\n"))


def test_a_tensor_may_stand_under_as_many_names_as_there_may_be_tensors(
    spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of(names: str) -> bytes:
        entries = b"".join(text(name) + b"h\x05" for name in names)
        return torch_zip(b"\x80\x02" + instructions(tensor()) + b"q\x050}(" + entries + b"u.")

    monkeypatch.setattr(limits, "TENSORS", 2)
    spend(of("ab"))
    with pytest.raises(CorruptCheckpoint, match="it has too many tensors"):
        spend(of("abc"))


def test_an_empty_tensor_may_have_other_axes_of_any_length_that_can_be_counted(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.pt"
    most = 2**59 - 1
    empty = tensor((0, most), (most, 1), of=storage("BoolStorage", "1"))
    value = {"empty": empty, "one": tensor((1, 6), (most, 1))}
    path.write_bytes(torch_zip(assemble(value), {"0": SIX_FLOATS, "1": b"123456"}))
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors
        for read in (StoredTensor.read, StoredTensor.float64):
            assert read(tensors["empty"]).shape == (0, most)
            assert read(tensors["one"]).tolist() == [[0, 1, 2, 3, 4, 5]]
    path.write_bytes(torch_zip(assemble({"w": tensor((0, most + 1), (0, 0))})))
    with pytest.raises(CorruptCheckpoint, match="more elements than can be counted"):
        open_checkpoint(path)
    path.write_bytes(torch_zip(assemble({"w": tensor((1, 6), (most + 1, 1))})))
    with pytest.raises(CorruptCheckpoint, match="impossible strides"):
        open_checkpoint(path)


def test_an_empty_tensor_reads_nothing_whatever_its_strides(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for shape, strides in (((0,), (100,)), ((3, 0, 2), (9, 9, 9)), ((0, 100), (0, 100))):
        path.write_bytes(torch_zip(assemble({"w": tensor(shape, strides, offset=6)})))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.tensors["w"].read().shape == shape


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_the_name_of_a_tensor_may_have_the_length_of_its_limit(
    spend: Spend, container: str
) -> None:
    def of(length: int) -> bytes:
        if container == "torch":
            return torch_zip(assemble({"n" * length: tensor()}))
        entry = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}
        return safetensors(json.dumps({"n" * length: entry}).encode(), SIX_FLOATS)

    spend(of(512))
    with pytest.raises(CorruptCheckpoint, match="impossible name"):
        spend(of(513))


def test_the_place_of_a_tensor_is_named_no_longer_than_a_name(tmp_path: Path) -> None:
    keys = [letter * 80 for letter in "abcdef"] + ["g" * 26]
    value: Any = {"below": tensor()}
    for key in reversed(keys):
        value = {key: value}
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"model": {"w": tensor()}, **value})))
    with open_checkpoint(path) as checkpoint:
        inner = checkpoint.extra
        for key in keys:
            inner = inner[key]
        assert inner["below"].name == ".".join(keys)
        assert len(inner["below"].name) == 512


# ---- containers


def test_a_table_of_contents_may_have_the_length_of_its_limit(
    spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = beside(b"N")
    length = struct.unpack("<I", content[-10:-6])[0]
    monkeypatch.setattr(limits, "ZIP_TABLE_BYTES", length)
    spend(content)
    monkeypatch.setattr(limits, "ZIP_TABLE_BYTES", length - 1)
    with pytest.raises(CorruptCheckpoint, match="table of contents is too long"):
        spend(content)


def test_the_pickle_in_an_archive_may_have_the_length_of_its_limit(
    spend: Spend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickle = assemble({"w": tensor()})
    monkeypatch.setattr(limits, "PICKLE_BYTES", len(pickle))
    spend(torch_zip(pickle))
    monkeypatch.setattr(limits, "PICKLE_BYTES", len(pickle) - 1)
    with pytest.raises(CorruptCheckpoint, match=r"data\.pkl is too large"):
        spend(torch_zip(pickle))


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_the_name_of_a_storage_may_have_the_length_of_its_limit(
    spend: Spend, write: Callable[..., bytes]
) -> None:
    def of(key: str) -> bytes:
        held = SIX_FLOATS if write is torch_zip else (6, SIX_FLOATS)
        return write(assemble({"w": tensor(of=storage(key=key))}), {key: held})

    spend(of("0" * 512))
    with pytest.raises(CorruptCheckpoint, match="a storage with too long a name"):
        spend(of("0" * 513))


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_a_tensor_may_have_as_many_axes_as_numpy_once_allowed(spend: Spend, container: str) -> None:
    def of(axes: int) -> bytes:
        shape = (6,) + (1,) * (axes - 1)
        if container == "torch":
            return torch_zip(assemble({"w": tensor(shape, (1,) * axes)}))
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 24]}
        return safetensors(json.dumps({"w": entry}).encode(), SIX_FLOATS)

    spend(of(32))
    with pytest.raises(CorruptCheckpoint, match="too many axes"):
        spend(of(33))


def test_a_length_below_a_terabyte_is_taken_for_that_of_a_header(spend: Spend) -> None:
    with pytest.raises(CorruptCheckpoint, match="header is too long"):
        spend(safetensors(b"{}", length=2**40 - 1))
    with pytest.raises(UnsupportedCheckpoint, match="no kind of checkpoint"):
        spend(safetensors(b"{}", b"\xff", length=2**40))
