"""The full-size model in the formats of both libraries becomes the same file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert.conversion import convert
from contentvec_convert.export import export
from contentvec_parity.references import open_reference
from tests.originals import save_transformers

pytestmark = pytest.mark.fullsize

PROVENANCE = {"source"}


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied afterwards: hundreds of megabytes go into it."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def _apart_from_provenance(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header without what it says of the source, and every byte after it."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        data = stream.read()
    metadata = header.pop("__metadata__")
    return {**header, "metadata": {k: metadata[k] for k in metadata.keys() - PROVENANCE}}, data


def test_both_formats_give_the_same_bytes(
    standin: Path, converted_standin: Path, room: Path, need: Callable[[str, str], Any]
) -> None:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    # parity's own table carries the names over, so the rules are not compared with themselves
    original = open_reference("transformers", standin)
    folder = save_transformers(original._model, original.config, room / "hubert_base")
    convert(folder, room / "again.safetensors", allow_unknown=True)
    header, data = _apart_from_provenance(converted_standin)
    other_header, other_data = _apart_from_provenance(room / "again.safetensors")
    # the folder was saved without the sentence that it is a stand-in
    header["metadata"].pop("stand_in")
    assert header == other_header
    assert data == other_data


@pytest.mark.parametrize("to", ["transformers", "fairseq"])
def test_there_and_back_gives_the_same_bytes(converted_standin: Path, room: Path, to: str) -> None:
    export(converted_standin, room / "back", to=to)
    convert(room / "back", room / "again.safetensors", allow_unknown=True)
    assert _apart_from_provenance(converted_standin) == _apart_from_provenance(
        room / "again.safetensors"
    )
