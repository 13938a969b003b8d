"""A bench document on the screen, and as a plot."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import MissingDependency, OutputError, import_hint, install_hint
from mlx_contentvec.files import write_bytes

Document = Mapping[str, Any]

MB = 1e6


def print_screen(document: Document, console: Any) -> None:
    """Tables: starting from nothing, the steady state with its memory, and errors; or live."""
    settings, machine = document["settings"], document["machine"]
    device = machine["device"]
    console.print(
        f"{machine['chip']}, {machine['system']}, on {settings['device']}"
        f" ({device.get('blas') or device.get('device_name', device['kind'])}), "
        f"{settings['threads']} thread(s), load average {document['load_average']:.1f} at the start"
    )
    console.print(", ".join(f"{name} {number}" for name, number in document["versions"].items()))
    if document["stand_in"]:
        console.print("The weights are a stand-in's: times are as with real ones.")
    yardstick, repeats = document["yardstick"], settings["repeats"]
    if settings["live"]:
        from mlx_contentvec.live import BLOCK, CONTEXT

        console.print(
            f"\nLive: a block of {1000 * BLOCK:g} ms behind {CONTEXT:g} s of context, as RVC's "
            f"real-time window has them; {repeats} blocks"
        )
        console.print(_blocks(document, BLOCK))
        console.print(
            f"x is of {yardstick}, which computes a window of the same length; what is above "
            f"{1000 * BLOCK:g} ms does not keep up"
        )
        return
    console.print("\nA new process: weights in, features of one second of audio out")
    console.print(_starts(document))
    console.print(f"\nOnce warm, median of {repeats}; memory is what comes on top of the model")
    console.print(_steady(document))
    console.print(
        f"x is of {yardstick}, or of transformers in the same dtype where that ran; the floor is "
        "the matrix products alone, at full speed"
    )
    if document["errors"]:
        console.print(f"\nDistance from float64 at {document['errors'][0]['stage']}, 3 s of audio")
        console.print(_errors(document))


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / MB:,.0f} MB"


def _starts(document: Document) -> Any:
    table = _table(
        "",
        "file",
        "loaded",
        "features",
        "x",
        "CPU",
        "x",
        "peak",
    )
    for row in document["cold"]:
        table.add_row(
            row["engine"],
            _megabytes(row["size"]),
            f"{row['loaded']:.2f} s",
            f"{row['first_features']:.2f} s",
            _times(row["first_features_ratio"]),
            f"{row['cpu']:.2f} s",
            _times(row["cpu_ratio"]),
            _megabytes(row["peak"]),
        )
    return table


def _blocks(document: Document, block: float) -> Any:
    table = _table("", "block", "slowest", "x", "CPU", "of real time")
    for row in document["steady"]:
        table.add_row(
            row["engine"],
            f"{1000 * row['wall']:.0f} ms",
            f"{1000 * max(sample['wall'] for sample in row['samples']):.0f} ms",
            _times(row["wall_ratio"]),
            f"{1000 * row['cpu']:.0f} ms",
            f"{100 * row['wall'] / block:.0f} %",
        )
    return table


def _steady(document: Document) -> Any:
    table = _table(
        "",
        "audio",
        "wall",
        "x",
        "CPU",
        "x",
        "real time",
        "memory",
    )
    memory = {
        (row["engine"], row["seconds"], row["batch"]): row["above_the_model"]
        for row in document["memory"]
    }
    previous = None
    for row in document["steady"]:
        case = (row["seconds"], row["batch"])
        if previous not in (None, case):
            table.add_section()
        previous = case
        clips = "" if row["batch"] == 1 else f"{row['batch']} x "
        table.add_row(
            row["engine"],
            f"{clips}{row['seconds']:g} s",
            f"{row['wall']:.3f} s",
            _times(row["wall_ratio"]),
            f"{row['cpu']:.3f} s",
            _times(row["cpu_ratio"]),
            f"{row['seconds'] * row['batch'] / row['wall']:.1f} x",
            _megabytes(memory.get((row["engine"], *case))),
        )
    return table


def _errors(document: Document) -> Any:
    table = _table("", "rms", "max")
    for row in document["errors"]:
        table.add_row(row["engine"], f"{row['rms']:.1e}", f"{row['max']:.1e}")
    return table


#: what a plot may end in
_PLOT_SUFFIXES = (".svg", ".png", ".pdf")


def require_plot(path: Path) -> Any:
    """matplotlib's pyplot: ``path`` can be drawn with it.

    Raises MissingDependency without matplotlib, OutputError for a suffix of no known format.
    """
    if path.suffix.lower() not in _PLOT_SUFFIXES:
        raise OutputError(
            f"cannot draw {path.name}: its suffix says in which format",
            expected=f"a name that ends in {', '.join(_PLOT_SUFFIXES)}",
        )
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingDependency(
            f"drawing a plot needs matplotlib: {error}",
            hint=import_hint(error, install_hint("report")),
        ) from None
    return pyplot


def plot(document: Document, path: Path) -> None:
    """Time and memory against the length of the audio, one line an engine, batch 1.

    Raises what :func:`require_plot` does, and OutputError if it cannot be written.
    """
    pyplot = require_plot(path)
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for engine in (engine["label"] for engine in document["engines"]):
        label = "floor: the matrix products alone" if engine == "floor" else engine
        for axes, table, key, unit in (
            (time, "steady", "wall", 1.0),
            (memory, "memory", "above_the_model", MB),
        ):
            points = [
                (row["seconds"], row[key] / unit)
                for row in document[table]
                if row["engine"] == engine and row["batch"] == 1 and row[key] is not None
            ]
            if points:
                dashes = {"linestyle": "dashed", "color": "grey"} if engine == "floor" else {}
                axes.plot(*zip(*points, strict=True), marker="o", label=label, **dashes)
    time.set(xlabel="seconds of audio", ylabel="seconds", title="Time of one clip")
    memory.set(xlabel="seconds of audio", ylabel="MB above the model", title="Memory of one clip")
    for axes in (time, memory):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    time.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.lower().removeprefix("."))
    pyplot.close(figure)
    write_bytes(path, drawn.getvalue())
