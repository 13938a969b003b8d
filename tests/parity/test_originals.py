"""Every architecture, made and saved by the original library, converts and passes parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert.conversion import convert
from contentvec_parity.harness import compare_files
from mlx_contentvec.config import EPS, EXTRACTOR_EPS, ModelConfig
from tests.originals import (
    TINY_BASE,
    TINY_LARGE,
    fairseq_hubert,
    save_fairseq,
    save_transformers,
    transformers_hubert,
)

ARCHITECTURES = {
    "base": TINY_BASE,
    "large": TINY_LARGE,
    "biased convolutions": replace(TINY_LARGE, conv_bias=True),
    "batch norm before the positional convolution": replace(TINY_BASE, conv_pos_batch_norm=True),
}


@pytest.fixture(params=list(ARCHITECTURES.values()), ids=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> ModelConfig:
    config: ModelConfig = request.param
    return config


def _passes(checkpoint: Path, config: ModelConfig, reference: str) -> None:
    converted = checkpoint.with_name("converted.safetensors")
    ledger = convert(checkpoint, converted, allow_unknown=True)
    eps = EXTRACTOR_EPS if reference == "transformers" and config.normalize else EPS
    assert ledger.config == replace(config, normalize_eps=eps)
    report = compare_files(checkpoint, converted, reference=reference, inputs="built-in")
    assert report["verdict"]["passed"], report["verdict"]["reason"]
    assert {row["kind"] for row in report["stages"]} == {"stage", "local", "features"}


@pytest.mark.usefixtures("fairseq")
def test_what_fairseq_made_and_saved_passes_parity(
    architecture: ModelConfig, tmp_path: Path
) -> None:
    model = fairseq_hubert(architecture)
    _passes(save_fairseq(model, architecture, tmp_path / "model.pt"), architecture, "fairseq")


def test_what_transformers_made_and_saved_passes_parity(
    architecture: ModelConfig, tmp_path: Path, need: Callable[[str, str], Any]
) -> None:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    model = transformers_hubert(architecture, model_class="HubertModelWithFinalProj")
    folder = save_transformers(model, architecture, tmp_path / "model")
    _passes(folder, architecture, "transformers")


@pytest.mark.usefixtures("fairseq")
def test_an_old_fairseq_file_converts_to_the_same_bytes_as_a_new_one(tmp_path: Path) -> None:
    model = fairseq_hubert(TINY_LARGE)
    forms: dict[str, dict[str, Any]] = {
        "new": {},
        "namespace": {"form": "args"},
        "serialised before torch 1.6": {"legacy_serialization": True},
        "made for resuming": {"optimizer_state": True},
        "all of it": {"form": "args", "legacy_serialization": True, "optimizer_state": True},
    }
    weights = {}
    for name, form in forms.items():
        path = save_fairseq(model, TINY_LARGE, tmp_path / f"{name}.pt", **form)
        output = tmp_path / f"{name}.safetensors"
        ledger = convert(path, output, allow_unknown=True)
        weights[name] = {row.target: row.sha256 for row in ledger.tensors}
        assert ledger.config == TINY_LARGE
    assert all(found == weights["new"] for found in weights.values())
