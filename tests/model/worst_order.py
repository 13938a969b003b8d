"""How exact the sums of a GPU's forms are where products are added one after the other.

``python -m tests.model.worst_order`` prints, for each form of ``ops.mlx`` at real widths, its
rms error as a multiple of that of runs of so many products, in a process that has no BLAS
but that of MLX: on Linux the reference BLAS, which adds in the worst order that there is.
"""

from __future__ import annotations

import json
import sys

# before the package, which would load OpenBLAS for MLX
import mlx.core as mx
import numpy as np

from mlx_contentvec.ops import mlx as mlx_ops


def one_after_the_other(rows: np.ndarray, matrix: np.ndarray, run: int) -> np.ndarray:
    """A float32 product in runs of products, the sums of the runs added by pairs."""
    parts = []
    for start in range(0, len(matrix), run):
        added = np.zeros((len(rows), matrix.shape[1]), np.float32)
        for k in range(start, start + run):
            added += rows[:, k, None] * matrix[k]
        parts.append(added)
    while len(parts) > 1:
        odd = parts[len(parts) // 2 * 2 :]
        parts = [one + other for one, other in zip(parts[::2], parts[1::2], strict=False)] + odd
    return parts[0]


def loss(got: mx.array, rows: np.ndarray, matrix: np.ndarray, run: int) -> float:
    """The rms error of ``got`` as a multiple of that of runs of ``run`` products."""
    exact = rows.astype(np.float64) @ matrix.astype(np.float64)
    worst = one_after_the_other(rows, matrix, run)
    ours, theirs = (np.sqrt(np.mean((y - exact) ** 2)) for y in (np.array(got), worst))
    return float(ours / theirs)


def convolution(kernel: int, run: int) -> float:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 129, 512)).astype(np.float32)
    weight = (rng.standard_normal((48, kernel, 512)) / 39).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x[0], kernel, axis=0)[::2]
    got = mlx_ops.conv1d(mx.array(x), mx.array(weight), None, 2)[0]
    rows = windows.swapaxes(1, 2).reshape(len(windows), -1)
    return loss(got, rows, weight.transpose(1, 2, 0).reshape(-1, 48), run)


def positional(run: int) -> float:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 60, 48)).astype(np.float32)
    weight = (rng.standard_normal((48, 128, 48)) / 78).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x[0], ((64, 63), (0, 0))), 128, 0)
    got = mlx_ops.grouped_conv1d(mx.array(x), mx.array(weight), mx.zeros(48))[0]
    rows = windows.swapaxes(1, 2).reshape(60, -1)
    return loss(got, rows, weight.transpose(1, 2, 0).reshape(-1, 48), run)


def feed_forward(run: int) -> float:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 60, 3072)).astype(np.float32)
    weight = (rng.standard_normal((48, 3072)) / 55).astype(np.float32)
    got = mlx_ops.linear(mx.array(x), mx.array(weight), None)[0]
    return loss(got, x[0], weight.T, run)


def main() -> None:
    mx.set_default_device(mx.cpu)
    # here it would be compiled for the CPU, by a C++ compiler that need not be there
    mlx_ops._compiled = lambda function: function
    found = {}
    for kind in ("metal", "cuda"):
        mlx_ops.device_kind = lambda kind=kind: kind
        found[f"{kind}, kernel 3"] = convolution(3, run=128)
        found[f"{kind}, kernel 2"] = convolution(2, run=32)
    # Metal has a kernel of its own for grouped convolutions
    found["cuda, positional"] = positional(run=16 * 48)
    mlx_ops.device_kind = lambda: "metal"
    found["metal, feed-forward"] = feed_forward(run=768)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
