#!/usr/bin/env python
"""Feed the commands with files that are wrong in random places of their structure.

    scripts/fuzz.py [--cases 100000] [--seed 0] [--first 0] [--kinds pickle,audio] [--keep FOLDER]

Good files of every kind are made first (tests/hostile_seeds.py). Each case changes one: the
instructions of a pickle, the fields of a zip archive or of a safetensors header, a part of
a JSON document, the headers and bodies of audio files. Then a command reads it, in a
process with limits on time and memory (tests/limited.py). Reported is what is neither
refused with one error nor right: tracebacks, hangs, floods, escape sequences, files left
behind, and, of files that are accepted, tensors other than ``torch.load``'s or safetensors'
own, and waveforms other than ffmpeg's.

A case follows from its number and the seed alone: ``--first N --cases 1`` repeats it, and
``--keep FOLDER`` keeps its files.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import pickletools
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "convert"), str(PROJECT / "parity")]

from tests.attack_corpus import TARGETS, InHeader, read_header  # noqa: E402
from tests.checkpoint_files import (  # noqa: E402
    Call,
    Entry,
    Name,
    assemble,
    instructions,
    safetensors,
    storage,
    tensor,
    torch_legacy,
    torch_zip,
    zip_archive,
)
from tests.limited import Limits, Make, Result, Work, serve, watch  # noqa: E402

LIMITS = Limits()
#: of the files that are accepted, one in so many is decoded by ffmpeg as well
ASK_FFMPEG = 3

# ---- changes that every kind has in common

EXTREMES = (0, 1, -1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)


def damaged(content: bytes, rng: random.Random, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes changed, removed, repeated or made extreme between two places."""
    made = bytearray(content)
    stop = min(len(made), stop or len(made))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(start, max(stop, start + 1))
        action = rng.randrange(7)
        if action == 0:
            made[at : at + 1] = bytes([rng.randrange(256)])
        elif action == 1 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            del made[at : at + rng.randrange(1, 40)]
        elif action == 3:
            other = rng.randrange(max(len(made), 1))
            made[at:at] = made[other : other + rng.randrange(1, 60)]
        elif action == 4:
            form = rng.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
            size = struct.calcsize(form)
            value = rng.choice(EXTREMES) % (1 << 8 * size)
            made[at : at + size] = struct.pack(form, value)
        elif action == 5:
            made[at : at + rng.randrange(1, 9)] = bytes(rng.choice((0, 255)) for _ in range(4))
        else:
            del made[rng.randrange(start, max(len(made), start + 1)) :]
    return bytes(made)


# ---- pickles

PIECES = [
    bytes([code])
    for code in b"()]}0123.NRbcdeglostu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
]
PIECES += [b"h\x00", b"h\x01", b"q\x00", b"q\x01", b"K\x02", b"J\xff\xff\xff\xff", b"M\x00\x01"]
PIECES += [
    instructions(value)
    for value in (
        "model", "w", "\x1b[31m\x9b2J", "state_dict", "cfg", "args", -1, 0, 2**40, 2**70, 1.5,
        float("inf"), float("nan"), b"bytes", (), [1], {"a": 1}, {1: 2}, (1, (2, (3,))),
        {"w": tensor()}, tensor(), tensor((6,), (1,)), tensor((2**40,), (0,)), storage(),
        storage("HalfStorage"), storage(count=7), storage(key="1"),
        Name("collections", "OrderedDict"), Name("torch._utils", "_rebuild_tensor_v2"),
        Name("os", "system"), Name("builtins", "dict"), Name("argparse", "Namespace"),
        Call("argparse", "Namespace", (), {"encoder_layers": 10**9}),
        Call("collections", "OrderedDict"), Call("builtins", "list", ([1, 2],)),
        Call("omegaconf.dictconfig", "DictConfig", (), {"_content": {"a": 1}}),
        "x" * 5_000, "é" * 300, "\ud800",
    )
]  # fmt: skip


def operations(pickle: bytes) -> list[bytes]:
    """A pickle in its instructions."""
    places = [place for _, _, place in pickletools.genops(pickle) if place is not None]
    return [pickle[a:b] for a, b in zip(places, [*places[1:], len(pickle)], strict=True)]


def changed_pickle(parts: list[bytes], rng: random.Random) -> bytes:
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # most of a checkpoint is one tensor after the other: the ends differ more
        at = rng.choice((rng.randrange(len(parts)), -rng.randrange(1, min(60, len(parts)))))
        action = rng.randrange(7)
        if action == 0:
            del parts[at]
        elif action == 1:
            parts.insert(at, rng.choice(PIECES))
        elif action == 2:
            parts[at] = rng.choice(PIECES)
        elif action == 3:
            parts.insert(at, parts[rng.randrange(len(parts))])
        elif action == 4:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif action == 5 and len(parts[at]) > 1:
            parts[at] = parts[at][:1] + damaged(parts[at][1:], rng)
        else:
            parts[at] = parts[at] * rng.choice((2, 3, 200, 5_000))
    return b"".join(parts)


@cache
def torch_parts(seeds: Path) -> tuple[list[list[bytes]], dict[str, bytes]]:
    """The instructions of some pickles, and the storages that they name."""
    with zipfile.ZipFile(seeds / "tiny.pt") as archive:
        names = archive.namelist()
        (pickle,) = (archive.read(name) for name in names if name.endswith("/data.pkl"))
        storages = {n.rsplit("/", 1)[1]: archive.read(n) for n in names if "/data/" in n}
    small = {"0": struct.pack("<6f", *range(6)), **storages}
    model = {"w": tensor(), "v": tensor((3,), (2,)), "u": tensor((2,), (1,), 4)}
    simple = [
        {"model": model, "cfg": {"model": {"encoder_layers": 2}}},
        model,
        {"state_dict": model, "args": Call("argparse", "Namespace", (), {"a": 1})},
        {"weight": model, "config": [1, 2], "info": "80epoch"},
    ]
    own = pickletools.optimize(pickle)
    return [operations(own), *(operations(assemble(value)) for value in simple)], small


def compare_with_torch(path: Path) -> str | None:
    """What is wrong with a checkpoint that is accepted, by torch's own reader."""
    import torch

    from contentvec_convert.checkpoint import open_checkpoint
    from mlx_contentvec.errors import CheckpointError

    try:
        with open_checkpoint(path) as checkpoint:
            ours = {
                name: (t.dtype, t.shape, t.read().tobytes())
                for name, t in checkpoint.tensors.items()
            }
            vouched = True
            try:
                checkpoint.verify()
            except CheckpointError:
                vouched = False
    except CheckpointError as error:
        return None if str(error).count("\n") < 12 else "a long message"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return None
    theirs: dict[str, list[Any]] = {}
    pending = [value]
    while pending and len(theirs) < 100_000:
        part = pending.pop()
        if isinstance(part, dict):
            for name, inner in part.items():
                if isinstance(inner, torch.Tensor):
                    theirs.setdefault(name, []).append(inner)
                elif isinstance(inner, dict):
                    pending.append(inner)
    for name, (dtype, shape, data) in ours.items():
        found = [tensor_facts(other) for other in theirs.get(name, [])]
        if (dtype, tuple(shape), data) not in found and vouched:
            return f"{name} {dtype} {shape} is not torch's {[f[:2] for f in found]}"
    return ""


def tensor_facts(other: Any) -> tuple[str, tuple[int, ...], bytes]:
    import torch

    plain = other.detach().cpu().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(other.dtype).removeprefix("torch."), tuple(other.shape), data


def checkpoint_work(path: Path, rng: random.Random) -> Work:
    commands = (
        ["inspect", path.name],
        ["inspect", path.name, "--json"],
        ["convert", path.name, "-o", "out.safetensors", "--allow-unknown"],
    )
    return Work([rng.choice(commands)], check=lambda: compare_with_torch(path))


def pickle_in_zip(seeds: Path, folder: Path, rng: random.Random) -> Work:
    pickles, storages = torch_parts(seeds)
    chosen = rng.choice(pickles)
    path = folder / "model.pt"
    used = storages if chosen is pickles[0] else {"0": storages["0"], "1": bytes(24)}
    path.write_bytes(torch_zip(changed_pickle(chosen, rng), used))
    return checkpoint_work(path, rng)


def pickle_in_legacy(seeds: Path, folder: Path, rng: random.Random) -> Work:
    path = folder / "model.pt"
    pickles, _ = torch_parts(seeds)
    whole = torch_legacy(changed_pickle(rng.choice(pickles[1:]), rng))
    if rng.random() < 0.3:
        whole = damaged(whole, rng)
    path.write_bytes(whole)
    return checkpoint_work(path, rng)


def legacy_bytes(seeds: Path, folder: Path, rng: random.Random) -> Work:
    path = folder / "model.pt"
    content = (seeds / "legacy.pt").read_bytes()
    path.write_bytes(damaged(content, rng, 0, 12_000))
    return checkpoint_work(path, rng)


ZIP_FIELDS = ("version", "flags", "method", "time", "date", "crc", "packed", "length")
END_FIELDS = ("disk", "start_disk", "here", "count", "length", "start")


def zip_fields(seeds: Path, folder: Path, rng: random.Random) -> Work:
    """An archive whose headers state something else."""
    pickles, storages = torch_parts(seeds)
    entries = [
        Entry("archive/data.pkl", b"".join(rng.choice(pickles[1:]))),
        Entry("archive/byteorder", rng.choice((b"little", b"big", b"x" * 20))),
        Entry("archive/data/0", storages["0"]),
        Entry("archive/version", b"3\n"),
    ]
    options: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2))):
        entry = rng.choice(entries)
        where = rng.randrange(6)
        if where < 2:
            own = rng.choice(ZIP_FIELDS)
            size = 2 if own in ZIP_FIELDS[:5] else 4
            value: int | bytes = rng.choice(EXTREMES) % (1 << 8 * size)
            if rng.random() < 0.3:
                value = rng.randrange(64)
            changed = {own: value}
            if where == 0:
                entry.local = {**entry.local, **changed}
            else:
                entry.central = {**entry.central, **changed}
        elif where == 2:
            entry.name = rng.choice(
                ("a/../data.pkl", "archive/data/0", "archive/data.pkl", "\x1b[31m", "x" * 600,
                 b"\xff\xfe/data.pkl", "/data.pkl", "b/data.pkl", "archive/data/\n", "")
            )  # fmt: skip
        elif where == 3:
            extra = struct.pack("<2H", 1, rng.choice((0, 8, 16, 24, 60_000)) % 65536)
            extra += bytes(rng.randrange(256) for _ in range(rng.randrange(28)))
            entry.central = {**entry.central, "extra": extra}
        elif where == 4:
            record = rng.choice(("end", "end64", "locator"))
            fields = END_FIELDS if record != "locator" else ("disk", "at", "disks")
            wide = {"end": 2**16, "end64": 2**64, "locator": 2**32}[record]
            options[record] = {rng.choice(fields): rng.choice(EXTREMES) % wide}
        else:
            options[rng.choice(("prefix", "suffix", "comment"))] = rng.choice(
                (b"x", b"PK\5\6" + bytes(18), b"PK\3\4" * 20, b"\x80\x02N.")
            )
    path = folder / "model.pt"
    with contextlib.suppress(struct.error):
        path.write_bytes(zip_archive(entries, **options))
    if not path.exists():
        path.write_bytes(zip_archive(entries))
    return checkpoint_work(path, rng)


def zip_bytes(seeds: Path, folder: Path, rng: random.Random) -> Work:
    pickles, storages = torch_parts(seeds)
    path = folder / "model.pt"
    content = torch_zip(b"".join(rng.choice(pickles[1:])), {"0": storages["0"]})
    path.write_bytes(damaged(content, rng))
    return checkpoint_work(path, rng)


# ---- JSON

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, 1e308, -1e308, 1e-320, 10**18, 10**19, 2**31, "", "7", "text",
    "\x1b]0;x\x07\x9b2J", "\u202e", "\ud800", "x" * 3_000, "../../etc/passwd", "/dev/zero", "a\nb",
    [], {}, [[]], [None], {"a": None}, [0] * 300, {"": ""}, "float16", "inf", "nan", [10**18] * 3,
)  # fmt: skip


def changed_json(document: Any, rng: random.Random) -> Any:
    """A document with some of its parts exchanged, removed, renamed or moved."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        part, key = document, None
        holder: Any = None
        while isinstance(part, (dict, list)) and part and (holder is None or rng.random() < 0.75):
            holder = part
            key = rng.choice(list(part)) if isinstance(part, dict) else rng.randrange(len(part))
            part = part[key]
        if holder is None:
            continue
        action = rng.randrange(8)
        if action < 4:
            # a copy: a later change would be one of VALUES, and could put it into itself
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif action == 4:
            del holder[key]
        elif action == 5 and isinstance(holder, dict):
            holder[rng.choice(("x", "\x1b[31m", "", "a" * 900))] = holder.pop(key)
        elif action == 6:
            holder[key] = [part] if rng.random() < 0.5 else {"a": part}
        elif isinstance(part, (int, float)) and not isinstance(part, bool):
            holder[key] = rng.choice((part + 1, part - 1, -part, part * 2, part * 10**6, str(part)))
        elif isinstance(part, str):
            holder[key] = rng.choice((part[:-1], part + "x", part.upper(), part * 2))
        else:
            holder[key] = part * 2 if isinstance(part, list) else None
    return document


def changed_text(document: Any, rng: random.Random) -> bytes:
    raw = json.dumps(changed_json(document, rng)).encode()
    return damaged(raw, rng) if rng.random() < 0.15 else raw


#: a run of the original takes long, and so does a package that is made
FUZZED = [
    target
    for target in TARGETS
    if "original" not in target.name and target.name != "report to package"
]


def json_of(target: Any) -> Kind:
    def change(seeds: Path, folder: Path, rng: random.Random) -> Work:
        path = target.lay_out(seeds, folder)
        content = path.read_bytes()
        if isinstance(target, InHeader):
            header, data = read_header(content)
            if target.key:
                stored = json.loads(header["__metadata__"][target.key])
                changed = changed_text(stored, rng).decode("utf-8", "replace")
                header["__metadata__"][target.key] = changed
                path.write_bytes(safetensors(json.dumps(header).encode(), data))
            else:
                path.write_bytes(safetensors(changed_text(header, rng), data))
        elif target.jsonl:
            lines = [changed_text(json.loads(line), rng) for line in content.splitlines()]
            path.write_bytes(b"\n".join([*lines, b""]))
        elif path.suffix == ".json":
            path.write_bytes(changed_text(json.loads(content or b"{}"), rng))
        else:
            path.write_bytes(damaged(content, rng))
        if path.read_bytes() == content:  # a good file, which may be answered at length
            return Work()
        work: Work = target.work(folder)
        if len(work.commands) > 1:
            work.commands = [rng.choice(work.commands)]
        return work

    return change


def compare_with_safetensors(path: Path) -> str | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from contentvec_convert.checkpoint import open_checkpoint
    from mlx_contentvec.errors import CheckpointError

    try:
        with open_checkpoint(path) as checkpoint:
            ours = {
                n: (t.dtype, t.shape, t.read().tobytes()) for n, t in checkpoint.tensors.items()
            }
    except CheckpointError:
        return None
    try:
        theirs = load_file(path)
    except (SafetensorError, KeyError, ValueError, AttributeError):
        return None
    if ours != {name: tensor_facts(other) for name, other in theirs.items()}:
        return "the tensors are not those that safetensors reads"
    return ""


def safetensors_file(seeds: Path, folder: Path, rng: random.Random) -> Work:
    """A small file, its header changed as JSON or as bytes."""
    six = struct.pack("<6f", *range(6))
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [28, 36]},
        "d": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [36, 36]},
        "__metadata__": {"format": "pt"},
    }
    content = safetensors(changed_text(header, rng), six + bytes(12))
    if rng.random() < 0.2:
        content = damaged(content, rng)
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return Work([["inspect", path.name]], check=lambda: compare_with_safetensors(path))


# ---- audio


def compare_with_ffmpeg(path: Path, ask: bool) -> str | None:
    """What is wrong with audio that is accepted, by ffmpeg's own decoding."""
    import numpy as np

    from mlx_contentvec.audio import read_audio
    from mlx_contentvec.errors import AudioError

    try:
        clip = read_audio(path, max_memory=64 << 20)
        if clip.resampler is not None:
            clip = read_audio(path, sample_rate=clip.source_rate, max_memory=256 << 20)
    except AudioError as error:
        said = str(error)
        return "a long message" if said.count("\n") > 8 or len(said) > 1_500 else None
    if not ask:
        return None
    done = subprocess.run(
        ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-map", "0:a:0", "-f", "f32le",
         "pipe:1"], capture_output=True, check=False,
    )  # fmt: skip
    theirs = np.frombuffer(done.stdout[: len(done.stdout) // 4 * 4], "<f4")
    ours = len(clip.waveform) * clip.channels
    # of joined MP3 files ffmpeg loses what follows the joint, and says so
    if ours > len(theirs) and done.stderr:
        return None
    if len(theirs) != ours:
        return (
            f"{len(clip.waveform)} samples of {clip.channels} channels, ffmpeg has "
            f"{len(theirs) / clip.channels}: {done.stderr[-200:]!r}"
        )
    # of what ffmpeg calls damaged, or joined, it need not make what another version of it makes
    if done.stderr:
        return None
    theirs = theirs.reshape(-1, clip.channels).astype(np.float64).mean(axis=1)
    if len(theirs) and (worst := np.abs(theirs - clip.waveform).max()) > 2e-3:
        return f"{worst:.2g} away from ffmpeg's waveform"
    return ""


def audio_of(names: tuple[str, ...]) -> Kind:
    def change(seeds: Path, folder: Path, rng: random.Random) -> Work:
        name = rng.choice(names)
        content = (seeds / "audio" / name).read_bytes()
        path = folder / name
        where = rng.random()
        if where < 0.55:
            content = damaged(content, rng, 0, 300)
        elif where < 0.8:
            content = damaged(content, rng)
        elif where < 0.88:
            content = content[: rng.randrange(len(content))]
        elif where < 0.94:
            content += (seeds / "audio" / rng.choice(names)).read_bytes()
        else:
            content = content[: rng.randrange(200)] + content[rng.randrange(200) :]
        path.write_bytes(content)
        ask = rng.randrange(ASK_FFMPEG) == 0
        work = Work(check=lambda: compare_with_ffmpeg(path, ask))
        if rng.random() < 0.05:
            weights = str(seeds / "deep.safetensors")
            work.commands = [["extract", name, "-w", weights, "-o", "out", "--max-memory", "300M"]]
        return work

    return change


Kind = Callable[[Path, Path, random.Random], Work]

#: kind -> (how often, what makes a case of it)
KINDS: dict[str, tuple[int, Kind]] = {
    "pickle in a zip archive": (12, pickle_in_zip),
    "pickle in the older container": (8, pickle_in_legacy),
    "bytes of the older container": (3, legacy_bytes),
    "fields of a zip archive": (7, zip_fields),
    "bytes of a zip archive": (4, zip_bytes),
    "safetensors": (10, safetensors_file),
    **{f"JSON: {target.name}": (2, json_of(target)) for target in FUZZED},
    "audio: wav": (6, audio_of(("s16.wav", "f32.wav", "adpcm.wav", "alaw.wav"))),
    "audio: flac": (3, audio_of(("a.flac", "flac.ogg"))),
    "audio: mp3": (5, audio_of(("a.mp3", "noxing.mp3"))),
    "audio: ogg": (5, audio_of(("a.ogg", "a.opus"))),
    "audio: others": (
        6,
        audio_of(("a.aiff", "a.au", "a.caf", "a.w64", "a.m4a", "a.mka", "a.webm", "a.aac",
                  "a.wma", "a.tta", "a.wv", "a.ac3")),
    ),
}  # fmt: skip


def case(seeds: Path, kinds: list[str], seed: int, number: int) -> tuple[str, Make]:
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(kinds, [KINDS[kind][0] for kind in kinds])[0]
    return f"{number} {kind}", lambda folder: KINDS[kind][1](seeds, folder, rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only those whose names have one of these")
    parser.add_argument("--seeds", type=Path, help="a folder of good files made earlier")
    parser.add_argument("--keep", type=Path, help="where the files of cases with problems go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    words = options.kinds.split(",")
    kinds = [kind for kind in KINDS if any(word in kind for word in words)]
    numbers = range(options.first, options.first + options.cases)
    if options.worker:
        serve((case(options.seeds, kinds, options.seed, n) for n in numbers), LIMITS)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        seeds = options.seeds or Path(temporary)
        if not (seeds / "audio").is_dir():
            from tests.hostile_seeds import make_seeds

            make_seeds(seeds)
        return run(seeds, kinds, numbers, options)


def run(seeds: Path, kinds: list[str], numbers: range, options: argparse.Namespace) -> int:
    names = [case(seeds, kinds, options.seed, number)[0] for number in numbers]

    def command(done: int) -> list[str | Path]:
        first = numbers.start + done
        return [sys.executable, __file__, "--worker", "--seeds", seeds, "--seed", str(options.seed),
                "--first", str(first), "--cases", str(numbers.stop - first),
                "--kinds", options.kinds]  # fmt: skip

    done, wrong, compared, accepted = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    begun = time.monotonic()
    for result in watch(command, names, LIMITS):
        number, _, kind = result.name.partition(" ")
        done[kind] += 1
        compared[kind] += result.compared
        accepted[kind] += 0 in result.statuses
        if result.problems:
            wrong[kind] += 1
            say(result)
            if options.keep is not None:
                folder = options.keep / number
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                case(seeds, kinds, options.seed, int(number))[1](folder)
        if sum(done.values()) % 5_000 == 0:
            print(f"{sum(done.values()):,} cases, {sum(wrong.values())} with problems, "
                  f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip
    print(f"{'kind':45}{'cases':>8}{'accepted':>10}{'compared':>10}{'problems':>10}")
    for kind in [*sorted(done), "all"]:
        figures = [
            sum(c.values()) if kind == "all" else c[kind] for c in (done, accepted, compared, wrong)
        ]
        print(f"{kind:45}{figures[0]:>8,}{figures[1]:>10,}{figures[2]:>10,}{figures[3]:>10,}")
    return 1 if wrong else 0


def say(result: Result) -> None:
    print(
        f"## {result.name} {result.statuses} {result.cpu_seconds:.2f} s, {result.memory >> 20} MiB"
    )
    for problem in result.problems:
        print(f"    {problem[:400]}")
    print("    | " + result.said[:600].replace("\n", "\n    | "), flush=True)


if __name__ == "__main__":
    sys.exit(main())
