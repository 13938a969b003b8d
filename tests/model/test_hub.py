"""resolve(): a file, a folder or a repository, and what happens when one is not right."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import ContentvecModel, hub, hub_client
from mlx_contentvec.errors import ContentvecError, HubError, OutputError
from mlx_contentvec.loading import find_weights
from tests.forks import run_python
from tests.hub_server import HubServer, needs_client_1
from tests.sources import PROJECT, search_path

REPO = "someone/contentvec-mlx"
WEIGHTS = b"\0weights" * 4000
HALF = b"\0half" * 1000
CONFIG = json.dumps(
    {"dtype": "float32", "variants": {"float16": {"file": "model.float16.safetensors"}}}
).encode()

#: the client waits longer and longer between attempts; here nobody need wait
NO_WAITING = "import time; time.sleep = lambda seconds: None\n"

RESOLVE = """
import sys
from mlx_contentvec.errors import HubError
from mlx_contentvec.hub import resolve
try:
    print(resolve(sys.argv[1], *(argument or None for argument in sys.argv[2:])))
except HubError as error:
    sys.exit(f"error: {error}")
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def sums(files: dict[str, bytes]) -> bytes:
    return "".join(f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in files.items()).encode()


def package(**changes: bytes) -> dict[str, bytes]:
    files = {
        "config.json": CONFIG,
        "model.safetensors": WEIGHTS,
        "model.float16.safetensors": HALF,
    }
    return {**files, "SHA256SUMS": sums(files), **changes}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


@pytest.fixture
def resolved(server: HubServer, tmp_path: Path) -> Run:
    """``resolved(name, revision, dtype, ...)``: the real client, in a process of its own."""

    def run(*arguments: str, token: str | None = "write", **env: str):
        environment = {
            **os.environ,
            "PYTHONPATH": search_path(),
            **server.environment(tmp_path / "home", token=token, **env),
        }
        done = run_python(
            "-c", NO_WAITING + RESOLVE, *arguments, env=environment, cwd=tmp_path, timeout=60
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Notes of what was verified go to this test's folder, not the user's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


def test_the_settings_of_whoever_runs_the_tests_do_not_reach_them() -> None:
    done = run_python(
        *("-c", "import os, tests.conftest; from huggingface_hub import constants as c\n"
          "print(c.HF_HUB_OFFLINE, c.ENDPOINT, *(v for v in os.environ if v == 'HF_HUB_CACHE'))"),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://x", "HF_HUB_CACHE": "/x"},
        cwd=PROJECT,
        timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "https://huggingface.co"], done.stderr


# files and folders -----------------------------------------------------------


def test_a_file_on_its_own_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path, {"any.safetensors": WEIGHTS})
    assert hub.resolve(folder / "any.safetensors") == folder / "any.safetensors"


def test_a_pipe_is_named_as_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(HubError, match="not a regular file"):
        hub.resolve(tmp_path / "pipe.safetensors")


def test_a_folder_gives_its_weights(tmp_path: Path) -> None:
    assert hub.resolve(str(write(tmp_path, package()))) == tmp_path / "model.safetensors"


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_a_folder_whose_name_is_no_text_gives_its_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / os.fsdecode(b"\xff"), package())
    for _ in range(2):
        assert hub.resolve(folder) == folder / "model.safetensors"


def test_a_folder_with_the_earlier_name_gives_that(tmp_path: Path) -> None:
    folder = write(tmp_path, {"contentvec_base.safetensors": WEIGHTS})
    assert hub.resolve(folder).name == "contentvec_base.safetensors"


def test_a_folder_with_one_file_of_any_name_gives_that(tmp_path: Path) -> None:
    folder = write(
        tmp_path, {"spin.safetensors": WEIGHTS, "spin.recording.safetensors": b"", "a.txt": b""}
    )
    (folder / ".hidden.safetensors").touch()
    for dtype in (None, "float16"):
        assert hub.resolve(folder, dtype=dtype) == folder / "spin.safetensors"
    with pytest.raises(HubError, match="no q8 weights"):
        hub.resolve(folder, dtype="q8")
    (folder / "other.safetensors").touch()
    with pytest.raises(HubError, match="several files of weights") as caught:
        hub.resolve(folder)
    assert "other.safetensors, spin.safetensors" in str(caught.value)
    (folder / "config.json").write_text("{}")
    with pytest.raises(HubError, match="holds no MLX weights"):
        hub.resolve(folder)


@pytest.mark.parametrize("ask", ["", "model.safetensors"])
def test_a_changed_byte_is_refused(tmp_path: Path, ask: str) -> None:
    folder = write(tmp_path, package(**{"model.safetensors": b"X" + WEIGHTS[1:]}))
    with pytest.raises(HubError, match="not the file that SHA256SUMS describes") as caught:
        hub.resolve(folder / ask)
    assert hashlib.sha256(WEIGHTS).hexdigest() in str(caught.value)


def test_a_change_after_a_good_check_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path, package())
    hub.resolve(folder)
    (folder / "model.safetensors").write_bytes(b"X" + WEIGHTS[1:])
    with pytest.raises(HubError, match="not the file"):
        hub.resolve(folder)


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, package())
    hub.resolve(folder)

    def refuse(*_: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(hub, "sha256_of", refuse)
    assert hub.resolve(folder) == folder / "model.safetensors"
    (folder / "link").symlink_to(folder)
    assert hub.resolve(folder / "link") == folder / "link" / "model.safetensors"


@pytest.mark.parametrize("why", ["in the way", "refused"])
def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    from huggingface_hub import constants

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    if why == "refused":
        monkeypatch.setattr("huggingface_hub.cached_assets_path", refuse)
    (tmp_path / "in the way").write_text("a file where the folder should be")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "in the way"))
    folder = write(tmp_path / "package", package())
    assert hub.resolve(folder) == folder / "model.safetensors"


def test_weights_that_the_checksums_leave_out_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, package(SHA256SUMS=sums({"config.json": CONFIG})))
    with pytest.raises(HubError, match=r"states no hash for model\.safetensors"):
        hub.resolve(folder)


@pytest.mark.parametrize("name", ["other.safetensors", "small/model.safetensors"])
def test_the_list_that_leaves_a_file_out_is_the_one_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, package())
    write((tmp_path / name).parent, {Path(name).name: WEIGHTS})
    with pytest.raises(HubError) as caught:
        hub.resolve_pretrained(tmp_path, filename=name)
    assert f"{tmp_path / 'SHA256SUMS'} states no hash for {name}" in str(caught.value)
    # a path of this machine is none of the package
    with pytest.raises(HubError, match="states no hash for /"):
        hub.resolve_pretrained(tmp_path, filename=str(tmp_path / name))


def test_checksums_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, package(SHA256SUMS=b"<!DOCTYPE html>\n"))
    with pytest.raises(HubError, match="not a list of checksums"):
        hub.resolve(folder)


def test_dtype_chooses_the_variant(tmp_path: Path) -> None:
    folder = write(tmp_path, package())
    assert hub.resolve(folder, dtype="float16").name == "model.float16.safetensors"


def test_a_float_type_without_a_variant_is_left_to_the_caller(tmp_path: Path) -> None:
    folder = write(tmp_path, package())
    assert hub.resolve(folder, dtype="bfloat16").name == "model.safetensors"
    bare = write(tmp_path / "bare", {"model.safetensors": WEIGHTS})
    assert hub.resolve(bare, dtype="bfloat16").name == "model.safetensors"


def test_a_file_that_the_checksums_beside_it_leave_out_is_taken_as_it_is(tmp_path: Path) -> None:
    file = write(tmp_path, package(**{"other.safetensors": HALF})) / "other.safetensors"
    assert hub.resolve(file) == file


def test_a_large_description_is_refused_before_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, package())
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**26 + 1)
    monkeypatch.setattr(hub, "sha256_of", lambda path: pytest.fail("it is hashed"))
    with pytest.raises(HubError, match="too large for what it should be"):
        hub.resolve(folder, dtype="float16")


def test_what_a_folder_lacks_is_listed(tmp_path: Path) -> None:
    files = hub.open_package(write(tmp_path, package()))
    assert files.missing("config.json", "card.md", "model.safetensors", "x") == ["card.md", "x"]


def test_a_quantised_variant_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path, package())
    with pytest.raises(HubError, match="no q4 weights") as caught:
        hub.resolve(folder, dtype="q4")
    assert "float32, float16" in str(caught.value)


def test_a_changed_config_does_not_choose(tmp_path: Path) -> None:
    folder = write(tmp_path, package(**{"config.json": CONFIG.replace(b"float16", b"float61")}))
    with pytest.raises(HubError, match=r"config\.json is not the file"):
        hub.resolve(folder, dtype="float16")


def test_a_config_that_is_not_json_is_said(tmp_path: Path) -> None:
    files = {"config.json": b"<html>", "model.safetensors": WEIGHTS}
    with pytest.raises(
        HubError, match=r"config\.json is not what it should be\s+found +it is not JSON"
    ):
        hub.resolve(write(tmp_path, files), dtype="q8")


def test_one_file_has_no_quantised_variant(tmp_path: Path) -> None:
    folder = write(tmp_path, package())
    assert hub.resolve(folder / "model.safetensors", dtype="float16").name == "model.safetensors"
    with pytest.raises(HubError, match="is one file and has no q8 variant"):
        hub.resolve(folder / "model.safetensors", dtype="q8")


def test_an_empty_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="holds no MLX weights") as caught:
        hub.resolve(tmp_path)
    assert "mlx-contentvec convert" in str(caught.value)


@pytest.mark.parametrize("form", ["a .pt", "a folder of transformers", "a folder with a .pt"])
def test_a_checkpoint_is_answered_with_the_command_that_converts_it(
    form: str, tiny_checkpoint: Path, converted_tiny: Path, tmp_path: Path, run_cli: Any
) -> None:
    from contentvec_convert.export import export

    source = tmp_path / "my embedder"
    if form == "a folder of transformers":
        export(converted_tiny, source, to="transformers")
    else:
        folder = source if form == "a folder with a .pt" else tmp_path
        write(folder, {"my model.pt": tiny_checkpoint.read_bytes()})
        source = folder if form == "a folder with a .pt" else folder / "my model.pt"
    with pytest.raises(ContentvecError) as caught:
        ContentvecModel.from_pretrained(source)
    lines = str(caught.value.hint).splitlines()
    (command,) = (line for line in lines if line.startswith("mlx-contentvec convert"))
    _, *arguments = shlex.split(command)
    done = run_cli(*arguments, "--allow-unknown", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ContentvecModel.from_pretrained(tmp_path / arguments[-1])


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_a_repository_is_answered_with_the_command_that_converts_it(
    form: str, converted_tiny: Path, tmp_path: Path, server: HubServer, run_cli: Any
) -> None:
    from contentvec_convert.export import export

    exported = export(converted_tiny, tmp_path / "exported", to="transformers").path
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    if form == "torch":
        exported = export(converted_tiny, tmp_path / "exported.pt", to="fairseq").path
        files = {"checkpoint.pt": exported.read_bytes()}
    server.add_repo(REPO, files)
    environment = server.environment(tmp_path / "home", token=None)
    program = "from mlx_contentvec import ContentvecModel as m; import sys; print(m.from_pretrained"
    asked = run_python(
        *("-c", f"{program}(sys.argv[1]).config)", REPO),
        env={**os.environ, "PYTHONPATH": search_path(), **environment},
        timeout=60,
    )
    lines = [line.removeprefix("hint: ").strip() for line in asked.stderr.splitlines()]
    (command,) = (line for line in lines if line.startswith("mlx-contentvec convert"))
    _, *arguments = shlex.split(command)
    assert arguments[1] == REPO
    done = run_cli(*arguments, "--allow-unknown", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    ContentvecModel.from_pretrained(tmp_path / arguments[-1])


def test_a_folder_given_for_a_file_is_answered_with_both_calls(tmp_path: Path) -> None:
    with pytest.raises(ContentvecError, match="is a folder") as caught:
        ContentvecModel.from_file(tmp_path)
    assert "from_pretrained" in str(caught.value)
    assert f"mlx-contentvec convert {tmp_path} -o" in str(caught.value)


def test_torch_weights_in_a_folder_are_converted_as_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "embedder", {"config.json": b"{}", "pytorch_model.bin": b"PK"})
    with pytest.raises(HubError, match="holds no MLX weights") as caught:
        hub.resolve(folder)
    assert f"mlx-contentvec convert {folder} -o embedder-mlx.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("nowhere.safetensors", "/no/such/folder", "a/b/c", "up/../one", "a/b--c", "a/b..c"),
        *("~nobody-of-this-name/model", "~nobody-of-this-name"),
    ],
)
def test_what_is_neither_is_not_looked_up_on_the_hub(name: str) -> None:
    for find in (hub.resolve, find_weights, hub.open_package):
        with pytest.raises(HubError, match="no weights at"):
            find(name)  # type: ignore[operator]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write(tmp_path, {"a.safetensors": WEIGHTS}) / "a.safetensors"
    assert hub.resolve("~/a.safetensors") == find_weights("~/a.safetensors") == file
    assert isinstance(hub.open_package("~"), hub.FolderFiles)


def test_a_path_that_is_missing_is_answered_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="no weights at") as caught:
        hub.resolve("model.safetensors")
    assert caught.value.hint == f"a local path is taken from the current folder: {tmp_path}"
    write(tmp_path, {"modell.safetensors": WEIGHTS})
    with pytest.raises(HubError, match=r"did you mean.*modell\.safetensors"):
        hub.resolve("model.safetensors")
    # a path is none of a repository, whatever its form
    with pytest.raises(HubError, match="no weights at"):
        hub.resolve(Path(REPO))


# the arguments of from_pretrained ---------------------------------------------


def test_a_path_of_this_machine_is_taken_before_all_else(tmp_path: Path) -> None:
    file = write(tmp_path, {"a.safetensors": WEIGHTS}) / "a.safetensors"
    for path in (file, str(file)):
        assert hub.resolve_pretrained(weights_path=path) == file
        assert hub.resolve_pretrained(path) == file
        assert hub.resolve_pretrained("a/b", "main", path) == file  # type: ignore[arg-type]
    with pytest.raises(HubError, match="no weights at"):
        hub.resolve_pretrained(weights_path="someone/contentvec-mlx")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("a/b", "main", "q8"), ("a/b", "main", "q8")),
        (("a/b", "main"), ("a/b", "main", None)),
        (("a/b", "x.safetensors"), ("a/b", None, "x.safetensors")),
        (("a/b", "y.safetensors", None, "a/b", "x.safetensors"), ("a/b", None, "x.safetensors")),
        (("a/b", "main", "float16", None, "x.safetensors"), ("a/b", "main", "x.safetensors")),
        ((None, "main", None, "a/b"), ("a/b", "main", None)),
    ],
)
def test_a_repository_is_asked_for_what_the_arguments_name(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str | None, ...], named: tuple[str, ...]
) -> None:
    for method in ("weights", "file"):
        monkeypatch.setattr(
            hub.RepositoryFiles, method, lambda files, what: (files.where, files.revision, what)
        )
    names = ("name", "revision", "dtype", "repo_id", "filename")
    found: object = hub.resolve_pretrained(**dict(zip(names, arguments, strict=False)))  # type: ignore[arg-type]
    assert found == named


@pytest.mark.parametrize("by", ["filename", "second argument"])
def test_one_file_of_a_folder_can_be_named(tmp_path: Path, by: str) -> None:
    folder = write(tmp_path, package())
    name = "model.float16.safetensors"
    arguments: dict[str, str] = {"filename" if by == "filename" else "revision": name}
    assert hub.resolve_pretrained(folder, **arguments) == folder / name
    with pytest.raises(HubError, match=r"has no other\.safetensors"):
        hub.resolve_pretrained(folder, filename="other.safetensors")
    with pytest.raises(HubError, match="has no q8 variant"):
        hub.resolve_pretrained(folder, dtype="q8", **arguments)
    write(folder, {name: b"X" + HALF[1:]})
    with pytest.raises(HubError, match="not the file that SHA256SUMS describes"):
        hub.resolve_pretrained(folder, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "a/b", "repo_id": "a/c"},
        {"name": "a/b", "weights_path": "file.safetensors"},
        {"repo_id": "a/b", "weights_path": "file.safetensors"},
        {"filename": "a.safetensors", "weights_path": "file.safetensors"},
        {"revision": "main", "weights_path": "file.safetensors"},
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(HubError, match="give one of them"):
        hub.resolve_pretrained(**arguments)


PRETRAINED = RESOLVE.replace(
    "resolve(sys.argv[1], *(argument or None for argument in sys.argv[2:]))",
    "resolve_pretrained(**dict(argument.split('=') for argument in sys.argv[1:]))",
).replace("import resolve", "import resolve_pretrained")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("name=lexandstuff/mlx-contentvec",),
        ("repo_id=lexandstuff/mlx-contentvec",),
        ("filename=contentvec_base.safetensors",),
        ("name=lexandstuff/mlx-contentvec", "revision=contentvec_base.safetensors"),
    ],
)
def test_the_first_release_is_found_in_every_form(
    server: HubServer, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    server.add_repo("lexandstuff/mlx-contentvec", {"contentvec_base.safetensors": WEIGHTS})
    result = run_python(
        *("-c", NO_WAITING + PRETRAINED, *arguments),
        env={
            **os.environ,
            "PYTHONPATH": search_path(),
            **server.environment(tmp_path / "home", token=None),
        },
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == WEIGHTS


def test_one_file_is_not_taken_for_a_package(tmp_path: Path) -> None:
    file = write(tmp_path, {"a.safetensors": WEIGHTS}) / "a.safetensors"
    for name in (file, str(file)):
        with pytest.raises(HubError, match="is one file, without the evidence"):
            hub.open_package(name)


# lists of checksums -----------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "0" * 64, "0" * 64 + "  ", "0" * 64 + " name", "0" * 63 + "  name", "A" * 64 + "  name",
        "  name", "", "0" * 64 + "  a\n" + "1" * 64 + "  a",
    ],
)  # fmt: skip
def test_a_line_that_sha256sum_does_not_write_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "SHA256SUMS"
    path.write_text(f"{'2' * 64}  first\n{line}\n{'3' * 64}  last\n")
    with pytest.raises(HubError, match="not a list of checksums"):
        hub.read_checksums(path)


def test_a_list_of_checksums_may_have_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "SHA256SUMS"
    start = "0" * 64 + "  "
    path.write_text(start + "n" * (2**20 - len(start)))
    assert len(hub.read_checksums(path)) == 1
    path.write_text(start + "n" * (2**20 - len(start) + 1))
    with pytest.raises(HubError, match="more than 1,048,576 bytes"):
        hub.read_checksums(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(HubError, match=r"not a list of checksums\s+found +'utf-8' codec"):
        hub.read_checksums(path)
    path.unlink()
    with pytest.raises(HubError, match="cannot be read: No such file"):
        hub.read_checksums(path)


def test_how_far_hashing_has_come_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = b"x" * (3 * 2**20 + 5)
    path.write_bytes(content)
    done: list[int] = []
    assert hub.sha256_of(path, done.append) == hashlib.sha256(content).hexdigest()
    assert len(done) > 3 and sum(done) == len(content)


def test_a_file_that_cannot_be_hashed_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (("", "not a regular"), ("pipe", "not a regular"), ("none", "No such file")):
        with pytest.raises(HubError, match=f"cannot be read: {why}"):
            hub.sha256_of(tmp_path / path)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        pytest.param(
            *("ALL_PROXY", "socks5://127.0.0.1:9"),
            "the proxy of this session needs is not installed",
            marks=needs_client_1,
        ),
        ("HTTP_PROXY", "http://127.0.0.1:9", "(or HF_ENDPOINT or HTTP_PROXY)"),
    ],
)
def test_a_proxy_that_does_not_work_is_named(
    server: HubServer, resolved: Run, variable: str, value: str, said: str
) -> None:
    if "socks" in value and importlib.util.find_spec("socksio"):
        pytest.skip("SOCKS proxies work here: pip uninstall socksio")
    result = resolved(REPO, **{"NO_PROXY": "", "no_proxy": "", variable: value})
    assert said in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize("place", ["token", "hub/models--someone--contentvec-mlx/refs/main"])
def test_a_pipe_among_the_files_of_the_client_is_not_waited_for(
    server: HubServer, resolved: Run, tmp_path: Path, place: str
) -> None:
    server.add_repo(REPO, package())
    pipe = tmp_path / "home" / place
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    result = resolved(REPO, token=None)
    assert f"{place} is no file" in result.stderr


def test_a_branch_in_the_cache_that_is_no_commit_is_said(resolved: Run, tmp_path: Path) -> None:
    branch = tmp_path / "home/hub" / f"models--{REPO.replace('/', '--')}" / "refs/main"
    branch.parent.mkdir(parents=True)
    branch.write_text("../../../../etc")
    result = resolved(REPO, HF_HUB_OFFLINE="1")
    assert "makes nothing of what it was given" in result.stderr, result.stderr
    assert "what is kept in" in result.stderr


def test_a_blob_is_hashed_once_if_its_name_is_a_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    digest = hub.sha256_of
    monkeypatch.setattr(hub, "sha256_of", lambda path: hashed.append(path) or digest(path))
    digits = hashlib.sha256(WEIGHTS).hexdigest()
    for name, times in ((digits, 1), ("0" * 40, 0), (digits + "x", 0)):
        blob = write(tmp_path, {name: WEIGHTS}) / name
        named = tmp_path / f"{len(name)}.safetensors"
        named.symlink_to(blob)
        hashed.clear()
        for _ in range(2):
            assert hub._as_named(named) == named
        assert hashed == [blob] * times


@pytest.mark.parametrize("removal", ["done", "refused", "another's"])
def test_a_damaged_download_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removal: str
) -> None:
    blob = write(tmp_path, {"0" * 64: WEIGHTS}) / ("0" * 64)
    named = tmp_path / "model.safetensors"
    named.symlink_to(blob)
    if removal == "refused":

        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "unlink", refuse)
    elif removal == "another's":

        def hashed(path: Path) -> str:
            path.unlink()
            named.unlink()
            return "1" * 64

        monkeypatch.setattr(hub, "sha256_of", hashed)
    with pytest.raises(HubError, match=r"model\.safetensors is damaged") as caught:
        hub._as_named(named)
    assert (f"remove {blob}" in str(caught.value)) == (removal == "refused")
    assert ("thrown away" in str(caught.value)) == (removal != "refused")
    assert os.path.lexists(named) == (removal == "refused")


def test_only_weights_may_be_large(tmp_path: Path) -> None:
    for name, size, plausible in (
        ("report.json", 2**26, True), ("report.json", 2**26 + 1, False),
        ("model.safetensors", 2**26 + 1, True),
    ):  # fmt: skip
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(size)
        if plausible:
            hub.require_plausible_size(path)
            continue
        with pytest.raises(HubError, match="too large for what it should be"):
            hub.require_plausible_size(path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", 7, None])
def test_a_variant_is_a_file_of_the_package(tmp_path: Path, name: object) -> None:
    config = {"dtype": "q8", "variants": {"q4": {"file": name}, "float16": name}}
    write(tmp_path, {"config.json": json.dumps(config).encode(), "model.safetensors": WEIGHTS})
    with pytest.raises(HubError, match="no q4 weights"):
        hub.resolve(tmp_path, dtype="q4")
    # what it is in itself, and what any weights can be turned into
    for dtype in ("q8", "float16"):
        assert hub.resolve(tmp_path, dtype=dtype).name == "model.safetensors"
    write(tmp_path, {"config.json": b'{"variants": ["q4"]}'})
    with pytest.raises(HubError, match="no q4 weights"):
        hub.resolve(tmp_path, dtype="q4")


def test_the_command_that_converts_names_what_is_needed(tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--hubert--small" / "snapshots" / ("0" * 40)
    said = hub.how_to_convert(cached / "pytorch_model.bin")
    assert said == "mlx-contentvec convert someone/hubert--small -o hubert--small-mlx.safetensors"
    other = tmp_path / "models--someone--hubert" / "elsewhere" / "x" / "model.pt"
    assert f"convert {other} -o" in hub.how_to_convert(other)
    for name in ("pytorch_model.bin", "model.safetensors", "model.pt"):
        path = tmp_path / "folder" / name
        write(path.parent, {name: b""})
        assert f"convert {path} -o" in hub.how_to_convert(path)
        write(path.parent, {"config.json": b"{}"})
        needed = path if name == "model.pt" else path.parent
        assert f"convert {needed} -o" in hub.how_to_convert(path)
        (path.parent / "config.json").unlink()


# what the client raises, without a client ---------------------------------------


def answer(kind: str, status: int, said: str = "") -> Exception:
    """An error of the client that has what the Hub answered."""
    from huggingface_hub import errors

    made: Exception = getattr(errors, kind).__new__(getattr(errors, kind))
    made.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    made.server_message = said  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("kind", "status", "token", "said"),
    [
        ("HfHubHTTPError", 401, "hf_x", "the Hub does not accept the token"),
        ("HfHubHTTPError", 401, None, "the Hub asks for a token"),
        ("HfHubHTTPError", 403, "hf_x", "the token may not do that"),
        ("HfHubHTTPError", 403, None, "the Hub asks for a token"),
        ("HfHubHTTPError", 409, None, "somebody else changed it at the same time"),
        ("HfHubHTTPError", 412, None, "somebody else changed it at the same time"),
        ("HfHubHTTPError", 429, None, "too many requests"),
        ("HfHubHTTPError", 404, None, "the Hub refuses"),
        ("HfHubHTTPError", 499, None, "the Hub refuses"),
        ("HfHubHTTPError", 500, None, "the Hub has a fault of its own"),
        ("HfHubHTTPError", 503, None, "the Hub has a fault of its own"),
        ("GatedRepoError", 403, None, "its owner gives access on request"),
        ("RevisionNotFoundError", 404, None, "it has no such revision"),
        ("EntryNotFoundError", 404, None, "it does not hold the file that was asked for"),
        ("RepositoryNotFoundError", 401, "hf_x", "this token may not see it"),
        ("RepositoryNotFoundError", 401, None, "no token was found"),
    ],
)
def test_every_answer_of_the_hub_has_its_words(
    monkeypatch: pytest.MonkeyPatch, kind: str, status: int, token: str | None, said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    for error in (answer(kind, status), answer(kind, status, " \nwhy\nand more")):
        explained = hub_client.explain(error, REPO, "download")
        assert explained is not None
        assert explained.problem.startswith(f"cannot download {REPO}: ")
        assert said in explained.problem
        why = ": why" if error.server_message else ""  # type: ignore[attr-defined]
        assert explained.found == f"HTTP {status}{why}"
    may_log_in = status == 401 and (token is None or kind == "HfHubHTTPError")
    log_in = "hf auth login" in str(hub_client.explain(answer(kind, status), REPO, "download"))
    assert log_in == (may_log_in or kind == "GatedRepoError")
    assert "write access" not in str(hub_client.explain(answer(kind, status), REPO, "download"))


def client_error(kind: str, text: str = "") -> Exception:
    from huggingface_hub import errors

    made: Exception = getattr(errors, kind).__new__(getattr(errors, kind))
    made.args = (text,)
    return made


def raised_in(error: Exception, *modules: str) -> Exception:
    """``error`` as a function of the last module raises it, called from those before."""

    def act() -> None:
        raise error

    for module in reversed(modules):
        names = {"__name__": module, "inner": act}
        exec("def outer(): inner()", names)
        act = names["outer"]  # type: ignore[assignment]
    try:
        act()
    except type(error):
        pass
    return error


def parsing(error: Exception) -> Exception:
    """``error`` as it is raised while the client's library parses an answer."""
    return raised_in(error, "huggingface_hub.hf_api", "httpx._models")


Lost = type("Lost", (Exception,), {"__module__": "httpcore._exceptions"})

#: name -> (error, whether HF_HUB_OFFLINE is set, what is said)
CLIENT: dict[str, tuple[Callable[[], Exception], bool, str | None]] = {
    "offline": (lambda: client_error("OfflineModeIsEnabled"), False, "HF_HUB_OFFLINE is set"),
    "offline, not in the cache": (
        lambda: client_error("LocalEntryNotFoundError"),
        True,
        "HF_HUB_OFFLINE is set",
    ),
    "not in the cache": (
        lambda: client_error("LocalEntryNotFoundError"),
        False,
        "the Hub does not answer, and it is not in the cache",
    ),
    "no name": (lambda: client_error("HFValidationError"), False, "is no repository name"),
    "lost": (lambda: Lost("gone"), False, "the connection to"),
    "refused": (lambda: ConnectionRefusedError("gone"), False, "the connection to"),
    "timed out": (lambda: TimeoutError(), False, "the connection to"),
    "cut off": (
        lambda: OSError("Consistency check failed: file should be of size 9"),
        False,
        "the connection closed before all had arrived",
    ),
    "no JSON": (
        lambda: parsing(json.JSONDecodeError("Expecting value", "<html>", 0)),
        False,
        "what answers is not the Hub",
    ),
    "no text": (
        lambda: parsing(UnicodeDecodeError("utf-8", b"\x80", 0, 1, "invalid start byte")),
        False,
        "what answers is not the Hub",
    ),
    "lists without end": (
        lambda: parsing(RecursionError("[[")),
        False,
        "what answers is not the Hub",
    ),
    "no JSON of ours": (
        lambda: raised_in(json.JSONDecodeError("Expecting value", "x", 0), "mlx_contentvec.hub"),
        False,
        None,
    ),
    "no text of ours": (
        lambda: raised_in(UnicodeDecodeError("utf-8", b"\x80", 0, 1, "x"), "mlx_contentvec.hub"),
        False,
        None,
    ),
    "our recursion": (
        lambda: raised_in(RecursionError("[["), "mlx_contentvec.hub"),
        False,
        None,
    ),
    "no route": (lambda: OSError(errno.EHOSTUNREACH, "No route"), False, "the connection to"),
    "another number": (lambda: OSError(errno.EDOM, "out of domain"), False, None),
    "another error": (lambda: OSError("No space left"), False, None),
    "another check": (lambda: ValueError("Consistency check failed"), False, None),
    "offline, another error": (lambda: ValueError("x"), True, None),
}


@pytest.mark.parametrize("wrapped", ["plain", "caused", "met"])
@pytest.mark.parametrize("name", CLIENT)
def test_every_error_of_the_client_has_its_words(
    monkeypatch: pytest.MonkeyPatch, name: str, wrapped: str
) -> None:
    from huggingface_hub import constants

    make, offline, said = CLIENT[name]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    error = make()
    if wrapped != "plain":
        outer = RuntimeError("outer")
        setattr(outer, "__cause__" if wrapped == "caused" else "__context__", error)
        # and round again
        error.__context__ = outer
        error = outer
    explained = hub_client.explain(error, REPO, "download")
    if said is None:
        assert explained is None
    else:
        assert explained is not None
        assert said in explained.problem


def test_a_client_whose_errors_are_value_errors_is_understood_too() -> None:
    """Before huggingface_hub 1.0 that a file is not in the cache is a ValueError."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    class Earlier(LocalEntryNotFoundError, ValueError):
        """That of huggingface_hub 0.34."""

    error = raised_in(Earlier("offline"), "huggingface_hub.file_download")
    explained = hub_client.explain(error, REPO, "download")
    assert explained is not None and "the Hub does not answer" in explained.problem
    error.__cause__ = Lost("no route")
    explained = hub_client.explain(error, REPO, "download")
    assert explained is not None and "the connection to" in explained.problem


def test_an_answer_of_another_form_is_what_the_client_cannot_make_its_objects_of() -> None:
    for modules, of_another_form in (
        (["huggingface_hub.hf_api"], True),
        (["huggingface_hub.hf_api", "dateutil.parser"], True),
        (["huggingface_hub.hf_api", "httpx._models"], False),  # it did not arrive as JSON
        (["httpx._models"], False),
        (["huggingface_hub_of_another"], False),
        (["mlx_contentvec.hub"], False),
        ([], False),
    ):
        error = raised_in(KeyError("id"), *modules)
        assert hub_client.is_of_another_form(error) == of_another_form, modules


@pytest.mark.parametrize("error", [ValueError("odd"), HubError("said"), OutputError("full")])
def test_what_is_not_of_the_clients_making_stays_what_it_is(error: Exception) -> None:
    error.__cause__ = Lost("gone") if isinstance(error, ContentvecError) else None
    with pytest.raises(type(error)) as caught, hub_client.plain_words(REPO, "look at"):
        raise error
    assert caught.value is error


def test_what_the_system_refuses_the_client_is_said() -> None:
    from huggingface_hub import constants

    for path, found in (("/cache/x", "/cache/x"), (None, constants.HF_HUB_CACHE)):
        error = OSError(errno.ENOSPC, "No space left on device", path)
        explained = hub_client.explain(error, REPO, "download")
        assert explained is not None
        assert explained.problem == f"cannot download {REPO}: No space left on device"
        assert explained.found == found
        assert (explained.hint is None) == (path is not None)  # that folder is not the client's


def test_a_reason_without_words_is_named_by_its_kind() -> None:
    wrapped = [RuntimeError("outer") for _ in range(2)]
    for outer, text in zip(wrapped, ("gone", ""), strict=True):
        outer.__cause__ = Lost(text)
    for error, found in (
        (TimeoutError(), "TimeoutError"),
        (Lost("a hf_abc\nb"), "a hf_..."),
        (wrapped[0], "gone"),
        (wrapped[1], "Lost"),
    ):
        explained = hub_client.explain(error, REPO, "download")
        assert explained is not None
        assert explained.found == found


@pytest.mark.parametrize(
    ("name", "facts", "said"),
    [
        ("config.json", {}, None),
        ("config.json", {"size": 2**26}, None),
        ("config.json", {"size": 2**26 + 1}, "too large"),
        ("config.json", {"size": 0}, None),
        ("config.json", {"size": -1}, "found     the size -1 of config.json"),
        ("config.json", {"size": None}, "found     no size of config.json"),
        ("model.safetensors", {"size": 2**34}, None),
        ("model.safetensors", {"size": 2**34 + 1}, "too large"),
        ("config.json", {"etag": None}, "the ETag None"),
        ("config.json", {"commit_hash": None}, "the commit None"),
        ("config.json", {"commit_hash": "0" * 41}, "the commit '000"),
        ("config.json", {"etag": "0" * 65}, "the ETag '000"),
    ],
)
def test_what_the_hub_states_of_a_file_is_plausible(
    monkeypatch: pytest.MonkeyPatch, name: str, facts: dict[str, Any], said: str | None
) -> None:
    stated = {"etag": "0" * 40, "commit_hash": "0" * 40, "size": 9, **facts}
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _: SimpleNamespace(**stated))
    if said is None:
        hub_client.require_plausible_file(REPO, name)
        return
    with pytest.raises(HubError) as refused:
        hub_client.require_plausible_file(REPO, name)
    assert said in str(refused.value)
    assert ("too large" in str(refused.value)) == (said == "too large")


#: what the look at a file on the Hub raises -> what is said where it is not in the cache
LOOK: dict[str, tuple[Callable[[], Exception], str]] = {
    "lost": (lambda: Lost("gone"), f"cannot download {REPO}: the connection to"),
    "odd": (lambda: ValueError("odd"), "MISSING"),
    "implausible": (lambda: HubError("implausible"), "implausible"),
}


@pytest.mark.parametrize("kind", LOOK)
def test_a_hub_that_is_not_reached_is_asked_once_and_the_cache_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    make, said = LOOK[kind]
    asked: list[str] = []
    commit = "1" * 40
    held = write(tmp_path / commit, {"model.safetensors": WEIGHTS, "config.json": CONFIG})

    def look(repo_id: str, name: str, revision: str | None) -> None:
        asked.append(name)
        raise make()

    def download(repo_id: str, name: str, revision: str | None, *, cached: bool) -> Path:
        assert cached and revision in (None, commit)
        if not (held / name).exists():
            raise client_error("LocalEntryNotFoundError")
        return held / name

    monkeypatch.setattr(hub, "require_plausible_file", look)
    monkeypatch.setattr(hub, "download", download)
    files = hub.RepositoryFiles(REPO)
    if kind != "implausible":  # there is no list of checksums, and none is asked for
        assert files.missing("config.json", "model.safetensors") == []
        assert files.weights() == held / "model.safetensors"
        assert (len(asked), files.revision) == (1, commit)
        (held / "model.safetensors").unlink()
    for act, missing in (
        (files.weights, f"{REPO} holds no MLX weights"),
        (lambda: files.file("model.safetensors"), f"{REPO} has no model"),
        (lambda: files.missing("config.json", "a.md"), f"a.md of {REPO} is not in the cache"),
    ):
        with pytest.raises(HubError) as caught:
            act()  # type: ignore[operator]
        assert caught.value.problem.startswith(said.replace("MISSING", missing))


def test_what_a_repository_lacks_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(repo_id: str, name: str, revision: str | None, *, cached: bool) -> Path:
        assert not cached
        if name == "lost":
            raise client_error("LocalEntryNotFoundError") from Lost("gone")
        if name != "config.json":
            raise client_error("EntryNotFoundError")
        return tmp_path / name

    monkeypatch.setattr(hub, "require_plausible_file", lambda *_: True)
    monkeypatch.setattr(hub, "download", download)
    files = hub.RepositoryFiles(REPO)
    assert files.missing("config.json", "card.md") == ["card.md"]
    with pytest.raises(HubError, match=rf"{REPO} has no card\.md"):
        files.file("card.md")
    with pytest.raises(HubError, match="the connection to"):
        files.missing("lost")
    # nor is a file taken unproven because the list of checksums did not arrive
    files = hub.RepositoryFiles(REPO)
    assert files.file("config.json") == tmp_path / "config.json"
    monkeypatch.setattr(hub, "CHECKSUMS", "lost")
    with pytest.raises(HubError, match="the connection to"):
        hub.RepositoryFiles(REPO).file("config.json")


@pytest.mark.parametrize("stated", [CONFIG, b"another"])
def test_the_list_of_checksums_may_be_that_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stated: bytes
) -> None:
    held = write(tmp_path, {"config.json": CONFIG, "SHA256SUMS": sums({"config.json": stated})})

    def look(repo_id: str, name: str, revision: str | None) -> None:
        if name == "SHA256SUMS":
            raise Lost("gone")

    monkeypatch.setattr(hub, "require_plausible_file", look)
    monkeypatch.setattr(hub, "download", lambda _, name, *__, **___: held / name)
    files = hub.RepositoryFiles(REPO)
    if stated == CONFIG:
        assert files.file("config.json") == held / "config.json"
        return
    with pytest.raises(HubError, match="not the file that SHA256SUMS describes"):
        files.file("config.json")


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("revision", [None, "main", "0" * 40, "0" * 41])
def test_a_commit_that_is_in_the_cache_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, revision: str | None, offline: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    asked: list[str] = []
    stated = SimpleNamespace(etag="0" * 40, commit_hash="0" * 40, size=9)
    monkeypatch.setattr(
        "huggingface_hub.get_hf_file_metadata", lambda url: asked.append(url) or stated
    )
    for cached in ("/cache/config.json", None):
        monkeypatch.setattr(
            "huggingface_hub.try_to_load_from_cache",
            lambda *_, cached=cached, **__: cached,
        )
        asked.clear()
        answered = hub_client.require_plausible_file(REPO, "config.json", revision)
        assert answered == bool(asked) == (not offline and (cached is None or revision != "0" * 40))


def test_a_download_is_broken_off_past_what_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    def download(*_: object, tqdm_class: type, **__: object) -> str:
        bars.append(tqdm_class(disable=True))
        return "/cache/config.json"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub_client.download(REPO, "config.json") == Path("/cache/config.json")
    bars[0].update(2**26 - 1)
    for nothing in (None, *[0] * 9):
        bars[0].update(nothing)
    bars[0].update(1)
    with pytest.raises(HubError, match="it does not end"):
        bars[0].update(1)
    for _ in range(5):
        bars[0].update(-9)
    with pytest.raises(HubError, match="the connection always breaks off"):
        bars[0].update(-9)
    # clients before 1.0 take no bar
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repo_id, name, revision, local_files_only: f"/cache/{revision}/{local_files_only}",
    )
    assert hub_client.download(REPO, "config.json", "v1") == Path("/cache/v1/False")
    assert hub_client.download(REPO, "config.json", "v1", cached=True) == Path("/cache/v1/True")


# the Hub -----------------------------------------------------------------------


def test_a_repository_is_downloaded_once_and_found_again(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    first = resolved(REPO)
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).read_bytes() == WEIGHTS
    asked = len(server.asked("GET /storage"))
    assert asked == 1
    assert resolved(REPO).stdout == first.stdout
    assert len(server.asked("GET /storage")) == asked
    assert not server.leaks


def test_a_cached_repository_is_found_offline(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    first = resolved(REPO)
    before = len(server.requests)
    offline = resolved(REPO, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, first.stdout)
    assert len(server.requests) == before


def test_a_cached_repository_is_found_when_the_network_is_gone(
    server: HubServer, resolved: Run
) -> None:
    server.add_repo(REPO, package())
    first = resolved(REPO)
    gone = resolved(REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert (gone.returncode, gone.stdout) == (0, first.stdout)


@pytest.mark.parametrize("lost", ["offline", "network gone"])
@pytest.mark.parametrize("by", ["name", "file", "commit"])
def test_a_cached_repository_without_checksums_needs_no_hub(
    server: HubServer, tmp_path: Path, by: str, lost: str
) -> None:
    name = "contentvec_base.safetensors" if by == "file" else "model.safetensors"
    commit = server.add_repo(REPO, {name: WEIGHTS, "config.json": CONFIG})
    arguments = {"name": (), "file": (f"filename={name}",), "commit": (f"revision={commit}",)}[by]

    def load(**env: str) -> subprocess.CompletedProcess[str]:
        return run_python(
            *("-c", NO_WAITING + PRETRAINED, f"name={REPO}", *arguments),
            env={
                **os.environ,
                "PYTHONPATH": search_path(),
                **server.environment(tmp_path / "home", token=None, **env),
            },
            timeout=60,
        )

    first = load()
    assert Path(first.stdout.strip()).read_bytes() == WEIGHTS, first.stderr
    gone = {"HF_HUB_OFFLINE": "1"} if lost == "offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    again = load(**gone)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr


def test_offline_and_not_cached_says_so(resolved: Run) -> None:
    result = resolved(REPO, HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in result.stderr


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_a_cache_that_cannot_be_made_is_said(
    server: HubServer, resolved: Run, tmp_path: Path, variable: str
) -> None:
    server.add_repo(REPO, package())
    (tmp_path / "file").write_text("in the way")
    result = resolved(REPO, token=None, **{variable: str(tmp_path / "file")})
    assert f"error: cannot download {REPO}: Not a directory" in result.stderr, result.stderr
    assert f"{variable} names another" in result.stderr


@pytest.mark.parametrize("file", ["token", "hub/models--someone--contentvec-mlx/refs/main"])
def test_a_file_of_the_client_that_is_no_text_is_named(
    server: HubServer, resolved: Run, tmp_path: Path, file: str
) -> None:
    server.add_repo(REPO, package())
    path = tmp_path / "home" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe")
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = resolved(REPO, token=None, **env)
        assert f"error: cannot download {REPO}: {path} holds no text" in result.stderr
        assert f"rm {path}" in result.stderr
    path.unlink()
    assert resolved(REPO, token=None).returncode == 0


def test_no_network_and_not_cached_says_so(resolved: Run) -> None:
    result = resolved(REPO, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the connection to http://127.0.0.1:9 failed" in result.stderr


def test_the_revision_is_honoured(server: HubServer, resolved: Run) -> None:
    old = server.add_repo(REPO, package())
    newer = {"config.json": CONFIG, "model.safetensors": HALF}
    server.add_repo(REPO, {**newer, "SHA256SUMS": sums(newer)})
    assert Path(resolved(REPO, old).stdout.strip()).read_bytes() == WEIGHTS
    assert Path(resolved(REPO).stdout.strip()).read_bytes() == HALF


def test_the_variant_is_downloaded_and_nothing_else(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    result = resolved(REPO, "", "float16")
    assert Path(result.stdout.strip()).read_bytes() == HALF
    assert len(server.asked("GET /storage")) == 1


def test_a_repository_of_the_first_release_is_taken(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, {"contentvec_base.safetensors": WEIGHTS})
    result = resolved(REPO)
    assert Path(result.stdout.strip()).read_bytes() == WEIGHTS, result.stderr
    again = resolved(REPO, HF_HUB_OFFLINE="1")
    assert again.stdout == result.stdout, again.stderr


def test_a_download_that_was_altered_on_the_way_is_thrown_away(
    server: HubServer, resolved: Run
) -> None:
    server.add_repo(REPO, package())
    server.fail("GET /storage", alter=lambda content: b"X" + content[1:])
    result = resolved(REPO)
    assert result.returncode == 1
    assert "the download of model.safetensors is damaged, and was thrown away" in result.stderr
    again = resolved(REPO)
    assert Path(again.stdout.strip()).read_bytes() == WEIGHTS, again.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "small/model.safetensors"])
def test_a_repository_that_contradicts_its_checksums_is_refused(
    server: HubServer, tmp_path: Path, name: str
) -> None:
    server.add_repo(REPO, {name: HALF, "SHA256SUMS": sums({name: WEIGHTS})})
    result = run_python(
        *("-c", NO_WAITING + PRETRAINED, f"name={REPO}", f"filename={name}"),
        env={
            **os.environ,
            "PYTHONPATH": search_path(),
            **server.environment(tmp_path / "home", token=None),
        },
        timeout=60,
    )
    assert "not the file that SHA256SUMS describes" in result.stderr, result.stderr


def test_a_connection_that_drops_does_no_harm(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    server.fail("GET /storage", drop_response=10_000)
    result = resolved(REPO)
    # clients of huggingface_hub 1 give up at once, later ones try again by themselves
    if result.returncode != 0:
        assert "the connection to" in result.stderr
        result = resolved(REPO)
    assert Path(result.stdout.strip()).read_bytes() == WEIGHTS, result.stderr


def test_a_connection_that_keeps_dropping_leaves_nothing(
    server: HubServer, resolved: Run, tmp_path: Path
) -> None:
    server.add_repo(REPO, package())
    server.fail("GET /storage", times=99, drop_response=0)
    result = resolved(REPO)
    assert result.returncode == 1
    assert "the connection to" in result.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_weights_missing_from_a_repository_are_named(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, {"pytorch_model.bin": WEIGHTS})
    said = resolved(REPO).stderr
    assert f"{REPO} holds no MLX weights" in said
    assert f"mlx-contentvec convert {REPO} -o contentvec-mlx-mlx.safetensors" in said


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the Hub does not accept the token"),
        (403, "the token may not do that"),
        (429, "too many requests"),
        (500, "the Hub has a fault of its own"),
        (503, "the Hub has a fault of its own"),
    ],
)
def test_what_the_hub_answers_is_said_in_plain_words(
    server: HubServer, resolved: Run, status: int, said: str
) -> None:
    server.add_repo(REPO, package())
    server.fail(f"HEAD /{REPO}", times=99, status=status)
    result = resolved(REPO)
    assert f"error: cannot download {REPO}: {said}" in result.stderr, result.stderr
    assert f"HTTP {status}" in result.stderr
    assert "hint:" in result.stderr
    assert server.token not in result.stderr + result.stdout


def test_an_unknown_repository_is_said_to_be_unknown(resolved: Run) -> None:
    assert "there is no such repository" in resolved("someone/nothing").stderr


def test_an_unknown_repository_without_a_token_hints_at_logging_in(resolved: Run) -> None:
    said = resolved("someone/nothing", token=None).stderr
    assert "no token was found" in said
    assert "hf auth login" in said


def test_an_unknown_revision_is_said_to_be_unknown(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    assert "no such revision" in resolved(REPO, "v9").stderr


def test_a_private_repository_needs_its_token(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package(), private=True)
    assert "no such repository, or it is private" in resolved(REPO, token=None).stderr
    assert resolved(REPO).returncode == 0


def test_a_rejected_token_is_not_repeated(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    result = resolved(REPO, token="hf_wrongwrongwrong")
    assert "does not accept the token" in result.stderr
    assert "wrongwrong" not in result.stderr


# what a server states


@pytest.mark.parametrize("what", ["ETag", "commit"])
@pytest.mark.parametrize(
    "stated", ["../../../../../outside", "/etc/outside", "a" * 300, "..", "x\x1b[31m" + "0" * 40]
)
def test_a_hash_that_is_none_makes_no_path(
    server: HubServer, resolved: Run, tmp_path: Path, what: str, stated: str
) -> None:
    server.add_repo(REPO, package())
    names = {"ETag": ("X-Linked-Etag", "ETag"), "commit": ("X-Repo-Commit",)}[what]
    server.fail("HEAD", times=99, headers=dict.fromkeys(names, stated))
    result = resolved(REPO)
    assert "what answers is not the Hub" in result.stderr, result.stderr
    assert "\x1b" not in result.stderr
    assert not [path for path in tmp_path.rglob("*") if "outside" in path.name or path.name == "a"]


def test_a_size_that_no_file_has_is_refused_before_it_is_downloaded(
    server: HubServer, resolved: Run
) -> None:
    server.add_repo(REPO, package())
    size = str(10**12)
    server.fail("HEAD", times=99, headers={"X-Linked-Size": size, "Content-Length": size})
    result = resolved(REPO)
    assert "too large for what it should be" in result.stderr, result.stderr
    assert not server.asked("GET /storage")


@needs_client_1
def test_a_paper_without_end_is_broken_off(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    server.fail(f"GET /{REPO}/resolve/.*SHA256SUMS", times=99, endless=True)
    result = resolved(REPO)
    assert "it does not end" in result.stderr, result.stderr
    assert server.asked("GET .*SHA256SUMS")[0].sent < 200_000_000


@needs_client_1
@pytest.mark.parametrize(
    ("seconds", "pieces", "given_up"),
    [
        (61, [1 << 16] * 5, False),
        (61, [1 << 16, (1 << 16) - 1], True),
        (40, [1, 1 << 16, 1], False),
        (60, [1, 1 << 16, 1], False),
        (61, [1, 1 << 16, 1], True),
        (61, [1 << 20, 1, 1, 1], True),
    ],
)
def test_what_a_minute_brings_decides(
    seconds: int, pieces: list[int], given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import get_session

    clock = iter(seconds * np.arange(1 + len(pieces)))
    monkeypatch.setattr(hub_client.time, "monotonic", lambda: next(clock))
    made = answer_of(*pieces)
    with hub_client.plain_words(REPO, "download"):
        get_session().event_hooks["response"][-1](made)
    if given_up:
        with pytest.raises(HubError, match=f"cannot download {REPO}: next to nothing arrives"):
            list(made.iter_raw())
    else:
        assert sum(map(len, made.iter_raw())) == sum(pieces)


def answer_of(*pieces: int, status: int = 200, **headers: str) -> Any:
    """An answer as the client's session gives it to its hooks."""

    def read() -> Iterator[bytes]:
        return (bytes(size) for size in pieces)

    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(headers=names, status_code=status, iter_raw=read, iter_bytes=read)


@needs_client_1
@pytest.mark.parametrize("most", [None, 16, 15])
def test_a_description_may_be_as_long_as_was_said(most: int | None) -> None:
    from huggingface_hub.utils import get_session

    with hub_client.plain_words(REPO, "look at", most=most):
        made = answer_of(8, 8)
        get_session().event_hooks["response"][-1](made)
        if most == 15:
            with pytest.raises(HubError, match="more than 15 bytes"):
                list(made.iter_bytes())
        else:
            assert sum(map(len, made.iter_bytes())) == 16


@needs_client_1
def test_each_thread_looks_at_its_own_answers() -> None:
    """The client's session, in which a hook stands, is that of the process."""
    from huggingface_hub.utils import get_session

    first, second = threading.Event(), threading.Event()
    said: list[str] = []

    def looks_at_a_description() -> None:
        with hub_client.plain_words("o/a", "look at", most=10):
            first.set()
            second.wait(10)
            made = answer_of(8, 8)
            for hook in get_session().event_hooks["response"]:
                hook(made)
            with pytest.raises(HubError) as refused:
                list(made.iter_bytes())
            said.append(str(refused.value))

    other = threading.Thread(target=looks_at_a_description)
    other.start()
    assert first.wait(10)
    with hub_client.plain_words("o/b", "download"):
        second.set()
        other.join()
        for _ in range(2):
            made = answer_of(8, 8)
            for hook in get_session().event_hooks["response"]:
                hook(made)
            assert len(list(made.iter_bytes())) == len(list(made.iter_raw())) == 2
    assert "the description from o/a: it does not end" in said[0]
    hooks = get_session().event_hooks["response"]
    assert len(hooks) == len(set(hooks))
    untouched = answer_of(8)
    read = untouched.iter_raw
    for hook in hooks:
        hook(untouched)
    assert untouched.iter_raw is read


@needs_client_1
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "1000"}, 1000),
        ({"Retry_After": "900"}, None),
        ({"RateLimit": '"api";r=4999;t=2'}, None),
        ({"RateLimit": '"api";r=0;t=901'}, 901),
        ({"Retry_After": "Sun, 06 Nov 1994 08:49:37 GMT"}, None),
        ({"Retry_After": "Sun, 06 Nov 2094 08:49:37 GMT"}, "2"),
        ({"Retry_After": "in a while"}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_how_long_the_client_would_wait(
    headers: dict[str, str], seconds: float | str | None, status: int
) -> None:
    from huggingface_hub.utils import get_session

    with hub_client.plain_words(REPO, "download"):
        hook = get_session().event_hooks["response"][-1]
        if seconds is None or status != 429:
            hook(answer_of(status=status, **headers))
            return
        with pytest.raises(HubError, match=f"to be asked again after {seconds}"):
            hook(answer_of(status=status, **headers))


def test_a_server_that_never_answers_is_asked_once(server: HubServer, resolved: Run) -> None:
    server.add_repo(REPO, package())
    server.fail("GET|HEAD", times=99, silence=30)
    begun = time.monotonic()
    result = resolved(REPO, HF_HUB_ETAG_TIMEOUT="1")
    assert "the connection to" in result.stderr, result.stderr
    assert time.monotonic() - begun < 20
    assert len(server.requests) <= 1
