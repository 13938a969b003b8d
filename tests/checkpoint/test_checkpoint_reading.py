"""The reader gives what torch.load gives, tensor by tensor and bit by bit."""

from __future__ import annotations

import argparse
import enum
import errno
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from contentvec_convert.checkpoint import (
    InertRecord,
    StoredTensor,
    foreign_file,
    is_cut_short,
    limits,
    open_checkpoint,
    source_file,
)
from contentvec_convert.checkpoint.source_file import SourceFile
from mlx_contentvec.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from mlx_contentvec.files import open_regular
from tests.checkpoint_files import (
    SIX_FLOATS,
    Call,
    Entry,
    Name,
    Raw,
    assemble,
    instructions,
    storage,
    tensor,
    torch_legacy,
    torch_zip,
    zip_archive,
)

Save = Callable[..., Path]

CONTAINERS = {"torch zip": True, "torch legacy": False}


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def save(torch: ModuleType, container: str, tmp_path: Path) -> Save:
    def write(value: object, **options: Any) -> Path:
        path = tmp_path / "model.pt"
        torch.save(value, path, _use_new_zipfile_serialization=CONTAINERS[container], **options)
        return path

    return write


def bits(torch: ModuleType, value: Any) -> bytes:
    """A torch tensor's elements in order, as bytes."""
    flat = value.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


def assert_same(torch: ModuleType, stored: dict[str, StoredTensor], truth: dict[str, Any]) -> None:
    assert list(stored) == list(truth)
    for name, expected in truth.items():
        found = stored[name]
        assert found.name == name
        assert found.dtype == str(expected.dtype).removeprefix("torch.")
        assert found.shape == tuple(expected.shape)
        assert found.read().shape == found.shape
        assert found.read().tobytes() == bits(torch, expected), name
        numbers = expected.float() if expected.dtype is torch.bfloat16 else expected
        assert found.numbers().tobytes() == bits(torch, numbers), name
        assert found.numbers().dtype.itemsize == numbers.element_size()
        if expected.dtype.is_floating_point and expected.element_size() > 1:
            assert bits(torch, torch.from_numpy(found.float32())) == bits(torch, expected.float())
            assert bits(torch, torch.from_numpy(found.float64())) == bits(torch, expected.double())


def test_every_dtype_arrives_bit_by_bit(torch: ModuleType, save: Save, container: str) -> None:
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 300
    dtypes = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 "
        "float8_e4m3fn float8_e5m2"
    )
    if container == "torch legacy":
        # torch itself cannot load these from its older container
        dtypes = " ".join(
            name for name in dtypes.split() if not name.startswith(("uint", "float8"))
        )
    truth = {name: real.abs().to(getattr(torch, name)) for name in dtypes.split()}
    truth["bool"] = real > 0
    truth["complex64"] = torch.complex(real.float(), -real.float())
    truth["complex128"] = torch.complex(real, -real)
    path = save(truth)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == container
        assert checkpoint.files == (path,)
        assert_same(torch, checkpoint.tensors, torch.load(path))


def test_special_numbers_survive_widening(torch: ModuleType, save: Save) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    truth = {
        "half": patterns.clone().view(torch.float16),
        "brain": patterns.clone().view(torch.bfloat16),
    }
    with open_checkpoint(save(truth)) as checkpoint:
        for name, expected in truth.items():
            np.testing.assert_array_equal(
                checkpoint.tensors[name].float32(), expected.float().numpy()
            )


def test_views_offsets_and_shared_storages_are_respected(torch: ModuleType, save: Save) -> None:
    base = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(2)).half()
    truth = {
        "whole": base,
        "transposed": base.transpose(0, 2),
        "rows": base[2:4],
        "every other": base[:, ::2, 1:],
        "one": base[5, 7, 3],
        "column": base[:, 3, :].t(),
        "diagonal": base[0, :4].diagonal(),
    }
    path = save(truth)
    with open_checkpoint(path) as checkpoint:
        assert_same(torch, checkpoint.tensors, torch.load(path))
        storages = {id(tensor.storage) for tensor in checkpoint.tensors.values()}
        assert len(storages) == 1
    assert path.stat().st_size < 2 * base.numel() + 4000


def test_empty_and_scalar_tensors_are_read(torch: ModuleType, save: Save) -> None:
    truth = {
        "none": torch.zeros(0),
        "no rows": torch.zeros(0, 7, dtype=torch.float16),
        "between": torch.ones(3, 0, 2, dtype=torch.int64),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "single": torch.tensor([7]),
    }
    with open_checkpoint(save(truth)) as checkpoint:
        assert_same(torch, checkpoint.tensors, truth)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_that_torch_can_load_is_read(
    torch: ModuleType, save: Save, protocol: int
) -> None:
    truth = OrderedDict(weight=torch.arange(6.0).reshape(2, 3), bias=torch.ones(3).bfloat16())
    path = save({"model": truth, "epoch": 3, "name": "näme", "set": {1}}, pickle_protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        assert_same(torch, checkpoint.tensors, truth)
        assert checkpoint.extra == {"epoch": 3, "name": "näme", "set": {1}}


def test_parameters_and_tensors_with_attributes_are_tensors(torch: ModuleType, save: Save) -> None:
    plain = torch.nn.Parameter(torch.arange(4.0))
    marked = torch.nn.Parameter(torch.arange(5.0))
    marked.partition = 3
    path = save({"plain": plain, "marked": marked})
    with open_checkpoint(path) as checkpoint:
        assert_same(torch, checkpoint.tensors, {"plain": plain, "marked": marked})


def test_a_real_state_dict_keeps_its_order_and_loses_its_metadata(
    torch: ModuleType, save: Save
) -> None:
    module = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 6, 3), dim=2)
    truth = module.state_dict()
    with open_checkpoint(save(truth)) as checkpoint:
        assert_same(torch, checkpoint.tensors, truth)
        assert checkpoint.extra == {}


@pytest.mark.parametrize(
    "path",
    [
        (), ("model",), ("state_dict",), ("model", "state_dict"),
        ("model", "state_dict", "model_state_dict", "weight"),
    ],
)  # fmt: skip
def test_the_state_dict_is_found_where_it_is_kept(
    torch: ModuleType, save: Save, path: tuple[str, ...]
) -> None:
    value: dict[str, Any] = {"a.weight": torch.ones(2)}
    for key in reversed(path):
        value = {"epoch": 1, key: value}
    with open_checkpoint(save(value)) as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]
        assert checkpoint.extra.get("epoch") == (1 if path else None)
        assert checkpoint.config is None


def test_what_stands_on_the_way_to_the_state_dict_is_kept(torch: ModuleType, save: Save) -> None:
    inner = {"state_dict": {"w": torch.ones(2)}}
    with open_checkpoint(save({"epoch": 1, "model": inner})) as checkpoint:
        assert checkpoint.extra == {"epoch": 1}
    with open_checkpoint(save({"epoch": 1, "model": {"step": 7, **inner}})) as checkpoint:
        assert checkpoint.extra == {"epoch": 1, "model": {"step": 7}}


class Shade(enum.Enum):
    DARK = "dark"


def test_what_stands_beside_the_tensors_becomes_plain_values_and_records(
    torch: ModuleType, save: Save
) -> None:
    extra = {
        "numbers": [1, -5, 2**40, 1.5, True, None],
        "shape": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "bytes": b"\x00\xff",
        "by default": defaultdict(list, a=[1]),
        "enum": Shade.DARK,
        "scalar": np.float64(1.25),
        "vector": np.arange(3),
        "frozen": frozenset({"x"}),
        "complex": 1 + 2j,
        "path": Path("a/b"),
        "nested": {"tensor": torch.arange(3)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
    }
    with open_checkpoint(save({"model": {"w": torch.zeros(1)}, **extra})) as checkpoint:
        found = checkpoint.extra
        for key in ("numbers", "bytes", "by default", "frozen", "complex"):
            assert found[key] == extra[key], key
        assert found["shape"] == (2, 3)
        for key, name in (
            ("device", "torch.device"), ("dtype", "torch.float16"), ("scalar", ".scalar"),
            ("vector", "._reconstruct"), ("path", "Path"),
        ):  # fmt: skip
            assert isinstance(found[key], InertRecord), key
            assert f"{found[key].module}.{found[key].name}".endswith(name)
        assert found["device"].args == ("cpu",)
        assert "dark" in str(found["enum"].args).lower()
        assert found["nested"]["tensor"].name == "nested.tensor"
        assert found["nested"]["tensor"].read().tolist() == [0, 1, 2]
        moment = found["optimizer"]["state"][0]["exp_avg"]
        assert moment.float32().tolist() == [1, 1]


#: instructions as other and older pickles have them -> the value they stand for
PLAIN: dict[str, tuple[bytes, object]] = {
    "integers": (b"(I7\nI-1\nL12345678901234567890L\nL5\nJ\xfe\xff\xff\xffM\x01\x02t",
                 (7, -1, 12345678901234567890, 5, -2, 513)),
    "long integers": (b"(\x8a\0\x8a\2\0\1\x8b\1\0\0\0\x80t", (0, 256, -128)),
    "truth": (b"(I00\nI01\n\x88\x89Nt", (False, True, True, False, None)),
    "numbers": (b"(F1.5\nF-inf\nG\x40\x09\x21\xfb\x54\x44\x2d\x18t", (1.5, -np.inf, np.pi)),
    "text": (b"(Vn\\u00e4me\n\x8c\1x\x8d\1\0\0\0\0\0\0\0yt", ("n\u00e4me", "x", "y")),
    "no text": (b"(T\0\0\0\0U\0V\n\x8c\0C\0t", ("", "", "", "", b"")),
    "bytes": (b"(C\1aB\1\0\0\0b\x8e\1\0\0\0\0\0\0\0c\x96\1\0\0\0\0\0\0\0dt",
              (b"a", b"b", b"c", bytearray(b"d"))),
    "lists": (b"(](K\1K\2e(K\3l]K\4at", ([1, 2], [3], [4])),
    "dicts": (b"(}(K\1K\2u(K\3K\4d}K\5K\6st", ({1: 2}, {3: 4}, {5: 6})),
    "sets": (b"(\x8f(K\1K\1K\2\x90(K\3\x91t", ({1, 2}, frozenset({3}))),
    "tuples": (b"()K\1\x85K\1K\2\x86K\1K\2K\3\x87t", ((), (1,), (1, 2), (1, 2, 3))),
    "memory": (b"(K\7q\5K\x08r\x06\0\0\0K\x09p7\nh\5j\6\0\0\0g7\nt", (7, 8, 9, 7, 8, 9)),
    "memory in order": (b"(\x8c\1a\x94\x8c\1b\x94h\x00h\x01t", ("a", "b", "a", "b")),
    "frames": (b"\x95\2\0\0\0\0\0\0\0K\1", 1),
    "what is dropped": (b"(K\1K\x020(K\3K\x041K\x052t", (1, 5, 5)),
    "keys that are tuples": (b"}(K\1(K\2t\x86NK\1Nu", {(1, (2,)): None, 1: None}),
}  # fmt: skip

#: the same where Python gives something else: text of Python 2, and what was no text
UNLIKE_PYTHON: dict[str, tuple[bytes, object]] = {
    "text of Python 2": (b"(U\3n\xc3\xa4T\2\0\0\0\xff\xfet", ("n\u00e4", b"\xff\xfe")),
    "text that was none": (b"X\3\0\0\0\xed\xa0\x80", "\ufffd" * 3),
    "escaped text that was none": (b"V\\ud800\n", "\ufffd"),
}


@pytest.mark.parametrize("name", [*PLAIN, *UNLIKE_PYTHON])
def test_plain_values_of_every_protocol_are_read(name: str, tmp_path: Path) -> None:
    code, expected = {**PLAIN, **UNLIKE_PYTHON}[name]
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": Raw(code)})))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.extra["x"] == expected
        assert repr(checkpoint.extra["x"]) == repr(expected)
    if name in PLAIN:
        assert pickle.loads(b"\x80\x04" + code + b".") == expected


#: calls that mean a plain value -> the value
CALLS: dict[str, tuple[Call, object]] = {
    "an ordered dict": (Call("collections", "OrderedDict", ([("a", 1), ["b", 2]],)),
                        {"a": 1, "b": 2}),
    "a copied dict": (Call("builtins", "dict", ({"a": 1},)), {"a": 1}),
    "a counter": (Call("collections", "Counter", ({"a": 3},)), {"a": 3}),
    "a dict with defaults": (
        Call("collections", "defaultdict", (Name("builtins", "list"),)),
        {},
    ),
    "a set of Python 2": (Call("__builtin__", "set", ([1, 2, 2],)), {1, 2}),
    "a frozen set": (Call("builtins", "frozenset", ((1,),)), frozenset({1})),
    "an empty set": (Call("builtins", "set"), set()),
    "a list": (Call("builtins", "list", ((1, 2),)), [1, 2]),
    "a size": (Call("torch", "Size", ([2, 3],)), (2, 3)),
    "a complex number": (Call("builtins", "complex", (1.0, -2.0)), 1 - 2j),
    "bytes": (Call("_codecs", "encode", ("\xff\x00", "latin1")), b"\xff\x00"),
    "no bytes": (Call("builtins", "bytes"), b""),
    "bytes that change": (Call("builtins", "bytearray", (b"ab",)), bytearray(b"ab")),
    "no bytes that change": (Call("builtins", "bytearray"), bytearray()),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_mean_plain_values_give_them(name: str, tmp_path: Path) -> None:
    call, expected = CALLS[name]
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": call})))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.extra["x"] == expected
        assert type(checkpoint.extra["x"]) is type(expected)


@pytest.mark.parametrize("opcode", [b"R", b"\x81"])
def test_a_foreign_object_is_what_the_pickle_says_of_it(tmp_path: Path, opcode: bytes) -> None:
    path = tmp_path / "model.pt"
    made = instructions(Call("a.b", "C.D", (1, "x"), {"deep": [2]}, opcode))
    code = made + b"(K\5K\6e" + b"K\7K\x08s" + b"K\x09a"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": Raw(code)})))
    with open_checkpoint(path) as checkpoint:
        record = checkpoint.extra["x"]
    assert isinstance(record, InertRecord)
    assert (record.module, record.name, record.args) == ("a.b", "C.D", (1, "x"))
    assert (record.state, record.items, record.entries) == ({"deep": [2]}, [5, 6, 9], [(7, 8)])
    assert repr(record) == "InertRecord(a.b.C.D)"


def test_objects_of_old_protocols_are_records(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    namespace = Name("argparse", "Namespace")
    rebuilt = Call(
        "copy_reg", "_reconstructor", (namespace, Name("__builtin__", "object"), None), {"x": 1}
    )
    code = b"(" + instructions(rebuilt) + b"(K\1ia\nB\n(" + instructions(namespace) + b"K\2ot"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": Raw(code)})))
    with open_checkpoint(path) as checkpoint:
        first, second, third = checkpoint.extra["x"]
    assert (first.module, first.name, first.state) == ("argparse", "Namespace", {"x": 1})
    assert (second.name, second.args) == ("B", (1,))
    assert (third.name, third.args) == ("Namespace", (2,))


def test_a_class_that_is_only_named_and_keywords_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with_keywords = instructions(Name("a", "B")) + b")" + instructions({"k": 1}) + b"\x92"
    value = {"w": tensor(), "x": Name("torch", "float16"), "y": Raw(with_keywords)}
    path.write_bytes(torch_zip(assemble(value)))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.extra["x"].args is None
        assert checkpoint.extra["y"].keywords == {"k": 1}


@pytest.mark.parametrize(
    "call",
    [Call("builtins", "range", (3,)), Call("a", "getattr", (1, 2, 3)), Call("builtins", "int")],
)
def test_a_harmless_call_without_a_meaning_here_is_a_record(tmp_path: Path, call: Call) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": call})))
    with open_checkpoint(path) as checkpoint:
        record = checkpoint.extra["x"]
    assert (record.module, record.name, record.args) == (call.module, call.name, call.args)


def test_what_stands_among_the_tensors_of_a_bare_state_dict_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "version": 2, "storage": storage()})))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.extra["version"] == 2
        assert repr(checkpoint.extra["storage"]) == "InertRecord(torch.storage.TypedStorage)"
    path.write_bytes(torch_zip(assemble({"model": {"w": tensor(), "extra": None}})))
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    path.write_bytes(torch_zip(assemble({"model": {"w": tensor(), "odd": "text"}})))
    with pytest.raises(UnsupportedCheckpoint, match="odd stands among the tensors and is none"):
        open_checkpoint(path)


def test_an_enum_in_an_omegaconf_configuration_is_its_value(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    mode = Call("fairseq.dataclass.constants", "Mode", ("layer_norm",))
    node = Call("omegaconf.nodes", "EnumNode", (), {"_val": mode, "_parent": None})
    other = Call("omegaconf.base", "Metadata", (), {"ref_type": None})
    nodes = {"mode": node, "other": other}
    config = Call("omegaconf.dictconfig", "DictConfig", (), {"_content": {"model": nodes}})
    path.write_bytes(torch_zip(assemble({"model": {"w": tensor()}, "cfg": config})))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config is not None
        assert checkpoint.config["model"]["mode"] == "layer_norm"
        assert checkpoint.config["model"]["other"].name == "Metadata"


@pytest.mark.parametrize(
    "node",
    [
        Call("omegaconf.nodes", "AnyNode"),
        Call("omegaconf.nodes", "AnyNode", (), ["_val"]),
        Call("omegaconf.nodes", "AnyNode", (), {"_content": {"a": 1}}),
        Call("omegaconf.dictconfig", "DictConfig", (), {"_metadata": 1}),
        Call("another.nodes", "AnyNode", (), {"_val": 1}),
        Call("another.dictconfig", "DictConfig", (), {"_content": {"a": 1}}),
    ],
)
def test_what_is_no_omegaconf_node_of_a_known_form_stays_a_record(
    tmp_path: Path, node: Call
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": node})))
    with open_checkpoint(path) as checkpoint:
        record = checkpoint.extra["x"]
    assert isinstance(record, InertRecord)
    assert (record.module, record.name, record.state) == (node.module, node.name, node.state)


def test_only_the_value_of_an_enum_is_taken_out_of_its_object(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    place = Call("pathlib", "PosixPath", ("a", "b"))
    nodes = [
        Call("omegaconf.nodes", "AnyNode", (), {"_val": place}),
        Call("omegaconf.nodes", "EnumNode", (), {"_val": "plain"}),
        Call("omegaconf.nodes", "EnumNode", (), {"_val": Call("a", "Mode")}),
    ]
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": nodes})))
    with open_checkpoint(path) as checkpoint:
        first, second, third = checkpoint.extra["x"]
    assert (first.name, first.args) == ("PosixPath", ("a", "b"))
    assert second == "plain"
    assert third.name == "Mode"


def test_an_object_as_a_key_stays_a_key(tmp_path: Path) -> None:
    """An omegaconf node is unwrapped as a value; a key that became a list would be no key."""
    path = tmp_path / "model.pt"
    node = instructions(Call("omegaconf.nodes", "AnyNode", (), {"_val": [1]}))
    code = b"}(" + node + b"K\1" + node + b"\x85K\2ca\nB\nK\3ca\nC\n\x85K\4u"
    code = b"(" + code + b"\x8f(" + node + b"ca\nB\n\x90t"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": Raw(code)})))
    with open_checkpoint(path) as checkpoint:
        pairs, members = checkpoint.extra["x"]
    assert {repr(key): value for key, value in pairs.items()} == {
        "InertRecord(omegaconf.nodes.AnyNode)": 1,
        "(InertRecord(omegaconf.nodes.AnyNode),)": 2,
        "InertRecord(a.B)": 3,
        "(InertRecord(a.C),)": 4,
    }
    assert len(members) == 2


def test_a_tensor_beside_the_model_does_not_hide_it(torch: ModuleType, save: Save) -> None:
    value = {"step": torch.tensor(5), "model": {"w": torch.ones(2)}}
    with open_checkpoint(save(value)) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
        assert checkpoint.extra["step"].float32() == 5


def test_a_device_beside_bare_tensors_is_kept(torch: ModuleType, save: Save) -> None:
    with open_checkpoint(save({"w": torch.ones(2), "on": torch.device("cpu")})) as checkpoint:
        assert repr(checkpoint.extra["on"]) == "InertRecord(torch.device)"


def test_an_entry_past_four_gigabytes_has_its_numbers_in_the_zip64_field(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    wide = {"length": 0xFFFFFFFF, "packed": 0xFFFFFFFF}
    others = struct.pack("<2HI", 0x5455, 4, 0) + struct.pack("<2H2Q", 0x7875, 16, 7, 7)
    field = others + struct.pack("<2H2Q", 1, 16, 24, 24)
    entries = [
        Entry("archive/data.pkl", assemble({"w": tensor()})),
        Entry("archive/data/0", SIX_FLOATS, wide, {**wide, "extra": field}),
    ]
    path.write_bytes(zip_archive(entries))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify()
        assert checkpoint.tensors["w"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_entries_may_be_listed_in_another_order_than_they_follow(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", assemble({"w": tensor()}))
        archive.writestr("archive/data/0", SIX_FLOATS)
        archive.filelist.reverse()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify()
        assert checkpoint.tensors["w"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("flags", [0x2, 0x4, 0x8, 0x800])
def test_flags_that_change_nothing_of_a_stored_entry_are_passed_over(
    tmp_path: Path, flags: int
) -> None:
    path = tmp_path / "model.pt"
    content = assemble({"w": tensor()})
    local = {"flags": flags, **({"crc": 0, "packed": 0, "length": 0} if flags == 0x8 else {})}
    entries = [
        Entry("archive/data.pkl", content),
        Entry("archive/data/0", SIX_FLOATS, local, {"flags": flags}),
    ]
    path.write_bytes(zip_archive(entries))
    with zipfile.ZipFile(path) as archive:
        assert archive.read("archive/data/0") == SIX_FLOATS
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify()
        assert checkpoint.tensors["w"].read().tobytes() == SIX_FLOATS


def test_an_archive_may_end_with_the_longest_comment(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    longest = b"#" * 0xFFFF
    path.write_bytes(torch_zip(assemble({"w": tensor()}), comment=longest))
    assert not is_cut_short(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify()
    path.write_bytes(path.read_bytes() + b"#")
    assert is_cut_short(path)
    with pytest.raises(CorruptCheckpoint, match="does not end as one"):
        open_checkpoint(path)


def test_a_namespace_of_old_fairseq_is_the_configuration(torch: ModuleType, save: Save) -> None:
    args = argparse.Namespace(arch="hubert", encoder_layers=12, normalize=False)
    with open_checkpoint(save({"args": args, "model": {"w": torch.zeros(1)}})) as checkpoint:
        assert checkpoint.config == {
            "model": {"arch": "hubert", "encoder_layers": 12, "normalize": False}
        }
        assert checkpoint.extra["args"].name == "Namespace"


def test_a_dict_of_newer_fairseq_is_the_configuration(torch: ModuleType, save: Save) -> None:
    cfg = {"model": {"encoder_layers": 12}, "task": {"normalize": False}}
    value = {"args": None, "cfg": cfg, "model": {"w": torch.zeros(1)}}
    with open_checkpoint(save(value)) as checkpoint:
        assert checkpoint.config == cfg


def test_an_omegaconf_configuration_is_unwrapped(
    torch: ModuleType, save: Save, need: Callable[[str, str], ModuleType]
) -> None:
    omegaconf = need("omegaconf", "scripts/test installs it with fairseq")
    cfg = {"model": {"layers": 12, "none": None, "list": [1, "x", {"y": 0.5}]}, "task": {"n": True}}
    value = {"cfg": omegaconf.OmegaConf.create(cfg), "model": {"w": torch.zeros(1)}}
    with open_checkpoint(save(value)) as checkpoint:
        assert checkpoint.config == cfg


def test_a_value_that_contains_itself_is_cut_where_it_does(torch: ModuleType, save: Save) -> None:
    loop: dict[str, Any] = {"depth": 1}
    loop["again"] = [loop]
    with open_checkpoint(save({"model": {"w": torch.zeros(1)}, "loop": loop})) as checkpoint:
        (inner,) = checkpoint.extra["loop"]["again"]
        assert checkpoint.extra["loop"]["depth"] == 1
        assert repr(inner) == "InertRecord(.enclosing value)"


def test_a_value_that_is_referred_to_twice_is_copied_once(torch: ModuleType, save: Save) -> None:
    row = [1, 2]
    value = {"model": {"w": torch.zeros(1)}, "rows": [row, row], "again": row}
    with open_checkpoint(save(value)) as checkpoint:
        first, second = checkpoint.extra["rows"]
        assert first == [1, 2]
        assert first is second


def test_a_file_that_is_refused_is_closed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def recorded(path: Path) -> int:
        opened.append(open_regular(path))
        return opened[-1]

    monkeypatch.setattr(source_file, "open_regular", recorded)
    (folder / "two.safetensors").write_bytes(b"\xff")
    with pytest.raises(UnsupportedCheckpoint, match="no kind of checkpoint"):
        open_checkpoint(folder)
    assert foreign_file(folder / "two.safetensors") is None
    assert not is_cut_short(folder / "two.safetensors")
    assert len(opened) >= 4
    for descriptor in opened:
        with pytest.raises(OSError, match=r"[Bb]ad file descriptor"):
            os.fstat(descriptor)


def test_opening_a_zip_reads_nothing_of_the_tensors(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    moments = {"state": {0: {"exp_avg": torch.ones(50_000)}}}
    torch.save({"model": {"w": torch.ones(50_000)}, "last_optimizer_state": moments}, path)
    spans: list[tuple[int, int]] = []
    read_into = SourceFile.read_into

    def recorded(file: SourceFile, offset: int, target: memoryview) -> None:
        spans.append((offset, offset + len(target)))
        read_into(file, offset, target)

    monkeypatch.setattr(SourceFile, "read_into", recorded)
    with open_checkpoint(path) as checkpoint:
        moment = checkpoint.extra["last_optimizer_state"]["state"][0]["exp_avg"]
        for tensor in (checkpoint.tensors["w"], moment):
            start, end = tensor.storage.start, tensor.storage.start + tensor.storage.length
            # the last bytes of the file, where its table of contents is sought, may overlap
            touched = [span for span in spans if span[0] < end and start < span[1]]
            assert all(length - offset <= 22 + 65535 for offset, length in touched)
            assert len(touched) <= 1
        assert spans
        assert checkpoint._sources[0]._map is None


def test_opening_the_older_container_skips_gigabytes_of_optimizer_state(tmp_path: Path) -> None:
    count = 2**33
    state = tensor((count,), (1,), of=storage(key="1", count=count))
    value = {"model": {"w": tensor()}, "last_optimizer_state": {"exp_avg": state}}
    path = tmp_path / "model.pt"
    content = torch_legacy(assemble(value), {"0": (6, SIX_FLOATS), "1": (count, b"")})
    path.write_bytes(content)
    os.truncate(path, len(content) + 4 * count)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert checkpoint.extra["last_optimizer_state"]["exp_avg"].nbytes == 2**35
    assert path.stat().st_blocks * 512 < 2**20


def test_nothing_is_read_of_a_checkpoint_that_was_closed(torch: ModuleType, save: Save) -> None:
    with open_checkpoint(save({"w": torch.arange(4.0)})) as checkpoint:
        before = checkpoint.tensors["w"].read()
    assert before.tolist() == [0, 1, 2, 3]
    checkpoint.close()
    with pytest.raises(CheckpointError, match="has been closed"):
        checkpoint.tensors["w"].read()


def test_a_file_is_mapped_once(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"content")
    file = SourceFile(path)
    assert file.mapped() is file.mapped()
    file.close()


def test_what_lies_beyond_all_files_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"content")
    file = SourceFile(path)
    assert file.read(4, 3) == b"ent"
    for place, length in ((5, 3), (2**64, 1), (0, 2**64)):
        with pytest.raises(CorruptCheckpoint, match="ends in the middle"):
            file.read(place, length)
    file.close()


def test_a_file_cut_short_after_opening_is_an_error_and_not_a_crash(
    torch: ModuleType, save: Save
) -> None:
    path = save({"w": torch.zeros(10_000)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 2000)
        with pytest.raises(CorruptCheckpoint, match="ends in the middle"):
            checkpoint.tensors["w"].float32()


def test_a_disk_that_fails_is_an_error_that_says_so(
    torch: ModuleType, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with open_checkpoint(save({"w": torch.zeros(3)})) as checkpoint:
        monkeypatch.setattr(source_file, "read_at", failing)
        with pytest.raises(CheckpointError, match=r"cannot read .*model\.pt: Input/output error"):
            checkpoint.tensors["w"].read()


def test_a_file_emptied_before_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(bytes(100))
    file = SourceFile(path)
    os.truncate(path, 0)
    with pytest.raises(CheckpointError, match="cannot map"):
        file.mapped()
    file.close()


def test_a_file_cut_short_before_it_is_mapped_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(bytes(10_000))
    file = SourceFile(path)
    os.truncate(path, 2000)
    for _ in range(2):
        with pytest.raises(CorruptCheckpoint, match="ends in the middle"):
            file.mapped()
    file.close()


def test_a_wrong_byte_in_a_tensor_is_found_by_its_checksum(
    torch: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"good": torch.zeros(100), "bad": torch.full((100,), 7.0)}, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify()
        place = checkpoint.tensors["bad"].storage.start + 5
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["good"].verify()
        with pytest.raises(CorruptCheckpoint, match="the bytes of bad do not have the checksum"):
            checkpoint.verify()


def test_a_storage_is_read_once_to_compare_its_checksum(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    base = torch.zeros(100)
    torch.save({"whole": base, "half": base[:50]}, path)
    read_into = SourceFile.read_into
    read = 0

    def counted(file: SourceFile, offset: int, target: memoryview) -> None:
        nonlocal read
        read += len(target)
        read_into(file, offset, target)

    with open_checkpoint(path) as checkpoint:
        monkeypatch.setattr(SourceFile, "read_into", counted)
        assert checkpoint.verify()
        assert checkpoint.verify()
    assert read == 400


def test_a_file_saved_without_checksums_says_so(torch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.verify()
        assert checkpoint.tensors["w"].float32().tolist() == [1, 1, 1]


def test_wide_floats_are_rounded_and_what_is_no_real_number_is_refused(
    torch: ModuleType, save: Save
) -> None:
    third = torch.tensor([1 / 3, 1e300], dtype=torch.float64)
    value = {"third": third, "complex": torch.complex(third, third)}
    with open_checkpoint(save(value)) as checkpoint:
        assert checkpoint.tensors["third"].float32().tolist() == third.float().tolist()
        with pytest.raises(UnsupportedCheckpoint, match="tensor complex is of dtype complex128"):
            checkpoint.tensors["complex"].float32()


@pytest.mark.parametrize("root", ["archive", "model", "hübert 500", "モデル"])
def test_the_archive_may_be_called_anything(torch: ModuleType, tmp_path: Path, root: str) -> None:
    path = tmp_path / f"{root}.pt"
    torch.save({"w": torch.ones(3)}, path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].shape == (3,)


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
@pytest.mark.parametrize(
    "value",
    [
        pytest.param(tensor(function="_rebuild_tensor"), id="torch 0.1"),
        pytest.param(
            Call("torch._utils", "_rebuild_parameter", (tensor(), True, Call("a", "b"))),
            id="parameter",
        ),
        pytest.param(
            Call(
                "torch._utils",
                "_rebuild_tensor_v3",
                (
                    storage("UntypedStorage", count=24), 0, (2, 3), (3, 1), False, None,
                    Name("torch", "float32"),
                ),
            ),
            id="untyped",
        ),
    ],
)  # fmt: skip
def test_every_way_of_writing_a_tensor_is_read(
    tmp_path: Path, write: Callable[..., bytes], value: Call
) -> None:
    path = tmp_path / "model.pt"
    if "UntypedStorage" in repr(value) and write is torch_legacy:
        content = torch_legacy(assemble({"w": value}), {"0": (24, SIX_FLOATS)})
    else:
        content = write(assemble({"w": value}))
    path.write_bytes(content)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["w"].float32().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_storages_of_a_gpu_are_read_like_any(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for module in ("torch", "torch.cuda"):
        identity = ("storage", Name(module, "FloatStorage"), "0", "cuda:3", 6)
        of = storage()
        of = type(of)(identity)
        path.write_bytes(torch_zip(assemble({"w": tensor(of=of)})))
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.tensors["w"].size == 6


# ---- safetensors


@pytest.fixture
def safetensors(need: Callable[[str, str], ModuleType]) -> ModuleType:
    return need("safetensors.torch", "pip install safetensors")


def test_safetensors_are_read_bit_by_bit(
    torch: ModuleType, safetensors: ModuleType, tmp_path: Path
) -> None:
    real = torch.randn(3, 5, generator=torch.Generator().manual_seed(3)) * 50
    dtypes = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool "
        "float8_e4m3fn float8_e5m2"
    )
    truth = {name: real.abs().to(getattr(torch, name)) for name in dtypes.split()}
    truth["empty"] = torch.zeros(0, 4)
    truth["scalar"] = torch.tensor(3.5)
    path = tmp_path / "model.safetensors"
    safetensors.save_file(truth, path, {"format": "pt", "note": "näme"})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == "safetensors"
        assert checkpoint.metadata == {"format": "pt", "note": "näme"}
        assert (checkpoint.extra, checkpoint.config) == ({}, None)
        starts = [tensor.storage.start for tensor in checkpoint.tensors.values()]
        assert starts == sorted(starts)
        assert_same(
            torch,
            dict(sorted(checkpoint.tensors.items())),
            dict(sorted(safetensors.load_file(path).items())),
        )
        assert not checkpoint.verify()


# ---- Hugging Face folders


@pytest.fixture
def folder(torch: ModuleType, safetensors: ModuleType, tmp_path: Path) -> Path:
    """Two shards of safetensors, their index, and a config.json."""
    path = tmp_path / "hubert"
    path.mkdir()
    safetensors.save_file({"a": torch.zeros(2), "b": torch.ones(3)}, path / "one.safetensors")
    safetensors.save_file({"c": torch.full((4,), 2.0)}, path / "two.safetensors")
    places = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 36}, "weight_map": places})
    )
    (path / "config.json").write_text('{"model_type": "hubert", "hidden_size": 96}')
    return path


def edit_index(folder: Path, **places: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, shard in places.items():
        if shard is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def test_a_folder_of_shards_is_one_checkpoint(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.files == (folder / "one.safetensors", folder / "two.safetensors")
        assert checkpoint.config == {"model_type": "hubert", "hidden_size": 96}
        assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == {
            "a": (2,), "b": (3,), "c": (4,)
        }  # fmt: skip
        assert checkpoint.tensors["c"].float32().tolist() == [2, 2, 2, 2]


def test_a_folder_of_links_is_read_as_the_hub_cache_keeps_it(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_folder_of_one_file_is_read_by_folder_and_by_file(
    torch: ModuleType, safetensors: ModuleType, tmp_path: Path, name: str
) -> None:
    write = torch.save if name.endswith(".bin") else safetensors.save_file
    write({"w": torch.ones(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    for path in (tmp_path, tmp_path / name):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.path == path
            assert checkpoint.files == (tmp_path / name,)
            assert list(checkpoint.tensors) == ["w"]
            assert checkpoint.config == {"model_type": "hubert"}


def test_a_folder_that_holds_both_forms_gives_the_safetensors(
    torch: ModuleType, safetensors: ModuleType, tmp_path: Path
) -> None:
    torch.save({"from bin": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    safetensors.save_file({"from safetensors": torch.ones(2)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["from safetensors"]
        assert checkpoint.config is None


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "",
        "..\\one.safetensors", "one.safetensors\n", "C:\\one.safetensors",
    ],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_folder(folder: Path, shard: str) -> None:
    (folder.parent / "one.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    edit_index(folder, c=shard)
    with pytest.raises(CorruptCheckpoint, match="names a file outside its folder"):
        open_checkpoint(folder)


def test_an_index_that_does_not_fit_its_files_is_refused(folder: Path) -> None:
    edit_index(folder, c="one.safetensors")
    with pytest.raises(CorruptCheckpoint, match="not in the files that the index gives") as refused:
        open_checkpoint(folder)
    assert refused.value.expected == "c"
    edit_index(folder, c="two.safetensors", b="two.safetensors")
    with pytest.raises(CorruptCheckpoint, match="does not say that b is in one"):
        open_checkpoint(folder)
    edit_index(folder, b="one.safetensors", a=None)
    with pytest.raises(CorruptCheckpoint, match="does not say that a is in one"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_map_is_refused(folder: Path, index: dict[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match="no weight_map"):
        open_checkpoint(folder)


def test_an_index_of_too_many_files_is_refused(folder: Path) -> None:
    edit_index(folder, **{f"t{i}": f"{i}.safetensors" for i in range(1001)})
    with pytest.raises(CorruptCheckpoint, match="names too many files"):
        open_checkpoint(folder)


def test_shards_of_too_many_tensors_in_all_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TENSORS", 3)
    open_checkpoint(folder).close()
    monkeypatch.setattr(limits, "TENSORS", 2)
    with pytest.raises(CorruptCheckpoint, match="its files have too many tensors"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(UnsupportedCheckpoint, match="lacks weight files") as refused:
        open_checkpoint(folder)
    assert refused.value.expected == "two.safetensors"


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "hubert_base.pt").write_bytes(b"")
    with pytest.raises(UnsupportedCheckpoint, match="no weights that can be read") as refused:
        open_checkpoint(tmp_path)
    assert refused.value.found == "hubert_base.pt"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "not JSON"),
        ("[1]", "not an object"),
        ('{"a": 1, "a": 2}', "the name a occurs twice"),
        ('{"a": ' * 2000 + "1" + "}" * 2000, "nests too deeply"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nests too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "integer that is too long"),
        ('{"a": NaN}', "it has a NaN"),
        ('{"a": "\udcff"}', "not UTF-8"),
    ],
)
def test_a_config_that_is_no_honest_json_is_refused(
    folder: Path, content: str, fragment: str
) -> None:
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CorruptCheckpoint, match=fragment):
        open_checkpoint(folder)


# ---- what cannot be opened at all


def test_what_is_not_there_or_not_a_file_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing.pt", tmp_path / "pipe", Path("a\0b"), Path("n" * 5000)):
        with pytest.raises(CheckpointError, match=r"cannot open|not a file"):
            open_checkpoint(path)


def test_a_whole_pickled_model_is_named_and_refused(torch: ModuleType, save: Save) -> None:
    module = torch.nn.Linear(2, 3)
    for value in (module, {"model": module, "epoch": 1}):
        with pytest.raises(UnsupportedCheckpoint, match="a whole pickled model") as refused:
            open_checkpoint(save(value))
        assert "torch.nn.modules.linear.Linear" in str(refused.value)


def test_a_checkpoint_without_a_state_dict_says_what_it_holds(
    torch: ModuleType, save: Save
) -> None:
    for value, found in (
        ({"epoch": 1, "lr": 0.5}, "a dict of epoch, lr"),
        ([torch.ones(1)], "(TensorView)"),
        (torch.ones(1), "TensorView"),
        ({}, "a dict of nothing"),
        (None, "None"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match="holds no state dict") as refused:
            open_checkpoint(save(value))
        assert refused.value.found == found


@pytest.mark.filterwarnings("ignore:.*[Qq]uantize:")
def test_a_tensor_of_another_kind_is_named(torch: ModuleType, save: Save) -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(UnsupportedCheckpoint, match="the tensor odd is of a kind"):
        open_checkpoint(save({"w": torch.ones(1), "odd": sparse}))
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedCheckpoint, match="QInt8Storage"):
        open_checkpoint(save({"w": torch.ones(1), "odd": quantized}))


def test_a_stand_in_is_read_as_torch_reads_it(torch: ModuleType, tiny_checkpoint: Path) -> None:
    dictionary = type("Dictionary", (), {})
    with torch.serialization.safe_globals([(dictionary, "fairseq.data.dictionary.Dictionary")]):
        truth = torch.load(tiny_checkpoint)
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        assert_same(torch, checkpoint.tensors, truth["model"])
        assert checkpoint.config == truth["cfg"]
        assert checkpoint.verify()
        assert set(checkpoint.extra) == set(truth) - {"model"}
        (labels,) = checkpoint.extra["task_state"]["dictionaries"]
        assert labels.state == vars(truth["task_state"]["dictionaries"][0])


@pytest.mark.fullsize
def test_the_full_size_stand_in_is_read_as_torch_reads_it(torch: ModuleType, standin: Path) -> None:
    dictionary = type("Dictionary", (), {})
    with torch.serialization.safe_globals([(dictionary, "fairseq.data.dictionary.Dictionary")]):
        truth = torch.load(standin, mmap=True)
    with open_checkpoint(standin) as checkpoint:
        assert list(checkpoint.tensors) == list(truth["model"])
        assert len(checkpoint.tensors) == 214
        for name, expected in truth["model"].items():
            assert checkpoint.tensors[name].read().tobytes() == bits(torch, expected), name
        assert checkpoint.config == truth["cfg"]
        assert checkpoint.verify()


def test_reading_imports_nothing_that_a_pickle_names(tmp_path: Path) -> None:
    """The same names that Python's own unpickler would import stay text."""
    assert "antlr" not in sys.modules
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(assemble({"w": tensor(), "x": Call("antlr.deep", "Thing", (1,))})))
    before = set(sys.modules)
    with open_checkpoint(path) as checkpoint:
        record = checkpoint.extra["x"]
        assert (record.module, record.name, record.args) == ("antlr.deep", "Thing", (1,))
    assert set(sys.modules) == before
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(assemble(Call("antlr.deep", "Thing", (1,))))
