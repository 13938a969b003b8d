#!/usr/bin/env python3
"""Two commands at once on one target, killed at random moments: what is there afterwards?

    scripts/prove_concurrency.py [convert] [extract] [package] [-n 100] [--seed 0] [--json FILE]

In each of the trials two processes run the same command on one target, with other
weights each. Most of them are killed (SIGKILL) after a random part of the time that
the command takes; half of the trials begin with a result that is there already.
Afterwards the target must be one whole result with its own ledger or manifest, or
what was there before. At the end of each trial the command runs once more: it must
succeed, and leave nothing else behind.

Everything is done with stand-ins of 1.5 MB (needs torch and transformers). The
processes are forked from one that has imported everything, so that a kill meets the
command at work and not at its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
ROOTS = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]
sys.path[:0] = ROOTS
os.environ["PYTHONPATH"] = os.pathsep.join(ROOTS)
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

#: imported once, by the process that the others are forked from
PRELOADED = [
    "mlx_contentvec.cli",
    "mlx_contentvec.model",
    "mlx_contentvec.extract.command",
    "contentvec_convert.commands.convert",
    "contentvec_parity.commands.publish",
    "contentvec_parity.publishing.package",
    "contentvec_parity.references.recording",
    "jinja2",
    "yaml",
]
#: the part of the processes that are killed
KILLED = 0.75
NAMES = ("one", "other")

Listing = dict[str, str]


def command(arguments: list[str], go: Path) -> None:
    """In a process of its own: run a command, silently, once the file ``go`` is there."""
    from mlx_contentvec.cli import main

    if arguments[0] == "package":
        _draw_nothing()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    # no lock that a process which is killed could take along
    while not go.exists():
        time.sleep(0.001)
    main(arguments)


def _draw_nothing() -> None:
    """Leave the page and the plot of a package blank: drawing them takes most of its time."""
    from contentvec_parity.publishing import package

    vars(package)["to_html"] = lambda *_: "blank"
    vars(package)["stage_plot"] = lambda _, path: path.write_bytes(b"blank")


@dataclass
class Target:
    """What two processes write, and how it is told what they left."""

    name: str
    #: where it is, in a folder of its own
    place: str
    #: the command for each of the two, without the target
    commands: dict[str, list[str]]
    #: says of the folder which whole results are in it, "nothing", or what is wrong with it
    state: Callable[[Path, Path], str]

    def arguments(self, who: str, folder: Path) -> list[str]:
        return [part.replace("{target}", str(folder / self.place)) for part in self.commands[who]]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(folder: Path) -> Listing:
    """Every file with its hash, but for what is hidden: drafts, locks and manifests."""
    return {
        path.relative_to(folder).as_posix(): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    }


# what is made before ----------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Two checkpoints, and one of them converted to two formats with its evidence."""
    import numpy as np
    import soundfile

    from contentvec_convert.conversion import convert
    from contentvec_parity.harness import compare_files
    from contentvec_parity.inputs import speech_like
    from contentvec_parity.references import recording
    from contentvec_parity.report import document as report
    from contentvec_parity.standin.write import write_standin

    for seed, name in enumerate(NAMES):
        write_standin(folder / f"{name}.pt", "tiny", seed=seed)
        convert(folder / f"{name}.pt", folder / f"{name}.safetensors", allow_unknown=True)
    source = folder / "one.pt"
    convert(source, folder / "half.safetensors", dtype="float16", allow_unknown=True)
    recording.record(source, folder / "recording.safetensors", reference="transformers")
    for name in ("one", "half"):
        document = compare_files(
            source, folder / f"{name}.safetensors", reference="transformers", inputs="built-in"
        )
        (folder / f"{name}.parity.json").write_text(report.to_json(document))
    (folder / "audio").mkdir()
    for seed in range(6):
        wave = speech_like(1600 + 800 * seed, seed)
        soundfile.write(folder / "audio" / f"{seed}.wav", np.asarray(wave), 16000)


def targets(made: Path) -> list[Target]:
    convert = {
        name: [
            "convert",
            str(made / f"{name}.pt"),
            "-o",
            "{target}",
            "--force",
            "--allow-unknown",
        ]
        for name in NAMES
    }
    extract = {
        name: [
            "extract",
            str(made / "audio"),
            "-w",
            str(made / f"{name}.safetensors"),
            "-o",
            "{target}",
            "--layer",
            "3",
            "--force",
        ]
        for name in NAMES
    }
    package = {
        name: [
            "package",
            str(made / f"{weights}.safetensors"),
            "{target}",
            "--recording",
            str(made / "recording.safetensors"),
            "--force",
            "--test-only-stand-in",
        ]
        for name, weights in zip(NAMES, ("one", "half"), strict=True)
    }
    return [
        Target("convert", "weights.safetensors", convert, converted),
        Target("extract", "features", extract, extracted),
        Target("package", "package", package, packaged),
    ]


# what is there ------------------------------------------------------------------------


def converted(folder: Path, _: Path) -> str:
    """Weights and the ledger that describes them, or neither."""
    weights, ledger = folder / "weights.safetensors", folder / "weights.ledger.json"
    there = [path.exists() for path in (weights, ledger)]
    if not any(there):
        return "nothing"
    if not all(there):
        return "weights without a ledger" if there[0] else "a ledger without weights"
    stated = json.loads(ledger.read_text())["output"]["sha256"]
    return "whole" if stated == digest(weights) else "the ledger of other weights"


def extracted(folder: Path, made: Path) -> str:
    """Outputs that are each in the manifest, as it describes them."""
    from mlx_contentvec.extract.manifest import Manifest, holds

    output = folder / "features"
    if not output.is_dir():
        return "nothing"
    manifest = Manifest(output)
    for path in output.rglob("*.npy"):
        if path.name.startswith("."):
            continue
        records = manifest.records(path.relative_to(output).as_posix())
        if not any(holds(path, record) for record in records):
            return "an output that no manifest describes"
    count = sum(not path.name.startswith(".") for path in output.rglob("*.npy"))
    whole = count == len(list((made / "audio").iterdir()))
    return "whole" if whole else "nothing" if not count else "some outputs, each as recorded"


def packaged(folder: Path, _: Path) -> str:
    from contentvec_parity.publishing.package import open_package

    if not (folder / "package").exists():
        return "nothing"
    open_package(folder / "package", allow_stand_in=True)
    return "whole"


# trials ------------------------------------------------------------------------------


class Proof:
    """The trials of one target."""

    def __init__(self, target: Target, made: Path, work: Path, seed: int) -> None:
        self.target = target
        self.made = made
        self.work = work
        self.random = random.Random(f"{target.name} {seed}")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.states: Counter[str] = Counter()
        self.faults: list[str] = []
        self.killed = 0
        self.folder = work / "trial"
        self.whole: dict[str, Listing] = {}
        self.seconds = 0.0

    def not_yet(self) -> Path:
        """A file that lets processes begin once it is there; it is not there yet."""
        go = self.work / "go"
        go.unlink(missing_ok=True)
        return go

    def start(self, who: str, folder: Path, go: Path) -> Any:
        process = self.context.Process(
            target=command, args=(self.target.arguments(who, folder), go), daemon=True
        )
        process.start()
        return process

    def run(self, who: str, folder: Path) -> tuple[int, float]:
        """One undisturbed run; its exit status and how long it took."""
        go = self.not_yet()
        process = self.start(who, folder, go)
        time.sleep(0.05)
        begun = time.monotonic()
        go.touch()
        process.join()
        return process.exitcode, time.monotonic() - begun

    def measure(self) -> None:
        """What each of the two makes when it is alone, and how long that takes."""
        took = []
        for who in NAMES:
            for turn in range(3):
                folder = self.work / f"{who}-{turn}"
                folder.mkdir()
                status, seconds = self.run(who, folder)
                if status:
                    raise SystemExit(f"{self.target.name} alone: exit status {status}")
                took.append(seconds)
            self.whole[who] = self.comparable(folder)
        self.seconds = statistics.median(took)

    def comparable(self, folder: Path) -> Listing:
        """A listing without what another run of the same command writes otherwise."""
        found = listing(folder)
        # drawn, or naming the place it is in
        drawn = ("README.md", "SHA256SUMS", "parity.html", "parity.png")
        return {name: value for name, value in found.items() if Path(name).name not in drawn}

    def trial(self, number: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        before = NAMES[number % 4 // 2] if number % 2 else None
        if before is not None:
            shutil.copytree(self.work / f"{before}-2", self.folder, dirs_exist_ok=True)
        go = self.not_yet()
        processes = [self.start(who, self.folder, go) for who in NAMES]
        time.sleep(0.05)
        # two share the processor
        moments = sorted(
            (self.random.uniform(0, 1.5 * self.seconds), process)
            for process in processes
            if self.random.random() < KILLED
        )
        begun = time.monotonic()
        go.touch()
        for moment, process in moments:
            process.join(max(0.0, begun + moment - time.monotonic()))
            if process.exitcode is None:
                # it may end by itself at this very moment
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        self.killed += sum(process.exitcode == -signal.SIGKILL for process in processes)
        self.judge(number, before)

    def judge(self, number: int, before: str | None) -> None:
        try:
            state = self.target.state(self.folder, self.made)
        except Exception as error:
            state = f"{type(error).__name__}: {error}".partition("\n")[0]
        self.states[state] += 1
        found = self.comparable(self.folder)
        if state == "whole":
            sound = self.is_one_result(found)
        elif state == "nothing":
            sound = before is None
        else:
            sound = state == "some outputs, each as recorded" and before is None
        if not sound:
            self.faults.append(f"trial {number}, before: {before}: {state}")
        status, _ = self.run(NAMES[0], self.folder)
        state = self.target.state(self.folder, self.made) if not status else f"status {status}"
        if state != "whole" or self.comparable(self.folder) != self.whole[NAMES[0]]:
            self.faults.append(f"trial {number}, run once more: {state}")
        if left := [p.name for p in self.folder.rglob(".mlx-contentvec-*.partial")]:
            self.faults.append(f"trial {number}, run once more: left {left[:3]}")

    def is_one_result(self, found: Listing) -> bool:
        if self.target.name != "extract":
            return found in self.whole.values()
        # each output is replaced by itself: of several runs each may have made some
        return all(
            any(whole.get(name) == value for whole in self.whole.values())
            for name, value in found.items()
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="convert|extract|package")
    parser.add_argument("-n", "--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="contentvec-proof-")))
        made = root / "made"
        made.mkdir()
        print("making two checkpoints and the evidence", file=sys.stderr)
        prepare(made)
        for target in targets(made):
            if options.names and target.name not in options.names:
                continue
            work = root / target.name
            work.mkdir()
            proof = Proof(target, made, work, options.seed)
            proof.measure()
            begun = time.monotonic()
            for number in range(options.trials):
                proof.trial(number)
            results[target.name] = {
                "trials": options.trials,
                "killed": proof.killed,
                "alone_seconds": round(proof.seconds, 2),
                "states": dict(proof.states),
                "faults": proof.faults,
            }
            print(
                f"{target.name}: {options.trials} trials in {time.monotonic() - begun:.0f} s, "
                f"{proof.killed} of {2 * options.trials} processes killed; afterwards "
                + ", ".join(f"{count} x {state}" for state, count in proof.states.most_common())
            )
            for fault in proof.faults:
                print(f"  FAULT {fault}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if any(result["faults"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
