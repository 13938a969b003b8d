"""What commands print: lines that fit the terminal, and progress with or without one."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from .errors import printable

#: seconds between two lines of progress where stderr is no terminal
LINE_EVERY = 10.0
#: seconds of work before a bar appears
PATIENCE = 1.0

#: what later lines of a wrapped one are indented by: a label and its spaces
_HANGING = re.compile(r"(?:error: |hint: | *\S+ {2,}| *)")

#: called with what is being done, the part that is done, and the whole
Progress = Callable[[str, int, int], None]


class FiniteRange(click.FloatRange):
    """A number within bounds: neither infinite nor NaN, which no bound refuses."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As ``click.FloatRange`` does."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return "" if self.min is None and self.max is None else super()._describe_range()


class NamedPath(click.Path):
    """A path with a name: "." and ".." are the folders that they stand for."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        """As ``click.Path`` does."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        return path if path.name not in ("", "..") else path.resolve()


def say(text: str, *, err: bool = False) -> None:
    """Print lines. On a terminal they are wrapped at its width, below their labels.

    Words are never broken, so that paths and checksums can be copied; what goes into a
    file or a pipe is not wrapped. What a terminal would obey, from names and files, is
    printed as what it is.
    """
    text = "\n".join(map(printable, text.split("\n")))
    stream = sys.stderr if err else sys.stdout
    if stream is not None and stream.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    click.echo(text, err=err)


def wrapped(text: str, width: int) -> str:
    """``text`` in lines of at most ``width`` columns, later ones below the text of the first."""
    lines = []
    for line in text.split("\n"):
        hanging = _HANGING.match(line)
        indent = len(hanging[0]) if hanging is not None else 0
        lines += textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * (indent if indent < width // 2 else 2),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def labelled(label: str, text: str, *, width: int = 10) -> str:
    """One row of a summary; further lines of ``text`` line up below the first."""
    return f"  {label:<{width}}" + text.replace("\n", "\n" + " " * (width + 2))


def _plain(text: str) -> str:
    """``text`` for rich, which takes what stands in brackets for a style."""
    from rich.markup import escape

    return escape(printable(text))


class Status:
    """Says on stderr what is being done: a spinner on a terminal, else a line now and then."""

    def __init__(self, first: str = "") -> None:
        self._text = first
        self._spinner: Any = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def update(self, text: str) -> None:
        """What is being done from now on."""
        self._text = text
        if self._spinner is not None:
            self._spinner.update(_plain(text))

    def __enter__(self) -> Status:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console

            self._spinner = Console(stderr=True).status(_plain(self._text))
            self._spinner.start()
        else:
            self._thread = threading.Thread(target=self._print, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._spinner is not None:
            self._spinner.stop()
        if self._thread is not None:
            self._thread.join()

    def _print(self) -> None:
        while not self._stop.wait(LINE_EVERY):
            if self._text:
                with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                    click.echo(printable(self._text), err=True)


@contextlib.contextmanager
def late_bar() -> Iterator[Progress]:
    """A bar on stderr for work that takes longer than PATIENCE; without a terminal, lines."""
    if sys.stderr is None or not sys.stderr.isatty():
        with Status() as status:
            yield lambda doing, done, total: status.update(
                f"{doing} {100 * done / max(total, 1):.0f} %"
            )
        return
    begun = time.monotonic()
    bar: Any = None
    tasks: dict[str, Any] = {}

    def advance(doing: str, done: int, total: int) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - begun > PATIENCE:
            from rich.console import Console
            from rich.progress import Progress as Bar

            bar = Bar(transient=True, console=Console(stderr=True))
            bar.start()
        if bar is not None:
            if doing not in tasks:
                tasks[doing] = bar.add_task(doing, total=total)
            bar.update(tasks[doing], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
