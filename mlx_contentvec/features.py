"""Waveforms in, RVC's features out: one clip of any length, or many clips in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from .audio import SAMPLE_RATE, Waveform, as_waveform
from .backend import device_kind, mx
from .config import ModelConfig
from .errors import ConfigError
from .memory import plan_chunks, whole_clip_bytes
from .streaming import Walk, streamed

Features = npt.NDArray[np.float32]


class FeatureModel(Protocol):
    """What is needed of ``model.ContentvecModel``, which stands above this module."""

    config: ModelConfig

    def walk(self) -> Walk: ...

    def __call__(self, source: Any, **options: Any) -> dict[str, Any]: ...


#: how a clip shorter than others of its batch is treated: "exact" gives it the
#: features it has alone, "fairseq" the original's, where padding is heard
Padding = Literal["exact", "fairseq"]

#: within a batch no clip is padded by more than this part of its own length
MOST_PADDING = 0.25
#: clips that :func:`extract_many` looks at together to find batches
LOOK_AHEAD = 64
#: seconds of audio in one batch. On a CPU batches are no faster than single clips
BATCH_SECONDS = {"cpu": 0.0, "metal": 60.0, "cuda": 120.0}


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
        if not 1 <= self.layer <= config.encoder_layers:
            raise ConfigError(
                f"this model has no layer {self.layer} to take features from",
                expected=f"1 to {config.encoder_layers}, counted from 1 as in fairseq",
            )
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
    if (version or "v2") not in VERSIONS:
        raise ConfigError(f"no version {version!r}", expected=" or ".join(VERSIONS))
    return VERSIONS[version or "v2"]


def extract(
    model: FeatureModel,
    waveform: Any,
    *,
    sample_rate: int = SAMPLE_RATE,
    version: str | None = None,
    layer: int | None = None,
    project: bool = False,
    max_memory: int | None = None,
) -> Features:
    """Features of one clip, whatever its length: nothing is cut, nothing drifts.

    waveform:   (samples,) or (samples, channels), floating point in -1 to 1 or
                integers, mixed to mono and resampled to the model's rate
    version:    "v1" (layer 9, projected, 256 wide) or "v2" (layer 12, 768 wide);
                or ``layer`` counted from 1, with ``project`` for ``final_proj``
    max_memory: bytes that may be used beside the model and the waveform. A clip
                that needs more in one go is streamed (``mlx_contentvec.streaming``):
                the same features within float32 noise. By default 256 MiB on a CPU
                and a quarter of a GPU's memory, and for a streamed clip 6 KiB a frame.

    returns: (frames, width) float32, about 50 frames a second

    Raises AudioError for a waveform that cannot be used, ConfigError for features
    the model does not have or a ``max_memory`` that is too small.
    """
    kind = feature_kind(version, layer, project)
    kind.check(model.config)
    samples = _as_waveform(model, waveform, sample_rate)
    return features_of(model, samples, kind, max_memory)


def extract_many(
    model: FeatureModel,
    waveforms: Iterable[Any],
    *,
    sample_rate: int = SAMPLE_RATE,
    version: str | None = None,
    layer: int | None = None,
    project: bool = False,
    max_memory: int | None = None,
    batch_seconds: float | None = None,
    padding: Padding = "exact",
) -> Iterator[Features]:
    """Features of many clips, in their order, computed in batches where that pays.

    Clips of like length share a batch of at most ``batch_seconds`` of audio (by
    default 60 or 120 on a GPU, and none on a CPU, where batches gain nothing).
    With ``padding="exact"`` every clip gets the features it gets alone, within
    float32 noise. ``padding="fairseq"`` is the original's own treatment: its
    group norm hears the padding, so features depend on the batch.

    The other arguments and the errors are those of :func:`extract`. Clips are
    taken from ``waveforms`` as they are needed, 64 at a time.
    """
    kind = feature_kind(version, layer, project)
    kind.check(model.config)
    if batch_seconds is None:
        batch_seconds = BATCH_SECONDS[device_kind()]
    remaining = iter(waveforms)
    while taken := [_as_waveform(model, w, sample_rate) for w in islice(remaining, LOOK_AHEAD)]:
        results: dict[int, Features] = {}
        for batch in batches([len(w) for w in taken], int(batch_seconds * SAMPLE_RATE)):
            features = features_of_batch(
                model, [taken[i] for i in batch], kind, padding, max_memory
            )
            results.update(zip(batch, features, strict=True))
        yield from (results[i] for i in range(len(taken)))


def batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group clips into batches: indices into ``lengths``, every one exactly once.

    lengths: samples of each clip
    limit:   samples in a batch, padding included; a longer clip stands alone

    Clips of one length come together first; a clip is padded by a quarter of
    its length at most.
    """
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
    """
    plan = plan_chunks(model.config, len(waveform), max_memory)
    if plan is not None:
        config = model.config
        if normalized:
            config = replace(config, normalize=False)
        return streamed(model.walk(), config, waveform, kind.layer, kind.project, plan, progress)
    result: dict[str, Any] = model(
        waveform[None], output_layer=kind.layer, project=kind.project, normalized=normalized
    )
    return _rows(result["x"][0])


def features_of_batch(
    model: FeatureModel,
    waveforms: Sequence[Waveform],
    kind: FeatureKind,
    padding: Padding = "exact",
    max_memory: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> list[Features]:
    """Features of checked waveforms that share a batch, or of one that stands alone."""
    longest = max(len(waveform) for waveform in waveforms)
    alone = len(waveforms) == 1
    if alone or whole_clip_bytes(model.config, longest, len(waveforms)) > (max_memory or 1 << 62):
        return [features_of(model, waveform, kind, max_memory, progress) for waveform in waveforms]
    source = np.zeros((len(waveforms), longest), np.float32)
    for row, waveform in zip(source, waveforms, strict=True):
        row[: len(waveform)] = waveform
    lengths = np.array([len(waveform) for waveform in waveforms])
    treatment: dict[str, Any] = {}
    if (lengths < longest).any():
        if padding == "exact":
            treatment = {"lengths": mx.array(lengths)}
        else:
            treatment = {"padding_mask": mx.array(np.arange(longest)[None] >= lengths[:, None])}
    result: dict[str, Any] = model(
        source, output_layer=kind.layer, project=kind.project, **treatment
    )
    x, mask = result["x"], result["padding_mask"]
    counts = [x.shape[1]] * len(waveforms) if mask is None else (~mask).sum(axis=1).tolist()
    return [_rows(clip[:count]) for clip, count in zip(x, counts, strict=True)]


def _as_waveform(model: FeatureModel, waveform: Any, sample_rate: int) -> Waveform:
    return as_waveform(
        waveform,
        sample_rate,
        sample_rate=model.config.sample_rate,
        min_samples=model.config.receptive_field,
    )


def _rows(x: Any) -> Features:
    """(frames, width) as a float32 numpy array of its own."""
    return np.array(x.astype(mx.float32))
