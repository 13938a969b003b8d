"""Arrays to a GPU and back: what the driver copies, and what it does not."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from mlx_contentvec.backend import mx
from mlx_contentvec.ops import host_copy
from tests.small_models import DEEP, noise, random_model

LARGE = noise(40_000).reshape(200, 200)


class Driver:
    """Copies as cuMemcpy does, or refuses; counts what it was asked for."""

    def __init__(self, copying: int = 0, waiting: int = 0) -> None:
        self.results = copying, waiting
        self.copied: list[int] = []
        self.waits = 0

    def cuMemcpy(self, to: int, source: int, size: int) -> int:  # noqa: N802
        if not self.results[0]:
            ctypes.memmove(to, source, size)
            self.copied.append(size)
        return self.results[0]

    def cuStreamSynchronize(self, stream: None) -> int:  # noqa: N802
        self.waits += 1
        return self.results[1]


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver beside MLX on a CPU, whose memory every array has."""
    given = getattr(request, "param", Driver())
    monkeypatch.setattr(host_copy, "device_kind", lambda: "cuda")
    monkeypatch.setattr(host_copy, "_driver", lambda: given)
    return given


def test_the_driver_copies_both_ways_and_is_waited_for(driver: Driver) -> None:
    x = host_copy.to_mlx(LARGE)
    assert np.array_equal(np.asarray(x), LARGE)
    copied = host_copy.to_numpy(x + 1)
    assert np.array_equal(copied, LARGE + 1)
    assert driver.copied == [LARGE.nbytes] * 2
    assert driver.waits == 2


@pytest.mark.parametrize("driver", [Driver(copying=201), Driver(waiting=700), None], indirect=True)
def test_what_the_driver_does_not_copy_arrives_all_the_same(driver: Driver | None) -> None:
    x = host_copy.to_mlx(LARGE)
    assert np.array_equal(np.asarray(x), LARGE)
    assert np.array_equal(host_copy.to_numpy(x), LARGE)
    assert driver is None or driver.copied == [] or driver.waits == 2


@pytest.mark.parametrize(
    "values",
    [LARGE[:, ::2], LARGE.T, LARGE[:3], LARGE.astype(np.float16), LARGE > 0, LARGE[:0]],
    ids=["every second", "by columns", "few", "float16", "truth", "nothing"],
)
def test_values_of_other_layouts_types_and_sizes_are_the_same_there_and_back(
    driver: Driver, values: Any
) -> None:
    x = host_copy.to_mlx(values)
    back = host_copy.to_numpy(x)
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)
    assert np.array_equal(host_copy.to_numpy(x.T), values.T)


def test_what_is_read_is_no_part_of_the_array() -> None:
    x = mx.array(LARGE)
    host_copy.to_numpy(x)[:] = 0
    assert np.array_equal(np.asarray(x), LARGE)


def test_a_machine_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    host_copy._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert host_copy._driver() is None
    host_copy._driver.cache_clear()


def test_a_model_takes_clips_and_gives_features_by_the_driver(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_copy, "SMALLEST", 0)
    model, clips = random_model(DEEP), [noise(6_000), noise(8_000, 1)]
    expected = [np.asarray(model(clip[None])["x"])[0] for clip in clips]
    driver.copied.clear()
    features = [model.extract(clip, sample_rate=16000) for clip in clips]
    for found, wanted in zip(features, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert driver.copied
    compiled = mx.compile(lambda x: model(x)["x"] + mx.array(model(clips[0][None])["x"]))
    twice = host_copy.to_numpy(compiled(mx.array(clips[0][None])))[0]
    np.testing.assert_allclose(twice, 2 * expected[0], atol=1e-4)
