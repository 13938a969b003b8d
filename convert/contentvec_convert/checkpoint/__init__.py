"""Reading checkpoints without torch, fairseq or trust.

The file's tensors come as views on it, the objects of other programs as inert
records. Nothing a file says is imported, called or written. Needs numpy and
the standard library.
"""

from __future__ import annotations

from .foreign import Foreign
from .opening import Checkpoint, foreign_file, is_cut_short, open_checkpoint
from .records import InertRecord
from .tensors import StoredTensor

__all__ = [
    "Checkpoint",
    "Foreign",
    "InertRecord",
    "StoredTensor",
    "foreign_file",
    "is_cut_short",
    "open_checkpoint",
]
