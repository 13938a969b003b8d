"""``mlx-contentvec fetch``: a known source checkpoint, downloaded and proven."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click

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
    path, identity = fetch_file(key, output, force=force, progress=_checking())
    if as_json:
        click.echo(json.dumps({"path": str(path), **identity.to_dict()}, indent=2))
        return
    click.echo(f"{path}  {identity.size:,} bytes")
    click.echo(f"  is      {identity.known.what if identity.known else 'unknown'}")
    click.echo(f"  md5     {identity.md5}")
    click.echo(f"  sha256  {identity.sha256}")


def _checking() -> Callable[[int, int], None]:
    """A bar on stderr that appears with the first byte checked and goes with the last."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(transient=True, console=Console(stderr=True))
    task = bar.add_task("checking")

    def checked(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return checked


def _list(as_json: bool) -> None:
    rows = [row for row in KNOWN_FILES if row.hub_path]
    if as_json:
        click.echo(json.dumps([vars(row) for row in rows], indent=2))
        return
    width = max(len(row.key) for row in rows)
    for row in rows:
        size = f"{row.size / 1e6:,.0f} MB" if row.size else "size not known"
        click.echo(f"{row.key:{width}}  {row.what} ({size})")
