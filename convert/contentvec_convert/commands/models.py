"""``mlx-contentvec models``: the embedders that are known, and what is known of each."""

from __future__ import annotations

import dataclasses
import json

import click

from mlx_contentvec.config import PRESETS
from mlx_contentvec.terminal import say

from ..known_files import KNOWN_FILES, KnownFile

_INPUT = {True: "normalised", False: "as it is", None: "as its files say"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def models(as_json: bool) -> None:
    """List the known embedders: what each is, how its input is scaled, where it lives.

    A file is recognised by its checksums, never by its name. The files marked
    "no checksum known" exist, and no file can be proven to be one of them: those
    that can be fetched are held to what the Hub states and to their architecture.
    """
    if as_json:
        click.echo(json.dumps([_facts(row) for row in KNOWN_FILES], indent=2))
        return
    for row in KNOWN_FILES:
        preset = PRESETS[row.architecture]
        click.echo(f"{row.key}")
        say(f"  {row.what}")
        say(
            f"  {row.architecture}: {preset.encoder_layers} layers, {preset.encoder_embed_dim} "
            f"wide; input {_INPUT[row.normalize]}"
        )
        say(f"  {row.home}  ({_availability(row)})")


def _availability(row: KnownFile) -> str:
    size = "" if row.size is None else f"{row.size:,} bytes, "
    if not row.fetchable:
        return f"{size}no checksum known: convert it with --allow-unknown"
    if not row.verifiable:
        return f"no checksum known, identified by where it lies: mlx-contentvec convert {row.key}"
    return f"{size}mlx-contentvec fetch {row.key}"


def _facts(row: KnownFile) -> dict[str, object]:
    preset = PRESETS[row.architecture]
    return {
        **dataclasses.asdict(row),
        "layers": preset.encoder_layers,
        "width": preset.encoder_embed_dim,
        "recognisable": row.verifiable,
        "fetchable": row.fetchable,
    }
