"""What a forward pass is given is taken up to its limits, and refused beyond."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import inputs, memory
from mlx_contentvec.audio import LOUDEST_PEAK
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import AudioError, ConfigError
from tests.small_models import LARGE, TINY, noise

SPEAKER = dataclasses.replace(TINY, encoder_layers_1=2, speaker_dim=8)
#: three clips of a second
CLIPS = np.stack([noise(16000, seed) for seed in range(3)])


def same(one: Any, other: Any) -> bool:
    return bool(np.array_equal(np.asarray(one), np.asarray(other)))


# ---- arrays -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["bool", "int16", "uint8", "float16", "float64", ">f4", "complex64"]
)
def test_numbers_of_every_kind_become_an_array(kind: str) -> None:
    given = np.array([[0, 1, 1], [1, 0, 1]]).astype(kind)
    assert same(inputs.to_mlx(given, "it"), given)


@pytest.mark.parametrize("values", [[1.0, 2.0], (1, 2), 3.0])
def test_plain_numbers_become_an_array(values: Any) -> None:
    assert same(inputs.to_mlx(values, "it"), values)


def test_an_array_of_mlx_is_taken_as_it_is() -> None:
    given = mx.zeros((2, 3))
    assert inputs.to_mlx(given, "it") is given


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array(["a"]), "numpy, <U1: these are no numbers"),
        (np.array([None]), "numpy, object: these are no numbers"),
        (np.zeros(1, "M8[s]"), r"numpy, datetime64\[s\]: these are no numbers"),
        ("a", "str: "),
        ([[1], [2, 3]], "list: "),
        ({}, "dict: "),
    ],
)
def test_what_is_no_array_of_numbers_is_named(values: Any, found: str) -> None:
    with pytest.raises(AudioError, match=f"it cannot be read as an array\\s+found +{found}"):
        inputs.to_mlx(values, "it")


def test_masked_values_are_refused_and_a_mask_of_nothing_is_not() -> None:
    values = np.ma.masked_array(CLIPS)
    assert same(inputs.to_mlx(values, "it"), CLIPS)
    with pytest.raises(AudioError, match="it has masked values"):
        inputs.to_mlx(np.ma.masked_less(values, 0), "it")


# ---- waveforms --------------------------------------------------------------------


@pytest.mark.parametrize("of", [np.asarray, mx.array])
def test_a_waveform_may_be_as_loud_and_as_short_as_the_limits(of: Any) -> None:
    waveform = np.full((1, TINY.receptive_field), LOUDEST_PEAK, np.float32)
    for sign in (1, -1):
        assert same(inputs.check_waveform(of(sign * waveform), TINY), sign * waveform)
        louder = waveform.copy()
        louder[0, -1] = sign * np.nextafter(np.float32(LOUDEST_PEAK), np.float32(1000))
        with pytest.raises(AudioError, match=r"out of scale\s+found +peak 100"):
            inputs.check_waveform(of(louder), TINY)
    with pytest.raises(AudioError, match=r"399 samples\s+expected +at least 400 \(25 ms\)"):
        inputs.check_waveform(of(waveform[:, :-1]), TINY)


@pytest.mark.parametrize("of", [np.asarray, mx.array])
@pytest.mark.parametrize(
    ("waveform", "said"),
    [
        (CLIPS[0], r"the wrong rank\s+found +shape \(16000,\)"),
        (CLIPS[None], r"the wrong rank\s+found +shape \(1, 3, 16000\)"),
        (CLIPS[:0], "the batch holds no clip"),
        (CLIPS.astype(np.int16), "is not floating point"),
        (CLIPS.astype(np.complex64), "is not floating point"),
        (np.where(CLIPS.max() == CLIPS, np.nan, CLIPS), "NaN or infinity"),
        (np.where(CLIPS.max() == CLIPS, -np.inf, CLIPS), "NaN or infinity"),
    ],
)
def test_what_is_no_batch_of_clips_is_refused(of: Any, waveform: Any, said: str) -> None:
    with pytest.raises(AudioError, match=said):
        inputs.check_waveform(of(waveform), TINY)


def test_only_arrays_are_waveforms() -> None:
    for source in ([[0.0] * 16000], None, "a.wav"):
        with pytest.raises(AudioError, match="the waveform must be an array"):
            inputs.check_waveform(source, TINY)


def test_a_traced_waveform_is_not_looked_at() -> None:
    loud = 2 * LOUDEST_PEAK * mx.ones((1, 400))
    (checked,), _ = mx.vjp(lambda x: [inputs.check_waveform(x, TINY)], [loud], [loud])
    assert same(checked, loud)


@pytest.mark.parametrize("over", [0, 1])
def test_a_clip_may_take_all_the_memory_that_there_is(
    over: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = memory.whole_clip_bytes(TINY, 16000, 3)
    monkeypatch.setattr(memory, "process_memory", lambda: needed - over)
    monkeypatch.setattr(inputs, "device_kind", lambda: "cpu")
    if not over:
        inputs.check_waveform(CLIPS, TINY)
        return
    with pytest.raises(AudioError, match=r"in one go here\s+found +3 x 1 s, about 0 GiB"):
        inputs.check_waveform(CLIPS, TINY)
    monkeypatch.setattr(memory, "process_memory", lambda: None)
    inputs.check_waveform(CLIPS, TINY)
    # what a GPU may hold is for whoever divides the clip
    monkeypatch.setattr(memory, "process_memory", lambda: needed - over)
    monkeypatch.setattr(inputs, "device_kind", lambda: "cuda")
    inputs.check_waveform(CLIPS, TINY)


# ---- lengths, padding, speakers -----------------------------------------------------


@pytest.mark.parametrize(
    "lengths", [[400, 16000, 401], (400, 400, 400), np.array([400, 500, 16000])]
)
def test_a_clip_may_be_as_short_as_a_frame_and_as_long_as_its_row(lengths: Any) -> None:
    checked = inputs.check_lengths(lengths, mx.array(CLIPS), TINY)
    assert same(checked, lengths) and checked.dtype == mx.int32


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([399, 16000, 500], r"impossible\s+found +399 to 16000 samples\s+expected +400 to 16000"),
        ([400, 16001, 500], "impossible"),
        ([-400, 500, 500], "impossible"),
        ([400, 500], r"one whole number of samples a clip\s+found +shape \(2,\), int32"),
        ([[400, 500, 600]], "one whole number"),
        ([400.0, 500.0, 600.0], "one whole number"),
        ([True, True, True], "one whole number"),
        (500, "one whole number"),
    ],
)
def test_other_lengths_are_refused(lengths: Any, said: str) -> None:
    with pytest.raises(AudioError, match=said):
        inputs.check_lengths(lengths, mx.array(CLIPS), TINY)


@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_a_padding_mask_is_true_where_it_is_one(kind: str) -> None:
    given = np.arange(16000)[None] >= np.array([[16000], [500], [0]])
    assert same(inputs.check_padding_mask(given.astype(kind), mx.array(CLIPS)), given)


@pytest.mark.parametrize("value", [2, -1, 0.5, np.nan])
def test_a_padding_mask_of_other_values_is_refused(value: float) -> None:
    mask = np.zeros(CLIPS.shape, np.float32)
    mask[1, 7] = value
    with pytest.raises(AudioError, match="other values than 0 and 1"):
        inputs.check_padding_mask(mask, mx.array(CLIPS))
    for other in (mask[:2], mask[:, 1:], mask[0]):
        with pytest.raises(AudioError, match="does not fit the waveform"):
            inputs.check_padding_mask(other, mx.array(CLIPS))


def test_padded_frames_are_those_whose_samples_are_all_padding() -> None:
    source = mx.zeros((3, 4000))
    ends = [4000, 2665, 2664]  # of 333 samples each, 8 frames and one
    mask = mx.arange(4000)[None] >= mx.array(ends)[:, None]
    padded = inputs.padded_frames(source, TINY, mask, None)
    assert padded is not None
    assert (~padded).sum(axis=1).tolist() == [12, 9, 8]
    padded = inputs.padded_frames(source, TINY, None, mx.array([4000, 720, 719]))
    assert padded is not None
    assert (~padded).sum(axis=1).tolist() == [12, 2, 1]
    assert inputs.padded_frames(source, TINY, None, None) is None
    with pytest.raises(AudioError, match="nothing but padding"):
        inputs.padded_frames(source, TINY, mx.arange(4000)[None] >= mx.array([[9], [0], [9]]), None)


def test_padding_follows_the_samples_of_a_clip_that_is_normalised() -> None:
    lengths = [16000, 500, 0]
    mask = mx.arange(16000)[None] >= mx.array(lengths)[:, None]
    assert inputs.unpadded_lengths(mask).tolist() == lengths
    for place in ((0, 0), (1, 499), (1, 501)):
        changed = np.array(mask)
        changed[place] = not changed[place]
        if place == (1, 499):
            assert inputs.unpadded_lengths(mx.array(changed)).tolist() == [16000, 499, 0]
            continue
        with pytest.raises(AudioError, match="padding before or between samples"):
            inputs.unpadded_lengths(mx.array(changed))


@pytest.mark.parametrize(
    ("speaker", "found"),
    [
        (None, "none"),
        (np.ones((2, 8)), r"shape \(2, 8\)"),
        (np.ones((3, 9)), r"shape \(3, 9\)"),
        (np.ones(8), r"shape \(8,\)"),
    ],
)
def test_a_conditioned_model_needs_one_embedding_a_clip(speaker: Any, found: str) -> None:
    source = mx.array(CLIPS)
    with pytest.raises(ConfigError, match=f"needs a speaker embedding\\s+found +{found}"):
        inputs.check_speaker(speaker, source, SPEAKER)
    taken = np.full((3, 8), 2, np.float32)
    assert same(inputs.check_speaker(taken, source, SPEAKER), taken)
    taken[1, 3] = np.nan
    with pytest.raises(ConfigError, match="spk_emb holds NaN or infinity"):
        inputs.check_speaker(taken, source, SPEAKER)


def test_a_model_without_conditioned_layers_reads_no_embedding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inputs.check_speaker(None, mx.array(CLIPS), TINY) is None
    with pytest.warns(UserWarning, match="spk_emb is ignored"):
        assert inputs.check_speaker(np.ones((3, 8)), mx.array(CLIPS), TINY) is None


# ---- stages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "shape"),
    [
        ("conv.0", (1, 10)),
        ("conv.1", (2, 3, 32)),
        ("conv.6", (1, 2, 32)),
        ("projection", (1, 1, 32)),
        ("positional", (1, 1, 96)),
        ("layer.1", (1, 1, 96)),
        ("final_proj", (1, 1, 96)),
    ],
)
def test_a_stage_reads_no_less_than_gives_a_frame(stage: str, shape: tuple[int, ...]) -> None:
    given = np.ones(shape, np.float32)
    assert same(inputs.check_stage_input(stage, given, TINY), given)
    axes = range(len(shape))
    others = [tuple(n - (axis == i) for i, n in enumerate(shape)) for axis in axes[1:]]
    others += [(0, *shape[1:]), shape[1:], (1, *shape)]
    for other in others:
        with pytest.raises(AudioError, match=f"{stage} cannot read this input"):
            inputs.check_stage_input(stage, np.ones(other, np.float32), TINY)


# ---- normalisation ------------------------------------------------------------------


def test_only_a_model_that_wants_it_has_its_clips_normalised() -> None:
    clip = CLIPS[0]
    assert inputs.normalization_of(clip, TINY)(clip) is clip
    normalised = inputs.normalization_of(clip, LARGE)(clip)
    assert abs(normalised.mean()) < 1e-6 and abs(normalised.std() - 1) < 1e-3


@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
def test_a_clip_is_normalised_alike_in_blocks_of_any_size(block: int) -> None:
    clip = CLIPS[0, :2500]
    exact = clip.astype(np.float64)
    found = inputs.Normalization.of(clip, 1e-5, block)
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert found.deviation == pytest.approx(np.sqrt(exact.var() + 1e-5), rel=1e-8)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("lengths", [None, [16000, 500, 7]])
def test_each_clip_of_a_batch_is_normalised_by_its_own_samples(
    lengths: list[int] | None, traced: bool
) -> None:
    expected = np.zeros_like(CLIPS)
    for row, clip, count in zip(expected, CLIPS, lengths or [16000] * 3, strict=True):
        row[:count] = inputs.Normalization.of(clip[:count], 1e-5)(clip[:count])
    given = None if lengths is None else mx.array(lengths)
    source = mx.array(CLIPS)
    if traced:
        (got,), (gradient,) = mx.vjp(
            lambda x: [inputs.normalize_waveform(x, 1e-5, given)], [source], [source]
        )
        found = np.asarray(gradient)
        assert found.any(axis=1).all()
        for row, count in zip(found, lengths or [16000] * 3, strict=True):
            assert not row[count:].any()
    else:
        got = inputs.normalize_waveform(source, 1e-5, given)
        assert same(got, expected)
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-4)
