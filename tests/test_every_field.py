"""Each field of what is read beside weights, by values that it cannot have.

Reports have a test of their own: tests/parity/test_every_field_of_a_report.py.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from contentvec_convert.conversion import convert
from contentvec_convert.identity import identify
from contentvec_convert.inspection import _ledger_state
from mlx_contentvec import hub
from mlx_contentvec.cli import main
from mlx_contentvec.errors import ContentvecError
from mlx_contentvec.extract.manifest import Manifest
from tests.attack_corpus import read_header
from tests.checkpoint_files import safetensors
from tests.fields import VALUES, exchanged, places
from tests.originals import TINY_BASE, save_transformers, transformers_hubert

#: names of objects that map many names to the same
ALIKE = frozenset(("weight_map", "tensors"))

SETTINGS = {"weights": "0" * 64, "layer": 3, "project": False, "dtype": "float32"}
RECORD = {
    "output": "a.npy",
    "settings": SETTINGS,
    "bytes": 4,
    "crc32": "00000000",
    "source": {"path": "/a.wav", "bytes": 4, "mtime_ns": 1, "crc32": "00000000"},
    "frames": 1,
    "width": 96,
}


#: little to hash and to plan: each file is read hundreds of times
LEAST_HUBERT = replace(
    TINY_BASE,
    conv_layers=((8, 10, 5), (8, 3, 2)),
    encoder_embed_dim=16,
    encoder_ffn_embed_dim=16,
    encoder_layers=1,
    conv_pos=4,
)


@pytest.fixture(scope="module")
def made(least_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file with its ledger, a folder of transformers', and what a package has."""
    pytest.importorskip("transformers", reason="pip install 'mlx-contentvec[parity]'")
    folder = tmp_path_factory.mktemp("made")
    convert(least_checkpoint, folder / "tiny.safetensors", allow_unknown=True)
    convert(least_checkpoint, folder / "q8.safetensors", dtype="q8", allow_unknown=True)
    save_transformers(transformers_hubert(LEAST_HUBERT), LEAST_HUBERT, folder / "hub")
    (folder / "npy").mkdir()
    (folder / "npy" / ".mlx-contentvec.jsonl").write_text(json.dumps(RECORD) + "\n")
    (folder / "npy" / "a.npy").write_bytes(b"1234")
    (folder / "package").mkdir()
    config = {
        "library_name": "mlx-contentvec",
        "weights": {"file": "model.safetensors", "size": 1, "sha256": "0" * 64},
        "variants": {"q8": {"file": "model.q8.safetensors", "size": 1, "sha256": "0" * 64}},
        "quantization": {"bits": 8, "group_size": 64},
    }
    (folder / "package" / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "tiny.safetensors", folder / "package" / "model.safetensors")
    shutil.copy(folder / "q8.safetensors", folder / "package" / "model.q8.safetensors")
    return folder


def inspected(path: Path) -> str:
    done = CliRunner().invoke(main, ["inspect", str(path)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert done.exit_code == 0 or "error: " in done.output
    assert "a fault in mlx-contentvec" not in done.output
    return done.output


def borne_out(ledger: Path) -> str:
    """What ``inspect`` says beside a ledger; the whole command once for each state of it."""
    weights = ledger.with_name("tiny.safetensors")
    state = _ledger_state(weights, identity_of(weights))
    if state not in said_of_ledger:
        said_of_ledger[state] = inspected(weights)
        assert state in said_of_ledger[state]
    return said_of_ledger[state]


#: state of a ledger -> the output
said_of_ledger: dict[str, str] = {}
identity_of = functools.cache(identify)


def asked(folder: Path) -> str:
    """What a manifest says of an output, as ``extract`` would."""
    try:
        status = Manifest(folder).status("a.npy", Path("/a.wav"), SETTINGS)
    except ContentvecError as error:
        return str(error)
    # as a command cuts it
    return str(ContentvecError("taken", found=status.reason))


def opened(folder: Path) -> str:
    try:
        files = hub.open_package(folder, None)
        return f"{files.weights(None)} {files.weights('q8')}"
    except ContentvecError as error:
        return str(error)


#: what is changed -> its file, the key of a file's metadata if it lies there, and what reads it
READ: dict[str, tuple[str, str, Callable[[Path], str]]] = {
    "stored config": ("tiny.safetensors", "config", inspected),
    "stored source": ("tiny.safetensors", "source", inspected),
    "stored quantisation": ("q8.safetensors", "quantization", inspected),
    "ledger": ("tiny.ledger.json", "", borne_out),
    "config of transformers": ("hub/config.json", "", lambda p: inspected(p.parent)),
    "preprocessor": ("hub/preprocessor_config.json", "", lambda p: inspected(p.parent)),
    "records of outputs": ("npy/.mlx-contentvec.jsonl", "", lambda p: asked(p.parent)),
    "config of a package": ("package/config.json", "", lambda p: opened(p.parent)),
}


@pytest.mark.parametrize("what", READ)
def test_no_field_breaks_what_reads_it(made: Path, what: str) -> None:
    name, key, read = READ[what]
    path = made / name
    good = path.read_bytes()
    header, data = read_header(good) if key else ({}, b"")
    document: Any = json.loads(header["__metadata__"][key] if key else good)
    most = len(read(path)) + 2_000
    wrong = {}
    try:
        for place in places(document, ALIKE):
            for kind, value in VALUES.items():
                text = exchanged(document, place, value)
                if key:
                    metadata = {**header["__metadata__"], key: text}
                    raw = json.dumps({**header, "__metadata__": metadata}).encode()
                    path.write_bytes(safetensors(raw, data))
                else:
                    path.write_text(text)
                said = read(path)
                if len(said) > most or not said.replace("\n", "").isprintable():
                    wrong[place, kind] = said[:300]
    finally:
        path.write_bytes(good)
    assert not wrong
