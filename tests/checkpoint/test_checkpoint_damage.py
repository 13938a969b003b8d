"""Damaged files: an error that says so or the right tensors, never anything else."""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contentvec_convert.checkpoint import foreign_file, open_checkpoint
from mlx_contentvec.errors import CheckpointError
from tests.checkpoint_files import (
    Call,
    Name,
    Raw,
    assemble,
    instructions,
    storage,
    tensor,
    torch_legacy,
    torch_zip,
)

FLIPS = 1_600

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def write_torch(torch: ModuleType, path: Path, **options: Any) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    model = OrderedDict(
        [("kernel", base.half()), ("turned", base.t()), ("bias", torch.ones(3).bfloat16())]
    )
    value = {
        "args": argparse.Namespace(layers=12, name="hubert"),
        "model": model,
        "extra_state": {"epoch": 3, "loss": 4.25, "best": None, "rows": [(1, "x"), (2, "y")]},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(5)}}},
    }
    torch.save(value, path, **options)


def write_zip(torch: ModuleType, path: Path) -> None:
    write_torch(torch, path)


def write_legacy(torch: ModuleType, path: Path) -> None:
    write_torch(torch, path, _use_new_zipfile_serialization=False)


def write_safetensors(torch: ModuleType, path: Path) -> None:
    save = pytest.importorskip("safetensors.torch", reason="pip install safetensors").save_file
    save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5).half()}, path, {"format": "pt"})


WRITERS: dict[str, Callable[[ModuleType, Path], None]] = {
    "torch zip": write_zip,
    "torch legacy": write_legacy,
    "safetensors": write_safetensors,
}
every_container = pytest.mark.parametrize("container", WRITERS)


@pytest.fixture
def written(torch: ModuleType, container: str, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    WRITERS[container](torch, path)
    return path


def read(path: Path) -> tuple[Tensors, bool]:
    """Every tensor's dtype, shape and bytes, and whether the file's own checksums vouch for them.

    Raises CheckpointError, or something that no test here accepts.
    """
    with open_checkpoint(path) as checkpoint:
        vouched = checkpoint.verify()
        tensors = {
            name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
            for name, tensor in checkpoint.tensors.items()
        }
        for tensor in checkpoint.tensors.values():
            assert tensor.read().tobytes() == tensors[tensor.name][2]
        json.dumps(checkpoint.extra, default=str)
    return tensors, vouched


def cuts(path: Path, stride: int) -> Iterator[int]:
    """Shorten the file step by step, down to nothing."""
    for length in reversed(range(0, path.stat().st_size, stride)):
        os.truncate(path, length)
        yield length


@every_container
def test_a_file_cut_anywhere_is_refused(written: Path) -> None:
    for length in cuts(written, 1):
        with pytest.raises(CheckpointError):
            open_checkpoint(written)
        if length < 200:
            foreign_file(written)


def test_a_stand_in_cut_anywhere_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes(tiny_checkpoint.read_bytes())
    for _ in cuts(path, 1009):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def damages(content: bytes, seed: int) -> Iterator[bytes]:
    """``content`` with one byte changed, a run removed, repeated, zeroed or made extreme."""
    choose = random.Random(seed)
    extremes = [b"\xff" * 4, b"\x00" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x00" * 8 + b"\x80"]
    for number in range(FLIPS):
        damaged = bytearray(content)
        place = choose.randrange(len(content))
        if number % 8 < 4:
            damaged[place] = choose.randrange(256)
        elif number % 8 == 4:
            damaged[place] ^= 1 << choose.randrange(8)
        elif number % 8 == 5:
            del damaged[place : place + choose.randrange(1, 40)]
        elif number % 8 == 6:
            extreme = choose.choice(extremes)
            damaged[place : place + len(extreme)] = extreme
        else:
            other = choose.randrange(len(content))
            damaged[place:place] = content[other : other + choose.randrange(1, 40)]
        yield bytes(damaged)


@every_container
def test_a_damaged_file_is_refused_or_read_right(written: Path, container: str) -> None:
    content = written.read_bytes()
    truth, vouched = read(written)
    assert vouched == (container == "torch zip")
    refused = 0
    for damaged in damages(content, seed=sum(container.encode())):
        written.write_bytes(damaged)
        try:
            tensors, vouched = read(written)
        except CheckpointError:
            refused += 1
            continue
        if vouched:
            # what the checksums vouch for is what was saved
            assert tensors == truth
    assert FLIPS / 4 < refused < FLIPS


def test_a_damaged_pickle_with_a_right_checksum_is_refused_or_read(
    torch: ModuleType, tmp_path: Path
) -> None:
    """Without the checksum in the way, every part of the unpickler meets damage."""
    path = tmp_path / "model"
    write_torch(torch, path, pickle_protocol=4)
    with zipfile.ZipFile(path) as archive:
        pickle = archive.read("model/data.pkl")
        storages = {
            name.rsplit("/", 1)[1]: archive.read(name)
            for name in archive.namelist()
            if name.startswith("model/data/")
        }
    path.write_bytes(torch_zip(pickle, storages))
    read(path)
    opened = 0
    for damaged in damages(pickle, seed=3):
        path.write_bytes(torch_zip(damaged, storages))
        try:
            read(path)
        except CheckpointError:
            continue
        opened += 1
    assert 0 < opened < FLIPS


#: what a hostile pickle is made of: whole instructions, and values that they work on
PIECES = [
    bytes([code])
    for code in b"()]}0123.NRbcdeglostu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
]
PIECES += [b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"K\x02", b"J\xff\xff\xff\xff", b"M\x00\x01"]
PIECES += [
    instructions(value)
    for value in (
        "model", "w", "state_dict", -1, 2**70, 1.5, b"bytes", (), [1], {"a": 1}, {"w": tensor()},
        Name("collections", "OrderedDict"), Name("torch._utils", "_rebuild_tensor_v2"),
        Name("torch._utils", "_rebuild_parameter"), Name("torch._tensor", "_rebuild_from_type_v2"),
        Name("torch", "Size"), Name("builtins", "set"), Name("builtins", "bytearray"),
        Name("omegaconf.nodes", "AnyNode"), Name("argparse", "Namespace"), Name("a", "B"),
        storage(), tensor(), tensor().args, Call("a", "B", (1,), {"_val": 2}),
        Call("omegaconf.dictconfig", "DictConfig", (), {"_content": {"x": 1}}),
    )
]  # fmt: skip


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=30),
    wrap=st.booleans(),
    write=st.sampled_from([torch_zip, torch_legacy]),
)
def test_any_instructions_are_refused_or_read(
    tmp_path: Path, pieces: list[bytes], wrap: bool, write: Callable[..., bytes]
) -> None:
    code = b"".join(pieces)
    value = {"w": tensor(), "x": Raw(code)} if wrap else Raw(code)
    path = tmp_path / "model.pt"
    path.write_bytes(write(assemble(value)))
    try:
        read(path)
    except CheckpointError as error:
        assert str(error).replace("\n", "").isprintable()
    foreign_file(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
        | st.sampled_from(["F32", "dtype", "shape", "data_offsets", 0, 24, [2, 3], [0, 24]]),
        lambda inner: st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "w", ""]), inner
        ),
        max_leaves=12,
    ),
    data=st.binary(max_size=30),
)  # fmt: skip
def test_any_safetensors_header_is_refused_or_read(
    tmp_path: Path, header: Any, data: bytes
) -> None:
    encoded = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    try:
        read(path)
    except CheckpointError as error:
        assert str(error).replace("\n", "").isprintable()
    foreign_file(path)
