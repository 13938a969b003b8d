"""The report of a parity run on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .document import (
    advice,
    agreement,
    device_line,
    feature_tables,
    figure,
    headline,
    reference_line,
    similarity,
    stage_entries,
    tensor_line,
    tf32_line,
    times,
    yardstick_line,
)


def print_screen(document: Mapping[str, Any], console: Any) -> None:
    """The verdict, then the features, the stages and the tensors, to a rich console."""
    verdict = document["verdict"]
    colour = "green" if verdict["passed"] else "red"
    console.print(f"[bold {colour}]{headline(document)}[/]  ", end="")
    console.print(verdict["reason"], highlight=False, markup=False)
    for found in agreement(document):
        console.print(
            f"{found.what:24} {found.written:>8}  {found.where}", highlight=False, markup=False
        )
    for line in advice(document):
        console.print(f"  {line}", highlight=False, markup=False)
    if document["source"].get("stand_in"):
        from rich.text import Text

        text = document["source"]["stand_in"]
        console.print(Text.assemble(("stand-in", "yellow"), f"  {text}"), highlight=False)
    console.print(
        f"MLX on {device_line(document)}; against {reference_line(document)}\n"
        f"{document['machine']['chip']}, {document['machine']['cores']} cores, "
        f"{document['machine']['system']}",
        highlight=False,
        markup=False,
    )
    console.print(_feature_table(document))
    console.print(_stage_table(document))
    for line in filter(
        None, (yardstick_line(document), tensor_line(document), tf32_line(document))
    ):
        console.print(line, highlight=False, markup=False)


def _table(title: str, first: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, padding=(0, 0, 0, 1)
    )
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _feature_table(document: Mapping[str, Any]) -> Any:
    table = _table(
        "\nFeatures: MLX against PyTorch, then the error of each against float64",
        "",
        "max absol.\ndifference",
        "cosine\nsimilarity",
        "largest\nMLX",
        "error\nPyTorch",
        "rms\nMLX",
        "error\nPyTorch",
    )
    for label, entries in feature_tables(document).items():
        table.add_row(f"[bold]{label}[/]")
        for entry in entries:
            if "problem" in entry:
                table.add_row(f"  {entry['clip']}", f"[red]{entry['problem']}[/]")
                continue
            mine, theirs, apart = entry["candidate"], entry["reference"], entry["apart"]
            table.add_row(
                f"  {entry['clip']}",
                figure(apart["max_abs"]),
                similarity(apart["cosine"]),
                figure(mine["max_abs"]),
                figure(theirs["max_abs"]),
                figure(mine["rms"]),
                figure(theirs["rms"]),
            )
    return table


def _stage_table(document: Mapping[str, Any]) -> Any:
    table = _table(
        "\nStages, all clips together: error of MLX as a multiple of PyTorch's",
        "",
        "from the audio\nrms",
        "\nlargest",
        "by itself\nrms",
        "\nlargest",
        "MLX rms\nerror",
    )
    verdict = document["verdict"]
    limit, alone = verdict["gates"]["ratio"], verdict["limits"]["wrong_by_itself"]

    def shown(entry: Mapping[str, Any] | None, metric: str, bound: float) -> str:
        if entry is None:
            return "-"
        value = entry["ratio"][metric]
        return f"[red]{times(value)}[/]" if value > bound else times(value)

    for name, (entry, local) in stage_entries(document).items():
        table.add_row(
            f"  {name}",
            shown(entry, "rms", limit),
            shown(entry, "max_abs", limit),
            shown(local, "rms", max(alone, limit)),
            shown(local, "max_abs", max(alone, limit)),
            figure(entry["candidate"]["rms"]) if "candidate" in entry else "-",
        )
    return table
