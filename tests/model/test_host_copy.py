"""Waveforms to a GPU, and results back: what the driver copies, and what it does not."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_contentvec.backend import mx
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.ops import host_copy
from tests.small_models import DEEP, noise, random_model

LARGE = noise(90_000).reshape(300, 300)


class Driver:
    """Copies as cuMemcpy does, or refuses; notes what it copied."""

    def __init__(self, result: int = 0, arrives: bool = True) -> None:
        self.result = result
        self.arrives = arrives
        self.copied: list[int] = []
        self.waited: list[int] = []

    def cuMemcpy(self, to: int, source: int, size: int) -> int:  # noqa: N802
        if not self.result:
            ctypes.memmove(to, source, size if self.arrives else 8)
            self.copied.append(size)
        return self.result

    def cuStreamSynchronize(self, stream: None) -> int:  # noqa: N802
        self.waited.append(len(self.copied))
        return 0 if self.arrives else 700


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A driver beside MLX on a CPU, whose memory every array has."""
    given = getattr(request, "param", Driver())
    monkeypatch.setattr(host_copy, "device_kind", lambda: "cuda")
    monkeypatch.setattr(host_copy, "_driver", lambda: given)
    return given


def test_the_driver_copies_what_is_large_and_lies_in_one_piece(driver: Driver) -> None:
    assert np.array_equal(host_copy.to_numpy(mx.array(LARGE) + 1, copy=False), LARGE + 1)
    assert driver.copied == [LARGE.nbytes]
    assert np.array_equal(host_copy.to_numpy(mx.array(LARGE)[:3]), LARGE[:3])
    assert np.array_equal(host_copy.to_numpy(mx.array(LARGE).T), LARGE.T)
    assert driver.copied == [LARGE.nbytes]


@pytest.mark.parametrize("driver", [Driver(201), None], indirect=True, ids=["refuses", "none"])
def test_without_the_driver_the_result_is_the_same(driver: Driver | None) -> None:
    assert np.array_equal(host_copy.to_numpy(mx.array(LARGE)), LARGE)
    assert driver is None or driver.copied == []


@pytest.mark.parametrize("values", [LARGE.astype(np.float16), LARGE > 0, LARGE[:0]])
def test_other_types_and_no_values_arrive_as_they_are(driver: Driver, values: Any) -> None:
    found = host_copy.to_numpy(mx.array(values))
    assert found.dtype == values.dtype
    assert np.array_equal(found, values)


def test_a_copy_is_no_part_of_the_array() -> None:
    x = mx.array(LARGE)
    host_copy.to_numpy(x)[:] = 0
    assert np.array_equal(np.asarray(x), LARGE)


def test_nothing_is_copied_unasked_where_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "device_kind", lambda: "metal")
    x = mx.array(LARGE)
    assert np.shares_memory(host_copy.to_numpy(x, copy=False), np.asarray(x))


def test_a_machine_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    host_copy._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert host_copy._driver() is None
    host_copy._driver.cache_clear()


def test_features_are_copied_by_the_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "MIN_DRIVER_COPY", 0)
    model, clip = random_model(DEEP), noise(6_000)
    expected = np.array(model(clip[None])["x"])[0]
    np.testing.assert_array_equal(model.extract(clip, sample_rate=16000), expected)
    assert driver.copied == [expected.nbytes]


def test_the_driver_copies_a_waveform_and_is_waited_for(driver: Driver) -> None:
    taken = host_copy.from_numpy(LARGE)
    assert np.array_equal(np.asarray(taken), LARGE)
    assert (driver.copied, driver.waited) == ([LARGE.nbytes], [1])
    assert not np.shares_memory(np.asarray(taken), LARGE)
    for other in (LARGE.T, LARGE[:50], LARGE.astype(np.float16), LARGE > 0):
        assert np.array_equal(np.asarray(host_copy.from_numpy(other)), other)
    assert driver.copied == [LARGE.nbytes]


@pytest.mark.parametrize(
    "driver",
    [Driver(201), Driver(arrives=False), None],
    indirect=True,
    ids=["refuses", "fails", "none"],
)
def test_without_the_driver_the_waveform_is_the_same(driver: Driver | None) -> None:
    assert np.array_equal(np.asarray(host_copy.from_numpy(LARGE)), LARGE)


@pytest.mark.parametrize("config", [DEEP, replace(DEEP, normalize=True)])
def test_a_clip_is_copied_by_the_driver(driver: Driver, config: ModelConfig) -> None:
    model, clip = random_model(config), noise(80_000)[None]
    expected = np.array(model(mx.array(clip))["x"])
    driver.copied.clear()
    np.testing.assert_array_equal(np.array(model(clip)["x"]), expected)
    assert driver.copied[0] == clip.nbytes
