"""Weights by name: a file, a folder, or a repository on the Hugging Face Hub.

    resolve("model.safetensors")            a file
    resolve("packages/contentvec")          a folder made by `mlx-contentvec package`
    resolve("someone/contentvec-mlx")       a repository, downloaded once into the Hub's cache

Whatever states a SHA-256 for the weights is held to it: the ``SHA256SUMS`` that
a package ships, and, for a download, the hash the Hub names its blob by. A file
is hashed once; a note of its size, inode and modification time in the cache
saves the second time.

Where files come from and go to (``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``,
``HF_HUB_CACHE``), and which token is used, is huggingface_hub's own business.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import HubError, name_list
from .files import (
    expand_home,
    is_file,
    is_folder,
    is_there,
    open_regular,
    read_regular,
    similar_name,
)
from .first_release import HF_REPO_ID, HF_WEIGHTS_FILE
from .hub_client import PAPER_BYTES, download, explain, plain_words, require_plausible_file
from .json_text import JsonError, read_object

CHECKSUMS = "SHA256SUMS"
CONFIG = "config.json"
#: the weights of a repository: the name of today, then the one that earlier
#: releases used and that their users still ask for
WEIGHTS = ("model.safetensors", HF_WEIGHTS_FILE)

#: what transformers calls the weights of a folder that are not safetensors
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: number formats that any weights can be turned into after loading
FLOATS = ("float32", "float16", "bfloat16")

#: bytes of a list of checksums: a hundred for each file of a folder
_CHECKSUMS_BYTES = 1 << 20
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")
#: the folder of a repository in the client's cache
_CACHED = re.compile(r"models--(.+?)--(.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve(name: str | Path, revision: str | None = None, dtype: str | None = None) -> Path:
    """A local, verified weights file for ``name``.

    name:     a safetensors file, a folder that holds one, or ``owner/name`` on the Hub
    revision: branch, tag or commit of the repository (the Hub only)
    dtype:    prefer the variant of this name (``float16``, ``q8``, ...) that the
              package's config.json lists; a float type it does not list is left to
              the caller, who gets the main file

    Raises HubError when there is nothing of that name, when the Hub cannot give
    it, or when the file is not the one whose hash is stated.
    """
    path = expand_home(name)
    if not is_file(path):
        return open_package(name, revision).weights(dtype)
    if dtype is not None and dtype not in FLOATS:
        raise HubError(
            f"{path} is one file and has no {dtype} variant",
            hint=f"load the folder it is in, or make it with\nmlx-contentvec convert SOURCE "
            f"--dtype {dtype}",
        )
    return _verified_file(path)


def resolve_pretrained(
    name: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    *,
    repo_id: str | None = None,
    filename: str | None = None,
    weights_path: str | Path | None = None,
) -> Path:
    """The weights file that the arguments of ``ContentvecModel.from_pretrained`` name.

    name, revision, dtype: see :func:`resolve`; the first release's repository by default
    repo_id:      the first release's word for ``name``
    filename:     one file of the repository or folder; where that release had it, a
                  second positional argument that ends in ``.safetensors``, it is
                  taken for that
    weights_path: a file of this machine, in place of all these; that release's third
                  positional argument, before which it did not read the others

    Raises HubError as :func:`resolve` does, and for arguments that contradict each other.
    """
    if dtype is not None and os.fspath(dtype).endswith(".safetensors"):
        return resolve(Path(dtype))
    if revision is not None and revision.endswith(".safetensors"):
        revision, filename = None, filename or revision
    if weights_path is not None:
        if given := [repr(x) for x in (name, revision, repo_id, filename) if x is not None]:
            raise HubError(
                "weights_path names the file already",
                found=f"weights_path={str(weights_path)!r} beside {', '.join(given)}",
                hint="give one of them",
            )
        return resolve(Path(weights_path), dtype=dtype)
    if name is not None and repo_id is not None and str(name) != repo_id:
        raise HubError(
            "two different sources are named",
            found=f"{str(name)!r} and repo_id={repo_id!r}",
            hint="give one of them",
        )
    source = name or repo_id or HF_REPO_ID
    if filename is None:
        return resolve(source, revision, dtype)
    if dtype is not None and dtype not in FLOATS:
        raise HubError(
            f"{filename} is one file and has no {dtype} variant",
            hint="leave filename out to get the variant that the repository lists",
        )
    return open_package(source, revision).file(filename)


def open_package(name: str | Path, revision: str | None = None) -> PackageFiles:
    """The files of a folder, or of a repository at one commit; see :func:`resolve`.

    Raises HubError when there is nothing of that name.
    """
    path = expand_home(name)
    if is_folder(path):
        return FolderFiles(path)
    if is_file(path):
        raise HubError(
            f"{path} is one file, without the evidence that a package has beside its weights",
            expected="a folder made by `mlx-contentvec package`, or a repository like owner/name",
            hint=f"mlx-contentvec inspect {path}\nsays what the file is",
        )
    if is_there(path):
        raise HubError(f"{path} is not a regular file", expected="a .safetensors file or a folder")
    if isinstance(name, Path) or not is_repo_id(name):
        raise HubError(
            f"there are no weights at {name}",
            expected="a .safetensors file, a folder with one, or a repository like owner/name",
            hint=similar_name(path)
            or "a local path is taken from the current folder: " + str(Path.cwd()),
        )
    return RepositoryFiles(name, revision)


def is_repo_id(name: str) -> bool:
    """Whether ``name`` can be that of a repository on the Hub: ``owner/name``."""
    return _REPO_ID.fullmatch(name) is not None and "--" not in name and ".." not in name


def read_checksums(path: Path) -> dict[str, str]:
    """File name -> SHA-256 (hex), from a ``SHA256SUMS`` as sha256sum writes it.

    Raises HubError on a line that is not one, on a file that is named twice, and where
    the file cannot be read or is no list of any folder's files.
    """

    def refuse(found: str) -> HubError:
        return HubError(
            f"{path} is not a list of checksums",
            found=found,
            expected="lines of a SHA-256, two spaces and a file name",
        )

    try:
        raw = read_regular(path, _CHECKSUMS_BYTES + 1)
        lines = raw.decode("utf-8").splitlines()
    except OSError as error:
        raise HubError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise refuse(str(error)) from None
    if len(raw) > _CHECKSUMS_BYTES:
        raise refuse(f"more than {_CHECKSUMS_BYTES:,} bytes")
    sums: dict[str, str] = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator or not _SHA256.fullmatch(digest) or not name or name in sums:
            raise refuse(f"the line {line[:80]!r}")
        sums[name] = digest
    return sums


def require_plausible_size(path: Path) -> None:
    """Raise HubError for a file that is no weights and takes long to be hashed."""
    size = path.stat().st_size
    if path.suffix != ".safetensors" and size > PAPER_BYTES:
        raise HubError(
            f"{path} is too large for what it should be",
            found=f"{size:,} bytes",
            expected=f"at most {PAPER_BYTES:,}",
        )


def sha256_of(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 (hex) of a file, read in pieces; ``advance`` is called with the size of each.

    Raises HubError if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            piece = memoryview(bytearray(1 << 20))
            while count := file.readinto(piece):
                digest.update(piece[:count])
                if advance is not None:
                    advance(count)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HubError(f"{path} cannot be read: {reason}") from error
    return digest.hexdigest()


def how_to_convert(source: str | os.PathLike[str]) -> str:
    """The command that makes a file of this project out of a checkpoint or a folder.

    Of a file in the client's cache it names the repository that the file is from.
    """
    path = Path(source)
    *_, cached, snapshots, _, _ = ("", "", "", "", *path.parts)
    if snapshots == "snapshots" and (repo := _CACHED.fullmatch(cached)) is not None:
        return _how_to_convert_repository(repo[1] + "/" + repo[2])
    if path.suffix in (".bin", ".safetensors") and is_file(path.parent / CONFIG):
        path = path.parent  # what transformers keeps beside its weights is needed as well
    source = os.fspath(path)
    output = f"{path.absolute().stem}-mlx.safetensors"
    return f"mlx-contentvec convert {shlex.quote(source)} -o {shlex.quote(output)}"


def _how_to_convert_repository(repo_id: str) -> str:
    output = f"{repo_id.partition('/')[2]}-mlx.safetensors"
    return f"mlx-contentvec convert {shlex.quote(repo_id)} -o {shlex.quote(output)}"


# the files of a package ---------------------------------------------------------


class _Absent(HubError):
    """A package does not have what was asked for, perhaps because the Hub was not reached."""


class PackageFiles(ABC):
    """Finds the files of a package and holds them to the hashes it states."""

    def __init__(self, where: str) -> None:
        self.where = where

    @abstractmethod
    def find(self, name: str) -> Path | None:
        """A file of the package, unverified; None if there is none of that name."""

    def file(self, name: str) -> Path:
        """A file of the package. Raises HubError if it is missing or not the one stated."""
        path = self.find(name)
        if path is None:
            raise _Absent(
                f"{self.where} has no {name}",
                hint="check the name; what proves weights is only in a package that "
                "`mlx-contentvec package` made",
            )
        return _verified(path, name, self.checksums())

    def missing(self, *names: str) -> list[str]:
        """Which of these files it lacks. Raises HubError where that cannot be told."""
        return [name for name in names if self.find(name) is None]

    def weights(self, dtype: str | None = None) -> Path:
        """The weights file, or the variant called ``dtype``; see :func:`resolve`."""
        names = WEIGHTS if dtype is None else self._variant(dtype)
        for name in names:
            path = self.find(name)
            if path is not None:
                return _verified(path, name, self.checksums())
        raise _Absent(
            f"{self.where} holds no MLX weights",
            expected=" or ".join(names),
            hint="a checkpoint is converted first:\n" + self.conversion(),
        )

    @abstractmethod
    def conversion(self) -> str:
        """The commands that make weights for MLX of what is there instead."""

    def checksums(self) -> dict[str, str] | None:
        """What SHA256SUMS states; None where there is none."""
        path = self.find(CHECKSUMS)
        return None if path is None else read_checksums(path)

    def config(self) -> dict[str, Any]:
        """config.json, or {} where there is none."""
        if self.find(CONFIG) is None:
            return {}
        path = self.file(CONFIG)
        try:
            return read_object(path)
        except JsonError as error:
            raise HubError(f"{path} is not what it should be", found=str(error)) from error

    def _variant(self, dtype: str) -> tuple[str, ...]:
        """The file of the variant called ``dtype``, or the main names if those will do."""
        config = self.config()
        variants = config.get("variants", {})
        variants = variants if isinstance(variants, dict) else {}
        row = variants.get(dtype)
        file = row.get("file") if isinstance(row, dict) else None
        if isinstance(file, str) and Path(file).name == file:
            return (file,)
        if dtype in FLOATS or dtype == config.get("dtype"):
            return WEIGHTS
        raise _Absent(
            f"there are no {dtype} weights in {self.where}",
            found=name_list([str(config.get("dtype", "float32")), *variants]),
            hint="make them with\nmlx-contentvec convert SOURCE -o FILE.safetensors --dtype "
            + dtype,
        )


class FolderFiles(PackageFiles):
    """A folder on this machine."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def find(self, name: str) -> Path | None:
        """See :meth:`PackageFiles.find`."""
        path = self.folder / name
        return path if is_file(path) else None

    def weights(self, dtype: str | None = None) -> Path:
        """See :meth:`PackageFiles.weights`; also the only converted file, whatever its name."""
        # what has a configuration beside it is a package, or transformers' folder
        if not any(map(self.find, (*WEIGHTS, CONFIG))) and dtype in (None, *FLOATS):
            names = [path.name for path in sorted(self.folder.glob("[!.]*.safetensors"))]
            names = [name for name in names if not name.endswith("recording.safetensors")]
            if len(names) == 1:
                return self.file(names[0])
            if names:
                raise HubError(
                    f"{self.where} holds several files of weights",
                    found=name_list(names),
                    expected=" or ".join(WEIGHTS) + ", or one file",
                    hint="name the file itself",
                )
        return super().weights(dtype)

    def conversion(self) -> str:
        """See :meth:`PackageFiles.conversion`."""
        if any(is_file(self.folder / name) for name in TORCH_WEIGHTS):
            return how_to_convert(self.folder)
        checkpoints = sorted(self.folder.glob("*.pt"))
        return how_to_convert(checkpoints[0] if len(checkpoints) == 1 else "hubert_base.pt")


class RepositoryFiles(PackageFiles):
    """A repository on the Hub, at the commit of the first file that is asked for."""

    def __init__(self, repo_id: str, revision: str | None = None) -> None:
        super().__init__(repo_id)
        self.revision = revision
        #: why the Hub did not answer; from then on only the cache is looked at
        self._unreachable: Exception | None = None
        #: whether it answered before; what is in the cache is found without asking it
        self._answered = False

    def conversion(self) -> str:
        """See :meth:`PackageFiles.conversion`."""
        return _how_to_convert_repository(self.where)

    def weights(self, dtype: str | None = None) -> Path:
        """See :meth:`PackageFiles.weights`."""
        with self._or_why_not():
            return super().weights(dtype)

    def file(self, name: str) -> Path:
        """See :meth:`PackageFiles.file`."""
        with self._or_why_not():
            return super().file(name)

    def checksums(self) -> dict[str, str] | None:
        """See :meth:`PackageFiles.checksums`. Raises HubError if the Hub is lost before the answer.

        What was found in the cache alone is held to the list that is there, if there is one.
        """
        reached = self._answered and self._unreachable is None
        sums = super().checksums()
        if sums is None and reached and self._unreachable is not None:
            raise _Absent(f"{CHECKSUMS} of {self.where} cannot be downloaded")
        return sums

    def missing(self, *names: str) -> list[str]:
        """See :meth:`PackageFiles.missing`."""
        lacks = super().missing(*names)
        if lacks and self._unreachable is not None:
            with self._or_why_not():
                raise _Absent(f"{name_list(lacks)} of {self.where} is not in the cache")
        return lacks

    def find(self, name: str) -> Path | None:
        """A file in the Hub's cache, downloaded if need be."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        with plain_words(self.where, "download"):
            try:
                if self._unreachable is None:
                    try:
                        if require_plausible_file(self.where, name, self.revision):
                            self._answered = True
                    except (HubError, EntryNotFoundError):
                        self._answered = True
                        raise
                    except Exception as unreachable:
                        # the client would ask again for minutes, and then look into the cache
                        self._unreachable = unreachable
                path = download(
                    self.where, name, self.revision, cached=self._unreachable is not None
                )
            except LocalEntryNotFoundError as unreachable:
                self._unreachable = self._unreachable or unreachable
                return None
            except EntryNotFoundError:
                return None
        # the other files must come from the same commit, whatever happens to the branch
        self.revision = path.parents[len(Path(name).parts) - 1].name
        return _as_named(path)

    @contextmanager
    def _or_why_not(self) -> Iterator[None]:
        """If nothing of use is in the cache, why the Hub was not reached says more."""
        try:
            yield
        except _Absent:
            if self._unreachable is not None:
                explained = explain(self._unreachable, self.where, "download")
                if explained is not None:
                    raise explained from self._unreachable
            raise


def _verified_file(path: Path) -> Path:
    """``path``, held to the SHA256SUMS beside it if that lists it."""
    sums = path.parent / CHECKSUMS
    if is_file(sums):
        stated = read_checksums(sums)
        if path.name in stated:
            return _verified(path, path.name, stated)
    return path


def _verified(path: Path, name: str, sums: dict[str, str] | None) -> Path:
    if sums is None:
        return path
    if name not in sums:
        # the list is at the root of the package, whatever folder of it the file is in
        root = path.parents[min(len(Path(name).parts), len(path.parents)) - 1]
        raise HubError(
            f"{root / CHECKSUMS} states no hash for {name}",
            found=name_list(sums),
            hint="the folder is not as it was made: make or download it again",
        )
    require_plausible_size(path)
    if not _is_known_good(path, sums[name]):
        digest = sha256_of(path)
        if digest != sums[name]:
            raise HubError(
                f"{path} is not the file that {CHECKSUMS} describes",
                found=f"sha256 {digest} ({path.stat().st_size:,} bytes)",
                expected=f"sha256 {sums[name]}",
                hint="it was changed or damaged after it was made: make or download it again",
            )
        _note_good(path, digest)
    return path


def _as_named(path: Path) -> Path:
    """A file of the Hub's cache, held to the hash its blob is named by.

    The blob of a large file is named by its SHA-256 and of a small one by its
    git object id. The client checks sizes only.
    """
    blob = path.resolve()
    if not _SHA256.fullmatch(blob.name) or _is_known_good(blob, blob.name):
        return path
    digest = sha256_of(blob)
    if digest != blob.name:
        fate = "was thrown away"
        hint = (
            "run the same again; if it fails again, something between here and the Hub\n"
            "changes what it passes on"
        )
        # out of the cache: left there it would be found again, and refused again
        try:
            blob.unlink(missing_ok=True)  # another process may have done it
            path.unlink(missing_ok=True)
        except OSError as error:
            fate = f"cannot be removed: {error.strerror}"
            hint = f"remove {blob}"
        raise HubError(
            f"the download of {path.name} is damaged, and {fate}",
            found=f"sha256 {digest}",
            expected=f"sha256 {blob.name}",
            hint=hint,
        )
    _note_good(blob, digest)
    return path


# what was hashed before --------------------------------------------------------


def _note_for(path: Path, digest: str) -> Path:
    from huggingface_hub import cached_assets_path, constants

    real = path.resolve()
    stat = real.stat()
    about = f"{real}|{stat.st_dev}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}|{digest}"
    notes = cached_assets_path(
        library_name="mlx-contentvec",
        namespace="verified",
        subfolder="sha256",
        assets_dir=constants.HF_ASSETS_CACHE,
    )
    return notes / hashlib.sha256(os.fsencode(about)).hexdigest()


def _is_known_good(path: Path, digest: str) -> bool:
    try:
        return is_file(_note_for(path, digest))
    except (OSError, ValueError):  # the client raises ValueError for a file in the folder's place
        return False


def _note_good(path: Path, digest: str) -> None:
    try:
        _note_for(path, digest).touch()
    except (OSError, ValueError):
        return  # a cache that cannot be written costs time, nothing else
