"""For the tests of any port: hold a dictionary of stage outputs against the original's.

    from contentvec_parity.testing import assert_parity

    def test_my_port_is_as_exact_as_the_original():
        assert_parity(my_stages(audio), original_stages(audio), truth=float64_stages(audio))

With the truth the question is the one that can be answered anywhere: is the
port further from it than the original is? Without it only the absolute limits
are left. Needs numpy alone; arrays may be numpy's, MLX's or torch's (on the CPU).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compare.metrics import Difference, compare_arrays, rounding_floor
from .compare.verdict import RATIO, ratio


def assert_parity(
    measured: Mapping[str, Any],
    original: Mapping[str, Any],
    *,
    truth: Mapping[str, Any] | None = None,
    max_ratio: float = RATIO,
    max_abs: float | None = None,
    min_cosine: float | None = None,
    valid: NDArray[np.bool_] | None = None,
) -> dict[str, Difference]:
    """Fail, naming the first stage that is off, unless the two agree.

    measured, original, truth: stage -> array, channels last, in the order they run
    max_ratio:  largest error(measured) / error(original), both against ``truth``
    max_abs:    largest difference of any value from ``truth`` (or from ``original``)
    min_cosine: smallest cosine of any frame with it
    valid:      (batch, frames), False where a frame does not count

    Returns what was measured, stage by stage. Raises AssertionError, and
    ParityError if the dictionaries do not hold the same stages; ValueError if
    nothing would be checked.
    """
    if truth is None and max_abs is None and min_cosine is None:
        raise ValueError("give truth=, max_abs= or min_cosine=: nothing would be checked")
    found = compare_arrays(measured, truth if truth is not None else original, valid=valid)
    theirs = compare_arrays(original, truth, valid=valid) if truth is not None else {}
    complaints: dict[str, list[str]] = {}
    for stage, difference in found.items():
        said: list[str] = []
        if difference.shape != difference.expected_shape:
            said.append(f"shape {difference.shape}, not {difference.expected_shape}")
        elif not difference.finite:
            said.append("numbers that are not finite")
        else:
            if truth is not None:
                said += _ratio_complaints(difference, theirs[stage], truth[stage], max_ratio)
            if max_abs is not None and difference["max_abs"] > max_abs:
                said.append(f"off by {difference['max_abs']:.3g}, at most {max_abs:g}")
            if min_cosine is not None and difference["worst_frame_cosine"] < min_cosine:
                said.append(
                    f"worst frame's cosine {difference['worst_frame_cosine']:.9f} "
                    f"(at {difference['worst_frame_at']}), at least {min_cosine:g}"
                )
        if said:
            complaints[stage] = said
    if complaints:
        first = next(iter(complaints))
        lines = [f"{first} is the first stage that is off:"]
        lines += [f"  {stage}: {'; '.join(said)}" for stage, said in complaints.items()]
        raise AssertionError("\n".join(lines))
    return found


def _ratio_complaints(
    mine: Difference, theirs: Difference, truth: Any, max_ratio: float
) -> list[str]:
    floor = rounding_floor(np.asarray(truth, np.float64))
    said = []
    for metric in ("max_abs", "rms"):
        value = ratio(mine[metric], theirs[metric], floor[metric])
        if value > max_ratio:
            said.append(
                f"{metric} error {mine[metric]:.3g} is {value:.3g} x the original's, "
                f"at most {max_ratio:g} x"
            )
    return said
