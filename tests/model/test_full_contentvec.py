"""Full ContentVec, with its speaker-conditioned layers, against the original's recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.conversion import convert
from contentvec_convert.recognition import describe
from contentvec_convert.sources import plan_for
from mlx_contentvec import ContentvecModel
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import ConfigError

DATA = Path(__file__).parents[1] / "data"

#: values up to 3.4 after 5 layers; float32 leaves 2.6e-6 here
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    with np.load(DATA / "full_contentvec.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ContentvecModel:
    output = tmp_path_factory.mktemp("full") / "full.safetensors"
    convert(DATA / "full_contentvec.pt", output, allow_unknown=True)
    return ContentvecModel.from_file(output)


@pytest.mark.parametrize("layer", [1, 2, 3, 4, 5, None])
def test_a_pair_of_clips_agrees_with_the_original(
    model: ContentvecModel, recording: dict[str, Any], layer: int | None
) -> None:
    waveforms, speaker = (mx.array(recording[name]) for name in ("waveforms", "speaker"))
    speakers = mx.concatenate([speaker, speaker])
    features = np.array(model(waveforms, speakers, output_layer=layer)["x"])
    assert np.abs(features - recording[f"pair.layer.{layer or 'last'}"]).max() < TOLERANCE


@pytest.mark.parametrize("layer", [2, 3, 5])
def test_a_clip_alone_agrees_with_the_original(
    model: ContentvecModel, recording: dict[str, Any], layer: int
) -> None:
    waveform, speaker = mx.array(recording["waveforms"][:1]), mx.array(recording["speaker"])
    features = np.array(model(waveform, speaker, output_layer=layer)["x"])
    assert np.abs(features - recording[f"alone.layer.{layer}"]).max() < TOLERANCE


def test_conditioned_features_depend_on_the_rest_of_the_batch_as_in_the_original(
    recording: dict[str, Any],
) -> None:
    plain = recording["pair.layer.2"][0] - recording["alone.layer.2"][0]
    conditioned = recording["pair.layer.5"][0] - recording["alone.layer.5"][0]
    # the recordings tell the two apart, so the tests above do as well
    assert np.abs(plain).max() < 1e-12
    assert np.abs(conditioned).max() > 100 * TOLERANCE


def test_another_speaker_gets_other_features(
    model: ContentvecModel, recording: dict[str, Any]
) -> None:
    waveform, speaker = mx.array(recording["waveforms"][:1]), mx.array(recording["speaker"])
    ours, other = (np.array(model(waveform, s)["x"]) for s in (speaker, -speaker))
    assert np.abs(ours - other).max() > 0.1
    plain = [np.array(model(waveform, s, output_layer=2)["x"]) for s in (speaker, -speaker)]
    assert np.array_equal(*plain)


def test_the_speaker_has_to_be_given(model: ContentvecModel, recording: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a speaker embedding"):
        model(mx.array(recording["waveforms"]))
    with pytest.raises(ConfigError, match="needs a speaker embedding"):
        model(mx.array(recording["waveforms"]), mx.array(recording["speaker"]))


def test_the_checkpoint_is_described_as_what_it_is() -> None:
    with open_checkpoint(DATA / "full_contentvec.pt") as checkpoint:
        plan = plan_for(checkpoint)
    assert plan.config.encoder_layers_1 == 3
    line = describe(plan.config, plan.naming)
    assert line.startswith("full ContentVec, 2 layers and 3 conditioned on the speaker, 16 wide")
