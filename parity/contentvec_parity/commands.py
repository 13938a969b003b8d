"""``mlx-contentvec parity``: run, record, and judge a saved run again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


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
        others = [name for name in self.commands if name != "run"]
        lines = [f"  {name:8}{self.commands[name].get_short_help_str(80)}" for name in others]
        return text + "\n\nSubcommands:\n" + "\n".join(lines)


@click.group(cls=RunByDefault, context_settings={"help_option_names": ["-h", "--help"]})
def parity() -> None:
    """Compare the MLX model with the original."""


@parity.command("run")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("converted", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    metavar="NAME|FILE",
    help="fairseq, transformers, or a recording (.safetensors). Default: what is installed.",
)
@click.option(
    "--audio",
    "audio",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Also compare on this audio file; may be given several times.",
)
@click.option("--quick", is_flag=True, help="Only the six built-in clips; seconds, not a minute.")
@click.option("--thorough", is_flag=True, help="Also every remainder of the hop, and 1 to 30 s.")
@click.option("--json", "json_file", metavar="FILE", help="Write the report as JSON; - for stdout.")
@click.option(
    "--ratio",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="Largest allowed error of MLX, as a multiple of PyTorch's.",
)
@click.option(
    "--max-abs",
    type=click.FloatRange(min=0),
    help="Largest allowed difference of any feature from the truth.",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(-1, 1),
    help="Smallest allowed cosine of any frame with the truth.",
)
def run(
    checkpoint: Path,
    converted: Path,
    reference: str | None,
    audio: tuple[Path, ...],
    quick: bool,
    thorough: bool,
    json_file: str | None,
    ratio: float,
    max_abs: float | None,
    min_cosine: float | None,
) -> None:
    """Run the original and the MLX model side by side and say how far apart they are.

    CHECKPOINT is the original (a fairseq .pt file or a Hugging Face folder),
    CONVERTED what `mlx-contentvec convert` made of it. Both are measured against
    the same model in float64: MLX passes if, in every stage, it is no further
    from that truth than --ratio times PyTorch's own float32 is.

    Exit status: 0 passed, 1 failed or refused, 2 wrong usage.
    """
    if quick and thorough:
        raise click.UsageError("--quick and --thorough exclude each other")
    # read by MLX when it starts: float32 products must be float32
    os.environ["MLX_ENABLE_TF32"] = "0"
    from .harness import compare_files
    from .verdict import Gates

    document = compare_files(
        checkpoint,
        converted,
        reference=reference,
        audio=audio,
        inputs="built-in" if quick else "thorough" if thorough else "standard",
        gates=Gates(ratio=ratio, max_abs=max_abs, min_cosine=min_cosine),
    )
    _deliver(document, json_file)


def _deliver(document: dict[str, Any], json_file: str | None) -> None:
    """Write and print what was asked for, and end with the verdict's status."""
    from .report import print_screen, to_json

    if json_file == "-":
        click.echo(to_json(document))
    else:
        if json_file is not None:
            Path(json_file).write_text(to_json(document) + "\n", encoding="utf-8")
        from rich.console import Console

        print_screen(document, Console(width=None, soft_wrap=False))
    click.get_current_context().exit(0 if document["verdict"]["passed"] else 1)
