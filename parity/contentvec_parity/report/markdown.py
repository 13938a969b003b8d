"""The report of a parity run as GitHub Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .document import (
    advice,
    agreement,
    device_line,
    extra_yardstick,
    feature_tables,
    figure,
    headline,
    reference_line,
    sentence,
    similarity,
    stage_entries,
    tensor_line,
    tf32_line,
    times,
    yardstick_line,
)


def to_markdown(document: Mapping[str, Any]) -> str:
    """The verdict, the features and the stages as GitHub Markdown."""
    verdict = document["verdict"]
    extra = extra_yardstick(document)
    sides = {"MLX": "candidate", "PyTorch": "reference", **({extra[1]: extra[0]} if extra else {})}
    headings = [
        *("features", "clip", "max absolute difference", "cosine similarity"),
        *(f"{side} {metric}" for metric in ("max", "rms") for side in sides),
        "worst frame's cosine",
    ]
    lines = [f"**Parity: {headline(document).lower()}.** {sentence(verdict['reason'])}", ""]
    lines += [f"- {found.what}: {found.written} ({found.where})" for found in agreement(document)]
    lines += [""]
    lines += [f"- {sentence(line.strip())}" for line in advice(document)]
    if document["source"].get("stand_in"):
        lines += [f"> Stand-in: {document['source']['stand_in']}", ""]
    lines += [
        "",
        f"MLX on {device_line(document)}, against {reference_line(document)}; "
        f"{document['machine']['chip']}, {document['machine']['system']}. "
        "The first two figures of a row compare MLX with PyTorch, as the last one does; errors are "
        "those of each against the same model in float64.",
        "",
        "| " + " | ".join(headings) + " |",
        "|---" * len(headings) + "|",
    ]
    for label, entries in feature_tables(document).items():
        for entry in entries:
            if "problem" in entry:
                empty = " |" * (len(headings) - 3)
                lines.append(f"| {label} | {entry['clip']} | {entry['problem']} |{empty}")
                continue
            apart = entry["apart"]
            cells = [
                label,
                entry["clip"],
                figure(apart["max_abs"]),
                similarity(apart["cosine"]),
                *(
                    figure(entry[side][metric]) if side in entry else "-"
                    for metric in ("max_abs", "rms")
                    for side in sides.values()
                ),
                similarity(apart["worst_frame_cosine"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Error of MLX as a multiple of PyTorch's, all clips together:",
        "",
        "| stage | from the audio, rms | max | by itself, rms | max |",
        "|---|---|---|---|---|",
    ]
    for stage, pair in stage_entries(document).items():
        ratios = [
            "-" if entry is None else times(entry["ratio"][metric])
            for entry in pair
            for metric in ("rms", "max_abs")
        ]
        lines.append("| " + " | ".join([stage, *ratios]) + " |")
    for line in (yardstick_line(document), tensor_line(document), tf32_line(document)):
        lines += ["", line] if line else []
    lines.append("")
    return "\n".join(lines)
