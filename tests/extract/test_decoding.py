"""Clips decoded by processes of their own: the same clips and errors, and nobody left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not like this")
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


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} has not come"
        time.sleep(0.05)


@contextmanager
def without_waiting() -> Iterator[None]:
    """What lies within does not take the minutes for which :func:`stand_in` is silent."""
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < 60


#: what a process does that is no worker, or not a good one; ``asked`` is a file of that name
SILENT = {
    "before it greets": "open(asked, 'w'); time.sleep(200)",
    "when it is asked": "_send(end, GREETING); end.recv(1); open(asked, 'w'); time.sleep(200)",
    "within its answer": (
        "_send(end, GREETING); end.recv(1); end.sendall(bytes([0] * 7 + [9]) + b'half')\n"
        "open(asked, 'w'); time.sleep(200)"
    ),
}
WRONG = {
    "another greeting": "_send(end, b'good morning'); time.sleep(200)",
    "a gigabyte for a greeting": "end.sendall((1 << 30).to_bytes(8, 'big')); time.sleep(200)",
    "a gigabyte for an answer": (
        "_send(end, GREETING); end.recv(1); end.sendall((1 << 30).to_bytes(8, 'big'))\n"
        "time.sleep(200)"
    ),
    "less than it says": (
        "import pickle; said = pickle.dumps('an answer'); _send(end, GREETING); end.recv(1)\n"
        "end.sendall((len(said) + 9).to_bytes(8, 'big') + said); end.shutdown(1); time.sleep(200)"
    ),
    "no pickle": "_send(end, GREETING); end.recv(1); _send(end, b'no pickle'); time.sleep(200)",
}


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str, asked: Path) -> None:
    """Have ``code`` run in the place of a worker, and give it as long as it takes."""
    program = (
        "import socket, sys, time; sys.path[:] = sys.argv[1:]\n"
        "from mlx_contentvec.extract.decoding import GREETING, _send\n"
        f"asked = {str(asked)!r}; end = socket.socket(fileno=0)\n"
    )
    monkeypatch.setattr(decoding, "_PROGRAM", program + code)
    monkeypatch.setattr(decoding, "GREETING_SECONDS", 200.0)
    monkeypatch.setattr(decoding, "ANSWER_SECONDS", 200.0)


def started_script(
    code: str, *arguments: str | Path, flags: Any = (), env: Any = None
) -> subprocess.Popen[str]:
    """A script that starts workers, in an interpreter of its own."""
    start = (
        "import os, signal, sys\n"
        "arguments, sys.path[:] = eval(sys.argv[1]), sys.argv[2:]\n"
        "from mlx_contentvec.extract.decoding import *\n"
        "def request(path): return Request(path, 16000, 400, None)\n"
    )
    return subprocess.Popen(
        [sys.executable, *flags, "-c", start + code, repr([*map(str, arguments)]), *sys.path],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(code: str, *arguments: str | Path, **how: Any) -> str:
    """What a script says that starts workers, and ends well."""
    with started_script(code, *arguments, **how) as script:
        said, errors = script.communicate(timeout=120)
    assert script.returncode == 0, errors
    return said


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


NAMES = """
with Workers(1) as workers:
    for name in sorted(os.listdir(arguments[0])):
        answer = workers.decode(request(os.path.join(arguments[0], name)))
        print(ascii(name), type(answer).__name__)
"""


def test_a_process_reads_names_as_this_interpreter_was_told_to(tmp_path: Path) -> None:
    names = ["\xe4.wav"]
    if sys.platform == "linux":
        names.append("\udcff.wav")
    for name in names:
        write_clip(tmp_path / "in" / "a.wav").rename(tmp_path / "in" / name)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = run_script(NAMES, tmp_path / "in", flags=["-X", "utf8"], env=plain)
    assert said.splitlines() == [f"{name!a} Decoded" for name in names]


def test_a_process_imports_no_more_than_this_interpreter_may(tmp_path: Path) -> None:
    write_clip(tmp_path / "in" / "a.wav")
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text("raise SystemExit('planted')")
    said = run_script(
        NAMES, tmp_path / "in", flags=["-I"], env={"PYTHONPATH": str(tmp_path / "planted")}
    )
    assert said == "'a.wav' Decoded\n"


@linux
@pytest.mark.skipif(sys.getfilesystemencoding() == "ascii", reason="needs a locale of UTF-8")
def test_a_process_that_reads_names_differently_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "_args_from_interpreter_flags", list)
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    with Workers(1) as started:
        assert started.decode(request(write_clip(tmp_path / "a.wav"))) is None


def test_what_imports_ignore_of_the_path_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [None, 3, tmp_path, *sys.path])
    with Workers(1) as started:
        assert isinstance(started.decode(request(write_clip(tmp_path / "a.wav"))), Decoded)


def test_a_process_without_decoders_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import sys; sys.modules['soxr'] = None; {decoding._PROGRAM}"
    monkeypatch.setattr(decoding, "_PROGRAM", program)
    with Workers(1) as started:
        assert started.decode(request(write_clip(tmp_path / "a.wav"))) is None


def test_a_process_is_reached_by_a_program_without_streams(tmp_path: Path) -> None:
    code = (
        "said = os.dup(1)\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "with Workers(2) as workers:\n"
        "    for _ in workers._started:\n"
        "        answer = type(workers.decode(request(arguments[0]))).__name__\n"
        "        os.write(said, f'{answer}\\n'.encode())\n"
    )
    assert run_script(code, write_clip(tmp_path / "a.wav")) == "Decoded\nDecoded\n"


def test_what_a_process_prints_reaches_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, "print('printed'); sys.exit('an error')", tmp_path)
    with Workers(1) as started:
        assert started.decode(request(tmp_path)) is None
    assert capfd.readouterr() == ("", "")


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


@pytest.mark.parametrize("how", WRONG)
def test_what_says_something_else_is_ended_at_once(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, WRONG[how], tmp_path)
    with without_waiting(), Workers(1) as started:
        assert started.decode(request(tmp_path)) is None
        assert not is_running(processes(started)[0])


@pytest.mark.parametrize("when", SILENT)
def test_one_that_falls_silent_is_given_up(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SILENT[when], tmp_path / "asked")
    limit = "GREETING_SECONDS" if when == "before it greets" else "ANSWER_SECONDS"
    monkeypatch.setattr(decoding, limit, 0.3)
    with without_waiting(), Workers(1) as started:
        assert started.decode(request(tmp_path)) is None
        assert not is_running(processes(started)[0])


@pytest.mark.parametrize("when", SILENT)
def test_who_is_to_stop_does_not_wait_for_one(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SILENT[when], tmp_path / "asked")
    with without_waiting(), Workers(1) as started:
        assert started.decode(request(tmp_path), (tmp_path / "asked").exists) is None
        assert not is_running(processes(started)[0])


def test_who_is_to_stop_decodes_nothing_either(tmp_path: Path) -> None:
    answer = decode(request(tmp_path / "missing.wav"), lambda: True)
    assert isinstance(answer, AudioError) and "stopped" in str(answer)


def test_one_that_cannot_be_killed_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SILENT["before it greets"], tmp_path / "asked")
    with Workers(1) as started:
        process = started._started[0]._process
        try:
            with monkeypatch.context() as patch, without_waiting():
                patch.setattr(process, "kill", lambda: None)
                assert started.decode(request(tmp_path), lambda: True) is None
        finally:
            process.kill()
            process.wait()


def test_one_that_is_waited_for_ends_with_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SILENT["when it is asked"], tmp_path / "asked")
    answers: list[Any] = []
    with without_waiting():
        with Workers(1) as started:
            waiting = threading.Thread(
                target=lambda: answers.append(started.decode(request(tmp_path)))
            )
            waiting.start()
            wait_for(tmp_path / "asked")
        waiting.join()
    assert answers == [None]
    assert not is_running(processes(started)[0])


def test_what_is_too_long_to_be_sent_is_left_to_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header may say that hours are seconds."""
    long, missing = request(write_clip(tmp_path / "a.wav")), request(tmp_path / "missing.wav")
    smaller = "from mlx_contentvec.extract import decoding; decoding.LARGEST_ANSWER = 2000; serve()"
    monkeypatch.setattr(decoding, "_PROGRAM", decoding._PROGRAM.replace("serve()", smaller))
    with Workers(1) as started:
        assert started.decode(long) is None
        assert isinstance(started.decode(missing), AudioError)


@linux
def test_a_process_that_has_ended_does_not_end_a_program_that_heeds_sigpipe(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "with Workers(1) as workers:\n"
        "    print(type(workers.decode(request(arguments[0]))).__name__)\n"
        "    process = workers._started[0]._process\n"
        "    process.kill(); process.wait()\n"
        "    print(workers.decode(request(arguments[0])))\n"
    )
    assert run_script(code, write_clip(tmp_path / "a.wav")) == "Decoded\nNone\n"


@pytest.mark.parametrize("error", [OSError, TypeError, ValueError, RuntimeError, MemoryError])
def test_a_system_that_starts_no_process_has_threads_decode(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(subprocess, "Popen", refuses)
    with Workers(4) as started:
        assert len(started) == 0


@pytest.mark.parametrize("executable", [None, ""])
def test_an_interpreter_that_does_not_know_its_own_file_has_threads_decode(
    executable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with Workers(1) as started:
        assert len(started) == 0


def test_nothing_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(act: Callable[[], None]) -> list[str]:
        gc.collect()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            act()
            gc.collect()
        return [str(one.message) for one in said]

    def start() -> None:
        with Workers(2) as started:
            assert started.decode(request(tmp_path / "missing.wav"))

    def start_none() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(tmp_path / "missing"))
            with Workers(1) as started:
                assert not started

    assert warned(start) == []
    assert warned(start_none) == []


def test_all_processes_end_with_the_work(tmp_path: Path) -> None:
    with Workers(2) as started:
        running = processes(started)
        assert all(map(is_running, running))
    assert not any(map(is_running, running))


def test_a_process_ends_well_when_nobody_can_ask_it(tmp_path: Path, workers: Workers) -> None:
    assert workers.decode(request(tmp_path / "missing.wav"))
    worker = workers._started[0]
    worker._socket.close()
    assert worker._process.wait(60) == 0


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

    def note(asked: Request, stopped: Any) -> Any:
        sent.append(asked.source)
        return send(asked, stopped)

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


INTERRUPTED = """
import mlx_contentvec.backend  # sets how signals are handled
import mlx_contentvec.extract.command as command
import mlx_contentvec.extract.decoding as decoding
from mlx_contentvec.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
# the system goes on with what a signal interrupts, as it does where a library has set the
# handler by signal(2)
signal.siginterrupt(signal.SIGINT, False)
command.worker_count = lambda *_: 1
decoding._PROGRAM, decoding.ANSWER_SECONDS = arguments[0], 200.0
sys.argv[:] = ["mlx-contentvec", *arguments[1:]]
main()
"""


def test_ctrl_c_ends_a_run_whose_process_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, SILENT["when it is asked"], tmp_path / "asked")
    weights = random_weights_file(tmp_path / "tiny.safetensors", TINY)
    write_clip(tmp_path / "in/a.wav")
    asked: list[str | Path]
    asked = ["extract", tmp_path / "in", "-w", weights, "-o", tmp_path / "out", "--layer", "3"]
    with (
        without_waiting(),
        started_script(INTERRUPTED, decoding._PROGRAM, *asked) as command,
    ):
        wait_for(tmp_path / "asked")
        command.send_signal(signal.SIGINT)
        _, errors = command.communicate()
    assert command.returncode == 130
    assert errors.startswith("interrupted: 0 of 1 outputs are finished")


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
