"""The model card: what is written, what is checked, and what a reader is told."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_parity.publishing import card
from contentvec_parity.publishing.card_lint import lint
from contentvec_parity.publishing.evidence import CARD, Package
from contentvec_parity.publishing.package import package
from mlx_contentvec.config import ModelConfig

REPO = "someone/contentvec-mlx"


@pytest.fixture(scope="module")
def packaged(evidence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp("packages") / "tiny"
    return package(
        evidence_folder / "float32.safetensors",
        folder,
        variants=[evidence_folder / "float16.safetensors"],
        repo_id=REPO,
        allow_stand_in=True,
    )


@pytest.fixture
def text(packaged: Package) -> str:
    return (packaged.folder / CARD).read_text(encoding="utf-8")


def test_the_generated_card_has_nothing_wrong(packaged: Package, text: str) -> None:
    assert lint(text, packaged.names) == []


def test_the_card_is_generated_alike_each_time(packaged: Package, text: str) -> None:
    assert card.render(packaged, REPO) == text


def test_the_front_matter_is_what_the_hub_reads(text: str) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(text).data
    assert data.library_name == "mlx"
    assert data.pipeline_tag == "feature-extraction"
    assert data.license == "mit"
    assert set(card.TAGS) <= set(data.tags)


def test_the_table_shows_what_the_report_measured(packaged: Package, text: str) -> None:
    entries = packaged.evidence[0].parity["verdict"]["summary"]
    for name in ("layer 3", "layer 3 + projection"):
        entry = next(e for e in entries if (e["kind"], e["name"]) == ("features", name))
        row = next(line for line in text.splitlines() if line.startswith(f"| {entry['name']} ("))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3] == f"{entry['candidate']['rms']:.1e}"
        assert cells[4] == f"{entry['reference']['rms']:.1e}"
        assert cells[5] == f"{entry['candidate']['rms'] / entry['reference']['rms']:.2f} x"
        assert cells[6] == f"{entry['candidate']['max_abs']:.1e}"
        assert cells[7] == f"{entry['reference']['max_abs']:.1e}"


def test_the_table_begins_with_the_two_figures_that_users_know_and_their_clips(
    packaged: Package, text: str
) -> None:
    document = packaged.evidence[0].parity
    (heading,) = [line for line in text.splitlines() if line.startswith("| features |")]
    assert heading.startswith("| features | max absolute difference | cosine similarity |")
    for name in ("layer 3", "layer 3 + projection"):
        rows = [r for r in document["stages"] if (r["kind"], r["name"]) == ("features", name)]
        largest = max(rows, key=lambda row: row["apart"]["max_abs"])
        lowest = min(rows, key=lambda row: row["apart"]["cosine"])
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} ("))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == f"{largest['apart']['max_abs']:.1e} (clip {largest['clip']})"
        assert cells[2] == f"1-{1 - lowest['apart']['cosine']:.1e} (clip {lowest['clip']})"


@pytest.mark.parametrize(
    ("address", "weights"),
    [
        (REPO, f'hf_hub_download("{REPO}", "contentvec_base.safetensors")'),
        ("./a folder", '"./a folder/contentvec_base.safetensors"'),
    ],
)
def test_the_usage_of_the_first_release_is_shown_where_its_model_is_held(
    packaged: Package, text: str, address: str, weights: str
) -> None:
    assert "encoder_layers_1=0" not in text  # a smaller model than the one it had
    config = {**packaged.config, "model": ModelConfig().to_dict()}
    shown = card.render(dataclasses.replace(packaged, config=config), address)
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", shown, re.S) if 'result["x"]' in c]
    assert "model = ContentvecModel(encoder_layers_1=0)\n" in code
    assert f"model.load_weights({weights})\n" in code
    assert ("import hf_hub_download" in code) == (address == REPO)
    assert lint(shown, packaged.names) == []


def test_known_weights_state_their_language_and_training_data(packaged: Package) -> None:
    from huggingface_hub import ModelCard

    from contentvec_convert.known_files import KNOWN_FILES

    stated = {}
    for key in (known.key for known in KNOWN_FILES):
        evidence = packaged.evidence[0]
        source = json.dumps({**evidence.source, "known_as": key})
        named = dataclasses.replace(evidence, metadata={**evidence.metadata, "source": source})
        text = card.render(dataclasses.replace(packaged, evidence=(named,)), REPO)
        assert [p for p in lint(text, packaged.names) if "front matter" in p] == []
        data = ModelCard(text).data
        stated[key] = (data.language, data.datasets)
    for key in ("contentvec", "contentvec-hf", "content-vec-best", "mlx-contentvec-0.1"):
        assert stated[key] == (["en"], ["openslr/librispeech_asr"]), key
    assert stated["japanese-hubert-base"] == (["ja"], None)
    assert stated["mhubert-147"] == (None, None)


def test_each_variant_has_its_own_figures(packaged: Package, text: str) -> None:
    for evidence in packaged.evidence:
        rows = [r["candidate"] for r in evidence.parity["stages"] if r["kind"] == "features"]
        lowest = min(row["snr_db"] for row in rows if row["snr_db"] is not None)
        line = next(line for line in text.splitlines() if line.startswith(f"| `{evidence.dtype}`"))
        assert f"{lowest:.1f} dB" in line


def test_the_card_says_that_weights_are_synthetic(text: str) -> None:
    assert "**Synthetic weights.**" in text
    assert "(synthetic weights)" in next(line for line in text.splitlines() if line[:2] == "# ")


def _first(pattern: str, by: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        changed, times = re.subn(pattern, by, text, count=1, flags=re.M)
        assert times == 1, f"nothing in the card matches {pattern}"
        return changed

    return change


def _without(pattern: str) -> Callable[[str], str]:
    return _first(pattern, "")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_first(r"^license: mit", "license: free"), "the Hub knows no license 'free'"),
        (_without(r"^license: mit\n"), "the front matter has no license"),
        (_first(r"^pipeline_tag: .*", "pipeline_tag: magic"), "the Hub has no task 'magic'"),
        (_first(r"^library_name: .*", "library_name: mlx-audio"), "library_name must be mlx"),
        (_first(r"^- voice-conversion", "- Voice Conversion"), "'Voice Conversion'"),
        (_first(r"^tags:", "colour: red\ntags:"), "colour means nothing to the Hub"),
        (_first(r"^tags:", "base_model: nobody\ntags:"), "base_model must be a repository"),
        (_first(r"^tags:", "tags: ["), "the front matter is not YAML"),
        (_without(r"\A---\n"), "does not begin with front matter"),
        (_first(r"\(parity\.html\)", "(report.html)"), "report.html leads to no file"),
        (_first(r"\(https://arxiv", "(http://arxiv"), "is not a plain https address"),
        (_first(r"\(LICENSE\)", "(#nowhere)"), "#nowhere leads to no heading"),
        (_first(r"^model = .*", "model = ContentvecModel("), "a block of Python does not parse"),
        (_first(r"^license: mit", "license: 1"), "license must be a str"),
        (_first(r"\A---\n(?s:.*?)\n---\n", "---\nmit\n---\n"), "is not a mapping"),
    ],
)
def test_a_card_that_the_hub_would_not_take_is_found_out(
    packaged: Package, text: str, change: Callable[[str], str], problem: str
) -> None:
    problems = lint(change(text), packaged.names)
    assert any(problem in found for found in problems), problems


def test_known_weights_name_their_home(packaged: Package, text: str) -> None:
    from contentvec_convert.known_files import CONTENTVEC

    known: dict[str, Any] = {"known_as": CONTENTVEC.key}
    assert card._base_model(card._known(known)) == "lj1995/VoiceConversionWebUI"
    assert "hubert_base.pt" in card._what(CONTENTVEC, known)
    # and of a stand-in no home is claimed
    assert "base_model" not in text


def test_the_users_own_files_are_told_from_made_clips(packaged: Package) -> None:
    document = packaged.evidence[0].parity
    assert "; all made from seeds" in card._context(document)
    clips = [*document["clips"], {**document["clips"][0], "origin": {"file": "me.wav"}}]
    assert "; an audio file, the rest made" in card._context({**document, "clips": clips})


def test_weights_in_another_format_are_not_measured_by_float32(packaged: Package) -> None:
    half = packaged.evidence[1]
    alone = dataclasses.replace(
        packaged, config={**packaged.config, "dtype": "float16", "variants": {}}, evidence=(half,)
    )
    text = card.render(alone, REPO)
    assert "every feature is as near the float64 truth as PyTorch's own float16" in text
    assert "| PyTorch float16, rms error | PyTorch float16, largest error |" in text
    assert "PyTorch float16 (cpu): rms error of layer 3" in text
    assert "PyTorch's own\nfloat32 has an error too" not in text
