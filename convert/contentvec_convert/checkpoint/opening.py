"""The way in: whatever the path names, one kind of checkpoint comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .source_file import SourceFile
from .state_dict import contents
from .tensors import StoredTensor
from .torch_file import looks_like_torch_legacy, read_torch_legacy, read_torch_zip
from .zip_archive import LOCAL_SIGNATURE


@dataclass(eq=False)
class Checkpoint:
    """Names, tensors and configuration of a checkpoint; no tensor is read before it is asked for.

    Use it as a context manager, or call :meth:`close`.
    """

    #: what was opened
    path: Path
    #: the weight file or files behind it
    files: tuple[Path, ...]
    #: "torch zip", "torch legacy" or "safetensors"
    container: str
    #: the state dict, in stored order. The optimizer's state is not part of it.
    tensors: dict[str, StoredTensor]
    #: the other top-level entries as plain values, foreign objects as InertRecord
    extra: dict[str, Any] = field(default_factory=dict)
    #: safetensors' ``__metadata__``
    metadata: dict[str, str] = field(default_factory=dict)
    #: config.json of a folder; fairseq's ``cfg``, or {"model": vars(args)} of an older file
    config: dict[str, Any] | None = None
    _sources: tuple[SourceFile, ...] = field(default=(), repr=False)

    def close(self) -> None:
        """Close the files. Arrays that view them stay valid."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a file of torch (either container).

    Raises CorruptCheckpoint if it is damaged or contradicts itself,
    UnsupportedCheckpoint if it is something else, and CheckpointError if it
    cannot be opened at all.
    """
    path = Path(path)
    file = SourceFile(path)
    try:
        head = file.head(64)
        if head.startswith(LOCAL_SIGNATURE):
            container, value = "torch zip", read_torch_zip(file)
        elif looks_like_torch_legacy(head):
            container, value = "torch legacy", read_torch_legacy(file)
        else:
            raise file.unsupported("it is no checkpoint")
        found = contents(file, value)
    except BaseException:
        file.close()
        raise
    return Checkpoint(
        path, (path,), container, found.tensors, found.extra, {}, found.config, (file,)
    )
