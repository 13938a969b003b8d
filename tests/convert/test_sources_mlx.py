"""A converted file as a source: another precision, and what cannot be had back."""

from __future__ import annotations

from pathlib import Path

import pytest

from contentvec_convert.conversion import convert
from contentvec_convert.ledger import Ledger
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import ConfigError, CorruptCheckpoint, UnsupportedCheckpoint


def _digests(ledger: Ledger) -> dict[str, str]:
    return {row.target: row.sha256 for row in ledger.tensors}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8"])
def test_changing_the_precision_is_converting_to_it(
    tiny_checkpoint: Path, converted_tiny: Path, tmp_path: Path, dtype: str
) -> None:
    direct = convert(tiny_checkpoint, tmp_path / "d.safetensors", allow_unknown=True, dtype=dtype)
    again = convert(converted_tiny, tmp_path / "a.safetensors", allow_unknown=True, dtype=dtype)
    assert again.naming == "mlx-contentvec"
    assert again.config == direct.config
    assert _digests(again) == _digests(direct)


def test_where_the_weights_come_from_is_passed_on(converted_tiny: Path, tmp_path: Path) -> None:
    again = convert(converted_tiny, tmp_path / "again.safetensors", allow_unknown=True)
    assert again.stand_in is not None
    assert again.source["naming"] == "mlx-contentvec"


def test_quantised_weights_are_not_a_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "q4.safetensors"
    convert(tiny_checkpoint, quantised, allow_unknown=True, dtype="q4")
    with pytest.raises(UnsupportedCheckpoint, match="quantised") as caught:
        convert(quantised, tmp_path / "wide.safetensors", allow_unknown=True)
    assert "original file" in str(caught.value)


@pytest.mark.parametrize("config", ["", "[]", '{"encoder_layers": "three"}', "null"])
def test_a_configuration_that_cannot_be_read_is_said(
    converted_tiny: Path, tmp_path: Path, config: str
) -> None:
    arrays, metadata = mx.load(str(converted_tiny), return_metadata=True)
    spoiled = tmp_path / "spoiled.safetensors"
    mx.save_safetensors(str(spoiled), arrays, {**metadata, "config": config})
    with pytest.raises((CorruptCheckpoint, ConfigError), match="configuration"):
        convert(spoiled, tmp_path / "out.safetensors", allow_unknown=True)
