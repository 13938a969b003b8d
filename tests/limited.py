"""Commands run on hostile files, many in one process, which has limits on time, memory and output.

The process that runs the cases reports each as a line of JSON (:func:`serve`); another
watches it (:func:`watch`), kills what blocks, and starts the next one after the case that
did. A case is a function that writes its files into an empty folder and returns what is to
be done with them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.sources import search_path

MIB = 1 << 20

#: what the commands import when they are used; torch before MLX, see tests/conftest.py
_MODULES = (
    "torch",
    "transformers",
    "av",
    "soxr",
    "matplotlib.pyplot",
    "jinja2",
    "contentvec_convert.commands.convert",
    "contentvec_convert.export",
    "contentvec_parity.commands.publish",
    "contentvec_parity.harness",
    "contentvec_parity.publishing.package",
    "mlx_contentvec.extract.command",
    "mlx_contentvec.model",
)

#: a command line, and what is called besides: it returns what is wrong, "" for what was
#: compared and is right, None for what could not be compared
Command = Sequence[str | Path]
Check = Callable[[], str | None]


@dataclass
class Work:
    """What one case does in its folder."""

    commands: list[Command] = field(default_factory=list)
    #: exit statuses that are right; None for any of 0, 1 and 2
    statuses: set[int] | None = None
    check: Check | None = None
    #: what one of the commands has to say
    says: str | None = None


Make = Callable[[Path], Work]


@dataclass(frozen=True)
class Limits:
    """What one case may take."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 45.0
    memory: int = 600 * MIB
    lines: int = 25
    characters: int = 6_000


@dataclass(frozen=True)
class Result:
    """What became of one case; ``problems`` is empty if all is as it should be."""

    name: str
    problems: tuple[str, ...]
    statuses: tuple[int, ...] = ()
    cpu_seconds: float = 0.0
    memory: int = 0
    said: str = ""
    #: whether what was accepted was compared with another program's reading of it
    compared: bool = False


# ---- the process with limits


def serve(
    cases: Iterable[tuple[str, Make]], limits: Limits, modules: Sequence[str] = _MODULES
) -> None:
    """Run cases and write a line for each begin and end to what was standard output.

    What is imported for the first time in a case counts as its own: ``modules`` are before.
    """
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    log = tempfile.TemporaryFile("w+b")  # noqa: SIM115
    fcntl.fcntl(log, fcntl.F_SETFL, os.O_APPEND)  # it is emptied for each case
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)

    def tell(**facts: Any) -> None:
        report.write(json.dumps(facts) + "\n")
        report.flush()

    for module in modules:
        importlib.import_module(module)
    if core := sys.modules.get("mlx.core"):
        core.set_default_device(core.cpu)  # CUDA's driver does not work under such limits
    tell(ready=True)
    with tempfile.TemporaryDirectory(prefix="limited-") as home:
        os.environ["HF_HOME"] = str(Path(home) / "hub")
        os.environ["HF_HUB_OFFLINE"] = "1"
        for number, (name, make) in enumerate(cases):
            folder = Path(home) / str(number)
            folder.mkdir()
            tell(begin=name)
            tell(end=name, **vars(_run(name, make, folder, limits, log.fileno())))
            os.chdir(home)
            shutil.rmtree(folder, ignore_errors=True)


def _limit_memory(memory: int) -> None:
    """Let the process grow by ``memory`` from here on, where the system can tell its size."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + memory
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _run(name: str, make: Make, folder: Path, limits: Limits, log: int) -> Result:
    from click.testing import CliRunner

    from mlx_contentvec.cli import main

    problems: list[str] = []
    statuses: list[int] = []
    said: list[str] = []
    work = make(folder)
    os.chdir(folder)
    _limit_memory(2 * limits.memory)
    gc.collect()
    gc.freeze()  # what is alive by now, modules above all, is not looked at before every case
    os.truncate(log, 0)
    resident = _resident(reset=True)
    begun = time.process_time()
    before = _listing(folder)
    for command in work.commands:
        result = CliRunner().invoke(main, [os.fspath(part) for part in command])
        statuses.append(result.exit_code)
        output = result.output
        said.append(output)
        shown = " ".join(map(str, command))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            problems.append(f"{shown}: {result.exception!r}")
        if "a fault in mlx-contentvec" in output or "Traceback" in output:
            problems.append(f"{shown}: a traceback")
        if "not enough memory" in output:
            problems.append(f"{shown}: out of memory")
        if result.exit_code not in (work.statuses or {0, 1, 2}):
            problems.append(f"{shown}: exit status {result.exit_code}")
        if result.exit_code and not output.strip():
            problems.append(f"{shown}: not a word")
        if (len(output) > limits.characters and "--json" not in command) or (
            output.count("\n") > limits.lines and "\nerror: " in f"\n{output}"
        ):
            problems.append(f"{shown}: {output.count(chr(10))} lines, {len(output)} characters")
        if not all(c.isprintable() or c in "\n\r" for c in output):
            problems.append(f"{shown}: prints what a terminal obeys")
        after = _listing(folder)
        left = {path for path in after - before if ".partial" in path or ".mlx-contentvec-" in path}
        if result.exit_code and command[0] in ("convert", "export", "package"):
            left |= after - before
        if left:
            problems.append(f"{shown}: leaves {sorted(left)[:3]}")
        before = after
    if work.says is not None and not any(work.says in output for output in said):
        problems.append(f"nothing says {work.says!r}")
    compared = False
    if work.check is not None:
        try:
            wrong = work.check()
            compared = wrong is not None
        except MemoryError:
            wrong = "out of memory"
        except Exception as error:
            wrong = f"the check: {error!r}"
        if wrong:
            problems.append(wrong)
    used = time.process_time() - begun
    memory = max(_resident() - resident, 0)
    if used > limits.cpu_seconds:
        problems.append(f"{used:.1f} s of CPU time")
    if memory > limits.memory:
        problems.append(f"{memory / MIB:.0f} MiB of memory")
    if size := os.fstat(log).st_size:
        written = os.pread(log, 200, 0)
        problems.append(f"{size} bytes that no command counted: {written!r}")
    return Result(
        name, tuple(problems), tuple(statuses), used, memory, "\n".join(said)[:1500], compared
    )


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _resident(*, reset: bool = False) -> int:
    """Peak resident bytes since the last reset; of the whole process where that cannot be had."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- the process that watches


def watch(
    command: Callable[[int], Sequence[str | Path]], names: Sequence[str], limits: Limits
) -> Iterator[Result]:
    """Results of the cases ``names``, in order, from processes of ``command(first case)``."""
    done = 0
    environment = {
        **os.environ,
        "PYTHONPATH": search_path(),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    while done < len(names):
        started = done
        wait = 120.0  # it has to import everything
        with subprocess.Popen(
            [os.fspath(part) for part in command(done)], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            buffer = b""
            while done < len(names):
                ready, _, _ = select.select([process.stdout], [], [], wait)
                piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
                if not piece:
                    why = "it ended the process" if ready else "it blocks or takes too long"
                    process.kill()
                    yield Result(names[done], (f"{why} (exit status {process.wait()})",))
                    done += 1
                    break
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    facts = json.loads(line)
                    if "end" in facts:
                        del facts["end"]
                        yield Result(**facts)
                        done += 1
                wait = limits.wall_seconds
            process.kill()
        if done == started:
            raise RuntimeError("the process with limits does not start")
