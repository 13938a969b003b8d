"""``mlx-contentvec package``, ``publish`` and ``verify``."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_contentvec.errors import printable
from mlx_contentvec.terminal import NamedPath, say

if TYPE_CHECKING:
    from ..publishing.evidence import Package

_FILE = NamedPath()
#: not in --help: the tools are tested with synthetic weights, and with nothing else so
_STAND_IN = click.option("--test-only-stand-in", "stand_in", is_flag=True, hidden=True)


def _repo_id(context: click.Context, parameter: click.Parameter, given: str) -> str:
    from mlx_contentvec.hub import is_repo_id

    if not is_repo_id(given):
        raise click.BadParameter(f"{given!r} is not like USER/NAME", context, parameter)
    return given


@click.command()
@click.argument("converted", type=_FILE)
@click.argument("folder", type=_FILE)
@click.option(
    "--parity", type=_FILE, help="Its parity report. Default: CONVERTED's name, .parity.json."
)
@click.option(
    "--recording",
    type=_FILE,
    help="A recording of the original. Default: CONVERTED's name, .recording.safetensors.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=_FILE,
    help="The same checkpoint in another number format, its .ledger.json and .parity.json "
    "beside it; may be given several times.",
)
@click.option(
    "--repo-id",
    metavar="USER/NAME",
    callback=lambda c, p, given: given and _repo_id(c, p, given),
    help="What the card tells readers to load.",
)
@click.option("--license", "license_id", help="The weights' license, as the Hub names it.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@_STAND_IN
def package(
    converted: Path,
    folder: Path,
    parity: Path | None,
    recording: Path | None,
    variants: tuple[Path, ...],
    repo_id: str | None,
    license_id: str | None,
    force: bool,
    as_json: bool,
    stand_in: bool,
) -> None:
    """Put CONVERTED and the evidence for it into FOLDER, ready to publish.

    The evidence is what the other commands leave behind: the ledger of `convert`,
    the report of `parity CHECKPOINT CONVERTED --json FILE`, and a recording of
    the original. Weights that have not passed parity are refused.
    """
    from ..publishing.package import package as make

    made = make(
        converted,
        folder,
        parity=parity,
        recording=recording,
        variants=variants,
        repo_id=repo_id,
        license_id=license_id,
        allow_stand_in=stand_in,
        force=force,
        step=_say,
    )
    if as_json:
        click.echo(json.dumps(_described(made), indent=2))
        return
    say(f"{folder}  {made.title}")
    _print_files(made)


@click.command()
@click.argument("folder", type=_FILE)
@click.option(
    "--repo-id", metavar="USER/NAME", required=True, callback=_repo_id, help="Where to publish it."
)
@click.option("--yes", is_flag=True, help="Do it. Without this, only say what would happen.")
@click.option("--public", is_flag=True, help="Let everybody see it. Default: a new one is private.")
@click.option("--replace", is_flag=True, help="Put it in place of another package of yours.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@_STAND_IN
def publish(
    folder: Path,
    repo_id: str,
    yes: bool,
    public: bool,
    replace: bool,
    as_json: bool,
    stand_in: bool,
) -> None:
    """Publish FOLDER, which `package` made, as a Hugging Face model repository.

    Says what would happen and stops, unless --yes is given. The files are
    uploaded aside, downloaded back and hashed, and only then shown; what breaks
    off is taken up again by running it again. The token is the one that
    `hf auth login` stored, or HF_TOKEN.
    """
    from ..publishing.card import render
    from ..publishing.package import addressed, open_package
    from ..publishing.publish import publish as upload

    _say(f"checking {folder}")
    found = open_package(folder, allow_stand_in=stand_in)
    if not yes:
        _preview(found, repo_id, public, render(found, repo_id), as_json)
        return
    found = addressed(found, repo_id)
    done = upload(found, repo_id, public=public, replace=replace, step=_say)
    if as_json:
        click.echo(json.dumps(vars(done), indent=2))
        return
    click.echo(f"{done.url}  {'private' if done.private else 'public'}")
    click.echo(f"  commit    {done.commit}" + ("" if done.changed else "  (was there already)"))
    click.echo(f"  proven    {len(found.names)} files downloaded back, every SHA-256 right")
    click.echo(f"  check it  mlx-contentvec verify {repo_id}")


@click.command()
@click.argument("name", metavar="REPO_OR_FOLDER")
@click.option("--revision", help="Branch, tag or commit of the repository.")
@click.option("--dtype", help="Verify this variant (float16, q8, ...) instead of the main file.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def verify(name: str, revision: str | None, dtype: str | None, as_json: bool) -> None:
    """Replay the recording that ships with published weights on this machine's device.

    Needs neither PyTorch nor fairseq. Says in one line how near MLX is to the
    original here. Exit status: 0 as near as it should be, 1 not, or refused.
    """
    # read by MLX when it starts: float32 products must be float32
    os.environ["MLX_ENABLE_TF32"] = "0"
    from ..publishing.verify import line, replay
    from ..report.document import to_json

    document = replay(name, revision=revision, dtype=dtype, step=_say)
    if as_json:
        click.echo(to_json(document))
    else:
        say(line(document, name))
    click.get_current_context().exit(0 if document["verdict"]["passed"] else 1)


def _say(text: str) -> None:
    """Name a step on stderr; the client's own bars may follow it."""
    with contextlib.suppress(OSError):  # nobody reads it
        click.secho(f"{printable(text)} ...", err=True, dim=True)


def _described(found: Package) -> dict[str, object]:
    return {
        "folder": str(found.folder),
        "title": found.title,
        "stand_in": found.stand_in,
        "formats": [evidence.dtype for evidence in found.evidence],
        "files": {
            name: {
                "size": (found.folder / name).stat().st_size,
                "sha256": found.hash_of(name),
            }
            for name in found.names
        },
    }


def _print_files(found: Package) -> None:
    width = max(map(len, found.names))
    for name in found.names:
        size = (found.folder / name).stat().st_size
        say(f"  {name:{width}}  {size:>13,} bytes  sha256 {found.hash_of(name)[:16]}")


def _preview(found: Package, repo_id: str, public: bool, card: str, as_json: bool) -> None:
    blobs = {found.hash_of(n): (found.folder / n).stat().st_size for n in found.names}
    if as_json:
        plan = {"repo_id": repo_id, "public": public, "upload": sum(blobs.values())}
        click.echo(json.dumps({**plan, **_described(found), "card": card}, indent=2))
        return
    click.echo(
        f"would publish {len(found.names)} files to {repo_id} "
        f"({'public' if public else 'private if it is new'}), "
        f"{sum(blobs.values()):,} bytes to send"
    )
    _print_files(found)
    click.echo("  README.md would read:\n")
    click.echo("\n".join(f"    {line}".rstrip() for line in card.splitlines()))
    click.echo("\nnothing was sent; --yes does it")
