"""``mlx-contentvec fetch``: a known source checkpoint, downloaded and proven."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_contentvec.terminal import labelled, late_bar, say

from ..fetch import fetch as fetch_file
from ..known_files import KNOWN_FILES


@click.command()
@click.argument("key", default="contentvec")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where to write it. Default: its own name, in the current folder.",
)
@click.option("--force", is_flag=True, help="Replace another file that is there.")
@click.option("--list", "listed", is_flag=True, help="List what can be fetched, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def fetch(key: str, output: Path | None, force: bool, listed: bool, as_json: bool) -> None:
    """Download the known checkpoint KEY (default: contentvec) from where its publisher keeps it.

    It gets its name when its size and checksums are right, and not before. An
    interrupted download is kept in NAME.part and goes on from there.
    """
    if listed:
        _list(as_json)
        return
    with late_bar() as progress:
        path, identity = fetch_file(
            key, output, force=force, progress=lambda done, total: progress("checking", done, total)
        )
    if as_json:
        click.echo(json.dumps({"path": str(path), **identity.to_dict()}, indent=2))
        return
    click.echo(f"{path}  {identity.size:,} bytes")
    say(labelled("is", identity.known.what if identity.known else "unknown", width=8))
    say(labelled("md5", identity.md5, width=8))
    say(labelled("sha256", identity.sha256, width=8))


def _list(as_json: bool) -> None:
    rows = [row for row in KNOWN_FILES if row.hub_path]
    if as_json:
        click.echo(json.dumps([vars(row) for row in rows], indent=2))
        return
    width = max(len(row.key) for row in rows)
    for row in rows:
        size = f"{row.size / 1e6:,.0f} MB" if row.size else "size not known"
        say(f"{row.key:{width}}  {row.what} ({size})")
