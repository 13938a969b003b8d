"""Waveforms in, RVC's features out: one clip of any length, or many clips in batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Real
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from .audio import SAMPLE_RATE, Clip, Waveform, as_waveform, read_audio
from .backend import device_kind, mx
from .config import ModelConfig, require_layer
from .errors import AudioError, BackendError, ConfigError, WeightsError
from .memory import (
    bounded,
    is_exhausted,
    limit_of,
    plans_in_turn,
    release,
    stacked_bytes,
    whole_clip_bytes,
)
from .ops import CpuHubert
from .ops.host_copy import to_numpy
from .ops.mlx import plans_attention
from .stacking import stacked
from .streaming import Walk, streamed

Features = npt.NDArray[np.float32]


class FeatureModel(Protocol):
    """What is needed of ``model.ContentvecModel``, which stands above this module."""

    config: ModelConfig
    #: a layer whose weight has the type that the model's have
    layer_norm: Any

    def walk(self) -> Walk: ...

    def __call__(self, source: Any, **options: Any) -> dict[str, Any]: ...


#: how a clip shorter than others of its batch is treated: "exact" gives it the
#: features it has alone, "fairseq" the original's, where padding is heard
Padding = Literal["exact", "fairseq"]

#: within a batch no clip is padded by more than this part of its own length
MOST_PADDING = 0.25
#: clips that :func:`extract_many` looks at together to find batches
LOOK_AHEAD = 64
#: seconds of audio in one batch, which fit into ``memory.GPU_ROOM``; on CUDA on tensor cores,
#: without which a batch is halved. On a CPU clips are stacked (``stacking``): from 16 s, 800
#: rows, on products are as fast as they get
BATCH_SECONDS = {"cpu": 16.0, "metal": 30.0, "cuda": 60.0}


@dataclass(frozen=True)
class FeatureKind:
    """Which of a model's outputs is wanted."""

    #: transformer layer, counted from 1
    layer: int
    #: whether ``final_proj`` is applied
    project: bool = False

    def __str__(self) -> str:
        return f"layer {self.layer}, projected" if self.project else f"layer {self.layer}"

    def width(self, config: ModelConfig) -> int:
        """Channels of the features."""
        return (config.final_dim or 0) if self.project else config.encoder_embed_dim

    def check(self, config: ModelConfig) -> None:
        """Raise ConfigError if a model of this configuration has no such output."""
        require_layer(self.layer, config.encoder_layers)
        if self.project and config.final_dim is None:
            raise ConfigError(
                "this model has no final_proj",
                hint="RVC v1 features need a checkpoint that kept it; v2 features do not",
            )


#: RVC's two kinds of features.
#: Source: RVC, infer/modules/train/extract_feature_print.py
VERSIONS = {"v1": FeatureKind(layer=9, project=True), "v2": FeatureKind(layer=12)}


def feature_kind(
    version: str | None = None, layer: int | None = None, project: bool = False
) -> FeatureKind:
    """The kind of features that RVC's ``version`` or an explicit ``layer`` names; v2 by default.

    Raises ConfigError for an unknown version, or a version beside a layer.
    """
    if layer is not None:
        if version is not None:
            raise ConfigError(
                "a version and a layer were both asked for",
                found=f"version {version}, layer {layer}",
                hint="v1 is layer 9 with the projection, v2 is layer 12 without",
            )
        return FeatureKind(layer, project)
    if project:
        raise ConfigError(
            "a projection of which layer?",
            hint="name the layer as well; RVC v1 is layer 9 with the projection",
        )
    if version is None:
        version = "v2"
    if not isinstance(version, str) or version not in VERSIONS:
        raise ConfigError(f"no version {version!r}", expected=" or ".join(VERSIONS))
    return VERSIONS[version]


def extract(
    model: FeatureModel,
    source: Any,
    *,
    sample_rate: int | None = None,
    version: str | None = None,
    layer: int | None = None,
    project: bool = False,
    max_memory: int | None = None,
) -> Features:
    """Features of one clip, whatever its length: nothing is cut, nothing drifts.

    source:     the path of an audio file; what ``read_audio`` returned; or an array,
                (samples,) or (samples, channels), floating point in -1 to 1 or
                integers. Mixed to mono and resampled to the model's rate
    sample_rate: in Hz, of an array, which does not say it; of the others it is known
    version:    "v1" (layer 9, projected, 256 wide) or "v2" (layer 12, 768 wide);
                or ``layer`` counted from 1, with ``project`` for ``final_proj``
    max_memory: bytes that may be used beside the model and the waveform. A clip
                that needs more in one go is streamed (``mlx_contentvec.streaming``):
                the same features within float32 noise. By default 256 MiB on a CPU
                and a quarter of a GPU's memory, 3 GiB at most, and for a streamed clip
                6 KiB a frame. On a GPU the freed buffers that MLX keeps count as well.

    returns: (frames, width) float32, about 50 frames a second

    Raises AudioError for audio that cannot be read or used, and for an array without
    ``sample_rate``; ConfigError for features the model does not have or a ``max_memory``
    that is too small; BackendError if the device has too little memory for the smallest
    pieces; WeightsError for features that are not finite.
    """
    kind = feature_kind(version, layer, project)
    kind.check(model.config)
    samples = _as_waveform(model, source, sample_rate)
    return require_finite(features_of(model, samples, kind, max_memory))


def extract_many(
    model: FeatureModel,
    sources: Iterable[Any],
    *,
    sample_rate: int | None = None,
    version: str | None = None,
    layer: int | None = None,
    project: bool = False,
    max_memory: int | None = None,
    batch_seconds: float | None = None,
    padding: Padding = "exact",
) -> Iterator[Features]:
    """Features of many clips, in their order, computed in batches where that pays.

    Clips share a batch of at most ``batch_seconds`` of audio: on a GPU those of like
    length, by default 60 s on CUDA and 30 on Metal; on a CPU neighbours of any length, 16 s,
    without padding.
    With ``padding="exact"`` every clip gets the features it gets alone, within
    float32 noise. ``padding="fairseq"`` is the original's own treatment: its
    group norm hears the padding, so features depend on the batch.

    The other arguments and the errors are those of :func:`extract`. Clips are
    taken from ``sources`` as they are needed, 64 at a time.
    """
    kind = feature_kind(version, layer, project)
    kind.check(model.config)
    if isinstance(sources, (str, bytes, os.PathLike, Clip)) or not isinstance(sources, Iterable):
        raise ConfigError(
            "extract_many takes several clips", hint="one clip: extract(path), or [path] here"
        )
    if batch_seconds is not None and (
        not isinstance(batch_seconds, Real) or not 0 <= batch_seconds < math.inf
    ):
        raise ConfigError(
            f"batch_seconds is {batch_seconds!r}", expected="seconds, a number from 0"
        )
    if padding not in get_args(Padding):
        raise ConfigError(f"no padding {padding!r}", expected=" or ".join(get_args(Padding)))
    if batch_seconds is None:
        batch_seconds = default_batch_seconds(padding)
    remaining = iter(sources)
    while taken := [_as_waveform(model, s, sample_rate) for s in islice(remaining, LOOK_AHEAD)]:
        results: dict[int, Features] = {}
        limit = int(batch_seconds * SAMPLE_RATE)
        for batch in batches([len(w) for w in taken], limit, stacked=stacks(model, padding)):
            features = features_of_batch(
                model, [taken[i] for i in batch], kind, padding, max_memory
            )
            results.update(zip(batch, features, strict=True))
        yield from (require_finite(results[i]) for i in range(len(taken)))


def require_finite(features: Features) -> Features:
    """The same features. Raises WeightsError if some are no numbers."""
    if not (finite := np.isfinite(features)).all():
        frames = np.count_nonzero(~finite.all(axis=1))
        raise WeightsError(
            "the features are not finite numbers",
            found=f"NaN or infinity in {frames:,} of {len(features):,} frames",
            hint="the weights hold such numbers, or are in float16 and too large for it:\n"
            "convert the checkpoint with --dtype float32, and compare: mlx-contentvec parity",
        )
    return features


def stacks(model: FeatureModel, padding: Padding) -> bool:
    """Whether clips that share a batch are stacked without padding: on a CPU, each as if alone.

    The norms of a speaker-conditioned layer see all of their batch.
    """
    exact = padding == "exact" and not model.config.encoder_layers_1
    return exact and device_kind() == "cpu"


def default_batch_seconds(padding: Padding) -> float:
    """Seconds of audio in a batch where none are asked for: on a CPU padding gains nothing."""
    cpu = device_kind() == "cpu"
    return 0.0 if cpu and padding != "exact" else BATCH_SECONDS[device_kind()]


def batches(lengths: Sequence[int], limit: int, *, stacked: bool = False) -> list[list[int]]:
    """Group clips into batches: indices into ``lengths``, every one exactly once.

    lengths: samples of each clip
    limit:   samples in a batch, padding included; a longer clip stands alone
    stacked: clips are not padded, and keep their order

    Clips of one length come together first; a clip is padded by a quarter of
    its length at most.
    """
    if stacked:
        return _neighbours(lengths, limit)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    grouped: list[list[int]] = []
    for i in order:
        shortest = lengths[grouped[-1][0]] if grouped else 0
        fits = bool(grouped) and (len(grouped[-1]) + 1) * lengths[i] <= limit
        if fits and lengths[i] <= shortest * (1 + MOST_PADDING):
            grouped[-1].append(i)
        else:
            grouped.append([i])
    return grouped


def _neighbours(lengths: Sequence[int], limit: int) -> list[list[int]]:
    grouped: list[list[int]] = []
    samples = 0
    for i, length in enumerate(lengths):
        if not grouped or samples + length > limit:
            grouped.append([])
            samples = 0
        grouped[-1].append(i)
        samples += length
    return grouped


def features_of(
    model: FeatureModel,
    waveform: Waveform,
    kind: FeatureKind,
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
    normalized: bool = False,
) -> Features:
    """Features of one checked waveform at the model's rate: in one go if it fits, else streamed.

    ``progress`` is given the part of a streamed clip that is done; ``normalized``: the
    waveform is used as it is, also by a model that wants normalised input.

    Raises BackendError if the device has not enough memory for the smallest pieces either.
    """
    if max_memory is not None and (not isinstance(max_memory, Real) or math.isnan(max_memory)):
        raise ConfigError(f"max_memory is {max_memory!r}", expected="bytes, a number")
    config = replace(model.config, normalize=False) if normalized else model.config
    stored = model.layer_norm.weight.dtype
    needed = whole_clip_bytes(config, len(waveform), stored=stored)
    said = ""
    for plan, limit in plans_in_turn(config, len(waveform), max_memory, stored):
        try:
            with bounded(limit, needed if plan is None else 0, stored):
                if plan is None:
                    return _in_one_go(model, [waveform], kind, normalized=normalized)[0]
                walk = model.walk()
                return streamed(walk, config, waveform, kind.layer, kind.project, plan, progress)
        except (RuntimeError, MemoryError) as error:
            if not is_exhausted(error):
                raise
            said = str(error).partition("\n")[0] or type(error).__name__
        # behind the handler: an error that is handled still holds the arrays of its work
        release()
    raise BackendError(
        f"the device has not enough for {len(waveform) / config.sample_rate:.1f} s of audio, "
        "in the smallest pieces either",
        found=said,
        hint="close what else uses the device, or compute on the CPU. If it speaks of cache\n"
        "thrashing: MLX_ENABLE_CACHE_THRASHING_CHECK=0",
    )


def features_of_batch(
    model: FeatureModel,
    waveforms: Sequence[Waveform],
    kind: FeatureKind,
    padding: Padding = "exact",
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> list[Features]:
    """Features of checked waveforms that share a batch, or of one that stands alone.

    A batch that is too large for the memory is halved until it fits; one that the device
    has not enough for is computed clip by clip.
    """
    if len(waveforms) == 1:
        return [features_of(model, waveforms[0], kind, max_memory, progress)]
    samples = [len(waveform) for waveform in waveforms]
    stored = model.layer_norm.weight.dtype
    together = whole_clip_bytes(model.config, max(samples), len(samples), stored)
    stacked = stacks(model, padding)
    needed = stacked_bytes(model.config, samples) if stacked else together
    if needed > limit_of(max_memory):
        middle = len(waveforms) // 2
        return [
            features
            for half in (waveforms[:middle], waveforms[middle:])
            for features in features_of_batch(model, half, kind, padding, max_memory, progress)
        ]
    try:
        with bounded(max_memory, together, stored):
            return _in_one_go(model, waveforms, kind, padding)
    except (RuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
    release()
    return [features_of(model, waveform, kind, max_memory, progress) for waveform in waveforms]


def _in_one_go(
    model: FeatureModel,
    waveforms: Sequence[Waveform],
    kind: FeatureKind,
    padding: Padding = "exact",
    normalized: bool = False,
) -> list[Features]:
    """Features of the clips of a batch, or of one clip, by one forward pass."""
    if len(waveforms) > 1 and stacks(model, padding):
        walk = model.walk()
        # parameters that are traced are computed by MLX
        if isinstance(walk, CpuHubert):
            return stacked(walk, model.config, waveforms, kind.layer, kind.project)
    longest = max(len(waveform) for waveform in waveforms)
    source = np.zeros((len(waveforms), longest), np.float32)
    for row, waveform in zip(source, waveforms, strict=True):
        row[: len(waveform)] = waveform
    lengths = np.array([len(waveform) for waveform in waveforms])
    treatment: dict[str, Any] = {}
    # a mask, also where nothing is padded: without one each length would have its plan
    planned = plans_attention(model.layer_norm.weight.dtype, model.config.head_width)
    if planned or (lengths < longest).any():
        if padding == "exact":
            treatment = {"lengths": lengths}
        else:
            treatment = {"padding_mask": np.arange(longest)[None] >= lengths[:, None]}
    result: dict[str, Any] = model(
        source,
        output_layer=kind.layer,
        project=kind.project,
        normalized=normalized,
        **treatment,
    )
    x, mask = result["x"], result["padding_mask"]
    counts = [x.shape[1]] * len(waveforms) if mask is None else (~mask).sum(axis=1).tolist()
    return [_rows(clip[:count]) for clip, count in zip(x, counts, strict=True)]


def _as_waveform(model: FeatureModel, source: Any, sample_rate: int | None) -> Waveform:
    """A path, a Clip or an array as the model takes it."""
    wanted, shortest = model.config.sample_rate, model.config.receptive_field
    if isinstance(source, (str, os.PathLike)):
        return read_audio(os.fspath(source), sample_rate=wanted, min_samples=shortest).waveform
    if isinstance(source, Clip):
        source, sample_rate = source.waveform, source.sample_rate
    if sample_rate is None:
        raise AudioError(
            "an array of samples does not say its sample rate",
            expected="sample_rate=, in Hz",
            hint=f"sample_rate={wanted} if it was made for this model; read_audio(path), or the\n"
            "path itself in place of the array, has the rate of the file",
        )
    return as_waveform(source, sample_rate, sample_rate=wanted, min_samples=shortest)


def _rows(x: Any) -> Features:
    """(frames, width) as a float32 numpy array of its own."""
    return to_numpy(x.astype(mx.float32))
