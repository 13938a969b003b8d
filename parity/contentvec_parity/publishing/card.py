"""The model card: written from the evidence, and read back against it.

``render`` fills ``templates/README.md.jinja``. ``lint`` takes any text that
claims to be the card of a package and lists what is wrong with it: front matter
the Hub would not take, links that lead nowhere, and figures that no report holds.
It works offline and does not trust ``render``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contentvec_convert.known_files import KNOWN_FILES, KnownFile
from mlx_contentvec.errors import MissingDependency

from ..report import document as report

if TYPE_CHECKING:
    from .package import Evidence, Package

TAGS = ("mlx", "audio", "speech", "hubert", "contentvec", "voice-conversion", "rvc")
#: the layers that RVC takes its features from, where a model has them
RVC_LAYERS = {"v1": 9, "v2": 12}
_TEMPLATES = Path(__file__).parent / "templates"
_HUB = "https://huggingface.co/"

#: license identifiers that the Hub knows, as far as a speech model may have one
LICENSES = (
    "mit",
    "apache-2.0",
    "bsd",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0",
    "gpl-3.0",
    "lgpl-3.0",
    "agpl-3.0",
    "mpl-2.0",
    "openrail",
    "unknown",
)
#: tasks that the Hub offers for models that take audio
PIPELINE_TAGS = frozenset(
    {
        "feature-extraction",
        "audio-to-audio",
        "audio-classification",
        "automatic-speech-recognition",
        "voice-activity-detection",
    }
)
#: keys of a model card's front matter that this project writes or may be given
FRONT_MATTER = {
    "license": str,
    "library_name": str,
    "pipeline_tag": str,
    "base_model": str,
    "tags": list,
    "language": list,
}
_REQUIRED = ("license", "library_name", "pipeline_tag", "tags")


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
    from . import package as files

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
        raise MissingDependency(
            "a model card needs jinja2", hint="pip install 'mlx-contentvec[report]'"
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
    from . import package as files

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


# the linter ------------------------------------------------------------------------


def lint(text: str, package: Package) -> list[str]:
    """What is wrong with ``text`` as the card of ``package``; nothing, if all is right."""
    front, body = _split(text)
    if front is None:
        return ["it does not begin with front matter between two lines of ---"]
    return [
        *_lint_front_matter(front),
        *_lint_links(body, package),
        *_lint_tables(body, package),
        *_lint_stray_figures(body, package),
        *_lint_claims(body, package),
    ]


def _split(text: str) -> tuple[str | None, str]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    return (match[1], text[match.end() :]) if match else (None, text)


def _lint_front_matter(front: str) -> Iterator[str]:
    import yaml  # type: ignore[import-untyped]

    try:
        fields = yaml.safe_load(front)
    except yaml.YAMLError as error:
        yield f"the front matter is not YAML: {error}"
        return
    if not isinstance(fields, dict):
        yield "the front matter is not a mapping"
        return
    for key in _REQUIRED:
        if key not in fields:
            yield f"the front matter has no {key}"
    for key, value in fields.items():
        if key not in FRONT_MATTER:
            yield f"the front matter's {key} means nothing to the Hub"
        elif not isinstance(value, FRONT_MATTER[key]):
            yield f"the front matter's {key} must be a {FRONT_MATTER[key].__name__}: {value!r}"
    license_id, task = fields.get("license"), fields.get("pipeline_tag")
    if license_id not in LICENSES:
        yield f"the Hub knows no license {license_id!r}"
    if task not in PIPELINE_TAGS:
        yield f"the Hub has no task {task!r} for audio models"
    if fields.get("library_name") != "mlx":
        yield "library_name must be mlx, or the Hub does not know what loads it"
    base = fields.get("base_model")
    if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
        yield f"base_model must be a repository like owner/name: {base!r}"
    tags = fields.get("tags") or []
    wrong = [
        tag for tag in tags if not isinstance(tag, str) or not re.fullmatch(r"[a-z0-9-]+", tag)
    ]
    yield from (f"a tag must be lower-case words joined by hyphens: {tag!r}" for tag in wrong)
    yield from (f"the tag {tag} is missing" for tag in TAGS if tag not in tags)


_FENCED = re.compile(r"^```.*?^```$", re.S | re.M)
_INLINE_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _lint_links(body: str, package: Package) -> Iterator[str]:
    text = _FENCED.sub("", body)
    anchors = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in _LINK.findall(text):
        if target.startswith("#"):
            if target[1:] not in anchors:
                yield f"the link {target} leads to no heading"
        elif "://" in target:
            if not re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/[\w./~%+-]*)?", target):
                yield f"the link {target} is not a plain https address"
        elif target not in package.checksums and not (package.folder / target).is_file():
            yield f"the link {target} leads to no file of the package"


def _tables(body: str) -> Iterator[list[list[str]]]:
    """Every Markdown table as rows of cells, its heading first."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", _FENCED.sub("", body), re.M):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")]
        yield [row for row in rows if any(row) and not set("".join(row)) <= set("-: ")]


def _lint_tables(body: str, package: Package) -> Iterator[str]:
    """Every cell of the two tables of figures, held to the report it is from."""
    main = package.evidence[0].parity
    wanted: dict[str, tuple[tuple[Column, ...], dict[str, Mapping[str, Any]]]] = {
        "features": (FEATURE_COLUMNS, _summaries(main)),
    }
    if len(package.evidence) > 1:
        formats: dict[str, Mapping[str, Any]] = {e.dtype: e.parity for e in package.evidence}
        wanted["format"] = (VARIANT_COLUMNS, formats)
    seen = set()
    for table in _tables(body):
        if not table or table[0][0] not in wanted:
            continue
        kind = table[0][0]
        seen.add(kind)
        columns, entries = wanted[kind]
        if table[0][1:] != [column.heading for column in columns]:
            yield f"the table of {kind} has other columns"
            continue
        shown = []
        for row in table[1:]:
            label = re.sub(r" \(.*\)$", "", row[0]).strip("`")
            shown.append(label)
            if label not in entries:
                yield f"{label} was not measured"
                continue
            for column, cell in zip(columns, row[1:], strict=True):
                figure = column.figure(entries[label])
                if not _is_written(cell, figure):
                    yield f"{label}, {column.heading}: {cell} is shown, {figure} was measured"
        yield from (
            f"{label} was measured and is not shown" for label in entries if label not in shown
        )
    yield from (f"the table of {kind} is missing" for kind in wanted if kind not in seen)


_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")


def _is_written(cell: str, figure: float | None) -> bool:
    """Whether a cell shows ``figure``, to the digits it has, in its unit."""
    if figure is None:
        return cell == "-"
    if cell.startswith("1 - "):
        cell, figure = cell[4:], max(0.0, 1 - figure)
    unit = {"MB": 1e6, "kB": 1e3}.get(cell.split()[-1], 1.0)
    match = _NUMBER.search(cell)
    if match is None:
        return cell == str(figure)
    return _rounds_to(match[0], figure / unit)


def _rounds_to(token: str, value: float) -> bool:
    """Whether ``value``, rounded to the digits that ``token`` shows, is ``token``."""
    if not math.isfinite(value):
        return False
    shown = token.replace(",", "")
    mantissa, _, exponent = shown.partition("e")
    digits = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(exponent or 0) - digits)
    return abs(float(shown) - value) <= step * 0.500001


#: what a measured or stated figure looks like in prose: decimals, exponents, units
_FIGURE = re.compile(
    r"(?<![\w.])(?:"
    r"\d[\d,]*\.\d+(?:e[+-]\d+)?"
    r"|\d+e[+-]\d+"
    r"|\d[\d,]*(?= ?(?:MB|kB|dB|x|%|ms|s|bytes|samples|inputs|tensors|of \d)\b)"
    r"|\d{1,3}(?:,\d{3})+"
    r")(?![\w.]\d)"
)
_HEX = re.compile(r"\b[0-9a-f]{32,64}\b")


def _lint_stray_figures(body: str, package: Package) -> Iterator[str]:
    """Every figure outside code must be one that the evidence holds."""
    # the tables of figures are held to their reports cell by cell
    text = re.sub(r"^\| (?:features|format) \|.*\n(?:\|.*\n)+", "", body, flags=re.M)
    text = _INLINE_CODE.sub("", _FENCED.sub("", text))
    text = re.sub(r"\]\([^)]*\)", "]", text)
    stated = _stated_numbers(package)
    words = _stated_words(package)
    for match in _FIGURE.finditer(text):
        token = match[0]
        if any(token in word for word in words):
            continue
        whole = re.fullmatch(r"[\d,]+", token)
        if whole and float(token.replace(",", "")) in stated:
            continue
        if whole or not any(_rounds_to(token, value) for value in stated):
            line = text[: match.start()].count("\n") + 1
            around = text[max(0, match.start() - 20) : match.end() + 20].replace("\n", " ")
            yield f"{token} stands in no report (body line {line}: ...{around}...)"


def _stated_numbers(package: Package) -> set[float]:
    found: set[float] = set()

    def collect(value: Any) -> None:
        if isinstance(value, bool):
            return
        if isinstance(value, (int, float)):
            found.add(float(value))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if not str(key).endswith("_at"):  # places, not figures
                    collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(package.config)
    for evidence in package.evidence:
        document = evidence.parity
        collect({key: document[key] for key in ("weights", "source", "clips")})
        collect(document["verdict"]["gates"])
        collect(_features(document))
        collect(evidence.ledger["counts"])
        counts = evidence.ledger["counts"]
        found.add(float(counts["written"] - counts["exact"]))
        clips = document["clips"]
        found |= {float(len(clips)), float(sum("file" in clip["origin"] for clip in clips))}
        lowest = _lowest(document, "worst_frame_cosine")
        found.add(max(0.0, 1 - (lowest if lowest is not None else 1.0)))
    for name in package.checksums:
        size = (package.folder / name).stat().st_size
        found |= {float(size), size / 1e6, size / 1e3}
    rate = package.config["sample_rate"]
    found |= {rate / 1000, 1000 * package.config["hop"] / rate}
    return found


def _stated_words(package: Package) -> list[str]:
    """Names of machines, systems and versions: they have digits and are no figures."""
    document = package.evidence[0].parity
    return [
        document["verdict"]["reason"],
        document["machine"]["chip"],
        document["machine"]["system"],
        document["created"],
        package.version,
        *document["versions"].values(),
        *document["reference"]["versions"].values(),
    ]


def _lint_claims(body: str, package: Package) -> Iterator[str]:
    """What a card must not leave out."""
    main = package.evidence[0]
    for what, text in (
        ("the checkpoint's SHA-256", main.source["sha256"]),
        ("the checkpoint's MD5", main.source["md5"]),
        ("the verdict", main.parity["verdict"]["reason"]),
        ("the machine", main.parity["machine"]["chip"]),
        ("the device", report.device_line(main.parity)),
    ):
        if text not in body:
            yield f"{what} is missing: {text}"
    stated = {main.source["sha256"], main.source["md5"], *package.checksums.values()}
    yield from (
        f"the checksum {digest} is not one of these files or their source"
        for digest in _HEX.findall(body)
        if digest not in stated
    )
    if package.stand_in and "Synthetic weights" not in body:
        yield "it does not say that the weights are synthetic"
