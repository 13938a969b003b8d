"""Every file of ``attack_corpus``, in processes with limits: one error or a right result."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack_corpus import LIMITS, cases
from tests.limited import MIB, Limits, Make, Work, serve, watch
from tests.optional import ffmpeg_program

for _needed in ("av", "torch", "transformers"):
    # looked for, not imported: the processes with limits import this file
    if importlib.util.find_spec(_needed) is None:
        pytest.skip(f"needs {_needed}: scripts/test installs it", allow_module_level=True)


@pytest.fixture(scope="session")
def seeds(shared: Callable[..., Path]) -> Path:
    """The good files of ``hostile_seeds``, which no case changes."""
    ffmpeg_program()
    from contentvec_parity.standin.weights import PRESETS
    from tests.hostile_seeds import LEAST, make_seeds

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "least", LEAST)
        return shared("seeds", lambda folder: make_seeds(folder, "least"))


def test_the_cases_have_names_of_their_own(seeds: Path) -> None:
    names = [name for name, _ in cases(seeds)]
    assert len(names) == len(set(names))


def test_no_file_breaks_a_command(seeds: Path, tmp_path: Path) -> None:
    """CPU seconds, memory, lines, escapes, exit status and what is left behind, case by case."""
    # cases link to their seeds, which changes the status of what another test reads
    own = shutil.copytree(seeds, tmp_path / "seeds")
    names = [name for name, _ in cases(own)]
    command = [sys.executable, "-m", "tests.attack_corpus", f"{own}"]
    problems = {}
    for result in watch(lambda first: [*command, f"{first}"], names, LIMITS):
        if result.problems:
            problems[result.name] = result.problems
    assert not problems


# ---- the limits themselves

TIGHT = Limits(cpu_seconds=0.5, wall_seconds=4.0, memory=100 * MIB, characters=300)


def blocks(folder: Path) -> Work:
    os.mkfifo(folder / "pipe")
    return Work(check=lambda: (folder / "pipe").read_text())


def works_on_and_on(_: Path) -> Work:
    def check() -> None:
        until = time.process_time() + 0.7
        while time.process_time() < until:
            pass

    return Work(check=check)


def takes_memory(size: int) -> Make:
    def check() -> None:
        bytearray(b"x") * size

    return lambda _: Work(check=check)


def raises(_: Path) -> Work:
    def check() -> str:
        raise KeyError("layers")

    return Work(check=check)


def writes_past_the_commands(_: Path) -> Work:
    def check() -> None:
        os.write(2, b"a library's own words")

    return Work(check=check)


#: name -> (a case that does what none may, what is said of it)
FAULTY: dict[str, tuple[Make, str]] = {
    "blocks": (blocks, "blocks or takes too long"),
    "works on and on": (works_on_and_on, "s of CPU time"),
    "takes memory": (takes_memory(150 * MIB), "MiB of memory"),
    "takes more than there is": (takes_memory(900 * MIB), "out of memory"),
    "raises": (raises, "KeyError"),
    "ends the process": (lambda _: Work(check=lambda: os._exit(3)), "ended the process"),
    "is wrong": (lambda _: Work(check=lambda: "other tensors"), "other tensors"),
    "writes past the commands": (writes_past_the_commands, "that no command counted"),
    "fails as it should not": (
        lambda _: Work([["inspect", "nothing"]], statuses={0}),
        "exit status 1",
    ),
    "does not say it": (lambda _: Work([["inspect", "nothing"]], says="else"), "nothing says"),
    "says too much": (lambda _: Work([["extract", "--help"]]), "characters"),
}


def test_whatever_a_case_may_not_do_is_noticed() -> None:
    names = list(FAULTY)
    found = {
        result.name: " ".join(result.problems)
        for result in watch(
            lambda first: [sys.executable, "-m", "tests.test_attacks", str(first)], names, TIGHT
        )
    }
    assert list(found) == names
    for name, (_, said) in FAULTY.items():
        assert said in found[name], (name, found[name])


if __name__ == "__main__":
    _cases = [(name, make) for name, (make, _) in FAULTY.items()]
    serve(_cases[int(sys.argv[1]) :], TIGHT, ("mlx_contentvec.extract.command",))
