"""load(): a model by the name of its weights, whatever they are."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

import mlx_contentvec
from contentvec_convert.known_files import CONTENTVEC
from mlx_contentvec import weights
from mlx_contentvec.errors import HubError, WeightsError
from tests.checkpoint_files import change_in_place
from tests.forks import run_python
from tests.hub_server import HubServer
from tests.small_models import TINY, random_weights_file
from tests.sources import search_path

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
    path = tmp_path / "model.safetensors"
    for name in (path, str(path), tmp_path):
        assert mlx_contentvec.load(name).config == TINY
    monkeypatch.chdir(tmp_path)
    assert mlx_contentvec.load("model.safetensors").config == TINY


@pytest.mark.parametrize("by", ["from_file", "load_weights"])
def test_a_file_that_changes_while_it_is_loaded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    path = random_weights_file(tmp_path / "model.safetensors", TINY)
    match = weights.match

    def changing(*arguments: Any) -> Any:
        change_in_place(path)
        return match(*arguments)

    monkeypatch.setattr(weights, "match", changing)
    with pytest.raises(WeightsError, match="changed while it was being read"):
        if by == "from_file":
            mlx_contentvec.load(path)
        else:
            mlx_contentvec.ContentvecModel(TINY).load_weights(path)
    monkeypatch.undo()
    assert mlx_contentvec.load(path).config == TINY


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
    with HubServer() as server:
        repository = CONTENTVEC.home.removeprefix("https://huggingface.co/")
        server.add_repo(repository, {"hubert_base.pt": content})
        environment = {
            **os.environ,
            "PYTHONPATH": search_path(),
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
