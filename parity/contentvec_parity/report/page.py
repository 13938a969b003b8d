"""The report as one self-contained HTML page: no network, light and dark, for any screen."""

from __future__ import annotations

import base64
import functools
import importlib
import io
import wave
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.errors import MissingDependency, import_hint, install_hint

from ..inputs import INPUT_SETS, SAMPLE_RATE
from ..references.recording import small
from . import document as report
from .plots import stage_svg

#: a clip longer than this is not put into the page
LISTENABLE_SECONDS = 35.0

#: horizontal steps of a drawn waveform
OUTLINE_STEPS = 360


def to_html(
    document: Mapping[str, Any], waveforms: Mapping[str, NDArray[np.float32]] | None = None
) -> str:
    """The page of a report.

    waveforms: clip name -> (samples,) of the user's own files, which a report does
               not hold; the clips made from seeds are made again

    Raises MissingDependency if jinja2 or matplotlib is not installed.
    """
    require_packages()
    # the first two sets are played as well; the third is large, and drawn where it is the worst
    own = {name: waveform[None] for name, waveform in (waveforms or {}).items()}
    heard = {**_made_again(document, "built-in", "standard"), **own}
    drawn = heard
    if any(
        "file" not in clip["origin"] and clip["name"] not in heard for clip in document["clips"]
    ):
        drawn = {**_made_again(document, "thorough"), **heard}
    page: str = _template().render(
        document=document,
        verdict=document["verdict"],
        headline=report.headline(document),
        reason=report.sentence(document["verdict"]["reason"]),
        agreement=report.agreement(document),
        advice=report.advice(document),
        device=report.device_line(document),
        reference=report.reference_line(document),
        tensors=report.tensor_line(document),
        tf32=report.tf32_line(document),
        yardstick=report.yardstick_line(document),
        extra=report.extra_yardstick(document),
        features=report.feature_tables(document),
        stages=report.stage_entries(document),
        worst=worst_frames(document, drawn),
        plots=stage_svg(document),
        clips=[{**clip, "audio": _playable(heard, clip)} for clip in document["clips"]],
    )
    return page


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": report.figure,
        "times": report.times,
        "similarity": report.similarity,
    }
    text = files(__package__).joinpath("templates/parity.html.jinja").read_text("utf-8")
    return environment.from_string(text)


def require_packages() -> None:
    """Raise MissingDependency now, and not after a run, if the page could not be made."""
    for name in ("jinja2", "matplotlib"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingDependency(
                f"the page needs {name}: {error}", hint=import_hint(error, install_hint("report"))
            ) from error


def _made_again(document: Mapping[str, Any], *sets: str) -> dict[str, NDArray[np.float32]]:
    """The clips of ``sets`` that were made from seeds: name -> (batch, samples)."""
    wanted = {clip["name"]: clip["origin"] for clip in document["clips"]}
    if document["reference"]["name"] == "recording":
        made = [clip for clip, _ in small()]
    else:
        made = [clip for name in sets for clip in INPUT_SETS[name]()]
    return {clip.name: clip.waveform for clip in made if wanted.get(clip.name) == clip.origin}


def _playable(heard: Mapping[str, NDArray[np.float32]], clip: Mapping[str, Any]) -> str | None:
    """A clip as a ``data:`` URI of 16-bit PCM; None if there is nothing to play."""
    if clip["name"] not in heard or clip["seconds"] > LISTENABLE_SECONDS:
        return None
    waveform = heard[clip["name"]][0]
    samples = np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


def worst_frames(
    document: Mapping[str, Any], heard: Mapping[str, NDArray[np.float32]]
) -> list[dict[str, Any]]:
    """For each kind of features, the frame of any clip that is furthest off, and where it is."""
    found = []
    for label in dict.fromkeys(
        row["name"] for row in document["stages"] if row["kind"] == "features" and row["comparable"]
    ):
        rows = [
            row
            for row in document["stages"]
            if row["kind"] == "features" and row["name"] == label and row["comparable"]
        ]
        if rows[0].get("variant"):
            continue
        row = min(rows, key=lambda row: row["candidate"]["worst_frame_cosine"])
        batch, frame = row["candidate"]["worst_frame_at"]
        config = document["config"]
        hop = int(np.prod([stride for _, _, stride in config["conv_layers"]]))
        start = frame * hop / config["sample_rate"]
        entry: dict[str, Any] = {
            "features": label,
            "clip": row["clip"],
            "frame": frame,
            "row": batch,
            "seconds": start,
            "mlx": row["candidate"]["worst_frame_cosine"],
            "pytorch": row["reference"]["worst_frame_cosine"],
            "outline": None,
        }
        if row["clip"] in heard:
            waveform = heard[row["clip"]][batch]
            entry["outline"] = _outline(waveform)
            entry["mark"] = round((frame * hop + 200) / len(waveform) * OUTLINE_STEPS, 1)
        found.append(entry)
    return found


def _outline(waveform: NDArray[np.float32]) -> str:
    """A waveform's outline as the points of an SVG polygon, 360 wide and 60 high."""
    steps = min(OUTLINE_STEPS, len(waveform))
    pieces = np.array_split(waveform, steps)
    peak = max(float(np.abs(waveform).max()), 1e-9)
    x = np.linspace(0, OUTLINE_STEPS, steps)
    upper = [30 - 28 * float(piece.max()) / peak for piece in pieces]
    lower = [30 - 28 * float(piece.min()) / peak for piece in pieces]
    points = [*zip(x, upper, strict=True), *reversed(list(zip(x, lower, strict=True)))]
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
