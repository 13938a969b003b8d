"""One clip decoded, and known by its content; in a process beside the model's where that pays.

Decoding is some 500 short steps a clip, between which a thread takes the interpreter, and the
model's own thread waits for it as often. 1,000 clips of 2 to 15 s take 6.5 to 7.0 s with processes
and 7.7 to 9.6 s with threads (H200, float32).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..audio import Clip, open_regular, read_audio, require_decoders
from ..errors import AudioError, ContentvecError, printable
from ..files import changed
from .manifest import Record, identity, same_source

#: processes that decode for a GPU, as long as there are twice as many cores
PROCESSES = 4
#: what a process runs. ``site`` has been imported by then, whatever else is from this path
_PROGRAM = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import serve; serve()"
#: what a process sends when it is ready to decode. In another encoding than this one's the
#: same name is another file's
GREETING = f"{__name__} {sys.getfilesystemencoding()}".encode()
#: seconds to wait for the greeting: it takes 0.2 s, more where Python is on a network drive
GREETING_SECONDS = 10.0
#: seconds to wait for an answer. A clip of a minute takes less than one, a file of 10 hours whose
#: header states less than a minute takes 12; after that a thread decodes it again
ANSWER_SECONDS = 60.0
#: bytes of an answer: 8 minutes of audio at 16 kHz, as a header may state too little. A longer
#: clip is decoded again by a thread
LARGEST_ANSWER = 1 << 25
#: seconds after which a thread that waits asks again whether it is to stop
TURN = 0.1
#: seconds to wait for the end of a killed process, which a drive that hangs may hold
_END_SECONDS = 1.0
_LENGTH_BYTES = 8
#: sending to a process that has ended raises, also where SIGPIPE ends programs; a Mac has no
#: such flag
_NO_SIGNAL: int = getattr(socket, "MSG_NOSIGNAL", 0)


@dataclass(frozen=True)
class Decoded:
    """A clip, and what its file was known by when it was decoded."""

    clip: Clip
    source: Record


@dataclass(frozen=True)
class Request:
    """A file, and how it is wanted: as ``audio.read_audio`` takes it."""

    source: str
    sample_rate: int
    min_samples: int
    max_memory: int | None


def decode(
    request: Request, stopped: Callable[[], bool] = lambda: False
) -> Decoded | ContentvecError:
    """A clip, or what is wrong with its file; ``stopped`` is asked whether to give up."""
    path = Path(request.source)
    if stopped():
        return AudioError(f"{printable(request.source)} was not read: that was stopped")
    try:
        # before anything waits for a pipe
        with open_regular(path, printable(request.source)):
            source = identity(path)
        clip = read_audio(
            path,
            sample_rate=request.sample_rate,
            min_samples=request.min_samples,
            max_memory=request.max_memory,
            stopped=stopped,
        )
        # what only has other times, by a tag or a second name, is as it was
        now = same_source(source, path)
        if now is None:
            raise changed(path, AudioError)
        return Decoded(clip, now)
    except ContentvecError as error:
        return error
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        return AudioError(
            f"{printable(request.source)} cannot be decoded: {type(error).__name__}: {error}"
        )


class _Worker:
    """A process that decodes clip by clip, and ends when this one does."""

    def __init__(self) -> None:
        """Raises OSError, or whatever else keeps the system from starting a process."""
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(TURN)
        self._has_greeted = False
        # what else is in the path is ignored by imports
        path = [entry for entry in sys.path if isinstance(entry, str)]
        # those of this interpreter, as multiprocessing has its processes started
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        with theirs, contextlib.ExitStack() as unless_started:
            unless_started.enter_context(self._socket)
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", _PROGRAM, *path],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for the command: it stops this one when what it has is written
                start_new_session=True,
            )
            unless_started.pop_all()

    def decode(
        self, request: Request, stopped: Callable[[], bool]
    ) -> Decoded | ContentvecError | None:
        """A clip, or what is wrong with its file; None if it is too long to be sent.

        Raises EOFError, OSError, ValueError or whatever pickle does if the process has ended,
        does not answer in time, or sends what is no answer; TimeoutError if it is ``stopped``.
        """
        if not self._has_greeted:
            if self._receive(GREETING_SECONDS, stopped) != GREETING:
                raise ValueError("this is no process that decodes")
            self._has_greeted = True
        _send(self._socket, pickle.dumps(request))
        answer: Decoded | ContentvecError | None = pickle.loads(
            self._receive(ANSWER_SECONDS, stopped)
        )
        return answer

    def _receive(self, seconds: float, stopped: Callable[[], bool]) -> bytearray:
        length = int.from_bytes(self._receive_bytes(_LENGTH_BYTES, seconds, stopped), "big")
        if length > LARGEST_ANSWER:
            raise ValueError(f"an answer of {length:,} bytes")
        return self._receive_bytes(length, seconds, stopped)

    def _receive_bytes(self, count: int, seconds: float, stopped: Callable[[], bool]) -> bytearray:
        received = bytearray(count)
        missing = memoryview(received)
        # counted, as a clock goes on while Ctrl-Z holds this process
        turns = seconds / TURN
        while missing:
            if stopped() or turns <= 0:
                raise TimeoutError
            try:
                arrived = self._socket.recv_into(missing)
            except TimeoutError:
                turns -= 1
                continue
            if not arrived:
                raise EOFError
            missing = missing[arrived:]
        return received

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """End the process; for whoever has this one to itself."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        self._socket.close()


class Workers:
    """Processes that decode; none where none can be started, or after they have ended.

    count: of processes, which begin at once
    """

    def __init__(self, count: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._started: list[_Worker] = []
        # threads decode, whatever it is that keeps processes from being started
        with contextlib.suppress(Exception):
            for _ in range(count):
                worker = _Worker()
                self._started.append(worker)
                self._idle.put(worker)

    def __len__(self) -> int:
        return len(self._started)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._started:
            worker.kill()
        # any other is closed by the thread that waits for it
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def decode(
        self, request: Request, stopped: Callable[[], bool] = lambda: False
    ) -> Decoded | ContentvecError | None:
        """:func:`decode` by a process, or None.

        None is for the caller to decode: no process is idle, the one that was gives no answer
        or is not waited for any more, or the clip is too long to be sent.
        """
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            return None
        try:
            answer = worker.decode(request, stopped)
        except Exception:  # bytes that are no pickle raise any of them
            worker.close()
            return None
        self._idle.put(worker)
        return answer


def worker_count(device: str, ranks: int = 1) -> int:
    """How many processes decode for a model on ``device``, beside those of other ``ranks``."""
    is_packed = getattr(sys, "frozen", False)
    if device != "cuda" or is_packed:
        return 0
    return min(PROCESSES, (os.cpu_count() or 1) // (2 * ranks))


def serve() -> None:
    """Decode what is asked for over standard input, a socket, until its other end is closed."""
    require_decoders()
    with socket.socket(fileno=0) as connection, connection.makefile("rb") as requests:
        _send(connection, GREETING)
        while length := requests.read(_LENGTH_BYTES):
            _send(connection, _answer(requests.read(int.from_bytes(length, "big"))))


def _answer(request: bytes) -> bytes:
    answer = pickle.dumps(decode(pickle.loads(request)), pickle.HIGHEST_PROTOCOL)
    return answer if len(answer) <= LARGEST_ANSWER else pickle.dumps(None)


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(len(message).to_bytes(_LENGTH_BYTES, "big"), _NO_SIGNAL)
    connection.sendall(message, _NO_SIGNAL)
