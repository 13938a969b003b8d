"""The subcommands of proof and publishing, one file each."""

from __future__ import annotations

from pathlib import Path


def file_of(json_option: str | None) -> Path | None:
    """The file that ``--json`` names; None where it was not given, or ``-`` for stdout."""
    return None if json_option in (None, "-") else Path(str(json_option))
