"""``mlx-contentvec standin``: make a checkpoint to try everything with."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import click

from mlx_contentvec.terminal import say

from ..standin.weights import DEFAULT_SEED, DTYPES, PRESETS, marker
from ..standin.write import write_standin


@click.command()
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="base",
    show_default=True,
    help="Size and conventions; base has those of hubert_base.pt (189.5 MB).",
)
@click.option("--seed", default=DEFAULT_SEED, show_default=True, type=click.IntRange(min=0))
@click.option(
    "--with",
    "made_with",
    type=click.Choice(["torch", "fairseq"]),
    default="torch",
    show_default=True,
    help="What writes it; fairseq's own trainer writes the same contents.",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="float16", show_default=True)
@click.option("--legacy-format", is_flag=True, help="Torch's file format from before 1.6.")
@click.option("--optimizer-state", is_flag=True, help="Keep Adam's moments: five times the size.")
@click.option("--force", is_flag=True, help="Overwrite OUTPUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def standin(
    output: Path,
    preset: str,
    seed: int,
    made_with: str,
    dtype: str,
    legacy_format: bool,
    optimizer_state: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write OUTPUT, a checkpoint like hubert_base.pt whose weights are synthetic.

    It has the form of the real file and is good for trying and testing the
    tools. Its features mean nothing.
    """
    from rich.console import Console
    from rich.progress import Progress

    # fairseq reports every step of setting up a training run
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("making weights", total=None)
        write_standin(
            output,
            preset,
            seed=seed,
            dtype=dtype,
            made_with=made_with,
            legacy=legacy_format,
            optimizer_state=optimizer_state,
            force=force,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    size = output.stat().st_size
    if as_json:
        facts = {
            "path": str(output),
            "size": size,
            "preset": preset,
            "seed": seed,
            "dtype": dtype,
            "made_with": made_with,
            "stand_in": marker(preset, seed),
        }
        click.echo(json.dumps(facts, indent=2))
        return
    say(f"wrote {output}: {size:,} bytes, {dtype}")
    click.echo(marker(preset, seed))
    say(f"It is in no table of known files: mlx-contentvec convert {output} --allow-unknown")
