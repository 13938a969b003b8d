"""How a target tensor is made from source tensors: rules, drops, and the few transforms.

A source (``sources/``) expands its rules from the model's configuration, one
per target. Nothing is ever parsed back out of a name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import MappingError
from mlx_contentvec.weight_norm import dead_taps, fold_weight_norm

Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One target tensor, the source tensors it is made of, and a key of TRANSFORMS."""

    target: str
    sources: tuple[str, ...]
    transform: str


@dataclass(frozen=True)
class Drop:
    """A source tensor left behind on purpose, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything that is to happen to a checkpoint's tensors.

    ``notes`` are sentences about what was found and decided on the way
    (a leftover of the configuration ignored, a convention assumed).
    """

    naming: str
    config: ModelConfig
    rules: tuple[Rule, ...]
    drops: tuple[Drop, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transform:
    """How source arrays become one target array.

    ``lossless`` ones only move elements, whatever their dtype, row by row: rows
    a to b of the source (its first axis) are rows a to b of the target. ``undo``
    takes any such rows of the target back to those of the source.

    The others compute in float64 and round once, to float32; ``undo`` gives
    None, because the sources cannot be had back.
    """

    lossless: bool
    #: source shapes -> target shape; MappingError if the sources do not go together
    shape: Callable[..., Shape]
    #: source arrays -> target array (a view where elements only move)
    apply: Callable[..., Array]
    #: target array -> source arrays, or None
    undo: Callable[[Array], tuple[Array, ...] | None]
    #: finite source arrays -> why they cannot give a finite target, None if they can
    damage: Callable[..., str | None] = lambda *sources: None


def _folded_shape(magnitude: Shape, direction: Shape) -> Shape:
    if len(direction) != 3 or tuple(magnitude) != (1, 1, direction[2]):
        raise MappingError(
            "the two parts of a weight norm do not go together",
            found=f"magnitude {tuple(magnitude)}, direction {tuple(direction)}",
            expected="magnitude (1, 1, kernel), direction (out, in / groups, kernel)",
        )
    return direction[0], direction[2], direction[1]


def _dead_taps(magnitude: Array, direction: Array) -> str | None:
    dead = dead_taps(direction)
    return f"{dead} kernel taps with a norm of zero, which cannot be normalised" if dead else None


def _kernel_shape(kernel: Shape) -> Shape:
    if len(kernel) != 3:
        raise MappingError(
            "a convolution kernel has three axes",
            found=f"shape {tuple(kernel)}",
            expected="(out, in / groups, kernel)",
        )
    return kernel[0], kernel[2], kernel[1]


def _swap_last_axes(kernel: Array) -> Array:
    return np.swapaxes(kernel, 1, 2)


TRANSFORMS: dict[str, Transform] = {
    # the same elements in the same order
    "move": Transform(
        lossless=True,
        shape=lambda source: tuple(source),
        apply=lambda source: source,
        undo=lambda target: (target,),
    ),
    # (out, in / groups, kernel) -> (out, kernel, in / groups): MLX convolves channels last
    "conv_kernel": Transform(
        lossless=True,
        shape=_kernel_shape,
        apply=_swap_last_axes,
        undo=lambda target: (_swap_last_axes(target),),
    ),
    "fold_weight_norm": Transform(
        lossless=False,
        shape=_folded_shape,
        apply=fold_weight_norm,
        undo=lambda target: None,
        damage=_dead_taps,
    ),
    # the first release of mlx-contentvec kept the two parts, channels last
    "fold_weight_norm_channels_last": Transform(
        lossless=False,
        shape=lambda magnitude, direction: _folded_shape(
            _kernel_shape(magnitude), _kernel_shape(direction)
        ),
        apply=lambda magnitude, direction: fold_weight_norm(
            _swap_last_axes(magnitude), _swap_last_axes(direction)
        ),
        undo=lambda target: None,
        damage=lambda magnitude, direction: _dead_taps(magnitude, _swap_last_axes(direction)),
    ),
}
