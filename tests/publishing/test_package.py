"""package: what goes in, and what is turned away."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_parity.publishing import checks
from contentvec_parity.publishing import package as packaging
from contentvec_parity.publishing.evidence import Package
from contentvec_parity.publishing.package import open_package, package
from mlx_contentvec.errors import ContentvecError, HubError, OutputError
from mlx_contentvec.files import Draft
from tests.sources import PROJECT

REPO = "someone/contentvec-mlx"


def make(folder: Path, evidence: Path, **options: Any) -> Package:
    options = {
        "variants": [evidence / "float16.safetensors"],
        "repo_id": REPO,
        "allow_stand_in": True,
        **options,
    }
    return package(evidence / "float32.safetensors", folder, **options)


@pytest.fixture(scope="module")
def made(evidence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return make(tmp_path_factory.mktemp("packages") / "tiny", evidence_folder)


@pytest.fixture
def evidence(evidence_folder: Path, tmp_path: Path) -> Path:
    """A copy of the evidence, to be spoiled."""
    return Path(shutil.copytree(evidence_folder, tmp_path / "evidence"))


@pytest.fixture
def copied(made: Package, tmp_path: Path) -> Path:
    """A copy of the package, to be spoiled."""
    return Path(shutil.copytree(made.folder, tmp_path / "package"))


# what goes in ------------------------------------------------------------------


def test_the_package_is_whole(made: Package) -> None:
    assert set(made.names) == {
        "README.md",
        "LICENSE",
        "SHA256SUMS",
        "config.json",
        "contentvec_base.safetensors",
        "ledger.float16.json",
        "ledger.json",
        "model.float16.safetensors",
        "model.safetensors",
        "parity.float16.json",
        "parity.html",
        "parity.json",
        "parity.png",
        "recording.safetensors",
    }
    assert {path.name for path in made.folder.iterdir()} == set(made.names)


def test_the_checksums_are_those_of_the_files(made: Package) -> None:
    for name, stated in made.checksums.items():
        assert hashlib.sha256((made.folder / name).read_bytes()).hexdigest() == stated


def test_the_checksums_can_be_read_by_sha256sum(made: Package) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum (coreutils)")
    assert os.system(f"cd '{made.folder}' && sha256sum --quiet -c SHA256SUMS") == 0


def test_both_names_are_one_file_on_the_disk(made: Package) -> None:
    assert (made.folder / "model.safetensors").samefile(made.folder / "contentvec_base.safetensors")


def test_the_config_says_what_the_weights_are(made: Package) -> None:
    config = json.loads((made.folder / "config.json").read_text())
    assert config["sample_rate"] == 16000
    assert config["normalize"] is False
    assert config["num_layers"] == config["model"]["encoder_layers"] == 3
    assert config["features"]["rvc_v1"] == {"output_layer": 3, "project": True, "width": 32}
    assert config["weights"]["sha256"] == made.checksums["model.safetensors"]
    assert config["variants"]["float16"]["file"] == "model.float16.safetensors"
    assert config["source"]["sha256"] == made.evidence[0].parity["source"]["sha256"]
    assert "synthetic" in config["stand_in"].lower() or "stand-in" in config["stand_in"].lower()


@pytest.mark.parametrize("name", ["model.safetensors", "contentvec_base.safetensors"])
def test_the_weights_load_with_whatever_reads_safetensors(made: Package, name: str) -> None:
    from safetensors import safe_open

    from mlx_contentvec.backend import mx, nn
    from mlx_contentvec.config import ModelConfig, parameter_shapes

    path = str(made.folder / name)
    config = ModelConfig.from_dict(made.config["model"])
    shapes = parameter_shapes(config)

    with_mlx, metadata = mx.load(path, return_metadata=True)
    assert {key: tuple(value.shape) for key, value in with_mlx.items()} == shapes
    assert metadata["format"] == "mlx"
    with safe_open(path, framework="numpy") as opened:
        assert {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()} == shapes  # noqa: SIM118

    from mlx_contentvec import ContentvecModel

    plain = ContentvecModel(config)
    nn.Module.load_weights(plain, path, strict=True)
    audio = mx.random.normal((1, 4000))
    assert mx.allclose(plain(audio)["x"], ContentvecModel.from_file(path)(audio)["x"], atol=1e-4)


def test_float16_loses_no_bit_of_a_float16_checkpoint(made: Package) -> None:
    """Widened again it is the float32 file, but for the one kernel that is computed."""
    from mlx_contentvec.backend import mx

    full = mx.load(str(made.folder / "model.safetensors"))
    half = mx.load(str(made.folder / "model.float16.safetensors"))
    computed = {"encoder.pos_conv.weight"}
    for name, array in full.items():
        same = mx.array_equal(half[name].astype(mx.float32), array)
        assert same or name in computed, name
    ledger = json.loads((made.folder / "ledger.float16.json").read_text())
    inexact = {row["target"] for row in ledger["tensors"] if not row["exact"]}
    assert inexact <= computed
    assert {row["sources"][0]["dtype"] for row in ledger["tensors"]} == {"float16"}


def test_from_pretrained_takes_the_variant_it_is_asked_for(made: Package) -> None:
    from mlx_contentvec import ContentvecModel
    from mlx_contentvec.backend import mx

    half = ContentvecModel.from_pretrained(made.folder, dtype="float16")
    assert half.layer_norm.weight.dtype == mx.float16
    full = ContentvecModel.from_pretrained(made.folder)
    assert full.layer_norm.weight.dtype == mx.float32


def test_opening_it_again_finds_the_same(made: Package) -> None:
    again = open_package(made.folder, allow_stand_in=True)
    assert again.checksums == made.checksums
    assert again.config == made.config


# what is turned away before anything is written -----------------------------------


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def spoil(evidence: Path, how: str) -> None:
    """One way in which the papers do not fit the weights."""
    parity, ledger = evidence / "float32.parity.json", evidence / "float32.ledger.json"

    def worse(document: dict[str, Any]) -> None:
        for row in document["stages"]:
            mine = row["candidate"]
            mine.update(rms=50 * mine["rms"], max_abs=50 * mine["max_abs"])
            mine["snr_db"] -= 20 * math.log10(50)
            if "apart" in row:
                row["apart"].update(rms=mine["rms"], max_abs=mine["max_abs"])
        assert document["verdict"]["passed"], "and yet it says that it passed"

    def without_a_clip(document: dict[str, Any]) -> None:
        document["clips"] = [clip for clip in document["clips"] if clip["name"] != "3s"]
        document["stages"] = [row for row in document["stages"] if row["clip"] != "3s"]

    def patient(document: dict[str, Any]) -> None:
        worse(document)
        document["verdict"]["gates"]["ratio"] = 1000.0

    {
        "no parity": parity.unlink,
        "no ledger": ledger.unlink,
        "no recording": (evidence / "float32.recording.safetensors").unlink,
        "no variant": (evidence / "float16.safetensors").unlink,
        "parity of another file": lambda: shutil.copy(evidence / "float16.parity.json", parity),
        "ledger of another file": lambda: shutil.copy(evidence / "float16.ledger.json", ledger),
        "another checkpoint": lambda: edited(
            parity, lambda document: document["source"].update(sha256="0" * 64)
        ),
        "failed": lambda: edited(parity, worse),
        "failed, with other limits": lambda: edited(parity, patient),
        "a tensor differs": lambda: edited(
            parity,
            lambda document: document["tensors"]["failures"].append(
                {"name": "layer_norm.weight", "stage": "projection", "what": "differs"}
            ),
        ),
        "no tensors": lambda: edited(parity, lambda document: document.update(tensors=None)),
        "another format": lambda: edited(
            parity, lambda document: document["weights"].update(precision="q4")
        ),
        "another model": lambda: edited(
            parity, lambda document: document["config"].update(normalize=True)
        ),
        "another size of the checkpoint": lambda: edited(
            parity, lambda document: document["source"].update(size=1)
        ),
        "known as another": lambda: edited(
            parity, lambda document: document["source"].update(known_as="contentvec")
        ),
        "a clip less": lambda: edited(parity, without_a_clip),
        "a longer clip": lambda: edited(
            parity,
            lambda document: document["clips"][0].update(samples=48_010, seconds=48_010 / 16_000),
        ),
        "a row of the ledger less": lambda: edited(
            ledger, lambda document: document["tensors"].pop()
        ),
        "a row of the ledger twice": lambda: edited(
            ledger, lambda document: document["tensors"].append(document["tensors"][0])
        ),
        "a row of the ledger of other bytes": lambda: edited(
            ledger, lambda document: document["tensors"][0].update(sha256="0" * 64)
        ),
        "a row of the ledger of another shape": lambda: edited(
            ledger, lambda document: document["tensors"][0]["shape"].reverse()
        ),
        "counts of the ledger": lambda: edited(
            ledger, lambda document: document["counts"].update(exact=99)
        ),
        "a ledger without rows": lambda: edited(ledger, lambda document: document.pop("tensors")),
        "a row of the ledger that is none": lambda: edited(
            ledger, lambda document: document["tensors"].append({"target": "x"})
        ),
        "no features": lambda: edited(
            parity,
            lambda document: document.update(
                stages=[row for row in document["stages"] if row["kind"] != "features"]
            ),
        ),
        "an older report": lambda: edited(
            parity, lambda document: document["stages"][0].pop("candidate")
        ),
        "not a report": lambda: parity.write_text("{}"),
        "not JSON": lambda: ledger.write_text("<html>"),
        "ledger of another source": lambda: edited(
            ledger, lambda document: document["source"].update(sha256="0" * 64)
        ),
    }[how]()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no parity", "there is no parity report for float32.safetensors"),
        ("no ledger", "cannot be read"),
        ("no recording", "there is no recording for float32.safetensors"),
        ("no variant", "there is no converted file"),
        ("parity of another file", "float32.parity.json is not about float32.safetensors"),
        ("ledger of another file", "float32.ledger.json is not about float32.safetensors"),
        ("another checkpoint", "compared with another checkpoint"),
        ("failed", "float32.safetensors has not passed parity"),
        ("failed, with other limits", "float32.safetensors has not passed parity"),
        ("a tensor differs", "float32.safetensors has not passed parity"),
        ("no tensors", "did not compare the tensors"),
        ("no features", "layer 3 was not measured on '3s'"),
        ("an older report", "has no candidate"),
        ("another format", "measured another number format"),
        ("another model", "measured another model"),
        ("another size of the checkpoint", "compared with another checkpoint"),
        ("known as another", "compared with another checkpoint"),
        ("a clip less", "the clip 3s among them"),
        ("a longer clip", "the clip 3s among them"),
        ("a row of the ledger less", "does not account for"),
        ("a row of the ledger twice", "does not account for"),
        ("a row of the ledger of other bytes", "is not as it says"),
        ("a row of the ledger of another shape", "is not as it says"),
        ("counts of the ledger", "counts that its rows do not have"),
        ("a ledger without rows", "no tensors, drops or counts"),
        ("a row of the ledger that is none", "a tensor that is not described"),
        ("not a report", "is not a saved parity run"),
        ("not JSON", "it is not JSON"),
        ("ledger of another source", "does not fit"),
    ],
)
def test_weights_without_proof_are_not_packaged(
    evidence: Path, tmp_path: Path, how: str, said: str
) -> None:
    spoil(evidence, how)
    with pytest.raises(ContentvecError) as caught:
        make(tmp_path / "package", evidence)
    assert said in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"evidence"}, "something was left behind"


def test_a_stand_in_is_not_packaged(evidence_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="synthetic weights are never packaged"):
        make(tmp_path / "package", evidence_folder, allow_stand_in=False)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_origin_are_not_packaged(evidence: Path, tmp_path: Path) -> None:
    from mlx_contentvec.backend import mx

    path = str(evidence / "float32.safetensors")
    mx.save_safetensors(path, mx.load(path), metadata={"format": "mlx"})
    with pytest.raises(HubError, match="was not written by mlx-contentvec convert"):
        make(tmp_path / "package", evidence)


def test_the_same_format_twice_is_refused(evidence_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the same number format"):
        make(
            tmp_path / "package",
            evidence_folder,
            variants=[evidence_folder / "float32.safetensors"],
        )


def test_a_recording_of_another_checkpoint_is_refused(
    evidence_folder: Path, tmp_path: Path
) -> None:
    from mlx_contentvec.backend import mx

    tensors, metadata = mx.load(
        str(evidence_folder / "float32.recording.safetensors"), return_metadata=True
    )
    header = json.loads(metadata["recording"])
    header["source"]["sha256"] = "0" * 64
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), tensors, {**metadata, "recording": json.dumps(header)})
    with pytest.raises(HubError, match="was recorded from another checkpoint"):
        make(tmp_path / "package", evidence_folder, recording=other)


def test_a_recording_too_large_to_ship_is_refused(
    evidence_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "RECORDING_LIMIT", 1000)
    with pytest.raises(HubError, match="too large to ship"):
        make(tmp_path / "package", evidence_folder)


def test_a_package_is_replaced_only_on_request(
    evidence_folder: Path, copied: Path, tmp_path: Path
) -> None:
    (copied / "LICENSE").unlink()
    (copied / ".DS_Store").write_text("Finder's")
    with pytest.raises(OutputError, match="exists"):
        make(copied, evidence_folder)
    assert not (copied / "LICENSE").exists()
    made = make(copied, evidence_folder, force=True)
    assert {path.name for path in copied.iterdir()} == set(made.names)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_an_empty_folder_is_replaced_on_request(evidence_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    make(tmp_path / "package", evidence_folder, force=True)
    assert (tmp_path / "package" / "SHA256SUMS").exists()


def what_is_no_package(folder: Path, how: str) -> None:
    def renamed() -> None:
        edited(folder / "config.json", lambda config: config.update(library_name="mlx"))

    {
        "a file more": lambda: (folder / "mine").write_text("precious"),
        "a hidden file more": lambda: (folder / ".env").write_text("precious"),
        "a folder more": lambda: (folder / "model.q8.safetensors").mkdir(),
        "no checksums": lambda: (folder / "SHA256SUMS").unlink(),
        "no configuration": lambda: (folder / "config.json").unlink(),
        "a configuration that is none": lambda: (folder / "config.json").write_text("[]"),
        "of another library": renamed,
    }[how]()


@pytest.mark.parametrize(
    "how",
    [
        "a file more",
        "a hidden file more",
        "a folder more",
        "no checksums",
        "no configuration",
        "a configuration that is none",
        "of another library",
    ],
)
def test_what_is_no_package_is_never_replaced(
    evidence_folder: Path, copied: Path, how: str
) -> None:
    what_is_no_package(copied, how)
    before = {path.name: path.stat().st_ino for path in copied.iterdir()}
    with pytest.raises(OutputError, match="and is not replaced"):
        make(copied, evidence_folder, force=True)
    assert {path.name: path.stat().st_ino for path in copied.iterdir()} == before


def test_files_and_links_are_never_replaced(
    evidence_folder: Path, copied: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(copied)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="and is not replaced"):
            make(tmp_path / name, evidence_folder, force=True)
    assert (tmp_path / "link").is_symlink()
    assert (copied / "SHA256SUMS").exists()


def test_what_a_folder_got_meanwhile_is_not_lost(
    evidence_folder: Path, copied: Path, tmp_path: Path
) -> None:
    def meanwhile(step: str) -> None:
        (copied / "mine").write_text("precious")

    with pytest.raises(OutputError, match="and is not replaced"):
        make(copied, evidence_folder, force=True, step=meanwhile)
    assert (copied / "mine").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


# what is found out afterwards -----------------------------------------------------


def rewrite_sums(folder: Path) -> None:
    """As somebody would who changes a file and its checksum with it."""
    packaging._sum_up(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "parity.json", "recording.safetensors", "LICENSE"]
)
def test_a_changed_file_is_found_out(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-2] ^= 1
    (copied / name).unlink()
    (copied / name).write_bytes(content)
    with pytest.raises(HubError, match="is not the file that SHA256SUMS describes"):
        open_package(copied, allow_stand_in=True)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", lambda d: d.update(sample_rate=44100), "does not say what the weights say"),
        ("config.json", lambda d: d["variants"].clear(), "does not list"),
        ("config.json", lambda d: d.update(library_name="other"), "was not made by"),
        ("parity.json", lambda d: d["weights"].update(sha256="0" * 64), "is not about"),
        ("ledger.json", lambda d: d["output"].update(sha256="0" * 64), "is not about"),
    ],
)
def test_a_change_that_took_its_checksum_along_is_found_out(
    copied: Path, name: str, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    edited(copied / name, change)
    rewrite_sums(copied)
    with pytest.raises(HubError) as caught:
        open_package(copied, allow_stand_in=True)
    assert said in str(caught.value) or "does not say what the weights say" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "by", "said"),
    [
        (r"^The max abs", "It agrees to 1.0e-09. The max abs", "It agrees to 1.0e-09"),
        (r"^(\| layer 3 \(.*?\| )\d\.\d", r"\g<1>0.1", "0.1e-"),
        (r"^\| layer 3 \+ projection .*\n", "", "layer 3 + projection"),
        (r"(\| `float16`.*? )(\d+\.\d) dB", r"\g<1>99.9 dB", "99.9 dB"),
        (r"(\| MD5 \| `)[0-9a-f]{32}", r"\g<1>" + "0" * 32, "0" * 32),
        (r"^> \*\*Synthetic weights.*\n", "", "They test the tools"),
        (r'from_pretrained\("[^"]*"', 'from_pretrained("else/where"', "extract speech.wav"),
        (r'from_pretrained\("[^"]*"', "from_pretrained(", "from_pretrained()"),
        (r"\Z", "\nAnd more.\n", "And more."),
        (r"\n\Z", "", "other line endings"),
    ],
)
def test_a_card_that_was_edited_is_refused(copied: Path, pattern: str, by: str, said: str) -> None:
    card = copied / "README.md"
    text, times = re.subn(pattern, by, card.read_text(), count=1, flags=re.M)
    assert times == 1
    card.write_text(text)
    rewrite_sums(copied)
    with pytest.raises(HubError, match="is not the one that follows from the evidence") as caught:
        open_package(copied, allow_stand_in=True)
    assert said in str(caught.value)


def test_a_license_that_the_hub_does_not_know_is_refused(
    evidence_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(HubError, match="the Hub knows no license 'free'"):
        make(tmp_path / "package", evidence_folder, license_id="free")
    assert list(tmp_path.iterdir()) == []


def test_the_verdict_that_a_card_quotes_is_judged_and_not_believed(copied: Path) -> None:
    document = json.loads((copied / "parity.json").read_text())
    reason = document["verdict"]["reason"]
    for name in ("parity.json", "README.md"):
        path = copied / name
        path.write_text(path.read_text().replace(reason, "it is perfect"))
    rewrite_sums(copied)
    with pytest.raises(HubError, match="it is perfect"):
        open_package(copied, allow_stand_in=True)


def test_two_names_for_two_files_are_found_out(copied: Path) -> None:
    (copied / "contentvec_base.safetensors").unlink()
    shutil.copy(copied / "model.float16.safetensors", copied / "contentvec_base.safetensors")
    rewrite_sums(copied)
    with pytest.raises(HubError, match="are not the same file"):
        open_package(copied, allow_stand_in=True)


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.safetensors", "LICENSE", "parity.html"])
def test_a_missing_file_is_found_out(copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(HubError, match=r"is not whole|is not a package"):
        open_package(copied, allow_stand_in=True)


def test_a_file_that_does_not_belong_there_is_found_out(copied: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(HubError, match="does not list every file"):
        open_package(copied, allow_stand_in=True)


def test_what_finder_leaves_in_a_package_is_not_of_it(copied: Path) -> None:
    for name in (".DS_Store", "._model.safetensors"):
        (copied / name).write_bytes(b"Bud1")
    package = open_package(copied, allow_stand_in=True)
    assert not {".DS_Store", "._model.safetensors"} & set(package.names)


def test_what_a_killed_process_left_in_a_package_is_not_of_it(
    copied: Path, evidence_folder: Path
) -> None:
    child = os.fork()
    if not child:
        try:
            with Draft(copied / "README.md") as card:
                card.write(0, b"half")
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    (left,) = copied.glob(".*.partial")
    assert left.name not in open_package(copied, allow_stand_in=True).names
    made = make(copied, evidence_folder, force=True)
    assert {path.name for path in copied.iterdir()} == set(made.names)
    assert [path.name for path in copied.parent.iterdir()] == ["package"]


def test_a_packaged_stand_in_stays_one(copied: Path) -> None:
    with pytest.raises(HubError, match="synthetic weights"):
        open_package(copied)


def test_the_command_packages_and_says_what(
    run_cli: Any, evidence_folder: Path, tmp_path: Path
) -> None:
    arguments = [
        "package",
        evidence_folder / "float32.safetensors",
        tmp_path / "package",
        "--variant",
        evidence_folder / "float16.safetensors",
    ]
    refused = run_cli(*arguments)
    assert refused.returncode == 1
    assert "synthetic weights are never packaged" in refused.stderr
    done = run_cli(*arguments, "--test-only-stand-in", "--json")
    assert done.returncode == 0, done.stderr
    described = json.loads(done.stdout)
    assert described["formats"] == ["float32", "float16"]
    assert (
        described["files"]["model.safetensors"]["sha256"]
        == (described["files"]["contentvec_base.safetensors"]["sha256"])
    )
    assert "test-only" not in run_cli("package", "--help").stdout


@pytest.mark.fullsize
def test_the_full_size_stand_in_is_packaged_and_its_card_runs(
    standin: Path,
    converted_standin: Path,
    standin_report: Path,
    need: Callable[[str, str], object],
    tmp_path: Path,
) -> None:
    need("soundfile", "pip install 'mlx-contentvec[audio]'")
    from contentvec_parity.references import recording

    recording.record(standin, tmp_path / "recording.safetensors")
    assert (tmp_path / "recording.safetensors").stat().st_size < checks.RECORDING_LIMIT
    made = package(
        converted_standin,
        tmp_path / "package",
        parity=standin_report,
        recording=tmp_path / "recording.safetensors",
        allow_stand_in=True,
    )
    section = (made.folder / "README.md").read_text().split("\n## Use\n")[1].split("\n## ")[0]
    python, first_release = re.findall(r"^```python\n(.*?)^```$", section, re.S | re.M)
    assert 'version="v2"' in python
    assert 'version="v1"' in python

    import soundfile

    soundfile.write(tmp_path / "speech.wav", np.zeros(8000, np.float32) + 0.01, 16000)
    for code, printed in (
        (python + "\nprint(v2.shape, v1.shape)", "(24, 768) (24, 256)\n"),
        (first_release + "\nprint(features.shape)", "(1, 24, 768)\n"),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.stdout == printed, ran.stderr
