"""Number formats: what a checkpoint stores, what the output stores, and the way between.

One row of PRECISIONS is one value of ``--dtype``. A row says how float32 is
rounded to it and from which stored formats it loses no bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_contentvec.errors import ConfigError, MappingError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

#: safetensors dtype -> bytes of one element
STORED_BYTES = {"F64": 8, "I64": 8, "F32": 4, "U32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Quantization:
    """MLX's affine quantisation: ``group_size`` weights share a scale and a bias."""

    bits: int
    group_size: int = 64

    def applies(self, shape: Shape) -> bool:
        """Whether a parameter is quantised: every linear weight that divides into groups."""
        return len(shape) == 2 and shape[1] % self.group_size == 0


@dataclass(frozen=True)
class Precision:
    """One format of the output."""

    name: str
    #: safetensors dtype of every tensor that is not quantised
    stored: str
    #: the same format's name in a checkpoint
    source: str
    #: formats of a checkpoint that it holds without loss
    holds: frozenset[str]
    #: float32 -> the stored elements, rounded to nearest, ties to even
    narrow: Callable[[Array], Array]
    summary: str
    quantization: Quantization | None = None

    def recode(self, elements: Array, dtype: str) -> Array:
        """A checkpoint's stored ``elements`` of ``dtype`` in this format.

        Bits are passed through where the format is the same.
        """
        if dtype == self.source:
            return elements
        return self.narrow(widen(elements, dtype))


@functools.cache
def _half_values() -> npt.NDArray[np.float32]:
    """All 65,536 float16 values as float32, by their bits.

    That the table is exact shows in that narrowing it gives back every index.
    """
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(values)
    if not np.array_equal(values.astype(np.float16).view(np.uint16)[numbers], bits[numbers]):
        raise MappingError("this machine does not widen float16 to float32 exactly")
    return values


#: what is left of a float16, sign extended and moved to the place it has in a float32
_HALF_BITS = np.int32(-0x70002000)
#: exponents have a bias of 15 in the one and of 127 in the other
_REBIASED = np.float32(2.0**112)
_SMALLEST_HALF = np.array([1 << 13], np.int32).view(np.float32)


def _widen_half(elements: Array) -> npt.NDArray[np.float32]:
    """float16 as float32 by moving the bits: twice as fast as looking the values up.

    The product is exact: a power of two, and no result is below the normal numbers of
    float32. Only the smallest come to it as subnormal ones, which a thread may be set to
    take for zero. There, and for what is not finite, the values are looked up.
    """
    bits = elements.view(np.int16)
    exact = (_SMALLEST_HALF * _REBIASED)[0] == 2.0**-24
    if not exact or (bits.size and (bits << 1).view(np.uint16).max() >= 0xF800):
        values: npt.NDArray[np.float32] = _half_values().take(bits.view(np.uint16), mode="clip")
        return values
    moved = bits.astype(np.int32)
    moved <<= 13
    moved &= _HALF_BITS
    widened = moved.view(np.float32)
    widened *= _REBIASED
    return widened


def widen(elements: Array, dtype: str) -> Array:
    """A checkpoint's ``elements`` of ``dtype`` as float32.

    bfloat16 comes as its bits (uint16). Exact but for float64, which is
    rounded to nearest. MappingError if ``dtype`` is not a floating-point format.
    """
    if dtype == "float16":
        return _widen_half(elements)
    if dtype == "bfloat16":
        # a bfloat16 is the upper half of a float32
        bits: Array = elements.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    if dtype == "float32":
        return elements
    if dtype == "float64":
        with np.errstate(over="ignore", invalid="ignore"):
            return elements.astype(np.float32)
    raise MappingError(
        "a weight is not stored as floating-point numbers",
        found=dtype,
        expected=" or ".join(sorted(WIDENED)),
    )


#: formats of a checkpoint that a weight can be stored in
WIDENED = frozenset({"float16", "bfloat16", "float32", "float64"})


def _as_float32(values: Array) -> Array:
    return values


def _to_float16(values: Array) -> Array:
    """Nearest float16; a finite value that is too large becomes infinite (and is refused later)."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def _to_bfloat16(values: Array) -> Array:
    """The bits (uint16) of the nearest bfloat16, ties to even.

    Source: the rounding that hardware bfloat16 conversions do; the carry out of
    the mantissa goes into the exponent by itself. Not for NaN.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded: Array = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return rounded.astype(np.uint16)


def all_finite(elements: Array, stored: str) -> bool:
    """Whether no element is NaN or infinite; ``stored`` is their safetensors dtype."""
    if stored == "F32":
        # one pass that also catches what a sum of infinities of both signs makes (NaN)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(elements.sum()):
                return True
        return bool(np.isfinite(elements).all())
    exponent = {"F16": 0x7C00, "BF16": 0x7F80}[stored]
    return bool(((elements.view(np.uint16) & np.uint16(exponent)) != exponent).all())


_HALF = frozenset({"float16"})

#: the values of ``--dtype``, by name
PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision(
            "float32",
            stored="F32",
            source="float32",
            holds=frozenset({"float16", "bfloat16", "float32"}),
            narrow=_as_float32,
            summary="every bit of the checkpoint; the default",
        ),
        Precision(
            "float16",
            stored="F16",
            source="float16",
            holds=_HALF,
            narrow=_to_float16,
            summary="half the size; loses nothing of a float16 checkpoint but in the folded kernel",
        ),
        Precision(
            "bfloat16",
            stored="BF16",
            source="bfloat16",
            holds=frozenset({"bfloat16"}),
            narrow=_to_bfloat16,
            summary="half the size, 8 bits of mantissa: worse than float16 for these weights",
        ),
        Precision(
            "q8",
            stored="F16",
            source="float16",
            holds=_HALF,
            narrow=_to_float16,
            summary="linear weights in 8 bits, groups of 64; the rest float16",
            quantization=Quantization(bits=8),
        ),
        Precision(
            "q4",
            stored="F16",
            source="float16",
            holds=_HALF,
            narrow=_to_float16,
            summary="linear weights in 4 bits, groups of 64; the rest float16",
            quantization=Quantization(bits=4),
        ),
    )
}


def precision_named(name: str) -> Precision:
    """The row of PRECISIONS. ConfigError if there is none of that name."""
    if name not in PRECISIONS:
        raise ConfigError(f"there is no output format {name!r}", expected=" or ".join(PRECISIONS))
    return PRECISIONS[name]


def quantize(weight: Array, how: Quantization) -> tuple[Array, Array, Array]:
    """A linear weight (out, in) float32, packed by MLX itself.

    returns: weight (out, in * bits / 32) uint32; scales and biases
    (out, in / group_size) float16, such that weight = scale * integer + bias.
    """
    from mlx_contentvec.backend import mx

    packed, scales, biases = mx.quantize(mx.array(weight), group_size=how.group_size, bits=how.bits)
    return (
        np.asarray(packed),
        np.asarray(scales.astype(mx.float16)),
        np.asarray(biases.astype(mx.float16)),
    )
