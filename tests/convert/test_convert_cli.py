"""``convert`` and ``inspect`` as a user meets them: exit status, words, JSON, speed of starting."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert.precision import PRECISIONS
from tests.sources import search_path

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A working folder with a stand-in in it."""
    shutil.copy(tiny_checkpoint, tmp_path / "standin.pt")
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- convert


def test_convert_says_what_it_did_and_that_it_is_a_stand_in(run_cli: RunCli, here: Path) -> None:
    run = run_cli("convert", "standin.pt", "--allow-unknown", cwd=here)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert names(here) == ["standin.ledger.json", "standin.pt", "standin.safetensors"]
    data = (here / "standin.safetensors").read_bytes()
    for said in (
        "STAND-IN",
        "read      70 of fairseq naming",
        "written   67 as float32",
        "proven    66 read back and undone",
        "computed  encoder.pos_conv.weight from encoder.pos_conv.0.weight_g",
        "dropped   mask_emb: ",
        "dropped   label_embs_concat: ",
        "encoder_layers_1: 3",
        hashlib.sha256(data).hexdigest(),
        hashlib.md5((here / "standin.pt").read_bytes()).hexdigest(),
        "standin.ledger.json",
    ):
        assert said in run.stdout, said


def test_convert_json_is_one_document_with_the_ledger(run_cli: RunCli, here: Path) -> None:
    run = run_cli("convert", "standin.pt", "--allow-unknown", "--json", cwd=here)
    document = json.loads(run.stdout)
    assert document.pop("path") == "standin.safetensors"
    assert document == json.loads((here / "standin.ledger.json").read_text())


def test_a_known_name_converts_to_the_name_that_users_know(run_cli: RunCli, here: Path) -> None:
    (here / "standin.pt").rename(here / "hubert_base.pt")
    run = run_cli("convert", "hubert_base.pt", "--allow-unknown", cwd=here)
    assert run.returncode == 0, run.stderr
    assert (here / "contentvec_base.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["standin.pt"], "not a file that is known here"),
        (["standin.pt", "--expect-md5", "0" * 32], "not the file expected"),
        (["standin.pt", "--allow-unknown", "-o", "none/out.safetensors"], "does not exist"),
        (["standin.pt", "--allow-unknown", "-o", "out.bin"], ".safetensors"),
        (["standin.pt", "--allow-unknown", "--heads", "8"], "heads"),
        (["standin.pt", "--allow-unknown", "--normalize"], "normalize"),
        (["nowhere.pt"], "No such file"),
    ],
)
def test_a_refusal_is_one_error_and_exit_status_1(
    run_cli: RunCli, here: Path, arguments: list[str], said: str
) -> None:
    run = run_cli("convert", *arguments, cwd=here)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("error: ") == 1
    assert said in run.stderr and "Traceback" not in run.stderr
    assert names(here) == ["standin.pt"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["standin.pt", "--dtype", "float8", "--allow-unknown"],
        ["standin.pt", "--heads", "0"],
        ["standin.pt", "-x"],
        ["standin.pt", "--expect-md5", "0" * 31],
        ["standin.pt", "--expect-sha256", "x" * 64],
    ],
)
def test_wrong_usage_is_exit_status_2(run_cli: RunCli, here: Path, arguments: list[str]) -> None:
    run = run_cli("convert", *arguments, cwd=here)
    assert run.returncode == 2
    assert "Usage" in run.stderr


def test_an_existing_output_needs_force(run_cli: RunCli, here: Path) -> None:
    (here / "standin.safetensors").write_bytes(b"old")
    run = run_cli("convert", "standin.pt", "--allow-unknown", cwd=here)
    assert run.returncode == 1 and "--force" in run.stderr
    run = run_cli("convert", "standin.pt", "--allow-unknown", "--force", cwd=here)
    assert run.returncode == 0


def test_a_file_name_that_is_no_text_is_handled(run_cli: RunCli, here: Path) -> None:
    name = os.fsdecode(b"st\xffnd-in.pt")
    try:
        (here / "standin.pt").rename(here / name)
    except OSError:
        pytest.skip("needs a file system that allows such a name, which macOS has not")
    run = run_cli("convert", name, "--allow-unknown", cwd=here)
    assert run.returncode == 0, run.stderr
    assert len(names(here)) == 3
    assert run_cli("inspect", name, cwd=here).returncode == 0
    run = run_cli("convert", name, "-o", "other.safetensors", cwd=here)
    assert run.returncode == 1 and run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_help_names_every_precision(run_cli: RunCli) -> None:
    run = run_cli("convert", "--help")
    assert run.returncode == 0
    assert all(name in run.stdout for name in PRECISIONS)


def test_a_float16_conversion_is_shown_as_lossless_but_for_the_kernel(
    run_cli: RunCli, here: Path
) -> None:
    run = run_cli("convert", "standin.pt", "--allow-unknown", "--dtype", "float16", cwd=here)
    assert "proven    66 read back and undone" in run.stdout
    run = run_cli(
        "convert", "standin.pt", "--allow-unknown", "--dtype", "bfloat16", "--force", cwd=here
    )
    assert "rounded   66 to bfloat16" in run.stdout and "proven" not in run.stdout


def test_nothing_heavy_is_imported_to_convert(here: Path) -> None:
    code = (
        "import sys\n"
        "from mlx_contentvec.cli import main\n"
        "main(['convert', 'standin.pt', '--allow-unknown'], standalone_mode=False)\n"
        "heavy = {'mlx', 'torch', 'rich', 'huggingface_hub', 'safetensors', 'fairseq', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == "[]"


def test_hashing_begins_before_numpy_is_imported() -> None:
    program = "import sys, contentvec_convert.commands.convert; print('numpy' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "False\n"


def test_a_pipe_that_closes_early_is_no_traceback(here: Path) -> None:
    command = f"{sys.executable} -m mlx_contentvec inspect standin.pt --tensors | head -1"
    run = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=here,
        env={**os.environ, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in run.stderr


def test_an_interrupted_command_says_so_and_leaves_nothing(here: Path) -> None:
    code = (
        "import signal, time; from contentvec_convert.writer import Draft\n"
        "from mlx_contentvec.cli import main\n"
        # a process started in the background of a shell may be deaf to it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "write = Draft.write\n"
        "def slow(self, *a): write(self, *a); print('writing', flush=True); time.sleep(0.2)\n"
        "Draft.write = slow\n"
        "main(['convert', 'standin.pt', '--allow-unknown'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, "PYTHONPATH": search_path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(names(here)) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert names(here) == ["standin.pt"]


@pytest.mark.parametrize("patience", ["0", "60"])
def test_a_bar_appears_on_a_terminal_when_it_takes_long(here: Path, patience: str) -> None:
    code = (
        "import sys; from mlx_contentvec import terminal\n"
        "terminal.PATIENCE = float(sys.argv[1])\n"
        "from mlx_contentvec.cli import main\n"
        "main(['convert', 'standin.pt', '--allow-unknown'])"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, patience],
        cwd=here,
        env={**os.environ, "PYTHONPATH": search_path(), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # what Linux says at the end of a terminal
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    output, _ = process.communicate()
    assert process.returncode == 0 and "written   67" in output
    assert (b"writing" in shown and b"checking" in shown) == (patience == "0")


# ---- every kind of damage, through the command


def invoke(*arguments: str) -> Any:
    from click.testing import CliRunner

    from mlx_contentvec.cli import main

    return CliRunner().invoke(main, list(arguments))


def test_damage_through_the_command_is_an_error_or_a_result_never_a_traceback(here: Path) -> None:
    data = (here / "standin.pt").read_bytes()
    source, output = here / "damaged.pt", here / "damaged.safetensors"
    steps = len(data) // 40
    damaged = [data[:length] for length in range(0, len(data), steps)]
    for place in range(7, len(data), steps):
        damaged.append(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
    for content in damaged:
        source.write_bytes(content)
        for flags in ([], ["--allow-unknown"]):
            run = invoke("convert", str(source), "-o", str(output), *flags)
            assert run.exception is None or isinstance(run.exception, SystemExit)
            if run.exit_code == 0:
                assert hashlib.md5(content).hexdigest() in run.output
                output.unlink()
            else:
                assert run.exit_code == 1
                assert run.output.startswith("error: ")
                assert not output.exists()


# ---- inspect


def test_inspect_shows_a_checkpoint_without_converting_it(run_cli: RunCli, here: Path) -> None:
    run = run_cli("inspect", "standin.pt", cwd=here)
    assert run.returncode == 0, run.stderr
    assert names(here) == ["standin.pt"]
    for said in ("torch zip", "STAND-IN", "3 layers, 96 wide, 4 heads", "70 (70 float16)"):
        assert said in run.stdout, said
    assert "dropped   mask_emb" in run.stdout


def test_inspect_json_lists_every_tensor_and_its_fate(run_cli: RunCli, here: Path) -> None:
    document = json.loads(run_cli("inspect", "standin.pt", "--json", cwd=here).stdout)
    assert document["convertible"] is True and document["problem"] is None
    assert document["stand_in"] and document["source"]["known_as"] is None
    assert len(document["tensors"]) == 70
    fates = [("target" in row, "dropped" in row) for row in document["tensors"]]
    assert fates.count((True, False)) == 68 and fates.count((False, True)) == 2
    assert document["config"]["encoder_layers"] == 3


def test_inspect_lists_tensors_on_request(run_cli: RunCli, here: Path) -> None:
    run = run_cli("inspect", "standin.pt", "--tensors", cwd=here)
    assert (
        "feature_extractor.conv_layers.1.0.weight float16 (64, 64, 3) -> "
        "feature_extractor.conv_layers.1.conv.weight (conv_kernel)" in run.stdout
    )


def test_inspect_of_a_converted_file_tells_its_origin_and_checks_its_ledger(
    run_cli: RunCli, here: Path
) -> None:
    run_cli("convert", "standin.pt", "--allow-unknown", cwd=here)
    run = run_cli("inspect", "standin.safetensors", cwd=here)
    md5 = hashlib.md5((here / "standin.pt").read_bytes()).hexdigest()
    for said in ("STAND-IN", md5, "ledger    matches", "float32", "67 (67 float32)"):
        assert said in run.stdout, said
    (here / "standin.ledger.json").rename(here / "other.ledger.json")
    (here / "standin.safetensors").rename(here / "moved.safetensors")
    assert "none: there is no moved" in run_cli("inspect", "moved.safetensors", cwd=here).stdout
    run_cli("convert", "standin.pt", "--allow-unknown", "--dtype", "float16", cwd=here)
    (here / "standin.ledger.json").rename(here / "moved.ledger.json")
    run = run_cli("inspect", "moved.safetensors", "--json", cwd=here)
    assert json.loads(run.stdout)["ledger"].startswith("of another file")


def test_inspect_of_a_quantised_file_shows_its_model(
    run_cli: RunCli, here: Path, tmp_path: Path
) -> None:
    run_cli("convert", "standin.pt", "--allow-unknown", "--dtype", "q8", cwd=here)
    run = run_cli("inspect", "standin.safetensors", cwd=here)
    assert run.returncode == 0, run.stderr
    assert "3 layers, 96 wide, 4 heads" in run.stdout
    assert "it cannot be converted again" in run.stdout and "quantised" in run.stdout


def test_inspect_says_why_a_readable_file_cannot_be_converted(
    run_cli: RunCli, here: Path, fairseq: Any, torch: Any
) -> None:
    state = torch.load(here / "standin.pt", weights_only=False)
    del state["model"]["final_proj.bias"]
    torch.save(state, here / "incomplete.pt")
    run = run_cli("inspect", "incomplete.pt", cwd=here)
    assert run.returncode == 0
    assert "refused" in run.stdout and "1 missing: final_proj.bias" in run.stdout
    run = run_cli("convert", "incomplete.pt", "--allow-unknown", cwd=here)
    assert run.returncode == 1 and "1 missing: final_proj.bias" in run.stderr


def test_inspect_of_something_else_is_an_error_that_says_what_it_is(
    run_cli: RunCli, here: Path
) -> None:
    (here / "page.pt").write_text("<!DOCTYPE html><html></html>")
    run = run_cli("inspect", "page.pt", cwd=here)
    assert run.returncode == 1 and run.stdout == ""
    assert "web page" in run.stderr


def test_the_words_of_mlx_lm_work_or_are_answered(run_cli: RunCli, here: Path) -> None:
    done = run_cli(
        *("convert", "--hf-path", "standin.pt", "--mlx-path", "model"),
        *("--dtype", "float16", "--allow-unknown"),
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    assert (here / "model" / "model.safetensors").is_file()
    from mlx_contentvec import ContentvecModel

    ContentvecModel.from_pretrained(here / "model")
    answers = {
        ("-q",): "say --dtype q8",
        ("--quantize",): "say --dtype q8",
        ("--q-bits", "4"): "say --dtype q8 or --dtype q4",
        ("--q-group-size", "32"): "groups are of 64",
        ("--upload-repo", "me/model"): "mlx-contentvec publish",
        ("--hf-path", "other.pt"): "name one SOURCE",
        ("--mlx-path", "model", "-o", "x.safetensors"): "name one output",
    }
    for words, answer in answers.items():
        done = run_cli("convert", "standin.pt", *words, cwd=here)
        assert done.returncode == 2 and answer in done.stderr, words
        assert len(done.stderr.splitlines()) == 4
    shown = run_cli("convert", "--help").stdout
    assert "--hf-path" not in shown and "--upload-repo" not in shown


def test_the_conversion_can_be_called(here: Path) -> None:
    import contentvec_convert

    ledger = contentvec_convert.convert(
        here / "standin.pt", here / "called.safetensors", allow_unknown=True
    )
    assert isinstance(ledger, contentvec_convert.Ledger)
    assert ledger.output["name"] == "called.safetensors"
    found = contentvec_convert.inspect(here / "called.safetensors")
    assert isinstance(found, contentvec_convert.Inspection)
    assert found.config == ledger.config
    assert dir(contentvec_convert) == sorted(contentvec_convert.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = contentvec_convert.nothing
