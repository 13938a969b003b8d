"""What ``mlx-contentvec doctor`` says of a machine, and what it measures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from contentvec_parity import doctor, machine
from contentvec_parity.commands import doctor as command
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import BackendError, ParityError
from tests.forks import run_command
from tests.sources import PROJECT


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command.doctor, list(arguments))


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac of 16 GB, as far as questions go."""
    info = {"memory_size": 16 << 30, "device_name": "Apple M2"}
    monkeypatch.setattr("mlx_contentvec.backend.device_kind", lambda: "metal")
    monkeypatch.setattr("mlx_contentvec.memory.device_kind", lambda: "metal")
    monkeypatch.setattr(mx, "device_info", lambda: info, raising=False)


def test_it_says_what_is_here_and_nothing_about_whose_it_is(
    converted_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(converted_tiny.parent)
    done = run()
    assert done.exit_code == 0
    for name in ("project", "machine", "system", "versions", "device", "TF32", "weights"):
        assert re.search(rf"^{name} ", done.stdout, re.MULTILINE), name
    assert converted_tiny.name in done.stdout
    assert str(converted_tiny.parent) not in done.stdout
    assert str(Path.home()) not in done.stdout


def test_the_same_as_json(tmp_path: Path) -> None:
    document = json.loads(run("--json", "-").stdout)
    assert document["schema"] == doctor.SCHEMA
    assert run("--json", str(tmp_path / "report.json")).stdout.startswith("project ")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["versions"] == document["versions"]
    assert run("--json", str(tmp_path)).exit_code == 1


@pytest.mark.parametrize(
    ("works", "sums", "said"),
    [
        (True, "short", "short, on tensor cores"),
        (True, "plain", "plain"),
        (False, "short", "short"),
    ],
)
def test_a_gpu_says_where_its_products_are(
    metal: None, monkeypatch: pytest.MonkeyPatch, works: bool, sums: str, said: str
) -> None:
    monkeypatch.setattr("mlx_contentvec.backend.device_kind", lambda: "cuda")
    monkeypatch.setattr("mlx_contentvec.ops.tensor_cores.works", lambda dtype: works)
    monkeypatch.setenv("MLX_CONTENTVEC_SUMS", sums)
    assert re.search(f"^sums +{said}$", run().stdout, re.MULTILINE)


def test_a_macs_limits_are_said_and_left_as_they_are(metal: None) -> None:
    before = mx.set_cache_limit(1 << 30)
    if mx.set_cache_limit(1 << 30) != 1 << 30:
        pytest.skip("needs MLX 0.32 or a GPU: earlier ones keep no limit on a CPU")
    try:
        document = doctor.facts()
        assert mx.set_cache_limit(1 << 30) == 1 << 30
    finally:
        mx.set_cache_limit(before)
    assert document["device"]["mlx_limits"]["cache"] == 1 << 30
    assert document["device"]["default_max_memory"] == 3 << 30
    text = doctor.to_text(document)
    assert "metal, Apple M2" in text
    assert "16.0 GiB; MLX may hold" in text
    assert "freed buffers 1.0 GiB" in text


@pytest.mark.parametrize("version", doctor.BROKEN_MLX)
def test_a_version_of_mlx_that_must_not_be_used_is_a_trouble(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    found = machine.versions()
    monkeypatch.setattr(machine, "versions", lambda: {**found, "mlx": version})
    done = run()
    assert done.exit_code == 1
    assert f"TROUBLE     MLX {version}: " in done.stdout


def test_pip_is_kept_from_the_versions_that_must_not_be_used() -> None:
    requirements = pytest.importorskip("packaging.requirements", reason="pip install packaging")
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = requirements.Requirement(re.findall(r'"(mlx[><=!][^"]+)"', text)[0]).specifier
    assert [version for version in doctor.BROKEN_MLX if version in allowed] == []
    # macOS 13 gets no later one
    assert {"0.29.1", "0.29.3", "0.30.5", "0.32.4"} == set(
        allowed.filter(["0.29.1", "0.29.3", "0.30.5", "0.32.4"])
    )


def test_without_mlx_the_rest_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise BackendError("MLX cannot be imported", hint="pip install mlx-contentvec")

    monkeypatch.setattr(machine, "describe", missing)
    done = run("--measure")
    assert done.exit_code == 1
    assert "TROUBLE     MLX cannot be imported; pip install mlx-contentvec" in done.stdout
    assert "versions    python" in done.stdout


def test_it_measures_a_stand_in_with_both_kinds_of_sums_on_a_gpu(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, asked = doctor._run, []

    def watching(*arguments: Any, environment: Any = None) -> str:
        asked.append((arguments[0], environment))
        return own(*arguments, environment=environment)

    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=run_command))
    monkeypatch.setattr(doctor, "_run", watching)
    monkeypatch.setattr(doctor, "SECONDS", (0.2, 0.4))
    found = doctor.measure("metal", preset="tiny")
    assert list(found) == ["short", "plain"]
    assert [environment for name, environment in asked if environment] == [
        {"MLX_CONTENTVEC_SUMS": "short"},
        {"MLX_CONTENTVEC_SUMS": "plain"},
    ]
    for outcome in found.values():
        assert outcome["passed"]
        assert list(outcome["seconds"]) == ["0.2", "0.4"]
        assert min(outcome["seconds"].values()) > 0
        assert outcome["worst_stage"]["ratio"]["max_abs"] > 0
    text = doctor.to_text({**doctor.facts(), "measured": found})
    assert "short sums  PASSED" in text
    assert "plain sums  PASSED" in text
    assert "speed: 0.2 s in" in text


def test_a_comparison_that_fails_is_a_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = {
        "passed": False,
        "reason": "conv.0 is off",
        "features": {"layer 12": {"max_abs": 9.0, "rms": 8.0}},
        "worst_stage": {"name": "conv.0", "kind": "local", "ratio": {"max_abs": 9.0, "rms": 8.0}},
        "seconds": {"1": 0.1},
    }
    monkeypatch.setattr(doctor, "measure", lambda *_: {"plain": outcome})
    done = run("--measure")
    assert done.exit_code == 1
    assert "plain sums  FAILED: conv.0 is off" in done.stdout
    assert "TROUBLE     the comparison failed, plain sums" in done.stdout


def test_a_step_that_fails_is_said_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParityError, match="standin failed") as raised:
        doctor._run("standin", "/nowhere/at/all.pt", "--preset", "tiny")
    assert "/nowhere" in str(raised.value.found)

    def failing(*_: Any) -> Any:
        raise ParityError("standin failed", found="no space left")

    monkeypatch.setattr(doctor, "measure", failing)
    done = run("--measure")
    assert done.exit_code == 1
    assert "could not measure: standin failed (no space left)" in done.stdout


@pytest.mark.parametrize("sums", ["short", "plain"])
def test_a_step_runs_with_the_variables_that_it_is_given(
    sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=run_command))
    monkeypatch.setenv("MLX_CONTENTVEC_SUMS", "plain")
    given = {"MLX_CONTENTVEC_SUMS": sums}
    said = json.loads(doctor._run("doctor", "--json", "-", environment=given))
    assert said["device"]["sums"] == sums
    if sums == "short":
        said = json.loads(doctor._run("doctor", "--json", "-"))
        assert said["device"]["sums"] == "plain"


@pytest.mark.parametrize(("kind", "lengths"), [("cpu", ["1", "10"]), ("cuda", ["1", "10", "30"])])
def test_what_is_timed_runs_with_the_variables_that_it_is_given(
    kind: str, lengths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def start(*given: Any) -> Any:
        started.append(given)
        return SimpleNamespace(run=lambda length: {"wall": length}, close=lambda: None)

    monkeypatch.setattr(doctor, "Worker", start)
    times = doctor._times(Path("model"), kind, {"MLX_CONTENTVEC_SUMS": "plain"})
    assert list(times) == lengths
    ((_, settings, variables),) = started
    assert settings.device == ("cpu" if kind == "cpu" else "gpu")
    assert variables == {"MLX_CONTENTVEC_SUMS": "plain"}


def test_the_command_is_one_of_the_commands(run_cli: Callable[..., Any]) -> None:
    done = run_cli("doctor", "--help")
    assert done.returncode == 0
    assert "--measure" in done.stdout
