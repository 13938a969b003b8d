"""Clips decoded by processes of their own: the same clips and errors, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_contentvec.cli import main
from mlx_contentvec.errors import AudioError
from mlx_contentvec.extract import decoding
from mlx_contentvec.extract.decoding import Decoded, Request, Workers, decode, worker_count
from mlx_contentvec.extract.manifest import Manifest
from mlx_contentvec.extract.run import LONGEST_SENT, Extraction, Job, Settings
from mlx_contentvec.model import ContentvecModel
from tests.small_models import TINY, noise, random_model, random_weights_file

soundfile = pytest.importorskip(
    "soundfile", reason="audio files need soundfile: pip install 'mlx-contentvec[audio]'"
)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="no descriptors are passed on there")
SETTINGS = Settings(weights="0" * 64, layer=3, project=False)


def request(path: Path, **changed: Any) -> Request:
    return Request(
        **{
            "source": str(path),
            "sample_rate": 16000,
            "min_samples": 400,
            "max_memory": None,
            **changed,
        }
    )


def write_clip(path: Path, samples: int = 8000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(samples, seed), 22050, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def model() -> ContentvecModel:
    return random_model(TINY)


@pytest.fixture
def workers() -> Any:
    with Workers(1) as started:
        yield started


def processes(workers: Workers) -> list[int]:
    return [worker._process.pid for worker in workers._started]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(process: int) -> None:
    end = time.monotonic() + 60
    while is_running(process):
        assert time.monotonic() < end, f"process {process} is still there"
        time.sleep(0.05)


def test_a_process_decodes_as_this_one_does(tmp_path: Path, workers: Workers) -> None:
    path = write_clip(tmp_path / "kept ä.wav")
    if sys.platform == "linux":  # a name that is not UTF-8, which a Mac's file system refuses
        path = path.rename(tmp_path / "kept \udcff.wav")
    ours, theirs = decode(request(path)), workers.decode(request(path))
    assert isinstance(ours, Decoded) and isinstance(theirs, Decoded)
    np.testing.assert_array_equal(theirs.clip.waveform, ours.clip.waveform)
    assert theirs.source == ours.source
    assert (theirs.clip.source_rate, theirs.clip.resampler) == (22050, ours.clip.resampler)


def test_a_process_says_the_same_of_what_it_cannot_decode(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    os.mkfifo(tmp_path / "pipe.wav")
    asked = [
        request(tmp_path / "text.wav"),
        request(tmp_path / "missing.wav"),
        request(tmp_path / "pipe.wav"),
        request(write_clip(tmp_path / "short.wav", 100)),
        request(write_clip(tmp_path / "long.wav"), max_memory=1000),
    ]
    for one in asked:
        ours, theirs = decode(one), workers.decode(one)
        assert isinstance(theirs, AudioError) and isinstance(ours, AudioError)
        assert str(theirs) == str(ours)
        assert (theirs.found, theirs.expected, theirs.hint) == (
            ours.found,
            ours.expected,
            ours.hint,
        )


def test_a_file_that_changes_while_it_is_decoded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "a.wav")
    read = decoding.read_audio

    def read_and_change(*of: Any, **how: Any) -> Any:
        clip = read(*of, **how)
        write_clip(path, seed=1)
        return clip

    monkeypatch.setattr(decoding, "read_audio", read_and_change)
    answer = decode(request(path))
    assert isinstance(answer, AudioError) and "changed while it was" in str(answer)


@pytest.mark.parametrize("error", [OSError, RuntimeError, ValueError, MemoryError])
def test_whatever_a_library_raises_is_said_of_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error("of the library")

    monkeypatch.setattr(decoding, "read_audio", fails)
    answer = decode(request(write_clip(tmp_path / "a.wav")))
    assert isinstance(answer, AudioError)
    assert f"a.wav cannot be decoded: {error.__name__}: of the library" in str(answer)


def test_what_waits_in_a_pipe_is_left_to_who_it_is_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    pipe = os.open(tmp_path / "pipe.wav", os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(pipe, b"RIFF")
        answer = decode(request(tmp_path / "pipe.wav"))
        assert isinstance(answer, AudioError) and answer.found == "a named pipe"
        assert os.read(pipe, 10) == b"RIFF"
    finally:
        os.close(pipe)


def test_nothing_is_taken_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_clip(tmp_path / "a.wav")
    (tmp_path / "av.py").write_text("raise SystemExit('this is not PyAV')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with Workers(1) as started:
        assert isinstance(started.decode(request(path)), Decoded)


def test_one_that_is_busy_is_not_waited_for(tmp_path: Path) -> None:
    with Workers(0) as none:
        assert not none
        assert none.decode(request(tmp_path)) is None


def test_a_process_that_has_ended_is_not_asked_again(tmp_path: Path, workers: Workers) -> None:
    path = write_clip(tmp_path / "a.wav")
    os.kill(processes(workers)[0], signal.SIGKILL)
    assert workers.decode(request(path)) is None
    assert workers.decode(request(path)) is None


def test_a_system_that_starts_no_process_has_threads_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuses)
    with Workers(4) as started:
        assert len(started) == 0


def test_all_processes_end_with_the_work(tmp_path: Path) -> None:
    with Workers(2) as started:
        running = processes(started)
        assert all(map(is_running, running))
    assert not any(map(is_running, running))


def test_processes_end_when_the_command_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from mlx_contentvec.extract.decoding import Workers\n"
        "started = Workers(1)\n"
        "print(started._started[0]._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        process = int(killed.stdout.readline())
        assert is_running(process)
        killed.kill()
    wait_until_gone(process)


def test_ctrl_c_reaches_the_command_alone(workers: Workers) -> None:
    assert os.getpgid(processes(workers)[0]) != os.getpgid(0)


@pytest.mark.parametrize(
    ("device", "cores", "ranks", "count"),
    [
        ("cpu", 64, 1, 0),
        ("metal", 12, 1, 0),
        ("cuda", 64, 1, 4),
        ("cuda", 16, 8, 1),
        ("cuda", 6, 1, 3),
        ("cuda", 1, 1, 0),
        ("cuda", None, 1, 0),
    ],
)
def test_a_gpu_of_nvidia_has_processes_decode_for_it(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int | None, ranks: int, count: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert worker_count(device, ranks) == count


def test_a_packed_application_starts_itself_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert worker_count("cuda") == 0


# ---- in a run ---------------------------------------------------------------------


def jobs_for(folder: Path, count: int) -> list[Job]:
    return [
        Job(str(write_clip(folder / f"{i}.wav", 8000 + 500 * i, i)), f"{i}.npy", 0.4)
        for i in range(count)
    ]


def test_outputs_are_the_same_whoever_decodes(model: ContentvecModel, tmp_path: Path) -> None:
    jobs = jobs_for(tmp_path / "in", 6)
    (tmp_path / "in/1.wav").write_bytes(b"RIFF")
    found: dict[str, Any] = {}
    for name, count in (("threads", 0), ("processes", 2)):
        folder = tmp_path / name
        folder.mkdir()
        with Workers(count) as workers:
            summary = Extraction(model, SETTINGS, Manifest(folder), workers=workers).run(jobs)
        found[name] = summary.failed, {p.name: p.read_bytes() for p in folder.glob("*.npy")}
    assert found["threads"] == found["processes"]
    assert len(found["threads"][1]) == 5 and len(found["threads"][0]) == 1


def test_a_long_clip_is_not_sent(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    sent: list[str] = []
    send = workers.decode

    def note(asked: Request) -> Any:
        sent.append(asked.source)
        return send(asked)

    monkeypatch.setattr(workers, "decode", note)
    extraction = Extraction(model, SETTINGS, Manifest(tmp_path), workers=workers)
    path = write_clip(tmp_path / "a.wav")
    for seconds in (LONGEST_SENT, LONGEST_SENT + 1):
        decoded = extraction._read(Job(str(path), "a.npy", seconds), threading.Event())
        assert isinstance(decoded, Decoded)
    assert len(sent) == 1


def test_a_run_goes_on_without_its_processes(
    model: ContentvecModel, tmp_path: Path, workers: Workers
) -> None:
    os.kill(processes(workers)[0], signal.SIGKILL)
    extraction = Extraction(model, SETTINGS, Manifest(tmp_path), workers=workers)
    assert extraction.run(jobs_for(tmp_path / "in", 3)).extracted == 3


def test_the_command_starts_them_for_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Workers] = []

    class Noted(Workers):
        def __init__(self, count: int) -> None:
            super().__init__(count)
            started.append(self)

    monkeypatch.setattr("mlx_contentvec.extract.command.Workers", Noted)
    monkeypatch.setattr("mlx_contentvec.extract.command.worker_count", lambda *_: 1)
    weights = random_weights_file(tmp_path / "tiny.safetensors", TINY)
    write_clip(tmp_path / "in/a.wav")
    asked = ["extract", str(tmp_path / "in"), "-w", str(weights), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*asked, "--layer", "3"])
    assert result.exit_code == 0, result.output
    assert len(started[0]) == 1
    assert not any(map(is_running, processes(started[0])))
