"""Weights of the first mlx-contentvec release (0.1.0 and 0.1.1), under this version's names.

That release kept the weight norm of the positional convolution as two
parameters and multiplied them out at every call; all other names and shapes
are still the same. Its files say nothing about the model they hold.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from .errors import WeightsError

Array = Any

POSITIONAL = "encoder.pos_conv.layers.0"
MAGNITUDE = f"{POSITIONAL}.g"
DIRECTION = f"{POSITIONAL}.v"
BIAS = f"{POSITIONAL}.module.bias"
#: what the release computed from the first two at every call, if it was saved at all
COMPUTED_KERNEL = f"{POSITIONAL}.module.weight"
#: where its conversion script put the direction, losing the magnitude
LOST_MAGNITUDE = "encoder.pos_conv.0.module.weight"
#: what its model did not have
HEAD = frozenset({"final_proj.weight", "final_proj.bias"})


def is_first_release(names: Container[str]) -> bool:
    """Whether these are names of the first release."""
    return any(name in names for name in (DIRECTION, COMPUTED_KERNEL, LOST_MAGNITUDE))


def fold_weight_norm(magnitude: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The kernel that a weight-normalised convolution computes, channels last.

    magnitude: (1, kernel, 1)    direction: (out, kernel, in / groups)
    returns:   (out, kernel, in / groups), float32, computed in float64

    One norm per kernel tap, over output and input channels, as fairseq has it
    (dim=2 of a channels-first kernel). The first release also raised norms
    below 1e-5 to that value, which PyTorch does not, and neither does this.
    Source: torch/nn/utils/weight_norm.py; fairseq/models/wav2vec/wav2vec2.py,
    ``make_conv_pos``. Raises WeightsError if the shapes do not fit.
    """
    if direction.ndim != 3 or magnitude.shape != (1, direction.shape[1], 1):
        raise WeightsError(
            "the weight norm of the positional convolution has impossible shapes",
            found=f"g {magnitude.shape}, v {direction.shape}",
            expected="g (1, kernel, 1), v (out, kernel, in / groups)",
        )
    direction = direction.astype(np.float64)
    norm = np.sqrt((direction * direction).sum(axis=(0, 2), keepdims=True))
    if not norm.all():
        raise WeightsError(
            "the weight norm of the positional convolution divides by zero",
            found=f"{np.count_nonzero(norm == 0)} taps of v are all zero",
        )
    kernel: np.ndarray = (direction * (magnitude.astype(np.float64) / norm)).astype(np.float32)
    return kernel


def renamed(weights: Mapping[str, Array]) -> dict[str, Array]:
    """``weights`` of the first release under this version's names, the weight norm folded.

    Raises WeightsError if the magnitude of the weight norm is missing: the
    conversion script of that release lost it, and the kernel with it.
    """
    from .backend import mx

    if missing := [name for name in (MAGNITUDE, DIRECTION, BIAS) if name not in weights]:
        raise WeightsError(
            "the positional convolution of this first-release file is incomplete",
            found=f"no {', '.join(missing)}",
            expected=f"{MAGNITUDE}, {DIRECTION} and {BIAS}",
            hint="convert the original checkpoint again: mlx-contentvec convert hubert_base.pt",
        )
    kept = {
        name: array
        for name, array in weights.items()
        if name not in (MAGNITUDE, DIRECTION, BIAS, COMPUTED_KERNEL)
    }
    magnitude, direction = (
        np.array(weights[name].astype(mx.float32)) for name in (MAGNITUDE, DIRECTION)
    )
    kept["encoder.pos_conv.weight"] = mx.array(fold_weight_norm(magnitude, direction))
    kept["encoder.pos_conv.bias"] = weights[BIAS]
    return kept
