"""Clips of any length in bounded memory, and the same features as in one go.

A HuBERT sees its whole clip: the first group norm runs over time and every
frame attends to every other. Cutting a clip therefore changes the features.
Here nothing is cut. Each stage walks over the clip in pieces and is given
exactly what it needs from beyond the piece:

    first convolution  its group norm's statistics, from one pass over the waveform
                       in float64 (``ops.cpu.Moments`` says why that is enough)
    convolutions       ``receptive_field - hop`` samples of context, 80 in every known model
    positional conv    half a kernel of frames on both sides
    attention          all keys and values of a few heads, the queries piece by piece
    feed-forward       nothing: frames do not see each other

What differs from the result in one go is the order of some sums: float32 noise.
Between stages the clip is held as float32 in two numpy buffers, (frames, width).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import ModelConfig
from .inputs import normalization_of
from .memory import ChunkPlan
from .ops import CpuHubert, MlxHubert
from .ops.cpu import Moments

Buffer = npt.NDArray[np.float32]
Walk = MlxHubert | CpuHubert

#: frames of a longer clip that a CPU's front end takes at a time, and the most that it takes
#: in one go. What it makes of 2 s stays in the cache, in memory that was used before (30 s:
#: 2.7 s instead of 3.4); a clip of 5 s takes the same time either way
FRONT_END_FRAMES, WHOLE_FRONT_END = 100, 300


def front_end_step(frames: int) -> int:
    """Frames that a CPU's front end takes at a time of a clip of so many."""
    return frames if frames <= WHOLE_FRONT_END else FRONT_END_FRAMES


def streamed(
    walk: Walk,
    config: ModelConfig,
    waveform: Buffer,
    layer: int,
    project: bool,
    plan: ChunkPlan,
    progress: Callable[[float], None] = lambda _: None,
) -> Buffer:
    """The features of one clip, a piece at a time.

    waveform: (samples,) float32, checked by the caller
    progress: is given the part of the work that is done, front end and layers alike
    returns:  (frames, width) float32: the output of ``layer``, projected if asked
    """
    x: Buffer = front_end(
        walk, config, waveform[None], plan.frames, normalize=normalization_of(waveform, config)
    )[0]
    # the second buffer of two: stages that look beyond their piece write here
    y = np.empty_like(x)
    _positional(walk, config, x, y, plan.frames)
    x, y = y, x
    for index in range(layer):
        for part in _attend(walk, index, config.encoder_attention_heads, x, y, plan):
            progress((index + 1 + part) / (layer + 1))
        after_attention = walk.layers[index].after_attention
        for start, stop in _spans(len(x), plan.frames):
            piece, attended = _load(walk, x[start:stop]), _load(walk, y[start:stop])
            x[start:stop] = _store(walk, after_attention(piece, attended))
    if not project or walk.final_proj is None:
        return x
    projected = np.empty((len(x), config.final_dim or 0), np.float32)
    for start, stop in _spans(len(x), plan.frames):
        projected[start:stop] = _store(walk, walk.final_proj(_load(walk, x[start:stop])))
    return projected


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _load(walk: Walk, rows: Buffer) -> Any:
    """(frames, width) of a buffer as (1, frames, width) in what the model computes in."""
    return walk.from_numpy(rows[None])


def _store(walk: Walk, x: Any) -> Buffer:
    """(1, frames, width) as (frames, width) float32."""
    rows: Buffer = walk.to_numpy(x)[0]
    return rows


def front_end(
    walk: Walk,
    config: ModelConfig,
    waveforms: Buffer,
    step: int,
    *,
    lengths: Sequence[int] | None = None,
    normalize: Callable[[Buffer], Buffer] = lambda samples: samples,
) -> Buffer:
    """The output of the projection: convolutions see ``receptive_field - hop`` samples more.

    waveforms: (batch, samples)    step: frames at a time
    lengths: samples of each clip that the first norm's statistics are taken of, or None for all
    returns: (batch, frames, width) float32
    """
    batch, samples = waveforms.shape
    frames = config.frames(samples)
    moments = None
    if config.extractor_norm == "group":
        _, kernel, stride = config.conv_layers[0]
        moments = [
            Moments.of(clip[:count], kernel, stride, normalize)
            for clip, count in zip(waveforms, lengths or [samples] * batch, strict=True)
        ]
    stages = dict(walk.stages(moments=moments))
    names = [*(f"conv.{i}" for i in range(len(config.conv_layers))), "projection"]
    x = np.empty((batch, frames, config.encoder_embed_dim), np.float32)
    for start, stop in _spans(frames, step):
        window = slice(start * config.hop, (stop - 1) * config.hop + config.receptive_field)
        piece = walk.waveform(normalize(waveforms[:, window]))
        for name in names:
            piece = stages[name](piece)
        x[:, start:stop] = walk.to_numpy(piece)
    return x


def _positional(walk: Walk, config: ModelConfig, x: Buffer, y: Buffer, step: int) -> None:
    """The encoder's input to its first layer, from ``x`` into ``y``."""
    positional = dict(walk.stages())["positional"]
    context = config.conv_pos // 2
    # the context is computed and thrown away: a piece of four contexts keeps that small
    for start, stop in _spans(len(x), max(step, 4 * context)):
        before, after = max(0, start - context), min(len(x), stop + context)
        piece = positional(_load(walk, x[before:after]))
        y[start:stop] = _store(walk, piece[:, start - before : stop - before])


def _attend(
    walk: Walk, index: int, head_count: int, x: Buffer, y: Buffer, plan: ChunkPlan
) -> Iterator[float]:
    """A layer's attention before its output projection, from ``x`` into ``y``, by some heads.

    Yields the part of it that is done.
    """
    width = x.shape[1] // head_count
    before_attention = walk.layers[index].before_attention

    def read(start: int, stop: int) -> Any:
        return before_attention(_load(walk, x[start:stop]))

    for first in range(0, head_count, plan.heads):
        heads = min(plan.heads, head_count - first)
        rows = slice(first * width, (first + heads) * width)

        def by_head(projected: Any, heads: int = heads) -> Any:
            """(1, frames, heads * width) as (1, heads, frames, width)."""
            return projected.reshape(1, projected.shape[1], heads, -1).transpose(0, 2, 1, 3)

        to_queries, to_keys, to_values = walk.head_projections(index, rows)
        keys, values = [], []
        for start, stop in _spans(len(x), plan.frames):
            piece = read(start, stop)
            keys.append(by_head(to_keys(piece)))
            values.append(by_head(to_values(piece)))
            walk.compute(keys[-1], values[-1])
        all_keys, all_values = walk.concatenate(keys, axis=2), walk.concatenate(values, axis=2)
        del keys, values
        for start, stop in _spans(len(x), plan.queries):
            queries = by_head(to_queries(read(start, stop)))
            attended = walk.attention(queries, all_keys, all_values, None)
            y[start:stop, rows] = _store(walk, attended)
            yield (first + heads * stop / len(x)) / head_count
