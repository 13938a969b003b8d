"""The converter: a checkpoint in, MLX safetensors and a ledger out.

    from contentvec_convert import convert

    ledger = convert("hubert_base.pt", "contentvec_base.safetensors")
    print(ledger.output["sha256"], len(ledger.tensors))

``fetch`` is in ``contentvec_convert.fetch``, ``export`` in ``contentvec_convert.export``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion import convert
    from .inspection import Inspection, inspect
    from .ledger import Ledger

__all__ = ["Inspection", "Ledger", "convert", "inspect"]

#: public name -> module, imported on first use: hashing a source begins before numpy is there
_HOMES = {
    "convert": ".conversion",
    "inspect": ".inspection",
    "Inspection": ".inspection",
    "Ledger": ".ledger",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
