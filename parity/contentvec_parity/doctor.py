"""What a machine has to run the models with, and how exact and fast they are on it.

    facts()    machine, versions, device and its limits, weights, packages, known troubles
    measure()  parity and speed of a stand-in, with short sums and, on a GPU, with plain ones
    to_text()  both as lines that can be pasted into an issue

Nothing here names a folder or a user of the machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import ContentvecError, ParityError

from . import machine
from .bench.measure import Engine, Settings, Worker
from .compare.candidate import read_metadata
from .compare.verdict import worst_ratio

SCHEMA = "mlx-contentvec-doctor/1"

#: versions of MLX that must not be used, and why; pyproject.toml keeps pip from them
BROKEN_MLX = {
    "0.29.0": "its attention reads memory that was freed",
    **{
        f"0.30.{patch}": "products of more than 32,767 rows lose rows on an M5: "
        "clips over 10 s get wrong features"
        for patch in range(5)
    },
}

#: module -> what it is for; none is needed to run a model on a waveform
OPTIONAL = {
    "av": "audio files",
    "soxr": "resampling",
    "jinja2": "reports as a page",
    "matplotlib": "plots",
    "torch": "the original",
    "transformers": "the original",
    "fairseq": "the original",
}

NO_WEIGHTS = ["none converted in this folder, none in the Hub's cache"]

#: seconds of audio whose features are timed, and how often
SECONDS = (1.0, 10.0, 30.0)
REPEATS = 3
#: as long as the slowest step may take on a slow machine
PATIENCE_SECONDS = 900

Progress = Callable[[str], None]


# -- facts -----------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What can be read off the machine in a second, as plain JSON values.

    Where MLX cannot be imported, ``device`` is None and ``troubles`` says why.
    """
    troubles: list[str] = []
    versions = machine.versions()
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "machine": None,
        "device": None,
    }
    mlx = versions.get("mlx")
    if mlx in BROKEN_MLX:
        troubles.append(f"MLX {mlx}: {BROKEN_MLX[mlx]}; pip install --upgrade mlx")
    if sys.platform == "darwin" and platform.machine() != "arm64":
        troubles.append("this Python is built for Intel: MLX needs one for Apple silicon (arm64)")
    try:
        found["machine"] = machine.describe()
        found["flags"] = machine.flags()
        found["device"] = _device()
    except ContentvecError as error:
        troubles.append(f"{error.problem}; {error.hint}")
    found["weights"] = list(_weights())
    found["packages"] = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    found["troubles"] = troubles
    return found


def _device() -> dict[str, Any]:
    """What MLX computes on, and what it and this project may take of its memory; in bytes."""
    from mlx_contentvec.backend import device_kind, memory_limit, mx
    from mlx_contentvec.memory import gpu_memory, limit_of
    from mlx_contentvec.ops import tensor_cores

    found: dict[str, Any] = {
        "kind": device_kind(),
        "sums": os.environ.get("MLX_CONTENTVEC_SUMS", "short"),
        "default_max_memory": limit_of(None),
    }
    if found["kind"] != "cpu":
        # only setting tells what was set
        kept = mx.set_cache_limit(0)
        mx.set_cache_limit(kept)
        found["memory"] = gpu_memory()
        found["tensor_cores"] = found["kind"] == "cuda" and tensor_cores.works(mx.float32)
        found["mlx_limits"] = {"memory": memory_limit(), "cache": kept}
    return found


def _weights() -> Iterator[dict[str, Any]]:
    """Converted files in this folder, and repositories in the Hub's cache."""
    for path in sorted(Path().glob("*.safetensors")):
        try:
            metadata = read_metadata(path)
        except (ContentvecError, OSError, ValueError):
            continue
        if "config" in metadata:
            yield {"name": path.name, "bytes": path.stat().st_size, "where": "this folder"}
    try:
        from huggingface_hub import scan_cache_dir

        repositories = scan_cache_dir().repos
    except Exception:  # a cache that is not there, or not readable: nothing to tell
        return
    for repository in sorted(repositories, key=lambda one: one.repo_id):
        if any(word in repository.repo_id.lower() for word in ("contentvec", "hubert")):
            size = repository.size_on_disk
            yield {"name": repository.repo_id, "bytes": size, "where": "the Hub's cache"}


# -- measurements ----------------------------------------------------------------------


def measure(
    kind: str, progress: Progress = lambda doing: None, *, preset: str = "base"
) -> dict[str, Any]:
    """Parity and speed of a stand-in on this machine, about a minute for one of full size.

    kind:   what MLX computes on; the form of the sums is a choice on a GPU only
    preset: of the stand-in, a key of ``standin.weights.PRESETS``

    returns: form of the sums -> ``passed``, ``reason``, ``features`` (their errors as
             multiples of PyTorch's), ``worst_stage``, ``seconds`` by length of audio

    Raises ParityError if a step fails, with what it said last.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="contentvec-doctor-") as name:
        folder = Path(name)
        checkpoint, converted = folder / "standin.pt", folder / "standin.safetensors"
        recording = folder / "recording.safetensors"
        progress("making a stand-in")
        _run("standin", checkpoint, "--preset", preset)
        progress("converting it")
        _run("convert", checkpoint, "--output", converted, "--allow-unknown")
        progress("running the original")
        _run("parity", "record", checkpoint, recording)
        for sums in ("short",) if kind == "cpu" else ("short", "plain"):
            progress(f"comparing, {sums} sums")
            environment = {"MLX_CONTENTVEC_SUMS": sums}
            said = _run(
                *("parity", "run", converted, "--reference", recording),
                *("--no-compare-tf32", "--json", "-"),
                environment=environment,
            )
            progress(f"timing, {sums} sums")
            seconds = _times(converted, kind, environment)
            found[sums] = {**_outcome(json.loads(said)), "seconds": seconds}
    return found


def _run(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> str:
    """The output of one of this project's own commands; a comparison that fails is a result."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_contentvec", *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    if done.returncode and not (arguments[:2] == ("parity", "run") and done.stdout):
        raise ParityError(
            f"{arguments[0]} failed",
            found=done.stderr.strip() or f"exit status {done.returncode}",
        )
    return done.stdout


def _outcome(document: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict of a comparison in a few figures: errors as multiples of PyTorch's."""
    verdict = document["verdict"]
    stages = [entry for entry in verdict["summary"] if entry["kind"] != "features"]
    first = max(stages, key=worst_ratio)
    return {
        "passed": verdict["passed"],
        "reason": verdict["reason"],
        "features": {
            entry["name"]: entry["ratio"]
            for entry in verdict["summary"]
            if entry["kind"] == "features"
        },
        "worst_stage": {"name": first["name"], "kind": first["kind"], "ratio": first["ratio"]},
    }


def _times(converted: Path, kind: str, environment: Mapping[str, str]) -> dict[str, float]:
    """Length of a clip in seconds -> the median time its features take, once warm."""
    settings = Settings(threads=os.cpu_count() or 1, device="cpu" if kind == "cpu" else "gpu")
    worker = Worker(Engine("MLX", "mlx", converted), settings, environment)
    try:
        found = {}
        # a CPU takes seconds for the longest
        for length in SECONDS[:2] if kind == "cpu" else SECONDS:
            walls = [worker.run(length)["wall"] for _ in range(1 + REPEATS)][1:]
            found[f"{length:g}"] = statistics.median(walls)
        return found
    finally:
        worker.close()


# -- text ------------------------------------------------------------------------------


def to_text(document: Mapping[str, Any]) -> str:
    """The document as lines of a name and what is there."""
    return "\n".join(f"{name:<12}{value}".rstrip() for name, value in _lines(document))


def _lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    there, device = document["machine"], document["device"]
    versions = dict(document["versions"])
    yield "project", f"mlx-contentvec {versions.pop('mlx-contentvec', 'from its sources')}"
    if there is not None:
        memory = there["memory_gib"]
        yield "machine", f"{there['chip']}, {there['cores']} cores, {memory} GiB"
        yield "system", f"{there['system']}, {there['architecture']}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if device is not None:
        yield from _device_lines(there["device"], device, document["flags"])
    weights = [
        f"{one['name']}, {one['bytes'] / 1e6:.1f} MB, in {one['where']}"
        for one in document["weights"]
    ]
    yield "weights", (weights or NO_WEIGHTS)[0]
    yield from (("", line) for line in weights[1:])
    missing = [
        f"{name} ({OPTIONAL[name]})" for name, there in document["packages"].items() if not there
    ]
    yield "packages", "all optional ones" if not missing else f"without {', '.join(missing)}"
    for sums, outcome in document.get("measured", {}).items():
        yield from _outcome_lines(sums, outcome)
    for trouble in document["troubles"]:
        yield "TROUBLE", trouble
    if not document["troubles"]:
        yield "troubles", "none known"


def _device_lines(
    described: Mapping[str, Any], device: Mapping[str, Any], flags: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    name = described.get("device_name", "")
    blas = f"products by {described['blas']}" if "blas" in described else ""
    yield "device", ", ".join(filter(None, (device["kind"], name, blas)))
    if device["kind"] != "cpu":
        limits = device["mlx_limits"]
        yield (
            "memory",
            f"{_gib(device['memory'])}; MLX may hold {_gib(limits['memory'])}, "
            f"freed buffers {_gib(limits['cache'])}",
        )
        on_tensor_cores = device["tensor_cores"] and device["sums"] != "plain"
        yield "sums", device["sums"] + (", on tensor cores" if on_tensor_cores else "")
    yield "a clip", f"may take {_gib(device['default_max_memory'])} unless told otherwise"
    yield (
        "TF32",
        "ON: float32 features are about 1,500 times less exact" if flags["tf32"] else "off",
    )
    # importing this package sets the one for TF32, which has just been said
    variables = {k: v for k, v in flags["environment"].items() if k != "MLX_ENABLE_TF32"}
    if variables:
        yield "environment", ", ".join(f"{name}={value}" for name, value in variables.items())


def _outcome_lines(sums: str, outcome: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"{sums} sums", f"{'PASSED' if outcome['passed'] else 'FAILED'}: {outcome['reason']}"
    features = ", ".join(
        f"{name} {ratio['max_abs']:.2f} / {ratio['rms']:.2f}"
        for name, ratio in outcome["features"].items()
        if name.startswith("layer")
    )
    yield "", f"error over PyTorch's on the CPU, largest / rms: {features}"
    stage = outcome["worst_stage"]
    alone = "by itself" if stage["kind"] == "local" else "from the audio"
    yield (
        "",
        f"worst stage: {stage['name']} {alone}, "
        f"{stage['ratio']['max_abs']:.2f} / {stage['ratio']['rms']:.2f}",
    )
    times = ", ".join(
        f"{length} s in {1000 * wall:.1f} ms" for length, wall in outcome["seconds"].items()
    )
    yield "", f"speed: {times}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"
