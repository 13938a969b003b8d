"""The registry of known embedders, and its listing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert import conversion, known_files
from contentvec_convert.conversion import convert
from contentvec_convert.identity import identify
from contentvec_convert.known_files import KNOWN_FILES, KnownFile
from contentvec_convert.repository import Fetched
from contentvec_convert.sources import SOURCES
from mlx_contentvec.config import PRESETS
from mlx_contentvec.errors import ConfigError
from tests.originals import TINY_BASE, save_transformers, transformers_hubert


def test_every_row_is_complete_and_its_own() -> None:
    assert len({row.key for row in KNOWN_FILES}) == len(KNOWN_FILES)
    for row in KNOWN_FILES:
        assert row.names
        assert row.what
        assert row.home.startswith("https://")
        assert row.architecture in PRESETS
        assert row.form in SOURCES
        if row.sha256 is not None:
            assert len(bytes.fromhex(row.sha256)) == 32
        if row.normalize is not None:
            # only large and xlarge were trained on normalised input
            assert row.normalize == PRESETS[row.architecture].normalize


def test_no_two_rows_can_claim_one_file() -> None:
    proofs = [row.sha256 for row in KNOWN_FILES if row.verifiable]
    assert len(set(proofs)) == len(proofs)
    # a row without a checksum claims nothing
    for row in KNOWN_FILES:
        if not row.verifiable:
            assert not row.is_file(row.size or 1, "0" * 32, "0" * 64)


def test_the_listing_says_of_each_what_it_is_and_how_to_get_it(run_cli: Callable[..., Any]) -> None:
    done = run_cli("models")
    assert done.returncode == 0, done.stderr
    for row in KNOWN_FILES:
        assert f"\n{row.key}\n" in f"\n{done.stdout}"
        assert row.what in done.stdout
        assert row.home in done.stdout
    assert "mlx-contentvec fetch contentvec)" in done.stdout
    assert "no checksum known" in done.stdout


def test_a_program_gets_the_same_facts(run_cli: Callable[..., Any]) -> None:
    rows = json.loads(run_cli("models", "--json").stdout)
    assert [row["key"] for row in rows] == [row.key for row in KNOWN_FILES]
    large = next(row for row in rows if row["architecture"] == "large")
    assert (large["layers"], large["width"], large["normalize"]) == (24, 1024, True)
    contentvec = rows[0]
    assert contentvec["fetchable"]
    assert contentvec["md5"] == "b76f784c1958d4e535cd0f6151ca35e4"


def test_a_known_file_brings_the_scale_of_its_input(
    tmp_path: Path, need: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    folder = save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    output = tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match="normalised input"):
        convert(folder, output, allow_unknown=True)
    row = KnownFile(
        key="tiny",
        names=("model.safetensors",),
        what="a model made for a test",
        home="https://example.org",
        sha256=identify(folder / "model.safetensors").sha256,
        form="transformers",
        normalize=False,
    )
    monkeypatch.setattr(known_files, "KNOWN_FILES", (*KNOWN_FILES, row))
    ledger = convert(folder, output)
    assert ledger.source["known_as"] == "tiny"
    assert ledger.config.normalize is False
    assert any("of tiny it is known to be taken as it is" in note for note in ledger.notes)
    # what the row does not say is not made up either
    silent = replace(row, normalize=None)
    monkeypatch.setattr(known_files, "KNOWN_FILES", (*KNOWN_FILES, silent))
    with pytest.raises(ConfigError, match="normalised input"):
        conversion.convert(folder, output, force=True)


def test_a_known_name_is_fetched_and_converted(
    converted_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from contentvec_convert import fetch
    from contentvec_convert.commands.convert import convert as command

    asked: list[str] = []

    def fetched(key: str, revision: None) -> Fetched:
        asked.append(key)
        return Fetched(converted_tiny, "nowhere")

    monkeypatch.setattr(fetch, "fetch", fetched)
    monkeypatch.chdir(tmp_path)
    arguments = ["contentvec", "-o", "out.safetensors", "--allow-unknown"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert asked == ["contentvec"]
    assert (tmp_path / "out.safetensors").is_file()


def test_a_file_of_that_name_comes_first(
    converted_tiny: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    (tmp_path / "contentvec").symlink_to(converted_tiny)
    done = run_cli(
        "convert", "contentvec", "-o", "out.safetensors", "--allow-unknown", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "fetching" not in done.stderr


def test_a_name_that_is_known_but_cannot_be_fetched_says_so(
    tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    done = run_cli("convert", "hubert-large-ll60k", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be fetched" in done.stderr
