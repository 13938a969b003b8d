"""The report of a parity run on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_contentvec.terminal import wrapped

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
    _print(console, f"{headline(document)}  {verdict['reason']}", f"bold {colour}")
    for found in agreement(document):
        _print(console, f"{found.what:24} {found.written:>8}  {found.where}")
    for line in advice(document):
        _print(console, f"  {line}")
    if document["source"].get("stand_in"):
        _print(console, f"stand-in  {document['source']['stand_in']}", "yellow")
    _print(console, f"MLX on {device_line(document)}; against {reference_line(document)}")
    there = document["machine"]
    _print(console, f"{there['chip']}, {there['cores']} cores, {there['system']}")
    _print(
        console, "\nFeatures: MLX against PyTorch, then the error of each against float64", "bold"
    )
    console.print(_feature_table(document))
    _print(console, "\nStages, all clips together: error of MLX as a multiple of PyTorch's", "bold")
    console.print(_stage_table(document))
    for line in filter(
        None, (yardstick_line(document), tensor_line(document), tf32_line(document))
    ):
        _print(console, line)


def _print(console: Any, text: str, style: str = "") -> None:
    """A line, its label in ``style``; wrapped below the label on a terminal alone."""
    from rich.text import Text

    label = text.partition("  ")[0]
    shown = Text(wrapped(text, console.width) if console.is_terminal else text)
    shown.stylize(style, 0, len(label))
    console.print(shown, soft_wrap=True)


def _table(first: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 0, 0, 1))
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _feature_table(document: Mapping[str, Any]) -> Any:
    table = _table(
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
