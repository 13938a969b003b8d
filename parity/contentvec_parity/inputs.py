"""What both sides are fed: clips made from seeds, and the user's own audio files.

Every clip is float32, 16 kHz mono, (batch, samples). The six ``BUILT_IN`` clips
are the ones every figure of the project refers to; ``STANDARD`` adds lengths,
levels, offsets and padded batches; ``THOROUGH`` adds the slow ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig

SAMPLE_RATE = 16_000

#: samples that one frame sees, in every model of the family
SHORTEST = ModelConfig().receptive_field

Waveform = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """One input: a waveform, or a padded batch of them."""

    name: str
    #: (batch, samples), float32, 16 kHz
    waveform: Waveform
    #: one sentence for the report
    about: str
    #: how to make it again: a seed and its parameters, or a file and how it was resampled
    origin: dict[str, Any] = field(default_factory=dict)
    #: (batch, samples), True where a row is padding; None for a clip without padding
    padding_mask: NDArray[np.bool_] | None = None

    @property
    def seconds(self) -> float:
        """Length in seconds, padding included."""
        return int(self.waveform.shape[1]) / SAMPLE_RATE


def speech_like(samples: int, seed: int) -> Waveform:
    """A voice-like test signal of ``samples`` samples, peak 0.7: (samples,), float32.

    A gliding fundamental with 24 harmonics whose strengths drift, syllables of
    2.3 per second, breath noise in bursts, and one near-silent pause; so every
    norm of the model sees loud and quiet frames within one clip.
    """
    made: Waveform = _speech_like(samples, seed).copy()
    return made


# each weight file of a package is held against the same clips
@functools.lru_cache(maxsize=32)
def _speech_like(samples: int, seed: int) -> Waveform:
    rng = np.random.RandomState(seed)
    seconds = np.arange(samples) / SAMPLE_RATE
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * seconds) + 25 * seconds
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    voice = np.zeros(samples)
    for harmonic in range(1, 25):
        drift = 1 + 0.6 * np.sin(2 * np.pi * (0.4 * harmonic) * seconds / 3)
        voice += np.sin(harmonic * phase + rng.rand() * 6.28) / harmonic**1.1 * drift
    syllables = np.clip(np.sin(2 * np.pi * 2.3 * seconds) + 0.35, 0, None)
    syllables[int(0.55 * samples) : int(0.62 * samples)] *= 1e-3
    breath = 0.3 + (np.sin(2 * np.pi * 1.1 * seconds) > 0.6)
    signal = voice * syllables + 0.05 * rng.randn(samples) * breath
    scaled: Waveform = (0.7 * signal / np.abs(signal).max()).astype(np.float32)
    return scaled


def spoken(name: str, samples: int, seed: int, about: str) -> Clip:
    """One speech-like clip."""
    return Clip(name, speech_like(samples, seed)[None], about, {"seed": seed, "samples": samples})


#: the names of the six built-in clips, for those who need no more of them
BUILT_IN = ("3s", "even", "short", "min", "quiet", "silence")


def built_in() -> list[Clip]:
    """The six clips every figure refers to."""
    short = spoken("short", 8000, 9, "half a second")
    return [
        spoken("3s", 48000, 7, "three seconds, speech-like"),
        spoken("even", 48320, 8, "an even number of frames (150)"),
        short,
        spoken("min", 400, 10, "the shortest clip that gives a frame"),
        Clip(
            "quiet",
            (short.waveform * 1e-3).astype(np.float32),
            "half a second at a thousandth of the level: the group norm's epsilon decides here",
            {**short.origin, "gain": 1e-3},
        ),
        Clip("silence", np.zeros((1, 8000), np.float32), "digital silence", {"samples": 8000}),
    ]


def _at_level(dbfs: float) -> Clip:
    peak = 10 ** (dbfs / 20)
    wave = speech_like(4000, 21)
    scaled = np.clip(wave.astype(np.float64) * (peak / 0.7), -1, 1).astype(np.float32)
    about = f"a quarter second with its peak at {dbfs:+.0f} dBFS" + (", clipped" * (dbfs > 0))
    return Clip(f"level{dbfs:+.0f}dB", scaled[None], about, {"seed": 21, "peak_dbfs": dbfs})


def _offset(dc: float) -> Clip:
    wave = (speech_like(8000, 22) * 0.4 + np.float32(dc)).astype(np.float32)
    about = f"half a second on a constant offset of {dc}"
    return Clip(f"dc{dc}", wave[None], about, {"seed": 22, "gain": 0.4, "offset": dc})


def padded_batch(name: str, lengths: tuple[int, ...], seed: int) -> Clip:
    """Speech-like clips of several lengths (in samples), padded with zeros to the longest."""
    longest = max(lengths)
    waveform = np.zeros((len(lengths), longest), np.float32)
    mask = np.ones((len(lengths), longest), bool)
    for row, samples in enumerate(lengths):
        waveform[row, :samples] = speech_like(samples, seed + row)
        mask[row, :samples] = False
    about = f"{len(lengths)} clips of {', '.join(map(str, lengths))} samples padded to one batch"
    return Clip(name, waveform, about, {"seed": seed, "lengths": list(lengths)}, mask)


def standard() -> list[Clip]:
    """The built-in clips, then lengths, levels, offsets and padded batches."""
    return [
        *built_in(),
        # on each side of the second and the third frame, and odd remainders of the hop of 320
        *(spoken(f"{n}", n, 31, f"{n} samples") for n in (719, 720, 721, 880, 1039, 1040, 1163)),
        *(_at_level(level) for level in (-80.0, -60.0, -40.0, -20.0, 0.0, 6.0)),
        *(_offset(dc) for dc in (0.1, 0.5)),
        padded_batch("batch2", (20000, 13000), 41),
        padded_batch("batch3", (9000, 4000, 400), 43),
        spoken("8s", 128000, 51, "eight seconds"),
    ]


def thorough() -> list[Clip]:
    """The standard clips, every remainder of the hop, and 1 to 30 seconds."""
    return [
        *standard(),
        *(spoken(f"hop{n}", 1360 + n, 61, f"{1360 + n} samples") for n in range(320)),
        *(
            spoken(f"{seconds}s", seconds * SAMPLE_RATE, 70 + seconds, f"{seconds} seconds")
            for seconds in (1, 2, 5, 15, 30)
        ),
    ]


def least_samples(config: ModelConfig) -> int:
    """The shortest clip that can be compared: one frame, of two windows of the first convolution.

    PyTorch's group norm refuses a single window, which a model of one convolution would give.
    """
    _, kernel, stride = config.conv_layers[0]
    return max(config.receptive_field, kernel + stride)


def lengthened(clip: Clip, samples: int) -> Clip:
    """``clip``, repeated if any of it is shorter than ``samples``: see ``least_samples``.

    400 samples are the shortest clip of the usual models; those of fewer frames per second
    need more.
    """
    if clip.padding_mask is not None:
        lengths = [int(row) for row in (~clip.padding_mask).sum(axis=1)]
        if min(lengths) >= samples:
            return clip
        return padded_batch(
            clip.name, tuple(max(length, samples) for length in lengths), clip.origin["seed"]
        )
    if clip.waveform.shape[1] >= samples:
        return clip
    about = f"{clip.about}, repeated to {samples} samples"
    origin = {**clip.origin, "repeated_to": samples}
    return Clip(clip.name, np.resize(clip.waveform, (1, samples)), about, origin)


#: name of a set of inputs -> what makes it
INPUT_SETS: dict[str, Callable[[], list[Clip]]] = {
    "built-in": built_in,
    "standard": standard,
    "thorough": thorough,
}


def from_files(paths: Iterable[Path], sample_rate: int = SAMPLE_RATE) -> list[Clip]:
    """The user's own audio, mixed to mono and brought to the rate of the model, in Hz.

    Raises AudioError if a file cannot be decoded, or is shorter than the 400
    samples that one frame needs.
    """
    from mlx_contentvec.audio import read_audio

    clips = []
    for path in paths:
        read = read_audio(path, sample_rate=sample_rate, min_samples=SHORTEST)
        origin = {
            "file": path.name,
            "sample_rate": read.source_rate,
            "channels": read.channels,
            "decoder": read.decoder,
            "resampler": read.resampler,
        }
        clips.append(Clip(path.name, read.waveform[None], f"the file {path.name}", origin))
    return clips
