#!/usr/bin/env python3
"""How much of the model's speed `extract` keeps, beside the loop that people write.

    scripts/bench_extract.py WEIGHTS [--clips N] [--shortest S] [--longest S] [--rate HZ]
                             [--threads N] [--rounds N] [--json FILE]
                             [--exported FOLDER] [--beside transformers,onnxruntime,openvino]

Makes N wav files of 16 bits (speech-like, lengths evenly from shortest to longest), and
times, each in a process of its own, in turns:

  model     ContentvecModel.extract_many over the decoded clips, which are in memory, in
            the batches of `extract`; after a first pass over the same clips
  extract   `mlx-contentvec extract` of the files, from a new process to its end; the part
            without the start is what its own summary says
  loops     each engine on the model in FOLDER (`mlx-contentvec export`), as people write
            it: one file after the other through soundfile.read, soxr.resample, the engine
            and numpy.save

Rates are seconds of audio a second; a ratio is the median of the ratios within a turn.
Without --threads each takes what it takes by itself. On CUDA TF32 is off for all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
ROOTS = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]
sys.path[:0] = ROOTS


def make_clips(folder: Path, arguments: argparse.Namespace) -> float:
    """Write the clips; returns their seconds."""
    import soundfile

    from contentvec_parity.inputs import speech_like

    folder.mkdir()
    lengths = np.linspace(arguments.shortest, arguments.longest, arguments.clips)
    order = np.random.default_rng(0).permutation(lengths)
    # made for 16 kHz: at another rate it is other speech of the same form
    speech = [speech_like(int(arguments.longest * arguments.rate), seed) for seed in range(20)]
    for index, seconds in enumerate(order):
        samples = speech[index % len(speech)][: int(seconds * arguments.rate)]
        soundfile.write(folder / f"{index:05}.wav", samples, arguments.rate, subtype="PCM_16")
    return float(lengths.sum())


def run_model(weights: str, clips: str) -> dict[str, float]:
    from mlx_contentvec.audio import read_audio
    from mlx_contentvec.model import ContentvecModel

    sources = [read_audio(path).waveform for path in sorted(Path(clips).iterdir())]
    model = ContentvecModel.from_file(weights)
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        for features in model.extract_many(sources, sample_rate=16000):
            np.asarray(features)
        taken.append(time.perf_counter() - start)
    return {"seconds": taken[1], "first": taken[0]}


def loop_of(
    engine: str,
    path: str | Path,
    weights: str | Path,
    threads: int | None = None,
    dtype: str = "float32",
) -> str:
    """A loop as JSON: ``Engine.work`` but for its device."""
    from contentvec_parity.bench.measure import Engine, Settings
    from contentvec_parity.compare.candidate import read_metadata
    from mlx_contentvec.config import ModelConfig

    config = ModelConfig.from_json(read_metadata(Path(weights))["config"])
    settings = Settings(threads=threads or os.cpu_count() or 1).on_clips_of(config)
    return json.dumps(Engine(engine, engine, Path(path), dtype).work(settings))


def run_loop(given: str, clips: str) -> dict[str, float]:
    import soundfile
    import soxr

    from contentvec_parity.bench import worker
    from mlx_contentvec.backend import device_kind

    work = {**json.loads(given), "device": "cpu" if device_kind() == "cpu" else "gpu"}
    run = worker.ENGINES[work["engine"]](work["path"], work)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        for clip in sorted(Path(clips).iterdir()):
            samples, rate = soundfile.read(clip, dtype="float32")
            samples = soxr.resample(samples, rate, 16000)
            np.save(Path(output) / f"{clip.stem}.npy", run(samples[None])[0])
    return {"seconds": time.perf_counter() - start}


def in_a_process(code: str, *given: str, environment: dict[str, str]) -> tuple[Any, float]:
    """What a new process prints as JSON, and the seconds from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, "-c", code, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(given)}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout), taken


OURS = "import sys, json, bench_extract as b; print(json.dumps(b.{}(*sys.argv[1:])))"
EXTRACT = "from mlx_contentvec.cli import main; main()"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--shortest", type=float, default=2.0, help="seconds")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds")
    parser.add_argument("--rate", type=int, default=44100, help="Hz")
    parser.add_argument("--threads", type=int, help="for all of them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--exported", type=Path, help="the model for the loops")
    parser.add_argument("--beside", default="transformers", help="engines for the loops")
    parser.add_argument("--dtype", default="float32", help="of transformers on a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from contentvec_parity.bench.onnx_file import write_onnx
    from contentvec_parity.machine import describe, versions

    environment = {**os.environ, "MLX_ENABLE_TF32": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(PROJECT / "scripts"), *ROOTS, os.environ.get("PYTHONPATH", "")]
    )
    if arguments.threads:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(arguments.threads)
    weights = str(arguments.weights.resolve())
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        clips, output = Path(scratch) / "clips", Path(scratch) / "features"
        audio = make_clips(clips, arguments)

        def model() -> None:
            said, _ = in_a_process(
                OURS.format("run_model"), weights, str(clips), environment=environment
            )
            found.setdefault("model", []).append(audio / said["seconds"])
            found.setdefault("model, first pass", []).append(audio / said["first"])

        def extract() -> None:
            shutil.rmtree(output, ignore_errors=True)
            given = ("extract", str(clips), "-w", weights, "-o", str(output), "--json")
            said, taken = in_a_process(EXTRACT, *given, environment=environment)
            found.setdefault("extract", []).append(audio / said["wall_seconds"])
            found.setdefault("extract, start included", []).append(audio / taken)

        def loop(engine: str, path: Path) -> None:
            given = loop_of(engine, path, weights, arguments.threads, arguments.dtype)
            said, taken = in_a_process(
                OURS.format("run_loop"), given, str(clips), environment=environment
            )
            found.setdefault(engine, []).append(audio / said["seconds"])
            found.setdefault(f"{engine}, start included", []).append(audio / taken)

        turns: list[Callable[[], None]] = [model, extract]
        for engine in arguments.beside.split(",") if arguments.exported else ():
            path = arguments.exported.resolve()
            if engine in ("onnxruntime", "openvino"):
                path = Path(scratch) / "model.onnx"
                if not path.exists():
                    write_onnx(arguments.exported, path)
            turns.append(partial(loop, engine, path))
        for _ in range(arguments.rounds):
            for turn in turns:
                turn()
    print(f"{arguments.clips} clips, {audio:.0f} s of audio; seconds of audio a second")
    for name, rates in found.items():
        ratios = [rate / base for rate, base in zip(rates, found["model"], strict=True)]
        print(f"{name:26} {statistics.median(rates):8.1f}   {statistics.median(ratios):.2f} x")
    if arguments.json:
        document = {"machine": describe(), "versions": versions(), "audio": audio, "rates": found}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
