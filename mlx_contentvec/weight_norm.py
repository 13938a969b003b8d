"""The weight norm of the positional convolution, multiplied out.

Source: fairseq/models/wav2vec/wav2vec2.py, make_conv_pos (dim=2);
torch/nn/utils/weight_norm.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: rows of a kernel taken to float64 at a time
_ROWS = 64


def fold_weight_norm(magnitude: Array, direction: Array) -> Array:
    """The plain kernel that a weight-normalised Conv1d computes with.

    magnitude: (1, 1, kernel), ``weight_g``
    direction: (out, in / groups, kernel), ``weight_v``, any float dtype
    returns:   (out, kernel, in / groups) float32, channels last

    kernel = magnitude * direction / norm(direction), where the norm runs over
    out and in and leaves one number per tap, because fairseq normalises with
    dim=2. A norm over any other axes has a shape that fits as well, and wrong
    values. Norm and product are float64, rounded once. A tap of norm zero gives
    values that are not numbers: see :func:`dead_taps`.
    """
    out, channels, taps = direction.shape
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = magnitude.astype(np.float64).reshape(taps) / np.sqrt(_squares(direction))
    kernel = np.empty((out, taps, channels), np.float32)
    for row in range(0, out, _ROWS):
        block = direction[row : row + _ROWS].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            kernel[row : row + _ROWS] = (block * scale).transpose(0, 2, 1)
    return kernel


def dead_taps(direction: Array) -> int:
    """Taps of ``direction`` (out, in / groups, kernel) whose norm is zero."""
    return int(np.count_nonzero(_squares(direction) == 0))


def _squares(direction: Array) -> Array:
    squares = np.zeros(direction.shape[2], np.float64)
    for row in range(0, direction.shape[0], _ROWS):
        block = direction[row : row + _ROWS].astype(np.float64)
        squares += np.einsum("oik,oik->k", block, block)
    return squares
