"""Python processes, forked from one that has imported what most commands import.

A short command spends most of its time on the start of Python and on imports. One server
for each test process imports other people's libraries, none of the project's and none that
reads a variable or starts a thread when it is imported, and forks itself for each process
that is asked for. What runs in a fork has its own arguments, directory, variables and streams,
and ends as any other process: :mod:`tests.test_forks` compares both kinds.

A second server has imported the original as well, which takes two seconds: for commands that
run it, where something else than their imports is tested.

Where a process is measured, killed or asked what it imports, start a new one instead.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: what the server imports, where it is installed
LIBRARIES = (
    *("asyncio", "concurrent.futures", "ctypes", "email.message", "importlib.metadata"),
    *("http.client", "pickle", "tempfile", "unittest.mock", "zipfile"),
    *("anyio", "av", "click", "filelock", "h11", "httpcore", "httpx", "httpcore2", "httpx2"),
    *("jinja2", "numpy", "rich.console", "rich.progress", "rich.table"),
    *("safetensors.numpy", "soxr", "yaml"),
)
#: what the server for commands that run the original imports besides
ORIGINAL = ("torch", "fairseq.checkpoint_utils")
#: variables that are read when Python or a library starts: a process that has others is no fork
_AT_START = (
    *("PYTHON", "LC_", "LANG", "LD_", "OMP_", "OPENBLAS_", "MKL_", "MALLOC_", "GLIBC_"),
    *("TORCH", "PYTORCH", "KMP_", "CUDA_"),
)


def run_python(
    *arguments: str | Path,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    timeout: float = 120,
    original: bool = False,
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ...`` or ``python -c CODE ...`` in a process of its own, output as text.

    It has the variables ``env``, or those of this process.
    original: it has imported the original when it begins, where it is forked
    """
    words = [os.fspath(argument) for argument in arguments]
    variables = dict(os.environ if env is None else env)
    if (
        sys.platform == "linux"  # a Mac's frameworks refuse to work in a fork
        and words[0] in ("-m", "-c")
        and _start_up(variables) == _start_up(os.environ)
    ):
        return _server(original).run(words, cwd, variables, input, timeout)
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=variables,
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


def run_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    **streams: object,
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` for code that starts this Python with the original and reads the text."""
    assert command[0] == sys.executable
    assert streams.pop("check", False) is False and streams == {
        "capture_output": True,
        "text": True,
    }
    return run_python(*command[1:], env=env, timeout=timeout, original=True)


def _start_up(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of ``_AT_START``; PYTHONPATH is followed by a fork as well."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(_AT_START) and name != "PYTHONPATH"
    }


_CLIENT = """\
#!{python} -IS
import json, os, socket, struct, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("\\0" + "{name}")
    arguments = ["-m", "{module}", *sys.argv[1:]]
    request = {{"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}}
    message = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("<Q", len(message))], [0, 1, 2])
    connection.sendall(message)
    status = int(connection.recv(16))
sys.exit(status)
"""


@contextlib.contextmanager
def program(path: Path, module: str) -> Iterator[None]:
    """A program at ``path`` that is ``python -m MODULE``, which has imported the original.

    For shells, whose variables must be those of this process as far as they are read at the
    start. One runs at a time. Linux only.
    """
    name = f"{os.getpid()}-{id(path)}"
    path.write_text(_CLIENT.format(python=sys.executable, name=name, module=module))
    path.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{name}")
        listening.listen()
        relay = threading.Thread(target=_relay, args=(listening,))
        relay.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            relay.join()


def _relay(listening: socket.socket) -> None:
    """Let the server run what the programs that connect ask for, until nothing listens."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            message, descriptors = _receive(connection)
            assert _start_up(json.loads(message)["env"]) == _start_up(os.environ)
            server = _server(True)
            server.start(message, descriptors)
            status = server.wait()
            connection.sendall(str(status if status >= 0 else 128 - status).encode())


# ---- the process that asks


class _Server:
    """A server of this process, and a connection to it."""

    def __init__(self, original: bool) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *(ORIGINAL if original else ())],
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, request: bytes, streams: list[int]) -> int:
        """The number of the process that has these streams, which are closed here."""
        try:
            _send(self._socket, request, streams)
        finally:
            for descriptor in streams:
                os.close(descriptor)
        return int(_receive(self._socket)[0])

    def wait(self) -> int:
        """The exit status of the process that was started last."""
        return os.waitstatus_to_exitcode(int(_receive(self._socket)[0]))

    def run(
        self,
        arguments: list[str],
        cwd: str | Path | None,
        env: dict[str, str],
        input: str | None,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        request = {"arguments": arguments, "cwd": os.fspath(cwd or Path.cwd()), "env": env}
        streams = [os.pipe() for _ in range(3)]
        given, theirs = streams[0][1], [streams[0][0], streams[1][1], streams[2][1]]
        read = {streams[1][0]: b"", streams[2][0]: b""}
        process = self.start(json.dumps(request).encode(), theirs)
        end = time.monotonic() + timeout
        with contextlib.ExitStack() as cleanup:
            for descriptor in read:
                cleanup.callback(os.close, descriptor)
            if input is not None:
                data = input.encode()
                assert len(data) <= 1 << 16, "a pipe holds no more"
                os.write(given, data)
            os.close(given)
            with selectors.DefaultSelector() as selector:
                for descriptor in read:
                    selector.register(descriptor, selectors.EVENT_READ)
                while selector.get_map():
                    ready = selector.select(end - time.monotonic())
                    if not ready and time.monotonic() > end:
                        os.kill(process, signal.SIGKILL)
                        self.wait()
                        raise subprocess.TimeoutExpired(arguments, timeout)
                    for key, _ in ready:
                        piece = os.read(key.fd, 1 << 16)
                        read[key.fd] += piece
                        if not piece:
                            selector.unregister(key.fd)
        status = self.wait()
        out, error = (
            io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read() for data in read.values()
        )
        return subprocess.CompletedProcess([sys.executable, *arguments], status, out, error)


@functools.cache
def _server(original: bool) -> _Server:
    return _Server(original)


def _send(to: socket.socket, message: bytes, descriptors: Sequence[int] = ()) -> None:
    socket.send_fds(to, [struct.pack("<Q", len(message))], descriptors)
    to.sendall(message)


def _receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """A message and its descriptors; an empty one when the other side is gone."""
    head, descriptors, _, _ = socket.recv_fds(source, 8, 3)
    message = b""
    if head:
        (length,) = struct.unpack("<Q", head)
        while len(message) < length:
            message += source.recv(length - len(message))
    return message, descriptors


# ---- the server


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork at each request; returns it in the fork, and ends with the process that asks."""
    while True:
        message, descriptors = _receive(connection)
        if not message:
            os._exit(0)
        process = os.fork()
        if not process:
            connection.close()
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            request: dict[str, Any] = json.loads(message)
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        _send(connection, str(process).encode())
        _, status = os.waitpid(process, 0)
        _send(connection, str(status).encode())


def _become(
    request: dict[str, Any], path: list[str], interrupt: signal._HANDLER
) -> types.ModuleType:
    """Make this process what was asked for; returns its main module."""
    option, what, *arguments = request["arguments"]
    os.chdir(request["cwd"])
    for name in set(os.environ) - set(request["env"]):
        del os.environ[name]
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, interrupt)
    roots = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [str(Path.cwd() / root) for root in roots if root] + path
    sys.path.insert(0, "" if option == "-c" else request["cwd"])
    sys.argv[:] = [option if option == "-c" else what, *arguments]
    sys.orig_argv[1:] = request["arguments"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    return main


def _leave(names: set[str]) -> None:
    """Keep Python from clearing these modules as it ends: what a fork does last before that."""
    modules = [sys.modules.pop(name) for name in names if name in sys.modules]
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(modules))


if __name__ == "__main__":
    # Ctrl-C ends the process that asks
    _interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    _path, _own = sys.path[1:], set(sys.modules)
    logging.disable(logging.WARNING)
    for _library in (*LIBRARIES, *sys.argv[2:]):
        with contextlib.suppress(ImportError):
            importlib.import_module(_library)
    # fairseq sets up the logging of the process that imports it
    logging.disable(logging.NOTSET)
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    # What is alive by now, a fork neither looks at when it ends nor takes apart: it would have to
    # copy it for that, which takes most of the time of a short command.
    atexit.register(_leave, set(sys.modules) - _own)
    _libc = ctypes.CDLL(None)
    _libc.on_exit(_libc._exit, None)  # torch's own tables, after Python has ended
    gc.collect()
    gc.freeze()
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    _main = _become(_request, _path, _interrupt)
    # outside of any function, so that it ends as every process does
    if _request["arguments"][0] == "-c":
        exec(compile(_request["arguments"][1], "<string>", "exec"), _main.__dict__)
    else:
        runpy.run_module(_request["arguments"][1], run_name="__main__", alter_sys=True)
