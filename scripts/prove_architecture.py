#!/usr/bin/env python
"""Make a model of real width with the original library, convert it, and run parity on it.

    scripts/prove_architecture.py large              fairseq's and transformers' large, 24 layers
    scripts/prove_architecture.py xlarge --layers 4  as wide as xlarge, not as deep
    scripts/prove_architecture.py large --library transformers --keep FOLDER

The weights are seeded and random: this shows that the architecture and the
format are understood, not that features are good. large takes about 6 GB of
memory, 4 GB of disk and some minutes of two cores; xlarge in full three times that.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]

from contentvec_convert.conversion import convert  # noqa: E402
from contentvec_parity.compare.verdict import summarise, worst_ratio  # noqa: E402
from contentvec_parity.harness import compare_files  # noqa: E402
from mlx_contentvec.config import PRESETS, ModelConfig  # noqa: E402
from tests import originals  # noqa: E402


def make(library: str, config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of ``config`` that ``library`` built and saved."""
    if library == "fairseq":
        model = originals.fairseq_hubert(config)
        return originals.save_fairseq(model, config, folder / "model.pt")
    model = originals.transformers_hubert(config, model_class="HubertModelWithFinalProj")
    return originals.save_transformers(model, config, folder / "model")


def prove(library: str, config: ModelConfig, folder: Path) -> bool:
    """Make, convert and compare; print what was found and whether it passed."""
    started = time.monotonic()
    checkpoint = make(library, config, folder)
    made = time.monotonic()
    ledger = convert(checkpoint, folder / "converted.safetensors", allow_unknown=True)
    converted = time.monotonic()
    report = compare_files(
        checkpoint, folder / "converted.safetensors", reference=library, inputs="built-in"
    )
    print(f"{library}: {ledger.source_tensors} tensors, {ledger.output['size']:,} bytes")
    print(
        f"  made in {made - started:.0f} s, converted in {converted - made:.1f} s, "
        f"compared in {time.monotonic() - converted:.0f} s, "
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    )
    for entry in summarise(report["stages"]):
        if entry["kind"] == "features":
            print(
                f"  {entry['name']:24} max {entry['candidate']['max_abs']:.2e} "
                f"rms {entry['candidate']['rms']:.2e} from float64, "
                f"{worst_ratio(entry):.2f} x PyTorch's own error"
            )
    print(f"  {report['verdict']['reason']}")
    return bool(report["verdict"]["passed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--library", choices=("fairseq", "transformers"), action="append")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave the files there")
    arguments = parser.parse_args()
    config = PRESETS[arguments.preset]
    if arguments.layers:
        config = dataclasses.replace(config, encoder_layers=arguments.layers)
    passed = True
    for library in arguments.library or ("fairseq", "transformers"):
        if arguments.keep is not None:
            folder = arguments.keep / library
            folder.mkdir(parents=True)
            passed &= prove(library, config, folder)
            continue
        with tempfile.TemporaryDirectory() as folder:
            passed &= prove(library, config, Path(folder))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
