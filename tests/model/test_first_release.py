"""Files of the first mlx-contentvec release load directly, and convert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert.conversion import convert
from contentvec_convert.rules import TRANSFORMS
from mlx_contentvec import ContentvecModel
from mlx_contentvec.backend import mx
from mlx_contentvec.config import stage_names
from mlx_contentvec.errors import ConfigError, CorruptCheckpoint, WeightsError
from mlx_contentvec.first_release import fold_weight_norm

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "first_release.safetensors"
SHAPE: dict[str, Any] = {
    "conv_layers": ((16, 10, 5), *(((16, 3, 2),) * 4), *(((16, 2, 2),) * 2)),
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "encoder_layers": 2,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    with np.load(DATA / "first_release.npz") as arrays:
        return dict(arrays)


def _agrees(model: ContentvecModel, recording: dict[str, Any]) -> None:
    waveform = mx.array(recording["waveform"])
    for layer in (1, 2):
        features = np.array(model(waveform, output_layer=layer)["x"])
        # two float32 implementations, values up to 5
        assert np.abs(features - recording[f"layer.{layer}"]).max() < 2e-5


def _saved(tmp_path: Path, **changes: Any) -> Path:
    """The recorded file with tensors replaced, or left out where the change is None."""
    tensors = {**mx.load(str(FILE)), **changes}
    path = tmp_path / "changed.safetensors"
    mx.save_safetensors(str(path), {k: v for k, v in tensors.items() if v is not None})
    return path


def test_load_weights_takes_the_file_as_it_is(recording: dict[str, Any]) -> None:
    model = ContentvecModel(**SHAPE, encoder_layers_1=0)
    model.load_weights(FILE).eval()
    _agrees(model, recording)


def test_a_model_from_the_first_release_has_no_projection(recording: dict[str, Any]) -> None:
    model = ContentvecModel(**SHAPE).load_weights(FILE)
    assert model.config.final_dim is None
    assert "final_proj" not in stage_names(model.config)
    with pytest.raises(ConfigError, match="no final_proj"):
        model(mx.array(recording["waveform"]), project=True)


def test_the_file_converts_to_the_same_model(recording: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "converted.safetensors"
    ledger = convert(FILE, output, allow_unknown=True, heads=4)
    assert [drop.source.name for drop in ledger.drops] == [
        "encoder.pos_conv.layers.0.module.weight"
    ]
    assert ledger.naming == "mlx-contentvec 0.1"
    model = ContentvecModel.from_file(output)
    assert model.config == ContentvecModel(**SHAPE, final_dim=None).config
    _agrees(model, recording)


def test_converting_needs_the_heads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention heads") as caught:
        convert(FILE, tmp_path / "converted.safetensors", allow_unknown=True)
    assert "--heads 12" in str(caught.value)


def test_a_stale_kernel_beside_the_weight_norm_is_not_used(
    recording: dict[str, Any], tmp_path: Path
) -> None:
    name = "encoder.pos_conv.layers.0.module.weight"
    for stale in (None, mx.ones((32, 16, 8))):
        model = ContentvecModel(**SHAPE).load_weights(_saved(tmp_path, **{name: stale}))
        _agrees(model, recording)


@pytest.mark.parametrize("letter", ["g", "v"])
def test_half_a_weight_norm_is_refused(tmp_path: Path, letter: str) -> None:
    path = _saved(tmp_path, **{f"encoder.pos_conv.layers.0.{letter}": None})
    with pytest.raises(WeightsError, match="incomplete"):
        ContentvecModel(**SHAPE).load_weights(path)
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        convert(path, tmp_path / "converted.safetensors", allow_unknown=True, heads=4)


def test_what_the_conversion_script_of_the_release_wrote_is_refused(tmp_path: Path) -> None:
    prefix = "encoder.pos_conv"
    tensors = mx.load(str(FILE))
    path = _saved(
        tmp_path,
        **{
            f"{prefix}.layers.0.g": None,
            f"{prefix}.layers.0.v": None,
            f"{prefix}.layers.0.module.weight": None,
            f"{prefix}.layers.0.module.bias": None,
            f"{prefix}.0.module.weight": tensors[f"{prefix}.layers.0.v"],
            f"{prefix}.0.module.bias": tensors[f"{prefix}.layers.0.module.bias"],
        },
    )
    with pytest.raises(WeightsError, match="incomplete") as caught:
        ContentvecModel(**SHAPE).load_weights(path)
    assert "convert the original checkpoint" in str(caught.value)
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        convert(path, tmp_path / "converted.safetensors", allow_unknown=True, heads=4)


def test_nothing_is_changed_by_a_file_that_does_not_fit() -> None:
    model = ContentvecModel(**{**SHAPE, "encoder_layers": 3})
    with pytest.raises(WeightsError, match="does not fit"):
        model.load_weights(FILE)
    assert model.config.final_dim == 256


def test_loading_and_converting_fold_alike() -> None:
    rng = np.random.default_rng(0)
    magnitude = rng.uniform(0.5, 2.0, (1, 16, 1)).astype(np.float32)
    direction = rng.standard_normal((32, 16, 8)).astype(np.float32)
    folded = fold_weight_norm(magnitude, direction)
    converted = TRANSFORMS["fold_weight_norm_channels_last"].apply(magnitude, direction)
    assert np.abs(folded.view(np.int32) - converted.view(np.int32)).max() <= 1
    # one norm per tap: the kernel's own norms are the magnitudes
    assert np.allclose(np.linalg.norm(folded.astype(float), axis=(0, 2)), magnitude.ravel())


@pytest.mark.parametrize("shape", [(1, 8, 1), (32, 1, 1), (16,)])
def test_a_magnitude_of_another_axis_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="impossible shapes"):
        fold_weight_norm(np.ones(shape, np.float32), np.ones((32, 16, 8), np.float32))


def test_a_dead_tap_is_refused() -> None:
    direction = np.ones((32, 16, 8), np.float32)
    direction[:, 3] = 0
    with pytest.raises(WeightsError, match="divides by zero"):
        fold_weight_norm(np.ones((1, 16, 1), np.float32), direction)
