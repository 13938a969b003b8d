"""Files that state absurd things, are no files, or change: refused at once, by every command."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from contentvec_convert import conversion
from contentvec_convert.checkpoint import foreign_file
from contentvec_convert.conversion import convert, ledger_path
from contentvec_convert.export import export
from contentvec_convert.identity import Identification
from contentvec_convert.inspection import inspect
from mlx_contentvec.errors import ContentvecError, IdentityError, OutputError
from mlx_contentvec.files import write_text
from mlx_contentvec.json_text import JsonError, parse_object, read_object
from tests.checkpoint_files import change_in_place
from tests.originals import TINY_BASE, save_transformers, transformers_hubert

MakeStandin = Callable[..., Path]

#: processor seconds that refusing any of these files may take, once all is imported
SECONDS = 3.0


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """No test here may take long or block, whatever it opens."""
    signal.alarm(60)
    used = time.process_time()
    yield
    signal.alarm(0)
    assert time.process_time() - used < SECONDS + 10  # the model and its file are made first


def refused(path: Path) -> list[str]:
    """What inspect, convert and export say of a file that none of them may take."""
    said = []
    inspected = None
    begun = time.process_time()
    try:
        inspected = inspect(path)
    except ContentvecError as error:
        said.append(str(error))
    if inspected is not None:
        assert inspected.problem is not None
        said.append(str(inspected.problem))
        json.dumps(inspected.to_dict())
    with pytest.raises(ContentvecError) as caught:
        convert(path, path.parent / "out.safetensors", allow_unknown=True)
    said.append(str(caught.value))
    with pytest.raises(ContentvecError) as caught:
        export(path, path.parent / "exported", to="transformers")
    said.append(str(caught.value))
    assert time.process_time() - begun < SECONDS
    assert all(len(text) < 2_000 for text in said)
    return said


@pytest.fixture(scope="module")
def converted(make_standin: MakeStandin, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "model.safetensors"
    convert(make_standin("tiny"), output, allow_unknown=True)
    return output


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "numpy") as opened:
        metadata: dict[str, str] = opened.metadata()
    return metadata


def with_metadata(converted: Path, path: Path, **changed: str) -> Path:
    save_file(load_file(converted), path, {**read_metadata(converted), **changed})
    return path


# ---- configurations


@pytest.mark.parametrize("layers", [10**5, 10**9, 10**18])
@pytest.mark.parametrize("field", ["encoder_layers", "encoder_layers_1"])
def test_a_converted_file_of_absurdly_many_layers_is_refused(
    tmp_path: Path, converted: Path, field: str, layers: int
) -> None:
    config = json.loads(read_metadata(converted)["config"])
    text = json.dumps({**config, field: layers})
    for said in refused(with_metadata(converted, tmp_path / "m.safetensors", config=text)):
        assert "layers" in said


@pytest.mark.parametrize("layers", [10**5, 10**9, 10**18])
def test_a_hugging_face_folder_of_absurdly_many_layers_is_refused(
    tmp_path: Path, layers: int
) -> None:
    save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, tmp_path / "hub")
    config = json.loads((tmp_path / "hub/config.json").read_text())
    config["num_hidden_layers"] = layers
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    assert "layers" in refused(tmp_path / "hub")[0]


# ---- texts


BAD_JSON = {
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "no object": "[1]",
    "a long integer": '{"encoder_layers": ' + "9" * 5_000 + "}",
    "twice": '{"a": 1, "a": 2}',
    "nan": '{"a": NaN}',
    "values": '{"a": [' + "0," * 1_000_001 + "0]}",
    "nothing": "",
    "a lone surrogate": '{"\ud800": 1}',
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_none_is_refused_in_a_clause(name: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_object(BAD_JSON[name])
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("key", ["config", "source", "quantization"])
@pytest.mark.parametrize("name", ["deep", "deep objects", "no object", "a long integer", "nan"])
def test_odd_metadata_of_a_converted_file_gives_one_error(
    tmp_path: Path, converted: Path, key: str, name: str
) -> None:
    path = with_metadata(converted, tmp_path / "m.safetensors", **{key: BAD_JSON[name]})
    if key == "source":
        inspect(path).to_dict()  # a file's own account is shown, not needed
        return
    refused(path)


@pytest.mark.parametrize("name", ["deep", "no object", "nan", "nothing"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_odd_json_in_a_hugging_face_folder_gives_one_error(
    tmp_path: Path, file: str, name: str
) -> None:
    save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, tmp_path / "hub")
    (tmp_path / "hub" / file).write_text(BAD_JSON[name])
    assert file in refused(tmp_path / "hub")[0]


@pytest.mark.parametrize("name", ["deep", "no object", "nothing"])
def test_an_odd_ledger_is_called_unreadable(tmp_path: Path, converted: Path, name: str) -> None:
    path = with_metadata(converted, tmp_path / "m.safetensors")
    ledger_path(path).write_text(BAD_JSON[name])
    assert (inspect(path).ledger or "").startswith("unreadable")


# ---- what is no regular file


def make_odd(kind: str, path: Path) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(path.with_name("pipe"))
        path.symlink_to("pipe")
    else:
        path.symlink_to(kind)
    return path


ODD = ["pipe", "link to a pipe", "/dev/zero", "/dev/tty", "/dev/stdin"]


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = make_odd(kind, tmp_path / "hubert_base.pt")
    refused(path)
    assert foreign_file(path) is None
    with pytest.raises((JsonError, OSError)):
        read_object(path)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "preprocessor_config.json", "ledger"]
)
def test_a_folder_with_what_is_no_regular_file_is_refused_without_waiting(
    tmp_path: Path, converted: Path, name: str, kind: str
) -> None:
    if name == "ledger":
        path = with_metadata(converted, tmp_path / "m.safetensors")
        make_odd(kind, ledger_path(path))
        assert (inspect(path).ledger or "").startswith("unreadable")
        return
    folder = tmp_path / "hub"
    save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, folder)
    (folder / name).unlink(missing_ok=True)
    make_odd(kind, folder / name)
    refused(folder)


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["out.safetensors", "out.ledger.json"])
def test_an_output_never_goes_into_a_pipe_or_a_device(
    tmp_path: Path, make_standin: MakeStandin, name: str, force: bool, kind: str
) -> None:
    make_odd(kind, tmp_path / name)
    with pytest.raises(OutputError):
        convert(make_standin("tiny"), tmp_path / "out.safetensors", allow_unknown=True, force=force)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ---- files that are lost or exchanged


def test_a_ledger_that_is_the_source_itself_is_not_overwritten(
    tmp_path: Path, converted: Path
) -> None:
    source = with_metadata(converted, tmp_path / "m.ledger.json")
    before = source.read_bytes()
    with pytest.raises(OutputError, match="the source itself"):
        convert(source, tmp_path / "m.safetensors", allow_unknown=True, force=True)
    assert source.read_bytes() == before


def test_a_strangers_ledger_is_not_overwritten_unasked(
    tmp_path: Path, make_standin: MakeStandin
) -> None:
    ledger = tmp_path / "m.ledger.json"
    ledger.write_text("the accounts of 2019")
    with pytest.raises(OutputError, match="already exists"):
        convert(make_standin("tiny"), tmp_path / "m.safetensors", allow_unknown=True)
    assert ledger.read_text() == "the accounts of 2019"
    convert(make_standin("tiny"), tmp_path / "m.safetensors", allow_unknown=True, force=True)
    assert json.loads(ledger.read_text())["output"]["name"] == "m.safetensors"


@pytest.mark.parametrize("moment", ["hashed", "writing", "checking"])
def test_bytes_changed_in_place_are_noticed_whatever_the_time_stamp_says(
    tmp_path: Path, converted: Path, moment: str
) -> None:
    source = tmp_path / "source.safetensors"  # keeps no checksums of its own
    source.write_bytes(converted.read_bytes())
    changed = False

    def change(doing: str = "hashed", *_: int) -> None:
        nonlocal changed
        if doing == moment and not changed:
            changed = True
            change_in_place(source)

    with pytest.raises(ContentvecError), Identification(source) as identification:
        if moment == "hashed":
            identification.result()
            change()
        convert(
            source,
            tmp_path / "out.safetensors",
            allow_unknown=True,
            identification=identification,
            progress=change,
        )
    assert changed
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_that_changes_between_reading_and_hashing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "hub"
    save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, folder)
    opened = conversion.open_checkpoint

    def changed_after(path: Path) -> Any:
        checkpoint = opened(path)
        change_in_place(folder / name)
        return checkpoint

    monkeypatch.setattr(conversion, "open_checkpoint", changed_after)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        convert(folder, tmp_path / "out.safetensors", allow_unknown=True)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("to", ["fairseq", "transformers"])
def test_an_export_never_replaces_its_own_source(tmp_path: Path, converted: Path, to: str) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    source = with_metadata(converted, folder / "model.safetensors")
    before = source.read_bytes()
    for output in (source, folder):
        with pytest.raises(OutputError, match="the source itself"):
            export(source, output, to=to, force=True)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"encoder_layers": 1}, {"conv_pos": 5}, {"final_dim": None}], ids=str
)
def test_a_configuration_of_another_model_is_refused_by_export_and_convert(
    tmp_path: Path, converted: Path, change: dict[str, Any]
) -> None:
    config = {**json.loads(read_metadata(converted)["config"]), **change}
    path = with_metadata(converted, tmp_path / "m.safetensors", config=json.dumps(config))
    refused(path)
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_an_export_or_a_report_never_goes_into_a_pipe_or_a_device(
    tmp_path: Path, converted: Path, kind: str
) -> None:
    path = make_odd(kind, tmp_path / "out.pt")
    with pytest.raises(OutputError, match="pipe or a device"):
        export(converted, path, to="fairseq", force=True)
    with pytest.raises(OutputError, match="pipe or a device"):
        write_text(path, "a report")
