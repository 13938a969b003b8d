"""Commands that cannot write: one error, exit status 1, nothing left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_parity.publishing.package import package
from tests.sources import PROJECT, search_path

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def limited(tmp_path: Path) -> Run:
    """``limited(kilobytes, *arguments)``: a command that can write no larger file."""

    def run(kilobytes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = shlex.join([sys.executable, "-m", "mlx_contentvec", *map(str, arguments)])
        return subprocess.run(
            ["bash", "-c", f"ulimit -f {kilobytes}; exec {command}"],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": search_path(),
                # cut by the limit, it would stay for whoever imports the module next
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("kilobytes", "arguments"),
    [
        (10, "package {e}/float32.safetensors package --test-only-stand-in"),
        (100, "package {e}/float32.safetensors package --test-only-stand-in"),
        (10, "standin standin.pt --preset tiny"),
        (400, "standin standin.pt --preset tiny"),
        (100, "standin standin.pt --preset tiny --legacy-format"),
        (100, "export {e}/float32.safetensors --to transformers -o folder"),
        (100, "export {e}/float32.safetensors --to fairseq -o file.pt"),
        (10, "parity judge {e}/float32.parity.json --json report.json"),
        (1, "parity judge {e}/float32.parity.json --markdown report.md"),
    ],
)
def test_a_file_too_large_is_one_error_and_leaves_nothing(
    limited: Run, evidence_folder: Path, tmp_path: Path, kilobytes: int, arguments: str
) -> None:
    done = limited(kilobytes, *arguments.format(e=evidence_folder).split())
    assert done.returncode == 1
    assert done.stderr.count("error: cannot write") == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_said_on_stderr_changes_no_exit_status() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full (Linux)")
    code = (
        "import sys; from mlx_contentvec.cli import main; "
        "sys.stderr = open('/dev/full', 'w'); sys.stderr.write('a step'); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "models"],
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": search_path()},
    )
    assert done.returncode == 0
    assert b"contentvec" in done.stdout


def test_nobody_who_reads_the_steps_does_not_stop_a_package(
    run_cli: Any, evidence_folder: Path, tmp_path: Path
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full (Linux)")
    made = package(evidence_folder / "float32.safetensors", tmp_path / "p", allow_stand_in=True)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_contentvec", "verify", str(made.folder)],
            env={**os.environ, "PYTHONPATH": search_path()},
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0
    assert done.stdout.startswith("PASSED")
