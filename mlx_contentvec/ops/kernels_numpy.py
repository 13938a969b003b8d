"""What one thread computes of a pass, by numpy and OpenBLAS.

numpy takes AVX2 or AVX-512 where they are, and a block of numbers stays in the cache
from a product to the last step of what follows it: an exponential takes 0.4 ns instead
of the 18 that the ``mlx[cpu]`` wheel for Linux takes, a GELU 1.3 instead of 3.5 to 14
(AMD EPYC with AVX-512, one core).
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import EPS
from . import blas

Buffer = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
#: numbers in work at once, half a megabyte
VALUES_PER_BLOCK = 1 << 17
#: attention scores in work at once, and keys that they are of at most
SCORES_PER_THREAD = 1 << 19
KEYS_PER_BLOCK = 4096
#: score of a key that may not be attended to
HIDDEN_SCORE = -1e9

# erf(x / sqrt(2)) ~ tanh(x R(x^2)). R is the polynomial whose largest error of a GELU,
# relative to x, is least on [0, 6.2]: 2.9e-8, half a float32 ulp (Lawson's iteration on
# atanh(erf(x / sqrt(2))) / x in float64). Its last coefficient is positive and so is R
# everywhere: beyond, the tanh is 1
GELU = (
    1.7561698026037676e-09,
    -1.322633090175129e-07,
    3.96474407327272e-06,
    -5.5306192048452935e-05,
    -3.25949790068765e-05,
    0.0363330845765848,
    0.797884941459876,
)
_GELU = tuple(np.float32(coefficient) for coefficient in GELU)


def require(fits: bool, *arrays: npt.NDArray[Any] | None) -> None:
    """Raise ValueError unless arrays fit together."""
    if not fits:
        shapes = ", ".join(str(x.shape) for x in arrays if x is not None)
        raise ValueError(f"do not fit together: {shapes}")


def require_windows(clip: Buffer, taps: Buffer, out: Buffer, stride: int) -> None:
    """Raise ValueError unless ``clip`` has the windows of ``taps`` for all rows of ``out``."""
    require(clip.shape[1] == taps.shape[1], clip, taps, out)
    require(len(clip) >= (len(out) - 1) * stride + len(taps), clip, taps, out)


class Then(NamedTuple):
    """What follows a product of matrices, in this order; each of its vectors has ``outputs``."""

    bias: Buffer | None = None
    #: mean, factor and shift: ``(out - mean) * factor + shift``
    scaling: tuple[Buffer, Buffer, Buffer] | None = None
    gelu: bool = False

    def require(self, outputs: int) -> None:
        """Raise ValueError unless each of its vectors has so many numbers."""
        for row in (self.bias, *(self.scaling or ())):
            require(row is None or row.shape == (outputs,), row)


PLAIN = Then()


class Scratch(threading.local):
    """Memory of each thread's own, kept for its next step."""

    def __init__(self) -> None:
        self._held = np.empty(0, np.float32)

    def of(self, count: int) -> Buffer:
        """So many numbers, which begin where a line of the cache does."""
        if len(self._held) < count + _LINE:
            self._held = np.empty(count + _LINE, np.float32)
        begin = -(blas.data_pointer(self._held) // 4) % _LINE
        return self._held[begin : begin + count]


#: numbers of a line of the cache
_LINE = 16


class NumpyKernels:
    """The steps of a pass that one thread takes for rows of its own."""

    #: what work is best divided at multiples of
    columns = 1

    def __init__(self) -> None:
        self._scratch = Scratch()

    @property
    def name(self) -> str:
        """Whose products these are: ``blas.name``."""
        return blas.name()

    def product(self, a: Buffer, b: Buffer, out: Buffer, run: int, then: Then = PLAIN) -> None:
        """``out = a @ b``, and what is to be done ``then``.

        a: (rows, inputs)    b: (inputs, outputs)    out: (rows, outputs), its rows contiguous
        run: how many products are added in a row

        Raises ValueError if the matrices do not fit together.
        """
        then.require(out.shape[1])
        if then.bias is not None:
            out[:] = then.bias
        blas.multiply(a, b, out, add=then.bias is not None, k_block=run)
        self._finish(out, then)

    def _finish(self, out: Buffer, then: Then) -> None:
        """What is to be done but for the bias."""
        if then.scaling is not None:
            mean, factor, shift = then.scaling
            out -= mean
            out *= factor
            out += shift
        if then.gelu:
            self.gelu_in_place(out)

    def convolve(
        self, clip: Buffer, taps: Buffer, out: Buffer, stride: int, run: int, then: Then = PLAIN
    ) -> None:
        """A convolution without padding, and what is to be done ``then``.

        clip: (time, in)    taps: (kernel, in, out)    out: (rows, out), its rows contiguous
        run: how many products are added in a row

        Raises ValueError if they do not fit together.
        """
        then.require(out.shape[1])
        require_windows(clip, taps, out, stride)
        if then.bias is not None:
            out[:] = then.bias
        for tap, matrix in enumerate(taps):
            window = clip[tap : tap + (len(out) - 1) * stride + 1 : stride]
            blas.multiply(window, matrix, out, add=tap > 0 or then.bias is not None, k_block=run)
        self._finish(out, then)

    def most_queries(self, keys: int) -> int:
        """How many queries one step of attention should take, of so many keys."""
        return max(16, SCORES_PER_THREAD // min(keys, KEYS_PER_BLOCK))

    def attend(
        self, queries: Buffer, keys: Buffer, values: Buffer, hidden: Mask | None, out: Buffer
    ) -> None:
        """The values mixed by the softmax of their scores, a span of the keys at a time.

        queries: (rows, width)    keys, values: (keys, width)    hidden: (keys,) or None
        out: (rows, width)
        Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
        """
        rows, width = queries.shape
        scratch = self._scratch.of(rows * min(len(keys), KEYS_PER_BLOCK))
        highest: Buffer | None = None
        total: Any = None
        for start in range(0, len(keys), KEYS_PER_BLOCK):
            span = slice(start, min(start + KEYS_PER_BLOCK, len(keys)))
            weights = scratch[: rows * (span.stop - start)].reshape(rows, -1)
            blas.multiply(queries, keys[span].T, weights, factor=width**-0.5)
            if hidden is not None:
                weights[:, hidden[span]] = HIDDEN_SCORE
            top = weights.max(axis=-1, keepdims=True)
            if highest is not None:
                np.maximum(top, highest, out=top)
            weights -= top
            np.exp(weights, out=weights)
            weight = weights.sum(axis=-1, keepdims=True)
            if highest is not None:
                shrunk = np.exp(highest - top)
                weight += total * shrunk
                out *= shrunk
            blas.multiply(weights, values[span], out, add=start > 0)
            highest, total = top, weight
        out /= total

    def layer_norm(self, x: Buffer, out: Buffer, scale: Buffer, shift: Buffer) -> None:
        """Layer norm of each row.

        x, out: (rows, width)    scale, shift: (width,)
        """
        np.subtract(x, x.mean(axis=-1, keepdims=True), out=out)
        deviation = (out * out).mean(axis=-1, keepdims=True)
        deviation += np.float32(EPS)
        np.sqrt(deviation, out=deviation)
        out /= deviation
        out *= scale
        out += shift

    def gelu_in_place(self, x: Buffer) -> None:
        """The exact (erf) GELU of a vector or matrix, a block at a time."""
        step = max(1, VALUES_PER_BLOCK // max(1, x[:1].size))
        square, inner = (np.empty_like(x[:step], order="C") for _ in range(2))
        for start in range(0, len(x), step):
            part = x[start : start + step]
            _gelu(part, square[: len(part)], inner[: len(part)])


def _gelu(x: Buffer, square: Buffer, inner: Buffer) -> None:
    np.multiply(x, x, out=square)
    np.multiply(square, _GELU[0], out=inner)
    inner += _GELU[1]
    for coefficient in _GELU[2:]:
        inner *= square
        inner += coefficient
    inner *= x
    np.tanh(inner, out=inner)
    x *= np.float32(0.5)
    inner *= x
    x += inner
