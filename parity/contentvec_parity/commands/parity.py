"""``mlx-contentvec parity``: run, record, and judge a saved run again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_contentvec.files import check_reports, write_text
from mlx_contentvec.terminal import FiniteRange, NamedPath

from ..compare.verdict import RATIO, Gates
from . import file_of


class RunByDefault(click.Group):
    """A group that takes its first subcommand when none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def get_help(self, ctx: click.Context) -> str:
        run = self.commands["run"]
        with click.Context(run, parent=ctx.parent, info_name=ctx.info_name) as own:
            text = run.get_help(own)
        formatter = ctx.make_formatter()
        with formatter.section("Subcommands"):
            formatter.write_dl(
                [
                    (name, command.get_short_help_str(200))
                    for name, command in self.commands.items()
                    if name != "run"
                ]
            )
        return text + "\n\n" + formatter.getvalue()


@click.group(cls=RunByDefault, context_settings={"help_option_names": ["-h", "--help"]})
def parity() -> None:
    """Compare the MLX model with the original."""


_FILE = NamedPath()

_GATES = (
    click.option(
        "--ratio",
        type=FiniteRange(min=0, min_open=True),
        default=RATIO,
        show_default=True,
        help="Largest allowed error of MLX, as a multiple of PyTorch's.",
    ),
    click.option(
        "--max-abs",
        type=FiniteRange(min=0),
        help="Largest allowed difference of any feature from the truth.",
    ),
    click.option(
        "--min-cosine",
        type=FiniteRange(-1, 1),
        help="Smallest allowed cosine of any frame with the truth.",
    ),
    click.option(
        "--min-snr",
        type=FiniteRange(),
        metavar="DB",
        help="Smallest allowed signal-to-noise ratio of any features.",
    ),
    click.option("--json", "json_file", metavar="FILE", help="Write the report; - for stdout."),
    click.option("--markdown", metavar="FILE", type=_FILE, help="Write tables for a model card."),
    click.option("--html", metavar="FILE", type=_FILE, help="Write one self-contained page."),
)


def _gated(command: Callable[..., None]) -> Callable[..., None]:
    """The options that judge a run and say where its report goes."""
    for option in reversed(_GATES):
        command = option(command)
    return command


@parity.command("run")
@click.argument("files", nargs=-1, required=True, metavar="CHECKPOINT CONVERTED", type=_FILE)
@click.option(
    "--reference",
    metavar="NAME|FILE",
    help="fairseq, transformers, or a recording (.safetensors). Default: what is installed.",
)
@click.option(
    "--audio",
    multiple=True,
    type=_FILE,
    help="Also compare on this audio file; may be given several times.",
)
@click.option("--quick", is_flag=True, help="Only the six built-in clips; seconds, not a minute.")
@click.option("--thorough", is_flag=True, help="Also every remainder of the hop, and 1 to 30 s.")
@click.option("--tf32", is_flag=True, help="Judge with TF32 products, on a device that has them.")
@click.option(
    "--compare-tf32/--no-compare-tf32",
    default=None,
    help="Also measure the features with TF32, for information. Default: on a GPU.",
)
@_gated
def run(
    files: tuple[Path, ...],
    reference: str | None,
    audio: tuple[Path, ...],
    quick: bool,
    thorough: bool,
    tf32: bool,
    compare_tf32: bool | None,
    **delivery: Any,
) -> None:
    """Run the original and the MLX model side by side and say how far apart they are.

    CHECKPOINT is the original (a fairseq .pt file or a Hugging Face folder),
    CONVERTED what `mlx-contentvec convert` made of it; with a recording as the
    reference CHECKPOINT may be left out. Both are measured against the same
    model in float64: MLX passes if, in every stage, it is no further from that
    truth than --ratio times PyTorch is: in float32, on the CPU or on this device
    (the larger error counts); for float16 and bfloat16 weights in that format.

    Exit status: 0 passed, 1 failed or refused, 2 wrong usage.
    """
    if quick and thorough:
        raise click.UsageError("--quick and --thorough exclude each other")
    # read by MLX when it starts: float32 products must be float32
    os.environ["MLX_ENABLE_TF32"] = "1" if tf32 else "0"
    from contentvec_convert.conversion import ledger_path

    from ..harness import compare_files, reference_named, replay

    _require_page(delivery)
    name, recording = reference_named(reference)
    ledgers = map(ledger_path, files)
    check_reports(
        _reports(**delivery), [*files, *ledgers, *audio, *([recording] if recording else [])]
    )
    if len(files) > 2 or (len(files) == 1 and recording is None):
        raise click.UsageError("give CHECKPOINT and CONVERTED")
    if len(files) == 2 and files[0].suffix == ".safetensors" != files[1].suffix:
        raise click.UsageError(f"CHECKPOINT comes first: {files[1]} {files[0]}")
    gates = _gates(delivery)
    if recording is not None:
        if audio or quick or thorough:
            raise click.UsageError("a recording has its own clips: no --audio, --quick, --thorough")
        checkpoint = files[0] if len(files) == 2 else None
        document = replay(
            recording,
            files[-1],
            checkpoint=checkpoint,
            gates=gates,
            compare_tf32=compare_tf32,
        )
    else:
        document = compare_files(
            *files,
            reference=name,
            audio=audio,
            inputs="built-in" if quick else "thorough" if thorough else "standard",
            gates=gates,
            compare_tf32=compare_tf32,
        )
    _deliver(document, **delivery, audio=audio)


@parity.command("record")
@click.argument("checkpoint", type=_FILE)
@click.argument("output", type=_FILE)
@click.option(
    "--reference",
    type=click.Choice(["fairseq", "transformers"]),
    help="Default: what is installed.",
)
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists.")
def record_command(checkpoint: Path, output: Path, reference: str | None, force: bool) -> None:
    """Record what the original makes of six short clips, for others to compare with.

    OUTPUT is a safetensors file of a few megabytes. Whoever has it can run
    `mlx-contentvec parity CONVERTED --reference OUTPUT` without PyTorch.
    """
    from mlx_contentvec.terminal import Status, say

    from ..references.recording import record

    with Status(f"recording {checkpoint.name}") as status:
        header = record(
            checkpoint, output, reference=reference, force=force, progress=status.update
        )
    say(
        f"{output}  {output.stat().st_size:,} bytes, {len(header['clips'])} clips of "
        f"{header['source']['name']} by {header['reference']['name']}"
    )


@parity.command("judge")
@click.argument("saved", type=_FILE)
@_gated
def judge_command(saved: Path, **delivery: Any) -> None:
    """Judge a saved run (--json FILE) by other limits, without running it again."""
    from ..compare.verdict import judge
    from ..report.document import read

    _require_page(delivery)
    document = read(saved)
    check_reports(_reports(**delivery), [saved])
    document["verdict"] = judge(document, _gates(delivery))
    _deliver(document, **delivery)


def _require_page(options: dict[str, Any]) -> None:
    if options["html"] is not None:
        from ..report.page import require_packages

        require_packages()


def _reports(
    json_file: str | None, markdown: Path | None, html: Path | None, **_: Any
) -> list[Path]:
    """The files that the options name."""
    return [path for path in (file_of(json_file), markdown, html) if path is not None]


def _gates(options: dict[str, Any]) -> Gates:
    return Gates(
        **{name: options.pop(name) for name in ("ratio", "max_abs", "min_cosine", "min_snr")}
    )


def _deliver(
    document: dict[str, Any],
    json_file: str | None,
    markdown: Path | None,
    html: Path | None,
    audio: tuple[Path, ...] = (),
) -> None:
    """Write and print what was asked for, all of it made first; end with the verdict's status."""
    from ..report.document import to_json
    from ..report.markdown import to_markdown
    from ..report.screen import print_screen

    written = []
    if (report := file_of(json_file)) is not None:
        written.append((report, to_json(document) + "\n"))
    if markdown is not None:
        written.append((markdown, to_markdown(document)))
    if html is not None:
        from ..inputs import from_files
        from ..report.page import to_html

        heard = {clip.name: clip.waveform[0] for clip in from_files(audio)}
        written.append((html, to_html(document, heard)))
    if json_file == "-":
        shown = to_json(document)
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = 100
        with console.capture() as screen:
            print_screen(document, console)
        shown = screen.get().removesuffix("\n")
    for path, text in written:
        write_text(path, text)
    click.echo(shown)
    click.get_current_context().exit(0 if document["verdict"]["passed"] else 1)
