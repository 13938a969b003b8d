"""What a forward pass is given, checked: waveform, lengths, padding, speaker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import memory
from .audio import LOUDEST_PEAK, as_float32, require_unmasked
from .backend import device_kind, mx
from .config import ModelConfig, stage_input
from .errors import AudioError, ConfigError
from .first_release import ignore_speaker
from .ops import is_traced
from .ops.host_copy import from_numpy, to_numpy

Buffer = npt.NDArray[np.float32]


def to_mlx(x: Any, name: str) -> mx.array:
    """``x`` as an MLX array: one already, or numbers in any layout and byte order.

    Raises AudioError, which calls it ``name``, for anything else.
    """
    if isinstance(x, mx.array):
        return x
    require_unmasked(x, name)
    try:
        return from_numpy(_native(x)) if isinstance(x, np.ndarray) else mx.array(x)
    except Exception as error:  # whatever the object raises that is asked to become an array
        kind = f"numpy, {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise AudioError(
            f"{name} cannot be read as an array",
            found=f"{kind}: {error}",
            expected="an array of numbers",
            hint="make it a numpy array first: np.asarray(values)",
        ) from error


def _native(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Numbers in the form that MLX takes: floats as float32, this machine's byte order, by rows."""
    if array.dtype.kind == "f":
        array = as_float32(array)
    elif array.dtype.kind not in "biuc":
        raise TypeError("these are no numbers")
    return np.asarray(array, array.dtype.newbyteorder("="), order="C")


def check_waveform(source: Any, config: ModelConfig) -> mx.array:
    """``source`` as float32, (batch, samples).

    Raises AudioError for another rank or type, a clip that is too short, NaN, another
    scale, or more than this machine can hold.
    """
    in_memory = source if isinstance(source, np.ndarray) else None
    if in_memory is not None:
        source = to_mlx(in_memory, "the waveform")
    if not isinstance(source, mx.array):
        raise AudioError(
            "the waveform must be an array",
            found=type(source).__name__,
            expected="mlx.core.array or numpy.ndarray of shape (batch, samples)",
        )
    if source.ndim != 2:
        raise AudioError(
            "the waveform has the wrong rank",
            found=f"shape {tuple(source.shape)}",
            expected="(batch, samples)",
            hint="for one clip: source[None] or source.reshape(1, -1); "
            "stereo must be mixed to mono first",
        )
    if not mx.issubdtype(source.dtype, mx.floating):
        raise AudioError(
            "the waveform is not floating point",
            found=str(source.dtype),
            expected="float32 samples, about -1 to 1",
            hint="int16 samples: source.astype(mx.float32) / 32768",
        )
    batch, samples = source.shape
    if batch < 1:
        raise AudioError("the batch holds no clip")
    if samples < config.receptive_field:
        raise AudioError(
            "the clip is too short for a single frame",
            found=f"{samples} samples",
            expected=f"at least {config.receptive_field} "
            f"({1000 * config.receptive_field / config.sample_rate:g} ms)",
        )
    if device_kind() == "cpu":
        _check_memory(config, samples, batch)
    source = source.astype(mx.float32)
    if is_traced(source):  # nothing to look at yet
        return source
    # a GPU's answer would take 0.5 ms, a tenth of a pass over 1 s (H200)
    peak = float(mx.abs(source).max() if in_memory is None else np.abs(in_memory).max())
    if not np.isfinite(peak):
        raise AudioError(
            "the waveform holds NaN or infinity",
            hint="find the broken samples with numpy.isfinite; one is enough to spoil a clip",
        )
    if peak > LOUDEST_PEAK:
        raise AudioError(
            "the waveform is out of scale",
            found=f"peak {peak:g}",
            expected="float samples, about -1 to 1",
            hint="samples in int16 scale: divide by 32768",
        )
    return source


def _check_memory(config: ModelConfig, samples: int, batch: int) -> None:
    """Refuse what cannot fit: on a CPU, MLX crashes when it is given no memory."""
    available = memory.process_memory()
    needed = memory.whole_clip_bytes(config, samples, batch)
    if available is not None and needed > available:
        raise AudioError(
            "this is too long to be computed in one go here",
            found=f"{batch} x {samples / config.sample_rate:.0f} s, about {needed / 2**30:.0f} GiB",
            expected=f"less than {available / 2**30:.1f} GiB, which is all that there is",
            hint="model.extract(waveform, sample_rate=16000) computes the same features in pieces",
        )


def check_lengths(lengths: Any, source: mx.array, config: ModelConfig) -> mx.array:
    """(batch,) samples of each clip, each long enough for a frame and within its row.

    Raises AudioError.
    """
    batch, samples = source.shape
    counts = np.asarray(to_mlx(lengths, "lengths"))
    if counts.shape != (batch,) or not np.issubdtype(counts.dtype, np.integer):
        raise AudioError(
            "lengths must be one whole number of samples a clip",
            found=f"shape {counts.shape}, {counts.dtype}",
            expected=f"shape ({batch},), integers",
        )
    if counts.min() < config.receptive_field or counts.max() > samples:
        raise AudioError(
            "a clip's length is impossible",
            found=f"{counts.min()} to {counts.max()} samples",
            expected=f"{config.receptive_field} to {samples}",
        )
    return mx.array(counts.astype(np.int32))


def check_speaker(speaker: Any, source: mx.array, config: ModelConfig) -> mx.array | None:
    """(batch, speaker_dim) for a conditioned model; None for any other, and a warning.

    source: the waveform, (batch, samples)
    Raises ConfigError.
    """
    if not config.encoder_layers_1:
        if speaker is not None:
            ignore_speaker(speaker, source)
        return None
    expected = (len(source), config.speaker_dim)
    embedding = None if speaker is None else to_mlx(speaker, "spk_emb")
    if embedding is None or tuple(embedding.shape) != expected:
        raise ConfigError(
            "this model needs a speaker embedding",
            found="none" if embedding is None else f"shape {tuple(embedding.shape)}",
            expected=f"spk_emb= of shape {expected}",
        )
    if not is_traced(embedding) and not bool(mx.isfinite(embedding).all()):
        raise ConfigError("spk_emb holds NaN or infinity", expected="finite numbers")
    return embedding


def check_padding_mask(padding_mask: Any, source: mx.array) -> mx.array:
    """(batch, samples), true where padded. Raises AudioError for what does not fit ``source``."""
    given = to_mlx(padding_mask, "the padding mask")
    if tuple(given.shape) != tuple(source.shape):
        raise AudioError(
            "the padding mask does not fit the waveform",
            found=f"shape {tuple(given.shape)}",
            expected=f"the waveform's shape, {tuple(source.shape)}",
            hint="a speaker embedding goes by its name: spk_emb=",
        )
    padding = given != 0
    if bool((padding & (given != 1)).any()):
        raise AudioError(
            "the padding mask holds other values than 0 and 1",
            expected="true where padded, else false",
        )
    return padding


def check_stage_input(stage: str, x: Any, config: ModelConfig) -> mx.array:
    """``x`` as the input of a stage: the waveform, or (batch, frames, channels).

    Raises AudioError for another shape, or for too few frames.
    """
    given = to_mlx(x, f"the input of {stage}")
    before = stage_input(config, stage)
    kind, _, number = stage.partition(".")
    least = config.conv_layers[int(number)][1] if kind == "conv" else 1
    if before is None:
        fits, expected = given.ndim == 2 and given.shape[1] >= least, "(batch, samples)"
    else:
        earlier, _, number = before.partition(".")
        channels = (
            config.conv_layers[int(number)][0] if earlier == "conv" else config.encoder_embed_dim
        )
        fits = given.ndim == 3 and given.shape[1] >= least and given.shape[2] == channels
        expected = f"(batch, frames, {channels})"
    if not fits or not given.shape[0]:
        raise AudioError(
            f"{stage} cannot read this input",
            found=f"shape {tuple(given.shape)}",
            expected=f"{expected}, at least {least} of the second",
        )
    return given


def padded_frames(
    source: mx.array,
    config: ModelConfig,
    padding: mx.array | None,
    lengths: mx.array | None,
) -> mx.array | None:
    """Which frames are padding, (batch, frames), from either description of the samples.

    From a padding mask by the original's rule, which drops what does not
    divide evenly and calls a frame padded if all its samples are: it can
    count one frame more than the clip alone has.
    Source: fairseq/models/hubert/hubert.py, ``forward_padding_mask``.
    Raises AudioError for a clip that is nothing but padding.
    """
    frames = config.frames(source.shape[1])
    if lengths is not None:
        counts = [config.frames(int(n)) for n in lengths.tolist()]
        return mx.arange(frames)[None] >= mx.array(counts)[:, None]
    if padding is None:
        return None
    batch, samples = padding.shape
    whole = samples - samples % frames
    padded = padding[:, :whole].reshape(batch, frames, -1).all(axis=-1)
    if bool(padded.all(axis=-1).any()):
        raise AudioError("a clip of the batch is nothing but padding")
    return padded


def unpadded_lengths(padding: mx.array) -> mx.array:
    """(batch,) samples of each clip in front of its padding, (batch, samples).

    Raises AudioError for padding before or between samples, which the original's
    loader never makes: what it would normalise such a clip by is not known.
    """
    lengths = (~padding).sum(axis=1)
    if bool((padding != (mx.arange(padding.shape[1])[None] >= lengths[:, None])).any()):
        raise AudioError(
            "the padding mask has padding before or between samples",
            expected="the samples of a clip, then its padding: this model normalises each clip",
        )
    return lengths


@dataclass(frozen=True)
class Normalization:
    """Zero mean and unit variance over a whole clip, as large models were trained.

    Source: fairseq/data/audio/raw_audio_dataset.py, ``postprocess``:
    ``F.layer_norm(feats, feats.shape)``, whose epsilon is 1e-5;
    transformers/models/wav2vec2/feature_extraction_wav2vec2.py,
    ``zero_mean_unit_var_norm``, with 1e-7.
    """

    mean: float
    deviation: float

    @classmethod
    def of(cls, waveform: Buffer, eps: float, block: int = 1 << 20) -> Normalization:
        """That of a clip, (samples,), read ``block`` samples at a time."""
        mean = float(waveform.mean(dtype=np.float64))
        blocks = (waveform[at : at + block] - mean for at in range(0, len(waveform), block))
        squares = sum(float(np.square(x, dtype=np.float64).sum()) for x in blocks)
        return cls(mean, float(np.sqrt(squares / len(waveform) + eps)))

    def __call__(self, waveform: Buffer) -> Buffer:
        """Any part of the clip, normalised."""
        return ((waveform.astype(np.float64) - self.mean) / self.deviation).astype(np.float32)


def normalization_of(waveform: Buffer, config: ModelConfig) -> Callable[[Buffer], Buffer]:
    """How a model of this configuration wants parts of ``waveform``, (samples,)."""
    if not config.normalize:
        return lambda samples: samples
    return Normalization.of(waveform, config.normalize_eps)


def normalize_waveform(waveform: mx.array, eps: float, lengths: mx.array | None = None) -> mx.array:
    """Each clip by its own :class:`Normalization`; padding becomes 0.

    The original's loader normalises a clip, then pads it with zeros.
    Source: fairseq/data/audio/raw_audio_dataset.py, ``postprocess``, ``collater``.

    waveform: (batch, samples)    lengths: (batch,) samples that count, or None for all
    """
    if is_traced(waveform):
        return _normalize_traced(waveform, eps, lengths)
    clips = to_numpy(waveform, copy=False)
    counts = [clips.shape[1]] * len(clips) if lengths is None else lengths.tolist()
    normalized = np.zeros_like(clips)
    for row, clip, count in zip(normalized, clips, counts, strict=True):
        row[:count] = Normalization.of(clip[:count], eps)(clip[:count])
    return from_numpy(normalized)


def _normalize_traced(waveform: mx.array, eps: float, lengths: mx.array | None) -> mx.array:
    """The same by operations that have gradients, in float32."""
    samples = waveform.shape[1]
    count = mx.full((len(waveform), 1), samples) if lengths is None else lengths[:, None]
    inside = mx.arange(samples)[None] < count
    mean = mx.where(inside, waveform, 0).sum(axis=1, keepdims=True) / count
    centred = mx.where(inside, waveform - mean, 0)
    variance = (centred * centred).sum(axis=1, keepdims=True) / count
    return centred * mx.rsqrt(variance + eps)
