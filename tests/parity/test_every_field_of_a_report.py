"""Each field of a saved report by values that it cannot have: refused, or of no consequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from contentvec_convert.conversion import convert
from contentvec_parity.compare.verdict import Gates, judge
from contentvec_parity.harness import compare_files
from contentvec_parity.inputs import INPUT_SETS, built_in
from contentvec_parity.report import document as report
from contentvec_parity.report import page
from mlx_contentvec import files
from mlx_contentvec.cli import main
from tests.fields import VALUES, exchanged, places

Report = dict[str, Any]

#: objects of many names alike
ALIKE = frozenset(("inputs", "reads", "versions", "environment"))


@pytest.fixture(scope="module")
def small(
    fairseq: object, least_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Report:
    """A report of few stages and one clip, with everything that a report can have."""
    weights = tmp_path_factory.mktemp("small") / "least.safetensors"
    convert(least_checkpoint, weights, allow_unknown=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INPUT_SETS, "least", lambda: built_in()[:1])
        measured = compare_files(least_checkpoint, weights, inputs="least", compare_tf32=False)
    document: Report = report._undone(json.loads(report.to_json(measured)))
    about = {"device": "cuda", "name": "a GPU", "dtype": "float32", "tf32": "off"}
    document["yardsticks"] = {"device": about}
    for row in document["stages"]:
        row["device"] = row["reference"]
    features = [row for row in document["stages"] if row["kind"] == "features"]
    # features first: the first row has most fields
    document["stages"] = features + [r for r in document["stages"] if r["kind"] != "features"]
    document["verdict"] = judge(document, Gates())
    document["with_tf32"] = {
        "flags": document["flags"],
        "summary": [e for e in document["verdict"]["summary"] if e["kind"] == "features"],
        "snr_db": 60.0,
    }
    return document


def shown(document: str, folder: Path, *, as_page: bool) -> tuple[int, str, str]:
    """Exit status of `parity judge`, what it prints, and what it writes."""
    saved, *rendered = (folder / f"report.{kind}" for kind in ("json", "md", "html"))
    saved.write_text(document)
    options = ["--markdown", rendered[0], *(["--html", rendered[1]] if as_page else [])]
    done = CliRunner().invoke(main, ["parity", "judge", *map(str, (saved, *options))])
    written = "".join(file.read_text() for file in rendered if file.exists())
    for file in rendered:
        file.unlink(missing_ok=True)
    return done.exit_code, done.output, written


def fault(said: tuple[int, str, str], good: tuple[int, str, str]) -> str | None:
    """What is wrong with an answer to a report of which one field was exchanged."""
    status, screen, written = said
    if not (screen + written).replace("\n", "").isprintable():
        return "escapes"
    if not status:
        # what was exchanged decides nothing, and may be named
        lines = [[text[:6], *text.split("\n")[1:3]] for text in (screen, good[1])]
        same = lines[0] == lines[1] and len(screen + written) < 1.5 * len(good[1] + good[2])
        return None if same else "another answer"
    if "a fault in" in screen or not screen.startswith("error: "):
        return "no error"
    return "a long error" if screen.count("\n") > 8 or len(screen) > 1_000 else None


@pytest.mark.parametrize("name", VALUES)
def test_no_field_of_a_report_breaks_what_shows_it(
    small: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # neither reads the report's texts, and both take long
    monkeypatch.setattr(page, "stage_svg", lambda _: {"drawn elsewhere": "<svg></svg>"})
    monkeypatch.setattr(page, "_made_again", lambda *_: {})
    # what is written is read at once, and need not outlast the machine
    monkeypatch.setattr(files, "sync", lambda _: None)
    as_page = name in ("missing", "null", "escapes", "no text")
    # the verdict is made again, and not read
    document = report._strict({key: part for key, part in small.items() if key != "verdict"})
    good = shown(report.to_json(document), tmp_path, as_page=as_page)
    assert good[0] == 0
    wrong = {}
    for place in places(document, ALIKE):
        said = shown(exchanged(document, place, VALUES[name]), tmp_path, as_page=as_page)
        if what := fault(said, good):
            wrong[place] = (what, said[1][:300])
    assert not wrong
