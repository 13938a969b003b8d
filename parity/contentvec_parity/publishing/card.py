"""The model card: ``templates/README.md.jinja``, filled from the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentvec_convert.known_files import KNOWN_FILES, KnownFile
from mlx_contentvec.errors import MissingDependency, install_hint

from ..report import document as report
from . import evidence as files
from .evidence import Evidence, Package

TAGS = ("mlx", "audio", "speech", "hubert", "contentvec", "voice-conversion", "rvc")
#: the layers that RVC takes its features from, where a model has them
RVC_LAYERS = {"v1": 9, "v2": 12}
_TEMPLATES = Path(__file__).parent / "templates"
_HUB = "https://huggingface.co/"


# figures ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, the figure of an entry, and how it is written."""

    heading: str
    figure: Callable[[Mapping[str, Any]], float | None]
    written: Callable[[float], str]


def _error(value: float) -> str:
    return report.figure(value)


def _ratio(value: float) -> str:
    return f"{report.times(value)} x"


def _decibels(value: float) -> str:
    return f"{value:.1f} dB"


def _cosine(value: float) -> str:
    return report.similarity(value)


def megabytes(size: float) -> str:
    """``378.9 MB``; ``41.2 kB`` for what is small."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


#: one row per call that gives features; an entry of the verdict's summary
FEATURE_COLUMNS = (
    Column("MLX, rms error", lambda e: e["candidate"]["rms"], _error),
    Column("PyTorch, rms error", lambda e: e["reference"]["rms"], _error),
    Column("MLX / PyTorch", lambda e: e["ratio"]["rms"], _ratio),
    Column("MLX, largest error", lambda e: e["candidate"]["max_abs"], _error),
    Column("PyTorch, largest error", lambda e: e["reference"]["max_abs"], _error),
)

#: one row per number format; a parity document
VARIANT_COLUMNS = (
    Column("size", lambda d: d["weights"]["size"], megabytes),
    Column("SNR", lambda d: _lowest(d, "snr_db"), _decibels),
    Column("worst frame's cosine", lambda d: _lowest(d, "worst_frame_cosine"), _cosine),
    Column("largest error", lambda d: _highest(d, "max_abs"), _error),
)


def _features(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row["candidate"] for row in document["stages"] if row["kind"] == "features"]


def _lowest(document: Mapping[str, Any], metric: str) -> float | None:
    """Of the features of all clips; None where each equals the truth."""
    return min((m[metric] for m in _features(document) if m[metric] is not None), default=None)


def _highest(document: Mapping[str, Any], metric: str) -> float:
    return max(float(m[metric]) for m in _features(document))


def _summaries(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Features -> their entry; of several calls that return the same features, the first."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in document["verdict"]["summary"]:
        if entry["kind"] == "features":
            found.setdefault(entry["stage"], entry)
    return {entry["name"]: entry for entry in found.values()}


def _table(
    first: str, columns: Sequence[Column], rows: Iterable[tuple[str, Mapping[str, Any]]]
) -> str:
    lines = [
        "| " + " | ".join([first, *(column.heading for column in columns)]) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for label, entry in rows:
        figures = [column.figure(entry) for column in columns]
        written = [
            "-" if f is None else c.written(f) for c, f in zip(columns, figures, strict=True)
        ]
        lines.append("| " + " | ".join([label, *written]) + " |")
    return "\n".join(lines)


# the card --------------------------------------------------------------------------


def render(package: Package, address: str) -> str:
    """The text of README.md. ``address``: what readers are told to load.

    Raises MissingDependency without jinja2.
    """
    main = package.evidence[0]
    document, config, source = main.parity, package.config, main.source
    known = _known(source)
    features = config["features"]
    labels = _labels(document, features)
    return fill(
        "README.md.jinja",
        license=config["license"],
        base_model=_base_model(known),
        tags=TAGS,
        title=package.title,
        stand_in=main.stand_in,
        what=_what(known, source),
        hop_ms=f"{1000 * config['hop'] / config['sample_rate']:g}",
        page=files.PAGE,
        parity=files.PARITY,
        plot=files.PLOT,
        ledger=files.LEDGER,
        recording=files.RECORDING,
        address=address,
        uses=_uses(features),
        extract_options=_extract_options(features),
        verdict=document["verdict"]["reason"],
        dtype=config["dtype"],
        half=config["dtype"] != "float32",
        features_table=_table(
            "features",
            FEATURE_COLUMNS,
            [(labels[name], entry) for name, entry in _summaries(document).items()],
        ),
        context=_context(document),
        variants=list(config["variants"]),
        variants_table=_table(
            "format",
            VARIANT_COLUMNS,
            [(f"`{e.dtype}`", e.parity) for e in package.evidence],
        ),
        source=source,
        home=known.home if known else None,
        source_size=f"{source['size']:,}",
        ledger_line=_ledger_line(package.evidence),
        files_table=_files_table(package),
        normalize=config["normalize"],
        receptive_field=config["receptive_field"],
        english=known is not None and known.key.startswith("content"),
        group_norm=config["model"]["extractor_norm"] == "group",
        license_line=_license_line(config["license"], known),
        version=package.version,
    )


def fill(template: str, **facts: Any) -> str:
    """A template of this package with ``facts`` in it. Raises MissingDependency without jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependency("a model card needs jinja2", hint=install_hint("report")) from error
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return str(environment.get_template(template).render(**facts))


def _known(source: Mapping[str, Any]) -> KnownFile | None:
    return next((row for row in KNOWN_FILES if row.key == source.get("known_as")), None)


def _base_model(known: KnownFile | None) -> str | None:
    if known is None or not known.home.startswith(_HUB):
        return None
    return known.home.removeprefix(_HUB)


def _what(known: KnownFile | None, source: Mapping[str, Any]) -> str:
    if known is None:
        return f"A HuBERT-family speech encoder, converted from `{source['name']}`."
    if known.key.startswith("content"):
        return (
            "[ContentVec](https://arxiv.org/abs/2204.09224) turns speech into features of what is\n"
            "said with little of who says it. This is the ContentVec that RVC voice conversion\n"
            f"loads as `{known.names[0]}`."
        )
    return f"{known.what}, converted from `{source['name']}`."


def _uses(features: Mapping[str, Any]) -> list[dict[str, str]]:
    """A line of code for each RVC version that the weights serve."""
    found = []
    for name, version in (("rvc_v2", "v2"), ("rvc_v1", "v1")):
        if name not in features:
            continue
        how = features[name]
        arguments = f"layer={how['output_layer']}" + (
            ", project=True" if how.get("project") else ""
        )
        if how["output_layer"] == RVC_LAYERS[version]:
            arguments = f'version="{version}"'
        found.append(
            {
                "code": f"{version} = model.extract(waveform, {arguments})",
                "comment": f"RVC {version}: (frames, {how['width']})",
            }
        )
    return found


def _extract_options(features: Mapping[str, Any]) -> str:
    """What `extract` must be told for a model whose last layer is not RVC v2's."""
    last = features["rvc_v2"]["output_layer"]
    return "" if last == RVC_LAYERS["v2"] else f" --layer {last}"


def _labels(document: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, str]:
    """What each call of the report is called in the card: its layer, and who uses it."""
    labels = {name: name for name in _summaries(document)}
    for version in ("rvc_v1", "rvc_v2"):
        if version not in features:
            continue
        how = features[version]
        name = f"layer {how['output_layer']}" + (" + projection" if how.get("project") else "")
        if name in labels:
            labels[name] = f"{name} (RVC {version[-2:]})"
    return labels


def _context(document: Mapping[str, Any]) -> str:
    clips = document["clips"]
    shortest, longest = (f(clip["samples"] for clip in clips) for f in (min, max))
    rate = document["config"]["sample_rate"]
    files = sum("file" in clip["origin"] for clip in clips)
    made = f"{files} of them audio files, the rest" if files else "all"
    return (
        f"Measured on {len(clips)} inputs from {shortest:,} samples to {longest / rate:g} s "
        f"(speech-like, quiet, silent; {made} made from seeds that the report names), "
        f"{document['created'][:10]}, on {document['machine']['chip']}, "
        f"{document['machine']['system']}. MLX ran on {report.device_line(document)}; the "
        f"original was {report.reference_line(document)}. Other devices round differently: "
        "`verify` measures yours."
    )


def _ledger_line(evidence: Sequence[Evidence]) -> str:
    lines = []
    for found in evidence:
        counts = found.ledger["counts"]
        exact, written = counts["exact"], counts["written"]
        line = (
            f"`{found.dtype}`: {exact} of {written} tensors hold the checkpoint's values "
            "bit for bit"
        )
        if exact < written:
            inexact = [row for row in found.ledger["tensors"] if not row["exact"]]
            how = sorted({_why_inexact(row) for row in inexact})
            line += f"; {written - exact} {'is' if written - exact == 1 else 'are'} " + " or ".join(
                how
            )
        lines.append(f"- {line}.")
    counts = evidence[0].ledger["counts"]
    return (
        f"All {counts['source_tensors']} tensors of the checkpoint are accounted for; "
        f"{counts['dropped']} of them the features do not need, each with its reason in the "
        "ledger. Read back from the disk and undone:\n\n" + "\n".join(lines)
    )


def _why_inexact(row: Mapping[str, Any]) -> str:
    if row["encoding"] != "plain":
        return "quantised"
    return (
        "computed (the weight norm of the positional convolution, folded)"
        if len(row["sources"]) > 1
        else "rounded to the format"
    )


def _files_table(package: Package) -> str:
    what = {
        files.MODEL: f"the weights, {package.config['dtype']}",
        files.EARLIER_NAME: "the same file, stored once, under the name that earlier users load",
        "config.json": "architecture, provenance, variants",
        files.PAGE: "the validation report",
        files.PARITY: "its data",
        files.PLOT: "its picture",
        files.LEDGER: "what became of every tensor",
        files.RECORDING: "inputs and the original's outputs, for `verify`",
        files.LICENSE: "the license",
    }
    for dtype, row in package.config["variants"].items():
        what[row["file"]] = f"the weights, {dtype}"
        what[f"{files.LEDGER[:-5]}.{dtype}.json"] = f"what became of every tensor, {dtype}"
        what[f"{files.PARITY[:-5]}.{dtype}.json"] = f"the report's data, {dtype}"
    lines = ["| file | what | size |", "| --- | --- | ---: |"]
    for name, about in what.items():
        size = (package.folder / name).stat().st_size
        lines.append(f"| [`{name}`]({name}) | {about} | {megabytes(size)} |")
    return "\n".join(lines)


def _license_line(license_id: str, known: KnownFile | None) -> str:
    if license_id == "mit":
        return (
            "MIT, as ContentVec, HuBERT and fairseq are; see [LICENSE](LICENSE). "
            "Please cite the papers below."
        )
    home = f" ([its home]({known.home}))" if known else ""
    return f"That of the checkpoint's publisher{home}; see [LICENSE](LICENSE)."
