"""The way in: whatever the path names, one kind of checkpoint comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_contentvec.errors import CheckpointError, CorruptCheckpoint, name_list
from mlx_contentvec.files import is_folder
from mlx_contentvec.safetensors_header import looks_like_safetensors

from . import limits
from .folder import WEIGHT_FILES, folder_config, folder_weights
from .foreign import HEAD_BYTES, Foreign, foreign_archive, foreign_bytes, foreign_value
from .safetensors_file import read_safetensors
from .source_file import DOWNLOAD_AGAIN, SourceFile
from .state_dict import Contents, contents
from .tensors import StoredTensor, brief
from .torch_file import looks_like_torch_legacy, read_torch_legacy, read_torch_zip
from .zip_archive import LOCAL_SIGNATURE, ZipArchive, has_end

TORCH_ZIP, TORCH_LEGACY, SAFETENSORS = "torch zip", "torch legacy", "safetensors"


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

    def verify(self) -> bool:
        """Compare every tensor's bytes with the checksums that the container keeps.

        Returns False if it keeps none (torch's older format, safetensors, a
        file saved without). Reads each storage once. Raises CorruptCheckpoint,
        which names the tensor, at the first that differs.
        """
        has_checksums = True
        for tensor in self.tensors.values():
            has_checksums &= tensor.verify()
        return has_checksums

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
    """Open a checkpoint: a file of torch (either container) or safetensors, or a folder.

    A folder is one in the Hugging Face layout: config.json beside
    model.safetensors, pytorch_model.bin, or the shards of either. A file of
    one of these two names takes the config.json beside it as well.

    Raises CorruptCheckpoint if it is damaged or contradicts itself,
    UnsupportedCheckpoint if it is something else, and CheckpointError if it
    cannot be opened at all.
    """
    path = Path(path)
    if is_folder(path):
        files, places = folder_weights(path)
        config = folder_config(path)
    else:
        files, places = (path,), None
        config = folder_config(path.parent) if path.name in WEIGHT_FILES else None
    sources: list[SourceFile] = []
    budget = limits.Budget()
    try:
        parts: list[tuple[str, Contents]] = []
        for name in files:
            sources.append(SourceFile(name, budget))
            parts.append(_read(sources[-1]))
            if sum(len(part.tensors) for _, part in parts) > limits.TENSORS:
                raise sources[-1].corrupt(
                    "its files have too many tensors", expected=f"at most {limits.TENSORS:,}"
                )
        container, whole = parts[0]
        if places is not None:
            whole = _joined(path, files, parts, places)
    except BaseException:
        for source in sources:
            source.close()
        raise
    return Checkpoint(
        path,
        files,
        container,
        whole.tensors,
        whole.extra,
        whole.metadata,
        config if whole.config is None else whole.config,
        tuple(sources),
    )


def foreign_file(path: str | Path) -> Foreign | None:
    """What a file is when it is nothing that :func:`open_checkpoint` reads.

    "A web page, saved instead of the weights", "an RVC voice model" or "an
    empty file", with a hint; None for a checkpoint, a folder, a file that
    cannot be read, or one that nothing is known of.
    """
    try:
        file = SourceFile(Path(path))
    except CheckpointError:
        return None
    try:
        return _foreign(file)
    except CheckpointError:
        return None
    finally:
        file.close()


def is_cut_short(path: str | Path) -> bool:
    """Whether a file begins as a zip archive and lacks the record that ends every one."""
    try:
        file = SourceFile(Path(path))
    except CheckpointError:
        return False
    try:
        return file.head(4) == LOCAL_SIGNATURE and not has_end(file)
    except CheckpointError:
        return False
    finally:
        file.close()


def _foreign(file: SourceFile) -> Foreign | None:
    head = file.head(HEAD_BYTES)
    if head.startswith(LOCAL_SIGNATURE):
        return foreign_archive(ZipArchive(file).entries) or foreign_value(read_torch_zip(file))
    if looks_like_torch_legacy(head):
        return foreign_value(read_torch_legacy(file))
    return None if looks_like_safetensors(head) else foreign_bytes(file, head)


def _read(file: SourceFile) -> tuple[str, Contents]:
    """The container of one file, and what it holds."""
    head = file.head(HEAD_BYTES)
    if head.startswith(LOCAL_SIGNATURE):
        return TORCH_ZIP, contents(file, read_torch_zip(file))
    if looks_like_torch_legacy(head):
        return TORCH_LEGACY, contents(file, read_torch_legacy(file))
    if looks_like_safetensors(head):
        return SAFETENSORS, read_safetensors(file)
    foreign = foreign_bytes(file, head)
    if foreign is not None:
        raise foreign.error(file)
    raise file.unsupported(
        "it is no kind of checkpoint that is known here",
        found=f"{file.size:,} bytes that begin with {head[:8].hex(' ')}",
        expected="a file that torch.save wrote, or a safetensors file",
        hint=DOWNLOAD_AGAIN,
    )


def _joined(
    folder: Path,
    files: tuple[Path, ...],
    parts: list[tuple[str, Contents]],
    places: dict[str, str],
) -> Contents:
    """The shards as one, each tensor where the index says and nowhere else."""
    tensors: dict[str, StoredTensor] = {}
    for file, (_, part) in zip(files, parts, strict=True):
        for name, tensor in part.tensors.items():
            if places.get(name) != file.name:
                raise CorruptCheckpoint(
                    f"{folder}: the index does not say that {brief(name)} is in {file.name}",
                    found=brief(places.get(name)),
                    expected=file.name,
                    hint="the files come from different models or versions: download all again",
                )
            tensors[name] = tensor
    missing = [name for name in places if name not in tensors]
    if missing:
        raise CorruptCheckpoint(
            f"{folder}: tensors are not in the files that the index gives for them",
            found=f"{len(tensors)} of {len(places)} tensors",
            expected=name_list(map(brief, missing)),
            hint="the files come from different models or versions: download all again",
        )
    return Contents(tensors, {}, None, parts[0][1].metadata)
