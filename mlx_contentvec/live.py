"""Features of sound as it arrives: a window that moves over a stream, one block at a time.

A stream of samples 0, 1, 2, ... has frame k at samples ``k * hop`` to
``k * hop + receptive_field``, as a clip has. After every block of new samples a
window of one fixed length is computed; it ends with the last frame that is
complete by then, and the frames that no window before it had are the answer:

    samples   |        context        | block i |
    window    |-------------------------------|        ends with a frame
    frames                            |. . . .|        new: these are returned

Each new frame is the one that a forward pass over its window gives. It differs
from the frame of the whole clip, which sees what comes later and all that came before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .audio import Waveform, as_waveform
from .config import ModelConfig
from .errors import ConfigError
from .features import (
    FeatureKind,
    FeatureModel,
    Features,
    feature_kind,
    features_of,
    require_finite,
)

#: seconds of the past in RVC's real-time window, and from one window to the next: what
#: its settings extra_time and block_time are at first. Source: RVC, gui_v1.py
CONTEXT, BLOCK = 2.5, 0.25
#: seconds of context and block together
LONGEST_WINDOW = 60.0


@dataclass(frozen=True)
class Window:
    """The lengths of a moving window."""

    #: samples from one window to the next
    block_samples: int
    #: frames of a window: those of the context, and as many as a block can complete
    frames: int
    #: samples of a window
    samples: int

    @classmethod
    def of(cls, config: ModelConfig, context: float, block: float) -> Window:
        """That of a context and a block in seconds. Raises ConfigError for what cannot be."""
        context, block = _seconds("context", context), _seconds("block", block)
        if not block or context + block > LONGEST_WINDOW:
            raise ConfigError(
                "these blocks cannot be computed as they arrive",
                found=f"context={context:g}, block={block:g} seconds",
                expected=f"a block above 0, and at most {LONGEST_WINDOW:g} s together",
            )
        block_samples = max(1, round(block * config.sample_rate))
        before = math.ceil(round(context * config.sample_rate) / config.hop)
        frames = before + math.ceil(block_samples / config.hop)
        return cls(block_samples, frames, (frames - 1) * config.hop + config.receptive_field)


class Live:
    """One stream. Not for several threads at once: the order of blocks is the stream."""

    def __init__(self, model: FeatureModel, kind: FeatureKind, window: Window) -> None:
        """See :func:`live`."""
        kind.check(model.config)
        self.window = window
        self._model, self._kind, self._config = model, kind, model.config
        self.reset()
        # a GPU compiles for this length, a CPU prepares its weights: now, not at the first block
        features_of(model, np.zeros(window.samples, np.float32), kind)

    @property
    def latency(self) -> float:
        """Seconds that a sample waits at most for its frame, besides the computing."""
        return (self.window.block_samples + self._config.receptive_field) / self._config.sample_rate

    def reset(self) -> None:
        """Start a new stream, whose context is silence at first."""
        #: samples pushed so far, and how many of them windows were computed for
        self._received = self._computed = 0
        self._returned = 0
        # the samples that windows still need, the first of them at _start in the stream
        self._start = -self.window.frames * self._config.hop
        self._samples = np.zeros(-self._start, np.float32)

    def push(self, samples: Any) -> Features:
        """Take the next samples of the stream, of any number, and return the frames that are new.

        samples: (samples,) or (samples, channels) at the model's rate (16 kHz), floating
                 point in -1 to 1 or integers; another rate is for the caller to change,
                 whose resampler knows what came before
        returns: (frames, width) float32; none while a block is not full, and those of
                 several windows where ``samples`` is longer than a block

        Raises AudioError for samples that cannot be used, and goes on without them.
        """
        taken = self._checked(samples)
        self._samples = np.concatenate([self._samples, taken])
        self._received += len(taken)
        return self._joined(self._full_blocks())

    def finish(self) -> Features:
        """The frames that are left when the stream ends, (frames, width); then a new one starts."""
        rest = self._joined(self._window(self._received))
        self.reset()
        return rest

    def _checked(self, samples: Any) -> Waveform:
        if (isinstance(samples, list) and not samples) or getattr(samples, "size", 1) == 0:
            return np.zeros(0, np.float32)
        rate = self._config.sample_rate
        return as_waveform(samples, rate, sample_rate=rate)

    def _full_blocks(self) -> Iterator[Features]:
        while self._received - self._computed >= self.window.block_samples:
            self._computed += self.window.block_samples
            yield from self._window(self._computed)

    def _window(self, end: int) -> Iterator[Features]:
        """The new frames of the window after ``end`` samples of the stream, if there are any."""
        complete = self._config.frames(end)
        new = complete - self._returned
        if not new:
            return
        first = (complete - self.window.frames) * self._config.hop
        self._samples = self._samples[first - self._start :]
        self._start, self._returned = first, complete
        window = self._samples[: self.window.samples]
        yield require_finite(features_of(self._model, window, self._kind)[-new:])

    def _joined(self, pieces: Iterator[Features]) -> Features:
        none = np.zeros((0, self._kind.width(self._config)), np.float32)
        return np.concatenate([none, *pieces])


def live(
    model: FeatureModel,
    *,
    version: str | None = None,
    layer: int | None = None,
    project: bool = False,
    context: float = CONTEXT,
    block: float = BLOCK,
) -> Live:
    """A stream whose frames are computed block by block, each in a window of its recent past.

    version, layer, project: which features, as for ``extract``
    context: seconds of sound that every returned frame has before it in its window
    block:   seconds of new sound from one window to the next

    ``push`` takes samples as they come and ``finish`` ends the stream; together they
    return as many frames as a clip of these samples has. All windows are of one
    length, the first of which is computed here, of silence. A frame is returned at
    most ``block`` and 25 ms (a frame's own length) after its first sample, and what
    computing a window takes: ``mlx-contentvec bench --live`` measures it. Frames of
    neighbouring windows differ a little in what they saw; a crossfade over their seam
    is for the caller, who makes sound of them.

    Raises ConfigError for features the model does not have, and for a window that is
    none or too long.
    """
    kind = feature_kind(version, layer, project)
    return Live(model, kind, Window.of(model.config, context, block))


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ConfigError(f"{name} is a number of seconds", found=repr(value)[:200])
