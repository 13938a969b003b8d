"""How fast, how big and how exact: MLX beside the originals and beside what the machine allows.

Every implementation runs in a process of its own, with the same number of
threads; they take turns, so that a machine that is busy for a while is busy for
all of them. Ratios are medians of the ratios within a turn. CPU time stands
beside wall time: it is what remains comparable where something else runs too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import numpy as np

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import MissingDependency, ParityError, install_hint, name_list

from ..compare.candidate import read_metadata
from .worker import PRODUCT, PRODUCTS

SCHEMA = "mlx-contentvec-bench/1"

#: what the others are measured against, where transformers does not run in their own dtype;
#: where it does not run at all, the first of the implementations that are not MLX's
YARDSTICK = "transformers float32"

ORIGINALS = ("transformers", "fairseq")
#: what runs the exported transformers model besides, by name: the packages that it needs
ENGINES = {
    "onnxruntime": ("torch", "transformers", "onnx", "onnxruntime"),
    "openvino": ("torch", "transformers", "onnx", "openvino"),
    "torch-compile": ("torch", "transformers"),
}
#: rms of the difference between an engine's features and MLX's, by their own rms, from
#: which it is not computing in float32: float16 weights give 2.5e-4, float32 1e-5
MOST_APART = 1e-4

#: seconds of audio on which errors against float64 are taken
ERROR_SECONDS = 3.0

#: seconds of audio after which an implementation has all its weights in memory
TO_SETTLE = 0.1

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Engine:
    """One implementation with one set of weights."""

    #: what tables call it
    label: str
    #: a key of ``bench_worker.ENGINES``
    kind: str
    path: Path
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """Bytes of weights on disk."""
        files = [self.path] if self.path.is_file() else list(self.path.iterdir())
        return sum(file.stat().st_size for file in files)

    def work(self, settings: Settings) -> dict[str, Any]:
        """What ``bench.worker`` is told."""
        return {
            "engine": self.kind,
            "path": str(self.path),
            "dtype": self.dtype,
            "threads": settings.threads,
            "device": settings.device,
            "normalize_eps": settings.normalize_eps,
        }


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    #: seconds of audio in a clip
    lengths: tuple[float, ...] = (1.0, 5.0, 10.0, 30.0)
    #: clips in a batch
    batches: tuple[int, ...] = (1,)
    threads: int = 1
    #: turns of each steady measurement
    repeats: int = 5
    #: processes started from nothing, per engine
    starts: int = 3
    #: "cpu", or "gpu" for what MLX and torch find
    device: str = "cpu"
    #: what is added to the variance of a clip, None where it is not normalised
    normalize_eps: float | None = None
    #: measure only blocks of ``model.live``, and the others on a window of its length
    live: bool = False

    def on_clips_of(self, config: ModelConfig) -> Settings:
        """The same, with clips normalised as a model wants them."""
        eps = config.normalize_eps if config.normalize else None
        return dataclasses.replace(self, normalize_eps=eps)


def operations(config: ModelConfig, samples: int, batch: int) -> int:
    """Floating point operations of the matrix products in one forward pass.

    Convolutions and attention count as the products they are; a multiplication
    and an addition are two. Norms, activations and softmax are not counted.
    """
    total = 0
    channels_in, length = 1, samples
    for channels, kernel, stride in config.conv_layers:
        length = (length - kernel) // stride + 1
        total += length * kernel * channels_in * channels
        channels_in = channels
    width = config.encoder_embed_dim
    total += length * channels_in * width
    total += length * config.conv_pos * width * (width // config.conv_pos_groups)
    layer = length * width * (4 * width + 2 * config.encoder_ffn_embed_dim + 2 * length)
    total += (config.encoder_layers + config.encoder_layers_1) * layer
    return 2 * total * batch


class Worker:
    """A running ``bench_worker``."""

    def __init__(
        self, engine: Engine, settings: Settings, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start it, with ``variables`` added to its environment."""
        threads = str(settings.threads)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path),
            "MLX_ENABLE_TF32": "0",
            "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
            **dict.fromkeys(
                (
                    "OMP_NUM_THREADS",
                    "OPENBLAS_NUM_THREADS",
                    "MKL_NUM_THREADS",
                    "VECLIB_MAXIMUM_THREADS",
                ),
                threads,
            ),
            **(variables or {}),
        }
        work = json.dumps(engine.work(settings))
        self.engine = engine
        self._complaints: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._began = time.perf_counter()
        self._process: Any = subprocess.Popen(
            [sys.executable, "-m", "contentvec_parity.bench.worker", work],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment,
            text=True,
        )
        self.loaded = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._complaints.seek(0)
            said = self._complaints.read().strip().splitlines()
            self._complaints.close()
            raise ParityError(
                f"{self.engine.label} cannot be measured",
                found=said[-1] if said else f"exit status {self._process.returncode}",
            )
        answer: dict[str, Any] = json.loads(line)
        answer["since_start"] = time.perf_counter() - self._began
        return answer

    def run(
        self,
        seconds: float,
        batch: int = 1,
        *,
        save: Path | None = None,
        twice: bool = False,
        memory: bool = False,
    ) -> dict[str, Any]:
        """One forward pass: wall and CPU seconds, and the memory it took above the model's.

        twice: of two in a row the second; another process may have had the GPU before the first
        memory: count memory, for which a process on a CPU first gives back what it keeps
            for the next pass: ``measure`` does not time such a pass
        """
        request = {
            "seconds": seconds,
            "batch": batch,
            "save": save and str(save),
            "twice": twice,
            "memory": memory,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> float:
        """End the process: the CPU seconds it took in all."""
        if self._process.returncode is not None:
            return 0.0  # it had failed, which has been said
        self._process.stdin.close()
        self._process.stdout.close()
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._complaints.close()
        return usage.ru_utime + usage.ru_stime


def measure(
    engines: Sequence[Engine], settings: Settings, config: ModelConfig, progress: Progress
) -> dict[str, Any]:
    """Every figure but the errors: starts from nothing, memory, and the steady state."""
    cold = [] if settings.live else _starts(engines, settings, progress)
    apart = settings.device == "cpu" and not settings.live
    memory = _memory(engines, settings, progress) if apart else []
    steady, warm = _steady(engines, settings, config, progress, with_memory=not apart)
    return {"cold": cold, "memory": memory or warm, "steady": steady}


def _turns(engines: Sequence[Engine], turn: int) -> Sequence[Engine]:
    """The engines in an order that moves by one each turn."""
    start = turn % len(engines)
    return [*engines[start:], *engines[:start]]


def _starts(
    engines: Sequence[Engine], settings: Settings, progress: Progress
) -> list[dict[str, Any]]:
    """Processes that load the weights and return the features of one second of audio."""
    found: dict[str, list[dict[str, float]]] = {engine.label: [] for engine in engines}
    for turn in range(settings.starts):
        for engine in _turns(engines, turn):
            progress(f"starting {engine.label}, {turn + 1} of {settings.starts}")
            worker = Worker(engine, settings)
            first = worker.run(1.0)
            found[engine.label].append(
                {
                    "loaded": worker.loaded["since_start"],
                    "first_features": first["since_start"],
                    "cpu": worker.close(),
                    "peak": first["process_peak"],
                }
            )
    rows = []
    for engine in engines:
        samples = found[engine.label]
        row: dict[str, Any] = {"engine": engine.label, "size": engine.size, "samples": samples}
        for key in ("loaded", "first_features", "cpu", "peak"):
            row[key] = statistics.median(sample[key] for sample in samples)
        for key in ("first_features", "cpu"):
            row[f"{key}_ratio"] = _ratio(samples, _yardstick(engine, engines, found), key)
        rows.append(row)
    return rows


def _memory(
    engines: Sequence[Engine], settings: Settings, progress: Progress
) -> list[dict[str, Any]]:
    """What one forward pass takes above the loaded model, each in a fresh process.

    A process keeps what it took once; on a GPU each pass is counted by itself,
    and the steady passes tell.
    """
    rows = []
    for seconds in settings.lengths:
        for batch in settings.batches:
            for engine in engines:
                if engine.kind == "floor":
                    continue
                progress(f"memory of {engine.label}, {batch} x {seconds:g} s")
                worker = Worker(engine, settings)
                worker.run(TO_SETTLE)
                answer = worker.run(seconds, batch, memory=True)
                worker.close()
                rows.append(_memory_row(engine, seconds, batch, answer))
    return rows


def _memory_row(
    engine: Engine, seconds: float, batch: int, answer: dict[str, Any]
) -> dict[str, Any]:
    return {
        "engine": engine.label,
        "seconds": seconds,
        "batch": batch,
        "above_the_model": answer["memory"],
        "peak": answer["process_peak"],
    }


def _steady(
    engines: Sequence[Engine],
    settings: Settings,
    config: ModelConfig,
    progress: Progress,
    with_memory: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Times once warm, and if asked the memory of one more pass of each."""
    rows, memory = [], []
    twice = settings.device == "gpu"
    with contextlib.ExitStack() as stack:
        workers = {}
        for engine in engines:
            progress(f"loading {engine.label}")
            workers[engine.label] = worker = Worker(engine, settings)
            stack.callback(worker.close)
        for seconds in settings.lengths:
            for batch in settings.batches:
                found: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
                for turn in range(-1, settings.repeats):
                    for engine in _turns(engines, turn):
                        done = f"{turn + 1} of {settings.repeats}"
                        progress(f"{engine.label}, {batch} x {seconds:g} s, {done}")
                        answer = workers[engine.label].run(seconds, batch, twice=twice)
                        if engine.kind == "floor":
                            answer = _floor(answer, config, seconds, batch, settings.device)
                        if turn >= 0:  # the first is to warm up
                            found[engine.label].append(
                                {key: answer[key] for key in ("wall", "cpu")}
                            )
                for engine in engines:
                    if with_memory and engine.kind != "floor":
                        answer = workers[engine.label].run(seconds, batch, memory=True)
                        memory.append(_memory_row(engine, seconds, batch, answer))
                    samples = found[engine.label]
                    row: dict[str, Any] = {
                        "engine": engine.label,
                        "seconds": seconds,
                        "batch": batch,
                        "samples": samples,
                    }
                    for key in ("wall", "cpu"):
                        row[key] = statistics.median(sample[key] for sample in samples)
                        row[f"{key}_ratio"] = _ratio(
                            samples, _yardstick(engine, engines, found), key
                        )
                    rows.append(row)
    return rows, memory


def _floor(
    answer: dict[str, Any], config: ModelConfig, seconds: float, batch: int, device: str
) -> dict[str, Any]:
    """The time a forward pass would take at the speed of one large product, and nothing else."""
    rows, inner, columns = PRODUCT
    scale = operations(config, round(seconds * config.sample_rate), batch) / (
        2 * rows * inner * columns * PRODUCTS[device]
    )
    return {key: answer[key] * scale for key in ("wall", "cpu")}


def yardstick(engines: Sequence[Engine]) -> str:
    """The label of what the others are measured against; ``YARDSTICK`` unless it does not run."""
    labels = [e.label for e in engines if e.kind in (*ORIGINALS, *ENGINES)]
    return YARDSTICK if YARDSTICK in labels or not labels else labels[0]


def _yardstick(
    engine: Engine, engines: Sequence[Engine], found: dict[str, list[dict[str, float]]]
) -> list[dict[str, float]] | None:
    """What transformers took with numbers of the same dtype, else what the yardstick took."""
    return found.get(f"transformers {engine.dtype}", found.get(yardstick(engines)))


def _ratio(
    samples: Sequence[dict[str, float]], yardstick: Sequence[dict[str, float]] | None, key: str
) -> float | None:
    """The median over the turns of this engine's figure by the yardstick's in the same turn."""
    if yardstick is None:
        return None
    return statistics.median(
        ours[key] / theirs[key] for ours, theirs in zip(samples, yardstick, strict=True)
    )


def errors(
    engines: Sequence[Engine], settings: Settings, checkpoint: Path, progress: Progress
) -> list[dict[str, Any]]:
    """How far each engine's features are from true float64, on three seconds of audio."""
    from ..inputs import SAMPLE_RATE, Clip, speech_like
    from ..references import choose, open_reference

    samples = round(ERROR_SECONDS * SAMPLE_RATE)
    progress("computing the truth in float64")
    clip = Clip("3s", speech_like(samples, 7)[None], "three seconds, speech-like")
    stages = open_reference(choose(checkpoint), checkpoint).truth(clip)
    last = [stage for stage in stages if stage != "final_proj"][-1]
    truth = stages[last]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines:
            if engine.kind == "floor":
                continue
            progress(f"errors of {engine.label}")
            worker = Worker(engine, settings)
            worker.run(ERROR_SECONDS, save=Path(folder) / "features.npy")
            worker.close()
            difference = np.load(Path(folder) / "features.npy").astype(np.float64) - truth
            rows.append(
                {
                    "engine": engine.label,
                    "stage": last,
                    "max": float(np.abs(difference).max()),
                    "rms": float(np.sqrt(np.mean(difference**2))),
                }
            )
    return rows


def require_same_features(
    engines: Sequence[Engine], settings: Settings, progress: Progress
) -> None:
    """Raise ParityError if one of ``ENGINES`` has other features than the first MLX file."""
    checked = [engine for engine in engines if engine.kind in ENGINES]
    if not checked:
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features.npy"
        for engine in (engines[0], *checked):
            progress(f"features of {engine.label}")
            kind = "mlx" if engine.kind == "live" else engine.kind
            worker = Worker(dataclasses.replace(engine, kind=kind), settings)
            worker.run(ERROR_SECONDS, save=file)
            worker.close()
            found.append(np.load(file).astype(np.float64))
    ours, *theirs = found
    for engine, features in zip(checked, theirs, strict=True):
        apart = np.inf
        if features.shape == ours.shape:
            apart = float(np.sqrt(np.mean((features - ours) ** 2) / np.mean(ours**2)))
        if not apart <= MOST_APART:
            raise ParityError(
                f"{engine.label} does not compute the features that MLX does",
                found=f"shape {features.shape}, relative rms difference {apart:.2g}",
                expected=f"shape {ours.shape}, at most {MOST_APART:g}",
                hint="another precision than float32, or a fault of the engine or of the export; "
                f"leave {engine.kind} out of --beside",
            )


def bench(
    checkpoint: Path,
    converted: Sequence[Path],
    settings: Settings,
    *,
    beside: Sequence[str] = ORIGINALS,
    torch_dtypes: Sequence[str] = ("float32",),
    with_errors: bool = True,
    progress: Progress = lambda doing: None,
) -> dict[str, Any]:
    """Measure ``converted`` files beside the original at ``checkpoint``, and report.

    checkpoint:   a fairseq checkpoint, or a Hugging Face folder
    converted:    what was converted from it; the first must be float32
    beside:       which of ``ORIGINALS`` and ``ENGINES`` to run; an original that is not
                  installed is left out
    torch_dtypes: dtypes in which transformers runs

    Raises ParityError if an implementation cannot be run, or one of ``ENGINES`` does not
    compute MLX's features; MissingDependency if it is not installed.
    """
    from contentvec_convert.export import export

    from .. import machine
    from .onnx_file import write_onnx

    _require_installed(beside)
    config = ModelConfig.from_json(read_metadata(converted[0])["config"])
    settings = settings.on_clips_of(config)
    if settings.live:
        from mlx_contentvec.live import BLOCK, CONTEXT, Window

        seconds = Window.of(config, CONTEXT, BLOCK).samples / config.sample_rate
        settings = dataclasses.replace(settings, lengths=(seconds,), batches=(1,))
    _require_possible(settings, config)
    with tempfile.TemporaryDirectory() as folder:
        huggingface = checkpoint
        if checkpoint.is_file() and set(beside) - {"fairseq"}:
            progress("writing the weights for transformers")
            huggingface = export(converted[0], Path(folder) / "hf", to="transformers").path
        onnx = Path(folder) / "model.onnx"
        if "onnxruntime" in beside or "openvino" in beside:
            progress("exporting to ONNX")
            write_onnx(huggingface, onnx)
        engines = _engines(checkpoint, huggingface, onnx, converted, beside, torch_dtypes)
        if settings.live:
            engines = [
                dataclasses.replace(engine, kind="live") if engine.kind == "mlx" else engine
                for engine in engines
            ]
        require_same_features(engines, settings, progress)
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.describe(),
            "versions": machine.versions(*(name for name in ENGINES if name in beside)),
            "settings": dataclasses.asdict(settings),
            "load_average": os.getloadavg()[0],
            "yardstick": yardstick(engines),
            "engines": [
                {"label": engine.label, "kind": engine.kind, "size": engine.size}
                for engine in engines
            ],
            "operations": {
                f"{seconds:g}": operations(config, round(seconds * config.sample_rate), 1)
                for seconds in settings.lengths
            },
            "stand_in": json.loads(read_metadata(converted[0])["source"]).get("stand_in", False),
            **measure(engines, settings, config, progress),
        }
        wanted = with_errors and not settings.live
        document["errors"] = errors(engines, settings, checkpoint, progress) if wanted else []
    return document


def _require_possible(settings: Settings, config: ModelConfig) -> None:
    """Raise ParityError for threads, a length or a batch that no implementation could take."""
    from mlx_contentvec.memory import process_memory, whole_clip_bytes

    cores = os.cpu_count() or 1
    if settings.threads > cores:
        raise ParityError(
            "there are more threads than this machine runs at once",
            found=f"--threads {settings.threads}",
            expected=f"at most {cores}",
        )
    available = process_memory() or sys.maxsize
    for seconds in settings.lengths:
        # beyond a million years it need not be exact
        samples = round(min(seconds, 1e15) * config.sample_rate)
        if samples < config.receptive_field:
            raise ParityError(
                f"a clip of {seconds:g} s is too short to give one frame",
                found=f"{samples:,} samples",
                expected=f"{config.receptive_field} or more at {config.sample_rate} Hz",
                hint="give longer ones with --lengths",
            )
        for batch in settings.batches:
            needed = 4 * samples * batch
            if needed <= available:  # else it is more than floating-point arithmetic may hold
                needed = whole_clip_bytes(config, samples, batch)
            if needed > available:
                raise ParityError(
                    f"{batch:,} x {seconds:g} s do not fit into memory at once",
                    found=f"{needed // 2**30:,} GiB or more",
                    expected=f"at most {available // 2**30:,} GiB, which is all that there is",
                    hint="give less with --lengths and --batches",
                )


def _require_installed(beside: Sequence[str]) -> None:
    for name in beside:
        missing = [p for p in ENGINES.get(name, ()) if importlib.util.find_spec(p) is None]
        if missing:
            raise MissingDependency(
                f"{name} cannot be measured: {name_list(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed",
                hint=install_hint("engines"),
            )


def _engines(
    checkpoint: Path,
    huggingface: Path,
    onnx: Path,
    converted: Sequence[Path],
    beside: Sequence[str],
    torch_dtypes: Sequence[str],
) -> list[Engine]:
    from ..references import available

    engines: list[Engine] = []
    for path in converted:
        dtype = read_metadata(path).get("dtype", "float32")
        label = f"MLX {dtype}"
        if any(engine.label == label for engine in engines):
            label = f"{label} ({path.name})"
        engines.append(Engine(label, "mlx", path, dtype))
    if "transformers" in beside and available("transformers"):
        engines += [
            Engine(f"transformers {dtype}", "transformers", huggingface, dtype)
            for dtype in torch_dtypes
        ]
    if "fairseq" in beside and checkpoint.is_file() and available("fairseq"):
        engines.append(Engine("fairseq float32", "fairseq", checkpoint))
    engines += [
        Engine(f"{name} float32", name, huggingface if name == "torch-compile" else onnx)
        for name in ENGINES
        if name in beside
    ]
    engines.append(Engine("floor", "floor", converted[0]))
    return engines
