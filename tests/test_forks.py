"""A forked process is what a started one is, to what runs in it and to who waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import forks
from tests.forks import program, run_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")

#: what a process finds, but for what differs from any process to the next
PROBE = """
import json, os, signal, sys, threading
streams = [sys.stdin, sys.stdout, sys.stderr]
print(json.dumps({
    "path": sys.path,
    "arguments": sys.argv,
    "all": sys.orig_argv,
    "name": __name__,
    "main": vars(sys.modules["__main__"]) is globals(),
    "directory": os.getcwd(),
    "variables": {**os.environ},
    "streams": [(s.fileno(), s.encoding, s.errors, s.line_buffering, s.isatty()) for s in streams],
    "open": [n for n in range(3, 20) if os.path.exists(f"/proc/self/fd/{n}")],
    "given": sys.stdin.read(),
    "signals": [repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGPIPE)],
    "bytecode": sys.dont_write_bytecode,
    "flags": repr(sys.flags),
    "threads": threading.active_count(),
    "ours": [name for name in sys.modules if "contentvec" in name],
    "heavy": sorted({"torch", "mlx", "huggingface_hub"} & set(sys.modules)),
}))
"""


def asked(fork: bool, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, **how: Any) -> Any:
    with monkeypatch.context() as patch:
        if not fork:
            patch.setattr(forks.sys, "platform", "not linux")
        return run_python(*arguments, **how)


@linux
@pytest.mark.parametrize("how", ["code", "module"])
def test_it_finds_what_a_started_process_finds(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probe.py").write_text(PROBE, encoding="utf-8")
    arguments = ["-c", PROBE] if how == "code" else ["-m", "probe"]
    environment = {**os.environ, "A": "b", "PYTHONPATH": os.pathsep.join(["one", "two"])}
    del environment["PATH"]
    found = [
        asked(fork, monkeypatch, *arguments, "x", "", cwd=tmp_path, env=environment, input="in")
        for fork in (True, False)
    ]
    assert [done.stderr for done in found] == ["", ""]
    forked, started = (json.loads(done.stdout) for done in found)
    for name in started:
        assert forked[name] == started[name], name
    assert forked["ours"] == forked["heavy"] == []


#: name -> code, exit status, output, errors
ENDS: dict[str, tuple[str, int, str, str]] = {
    "well": ("print('a')", 0, "a\n", ""),
    "with a status": ("import sys; sys.exit(3)", 3, "", ""),
    "with a message": ("import sys; sys.exit('no')", 1, "", "no\n"),
    "at once": ("import os; os._exit(4)", 4, "", ""),
    "by a signal": ("import os; os.kill(os.getpid(), 9)", -9, "", ""),
    "interrupted": (
        # a process started in the background of a shell may be deaf to it
        "import os, signal; signal.signal(2, signal.default_int_handler); os.kill(os.getpid(), 2)",
        -2,
        "",
        "KeyboardInterrupt",
    ),
    "by an exception": ("{}['x']", 1, "", "KeyError: 'x'"),
    "after its threads": (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        0,
        "late\n",
        "",
    ),
    "after what was registered": ("import atexit; atexit.register(print, 'z')", 0, "z\n", ""),
    "with more than a pipe holds": ("print('x' * 300_000)", 0, "x" * 300_000 + "\n", ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_it_ends_as_a_started_process_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, status, output, errors = ENDS[name]
    for fork in (True, False):
        done = asked(fork, monkeypatch, "-c", code)
        assert (done.returncode, done.stdout) == (status, output)
        assert errors in done.stderr if errors else not done.stderr


def test_it_is_killed_when_it_takes_too_long() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", "import time; print('begun', flush=True); time.sleep(60)", timeout=0.5)
    assert run_python("-c", "print('the next')").stdout == "the next\n"


def test_one_leaves_nothing_to_the_next() -> None:
    code = "import builtins, os; print(hasattr(builtins, 'left')); builtins.left = os.chdir('/')"
    assert [run_python("-c", code).stdout for _ in range(2)] == ["False\n"] * 2


@linux
def test_one_that_has_imported_the_original_has_nothing_else_of_it(need: Any) -> None:
    need("fairseq", "scripts/test installs fairseq-fixed")
    code = (
        "import logging, sys, threading\n"
        "print(sorted({'torch', 'fairseq', 'mlx', 'huggingface_hub'} & set(sys.modules)))\n"
        "print(logging.root.handlers, logging.root.level, logging.root.manager.disable)\n"
        "print(threading.active_count(), [name for name in sys.modules if 'contentvec' in name])\n"
        "sys.exit(3)"
    )
    done = run_python("-c", code, original=True)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == "['fairseq', 'torch']\n[] 30 0\n1 []\n"


@linux
def test_a_program_is_to_a_shell_what_its_module_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "probe.py").write_text(
        "import os, sys\n"
        "if 'killed' in sys.argv: os.kill(os.getpid(), 9)\n"
        "print(sys.argv[1:], os.getcwd(), os.environ['A'], sys.stdin.read())\n"
        "sys.stderr.write('errors')\n"
        "sys.exit(len(sys.argv))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = "cd below; echo in | A=b ../probe x ''; echo $?; A=b ../probe killed </dev/null; echo $?"
    with program(tmp_path / "probe", "probe"):
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
        )
    where = tmp_path / "below"
    assert done.stdout == f"['x', ''] {where} b in\n\n3\n137\n"
    assert done.stderr == "errors"


@linux
def test_a_variable_that_is_read_at_the_start_asks_for_a_new_process() -> None:
    code = "import os, sys; print(os.getppid(), sys.flags.utf8_mode)"
    forked = run_python("-c", code).stdout.split()
    started = run_python("-c", code, env={**os.environ, "PYTHONUTF8": "1"}).stdout.split()
    assert forked[0] != str(os.getpid()) and started == [str(os.getpid()), "1"]
