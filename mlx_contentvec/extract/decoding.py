"""One clip decoded, and known by its content; in a process beside the model's where that pays.

Decoding is some 500 short steps a clip, between which a thread takes the interpreter, and the
model's own thread waits for it as often. 1,000 clips of 2 to 15 s take 6.5 to 7.0 s with processes
and 7.7 to 9.6 s with threads (H200, float32).
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from ..audio import Clip, open_regular, read_audio, require_decoders
from ..errors import AudioError, ContentvecError, printable
from ..files import changed
from .manifest import Record, identity, same_source

#: processes that decode for a GPU, as long as there are twice as many cores
PROCESSES = 4
#: what a process is started with: the descriptor of its connection, and the path of imports,
#: which is set before anything is imported
_PROGRAM = (
    f"import sys; sys.path[:] = sys.argv[2:]; from {__name__} import serve; serve(int(sys.argv[1]))"
)


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
        """Raises OSError where the system starts no more processes."""
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Ctrl-C is for the command: it stops this one when what it has is written
                start_new_session=True,
            )

    def decode(self, request: Request) -> Decoded | ContentvecError:
        """Raises EOFError, OSError or whatever an answer in pieces gives if the process ended."""
        self._connection.send(request)
        answer: Decoded | ContentvecError = self._connection.recv()
        return answer

    def stop(self) -> None:
        # the connection is left to who waits at its end
        self._process.kill()
        self._process.wait()


class Workers:
    """Processes that decode; none where none can be started, or after they have ended.

    count: of processes, which begin at once
    """

    def __init__(self, count: int) -> None:
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._started: list[_Worker] = []
        with contextlib.suppress(OSError):
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
            worker.stop()

    def decode(self, request: Request) -> Decoded | ContentvecError | None:
        """:func:`decode` by a process; None if none is idle, or the one that was has ended."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            return None
        try:
            answer = worker.decode(request)
        except Exception:  # half an answer is any of them
            worker.stop()
            return None
        self._idle.put(worker)
        return answer


def worker_count(device: str, ranks: int = 1) -> int:
    """How many processes decode for a model on ``device``, beside those of other ``ranks``."""
    packed = getattr(sys, "frozen", False) or not sys.executable
    if device != "cuda" or packed or os.name != "posix":
        return 0
    return min(PROCESSES, (os.cpu_count() or 1) // (2 * ranks))


def serve(descriptor: int) -> None:
    """Decode what is asked for over a connection, until its other end is closed."""
    require_decoders()
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(decode(connection.recv()))
