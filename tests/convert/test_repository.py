"""Models of the Hub: fetched by the address of their repository, proven, converted in one go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from contentvec_convert import repository
from contentvec_convert.identity import FileIdentity, Identity, identify
from contentvec_convert.known_files import KNOWN_FILES, KnownFile
from contentvec_convert.repository import Fetched, is_address
from mlx_contentvec import ContentvecModel
from mlx_contentvec.config import PRESETS, ModelConfig
from mlx_contentvec.errors import HubError, IdentityError, OutputError
from tests.hub_server import HubServer, needs_client_1
from tests.originals import TINY_BASE, save_transformers, transformers_hubert

Convert = Callable[..., Any]
#: transformers saves no projection
MODEL = dataclasses.replace(TINY_BASE, final_dim=None)


@pytest.fixture(scope="module")
def files(
    need: Callable[[str, str], Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of a small model in the Hugging Face layout."""
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    folder = tmp_path_factory.mktemp("model")
    save_transformers(transformers_hubert(MODEL), MODEL, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def command(server: HubServer, run_cli: Convert, tmp_path: Path) -> Convert:
    """``command("convert", "owner/name")``: the command, run in tmp_path."""

    def run(*arguments: str) -> Any:
        environment = server.environment(tmp_path / "home", token=None)
        return run_cli(*arguments, cwd=tmp_path, env=environment)

    return run


def test_a_hugging_face_folder_is_fetched_and_converted(
    server: HubServer, command: Convert, files: dict[str, bytes], tmp_path: Path
) -> None:
    commit = server.add_repo("someone/voice", files)
    done = command("convert", "someone/voice")
    assert done.returncode == 0, done.stderr
    assert "fetching someone/voice" in done.stderr
    assert f"downloaded from someone/voice/model.safetensors at {commit[:12]}" in done.stdout
    model = ContentvecModel.from_file(tmp_path / "voice.safetensors")
    assert model.config == MODEL
    assert (tmp_path / "voice" / "model.safetensors").read_bytes() == files["model.safetensors"]
    ledger = json.loads((tmp_path / "voice.ledger.json").read_text())
    assert ledger["source"]["known_as"] is None
    assert any("the SHA-256 that the Hub states" in note for note in ledger["notes"])
    # what is there is not downloaded again, and its conversion by hand is the same file
    downloads = len(server.asked("GET /storage"))
    assert command("convert", "someone/voice", "-o", "again.safetensors").returncode == 0
    assert len(server.asked("GET /storage")) == downloads
    assert (
        command("convert", "voice", "-o", "by-hand.safetensors", "--allow-unknown").returncode == 0
    )
    outputs = {
        (tmp_path / f"{name}.safetensors").read_bytes() for name in ("voice", "again", "by-hand")
    }
    assert len(outputs) == 1


def test_a_folder_and_a_file_inside_a_repository_have_addresses(
    server: HubServer, command: Convert, files: dict[str, bytes], tmp_path: Path
) -> None:
    inside = {f"embedders/small/{name}": content for name, content in files.items()}
    server.add_repo("someone/many", {"rmvpe.pt": b"\x00" * 100, **inside})
    for address in ("someone/many/embedders/small", "someone/many/embedders/small/config.json"):
        done = command("convert", address, "-o", "out.safetensors", "--force")
        if address.endswith("small"):
            assert done.returncode == 0, done.stderr
            assert (tmp_path / "small" / "config.json").is_file()
        else:
            assert done.returncode == 1 and "Traceback" not in done.stderr
    assert ContentvecModel.from_file(tmp_path / "out.safetensors").config == MODEL


def test_a_fairseq_checkpoint_of_a_repository_is_converted(
    server: HubServer, command: Convert, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content = tiny_checkpoint.read_bytes()
    server.add_repo("someone/rvc", {"hubert_base.pt": content, "rmvpe.pt": b"other"})
    # an address is no leave to convert a stand-in
    refused = command("convert", "someone/rvc")
    assert refused.returncode == 1 and "is a stand-in" in refused.stderr
    done = command("convert", "someone/rvc", "--allow-unknown")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == content
    assert ContentvecModel.from_file(tmp_path / "contentvec_base.safetensors").config.final_dim
    # another checksum than the one that the caller expects
    wrong = command("convert", "someone/rvc", "-o", "x.safetensors", "--expect-sha256", "0" * 64)
    assert wrong.returncode == 1 and "is not the file expected" in wrong.stderr


def test_several_checkpoints_are_not_chosen_among(server: HubServer, command: Convert) -> None:
    server.add_repo("someone/two", {"a.pt": b"a", "b.pt": b"b"})
    done = command("convert", "someone/two")
    assert done.returncode == 1
    assert "a.pt, b.pt" in done.stderr
    assert "mlx-contentvec convert someone/two/NAME" in done.stderr
    server.add_repo("someone/none", {"README.md": b"nothing"})
    done = command("convert", "someone/none")
    assert done.returncode == 1 and "holds no model that can be chosen" in done.stderr


def test_shards_are_fetched_with_their_index(
    server: HubServer, command: Convert, files: dict[str, bytes], tmp_path: Path
) -> None:
    from safetensors.numpy import load, save

    tensors = load(files["model.safetensors"])
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    server.add_repo(
        "someone/large",
        {
            **{name: content for name, content in files.items() if name != "model.safetensors"},
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{file: save({n: tensors[n] for n in held}) for file, held in shards.items()},
        },
    )
    done = command("convert", "someone/large")
    assert done.returncode == 0, done.stderr
    assert ContentvecModel.from_file(tmp_path / "large.safetensors").config == MODEL
    # an index that points out of its folder is not followed
    index["weight_map"][names[0]] = "../../elsewhere.safetensors"
    server.add_repo(
        "someone/evil", {**files, "model.safetensors.index.json": json.dumps(index).encode()}
    )
    del server.repos["someone/evil"].files["model.safetensors"]
    done = command("convert", "someone/evil")
    assert done.returncode == 1 and "outside its folder" in done.stderr


def test_a_download_that_broke_off_goes_on(
    server: HubServer, command: Convert, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.add_repo("someone/voice", files)
    size = len(files["model.safetensors"])
    server.fail("GET /storage", drop_response=size // 2)
    server.fail("GET /storage", times=99, status=500)
    broken = command("convert", "someone/voice")
    assert broken.returncode == 1 and "Traceback" not in broken.stderr
    assert not (tmp_path / "voice" / "model.safetensors").exists()
    server.faults.clear()
    assert command("convert", "someone/voice").returncode == 0


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"alter": lambda content: b"X" + content[1:]}, "served is not model.safetensors"),
        ({"alter": lambda content: content + b"more" * 9999}, "more than"),
    ],
    ids=["altered", "too long"],
)
def test_what_is_not_what_the_hub_states_is_thrown_away(
    server: HubServer,
    command: Convert,
    files: dict[str, bytes],
    tmp_path: Path,
    fault: dict[str, Any],
    said: str,
) -> None:
    server.add_repo("someone/voice", files)
    server.fail("GET /storage", times=99, **fault)
    done = command("convert", "someone/voice")
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert not (tmp_path / "voice" / "model.safetensors").exists()
    assert not (tmp_path / "voice.safetensors").exists()
    server.faults.clear()
    assert command("convert", "someone/voice").returncode == 0


def test_a_configuration_that_is_there_is_not_replaced(
    server: HubServer, command: Convert, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.add_repo("someone/voice", files)
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "config.json").write_text("mine")
    done = command("convert", "someone/voice")
    assert done.returncode == 1 and "is not that of someone/voice" in done.stderr
    assert (tmp_path / "voice" / "config.json").read_text() == "mine"
    assert not server.asked("GET /storage")  # said before the weights are downloaded


def test_a_disk_that_is_too_full_is_said_before_the_download(
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from contentvec_convert import fetch
    from mlx_contentvec import files as file_module

    size = len(files["model.safetensors"])
    row = KnownFile("tiny", ("model.safetensors",), "", "https://huggingface.co/a/b", size=size)
    usage = SimpleNamespace(total=10 * size, free=size // 2)
    monkeypatch.setattr(file_module.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(fetch, "_obtain", lambda *arguments: pytest.fail("it is downloaded"))
    path = tmp_path / "model.safetensors"
    with pytest.raises(OutputError, match="the disk is too full"):
        fetch._fetch_file(row, path, force=False, progress=None)
    assert not list(tmp_path.iterdir())
    # what is there of it already needs no room
    path.with_name(f"{path.name}.part").write_bytes(files["model.safetensors"][: size - 9])
    with pytest.raises(pytest.fail.Exception, match="it is downloaded"):
        fetch._fetch_file(row, path, force=False, progress=None)


@pytest.mark.parametrize(
    "answer",
    [
        b"<!DOCTYPE html><title>Log in</title>", b'{"\x80"}', b"[" * 100_000, b"[]", b"null", b"{}",
        b'{"id": "a/b", "lastModified": "yesterday"}', b'{"id": "a/b", "siblings": ["x"]}',
        b'{"id": "a/b", "siblings": 7}', b'{"id": "a/b", "siblings": [{"rfilename": 7}]}',
    ],
)  # fmt: skip
def test_an_answer_that_describes_no_repository_is_said(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    server.add_repo("someone/voice", {})
    server.fail("GET", times=99, alter=lambda _: answer)
    problem = "cannot look at someone/voice: what answers is not the Hub"
    with pytest.raises(HubError, match=problem) as caught:
        repository.find_model("someone/voice")
    found = ("JSON of another form", "text that is not JSON", "bytes that are no text",
             "lists in lists without end")  # fmt: skip
    assert caught.value.found in found


def test_an_index_that_names_itself_is_damaged(server: HubServer, command: Convert) -> None:
    index = b'{"weight_map": {"a": "pytorch_model.bin.index.json"}}'
    server.add_repo("someone/voice", {"config.json": b"{}", "pytorch_model.bin.index.json": index})
    done = command("fetch", "someone/voice")
    assert done.returncode == 1
    assert "it names an index in the place of weights" in done.stderr


def test_a_name_that_is_too_long_for_a_repository_is_said() -> None:
    with pytest.raises(HubError, match="is no repository name"):
        repository.find_model("someone/" + "a" * 200)


@needs_client_1
def test_a_description_without_end_is_broken_off(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("mlx_contentvec.hub_client.PAPER_BYTES", 1 << 20)
    server.add_repo("someone/voice", {})
    server.fail("GET", times=9, endless=True)
    with pytest.raises(HubError, match="it does not end"):
        repository.find_model("someone/voice")
    assert len(server.requests) <= 1


@pytest.mark.parametrize("kind", [AttributeError, KeyError, TypeError, ValueError])
def test_a_fault_of_ours_is_not_blamed_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def model_info(*_: object, **__: object) -> None:
        raise kind("ours")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(kind, match="ours"):
        repository.find_model("someone/voice")


INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
SHARDS = "1.safetensors 2.safetensors"


@pytest.mark.parametrize(
    ("files", "address", "chosen", "beside"),
    [
        ("config.json model.safetensors pytorch_model.bin", "a/b", "model.safetensors", 1),
        ("config.json pytorch_model.bin x.pt", "a/b", "pytorch_model.bin", 1),
        ("config.json preprocessor_config.json processor_config.json model.safetensors",
         "a/b", "model.safetensors", 3),
        ("model.safetensors", "a/b", "model.safetensors", 0),
        (f"config.json {INDEX} {SHARDS}", "a/b", SHARDS, 2),
        (f"{INDEX} {SHARDS}", f"a/b/{INDEX}", SHARDS, 1),
        (f"config.json model.safetensors {TORCH_INDEX} {SHARDS}", f"a/b/{TORCH_INDEX}", SHARDS, 2),
        (f"config.json {INDEX} 1.safetensors", "a/b/1.safetensors", "1.safetensors", 0),
        # a fairseq checkpoint is one file, whatever else is there
        ("config.json hubert_base.pt other.pt", "a/b", "hubert_base.pt", 0),
        ("config.json some.pth", "a/b", "some.pth", 0),
        ("config.json contentvec_base.safetensors a.pt", "a/b", "contentvec_base.safetensors", 0),
        ("config.json a.pt b.pt", "a/b/b.pt", "b.pt", 0),
        ("config.json a.pt model.safetensors", "a/b/model.safetensors", "model.safetensors", 1),
        ("a.pt x/b.pt x/y/c.pt", "a/b", "a.pt", 0),
        ("a.pt x/b.pt x/y/c.pt", "a/b/x", "x/b.pt", 0),
        ("a.pt x/b.pt x/y/c.pt", "a/b/x/y/c.pt", "x/y/c.pt", 0),
        ("x\x1b.pt b.pt", "a/b", "b.pt", 0),
        ("a.pt b.pt", "a/b", None, 0),
        ("hubert_base.pt checkpoint_best_legacy_500.pt", "a/b", None, 0),
        ("a.pt", "a/b/c.pt", None, 0),
        ("", "a/b", None, 0),
    ],
)  # fmt: skip
def test_the_weights_of_a_repository_are_found_among_its_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    address: str,
    chosen: str | None,
    beside: int,
) -> None:
    siblings = [SimpleNamespace(rfilename=name) for name in files.split(" ") if name]
    info = SimpleNamespace(sha="1" * 40, siblings=siblings)

    def model_info(_: object, repo_id: str, *, revision: str | None) -> SimpleNamespace:
        assert (repo_id, revision) == ("a/b", "v1")
        return info

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr(repository, "stated", lambda row: row)
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": dict(zip("ab", SHARDS.split(), strict=True))}))
    monkeypatch.setattr(repository, "small_file", lambda *_: index)
    if chosen is None:
        with pytest.raises(HubError, match="holds no model that can be chosen"):
            repository.find_model(address, "v1")
        return
    rows = repository.find_model(address, "v1")
    assert [row.hub_path for row in rows] == chosen.split()
    assert {row.names[0] for row in rows} == {Path(name).name for name in chosen.split()}
    for row in rows:
        assert (row.home, row.revision) == ("https://huggingface.co/a/b", "1" * 40)
        assert len(row.beside) == beside and set(row.beside) <= set(files.split())
        assert row.form == ("transformers" if beside else "fairseq")


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        ("a/b", "b"),
        ("a/b/model.safetensors", "b"),
        ("a/b/model.safetensors.index.json", "b"),
        ("a/b/x/y", "y"),
        ("a/b/x/y/model.safetensors", "y"),
        ("spin", "spin"),
    ],
)
def test_a_model_of_several_files_is_named_after_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, folder: str
) -> None:
    from contentvec_convert import fetch

    inside = "x/y/" if "/x/y" in address else ""
    row = KnownFile(
        *("a", ("model.safetensors",), "", "https://huggingface.co/a/b"),
        hub_path=f"{inside}model.safetensors",
        beside=("config.json",),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "find_model", lambda *_: (row,))
    monkeypatch.setattr(fetch, "stated", lambda row: row)
    identity = SimpleNamespace(name="", sha256="")
    monkeypatch.setattr(fetch, "_fetch_file", lambda *_, **__: identity)
    assert fetch.fetch(address).path == Path(folder)


@pytest.mark.parametrize(("commit", "revision"), [(None, None), (5, "5"), ("main", "main")])
def test_a_commit_is_text_or_none(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, commit: object, revision: str | None
) -> None:
    answer = {"id": "someone/voice", "siblings": [{"rfilename": "a.pt"}], "sha": commit}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr(repository, "stated", lambda row: row)
    server.add_repo("someone/voice", {})
    server.fail("GET", times=99, alter=lambda _: json.dumps(answer).encode())
    (row,) = repository.find_model("someone/voice")
    assert (row.hub_path, row.revision, row.beside) == ("a.pt", revision, ())


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, None),
        ({"size": 2**35}, None),
        ({"size": 2**35 + 1}, "too large"),
        ({"size": -1}, "the size -1 of"),
        ({"size": None}, "no size"),
        ({"etag": "0" * 40}, "states no SHA-256"),
        ({"etag": "0" * 64 + "x"}, "the ETag"),
        ({"etag": None}, "the ETag"),
        ({"commit_hash": "../x"}, "the commit"),
        ({"commit_hash": None}, "the commit"),
    ],
)
def test_what_the_hub_states_of_weights_is_plausible(
    monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], said: str | None
) -> None:
    found = {"etag": "0" * 64, "commit_hash": "1" * 40, "size": 9, **facts}
    monkeypatch.setattr(
        "huggingface_hub.get_hf_file_metadata", lambda *_, **__: SimpleNamespace(**found)
    )
    row = KnownFile("a", ("a.pt",), "", "https://huggingface.co/a/b", hub_path="a.pt")
    if said is not None:
        with pytest.raises(HubError, match=said):
            repository.stated(row)
        return
    stated = repository.stated(row)
    assert (stated.size, stated.sha256, stated.revision) == (found["size"], "0" * 64, "1" * 40)


@pytest.mark.parametrize(
    ("known", "etag", "right"),
    [
        ("1" * 64, "1" * 64, True),
        ("1" * 64, "2" * 64, False),
        ("1" * 64, "2" * 40, True),  # a mirror may name its files by something else
        (None, "2" * 64, True),
    ],
)
def test_a_size_is_taken_from_a_hub_that_states_the_checksum_that_is_known(
    monkeypatch: pytest.MonkeyPatch, known: str | None, etag: str, right: bool
) -> None:
    found = SimpleNamespace(etag=etag, commit_hash="1" * 40, size=9)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: found)
    row = KnownFile("k", ("a.pt",), "", "https://huggingface.co/a/b", hub_path="a.pt", sha256=known)
    if right:
        assert repository.with_stated_size(row) == dataclasses.replace(row, size=9)
        return
    with pytest.raises(IdentityError, match="what a/b serves is not k") as refused:
        repository.with_stated_size(row)
    assert etag in str(refused.value.found) and refused.value.expected == f"sha256 {known}"


@pytest.mark.parametrize(("size", "said"), [(2**26, None), (2**26 + 1, "config.json is too large")])
def test_a_configuration_that_is_stated_to_be_large_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, said: str | None
) -> None:
    stated = SimpleNamespace(etag="0" * 40, commit_hash="1" * 40, size=size)
    asked: list[tuple[str | None, ...]] = []

    def download(*arguments: str | None) -> Path:
        asked.append(arguments)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: stated)
    monkeypatch.setattr(repository.hub_client, "download", download)
    if said is None:
        assert repository.small_file("a/b", "x/config.json", "v1") == tmp_path
        assert asked == [("a/b", "x/config.json", "v1")]
        return
    with pytest.raises(HubError, match=said):
        repository.small_file("a/b", "x/config.json", "v1")
    assert not asked


def test_a_revision_is_one_of_a_repository(
    server: HubServer, command: Convert, files: dict[str, bytes], tmp_path: Path
) -> None:
    first = server.add_repo("someone/voice", files)
    server.add_repo("someone/voice", {"README.md": b"emptied"})
    assert command("convert", "someone/voice").returncode == 1
    assert command("convert", "someone/voice", "--revision", first).returncode == 0
    assert command("convert", "voice", "--revision", first).returncode == 2
    assert "has no revisions" in command("convert", "spin", "--revision", "x").stderr


def test_the_first_release_is_converted_by_its_address_and_its_key(
    server: HubServer, command: Convert, tmp_path: Path
) -> None:
    from mlx_contentvec.first_release import HF_REPO_ID, HF_WEIGHTS_FILE

    recorded = Path(__file__).parents[1] / "data" / "first_release.safetensors"
    server.add_repo(HF_REPO_ID, {HF_WEIGHTS_FILE: recorded.read_bytes()})
    done = command("convert", HF_REPO_ID, "-o", "new.safetensors", "--heads", "4")
    assert done.returncode == 0, done.stderr
    assert ContentvecModel.from_file(tmp_path / "new.safetensors").config.encoder_layers == 2
    # by its key it must be the model that the table says
    done = command("convert", "mlx-contentvec-0.1", "-o", "x.safetensors", "--heads", "4")
    assert done.returncode == 1 and "is not mlx-contentvec-0.1" in done.stderr


def test_a_known_model_without_a_checksum_is_identified_by_where_it_lies(
    server: HubServer,
    command: Convert,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = next(row for row in KNOWN_FILES if row.key == "spin")
    assert row.hub_path is not None and not row.verifiable
    folder = row.hub_path.rpartition("/")[0]
    held = {
        f"{folder}/config.json": files["config.json"],
        row.hub_path: files["model.safetensors"],
    }
    server.add_repo("IAHispano/Applio", held)
    # the small model is none of the row's architecture
    done = command("convert", "spin")
    assert done.returncode == 1
    assert f"what IAHispano/Applio/{row.hub_path} at " in done.stderr
    assert "encoder_layers 12" in done.stderr and "encoder_layers 3" in done.stderr
    assert not (tmp_path / "spin.safetensors").exists()
    monkeypatch.setitem(PRESETS, "base", MODEL)
    from contentvec_convert.conversion import convert

    fetched = Fetched(tmp_path / "spin", "somewhere", {"pytorch_model.bin": ""}, (), row)
    with pytest.raises(IdentityError, match="no longer the file that was downloaded"):
        convert(fetched.path, tmp_path / "spin.safetensors", fetched=fetched)
    sha256 = identify(tmp_path / "spin" / "pytorch_model.bin").sha256
    fetched = dataclasses.replace(fetched, sha256={"pytorch_model.bin": sha256})
    ledger = convert(fetched.path, tmp_path / "spin.safetensors", fetched=fetched)
    # its users give it plain audio, which its files do not say
    assert ledger.config.normalize is False
    assert any(note.startswith("downloaded as spin from") for note in ledger.notes)


def test_a_path_in_a_folder_that_is_here_is_only_fetched_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Convert, server: HubServer
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    server.add_repo("someone/voice", {"hubert.pt": b"\0weights"})
    converted = command("convert", "someone/voice", "-o", "x.safetensors")
    assert "cannot read someone/voice: No such file" in converted.stderr
    assert not server.requests
    fetched = command("fetch", "someone/voice")
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "hubert.pt").read_bytes() == b"\0weights"


def test_what_looks_like_a_path_is_not_looked_up() -> None:
    for name in (
        *("models/hubert_base.pt", "owner", "/owner/name", "../name"),
        *("owner/name/../x", "owner/name//x", "./owner/name", "owner/a--b", "~/name", "o/n/\x1b"),
        *("owner/name.pt", "owner/name.pth", "owner/name.ckpt", "owner/name.bin"),
        *("owner/name.safetensors", "owner/name.onnx", "owner/name.zip"),
    ):
        assert not is_address(name), name
    for name in ("owner/name", "owner/name.v2", "owner/name/file.pt", "owner/name/folder/x"):
        assert is_address(name), name


def test_what_a_download_was_held_to_is_noted_unless_its_checksums_show_it() -> None:
    keys = ("contentvec", "spin")
    known, unproven = (next(row for row in KNOWN_FILES if row.key == key) for key in keys)
    for row, begin in ((known, None), (unproven, "downloaded as spin from a/b, held"),
                       (None, "downloaded from a/b, held")):  # fmt: skip
        notes = Fetched(Path(), "a/b", row=row).notes
        assert [note[: len(begin or "")] for note in notes] == ([] if begin is None else [begin])
    row = KnownFile("k", ("a.pt",), "", "https://huggingface.co/a/b", hub_path="x/a.pt")
    assert repository.origin_of([row]) == "a/b/x/a.pt"
    assert repository.origin_of([dataclasses.replace(row, revision="1" * 40)]) == (
        "a/b/x/a.pt at 111111111111"
    )


def test_only_weights_that_were_downloaded_are_compared() -> None:
    weights = FileIdentity("a.pt", 1, "", "0" * 64)
    identity = Identity("a.pt", 1, "", "", None, (weights, FileIdentity("c.json", 1, "", "2" * 64)))
    Fetched(Path(), "a/b", {"a.pt": "0" * 64}).check(identity)
    with pytest.raises(IdentityError, match=r"a\.pt is no longer the file"):
        Fetched(Path(), "a/b", {"a.pt": "1" * 64}).check(identity)


def test_the_architectures_of_the_table_are_told_apart() -> None:
    row = next(row for row in KNOWN_FILES if row.key == "spin")
    fetched = Fetched(Path(), "somewhere", row=row)
    fetched.check_model(ModelConfig(encoder_attention_heads=8, conv_pos_batch_norm=True))
    # an address promises no architecture, and checksums say more than one
    for known in (None, next(row for row in KNOWN_FILES if row.verifiable)):
        Fetched(Path(), "somewhere", row=known).check_model(PRESETS["large"])
    for other in (PRESETS["large"], ModelConfig(encoder_layers=11)):
        with pytest.raises(IdentityError, match="is not spin"):
            fetched.check_model(other)
