"""How much of a file's claims is believed before it is refused.

Each limit lies far above what a real checkpoint reaches and keeps a hostile
one cheap: opening any file ends within seconds and some hundred megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_contentvec.json_text import JSON_BYTES, JSON_VALUES

MIB = 1024 * 1024

#: a pickle: 62 KB in RVC's file; a few MB with a large dictionary inside
PICKLE_BYTES = 64 * MIB
#: instructions of one pickle: 12 thousand in RVC's file, 100 thousand with Adam state
PICKLE_OPERATIONS = 2_000_000
#: lists, dicts, sets and records that one pickle makes (an empty set alone takes 216 bytes)
PICKLE_CONTAINERS = 300_000
#: bytes of one integer: torch's magic number has 10
INTEGER_BYTES = 32
#: different names of classes and functions: some tens in a real file
PICKLE_NAMES = 10_000
#: values inside one tuple that is a dict key
KEY_PARTS = 64
#: characters of one key: equal keys are compared to their end
KEY_CHARACTERS = 4_096
#: tensors of one file: 214 in RVC's, 642 with Adam state, some thousands in the largest
TENSORS = 50_000
#: values nested inside each other in a pickle, at the end of reading
NESTING = 64
#: values of the finished structure, counted as often as they are reachable
VALUES = 1_000_000
#: entries of a zip archive
ZIP_ENTRIES = 100_000
#: its table of contents: about 90 bytes for each entry
ZIP_TABLE_BYTES = 32 * MIB
#: characters of a tensor's name
NAME_CHARACTERS = 512
#: weight files of a sharded model
SHARDS = 1_000


@dataclass
class Budget:
    """What reading one checkpoint may still cost, all its files and shards together.

    Whoever makes something takes it from here first, and refuses when a number
    falls below zero.
    """

    operations: int = PICKLE_OPERATIONS
    containers: int = PICKLE_CONTAINERS
    names: int = PICKLE_NAMES
    #: characters of texts, as many as they take bytes
    text_bytes: int = PICKLE_BYTES
    tensors: int = TENSORS
    values: int = VALUES
    zip_entries: int = ZIP_ENTRIES
    json_bytes: int = JSON_BYTES
    json_values: int = JSON_VALUES
    #: keys so far that are slow to compare: see PickleMachine.key
    slow_keys: int = 0
