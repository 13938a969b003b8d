"""A folder of weights that brings its own evidence, ready for the Hub or a USB stick.

    model.safetensors            the weights
    contentvec_base.safetensors  the same file under the name that earlier users load
    config.json                  architecture, provenance, variants
    README.md                    the model card, every figure from the reports below
    parity.json, .html, .png     how near these very weights are to the original
    ledger.json                  what became of every tensor of the checkpoint
    recording.safetensors        inputs and the original's outputs: `mlx-contentvec verify`
    LICENSE, SHA256SUMS

A variant in another number format adds ``model.NAME.safetensors``, its ledger
and its own report. Nothing is packaged that has not passed parity, and the
verdict is judged again from the report's figures, not believed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contentvec_convert.conversion import ledger_path
from contentvec_convert.precision import PRECISIONS
from mlx_contentvec import hub
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import HubError, OutputError, name_list
from mlx_contentvec.files import (
    cannot_write,
    explained,
    is_file,
    is_folder,
    is_temporary_name,
    left_by_the_system,
    similar_name,
    write_text,
)
from mlx_contentvec.folders import Room
from mlx_contentvec.json_text import JsonError, read_object

from ..compare.candidate import read_metadata
from ..report import document as report
from ..report.page import to_html
from ..report.plots import stage_plot
from . import checks
from .card import fill, render
from .card_lint import lint
from .evidence import (
    CARD,
    EARLIER_NAME,
    LEDGER,
    LIBRARY,
    LICENSE,
    MODEL,
    PAGE,
    PARITY,
    PLOT,
    RECORDING,
    Evidence,
    Package,
)

#: what every package holds; SHA256SUMS lists them
_FIXED = frozenset(
    (MODEL, EARLIER_NAME, hub.CONFIG, LEDGER, PARITY, PAGE, PLOT, RECORDING, CARD, LICENSE)
)

_ELSEWHERE = "give another folder"

#: bytes of a card, which has 10,000
CARD_LIMIT = 1_000_000


def package(
    converted: Path,
    folder: Path,
    *,
    parity: Path | None = None,
    recording: Path | None = None,
    variants: Sequence[Path] = (),
    repo_id: str | None = None,
    license_id: str | None = None,
    allow_stand_in: bool = False,
    force: bool = False,
    step: Callable[[str], None] = lambda _: None,
) -> Package:
    """Make the folder from a converted file, its ledger, its parity report and a recording.

    parity, recording: by default ``<stem>.parity.json`` and
        ``<stem>.recording.safetensors`` beside ``converted``
    variants: further converted files of the same checkpoint, each with its
        ledger and parity report beside it
    repo_id:  the name that the card tells readers to load; the folder's own by default
    license_id: the weights' license, as the Hub names it; known for ContentVec,
        "unknown" otherwise
    allow_stand_in: for tests; a package of synthetic weights says so everywhere

    The folder appears when it is complete. Raises HubError for weights that are
    not proven, OutputError when the folder cannot be written.
    """
    _check_target(folder, force)
    recording = recording or converted.with_name(f"{converted.stem}.recording.safetensors")
    if not is_file(recording):
        raise HubError(
            f"there is no recording for {converted.name}",
            expected=str(recording),
            hint=f"mlx-contentvec parity record CHECKPOINT {recording}",
        )
    evidence = []
    for path, given in [(converted, parity), *((variant, None) for variant in variants)]:
        step(f"checking {path.name}")
        evidence.append(_gather(path, ledger_path(path), given or _parity_beside(path)))
    _check_together(evidence, allow_stand_in)
    license_id = license_id or _license(evidence[0])
    with Room(folder, is_own=_is_own) as room:
        draft = room.path / "package"
        with explained(folder):
            draft.mkdir()
            step("copying")
            _fill(draft, evidence, recording, license_id)
            step("drawing")
            _show(draft, repo_id or _address_of(folder))
            _sum_up(draft)
        step("checking the package")
        open_package(draft, allow_stand_in=allow_stand_in)
        room.publish(draft, force=force, may_replace=lambda: _require_replaceable(folder))
    return open_package(folder, allow_stand_in=allow_stand_in, hashed=True)


def open_package(folder: Path, *, allow_stand_in: bool = False, hashed: bool = False) -> Package:
    """A folder that :func:`package` made, every claim in it checked again.

    hashed: the files were hashed a moment ago

    Raises HubError that names what does not fit.
    """
    sums_path = folder / hub.CHECKSUMS
    if not is_file(sums_path):
        raise HubError(
            f"{folder} is not a package",
            expected=f"a folder with {hub.CHECKSUMS}",
            hint="mlx-contentvec package CONVERTED FOLDER",
        )
    checksums = hub.read_checksums(sums_path)
    _check_files(folder, checksums, hashed)
    config = _read_json(folder / hub.CONFIG)
    if config.get("library_name") != LIBRARY:
        raise HubError(f"{folder / hub.CONFIG} was not made by {LIBRARY}")
    evidence = _gather_packaged(folder, config, checksums, proven=hashed)
    listed = _FIXED | {n for dtype in config["variants"] for n in _variant_names(dtype)}
    if unknown := sorted(set(checksums) - listed):
        raise HubError(f"{folder} holds what {hub.CONFIG} does not list", found=name_list(unknown))
    _check_together(evidence, allow_stand_in)
    expected = _config(evidence, str(config.get("license")))
    if config != json.loads(json.dumps(expected)):
        differing = [key for key in expected if config.get(key) != expected[key]]
        raise HubError(
            f"{folder / hub.CONFIG} does not say what the weights say",
            found=name_list(differing or sorted(set(config) - set(expected))),
            hint="package the converted file again",
        )
    if checksums[MODEL] != checksums[EARLIER_NAME]:
        raise HubError(f"{MODEL} and {EARLIER_NAME} are not the same file")
    checks.check_recording(folder / RECORDING, evidence, proven=hashed)
    found = Package(folder, checksums, config, tuple(evidence))
    _check_card(found)
    return found


def addressed(found: Package, repo_id: str) -> Package:
    """The same package with a card that tells readers to load ``repo_id``."""
    text = render(found, repo_id)
    card = found.folder / CARD
    if _read_text(card) == text:
        return found
    write_text(card, text)
    checksums = {**found.checksums, CARD: hub.sha256_of(card)}
    _write_sums(found.folder, checksums)
    return Package(found.folder, checksums, found.config, found.evidence)


# what is replaced ------------------------------------------------------------------


def _is_own(name: str) -> bool:
    """Whether a package has a file of this name."""
    variant = (name for dtype in PRECISIONS for name in _variant_names(dtype))
    own = name in _FIXED or name in (hub.CHECKSUMS, *variant)
    return own or left_by_the_system(name) or is_temporary_name(name)


def _check_target(folder: Path, force: bool) -> None:
    if not is_folder(folder.parent):
        raise OutputError(f"there is no folder {folder.parent}", hint="make it first")
    if os.path.lexists(folder):
        if not force:
            raise OutputError(
                f"{folder} exists", hint="give another folder, or --force to replace it"
            )
        _require_replaceable(folder)


def _require_replaceable(folder: Path) -> None:
    """OutputError unless ``folder`` is a package, or empty: nothing else is ever deleted."""
    try:
        if folder.is_symlink() or not is_folder(folder):
            raise OutputError(f"{folder} is not a folder, and is not replaced", hint=_ELSEWHERE)
        there = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise cannot_write(folder, error) from error
    foreign = [name for name in there if not _is_own(name) or is_folder(folder / name)]
    if foreign:
        raise OutputError(
            f"{folder} holds what no package has, and is not replaced",
            found=name_list(foreign),
            hint=_ELSEWHERE,
        )
    if not all(map(left_by_the_system, there)) and not _is_ours(folder):
        raise OutputError(
            f"{folder} is not a package, and is not replaced",
            found=name_list(there),
            expected=f"{hub.CHECKSUMS} and a {hub.CONFIG} that {LIBRARY} wrote",
            hint=_ELSEWHERE,
        )


def _is_ours(folder: Path) -> bool:
    if not is_file(folder / hub.CHECKSUMS):
        return False
    try:
        return _read_json(folder / hub.CONFIG).get("library_name") == LIBRARY
    except HubError:
        return False


# what is refused -------------------------------------------------------------------


def _gather(
    weights: Path, ledger: Path, parity: Path, sha256: str | None = None, *, proven: bool = False
) -> Evidence:
    """One weights file with its papers; HubError unless they are about this very file.

    proven: the tensors were held against the ledger a moment ago
    """
    if not is_file(weights):
        raise HubError(f"there is no converted file {weights}", hint=similar_name(weights))
    metadata = read_metadata(weights)
    checks.check_metadata(weights, metadata)
    sha256 = sha256 or hub.sha256_of(weights)
    found = Evidence(
        metadata["dtype"],
        weights,
        metadata,
        sha256,
        _read_json(ledger),
        _read_report(parity, weights),
    )
    checks.check_ledger(found, ledger)
    if not proven:
        checks.check_ledger_rows(found, ledger)
    checks.check_parity(found, parity)
    return found


def _gather_packaged(
    folder: Path, config: Mapping[str, Any], checksums: Mapping[str, str], *, proven: bool
) -> list[Evidence]:
    """The evidence that lies in a packaged folder, the main file first."""
    names = [(MODEL, LEDGER, PARITY)]
    variants = config.get("variants")
    if not isinstance(variants, dict):
        raise HubError(f"{folder / hub.CONFIG} does not list the variants")
    for dtype, row in variants.items():
        names.append(_variant_names(dtype))
        listed = isinstance(row, dict) and row.get("file") == names[-1][0]
        if not listed or any(name not in checksums for name in names[-1]):
            raise HubError(f"{folder / hub.CONFIG} lists a variant that is not here", found=dtype)
    return [
        _gather(
            folder / weights, folder / ledger, folder / parity, checksums[weights], proven=proven
        )
        for weights, ledger, parity in names
    ]


def _check_together(evidence: Sequence[Evidence], allow_stand_in: bool) -> None:
    """The main file and its variants: one checkpoint, one model, each format once."""
    main = evidence[0]
    for other in evidence[1:]:
        for what, ours, theirs in (
            ("checkpoint", main.source["sha256"], other.source["sha256"]),
            ("configuration", main.metadata["config"], other.metadata["config"]),
        ):
            if ours != theirs:
                raise HubError(
                    f"{other.weights.name} is not a variant of {main.weights.name}",
                    found=f"another {what}",
                )
    formats = [e.dtype for e in evidence]
    if len(set(formats)) < len(formats):
        raise HubError("two files have the same number format", found=name_list(formats))
    stand_in = next((e.stand_in for e in evidence if e.stand_in), None)
    if stand_in and not allow_stand_in:
        raise HubError(
            "synthetic weights are never packaged for others",
            found=stand_in,
            hint="convert the real checkpoint: mlx-contentvec fetch contentvec",
        )


def _check_files(folder: Path, checksums: Mapping[str, str], hashed: bool) -> None:
    missing = sorted(name for name in _FIXED | set(checksums) if not is_file(folder / name))
    if missing:
        raise HubError(f"{folder} is not whole", found=f"missing: {name_list(missing)}")
    if strange := [name for name in checksums if Path(name).name != name]:
        raise HubError(
            f"{folder / hub.CHECKSUMS} lists what is not in the folder", found=name_list(strange)
        )
    there = {path.name for path in _files(folder)}
    surplus = sorted(there - set(checksums))
    unlisted = sorted(_FIXED - set(checksums))
    if surplus or unlisted:
        raise HubError(
            f"{folder / hub.CHECKSUMS} does not list every file",
            found=name_list(surplus or unlisted),
            hint="take away what does not belong there, or package again",
        )
    known: dict[tuple[int, int], str] = {}
    for name, stated in checksums.items():
        if hashed:
            continue
        hub.require_plausible_size(folder / name)
        stat = (folder / name).stat()
        # two names of one blob are hashed once
        key = (stat.st_dev, stat.st_ino)
        digest = known.get(key) or hub.sha256_of(folder / name)
        known[key] = digest
        if digest != stated:
            raise HubError(
                f"{folder / name} is not the file that {hub.CHECKSUMS} describes",
                found=f"sha256 {digest}",
                expected=f"sha256 {stated}",
                hint="it was changed or damaged: package the converted file again",
            )


def _check_card(found: Package) -> None:
    """The card must be the generated one, for whatever address it names, and fit for the Hub."""
    path = found.folder / CARD
    text = _read_text(path)
    address = re.search(r'from_pretrained\("([^"\n]+)"', text)
    generated = render(found, address[1] if address else "")
    if text != generated:
        pairs = itertools.zip_longest(text.splitlines(), generated.splitlines(), fillvalue="")
        number, shown, expected = next(
            ((i, *pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1]),
            (0, "other line endings", "those of the generated card"),
        )
        raise HubError(
            f"the model card {path} is not the one that follows from the evidence",
            found=f"line {number}: {shown}",
            expected=expected,
            hint="package the converted file again; a card is generated, not edited",
        )
    problems = lint(text, {*found.checksums, hub.CHECKSUMS})
    if problems:
        raise HubError(
            f"the model card {path} is not fit for the Hub",
            found=name_list(problems),
            hint="package the converted file again",
        )


# what is written --------------------------------------------------------------------


def _parity_beside(converted: Path) -> Path:
    return converted.with_name(f"{converted.stem}.parity.json")


def _variant_names(dtype: str) -> tuple[str, str, str]:
    """Weights, ledger and report of a variant."""
    return f"model.{dtype}.safetensors", f"ledger.{dtype}.json", f"parity.{dtype}.json"


def _fill(draft: Path, evidence: Sequence[Evidence], recording: Path, license_id: str) -> None:
    """Everything that is copied or follows from the weights."""
    main = evidence[0]
    _link(main.weights, draft / MODEL)
    _link(draft / MODEL, draft / EARLIER_NAME)
    shutil.copyfile(recording, draft / RECORDING)
    _write_papers(draft, main, MODEL, LEDGER, PARITY)
    for other in evidence[1:]:
        weights, ledger, parity = _variant_names(other.dtype)
        _link(other.weights, draft / weights)
        _write_papers(draft, other, weights, ledger, parity)
    config = json.dumps(_config(evidence, license_id), indent=2, ensure_ascii=False)
    (draft / hub.CONFIG).write_text(config + "\n", encoding="utf-8")
    text = fill("LICENSE.jinja", license=license_id, source=main.source)
    (draft / LICENSE).write_text(text, encoding="utf-8")


def _write_papers(draft: Path, evidence: Evidence, weights: str, ledger: str, parity: str) -> None:
    text = json.dumps(evidence.ledger, indent=1, ensure_ascii=False)
    (draft / ledger).write_text(text + "\n", encoding="utf-8")
    document = {
        **evidence.parity,
        "weights": {**evidence.parity["weights"], "name": weights},
    }
    (draft / parity).write_text(report.to_json(document) + "\n", encoding="utf-8")


def _address_of(folder: Path) -> str:
    """The folder as a card names it: never what could be a repository of the Hub."""
    return f"./{folder}" if hub.is_repo_id(str(folder)) else str(folder)


def _show(draft: Path, address: str) -> None:
    """The page, the plot and the card, from what has been written."""
    document = report.read(draft / PARITY)
    (draft / PAGE).write_text(to_html(document), encoding="utf-8")
    stage_plot(document, draft / PLOT)
    config, checksums = _read_json(draft / hub.CONFIG), _hashes(draft)
    evidence = tuple(_gather_packaged(draft, config, checksums, proven=True))
    text = render(Package(draft, checksums, config, evidence), address)
    (draft / CARD).write_text(text, encoding="utf-8")


def _config(evidence: Sequence[Evidence], license_id: str) -> dict[str, Any]:
    """config.json: what a program needs to know before it opens the weights."""
    main = evidence[0]
    model = ModelConfig.from_json(main.metadata["config"])
    last = model.encoder_layers
    first = min(9, last)
    config: dict[str, Any] = {
        "model_type": "contentvec",
        "architectures": ["ContentvecModel"],
        "library_name": LIBRARY,
        "library_version": main.metadata["mlx_contentvec_version"],
        "title": _title(main),
        "license": license_id,
        "sample_rate": model.sample_rate,
        "normalize": model.normalize,
        "hop": model.hop,
        "receptive_field": model.receptive_field,
        "num_layers": last,
        "hidden_size": model.encoder_embed_dim,
        "features": {
            "rvc_v2": {"output_layer": last, "width": model.encoder_embed_dim},
        },
        "dtype": main.dtype,
        "model": model.to_dict(),
        "source": main.source,
        "weights": {"file": MODEL, "size": main.size, "sha256": main.sha256},
        "variants": {
            other.dtype: {
                "file": _variant_names(other.dtype)[0],
                "size": other.size,
                "sha256": other.sha256,
                **_quantization(other),
            }
            for other in evidence[1:]
        },
        # mlx-lm's key, so that its tools recognise a quantised repository
        **_quantization(main),
    }
    if model.final_dim is not None:
        config["features"]["rvc_v1"] = {
            "output_layer": first,
            "project": True,
            "width": model.final_dim,
        }
    if main.stand_in:
        config["stand_in"] = main.stand_in
    return config


def _quantization(evidence: Evidence) -> dict[str, Any]:
    if "quantization" not in evidence.metadata:
        return {}
    return {"quantization": json.loads(evidence.metadata["quantization"])}


def _title(main: Evidence) -> str:
    known = main.source.get("known_as")
    name = "ContentVec" if known and "content" in known else known or Path(main.source["name"]).stem
    return f"{name} for MLX" + (" (synthetic weights)" if main.stand_in else "")


def _license(main: Evidence) -> str:
    """The license of what is known; a stand-in is this project's own."""
    known = str(main.source.get("known_as") or "")
    return "mit" if main.stand_in or known.startswith("content") else "unknown"


def _files(folder: Path) -> list[Path]:
    """What a folder holds beside the list of checksums; a system's own files do not count.

    Nor does what a process that was killed while it replaced the card left of it.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.name != hub.CHECKSUMS
        and not left_by_the_system(path.name)
        and not is_temporary_name(path.name)
    )


def _hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of a folder but the list itself; links are hashed once."""
    known: dict[tuple[int, int], str] = {}
    found = {}
    for path in _files(folder):
        stat = path.stat()
        key = (stat.st_dev, stat.st_ino)
        known[key] = known.get(key) or hub.sha256_of(path)
        found[path.name] = known[key]
    return found


def _sum_up(folder: Path) -> None:
    _write_sums(folder, _hashes(folder))


def _write_sums(folder: Path, checksums: Mapping[str, str]) -> None:
    lines: Iterable[str] = (f"{checksums[name]}  {name}\n" for name in sorted(checksums))
    write_text(folder / hub.CHECKSUMS, "".join(lines))


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes where the file system allows it, a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise HubError(f"{path} is not what it should be", found=str(error)) from error


def _read_text(path: Path) -> str:
    """A card. HubError if it cannot be one."""
    size = path.stat().st_size
    if size > CARD_LIMIT:
        raise HubError(f"{path} is too large", found=f"{size:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HubError(f"{path} is not UTF-8") from error


def _read_report(path: Path, weights: Path) -> report.Document:
    if not is_file(path):
        raise HubError(
            f"there is no parity report for {weights.name}",
            expected=str(path),
            hint=f"mlx-contentvec parity CHECKPOINT {weights.name} --json {path}",
        )
    return report.read(path)
