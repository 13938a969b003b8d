"""What a CPU computes: on MLX's own memory, divided among threads.

The ``mlx[cpu]`` wheel for Linux is built for plain x86-64, copies whatever part of
a matrix it is to multiply, and each of its operations walks over memory on its own.
Here each thread takes all that follows a product for rows of its own, while they
are in its cache. What one thread does is in ``kernels``.

Nothing here can be traced: a function that ``mx.compile`` or a gradient traces is
computed by MLX's own operations (``mlx_contentvec.ops``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import EPS
from . import blas, kernels
from .kernels_numpy import Buffer, Mask, Then

Exact = npt.NDArray[np.float64]
Spectrum = npt.NDArray[np.complex64]

#: rows of a convolution or a feed-forward in work at once on each thread
ROWS_PER_TILE = 512
#: inputs of a linear layer that are summed in a row. OpenBLAS adds up to 384 products in a
#: row; short runs added to each other lose less: of PyTorch's own rms error features keep
#: 0.39 to 0.84 at 64, 0.39 to 0.86 at 96, 0.40 to 1.01 at 128, 0.60 to 1.32 at 256; 64 takes
#: 2 % more time than the others (5 s of audio). On a Zen 4 192 takes as long as 96 within 1 %
K_BLOCK = 96
#: the same for convolutions, which reach 1.05 times PyTorch's error at 96 and 0.97 at 64
CONV_K_BLOCK = 64
#: length of the FFT of the positional convolution, in kernels: its response is read whole for
#: any clip, 38 MB at 2 and twice that at 4 (3.8 ms against 7.6 for 1 s of audio, 5.1 against
#: 7.6 for 5 s, 19 against 16 for 30 s; AMD EPYC, one core; mx.conv1d takes 25 and 98)
FFT_KERNELS = 2
#: multiplications below which a product is not worth another thread: 0.2 ms
MIN_MACS_PER_THREAD = 1 << 24
#: outputs of a product that a thread takes at least. It reads their weights alone, of
#: which a product of few rows is mostly made: 1 s of audio takes 14 % longer by rows
MIN_OUTPUTS_PER_THREAD = 128
#: numbers that a thread normalises, or takes the GELU of, in one step
VALUES_PER_STEP = 1 << 17
#: samples that moments are summed over at once: numpy's BLAS shares larger products among
#: threads of its own, which then wait in a loop for the next
SAMPLES_PER_BLOCK = 1 << 13

_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
# a fork takes the pools along, but not their threads
os.register_at_fork(after_in_child=_pools.clear)


def _helpers(count: int) -> ThreadPoolExecutor:
    with _pools_lock:
        if count not in _pools:
            _pools[count] = ThreadPoolExecutor(count, "mlx-contentvec")
        return _pools[count]


def parallel_for(work: Callable[[slice], None], count: int, step: int) -> None:
    """``work`` on ``count`` things, ``step`` of them at a time, shared among threads.

    Products within ``work`` run on the thread that asks for them.
    """
    with blas.own_threads() as threads:
        threads = min(threads, -(-count // step))

        def share(thread: int) -> None:
            stop = count * (thread + 1) // threads
            # MLX does not warn of infinities and nan either
            with np.errstate(over="ignore", invalid="ignore"):
                for start in range(count * thread // threads, stop, step):
                    work(slice(start, min(start + step, stop)))

        if threads == 1:
            share(0)
            return
        helpers = _helpers(threads - 1)
        others = [helpers.submit(share, thread) for thread in range(1, threads)]
        share(0)
        for other in others:
            other.result()


def linear(
    x: Buffer, weight: Buffer, bias: Buffer | None = None, then_gelu: bool = False
) -> Buffer:
    """``x @ weight.T + bias``, and its GELU if asked.

    x: (..., in)    weight: (out, in)    bias: (out,) or None    returns (..., out)
    """
    flat, matrix = x.reshape(-1, x.shape[-1]), weight.T
    count, outputs = len(flat), matrix.shape[1]
    result = np.empty((*x.shape[:-1], outputs), np.float32)
    out = result.reshape(count, outputs)

    threads = min(blas.threads(), -(-count * matrix.size // MIN_MACS_PER_THREAD))
    stripes = min(threads, max(1, outputs // MIN_OUTPUTS_PER_THREAD))
    blocks = -(-threads // stripes)
    steps = kernels.chosen()

    def edge(stripe: int) -> int:
        end: int = min(outputs, _up(outputs * stripe // stripes, steps.columns))
        return end

    def work(parts: slice) -> None:
        for part in range(parts.start, parts.stop):
            block, stripe = divmod(part, stripes)
            rows = slice(count * block // blocks, count * (block + 1) // blocks)
            cols = slice(edge(stripe), edge(stripe + 1))
            steps.product(
                *(flat[rows], matrix[:, cols], out[rows, cols], K_BLOCK),
                Then(None if bias is None else bias[cols], gelu=then_gelu),
            )

    parallel_for(work, blocks * stripes, 1)
    return result


def conv1d(
    x: Buffer,
    weight: Buffer,
    bias: Buffer | None,
    stride: int,
    norm: tuple[Buffer, Buffer] | None,
) -> Buffer:
    """A convolution, its layer norm where there is one, and GELU.

    x: (batch, time, in)    weight: (out, kernel, in)    bias: (out,) or None
    norm: weight and bias, (out,) each
    returns: (batch, (time - kernel) // stride + 1, out)
    """
    taps = weight.transpose(1, 2, 0)
    kernel, _, channels = taps.shape
    count = (x.shape[1] - kernel) // stride + 1
    result = np.empty((len(x), count, channels), np.float32)
    steps = kernels.chosen()

    def work(clip: Buffer, out: Buffer, rows: slice) -> None:
        part = clip[rows.start * stride : (rows.stop - 1) * stride + kernel]
        tile = out[rows]
        steps.convolve(part, taps, tile, stride, CONV_K_BLOCK, Then(bias, gelu=norm is None))
        if norm is not None:
            steps.layer_norm(tile, tile, *norm)
            steps.gelu_in_place(tile)

    for clip, out in zip(x, result, strict=True):
        parallel_for(partial(work, clip, out), count, _tile(count, taps.size))
    return result


def _up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def _tile(rows: int, multiplications: int) -> int:
    """How many rows, each of so many multiplications, are in work at once on each thread."""
    fair, worthwhile = -(-rows // blas.threads()), -(-MIN_MACS_PER_THREAD // multiplications)
    return min(ROWS_PER_TILE, max(fair, worthwhile))


class Moments(NamedTuple):
    """Mean and covariance of a waveform's windows, in float64.

    A convolution is linear, so the mean and the variance over time of each of
    its channels follow from these: mean = w . m, variance = w' C w. That gives
    a group norm of one channel per group from the waveform alone, in one cheap
    pass and more exactly than from the float32 channels.
    """

    #: the waveform's own mean; the rest is of the windows of ``waveform - offset``
    offset: np.float32
    #: (kernel,)
    mean: Exact
    #: (kernel, kernel)
    covariance: Exact

    @classmethod
    def of(
        cls,
        waveform: Buffer,
        kernel: int,
        stride: int,
        prepared: Callable[[Buffer], Buffer] = lambda samples: samples,
    ) -> Moments:
        """Those of ``prepared(waveform)``, which is prepared a part at a time.

        waveform: (samples,)
        """
        samples = len(waveform)
        count = (samples - kernel) // stride + 1
        parts = (
            prepared(waveform[at : at + SAMPLES_PER_BLOCK])
            for at in range(0, samples, SAMPLES_PER_BLOCK)
        )
        offset = np.float32(sum(float(x.sum(dtype=np.float64)) for x in parts) / samples)
        first, second = np.zeros(kernel), np.zeros((kernel, kernel))
        for start in range(0, count, SAMPLES_PER_BLOCK // stride):
            stop = min(start + SAMPLES_PER_BLOCK // stride, count)
            window = prepared(waveform[start * stride : (stop - 1) * stride + kernel])
            exact = window.astype(np.float64)
            exact -= np.float64(offset)
            rows = np.ascontiguousarray(_windows(exact, kernel, stride))
            first += rows.sum(axis=0)
            with blas.quiet_product():
                second += rows.T @ rows
        mean = first / count
        return cls(offset, mean, second / count - np.outer(mean, mean))

    def of_channels(self, weight: Buffer) -> tuple[Buffer, Buffer]:
        """Mean and variance over time of what ``waveform - offset`` is convolved to.

        weight: (channels, kernel)    returns: (channels,) each
        """
        exact = weight.astype(np.float64)
        with blas.quiet_product():
            variance = ((exact @ self.covariance) * exact).sum(axis=-1)
            mean = exact @ self.mean
        return mean.astype(np.float32), np.maximum(variance, 0).astype(np.float32)


def _windows(x: npt.NDArray[Any], kernel: int, stride: int) -> npt.NDArray[Any]:
    """Every window of a sequence as one row: (rows, kernel) of (samples,)."""
    return np.lib.stride_tricks.sliding_window_view(x, kernel)[::stride]


def normalised_conv1d(
    waveform: Buffer,
    weight: Buffer,
    scale: Buffer,
    shift: Buffer,
    stride: int,
    moments: Sequence[Moments],
) -> Buffer:
    """A convolution, a group norm of one channel per group, and GELU.

    waveform: (batch, samples)    weight: (channels, kernel)    scale, shift: (channels,)
    moments: each clip's, whose mean and variance count
    returns: (batch, (samples - kernel) // stride + 1, channels)

    Scaling the product rounds less than scaling the kernel before it.
    """
    kernel, matrix = weight.shape[1], np.ascontiguousarray(weight.T)
    count = (waveform.shape[1] - kernel) // stride + 1
    result = np.empty((len(waveform), count, len(weight)), np.float32)
    steps = kernels.chosen()

    def work(windows: Buffer, mean: Buffer, factor: Buffer, out: Buffer, rows: slice) -> None:
        steps.product(
            *(np.ascontiguousarray(windows[rows]), matrix, out[rows], kernel),
            Then(scaling=(mean, factor, shift), gelu=True),
        )

    for clip, moment, out in zip(waveform, moments, result, strict=True):
        mean, variance = moment.of_channels(weight)
        factor = scale / np.sqrt(variance + np.float32(EPS))
        windows = _windows(clip - moment.offset, kernel, stride)
        parallel_for(partial(work, windows, mean, factor, out), count, ROWS_PER_TILE)
    return result


def grouped_conv1d(
    x: Buffer, spectrum: Spectrum, bias: Buffer, kernel: int, clips: Sequence[slice] | None = None
) -> Buffer:
    """A grouped convolution of as many frames out as in, by overlap and save.

    x: (batch, frames, channels)    spectrum: (bins, groups, in, out), as ``spectrum_of`` gives
    clips: the frames of each clip, where clips lie one behind the other

    The blocks of all clips are multiplied together: the spectrum is read once.
    """
    bins, groups, per_group, _ = spectrum.shape
    size = 2 * (bins - 1)
    step = size - kernel + 1
    result = np.empty(x.shape, np.float32)
    #: a clip's frames, those of its result, and the blocks that they are in
    parts: list[tuple[Buffer, Buffer, slice]] = []
    count = 0
    for clip, out in zip(x, result, strict=True):
        for span in clips or [slice(0, len(clip))]:
            blocks = slice(count, count - (span.start - span.stop) // step)
            parts.append((clip[span], out[span], blocks))
            count = blocks.stop

    def work(part: slice) -> None:
        for group in range(part.start, part.stop):
            cols = slice(group * per_group, (group + 1) * per_group)
            blocked = np.zeros((count, per_group, size), np.float32)
            for clip, _, blocks in parts:
                padded = np.zeros((per_group, len(clip) + size + step), np.float32)
                padded[:, kernel // 2 : kernel // 2 + len(clip)] = clip[:, cols].T
                for index, block in enumerate(blocked[blocks]):
                    block[:] = padded[:, index * step : index * step + size]
            window = np.fft.rfft(blocked).astype(np.complex64, copy=False)
            with blas.quiet_product():
                product = np.matmul(window.transpose(2, 0, 1), spectrum[:, group])
            y = np.fft.irfft(product.transpose(1, 2, 0), size)[..., kernel - 1 :]
            for clip, out, blocks in parts:
                rows = y[blocks].transpose(0, 2, 1).reshape(-1, per_group)
                np.add(rows[: len(clip)], bias[cols], out=out[:, cols])

    parallel_for(work, groups, 1)
    return result


def spectrum_of(weight: Buffer, kernels: int = FFT_KERNELS) -> Spectrum:
    """The frequency response of a grouped convolution's kernel, at ``kernels`` times its length.

    weight: (channels, length, in)    returns: (bins, groups, in, out), complex64
    """
    channels, length, per_group = weight.shape
    groups, size = channels // per_group, kernels * length
    flipped = weight[:, ::-1]
    response = np.empty((size // 2 + 1, groups, per_group, per_group), np.complex64)
    # group by group: the whole in double precision is five times the kernel
    for group in range(groups):
        rows = flipped[group * per_group : (group + 1) * per_group].transpose(2, 0, 1)
        bins = np.fft.rfft(np.ascontiguousarray(rows, np.float64), size)
        response[:, group] = bins.transpose(2, 0, 1)
    return response


def layer_norm(x: Buffer, weight: Buffer, bias: Buffer) -> Buffer:
    """Layer norm over the last axis."""
    width = x.shape[-1]
    result = np.empty(x.shape, np.float32)
    rows, normalised = x.reshape(-1, width), result.reshape(-1, width)

    steps = kernels.chosen()

    def work(part: slice) -> None:
        steps.layer_norm(rows[part], normalised[part], weight, bias)

    parallel_for(work, len(rows), max(1, VALUES_PER_STEP // width))
    return result


def gelu(x: Buffer) -> Buffer:
    """The exact (erf) GELU."""
    result = np.array(x, np.float32, order="C")
    values = result.reshape(-1)
    steps = kernels.chosen()
    parallel_for(lambda block: steps.gelu_in_place(values[block]), len(values), VALUES_PER_STEP)
    return result


def attention(queries: Buffer, keys: Buffer, values: Buffer, mask: Mask | None) -> Buffer:
    """Scaled dot-product attention.

    queries, keys, values: (batch, heads, frames, head width); there may be more
    keys and values than queries
    mask: (batch, 1, 1, frames), true where a key may be attended to, or None
    returns: (batch, frames, heads * head width)
    """
    batch, heads, frames, width = queries.shape
    count, steps = keys.shape[2], kernels.chosen()
    fair = -(-batch * heads * frames // blas.threads())
    worthwhile = -(-MIN_MACS_PER_THREAD // (2 * count * width))
    rows_per_piece = min(steps.most_queries(count), max(fair, worthwhile))
    rows_per_piece = min(frames, _up(rows_per_piece, steps.columns))
    starts = range(0, frames, rows_per_piece)
    result = np.empty((batch, frames, heads * width), np.float32)
    mixed = result.reshape(batch, frames, heads, width).transpose(0, 2, 1, 3)

    hidden = None if mask is None else ~mask[:, 0, 0]

    def work(parts: slice) -> None:
        for part in range(parts.start, parts.stop):
            rest, piece = divmod(part, len(starts))
            clip, head = divmod(rest, heads)
            rows = slice(starts[piece], min(starts[piece] + rows_per_piece, frames))
            steps.attend(
                queries[clip, head, rows],
                keys[clip, head],
                values[clip, head],
                None if hidden is None else hidden[clip],
                mixed[clip, head, rows],
            )

    parts = batch * heads * len(starts)
    # heads of a short clip are many small steps, which wait for each other's turn in Python
    multiplications = 2 * batch * heads * frames * count * width
    threads = max(1, min(blas.threads(), multiplications // MIN_MACS_PER_THREAD))
    parallel_for(work, parts, -(-parts // threads))
    return result
