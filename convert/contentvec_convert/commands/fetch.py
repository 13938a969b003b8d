"""``mlx-contentvec fetch``: a source checkpoint, downloaded and proven."""

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
@click.option("--revision", help="Branch, tag or commit of a repository.")
@click.option("--force", is_flag=True, help="Replace another file that is there.")
@click.option("--list", "listed", is_flag=True, help="List what can be fetched, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def fetch(
    key: str,
    output: Path | None,
    revision: str | None,
    force: bool,
    listed: bool,
    as_json: bool,
) -> None:
    """Download the known checkpoint KEY (default: contentvec) from where its publisher keeps it.

    KEY may also be a repository on the Hugging Face Hub, OWNER/NAME, or a folder
    or file in it, OWNER/NAME/PATH.

    A file gets its name when its size and checksums are right, and not before:
    those that are known of it, else those that the Hub states. An interrupted
    download is kept in NAME.part and goes on from there.
    """
    if listed:
        _list(as_json)
        return
    with late_bar() as progress:
        fetched = fetch_file(
            key,
            output,
            revision=revision,
            force=force,
            progress=lambda done, total: progress("checking", done, total),
        )
    if as_json:
        first, *rest = [identity.to_dict() for identity in fetched.identities]
        document = {"path": str(fetched.path), "notes": list(fetched.notes), **first}
        click.echo(
            json.dumps({**document, "files": [first, *rest]} if rest else document, indent=2)
        )
        return
    for identity in fetched.identities:
        say(f"{fetched.path}  {identity.size:,} bytes")
        say(labelled("is", identity.known.what if identity.known else "unknown", width=8))
        say(labelled("md5", identity.md5, width=8))
        say(labelled("sha256", identity.sha256, width=8))
    for note in fetched.notes:
        say(labelled("note", note, width=8))


def _list(as_json: bool) -> None:
    rows = [row for row in KNOWN_FILES if row.fetchable]
    if as_json:
        click.echo(json.dumps([vars(row) for row in rows], indent=2))
        return
    width = max(len(row.key) for row in rows)
    for row in rows:
        size = f"{row.size / 1e6:,.0f} MB" if row.size else "size not known"
        say(f"{row.key:{width}}  {row.what} ({size})")
