"""Every error this project raises on purpose, drawn in one place.

    ContentvecError
    |-- CheckpointError          a source file cannot be read
    |   |-- CorruptCheckpoint    it is damaged, truncated or contradicts itself
    |   `-- UnsupportedCheckpoint  it is sound, but not something that can be converted
    |       `-- ForeignCheckpoint  it is known to be something else
    |-- IdentityError            a file is not the one it should be
    |-- ConfigError              a configuration is impossible, or does not fit the tensors
    |-- MappingError             tensors are unmapped, missing or of the wrong shape
    |-- OutputError              a result cannot be written where it was asked for
    |-- WeightsError             weights do not fit the model they are loaded into
    |-- AudioError               audio cannot be decoded or is not usable input
    |-- BackendError             MLX or a backend is missing, or its device has not enough
    |-- MissingDependency        an optional package is needed for what was asked
    |-- ParityError              a comparison cannot be made (one that fails is a result)
    `-- HubError                 a repository cannot be read, verified or published

Libraries raise these; only the command line prints them and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ContentvecError(Exception):
    """What went wrong, what was found, what was expected, and what to do.

    ``str()`` renders all four the way the command line prints them: what comes from a
    file or a server has no control characters there, and no more than a few lines.
    """

    def __init__(
        self,
        problem: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.problem = problem
        self.found = found
        self.expected = expected
        self.hint = hint
        super().__init__(problem)

    def __str__(self) -> str:
        lines = _shown(self.problem)
        if self.found is not None:
            lines += _shown(f"  found     {self.found}")
        if self.expected is not None:
            lines += _shown(f"  expected  {self.expected}")
        if self.hint is not None:
            lines.append("")
            lines += _shown("hint: " + self.hint.replace("\n", "\n      "))
        return "\n".join(lines)


#: lines of one part of a message, and characters of one line
_LINES, _CHARACTERS = 12, 1_000


def _shown(text: str) -> list[str]:
    """The lines of one part of a message, bounded, and harmless to a terminal."""
    lines = text[: _LINES * _CHARACTERS].split("\n")
    shown = [printable(line[:_CHARACTERS]) for line in lines[:_LINES]]
    if len(lines) > _LINES or any(len(line) > _CHARACTERS for line in lines):
        shown[-1] += " ..."
    return shown


class CheckpointError(ContentvecError):
    """A source file cannot be read."""


class CorruptCheckpoint(CheckpointError):
    """A source file is damaged, truncated or contradicts itself."""


class UnsupportedCheckpoint(CheckpointError):
    """A source file is sound, but not something that can be converted."""


class ForeignCheckpoint(UnsupportedCheckpoint):
    """A source file is known to be something else: ``what``, such as "a web page"."""

    def __init__(self, problem: str, *, what: str, **details: str | None) -> None:
        super().__init__(problem, **details)
        self.what = what


class IdentityError(ContentvecError):
    """A file is not the one it should be."""


class ConfigError(ContentvecError):
    """A configuration is impossible, or does not fit the tensors."""


class MappingError(ContentvecError):
    """Tensors are unmapped, missing or of the wrong shape."""


class OutputError(ContentvecError):
    """A result cannot be written where it was asked for."""


class WeightsError(ContentvecError):
    """Weights do not fit the model they are loaded into."""


class AudioError(ContentvecError):
    """Audio cannot be decoded, or is not usable input."""


class BackendError(ContentvecError):
    """MLX or one of its backends is missing, or its device has too little memory."""


class MissingDependency(ContentvecError):
    """An optional package is needed for what was asked."""


class ParityError(ContentvecError):
    """A comparison cannot be made. (One that fails is a result, not an error.)"""


class HubError(ContentvecError):
    """A model repository cannot be read, verified or published."""


def name_list(names: Iterable[str], limit: int = 10) -> str:
    """``names`` joined by commas, cut after ``limit``: ``a, b and 14 more``."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def install_hint(extra: str) -> str:
    """How to install an extra of this package, from an index or from a clone of its source.

    The first release on the index, 0.1, has neither these extras nor a command.
    """
    return f"pip install 'mlx-contentvec[{extra}]>=0.2'\nor in a clone: pip install '.[{extra}]'"


#: the words of the dynamic linker for a library that has no room, and of CUDA's driver
_NO_ROOM = (
    *("failed to map segment", "cannot map zero-fill pages", "Cannot allocate memory"),
    "out of memory",
)


#: what to do where memory ran out
MORE_MEMORY = "end other programs, or raise the limit of this session (ulimit -v) or container"


def is_out_of_memory(error: Exception) -> bool:
    """Whether ``error`` means that there was no memory, for data or for a library."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_ROOM)


def import_hint(error: Exception, install: str) -> str:
    """What to do about a module that cannot be imported: ``install``, unless it is installed."""
    return f"memory ran out: {MORE_MEMORY}" if is_out_of_memory(error) else install


def counted(number: int, noun: str) -> str:
    """``1 clip``, ``2 clips``, ``1,000 clips``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def did_you_mean(word: str, words: Iterable[str]) -> str | None:
    """A question that names what ``word`` may be a misspelling of; None if it resembles nothing."""
    close = difflib.get_close_matches(word.lower(), list(words), 3, 0.6)
    return f"did you mean {' or '.join(close)}?" if close else None


def printable(text: str) -> str:
    r"""``text`` for a terminal: control characters and bytes that are no UTF-8 as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable()
        else repr(character)[1:-1]
        if not "\udc80" <= character <= "\udcff"
        else f"\\x{ord(character) - 0xDC00:02x}"
        for character in text
    )
