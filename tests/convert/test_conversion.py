"""Conversions from beginning to end: what comes out, and what must not."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert import conversion, transfer
from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.checkpoint.source_file import SourceFile
from contentvec_convert.conversion import convert, default_output, ledger_path
from contentvec_convert.precision import PRECISIONS, all_finite, widen
from contentvec_parity.standin import weights as standin_module
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import (
    CheckpointError,
    ConfigError,
    ContentvecError,
    CorruptCheckpoint,
    IdentityError,
    MappingError,
    OutputError,
)
from mlx_contentvec.files import Draft
from mlx_contentvec.first_release import DIRECTION
from tests.sources import search_path

MakeStandin = Callable[..., Path]

#: fairseq name <- MLX name, where they differ: written out by hand, not by the rules
RENAMED = {
    "feature_extractor.conv_layers.0.norm.weight": "feature_extractor.conv_layers.0.2.weight",
    "feature_extractor.conv_layers.0.norm.bias": "feature_extractor.conv_layers.0.2.bias",
    "encoder.pos_conv.bias": "encoder.pos_conv.0.bias",
} | {
    f"feature_extractor.conv_layers.{i}.conv.weight": f"feature_extractor.conv_layers.{i}.0.weight"
    for i in range(7)
}

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``preset(encoder_layers=1, ...)``: the name of a stand-in with this configuration."""

    def add(**model: Any) -> str:
        tiny = standin_module.PRESETS["tiny"]
        changed = dataclasses.replace(tiny, model={**tiny.model, **model})
        monkeypatch.setitem(standin_module.PRESETS, "changed", changed)
        return "changed"

    return add


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metadata_of(path: Path) -> dict[str, str]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        metadata: dict[str, str] = json.loads(stream.read(length))["__metadata__"]
    return metadata


def assert_is_torchs(output: Path, checkpoint: Path, torch: Any) -> None:
    """Every tensor of a converted base-like file equals what torch itself reads."""
    from safetensors.numpy import load_file

    state = torch.load(checkpoint, weights_only=False)["model"]
    loaded = load_file(output)
    for name, array in loaded.items():
        if name == "encoder.pos_conv.weight":
            magnitude = state["encoder.pos_conv.0.weight_g"].double()
            direction = state["encoder.pos_conv.0.weight_v"].double()
            kernel = magnitude * direction / direction.norm(dim=(0, 1), keepdim=True)
            expected = kernel.float().numpy().transpose(0, 2, 1)
            np.testing.assert_array_max_ulp(array, expected, 1)
            continue
        expected = state[RENAMED.get(name, name)].float().numpy()
        if expected.ndim == 3:
            expected = expected.transpose(0, 2, 1)
        assert array.dtype == np.float32
        assert np.array_equal(array.view(np.uint32), expected.copy().view(np.uint32)), name
    assert len(loaded) == len(state) - 3


# ---- the main job


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_tensor_of_the_output_is_torchs(
    tmp_path: Path, make_standin: MakeStandin, fairseq: Any, torch: Any, dtype: str
) -> None:
    checkpoint = make_standin("tiny", dtype=dtype)
    output = tmp_path / "out.safetensors"
    ledger = convert(checkpoint, output, allow_unknown=True)
    assert_is_torchs(output, checkpoint, torch)
    assert [row.target for row in ledger.inexact] == ["encoder.pos_conv.weight"]


def test_float64_weights_are_rounded_and_the_ledger_says_so(
    tmp_path: Path, make_standin: MakeStandin, fairseq: Any, torch: Any
) -> None:
    checkpoint = make_standin("tiny", dtype="float64")
    output = tmp_path / "out.safetensors"
    ledger = convert(checkpoint, output, allow_unknown=True)
    assert_is_torchs(output, checkpoint, torch)
    assert len(ledger.inexact) == len(ledger.tensors)


@pytest.mark.fullsize
def test_the_full_size_file_converts_with_214_tensors_accounted_for(
    tmp_path: Path, standin: Path, fairseq: Any, torch: Any
) -> None:
    output = tmp_path / "contentvec_base.safetensors"
    ledger = convert(standin, output, allow_unknown=True)
    assert ledger.source_tensors == 214
    assert len(ledger.tensors) == 211
    assert len(ledger.drops) == 2
    assert ledger.config == ModelConfig()
    assert {row.dtype for row in ledger.tensors} == {"F32"}
    assert [row.target for row in ledger.inexact] == ["encoder.pos_conv.weight"]
    assert_is_torchs(output, standin, torch)
    output.unlink()


def test_the_name_of_the_source_changes_the_ledger_and_not_the_output(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    other = tmp_path / "what my friend called it.bin"
    other.write_bytes(tiny_checkpoint.read_bytes())
    ledgers = [
        convert(source, tmp_path / f"{i}.safetensors", allow_unknown=True)
        for i, source in enumerate((tiny_checkpoint, other))
    ]
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert [ledger.source["name"] for ledger in ledgers] == [tiny_checkpoint.name, other.name]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for folder in ("1", "2"):
        (tmp_path / folder).mkdir()
        convert(tiny_checkpoint, tmp_path / folder / "out.safetensors", allow_unknown=True)
    for name in ("out.safetensors", "out.ledger.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_output_says_where_it_comes_from(converted_tiny: Path, tiny_checkpoint: Path) -> None:
    metadata = metadata_of(converted_tiny)
    source = json.loads(metadata["source"])
    data = tiny_checkpoint.read_bytes()
    assert metadata["format"] == "mlx"
    assert metadata["dtype"] == "float32"
    assert ModelConfig.from_dict(json.loads(metadata["config"])).encoder_layers == 3
    assert source == {
        "size": len(data),
        "md5": hashlib.md5(data).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "known_as": None,
        "naming": "fairseq",
        "container": "torch zip",
        "stand_in": True,
    }
    assert "synthetic" in metadata["stand_in"]


def test_pre_norm_models_convert_with_their_input_scale(converted_tiny_large: Path) -> None:
    config = ModelConfig.from_dict(json.loads(metadata_of(converted_tiny_large)["config"]))
    assert config.layer_norm_first and config.normalize and config.extractor_norm == "layer"


def test_a_converted_file_keeps_saying_that_it_is_a_stand_in(
    tmp_path: Path, converted_tiny: Path
) -> None:
    with pytest.raises(IdentityError):
        convert(converted_tiny, tmp_path / "half.safetensors", dtype="float16")
    convert(converted_tiny, tmp_path / "half.safetensors", dtype="float16", allow_unknown=True)
    metadata = metadata_of(tmp_path / "half.safetensors")
    assert json.loads(metadata["source"])["stand_in"] is True
    assert "synthetic" in metadata["stand_in"]


def test_a_converted_file_converts_to_the_same_tensors_again(
    tmp_path: Path, converted_tiny: Path
) -> None:
    output = tmp_path / "again.safetensors"
    ledger = convert(converted_tiny, output, allow_unknown=True)
    assert not ledger.inexact
    first = json.loads(ledger_path(converted_tiny).read_text())["tensors"]
    assert {row["target"]: row["sha256"] for row in first} == {
        row.target: row.sha256 for row in ledger.tensors
    }


def test_the_default_name_is_the_one_that_users_know(tmp_path: Path) -> None:
    assert default_output(tmp_path / "hubert_base.pt") == Path("contentvec_base.safetensors")
    assert default_output(tmp_path / "mine.v2.pt") == Path("mine.v2.safetensors")
    assert default_output(tmp_path / "folder") == Path("folder.safetensors")


def test_progress_covers_both_passes_and_ends_at_the_total(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    convert(
        tiny_checkpoint,
        tmp_path / "out.safetensors",
        allow_unknown=True,
        progress=lambda doing, done, total: seen.setdefault(doing, []).append((done, total)),
    )
    assert [doing for doing in seen if doing != "hashing"] == ["writing", "checking"]
    for steps in seen.values():
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1][0] == steps[-1][1]


# ---- precisions


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_precision_is_read_by_mlx_and_near_the_source(
    tmp_path: Path, make_standin: MakeStandin, preset: Callable[..., str], dtype: str
) -> None:
    from mlx_contentvec.backend import mx

    checkpoint = make_standin(
        preset(encoder_embed_dim=128, encoder_ffn_embed_dim=256, final_dim=64)
    )
    output, full = tmp_path / "out.safetensors", tmp_path / "full.safetensors"
    convert(checkpoint, output, dtype=dtype, allow_unknown=True)
    convert(checkpoint, full, allow_unknown=True)
    arrays, metadata = mx.load(str(output), return_metadata=True)
    wanted = mx.load(str(full))
    how = json.loads(metadata["quantization"]) if "quantization" in metadata else None
    assert metadata["dtype"] == dtype
    assert (how is not None) == (PRECISIONS[dtype].quantization is not None)
    tolerance = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "q8": 0.01, "q4": 0.2}[dtype]
    for name, array in wanted.items():
        found = arrays.pop(name)
        if how is not None and array.ndim == 2:
            stem = name.removesuffix("weight")
            scales, biases = arrays.pop(f"{stem}scales"), arrays.pop(f"{stem}biases")
            found = mx.dequantize(found, scales, biases, **how)
        error = mx.abs(found.astype(mx.float32) - array).max().item()
        assert error <= tolerance * mx.abs(array).max().item(), name
    assert not arrays


def test_a_float16_source_stays_bit_for_bit_in_float16(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    ledger = convert(
        tiny_checkpoint, tmp_path / "out.safetensors", dtype="float16", allow_unknown=True
    )
    assert [row.target for row in ledger.inexact] == ["encoder.pos_conv.weight"]


def test_bfloat16_is_rounded_to_nearest_even(torch: Any) -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(PRECISIONS["bfloat16"].narrow(values), expected)


def test_widening_is_exact_for_every_half_number(torch: Any) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    for dtype in ("float16", "bfloat16"):
        expected = torch.from_numpy(bits.view(np.int16)).view(getattr(torch, dtype)).float().numpy()
        numbers = ~np.isnan(expected)
        found = widen(bits.view(np.float16) if dtype == "float16" else bits, dtype)
        assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))
        assert np.isnan(found[~numbers]).all()


@pytest.mark.filterwarnings("error")
def test_a_signalling_nan_of_float64_is_read_without_a_warning() -> None:
    bits = np.array([0x7FF0_0000_0000_0001], np.uint64)
    assert np.isnan(widen(bits.view(np.float64), "float64")).all()


@pytest.mark.parametrize("subnormal_is_zero", [False, True])
def test_widening_is_exact_however_a_thread_takes_subnormal_numbers(
    torch: Any, subnormal_is_zero: bool
) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits.view(np.float16)[(bits & 0x7C00) != 0x7C00]
    expected = torch.from_numpy(halves).float().numpy().view(np.uint32)
    if not torch.set_flush_denormal(subnormal_is_zero) and subnormal_is_zero:
        pytest.skip("needs a processor that can take subnormal numbers for zero")
    try:
        found = [widen(array, "float16") for array in (halves, halves[::2], halves[:0])]
    finally:
        torch.set_flush_denormal(False)
    for widened, wanted in zip(found, (expected, expected[::2], expected[:0]), strict=True):
        assert np.array_equal(widened.view(np.uint32), wanted)


@pytest.mark.parametrize(
    ("stored", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", np.uint16)]
)
def test_numbers_that_are_none_are_found(stored: str, dtype: Any) -> None:
    bits = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}[stored]
    infinity = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}[stored]
    array = np.zeros(1000, bits)
    assert all_finite(array.view(dtype), stored)
    array[500] = infinity - 1  # the largest finite number, all over: the sum overflows
    array[600] = infinity - 1
    assert all_finite(array.view(dtype), stored)
    for bad in (infinity, infinity + 1, infinity | (1 << (8 * bits().itemsize - 1))):
        array[3] = bad
        assert not all_finite(array.view(dtype), stored)


def test_an_unknown_precision_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="float8"):
        convert(tiny_checkpoint, tmp_path / "out.safetensors", dtype="float8", allow_unknown=True)


# ---- identity decides first


def test_a_stand_in_needs_a_word_from_the_caller(tmp_path: Path, tiny_checkpoint: Path) -> None:
    output = tmp_path / "out.safetensors"
    with pytest.raises(IdentityError):
        convert(tiny_checkpoint, output)
    assert names(tmp_path) == []
    md5 = hashlib.md5(tiny_checkpoint.read_bytes()).hexdigest()
    convert(tiny_checkpoint, output, expect_md5=md5)
    assert metadata_of(output)["stand_in"]


def test_a_stand_in_is_refused_even_if_its_checksum_were_listed(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion.Expectation, "check", lambda *_: None)
    with pytest.raises(IdentityError, match="stand-in"):
        convert(tiny_checkpoint, tmp_path / "out.safetensors")
    assert names(tmp_path) == []


def test_the_wrong_checksum_stops_a_conversion_that_had_begun(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with pytest.raises(IdentityError, match="not the file expected"):
        convert(tiny_checkpoint, tmp_path / "out.safetensors", expect_md5="0" * 32)
    assert names(tmp_path) == []


def test_a_wrong_file_is_called_wrong_before_its_insides_are_criticised(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    cut = tmp_path / "hubert_base.pt"
    cut.write_bytes(tiny_checkpoint.read_bytes()[:100_000])
    with pytest.raises(IdentityError, match="not the file it is named after"):
        convert(cut, tmp_path / "out.safetensors")
    with pytest.raises(IdentityError, match="not the file expected"):
        convert(cut, tmp_path / "out.safetensors", expect_sha256="0" * 64)
    with pytest.raises(CheckpointError):
        convert(cut, tmp_path / "out.safetensors", allow_unknown=True)
    assert names(tmp_path) == ["hubert_base.pt"]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = tmp_path / "source.pt"
    source.write_bytes(tiny_checkpoint.read_bytes())

    def touch(doing: str, done: int, total: int) -> None:
        if doing == "checking" and done == total:
            os.utime(source, ns=(1, 1))

    with pytest.raises(IdentityError, match="changed"):
        convert(source, tmp_path / "out.safetensors", allow_unknown=True, progress=touch)
    assert names(tmp_path) == ["source.pt"]


def test_what_a_stand_in_says_of_itself_is_one_printable_line(
    tmp_path: Path, tiny_checkpoint: Path, fairseq: Any, torch: Any
) -> None:
    state = torch.load(tiny_checkpoint, weights_only=False)
    state["extra_state"]["stand_in"] = "made\x1b[2J up\nfor\ta test" + "." * 9999
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out.safetensors", allow_unknown=True)
    said = metadata_of(tmp_path / "out.safetensors")["stand_in"]
    assert said.startswith("made[2J up for a test...") and len(said) <= 300


# ---- where it is written


def test_the_source_is_never_the_output(tmp_path: Path, converted_tiny: Path) -> None:
    source = tmp_path / "a.safetensors"
    source.write_bytes(converted_tiny.read_bytes())
    link = tmp_path / "b.safetensors"
    link.symlink_to(source)
    for output in (source, link):
        with pytest.raises(OutputError, match="the source itself"):
            convert(source, output, allow_unknown=True, force=True)


def test_a_weight_file_of_the_source_folder_is_never_the_output(
    tmp_path: Path, converted_tiny: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    weights.write_bytes(converted_tiny.read_bytes())
    (folder / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="the source itself"):
        convert(folder, weights, allow_unknown=True, force=True)
    assert weights.read_bytes() == converted_tiny.read_bytes()
    ledger = convert(folder, tmp_path / "model.safetensors", allow_unknown=True)
    assert [file.name for file in ledger.identity.files] == ["model.safetensors", "config.json"]


def test_the_output_must_be_named_as_safetensors(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(OutputError, match="suffix"):
        convert(tiny_checkpoint, tmp_path / "out.npz", allow_unknown=True)


def test_an_existing_output_stays_unless_forced(tmp_path: Path, tiny_checkpoint: Path) -> None:
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(OutputError, match="already exists"):
        convert(tiny_checkpoint, output, allow_unknown=True)
    assert output.read_bytes() == b"precious"
    convert(tiny_checkpoint, output, allow_unknown=True, force=True)
    assert names(tmp_path) == ["out.ledger.json", "out.safetensors"]


def test_a_full_disk_keeps_the_old_output_and_its_ledger(
    tmp_path: Path, tiny_checkpoint: Path, converted_tiny: Path
) -> None:
    output = tmp_path / "out.safetensors"
    convert(tiny_checkpoint, output, dtype="float16", allow_unknown=True)
    old = output.read_bytes(), ledger_path(output).read_bytes()
    size = converted_tiny.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OutputError, match="cannot write"):
                convert(tiny_checkpoint, output, allow_unknown=True, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (output.read_bytes(), ledger_path(output).read_bytes()) == old
        assert names(tmp_path) == ["out.ledger.json", "out.safetensors"]


def test_a_flush_that_fails_once_is_not_forgotten(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reports lost writes to one call of fsync and lets the next one succeed."""
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def fsync(_: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="Input/output error"):
        convert(tiny_checkpoint, tmp_path / "out.safetensors", allow_unknown=True)
    assert names(tmp_path) == []


# ---- the proof


@pytest.mark.parametrize(
    "target",
    [
        "encoder.layers.1.fc1.weight",  # moved
        "feature_extractor.conv_layers.3.conv.weight",  # transposed
        "encoder.pos_conv.weight",  # computed
        "encoder.layers.0.self_attn.k_proj.bias",  # moves no feature
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_wrong_bit_on_the_disk_is_noticed(
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    dtype: str,
) -> None:
    lay_out = conversion.lay_out
    places: dict[str, int] = {}

    def remember(*arguments: Any) -> Any:
        layout = lay_out(*arguments)
        places.update(layout.starts)
        return layout

    write = Draft.write

    def damage(self: Draft, offset: int, data: Any) -> None:
        data = bytearray(data)
        if offset == places[target]:
            data[-1] ^= 1
        write(self, offset, bytes(data))

    monkeypatch.setattr(conversion, "lay_out", remember)
    monkeypatch.setattr(Draft, "write", damage)
    with pytest.raises(OutputError) as caught:
        convert(tiny_checkpoint, tmp_path / "out.safetensors", dtype=dtype, allow_unknown=True)
    assert target in str(caught.value)
    assert names(tmp_path) == []


def test_a_header_that_reads_back_wrong_is_noticed(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Draft.write

    def damage(self: Draft, offset: int, data: Any) -> None:
        write(self, offset, bytes(data).replace(b"F32", b"F16", 1) if offset == 0 else data)

    monkeypatch.setattr(Draft, "write", damage)
    with pytest.raises(OutputError, match="not written as it should be"):
        convert(tiny_checkpoint, tmp_path / "out.safetensors", allow_unknown=True)


def test_tensors_larger_than_a_block_are_proven_in_every_block(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(tiny_checkpoint, tmp_path / "whole.safetensors", allow_unknown=True)
    monkeypatch.setattr(transfer, "BLOCK_ELEMENTS", 100)
    pieces = convert(tiny_checkpoint, tmp_path / "pieces.safetensors", allow_unknown=True)
    assert whole.output["sha256"] == pieces.output["sha256"]
    assert whole.tensors == pieces.tensors


# ---- damaged and hostile values


def rewritten(source: Path, target: Path, torch: Any, change: Callable[[Any], None]) -> Path:
    """The checkpoint at ``source`` with its state dict changed, saved by torch."""
    state = torch.load(source, weights_only=False)
    change(state["model"])
    torch.save(state, target)
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_numbers_are_refused_by_name(
    tmp_path: Path, tiny_checkpoint: Path, fairseq: Any, torch: Any, value: float, dtype: str
) -> None:
    def spoil(state: Any) -> None:
        state["encoder.layers.1.fc2.weight"][3, 5] = value

    source = rewritten(tiny_checkpoint, tmp_path / "a.pt", torch, spoil)
    with pytest.raises(CorruptCheckpoint, match=r"encoder\.layers\.1\.fc2\.weight"):
        convert(source, tmp_path / "out.safetensors", dtype=dtype, allow_unknown=True)
    assert names(tmp_path) == ["a.pt"]


def test_a_weight_norm_of_zero_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, fairseq: Any, torch: Any
) -> None:
    def spoil(state: Any) -> None:
        state["encoder.pos_conv.0.weight_v"][:, :, 7] = 0

    source = rewritten(tiny_checkpoint, tmp_path / "a.pt", torch, spoil)
    with pytest.raises(CorruptCheckpoint, match="not numbers") as caught:
        convert(source, tmp_path / "out.safetensors", allow_unknown=True)
    assert "encoder.pos_conv.0.weight_v" in str(caught.value)


def test_a_weight_norm_of_zero_in_a_file_of_the_first_release_is_refused_too(
    tmp_path: Path,
) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(DATA / "first_release.safetensors")
    tensors[DIRECTION][:, 3] = 0
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CorruptCheckpoint, match="not numbers") as caught:
        convert(
            tmp_path / "a.safetensors", tmp_path / "out.safetensors", allow_unknown=True, heads=4
        )
    assert "1 kernel taps" in str(caught.value)


def test_a_folded_kernel_too_large_for_float16_is_not_called_damaged(
    tmp_path: Path, make_standin: MakeStandin, fairseq: Any, torch: Any
) -> None:
    def spoil(state: Any) -> None:
        state["encoder.pos_conv.0.weight_g"][..., 3] = 1e8

    source = rewritten(make_standin("tiny", dtype="float32"), tmp_path / "a.pt", torch, spoil)
    with pytest.raises(MappingError, match="too large"):
        convert(source, tmp_path / "out.safetensors", dtype="float16", allow_unknown=True)


def test_weights_too_large_for_float16_are_refused_by_name(
    tmp_path: Path, make_standin: MakeStandin, fairseq: Any, torch: Any
) -> None:
    def spoil(state: Any) -> None:
        state["layer_norm.bias"][0] = 1e6

    source = rewritten(make_standin("tiny", dtype="float32"), tmp_path / "a.pt", torch, spoil)
    with pytest.raises(MappingError, match=r"layer_norm\.bias") as caught:
        convert(source, tmp_path / "out.safetensors", dtype="float16", allow_unknown=True)
    assert "--dtype float32" in str(caught.value)


def test_shared_and_strided_storages_convert_as_torch_sees_them(
    tmp_path: Path, tiny_checkpoint: Path, fairseq: Any, torch: Any
) -> None:
    def rearrange(state: Any) -> None:
        both = torch.stack([state["layer_norm.weight"], state["layer_norm.bias"]])
        state["layer_norm.weight"], state["layer_norm.bias"] = both[0], both[1]
        name = "encoder.layers.0.fc1.weight"
        state[name] = state[name].t().contiguous().t()

    source = rewritten(tiny_checkpoint, tmp_path / "a.pt", torch, rearrange)
    first = convert(source, tmp_path / "a.safetensors", allow_unknown=True)
    second = convert(tiny_checkpoint, tmp_path / "b.safetensors", allow_unknown=True)
    assert first.tensors == second.tensors


def test_a_tensor_stored_transposed_is_read_no_more_often_than_others(
    tmp_path: Path,
    tiny_checkpoint: Path,
    fairseq: Any,
    torch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def transpose(state: Any) -> None:
        for name, tensor in state.items():
            if tensor.ndim == 2:
                state[name] = tensor.t().contiguous().t()

    source = rewritten(tiny_checkpoint, tmp_path / "a.pt", torch, transpose)
    monkeypatch.setattr(transfer, "BLOCK_ELEMENTS", 100)
    read, count = SourceFile.read_into, 0

    def counted(self: SourceFile, offset: int, target: memoryview) -> None:
        nonlocal count
        count += len(target)
        read(self, offset, target)

    monkeypatch.setattr(SourceFile, "read_into", counted)
    convert(source, tmp_path / "out.safetensors", allow_unknown=True)
    # its own checksums, writing and checking; the positional kernel is mapped
    assert count < 3.2 * source.stat().st_size


# ---- every kind of damage to the file


def outcome(source: Path, output: Path) -> str:
    """ "refused" or "converted"; anything but an error of ours or a result fails the test."""
    try:
        convert(source, output, allow_unknown=True)
    except ContentvecError as error:
        assert str(error)
        assert not output.exists()
        return "refused"
    return "converted"


@pytest.fixture
def small_checkpoint(make_standin: MakeStandin, preset: Callable[..., str]) -> Path:
    """The smallest that has every kind of tensor, so that damage is likely to hit structure."""
    return make_standin(
        preset(
            encoder_layers=1,
            encoder_embed_dim=32,
            encoder_ffn_embed_dim=32,
            final_dim=8,
            conv_pos=16,
            conv_feature_layers="[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
        )
    )


def test_every_truncation_is_refused(tmp_path: Path, small_checkpoint: Path) -> None:
    data = small_checkpoint.read_bytes()
    source, output = tmp_path / "cut.pt", tmp_path / "out.safetensors"
    lengths = {*range(0, len(data), 499), *range(len(data) - 60, len(data))}
    for length in sorted(lengths):
        source.write_bytes(data[:length])
        assert outcome(source, output) == "refused", length
    assert names(tmp_path) == ["cut.pt"]


def test_a_flipped_byte_is_refused_or_changes_nothing_but_the_checksum(
    tmp_path: Path, small_checkpoint: Path
) -> None:
    data = small_checkpoint.read_bytes()
    source, output = tmp_path / "flipped.pt", tmp_path / "out.safetensors"
    source.write_bytes(data)
    intact = convert(source, tmp_path / "intact.safetensors", allow_unknown=True)
    chance = random.Random(11)
    counts = {"refused": 0, "converted": 0}
    for _ in range(300):
        place = chance.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= chance.randrange(1, 256)
        source.write_bytes(flipped)
        result = outcome(source, output)
        counts[result] += 1
        if result == "converted":
            ledger = json.loads(ledger_path(output).read_text())
            shown = {row["target"]: row["sha256"] for row in ledger["tensors"]}
            assert shown == {row.target: row.sha256 for row in intact.tensors}, place
            assert ledger["config"] == intact.config.to_dict()
            assert ledger["source"]["sha256"] != intact.identity.sha256
            output.unlink()
            ledger_path(output).unlink()
    assert counts["refused"] > 200
    assert names(tmp_path) == ["flipped.pt", "intact.ledger.json", "intact.safetensors"]


# ---- kills


_SLOW = """
import signal, sys, time
from contentvec_convert import writer
from contentvec_convert.conversion import convert
write, read = writer.Draft.write, writer.Draft.read_into
def slow_write(self, *a): time.sleep(0.001); write(self, *a)
def slow_read(self, *a): time.sleep(0.001); read(self, *a)
writer.Draft.write, writer.Draft.read_into = slow_write, slow_read
# a process started in the background of a shell may be deaf to it
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
convert(sys.argv[1], sys.argv[2], allow_unknown=True, force=True)
print("done", flush=True)
"""


def slow_conversion(source: Path, output: Path) -> subprocess.Popen[str]:
    """A conversion of some 0.3 seconds in a process of its own, past its imports."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW, source, output],
        env={**os.environ, "PYTHONPATH": search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, tiny_checkpoint: Path, converted_tiny: Path
) -> None:
    complete = converted_tiny.read_bytes()
    output = tmp_path / "out.safetensors"
    chance = random.Random(5)
    states = set()
    for round_ in range(12):
        if round_ % 2:
            output.write_bytes(b"old")
        else:
            output.unlink(missing_ok=True)
        ledger_path(output).unlink(missing_ok=True)
        process = slow_conversion(tiny_checkpoint, output)
        time.sleep(chance.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        state = output.read_bytes() if output.exists() else None
        assert state in (b"old" if round_ % 2 else None, complete)
        if ledger_path(output).exists():
            ledger = json.loads(ledger_path(output).read_text())
            assert state == complete
            assert ledger["output"]["sha256"] == hashlib.sha256(complete).hexdigest()
        states.add(state == complete)
    # and the debris of all those kills goes with the next run
    convert(tiny_checkpoint, output, allow_unknown=True, force=True)
    assert output.read_bytes() == complete
    assert names(tmp_path) == ["out.ledger.json", "out.safetensors"]


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for pause in (0.0, 0.05, 0.15):
        process = slow_conversion(tiny_checkpoint, tmp_path / "out.safetensors")
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert "KeyboardInterrupt" in errors
        assert names(tmp_path) == []


# ---- memory


@pytest.mark.fullsize
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, which Linux has")
def test_memory_of_a_full_size_conversion_is_bounded(tmp_path: Path, standin: Path) -> None:
    code = (
        "import sys, threading, time, re\n"
        "from contentvec_convert.conversion import convert\n"
        "peak = [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        text = open('/proc/self/smaps_rollup').read()\n"
        "        private = sum(map(int, re.findall(r'Private_\\w+:\\s+(\\d+)', text)))\n"
        "        peak[0] = max(peak[0], private); time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "convert(sys.argv[1], sys.argv[2], allow_unknown=True)\n"
        "print(peak[0])"
    )
    output = tmp_path / "out.safetensors"
    run = subprocess.run(
        [sys.executable, "-c", code, standin, output],
        env={**os.environ, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 100 * 1024, "kilobytes of private memory"
    output.unlink()


def test_the_source_is_opened_before_and_after_for_reading_only(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = tmp_path / "read-only.pt"
    source.write_bytes(tiny_checkpoint.read_bytes())
    source.chmod(0o444)
    before = source.stat()
    convert(source, tmp_path / "out.safetensors", allow_unknown=True)
    after = source.stat()
    assert (before.st_mtime_ns, before.st_size, before.st_mode) == (
        after.st_mtime_ns,
        after.st_size,
        after.st_mode,
    )
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.tensors
