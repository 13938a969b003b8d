"""A stream gets, block by block, the frames that windows cut by hand give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import live
from mlx_contentvec.errors import AudioError, ConfigError
from mlx_contentvec.model import ContentvecModel
from tests.small_models import CONFIGS, DEEP, TINY, in_one_go, noise, random_model

HOP, FIELD, RATE = 320, 400, 16000


@pytest.fixture(scope="module")
def deep() -> ContentvecModel:
    return random_model(DEEP)


def frames(samples: int) -> int:
    return max(0, (samples - FIELD) // HOP + 1)


def by_hand(
    model: ContentvecModel, clip: np.ndarray, context: float, block: float, **options: Any
) -> list[np.ndarray]:
    """The new frames after each block, and after the clip's end, from windows cut out of it.

    A window ends with the last frame that is complete and has whole frames of context.
    """
    step = round(block * RATE)
    length = math.ceil(round(context * RATE) / HOP) + math.ceil(step / HOP)
    silence = np.zeros(length * HOP, np.float32)
    padded, answers, done = np.concatenate([silence, clip]), [], 0
    for end in [*range(step, len(clip) + 1, step), len(clip)]:
        last = frames(end)
        if last > done:
            start = len(silence) + (last - length) * HOP
            window = padded[start : start + (length - 1) * HOP + FIELD]
            assert start + len(window) <= len(silence) + end
            answers.append(in_one_go(model, window, **options)[-(last - done) :])
            done = last
    return answers


def cut(clip: np.ndarray, sizes: Any) -> list[np.ndarray]:
    pieces, at = [], 0
    while at < len(clip):
        size = int(next(sizes))
        pieces.append(clip[at : at + size])
        at += size
    return pieces


@pytest.fixture(scope="module")
def shallow() -> ContentvecModel:
    return random_model(TINY)


@pytest.mark.parametrize(
    ("context", "block", "seconds"),
    [(0.5, 0.02, 0.8), (0.5, 0.25, 2.1), (1.0, 0.1, 1.5), (2.5, 0.25, 3.0), (3.0, 1.0, 4.3)],
)
def test_the_frames_are_those_of_windows_cut_by_hand(
    shallow: ContentvecModel, context: float, block: float, seconds: float
) -> None:
    clip = noise(round(seconds * RATE))
    expected = np.concatenate(by_hand(shallow, clip, context, block))
    sizes = np.random.default_rng(int(1000 * block))
    for draw in (
        iter(lambda: round(block * RATE), 0),  # as a sound card gives them
        iter(lambda: sizes.integers(0, 5000), -1),  # at random, also none
    ):
        stream = shallow.live(layer=3, context=context, block=block)
        pieces = [stream.push(piece) for piece in cut(clip, draw)] + [stream.finish()]
        got = np.concatenate(pieces)
        assert got.shape == (frames(len(clip)), 96)
        np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_version_names_the_features(deep: ContentvecModel, version: str) -> None:
    clip = noise(8000)
    stream = deep.live(version=version, context=0.5, block=0.2)
    got = np.concatenate([stream.push(clip), stream.finish()])
    options: dict[str, Any] = {"output_layer": 12}
    if version == "v1":
        options = {"output_layer": 9, "project": True}
    np.testing.assert_allclose(
        got, np.concatenate(by_hand(deep, clip, 0.5, 0.2, **options)), atol=3e-5
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_every_kind_are_heard_live(name: str) -> None:
    model, clip = random_model(CONFIGS[name]), noise(6000)
    stream = model.live(layer=3, context=0.3, block=0.1)
    got = np.concatenate([stream.push(clip), stream.finish()])
    expected = by_hand(model, clip, 0.3, 0.1, output_layer=3)
    np.testing.assert_allclose(got, np.concatenate(expected), atol=5e-5)


def test_every_window_has_one_length(
    deep: ContentvecModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    def watched(model: Any, window: np.ndarray, *arguments: Any) -> np.ndarray:
        lengths.append(len(window))
        return np.zeros((frames(len(window)), 96), np.float32)

    monkeypatch.setattr(live, "features_of", watched)
    stream = deep.live(context=0.7, block=0.13)
    for piece in cut(noise(30000), iter(lambda: 777, 0)):
        stream.push(piece)
    stream.finish()
    assert set(lengths) == {stream.window.samples}
    # the first is of silence, before the stream; then one a block, and the end
    assert len(lengths) == 1 + 30000 // 2080 + 1


@pytest.mark.parametrize("block", [0.02, 0.25, 0.013])
def test_no_frame_waits_longer_than_the_latency_says(
    deep: ContentvecModel, monkeypatch: pytest.MonkeyPatch, block: float
) -> None:
    monkeypatch.setattr(
        live,
        "features_of",
        lambda model, window, kind: np.zeros((frames(len(window)), 96), np.float32),
    )
    stream = deep.live(context=0.5, block=block)
    assert stream.latency == pytest.approx(block + 0.025)
    returned, longest = 0, 0
    for pushed in range(1, 9000):
        fresh = len(stream.push(np.zeros(1, np.float32)))
        if fresh:
            longest = max(longest, pushed - returned * HOP)
        returned += fresh
    assert longest <= stream.latency * RATE
    assert longest > stream.latency * RATE - HOP


def test_a_stream_that_has_ended_starts_anew(deep: ContentvecModel) -> None:
    clip = noise(5000)
    stream = deep.live(context=0.4, block=0.1)
    first = np.concatenate([stream.push(clip), stream.finish()])
    assert np.array_equal(np.concatenate([stream.push(clip), stream.finish()]), first)
    stream.push(clip)
    stream.reset()
    assert np.array_equal(np.concatenate([stream.push(clip), stream.finish()]), first)


def test_less_than_a_frame_gives_none(deep: ContentvecModel) -> None:
    stream = deep.live(context=0.1, block=0.02)
    assert stream.push(noise(399)).shape == (0, 96)
    for nothing in ([], np.zeros(0, np.float32), np.zeros((0, 2), np.int16)):
        assert stream.push(nothing).shape == (0, 96)
    assert stream.finish().shape == (0, 96)


def test_a_long_stream_holds_no_more_than_its_window(
    deep: ContentvecModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        live,
        "features_of",
        lambda model, window, kind: np.zeros((frames(len(window)), 96), np.float32),
    )
    stream = deep.live(context=0.5, block=0.1)
    for _ in range(200):
        stream.push(np.zeros(1600, np.float32))
        assert len(stream._samples) <= stream.window.samples + 2 * stream.window.block_samples


def test_samples_of_other_kinds_are_taken_as_extract_takes_them(deep: ContentvecModel) -> None:
    clip = noise(4000)
    numbers = np.round(clip * 32767).astype(np.int16)
    stream = deep.live(context=0.2, block=0.1)
    stereo = stream.push(np.stack([numbers, numbers], axis=1))
    stream.reset()
    np.testing.assert_array_equal(stereo, stream.push(numbers.astype(np.float32) / 32768))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.array([0.1, np.nan], np.float32), "not finite|NaN"),
        (np.full(10, 3e4, np.float32), "out of scale"),
        (None, "the waveform"),
        ("sound", "the waveform"),
        (np.zeros((2, 3, 4), np.float32), "shape"),
    ],
)
def test_a_bad_block_is_refused_and_the_stream_goes_on(
    deep: ContentvecModel, samples: Any, message: str
) -> None:
    clip = noise(4000)
    stream = deep.live(context=0.2, block=0.1)
    pieces = [stream.push(clip[:1500])]
    with pytest.raises(AudioError, match=message):
        stream.push(samples)
    pieces += [stream.push(clip[1500:]), stream.finish()]
    expected = by_hand(deep, clip, 0.2, 0.1)
    np.testing.assert_allclose(np.concatenate(pieces), np.concatenate(expected), atol=3e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"block": 0},
        {"block": -0.1},
        {"block": float("nan")},
        {"context": -1},
        {"context": float("inf")},
        {"context": "2 s"},
        {"context": 60, "block": 1},
        {"version": "v3"},
        {"layer": 13},
        {"version": "v1", "layer": 9},
    ],
)
def test_a_window_that_cannot_be_is_refused(deep: ContentvecModel, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        deep.live(**options)


def test_no_context_at_all_is_a_window_of_the_block_alone(deep: ContentvecModel) -> None:
    clip = noise(4000)
    stream = deep.live(context=0, block=0.1)
    got = np.concatenate([stream.push(clip), stream.finish()])
    expected = np.concatenate(by_hand(deep, clip, 0, 0.1))
    np.testing.assert_allclose(got, expected, atol=3e-5)
