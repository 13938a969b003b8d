#!/usr/bin/env python
"""Let eight threads call one model for a minute, in every way, and compare every answer.

    scripts/prove_threads.py WEIGHTS [--seconds 60] [--threads 8]

WEIGHTS is whatever `ContentvecModel.from_pretrained` loads. The model is loaded in one thread;
each of the others has clips of its own, of other lengths than those of its neighbours, and
calls `extract`, the model itself, `extract_many`, both protocols of `rvc.Hubert` and a live
stream in turn. Each answer is compared with what one thread alone got before: to the bit on a
CPU, within float32 noise on a GPU. Printed: answers, differences, and memory before and after.
"""

from __future__ import annotations

import argparse
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]

from contentvec_parity.machine import describe  # noqa: E402
from mlx_contentvec import ContentvecModel  # noqa: E402
from mlx_contentvec.backend import device_kind, mx  # noqa: E402
from mlx_contentvec.rvc import Hubert  # noqa: E402

#: how far an answer of a GPU may be, which may sum in another order: float32 noise of twelve
#: layers on the stand-in
NOISE = 5e-5
RATE = 16000


def streamed(model: ContentvecModel, clip: np.ndarray) -> np.ndarray:
    stream = model.live(context=0.5, block=0.25)
    pieces = [stream.push(piece) for piece in np.array_split(clip, 7)]
    return np.concatenate([*pieces, stream.finish()])


CALLS: dict[str, Callable[[ContentvecModel, np.ndarray], Any]] = {
    "extract": lambda model, clip: model.extract(clip, sample_rate=RATE),
    "model()": lambda model, clip: model(clip[None], output_layer=9)["x"],
    "extract_many": lambda model, clip: next(
        iter(model.extract_many([clip, clip[::2]], sample_rate=RATE))
    ),
    "fairseq": lambda model, clip: Hubert(model).extract_features(clip[None], output_layer=9)[0],
    "transformers": lambda model, clip: Hubert(model)(clip[None])[0],
    "live": streamed,
}


def answer(model: ContentvecModel, call: str, clip: np.ndarray) -> np.ndarray:
    got = CALLS[call](model, clip)
    return np.array(got.astype(mx.float32) if isinstance(got, mx.array) else got)


def memory() -> float:
    """Peak memory of this process in GB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def prove(weights: Path, seconds: float, threads: int) -> bool:
    with ThreadPoolExecutor(1) as loader:
        model = loader.submit(ContentvecModel.from_pretrained, weights).result()
    rng = np.random.default_rng(0)
    clips = [
        (0.1 * rng.standard_normal(RATE // 2 + 1600 * i)).astype(np.float32) for i in range(threads)
    ]
    expected = {
        (call, i): answer(model, call, clip) for i, clip in enumerate(clips) for call in CALLS
    }
    before, end = memory(), time.monotonic() + seconds
    answers: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    lock, together = threading.Lock(), threading.Barrier(threads)

    def ask(i: int) -> None:
        together.wait()
        turn = i
        while time.monotonic() < end:
            call = list(CALLS)[turn % len(CALLS)]
            got = answer(model, call, clips[i])
            largest = float(np.abs(got - expected[call, i]).max())
            with lock:
                answers[call] += 1
                wrong[call] += not largest <= (0 if device_kind() == "cpu" else NOISE)
            turn += 1

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    for call in CALLS:
        print(f"{call:13} {answers[call]:6} answers, {wrong[call]} differ")
    print(
        f"{threads} threads, {seconds:g} s; "
        f"peak memory {before:.2f} GB before, {memory():.2f} after"
    )
    print("machine:", describe())
    return not wrong.total() and min(answers[call] for call in CALLS) > 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    sys.exit(0 if prove(arguments.weights, arguments.seconds, arguments.threads) else 1)


if __name__ == "__main__":
    main()
