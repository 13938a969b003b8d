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

import errno
import hashlib
import inspect
import json
import os
import re
import shlex
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ContentvecError, HubError, name_list
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
from .json_text import JsonError, read_object

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

CHECKSUMS = "SHA256SUMS"
CONFIG = "config.json"
#: the weights of a repository: the name of today, then the one that earlier
#: releases used and that their users still ask for
WEIGHTS = ("model.safetensors", HF_WEIGHTS_FILE)

#: what transformers calls the weights of a folder that are not safetensors
TORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: number formats that any weights can be turned into after loading
FLOATS = ("float32", "float16", "bfloat16")

#: bytes of a file that describes weights: a report, a page, a plot
PAPER_BYTES = 1 << 26
#: four times those of the largest HuBERT, a billion parameters in float32
_WEIGHTS_BYTES = 1 << 34
_WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".bin", ".npz")
#: what the Hub names blobs and commits by
_ETAG = re.compile(r"[0-9a-fA-F]{32,64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: bytes of a list of checksums: a hundred for each file of a folder
_CHECKSUMS_BYTES = 1 << 20
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")
#: the folder of a repository in the client's cache
_CACHED = re.compile(r"models--(.+?)--(.+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"hf_\w+")
#: top-level modules whose exceptions mean that the network did not deliver
_NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "ssl", "socket"}
#: the client, which reads the headers of answers itself
_CLIENT = {"huggingface_hub", *_NETWORK}
#: the system's words for that, where Python has no exception of its own for them
_LOST = {
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.EHOSTUNREACH),
    getattr(errno, "EHOSTDOWN", errno.EHOSTUNREACH),  # Windows has no such number
}
#: why a file cannot be written, also where the system does not say which
_NO_WRITING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST),
}
#: seconds that a server may have the client wait before it asks again
_PATIENCE = 900
#: times that a download may begin anew; the client does so for as long as anything arrives
MOST_TURNS = 5
#: what is raised where an answer is parsed -> what the answer was
_MALFORMED: dict[type[Exception], str] = {
    json.JSONDecodeError: "text that is not JSON",
    UnicodeDecodeError: "bytes that are no text",
    RecursionError: "lists in lists without end",
}


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


# what a server states ---------------------------------------------------------


def most_bytes(name: str) -> int:
    """What a file of this name in a repository may have."""
    return _WEIGHTS_BYTES if name.endswith(_WEIGHTS_SUFFIXES) else PAPER_BYTES


def require_plausible_file(repo_id: str, name: str, revision: str | None = None) -> bool:
    """Look at what the Hub states of a file, before any of it is used.

    returns: whether the Hub was asked. It is not offline, nor for a file of a commit that is
    in the cache.

    The client makes paths in its cache of the ETag and the commit. Raises HubError for
    what would lead out of it, and for a size that no such file has; otherwise what
    huggingface_hub raises.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cached = revision is not None and _COMMIT.fullmatch(revision) is not None
    if constants.HF_HUB_OFFLINE or (
        cached and isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)
    ):
        return False
    stated = get_hf_file_metadata(hf_hub_url(repo_id, name, revision=revision))
    require_plausible_metadata(repo_id, name, stated, most_bytes(name))
    return True


def require_plausible_metadata(repo_id: str, name: str, stated: HfFileMetadata, most: int) -> None:
    """Raise HubError if the ETag, the commit or the size that is stated of a file is none.

    most: bytes that such a file may have
    """
    for what, value, form in (
        ("ETag", stated.etag, _ETAG),
        ("commit", stated.commit_hash, _COMMIT),
    ):
        if value is None or not form.fullmatch(value):
            raise not_the_hub(
                f"{repo_id} cannot be downloaded",
                found=f"the {what} {value!r} of {name}",
                expected="hexadecimal digits",
            )
    if stated.size is None or stated.size < 0:
        size = "no size" if stated.size is None else f"the size {stated.size:,}"
        raise not_the_hub(
            f"{repo_id} cannot be downloaded",
            found=f"{size} of {name}",
            expected="a number of bytes",
        )
    if stated.size > most:
        raise HubError(
            f"{repo_id} cannot be downloaded: {name} is too large for what it should be",
            found=f"{stated.size:,} bytes",
            expected=f"at most {most:,}",
        )


def not_the_hub(problem: str, *, found: str, expected: str) -> HubError:
    """The error for an answer that the Hub does not give."""
    from huggingface_hub import constants

    return HubError(
        f"{problem}: what answers is not the Hub",
        found=found,
        expected=expected,
        hint=f"check HF_ENDPOINT, now {constants.ENDPOINT}",
    )


def download(repo_id: str, name: str, revision: str | None = None, *, cached: bool = False) -> Path:
    """A file in the Hub's cache, downloaded if need be, and no further than it may be long.

    cached: only look there. Raises what huggingface_hub raises, HubError for a file
    without end.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    most = most_bytes(name)

    class Bounded(tqdm):
        """The client's bar; it is told of every piece that arrives."""

        arrived = 0
        turns = 0

        def update(self, n: float | None = 1) -> bool | None:
            if n is not None and n < 0:  # it takes back what had arrived
                self.turns += 1
                require_few_turns(self.turns, repo_id, name)
            self.arrived += int(n or 0)
            if self.arrived > most:
                raise endless(repo_id, name, most)
            return super().update(n)  # type: ignore[no-any-return]

    bounds: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        bounds["tqdm_class"] = Bounded  # clients before 1.0 cannot be told
    return Path(
        hf_hub_download(repo_id, name, revision=revision, local_files_only=cached, **bounds)
    )


def require_few_turns(turns: int, repo_id: str, name: str) -> None:
    """Raise HubError if a download has begun anew so often that it will never end."""
    if turns > MOST_TURNS:
        raise HubError(
            f"cannot download {name} from {repo_id}: the connection always breaks off",
            found=f"{turns} turns, each from the begin of the file",
            expected="a server that goes on where it broke off",
            hint="run the same again later, or from another network",
        )


def endless(repo_id: str, name: str, most: int) -> HubError:
    """The error for a download that goes on past its end."""
    return HubError(
        f"cannot download {name} from {repo_id}: it does not end",
        found=f"more than {most:,} bytes",
        hint="what answers is not the Hub, or something between changes what it passes on",
    )


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


# the client's errors, in plain words ------------------------------------------


@contextmanager
def plain_words(repo_id: str, doing: str, most: int | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises while ``doing`` something into a HubError.

    most: bytes that an answer may have, where the client takes it whole into memory
    """
    try:
        _require_no_pipes(repo_id, doing)
        with _watched(repo_id, doing, most):
            yield
    except ContentvecError:
        raise
    except Exception as error:
        explained = explain(error, repo_id, doing)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def _watched(repo_id: str, doing: str, most: int | None) -> Iterator[None]:
    """Look at answers before the client does, which waits for as long as a server says.

    Clients before 1.0 cannot be told.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    def look(answer: Any) -> None:
        stated = f"{answer.headers.get('Retry-After')} {answer.headers.get('RateLimit')}"
        wait = max(re.findall(r"\d+", stated), key=float, default="0")
        if answer.status_code == 429 and float(wait) > _PATIENCE:
            raise HubError(
                f"cannot {doing} {repo_id}: too many requests",
                found=f"HTTP 429, to be asked again after {wait[:20]} seconds",
                expected=f"at most {_PATIENCE} seconds",
                hint="run the same again after that time",
            )
        if most is not None:
            answer.iter_bytes = bounded(answer.iter_bytes, most)

    def bounded(pieces: Callable[..., Iterator[bytes]], most: int) -> Any:
        def read(*arguments: Any, **options: Any) -> Iterator[bytes]:
            arrived = 0
            for piece in pieces(*arguments, **options):
                arrived += len(piece)
                if arrived > most:
                    raise endless(repo_id, "the description", most)
                yield piece

        return read

    session: Any = get_session()
    hooks = getattr(session, "event_hooks", None)
    if hooks is None:
        yield
        return
    session.event_hooks = {**hooks, "response": [*hooks["response"], look]}
    try:
        yield
    finally:
        session.event_hooks = hooks


def explain(error: BaseException, repo_id: str, doing: str) -> HubError | None:
    """The HubError that says what ``error`` means; None if it is not of the Hub's making."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub_errors

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)

    def first(*kind: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kind)), None)

    # not every client wraps the answer in an error of its own, nor fills it in
    answer = next((e for e in chain if getattr(e, "response", None) is not None), None)
    if answer is not None:
        return _explain_answer(answer, repo_id, doing)
    if first(hub_errors.OfflineModeIsEnabled) or (
        constants.HF_HUB_OFFLINE and first(hub_errors.LocalEntryNotFoundError)
    ):
        return HubError(
            f"cannot {doing} {repo_id}: HF_HUB_OFFLINE is set, and it is not in the cache",
            found=f"the cache {constants.HF_HUB_CACHE}",
            hint="run once without HF_HUB_OFFLINE, or point HF_HOME to the cache that has it",
        )
    if first(UnicodeDecodeError) and (path := _file_without_text(repo_id)) is not None:
        return HubError(
            f"cannot {doing} {repo_id}: {path} holds no text",
            hint=f"the Hub's client wrote it; remove it with\nrm {shlex.quote(str(path))}\n"
            "and run the same again (after `hf auth login`, if it is the token)",
        )
    malformed = next((e for e in chain if isinstance(e, tuple(_MALFORMED))), None)
    if malformed is not None and _raised_in(malformed, _NETWORK):
        found = next(text for kind, text in _MALFORMED.items() if isinstance(malformed, kind))
        return not_the_hub(f"cannot {doing} {repo_id}", found=found, expected="JSON")
    if first(hub_errors.HFValidationError):
        return HubError(f"{repo_id!r} is no repository name", expected="owner/name")
    if isinstance(error, ImportError) and _raised_in(error, _NETWORK):
        return HubError(
            f"cannot {doing} {repo_id}: what the proxy of this session needs is not installed",
            found=str(error),
            hint="install it, or unset ALL_PROXY and HTTPS_PROXY, or name an http:// proxy there",
        )
    if isinstance(error, (ValueError, OverflowError)) and _raised_in(error, _CLIENT):
        # such as a Content-Range without a number, or a branch in the cache that is no commit
        return HubError(
            f"cannot {doing} {repo_id}: the Hub's client makes nothing of what it was given",
            found=_scrub(str(error)),
            expected="answers as the Hub gives them, or files of its cache",
            hint=f"check HF_ENDPOINT, now {constants.ENDPOINT},\nand what is kept in "
            f"{constants.HF_HUB_CACHE}",
        )
    lost = next((e for e in chain if type(e).__module__.split(".")[0] in _NETWORK), None)
    if lost is None:
        lost = next((e for e in chain if isinstance(e, OSError) and e.errno in _LOST), None)
    if lost is not None or first(ConnectionError, TimeoutError):
        reason = _scrub(str(lost or error)) or type(lost or error).__name__
        return HubError(
            f"cannot {doing} {repo_id}: the connection to {constants.ENDPOINT} failed",
            found=reason.splitlines()[0],
            hint=f"check the network ({_addresses()}) and run the same again:\n"
            "what has arrived is kept",
        )
    if first(hub_errors.LocalEntryNotFoundError):
        return HubError(
            f"cannot {doing} {repo_id}: the Hub does not answer, and it is not in the cache",
            hint="check the network and run the same again",
        )
    if any("Consistency check failed" in str(e) for e in chain if isinstance(e, OSError)):
        return HubError(
            f"cannot {doing} {repo_id}: the connection closed before all had arrived",
            hint="run the same again",
        )
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _NO_WRITING):
        found = str(error.filename or constants.HF_HUB_CACHE)
        return HubError(
            f"cannot {doing} {repo_id}: {error.strerror}",
            found=found,
            hint=_hint_for_folder(found),
        )
    return None


def _addresses() -> str:
    """The variables that say where the client connects to, as a part of a hint."""
    proxies = (f"{name}_PROXY" for name in ("HTTPS", "HTTP", "ALL"))
    names = (name for proxy in proxies for name in (proxy, proxy.lower()) if os.environ.get(name))
    return " or ".join(["or HF_ENDPOINT", *names])


def _hint_for_folder(path: str) -> str | None:
    """Which variable says where the client keeps the file at ``path``, if that is its own."""
    from huggingface_hub import constants

    of_cache = [name for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if name in os.environ]
    for variable, folder in (
        (next(iter(of_cache), "HF_HOME"), constants.HF_HUB_CACHE),
        ("HF_HOME", constants.HF_HOME),
    ):
        if Path(path).resolve().is_relative_to(Path(folder).resolve()):
            return (
                f"the Hub's client keeps its files in {folder}: {variable} names another\n"
                "folder, which must be writable and have room"
            )
    return None


def _texts(repo_id: str) -> list[Path]:
    """What the client reads as text: the token, and the commits of branches."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "refs")
    return [Path(constants.HF_TOKEN_PATH), *sorted(refs.rglob("*"))]


def _require_no_pipes(repo_id: str, doing: str) -> None:
    """Raise HubError if a pipe or a device is where the client would wait for a text."""
    for path in _texts(repo_id):
        if is_there(path) and not is_file(path) and not is_folder(path):
            raise HubError(
                f"cannot {doing} {repo_id}: {path} is no file",
                found="a pipe, a device or a socket",
                expected="a file of the Hub's client, or none",
                hint=f"remove it: rm {shlex.quote(str(path))}",
            )


def _file_without_text(repo_id: str) -> Path | None:
    """A file that the client reads as text and that is none."""
    for path in _texts(repo_id):
        try:
            read_regular(path, PAPER_BYTES).decode()
        except UnicodeDecodeError:
            return path
        except (OSError, ValueError):
            continue
    return None


def is_of_another_form(error: Exception) -> bool:
    """Whether the client raised ``error`` while it made its objects of the JSON of an answer."""
    from huggingface_hub.errors import HFValidationError

    made = _raised_in(error, {"huggingface_hub"}) and not _raised_in(error, _NETWORK)
    return made and not isinstance(error, HFValidationError)


def _raised_in(error: BaseException, modules: set[str]) -> bool:
    """Whether a function of one of these top-level modules was being run."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").split(".")[0] in modules for frame in frames)


def _explain_answer(answer: Any, repo_id: str, doing: str) -> HubError:
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub_errors

    status = answer.response.status_code
    said = _scrub(str(getattr(answer, "server_message", None) or "")).strip()
    found = f"HTTP {status}" + (f": {said.splitlines()[0]}" if said else "")
    has_token = get_token() is not None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"

    def error(problem: str, hint: str) -> HubError:
        return HubError(f"cannot {doing} {repo_id}: {problem}", found=found, hint=hint)

    if isinstance(answer, hub_errors.GatedRepoError):
        return error(
            "its owner gives access on request",
            f"ask for it at {constants.ENDPOINT}/{repo_id}, then {log_in}",
        )
    if isinstance(answer, hub_errors.RevisionNotFoundError):
        return error("it has no such revision", "name a branch, a tag or a full commit id")
    if isinstance(answer, hub_errors.EntryNotFoundError):
        return error(
            "it does not hold the file that was asked for",
            "is it a repository of MLX ContentVec weights? Others are converted first:\n"
            "mlx-contentvec convert SOURCE -o FILE.safetensors",
        )
    if isinstance(answer, hub_errors.RepositoryNotFoundError):
        return error(
            "there is no such repository, or it is private and this token may not see it"
            if has_token
            else "there is no such repository, or it is private and no token was found",
            "check the name" + ("" if has_token else f"; for a private one, {log_in}"),
        )
    if status == 401:
        return error(
            "the Hub does not accept the token" if has_token else "the Hub asks for a token",
            f"make a token at {constants.ENDPOINT}/settings/tokens, then {log_in}",
        )
    if status == 403:
        access = "write access to" if doing.startswith("publish") else "access to the files of"
        return error(
            "the token may not do that" if has_token else "the Hub asks for a token",
            f"use a token with {access} that user or organisation:\n"
            f"{constants.ENDPOINT}/settings/tokens",
        )
    if status in (409, 412):
        return error(
            "somebody else changed it at the same time", "look at it, then run the same again"
        )
    if status == 429:
        return error("too many requests", "wait a few minutes and run the same again")
    if status >= 500:
        return error(
            "the Hub has a fault of its own",
            "wait a little and run the same again: what has arrived is kept\n"
            "(https://status.huggingface.co)",
        )
    return error("the Hub refuses", f"see what it says above; HF_ENDPOINT is {constants.ENDPOINT}")


def _scrub(text: str) -> str:
    """``text`` without anything that looks like a token."""
    return _TOKEN.sub("hf_...", text)
