"""``mlx-contentvec convert`` and ``mlx-contentvec inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .conversion import convert as convert_checkpoint
from .precision import PRECISIONS


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(PRECISIONS)), default="float32", show_default=True)
@click.option("--allow-unknown", is_flag=True)
@click.option("--expect-md5")
@click.option("--expect-sha256")
@click.option("--force", is_flag=True)
@click.option("--heads", type=click.IntRange(min=1))
@click.option("--normalize/--no-normalize", default=None)
@click.option("--json", "as_json", is_flag=True)
def convert(source, output, as_json, **options):
    """Convert."""
    ledger = convert_checkpoint(source, output, **options)
    if as_json:
        click.echo(json.dumps(ledger.to_dict()))
    else:
        click.echo(f"{ledger.output} {ledger.source_tensors}")
