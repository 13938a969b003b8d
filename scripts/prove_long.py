#!/usr/bin/env python
"""Extract ever longer clips, beside the originals, until they fail or the list ends.

    scripts/prove_long.py CHECKPOINT WEIGHTS [--lengths 10,60,300,1800] [--threads 2] [--memory 20]

CHECKPOINT is what fairseq loads, WEIGHTS what was converted from it. Four ways
take turns: `extract` as a user calls it (in pieces), the same model on the whole
clip, transformers and fairseq. Each pass is a process of its own that may use
so many GiB of address space; a way that failed at one length is not tried at the
next. Printed: time, peak memory above the loaded model, and how far each result
is from that of the whole clip in MLX.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]

from contentvec_convert.export import export  # noqa: E402
from contentvec_parity.bench.measure import TO_SETTLE, Engine, Settings, Worker  # noqa: E402
from contentvec_parity.machine import describe, versions  # noqa: E402
from mlx_contentvec.errors import ContentvecError  # noqa: E402

#: the most that `extract` may take above the loaded model, in bytes
MOST = 1.5e9
#: how far pieces may be from the whole: float32 noise of twelve layers on the stand-in
NOISE = 5e-5


def once(engine: Engine, settings: Settings, seconds: float, save: Path) -> dict[str, float]:
    worker = Worker(engine, settings)
    try:
        worker.run(TO_SETTLE)
        return worker.run(seconds, save=save, memory=True)
    finally:
        worker.close()


def prove(arguments: argparse.Namespace, folder: Path) -> bool:
    huggingface = export(arguments.weights, folder / "hf", to="transformers").path
    engines = [
        Engine("MLX, extract", "extract", arguments.weights),
        Engine("MLX, whole", "mlx", arguments.weights),
        Engine("transformers", "transformers", huggingface),
        Engine("fairseq", "fairseq", arguments.checkpoint),
    ]
    settings = Settings(threads=arguments.threads)
    failed: set[str] = set()
    sound = True
    rows = []
    for seconds in arguments.lengths:
        features = {}
        for engine in engines:
            if engine.label in failed:
                continue
            save = folder / f"{engine.kind}.npy"
            row = {"engine": engine.label, "seconds": seconds}
            rows.append(row)
            try:
                answer = once(engine, settings, seconds, save)
            except ContentvecError as error:
                failed.add(engine.label)
                row["failed"] = error.found
                print(f"{seconds:6g} s  {engine.label:13} {error.found}", flush=True)
                sound = sound and engine.kind != "extract"
                continue
            features[engine.kind] = np.load(save)[0]
            row.update(wall=answer["wall"], cpu=answer["cpu"], memory=answer["memory"])
            if engine.kind == "extract":
                sound = sound and (answer["memory"] or 0) < MOST
            print(
                f"{seconds:6g} s  {engine.label:13} {answer['wall']:8.1f} s"
                f"  {seconds / answer['wall']:6.1f} x real time"
                f"  {(answer['memory'] or 0) / 1e9:6.2f} GB",
                flush=True,
            )
        whole = features.pop("mlx", None)
        for kind, other in features.items() if whole is not None else ():
            difference = float(np.abs(other - whole).max())
            rows.append({"engine": kind, "seconds": seconds, "from_whole": difference})
            print(f"{seconds:6g} s  {kind} from MLX on the whole clip: {difference:.1e}")
            sound = sound and difference < NOISE
        if arguments.json:
            document = {"machine": describe(), "versions": versions(), "rows": rows}
            arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return sound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument(
        "--lengths",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[10, 60, 300, 1800],
        help="seconds of audio",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, default=20.0, help="GiB of address space")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    limit = int(arguments.memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        passed = prove(arguments, Path(folder))
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
