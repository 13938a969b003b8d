"""What only some tests need: they are skipped without it, or fail under ``REQUIRE_ALL``."""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

#: set by scripts/test: what is missing is a failure, not a skip
REQUIRE_ALL = os.environ.get("MLX_CONTENTVEC_REQUIRE_ALL") == "1"


def optional(module: str, how_to_get_it: str) -> ModuleType:
    """The module; skips or fails without it, saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        _missing(f"needs {module} ({error}): {how_to_get_it}")


def ffmpeg_program() -> str:
    """Where ffmpeg is; skips or fails without it, saying how to get it."""
    found = shutil.which("ffmpeg")
    if found is None:
        _missing("needs ffmpeg on the PATH: apt-get install ffmpeg, or brew install ffmpeg")
    return found


def _missing(reason: str) -> NoReturn:
    if REQUIRE_ALL:
        pytest.fail(reason)
    pytest.skip(reason)
