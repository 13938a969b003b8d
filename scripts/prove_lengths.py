#!/usr/bin/env python
"""Features of many clips of as many lengths, in every number format, beside PyTorch's.

    scripts/prove_lengths.py WEIGHTS [--clips 600] [--shortest 2] [--longest 30] [--max-memory GIB]

WEIGHTS is a converted file of float32. Every clip's features come from
`ContentvecModel.extract_many`, alone and in batches as `extract` makes them; each is held
to transformers' in float32 on the same device, TF32 off. In half precision a clip is right
if it is no more than twice as far from those as transformers' own features in that format.
Printed for each format: how many clips are right, the worst and the median signal-to-noise
ratio, the time, and the most that MLX held of the device, live arrays and kept buffers
together.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]

from contentvec_convert.export import export  # noqa: E402
from contentvec_parity.machine import describe, versions  # noqa: E402
from mlx_contentvec.backend import device_kind, mx  # noqa: E402
from mlx_contentvec.errors import ContentvecError  # noqa: E402
from mlx_contentvec.memory import limit_of  # noqa: E402
from mlx_contentvec.model import ContentvecModel  # noqa: E402

#: decibels that tell a right clip from a wrong one in float32, which has two errors here; the
#: stand-in enlarges each more than real weights do
LEAST = 85.0
#: decibels that MLX may fall behind PyTorch's own half precision: twice the error
BEHIND = 6.0
DTYPES = ("float32", "float16", "bfloat16")
#: bytes that may be live beside the model when a clip begins, its limit counting from there:
#: the features of the batch before
FEATURES = 8 << 20
BATCH_SECONDS = {"alone": 0.0, "batches": None}


class Watch(threading.Thread):
    """The most that MLX holds, live and kept, looked at every millisecond.

    The two numbers are read one after the other: what is let go or taken again in between
    counts twice, and may even look the same a moment later. So many looks must agree.
    """

    LOOKS = 8

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.001):
            looks = {(mx.get_active_memory(), mx.get_cache_memory()) for _ in range(self.LOOKS)}
            if len(looks) == 1:
                self.most = max(self.most, sum(looks.pop()))


def clips(arguments: argparse.Namespace) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    lengths = np.linspace(arguments.shortest * 16000, arguments.longest * 16000, arguments.clips)
    made = []
    for length in random.permutation(lengths.astype(int)):
        times = np.arange(length) / 16000
        pitch = 2 * np.pi * np.cumsum(random.uniform(80, 300) * (1 + 0.2 * np.sin(3 * times)))
        tone = sum(np.sin(k * pitch / 16000) / k for k in range(1, 8))
        loudness = 0.1 * (1 + np.sin(2 * np.pi * random.uniform(0.5, 3) * times))
        noise = 0.02 * random.standard_normal(length)
        made.append((loudness * tone + noise).astype(np.float32))
    return made


def references(
    weights: Path, sources: list[np.ndarray], layer: int
) -> tuple[list[np.ndarray], dict[str, list[float]]]:
    """Features in float32, and for each format the decibels that a right clip has at least."""
    import torch
    from transformers import HubertModel

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = export(weights, Path(folder) / "hf", to="transformers").path
        model = HubertModel.from_pretrained(path).eval().to(device)

    def features(model: Any, source: np.ndarray, dtype: str) -> np.ndarray:
        given = torch.from_numpy(source)[None].to(device, getattr(torch, dtype))
        states = model(given, output_hidden_states=True).hidden_states
        found: np.ndarray = states[layer][0].float().cpu().numpy()
        return found

    with torch.no_grad():
        exact = [features(model, source, "float32") for source in sources]
        least = {"float32": [LEAST] * len(sources)}
        for dtype in DTYPES[1:]:
            # a copy: what was rounded once would be rounded again for the next format
            rounded = copy.deepcopy(model).to(getattr(torch, dtype))
            own = [
                decibels(features(rounded, source, dtype), known)
                for source, known in zip(sources, exact, strict=True)
            ]
            least[dtype] = [value - BEHIND for value in own]
    return exact, least


def decibels(features: np.ndarray, reference: np.ndarray) -> float:
    noise = float(((features - reference).astype(np.float64) ** 2).sum())
    signal = float((reference.astype(np.float64) ** 2).sum())
    return 10 * math.log10(signal / max(noise, 1e-30))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--clips", type=int, default=600)
    parser.add_argument("--shortest", type=float, default=2.0, help="seconds")
    parser.add_argument("--longest", type=float, default=30.0, help="seconds")
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--max-memory", type=float, help="GiB; by default what extract takes")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    cap = None if arguments.max_memory is None else int(arguments.max_memory * 2**30)
    sources = clips(arguments)
    expected, least = references(arguments.weights, sources, arguments.layer)
    rows, sound = [], True
    for dtype in DTYPES:
        for way, batch_seconds in BATCH_SECONDS.items():
            model = ContentvecModel.from_file(arguments.weights)
            model.set_dtype(getattr(mx, dtype))
            mx.eval(model.parameters())
            mx.clear_cache()
            held = mx.get_active_memory()
            watch = Watch()
            watch.start()
            start = time.perf_counter()
            row = {"dtype": dtype, "way": way, "clips": len(sources)}
            kept: list[float] = []
            found: Iterator[np.ndarray] = iter(())
            try:
                found = model.extract_many(
                    sources,
                    sample_rate=16000,
                    layer=arguments.layer,
                    batch_seconds=batch_seconds,
                    max_memory=cap,
                )
                for features, reference in zip(found, expected, strict=True):
                    if features.shape == reference.shape:
                        kept.append(decibels(features, reference))
            except ContentvecError as error:
                row["failed"] = str(error)
                print(error, file=sys.stderr)
            row["seconds"] = time.perf_counter() - start
            watch.done.set()
            watch.join()
            kept = kept or [-np.inf]
            row.update(
                right=sum(value >= few for value, few in zip(kept, least[dtype], strict=False)),
                worst_db=min(kept),
                median_db=float(np.median(kept)),
                most=watch.most,
                model=held,
                cap=limit_of(cap),
            )
            rows.append(row)
            del model, found
            gc.collect()
            # a CPU keeps no buffers, and a copy of half precision's weights in float32
            fits = device_kind() == "cpu" or watch.most <= held + limit_of(cap) + FEATURES
            sound = sound and row["right"] == len(sources) and fits
            print(
                f"{dtype:9} {way:8} {row['right']:4} of {len(sources)} right   worst "
                f"{row['worst_db']:5.1f} dB, median {row['median_db']:5.1f} dB   "
                f"{row['seconds']:6.1f} s   {watch.most / 2**30:.2f} GiB held, "
                f"model {held / 2**30:.2f}, cap {limit_of(cap) / 2**30:.2f}",
                flush=True,
            )
    if arguments.json:
        document = {"machine": describe(), "versions": versions(), "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    print("passed" if sound else "FAILED")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
