"""The model card: ``templates/README.md.jinja``, filled from the evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contentvec_convert.known_files import KNOWN_FILES, KnownFile
from mlx_contentvec import hub
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import MissingDependency, import_hint, install_hint

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
    """A column of a table: its heading, and what it shows of an entry."""

    heading: str
    cell: Callable[[Mapping[str, Any]], str]


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} dB"


def megabytes(size: float) -> str:
    """``378.9 MB``; ``41.2 kB`` for what is small."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def _worst(what: str) -> Callable[[Mapping[str, Any]], str]:
    """A cell with a figure between MLX and the original, and the clip where it is the worst."""

    def cell(entry: Mapping[str, Any]) -> str:
        found = next(found for found in entry["agreement"] if found.what == what)
        return f"{found.written} (clip {found.clip})"

    return cell


#: one row per call that gives features: an entry of the verdict's summary, with ``agreement``
FEATURE_COLUMNS = (
    Column(report.MAX_ABS, _worst(report.MAX_ABS)),
    Column(report.COSINE, _worst(report.COSINE)),
    # not broken after the comma: a cell would break after the "e-" of its figure
    Column("MLX,\u00a0rms error", lambda e: report.figure(e["candidate"]["rms"])),
    Column("PyTorch, rms error", lambda e: report.figure(e["reference"]["rms"])),
    Column("MLX / PyTorch", lambda e: f"{report.times(e['ratio']['rms'])} x"),
    Column("MLX, largest error", lambda e: report.figure(e["candidate"]["max_abs"])),
    Column("PyTorch, largest error", lambda e: report.figure(e["reference"]["max_abs"])),
)


def _feature_columns(document: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a report, with PyTorch on its device or in its format where it was run."""
    extra = report.extra_yardstick(document)
    if extra is None:
        return FEATURE_COLUMNS
    side, heading = extra

    def cell(metric: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda e: report.figure(e[side][metric] if side in e else None)

    return (
        *FEATURE_COLUMNS,
        Column(f"{heading}, rms error", cell("rms")),
        Column(f"{heading}, largest error", cell("max_abs")),
    )


#: one row per number format; a parity document
VARIANT_COLUMNS = (
    Column("size", lambda d: megabytes(d["weights"]["size"])),
    Column("SNR", lambda d: _decibels(_lowest(d, "snr_db"))),
    Column(report.MAX_ABS, lambda d: report.agreement(d)[0].written),
    Column(report.COSINE, lambda d: report.agreement(d)[1].written),
    Column("worst frame's cosine", lambda d: _frame_cosine(_lowest(d, "worst_frame_cosine"))),
)


def _features(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row["candidate"] for row in document["stages"] if row["kind"] == "features"]


def _lowest(document: Mapping[str, Any], metric: str) -> float | None:
    """Of the features of all clips; None where each equals the truth."""
    return min((m[metric] for m in _features(document) if m[metric] is not None), default=None)


def _frame_cosine(value: float | None) -> str:
    return "-" if value is None else report.similarity(value)


def _summaries(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Features -> their entry; of several calls that return the same features, the first."""
    found: dict[str, Mapping[str, Any]] = {}
    for entry in document["verdict"]["summary"]:
        if entry["kind"] == "features":
            found.setdefault(entry["stage"], entry)
    return {
        name: {**entry, "agreement": report.agreement(document, name)}
        for entry in found.values()
        for name in (entry["name"],)
    }


def _table(
    first: str, columns: Sequence[Column], rows: Iterable[tuple[str, Mapping[str, Any]]]
) -> str:
    lines = [
        "| " + " | ".join([first, *(column.heading for column in columns)]) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for label, entry in rows:
        cells = [label, *(column.cell(entry) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
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
        language=_language(known),
        datasets=_datasets(known),
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
        first_release_weights=_first_release_weights(config, address),
        extract_options=_extract_options(features),
        verdict=document["verdict"]["reason"],
        dtype=config["dtype"],
        half=config["dtype"] != "float32",
        features_table=_table(
            "features",
            _feature_columns(document),
            [(labels[name], entry) for name, entry in _summaries(document).items()],
        ),
        yardstick=report.yardstick_line(document),
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
        raise MissingDependency(
            f"a model card needs jinja2: {error}", hint=import_hint(error, install_hint("report"))
        ) from error
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


#: words of a known file's key -> the languages it was trained on, as the Hub codes them
LANGUAGES = {
    "contentvec": ("en",),
    "content-vec": ("en",),
    "chinese": ("zh",),
    "japanese": ("ja",),
    "korean": ("ko",),
    "hubert-base-ls960": ("en",),
}
#: the same -> the data sets of the Hub that it was trained on (ContentVec: arXiv:2204.09224,
#: section 4; HuBERT base: arXiv:2106.07447, section IV)
DATASETS = {
    "contentvec": ("openslr/librispeech_asr",),
    "content-vec": ("openslr/librispeech_asr",),
    "hubert-base-ls960": ("openslr/librispeech_asr",),
}


def _by_key(table: Mapping[str, tuple[str, ...]], known: KnownFile | None) -> tuple[str, ...]:
    key = "" if known is None else known.key.removeprefix("mlx-")
    return next((values for start, values in table.items() if key.startswith(start)), ())


def _language(known: KnownFile | None) -> tuple[str, ...]:
    return _by_key(LANGUAGES, known)


def _datasets(known: KnownFile | None) -> tuple[str, ...]:
    return _by_key(DATASETS, known)


def _first_release_weights(config: Mapping[str, Any], address: str) -> str | None:
    """Python that names the weights as the first release's users do; None for other models.

    Its ``ContentvecModel(encoder_layers_1=0)`` is the one architecture that it had.
    """
    if config["model"] != ModelConfig().to_dict():
        return None
    if hub.is_repo_id(address):
        return f'hf_hub_download("{address}", "{files.EARLIER_NAME}")'
    return f'"{address}/{files.EARLIER_NAME}"'


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
    made = (
        f"{'an audio file' if files == 1 else f'{files} audio files'}, the rest" if files else "all"
    )
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
        written = megabytes(size).replace(" ", "\u00a0")
        lines.append(f"| [`{name}`]({name}) | {about} | {written} |")
    return "\n".join(lines)


def _license_line(license_id: str, known: KnownFile | None) -> str:
    if license_id == "mit":
        return (
            "MIT, as ContentVec, HuBERT and fairseq are; see [LICENSE](LICENSE). "
            "Please cite the papers below."
        )
    home = f" ([its home]({known.home}))" if known else ""
    return f"That of the checkpoint's publisher{home}; see [LICENSE](LICENSE)."
