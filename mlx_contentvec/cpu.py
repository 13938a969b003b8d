"""What a CPU computes element by element: by numpy, in place, on MLX's own memory.

The ``mlx[cpu]`` wheel for Linux is built for plain x86-64, and each of its
operations walks over memory on its own. numpy takes AVX2 or AVX-512 where they
are, and a block of numbers stays in the cache from the first step to the last:
an exponential takes 0.4 ns instead of 18, a GELU 1.3 instead of 3.5 to 14 (AMD
EPYC with AVX-512, one core). Products stay MLX's where OpenBLAS is in front of
it; else they go to numpy's BLAS, which its wheels bring along.

Nothing here works on an array that ``mx.compile`` or a gradient is tracing:
``in_memory`` says so.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from .backend import BLAS, cpu_threads, mx

Array = Any
Buffer = npt.NDArray[np.float32]

#: numbers in work at once on each thread, half a megabyte. Blocks of an eighth fit the second-level
#: cache with their scratch, and are slower: threads meet at Python's lock after every step
BLOCK = 1 << 17
#: attention scores in work at once: 75 ms for a layer of 30 s, 89 at an eighth of it
SCORES = 1 << 20
#: keys that queries are scored against at once, at most: longer clips come in spans of them
KEYS = 4096

# erf(x / sqrt(2)) ~ tanh(x R(x^2)). R is the polynomial whose largest error of a GELU,
# relative to x, is least on [0, 6.2]: 2.9e-8, half a float32 ulp (Lawson's iteration on
# atanh(erf(x / sqrt(2))) / x in float64). Its last coefficient is positive and so is R
# everywhere: beyond, the tanh is 1
_GELU = tuple(
    np.float32(coefficient)
    for coefficient in (
        1.7561698026037676e-09,
        -1.322633090175129e-07,
        3.96474407327272e-06,
        -5.5306192048452935e-05,
        -3.25949790068765e-05,
        0.0363330845765848,
        0.797884941459876,
    )
)


def memory() -> int | None:
    """Bytes that this process may use at most; None where the system does not say."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    with contextlib.suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            there = min(there, limit)
    return there


def in_memory(*arrays: Array) -> bool:
    """Compute the arrays; False if one depends on what a gradient, vmap or compile traces.

    ``mx.eval`` allows that in a gradient, ``mx.async_eval`` refuses it, but looks
    only at what is not computed yet: hence the new axes.
    Source: mlx/transforms.cpp, ``eval_impl``.
    """
    try:
        mx.async_eval(*(x[None] for x in arrays))
    except ValueError:
        return False
    mx.eval(*arrays)
    return True


_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()
# a fork takes the pools along, but not their threads
os.register_at_fork(after_in_child=_pools.clear)


def _helpers(count: int) -> ThreadPoolExecutor:
    with _pools_lock:
        if count not in _pools:
            _pools[count] = ThreadPoolExecutor(count, "mlx-contentvec")
        return _pools[count]


def _in_blocks(work: Callable[[slice], None], rows: int, width: int) -> None:
    """``work`` on all rows, a block of them at a time, on as many threads as products have."""
    step = max(1, BLOCK // width)
    threads = min(cpu_threads(), -(-rows // step))

    def share(thread: int) -> None:
        stop = rows * (thread + 1) // threads
        # MLX does not warn of infinities and nan either
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(rows * thread // threads, stop, step):
                work(slice(start, min(start + step, stop)))

    if threads == 1:
        share(0)
        return
    helpers = _helpers(cpu_threads() - 1)
    others = [helpers.submit(share, thread) for thread in range(1, threads)]
    share(0)
    for other in others:
        other.result()


def matmul(a: Array, b: Array) -> Array:
    """``a @ b``, by whichever BLAS is fast here."""
    if BLAS == "numpy" and in_memory(a, b):
        return mx.array(np.matmul(np.asarray(a), np.asarray(b)))
    return a @ b


def summed(terms: list[Array], matrices: list[Array], bias: Array | None) -> Array:
    """``bias + sum(term @ matrix)``; terms: (rows, in) each, matrices: (in, out) each."""
    if BLAS == "numpy" and in_memory(*terms, *matrices, *([] if bias is None else [bias])):
        total = np.zeros((terms[0].shape[0], matrices[0].shape[1]), np.float32)
        if bias is not None:
            total += np.asarray(bias)
        product = np.empty_like(total)
        for term, matrix in zip(terms, matrices, strict=True):
            total += np.matmul(np.asarray(term), np.asarray(matrix), out=product)
        return mx.array(total)
    result = bias
    for term, matrix in zip(terms, matrices, strict=True):
        result = term @ matrix if result is None else mx.addmm(result, term, matrix)
    return result


def gelu(x: Array) -> Array | None:
    """The exact GELU in float32, computed now; None while a function is traced."""
    x = mx.contiguous(x.astype(mx.float32))
    # what the result starts as, and whose memory it gets
    half = x * 0.5
    if not in_memory(x, half):
        return None
    values, result = np.asarray(x).reshape(-1), np.asarray(half).reshape(-1)

    def work(block: slice) -> None:
        square, inner = np.empty((2, block.stop - block.start), np.float32)
        _add_gelu(values[block], result[block], square, inner)

    _in_blocks(work, len(values), 1)
    return half


def normalised_gelu(x: Array, mean: Array, scale: Array, bias: Array) -> Array | None:
    """``gelu((x - mean) * scale + bias)``, computed now; None while a function is traced.

    x: (batch, rows, channels)    mean, scale: (batch, 1, channels)    bias: (channels,)
    """
    shifted = x - mean
    if not in_memory(shifted, scale, bias):
        return None
    per_channel = np.asarray(bias)
    for clip, factor in zip(np.asarray(shifted), np.asarray(scale), strict=True):
        _normalise_and_gelu(clip, factor, per_channel)
    return shifted


def _normalise_and_gelu(values: Buffer, scale: Buffer, bias: Buffer) -> None:
    def work(rows: slice) -> None:
        x = values[rows]
        x *= scale
        x += bias
        half, square, inner = x * np.float32(0.5), np.empty_like(x), np.empty_like(x)
        _add_gelu(x, half, square, inner)
        x[:] = half

    _in_blocks(work, *values.shape)


def _add_gelu(x: Buffer, half: Buffer, square: Buffer, inner: Buffer) -> None:
    """``half``, x / 2 before, becomes gelu(x); ``square`` and ``inner`` are scratch."""
    np.multiply(x, x, out=square)
    np.multiply(square, _GELU[0], out=inner)
    inner += _GELU[1]
    for coefficient in _GELU[2:]:
        inner *= square
        inner += coefficient
    inner *= x
    np.tanh(inner, out=inner)
    inner *= half
    half += inner


def attention(queries: Array, keys: Array, values: Array, mask: Array | None) -> Array | None:
    """Scaled dot-product attention, computed now; None while a function is traced.

    queries, keys, values: (batch, heads, frames, head width); there may be more
    keys and values than queries
    mask: (batch, 1, 1, frames), true where a key may be attended to, or None
    returns: (batch, frames, heads * head width), float32
    """
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    queries = queries * queries.shape[-1] ** -0.5
    spans = [slice(a, a + KEYS) for a in range(0, keys.shape[2], KEYS)]
    key_spans = [mx.contiguous(keys[:, :, span].swapaxes(2, 3)) for span in spans]
    value_spans = [mx.contiguous(values[:, :, span]) for span in spans]
    if not in_memory(queries, *key_spans, *value_spans):
        return None
    hidden = None if mask is None else ~np.asarray(mask)
    batch, heads, frames, width = queries.shape
    longest = min(KEYS, keys.shape[2])
    rows = min(frames, max(16, SCORES // longest))
    together = max(1, SCORES // (rows * longest))
    result = np.empty((batch, frames, heads, width), np.float32)
    for clip in range(batch):
        for head in range(0, heads, together):
            some = slice(head, head + together)
            for start in range(0, frames, rows):
                asked = queries[clip, some, start : start + rows]
                mixture = _Mixture(asked)
                for span, key, value in zip(spans, key_spans, value_spans, strict=True):
                    scores = matmul(asked, key[clip, some])
                    mx.eval(scores, mixture.mixed)
                    if hidden is not None:
                        np.asarray(scores)[..., hidden[clip, 0, 0, span]] = -1e9
                    mixture.add(scores, value[clip, some])
                result[clip, start : start + rows, some] = mixture.result().swapaxes(0, 1)
    return mx.array(result.reshape(batch, frames, heads * width))


class _Mixture:
    """Values mixed by the softmax of their scores, a part of the keys at a time.

    Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867).
    """

    def __init__(self, queries: Array) -> None:
        rows = (*queries.shape[:2], 1)
        self._highest: Buffer = np.full(rows, -np.inf, np.float32)
        self._total: Buffer = np.zeros(rows, np.float32)
        #: (heads, queries, width), not yet divided by the weights' total
        self.mixed = mx.zeros(queries.shape)

    def add(self, scores: Array, values: Array) -> None:
        """scores: (heads, queries, keys), overwritten    values: (heads, keys, width)."""
        heads, queries, keys = scores.shape
        weights: Buffer = np.asarray(scores).reshape(heads * queries, keys)
        highest = self._highest.reshape(-1, 1).copy()
        total = np.empty_like(highest)

        def work(rows: slice) -> None:
            some, top = weights[rows], highest[rows]
            np.maximum(top, some.max(axis=-1, keepdims=True), out=top)
            some -= top
            np.exp(some, out=some)
            some.sum(axis=-1, keepdims=True, out=total[rows])

        _in_blocks(work, heads * queries, keys)
        highest, total = (x.reshape(self._total.shape) for x in (highest, total))
        shrunk = np.exp(self._highest - highest)
        self._total = self._total * shrunk + total
        self.mixed = self.mixed * mx.array(shrunk) + matmul(scores, values)
        mx.async_eval(self.mixed)
        self._highest = highest

    def result(self) -> Buffer:
        """(heads, queries, width)."""
        mixed: Buffer = np.asarray(self.mixed)
        return mixed / self._total
