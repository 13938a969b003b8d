"""``mlx-contentvec bench``: measure MLX beside the originals on this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from mlx_contentvec.files import check_reports, write_text
from mlx_contentvec.terminal import NamedPath

from . import file_of


def numbers(kind: type[float] | type[int]) -> Callable[[str], tuple[float, ...]]:
    """The type of an option that takes positive numbers separated by commas."""

    def parse(text: str) -> tuple[float, ...]:
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < number < math.inf for number in found):
            raise click.BadParameter(f"{text!r} is no list of positive numbers such as 1,5,10")
        return found

    return parse


def beside(text: str) -> tuple[str, ...]:
    """The implementations that ``--beside`` names; both originals unless it chooses of them."""
    from ..bench.measure import ENGINES, ORIGINALS

    choices = {"both": ORIGINALS, "none": (), **{name: (name,) for name in ORIGINALS}}
    names = [name.strip() for name in text.split(",")]
    if unknown := sorted(set(names) - {*choices, *ENGINES}):
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join([*choices, *ENGINES])}")
    originals = {n for name in names if name in choices for n in choices[name]}
    if not any(name in choices for name in names):
        originals = set(ORIGINALS)
    return tuple(name for name in (*ORIGINALS, *ENGINES) if name in originals or name in names)


@click.command()
@click.argument("checkpoint", type=NamedPath())
@click.argument("converted", nargs=-1, required=True, type=NamedPath())
@click.option(
    "--lengths",
    type=numbers(float),
    metavar="N,N,...",
    default="1,5,10,30",
    show_default=True,
    help="Seconds of audio in a clip.",
)
@click.option(
    "--batches",
    type=numbers(int),
    metavar="N,N,...",
    default="1",
    show_default=True,
    help="Clips in a batch.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Turns of each measurement.",
)
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="New processes per implementation.",
)
@click.option("--device", type=click.Choice(["cpu", "gpu"]), help="Default: what MLX uses.")
@click.option(
    "--beside",
    "others",
    type=beside,
    metavar="NAME,NAME,...",
    default="both",
    show_default=True,
    help="The originals to run, where they are installed: both, transformers, fairseq or none; "
    "and engines that run them exported: onnxruntime, openvino, torch-compile.",
)
@click.option(
    "--torch-dtype",
    "torch_dtypes",
    multiple=True,
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Also run transformers in this dtype; may be given several times.",
)
@click.option(
    "--live",
    is_flag=True,
    help="Measure model.live instead: one block at the settings of RVC's real-time window.",
)
@click.option("--no-errors", is_flag=True, help="Leave out the comparison with float64.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the figures as JSON; - for stdout."
)
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw time and memory against length (svg, png, pdf).",
)
def bench(
    checkpoint: Path,
    converted: tuple[Path, ...],
    lengths: tuple[float, ...],
    batches: tuple[int, ...],
    threads: int,
    repeats: int,
    starts: int,
    device: str | None,
    others: tuple[str, ...],
    torch_dtypes: tuple[str, ...],
    live: bool,
    no_errors: bool,
    json_file: str | None,
    plot_file: Path | None,
) -> None:
    """Measure loading, extraction and memory of CONVERTED files on this machine.

    CHECKPOINT is the original, which transformers and fairseq run beside them;
    the first CONVERTED file must be float32. Each implementation has a process
    of its own and the same number of threads, and they take turns.
    """
    if live:
        source = click.get_current_context().get_parameter_source
        for option in ("lengths", "batches", "starts", "plot_file"):
            if source(option) is not ParameterSource.DEFAULT:
                name = option.partition("_")[0]
                raise click.UsageError(f"--live has a window of its own: leave out --{name}")

    from contentvec_convert.conversion import ledger_path

    from ..bench.report import require_plot
    from ..harness import require_files

    require_files(checkpoint, *converted)
    report = file_of(json_file)
    if plot_file is not None:
        require_plot(plot_file)
    reports = [path for path in (report, plot_file) if path is not None]
    ledgers = map(ledger_path, converted)
    check_reports(reports, [checkpoint, *converted, *ledgers])

    from rich.console import Console

    from mlx_contentvec.backend import device_kind
    from mlx_contentvec.terminal import Status

    from ..bench.measure import Settings
    from ..bench.measure import bench as measure
    from ..bench.report import plot, print_screen

    settings = Settings(
        lengths=lengths,
        batches=batches,
        threads=threads,
        repeats=repeats,
        starts=starts,
        device=device or ("cpu" if device_kind() == "cpu" else "gpu"),
        live=live,
    )
    with Status("starting") as status:
        document = measure(
            checkpoint,
            converted,
            settings,
            beside=others,
            torch_dtypes=("float32", *(name for name in torch_dtypes if name != "float32")),
            with_errors=not no_errors,
            progress=status.update,
        )
    if json_file == "-":
        click.echo(json.dumps(document, indent=2))
    else:
        if report is not None:
            write_text(report, json.dumps(document, indent=2) + "\n")
        console = Console()
        if not console.is_terminal:
            console.width = 120
        print_screen(document, console)
    if plot_file is not None:
        plot(document, plot_file)
