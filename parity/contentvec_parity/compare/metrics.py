"""How far two sets of stage outputs are apart: pure functions, and a table of them.

A new metric is one function of a :class:`Pair` and one row of ``METRICS``.
``compare`` takes any two dictionaries of arrays, so other ports can use it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.errors import ParityError, name_list

Array = NDArray[np.float64]

#: percentiles of the error in units in the last place look at no more values than this
ULP_SAMPLE = 1 << 18


@dataclass(frozen=True)
class Pair:
    """Two arrays of one shape, (..., frames, channels), in float64."""

    measured: Array
    expected: Array
    #: measured - expected
    difference: Array

    @cached_property
    def distance(self) -> Array:
        """The size of each difference."""
        return np.abs(self.difference)

    @cached_property
    def sum_of_squares(self) -> float:
        """The sum of the squared differences."""
        flat = self.difference.ravel()
        return float(flat @ flat)


def max_abs(pair: Pair) -> float:
    """The largest difference of any one value."""
    return float(pair.distance.max(initial=0.0))


def max_abs_at(pair: Pair) -> list[int]:
    """Where that is: the index into the array."""
    if not pair.difference.size:
        return []
    flat = int(pair.distance.argmax())
    return [int(i) for i in np.unravel_index(flat, pair.difference.shape)]


def rms(pair: Pair) -> float:
    """The root of the mean squared difference."""
    return math.sqrt(pair.sum_of_squares / max(pair.difference.size, 1))


def _cosine(product: Array, one: Array, other: Array) -> Array:
    """Cosines from dot products and squared lengths; two zero vectors are alike."""
    lengths = np.sqrt(one * other)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = product / lengths
    both_zero = (one == 0) & (other == 0)
    return np.where(lengths > 0, np.clip(cosine, -1, 1), np.where(both_zero, 1.0, 0.0))


def cosine(pair: Pair) -> float:
    """The cosine of the angle between the two arrays, taken as one vector each."""
    one, other = pair.measured.ravel(), pair.expected.ravel()
    products = (np.array(one @ other), np.array(one @ one), np.array(other @ other))
    return float(_cosine(*products))


def _frame_cosines(pair: Pair) -> Array:
    one, other = pair.measured, pair.expected
    return _cosine(
        np.einsum("...c,...c->...", one, other),
        np.einsum("...c,...c->...", one, one),
        np.einsum("...c,...c->...", other, other),
    )


def worst_frame_cosine(pair: Pair) -> float:
    """The smallest cosine of any one frame."""
    return float(_frame_cosines(pair).min(initial=1.0))


def worst_frame_at(pair: Pair) -> list[int]:
    """Which frame that is: the index without the channel."""
    frames = _frame_cosines(pair)
    if not frames.size:
        return []
    return [int(i) for i in np.unravel_index(int(frames.argmin()), frames.shape)]


def snr_db(pair: Pair) -> float | None:
    """Power of what was expected over power of the difference, in dB; None if equal."""
    signal = float(pair.expected.ravel() @ pair.expected.ravel())
    if pair.sum_of_squares == 0:
        return None
    return 10 * math.log10(signal / pair.sum_of_squares) if signal > 0 else -math.inf


def ulps(pair: Pair) -> list[float]:
    """Median, 99th percentile and largest difference in float32 units in the last place."""
    step = max(1, -(-pair.difference.size // ULP_SAMPLE))
    difference = pair.distance.ravel()[::step]
    if not difference.size:
        return [0.0, 0.0, 0.0]
    unit = np.spacing(np.abs(pair.expected.ravel()[::step]).astype(np.float32))
    return [float(p) for p in np.percentile(difference / unit, (50, 99, 100))]


@dataclass(frozen=True)
class Metric:
    """One number, or one place, that a comparison yields."""

    name: str
    measure: Callable[[Pair], Any]
    #: what a reader of a report is told it is
    about: str
    #: the option that bounds it, and whether it must stay below or above
    bound: tuple[str, str] | None = None


METRICS: tuple[Metric, ...] = (
    Metric("max_abs", max_abs, "largest difference", ("max_abs", "at most")),
    Metric("max_abs_at", max_abs_at, "where the largest difference is"),
    Metric("rms", rms, "root mean square difference"),
    Metric("cosine", cosine, "cosine similarity over everything"),
    Metric(
        "worst_frame_cosine",
        worst_frame_cosine,
        "cosine similarity of the worst frame",
        ("min_cosine", "at least"),
    ),
    Metric("worst_frame_at", worst_frame_at, "which frame is the worst"),
    Metric("snr_db", snr_db, "signal-to-noise ratio in dB"),
    Metric("ulps", ulps, "difference in float32 units: median, 99th percentile, largest"),
)

#: what every row carries; the rest is measured for the features users read
ESSENTIAL = ("max_abs", "max_abs_at", "rms", "snr_db")


@dataclass(frozen=True)
class Difference:
    """How far one array is from another."""

    shape: tuple[int, ...]
    expected_shape: tuple[int, ...]
    #: number of values compared; 0 where the shapes differ
    values: int
    #: whether every compared value is a finite number
    finite: bool
    #: metric name -> what it measured; empty where nothing can be measured
    metrics: Mapping[str, Any]

    @property
    def comparable(self) -> bool:
        """Whether the shapes agree and everything is finite."""
        return self.shape == self.expected_shape and self.finite

    def __getitem__(self, metric: str) -> Any:
        return self.metrics[metric]


def difference(
    measured: NDArray[Any],
    expected: NDArray[Any],
    *,
    valid: NDArray[np.bool_] | None = None,
    metrics: tuple[str, ...] | None = None,
) -> Difference:
    """Compare two arrays, (batch, frames, channels) or any shape with channels last.

    valid:   (batch, frames), False where a frame is padding and does not count
    metrics: names of the metrics wanted, all by default
    """
    shapes = (tuple(measured.shape), tuple(expected.shape))
    if shapes[0] != shapes[1]:
        return Difference(*shapes, 0, True, {})
    one, other = np.asarray(measured, np.float64), np.asarray(expected, np.float64)
    if valid is not None and not valid.all():
        one, other = one[valid][None], other[valid][None]
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return Difference(*shapes, one.size, False, {})
    pair = Pair(one, other, one - other)
    wanted = {metric.name: metric.measure for metric in METRICS}
    found = {name: wanted[name](pair) for name in metrics or tuple(wanted)}
    if valid is not None and not valid.all():
        places = np.argwhere(valid)
        for name in ("max_abs_at", "worst_frame_at"):
            if found.get(name):
                _, frame, *channel = found[name]
                found[name] = [*(int(i) for i in places[frame]), *channel]
    return Difference(*shapes, one.size, True, found)


def compare_arrays(
    measured: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    valid: NDArray[np.bool_] | None = None,
) -> dict[str, Difference]:
    """Compare two dictionaries of stage outputs, stage by stage.

    Any arrays that numpy can read will do (numpy, mlx, torch on the CPU), with
    channels last. The order is that of ``expected``.

    Raises ParityError if the two do not hold the same stages.
    """
    missing = [name for name in expected if name not in measured]
    surplus = [name for name in measured if name not in expected]
    if missing or surplus:
        raise ParityError(
            "the two do not hold the same stages",
            found=f"{len(missing)} missing: {name_list(missing)}"
            if missing
            else f"{len(surplus)} more: {name_list(surplus)}",
            expected=name_list(expected),
        )
    return {
        name: difference(np.asarray(measured[name]), np.asarray(expected[name]), valid=valid)
        for name in expected
    }


def rounding_floor(truth: NDArray[np.float64]) -> dict[str, float]:
    """The error of the truth itself once it is rounded to float32: no float32 can do better."""
    off = truth.ravel() - truth.ravel().astype(np.float32)
    return {
        "max_abs": float(np.abs(off).max(initial=0.0)),
        "rms": math.sqrt(float(off @ off) / max(off.size, 1)),
    }
