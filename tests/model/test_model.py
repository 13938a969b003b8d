"""The model by itself: its shape, its refusals, and that batches do not change a clip."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import ContentvecModel, ModelConfig, memory, ops
from mlx_contentvec.backend import device_kind, mx, nn
from mlx_contentvec.config import PRESETS, parameter_shapes, stage_input, stage_names
from mlx_contentvec.errors import AudioError, ConfigError, WeightsError
from mlx_contentvec.hubert import Linear
from mlx_contentvec.inputs import normalize_waveform
from mlx_contentvec.memory import ChunkPlan
from mlx_contentvec.ops import cpu_hubert
from mlx_contentvec.ops import mlx as mlx_ops
from mlx_contentvec.streaming import streamed
from tests import small_models
from tests.small_models import random_model, random_weights

TINY = ModelConfig(
    conv_layers=((32, 10, 5), *(((32, 3, 2),) * 4), *(((32, 2, 2),) * 2)),
    encoder_embed_dim=48,
    encoder_ffn_embed_dim=96,
    encoder_layers=3,
    encoder_attention_heads=4,
    final_dim=16,
)
VARIANTS = {
    "base": TINY,
    "large": ModelConfig(
        **{**TINY.to_dict(), "extractor_norm": "layer", "layer_norm_first": True, "normalize": True}
    ),
    "conv bias": ModelConfig(**{**TINY.to_dict(), "conv_bias": True}),
    "batch norm": ModelConfig(**{**TINY.to_dict(), "conv_pos_batch_norm": True}),
    "speaker": ModelConfig(**{**TINY.to_dict(), "encoder_layers_1": 2, "speaker_dim": 8}),
}


def model(config: ModelConfig = TINY) -> ContentvecModel:
    return random_model(config)


def waveform(samples: int = 4000, seed: int = 1) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal(samples).astype(np.float32)


def speakers(config: ModelConfig, batch: int) -> dict[str, mx.array]:
    if not config.encoder_layers_1:
        return {}
    values = np.random.default_rng(5).standard_normal((batch, config.speaker_dim))
    return {"spk_emb": mx.array(values.astype(np.float32))}


class TestUsage:
    def test_the_usage_that_users_know_works_as_written(self, converted_tiny: Path) -> None:
        model = ContentvecModel.from_file(converted_tiny)
        model.load_weights(str(converted_tiny))
        model.eval()
        result = model(mx.array(waveform(16000))[None])
        features = result["x"]
        assert features.shape == (1, 49, model.config.encoder_embed_dim)
        assert result["padding_mask"] is None

    def test_the_default_model_is_the_one_in_hubert_base(self) -> None:
        assert ContentvecModel(encoder_layers_1=0).config == PRESETS["base"]

    @pytest.mark.parametrize("name", VARIANTS)
    def test_the_parameters_are_the_planned_ones(self, name: str) -> None:
        from mlx.utils import tree_flatten

        built = {
            name: tuple(array.shape)
            for name, array in tree_flatten(ContentvecModel(VARIANTS[name]).parameters())
        }
        assert built == parameter_shapes(VARIANTS[name])

    @pytest.mark.parametrize("samples", [400, 401, 719, 720, 721, 1040, 16000, 16001])
    def test_frames_follow_from_samples(self, samples: int) -> None:
        frames = model()(waveform(samples)[None])["x"].shape[1]
        assert frames == (samples - 400) // 320 + 1 == TINY.frames(samples)

    def test_building_a_model_leaves_the_random_numbers_alone(self) -> None:
        mx.random.seed(7)
        expected = mx.random.normal((3,))
        mx.random.seed(7)
        model()
        assert bool((mx.random.normal((3,)) == expected).all())

    def test_importing_the_package_needs_mlx_and_numpy_only(self) -> None:
        code = (
            "import sys; import mlx_contentvec.model; heavy = {'torch', 'click', 'rich', "
            "'huggingface_hub', 'safetensors', 'soundfile'} & set(sys.modules); "
            "assert not heavy, heavy"
        )
        root = Path(__file__).resolve().parents[2]
        subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


class TestLayers:
    def test_layers_are_counted_from_one(self) -> None:
        tiny, source = model(), mx.array(waveform())[None]
        stages = tiny.stage_outputs(source)
        for layer in (1, 2, 3):
            chosen = tiny(source, output_layer=layer)["x"]
            assert bool((chosen == stages[f"layer.{layer}"]).all())
        assert bool((tiny(source)["x"] == stages["layer.3"]).all())

    def test_v1_is_the_projection_of_its_layer(self) -> None:
        tiny, source = model(), mx.array(waveform())[None]
        projected = tiny(source, output_layer=2, project=True)["x"]
        assert projected.shape == (1, 12, 16)
        unprojected = tiny(source, output_layer=2)["x"]
        assert bool((projected == tiny.run_stage("final_proj", unprojected)).all())

    def test_the_call_that_rvc_makes_gives_the_same(self) -> None:
        tiny, source = model(), mx.array(waveform())[None]
        no_padding = mx.zeros(source.shape, mx.bool_)
        features, mask = tiny.extract_features(
            source=source, padding_mask=no_padding, output_layer=3
        )
        assert bool((features == tiny(source)["x"]).all())
        assert mask.shape == (1, 12)
        assert not bool(mask.any())

    @pytest.mark.parametrize("layer", [0, -1, 4])
    def test_a_layer_that_is_not_there_is_refused(self, layer: int) -> None:
        with pytest.raises(ConfigError, match=f"no layer {layer}"):
            model()(waveform()[None], output_layer=layer)

    def test_projecting_without_a_projection_is_refused(self) -> None:
        without = ModelConfig(**{**TINY.to_dict(), "final_dim": None})
        with pytest.raises(ConfigError, match="final_proj"):
            model(without)(waveform()[None], project=True)


class TestStages:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_stages_run_one_by_one_are_the_forward_pass(self, name: str) -> None:
        config = VARIANTS[name]
        built, source = model(config), mx.array(waveform())[None]
        conditions = speakers(config, 1)
        stages = built.stage_outputs(source, **conditions)
        assert list(stages) == list(stage_names(config))
        last = "final_norm" if config.layer_norm_first else f"layer.{len(built.encoder.layers)}"
        assert bool((stages[last] == built(source, **conditions)["x"]).all())
        for stage in stage_names(config)[1:]:
            alone = built.run_stage(stage, stages[stage_input(config, stage)], **conditions)
            assert bool((alone == stages[stage]).all()), stage

    @pytest.mark.parametrize("name", VARIANTS)
    def test_some_stages_are_those_among_all(self, name: str) -> None:
        built, source = model(VARIANTS[name]), mx.array(waveform())[None]
        conditions = speakers(VARIANTS[name], 1)
        stages = built.stage_outputs(source, **conditions)
        names = list(stages)
        for wanted in ({"conv.6"}, {"final_proj"}, {"layer.2", "projection"}, set(names[-2:])):
            some = built.stage_outputs(source, names=wanted, **conditions)
            assert list(some) == [stage for stage in names if stage in wanted]
            for stage, output in some.items():
                assert bool((output == stages[stage]).all()), stage

    def test_what_comes_behind_the_last_wanted_stage_is_not_computed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny, ran = model(), []
        walk = tiny.walk()

        class Watched:
            waveform = staticmethod(walk.waveform)

            @staticmethod
            def stages(**conditions: Any) -> Any:
                for name, stage in walk.stages(**conditions):
                    yield name, lambda x, name=name, stage=stage: (ran.append(name), stage(x))[1]

        monkeypatch.setattr(ContentvecModel, "walk", lambda *inputs: Watched)
        tiny.stage_outputs(waveform()[None], names=["layer.1"])
        assert ran[-1] == "layer.1"

    @pytest.mark.parametrize("names", [["layer.4"], ["layer.1", "colour"], [3]])
    def test_a_stage_that_is_not_there_is_refused(self, names: list[Any]) -> None:
        with pytest.raises(ConfigError, match="no stage") as caught:
            model().stage_outputs(waveform()[None], names=names)
        assert "conv.0" in str(caught.value)
        with pytest.raises(ConfigError, match=r"no stage 'layer\.4'"):
            model().run_stage("layer.4", np.zeros((1, 4, 48), np.float32))


class TestBatches:
    @pytest.mark.parametrize("name", ["base", "large", "conv bias", "batch norm"])
    def test_a_clip_among_longer_ones_gets_what_it_gets_alone(self, name: str) -> None:
        built = model(VARIANTS[name])
        clips = [waveform(samples, seed) for seed, samples in enumerate((4000, 2719, 400, 3333))]
        batch = np.full((4, 4000), 0.25, np.float32)
        for row, clip in zip(batch, clips, strict=True):
            row[: len(clip)] = clip
        result = built(batch, lengths=np.array([len(clip) for clip in clips]))
        for row, clip in enumerate(clips):
            alone = built(clip[None])["x"][0]
            frames = alone.shape[0]
            assert int((~result["padding_mask"][row]).sum()) == frames
            assert float(mx.abs(result["x"][row, :frames] - alone).max()) < 2e-5

    def test_the_originals_padding_rule_gives_another_mask_and_other_features(self) -> None:
        tiny = model()
        batch = np.stack([waveform(4000, 1), waveform(4000, 2)])
        padding = np.zeros((2, 4000), bool)
        padding[1, 2719:] = True
        batch[1, 2719:] = 0
        result = tiny(batch, padding_mask=mx.array(padding))
        alone = tiny(batch[1:, :2719])["x"][0]
        # 4000 = 12 frames x 333 samples; 8.2 of these blocks hold audio
        assert int((~result["padding_mask"][1]).sum()) == 9
        assert float(mx.abs(result["x"][1, : alone.shape[0]] - alone).max()) > 1e-2

    def test_a_silent_clip_is_finite(self) -> None:
        assert bool(mx.isfinite(model()(np.zeros((1, 4000), np.float32))["x"]).all())

    @pytest.mark.parametrize("lengths", [[4000], [4000, 399], [4000, 4001], [4000.0, 3000.0]])
    def test_impossible_lengths_are_refused(self, lengths: list[Any]) -> None:
        with pytest.raises(AudioError, match="length"):
            model()(np.stack([waveform(), waveform()]), lengths=np.array(lengths))

    def test_nothing_but_padding_is_refused(self) -> None:
        with pytest.raises(AudioError, match="nothing but padding"):
            model()(waveform()[None], padding_mask=mx.ones((1, 4000), mx.bool_))


class TestNormalisedInput:
    @pytest.mark.parametrize("level", [1.0, 1e-3])
    def test_each_clip_is_brought_to_zero_mean_and_unit_variance(self, level: float) -> None:
        clips = level * np.stack([waveform(4000, 1) + 0.5, waveform(4000, 2)])
        clips[1, 2719:] = 77.0
        lengths = [4000, 2719]
        got = np.array(normalize_waveform(mx.array(clips), 1e-5, mx.array(lengths)))
        for row, length in enumerate(lengths):
            exact = clips[row, :length].astype(np.float64)
            expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
            assert np.abs(got[row, :length] - expected).max() < 1e-6
            assert not got[row, length:].any()

    def test_a_normalising_model_is_given_the_waveform_as_it_is(self) -> None:
        large = model(VARIANTS["large"])
        raw = mx.array(0.5 * waveform()[None] + 0.2)
        assert float(mx.abs(large(raw)["x"] - large(mx.array(waveform()[None]))["x"]).max()) < 1e-4
        first = large.run_stage("conv.0", normalize_waveform(raw, 1e-5))
        assert bool((large.stage_outputs(raw)["conv.0"] == first).all())

    def test_what_the_caller_normalised_is_used_as_it_is(self) -> None:
        large = model(VARIANTS["large"])
        raw = 0.5 * waveform()[None] + 0.2
        ready = normalize_waveform(mx.array(raw), 1e-5)
        expected = large(raw)["x"]
        assert bool((large(ready, normalized=True)["x"] == expected).all())
        stages = large.stage_outputs(ready, names=["final_norm"], normalized=True)
        assert bool((stages["final_norm"] == expected).all())
        assert float(mx.abs(large(raw, normalized=True)["x"] - expected).max()) > 1e-2

    @pytest.mark.parametrize("eps", [1e-5, 1e-7])
    @pytest.mark.parametrize("way", ["called", "traced", "in one go", "in pieces", "together"])
    def test_quiet_audio_is_normalised_with_the_epsilon_of_the_configuration(
        self, way: str, eps: float
    ) -> None:
        config = ModelConfig.from_dict({**VARIANTS["large"].to_dict(), "normalize_eps": eps})
        large, quiet = model(config), 1e-3 * waveform(16000)
        exact = quiet.astype(np.float64)
        ready = ((exact - exact.mean()) / np.sqrt(exact.var() + eps)).astype(np.float32)
        expected = np.array(large(ready[None], normalized=True, output_layer=3)["x"][0])
        if way == "called":
            got = np.array(large(quiet[None], output_layer=3)["x"][0])
        elif way == "traced":
            (traced,), _ = mx.vjp(
                lambda clip: [large(clip, output_layer=3)["x"]],
                [mx.array(quiet[None])],
                [mx.zeros((1, *expected.shape))],
            )
            got = np.array(traced[0])
        elif way == "in one go":
            got = large.extract(quiet, sample_rate=16000, layer=3)
        elif way == "in pieces":
            plan = ChunkPlan(frames=16, heads=2, queries=8)
            got = streamed(large.walk(), config, quiet, 3, False, plan)
        else:
            clips = [quiet, quiet[:8000]]
            got = next(iter(large.extract_many(clips, sample_rate=16000, layer=3)))
        assert np.abs(got - expected).max() < 1e-4

    def test_it_matters_to_the_base_model(self) -> None:
        base = model()
        assert (
            float(mx.abs(base(waveform()[None])["x"] - base(1e-3 * waveform()[None])["x"]).max())
            > 1e-2
        )


def fairseq_batch(clips: list[np.ndarray]) -> tuple[Any, Any]:
    """What fairseq's own loader makes of clips for a model that wants normalised input."""
    import torch
    from fairseq.data.audio.raw_audio_dataset import RawAudioDataset

    loader = RawAudioDataset(16000, pad=True, normalize=True, shuffle=False)
    samples = [
        {"id": i, "source": loader.postprocess(torch.from_numpy(clip), 16000)}
        for i, clip in enumerate(clips)
    ]
    batch = loader.collater(samples)["net_input"]
    return batch["source"], batch["padding_mask"]


@pytest.fixture(scope="module")
def normalising(fairseq: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """fairseq's model on normalised input, with conv bias: its checkpoint, and that converted."""
    from contentvec_convert.conversion import convert
    from tests.originals import TINY_LARGE, fairseq_hubert, save_fairseq

    folder = tmp_path_factory.mktemp("normalising")
    config = dataclasses.replace(TINY_LARGE, conv_bias=True)
    original = fairseq_hubert(config)
    checkpoint = save_fairseq(original, config, folder / "a.pt")
    convert(checkpoint, folder / "a.safetensors", allow_unknown=True)
    return original, checkpoint, folder / "a.safetensors"


class TestPaddedBatchesOfNormalisedInput:
    """fairseq's loader normalises each clip, then pads."""

    LENGTHS = (8000, 7000, 6400)

    def padded(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        clips = [0.1 * waveform(n, n) + 0.3 for n in self.LENGTHS]
        batch, mask = np.full((3, 8000), 7.0, np.float32), np.ones((3, 8000), bool)
        for row, clip in enumerate(clips):
            batch[row, : len(clip)], mask[row, : len(clip)] = clip, False
        return clips, batch, mask

    @pytest.mark.parametrize("traced", [False, True])
    def test_they_get_what_fairseq_computes(self, normalising: Any, traced: bool) -> None:
        import torch

        original, _, converted = normalising
        clips, batch, mask = self.padded()
        source, padding = fairseq_batch(clips)
        np.testing.assert_array_equal(padding.numpy(), mask)
        with torch.no_grad():
            expected, frames = original.extract_features(source=source, padding_mask=padding)
        ours = ContentvecModel.from_file(converted)
        if traced:
            got, _ = mx.vjp(
                lambda x: ours(x, padding_mask=mask)["x"],
                [mx.array(batch)],
                [mx.zeros(tuple(expected.shape))],
            )
            features = got[0]
        else:
            features = ours(batch, padding_mask=mask)["x"]
        kept = ~frames.numpy()
        difference = np.abs(np.array(features) - expected.numpy())[kept]
        # what a gradient traces is summed in plain float32, with an offset of 0.3
        assert difference.max() < (5e-4 if traced else 5e-5)

    def test_so_do_batches_of_extract_many(self, normalising: Any) -> None:
        import torch

        original, _, converted = normalising
        clips, _, _ = self.padded()
        source, padding = fairseq_batch(clips)
        with torch.no_grad():
            expected, frames = original.extract_features(
                source=source, padding_mask=padding, output_layer=3
            )
        ours = ContentvecModel.from_file(converted)
        batched = ours.extract_many(
            clips, sample_rate=16000, layer=3, batch_seconds=10, padding="fairseq"
        )
        for features, row, padded in zip(batched, expected, frames, strict=True):
            np.testing.assert_allclose(features, row[~padded].numpy(), atol=5e-5, rtol=0)

    @pytest.mark.parametrize("name", ["fairseq", "transformers"])
    def test_every_reference_of_a_parity_run_is_given_the_same(
        self, normalising: Any, name: str
    ) -> None:
        from contentvec_parity.inputs import Clip
        from contentvec_parity.references import open_reference

        _, checkpoint, _ = normalising
        clips, batch, mask = self.padded()
        source, _ = fairseq_batch(clips)
        given = open_reference(name, checkpoint).model_input(Clip("batch", batch, "", {}, mask))
        np.testing.assert_array_equal(given, source.numpy())

    def test_the_reference_asks_fairseqs_own_loader(
        self, normalising: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fairseq.data.audio.raw_audio_dataset import RawAudioDataset

        from contentvec_parity.inputs import Clip
        from contentvec_parity.references import fairseq as reference

        clip = Clip("one", waveform()[None], "")
        original = reference.open(normalising[1])
        before = original.model_input(clip)
        postprocess = RawAudioDataset.postprocess
        monkeypatch.setattr(RawAudioDataset, "postprocess", lambda *given: 2 * postprocess(*given))
        np.testing.assert_array_equal(original.model_input(clip), 2 * before)

    def test_padding_before_or_between_samples_is_refused(self) -> None:
        large = model(VARIANTS["large"])
        mask = np.zeros((1, 4000), bool)
        mask[0, :400] = True
        with pytest.raises(AudioError, match="before or between samples"):
            large(waveform()[None], padding_mask=mask)

    def test_nothing_but_padding_is_refused(self) -> None:
        with pytest.raises(AudioError, match="nothing but padding"):
            model(VARIANTS["large"])(waveform()[None], padding_mask=np.ones((1, 4000), bool))


class TestSpeakerConditioning:
    def test_the_speaker_moves_the_features(self) -> None:
        config = VARIANTS["speaker"]
        built, source = model(config), waveform()[None]
        one = built(source, **speakers(config, 1))["x"]
        other = built(source, spk_emb=mx.ones((1, 8)))["x"]
        assert float(mx.abs(one - other).max()) > 1e-2

    def test_a_conditioned_model_without_a_speaker_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="needs a speaker embedding"):
            model(VARIANTS["speaker"])(waveform()[None])
        with pytest.raises(ConfigError, match=r"\(1, 8\)"):
            model(VARIANTS["speaker"])(waveform()[None], spk_emb=mx.ones((1, 9)))

    def test_a_plain_model_ignores_a_speaker_with_a_warning(self) -> None:
        expected = np.array(model()(waveform()[None])["x"])
        with pytest.warns(UserWarning, match="spk_emb is ignored") as caught:
            x = model()(waveform()[None], spk_emb=mx.ones((1, 8)))["x"]
        np.testing.assert_array_equal(np.array(x), expected)
        assert caught[0].filename == __file__


#: what a library or a file may give in the place of a plain array of float32
LAYOUTS: dict[str, Any] = {
    "big-endian": lambda array: array.astype(">f4"),
    "big-endian float64": lambda array: array.astype(">f8"),
    "long double": lambda array: array.astype(np.longdouble),
    "backwards": lambda array: np.ascontiguousarray(array[:, ::-1])[:, ::-1],
    "strided": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "by columns": np.asfortranarray,
    "masked nowhere": np.ma.masked_array,
}


class TestRefusedInput:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (np.zeros((1, 399), np.float32), "399 samples"),
            (np.zeros((1, 0), np.float32), "too short"),
            (np.zeros((0, 4000), np.float32), "no clip"),
            (np.zeros(4000, np.float32), "wrong rank"),
            (np.zeros((1, 2, 4000), np.float32), "wrong rank"),
            (np.zeros((1, 4000), np.int16), "not floating point"),
            (np.full((1, 4000), np.nan, np.float32), "NaN"),
            (np.full((1, 4000), 0x7FF0_0000_0000_0001, np.uint64).view(np.float64), "NaN"),
            (np.full((1, 4000), 1e300), "out of scale"),
            (np.where(np.arange(4000) == 3999, np.inf, 0).astype(np.float32)[None], "NaN or inf"),
            (32768 * waveform()[None], "out of scale"),
            ([[0.0] * 4000], "must be an array"),
            (np.zeros((1, 4000), object), "no numbers"),
            (np.full((1, 4000), "a"), "no numbers"),
            (np.zeros((1, 4000), "f4,f4"), "no numbers"),
            (np.zeros((1, 4000), complex), "not floating point"),
            (np.ma.masked_less(waveform()[None], 0), "masked values"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.filterwarnings("error")
    def test_each_says_what_is_wrong(self, source: Any, message: str) -> None:
        with pytest.raises(AudioError, match=message):
            model()(source)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_layout_of_an_array_is_read(self, layout: str) -> None:
        tiny, given = model(VARIANTS["speaker"]), LAYOUTS[layout]
        source, embedding = np.stack([waveform(), waveform(seed=2)]), np.ones((2, 8), np.float32)
        mask = np.arange(4000)[None] >= np.array([[4000], [3000]])
        wanted = tiny(source, mx.array(embedding), mx.array(mask))
        got = tiny(given(source), given(embedding), given(mask.astype(np.float32)))
        assert bool((got["x"] == wanted["x"]).all())
        lengths = np.array([4000, 3000])
        wanted = tiny(source, mx.array(embedding), lengths=lengths)
        got = tiny(given(source), given(embedding), lengths=lengths.astype(">i4")[::-1][::-1])
        assert bool((got["x"] == wanted["x"]).all())
        stage = np.array(tiny.stage_outputs(source, spk_emb=mx.array(embedding))["conv.6"])
        wanted = tiny.run_stage("projection", mx.array(stage))
        assert bool((tiny.run_stage("projection", given(stage)) == wanted).all())

    @pytest.mark.parametrize("options", [{"padding_mask": "a"}, {"padding_mask": [[0], [0, 1]]}])
    def test_a_mask_that_is_no_array_is_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(AudioError, match="the padding mask cannot be read as an array"):
            model()(waveform()[None], **options)

    @pytest.mark.parametrize("lengths", [[[1], [2, 3]], ["a"], [None], {}, [2**70]])
    def test_lengths_that_are_no_array_are_refused(self, lengths: Any) -> None:
        with pytest.raises(AudioError, match="lengths cannot be read as an array"):
            model()(waveform()[None], lengths=lengths)

    @pytest.mark.parametrize("values", [np.nan, np.inf, np.float64(1e300)])
    def test_a_speaker_that_is_not_finite_is_refused(self, values: float) -> None:
        with pytest.raises(ConfigError, match="spk_emb holds NaN or infinity"):
            model(VARIANTS["speaker"])(waveform()[None], np.full((1, 8), values))

    @pytest.mark.parametrize(
        ("stage", "shape"),
        [
            ("conv.0", (4000,)),
            ("conv.0", (1, 9)),
            ("conv.1", (1, 2, 32)),
            ("conv.1", (1, 100, 31)),
            ("projection", (1, 12, 48)),
            ("positional", (0, 12, 48)),
            ("layer.1", (1, 4000)),
            ("layer.1", (1, 0, 48)),
            ("final_proj", (1, 12, 16)),
        ],
    )
    def test_a_stage_names_the_input_that_it_reads(
        self, stage: str, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(AudioError, match=f"{stage} cannot read this input"):
            model().run_stage(stage, np.zeros(shape, np.float32))

    def test_float64_and_half_precision_input_are_fine(self) -> None:
        tiny, source = model(), waveform()[None]
        assert bool((tiny(source.astype(np.float64))["x"] == tiny(source)["x"]).all())
        assert tiny(mx.array(source).astype(mx.float16))["x"].dtype == mx.float32


class TestWeights:
    def test_a_model_without_weights_does_not_run(self) -> None:
        with pytest.raises(WeightsError, match="no weights yet"):
            ContentvecModel(TINY)(waveform()[None])

    @pytest.mark.parametrize("change", ["set_dtype", "layers", "quantize"])
    def test_nor_does_one_that_was_only_changed(self, change: str) -> None:
        built = ContentvecModel(small_models.TINY)
        if change == "set_dtype":
            built.set_dtype(mx.float16)
        elif change == "layers":
            for module in built.modules()[1:]:
                module.set_dtype(mx.float16)
        else:
            nn.quantize(built.encoder, group_size=32, bits=8)
        with pytest.raises(WeightsError, match="no weights yet"):
            built(waveform()[None])

    @pytest.mark.parametrize("strict", [True, False])
    def test_layers_that_were_changed_before_are_loaded_like_others(self, strict: bool) -> None:
        arrays = random_weights(TINY)
        built = ContentvecModel(TINY)
        built.encoder.set_dtype(mx.float16)
        # what is freed now may leave its place in memory to what is loaded
        gc.collect()
        if strict:
            built.load_weights(list(arrays.items()))
        else:
            inside = {name for name in arrays if name.startswith("encoder.")}
            rest = [pair for pair in arrays.items() if pair[0] not in inside]
            built.load_weights(rest, strict=False)
            with pytest.raises(WeightsError, match=r"parameters never loaded: encoder\."):
                built(waveform()[None])
            built.load_weights([(name, arrays[name]) for name in inside], strict=False)
        source = waveform()[None]
        assert bool((built(source)["x"] == model()(source)["x"]).all())

    def test_a_single_parameter_left_out_is_named_and_nothing_is_loaded(self) -> None:
        arrays = random_weights(TINY)
        del arrays["encoder.layers.1.fc1.bias"]
        built = ContentvecModel(TINY)
        with pytest.raises(WeightsError, match=r"1 missing: encoder\.layers\.1\.fc1\.bias"):
            built.load_weights(list(arrays.items()))
        with pytest.raises(WeightsError, match="no weights yet"):
            built(waveform()[None])
        built.load_weights(list(arrays.items()), strict=False)
        with pytest.raises(WeightsError, match=r"encoder\.layers\.1\.fc1\.bias"):
            built(waveform()[None])

    def test_a_surplus_or_misshapen_tensor_is_named(self) -> None:
        arrays = {**random_weights(TINY), "extra": mx.zeros((1,))}
        with pytest.raises(WeightsError, match="1 not in the model: extra"):
            ContentvecModel(TINY).load_weights(list(arrays.items()))
        arrays = {**random_weights(TINY), "layer_norm.bias": mx.zeros((31,))}
        with pytest.raises(WeightsError, match=r"layer_norm.bias \(31,\) instead of \(32,\)"):
            ContentvecModel(TINY).load_weights(list(arrays.items()), strict=False)

    @pytest.mark.parametrize("name", ["encoder.layers.1.fc1.weight", "layer_norm.bias"])
    @pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.bool_, mx.complex64])
    def test_a_tensor_that_is_not_floating_point_is_named(self, name: str, dtype: Any) -> None:
        arrays = random_weights(TINY)
        arrays[name] = arrays[name].astype(dtype)
        with pytest.raises(WeightsError, match=f"1 of another type: {name} {dtype}"):
            ContentvecModel(TINY).load_weights(list(arrays.items()), strict=False)

    def test_a_quantised_weight_is_taken_for_nothing_else(self, tmp_path: Path) -> None:
        quantised = random_model(small_models.QUANTISABLE)
        nn.quantize(quantised, group_size=32, bits=8)
        path = tmp_path / "saved.safetensors"
        quantised.save(path)
        arrays, metadata = mx.load(str(path), return_metadata=True)
        name = "encoder.layers.1.fc1.weight"
        for dtype in (mx.float32, mx.int32):
            changed = {**arrays, name: arrays[name].view(dtype)}
            mx.save_safetensors(str(path), changed, metadata)
            with pytest.raises(WeightsError, match=f"1 of another type: {name} {dtype}"):
                ContentvecModel.from_file(path)
        mx.save_safetensors(str(path), arrays, metadata)
        ContentvecModel.from_file(path)

    @pytest.mark.parametrize(
        "given",
        [
            None,
            3,
            ["layer_norm.bias"],
            [("layer_norm.bias", np.zeros(32, np.float32))],
            [("layer_norm.bias", [0.0] * 32)],
            [(3, mx.zeros(32))],
        ],
        ids=["nothing", "a number", "names", "numpy", "lists", "numbers for names"],
    )
    def test_what_are_no_weights_is_refused(self, given: Any) -> None:
        with pytest.raises(WeightsError, match="weights are a file, or names with arrays"):
            ContentvecModel(TINY).load_weights(given, strict=False)

    def test_plain_mlx_loading_fills_the_model_too(self, converted_tiny: Path) -> None:
        import mlx.nn as nn

        ours = ContentvecModel.from_file(converted_tiny)
        plain = ContentvecModel(ours.config)
        nn.Module.load_weights(plain, str(converted_tiny), strict=True)
        source = waveform()[None]
        assert float(mx.abs(ours(source)["x"] - plain(source)["x"]).max()) < 1e-5

    @pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
    def test_a_weight_replaced_after_loading_is_the_one_that_is_used(self, part: str) -> None:
        tiny, source = model(), mx.array(waveform())[None]
        before = tiny(source, output_layer=1)["x"]
        attention = tiny.encoder.layers[0].self_attn
        attention.update({part: {"weight": 2 * attention[part].weight}})
        assert float(mx.abs(tiny(source, output_layer=1)["x"] - before).max()) > 1e-3

    def test_a_weight_changed_in_place_is_the_one_that_is_used(self) -> None:
        from mlx.utils import tree_flatten

        source = mx.array(waveform())[None]
        weights = random_weights(TINY)
        tiny = ContentvecModel(TINY)
        tiny.load_weights([(name, weight + 0) for name, weight in weights.items()])
        before = tiny(source)["x"]
        unmoved = []
        for name, parameter in tree_flatten(tiny.parameters()):
            parameter *= 1.5
            got = tiny(source)["x"]
            weights[name] = weights[name] * 1.5
            other = ContentvecModel(TINY)
            other.load_weights(list(weights.items()))
            assert float(mx.abs(got - other(source)["x"]).max()) < 1e-4, name
            if float(mx.abs(got - before).max()) < 1e-6:
                unmoved.append(name.rpartition(".")[0].rpartition(".")[2])
            before = got
        # a constant added to every key's score, and what features do not read
        assert set(unmoved) <= {"k_proj", "final_proj", ""}, unmoved

    def test_another_dtype_reaches_every_weight_that_is_used(self) -> None:
        from mlx.utils import tree_flatten

        tiny, source = model(), mx.array(waveform())[None]
        exact = tiny(source)["x"]
        tiny.set_dtype(mx.float16)
        assert {array.dtype for _, array in tree_flatten(tiny.parameters())} == {mx.float16}
        half = tiny(source)["x"]
        assert half.dtype == mlx_ops.compute_dtype(mx.float16)
        assert 1e-5 < float(mx.abs(half - exact).max()) < 0.05

    def test_what_cannot_fit_is_refused_before_it_is_tried(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if device_kind() != "cpu":
            pytest.skip("needs a CPU: mx.set_default_device(mx.cpu)")
        tiny, source = model(), waveform()[None]
        monkeypatch.setattr(memory, "process_memory", lambda: 1000)
        with pytest.raises(AudioError, match="in one go") as caught:
            tiny(source)
        assert "model.extract" in str(caught.value)
        monkeypatch.setattr(memory, "process_memory", lambda: None)
        tiny(source)

    def test_the_memory_of_a_process_is_bounded_by_its_limit(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import resource

        assert (memory.process_memory() or 0) > 1 << 30
        # a real limit would end a process that has CUDA loaded
        limits = {resource.RLIMIT_AS: (9 << 20, resource.RLIM_INFINITY)}
        monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
        assert memory.process_memory() == 9 << 20

    def test_a_cpu_computes_half_precision_weights_in_float32(self) -> None:
        if device_kind() != "cpu":
            pytest.skip("needs a CPU: mx.set_default_device(mx.cpu)")
        tiny, source = model(), mx.array(waveform())[None]
        tiny.set_dtype(mx.bfloat16)
        half = tiny(source)["x"]
        tiny.set_dtype(mx.float32)
        assert float(mx.abs(half - tiny(source)["x"]).max()) == 0

    @pytest.mark.parametrize("bits", [8, 4])
    def test_a_quantised_layer_is_what_mlx_makes_of_it(self, bits: int) -> None:
        mx.random.seed(0)
        linear = Linear(64, 32)
        linear.update({"weight": mx.random.normal((32, 64)), "bias": mx.random.normal((32,))})
        quantised, x = linear.to_quantized(32, bits), mx.random.normal((2, 5, 64))
        expected = quantised(x)
        close = 1e-6 * float(mx.abs(expected).max())
        prepared, given = cpu_hubert.Linear(quantised), np.array(x)
        assert np.abs(prepared(given) - np.array(expected)).max() < close
        for layer in (
            prepared.output_slice(slice(8, 24)),
            mlx_ops.output_slice(quantised, slice(8, 24)),
        ):
            some = layer(given if layer.__module__.endswith("cpu_hubert") else x)
            assert float(mx.abs(mx.array(some) - expected[..., 8:24]).max()) < close

    def test_long_input_runs_a_stage_at_a_time_and_can_still_be_traced(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny, source = model(), mx.array(waveform())[None]
        plain = tiny(source)["x"]
        monkeypatch.setattr(ops, "PIPELINED_SAMPLES", 0)
        for module in (ops, mlx_ops):
            monkeypatch.setattr(module, "device_kind", lambda: "metal")
        # here it would be compiled for the CPU, by a C++ compiler that need not be there
        monkeypatch.setattr(mlx_ops, "_compiled", lambda function: function)
        assert float(mx.abs(tiny(source)["x"] - plain).max()) < 1e-4
        gradient = mx.grad(lambda clip: tiny(clip)["x"].sum())(source)
        assert bool(mx.isfinite(gradient).all())

    def test_a_gpu_starts_before_all_of_a_short_clip_is_described(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[mx.array] = []
        monkeypatch.setattr(ops.Pipeline, "add", lambda _, x: started.append(x))
        for module in (ops, mlx_ops):
            monkeypatch.setattr(module, "device_kind", lambda: "metal")
        monkeypatch.setattr(mlx_ops, "_compiled", lambda function: function)
        tiny = model()
        tiny(waveform()[None])
        stages = len(stage_names(tiny.config)) - ("final_proj" in tiny)
        assert len(started) == stages // 2

    @pytest.mark.parametrize(("waits", "held"), [(False, 1100), (True, 1000), (False, 1101)])
    def test_a_stage_waits_for_an_earlier_one_where_memory_is_nearly_full(
        self, waits: bool, held: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was there before the pass does not count: another model in the process."""
        waited: list[mx.array] = []
        live = [1000]
        monkeypatch.setattr(mx, "get_active_memory", lambda: live[0])
        monkeypatch.setattr(mx, "get_memory_limit", lambda: 1150, raising=False)
        monkeypatch.setattr(mx, "eval", waited.append)
        pipeline = ops.Pipeline(waits)
        live[0] = held
        first, second = mx.zeros(1), mx.ones(1)
        pipeline.add(first)
        pipeline.add(second)
        assert [one is first for one in waited] == [True] * (waits or held > 1100)

    @pytest.mark.parametrize(
        ("kind", "dtype", "seconds"),
        [
            ("cuda", mx.float32, 20),
            ("cuda", mx.float16, 80),
            ("cuda", mx.bfloat16, 80),
            ("metal", mx.float16, 20),
        ],
    )
    def test_the_length_from_which_a_gpu_waits_between_stages(
        self, kind: str, dtype: mx.Dtype, seconds: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (ops, mlx_ops):
            monkeypatch.setattr(module, "device_kind", lambda: kind)
        assert not ops.waits_between_stages(seconds * 16000, dtype)
        assert ops.waits_between_stages(seconds * 16000 + 1, dtype)

    def test_one_layer_can_be_trained_while_the_rest_is_frozen(self) -> None:
        import mlx.nn as nn

        tiny, source = model(), mx.array(waveform())[None]
        tiny.freeze()
        linear = tiny.encoder.layers[1].fc1
        linear.unfreeze()

        def loss(tiny: ContentvecModel) -> mx.array:
            features = tiny(source)["x"]
            return (features * mx.sin(mx.arange(features.shape[-1]))).sum()

        _, gradients = nn.value_and_grad(tiny, loss)(tiny)
        gradient = np.array(gradients["encoder"]["layers"][1]["fc1"]["weight"])
        row, column = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        nudge = np.zeros(gradient.shape, np.float32)
        nudge[row, column] = 1e-2
        weight, losses = linear.weight, []
        for step in (mx.array(nudge), -mx.array(nudge)):
            linear.weight = weight + step
            losses.append(float(loss(tiny)))
        slope = (losses[0] - losses[1]) / 2e-2
        assert abs(slope - gradient[row, column]) < 0.02 * abs(slope)

    def test_a_file_of_another_model_is_told_by_its_configuration(
        self, converted_tiny: Path
    ) -> None:
        config = ContentvecModel.from_file(converted_tiny).config
        heads = ModelConfig(**{**config.to_dict(), "encoder_attention_heads": 8})
        with pytest.raises(WeightsError, match=r"encoder_attention_heads 4 \(this model: 8\)"):
            ContentvecModel(heads).load_weights(converted_tiny)
        with pytest.raises(WeightsError, match="encoder_layers 3"):
            ContentvecModel(encoder_layers_1=0).load_weights(converted_tiny)

    def test_what_is_no_converted_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="no such file"):
            ContentvecModel(TINY).load_weights(tmp_path / "none.safetensors")
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(WeightsError, match="not a regular file"):
            ContentvecModel(TINY).load_weights(tmp_path / "pipe.safetensors")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"\x00" * 64)
        with pytest.raises(WeightsError, match="not a readable safetensors file"):
            ContentvecModel(TINY).load_weights(broken)
        foreign = tmp_path / "foreign.safetensors"
        mx.save_safetensors(str(foreign), {"weight": mx.zeros((2,))})
        with pytest.raises(WeightsError, match="does not say what model it holds"):
            ContentvecModel.from_file(foreign)
