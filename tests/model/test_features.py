from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contentvec_parity.references.truth import true_double
from mlx_contentvec import features as features_module
from mlx_contentvec import memory
from mlx_contentvec.audio import read_audio
from mlx_contentvec.backend import mx
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import AudioError, BackendError, ConfigError, WeightsError
from mlx_contentvec.features import (
    BATCH_SECONDS,
    VERSIONS,
    FeatureKind,
    batches,
    extract,
    extract_many,
    feature_kind,
    stacks,
)
from mlx_contentvec.model import ContentvecModel
from mlx_contentvec.ops import cpu
from mlx_contentvec.ops import mlx as mlx_ops
from mlx_contentvec.rvc import Hubert
from tests.small_models import (
    CLOSE,
    CONFIGS,
    DEEP,
    TINY,
    in_one_go,
    least_memory,
    noise,
    random_model,
)

#: clips are stacked without padding on a CPU only
on_a_cpu = pytest.mark.skipif(memory.device_kind() != "cpu", reason="a CPU's way")


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
    features = model.extract(waveform, version=version, sample_rate=16000)
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
    least = least_memory(model, len(waveform))
    features = model.extract(waveform, version=version, max_memory=least, sample_rate=16000)
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
    features = extract(deep, waveform, sample_rate=16000)
    np.testing.assert_array_equal(
        features, extract(deep, waveform, version="v2", sample_rate=16000)
    )
    np.testing.assert_array_equal(features, extract(deep, waveform, layer=12, sample_rate=16000))
    np.testing.assert_array_equal(
        extract(deep, waveform, version="v1", sample_rate=16000),
        extract(deep, waveform, layer=9, project=True, sample_rate=16000),
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
    np.testing.assert_array_equal(
        extract(deep, mx.array(waveform), sample_rate=16000),
        extract(deep, waveform, sample_rate=16000),
    )


def test_a_model_that_wants_normalised_input_gets_it() -> None:
    model = random_model(CONFIGS["large"])
    waveform = noise(48000)
    features = extract(model, waveform, sample_rate=16000, layer=3)
    np.testing.assert_allclose(
        extract(model, waveform * 0.5 + 0.1, layer=3, sample_rate=16000), features, atol=1e-2
    )
    least = least_memory(model, len(waveform))
    streamed = extract(model, waveform, sample_rate=16000, layer=3, max_memory=least)
    np.testing.assert_allclose(streamed, features, atol=2e-5)


def test_features_the_model_does_not_have_are_refused() -> None:
    model = random_model(TINY)
    with pytest.raises(ConfigError, match="no layer 12"):
        extract(model, noise(16000), sample_rate=16000)
    with pytest.raises(ConfigError, match="version v1, layer 3"):
        extract(model, noise(16000), sample_rate=16000, version="v1", layer=3)
    with pytest.raises(ConfigError, match="no version 'v3'"):
        extract(model, noise(16000), sample_rate=16000, version="v3")
    with pytest.raises(ConfigError, match="which layer"):
        extract(model, noise(16000), sample_rate=16000, project=True)
    with pytest.raises(ConfigError, match="no final_proj"):
        FeatureKind(3, project=True).check(ModelConfig(final_dim=None))
    with pytest.raises(AudioError, match="too short"):
        extract(model, noise(399), sample_rate=16000, layer=3)


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
    batched = list(model.extract_many(clips, layer=3, batch_seconds=10, sample_rate=16000))
    for clip, features in zip(clips, batched, strict=True):
        np.testing.assert_allclose(features, in_one_go(model, clip, output_layer=3), atol=2e-5)


def test_batched_features_are_those_of_fairseq_alone(
    torch: Any, original: tuple[Any, ContentvecModel]
) -> None:
    fairseq_model, model = original
    clips = [noise(samples, seed) for seed, samples in enumerate(MIXED)]
    for clip, features in zip(
        clips, model.extract_many(clips, batch_seconds=10, sample_rate=16000), strict=True
    ):
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
    batched = list(
        model.extract_many(clips, batch_seconds=10, padding="fairseq", sample_rate=16000)
    )
    for row in range(3):
        valid = expected[row][~frame_mask[row]].numpy()
        np.testing.assert_allclose(batched[row], valid, atol=5e-5, rtol=0)
    # the longest is not padded; the others are heard with their padding
    alone = model.extract(clips[0], sample_rate=16000)
    assert np.abs(batched[0][: len(alone)] - alone).max() > 1e-2
    np.testing.assert_allclose(batched[2], model.extract(clips[2], sample_rate=16000), atol=5e-5)


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


@given(
    st.lists(st.sampled_from([0, 1]) | st.integers(400, 100_000), max_size=40),
    st.sampled_from([0, 1000, 50_000, 1_000_000]),
)
@example(lengths=[0], limit=1000)
def test_stacks_are_neighbours_and_as_large_as_they_may_be(lengths: list[int], limit: int) -> None:
    grouped = batches(lengths, limit, stacked=True)
    assert [i for batch in grouped for i in batch] == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in batch) for batch in grouped]
    for batch, samples in zip(grouped, sums, strict=True):
        assert len(batch) == 1 or samples <= limit
    for samples, following in zip(sums, grouped[1:], strict=False):
        assert samples + lengths[following[0]] > limit


@on_a_cpu
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_on_a_cpu_clips_of_any_length_share_one_pass_without_padding(
    version: str, deep: ContentvecModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 17 frames are one block of the positional convolution
    clips = [noise(400 + 320 * n, n) for n in (0, 1, 48, 15, 16, 17, 33, 34)]
    alone = [deep.extract(clip, sample_rate=16000, version=version) for clip in clips]
    rows: list[int] = []
    linear = cpu.linear

    def count(x: Any, *arguments: Any) -> Any:
        rows.append(x.reshape(-1, x.shape[-1]).shape[0])
        return linear(x, *arguments)

    monkeypatch.setattr(cpu, "linear", count)
    together = list(deep.extract_many(clips, sample_rate=16000, version=version))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.base is None
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert sum(map(len, alone)) in rows
    assert max(rows) == sum(map(len, alone))


@pytest.mark.parametrize("options", [{"batch_seconds": 0}, {"padding": "fairseq"}])
def test_clips_are_not_stacked_unasked(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(TINY)
    clips = [noise(16000), noise(16000, 1)]
    monkeypatch.setattr(features_module, "stacked", lambda *_: pytest.fail("stacked"))
    for _ in model.extract_many(clips, layer=1, sample_rate=16000, **options):
        pass


@on_a_cpu
def test_a_stack_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(TINY)
    clips = [noise(16000, seed) for seed in range(8)]
    sizes: list[int] = []
    stacked = features_module.stacked

    def count(walk: Any, config: Any, waveforms: Any, *kind: Any) -> Any:
        sizes.append(len(waveforms))
        return stacked(walk, config, waveforms, *kind)

    monkeypatch.setattr(features_module, "stacked", count)
    limit = memory.stacked_bytes(model.config, [16000] * 3)
    options = {"layer": 3, "sample_rate": 16000, "max_memory": limit}
    for clip, found in zip(clips, model.extract_many(clips, **options), strict=True):
        np.testing.assert_allclose(found, in_one_go(model, clip, output_layer=3), atol=2e-5)
    assert sizes == [2, 2, 2, 2]


@on_a_cpu
def test_a_model_whose_norms_see_their_batch_is_not_stacked() -> None:
    conditioned = random_model(replace(TINY, encoder_layers_1=1))
    assert stacks(random_model(TINY), "exact")
    assert not stacks(conditioned, "exact")


def test_an_array_must_say_its_sample_rate_and_what_has_one_need_not(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    model, waveform = random_model(TINY), noise(22050)
    soundfile.write(tmp_path / "song.wav", waveform, 22050, subtype="FLOAT")
    expected = model.extract(waveform, sample_rate=22050, layer=3)
    for source in (
        str(tmp_path / "song.wav"),
        tmp_path / "song.wav",
        read_audio(tmp_path / "song.wav"),
    ):
        np.testing.assert_array_equal(model.extract(source, layer=3), expected)
    songs = [tmp_path / "song.wav", waveform]
    for features in model.extract_many(songs, layer=3, sample_rate=22050):
        np.testing.assert_allclose(features, expected, atol=2e-5)
    with pytest.raises(AudioError, match="sample_rate="):
        model.extract(waveform, layer=3)
    with pytest.raises(AudioError, match="sample_rate="):
        next(model.extract_many([waveform], layer=3))


def test_arguments_that_mean_nothing_are_errors_of_this_project() -> None:
    model = random_model(TINY)
    layers: list[Any] = ["3", 2.0, True, 0, 4, float("nan"), 10**30]
    for layer in layers:
        with pytest.raises(ConfigError, match="no layer"):
            model.extract(noise(16000), sample_rate=16000, layer=layer)
        with pytest.raises(ConfigError, match="no layer"):
            model(noise(16000)[None], output_layer=layer)
    versions: list[Any] = [2, 0, "", ["v2"]]
    for version in versions:
        with pytest.raises(ConfigError, match="no version"):
            model.extract(noise(16000), sample_rate=16000, version=version)
    nan = float("nan")
    for arguments in (
        *({"max_memory": "800M"}, {"max_memory": nan}, {"batch_seconds": "10"}),
        *({"batch_seconds": nan}, {"batch_seconds": float("inf")}, {"batch_seconds": -1}),
    ):
        with pytest.raises(ConfigError, match="a number"):
            next(model.extract_many([noise(16000)], layer=3, sample_rate=16000, **arguments))
    several: list[Any] = ["song.wav", None, 3]
    for sources in several:
        with pytest.raises(ConfigError, match="several"):
            next(model.extract_many(sources, layer=3))
    with pytest.raises(AudioError, match=r"array\.T"):
        model.extract(noise(32000).reshape(2, -1), layer=3, sample_rate=16000)
    with pytest.raises(ConfigError, match="exact or fairseq"):
        next(model.extract_many([noise(16000)], layer=3, sample_rate=16000, padding="zeros"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_no_numbers_are_not_given(value: float) -> None:
    """Of damaged weights, or of float16 ones that overflow."""
    broken, clip, long = random_model(TINY), noise(4000), noise(160_000)
    bias = np.array(broken.encoder.layers[1].fc1.bias)
    bias[3] = value
    broken.update({"encoder": {"layers": [{}, {"fc1": {"bias": mx.array(bias)}}]}})
    options: dict[str, Any] = {"sample_rate": 16000, "layer": 2}
    stream = broken.live(layer=2, context=0.1)
    for ask in (
        lambda: broken.extract(clip, **options),
        lambda: broken.extract(long, max_memory=least_memory(broken, len(long)), **options),
        lambda: list(broken.extract_many([clip, clip[:3000]], **options)),
        lambda: stream.push(clip),
    ):
        with pytest.raises(WeightsError, match="not finite numbers") as refused:
            ask()
        assert "frames" in str(refused.value.found)
    assert np.isfinite(broken.extract(clip, sample_rate=16000, layer=1)).all()


def test_many_clips_are_taken_as_they_are_needed() -> None:
    taken = 0

    def clips() -> Iterator[np.ndarray]:
        nonlocal taken
        for seed in range(200):
            taken += 1
            yield noise(400, seed)

    features = random_model(TINY).extract_many(clips(), layer=1, sample_rate=16000)
    next(features)
    assert taken == 64


def test_features_come_in_the_order_of_their_clips() -> None:
    model = random_model(TINY)
    clips = [noise(n) for n in (9000, 500, 9000, 4000)]
    shapes = [
        len(f) for f in model.extract_many(clips, layer=1, batch_seconds=5, sample_rate=16000)
    ]
    assert shapes == [TINY.frames(len(clip)) for clip in clips]


def test_a_batch_that_does_not_fit_is_taken_clip_by_clip() -> None:
    model = random_model(TINY)
    clips = [noise(16000, seed) for seed in range(3)]
    limit = memory.whole_clip_bytes(model.config, 16000, batch=2)
    tight = list(
        model.extract_many(clips, layer=3, batch_seconds=60, max_memory=limit, sample_rate=16000)
    )
    for clip, features in zip(clips, tight, strict=True):
        np.testing.assert_allclose(features, in_one_go(model, clip, output_layer=3), atol=2e-5)


# ---- a GPU's memory ---------------------------------------------------------------


class FakeGpu:
    """MLX's account of a GPU's memory: freed buffers are kept, for arrays of their size only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: int = 0, kind: str = "metal") -> None:
        self.limit = 1 << 60
        self.live = held
        self.kept: list[int] = []
        self.most = 0
        self.limits: list[int] = []
        self.keeps = 1 << 60
        monkeypatch.setattr(memory, "device_kind", lambda: kind)
        monkeypatch.setattr("mlx_contentvec.features.device_kind", lambda: kind)
        monkeypatch.setattr(memory, "compute_dtype", lambda stored: stored)
        monkeypatch.setattr(
            memory.mx, "device_info", lambda: {"memory_size": 16 << 30}, raising=False
        )
        monkeypatch.setattr(memory.mx, "get_memory_limit", lambda: self.limit, raising=False)
        monkeypatch.setattr(memory.mx, "set_memory_limit", self.set_limit)
        monkeypatch.setattr(memory.mx, "set_cache_limit", self.set_cache_limit)
        monkeypatch.setattr(memory.mx, "get_active_memory", lambda: self.live)
        monkeypatch.setattr(memory.mx, "clear_cache", self.kept.clear)
        monkeypatch.setattr(memory.mx, "synchronize", self.synchronize)
        monkeypatch.setattr(memory, "_settled", 0)
        self.leavings = self.waits = 0

    def synchronize(self) -> None:
        self.live, self.leavings = self.live - self.leavings, 0
        self.waits += 1

    def set_limit(self, limit: int) -> int:
        before, self.limit = self.limit, limit
        self.limits.append(limit)
        return before

    def set_cache_limit(self, limit: int) -> int:
        before, self.keeps = self.keeps, limit
        return before

    def computes(self, size: int) -> None:
        """Take ``size`` bytes and free them."""
        if size in self.kept:
            self.kept.remove(size)
        while self.kept and self.live + sum(self.kept) + size > self.limit:
            self.kept.pop(0)
        self.most = max(self.most, self.live + sum(self.kept) + size)
        self.kept.append(size)


class Measured:
    """A model of which every pass takes memory of a :class:`FakeGpu`; ``fails`` may raise."""

    def __init__(self, model: ContentvecModel, gpu: FakeGpu, fails: Any = lambda shape: None):
        self.model, self.gpu, self.fails = model, gpu, fails
        self.config, self.layer_norm = model.config, model.layer_norm
        self.shapes: list[tuple[int, ...]] = []
        #: for each pass, what says which samples are padding
        self.treated: list[set[str]] = []

    def walk(self) -> Any:
        return self.model.walk()

    def __call__(self, source: Any, **options: Any) -> dict[str, Any]:
        self.shapes.append(source.shape)
        self.treated.append({"lengths", "padding_mask"} & options.keys())
        self.fails(source.shape)
        self.gpu.computes(400 * source.size)
        return self.model(source, **options)


def test_freed_buffers_of_many_lengths_count_against_the_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, held=100 << 20)
    model = Measured(random_model(TINY), gpu)
    clips = [noise(8000 + 40 * i) for i in range(40)]
    for _ in extract_many(
        model, clips, sample_rate=16000, layer=1, batch_seconds=0, max_memory=20 << 20
    ):
        # whoever takes the features has the process's own limit
        assert gpu.limit == 1 << 60
    assert gpu.most <= 120 << 20
    assert len(model.shapes) == 40
    for clip in clips:
        extract(model, clip, sample_rate=16000, layer=1, max_memory=20 << 20)
    assert gpu.most <= 120 << 20


def test_without_a_cap_a_gpu_holds_less_than_four_gigabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, held=500 << 20)
    extract(Measured(random_model(TINY), gpu), noise(8000), sample_rate=16000, layer=1)
    assert max(gpu.limits[:-1]) < 4 << 30
    assert gpu.limits[-1] == 1 << 60


def have_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with kernels of our own, as far as memory is reckoned."""
    FakeGpu(monkeypatch, kind="cuda")
    monkeypatch.setattr(memory, "convolves_on_tensor_cores", lambda d, layers: d == mx.float32)
    monkeypatch.setattr(memory, "attends_on_tensor_cores", lambda d, width: width == 64)


@pytest.mark.parametrize("stored", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_what_is_put_into_one_batch_fits(monkeypatch: pytest.MonkeyPatch, stored: Any) -> None:
    base = ModelConfig()
    for kind in ("metal", "cuda"):
        FakeGpu(monkeypatch, kind=kind)
        if kind == "cuda":
            have_tensor_cores(monkeypatch)
        for seconds in (2.0, 10.0, BATCH_SECONDS[kind]):
            clips, samples = int(BATCH_SECONDS[kind] // seconds), int(16000 * seconds)
            needed = memory.whole_clip_bytes(base, samples, clips, stored)
            assert needed <= memory.limit_of(None)
            assert memory.plan_chunks(base, samples, None, stored) is None
            # not so on CUDA without tensor cores
            most = memory.whole_clip_bytes(base, samples, clips)
            assert needed <= most
            assert (most <= memory.limit_of(None)) is (kind == "metal")


@pytest.mark.parametrize(
    ("stored", "clips", "seconds", "held"),
    [
        (mx.float32, 1, 60, 1534),
        (mx.float32, 12, 5, 1649),
        (mx.float32, 5, 15, 2050),
        (mx.float16, 1, 60, 1807),
        (mx.float16, 6, 10, 2504),
    ],
)
def test_a_pass_is_reckoned_to_take_what_an_h200_held(
    monkeypatch: pytest.MonkeyPatch, stored: Any, clips: int, seconds: int, held: int
) -> None:
    """MiB, 30 November 2026, MLX 0.32.4; each clip of a batch 20 ms shorter than the one before."""
    have_tensor_cores(monkeypatch)
    needed = memory.whole_clip_bytes(ModelConfig(), 16000 * seconds, clips, stored) / 2**20
    assert held <= needed <= 2 * held


def test_attention_of_a_kernel_of_our_own_holds_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    have_tensor_cores(monkeypatch)
    samples = 16000 * 600
    for heads, here in ((12, True), (24, False)):
        config = replace(ModelConfig(), encoder_attention_heads=heads)
        scores = int(4 * 2.25 * heads * config.frames(samples) ** 2)
        for stored in (mx.float32, mx.float16):
            # float32 scores also where the model is in half precision
            needed = memory.whole_clip_bytes(config, samples, stored=stored)
            assert needed < scores if here else needed == scores


@on_a_cpu
def test_a_cpu_computes_half_precision_in_single() -> None:
    single, half = (
        memory.whole_clip_bytes(TINY, 16000, stored=stored) for stored in (mx.float32, mx.float16)
    )
    assert single == half == memory.whole_clip_bytes(TINY, 16000)


@pytest.mark.parametrize("exhausted", [0, 1, 2])
def test_a_clip_that_fits_on_tensor_cores_is_not_streamed(
    monkeypatch: pytest.MonkeyPatch, exhausted: int
) -> None:
    have_tensor_cores(monkeypatch)
    tried: list[tuple[int, ...]] = []

    def fails(shape: tuple[int, ...]) -> None:
        tried.append(shape)
        if len(tried) <= exhausted:
            raise RuntimeError("out of memory")

    model = Measured(random_model(TINY), FakeGpu(monkeypatch, kind="cuda"), fails)
    limit = memory.whole_clip_bytes(TINY, 8000, stored=mx.float32)
    assert limit < memory.whole_clip_bytes(TINY, 8000)
    extract(model, noise(8000), sample_rate=16000, layer=1, max_memory=limit)
    # whole, and whole again; the third time in pieces
    assert tried == [(1, 8000)] * min(1 + exhausted, 2)


@pytest.mark.parametrize("clips", [1, 3])
def test_a_kernel_without_memory_for_its_trial_is_no_error_of_the_reckoning(
    monkeypatch: pytest.MonkeyPatch, clips: int
) -> None:
    have_tensor_cores(monkeypatch)

    def has_no_memory(*_: Any) -> bool:
        raise RuntimeError("cudaMallocAsync failed: out of memory")

    known = memory.whole_clip_bytes(TINY, 8000)
    monkeypatch.setattr(memory, "convolves_on_tensor_cores", has_no_memory)
    assert memory.whole_clip_bytes(TINY, 8000, stored=mx.float32) == known
    model = Measured(random_model(TINY), FakeGpu(monkeypatch, kind="cuda"))
    sources = [noise(8000, seed) for seed in range(clips)]
    assert len(list(extract_many(model, sources, sample_rate=16000, layer=1))) == clips


def test_nothing_is_tried_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    have_tensor_cores(monkeypatch)
    tried: list[Any] = []

    def refuses() -> None:
        raise BackendError("a fork")

    monkeypatch.setattr(memory, "convolves_on_tensor_cores", lambda *given: tried.append(given))
    monkeypatch.setattr(memory, "require_no_fork", refuses)
    model = Measured(random_model(TINY), FakeGpu(monkeypatch, kind="cuda"))
    with pytest.raises(BackendError, match="a fork"):
        extract(model, noise(8000), sample_rate=16000, layer=1)
    assert tried == []


def test_a_batch_too_large_for_the_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Measured(random_model(TINY), FakeGpu(monkeypatch))
    clips = [noise(8000, seed) for seed in range(8)]
    pair = memory.whole_clip_bytes(TINY, 8000, 2)
    list(extract_many(model, clips, sample_rate=16000, layer=1, max_memory=pair))
    assert model.shapes == [(2, 8000)] * 4


def test_a_limit_of_the_users_own_is_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.limit = 1 << 20
    extract(Measured(random_model(TINY), gpu), noise(8000), sample_rate=16000, layer=1)
    assert set(gpu.limits) == {1 << 20}


def test_threads_share_the_lowered_limit_and_the_last_sets_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)
    with memory.bounded(100):
        with memory.bounded(200):
            assert gpu.limit == 200
        assert gpu.limit == 200
    assert gpu.limit == 1 << 60
    with pytest.raises(KeyError), memory.bounded(100):
        raise KeyError
    assert gpu.limit == 1 << 60


def test_what_the_pass_before_has_not_let_go_of_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch, held=5 << 20)
    for leavings, more, live, waits in (
        (0, 0, 5, 1),  # the first time
        (0, 0, 5, 1),
        (30, 0, 5, 2),
        (0, 1, 6, 2),
        (0, 7, 13, 3),  # a user's own
        (0, 0, 13, 3),
        (0, -8, 5, 3),
        (8, 0, 5, 4),
    ):
        gpu.leavings = leavings << 20
        gpu.live += gpu.leavings + (more << 20)
        with memory.bounded(100):
            assert (gpu.limit, gpu.waits) == ((live << 20) + 100, waits)
            gpu.live += 9 << 20
            with memory.bounded(100):  # another thread's: what is live may be in work
                assert gpu.waits == waits
            gpu.live -= 9 << 20


@pytest.mark.parametrize(
    ("kind", "needed", "own", "keeps"),
    [
        ("cuda", 67, 1 << 60, 256 << 20),
        ("cuda", 66, 1 << 60, 1 << 60),
        ("cuda", 67, 1 << 20, 1 << 20),
        ("metal", 67, 1 << 60, 1 << 60),
    ],
)
def test_work_that_fills_its_limit_keeps_few_buffers(
    kind: str, needed: int, own: int, keeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, kind=kind)
    gpu.keeps = own
    with memory.bounded(100, needed):
        assert gpu.keeps == keeps
        with memory.bounded(100, 99 if kind == "cuda" else 0), memory.bounded(100):
            assert gpu.keeps == min(own, 256 << 20 if kind == "cuda" else own)
    assert gpu.keeps == own


@pytest.mark.parametrize(
    ("dtype", "few"), [(mx.float32, True), (mx.float16, False), (mx.bfloat16, False)]
)
@pytest.mark.parametrize("clips", [1, 3])
def test_half_precision_keeps_all_freed_buffers(
    dtype: mx.Dtype, few: bool, clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch, kind="cuda")
    seen: list[int] = []
    model = Measured(random_model(TINY), gpu, lambda shape: seen.append(gpu.keeps))
    model.layer_norm = random_model(TINY).layer_norm
    model.layer_norm.set_dtype(dtype)
    limit = memory.whole_clip_bytes(TINY, 8000, clips, dtype)
    assert (limit == memory.whole_clip_bytes(TINY, 8000, clips)) is few
    sources = [noise(8000, seed) for seed in range(clips)]
    list(extract_many(model, sources, sample_rate=16000, layer=1, max_memory=limit))
    assert seen == [256 << 20 if few else 1 << 60]


@pytest.mark.parametrize("call", ["one clip", "a batch", "hidden states"])
def test_the_embedder_of_rvc_is_bounded_too(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    gpu = FakeGpu(monkeypatch, held=1000)
    hubert = Hubert(random_model(TINY), max_memory=20 << 20)
    clip = noise(8000)[None]
    if call == "hidden states":
        hubert(clip, output_hidden_states=True)
    else:
        hubert.extract_features(clip if call == "one clip" else np.repeat(clip, 2, axis=0))
    assert gpu.limits == [1000 + (20 << 20), 1 << 60]


def refusing(fits: Any, message: str = "[malloc] Unable to allocate 9 bytes.") -> Any:
    """Raises as MLX does for shapes that do not fit."""

    def fails(shape: tuple[int, ...]) -> None:
        if not fits(shape):
            raise RuntimeError(message)

    return fails


OUT_OF_MEMORY = [
    "[malloc] Unable to allocate 123456 bytes.",
    "cudaMallocManaged failed: out of memory.",
    "[METAL] Command buffer execution failed: Insufficient Memory (00000008:"
    "kIOGPUCommandBufferCallbackErrorOutOfMemory)",
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed "
    "buffer size of 8 bytes.",
    "Cache thrashing is happening, please set the environment variable MLX_CUDA_CONV_CACHE_SIZE "
    "to a larger value than 128 to fix degraded performance.",
]


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_what_a_device_has_not_enough_for_is_tried_again_in_pieces(
    monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    model = random_model(TINY)
    expected = extract(model, noise(32000), sample_rate=16000, layer=3)
    gpu = FakeGpu(monkeypatch)
    measured = Measured(model, gpu, refusing(lambda _: False, message))
    features = extract(measured, noise(32000), sample_rate=16000, layer=3)
    np.testing.assert_allclose(features, expected, atol=2e-5, rtol=0)
    assert len(measured.shapes) == 2
    assert gpu.limits[-1] == 1 << 60


def test_once_the_kept_buffers_are_let_go_there_may_be_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.kept.append(1 << 30)
    measured = Measured(random_model(TINY), gpu, refusing(lambda _: not gpu.kept))
    extract(measured, noise(32000), sample_rate=16000, layer=3)
    assert len(measured.shapes) == 2


def test_a_batch_that_a_device_refuses_is_computed_clip_by_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(TINY)
    clips = [noise(8000, seed) for seed in range(3)]
    measured = Measured(model, FakeGpu(monkeypatch), refusing(lambda shape: shape[0] == 1))
    found = list(extract_many(measured, clips, sample_rate=16000, layer=3))
    assert measured.shapes == [(3, 8000), *[(1, 8000)] * 3]
    for clip, one in zip(clips, found, strict=True):
        np.testing.assert_allclose(one, in_one_go(model, clip, output_layer=3), atol=2e-5)


def test_what_fails_in_the_smallest_pieces_too_is_said_in_our_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = Measured(random_model(TINY), FakeGpu(monkeypatch), refusing(lambda _: False))

    def no_walk() -> Any:
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    monkeypatch.setattr(measured, "walk", no_walk)
    with pytest.raises(BackendError, match=r"not enough for 2\.0 s of audio") as raised:
        extract(measured, noise(32000), sample_rate=16000, layer=3)
    assert raised.value.found == "[malloc] Unable to allocate 9 bytes."


def test_other_errors_of_a_device_are_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = refusing(lambda _: False, "an illegal memory access was encountered")
    measured = Measured(random_model(TINY), FakeGpu(monkeypatch), failing)
    with pytest.raises(RuntimeError, match="illegal"):
        extract(measured, noise(32000), sample_rate=16000, layer=3)
    assert len(measured.shapes) == 1


@pytest.mark.parametrize("padding", ["exact", "fairseq"])
@pytest.mark.parametrize(("dtype", "planned"), [(mx.float32, False), (mx.float16, True)])
def test_half_precision_on_cuda_always_says_which_samples_are_padding(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, planned: bool, padding: Any
) -> None:
    model = random_model(TINY, dtype)
    clips = [noise(8200 + 7 * i, i) for i in range(5)]
    options: dict[str, Any] = {"sample_rate": 16000, "layer": 3}
    expected = [extract(model, clip, **options) for clip in clips]
    measured = Measured(model, FakeGpu(monkeypatch, kind="cuda"))
    monkeypatch.setattr(mlx_ops, "device_kind", lambda: "cuda")
    alone = list(extract_many(measured, clips, batch_seconds=0, padding=padding, **options))
    assert [bool(given) for given in measured.treated] == [planned] * len(clips)
    batched = list(extract_many(measured, clips, **options))
    assert measured.treated[-1]
    close = 2e-5 if memory.device_kind() == "cpu" else CLOSE["float16"]
    for one, other, known in zip(alone, batched, expected, strict=True):
        np.testing.assert_allclose(one, known, atol=close)
        np.testing.assert_allclose(other, known, atol=close)


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
            features = model.extract(
                waveform, version=version, max_memory=max_memory, sample_rate=16000
            )
            assert features.shape == (249, width)
            assert np.abs(features - exact).max() < 1.5 * floor
