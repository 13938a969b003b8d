from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentvec_parity.references.truth import true_double
from mlx_contentvec.backend import mx
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import AudioError, ConfigError
from mlx_contentvec.features import VERSIONS, FeatureKind, batches, extract, feature_kind
from mlx_contentvec.model import ContentvecModel
from tests.small_models import CONFIGS, DEEP, TINY, in_one_go, noise, random_model


@pytest.fixture(scope="module")
def deep() -> ContentvecModel:
    return random_model(DEEP)


@pytest.fixture(scope="module")
def original(fairseq: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ContentvecModel]:
    """fairseq's model, 12 layers deep, and the MLX model with its converted weights."""
    from contentvec_convert.conversion import convert
    from tests.originals import fairseq_hubert, save_fairseq

    folder = tmp_path_factory.mktemp("original")
    model = fairseq_hubert(DEEP)
    convert(
        save_fairseq(model, DEEP, folder / "a.pt"), folder / "a.safetensors", allow_unknown=True
    )
    return model, ContentvecModel.from_file(folder / "a.safetensors")


def as_rvc_asks(torch: Any, model: Any, waveform: np.ndarray, version: str) -> np.ndarray:
    """RVC's own lines, infer/modules/train/extract_feature_print.py."""
    feats = torch.from_numpy(waveform).view(1, -1)
    inputs = {
        "source": feats,
        "padding_mask": torch.BoolTensor(feats.shape).fill_(False),
        "output_layer": 9 if version == "v1" else 12,
    }
    with torch.no_grad():
        logits = model.extract_features(**inputs)
        return (model.final_proj(logits[0]) if version == "v1" else logits[0]).squeeze(0).numpy()


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("seconds", [0.5, 3.1])
def test_features_are_those_that_rvc_gets_from_fairseq(
    torch: Any, original: tuple[Any, ContentvecModel], version: str, seconds: float
) -> None:
    fairseq_model, model = original
    waveform = noise(int(seconds * 16000))
    expected = as_rvc_asks(torch, fairseq_model, waveform, version)
    features = model.extract(waveform, version=version)
    assert features.dtype == np.float32
    assert features.shape == expected.shape
    np.testing.assert_allclose(features, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_streamed_features_are_those_of_fairseq(
    torch: Any, original: tuple[Any, ContentvecModel], version: str
) -> None:
    fairseq_model, model = original
    waveform = noise(16000 * 7)
    expected = as_rvc_asks(torch, fairseq_model, waveform, version)
    features = model.extract(waveform, version=version, max_memory=2 << 20)
    np.testing.assert_allclose(features, expected, atol=5e-5, rtol=0)


def test_a_file_gives_fairseqs_features_of_what_it_holds(
    torch: Any, original: tuple[Any, ContentvecModel], tmp_path: Path
) -> None:
    soundfile = pytest.importorskip("soundfile", reason="pip install 'mlx-contentvec[audio]'")
    from mlx_contentvec.audio import read_audio
    from mlx_contentvec.extract.manifest import Manifest
    from mlx_contentvec.extract.run import Extraction, Job, Settings

    fairseq_model, model = original
    stereo = np.stack([noise(44100 * 2, seed) for seed in range(2)], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 44100)
    settings = Settings(weights="0" * 64, layer=9, project=True)
    extraction = Extraction(model, settings, Manifest(tmp_path))
    extraction.run([Job(str(tmp_path / "a.flac"), "a.npy", 2.0)])
    heard = read_audio(tmp_path / "a.flac").waveform
    expected = as_rvc_asks(torch, fairseq_model, heard, "v1")
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=5e-5, rtol=0)


def test_version_two_is_the_default(deep: ContentvecModel) -> None:
    waveform = noise(16000)
    features = extract(deep, waveform)
    np.testing.assert_array_equal(features, extract(deep, waveform, version="v2"))
    np.testing.assert_array_equal(features, extract(deep, waveform, layer=12))
    np.testing.assert_array_equal(
        extract(deep, waveform, version="v1"), extract(deep, waveform, layer=9, project=True)
    )


def test_a_waveform_is_mixed_and_resampled(deep: ContentvecModel) -> None:
    pytest.importorskip("soxr", reason="pip install 'mlx-contentvec[audio]'")
    stereo = np.stack([noise(48000, seed) for seed in range(2)], axis=1)
    assert extract(deep, stereo, sample_rate=48000).shape == (49, 96)
    mono = stereo.mean(axis=1)
    np.testing.assert_array_equal(
        extract(deep, stereo, sample_rate=16000), extract(deep, mono, sample_rate=16000)
    )


def test_an_mlx_array_is_a_waveform(deep: ContentvecModel) -> None:
    waveform = noise(8000)
    np.testing.assert_array_equal(extract(deep, mx.array(waveform)), extract(deep, waveform))


def test_a_model_that_wants_normalised_input_gets_it() -> None:
    model = random_model(CONFIGS["large"])
    waveform = noise(48000)
    features = extract(model, waveform, layer=3)
    np.testing.assert_allclose(extract(model, waveform * 0.5 + 0.1, layer=3), features, atol=1e-2)
    streamed = extract(model, waveform, layer=3, max_memory=3 << 20)
    np.testing.assert_allclose(streamed, features, atol=2e-5)


def test_features_the_model_does_not_have_are_refused() -> None:
    model = random_model(TINY)
    with pytest.raises(ConfigError, match="no layer 12"):
        extract(model, noise(16000))
    with pytest.raises(ConfigError, match="version v1, layer 3"):
        extract(model, noise(16000), version="v1", layer=3)
    with pytest.raises(ConfigError, match="no version 'v3'"):
        extract(model, noise(16000), version="v3")
    with pytest.raises(ConfigError, match="which layer"):
        extract(model, noise(16000), project=True)
    with pytest.raises(ConfigError, match="no final_proj"):
        FeatureKind(3, project=True).check(ModelConfig(final_dim=None))
    with pytest.raises(AudioError, match="too short"):
        extract(model, noise(399), layer=3)


def test_the_versions_are_rvcs() -> None:
    assert {"v1": FeatureKind(9, True), "v2": FeatureKind(12, False)} == VERSIONS
    assert [kind.width(ModelConfig()) for kind in VERSIONS.values()] == [256, 768]
    assert feature_kind(layer=7) == FeatureKind(7)


# ---- many clips -------------------------------------------------------------------

MIXED = [16000, 5000, 400, 16000, 4600, 17777, 21000, 5119, 720, 16000, 20500]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_clip_in_a_batch_is_the_clip_alone(config: ModelConfig) -> None:
    model = random_model(config)
    clips = [noise(samples, seed) * (1 + seed) / 5 for seed, samples in enumerate(MIXED)]
    batched = list(model.extract_many(clips, layer=3, batch_seconds=10))
    for clip, features in zip(clips, batched, strict=True):
        np.testing.assert_allclose(features, in_one_go(model, clip, output_layer=3), atol=2e-5)


def test_batched_features_are_those_of_fairseq_alone(
    torch: Any, original: tuple[Any, ContentvecModel]
) -> None:
    fairseq_model, model = original
    clips = [noise(samples, seed) for seed, samples in enumerate(MIXED)]
    for clip, features in zip(clips, model.extract_many(clips, batch_seconds=10), strict=True):
        expected = as_rvc_asks(torch, fairseq_model, clip, "v2")
        np.testing.assert_allclose(features, expected, atol=5e-5, rtol=0)


def test_padding_as_fairseq_does_it_is_what_fairseq_computes(
    torch: Any, original: tuple[Any, ContentvecModel]
) -> None:
    fairseq_model, model = original
    clips = [noise(samples, seed) for seed, samples in enumerate([16000, 18000, 20000])]
    source, mask = np.zeros((3, 20000), np.float32), np.ones((3, 20000), bool)
    for row, clip in enumerate(clips):
        source[row, : len(clip)] = clip
        mask[row, : len(clip)] = False
    with torch.no_grad():
        expected, frame_mask = fairseq_model.extract_features(
            source=torch.from_numpy(source), padding_mask=torch.from_numpy(mask), output_layer=12
        )
    batched = list(model.extract_many(clips, batch_seconds=10, padding="fairseq"))
    for row in range(3):
        valid = expected[row][~frame_mask[row]].numpy()
        np.testing.assert_allclose(batched[row], valid, atol=5e-5, rtol=0)
    # the longest is not padded; the others are heard with their padding
    alone = model.extract(clips[0])
    assert np.abs(batched[0][: len(alone)] - alone).max() > 1e-2
    np.testing.assert_allclose(batched[2], model.extract(clips[2]), atol=5e-5)


@given(
    st.lists(st.integers(400, 100_000), max_size=40),
    st.sampled_from([0, 1000, 50_000, 1_000_000]),
)
def test_batches_hold_every_clip_once_and_pad_little(lengths: list[int], limit: int) -> None:
    grouped = batches(lengths, limit)
    assert sorted(i for batch in grouped for i in batch) == list(range(len(lengths)))
    for batch in grouped:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= limit
        assert all(longest <= 1.25 * lengths[i] for i in batch)


def test_clips_of_one_length_share_a_batch() -> None:
    assert batches([5, 9, 5, 5, 9], 20) == [[0, 2, 3], [1, 4]]


def test_many_clips_are_taken_as_they_are_needed() -> None:
    taken = 0

    def clips() -> Iterator[np.ndarray]:
        nonlocal taken
        for seed in range(200):
            taken += 1
            yield noise(400, seed)

    features = random_model(TINY).extract_many(clips(), layer=1)
    next(features)
    assert taken == 64


def test_features_come_in_the_order_of_their_clips() -> None:
    model = random_model(TINY)
    clips = [noise(n) for n in (9000, 500, 9000, 4000)]
    shapes = [len(f) for f in model.extract_many(clips, layer=1, batch_seconds=5)]
    assert shapes == [TINY.frames(len(clip)) for clip in clips]


def test_a_batch_that_does_not_fit_is_taken_clip_by_clip() -> None:
    model = random_model(TINY)
    clips = [noise(16000, seed) for seed in range(3)]
    tight = list(model.extract_many(clips, layer=3, batch_seconds=60, max_memory=3 << 20))
    for clip, features in zip(clips, tight, strict=True):
        np.testing.assert_allclose(features, in_one_go(model, clip, output_layer=3), atol=2e-5)


@pytest.mark.fullsize
def test_the_full_size_model_gives_rvcs_features(
    torch: Any, fairseq: Any, standin: Path, converted_standin: Path, speech: Any
) -> None:
    models, _, _ = fairseq.checkpoint_utils.load_model_ensemble_and_task([str(standin)])
    model = ContentvecModel.from_file(converted_standin)
    waveform = speech(16000 * 5)
    original = models[0].float().eval()
    double = true_double(original)
    for version, width in (("v1", 256), ("v2", 768)):
        exact = as_rvc_asks(torch, double, waveform.astype(np.float64), version)
        # PyTorch's own float32 error is another on another CPU
        floor = np.abs(as_rvc_asks(torch, original, waveform, version) - exact).max()
        assert floor < 1e-4
        for max_memory in (None, 64 << 20):
            features = model.extract(waveform, version=version, max_memory=max_memory)
            assert features.shape == (249, width)
            assert np.abs(features - exact).max() < 1.5 * floor
