"""The errors of every stage as a plot: for the page (SVG) and for a model card (PNG)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import MissingDependency, import_hint, install_hint

from .document import headline, stage_entries

#: role -> (colour on paper, colour that stands for a CSS variable in the SVG)
COLOURS = {
    "ink": ("#1c2733", "#010101"),
    "muted": ("#66727f", "#020202"),
    "line": ("#d5dbe1", "#030303"),
    "mlx": ("#0b66c3", "#040404"),
    "pytorch": ("#c4650b", "#050505"),
}

#: kind of row -> what its plot is headed by
KINDS = {"stage": "From the audio", "local": "Each stage by itself"}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency(
            f"plots need matplotlib: {error}", hint=import_hint(error, install_hint("report"))
        ) from error
    return matplotlib


def _draw(axes: Any, document: Mapping[str, Any], kind: str, palette: Mapping[str, str]) -> None:
    """Errors of MLX and PyTorch, one line per stage, on a logarithmic axis."""
    entries = [
        (name, pair[0] if kind == "stage" else pair[1])
        for name, pair in stage_entries(document).items()
    ]
    drawn = [(name, entry) for name, entry in entries if entry and "candidate" in entry]
    places = range(len(drawn))
    half = all("half" in entry for _, entry in drawn)
    for metric, size, filled in (("max_abs", 14, False), ("rms", 26, True)):
        for who, marker, label in (("reference", "D", "PyTorch"), ("candidate", "o", "MLX")):
            colour = palette["mlx" if who == "candidate" else "pytorch"]
            what = "rms" if metric == "rms" else "largest"
            side = "half" if who == "reference" and half else who
            axes.scatter(
                [max(entry[side][metric], 1e-12) for _, entry in drawn],
                places,
                s=size,
                marker=marker,
                linewidths=0.9,
                facecolors=colour if filled else "none",
                edgecolors=colour,
                label=f"{label}, {what}",
                zorder=3 if who == "candidate" else 2,
            )
    axes.set_xscale("log")
    axes.set_yticks(list(places), [name for name, _ in drawn])
    axes.invert_yaxis()
    axes.set_title(KINDS[kind], loc="left", fontsize=10, color=palette["ink"])
    axes.set_xlabel("error against float64", color=palette["muted"])
    axes.grid(True, axis="x", color=palette["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor=palette["ink"], labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    legend = axes.legend(
        fontsize=7.5,
        ncols=2,
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1.02, 1.0),
        handletextpad=0.1,
        columnspacing=0.8,
        borderaxespad=0,
    )
    for text in legend.get_texts():
        text.set_color(palette["ink"])


def _height(document: Mapping[str, Any]) -> float:
    return 1.1 + 0.21 * len(stage_entries(document))


def _kinds(document: Mapping[str, Any]) -> list[str]:
    pairs = stage_entries(document).values()
    return ["stage"] + ["local"] * any(local is not None for _, local in pairs)


def stage_svg(document: Mapping[str, Any]) -> dict[str, str]:
    """Heading -> an inline ``<svg>`` whose colours are CSS variables (``--ink`` ...)."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    palette = {role: stand_in for role, (_, stand_in) in COLOURS.items()}
    found = {}
    for kind in _kinds(document):
        # text stays text, and the same document gives the same bytes
        settings = {"svg.fonttype": "none", "svg.hashsalt": kind, "font.size": 8}
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(4.4, _height(document)), layout="constrained")
            _draw(figure.subplots(), document, kind, palette)
            figure.patch.set_alpha(0)
            figure.axes[0].patch.set_alpha(0)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
        for role, (_, stand_in) in COLOURS.items():
            svg = svg.replace(stand_in, f"var(--{role})")
        svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 inherit; font-family: inherit", svg)
        # sized by the page; its title for those who cannot see it
        svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
        label = f"Errors of MLX and of PyTorch, stage by stage: {KINDS[kind].lower()}"
        found[KINDS[kind]] = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return found


def stage_plot(document: Mapping[str, Any], path: Path) -> None:
    """Write the same as a PNG on white, for a model card."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    kinds = _kinds(document)
    palette = {role: colour for role, (colour, _) in COLOURS.items()}
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(
            figsize=(4.6 * len(kinds), _height(document) + 0.3), layout="constrained", dpi=160
        )
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            _draw(axes, document, kind, palette)
        weights = document["weights"].get("name", "")
        figure.suptitle(
            f"{headline(document)}: {weights}, MLX and PyTorch "
            f"{document['yardsticks'].get('half', {}).get('dtype', 'float32')} against float64",
            fontsize=9,
            color=palette["ink"],
        )
        figure.savefig(path, format="png", facecolor="white", metadata={"Software": None})
