"""The same features with TF32 products: what turning them on costs.

On CUDA and on an Apple M5 or later MLX can compute float32 products at TF32
precision. Importing ``mlx_contentvec`` turns that off unless the user has set
``MLX_ENABLE_TF32``, and MLX reads the variable once, at its first product. So
this measurement is a second process.
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

#: the clips it is measured on, and which stages of them: a sound report has each stage once
CLIPS = {"short": "features", "quiet": "features", "min": "every stage"}

#: as long as the slowest device may take for one and a half seconds of audio
TIMEOUT_SECONDS = 300


def measure(recording: Path, converted: Path) -> dict[str, Any]:
    """``flags``, ``summary`` and ``snr_db`` of the features with TF32 allowed.

    Raises ParityError if the other process does not end with a report.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "mlx_contentvec", "parity", "run", "--tf32", "--json", "-"]
    try:
        done = subprocess.run(
            [*command, "--reference", os.fspath(recording), os.fspath(converted)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        document = json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise ParityError(
            "the features with TF32 could not be measured",
            found=str(error),
            hint="--no-compare-tf32 leaves them out",
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
    """The same, against an original that is open in this process."""
    with tempfile.TemporaryDirectory(prefix="contentvec-parity-") as folder:
        recording = Path(folder) / "features.safetensors"
        clips = [(clip, CLIPS[clip.name]) for clip in built_in() if clip.name in CLIPS]
        write(original, source, recording, clips)
        return measure(recording, converted)
