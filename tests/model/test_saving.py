"""A model written by ``save``, or by rvc-mlx, is read back as what it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from contentvec_convert.conversion import convert
from contentvec_convert.export import export
from contentvec_convert.inspection import inspect
from mlx_contentvec import ContentvecModel, weights
from mlx_contentvec.backend import mx, nn
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ConfigError, OutputError, WeightsError
from mlx_contentvec.rvc import Hubert
from tests.small_models import (
    CLOSE,
    CONFIGS,
    DEEP,
    QUANTISABLE,
    TINY,
    assert_same,
    noise,
    random_model,
    random_weights,
    random_weights_file,
)

CLIP = noise(6000)


def features(model: ContentvecModel) -> np.ndarray:
    return model.extract(CLIP, sample_rate=16000, layer=3)


def changed(change: str) -> ContentvecModel:
    model = random_model(QUANTISABLE if change.startswith("quantised") else TINY)
    if change == "float16":
        model.set_dtype(mx.float16)
    elif change == "bfloat16":
        model.set_dtype(mx.bfloat16)
    elif change == "quantised":
        nn.quantize(model, group_size=32, bits=8)
    elif change == "quantised, then float16":
        nn.quantize(model, group_size=32, bits=4)
        model.set_dtype(mx.float16)
    elif change == "trained":
        model.update({"layer_norm": {"bias": model.layer_norm.bias + 0.5}})
    return model


def test_scales_are_stored_by_rows(tmp_path: Path) -> None:
    """CUDA multiplies with no others; a quantised float32 model has scales in float32."""
    path = tmp_path / "saved.safetensors"
    changed("quantised").save(path)
    again = ContentvecModel.from_file(path)
    again.set_dtype(mx.float16)
    again.set_dtype(mx.float32)
    again.load_weights(weights.flat_parameters(ContentvecModel.from_file(path)))
    scales = [
        x for name, x in weights.flat_parameters(again) if name.endswith(("scales", "biases"))
    ]
    assert scales and all(x.dtype == mx.float32 for x in scales)
    for x in scales:
        assert np.asarray(x).flags.c_contiguous


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ("none", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("quantised", "q8"),
        ("quantised, then float16", "q4"),
        ("trained", "float32"),
    ],
)
def test_a_saved_model_is_the_model(change: str, dtype: str, tmp_path: Path) -> None:
    model = changed(change)
    path = tmp_path / "saved.safetensors"
    model.save(path)
    again = ContentvecModel.from_file(path)
    assert again.config == model.config
    for (name, one), (_, other) in zip(
        weights.flat_parameters(model), weights.flat_parameters(again), strict=True
    ):
        assert one.dtype == other.dtype, name
    kind = change.partition(",")[0]
    assert_same(features(again), features(model), kind if kind in CLOSE else "float32")
    _, metadata = mx.load(str(path), return_metadata=True)
    assert metadata["format"] == "mlx" and metadata["dtype"] == dtype
    assert [file.name for file in tmp_path.iterdir()] == ["saved.safetensors"]


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_every_kind_are_saved(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save(tmp_path / "saved.safetensors")
    again = ContentvecModel.from_file(tmp_path / "saved.safetensors")
    assert_same(features(again), features(model))


def test_what_was_saved_converts_and_says_where_it_comes_from(
    converted_tiny: Path, tmp_path: Path
) -> None:
    _, before = mx.load(str(converted_tiny), return_metadata=True)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    model = ContentvecModel.from_file(converted_tiny)
    model.set_dtype(mx.float16)
    model.save(first)
    ContentvecModel.from_file(first).save(second)
    for path in (first, second):
        _, after = mx.load(str(path), return_metadata=True)
        # what was done to the weights is not known: they are not the source's any more
        assert "source" not in after
        assert after["derived_from"] == before["source"]
        assert after["stand_in"] == before["stand_in"]
    assert inspect(second).provenance is not None
    convert(second, tmp_path / "converted.safetensors", allow_unknown=True)
    source = CLIP[None]
    converted = ContentvecModel.from_file(tmp_path / "converted.safetensors")(source)["x"]
    expected = ContentvecModel.from_file(second)(source)["x"]
    assert_same(np.array(converted.astype(mx.float32)), np.array(expected), "float16")


def test_a_file_is_replaced_only_by_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "saved.safetensors"
    random_model(TINY).save(path)
    before = path.read_bytes()

    def cut(file: BinaryIO, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        file.write(before[: len(before) // 2])

    def altered(file: BinaryIO, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        arrays = {**arrays, "layer_norm.bias": arrays["layer_norm.bias"] + 1}
        save_safetensors(file, arrays, metadata)

    save_safetensors = mx.save_safetensors
    for fault in (cut, altered):
        monkeypatch.setattr(mx, "save_safetensors", fault)
        with pytest.raises(OutputError):
            changed("trained").save(path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["saved.safetensors"]
    monkeypatch.setattr(mx, "save_safetensors", save_safetensors)
    changed("trained").save(path)
    assert path.read_bytes() != before


def test_where_nothing_can_be_written_is_an_error(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "no folder" / "a.safetensors", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(OutputError, match=why):
            random_model(TINY).save(path)
    assert not list(tmp_path.parent.glob(".mlx-contentvec-*"))


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights yet"):
        ContentvecModel(TINY).save(tmp_path / "a.safetensors")


def test_what_could_not_be_read_back_is_not_saved(tmp_path: Path) -> None:
    more = random_model(TINY)
    more.adapter = nn.Linear(4, 4)
    with pytest.raises(WeightsError, match=r"adapter\.bias, adapter\.weight"):
        more.save(tmp_path / "a.safetensors")
    mixed = random_model(TINY)
    nn.quantize(mixed.encoder.layers[0], group_size=32, bits=8)
    nn.quantize(mixed.encoder.layers[1], group_size=32, bits=4)
    with pytest.raises(WeightsError, match="4 bits in groups of 32"):
        mixed.save(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "stored",
    [
        "{",
        "[]",
        "{}",
        '{"bits": 8}',
        '{"bits": 9, "group_size": 64}',
        '{"bits": 8, "group_size": 7}',
    ],
)
def test_a_quantisation_that_is_none_is_refused(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    changed("quantised").save(path)
    arrays, metadata = mx.load(str(path), return_metadata=True)
    mx.save_safetensors(str(path), arrays, {**metadata, "quantization": stored})
    with pytest.raises(WeightsError, match=r"quantised in a way|does not fit"):
        ContentvecModel.from_file(path)


# -- lazily --------------------------------------------------------------------------


def test_lazy_weights_are_the_same_weights(tmp_path: Path) -> None:
    path = random_weights_file(tmp_path / "a.safetensors", TINY)
    eager = features(ContentvecModel.from_file(path))
    # a GPU's product may add in another order where weights are stored otherwise
    np.testing.assert_allclose(
        features(ContentvecModel.from_file(path, lazy=True)), eager, atol=1e-5
    )
    built = ContentvecModel(TINY).load_weights(path, lazy=True)
    np.testing.assert_allclose(features(built), eager, atol=1e-5)


def test_lazy_weights_stay_in_the_file(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, encoder_ffn_embed_dim=40_000)
    path = random_weights_file(tmp_path / "a.safetensors", config)
    before = mx.get_active_memory()
    lazy = ContentvecModel.from_file(path, lazy=True)
    assert mx.get_active_memory() - before < path.stat().st_size / 10
    eager = ContentvecModel.from_file(path)
    assert mx.get_active_memory() - before > path.stat().st_size / 2
    del lazy, eager


# -- rvc-mlx -------------------------------------------------------------------------


def write_rvc_mlx(
    path: Path, shape: ModelConfig, has_final_proj: str = "1", **metadata: str
) -> Path:
    """As its ``convert_hubert_checkpoint`` and ``save_converted`` write it: in float16."""
    fields = {
        "conv_layers": shape.conv_layers,
        "embed_dim": shape.encoder_embed_dim,
        "ffn_dim": shape.encoder_ffn_embed_dim,
        "num_heads": shape.encoder_attention_heads,
        "num_layers": shape.encoder_layers,
        "conv_pos": shape.conv_pos,
        "conv_pos_groups": shape.conv_pos_groups,
        "final_dim": shape.final_dim,
    }
    arrays = random_weights(shape, mx.float16)
    if has_final_proj == "0":
        arrays |= {name: mx.zeros_like(arrays[name]) for name in arrays if "final_proj" in name}
    mx.save_safetensors(
        str(path),
        arrays,
        {
            "format": "rvc-mlx",
            "format_version": "1",
            "kind": "hubert",
            "config": json.dumps(fields),
            "has_final_proj": has_final_proj,
            **metadata,
        },
    )
    return path


def test_a_file_of_rvc_mlx_loads(tmp_path: Path) -> None:
    path = write_rvc_mlx(tmp_path / "hubert.safetensors", DEEP)
    expected = random_model(DEEP, mx.float16)
    for version in ("v1", "v2"):
        wanted = expected.extract(CLIP, sample_rate=16000, version=version)
        found = ContentvecModel.from_file(path).extract(CLIP, sample_rate=16000, version=version)
        assert_same(found, wanted, "float16")
    wanted = expected.extract(CLIP, sample_rate=16000)
    named = ContentvecModel.from_pretrained(path)
    assert_same(named.extract(CLIP, sample_rate=16000), wanted, "float16")
    loaded = ContentvecModel(DEEP).load_weights(path)
    assert_same(loaded.extract(CLIP, sample_rate=16000), wanted, "float16")
    assert_same(Hubert.load(path)(CLIP[None]).last_hidden_state[0], wanted, "float16")
    named.save(tmp_path / "ours.safetensors")
    ours = ContentvecModel.from_file(tmp_path / "ours.safetensors")
    assert_same(ours.extract(CLIP, sample_rate=16000), wanted, "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("final_dim", [256, None])
def test_an_export_for_rvc_mlx_is_what_it_writes(
    dtype: str, final_dim: int | None, tmp_path: Path
) -> None:
    shape = dataclasses.replace(DEEP, final_dim=final_dim)
    random_model(shape).save(tmp_path / "model.safetensors")
    ours = tmp_path / "ours.safetensors"
    convert(tmp_path / "model.safetensors", ours, dtype=dtype, allow_unknown=True)
    theirs = tmp_path / "hubert.safetensors"
    result = export(ours, theirs, to="rvc-mlx")
    assert bool(result.notes) == (final_dim is None)
    example = dataclasses.replace(DEEP, final_dim=256)
    written, metadata = mx.load(str(theirs), return_metadata=True)
    expected, described = mx.load(
        str(write_rvc_mlx(tmp_path / "x.safetensors", example, "0" if final_dim is None else "1")),
        return_metadata=True,
    )
    assert {n: a.shape for n, a in written.items()} == {n: a.shape for n, a in expected.items()}
    assert {key: metadata[key] for key in described} == described
    assert ContentvecModel.from_file(theirs).config == shape
    model = ContentvecModel.from_file(ours)
    if dtype == "bfloat16":
        model.set_dtype(mx.float32)
    assert_same(features(ContentvecModel.from_file(theirs)), features(model), dtype)
    # and the way back: what rvc-mlx holds is inspected and converted
    assert inspect(theirs).naming == "rvc-mlx"
    convert(theirs, tmp_path / "again.safetensors", allow_unknown=True)
    again = ContentvecModel.from_file(tmp_path / "again.safetensors")
    assert again.config == shape
    assert_same(features(again), features(ContentvecModel.from_file(theirs)), dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"extractor_norm": "layer"},
        {"layer_norm_first": True},
        {"conv_bias": True},
        {"normalize": True},
        {"conv_pos_batch_norm": True},
        {"encoder_layers_1": 1},
    ],
    ids=str,
)
def test_a_model_that_rvc_mlx_does_not_build_is_not_exported(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    random_model(dataclasses.replace(TINY, **change)).save(path)
    with pytest.raises(ConfigError, match="builds HuBERT base") as caught:
        export(path, tmp_path / "hubert.safetensors", to="rvc-mlx")
    assert next(iter(change)) in str(caught.value)


def test_the_zeros_that_rvc_mlx_has_for_a_projection_are_none(tmp_path: Path) -> None:
    path = write_rvc_mlx(tmp_path / "hubert.safetensors", DEEP, has_final_proj="0")
    model = ContentvecModel.from_file(path)
    assert model.config == dataclasses.replace(DEEP, final_dim=None)
    expected = random_model(DEEP, mx.float16).extract(CLIP, sample_rate=16000)
    assert_same(model.extract(CLIP, sample_rate=16000), expected, "float16")


@pytest.mark.parametrize("kind", ["voice", "rmvpe"])
def test_other_files_of_rvc_mlx_hold_no_embedder(kind: str, tmp_path: Path) -> None:
    path = write_rvc_mlx(tmp_path / "alice.safetensors", TINY, kind=kind)
    with pytest.raises(WeightsError, match=f"kind '{kind}'"):
        ContentvecModel.from_file(path)


@pytest.mark.parametrize(
    "config",
    ["{", "[]", "7", "{}", '{"embed_dim": 96}', '{"colour": 1}', "[" * 100_000],
)
def test_a_configuration_of_rvc_mlx_that_is_none_is_refused(config: str, tmp_path: Path) -> None:
    path = write_rvc_mlx(tmp_path / "hubert.safetensors", TINY, config=config)
    with pytest.raises(WeightsError, match="cannot be read"):
        ContentvecModel.from_file(path)
