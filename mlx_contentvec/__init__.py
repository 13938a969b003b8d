"""ContentVec and HuBERT in MLX: 16 kHz mono audio in, content features out."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# MLX computes float32 products at TF32 precision on CUDA and on an Apple M5 unless this
# says otherwise before the first product; features are then about 1,500 times as far from
# the original as PyTorch's own float32 is. Who sets it to 1 gets TF32
os.environ.setdefault("MLX_ENABLE_TF32", "0")

if TYPE_CHECKING:
    from .audio import read_audio
    from .config import ModelConfig
    from .errors import ContentvecError
    from .first_release import HF_REPO_ID, HF_WEIGHTS_FILE
    from .loading import load
    from .model import ContentvecModel

__all__ = [
    "HF_REPO_ID",
    "HF_WEIGHTS_FILE",
    "ContentvecError",
    "ContentvecModel",
    "ModelConfig",
    "__version__",
    "load",
    "read_audio",
]

#: public name -> module, imported on first use so that converting never imports mlx
_HOMES = {
    "ContentvecError": ".errors",
    "ContentvecModel": ".model",
    "ModelConfig": ".config",
    "load": ".loading",
    "read_audio": ".audio",
    # public names of the first release
    "HF_REPO_ID": ".first_release",
    "HF_WEIGHTS_FILE": ".first_release",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
