"""Where the sources are, and how a process that a test starts finds them."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def search_path() -> str:
    """A PYTHONPATH of the sources and what is there: on a cluster that may be every package."""
    sources = (PROJECT, PROJECT / "convert", PROJECT / "parity")
    there = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*map(str, sources), *filter(None, there)]))
