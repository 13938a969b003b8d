"""Runs the original and the port, compares them, and reports how far apart they are."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare.metrics import Difference, compare_arrays
    from .harness import compare_files, replay

__all__ = ["Difference", "compare_arrays", "compare_files", "replay"]

#: public name -> module, imported on first use: the command line imports this package too
_HOMES = {
    "Difference": ".compare.metrics",
    "compare_arrays": ".compare.metrics",
    "compare_files": ".harness",
    "replay": ".harness",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
