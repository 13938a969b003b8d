"""``mlx-contentvec extract``: audio files in, feature files out."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..audio import AUDIO_SUFFIXES, require_decoders
from ..errors import ConfigError, counted, printable
from ..terminal import FiniteRange, Status, say
from .applio import check_model_info, write_model_info
from .decoding import Workers, worker_count
from .manifest import Manifest, ignores_case, locked
from .run import (
    DTYPES,
    Extraction,
    Failure,
    Job,
    Settings,
    Summary,
    plan_jobs,
    share_of_rank,
)
from .sharding import Ranks, Shard
from .sources import (
    Source,
    find_sources,
    name_applio_outputs,
    name_outputs,
    name_rvc_outputs,
    training_root,
)

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)


def size(text: str) -> int:
    """Bytes, written as ``800M`` or ``1.5G``: units of 1024, 1024^2 and 1024^3."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size like 800M or 1.5G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


#: bytes of a list of files on stdin: two million of the longest names that are usual
LIST_BYTES = 1 << 28
#: in the place of a shard: nothing is extracted, what is missing is said
SUMMARY = "summary"


def shard(text: str) -> Shard | str:
    """A shard as INDEX/COUNT, or ``summary``."""
    if text == SUMMARY:
        return text
    try:
        return Shard.parse(text)
    except ConfigError as error:
        raise click.BadParameter(f"{text!r}: {error.expected}, or {SUMMARY}") from None


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "-o", "--output", "folder", required=True, type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the features.",
)  # fmt: skip
@click.option(
    "-w", "--weights", required=True,
    help="Converted weights: a file, a folder, owner/name on the Hub, or a known model's name.",
)  # fmt: skip
@click.option(
    "--version", "version", type=click.Choice(["v1", "v2"]),
    help="RVC's features: v1 is layer 9 projected to 256, v2 is layer 12 (the default).",
)  # fmt: skip
@click.option("--layer", type=click.IntRange(min=1), help="Another layer, counted from 1.")
@click.option("--project", is_flag=True, help="Put that layer through final_proj.")
@click.option("--rvc", is_flag=True, help="RVC's training layout: 3_feature256 or 3_feature768.")
@click.option(
    "--applio", is_flag=True, help="Applio's training layout: extracted, and model_info.json."
)
@click.option(
    "--embedder", metavar="NAME",
    help="What Applio calls these weights.  [default: contentvec with --applio]",
)  # fmt: skip
@click.option(
    "--safetensors", is_flag=True, help="One features.safetensors for each folder of audio."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
    help="Type of the features; RVC expects float32.",
)  # fmt: skip
@click.option(
    "--max-memory", type=size,
    help="Memory beside the model, like 800M or 1.5G, on a GPU with what MLX keeps of it; "
    "longer clips are streamed, exactly.",
)  # fmt: skip
@click.option(
    "--window", type=FiniteRange(min=0, min_open=True), metavar="SECONDS",
    help="Cut clips into windows of this length instead: faster for hours of audio, not exact.",
)  # fmt: skip
@click.option(
    "--overlap", type=FiniteRange(min=0), metavar="SECONDS",
    help="What neighbouring windows share.  [default: 2 with --window]",
)  # fmt: skip
@click.option(
    "--batch-seconds", type=FiniteRange(min=0), metavar="SECONDS",
    help="Audio in one batch.  [default: 60 on CUDA, 30 on Metal, 16 on a CPU]",
)  # fmt: skip
@click.option(
    "--padding", type=click.Choice(["exact", "fairseq"]), default="exact", show_default=True,
    help="In a batch: each clip as if alone, or as the original pads them.",
)  # fmt: skip
@click.option(
    "--shard", type=shard, metavar="I/N",
    help="Do one of N equal parts, counted from 0, beside other processes; then once "
    "`summary`, to say what is missing.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace outputs that are not of this run.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def extract(paths: tuple[str, ...], folder: Path, weights: str, **options: Any) -> None:
    """Extract features from audio: files, folders, glob patterns, or - for a list on stdin.

    Finished outputs are skipped, so the same command goes on where one was
    stopped. Files that cannot be used are listed at the end, and the exit
    status is 1. Under mlx.launch the work is shared among its processes; whatever
    else starts processes gives each its --shard.
    """
    layouts = [name for name in ("rvc", "applio", "safetensors") if options[name]]
    if len(layouts) > 1:
        raise click.UsageError(f"--{layouts[0]} and --{layouts[1]} exclude each other")
    if options["embedder"] is not None and not options["applio"]:
        raise click.UsageError("--embedder needs --applio")
    if options["applio"] and (options["version"] == "v1" or options["layer"]):
        raise click.UsageError("Applio trains on the last layer: leave out --version and --layer")
    if options["overlap"] is not None and options["window"] is None:
        raise click.UsageError("--overlap needs --window")
    _require_right_places(paths, weights)
    ranks = Ranks.launched()
    if "-" in paths and ranks.size > 1:
        raise click.UsageError("a list on stdin does not reach every process of mlx.launch")
    if options["shard"] is not None and ranks.size > 1:
        raise click.UsageError("--shard is for processes that mlx.launch did not start")
    require_decoders()
    summary = _run(paths, folder, weights, ranks, options)
    if ranks.rank == 0:
        if options["as_json"]:
            click.echo(json.dumps({"output": str(folder), **summary.to_dict()}, indent=2))
        else:
            relative = not any(map(os.path.isabs, paths))
            _report(summary, folder, options["shard"], relative=relative)
    # nobody leaves before the first has reported: the launcher stops all when one fails
    ranks.gather(None)
    if summary.failed:
        click.get_current_context().exit(1)


def _require_right_places(paths: tuple[str, ...], weights: str) -> None:
    """Notice audio in the place of weights, and weights in the place of audio."""
    if Path(weights).suffix.lower() in AUDIO_SUFFIXES:
        raise click.UsageError(f"-w names the weights, and {printable(weights)} is audio")
    given = [path for path in paths if Path(path).suffix in (".safetensors", ".pt", ".pth")]
    if given:
        raise click.UsageError(
            f"{printable(given[0])} is no audio: weights are named with -w, audio without"
        )


def _run(
    paths: tuple[str, ...], folder: Path, weights: str, ranks: Ranks, options: dict[str, Any]
) -> Summary:
    """Plan, extract this rank's share, and add up what all ranks did."""
    # MLX on CUDA counts the plans of convolutions, attention and graphs that it had to make
    # since it started, and refuses every other once there were many: a folder of many
    # lengths must not end there. Source: mlx/backend/cuda/lru_cache.h
    os.environ.setdefault("MLX_ENABLE_CACHE_THRASHING_CHECK", "0")
    from ..backend import device_kind
    from ..features import default_batch_seconds, feature_kind
    from ..hub import sha256_of
    from ..loading import find_weights
    from ..model import ContentvecModel
    from ..weights import unchanged
    from .packing import check_packs, pack, part_of
    from .windows import cut_windows

    kind = feature_kind(options["version"], options["layer"], options["project"])
    folder, prefix = training_root(folder)
    embedder = options["embedder"] or "contentvec"
    shard = options["shard"]
    part = shard if isinstance(shard, Shard) else None
    name = None if part is None else f"shard-{part.index}-of-{part.count}"
    with (
        locked(folder, name) if ranks.rank == 0 else contextlib.nullcontext(),
        # they begin while the weights are loaded
        Workers(worker_count(device_kind(), ranks.size)) as workers,
    ):
        weights_file = find_weights(weights)
        with unchanged(weights_file):
            model = ContentvecModel.from_file(weights_file)
            digest = sha256_of(weights_file)
        kind.check(model.config)
        window = options["window"]
        overlap = 2.0 if options["overlap"] is None else options["overlap"]
        if window is not None:
            cut_windows(model.config, 1, window, overlap)
        settings = Settings(
            weights=digest,
            layer=kind.layer,
            project=kind.project,
            dtype=options["dtype"],
            padding=options["padding"],
            window=window,
            overlap=None if window is None else overlap,
        )
        # each process writes records of its own: rank 0 those of whoever works alone
        manifest = Manifest(folder, ranks.rank if part is None else part.index + 1)
        pending: list[Job] = []
        outputs: list[str] = []
        finished = 0
        if ranks.rank == 0:
            sources = find_sources(list(_listed(paths)))
            outputs = [
                prefix + output
                for output in _outputs(
                    sources, kind.width(model.config), options, ignores_case(folder)
                )
            ]
            if options["applio"]:
                check_model_info(folder, embedder, force=options["force"])
            if options["safetensors"]:
                outputs = [part_of(output) for output in outputs]
                check_packs(outputs, manifest, asdict(settings), options["force"])
            if part is not None:
                mine = part.of([source.path for source in sources])
                sources, outputs = [sources[i] for i in mine], [outputs[i] for i in mine]
            pending, finished = plan_jobs(
                sources, outputs, manifest, settings, force=options["force"]
            )
        missing: list[Failure] = []
        if shard == SUMMARY:
            missing = [Failure(job.source, "has no features yet") for job in pending]
            pending = []
        batch_seconds = options["batch_seconds"]
        extraction = Extraction(
            model,
            settings,
            manifest,
            max_memory=options["max_memory"],
            batch_seconds=(
                default_batch_seconds(options["padding"])
                if batch_seconds is None
                else batch_seconds
            ),
            workers=workers,
        )
        share = share_of_rank(pending, ranks)
        try:
            with _progress(share, ranks) as advance:
                extraction.run(share, advance)
        except KeyboardInterrupt:
            click.echo(
                f"interrupted: {finished + extraction.summary.extracted} of "
                f"{finished + len(pending)} outputs are finished; the same command goes on",
                err=True,
            )
            raise click.exceptions.Exit(130) from None
        summary = Summary.joined(ranks.gather(extraction.summary.to_dict()))
        summary.skipped = finished
        summary.failed = sorted([*summary.failed, *missing], key=lambda failure: failure.source)
        # what belongs to no single shard is left to the summary
        if ranks.rank == 0 and options["safetensors"] and part is None:
            made = Manifest(folder)
            # again: what was put there meanwhile is not of this run either
            check_packs(outputs, made, asdict(settings), options["force"])
            pack(outputs, made, asdict(settings))
        if ranks.rank == 0 and options["applio"] and part is None:
            write_model_info(folder, embedder)
        return summary


def _listed(paths: tuple[str, ...]) -> Iterator[str]:
    """The given paths, ``-`` replaced by the lines of stdin."""
    for path in paths:
        if path == "-":
            listed = os.fsdecode(_read_stdin())
            yield from (line.rstrip("\r") for line in listed.split("\n") if line.strip())
        else:
            yield path


def _read_stdin() -> bytes:
    """The list on stdin. Raises ConfigError for one that cannot be read or does not end."""
    problem = "the list of files on standard input cannot be read"
    if sys.stdin is None:
        raise ConfigError(problem, found="it is closed", expected="a name on each line")
    try:
        listed = sys.stdin.buffer.read(LIST_BYTES + 1)
    except OSError as error:
        raise ConfigError(problem, found=error.strerror, expected="a name on each line") from error
    if len(listed) > LIST_BYTES:
        raise ConfigError(problem, found=f"more than {LIST_BYTES:,} bytes", expected="an end")
    return listed


def _outputs(
    sources: list[Source], width: int, options: dict[str, Any], ignore_case: bool
) -> list[str]:
    if options["rvc"]:
        return name_rvc_outputs(sources, width, ignore_case=ignore_case)
    if options["applio"]:
        return name_applio_outputs(sources, width, ignore_case=ignore_case)
    return name_outputs(sources, ignore_case=ignore_case)


@contextlib.contextmanager
def _progress(share: list[Job], ranks: Ranks) -> Iterator[Callable[[Job, float], None]]:
    """A bar on stderr with the rate and the time left; the first rank's own share."""
    # a clip of unknown length counts a little, so that the end is reached
    lengths = {job.output: max(job.seconds, 0.01) for job in share}
    total = sum(lengths.values())
    done: dict[str, float] = {}
    begun = time.monotonic()

    def advanced(job: Job, fraction: float) -> tuple[float, str, str]:
        """Seconds of audio that are done, clips that are, and the rate."""
        done[job.output] = fraction
        seconds = sum(lengths[output] * part for output, part in done.items())
        elapsed = time.monotonic() - begun
        finished = sum(part == 1.0 for part in done.values())
        rate = f"{seconds / elapsed:.1f} audio-s/s" if elapsed > 1 else ""
        return seconds, f"{finished:,}/{len(share):,}", rate

    if ranks.rank or not share:
        yield lambda job, fraction: None
        return
    if not sys.stderr.isatty():
        with Status() as status:

            def say_how_far(job: Job, fraction: float) -> None:
                seconds, clips, rate = advanced(job, fraction)
                status.update(f"{clips} clips, {100 * seconds / total:.0f} %, {rate}".rstrip(" ,"))

            yield say_how_far
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.fields[clips]} clips"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total, clips=f"0/{len(share)}", rate="")

        def advance(job: Job, fraction: float) -> None:
            seconds, clips, rate = advanced(job, fraction)
            progress.update(task, completed=seconds, clips=clips, rate=rate)

        yield advance


def _report(summary: Summary, folder: Path, shard: Shard | str | None, *, relative: bool) -> None:
    rate = summary.audio_seconds / summary.wall_seconds if summary.wall_seconds else 0.0
    if shard == SUMMARY:
        everything = summary.skipped + len(summary.failed)
        say(f"finished   {summary.skipped:,} of {counted(everything, 'clip')}")
    else:
        say(
            f"extracted  {counted(summary.extracted, 'clip')}, "
            f"{_duration(summary.audio_seconds)} of audio in {_duration(summary.wall_seconds)} "
            f"({rate:.1f} audio-seconds per second)"
        )
    if isinstance(shard, Shard):
        say(f"shard      {shard}; when all are done: --shard {SUMMARY}")
    if summary.ranks > 1:
        click.echo(f"processes  {summary.ranks}")
    if summary.skipped and shard != SUMMARY:
        click.echo(f"skipped    {summary.skipped:,} finished before")
    if summary.seams:
        click.echo(
            f"seams      {summary.seams:,}, windows disagree by {summary.seam_max:.2g} at most, "
            f"{summary.seam_rms:.2g} rms"
        )
    click.echo(f"output     {printable(str(folder))}")
    if summary.failed:
        click.echo(f"error: {counted(len(summary.failed), 'file')} gave no features", err=True)
        for failure in summary.failed:
            source = os.path.relpath(failure.source) if relative else failure.source
            say(f"  {printable(source)}: {failure.reason}", err=True)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02} min"
