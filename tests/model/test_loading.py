"""load(): a model by the name of its weights, whatever they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

import mlx_contentvec
from contentvec_convert.known_files import CONTENTVEC
from mlx_contentvec.errors import HubError, WeightsError
from tests.forks import run_python
from tests.hub_server import HubServer
from tests.small_models import TINY, random_weights_file

PROJECT = Path(__file__).resolve().parents[2]

#: the first row of the table of known files, with the tiny checkpoint's checksums
LOAD = """
import dataclasses, sys
from contentvec_convert import fetch, identity, known_files
row = dataclasses.replace(
    known_files.CONTENTVEC, size=int(sys.argv[1]), md5=sys.argv[2], sha256=sys.argv[3])
known_files.KNOWN_FILES = fetch.KNOWN_FILES = identity.KNOWN_FILES = (row,)
from mlx_contentvec import load
print(load("contentvec").config.encoder_layers)
"""


def test_a_file_and_its_folder_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_weights_file(tmp_path / "model.safetensors", TINY)
    for weights in (tmp_path / "model.safetensors", str(tmp_path / "model.safetensors"), tmp_path):
        assert mlx_contentvec.load(weights).config == TINY
    monkeypatch.chdir(tmp_path)
    assert mlx_contentvec.load("model.safetensors").config == TINY


def test_a_folder_with_the_name_of_a_known_model_is_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "contentvec").mkdir()
    random_weights_file(tmp_path / "contentvec" / "model.safetensors", TINY)
    monkeypatch.chdir(tmp_path)
    assert mlx_contentvec.load("contentvec").config == TINY


def test_a_known_model_is_fetched_and_converted_once(tmp_path: Path, tiny_checkpoint: Path) -> None:
    content = tiny_checkpoint.read_bytes()
    checksums = [hash_(content).hexdigest() for hash_ in (hashlib.md5, hashlib.sha256)]
    roots = (PROJECT, PROJECT / "convert", PROJECT / "parity")
    with HubServer() as server:
        repository = CONTENTVEC.home.removeprefix("https://huggingface.co/")
        server.add_repo(repository, {"hubert_base.pt": content})
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            **server.environment(tmp_path / "home"),
        }
        requests = []
        for _ in range(2):
            done = run_python(
                *("-c", LOAD, str(len(content)), *checksums), env=environment, cwd=tmp_path
            )
            assert done.returncode == 0, done.stderr
            assert int(done.stdout) > 0
            requests.append(len(server.requests))
    assert requests[0] == requests[1] > 0
    assert not list((tmp_path / "home").rglob("hubert_base.pt"))


def test_a_misspelled_name_is_told_what_it_may_mean() -> None:
    with pytest.raises(HubError, match="did you mean contentvec"):
        mlx_contentvec.load("contentvecc")


def test_a_file_that_is_not_converted_yet_is_told_to_be(tiny_checkpoint: Path) -> None:
    with pytest.raises(WeightsError, match="mlx-contentvec convert"):
        mlx_contentvec.load(tiny_checkpoint)
