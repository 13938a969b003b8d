"""Files made to harm: each is refused with one clear error, or read as records that do nothing.

The payloads are live: Python's own unpickler runs every one of them in a
process of its own and leaves the file that this reader must not leave.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert.checkpoint import InertRecord, foreign_file, limits, open_checkpoint
from contentvec_convert.checkpoint.tensors import brief
from mlx_contentvec.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from tests.checkpoint_files import (
    SIX_FLOATS,
    Call,
    Entry,
    Name,
    Persistent,
    Raw,
    assemble,
    instructions,
    safetensors,
    storage,
    tensor,
    text,
    torch_legacy,
    torch_zip,
    zip_archive,
)

CONTAINERS: dict[str, Callable[..., bytes]] = {"zip": torch_zip, "legacy": torch_legacy}
every_container = pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)

REFUSED = "which no checkpoint needs and a program would use"
INERT = None

# ---- programs


def stack_global(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def called(function: bytes, *args: Any) -> bytes:
    return function + instructions(args) + b"R"


def touch(canary: Path) -> str:
    return f"touch {canary}"


def write(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


#: name -> (instructions that leave CANARY behind, what this reader says of them)
PROGRAMS: dict[str, tuple[Callable[[Path], bytes], str | None]] = {
    "os.system": (lambda c: instructions(Call("os", "system", (touch(c),))), REFUSED),
    "posix.system": (lambda c: instructions(Call("posix", "system", (touch(c),))), REFUSED),
    "subprocess": (
        lambda c: instructions(Call("subprocess", "call", (["touch", str(c)],))),
        REFUSED,
    ),
    "eval": (lambda c: instructions(Call("builtins", "eval", (write(c),))), REFUSED),
    "exec": (lambda c: instructions(Call("builtins", "exec", (write(c),))), REFUSED),
    "eval of Python 2": (
        lambda c: instructions(Call("__builtin__", "eval", (write(c),))),
        REFUSED,
    ),
    "open": (lambda c: instructions(Call("builtins", "open", (str(c), "w"))), REFUSED),
    "getattr of a module": (
        lambda c: called(
            called(
                instructions(Name("builtins", "getattr")),
                Call("builtins", "__import__", ("os",)),
                "system",
            ),
            touch(c),
        ),
        REFUSED,
    ),
    "getattr of a hidden module": (
        lambda c: called(
            called(instructions(Name("builtins", "getattr")), Name("random", "_os"), "system"),
            touch(c),
        ),
        "calls what is not a name",
    ),
    "getattr of getattr": (
        lambda c: called(
            instructions(
                Call(
                    "builtins",
                    "getattr",
                    (Call("builtins", "getattr", (Name("random", "_os"), "system")), "__call__"),
                )
            ),
            touch(c),
        ),
        REFUSED,
    ),
    "a stack global": (lambda c: called(stack_global("os", "system"), touch(c)), REFUSED),
    "a dotted name in a harmless module": (
        lambda c: called(stack_global("random", "_os.system"), touch(c)),
        INERT,
    ),
    "a dotted name that ends in a known one": (
        lambda c: called(stack_global("glob", "os.system"), touch(c)),
        REFUSED,
    ),
    "a name made of pieces": (
        lambda c: called(b"\x8c\x02osq\x07" + b"0" + b"h\x07" + text("system") + b"\x93", touch(c)),
        REFUSED,
    ),
    "an instance (protocol 0)": (
        lambda c: b"(" + text(touch(c)) + b"ios\nsystem\n",
        REFUSED,
    ),
    "an object (protocol 1)": (
        lambda c: b"(" + instructions(Name("os", "system")) + text(touch(c)) + b"o",
        REFUSED,
    ),
    "a class that writes a file": (
        lambda c: instructions(Call("logging", "FileHandler", (str(c),))),
        INERT,
    ),
    "a new object": (
        lambda c: (
            instructions(Call("logging", "FileHandler", (str(c),), opcode=b"\x81"))
            + b"0"
            + instructions(Call("zipfile", "ZipFile", (str(c), "w")))
        ),
        INERT,
    ),
    "a new object with keywords": (
        lambda c: (
            instructions(Name("logging", "FileHandler"))
            + b")"
            + instructions({"filename": str(c)})
            + b"\x920"
            + instructions(Call("zipfile", "ZipFile", (str(c), "w")))
        ),
        INERT,
    ),
    "an object with a state": (
        lambda c: instructions(Call("logging", "FileHandler", (str(c),), {"level": 10})),
        INERT,
    ),
    "a call through a function": (
        lambda c: instructions(Call("functools", "reduce", (Name("_io", "open"), [str(c), "w"]))),
        INERT,
    ),
    "a call that waits in an iterator": (
        lambda c: instructions(
            Call(
                "collections",
                "deque",
                (Call("builtins", "map", (Name("logging", "FileHandler"), [str(c)])),),
            )
        ),
        REFUSED,
    ),
    "runpy": (
        lambda c: instructions(Call("runpy", "_run_code", (compile_of(c), {}))),
        REFUSED,
    ),
    "a pickle in a pickle": (
        lambda c: instructions(
            Call("pickle", "loads", (assemble(Call("os", "system", (touch(c),))),))
        ),
        REFUSED,
    ),
    "timeit": (lambda c: instructions(Call("timeit", "timeit", ("pass", write(c)))), REFUSED),
    "a tensor's own function, disguised": (
        lambda c: called(stack_global("tempfile", "_shutil.os.system"), touch(c)),
        REFUSED,
    ),
}


def compile_of(canary: Path) -> Any:
    return Call("builtins", "compile", (write(canary), "x", "exec"))


def beside_a_tensor(code: bytes) -> bytes:
    """A pickle that would be a checkpoint if it were not for ``code``, under the key "x"."""
    return b"\x80\x04}(" + text("w") + instructions(tensor()) + text("x") + code + b"u."


@pytest.fixture(scope="module")
def left_by_pickle(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The payloads that leave their file behind under Python's own unpickler."""
    folder = tmp_path_factory.mktemp("live")
    payloads = {}
    for index, (name, (build, _)) in enumerate(PROGRAMS.items()):
        payloads[name] = folder / f"canary-{index}"
        for protocol in (b"\x02", b"\x04"):
            code = b"\x80" + protocol + build(payloads[name]) + b"."
            (folder / f"payload-{index}-{protocol.hex()}").write_bytes(code)
    script = """
import pickle, sys, pathlib
for path in pathlib.Path(sys.argv[1]).glob("payload-*"):
    try:
        pickle.loads(path.read_bytes())
    except BaseException as error:
        print(path.name, repr(error))
"""
    subprocess.run([sys.executable, "-c", script, folder], check=True, timeout=60)
    return {name for name, canary in payloads.items() if canary.exists()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_payload_is_live(name: str, left_by_pickle: set[str]) -> None:
    assert name in left_by_pickle


@every_container
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_in_a_pickle_never_runs(
    name: str, write: Callable[..., bytes], tmp_path: Path
) -> None:
    build, fragment = PROGRAMS[name]
    canary = tmp_path / "canary"
    path = tmp_path / "model.pt"
    path.write_bytes(write(beside_a_tensor(build(canary))))
    before = set(sys.modules)
    if fragment is None:
        with open_checkpoint(path) as checkpoint:
            assert isinstance(checkpoint.extra["x"], InertRecord)
            assert list(checkpoint.tensors) == ["w"]
    else:
        with pytest.raises(CheckpointError, match=fragment):
            open_checkpoint(path)
    assert foreign_file(path) is None
    assert set(sys.modules) == before
    assert not canary.exists()
    assert list(tmp_path.iterdir()) == [path]


# ---- pickles that are wrong

#: name -> (instructions of the value under "x", what is said)
PICKLES: dict[str, tuple[bytes, str]] = {
    "a name with a space": (stack_global("o s", "system"), "names what is no name"),
    "a name in other letters": (stack_global("ｏｓ", "system"), "names what is no name"),
    "a name with a zero": (stack_global("os\0", "system"), "names what is no name"),
    "a name that starts with a dot": (stack_global(".os", "system"), "names what is no name"),
    "an empty name": (stack_global("", ""), "names what is no name"),
    "a name that is a number": (b"K\x01K\x02\x93", "names something that is not text"),
    "a name without end": (stack_global("a" * 300, "b" * 300), "too long a name"),
    "globals of a function": (
        stack_global("torch._utils", "_rebuild_tensor_v2.__globals__"),
        REFUSED,
    ),
    "a hidden attribute": (
        called(instructions(Name("builtins", "getattr")), Name("a", "B"), "__subclasses__"),
        REFUSED,
    ),
    "a call of a call": (
        called(instructions(Call("functools", "partial", (Name("a", "b"),))), 1),
        "calls what is not a name",
    ),
    "a call of text": (called(text("os.system"), "ls"), "calls what is not a name"),
    "a call without arguments": (
        instructions(Name("a", "b")) + b"NR",
        "calls with what are not arguments",
    ),
    "keywords that are none": (
        instructions(Name("a", "b")) + b")K\x01\x92",
        "not keyword arguments",
    ),
    "the extension registry": (b"\x82\x01", "unknown instruction"),
    "a buffer from outside": (b"\x97", "unknown instruction"),
    "an object of no class": (b"(o", "an object of no class"),
    "a state for a number": (b"K\x01}b", "gives a state to what has none"),
    "a state for a list": (b"]}b", "gives a state to what has none"),
    "two states": (
        instructions(Call("a", "B", (), {"x": 1})) + b"}(K\x01K\x02ub",
        "gives an object its state twice",
    ),
    "a text as a storage": (instructions(Persistent("0")), "not a storage"),
    "a storage of text": (instructions(storage(count="6")), "impossible size"),
    "a storage of impossibly many": (instructions(storage(count=2**60)), "impossible size"),
    "a storage of truth": (instructions(storage(count=True)), "impossible size"),
    "a storage of negative size": (instructions(storage(count=-1)), "impossible size"),
    "a storage with a number as its key": (instructions(storage(key=0)), "not a storage"),
    "a storage with a long key": (instructions(storage(key="0" * 600)), "too long a name"),
    "a storage of an unknown class": (
        instructions(storage(kind="EvilStorage")),
        "tensors of an unknown kind, torch.EvilStorage",
    ),
    "a storage in the text of protocol 0": (b"P0\n", "in a way that torch does not"),
    "a tensor without a storage": (
        instructions(Call("torch._utils", "_rebuild_tensor_v2", (1, 2, 3, 4))),
        "a tensor of no storage",
    ),
    "a tensor without arguments": (
        instructions(Call("torch._utils", "_rebuild_tensor_v2")),
        "a tensor of no storage",
    ),
    "a tensor of a tensor of a tensor": (
        instructions(
            Call(
                "torch._tensor",
                "_rebuild_from_type_v2",
                (Name("torch._tensor", "_rebuild_from_type_v2"), None, (), None),
            )
        ),
        "a tensor of itself",
    ),
    "a parameter of text": (
        instructions(Call("torch._utils", "_rebuild_parameter", ("w", True, None))),
        "a parameter of no tensor",
    ),
    "a dtype of text": (
        instructions(
            Call(
                "torch._utils",
                "_rebuild_tensor_v3",
                (storage(), 0, (6,), (1,), False, None, "float32"),
            )
        ),
        "a tensor of no dtype",
    ),
    "a dtype of the future": (
        instructions(
            Call(
                "torch._utils",
                "_rebuild_tensor_v3",
                (storage(), 0, (6,), (1,), False, None, Name("torch", "float1")),
            )
        ),
        "a tensor of dtype torch.float1",
    ),
    "an untyped tensor": (
        instructions(tensor(of=storage("UntypedStorage", "1", 24))),
        "a tensor of no dtype|storage 1 is missing",
    ),
    "a tensor of a type and no more": (
        instructions(Call("torch._tensor", "_rebuild_from_type_v2", (Name("a", "b"),))),
        "makes a tensor in an unknown way",
    ),
    "a tensor of a type by a text": (
        instructions(Call("torch._tensor", "_rebuild_from_type_v2", ("eval", None, (), None))),
        "makes a tensor in an unknown way",
    ),
    "a parameter of nothing": (
        instructions(Call("torch._utils", "_rebuild_parameter")),
        "a parameter of no tensor",
    ),
    "a state for a tensor": (
        instructions(tensor()) + b"}b",
        "gives a state to what has none",
    ),
    "a dtype that is missing": (
        instructions(Call("torch._utils", "_rebuild_tensor_v3", (storage(), 0, (6,), (1,), 0, 0))),
        "a tensor of no dtype",
    ),
    "a dtype of another library": (
        instructions(
            Call(
                "torch._utils",
                "_rebuild_tensor_v3",
                (storage(), 0, (6,), (1,), False, None, Name("numpy", "float32")),
            )
        ),
        "a tensor of no dtype",
    ),
    "a dict of two things": (
        instructions(Call("collections", "OrderedDict", ({}, {}))),
        "a dict of more than one thing",
    ),
    "a dict of texts": (
        instructions(Call("collections", "OrderedDict", (["ab"],))),
        "makes a dict of what are not pairs",
    ),
    "a set of two things": (
        instructions(Call("builtins", "set", ([], []))),
        "makes a collection of what is none",
    ),
    "a list of a number": (
        instructions(Call("builtins", "list", (7,))),
        "makes a collection of what is none",
    ),
    "a complex number of text": (
        instructions(Call("builtins", "complex", ("1", "2"))),
        "complex number of what are not",
    ),
    "half a complex number": (
        instructions(Call("builtins", "complex", (1.0,))),
        "complex number of what are not",
    ),
    "bytes of no code": (
        instructions(Call("_codecs", "encode", ("x",))),
        "makes bytes in an unknown way",
    ),
    "bytes of a number": (
        instructions(Call("_codecs", "encode", (7, "latin1"))),
        "makes bytes in an unknown way",
    ),
    "bytes of text that has none": (
        instructions(Call("_codecs", "encode", ("\u20ac", "latin1"))),
        "bytes of text that has none",
    ),
    "bytes twice": (
        instructions(Call("builtins", "bytearray", (b"a", b"b"))),
        "makes bytes in an unknown way",
    ),
    "an old object of text": (
        instructions(Call("copy_reg", "_reconstructor", ("a", "b", None))),
        "an object of no class",
    ),
    "an old object of too little": (
        instructions(Call("copy_reg", "_reconstructor", (Name("a", "B"),))),
        "an object of no class",
    ),
    "a memory of a mark": (b"(q\x00", "needs a value where there is none"),
    "a module that is a number": (b"K\x01" + text("x") + b"\x93", "something that is not text"),
    "a function that is a number": (text("x") + b"K\x01\x93", "something that is not text"),
    "a frame past the end": (b"\x95" + struct.pack("<Q", 2**40), "stops in the middle"),
    "a number without end": (b"F" + b"1" * 200 + b"\n", "a number that is none"),
    "a negative length of an integer": (b"\x8b\xff\xff\xff\xff", "impossible length"),
    "a storage in a list": (
        instructions(Persistent(list(storage().identity))),
        "not a storage",
    ),
    "a storage of little": (instructions(Persistent(storage().identity[:4])), "not a storage"),
    "a storage of much": (
        instructions(Persistent((*storage().identity, None, None))),
        "not a storage",
    ),
    "a class of nothing": (instructions(Persistent(("module",))), "not a storage"),
    "a storage of another kind": (
        instructions(Persistent(("blob", *storage().identity[1:]))),
        "not a storage",
    ),
    "a storage of a class in text": (
        instructions(Persistent(("storage", "FloatStorage", "0", "cpu", 6))),
        "not a storage",
    ),
    "a storage of another library": (
        instructions(Persistent(("storage", Name("evil", "FloatStorage"), "0", "cpu", 6))),
        "tensors of an unknown kind, evil.FloatStorage",
    ),
    "a dict of a number": (
        instructions(Call("collections", "OrderedDict", (1,))),
        "makes a dict of what is none",
    ),
    "a dict of triples": (
        instructions(Call("collections", "OrderedDict", ([(1, 2, 3)],))),
        "makes a dict of what are not pairs",
    ),
    "a set of lists": (
        instructions(Call("builtins", "set", ([[]],))),
        "a key that cannot be one",
    ),
    "a gigabyte of zeros": (
        instructions(Call("builtins", "bytes", (2**30,))),
        "makes bytes in an unknown way",
    ),
    "a gigabyte of zeros that change": (
        instructions(Call("builtins", "bytearray", (2**30,))),
        "makes bytes in an unknown way",
    ),
    "bytes of another code": (
        instructions(Call("_codecs", "encode", ("x", "rot13"))),
        "makes bytes in an unknown way",
    ),
    "a list as a key": (b"}]K\x01s", "a key that cannot be one"),
    "a dict as a key": (b"}}K\x01s", "a key that cannot be one"),
    "a list inside a key": (b"}]\x85K\x01s", "a key that cannot be one"),
    "a list deep inside a key": (b"}]\x85\x85K\x01s", "a key that cannot be one"),
    "a tensor as a key": (b"}" + instructions(tensor()) + b"Ns", "a key that cannot be one"),
    "a key twice": (b"}(" + (text("again") + b"N") * 2 + b"u", "the name again occurs twice"),
    "a key without a value": (b"}(K\x01u", "a key without a value"),
    "an entry in a list": (b"]K\x01K\x02s", "what is not a dict"),
    "an item in a dict": (b"}K\x01a", "what is not a list"),
    "an item in a tuple": (b")K\x01a", "what is not a list"),
    "a member of a list": (b"](K\x01\x90", "what is not a set"),
    "a mark that is missing": (b"1" * 9, "a mark that is not there"),
    "a mark as a value": (b"((\x85", "where there is a mark"),
    "a memory of nothing": (b"h\x07", "a value it never made"),
    "an instruction from nowhere": (b"\xff", "unknown instruction"),
    "a protocol of the future": (b"\x80\x09", "protocol|newer kind"),
    "an integer of words": (b"Iabc\n", "an integer that is none"),
    "an integer with underscores": (b"L1_000L\n", "an integer that is none"),
    "an integer without end": (b"I" + b"9" * 5000 + b"\n", "an integer that is none"),
    "a number of words": (b"Fabc\n", "a number that is none"),
    "a negative length": (b"T\xff\xff\xff\xff", "negative length"),
    "a negative place": (b"Np-1\n", "impossible number"),
    "half a text": (b"V\\u12\n", "cannot be decoded"),
    "an empty stop": (b"0.", "values left over|where there is"),
}


@every_container
@pytest.mark.parametrize("name", PICKLES)
def test_a_wrong_pickle_is_refused(name: str, write: Callable[..., bytes], tmp_path: Path) -> None:
    code, fragment = PICKLES[name]
    path = tmp_path / "model.pt"
    path.write_bytes(write(beside_a_tensor(code)))
    with pytest.raises(CheckpointError, match=fragment):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("code", "found"),
    [(b"0", "at byte 3 of the pickle"), (b"\xff", "byte 0xff at byte 3 of the pickle")],
)
def test_a_refusal_says_where_in_the_pickle(tmp_path: Path, code: bytes, found: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(b"\x80\x02" + code + b"."))
    with pytest.raises(CorruptCheckpoint) as refused:
        open_checkpoint(path)
    assert refused.value.found == found


@every_container
def test_an_instruction_with_nothing_to_work_on_is_refused(
    write: Callable[..., bytes], tmp_path: Path
) -> None:
    """Every one of the 256 instructions, on an empty stack and before the end of the file."""
    path = tmp_path / "model.pt"
    for code in range(256):
        path.write_bytes(write(b"\x80\x02" + bytes([code])))
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2Jb", "n" * 600, "\u202eb"])
@every_container
def test_a_tensor_whose_name_cannot_be_shown_is_refused(
    name: str, write: Callable[..., bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(write(assemble({name: tensor()})))
    with pytest.raises(CorruptCheckpoint, match="impossible name") as refused:
        open_checkpoint(path)
    assert str(refused.value).replace("\n", "").isprintable()


# ---- tensors that are wrong

#: name -> (the tensor, what is said)
TENSORS: dict[str, tuple[Call, str]] = {
    "more elements than the storage": (tensor((2, 4), (4, 1)), "past the end of its storage"),
    "an offset past the end": (tensor(offset=1), "past the end of its storage"),
    "an offset without elements": (tensor((0,), (1,), offset=7), "past the end of its storage"),
    "a negative offset": (tensor(offset=-1), "impossible offset"),
    "an offset of text": (tensor(offset="0"), "impossible offset"),
    "an offset of truth": (tensor(offset=True), "impossible offset"),
    "a negative stride": (tensor(strides=(-3, 1)), "impossible strides"),
    "a negative size": (tensor((-2, 3)), "impossible shape"),
    "two negative sizes": (tensor((-2, -3)), "impossible shape"),
    "sizes that are no integers": (tensor((2.0, 3)), "impossible shape"),
    "a size that is a tensor": (tensor((tensor(), 3)), "impossible shape"),
    "no shape": (tensor(None, None), "has no shape"),
    "more strides than axes": (tensor((6,), (3, 1)), "strides"),
    "a stride past the end": (tensor((2, 3), (4, 1)), "past the end of its storage"),
    "a product past 64 bits": (
        tensor((2**32, 2**32, 2), (0, 0, 1)),
        "more elements than can be counted",
    ),
    "a product that wraps to 6": (
        tensor((2**63 - 1, 2), (0, 0)),
        "more elements than can be counted",
    ),
    "a size past 64 bits": (tensor((2**64, 1), (1, 1)), "more elements than can be counted"),
    "no elements of a size past 64 bits": (
        tensor((0, 2**62), (1, 1)),
        "more elements than can be counted",
    ),
    "a stride past 64 bits of an axis that takes no step": (
        tensor((1, 6), (2**62, 1)),
        "impossible strides",
    ),
    "an offset past 64 bits": (tensor(offset=2**64), "past the end of its storage"),
    "a stride past 64 bits": (tensor((2, 3), (2**64, 1)), "impossible strides"),
    "a terabyte in one element": (tensor((2**38,), (0,)), "more elements than its storage"),
    "a thousand axes": (tensor((1,) * 1000, (1,) * 1000), "too many axes"),
    "a storage that is missing": (tensor(of=storage(key="7")), "7 is missing|does not fit"),
    "a storage outside": (tensor(of=storage(key="../data.pkl")), "missing|does not fit"),
    "a storage that claims more": (
        tensor(of=storage(count=7)),
        "does not have the size that is claimed",
    ),
    "a storage that claims less": (
        tensor((5,), (1,), of=storage(count=5)),
        "does not have the size that is claimed",
    ),
    "a storage that claims exabytes": (
        tensor(of=storage(count=2**60 - 1)),
        "does not have the size that is claimed",
    ),
    "a storage of another width": (
        tensor(of=storage("DoubleStorage")),
        "does not have the size that is claimed|ends in the middle",
    ),
}


@every_container
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_outside_its_storage_is_refused_by_name(
    name: str, write: Callable[..., bytes], tmp_path: Path
) -> None:
    wrong, fragment = TENSORS[name]
    path = tmp_path / "model.pt"
    path.write_bytes(write(assemble({"model": {"the.weight": wrong}})))
    with pytest.raises(CorruptCheckpoint, match=fragment) as refused:
        open_checkpoint(path)
    named = ("the.weight", "storage", "ends in the middle of a tensor")
    assert any(name in str(refused.value) for name in named)


@every_container
def test_a_wrong_tensor_beside_the_model_is_refused_too(
    write: Callable[..., bytes], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    value = {"model": {"w": tensor()}, "optimizer": {"state": [tensor(offset=5)]}}
    path.write_bytes(write(assemble(value)))
    with pytest.raises(CorruptCheckpoint, match=r"tensor optimizer\.state\.0 reaches past"):
        open_checkpoint(path)


# ---- zip archives that are wrong

PICKLE = assemble({"w": tensor()})
DATA, FLOATS = Entry("archive/data.pkl", PICKLE), Entry("archive/data/0", SIX_FLOATS)
TABLE_AT = zip_archive([DATA, FLOATS]).index(b"PK\x01\x02")


def deflated(name: str, content: bytes) -> Entry:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(content) + packer.flush()
    facts = {"method": 8, "packed": len(packed), "length": len(content), "crc": zlib.crc32(content)}
    return Entry(name, packed, facts, facts)


ZIPS: dict[str, tuple[bytes, str]] = {
    "no end": (zip_archive([DATA, FLOATS])[:-30], "does not end as one"),
    "something before it": (
        b"PK\x03\x04" + b"#" * 60 + zip_archive([DATA, FLOATS]),
        "not where it should be",
    ),
    "something before it, counted": (
        zip_archive([DATA, FLOATS], prefix=b"PK\x03\x04" + b"#" * 60),
        "something stands before the archive",
    ),
    "something after it": (zip_archive([DATA, FLOATS], suffix=b"#"), "something follows the end"),
    "a second archive after it": (
        zip_archive([DATA, FLOATS]) + zip_archive([DATA, FLOATS]),
        "not where it should be",
    ),
    "a comment shorter than it says": (
        zip_archive([DATA, FLOATS], end={"comment": 9}),
        "something follows the end",
    ),
    "more entries than there are": (
        zip_archive([DATA, FLOATS], end={"here": 3, "count": 3}),
        "table of contents",
    ),
    "fewer entries than there are": (
        zip_archive([DATA, FLOATS], end={"here": 1, "count": 1}),
        "more in it than entries",
    ),
    "a part of a split archive": (zip_archive([DATA, FLOATS], end={"disk": 1}), "split"),
    "a split archive's second part": (zip_archive([DATA, FLOATS], end={"start_disk": 1}), "split"),
    "entries elsewhere": (zip_archive([DATA, FLOATS], end={"here": 1}), "split"),
    "no entries": (zip_archive([], prefix=b"PK\x03\x04"), "a zip archive of nothing"),
    "a table that is too short for its entries": (
        zip_archive([DATA, FLOATS], end={"here": 30_000, "count": 30_000}),
        "ends too early",
    ),
    "a comment past the table": (
        zip_archive([DATA, FLOATS]).replace(
            struct.pack("<5H", 14, 0, 0, 0, 0), struct.pack("<5H", 14, 0, 500, 0, 0)
        ),
        "garbled",
    ),
    "an entry on another disk": (
        zip_archive([DATA, FLOATS]).replace(
            struct.pack("<5H", 14, 0, 0, 0, 0), struct.pack("<5H", 14, 0, 0, 7, 0)
        ),
        "contradicts itself",
    ),
    "an entry of two sizes": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"packed": 4}, {"packed": 4})]),
        "contradicts itself",
    ),
    "another packed length inside": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"packed": 4})]),
        "the two headers",
    ),
    "a byte order without end": (
        zip_archive([DATA, FLOATS, Entry("archive/byteorder", b"little" * 9)]),
        "is too large",
    ),
    "larger records that are none": (
        zip_archive([DATA, FLOATS], end64={}).replace(b"PK\x06\x06", b"PK\x06\x05"),
        "contradicts itself",
    ),
    "larger records on another disk": (
        zip_archive([DATA, FLOATS], locator={"disk": 1}),
        "contradicts itself",
    ),
    "a table outside": (
        zip_archive([DATA, FLOATS], end={"start": 2**32 - 2}),
        "not where it should be",
    ),
    "a table of the wrong length": (
        zip_archive([DATA, FLOATS], end={"length": 7}),
        "not where it should be",
    ),
    "two entries of one name": (
        zip_archive([DATA, FLOATS, FLOATS]),
        "two entries are named archive/data/0",
    ),
    "two pickles": (
        zip_archive([DATA, FLOATS, Entry("other/data.pkl", PICKLE)]),
        "two entries claim to be its pickle",
    ),
    "entries that overlap": (
        zip_archive([DATA, FLOATS, Entry("archive/data/1", b"", {}, {"offset": 0})]),
        "two headers",
    ),
    "one place for two entries": (
        zip_archive(
            [DATA, FLOATS, Entry("archive/data/1", SIX_FLOATS, before=b"PK\x03\x04" * 0)]
        ).replace(struct.pack("<2I", 24, 24), struct.pack("<2I", 90, 90)),
        "claims more|overlap|contradict",
    ),
    "an entry past the end": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {}, {"offset": 2**31})]),
        "lies outside the archive",
    ),
    "an entry that begins in the table": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {}, {"offset": TABLE_AT - 29})]),
        "lies outside the archive",
    ),
    "an entry whose header would end at the table": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {}, {"offset": TABLE_AT - 30})]),
        "no entry where archive/data/0 should begin",
    ),
    "an entry that claims more": (
        zip_archive(
            [
                DATA,
                Entry(
                    "archive/data/0",
                    SIX_FLOATS,
                    {"length": 2**30, "packed": 2**30},
                    {"length": 2**30, "packed": 2**30},
                ),
            ]
        ),
        "claims more than the file holds",
    ),
    "an entry that claims to reach into the table": (
        zip_archive(
            [
                DATA,
                Entry(
                    "archive/data/0",
                    SIX_FLOATS,
                    {"length": 60, "packed": 60},
                    {"length": 60, "packed": 60},
                ),
            ]
        ),
        "claims more than the file holds",
    ),
    "no entry where one should be": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"signature": b"PK\x03\x05"})]),
        "no entry where",
    ),
    "another name inside": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"name": b"archive/data/1"})]),
        "the two headers",
    ),
    "another length inside": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"length": 4})]),
        "the two headers",
    ),
    "another checksum inside": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"crc": 4})]),
        "the two headers",
    ),
    "another method inside": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"method": 8})]),
        "the two headers",
    ),
    "a long extra field inside": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {"extra": b"\0" * 9})]).replace(
            struct.pack("<2H", 14, 9), struct.pack("<2H", 14, 0xFFFF)
        ),
        "claims more than the file holds",
    ),
    "a garbled table": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {}, {"signature": b"PK\x01\x03"})]),
        "garbled",
    ),
    "a size in a zip64 field that is not there": (
        zip_archive([DATA, Entry("archive/data/0", SIX_FLOATS, {}, {"length": 0xFFFFFFFF})]),
        "lacks its size",
    ),
    "larger records that contradict the smaller": (
        zip_archive([DATA, FLOATS], end64={"count": 3, "here": 3}),
        "contradicts itself",
    ),
    "larger records of a split archive": (
        zip_archive([DATA, FLOATS], locator={"disks": 2}),
        "contradicts itself",
    ),
    "larger records somewhere else": (
        zip_archive([DATA, FLOATS], locator={"at": 0}),
        "contradicts itself",
    ),
    "larger records outside": (
        zip_archive([DATA, FLOATS], locator={"at": 2**63}),
        "contradicts itself",
    ),
    "larger records of another size": (
        zip_archive([DATA, FLOATS], end64={"size": 2**40}),
        "contradicts itself",
    ),
    "an encrypted pickle": (
        zip_archive([Entry("archive/data.pkl", PICKLE, {"flags": 1}, {"flags": 1}), FLOATS]),
        "encrypted",
    ),
    "a compressed pickle": (
        zip_archive([deflated("archive/data.pkl", PICKLE), FLOATS]),
        "data.pkl is compressed",
    ),
    "a compressed tensor": (
        zip_archive([DATA, deflated("archive/data/0", SIX_FLOATS)]),
        "data/0 is compressed",
    ),
    "a zip bomb": (
        zip_archive([deflated("archive/data.pkl", b"\0" * 2**26), FLOATS]),
        "data.pkl is compressed",
    ),
    "a wrong checksum of the pickle": (
        zip_archive([Entry("archive/data.pkl", PICKLE, {"crc": 9}, {"crc": 9}), FLOATS]),
        "data.pkl does not have the checksum",
    ),
    "something after the pickle": (
        zip_archive([Entry("archive/data.pkl", PICKLE + b"N."), FLOATS]),
        "something follows the end of its pickle",
    ),
    "a name with a way up": (zip_archive([DATA, Entry("archive/../x")]), "impossible name"),
    "a name from the root": (zip_archive([DATA, Entry("/etc/passwd")]), "impossible name"),
    "a name of another system": (zip_archive([DATA, Entry("a\\b")]), "impossible name"),
    "a name with a zero": (zip_archive([DATA, Entry("a\0b")]), "impossible name"),
    "a name that is no text": (zip_archive([DATA, Entry(b"\xff\xfe")]), "impossible name"),
    "no name": (zip_archive([DATA, Entry("")]), "impossible name"),
    "a big-endian machine": (
        zip_archive([DATA, FLOATS, Entry("archive/byteorder", b"big")]),
        "big-endian",
    ),
    "a TorchScript program": (
        zip_archive([DATA, FLOATS, Entry("archive/constants.pkl", b"")]),
        "TorchScript",
    ),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_wrong_archive_is_refused(name: str, tmp_path: Path) -> None:
    content, fragment = ZIPS[name]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=fragment):
        open_checkpoint(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_archive_that_the_wrong_ones_are_made_from_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    variants: tuple[dict[str, Any], ...] = (
        {"comment": b"a comment"},
        {"end64": {}},
        {"locator": {}, "comment": b"x"},
        {"end": {"here": 0xFFFF, "count": 0xFFFF}, "end64": {"here": 2, "count": 2}},
        {"end": {"length": 0xFFFFFFFF, "start": 0xFFFFFFFF}, "locator": {}},
    )
    for options in variants:
        path.write_bytes(zip_archive([DATA, FLOATS], **options))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.verify()
            assert checkpoint.tensors["w"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_entries_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """An entry whose bytes are the header and the bytes of the next one."""
    inner = zip_archive([Entry("archive/data/1", b"####")])
    inner = inner[: inner.index(b"PK\x01\x02")]
    at = len(zip_archive([DATA])) - len(zip_archive([])) - 46 - len(DATA.name)
    outer = Entry("archive/data/0", inner)
    shared = Entry("archive/data/1", b"####", {}, {"offset": at + 30 + len(outer.name)})
    content = bytearray(zip_archive([DATA, outer, shared]))
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="archive/data/0 and archive/data/1 overlap"):
        open_checkpoint(path)


# ---- torch's older container and safetensors, wrong


def legacy(**changes: Any) -> bytes:
    parts = {
        "magic": assemble(0x1950A86A20F9469CFC6C),
        "version": assemble(1001),
        "facts": assemble({"little_endian": True}),
        "value": PICKLE,
        "keys": assemble(["0"]),
        "storages": struct.pack("<q", 6) + SIX_FLOATS,
        "suffix": b"",
    }
    return b"".join({**parts, **changes}.values())


OLDER: dict[str, tuple[bytes, str]] = {
    "a number that is swallowed": (
        legacy(magic=b"\x80\x02C\x14" + b"#" * 7 + assemble(0x1950A86A20F9469CFC6C)[2:] + b"."),
        "does not begin with torch's number",
    ),
    "storages of lists": (legacy(keys=assemble([[]])), "does not fit its tensors"),
    "another version": (legacy(version=assemble(1002)), "unknown version"),
    "a version of text": (legacy(version=assemble("1001")), "unknown version"),
    "no facts": (legacy(facts=assemble([1])), "what machine"),
    "a big-endian machine": (legacy(facts=assemble({"little_endian": False})), "big-endian"),
    "no storages": (legacy(keys=assemble([])), "does not fit its tensors"),
    "a storage too many": (legacy(keys=assemble(["0", "1"])), "does not fit its tensors"),
    "a storage twice": (legacy(keys=assemble(["0", "0"])), "does not fit its tensors"),
    "storages of numbers": (legacy(keys=assemble([0])), "does not fit its tensors"),
    "storages that are no list": (legacy(keys=assemble("0")), "does not fit its tensors"),
    "another number of elements": (
        legacy(storages=struct.pack("<q", 5) + SIX_FLOATS),
        "does not have the size that is claimed",
    ),
    "a negative number of elements": (
        legacy(storages=struct.pack("<q", -1) + SIX_FLOATS),
        "does not have the size that is claimed",
    ),
    "half a number of elements": (legacy(storages=b"\6\0\0"), "ends in the middle"),
    "half a tensor": (legacy(storages=struct.pack("<q", 6) + SIX_FLOATS[:9]), "ends in the middle"),
    "something after the tensors": (legacy(suffix=b"#"), "something follows its last tensor"),
    "a storage that views another": (
        legacy(
            value=assemble(
                {
                    "w": tensor(
                        of=Persistent(
                            ("storage", Name("torch", "FloatStorage"), "0", "cpu", 6, ("1", 0, 3))
                        )
                    )
                }
            )
        ),
        "views of each other",
    ),
    "two sizes of one storage": (
        legacy(value=assemble({"w": tensor(), "v": tensor((3,), (1,), of=storage(count=3))})),
        "two sizes are claimed",
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_a_wrong_file_of_the_older_container_is_refused(name: str, tmp_path: Path) -> None:
    content, fragment = OLDER[name]
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=fragment):
        open_checkpoint(path)


@pytest.mark.parametrize("start", [b"\x81\x02", b"\x80\x01", b"\x80\x06", b"\x80", b""])
def test_torch_s_number_alone_makes_no_file_of_the_older_container(
    start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(start + legacy()[2:])
    with pytest.raises(UnsupportedCheckpoint, match=r"no kind of checkpoint|a plain pickle"):
        open_checkpoint(path)


def header(**changes: Any) -> bytes:
    entry = {"dtype": '"F32"', "shape": "[2,3]", "data_offsets": "[0,24]", **changes}
    fields = ",".join(f'"{key}":{value}' for key, value in entry.items() if value is not None)
    return f'{{"the.weight":{{{fields}}}}}'.encode()


SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "a header past the end": (safetensors(header(), SIX_FLOATS, 2**20), "ends in the middle"),
    "a header of gigabytes": (safetensors(header(), SIX_FLOATS, 2**33), "header is too long"),
    "a header that is not JSON": (safetensors(b"{nonsense", SIX_FLOATS), "not JSON"),
    "a header that nests": (safetensors(b'{"a":' * 99 + b"1" + b"}" * 99), "nests too deeply"),
    "a header that nests without end": (safetensors(b'{"a":' * 100_000), "nests|not JSON"),
    "a name twice": (
        safetensors(header()[:-1] + b"," + header()[1:], SIX_FLOATS),
        "the.weight occurs twice",
    ),
    "a hole": (
        safetensors(header(data_offsets="[4,28]"), SIX_FLOATS + b"1234"),
        "does not follow the one before it",
    ),
    "a hole at the end": (safetensors(header(), SIX_FLOATS + b"1"), "goes on past its end"),
    "bytes that are missing": (safetensors(header(), SIX_FLOATS[:-5]), "it lacks 5 bytes"),
    "an overlap": (
        safetensors(
            b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},'
            b'"b":{"dtype":"F32","shape":[5],"data_offsets":[4,24]}}',
            SIX_FLOATS,
        ),
        "the tensor b does not follow",
    ),
    "a place that runs backwards": (
        safetensors(header(data_offsets="[24,0]"), SIX_FLOATS),
        "impossible place",
    ),
    "a negative place": (
        safetensors(header(data_offsets="[-24,0]"), SIX_FLOATS),
        "impossible place",
    ),
    "a place that is no number": (
        safetensors(header(data_offsets="[0,24.0]"), SIX_FLOATS),
        "has no place",
    ),
    "three numbers for a place": (
        safetensors(header(data_offsets="[0,24,1]"), SIX_FLOATS),
        "has no place",
    ),
    "a shape of another size": (
        safetensors(header(shape="[2,4]"), SIX_FLOATS),
        "does not take 24 bytes",
    ),
    "a shape past 64 bits of no elements": (
        safetensors(header(shape="[0,4611686018427387904]", data_offsets="[0,0]")),
        "more elements than can be counted",
    ),
    "a shape past 64 bits": (
        safetensors(header(shape="[4294967296,4294967296,6]"), SIX_FLOATS),
        "does not take 24 bytes",
    ),
    "a negative shape": (safetensors(header(shape="[-2,-3]"), SIX_FLOATS), "impossible shape"),
    "a shape of truth": (safetensors(header(shape="[true,6]"), SIX_FLOATS), "impossible shape"),
    "a shape of texts": (safetensors(header(shape='["2","3"]'), SIX_FLOATS), "impossible shape"),
    "a shape of text": (safetensors(header(shape='"6"'), SIX_FLOATS), "impossible shape"),
    "a thousand axes": (
        safetensors(header(shape=str([1] * 1000)), SIX_FLOATS),
        "too many axes",
    ),
    "an unknown dtype": (safetensors(header(dtype='"F4"'), SIX_FLOATS), "unknown dtype"),
    "a dtype that is a list": (safetensors(header(dtype="[]"), SIX_FLOATS), "unknown dtype"),
    "no dtype": (safetensors(header(dtype=None), SIX_FLOATS), "not described"),
    "one fact too many": (safetensors(header(more="1"), SIX_FLOATS), "not described"),
    "a tensor that is a list": (safetensors(b'{"w":[]}'), "not described"),
    "a tensor that is a list of the right words": (
        safetensors(b'{"w":["dtype","shape","data_offsets"]}'),
        "not described",
    ),
    "a shape that is an object": (safetensors(header(shape="{}"), SIX_FLOATS), "impossible shape"),
    "metadata in a list": (safetensors(b'{"__metadata__":[]}'), "not strings"),
    "metadata of numbers": (safetensors(b'{"__metadata__":{"a":1}}'), "not strings"),
    "metadata that are no text": (
        safetensors(b'{"__metadata__":{"a":"\\ud800"}}'),
        "half of a character",
    ),
    "a name that cannot be shown": (
        safetensors(header().replace(b"the", b"\\u001b"), SIX_FLOATS),
        "impossible name",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_wrong_safetensors_file_is_refused(name: str, tmp_path: Path) -> None:
    content, fragment = SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=fragment):
        open_checkpoint(path)


def test_a_safetensors_file_of_too_many_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TENSORS", 0)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header(), SIX_FLOATS))
    with pytest.raises(CorruptCheckpoint, match="too many tensors"):
        open_checkpoint(path)


def test_a_pickle_that_never_ends_its_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(zip_archive([Entry("archive/data.pkl", b"\x80\x02cos")]))
    with pytest.raises(CorruptCheckpoint, match="stops in the middle"):
        open_checkpoint(path)


def test_the_safetensors_that_the_wrong_ones_are_made_from_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(header(), SIX_FLOATS))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["the.weight"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]


# ---- files that would take all the time or memory there is


def pickled(code: bytes) -> bytes:
    return b"\x80\x04" + code + b"."


def shared(times: int, join: bytes) -> bytes:
    """``join`` applied to the same value twice, again and again: 2**times values in all."""
    steps = (b"q" + bytes([i]) + b"0" + join % (i, i) for i in range(times))
    return b"K\x01\x85" + b"".join(steps)


def length4(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def integer(value: int) -> bytes:
    return instructions(value)


RECORD = b"ca\nB\nq\x00"


def colliding(count: int) -> bytes:
    """A dict of tuples that have one hash, because -1 and -2 have, and that differ at their ends.

    Two families of them begin with texts that are equal and not the same object.
    """
    key = b"X" + length4("😀".encode() * 1_000)
    tuples = b"".join(
        b"("
        + (b"h\x00" if index % 2 else b"h\x01") * 50
        + b"".join(integer(-1 if index >> bit & 1 else -2) for bit in range(11))
        + b"tN"
        for index in range(count)
    )
    return key + b"q\x000" + key + b"q\x010}(" + tuples + b"u"


#: the pickle of a tuple of half a million ones
ENDLESS = Raw(b"(" + b"K\x01" * 500_000 + b"t")

#: name -> (the file, what is said). Each costs its maker a few bytes or megabytes.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a value shared 2**60 times": (
        lambda: torch_zip(beside_a_tensor(shared(60, b"](h%ch%ce"))),
        "the same values again and again",
    ),
    "a key shared 2**60 times": (
        lambda: torch_zip(beside_a_tensor(b"}" + shared(60, b"h%ch%c\x86") + b"Ns")),
        "a key that is too large",
    ),
    "lists inside each other": (
        lambda: torch_zip(beside_a_tensor(b"]" * 100_000 + b"a" * 99_999)),
        "nests too deeply",
    ),
    "tuples inside each other": (
        lambda: torch_legacy(beside_a_tensor(b"(" * 100_000 + b"t" * 100_000)),
        "nests too deeply",
    ),
    "records inside each other": (
        lambda: torch_zip(
            beside_a_tensor(RECORD + b"h\x00" * 99_999 + b")\x81" + b"\x85\x81" * 99_999)
        ),
        "nests too deeply",
    ),
    "states inside each other": (
        lambda: torch_zip(
            beside_a_tensor(RECORD + b"0" + b"h\x00)\x81" * 60_000 + b"b" * 59_999)
        ),
        "nests too deeply",
    ),
    "configurations inside each other": (
        lambda: torch_zip(
            beside_a_tensor(
                b"comegaconf.nodes\nAnyNode\nq\x000"
                + (b"h\x00)\x81}" + text("_val")) * 50_000
                + b"N"
                + b"sb" * 50_000
            )
        ),
        "nests too deeply",
    ),
    "dicts inside each other as the model": (
        lambda: torch_zip(pickled((b"}" + text("model")) * 99_999 + b"N" + b"s" * 99_999)),
        "no state dict",
    ),
    "a million tensors": (
        lambda: torch_zip(
            pickled(
                instructions(Name("torch._utils", "_rebuild_tensor_v2"))
                + b"q\x000"
                + instructions(tensor().args)
                + b"q\x010}("
                + b"".join(text(str(i)) + b"h\x00h\x01R" for i in range(1_000_000))
                + b"u"
            )
        ),
        "too many tensors",
    ),
    "a million entries": (
        lambda: zip_archive(
            [DATA], end={"here": 0xFFFF, "count": 0xFFFF}, end64={"here": 10**6, "count": 10**6}
        ),
        "too many entries",
    ),
    "a table of contents of gigabytes": (
        lambda: zip_archive([Entry("a", b"", {}, {"extra": b"x" * 60_000})] * 700),
        "table of contents is too long",
    ),
    "instructions without end": (
        lambda: torch_legacy(beside_a_tensor(b"N0" * 2_500_000)),
        "endless",
    ),
    "marks without end": (lambda: torch_zip(beside_a_tensor(b"(" * 4_500_000)), "endless"),
    "sets without end": (
        lambda: torch_zip(beside_a_tensor(b"(" + b"\x8f" * 3_000_000 + b"t")),
        "builds without end",
    ),
    "objects without end": (
        lambda: torch_zip(beside_a_tensor(RECORD + b"(" + b"h\x00)\x81" * 1_000_000 + b"t")),
        "builds without end",
    ),
    "copies of a dict": (
        lambda: torch_zip(
            beside_a_tensor(
                b"ccollections\nOrderedDict\nq\x00}("
                + b"".join(text(str(i)) + b"N" for i in range(100_000))
                + b"u\x85q\x01("
                + b"h\x00h\x01R" * 250_000
                + b"t"
            )
        ),
        "endless",
    ),
    "copies of a list": (
        lambda: torch_zip(
            beside_a_tensor(
                b"cbuiltins\nlist\nq\x00("
                + b"N" * 100_000
                + b"t\x85q\x01("
                + b"h\x00h\x01R" * 250_000
                + b"t"
            )
        ),
        "endless",
    ),
    "copies of a text": (
        lambda: torch_zip(
            beside_a_tensor(
                b"c_codecs\nencode\nq\x00(X"
                + length4(b"a" * 2**24)
                + text("latin1")
                + b"tq\x01("
                + b"h\x00h\x01R" * 250_000
                + b"t"
            )
        ),
        "too long",
    ),
    "a text of exabytes": (
        lambda: torch_legacy(beside_a_tensor(b"\x8d" + struct.pack("<Q", 2**62))),
        "too long",
    ),
    "an integer of gigabytes": (
        lambda: torch_zip(beside_a_tensor(b"\x8b" + struct.pack("<i", 2**31 - 1))),
        "impossible length",
    ),
    "integers of one hash": (
        lambda: torch_zip(
            beside_a_tensor(
                b"}(" + b"".join(integer((2**61 - 1) * i) + b"N" for i in range(200_000)) + b"u"
            )
        ),
        "a key that cannot be one",
    ),
    "keys that are tuples": (
        lambda: torch_zip(
            beside_a_tensor(b"}(" + b"".join(integer(i) + b"\x85N" for i in range(9999)) + b"u")
        ),
        "endless",
    ),
    "tuples of one hash that compare through long texts": (
        lambda: torch_zip(beside_a_tensor(colliding(2000))),
        "endless",
    ),
    "copies of a dict whose keys are slow to compare": (
        lambda: torch_zip(
            beside_a_tensor(
                b"cbuiltins\ndict\nq\x05}("
                + b"".join(integer(i) + b"\x85N" for i in range(400))
                + b"u\x85q\x06("
                + b"h\x05h\x06R" * 60_000
                + b"t"
            )
        ),
        "endless",
    ),
    "floats without end as keys": (
        lambda: torch_zip(
            beside_a_tensor(
                b"}("
                + b"".join(b"G" + struct.pack(">d", i + 0.5) + b"N" for i in range(100_000))
                + b"u"
            )
        ),
        "endless",
    ),
    "names without end": (
        lambda: torch_zip(
            beside_a_tensor(
                b"(" + b"".join(b"cmodule\nName%d\n" % i for i in range(500_000)) + b"t"
            )
        ),
        "too many classes",
    ),
    "one text of wide characters": (
        lambda: torch_zip(
            beside_a_tensor(b"X" + length4(b"a" * 50_000_000 + "😀".encode()))
        ),
        "too long",
    ),
    "long keys outside ASCII, shown again and again": (
        lambda: torch_zip(
            beside_a_tensor(
                b"X" + length4("é".encode() * 2_000) + b"q\x000](" + b"}h\x00Ns" * 290_000 + b"e"
            )
        ),
        "opened",
    ),
    "one tensor under a million names": (
        lambda: torch_zip(
            pickled(
                instructions(tensor())
                + b"q\x000}("
                + b"".join(text(str(i)) + b"h\x00" for i in range(300_000))
                + b"u"
            )
        ),
        "too many tensors",
    ),
    "keys that take long to compare": (
        lambda: torch_zip(
            beside_a_tensor(
                b"\x8f(X" + length4(b"a" * 2**24) + b"\x90(X" + length4(b"a" * 2**24) + b"q\x00"
                + b"h\x00" * 500_000 + b"\x90"
            )
        ),
        "a key that is too long",
    ),
    "a shape without end": (
        lambda: torch_zip(
            assemble({"w": tensor(ENDLESS, ENDLESS)})
        ),
        "too many axes",
    ),
    "a zip bomb": (
        lambda: zip_archive([deflated("archive/data.pkl", b"\0" * 2**26), FLOATS]),
        "is compressed",
    ),
    "a header of lists": (
        lambda: safetensors(b'{"a":[' + b"[]," * 2_000_000 + b"1]}"),
        "too large",
    ),
    "a header too long": (
        lambda: safetensors(b'{"a":"' + b"a" * 2**24 + b'"}'),
        "header is too long",
    ),
}  # fmt: skip

#: seconds of processor time and bytes of memory that reading any file may take
SECONDS, BYTES = 5, 300 * 2**20

SCRIPT = """
import resource, sys, time
from contentvec_convert.checkpoint import open_checkpoint
from mlx_contentvec.errors import CheckpointError

def taken():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[0]) * resource.getpagesize()

limit = taken() + {bytes}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        open_checkpoint(path)
        said = "opened"
    except CheckpointError as error:
        said = error.problem
    print(round(time.process_time() - start, 2), said, flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="a limit on memory needs Linux to be kept"
)
def test_no_file_takes_more_than_seconds_and_some_memory(tmp_path: Path) -> None:
    paths = []
    for index, (build, _) in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"{index}.pt")
        paths[-1].write_bytes(build())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{bytes}", str(BYTES)), *paths],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(BOMBS)
    for (name, (_, fragment)), line in zip(BOMBS.items(), lines, strict=True):
        seconds, said = line.split(" ", 1)
        assert float(seconds) < SECONDS, name
        assert any(part in said for part in fragment.split("|")), (name, said)


def test_the_shards_of_a_model_share_one_budget(tmp_path: Path) -> None:
    """A hundred names of one file: each alone is read, all together are refused."""
    entry = '"%s":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % f"tensor{i}" for i in range(2_000)) + "}").encode()
    (tmp_path / "one").write_bytes(safetensors(header))
    open_checkpoint(tmp_path / "one").close()
    shards = [f"{index}.safetensors" for index in range(100)]
    for shard in shards:
        (tmp_path / shard).symlink_to(tmp_path / "one")
    weight_map = {f"{shard}/{i}": shard for i, shard in enumerate(shards)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="too many tensors"):
        open_checkpoint(tmp_path)


def test_a_message_about_a_hostile_dict_stays_short(tmp_path: Path) -> None:
    keys = b"".join(b"(" + text("x" * 3_000) * 8 + integer(i) + b"tN" for i in range(12))
    path = tmp_path / "odd.pt"
    path.write_bytes(torch_zip(pickled(b"}(" + keys + b"u")))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert len(str(caught.value)) < 1_000


#: values of a hostile file -> how a message shows them
SHOWN: list[tuple[object, str]] = [
    ((1,) * 8, "(1, 1, 1, 1, 1, 1, 1, 1)"),
    ((1,) * 9, "(1, 1, 1, 1, 1, 1, 1, 1, ...)"),
    ([1, (2,), [3], "x"], "(1, tuple, list, x)"),
    (2**128 - 1, "340282366920938463463374607431768211455"),
    (2**128, "an integer of 129 bits"),
    # Python itself refuses to write it
    (-(2**20_000), "an integer of 20001 bits"),
    (True, "True"),
    ("a" * 80, "a" * 80),
    ("a" * 81, "a" * 77 + "..."),
    ("n\u00e4me", "n\\xe4me"),
    ("a\nb", "a\\nb"),
    ("\u202eb", "\\u202eb"),
]


@pytest.mark.parametrize("index", range(len(SHOWN)))
def test_a_value_is_shown_on_one_short_line_of_ascii(index: int) -> None:
    value, shown = SHOWN[index]
    assert brief(value) == shown
