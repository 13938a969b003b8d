"""``mlx-contentvec doctor``: what is here, and with ``--measure`` how well it works."""

from __future__ import annotations

import json

import click

from . import file_of


@click.command()
@click.option(
    "--measure",
    is_flag=True,
    help="Also compare a stand-in with the original and time it: about a minute, 600 MB of disk.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write the same as JSON; - for stdout.")
def doctor(measure: bool, json_file: str | None) -> None:
    """Say what this machine has to run the models with, to be pasted into an issue.

    Exit status: 0, or 1 if a known trouble was found or a comparison failed.
    """
    from mlx_contentvec.errors import ContentvecError
    from mlx_contentvec.files import check_reports, write_text
    from mlx_contentvec.terminal import Status, say

    from .. import doctor as examination

    report = file_of(json_file)
    check_reports([report] if report else [], [])
    document = examination.facts()
    if measure and document["device"] is not None:
        with Status() as status:
            try:
                document["measured"] = examination.measure(
                    document["device"]["kind"], status.update
                )
            except ContentvecError as error:
                document["troubles"].append(f"could not measure: {error.problem} ({error.found})")
        for sums, outcome in document.get("measured", {}).items():
            if not outcome["passed"]:
                document["troubles"].append(f"the comparison failed, {sums} sums")
    text = json.dumps(document, indent=2)
    if report is not None:
        write_text(report, text + "\n")
    if json_file == "-":
        click.echo(text)
    else:
        say(examination.to_text(document))
    click.get_current_context().exit(1 if document["troubles"] else 0)
