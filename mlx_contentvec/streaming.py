"""Clips of any length in bounded memory, and the same features as in one go.

A HuBERT sees its whole clip: the first group norm runs over time and every
frame attends to every other. Cutting a clip therefore changes the features.
Here nothing is cut. Each stage walks over the clip in pieces and is given
exactly what it needs from beyond the piece:

    first convolution  its group norm's statistics, from one pass over the waveform
                       in float64 (``cpu.Moments`` says why that is enough)
    convolutions       ``receptive_field - hop`` samples of context, 80 in every known model
    positional conv    half a kernel of frames on both sides
    attention          all keys and values of a few heads, the queries piece by piece
    feed-forward       nothing: frames do not see each other

What differs from the unchunked result is the order of some sums: float32 noise.
Between stages the clip is held as float32 in two numpy buffers, (frames, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import cpu, kernels
from .backend import device_kind, mx
from .config import ModelConfig
from .errors import ConfigError

if TYPE_CHECKING:
    from .layers import EncoderLayer
    from .model import ContentvecModel

Array = Any
Buffer = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pieces:
    """How much of a clip is in work at once."""

    #: frames of the front end, and of whatever is computed frame by frame
    frames: int
    #: attention heads whose keys and values are held
    heads: int
    #: queries that are scored against all keys of a head
    queries: int


#: bytes beside model, waveform and the two buffers that a CPU is given where no cap is
#: set; a GPU is given a part of its memory. A clip that needs no more is not streamed
CPU_ROOM = 256 << 20
GPU_PART = 1 / 4
#: a GPU's memory where MLX does not tell
GPU_MEMORY = 8 << 30
#: sizes that a piece may have, the first being the least that works. A CPU is
#: fastest while its pieces stay in cache, a GPU wants them large
FRAMES = {"cpu": (32, 64, 128, 256), "metal": (32, 128, 512, 2048), "cuda": (32, 128, 512, 2048)}
QUERIES = (16, 64, 256, 1024)
#: arrays as large as its largest that front end or feed-forward hold at their peak, and
#: copies of the scores that attention holds (measured; assumed for Metal). A CPU works
#: in tiles, so that most of its arrays are small
COPIES = {"cpu": 3, "metal": 5, "cuda": 5}
SCORES = {"cpu": 0.0, "metal": 2.25, "cuda": 2.25}


def whole_clip_bytes(config: ModelConfig, samples: int, batch: int = 1) -> int:
    """About what a forward pass over whole clips takes beside the model, in bytes."""
    frames = config.frames(samples)
    scores = SCORES[device_kind()] * config.encoder_attention_heads * frames * frames
    return 4 * batch * max(_values_at_once(config, frames), int(scores))


def _values_at_once(config: ModelConfig, frames: int) -> int:
    """The most numbers held while ``frames`` frames go through front end or feed-forward."""
    channels, _, stride = config.conv_layers[0]
    front_end = frames * config.hop // stride * channels
    return COPIES[device_kind()] * max(front_end, frames * config.encoder_ffn_embed_dim)


def streamed_bytes(config: ModelConfig, samples: int, pieces: Pieces) -> int:
    """About what :func:`streamed` takes beside the model and the waveform, in bytes."""
    frames = config.frames(samples)
    head_width = config.encoder_embed_dim // config.encoder_attention_heads
    # keys and values, twice while their pieces are joined, and on a CPU rearranged
    keys_and_values = 4 * pieces.heads * frames * head_width
    if device_kind() == "cpu":
        scored = 2 * min(cpu.SCORES, pieces.queries * frames)
    else:
        scored = 2 * pieces.heads * frames * pieces.queries
    attention = keys_and_values + scored
    return _buffers(config, frames) + 4 * max(_values_at_once(config, pieces.frames), attention)


def _buffers(config: ModelConfig, frames: int) -> int:
    return 2 * 4 * frames * config.encoder_embed_dim


def plan_pieces(config: ModelConfig, samples: int, max_memory: int | None) -> Pieces | None:
    """How to stream a clip of ``samples`` samples; None if it fits in one go.

    max_memory: bytes beside the model and the waveform; None for what suits the device

    Raises ConfigError if ``max_memory`` is less than the clip needs.
    """
    device = device_kind()
    limit = _room() if max_memory is None else max_memory
    if whole_clip_bytes(config, samples) <= limit:
        return None
    pieces = Pieces(frames=FRAMES[device][0], heads=1, queries=QUERIES[0])
    least = streamed_bytes(config, samples, pieces)
    if max_memory is None:
        limit = max(least, limit + _buffers(config, config.frames(samples)))
    if least > limit:
        raise ConfigError(
            f"a clip of {samples / config.sample_rate:.1f} s does not fit the memory it is given",
            found=f"{limit / 2**20:.0f} MiB",
            expected=f"{least / 2**20:.0f} MiB or more",
            hint="give it more, or take windows, which changes the features around their seams",
        )
    heads = range(1, config.encoder_attention_heads + 1)
    choices = (("queries", QUERIES), ("frames", FRAMES[device]), ("heads", heads))
    for field, sizes in choices:
        for size in sizes:
            larger = replace(pieces, **{field: size})
            if streamed_bytes(config, samples, larger) <= limit:
                pieces = larger
    return pieces


def _room() -> int:
    if device_kind() == "cpu":
        return CPU_ROOM
    info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
    memory = info.get("memory_size") or info.get("total_memory") or GPU_MEMORY
    return int(memory * GPU_PART)


def streamed(
    model: ContentvecModel,
    waveform: Buffer,
    layer: int,
    project: bool,
    pieces: Pieces,
    progress: Callable[[float], None] = lambda _: None,
) -> Buffer:
    """The features of one clip, a piece at a time.

    waveform: (samples,) float32, checked by the caller
    progress: hears what part of the work is done, front end and layers alike
    returns:  (frames, width) float32: the output of ``layer``, projected if asked
    """
    x = _front_end(model, waveform, pieces.frames)
    # the second buffer of two: stages that look beyond their piece write here
    y = np.empty_like(x)
    _positional(model, x, y, pieces.frames)
    x, y = y, x
    for index in range(layer):
        block = model.encoder.layers[index]
        for part in _attend(model, block, x, y, pieces):
            progress((index + 1 + part) / (layer + 1))
        for start, stop in _spans(len(x), pieces.frames):
            attended = block.self_attn.out_proj(_load(model, y[start:stop]))
            x[start:stop] = _store(_after_attention(block, _load(model, x[start:stop]), attended))
    if not project:
        return x
    projected = np.empty((len(x), model.config.final_dim or 0), np.float32)
    for start, stop in _spans(len(x), pieces.frames):
        projected[start:stop] = _store(model.final_proj(_load(model, x[start:stop])))
    return projected


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _load(model: ContentvecModel, rows: Buffer) -> Array:
    """(frames, width) of a buffer as (1, frames, width) in what the model computes in."""
    return kernels.rounded(kernels.prepared(rows[None]), model.layer_norm.weight.dtype)


def _store(x: Array) -> Buffer:
    """(1, frames, width) as (frames, width) float32."""
    stored: Buffer = x[0] if isinstance(x, np.ndarray) else np.asarray(x[0].astype(mx.float32))
    return stored


# ---- waveform to frames -----------------------------------------------------------


def _front_end(model: ContentvecModel, waveform: Buffer, step: int) -> Buffer:
    config = model.config
    frames = config.frames(len(waveform))
    scale = _Scale.of(waveform) if config.normalize else _Scale(0.0, 1.0)
    moments = None
    if config.extractor_norm == "group":
        _, kernel, stride = config.conv_layers[0]
        moments = [cpu.Moments.of(waveform, kernel, stride, scale.applied)]
    first, *rest = model.feature_extractor.conv_layers
    x = np.empty((frames, config.encoder_embed_dim), np.float32)
    for start, stop in _spans(frames, step):
        heard = slice(start * config.hop, (stop - 1) * config.hop + config.receptive_field)
        samples = kernels.prepared(scale.applied(waveform[heard])[None])
        piece = first(samples[..., None], moments=moments)
        for block in rest:
            piece = block(piece)
        x[start:stop] = _store(model.run_stage("projection", piece))
    return x


@dataclass(frozen=True)
class _Scale:
    """Zero mean and unit variance over the whole clip, see ``model.normalize_waveform``."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, waveform: Buffer) -> _Scale:
        mean = float(waveform.mean(dtype=np.float64))
        blocks = (waveform[a:b] - mean for a, b in _spans(len(waveform), 1 << 20))
        squares = sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks)
        return cls(mean, float(np.sqrt(squares / len(waveform) + kernels.EPS)))

    def applied(self, waveform: Buffer) -> Buffer:
        if self == _Scale(0.0, 1.0):
            return waveform
        return ((waveform.astype(np.float64) - self.mean) / self.deviation).astype(np.float32)


# ---- frames to features -----------------------------------------------------------


def _positional(model: ContentvecModel, x: Buffer, y: Buffer, step: int) -> None:
    """The encoder's input to its first layer, from ``x`` into ``y``."""
    context = model.config.conv_pos // 2
    # the context is computed and thrown away: a piece of four contexts keeps that small
    for start, stop in _spans(len(x), max(step, 4 * context)):
        before, after = max(0, start - context), min(len(x), stop + context)
        piece = model.run_stage("positional", _load(model, x[before:after]))
        y[start:stop] = _store(piece[:, start - before : stop - before])


def _after_attention(block: EncoderLayer, x: Array, attended: Array) -> Array:
    """The rest of a layer, once attention has been projected: frames do not mix any more."""
    x = x + attended
    if block.norm_first:
        return x + block.feed_forward(block.final_layer_norm(x))
    x = block.self_attn_layer_norm(x)
    return block.final_layer_norm(x + block.feed_forward(x))


def _attend(
    model: ContentvecModel, block: EncoderLayer, x: Buffer, y: Buffer, pieces: Pieces
) -> Iterator[float]:
    """Self-attention before its output projection, from ``x`` into ``y``, a few heads at a time.

    Yields what part of it is done.
    """
    attention = block.self_attn
    width = x.shape[1] // attention.heads

    def read(start: int, stop: int) -> Array:
        piece = _load(model, x[start:stop])
        return block.self_attn_layer_norm(piece) if block.norm_first else piece

    for first in range(0, attention.heads, pieces.heads):
        heads = min(pieces.heads, attention.heads - first)
        rows = slice(first * width, (first + heads) * width)
        to_queries, to_keys, to_values = (
            _some_outputs(linear, rows, heads)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        keys, values = [], []
        for start, stop in _spans(len(x), pieces.frames):
            piece = read(start, stop)
            keys.append(to_keys(piece))
            values.append(to_values(piece))
            _compute(keys[-1], values[-1])
        all_keys, all_values = _joined(keys), _joined(values)
        _compute(all_keys, all_values)
        del keys, values
        for start, stop in _spans(len(x), pieces.queries):
            queries = to_queries(read(start, stop))
            y[start:stop, rows] = _store(kernels.attention(queries, all_keys, all_values, None))
            yield (first + heads * stop / len(x)) / attention.heads


def _joined(pieces: list[Array]) -> Array:
    if isinstance(pieces[0], np.ndarray):
        return np.concatenate(pieces, axis=2)
    return mx.concatenate(pieces, axis=2)


def _compute(*arrays: Array) -> None:
    mx.eval(*(x for x in arrays if not isinstance(x, np.ndarray)))


def _some_outputs(linear: Any, rows: slice, heads: int) -> Callable[[Array], Array]:
    """A linear layer of which only the outputs of some heads are computed.

    (1, frames, width) becomes (1, heads, frames, head width).
    """
    part = linear.outputs(rows)
    return lambda x: part(x).reshape(1, x.shape[1], heads, -1).transpose(0, 2, 1, 3)
