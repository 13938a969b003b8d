from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from mlx_contentvec import hub
from mlx_contentvec.cli import main
from mlx_contentvec.extract.run import Extraction
from tests.checkpoint_files import change_in_place
from tests.small_models import DEEP, noise, random_weights_file
from tests.sources import PROJECT, search_path

soundfile = pytest.importorskip(
    "soundfile", reason="audio files need soundfile: pip install 'mlx-contentvec[audio]'"
)
COMMAND = [sys.executable, "-m", "mlx_contentvec", "extract"]
RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights_file(tmp_path_factory.mktemp("weights") / "deep.safetensors", DEEP)


def write_clips(folder: Path, count: int, samples: int = 8000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        soundfile.write(folder / f"{i:03}.wav", noise(samples + 160 * i, seed=i), 16000)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": search_path(), "OMP_NUM_THREADS": "1"}


def outputs(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.npy"))


def stopped_after(count: int, how: int, folder: Path, command: list[Any]) -> int:
    """Start an extraction, send it a signal once ``count`` outputs are there; its exit status."""
    # where tests run in the background Ctrl-C is ignored, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*map(str, command)], env=environment(), stderr=subprocess.DEVNULL, cwd=PROJECT
    )
    signal.signal(signal.SIGINT, before)
    end = time.monotonic() + 60
    while len(outputs(folder)) < count and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(timeout=60)


def test_a_folder_becomes_features_and_a_summary(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    write_clips(tmp_path / "in", 3)
    done = run_cli("extract", tmp_path / "in", "-o", tmp_path / "out", "-w", weights)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("extracted  3 clips, 1.5 s of audio in ")
    assert "audio-seconds per second" in done.stdout
    assert outputs(tmp_path / "out") == ["000.npy", "001.npy", "002.npy"]
    assert np.load(tmp_path / "out/001.npy").shape == (DEEP.frames(8160), 96)


def test_version_one_is_projected(run_cli: RunCli, weights: Path, tmp_path: Path) -> None:
    clip = write_clips(tmp_path / "in", 1) / "000.wav"
    common = ["extract", clip, "-w", weights]
    assert run_cli(*common, "-o", tmp_path / "v1", "--version", "v1").returncode == 0
    same = run_cli(*common, "-o", tmp_path / "l9", "--layer", "9", "--project")
    assert same.returncode == 0
    v1 = np.load(tmp_path / "v1/000.npy")
    assert v1.shape == (24, 32)
    np.testing.assert_array_equal(v1, np.load(tmp_path / "l9/000.npy"))


def test_a_list_comes_on_stdin(run_cli: RunCli, weights: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "in", 3)
    listed = f"{folder / '000.wav'}\n{folder / '002.wav'}\n"
    done = run_cli("extract", "-", "-o", tmp_path / "out", "-w", weights, input=listed)
    assert done.returncode == 0
    assert outputs(tmp_path / "out") == ["000.npy", "002.npy"]


def test_bad_files_are_named_and_the_status_is_one(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    folder = write_clips(tmp_path / "in", 2)
    (folder / "bad.wav").write_text("hello")
    command = ["extract", folder, "-o", tmp_path / "out", "-w", weights]
    done = run_cli(*command)
    assert done.returncode == 1
    assert "extracted  2 clips" in done.stdout
    assert "error: 1 file gave no features" in done.stderr
    assert f"{folder / 'bad.wav'}: is not audio" in done.stderr
    again = run_cli(*command, "--json")
    summary = json.loads(again.stdout)
    assert again.returncode == 1
    assert (summary["extracted"], summary["skipped"]) == (0, 2)
    assert [Path(failure["source"]).name for failure in summary["failed"]] == ["bad.wav"]


def test_a_file_that_appears_where_a_folder_is_to_be_packed_is_kept(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = write_clips(tmp_path / "in", 2), tmp_path / "out"
    theirs, features = out / "features.safetensors", Extraction._features

    def appearing(extraction: Extraction, *given: Any) -> Any:
        theirs.write_bytes(b"another's")
        return features(extraction, *given)

    monkeypatch.setattr(Extraction, "_features", appearing)
    command = ["extract", str(folder), "-o", str(out), "-w", str(weights), "--safetensors"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and "features.safetensors" in done.output
    assert theirs.read_bytes() == b"another's"
    monkeypatch.undo()
    theirs.unlink()
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and "2 finished before" in done.output
    assert sorted(load_file(theirs)) == ["000", "001"]


def test_one_safetensors_for_each_folder(run_cli: RunCli, weights: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write_clips(tmp_path / "in/a", 2)
    out = tmp_path / "out"
    done = run_cli("extract", tmp_path / "in", "-o", out, "-w", weights, "--safetensors")
    assert done.returncode == 0
    assert sorted(load_file(out / "a/features.safetensors")) == ["000", "001"]
    assert outputs(out) == []


def test_weights_that_change_before_they_are_named_in_the_manifest_are_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "model.safetensors"
    copied.write_bytes(weights.read_bytes())
    sha256_of = hub.sha256_of

    def changing(path: Path) -> str:
        change_in_place(path)
        return sha256_of(path)

    monkeypatch.setattr(hub, "sha256_of", changing)
    folder, out = write_clips(tmp_path / "in", 1), tmp_path / "out"
    done = CliRunner().invoke(
        main, ["extract", str(folder), "-o", str(out), "-w", str(copied), "--layer", "2"]
    )
    assert done.exit_code == 1
    assert "model.safetensors changed while it was being read" in done.output.replace("\n", " ")
    assert not outputs(out)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--rvc", "--safetensors"], 2, "exclude each other"),
        (["--rvc", "--applio"], 2, "exclude each other"),
        (["--embedder", "spin"], 2, "--embedder needs --applio"),
        (["--applio", "--version", "v1"], 2, "the last layer"),
        (["--applio"], 1, "Applio trains on no features 96 wide"),
        (["--overlap", "1"], 2, "--overlap needs --window"),
        (["--window", "nan"], 2, "not a finite number"),
        (["--window", "inf"], 2, "not a finite number"),
        (["--window", "1", "--overlap", "nan"], 2, "not a finite number"),
        (["--window", "8", "--overlap", "0"], 1, "windows of 8 s that overlap by 0 s"),
        (["--batch-seconds", "nan"], 2, "not a finite number"),
        (["--max-memory", 400 * "9" + "G"], 2, "is not a size like"),
        (["--max-memory", "much"], 2, "not a size like 800M"),
        (["--layer", "13"], 1, "no layer 13"),
        (["--rvc"], 1, "RVC has no folder for features 96 wide"),
        (["--version", "v1", "--layer", "3"], 1, "version v1, layer 3"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run_cli: RunCli, weights: Path, tmp_path: Path, options: list[str], status: int, message: str
) -> None:
    folder = write_clips(tmp_path / "in", 1)
    done = run_cli("extract", folder, "-o", tmp_path / "out", "-w", weights, *options)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert outputs(tmp_path / "out") == []


@pytest.mark.parametrize("wrong", ["weights", "audio", "layer"])
def test_what_is_refused_leaves_no_folder(
    run_cli: RunCli, weights: Path, tmp_path: Path, wrong: str
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(bytes(100))
    (tmp_path / "empty").mkdir()
    done = run_cli(
        "extract",
        tmp_path / "empty" if wrong == "audio" else write_clips(tmp_path / "in", 1),
        "-w",
        tmp_path / "bad.safetensors" if wrong == "weights" else weights,
        "-o",
        tmp_path / "new" / "out",
        *(["--layer", "99"] if wrong == "layer" else []),
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_clip_that_does_not_fit_its_memory_is_named(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    folder = write_clips(tmp_path / "in", 1)
    soundfile.write(folder / "long.wav", noise(16000 * 100), 16000)
    common = ["extract", folder, "-w", weights, "--max-memory"]
    done = run_cli(*common, "3M", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "long.wav: is too long for the memory (" in done.stderr
    assert outputs(tmp_path / "out") == ["000.npy"]
    # 100 s at 16 kHz are 6.4 MB
    windows = run_cli(*common, "7M", "-o", tmp_path / "windows", "--window", "10", "--overlap", "1")
    assert windows.returncode == 0
    assert "seams      10, windows disagree by" in windows.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_keeps_what_is_finished_and_goes_on(
    run_cli: RunCli, weights: Path, tmp_path: Path, how: signal.Signals
) -> None:
    folder = write_clips(tmp_path / "in", 40, samples=16000)
    out = tmp_path / "out"
    # one by one: a GPU that takes them all at once is done before a signal arrives
    command = [folder, "-o", out, "-w", weights, "--batch-seconds", "0"]
    status = stopped_after(5, how, out, [*COMMAND, *command])
    assert status == (130 if how == signal.SIGINT else -how)
    kept = outputs(out)
    assert 5 <= len(kept) < 40
    for name in kept:
        assert np.load(out / name).shape[1] == 96
    times = {name: (out / name).stat().st_mtime_ns for name in kept}
    done = run_cli("extract", *command)
    assert done.returncode == 0
    assert f"skipped    {len(kept)} finished before" in done.stdout
    assert len(outputs(out)) == 40
    assert all((out / name).stat().st_mtime_ns == mtime for name, mtime in times.items())


def test_a_list_on_stdin_that_is_closed_or_does_not_end_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*COMMAND, "-", "-o", str(tmp_path / "out"), "-w", str(weights)]
    closed = subprocess.run(
        ["sh", "-c", f"{shlex.join(command)} <&-"],
        capture_output=True,
        env=environment(),
        text=True,
        timeout=60,
    )
    assert closed.returncode == 1
    assert "the list of files on standard input cannot be read" in closed.stderr
    assert "it is closed" in closed.stderr
    monkeypatch.setattr("mlx_contentvec.extract.command.LIST_BYTES", 9)
    long = CliRunner().invoke(main, command[3:], input="0123456789")
    assert long.exit_code == 1
    assert "more than 9 bytes" in long.output


def test_a_list_on_stdin_holds_names_that_are_not_utf_8(weights: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "in", 1)
    name = os.fsencode(folder) + b"/\x82\xa0.wav"
    (folder / "000.wav").rename(os.fsdecode(name))
    done = subprocess.run(
        [*COMMAND, "-", "-o", str(tmp_path / "out"), "-w", str(weights)],
        input=name + b"\n",
        capture_output=True,
        env=environment(),
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert [os.fsencode(p.name) for p in (tmp_path / "out").glob("*.npy")] == [b"\x82\xa0.npy"]


def test_odd_names_are_printed_harmlessly_and_stop_nothing(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    folder = write_clips(tmp_path / "in", 1)
    (folder / ("x" * 249 + ".wav")).write_bytes((folder / "000.wav").read_bytes())
    for name in (b"\x82\xa0.wav", b"\x1b[31mred\n.wav", b"b\nd.wav"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("text")
    done = run_cli("extract", folder, "-o", tmp_path / "out", "-w", weights)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr and "Traceback" not in done.stderr
    for shown in (r"\x82\xa0.wav: is not audio", r"\x1b[31mred\n.wav: is", r"b\nd.wav: is"):
        assert shown in done.stderr
    assert "000.npy" in outputs(tmp_path / "out")
    summary = run_cli("extract", folder, "-o", tmp_path / "out", "-w", weights, "--json")
    assert json.loads(summary.stdout)["skipped"] >= 1


@pytest.mark.parametrize("name", ["extracted", "3_feature768", "3_feature256"])
def test_nothing_but_features_lies_where_training_programs_look(
    run_cli: RunCli, weights: Path, tmp_path: Path, name: str
) -> None:
    folder = write_clips(tmp_path / "in", 2)
    out = tmp_path / "logs/voice" / name
    command = ["extract", folder, "-o", out, "-w", weights]
    assert run_cli(*command).returncode == 0
    assert sorted(p.name for p in out.iterdir()) == ["000.npy", "001.npy"]
    visible = [p.name for p in out.parent.iterdir() if not p.name.startswith(".")]
    assert visible == [name]
    assert "skipped    2 finished before" in run_cli(*command).stdout


# ---- shards ------------------------------------------------------------------------


def test_shards_without_a_launcher_do_everything_once_and_the_summary_says_so(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    folder, out = write_clips(tmp_path / "in", 7), tmp_path / "out"
    (folder / "bad.wav").write_text("hello")
    command = [*COMMAND, folder, "-o", out, "-w", weights]
    started = [
        subprocess.Popen(
            [*map(str, command), "--shard", f"{index}/3", "--json"],
            env=environment(),
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 2)
    ]
    said = [json.loads(process.communicate(timeout=120)[0]) for process in started]
    made = sum(summary["extracted"] for summary in said)
    assert len(outputs(out)) == made < 7
    missing = run_cli("extract", folder, "-o", out, "-w", weights, "--shard", "summary")
    assert missing.returncode == 1
    assert f"finished   {made} of 8 clips" in missing.stdout
    assert missing.stderr.count("has no features yet") == 8 - made
    last = run_cli("extract", folder, "-o", out, "-w", weights, "--shard", "1/3")
    assert "shard      1/3; when all are done: --shard summary" in last.stdout
    assert len(outputs(out)) == 7
    # a shard that is started again has nothing left to do
    again = run_cli("extract", folder, "-o", out, "-w", weights, "--shard", "1/3", "--json")
    assert json.loads(again.stdout)["extracted"] == 0
    done = run_cli("extract", folder, "-o", out, "-w", weights, "--shard", "summary", "--json")
    summary = json.loads(done.stdout)
    assert (done.returncode, summary["skipped"]) == (1, 7)
    assert [Path(one["source"]).name for one in summary["failed"]] == ["bad.wav"]
    (folder / "bad.wav").unlink()
    whole = run_cli("extract", folder, "-o", out, "-w", weights, "--shard", "summary")
    assert (whole.returncode, whole.stderr) == (0, "")


def test_what_belongs_to_no_single_shard_is_made_by_the_summary(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "out"
    common = ["extract", write_clips(tmp_path / "in", 3), "-o", out, "-w", weights, "--safetensors"]
    for index in range(2):
        assert run_cli(*common, "--shard", f"{index}/2").returncode == 0
        assert not (out / "features.safetensors").exists()
    assert run_cli(*common, "--shard", "summary").returncode == 0
    assert sorted(load_file(out / "features.safetensors")) == ["000", "001", "002"]
    assert "skipped" in run_cli(*common, "--shard", "0/2").stdout


@pytest.mark.parametrize("shard", ["3/3", "one", "1/0"])
def test_a_shard_that_is_none_is_a_usage_error(
    run_cli: RunCli, weights: Path, tmp_path: Path, shard: str
) -> None:
    done = run_cli("extract", tmp_path, "-o", tmp_path / "out", "-w", weights, "--shard", shard)
    assert done.returncode == 2
    assert "INDEX/COUNT, counted from 0" in done.stderr


# ---- several processes ------------------------------------------------------------

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
needs_launcher = pytest.mark.skipif(LAUNCH is None, reason="mlx.launch comes with MLX")


def launched(count: int, *arguments: Any) -> list[str]:
    variables = [f"{k}={v}" for k, v in environment().items() if k in ("PYTHONPATH",)]
    return [
        # through nccl, which is CUDA's, each process has to have a GPU of its own
        *(str(LAUNCH), "-n", str(count), "--backend", "ring", "--env", "OMP_NUM_THREADS=1"),
        *(part for variable in variables for part in ("--env", variable)),
        # before MLX 0.32 the launcher runs a file that it is given by Python, whatever it is
        *("--", "env", *map(str, [*COMMAND, *arguments])),
    ]


@needs_launcher
def test_two_processes_share_the_work_and_report_once(weights: Path, tmp_path: Path) -> None:
    folder = write_clips(tmp_path / "in", 8)
    (folder / "bad.wav").write_text("hello")
    out = tmp_path / "out"
    done = subprocess.run(
        launched(2, folder, "-o", out, "-w", weights, "--json"),
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    summary = json.loads(done.stdout)
    assert (summary["extracted"], summary["ranks"], len(summary["failed"])) == (8, 2, 1)
    assert len(outputs(out)) == 8
    lines = [len(path.read_text().splitlines()) for path in sorted(out.glob("*.jsonl"))]
    assert sum(lines) == 8
    assert min(lines) >= 3


@needs_launcher
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc: run it on Linux")
def test_a_killed_process_loses_only_what_it_had_not_finished(
    run_cli: RunCli, weights: Path, tmp_path: Path
) -> None:
    folder = write_clips(tmp_path / "in", 40, samples=16000)
    out = tmp_path / "out"
    launcher = subprocess.Popen(
        launched(2, folder, "-o", out, "-w", weights),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    # found before it has anything to lose, and stopped while the other goes on: on a busy
    # machine one of them may have finished before the other begins
    until(lambda: 1 in ranks_of(folder))
    second = ranks_of(folder)[1]
    until((out / ".mlx-contentvec.rank-1.jsonl").exists)
    os.kill(second, signal.SIGSTOP)
    until(lambda: len(outputs(out)) > 4)
    os.kill(second, signal.SIGKILL)
    said, _ = launcher.communicate(timeout=60)
    until(lambda: not ranks_of(folder))
    # whatever the launcher's exit status, nothing looks like the end of a run
    assert "extracted " not in said
    kept = outputs(out)
    assert 4 < len(kept) < 40
    told = run_cli("extract", folder, "-o", out, "-w", weights, "--shard", "summary")
    assert told.returncode == 1
    assert f"finished   {len(kept)} of 40 clips" in told.stdout
    done = run_cli("extract", folder, "-o", out, "-w", weights)
    assert done.returncode == 0
    assert f"skipped    {len(kept)} finished before" in done.stdout
    assert len(outputs(out)) == 40


def until(happens: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.005)


def ranks_of(folder: Path) -> dict[int, int]:
    """The processes that extract ``folder``, by their ranks, found by their arguments."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for rank in range(2):
            if str(folder).encode() in arguments and f"MLX_RANK={rank}".encode() in variables:
                found[rank] = int(process.name)
    return found
