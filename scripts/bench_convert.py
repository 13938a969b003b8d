#!/usr/bin/env python3
"""What a conversion costs, beside tools that do less and tools that do it otherwise.

    scripts/bench_convert.py [CHECKPOINT] [--rounds N] [--cold] [--json FILE]

Without a checkpoint the full-size stand-in is made first (needs torch). Every
contender is a process of its own, timed from start to exit; they take turns,
so that a busy machine is busy for all of them. A ratio is the median of the
ratios within a turn.

  convert       `mlx-contentvec convert`: MD5 and SHA-256 of the source, SHA-256 of
                the output and of each tensor, everything read back and compared
  md5sum, sha256sum, cp   of the source's bytes, and of the output's
  torch         torch.load, the same tensors by torch, safetensors' save_file:
                no checksum, no comparison, no flush

--cold drops the source from the page cache before each contender (Linux).
Memory: rss is the peak of all resident pages; private is the peak of those
that no file backs, sampled every few milliseconds (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
ROOTS = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]
sys.path[:0] = ROOTS

SCHEMA = "mlx-contentvec-bench-convert/1"

#: the same conversion as people write it
TORCH = """
import sys, types, torch
from safetensors.torch import save_file
class Dictionary:
    pass
torch.serialization.add_safe_globals([(Dictionary, "fairseq.data.dictionary.Dictionary")])
state = torch.load(sys.argv[1], map_location="cpu", weights_only=True)["model"]
for name in ("mask_emb", "label_embs_concat"):
    state.pop(name, None)
position = "encoder.pos_conv.0."
magnitude = state.pop(position + "weight_g").double()
direction = state.pop(position + "weight_v").double()
kernel = magnitude * direction / direction.norm(dim=(0, 1), keepdim=True)
state["encoder.pos_conv.weight"] = kernel
state["encoder.pos_conv.bias"] = state.pop(position + "bias")
tensors = {}
for name, tensor in state.items():
    tensor = tensor.float()
    tensors[name] = (tensor.permute(0, 2, 1) if tensor.ndim == 3 else tensor).contiguous()
save_file(tensors, sys.argv[2], metadata={"format": "mlx"})
"""


def hashing_tools() -> dict[str, list[str]]:
    """The system's own tools by what they compute: GNU's, or those of a Mac."""
    if shutil.which("md5sum"):
        return {"md5sum": ["md5sum"], "sha256sum": ["sha256sum"]}
    return {"md5sum": ["md5", "-q"], "sha256sum": ["shasum", "-a", "256"]}


def measure(command: list[str], log: Path) -> dict[str, float | None]:
    """Run a command to its end: seconds of wall and CPU time, megabytes at their peak."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(ROOTS)}
    # compiled in the first round, as torch is and as this project is where it is installed
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    peak = 0.0
    with log.open("wb") as stream:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            path = Path(f"/proc/{process.pid}/smaps_rollup")
            while not ended.wait(0.01):
                try:
                    found = re.findall(r"^(?:Anonymous|Swap):\s+(\d+)", path.read_text(), re.M)
                except (OSError, ValueError):
                    return
                peak = max(peak, sum(map(int, found)) / 1024)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        ended.set()
        watcher.join()
    if process.returncode:
        sys.exit(f"error: {' '.join(command[:4])} failed\n\n{log.read_text()[-2000:]}")
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_mb": usage.ru_maxrss / unit,
        "private_mb": peak or None,
    }


def drop_from_cache(path: Path) -> None:
    """Have the next reader of ``path`` fetch it from the disk."""
    os.sync()
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def race(checkpoint: Path, folder: Path, rounds: int, cold: bool) -> dict[str, list[Any]]:
    """Every contender's measurements, one per round."""
    output, other, log = folder / "out.safetensors", folder / "other", folder / "log"
    python = sys.executable
    convert = [python, "-m", "mlx_contentvec", "convert", str(checkpoint), "-o", str(output)]
    contenders: dict[str, list[str]] = {"convert": [*convert, "--allow-unknown", "--force"]}
    for name, tool in hashing_tools().items():
        contenders[f"{name} source"] = [*tool, str(checkpoint)]
        contenders[f"{name} output"] = [*tool, str(output)]
    contenders["cp output"] = ["cp", str(output), str(other)]
    contenders["torch"] = [python, "-c", TORCH, str(checkpoint), str(folder / "torch.safetensors")]
    results: dict[str, list[Any]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, command in contenders.items():
            for leftover in (other, folder / "torch.safetensors"):
                leftover.unlink(missing_ok=True)
            if name == "convert":
                output.unlink(missing_ok=True)
            if cold:
                drop_from_cache(output if name.endswith("output") else checkpoint)
            result = measure(command, log)
            if round_:  # the first round only warms the caches
                results[name].append(result)
            shown = f"{result['wall_s']:.2f} s"
            print(f"round {round_} of {rounds}: {name} {shown}", file=sys.stderr, flush=True)
    return results


def median(rows: list[Any], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.median(values) if values else None


def ratios(results: dict[str, list[Any]]) -> dict[str, float]:
    """Medians over the rounds of convert's cost over that of others in the same round."""
    tools = {
        "tools on the source, cp of the output": ("md5sum source", "sha256sum source", "cp output"),
        "tools on the output": ("md5sum output", "sha256sum output", "cp output"),
        "torch": ("torch",),
    }
    found = {}
    for what, names in tools.items():
        for key in ("wall_s", "cpu_s", "rss_mb"):
            if key == "rss_mb" and what != "torch":
                continue
            found[f"{key} / {what}"] = statistics.median(
                ours[key] / sum(results[name][i][key] for name in names)
                for i, ours in enumerate(results["convert"])
            )
    return found


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['checkpoint']['name']}, {report['checkpoint']['size']:,} bytes", end="")
    print(f" -> {report['output_size']:,} bytes; {report['machine']}")
    print(f"{report['rounds']} rounds, {'cold' if report['cold'] else 'warm'}\n")
    print("| | wall s | CPU s | peak RSS MB | private MB |\n|---|---|---|---|---|")
    for name, row in report["medians"].items():
        private = "" if row["private_mb"] is None else f"{row['private_mb']:.0f}"
        print(
            f"| {name} | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {row['rss_mb']:.0f} "
            f"| {private} |"
        )
    print("\n| convert over | ratio |\n|---|---|")
    for what, value in report["ratios"].items():
        print(f"| {what} | {value:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--preset", default="base", help="of the stand-in to make (base, large)")
    parser.add_argument("--dtype", default="float16", help="of the stand-in to make")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            from contentvec_parity.standin.write import write_standin

            print(f"making a stand-in ({arguments.preset}, {arguments.dtype})", file=sys.stderr)
            checkpoint = folder / "standin.pt"
            write_standin(checkpoint, arguments.preset, dtype=arguments.dtype)
        results = race(checkpoint, folder, arguments.rounds, arguments.cold)
        report = {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores, {platform.platform()}, Python "
            f"{platform.python_version()}",
            "checkpoint": {"name": checkpoint.name, "size": checkpoint.stat().st_size},
            "output_size": (folder / "out.safetensors").stat().st_size,
            "rounds": arguments.rounds,
            "cold": arguments.cold,
            "medians": {
                name: {key: median(rows, key) for key in rows[0]} for name, rows in results.items()
            },
            "ratios": ratios(results),
            "runs": results,
        }
    show(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
