"""The command as people meet it: lines that fit, misspelled words, streams that are gone."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_contentvec import terminal
from mlx_contentvec.cli import _unexpected
from mlx_contentvec.errors import AudioError, ContentvecError, counted, did_you_mean
from mlx_contentvec.extract.sources import find_sources
from mlx_contentvec.terminal import NamedPath, Status, labelled, late_bar, say, wrapped
from tests.hub_server import needs_client_1
from tests.sources import search_path


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``script`` by sh, with the command's name in $M."""
    return subprocess.run(
        ["sh", "-c", script],
        env={
            **os.environ,
            "M": f"{sys.executable} -m mlx_contentvec",
            "PYTHONPATH": search_path(),
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# lines --------------------------------------------------------------------------------


def test_later_lines_stand_below_the_text_of_the_first() -> None:
    row = labelled("model", "HuBERT base, 12 layers, 768 wide, 12 heads\nand more")
    assert wrapped(row, 40).split("\n") == [
        "  model     HuBERT base, 12 layers, 768",
        "            wide, 12 heads",
        "            and more",
    ]
    error = str(ContentvecError("a b", found="c " * 20, hint="d " * 20)).split("\n")
    for line in wrapped("\n".join(error), 30).split("\n"):
        assert len(line) <= 30
        assert (
            line.startswith(("a b", "  found     c", "            c", "hint: d", "      d"))
            or not line
        )


def test_no_word_is_broken() -> None:
    path = "a/" * 60
    assert path in wrapped(labelled("ledger", f"see {path} there"), 40)


@pytest.mark.parametrize("given", [".", "..", "./", "../folder"])
def test_a_folder_by_its_place_has_a_name(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    monkeypatch.chdir(folder / "inner" if given == ".." else folder)
    path = NamedPath().convert(given, None, None)
    assert path.name == "folder" and path.samefile(folder)


def test_one_is_not_several() -> None:
    assert [counted(n, "clip") for n in (0, 1, 2, 1000)] == [
        "0 clips", "1 clip", "2 clips", "1,000 clips",
    ]  # fmt: skip


def test_only_what_resembles_a_word_is_suggested() -> None:
    assert did_you_mean("convrt", ["convert", "verify"]) == "did you mean convert?"
    assert did_you_mean("zzz", ["convert", "verify"]) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convrt x", "did you mean convert?"),
        ("here.pt", "mlx-contentvec convert here.pt"),
        ("convert here.pt --dtyp q8", "--dtype"),
        ("convert heer.pt", "did you mean here.pt"),
        ("convert contentve", "did you mean contentvec"),
        ("fetch contentve", "did you mean contentvec"),
        ("extract . -o out -w contentve", "did you mean contentvec"),
        ("extract . -o out -w song.wav", "song.wav is audio"),
        ("extract here.pt -o out -w .", "here.pt is no audio"),
        ("parity a.safetensors here.pt", "here.pt a.safetensors"),
        ("extract . -o out -w ./heer.pt", "did you mean here.pt"),
        ("extract song.wav -o out -w here.pt", "mlx-contentvec inspect here.pt"),
        ("inspect heer.pt", "did you mean here.pt"),
        ("parity heer.pt here.pt", "did you mean here.pt"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(tmp_path: Path, words: str, said: str) -> None:
    (tmp_path / "here.pt").write_bytes(b"")
    run = shell(f"$M {words}", tmp_path)
    assert run.returncode in (1, 2) and said in run.stderr and "Traceback" not in run.stderr


def test_a_misspelt_audio_file_is_answered_with_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "song.wav").write_bytes(b"")
    with pytest.raises(AudioError) as caught:
        find_sources([str(tmp_path / "sogn.wav")])
    assert caught.value.hint == f"did you mean {tmp_path / 'song.wav'}?"


# progress -----------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.05)
    with late_bar() as advance:
        advance("hashing", 1, 4)
        time.sleep(0.3)
    with Status("loading"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= lines.count("hashing 25 %") <= 6 and 2 <= lines.count("loading") <= 6


#: sets a terminal's title, colours, clears it by the one-byte form of ESC [, turns the line round
ESCAPES = "\x1b]0;x\x07\x1b[31m\x9b2J\u202e"


def test_what_a_terminal_would_obey_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a{ESCAPES}\nb")
    printed = capsys.readouterr().out
    assert printed == "a\\x1b]0;x\\x07\\x1b[31m\\x9b2J\\u202e\nb\n"


def test_no_part_of_an_error_is_obeyed_or_fills_pages() -> None:
    parts = {part: f"{ESCAPES}{part}\n" * 5_000 for part in ("found", "expected", "hint")}
    shown = str(ContentvecError("x" * 100_000, **parts))
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert shown.count("\n") < 60
    assert len(shown) < 20_000
    assert "..." in shown
    plain = ContentvecError("a", found="b\nc", expected="d", hint="e\nf")
    assert str(plain) == "a\n  found     b\nc\n  expected  d\n\nhint: e\n      f"


def test_a_name_in_brackets_is_no_style(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Status("loading [/red].pt") as status:
        status.update(f"recording [/]{ESCAPES}.pt")


def test_quick_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with late_bar() as advance:
        advance("hashing", 1, 4)
    assert capsys.readouterr().err == ""


# streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["models", "--help", "convert --help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_gives_one_line(tmp_path: Path, command: str, unbuffered: str) -> None:
    done = shell(f"$M {command} >/dev/full", tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert done.stderr == "error: results cannot be written: No space left on device\n"


def test_a_current_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    done = shell("mkdir gone; cd gone; rmdir ../gone; $M verify foo", tmp_path)
    assert "error: the current folder is not there any more" in done.stderr
    assert done.returncode == 1
    # where it is there, it is not blamed
    said = str(_unexpected(FileNotFoundError(errno.ENOENT, "No usable temporary directory")))
    assert "No usable temporary directory" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("HF_ENDPOINT", "http://[::1", marks=needs_client_1),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
    ],
)
def test_a_setting_that_the_client_of_the_hub_does_not_take_is_named(
    tmp_path: Path, name: str, value: str
) -> None:
    done = shell("$M fetch", tmp_path, **{name: value})
    assert "error: the Hub's client does not begin with the settings" in done.stderr
    assert name in done.stderr
    assert done.returncode == 1


def test_a_closed_standard_output_gives_one_line(tmp_path: Path) -> None:
    done = shell("$M models >&-", tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: standard output is closed: results have nowhere to go\n"


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
def test_without_standard_error_results_still_come(tmp_path: Path, where: str) -> None:
    done = shell(f"$M models {where} && ! $M convert none.pt {where}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "contentvec" in done.stdout


def test_a_reader_that_leaves_early_hears_no_complaint(tmp_path: Path) -> None:
    done = shell("$M models | head -n 1", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# the last resort ----------------------------------------------------------------------

FAULT = """
import sys, click
from mlx_contentvec import cli
cli.COMMANDS["break"] = ("__main__:broken", "")
@click.command()
def broken():
    raise KeyError("nobody thought of this")
sys.argv = ["mlx-contentvec", "break"]
cli.main()
"""


@pytest.mark.parametrize("wanted", ["", "1"])
def test_what_nobody_thought_of_says_what_to_report(tmp_path: Path, wanted: str) -> None:
    (tmp_path / "fault.py").write_text(FAULT)
    done = shell(f"{sys.executable} fault.py", tmp_path, MLX_CONTENTVEC_TRACEBACK=wanted)
    assert done.returncode == 1
    assert "KeyError: 'nobody thought of this'" in done.stderr
    assert "report" in done.stderr and "Python 3" in done.stderr
    assert ("Traceback" in done.stderr) == bool(wanted)
