"""The loop that ``scripts/bench_extract.py`` times beside ``extract``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from contentvec_parity.bench import worker
from tests.small_models import LARGE, TINY
from tests.sources import PROJECT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "bench_extract", PROJECT / "scripts" / "bench_extract.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # the folder of the scripts holds scripts only
        patch.setattr(sys, "dont_write_bytecode", True)
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("config", [TINY, LARGE], ids=["as it is", "normalised"])
def test_a_loop_is_given_all_that_an_engine_asks_for(
    config: Any, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile = pytest.importorskip("soundfile")
    metadata = {"config": config.to_json()}
    monkeypatch.setattr("contentvec_parity.compare.candidate.read_metadata", lambda _: metadata)
    (tmp_path / "clips").mkdir()
    speech = np.random.default_rng(0).uniform(-0.5, 0.5, 4410).astype(np.float32)
    soundfile.write(tmp_path / "clips" / "a.wav", speech, 44100, subtype="FLOAT")
    given: list[np.ndarray[Any, Any]] = []

    def engine(_: str, settings: dict[str, Any]) -> worker.Run:
        assert {"device", "threads", "dtype"} <= set(settings)

        def run(source: worker.Waveform) -> worker.Waveform:
            given.append(worker._as_wanted(source, settings))
            return given[-1]

        return run

    monkeypatch.setitem(worker.ENGINES, "recorded", engine)
    loop = script.loop_of("recorded", "model", "weights.safetensors", threads=1)
    taken = script.run_loop(loop, str(tmp_path / "clips"))
    assert taken["seconds"] > 0
    (clip,) = given
    assert clip.shape == (1, 1600)
    assert abs(clip.std() - 1) < 1e-3 if config.normalize else clip.std() < 0.5
