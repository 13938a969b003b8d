"""Torch's two containers: the zip archive of today and the row of pickles before it.

Both end in the same place: the pickled value, with :class:`TensorView` where
its tensors are, and nothing read of the tensors themselves.
"""

from __future__ import annotations

import struct
from typing import Any

from mlx_contentvec.errors import name_list

from . import limits
from .constructors import CONSTRUCTORS, STORAGE_DTYPES, UNTYPED_STORAGES, TypedStorage
from .foreign import foreign_archive
from .pickle_machine import PickleMachine
from .records import GlobalName
from .source_file import SourceFile
from .tensors import DTYPES, Storage, brief
from .zip_archive import ZipArchive

#: the number that marks the older container, as a pickle writes it
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_COUNT = struct.Struct("<q")


def read_torch_zip(file: SourceFile) -> Any:
    """The value that ``torch.save`` wrote into a zip archive.

    ``ROOT/data.pkl`` is the pickle and ``ROOT/data/KEY`` a storage, under any
    one ROOT. Source: torch/serialization.py, _save and _load.
    Raises CorruptCheckpoint or UnsupportedCheckpoint.
    """
    archive = ZipArchive(file)
    foreign = foreign_archive(archive.entries)
    if foreign is not None:
        raise foreign.error(file)
    roots = [name[: -len("/data.pkl")] for name in archive.entries if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if len(roots) != 1:
        raise file.corrupt("two entries claim to be its pickle", found=name_list(map(brief, roots)))
    root = roots[0]
    if archive.read(f"{root}/byteorder", 16) not in (None, b"little"):
        raise file.unsupported(
            "it was saved on a big-endian machine",
            hint="load it with torch on any machine and save it again",
        )

    def storage(machine: PickleMachine, identity: Any) -> TypedStorage:
        dtype, key, count, _ = _storage_identity(machine, identity)
        itemsize = 1 if dtype is None else DTYPES[dtype].itemsize
        entry = archive.stored(f"{root}/data/{key}")
        if entry is None:
            raise file.corrupt(f"the storage {brief(key)} is missing")
        if count * itemsize != entry.length:
            raise file.corrupt(
                f"the storage {brief(key)} does not have the size that is claimed for it",
                found=f"{entry.length:,} bytes",
                expected=f"{count * itemsize:,}",
            )
        made = storages.get(key)
        if made is None:
            checksum = entry.crc if archive.has_checksums else None
            made = storages[key] = Storage(file, entry.start, entry.length, checksum)
        return TypedStorage(made, dtype)

    storages: dict[str, Storage] = {}
    content = archive.read(f"{root}/data.pkl", limits.PICKLE_BYTES) or b""
    value, end = PickleMachine(file, content, CONSTRUCTORS, storage).load()
    if end != len(content):
        raise file.corrupt("something follows the end of its pickle")
    return value


def looks_like_torch_legacy(head: bytes) -> bool:
    """Whether a file's first bytes (16 or more) are those of torch's older container."""
    if head[:1] != b"\x80" or head[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
        return False
    # protocols 4 and 5 put a frame of 9 bytes around it
    return head[2:].startswith(_LEGACY_MAGIC) or head[11:].startswith(_LEGACY_MAGIC)


def read_torch_legacy(file: SourceFile) -> Any:
    """The value that torch before 1.6 wrote: five pickles, then storage after storage.

    The pickles are a magic number, a version, facts about the machine, the
    value, and the keys of the storages in the order in which they follow,
    each as its number of elements (int64) and its bytes.
    Source: torch/serialization.py, _legacy_save and _legacy_load.
    Raises CorruptCheckpoint or UnsupportedCheckpoint.
    """
    storages: dict[str, Storage] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def storage(machine: PickleMachine, identity: Any) -> Any:
        if isinstance(identity, tuple) and identity[:1] == ("module",) and len(identity) > 1:
            # a class together with its source text, from whole pickled modules
            return identity[1]
        dtype, key, count, view = _storage_identity(machine, identity)
        itemsize = 1 if dtype is None else DTYPES[dtype].itemsize
        if sizes.setdefault(key, (count, itemsize)) != (count, itemsize):
            raise file.corrupt(f"two sizes are claimed for the storage {brief(key)}")
        # its place is known once all the pickles have been read
        made = storages.setdefault(key, Storage(file, 0, count * itemsize))
        if view is None:
            return TypedStorage(made, dtype)
        raise file.unsupported(
            "its storages are views of each other, as only early versions of torch wrote them",
            hint="load it with torch and save it with torch.save",
        )

    machine = PickleMachine(file, file.mapped(), CONSTRUCTORS, storage)
    magic, position = machine.load()
    if magic != _LEGACY_MAGIC_NUMBER:
        raise file.corrupt("it does not begin with torch's number")
    version, position = machine.load(position)
    if version != _LEGACY_VERSION:
        raise file.unsupported(
            "it is of an unknown version of torch's older format",
            found=brief(version),
            expected=str(_LEGACY_VERSION),
        )
    facts, position = machine.load(position)
    if type(facts) is not dict:
        raise file.corrupt("it does not say what machine it was saved on")
    if facts.get("little_endian") is not True:
        raise file.unsupported(
            "it was saved on a big-endian machine",
            hint="load it with torch on any machine and save it again",
        )
    value, position = machine.load(position)
    keys, position = machine.load(position)
    if (
        type(keys) is not list
        or not all(isinstance(key, str) for key in keys)
        or len(set(keys)) != len(keys)
        or set(keys) != set(storages)
    ):
        raise file.corrupt("its list of storages does not fit its tensors")
    for key in keys:
        count, itemsize = sizes[key]
        held = _COUNT.unpack(file.read(position, _COUNT.size))[0]
        position += _COUNT.size
        if held != count:
            raise file.corrupt(
                f"the storage {brief(key)} does not have the size that is claimed for it",
                found=f"{held:,} elements",
                expected=f"{count:,}",
            )
        if count * itemsize > file.size - position:
            raise file.corrupt(
                "it ends in the middle of a tensor",
                found=f"{file.size:,} bytes",
                expected=f"at least {position + count * itemsize:,}",
            )
        storages[key].start = position
        position += count * itemsize
    if position != file.size:
        raise file.corrupt(
            "something follows its last tensor",
            found=f"{file.size:,} bytes",
            expected=f"{position:,}",
        )
    return value


def _storage_identity(machine: PickleMachine, identity: Any) -> tuple[str | None, str, int, Any]:
    """dtype (None if untyped), key, number of elements, and view of a persistent id.

    ("storage", class, key, location, elements[, view]); the location is where
    the tensor lived (cpu, cuda:0) and means nothing here.
    """
    if not isinstance(identity, tuple) or len(identity) not in (5, 6):
        machine.corrupt("it refers to something outside that is not a storage")
    kind, storage_class, key, _, count = identity[:5]
    if kind != "storage" or not isinstance(storage_class, GlobalName) or type(key) is not str:
        machine.corrupt("it refers to something outside that is not a storage")
    if len(key) > limits.NAME_CHARACTERS:
        machine.corrupt("it refers to a storage with too long a name")
    if type(count) is not int or not 0 <= count < 2**60:
        machine.corrupt("it claims a storage of impossible size", found=brief(count))
    dtype: str | None = None
    if (storage_class.module, storage_class.name) not in UNTYPED_STORAGES:
        if (
            storage_class.module not in ("torch", "torch.cuda")
            or storage_class.name not in STORAGE_DTYPES
        ):
            raise machine.file.unsupported(
                f"it has tensors of an unknown kind, {storage_class}",
                expected=", ".join(STORAGE_DTYPES),
            )
        dtype = STORAGE_DTYPES[storage_class.name]
    return dtype, key, count, identity[5] if len(identity) == 6 else None
