from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_contentvec.backend import mx
from mlx_contentvec.errors import AudioError, ConfigError
from mlx_contentvec.rvc import Hubert
from tests import originals
from tests.small_models import (
    DEEP,
    LARGE,
    in_one_go,
    least_memory,
    noise,
    random_model,
    random_weights,
    random_weights_file,
)


@pytest.fixture(scope="module")
def hubert() -> Hubert:
    return Hubert(random_model(DEEP))


def rvc_v1(hubert: Any, feats: Any, padding_mask: Any) -> Any:
    """RVC's own lines for version v1, infer/modules/vc/pipeline.py."""
    logits = hubert.extract_features(source=feats, padding_mask=padding_mask, output_layer=9)
    return hubert.final_proj(logits[0])


def test_numpy_in_numpy_out(hubert: Hubert) -> None:
    clip = noise(16000)
    feats = rvc_v1(hubert, clip.reshape(1, -1), np.zeros((1, 16000), bool))
    assert isinstance(feats, np.ndarray) and feats.dtype == np.float32
    expected = in_one_go(hubert.model, clip, output_layer=9, project=True)
    np.testing.assert_allclose(feats[0], expected, atol=2e-5)


def test_torch_in_torch_out(torch: Any, hubert: Hubert) -> None:
    clip = noise(16000)
    feats = torch.from_numpy(clip).half().view(1, -1)
    mask = torch.BoolTensor(feats.shape).fill_(False)
    answer = rvc_v1(hubert.to("cpu").half().eval(), feats, mask)
    assert isinstance(answer, torch.Tensor) and answer.dtype == torch.float16
    heard = feats[0].float().numpy()
    expected = in_one_go(hubert.model, heard, output_layer=9, project=True)
    np.testing.assert_allclose(answer[0].float().numpy(), expected, atol=2e-2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_mlx_in_mlx_out(hubert: Hubert, dtype: Any) -> None:
    feats, mask = hubert.extract_features(
        mx.array(noise(16000))[None].astype(dtype), output_layer=12
    )
    assert isinstance(feats, mx.array) and feats.dtype == dtype
    assert feats.shape == (1, 49, 96)
    assert mask is None


def test_a_long_clip_is_streamed(hubert: Hubert) -> None:
    clip = noise(16000 * 6)
    streaming = Hubert(hubert.model, max_memory=least_memory(hubert.model, len(clip)))
    feats, _ = streaming.extract_features(clip[None], output_layer=12)
    np.testing.assert_allclose(feats[0], in_one_go(hubert.model, clip, output_layer=12), atol=3e-5)


def test_a_padded_batch_is_treated_as_fairseq_treats_it(hubert: Hubert) -> None:
    source = np.stack([noise(16000, seed) for seed in range(2)])
    padding_mask = np.zeros(source.shape, bool)
    padding_mask[1, 9000:] = True
    feats, mask = hubert.extract_features(source, padding_mask, output_layer=12)
    expected, expected_mask = hubert.model.extract_features(source, mx.array(padding_mask), 12)
    np.testing.assert_array_equal(feats, np.array(expected))
    np.testing.assert_array_equal(mask, np.array(expected_mask))
    assert mask.any()


def test_without_a_layer_the_last_one_is_given(hubert: Hubert) -> None:
    clip = noise(16000)[None]
    last, _ = hubert.extract_features(source=clip)
    np.testing.assert_allclose(last, hubert.extract_features(clip, output_layer=12)[0], atol=2e-5)


def test_what_cannot_be_answered_is_an_error(hubert: Hubert) -> None:
    with pytest.raises(ConfigError, match="no layer 13"):
        hubert.extract_features(noise(16000)[None], output_layer=13)
    with pytest.raises(AudioError, match="too short"):
        hubert.extract_features(noise(300)[None], output_layer=12)
    with pytest.raises(AudioError, match="divide by 32768"):
        hubert.extract_features(noise(16000)[None] * 32768, output_layer=12)


def test_it_loads_by_name(tmp_path: Path, hubert: Hubert) -> None:
    weights = random_weights_file(tmp_path / "deep.safetensors", DEEP)
    clip = noise(8000)[None]
    loaded = Hubert.load(weights).extract_features(clip, output_layer=12)[0]
    np.testing.assert_array_equal(loaded, hubert.extract_features(clip, output_layer=12)[0])


# transformers' calls -----------------------------------------------------------


@pytest.fixture(scope="module", params=["base", "large"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, need: Any):
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    config = originals.DEEP if request.param == "base" else originals.LARGE
    return originals.transformers_original(tmp_path_factory.mktemp(request.param), config)


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    """Three clips, two of them padded, and transformers' mask. 16,079 samples make 50 frames."""
    source = np.stack([noise(16079, seed) for seed in range(3)])
    mask = np.ones(source.shape, np.int64)
    for row, length in ((1, 15759), (2, 5000)):
        mask[row, length:] = source[row, length:] = 0
    return source, mask


def hidden_states(torch: Any, model: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    source, *masks = (torch.from_numpy(array) for array in arrays)
    source = source.to(model.dtype)
    with torch.no_grad():
        outputs = model(source, *masks, output_hidden_states=True)
    return [x.numpy() for x in (outputs.last_hidden_state, *outputs.hidden_states)]


def test_hidden_states_are_those_of_transformers(torch: Any, original: originals.Original) -> None:
    source = noise(16079)[None]
    reference, truth = (hidden_states(torch, m, source) for m in (original.model, original.truth))
    outputs = original.hubert(source, output_hidden_states=True)
    answers = [outputs.last_hidden_state, *outputs.hidden_states]
    assert len(answers) == len(truth)
    for answer, *others in zip(answers, reference, truth, strict=True):
        originals.assert_within_gate(answer, *others)
    alone = original.hubert(source)
    assert alone.hidden_states is None
    originals.assert_within_gate(alone.last_hidden_state, reference[0], truth[0])


def test_an_attention_mask_means_what_it_means_in_transformers(
    torch: Any, original: originals.Original
) -> None:
    source, mask = padded_batch()
    reference, truth = (
        hidden_states(torch, m, source, mask) for m in (original.model, original.truth)
    )
    hubert = original.hubert
    outputs = hubert(source, mask, output_hidden_states=True)
    for answer, *others in zip(
        [outputs.last_hidden_state, *outputs.hidden_states], reference, truth, strict=True
    ):
        originals.assert_within_gate(answer, *others)
    alone = hubert(source, mask).last_hidden_state
    originals.assert_within_gate(alone, reference[0], truth[0])
    # the mask does something, and fairseq's rule does something else
    unmasked = hubert(source).last_hidden_state
    as_fairseq, _ = hubert.extract_features(source, mask == 0)
    assert np.abs(unmasked - alone).max() > 1e-3
    assert np.abs(as_fairseq - alone).max() > 1e-3


def test_fairseq_counts_a_frame_more_than_the_clip_has_alone(hubert: Hubert) -> None:
    source, mask = padded_batch()
    _, padded = hubert.extract_features(source, mask == 0)
    alone = [hubert.model.config.frames(int(length)) for length in mask.sum(axis=1)]
    assert ((~padded).sum(axis=1) - alone).tolist() == [0, 1, 1]


def test_a_result_is_read_as_that_of_transformers_is(hubert: Hubert) -> None:
    source = noise(8000)[None]
    outputs = hubert(input_values=source, attention_mask=None, output_hidden_states=True)
    assert outputs[0] is outputs.last_hidden_state is outputs["last_hidden_state"]
    assert outputs[1] is outputs.hidden_states is outputs["hidden_states"]
    assert list(outputs) == ["last_hidden_state", "hidden_states"] and len(outputs) == 2
    assert outputs.attentions is None and "attentions" not in outputs
    last, states = hubert(source, output_hidden_states=True, return_dict=False)
    np.testing.assert_array_equal(last, outputs[0])
    assert len(states) == 13
    assert len(hubert(source, return_dict=False)) == 1
    with pytest.raises(AttributeError, match="no 'logits'"):
        _ = outputs.logits
    with pytest.raises(KeyError):
        _ = hubert(source)["hidden_states"]
    with pytest.raises(IndexError):
        _ = hubert(source)[1]


def test_all_hidden_states_come_from_one_pass(
    hubert: Hubert, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    model = type(hubert.model)
    for name in ("stage_outputs", "__call__", "extract_features"):
        call = getattr(model, name)
        monkeypatch.setattr(
            model,
            name,
            lambda self, *a, call=call, name=name, **k: (passes.append(name), call(self, *a, **k))[
                1
            ],
        )
    hubert(noise(8000)[None], output_hidden_states=True)
    assert passes == ["stage_outputs"]


def test_a_long_clip_is_streamed_for_transformers_calls_too(tmp_path: Path) -> None:
    hubert = Hubert(random_model(LARGE))
    clip = noise(16000 * 6)[None]
    expected = hubert(clip).last_hidden_state
    least = least_memory(hubert.model, clip.shape[1])
    streamed = Hubert(hubert.model, max_memory=least)(clip).last_hidden_state
    assert not np.array_equal(streamed, expected)
    np.testing.assert_allclose(streamed, expected, atol=3e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_is_answered_in_its_type(torch: Any, hubert: Hubert, dtype: str) -> None:
    source = torch.from_numpy(noise(8000))[None].to(getattr(torch, dtype))
    outputs = hubert(source, output_hidden_states=True)
    kinds = {(type(x), x.dtype, x.device) for x in (outputs[0], *outputs[1])}
    assert kinds == {(torch.Tensor, source.dtype, source.device)}
    projected = hubert.final_proj(outputs.hidden_states[9][0])
    assert projected.shape == (24, 32) and projected.dtype == source.dtype
    features, mask = hubert.extract_features(source, torch.zeros(source.shape, dtype=torch.bool))
    assert features.dtype == source.dtype
    assert mask.dtype == torch.bool and mask.shape == (1, 24)


@pytest.mark.parametrize("kind", ["numpy", "mlx"])
def test_other_arrays_are_answered_in_kind(hubert: Hubert, kind: str) -> None:
    array = np.asarray if kind == "numpy" else mx.array
    source = array(noise(8000)[None])
    outputs = hubert(source, array(np.ones((1, 8000), np.int32)), output_hidden_states=True)
    expected = {type(source)}
    assert {type(x) for x in (outputs[0], *outputs[1], hubert.final_proj(outputs[0]))} == expected
    features, mask = hubert.extract_features(source, array(np.zeros((1, 8000), np.float32)))
    assert {type(features), type(mask)} == expected
    assert mask.dtype == (np.bool_ if kind == "numpy" else mx.bool_)


def test_the_config_is_that_of_transformers(original: originals.Original) -> None:
    theirs = original.model.config
    ours = vars(original.hubert.config)
    own = {"do_normalize", "sampling_rate"}
    assert {name: list_or_value(value) for name, value in ours.items() if name not in own} == {
        name: list_or_value(getattr(theirs, name)) for name in ours if name not in own
    }
    assert ours["do_normalize"] == original.hubert.model.config.normalize
    assert ours["sampling_rate"] == 16000


def list_or_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_calls_of_a_torch_module_are_answered(torch: Any, hubert: Hubert) -> None:
    assert hubert.to("cpu").half().eval().train(False).requires_grad_(False) is hubert
    assert hubert.device == torch.device("cpu") and hubert.dtype == torch.float16
    weights = list(hubert.parameters())
    assert {(w.dtype, w.device) for w in weights} == {(torch.float16, torch.device("cpu"))}
    assert sum(w.numel() for w in weights) == sum(w.size for w in random_weights(DEEP).values())
    assert hubert.to(torch.device("meta"), torch.float32).device == torch.device("meta")
    assert hubert.to(torch.zeros(1)).float().device == torch.device("cpu")
    assert hubert.cuda(1).device == torch.device("cuda:1") and hubert.cpu().device.type == "cpu"
    assert hubert.training is False
    for call in (hubert.train, hubert.requires_grad_):
        with pytest.raises(ConfigError, match="does not train"):
            call()


def test_it_answers_where_torch_is_not_imported(hubert: Hubert, monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert hubert.to("cpu").half().float().eval() is hubert
    assert (hubert.device, hubert.dtype) == ("cpu", mx.float32)
    assert all(isinstance(weight, mx.array) for weight in hubert.parameters())
    assert isinstance(hubert(noise(8000)[None])[0], np.ndarray)


def test_normalising_is_left_to_the_caller(torch: Any, original: originals.Original) -> None:
    quiet = 0.02 * noise(8000)[None]
    for source in (quiet, (quiet - quiet.mean()) / quiet.std()):
        reference, truth = (
            hidden_states(torch, m, source)[0] for m in (original.model, original.truth)
        )
        originals.assert_within_gate(original.hubert(source)[0], reference, truth)


# masks and inputs that cannot be used ------------------------------------------


def test_what_an_extractor_of_transformers_made_is_used_as_it_is(
    torch: Any, original: originals.Original
) -> None:
    """A model from a folder of transformers makes the same of quiet audio itself."""
    import transformers

    config = original.hubert.model.config
    quiet = 1e-3 * noise(8000)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=config.normalize)
    given = extractor(quiet, sampling_rate=16000, return_tensors="np").input_values
    reference, truth = (
        hidden_states(torch, model, given)[0] for model in (original.model, original.truth)
    )
    features = original.hubert.model(given, normalized=True)["x"]
    originals.assert_within_gate(np.array(features), reference, truth)
    by_the_model = np.array(original.hubert.model(quiet[None])["x"])
    originals.assert_within_gate(by_the_model, reference, truth)


def rows(*lengths: int, samples: int = 8000) -> np.ndarray:
    """(clips, samples), true where padded."""
    return np.arange(samples) >= np.array(lengths)[:, None]


BAD_MASKS = {
    "fewer clips": (rows(8000), "padding_mask does not belong"),
    "more clips": (rows(8000, 8000, 8000), "padding_mask does not belong"),
    "of frames": (rows(24, 12, samples=24), "padding_mask does not belong"),
    "a sample more": (rows(8000, 7000, samples=8001), "padding_mask does not belong"),
    "no axis for clips": (rows(8000)[0], "padding_mask does not belong"),
    "an axis more": (rows(8000, 7000)[:, None], "padding_mask does not belong"),
    "lengths": (np.array([8000, 7000]), "padding_mask does not belong"),
    "other values": (rows(8000, 7000) * 2, "other values than 0 and 1"),
    "to be added": (np.where(rows(8000, 7000), -np.inf, 0.0), "other values than 0 and 1"),
    "not a number": (np.where(rows(8000, 7000), np.nan, 0.0), "other values than 0 and 1"),
    "nothing but padding": (rows(8000, 0), "nothing but padding"),
    "a list": ([[False] * 8000] * 2, "padding_mask must be an array"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_padding_mask_is_held_to_its_source(hubert: Hubert, name: str) -> None:
    mask, reason = BAD_MASKS[name]
    source = np.stack([noise(8000, seed) for seed in range(2)])
    with pytest.raises(AudioError, match=reason):
        hubert.extract_features(source, mask, output_layer=12)


@pytest.mark.parametrize("name", BAD_MASKS)
def test_an_attention_mask_is_held_to_its_source(hubert: Hubert, name: str) -> None:
    mask, reason = BAD_MASKS[name]
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = ~mask
    reason = reason.replace("padding_mask", "attention_mask")
    source = np.stack([noise(8000, seed) for seed in range(2)])
    with pytest.raises(AudioError, match=reason.replace("nothing but padding", "too short")):
        hubert(source, mask)


@pytest.mark.parametrize("kept", ["in front", "hole", "399 samples"])
def test_an_attention_mask_that_transformers_takes_for_another_is_refused(
    hubert: Hubert, kept: str
) -> None:
    mask = np.ones((1, 8000), np.int64)
    mask[
        0,
        {"in front": slice(0, 320), "hole": slice(3000, 3001), "399 samples": slice(399, None)}[
            kept
        ],
    ] = 0
    with pytest.raises(AudioError, match=r"before or between|too short"):
        hubert(noise(8000)[None], mask)


def test_a_padding_mask_with_a_hole_is_what_fairseq_makes_of_it(
    torch: Any, fairseq: Any, tmp_path: Path
) -> None:
    original = originals.fairseq_original(tmp_path, originals.TINY_BASE)
    source = np.stack([noise(8000, seed) for seed in range(2)])
    mask = rows(8000, 6000)
    mask[0, 3000:4000] = mask[1, :700] = True
    answers = {}
    for name, model in (("reference", original.model), ("truth", original.truth)):
        dtype = next(model.parameters()).dtype
        with torch.no_grad():
            answers[name], frames = model.extract_features(
                torch.from_numpy(source).to(dtype), torch.from_numpy(mask)
            )
    x, padded = original.hubert.extract_features(source, mask)
    np.testing.assert_array_equal(padded, frames.numpy())
    assert padded[0].any() and padded[1, 0]
    originals.assert_within_gate(x, answers["reference"], answers["truth"])


def test_masks_of_every_type_are_taken(torch: Any, hubert: Hubert) -> None:
    source = np.stack([noise(8000, seed) for seed in range(2)])
    mask = rows(8000, 5000)
    padded, attended = hubert.extract_features(source, mask)[0], hubert(source, ~mask)[0]
    for dtype in ("bool", "uint8", "int64", "float16", "float32"):
        ours = mask.astype(dtype)
        for given, not_given in (
            (ours, (~mask).astype(dtype)),
            (torch.from_numpy(ours), torch.from_numpy((~mask).astype(dtype))),
            (mx.array(ours), mx.array((~mask).astype(dtype))),
        ):
            np.testing.assert_array_equal(hubert.extract_features(source, given)[0], padded)
            np.testing.assert_array_equal(hubert(source, not_given)[0], attended)


BAD_SOURCES = {
    "no axis for clips": (noise(8000), "wrong rank"),
    "channels": (noise(8000)[None, None], "wrong rank"),
    "integers": ((noise(8000)[None] * 32767).astype(np.int16), "not floating point"),
    "a list": (noise(8000)[None].tolist(), "must be an array"),
    "no clip": (np.zeros((0, 8000), np.float32), "holds no clip"),
    "too short": (noise(399)[None], "too short"),
    "not a number, signalling": (
        np.full((1, 8000), 0x7FF0_0000_0000_0001, np.uint64).view(np.float64),
        "NaN",
    ),
    "not a number": (np.full((1, 8000), np.nan, np.float32), "NaN"),
    "texts": (np.full((1, 8000), "a"), "must be an array"),
    "objects": (noise(8000)[None].astype(object), "must be an array"),
    "masked": (np.ma.masked_less(noise(8000)[None], 0), "masked values"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_waveform_that_cannot_be_used_is_refused_by_every_call(hubert: Hubert, name: str) -> None:
    source, reason = BAD_SOURCES[name]
    ones = np.ones(np.shape(source), bool)
    for call in (
        lambda: hubert.extract_features(source),
        lambda: hubert.extract_features(source, ~ones, output_layer=12),
        lambda: hubert(source),
        lambda: hubert(source, ones),
        lambda: hubert(source, output_hidden_states=True),
        lambda: hubert(source, ones, output_hidden_states=True),
    ):
        with pytest.raises(AudioError, match=reason):
            call()


@pytest.mark.parametrize("form", ["sparse", "without values"])
def test_a_tensor_that_numpy_cannot_read_is_refused(torch: Any, hubert: Hubert, form: str) -> None:
    plain = torch.zeros(1, 8000)
    given = plain.to_sparse() if form == "sparse" else plain.to("meta")
    for call in (
        lambda: hubert.extract_features(given),
        lambda: hubert.extract_features(plain, given),
        lambda: hubert(given),
        lambda: hubert(plain, given),
        lambda: hubert.final_proj(given),
    ):
        with pytest.raises(AudioError, match="cannot be read as an array"):
            call()


def test_a_mask_of_texts_is_refused(hubert: Hubert) -> None:
    source = noise(8000)[None]
    for call in (hubert.extract_features, hubert):
        with pytest.raises(AudioError, match="must be an array"):
            call(source, np.full((1, 8000), "1"))


@pytest.mark.parametrize("shape", [(1, 0, 96), (0, 5, 96)])
def test_final_proj_gives_no_frames_for_none(
    torch: Any, hubert: Hubert, shape: tuple[int, ...]
) -> None:
    given = torch.zeros(shape)
    assert hubert.final_proj(given).shape == torch.nn.Linear(96, 32)(given).shape


def test_what_only_training_asks_is_refused(hubert: Hubert) -> None:
    source = noise(8000)[None]
    with pytest.raises(ConfigError, match="output_layer=12"):
        hubert.extract_features(source, None, 12)
    with pytest.raises(ConfigError, match="ret_conv"):
        hubert.extract_features(source, ret_conv=True)
    with pytest.raises(ConfigError, match="output_attentions"):
        hubert(source, output_attentions=True)
    with pytest.raises(ConfigError, match="mask_time_indices"):
        hubert(source, mask_time_indices=np.zeros((1, 24), bool))


def test_final_proj_says_what_it_cannot_read(hubert: Hubert) -> None:
    for bad in (np.zeros((1, 5, 32), np.float32), np.zeros(96, np.float32), np.zeros((5, 96), int)):
        with pytest.raises(ConfigError, match="cannot read these features"):
            hubert.final_proj(bad)
    headless = Hubert(random_model(dataclasses.replace(DEEP, final_dim=None)))
    with pytest.raises(ConfigError, match="no final_proj"):
        headless.final_proj(np.zeros((1, 5, 96), np.float32))
