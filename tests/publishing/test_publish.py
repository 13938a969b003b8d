"""publish, from_pretrained and verify, end to end against a Hub on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from contentvec_parity.publishing.evidence import Package
from contentvec_parity.publishing.package import package
from contentvec_parity.publishing.publish import STAGING
from tests.forks import run_python
from tests.hub_server import GITATTRIBUTES, HubServer
from tests.sources import search_path

REPO = "someone/contentvec-mlx"

#: the command line, with a client that does not wait between attempts
COMMAND = """
import sys, time
time.sleep = lambda seconds: None
from mlx_contentvec.cli import main
main(sys.argv[1:])
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def packaged(evidence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package(
        evidence_folder / "float32.safetensors",
        tmp_path_factory.mktemp("packages") / "tiny",
        variants=[evidence_folder / "float16.safetensors"],
        allow_stand_in=True,
    )


@pytest.fixture
def folder(packaged: Package, tmp_path: Path) -> Path:
    """A package of this test's own: publishing writes the repository's name into its card."""
    return Path(shutil.copytree(packaged.folder, tmp_path / "package"))


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running
        assert not running.leaks, "the token was sent to the storage host"


@pytest.fixture
def environment(server: HubServer, tmp_path: Path) -> Callable[..., dict[str, str]]:
    def build(*, home: str = "home", token: str | None = "write", **more: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        pointed = server.environment(tmp_path / home, token=token, **more)
        return {**inherited, "PYTHONPATH": search_path(), **pointed}

    return build


@pytest.fixture
def run(server: HubServer, environment: Callable[..., dict[str, str]], tmp_path: Path) -> Run:
    """``run("publish", ...)``: one command in a process of its own; no token in what it prints."""

    def start(*arguments: str | Path, **where: str) -> subprocess.CompletedProcess[str]:
        done = run_python("-c", COMMAND, *arguments, env=environment(**where), cwd=tmp_path)
        for secret in (server.token, server.read_token, "hf_bad"):
            assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return start


@pytest.fixture
def publish(run: Run, folder: Path) -> Run:
    def start(*more: str, **where: str) -> subprocess.CompletedProcess[str]:
        arguments = ("--repo-id", REPO, "--yes", "--test-only-stand-in")
        return run("publish", folder, *arguments, *more, **where)

    return start


def nothing_shows(server: HubServer) -> bool:
    """Whether a reader of the repository's main sees only what the Hub itself put there."""
    return REPO not in server.repos or set(server.repos[REPO].files) == {".gitattributes"}


# all the way --------------------------------------------------------------------


def test_published_weights_come_back_in_a_fresh_process_and_verify(
    publish: Run,
    run: Run,
    server: HubServer,
    packaged: Package,
    environment: Callable[..., dict[str, str]],
    tmp_path: Path,
) -> None:
    done = publish()
    assert done.returncode == 0, done.stderr
    assert "private" in done.stdout
    repo = server.repos[REPO]
    assert repo.private
    assert set(repo.branches) == {"main"}
    assert set(repo.files) - {".gitattributes"} == set(packaged.names)

    # whoever may see it loads it, in a process and a cache of their own
    code = (
        "from mlx_contentvec import ContentvecModel\n"
        "from mlx_contentvec.backend import mx\n"
        f"model = ContentvecModel.from_pretrained('{REPO}')\n"
        "print(model(mx.zeros((1, 4000)))['x'].shape)\n"
        f"half = ContentvecModel.from_pretrained('{REPO}', dtype='float16')\n"
        "print(half.layer_norm.weight.dtype)\n"
    )
    loaded = run_python("-c", code, env=environment(home="reader"), cwd=tmp_path)
    assert loaded.stdout.splitlines() == ["(1, 12, 96)", "mlx.core.float16"], loaded.stderr

    verified = run("verify", REPO, home="reader")
    assert verified.returncode == 0, verified.stderr
    assert len(verified.stdout.splitlines()) == 1
    assert verified.stdout.startswith("PASSED"), verified.stdout

    # and without the network, from the cache
    offline = run("verify", REPO, home="reader", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_the_usage_section_of_the_card_runs_as_it_is_shown(
    publish: Run,
    server: HubServer,
    environment: Callable[..., dict[str, str]],
    tmp_path: Path,
    need: Callable[[str, str], object],
) -> None:
    need("soundfile", "pip install 'mlx-contentvec[audio]'")
    need("soxr", "pip install 'mlx-contentvec[audio]'")
    assert publish().returncode == 0
    card = server.repos[REPO].files["README.md"].content.decode()
    section = card.split("\n## Use\n")[1].split("\n## ")[0]
    section += card.split("\n## Smaller files\n")[1].split("\n## ")[0]
    python = "".join(re.findall(r"^```python\n(.*?)^```$", section, re.S | re.M))
    shell = "".join(re.findall(r"^```bash\n(.*?)^```$", section, re.S | re.M))
    assert f'from_pretrained("{REPO}")' in python
    assert f"mlx-contentvec verify {REPO}" in shell

    import soundfile

    spoken = np.random.default_rng(0).normal(0, 0.1, (44100, 2))
    soundfile.write(tmp_path / "speech.wav", spoken, 44100)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "mlx-contentvec"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_contentvec "$@"\n')
    command.chmod(0o755)
    env = environment(home="reader")
    env["PATH"] = f"{bin_folder}{os.pathsep}{env['PATH']}"

    # what the comments say the shapes are, asked of the code itself
    shapes = "".join(f"\nprint({name}.shape)" for name in re.findall(r"^(v\d) = ", python, re.M))
    ran = run_python("-c", python + shapes, env=env, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    widths = re.findall(r"RVC v\d: \(frames, (\d+)\)", python)
    assert ran.stdout.splitlines() == [f"(49, {width})" for width in widths]
    ran = subprocess.run(
        ["bash", "-euc", shell], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert "PASSED" in ran.stdout
    assert list((tmp_path / "features").rglob("speech*")), "extract left nothing"


def test_without_yes_nothing_is_sent(run: Run, server: HubServer, folder: Path) -> None:
    before = (folder / "README.md").read_text()
    said = run("publish", folder, "--repo-id", REPO, "--test-only-stand-in")
    assert said.returncode == 0, said.stderr
    assert not server.requests
    assert (folder / "README.md").read_text() == before
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert f"{sizes['model.safetensors']:,} bytes" in said.stdout
    to_send = sum(sizes.values()) - sizes["contentvec_base.safetensors"]
    assert f"{to_send:,} bytes to send" in said.stdout
    assert f'from_pretrained("{REPO}")' in said.stdout
    assert "nothing was sent" in said.stdout


def test_one_blob_under_two_names_is_sent_once(
    publish: Run, server: HubServer, packaged: Package
) -> None:
    assert publish().returncode == 0
    digest = packaged.checksums["model.safetensors"]
    assert len(server.asked(f"PUT /storage/{digest}")) == 1
    files = server.repos[REPO].files
    assert files["model.safetensors"].sha256 == files["contentvec_base.safetensors"].sha256


def test_large_files_go_up_in_parts(run: Run, folder: Path, packaged: Package) -> None:
    with HubServer(part_size=500_000) as server:
        env = {"HF_ENDPOINT": server.url}
        arguments = ("--repo-id", REPO, "--yes", "--test-only-stand-in")
        done = run("publish", folder, *arguments, **env)
        assert done.returncode == 0, done.stderr
        digest = packaged.checksums["model.safetensors"]
        parts = [r.path for r in server.asked(f"PUT /storage/{digest}/")]
        assert len(parts) == -(-(folder / "model.safetensors").stat().st_size // 500_000)


def test_publishing_again_changes_nothing(publish: Run, server: HubServer) -> None:
    first = publish()
    head = server.repos[REPO].branches["main"]
    sent = len(server.asked("PUT|commit"))
    again = publish()
    assert again.returncode == 0, again.stderr
    assert "was there already" in again.stdout
    assert server.repos[REPO].branches["main"] == head
    assert head in first.stdout
    assert len(server.asked("PUT|commit")) == sent


def test_it_becomes_public_only_when_asked(publish: Run, server: HubServer) -> None:
    assert publish().returncode == 0
    assert server.repos[REPO].private
    public = publish("--public")
    assert public.returncode == 0, public.stderr
    assert not server.repos[REPO].private
    assert "public" in public.stdout


def test_it_was_private_until_it_was_proven(publish: Run, server: HubServer) -> None:
    server.fail("GET /storage", times=99, alter=lambda content: content[:-1] + b"X")
    assert publish("--public").returncode == 1
    assert server.repos[REPO].private


# what goes wrong ------------------------------------------------------------------


def test_an_upload_that_drops_once_is_picked_up(publish: Run, server: HubServer) -> None:
    server.fail("PUT /storage", drop_request=100_000)
    done = publish()
    assert done.returncode == 0, done.stderr
    assert not nothing_shows(server)


def test_an_upload_that_keeps_dropping_shows_nothing_and_can_be_resumed(
    publish: Run, server: HubServer, packaged: Package
) -> None:
    digest = packaged.checksums["model.float16.safetensors"]
    server.fail(f"PUT /storage/{digest}", times=99, drop_request=1000)
    broken = publish()
    assert broken.returncode == 1
    assert f"error: cannot publish to {REPO}: the connection to" in broken.stderr
    assert nothing_shows(server)
    server.faults.clear()
    server.requests.clear()
    done = publish()
    assert done.returncode == 0, done.stderr
    assert not server.asked(f"PUT /storage/{packaged.checksums['model.safetensors']}"), "sent twice"
    assert server.asked(f"PUT /storage/{digest}")
    assert set(server.repos[REPO].branches) == {"main"}


def test_what_comes_back_wrong_is_not_shown(
    publish: Run, server: HubServer, packaged: Package
) -> None:
    server.fail("GET /storage", times=99, alter=lambda content: content[:-1] + b"X")
    broken = publish()
    assert broken.returncode == 1
    assert f"what {REPO} gives back is not what was sent" in broken.stderr
    assert packaged.checksums["model.safetensors"] in broken.stderr
    assert nothing_shows(server)
    server.faults.clear()
    assert publish().returncode == 0
    assert not nothing_shows(server)


def test_what_was_stored_wrong_is_not_shown(publish: Run, server: HubServer) -> None:
    server.fail("POST /storage/.*/verify", times=99, status=422)
    broken = publish()
    assert broken.returncode == 1
    assert "HTTP 422" in broken.stderr
    assert nothing_shows(server)


@pytest.mark.parametrize(
    ("request_line", "status", "said"),
    [
        ("GET /api/whoami", 401, "the Hub does not accept the token"),
        ("POST /api/repos/create", 401, "the Hub does not accept the token"),
        ("POST /api/repos/create", 403, "the token may not do that"),
        ("POST /api/repos/create", 500, "the Hub has a fault of its own"),
        ("POST .*/preupload", 503, "the Hub has a fault of its own"),
        ("POST .*objects/batch", 403, "the token may not do that"),
        ("PUT /storage", 500, "the Hub has a fault of its own"),
        ("POST .*/commit/mlx-", 502, "the Hub has a fault of its own"),
        ("POST .*/commit/main", 409, "somebody else changed it"),
        ("POST .*/commit/main", 500, "the Hub has a fault of its own"),
    ],
)
def test_what_the_hub_refuses_is_said_and_nothing_shows(
    publish: Run, server: HubServer, request_line: str, status: int, said: str
) -> None:
    server.fail(request_line, times=99, status=status)
    broken = publish()
    assert broken.returncode == 1
    assert f"error: cannot publish to {REPO}: {said}" in broken.stderr, broken.stderr
    assert f"HTTP {status}" in broken.stderr
    assert nothing_shows(server)
    if "commit" in request_line:
        # everything had arrived: the next run finds it and only has to show it
        server.faults.clear()
        server.requests.clear()
        done = publish()
        assert done.returncode == 0, done.stderr
        assert not server.asked("PUT /storage")
        assert set(server.repos[REPO].branches) == {"main"}


def test_no_token_says_where_to_get_one(publish: Run, server: HubServer) -> None:
    broken = publish(token=None)
    assert broken.returncode == 1
    assert "no Hugging Face token was found" in broken.stderr
    assert "hf auth login" in broken.stderr
    assert not server.requests


def test_a_token_that_may_only_read_is_told_apart(publish: Run, server: HubServer) -> None:
    broken = publish(token="read")
    assert broken.returncode == 1
    assert "the token of someone may only read" in broken.stderr
    assert not server.repos


def test_a_wrong_token_is_said_and_not_shown(publish: Run) -> None:
    broken = publish(token="hf_badbadbad")
    assert broken.returncode == 1
    assert "the Hub does not accept the token" in broken.stderr


def test_a_foreign_namespace_is_said(run: Run, folder: Path) -> None:
    arguments = ("--yes", "--test-only-stand-in")
    broken = run("publish", folder, "--repo-id", "nobody/model", *arguments)
    assert broken.returncode == 1
    assert "the token may not do that" in broken.stderr
    assert "nobody" in broken.stderr


def test_a_network_that_is_gone_is_said(publish: Run) -> None:
    broken = publish(HF_ENDPOINT="http://127.0.0.1:9")
    assert broken.returncode == 1
    assert "the connection to http://127.0.0.1:9 failed" in broken.stderr


def test_offline_is_said(publish: Run) -> None:
    broken = publish(HF_HUB_OFFLINE="1")
    assert broken.returncode == 1
    assert "HF_HUB_OFFLINE is set" in broken.stderr


def test_a_name_that_is_taken_by_something_else_stays_as_it_is(
    publish: Run, server: HubServer
) -> None:
    server.add_repo(REPO, {"config.json": b"{}", "pytorch_model.bin": b"\0theirs"})
    head = server.repos[REPO].branches["main"]
    for more in ((), ("--replace",)):
        broken = publish(*more)
        assert broken.returncode == 1
        assert f"{REPO} is taken: it holds something else" in broken.stderr
    assert server.repos[REPO].branches == {"main": head}


def test_another_package_is_replaced_only_on_request(
    publish: Run, run: Run, server: HubServer, evidence_folder: Path, tmp_path: Path
) -> None:
    other = package(evidence_folder / "float32.safetensors", tmp_path / "o", allow_stand_in=True)
    arguments = ("--repo-id", REPO, "--yes", "--test-only-stand-in")
    assert publish().returncode == 0
    old = server.repos[REPO].branches["main"]
    refused = run("publish", other.folder, *arguments)
    assert refused.returncode == 1
    assert "holds another package already" in refused.stderr
    assert server.repos[REPO].branches == {"main": old}
    replaced = run("publish", other.folder, *arguments, "--replace")
    assert replaced.returncode == 0, replaced.stderr
    assert set(server.repos[REPO].files) == {".gitattributes", *other.names}
    assert server.repos[REPO].commits[old], "the old commit stays"


def test_a_change_on_the_hub_meanwhile_is_not_overwritten(publish: Run, server: HubServer) -> None:
    def change(content: bytes) -> bytes:
        # somebody commits between the upload and the publication
        repo = server.repos[REPO]
        if STAGING in repo.branches and len(repo.commits) == 2:
            files = dict(repo.files)
            files["theirs.txt"] = files[".gitattributes"]
            repo.commit("main", files)
        return content

    server.fail("GET /storage", times=99, alter=change)
    broken = publish()
    assert broken.returncode == 1
    assert "somebody else changed it at the same time" in broken.stderr
    assert set(server.repos[REPO].files) == {".gitattributes", "theirs.txt"}


def test_a_stand_in_never_leaves_this_machine(run: Run, folder: Path) -> None:
    refused = run("publish", folder, "--repo-id", REPO, "--yes")
    assert refused.returncode == 1
    assert "synthetic weights" in refused.stderr
    elsewhere = run(
        "publish",
        folder,
        *("--repo-id", REPO, "--yes", "--test-only-stand-in"),
        HF_ENDPOINT="https://hub.invalid",
    )
    assert elsewhere.returncode == 1
    assert "synthetic weights are never published" in elsewhere.stderr


def test_a_name_that_cannot_be_one_is_wrong_usage(run: Run, folder: Path) -> None:
    wrong = run("publish", folder, "--repo-id", "contentvec", "--test-only-stand-in")
    assert wrong.returncode == 2
    assert "is not like USER/NAME" in wrong.stderr


def test_json_says_the_same(publish: Run, server: HubServer) -> None:
    done = publish("--json")
    document = json.loads(done.stdout)
    assert document["commit"] == server.repos[REPO].branches["main"]
    assert document["private"] is True
    assert document["changed"] is True


def test_gitattributes_of_the_hub_are_left_alone(publish: Run, server: HubServer) -> None:
    assert publish().returncode == 0
    assert server.repos[REPO].files[".gitattributes"].content == GITATTRIBUTES


# verify -----------------------------------------------------------------------------


def test_verify_takes_a_folder(run: Run, folder: Path) -> None:
    done = run("verify", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASSED")


def test_verify_needs_no_torch(run: Run, folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    for name in ("torch", "transformers", "fairseq"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('not here')")
    done = run("verify", folder, PYTHONPATH=f"{blocked}{os.pathsep}{search_path()}")
    assert done.returncode == 0, done.stderr


def test_verify_of_a_variant_uses_its_own_limit(run: Run, folder: Path) -> None:
    done = run("verify", folder, "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert "float16" in done.stdout


def test_verify_finds_weights_that_compute_something_else(run: Run, folder: Path) -> None:
    from contentvec_parity.publishing.package import _sum_up
    from mlx_contentvec.backend import mx

    path = str(folder / "model.safetensors")
    tensors, metadata = mx.load(path, return_metadata=True)
    tensors["encoder.layers.1.fc1.bias"] = tensors["encoder.layers.1.fc1.bias"] + 0.01
    for name in ("model.safetensors", "contentvec_base.safetensors"):
        (folder / name).unlink()
        mx.save_safetensors(str(folder / name), tensors, metadata=metadata)
    _sum_up(folder)
    done = run("verify", folder)
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED")
    assert "layer.2" in done.stdout


def test_verify_refuses_damaged_weights(run: Run, folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(content)
    done = run("verify", folder)
    assert done.returncode == 1
    assert "is not the file that SHA256SUMS describes" in done.stderr


def test_verify_without_a_recording_says_so(
    run: Run, evidence_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(evidence_folder / "float32.safetensors", bare / "model.safetensors")
    done = run("verify", bare)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "cannot be verified" in said
    assert "without SHA256SUMS, recording.safetensors" in said


def test_verify_json_is_the_whole_report(run: Run, folder: Path) -> None:
    document = json.loads(run("verify", folder, "--json").stdout)
    assert document["reference"]["name"] == "recording"
    assert document["verdict"]["passed"] is True
