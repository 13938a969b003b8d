"""A clip in overlapping windows, as RVC processes long input, and what that costs.

Each window is a clip of its own to the model, so features near a window's edge
are not those of the whole clip. Neighbours overlap, each frame is taken from
the window whose edge is farther away, and what two windows disagree by where
one takes over from the other is measured and reported.
Source of the scheme: RVC, infer/modules/vc/pipeline.py, ``Pipeline.pipeline``
(``x_center`` and ``x_pad``); RVC looks for a quiet place to cut, this does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..audio import Waveform
    from ..config import ModelConfig
    from ..features import FeatureKind, Features
    from ..model import ContentvecModel


@dataclass(frozen=True)
class Seams:
    """How much neighbouring windows disagree about the two frames at each cut."""

    count: int
    #: largest difference of one feature value
    max_abs: float
    #: root mean square of the differences
    rms: float


@dataclass(frozen=True)
class Window:
    """Frames that one window sees, and those of them that are kept."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def cut_windows(config: ModelConfig, frames: int, window: float, overlap: float) -> list[Window]:
    """Windows of ``window`` seconds, neighbours sharing ``overlap`` seconds or more.

    Both to the nearest frame.

    frames: of the whole clip. The last window ends with it and is as long as the others.

    Raises ConfigError if windows of that length do not get anywhere.
    """
    length = round(window * config.sample_rate / config.hop)
    shared = round(overlap * config.sample_rate / config.hop)
    if shared < 2 or length < 2 * shared:
        raise ConfigError(
            "windows and their overlap do not fit together",
            found=f"windows of {window:g} s that overlap by {overlap:g} s",
            expected="an overlap of 40 ms or more, and windows at least twice as long",
        )
    starts = list(range(0, max(frames - length, 0), length - shared))
    starts.append(max(frames - length, 0))
    stops = [min(start + length, frames) for start in starts]
    cuts = [(start + stop) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)]
    return [
        Window(*bounds) for bounds in zip(starts, stops, [0, *cuts], [*cuts, frames], strict=True)
    ]


def windowed(
    model: ContentvecModel,
    waveform: Waveform,
    kind: FeatureKind,
    window: float,
    overlap: float,
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Features, Seams]:
    """Features of one checked waveform, window by window, and how well the windows agree.

    returns: (frames, width) float32 and the seams; not the features of the whole clip

    Raises ConfigError as :func:`cut_windows` and ``features_of`` do.
    """
    from ..features import features_of

    config = model.config
    frames = config.frames(len(waveform))
    features = np.empty((frames, kind.width(config)), np.float32)
    before: Features | None = None
    squares: list[float] = []
    largest = 0.0
    for piece in cut_windows(config, frames, window, overlap):
        # the last window reaches to the end of the clip, the samples after the last frame included
        end = (piece.stop - 1) * config.hop + config.receptive_field
        span = slice(piece.start * config.hop, None if piece.stop == frames else end)
        inside = features_of(model, waveform[span], kind, max_memory)
        if before is not None:
            at_cut = inside[piece.keep_from - 1 - piece.start :][:2]
            difference = np.abs(at_cut - before)
            squares.append(float(np.mean(np.square(difference, dtype=np.float64))))
            largest = max(largest, float(difference.max()))
        features[piece.keep_from : piece.keep_to] = inside[
            piece.keep_from - piece.start : piece.keep_to - piece.start
        ]
        progress(piece.keep_to / frames)
        before = inside[piece.keep_to - 1 - piece.start :][:2]
    rms = float(np.sqrt(np.mean(squares))) if squares else 0.0
    return features, Seams(len(squares), largest, rms)
