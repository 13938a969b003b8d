"""What users get who set nothing: the same features at the device's own precision.

MLX computes float32 products at TF32 precision on some devices unless told not
to, and reads that setting once, when it starts. So the second measurement is a
second process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import ParityError

from .compare.verdict import summarise
from .inputs import built_in
from .references import Reference
from .references.recording import write

#: the clips it is measured on
CLIPS = ("short", "quiet", "min")

#: as long as the slowest device may take for one and a half seconds of audio
PATIENCE_SECONDS = 300


def record_for_it(original: Reference, source: Mapping[str, Any], folder: Path) -> Path:
    """A recording of a few clips' features, for the other process to compare with."""
    path = folder / "features.safetensors"
    clips = [(clip, "features") for clip in built_in() if clip.name in CLIPS]
    write(original, source, path, clips)
    return path


def measure(recording: Path, converted: Path) -> dict[str, Any]:
    """``flags``, ``summary`` and ``snr_db`` of the features with MLX's own settings.

    Raises ParityError if the other process does not come to an end with a report.
    """
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "mlx_contentvec", "parity", "run", "--tf32", "--json", "-"]
    try:
        done = subprocess.run(
            [*command, "--reference", os.fspath(recording), os.fspath(converted)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        document = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise ParityError(
            "the device's own precision could not be measured",
            found=str(error),
            hint="--no-device-default leaves it out",
        ) from error
    rows = [row for row in document["stages"] if row["kind"] == "features"]
    ratios = [row["candidate"]["snr_db"] for row in rows if row["comparable"]]
    return {
        "flags": document["flags"],
        "summary": summarise(rows),
        "snr_db": min((value for value in ratios if value is not None), default=None),
    }


def measure_original(
    original: Reference, source: Mapping[str, Any], converted: Path
) -> dict[str, Any]:
    """The same, for an original that is open in this process."""
    with tempfile.TemporaryDirectory(prefix="contentvec-parity-") as folder:
        return measure(record_for_it(original, source, Path(folder)), converted)
