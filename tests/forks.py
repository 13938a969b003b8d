"""Python processes, forked from one that has imported what most commands import.

A short command spends most of its time on the start of Python and on imports. One server
for each test process imports other people's libraries, none of the project's and none that
reads a variable or starts a thread when it is imported, and forks itself for each process
that is asked for. What runs in a fork has its own arguments, directory, variables and streams,
and ends as any other process: :mod:`tests.test_forks` compares both kinds.

Where a process is measured, killed or asked what it imports, start a new one instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
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
#: variables that are read when Python or a library starts: a process that has others is no fork
_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "OPENBLAS_", "MKL_", "MALLOC_", "GLIBC_")


def run_python(
    *arguments: str | Path,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ...`` or ``python -c CODE ...`` in a process of its own, output as text.

    It has the variables ``env``, or those of this process.
    """
    words = [os.fspath(argument) for argument in arguments]
    variables = dict(os.environ if env is None else env)
    if (
        sys.platform == "linux"  # a Mac's frameworks refuse to work in a fork
        and words[0] in ("-m", "-c")
        and _start_up(variables) == _start_up(os.environ)
    ):
        return _server().run(words, cwd, variables, input, timeout)
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


def _start_up(variables: Mapping[str, str]) -> dict[str, str]:
    """Those of ``_AT_START``; PYTHONPATH is followed by a fork as well."""
    return {
        name: value
        for name, value in variables.items()
        if name.startswith(_AT_START) and name != "PYTHONPATH"
    }


# ---- the process that asks


class _Server:
    """The server of this process, and a connection to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
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
        try:
            _send(self._socket, json.dumps(request).encode(), theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        end = time.monotonic() + timeout
        process = int(_receive(self._socket)[0])
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
                        _receive(self._socket)
                        raise subprocess.TimeoutExpired(arguments, timeout)
                    for key, _ in ready:
                        piece = os.read(key.fd, 1 << 16)
                        read[key.fd] += piece
                        if not piece:
                            selector.unregister(key.fd)
        status = os.waitstatus_to_exitcode(int(_receive(self._socket)[0]))
        out, error = (
            io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read() for data in read.values()
        )
        return subprocess.CompletedProcess([sys.executable, *arguments], status, out, error)


@functools.cache
def _server() -> _Server:
    return _Server()


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


if __name__ == "__main__":
    # Ctrl-C ends the process that asks
    _interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    _path = sys.path[1:]
    for _library in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(_library)
    # What is alive by now, a fork neither looks at when it ends nor has to copy for that: three
    # quarters of the time of a short one.
    gc.collect()
    gc.freeze()
    _request = _serve(socket.socket(fileno=int(sys.argv[1])))
    _main = _become(_request, _path, _interrupt)
    # outside of any function, so that it ends as every process does
    if _request["arguments"][0] == "-c":
        exec(compile(_request["arguments"][1], "<string>", "exec"), _main.__dict__)
    else:
        runpy.run_module(_request["arguments"][1], run_name="__main__", alter_sys=True)
