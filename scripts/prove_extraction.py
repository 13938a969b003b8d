#!/usr/bin/env python
"""Extract a folder of good and broken clips, stopping on the way, and hold it to the original.

    scripts/prove_extraction.py CHECKPOINT WEIGHTS [--clips 500] [--compare 500] [--keep FOLDER]

CHECKPOINT is what fairseq loads, WEIGHTS what was converted from it. Five of the
clips are broken: empty, 100 samples, text named .wav, NaN samples, a link to
nowhere. The first run is interrupted (Ctrl-C), the second killed, the third runs
to its end. Then every output is compared with what RVC's own lines get from
fairseq for the same decoded waveform, and batches of random mixes of the clips
with each clip alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROJECT = Path(__file__).resolve().parent.parent
ROOTS = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]
sys.path[:0] = ROOTS

import soundfile  # noqa: E402

from contentvec_parity.inputs import Clip, speech_like  # noqa: E402
from contentvec_parity.references.fairseq import open as open_fairseq  # noqa: E402
from mlx_contentvec.audio import read_audio  # noqa: E402
from mlx_contentvec.model import ContentvecModel  # noqa: E402

BROKEN = ("empty", "short", "text", "nan", "unreadable")
#: how many times the original's own error is still noise
NOISE = 3.0
#: clips of a random mix, and seconds of audio in one batch of it
MIX, BATCH_SECONDS = 24, 12.0


def make_clips(folder: Path, count: int) -> None:
    """``count`` clips of half a second to a second and a half, the broken ones among them."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count - len(BROKEN)):
        samples = speech_like(int(rng.uniform(0.5, 1.5) * 16000), i)
        soundfile.write(folder / f"{i:03}.wav", samples, 16000)
    (folder / "empty.wav").touch()
    soundfile.write(folder / "short.wav", np.zeros(100), 16000)
    (folder / "text.wav").write_text("not audio at all\n")
    silence = np.zeros(16000, np.float32)
    silence[8000] = np.nan
    soundfile.write(folder / "nan.wav", silence, 16000, subtype="FLOAT")
    (folder / "unreadable.wav").symlink_to(folder / "nowhere.wav")


def extraction(clips: Path, output: Path, weights: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = ["extract", clips, "-o", output, "-w", weights, "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_contentvec", *map(str, command)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def stop_after(
    count: int, how: signal.Signals, process: subprocess.Popen[str], out: Path
) -> tuple[int, int]:
    """Send a signal once ``count`` outputs are there; the exit status and the outputs then."""
    while process.poll() is None and len(list(out.glob("*.npy"))) < count:
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate()
    kept = sorted(out.glob("*.npy"))
    for path in kept:
        np.load(path, allow_pickle=False)  # a torn file would raise
    print(f"{how.name}: exit status {process.returncode}, {len(kept)} whole outputs", flush=True)
    return process.returncode, len(kept)


@dataclass(frozen=True)
class Worst:
    """The output that is farthest from fairseq's, and who is how far from float64 there."""

    clip: str
    from_fairseq: float
    ours: float
    fairseqs: float


def compare(clips: Path, output: Path, checkpoint: Path, count: int) -> Worst:
    """``count`` outputs beside what fairseq gives, asked as RVC asks it."""
    import torch

    original = open_fairseq(checkpoint)
    differences = {}
    for path in sorted(output.glob("*.npy"))[:count]:
        source = torch.from_numpy(read_audio(clips / f"{path.stem}.wav").waveform).view(1, -1)
        mask = torch.BoolTensor(source.shape).fill_(False)
        with torch.no_grad():
            features, _ = original._model.extract_features(
                source=source, padding_mask=mask, output_layer=12
            )
        differences[path] = (np.load(path) - features[0].numpy(), features[0].numpy())
    path = max(differences, key=lambda path: np.abs(differences[path][0]).max())
    waveform = read_audio(clips / f"{path.stem}.wav").waveform
    truth = original.truth(Clip(path.stem, waveform[None], "the worst"))["layer.12"][0]
    difference, features = differences[path]
    return Worst(
        path.stem,
        float(np.abs(difference).max()),
        float(np.abs(np.load(path) - truth).max()),
        float(np.abs(features - truth).max()),
    )


def mixed(clips: Path, output: Path, weights: Path, mixes: int) -> float:
    """The worst difference of a clip in a padded batch from the clip alone."""
    rng = np.random.default_rng(1)
    model = ContentvecModel.from_file(weights)
    paths = sorted(output.glob("*.npy"))
    worst = 0.0
    for _ in range(mixes):
        chosen = [paths[i] for i in rng.choice(len(paths), min(MIX, len(paths)), replace=False)]
        heard = [read_audio(clips / f"{path.stem}.wav") for path in chosen]
        batched = model.extract_many(heard, batch_seconds=BATCH_SECONDS)
        for path, features in zip(chosen, batched, strict=True):
            worst = max(worst, float(np.abs(features - np.load(path)).max()))
    return worst


def prove(arguments: argparse.Namespace, folder: Path) -> bool:
    """Everything in ``folder``; print what was found, and whether it is right."""
    clips, output, weights = folder / "clips", folder / "features", arguments.weights
    make_clips(clips, arguments.clips)
    good = arguments.clips - len(BROKEN)
    first = extraction(clips, output, weights)
    interrupted, _ = stop_after(good // 4, signal.SIGINT, first, output)
    second = extraction(clips, output, weights)
    killed, kept = stop_after(good // 2, signal.SIGKILL, second, output)
    last = extraction(clips, output, weights)
    summary = json.loads(last.communicate()[0])
    named = sorted(Path(failure["source"]).stem for failure in summary["failed"])
    print(
        f"to the end: exit status {last.returncode}, {summary['skipped']} skipped, "
        f"{summary['extracted']} extracted, {summary['audio_seconds']:.0f} s of audio in "
        f"{summary['wall_seconds']:.0f} s"
    )
    for failure in summary["failed"]:
        print(f"  {Path(failure['source']).name}: {failure['reason']}")
    worst = compare(clips, output, arguments.checkpoint, arguments.compare)
    print(
        f"worst difference from fairseq: {worst.from_fairseq:.2e}, clip {worst.clip}; there "
        f"MLX is {worst.ours:.2e} and fairseq {worst.fairseqs:.2e} from float64",
        flush=True,
    )
    in_batches = mixed(clips, output, weights, arguments.mixes)
    print(f"worst difference of a clip in a batch from the clip alone: {in_batches:.2e}")
    return (
        (interrupted, killed, last.returncode) == (130, -signal.SIGKILL, 1)
        and kept < good
        and named == sorted(BROKEN)
        and summary["skipped"] == kept
        and summary["skipped"] + summary["extracted"] == good
        and worst.ours < NOISE * worst.fairseqs
        and in_batches < NOISE * worst.from_fairseq
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--clips", type=int, default=500, help="good and broken ones")
    parser.add_argument("--compare", type=int, default=500, help="with fairseq, at most")
    parser.add_argument("--mixes", type=int, default=4, help="random batches")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave the files there")
    arguments = parser.parse_args()
    # a shell that starts this in the background has it, and its children, ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        passed = prove(arguments, arguments.keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            passed = prove(arguments, Path(folder))
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
