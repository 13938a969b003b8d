"""fetch: a known file arrives whole and proven, or does not get its name."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from contentvec_convert import fetch as fetch_module
from contentvec_convert import repository
from contentvec_convert.fetch import known_file
from contentvec_convert.known_files import CONTENTVEC, KNOWN_FILES, KnownFile
from mlx_contentvec.errors import HubError, IdentityError, OutputError
from mlx_contentvec.files import Draft
from tests.forks import run_python
from tests.hub_server import HubServer, needs_client_1
from tests.sources import search_path

REPO = CONTENTVEC.home.removeprefix("https://huggingface.co/")
CONTENT = bytes(range(256)) * 1200
OTHER = b"not the same" * 30_000
#: the table's first row, with this test's bytes for the 189 MB that it describes
SMALL = dataclasses.replace(
    CONTENTVEC,
    size=len(CONTENT),
    md5=hashlib.md5(CONTENT).hexdigest(),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)

#: the client's pieces are made small, and nobody waits between attempts
PREAMBLE = f"""
import dataclasses, sys, time
time.sleep = lambda seconds: None
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096
from contentvec_convert import fetch, known_files
row = dataclasses.replace(
    known_files.CONTENTVEC, size={SMALL.size}, md5="{SMALL.md5}", sha256="{SMALL.sha256}")
folder = dataclasses.replace(
    row, key="contentvec-hf", names=("pytorch_model.bin",), size=None, md5=None,
    hub_path="hubert_base/pytorch_model.bin", beside=("config.json",))
kept = [r for r in known_files.KNOWN_FILES if not r.fetchable]
known_files.KNOWN_FILES = fetch.KNOWN_FILES = (row, folder, *kept)
"""
RUN = """
from mlx_contentvec.cli import main
main(sys.argv[1:])
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        running.add_repo(
            REPO,
            {
                "hubert_base.pt": CONTENT,
                "hubert_base/pytorch_model.bin": CONTENT,
                "hubert_base/config.json": b'{"a": 1}',
            },
        )
        yield running


@pytest.fixture
def fetch(server: HubServer, tmp_path: Path) -> Run:
    """``fetch(arguments)``: the command, run in tmp_path."""

    def run(*arguments: str, before: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        done = run_python(
            *("-c", PREAMBLE + before + RUN, "fetch", *arguments),
            env={
                **os.environ,
                "PYTHONPATH": search_path(),
                **server.environment(tmp_path / "home", **env),
            },
            cwd=tmp_path,
            timeout=60,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_the_file_arrives_under_its_name(fetch: Run, tmp_path: Path, server: HubServer) -> None:
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT
    assert not (tmp_path / "hubert_base.pt.part").exists()
    assert hashlib.sha256(CONTENT).hexdigest() in result.stdout
    assert not server.leaks
    assert not server.asked("HEAD")  # all that there is to know of it is known


def test_a_file_that_is_there_is_not_fetched_again(fetch: Run, server: HubServer) -> None:
    fetch()
    before = len(server.requests)
    assert fetch().returncode == 0
    assert len(server.requests) == before


def test_another_file_in_its_place_is_not_replaced_unasked(fetch: Run, tmp_path: Path) -> None:
    (tmp_path / "hubert_base.pt").write_bytes(OTHER)
    result = fetch()
    assert result.returncode == 1
    assert "exists, and is not contentvec" in result.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == OTHER
    assert fetch("--force").returncode == 0
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT


def test_output_names_the_file_or_its_folder(fetch: Run, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    assert fetch("-o", "weights").returncode == 0
    assert (tmp_path / "weights" / "hubert_base.pt").read_bytes() == CONTENT
    assert fetch("-o", "other.pt").returncode == 0
    assert (tmp_path / "other.pt").read_bytes() == CONTENT


def test_a_folder_that_is_not_there_is_said(fetch: Run) -> None:
    result = fetch("-o", "no/where.pt")
    assert result.returncode == 1
    assert "there is no folder no" in result.stderr


@pytest.mark.parametrize("output", [None, "other"])
def test_a_model_of_several_files_becomes_a_folder(
    fetch: Run, tmp_path: Path, server: HubServer, output: str | None
) -> None:
    folder = tmp_path / (output or "contentvec-hf")
    arguments = ("contentvec-hf", *(("-o", output) if output else ()))
    result = fetch(*arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{folder.name}  307,200 bytes")
    assert (folder / "pytorch_model.bin").read_bytes() == CONTENT
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    # what was removed of it since is written again
    (folder / "config.json").unlink()
    assert fetch(*arguments).returncode == 0
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    assert len(server.asked("GET /storage")) == 1


def test_a_dropped_connection_goes_on_where_it_stopped(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    server.fail("GET /storage", drop_response=100_000)
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT
    ranges = [request.range for request in server.asked("GET /storage")]
    assert ranges[0] is None
    assert ranges[1] == "bytes=98304-"


def test_a_network_that_is_gone_leaves_a_part_that_the_next_run_takes_up(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    server.fail("GET /storage", drop_response=100_000)
    server.fail("GET /storage", times=99, drop_response=0)
    broken = fetch()
    assert broken.returncode == 1
    assert "the connection to" in broken.stderr
    assert "what has arrived" in broken.stderr
    assert not (tmp_path / "hubert_base.pt").exists()
    part = (tmp_path / "hubert_base.pt.part").read_bytes()
    assert part == CONTENT[: len(part)]
    assert len(part) == 98_304
    server.faults.clear()
    assert fetch().returncode == 0
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT
    assert server.asked("GET /storage")[-1].range == f"bytes={len(part)}-"


def test_the_part_of_another_file_does_not_spoil_this_one(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    (tmp_path / "hubert_base.pt.part").write_bytes(OTHER[:5000])
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT


def test_a_file_whose_sha256_is_known_needs_only_its_size(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    path = tmp_path / "contentvec-hf" / "pytorch_model.bin"
    names = ("X-Linked-Etag", "ETag")
    server.fail("HEAD .*bin", times=99, headers=dict.fromkeys(names, '"' + "0" * 64 + '"'))
    refused = fetch("contentvec-hf")
    assert f"what {REPO} serves is not contentvec-hf" in refused.stderr, refused.stderr
    assert not server.asked("GET /storage") and not list(path.parent.iterdir())
    server.faults.clear()
    # a mirror may name its files by something else
    server.fail("HEAD .*bin", times=99, headers=dict.fromkeys(names, '"' + "0" * 40 + '"'))
    full = "fetch.check_target.__globals__['shutil'].disk_usage = lambda _: Usage\n"
    full = "class Usage: total, free = 10**9, 999\n" + full
    assert f"{len(CONTENT):,} bytes" in fetch("contentvec-hf", before=full).stderr
    done = fetch("contentvec-hf")
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("surplus", [b"", b"and more"])
@pytest.mark.parametrize("key", ["contentvec", "contentvec-hf"])
def test_a_part_that_is_complete_or_too_long_is_dealt_with(
    fetch: Run, tmp_path: Path, server: HubServer, key: str, surplus: bytes
) -> None:
    folder = key == "contentvec-hf"  # the size of its weights is the one that the Hub states
    path = tmp_path / ("contentvec-hf/pytorch_model.bin" if folder else "hubert_base.pt")
    path.parent.mkdir(exist_ok=True)
    path.with_name(f"{path.name}.part").write_bytes(CONTENT + surplus)
    result = fetch(key)
    assert result.returncode == 0, result.stderr
    assert path.read_bytes() == CONTENT
    assert len(server.asked("GET /storage")) == (1 if surplus else 0)


@pytest.mark.parametrize(
    ("fault", "nature"),
    [
        ({"alter": lambda content: b"X" + content[1:]}, "bytes"),
        ({"alter": lambda content: b"<!DOCTYPE html><title>Log in</title>"}, "a web page"),
        ({"shorten": 1000}, "306,200 bytes"),
    ],
    ids=["altered", "web page", "short"],
)
def test_what_is_not_the_file_does_not_get_its_name(
    fetch: Run, tmp_path: Path, server: HubServer, fault: dict[str, object], nature: str
) -> None:
    server.fail("GET /storage", times=9, **fault)
    result = fetch()
    assert result.returncode == 1
    assert f"what {REPO} served is not contentvec, and was thrown away" in result.stderr
    assert nature in result.stderr
    assert hashlib.md5(CONTENT).hexdigest() in result.stderr
    assert not list(tmp_path.glob("hubert_base*"))
    assert len(server.asked("GET /storage")) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "the Hub does not accept the token"),
        (403, "the token may not do that"),
        (404, "the Hub refuses"),
        (500, "the Hub has a fault of its own"),
    ],
)
def test_what_the_hub_answers_is_said_in_plain_words(
    fetch: Run, tmp_path: Path, server: HubServer, status: int, said: str
) -> None:
    server.fail("GET /", times=99, status=status)
    result = fetch()
    assert result.returncode == 1
    assert said in result.stderr
    assert f"HTTP {status}" in result.stderr
    assert not (tmp_path / "hubert_base.pt").exists()


def test_offline_says_so(fetch: Run) -> None:
    result = fetch(HF_HUB_OFFLINE="1")
    assert result.returncode == 1
    assert "HF_HUB_OFFLINE is set" in result.stderr


def test_a_file_in_the_cache_is_taken_from_there_even_offline(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    cache = f'from huggingface_hub import hf_hub_download as d; d("{REPO}", "hubert_base.pt")\n'
    assert fetch("--list", before=cache).returncode == 0
    before = len(server.requests)
    result = fetch(HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT
    assert len(server.requests) == before


def test_a_branch_of_the_cache_that_is_no_text_is_named(fetch: Run, tmp_path: Path) -> None:
    branch = tmp_path / "home" / "hub" / f"models--{REPO.replace('/', '--')}" / "refs" / "main"
    branch.parent.mkdir(parents=True)
    branch.write_bytes(b"\xff")
    result = fetch()
    assert result.returncode == 1
    assert f"cannot look for hubert_base.pt of {REPO}: " in result.stderr
    assert "refs/main holds no text" in " ".join(result.stderr.split())


def test_json_is_one_document(fetch: Run) -> None:
    document = json.loads(fetch("--json").stdout)
    assert document["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert Path(document["path"]).name == document["name"] == "hubert_base.pt"
    assert "files" not in document


def test_a_model_of_several_files_is_one_document(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    shards = {"model-1.safetensors": CONTENT, "model-2.safetensors": OTHER}
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    server.add_repo(
        "someone/large",
        {**shards, "model.safetensors.index.json": index.encode(), "config.json": b"{}"},
    )
    done = fetch("someone/large", "--json")
    document = json.loads(done.stdout)
    assert document["path"] == "large"
    assert [file["name"] for file in document["files"]] == list(shards)
    assert [file["size"] for file in document["files"]] == [len(CONTENT), len(OTHER)]
    (note,) = document["notes"]
    assert note.startswith("downloaded from someone/large/model-1.safetensors at ")
    lines = fetch("someone/large").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [*2 * ("large", "is", "md5", "sha256"), "note"]
    assert "ContentVec-500" in lines[1] and lines[5].split() == ["is", "unknown"]


def test_list_names_what_can_be_fetched(fetch: Run) -> None:
    lines = fetch("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["contentvec", "contentvec-hf"]
    assert lines[0].endswith("(0 MB)") and lines[1].endswith("(size not known)")
    rows = json.loads(fetch("--list", "--json").stdout)
    assert [row["key"] for row in rows] == ["contentvec", "contentvec-hf"]
    assert rows[0]["sha256"] == SMALL.sha256


def test_an_unknown_key_lists_the_known_ones() -> None:
    with pytest.raises(HubError, match="no known file is called nonsense") as caught:
        known_file("nonsense")
    assert "contentvec" in str(caught.value)
    assert "hubert-base-ls960" not in str(caught.value)  # it cannot be fetched


def test_a_file_without_a_checksum_is_not_fetched() -> None:
    with pytest.raises(HubError, match="no checksum of it is known"):
        known_file("hubert-base-ls960")


def test_whatever_can_be_proven_can_be_fetched() -> None:
    for row in KNOWN_FILES:
        assert row.fetchable or not row.verifiable
        assert row.fetchable or row.hub_path is None
        assert not repository.is_address(row.key)


def test_a_link_planted_at_the_unfinished_download_is_not_followed(
    fetch: Run, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_text("kept")
    for plant in (os.symlink, os.link):
        plant(tmp_path / "precious", tmp_path / "hubert_base.pt.part")
        done = fetch()
        assert done.returncode == 1
        assert "cannot write hubert_base.pt.part: " in done.stderr
        assert (tmp_path / "precious").read_text() == "kept"
        (tmp_path / "hubert_base.pt.part").unlink()


def test_a_name_as_long_as_can_be_is_downloaded_to(fetch: Run, tmp_path: Path) -> None:
    name = "n" * 250 + ".pt"
    done = fetch("-o", name)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} - {"home"} == {name}


def test_a_download_without_end_is_broken_off_at_the_known_size(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    server.fail("GET /storage", times=99, endless=True)
    result = fetch()
    assert result.returncode == 1
    assert f"cannot download hubert_base.pt from {REPO}: it does not end" in result.stderr
    assert f"more than {len(CONTENT):,} bytes" in result.stderr
    assert not list(tmp_path.glob("hubert_base.pt*"))


@needs_client_1
def test_a_server_that_begins_anew_and_always_breaks_off_is_given_up(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    server.fail("GET /storage", times=99, no_ranges=True, drop_response=50_000)
    result = fetch()
    assert result.returncode == 1
    assert "the connection always breaks off" in result.stderr
    assert len(server.asked("GET /storage")) < 10
    server.faults.clear()
    assert fetch().returncode == 0
    assert f"cannot download hubert_base.pt from {REPO}" in result.stderr


@needs_client_1
@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
def test_a_server_that_asks_for_more_patience_than_anybody_has_is_given_up(
    fetch: Run, server: HubServer, header: str
) -> None:
    said = {"Retry-After": "1000000000", "RateLimit": '"api";r=0;t=1000000000'}[header]
    server.fail("GET", times=99, status=429, headers={header: said})
    result = fetch()
    assert result.returncode == 1
    assert "too many requests" in result.stderr
    assert "after 1000000000 seconds" in result.stderr
    assert len(server.requests) == 1
    server.faults[0].times, server.faults[0].headers = 1, {header: said.replace("000000000", "")}
    assert fetch().returncode == 0


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 9-99/*"},
        {"Content-Range": "bytes 9-99/1" + "0" * 5000},
        pytest.param({"Location": f"http://{'a' * 300}.example/"}, marks=needs_client_1),
        {"Retry-After": "1" + "0" * 5000},
    ],
    ids=["no length", "a length of 5,001 digits", "no name of a host", "no time"],
)
def test_a_header_that_the_client_cannot_read_is_not_taken_for_a_fault_of_ours(
    fetch: Run, tmp_path: Path, server: HubServer, headers: dict[str, str]
) -> None:
    (tmp_path / "hubert_base.pt.part").write_bytes(CONTENT[:9])
    status = 429 if "Retry-After" in headers else None
    server.fail("GET", times=99, headers=headers, status=status)
    result = fetch()
    assert result.returncode == 1
    assert "error: cannot download hubert_base.pt" in result.stderr
    assert "makes nothing of what it was given" in result.stderr or status
    assert "a fault in mlx-contentvec" not in result.stderr
    assert (tmp_path / "hubert_base.pt.part").read_bytes() == CONTENT[:9]


def test_a_part_beyond_what_the_server_has_is_begun_anew(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    (tmp_path / "hubert_base.pt.part").write_bytes(CONTENT[:9])
    server.fail("GET /storage", status=416)
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert [request.range for request in server.asked("GET /storage")] == ["bytes=9-", None]


def test_a_server_that_never_answers_is_given_up(fetch: Run, server: HubServer) -> None:
    server.fail("GET|HEAD", times=99, silence=30)
    begun = time.monotonic()
    result = fetch(before="constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.1\n")
    assert result.returncode == 1
    assert "the connection to" in result.stderr
    assert time.monotonic() - begun < 25


@needs_client_1
def test_a_server_that_trickles_is_given_up(fetch: Run, server: HubServer, tmp_path: Path) -> None:
    """Each byte arrives in time, and all of them would in days."""
    server.fail("GET /storage", trickle=0.02)
    result = fetch(before="from mlx_contentvec import hub_client\nhub_client._LULL = 0.3\n")
    assert result.returncode == 1
    assert "next to nothing arrives" in result.stderr and "expected" in result.stderr
    assert not (tmp_path / "hubert_base.pt").exists()
    assert fetch().returncode == 0  # from where it was


def test_two_downloads_of_one_file_do_not_mix(fetch: Run, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "hubert_base.pt.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = fetch()
    assert done.returncode == 1
    assert "another process is downloading" in done.stderr


@pytest.mark.parametrize("content", [CONTENT, OTHER], ids=["the file", "another file"])
def test_what_another_process_has_just_placed_is_not_written_to(
    fetch: Run, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "hubert_base.pt.part").write_bytes(content)
    before = """
import os
def lock(descriptor):
    os.rename("hubert_base.pt.part", "hubert_base.pt")
    return True
fetch.lock_now = lock
"""
    done = fetch("--force", before=before)
    assert "another process was downloading hubert_base.pt until now" in done.stderr
    assert "run the same again" in done.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == content


@pytest.mark.parametrize(
    ("there", "force", "said"),
    [
        (b"{}", False, None),
        (b"{} ", False, "exists, and is not that of"),
        (b"{} ", True, None),
        ("folder", False, "exists, and is not that of"),
        ("folder", True, "it is a folder"),
        ("pipe", False, "exists, and is not that of"),
        ("pipe", True, "it is a pipe or a device"),
        ("not readable", False, "exists, and is not that of"),
    ],
)
def test_what_is_in_the_place_of_a_small_file_is_seen_before_the_download(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: bytes | str,
    force: bool,
    said: str | None,
) -> None:
    path = tmp_path / "config.json"
    if there == "folder":
        path.mkdir()
    elif there == "pipe":
        os.mkfifo(path)
    elif there == "not readable":
        path.write_bytes(b"{}")
        monkeypatch.setattr(fetch_module, "read_regular", lambda *_: refuse())
    elif isinstance(there, bytes):
        path.write_bytes(there)
    (tmp_path / "downloaded").write_bytes(b"{}")
    monkeypatch.setattr(fetch_module, "small_file", lambda *_: tmp_path / "downloaded")
    row = dataclasses.replace(CONTENTVEC, beside=("config.json",))
    if said is None:
        wanted = {} if there == b"{}" else {path: b"{}"}
        assert fetch_module._read_beside(row, tmp_path, force=force) == wanted
        return
    with pytest.raises(OutputError, match=said):
        fetch_module._read_beside(row, tmp_path, force=force)


#: in front of the command: no file may be larger than this many bytes
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))\n"


@pytest.mark.parametrize("key", ["contentvec", "contentvec-hf"])
def test_a_disk_that_is_full_is_one_error_and_gives_no_file_its_name(
    fetch: Run, tmp_path: Path, key: str
) -> None:
    result = fetch(key, before=LIMIT.format(100_000))
    assert result.returncode == 1
    assert result.stderr.count("error: cannot write") == 1, result.stderr
    assert "File too large" in result.stderr
    # the client's cache, in home, is its own
    left = {
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file() and tmp_path / "home" not in path.parents
    }
    assert not left & {"hubert_base.pt", "pytorch_model.bin", "config.json"}


def test_a_small_file_beside_the_weights_is_whole_or_not_there(
    fetch: Run, tmp_path: Path, server: HubServer
) -> None:
    server.add_repo(
        REPO, {"hubert_base/pytorch_model.bin": CONTENT, "hubert_base/config.json": OTHER}
    )
    # the client's cache and the weights have room, the copy of the configuration has not
    before = (
        "import contextlib, errno\n"
        "class Full:\n"
        "    def write(self, data):\n"
        "        raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "fetch.Draft.open = lambda self: contextlib.nullcontext(Full())\n"
    )
    result = fetch("contentvec-hf", before=before)
    assert result.returncode == 1
    assert "error: cannot write" in result.stderr
    assert "No space left" in result.stderr
    assert not (tmp_path / "contentvec-hf" / "config.json").exists()


# without a server ----------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """``cached(CONTENT, ...)``: what the Hub's cache gives, one after the other."""

    def put(*contents: bytes) -> list[Path]:
        left = []
        for number, content in enumerate(contents):
            left.append(tmp_path / f"cached {number}")
            left[-1].write_bytes(content)
        monkeypatch.setattr(fetch_module, "_in_cache", lambda row: left.pop(0))
        return left

    return put


@pytest.mark.parametrize("part", [b"", CONTENT[:9], CONTENT + b"and more"])
def test_what_the_cache_gives_takes_the_place_of_the_part(
    tmp_path: Path, cached: Callable[..., list[Path]], part: bytes
) -> None:
    path = tmp_path / "model.pt"
    path.with_name("model.pt.part").write_bytes(part)
    left = cached(CONTENT, OTHER)
    found = fetch_module._fetch_file(SMALL, path, force=False, progress=None)
    assert (found.name, found.sha256, len(left)) == ("model.pt", SMALL.sha256, 1)
    assert path.read_bytes() == CONTENT


def test_a_copy_of_the_cache_begins_where_the_part_begins(tmp_path: Path) -> None:
    (tmp_path / "cached").write_bytes(CONTENT)
    part = tmp_path / "model.pt.part"
    with part.open("w+b") as file:
        file.write(b"begun")
        fetch_module._copy(tmp_path / "cached", part, file)
    assert part.read_bytes() == CONTENT


@pytest.mark.parametrize(("part", "contents"), [(b"begun", [OTHER, CONTENT]), (b"", [OTHER])])
def test_only_what_was_begun_before_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: bytes, contents: list[bytes]
) -> None:
    path = tmp_path / "model.pt"
    path.with_name("model.pt.part").write_bytes(part)
    left = [*contents]

    def download(row: object, path: object, file: BinaryIO) -> None:
        file.seek(0)
        file.write(left.pop(0))

    monkeypatch.setattr(fetch_module, "_in_cache", lambda row: None)
    monkeypatch.setattr(fetch_module, "_download", download)
    if part:
        fetch_module._fetch_file(SMALL, path, force=False, progress=None)
        assert path.read_bytes() == CONTENT
    else:
        with pytest.raises(IdentityError, match="served is not contentvec"):
            fetch_module._fetch_file(SMALL, path, force=False, progress=None)
        assert not list(tmp_path.glob("model*"))
    assert not left


@pytest.mark.parametrize(
    ("key", "name"),
    [("contentvec", "hubert_base.pt"), ("contentvec-hf", "hubert_base/pytorch_model.bin")],
    ids=["size known", "size stated"],
)
def test_a_damaged_file_of_the_cache_is_downloaded_instead(
    fetch: Run, tmp_path: Path, server: HubServer, key: str, name: str
) -> None:
    download = f'from huggingface_hub import hf_hub_download as d; d("{REPO}", "{name}")\n'
    assert fetch("--list", before=download).returncode == 0
    (blob,) = (tmp_path / "home").rglob(f"blobs/{SMALL.sha256}")
    blob.write_bytes(b"X" + CONTENT[1:])
    if key == "contentvec":  # of the other, the configuration is not in the cache
        offline = fetch(key, HF_HUB_OFFLINE="1")
        assert offline.returncode == 1 and "hubert_base.pt is not contentvec" in offline.stderr
        assert "served" not in offline.stderr
        assert f"remove {blob}" in offline.stderr.replace("\n", " ")
    result = fetch(key)
    assert result.returncode == 0, result.stderr
    path = tmp_path / ("hubert_base.pt" if key == "contentvec" else f"{key}/pytorch_model.bin")
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("damaged", [CONTENT[:5000], b"X" + CONTENT[1:]], ids=["short", "changed"])
def test_a_damaged_file_of_the_cache_does_not_cost_the_part(
    fetch: Run, tmp_path: Path, server: HubServer, damaged: bytes
) -> None:
    download = f'from huggingface_hub import hf_hub_download as d; d("{REPO}", "hubert_base.pt")\n'
    assert fetch("--list", before=download).returncode == 0
    (blob,) = (tmp_path / "home").rglob(f"blobs/{SMALL.sha256}")
    blob.write_bytes(damaged)
    (tmp_path / "hubert_base.pt.part").write_bytes(CONTENT[:100_000])
    result = fetch()
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hubert_base.pt").read_bytes() == CONTENT
    assert server.asked("GET /storage")[-1].range == "bytes=100000-"


def test_a_damaged_file_of_the_cache_is_described_as_it_is_after_a_part_was_begun(
    tmp_path: Path, cached: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "model.pt.part").write_bytes(CONTENT[:9])
    damaged = b"X" + CONTENT[1:]
    cached(damaged)
    with pytest.raises(IdentityError, match="is not contentvec") as caught:
        fetch_module._fetch_file(SMALL, tmp_path / "model.pt", force=False, progress=None)
    assert hashlib.md5(damaged).hexdigest() in str(caught.value.found)
    assert (tmp_path / "model.pt.part").read_bytes() == CONTENT[:9]


def test_a_file_that_leaves_the_cache_meanwhile_is_named(
    tmp_path: Path, cached: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(CONTENT)
    monkeypatch.setattr(fetch_module, "_accept", lambda row, path, progress: path.unlink())
    with pytest.raises(HubError, match=r"cached 0 cannot be read: No such file"):
        fetch_module._fetch_file(SMALL, tmp_path / "model.pt", force=False, progress=None)
    assert not list(tmp_path.glob("model*"))


def test_an_error_of_the_client_is_not_one_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object) -> None:
        raise OSError("odd")

    monkeypatch.setattr(fetch_module, "_in_cache", lambda row: None)
    monkeypatch.setattr(fetch_module, "_download_from", download)
    with pytest.raises(OSError, match=r"^odd$"):
        fetch_module._fetch_file(SMALL, tmp_path / "model.pt", force=False, progress=None)


@pytest.mark.parametrize(
    ("pieces", "begun"),
    [([CONTENT[:9], CONTENT[9:]], [0, 9]), ([CONTENT[:9], b"", CONTENT[9:]], [0, 9])],
    ids=["goes on", "stands still"],
)
def test_a_download_goes_on_as_long_as_something_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], begun: list[int]
) -> None:
    done: list[int] = []
    left = [*pieces]

    def lose(row: object, file: fetch_module._Bounded, size: int) -> None:
        done.append(size)
        file.write(left.pop(0))
        raise HubError("the connection is lost")

    monkeypatch.setattr(fetch_module, "_download_from", lose)
    part = tmp_path / "part"
    with part.open("w+b") as file:
        if b"" in pieces:
            with pytest.raises(HubError, match="the connection is lost"):
                fetch_module._download(SMALL, part, file)
        else:
            fetch_module._download(SMALL, part, file)
    assert done == begun
    assert part.read_bytes() == b"".join(pieces[:2])


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [
        ("contentvec", None, []),
        ("spin", None, ["Resources/embedders/spin/pytorch_model.bin"]),
        ("mhubert-147", None, ["utter-project/mHuBERT-147", None]),
        ("a/b", "v1", ["a/b", "v1"]),
    ],
)
def test_the_hub_is_asked_for_what_the_table_does_not_say(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    revision: str | None,
    asked: list[str | None],
) -> None:
    found: list[str | None] = []

    def find_model(address: str, revision: str | None = None) -> tuple[KnownFile, ...]:
        found.extend([address, revision])
        return (SMALL,)

    def stated(row: KnownFile) -> KnownFile:
        found.append(row.hub_path)
        return row

    monkeypatch.setattr(fetch_module, "find_model", find_model)
    monkeypatch.setattr(fetch_module, "stated", stated)
    identity = SimpleNamespace(name="", sha256="")
    monkeypatch.setattr(fetch_module, "_fetch_file", lambda *_, **__: identity)
    fetch_module.fetch(name, tmp_path / "out", revision=revision)
    assert found == asked


def test_what_gets_its_name_was_flushed_to_the_disk_before(
    tmp_path: Path, cached: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(fetch_module, "sync", lambda number: done.append(os.fstat(number).st_size))
    monkeypatch.setattr(fetch_module, "place", lambda *_, **__: done.append("named"))
    cached(CONTENT)
    fetch_module._fetch_file(SMALL, tmp_path / "model.pt", force=False, progress=None)
    assert done == [len(CONTENT), "named"]
    done.clear()
    rename = Draft.rename

    def named(draft: Draft, *, force: bool) -> None:
        done.append("named")
        rename(draft, force=force)

    monkeypatch.setattr(Draft, "sync", lambda draft: done.append("flushed"))
    monkeypatch.setattr(Draft, "rename", named)
    path = tmp_path / "config.json"
    path.write_bytes(b"before")
    fetch_module._write_beside({path: b"{}"})
    assert done == ["flushed", "named"] and path.read_bytes() == b"{}"


def test_a_file_of_no_bytes_is_a_file(tmp_path: Path, cached: Callable[..., list[Path]]) -> None:
    row = dataclasses.replace(SMALL, size=0, md5=None, sha256=hashlib.sha256().hexdigest())
    cached(b"")
    fetch_module._fetch_file(row, tmp_path / "model.pt", force=False, progress=None)
    assert [path.stat().st_size for path in tmp_path.glob("model*")] == [0]


def test_a_name_that_the_system_refuses_is_one_error(
    tmp_path: Path, cached: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dataclasses.replace(SMALL, beside=("config.json",))
    with pytest.raises(OutputError, match=r"cannot write .*nnn: File name too long"):
        fetch_module._target(folder, tmp_path / ("n" * 300))
    for name, path in (("place", r"model\.pt"), ("sync", r"model\.pt\.part")):
        monkeypatch.setattr(fetch_module, name, refuse)
        cached(CONTENT)
        with pytest.raises(OutputError, match=rf"cannot write .*{path}: Permission denied"):
            fetch_module._fetch_file(SMALL, tmp_path / "model.pt", force=False, progress=None)


def test_the_name_of_a_part_is_no_longer_than_names_may_be() -> None:
    assert fetch_module._part_of(Path("n" * 250)).name == "n" * 250 + ".part"
    parts = {fetch_module._part_of(Path(letter * 251)).name for letter in "nmo"}
    assert len(parts) == 3 and max(len(os.fsencode(part)) for part in parts) < 100


def test_a_file_that_is_full_says_so_and_nothing_more_when_it_is_closed() -> None:
    closed: list[bool] = []

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            super().close()  # or Python closes it once more, and says that it cannot
            closed.append(True)
            raise OSError(errno.ENOSPC, "No space left on device")

    file = Full()
    with (
        fetch_module._closed_quietly(file),
        pytest.raises(OutputError, match=r"cannot write model\.pt\.part: No space left"),
    ):
        fetch_module._Bounded(file, SMALL, Path("model.pt.part"), 9).write(b"x")
    assert closed
