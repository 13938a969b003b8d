#!/usr/bin/env python3
"""Change one guard, limit or comparison at a time, and see whether a test notices.

    scripts/mutate.py [FILE ...] [--only LINE] [--limit N] [--seconds N] [--list]

FILE is a row of TESTS; all of them by default. Each change is made in a copy of the
project and only the tests of that file are run, in a process forked from one that
has imported the large libraries. A change that no test notices is printed:
either a test is missing, or the change changes nothing. Rows of EQUIVALENT say of
such a change why it does not.

Exit status: 0 every change was noticed or is known to change nothing, 1 not.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

#: file -> the tests that must notice a change of it
TESTS: dict[str, list[str]] = {
    "parity/contentvec_parity/compare/verdict.py": ["tests/parity/test_parity_comparison.py"],
    "mlx_contentvec/extract/manifest.py": ["tests/extract/test_manifest.py"],
    "mlx_contentvec/extract/packing.py": ["tests/extract/test_extraction.py"],
    "convert/contentvec_convert/writer.py": ["tests/convert/test_writer.py"],
    "mlx_contentvec/extract/run.py": ["tests/extract/test_extraction.py"],
    "mlx_contentvec/config.py": ["tests/model/test_config.py", "tests/model/test_model.py"],
    "mlx_contentvec/inputs.py": ["tests/model/test_inputs.py", "tests/model/test_model.py"],
    "mlx_contentvec/files.py": ["tests/convert/test_writer.py", "tests/test_files.py"],
    "mlx_contentvec/folders.py": ["tests/test_folders.py"],
    "mlx_contentvec/hub.py": ["tests/model/test_hub.py"],
    "mlx_contentvec/hub_client.py": ["tests/model/test_hub.py"],
    "mlx_contentvec/json_text.py": ["tests/test_json_text.py"],
    "mlx_contentvec/safetensors_header.py": [
        "tests/model/test_safetensors_header.py",
        "tests/checkpoint",
    ],
    "convert/contentvec_convert/fetch.py": [
        "tests/convert/test_fetch.py",
        "tests/convert/test_repository.py",
    ],
    "convert/contentvec_convert/commands/fetch.py": ["tests/convert/test_fetch.py"],
    "convert/contentvec_convert/repository.py": ["tests/convert/test_repository.py"],
    "parity/contentvec_parity/bench/measure.py": ["tests/parity/test_bench.py"],
    "parity/contentvec_parity/compare/soundness.py": ["tests/parity/test_parity_soundness.py"],
    "parity/contentvec_parity/references/recording_checks.py": [
        "tests/publishing/test_recording_checks.py",
        "tests/publishing/test_verify.py",
    ],
    "parity/contentvec_parity/publishing/checks.py": [
        "tests/publishing/test_package_checks.py",
        "tests/publishing/test_package.py",
        "tests/publishing/test_verify.py",
    ],
    **{
        f"convert/contentvec_convert/checkpoint/{name}.py": ["tests/checkpoint"]
        for name in (
            "limits",
            "opening",
            "pickle_machine",
            "safetensors_file",
            "source_file",
            "state_dict",
            "tensors",
            "torch_file",
            "zip_archive",
        )
    },
}

#: (file, line of code, change) -> why no test can notice it
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "convert/contentvec_convert/fetch.py",
        "if before > size:",
        "> -> >=",
    ): "the loop ends where they are equal",
    (
        "convert/contentvec_convert/checkpoint/pickle_machine.py",
        "_DISPATCH: list[Callable[[PickleMachine], None] | None] = [None] * 256",
        "limit -> 2 x + 1",
    ): "no byte is as large as the places beyond",
    (
        "convert/contentvec_convert/checkpoint/zip_archive.py",
        "if locator_at >= 0 and file.read(locator_at, 4) == _LOCATOR64_SIGNATURE:",
        ">= -> >",
    ): "what begins with a locator is not taken for an archive",
    (
        "convert/contentvec_convert/checkpoint/zip_archive.py",
        "while missing and position + 4 <= len(extra):",
        "<= -> <",
    ): "a field that begins in the last four bytes holds nothing",
    (
        "mlx_contentvec/safetensors_header.py",
        'f"it lacks {missing:,} bytes at its end" if missing > 0 else "it goes on past its end",',
        "> -> >=",
    ): "the number is not zero there",
    (
        "mlx_contentvec/safetensors_header.py",
        "super().__init__(problem)",
        "call -> pass",
    ): "an exception keeps its arguments when it is made",
    (
        "convert/contentvec_convert/checkpoint/source_file.py",
        "_CHUNK = 1024 * 1024",
        "limit -> 2 x + 1",
    ): "the same bytes are read, in other pieces",
    (
        "convert/contentvec_convert/checkpoint/tensors.py",
        "_CHUNK = 1024 * 1024",
        "limit -> 2 x + 1",
    ): "the same bytes are read, in other pieces",
    (
        "mlx_contentvec/files.py",
        "if fcntl is not None:",
        "if -> if True",
    ): "the other branch is that of Windows",
    (
        "mlx_contentvec/files.py",
        'if hasattr(os, "preadv"):',
        "if -> if True",
    ): "the other branch is that of an older macOS",
    (
        "mlx_contentvec/files.py",
        'if hasattr(os, "preadv"):',
        "if -> if False",
    ): "both branches read the same bytes",
    (
        "mlx_contentvec/files.py",
        "_LOCK_SECONDS = 30.0",
        "limit -> 2 x + 1",
    ): "patience with another process; whether it ends is tested with a shorter one",
    (
        "mlx_contentvec/files.py",
        "if time.monotonic() > give_up:",
        "> -> >=",
    ): "no clock is read at the very nanosecond",
    (
        "mlx_contentvec/files.py",
        "time.sleep(0.01)",
        "call -> pass",
    ): "it waits all the same, at the cost of a core",
    (
        "mlx_contentvec/files.py",
        "if fcntl is None:",
        "if -> if False",
    ): "the other branch is that of Windows",
    (
        "mlx_contentvec/folders.py",
        'if sys.platform == "darwin":',
        "if -> if False",
    ): "the other branch is that of macOS",
    (
        "mlx_contentvec/folders.py",
        "if path.is_file():",
        "if -> if True",
    ): "a folder that is made has files alone, and is flushed itself afterwards",
    (
        "mlx_contentvec/json_text.py",
        "if len(made) != len(pairs):",
        "if -> if True",
    ): "the search for a name that occurs twice finds none",
    (
        "mlx_contentvec/extract/manifest.py",
        "if output not in self._packed:",
        "if -> if True",
    ): "a packed file is hashed again, with the same result",
    (
        "mlx_contentvec/extract/manifest.py",
        "raise cannot_write(path, error) from error",
        "raise -> pass",
    ): "the draft cannot be made in that folder either, and says so in the same words",
    (
        "mlx_contentvec/extract/run.py",
        "if settings.window is None or settings.overlap is None:",
        "or -> and",
    ): "both are given or neither",
    (
        "parity/contentvec_parity/compare/soundness.py",
        'if not abs(clip["seconds"] - length) <= _SLACK * length:',
        "<= -> <",
    ): "no two numbers as near to each other are apart by exactly that",
}

#: imported by the process that the others are forked from
HEAVY = ("numpy", "safetensors.numpy", "pytest", "click", "torch", "mlx.core", "mlx.nn")

_COMPARE = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
_SHOWN = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
}


@dataclass(frozen=True)
class Change:
    """One piece of a source file, and what stands in its place."""

    line: int
    start: int
    end: int
    text: str
    about: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


class Source:
    """A file, and the places in it."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def at(self, line: int, column: int) -> int:
        """The index of a place that ast gives, whose columns count bytes."""
        before = self.lines[line - 1].encode()[:column].decode()
        return self.starts[line - 1] + len(before)

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.at(node.lineno, node.col_offset),
            self.at(node.end_lineno, node.end_col_offset),
        )

    def changes(self) -> list[Change]:
        tree = ast.parse(self.text)
        found = [change for node in ast.walk(tree) for change in self._of(node)]
        found += self._limits(tree)
        return sorted(found, key=lambda change: (change.start, change.about))

    def _of(self, node: ast.AST) -> Iterator[Change]:
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for one, operator, other in zip(sides, node.ops, sides[1:], strict=False):
                yield self._between(one, other, _SHOWN[type(operator)], _COMPARE[type(operator)])
        elif isinstance(node, ast.BoolOp):
            shown = "and" if isinstance(node.op, ast.And) else "or"
            other_word = "or" if shown == "and" else "and"
            for one, other in zip(node.values, node.values[1:], strict=False):
                yield self._between(one, other, shown, other_word)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start, end = self.span(node)
            inner, _ = self.span(node.operand)
            yield Change(node.lineno, start, end, f"({self.text[inner:end]})", "not x -> x")
        elif isinstance(node, ast.Raise):
            yield Change(node.lineno, *self.span(node), "pass", "raise -> pass")
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            for word in ("True", "False"):
                yield Change(node.lineno, *self.span(node.test), word, f"if -> if {word}")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            # a call for its effect alone: a check, a flush, a removal
            yield Change(node.lineno, *self.span(node), "pass", "call -> pass")

    def _between(self, one: ast.expr, other: ast.expr, shown: str, by: str) -> Change:
        """The operator between two operands, wherever parentheses and comments are."""
        begin, end = self.span(one)[1], self.span(other)[0]
        start = begin + self.text[begin:end].index(shown)
        line = self.text.count("\n", 0, start) + 1
        return Change(line, start, start + len(shown), by, f"{shown} -> {by}")

    def _limits(self, tree: ast.Module) -> Iterator[Change]:
        """Numbers of the module's constants."""
        for statement in tree.body:
            if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or statement.value is None:
                continue
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Call):
                    break  # a default of getattr: what another system lacks
                if isinstance(node, ast.Constant) and type(node.value) in (int, float):
                    by = f"({self.text[slice(*self.span(node))]} * 2 + 1)"
                    yield Change(node.lineno, *self.span(node), by, "limit -> 2 x + 1")


def copy_project(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=PROJECT,
        capture_output=True,
        check=True,
    ).stdout.split(b"\0")
    for name in filter(None, listed):
        source = PROJECT / os.fsdecode(name)
        if source.is_file():
            target = folder / os.fsdecode(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target, follow_symlinks=True)
            shutil.copymode(source, target)


def tests_notice(tree: Path, tests: list[str], seconds: float) -> bool:
    """Whether one of the tests fails, or does not end, in the project as it is now."""
    child = os.fork()
    if not child:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        os.chdir(tree)
        roots = [str(tree), str(tree / "convert"), str(tree / "parity")]
        sys.path[:0] = roots
        os.environ["PYTHONPATH"] = os.pathsep.join(roots)
        status = 1
        try:
            status = int(
                importlib.import_module("pytest").main(
                    ["-x", "-q", "-p", "no:cacheprovider", "-m", "not fullsize", *tests]
                )
            )
        finally:
            os._exit(status)
    give_up = time.monotonic() + seconds
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended and time.monotonic() < give_up:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
    # also where it ended: a test that failed leaves the processes that it had begun
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
    return not ended or status != 0


def any_notices(tree: Path, tests: list[str], seconds: float) -> bool:
    """:func:`tests_notice`, path by path: collecting tests may take longer than the first ones."""
    return any(tests_notice(tree, [path], seconds) for path in tests)


def survivors(tree: Path, name: str, options: argparse.Namespace, end: float) -> list[str]:
    path = tree / name
    source = Source(path)
    changes = [c for c in source.changes() if options.only in (None, c.line)]
    changes = changes[:: max(1, len(changes) // options.limit)] if options.limit else changes
    begun = time.monotonic()
    if any_notices(tree, TESTS[name], 1200):
        return [f"{name}: its tests fail as it is"]
    allowed = 5 * (time.monotonic() - begun) + 10
    found, tried = [], 0
    for change in changes:
        if time.monotonic() > end:
            break
        tried += 1
        try:
            changed = change.apply(source.text)
            ast.parse(changed)
        except SyntaxError:
            continue
        path.write_text(changed, encoding="utf-8")
        if not any_notices(tree, TESTS[name], allowed):
            code = source.lines[change.line - 1].strip()
            if (name, code, change.about) not in EQUIVALENT:
                found.append(f"{name}:{change.line}: {change.about}: {code}")
                print(found[-1], flush=True)
    path.write_text(source.text, encoding="utf-8")
    print(f"{name}: {tried} of {len(changes)} changes tried, {len(found)} not noticed", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--only", type=int, metavar="LINE", help="changes of this line alone")
    parser.add_argument("--limit", type=int, help="about so many changes of each file, spread")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--list", action="store_true", help="list the changes, try none")
    options = parser.parse_args()
    names = [n for n in TESTS if not options.files or any(f in n for f in options.files)]
    if options.list:
        for name in names:
            for change in Source(PROJECT / name).changes():
                print(f"{name}:{change.line}: {change.about}")
        return 0
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # others' plugins take longer to import than most tests to run
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # the project itself must not be found, only its copy
    sys.path[:] = [p for p in sys.path if not Path(p or ".").resolve().is_relative_to(PROJECT)]
    for module in HEAVY:
        try:
            importlib.import_module(module)
        except ImportError:
            print(f"without {module}", file=sys.stderr)
    end = time.monotonic() + options.seconds
    found = []
    with tempfile.TemporaryDirectory(prefix="contentvec-mutants-") as folder:
        tree = Path(folder).resolve()
        copy_project(tree)
        for name in names:
            found += survivors(tree, name, options, end)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
