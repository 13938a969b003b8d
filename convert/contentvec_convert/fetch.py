"""Download a source checkpoint, known or not, from where its publisher keeps it.

The bytes go to ``NAME.part``. An interrupted download goes on from there, and
only a file with the size and the checksums of its row in the table of known
files gets its final name: what is called ``hubert_base.pt`` is that file. Where
the table has no size, no checksum, or no row, these are the size and the SHA-256
that the Hub states.

The address, the token and the cache are huggingface_hub's: ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``, ``HF_HUB_CACHE`` and the login hold here as well. A file that
is in the cache already is copied from there. (The client's own downloader keeps
no partial file between two runs, which is why the ``.part`` is kept here.)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from mlx_contentvec import hub_client
from mlx_contentvec.errors import (
    HubError,
    IdentityError,
    OutputError,
    did_you_mean,
    name_list,
    printable,
)
from mlx_contentvec.files import (
    Draft,
    check_target,
    explained,
    is_at,
    is_folder,
    is_there,
    lock_now,
    open_own,
    place,
    read_regular,
    sync,
)

from .diagnosis import accept
from .identity import Identification, Identity, name_of
from .known_files import KNOWN_FILES, KnownFile
from .repository import (
    Fetched,
    find_model,
    folder_of,
    is_address,
    origin_of,
    repository_of,
    small_file,
    stated,
    with_stated_size,
)

#: called with the bytes checked so far and the bytes there are
Checked = Callable[[int, int], None]

#: the status of a server whose file ends before the place to go on from
_NO_SUCH_RANGE = 416
#: what every usual file system allows a name
_NAME_BYTES = 255


def known_file(key: str) -> KnownFile:
    """The downloadable file with this key.

    Raises HubError when there is no such row, or none that can be downloaded.
    """
    row = next((row for row in KNOWN_FILES if row.key == key), None)
    fetchable = [row.key for row in KNOWN_FILES if row.fetchable]
    if row is None:
        raise HubError(
            f"no known file is called {printable(key)}",
            expected=f"{name_list(fetchable, limit=len(fetchable))}, or owner/name on the Hub",
            hint=did_you_mean(key, fetchable),
        )
    if not row.fetchable:
        raise HubError(
            f"{key} cannot be fetched: no checksum of it is known here",
            expected=name_list(fetchable, limit=len(fetchable)),
            hint=f"download it by hand from {row.home}, then convert it with --allow-unknown",
        )
    return row


def fetch(
    name: str,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
    progress: Checked | None = None,
) -> Fetched:
    """Download a known file by its key, or the model of a repository by its address.

    name:     a key of the table, or ``owner/name``, or ``owner/name/path`` for a folder or
              a file of a repository
    output:   file to write, by default the file's own name in the current folder;
              of a Hugging Face model, the folder to write, by default called as at its home
    revision: branch, tag or commit of a repository
    force:    replace another file that is there
    progress: called with the bytes checked and the bytes there are; the download draws
              its own bar

    Raises HubError when the download fails, IdentityError when what arrived is
    not the file, OutputError when it cannot be written.
    """
    row = None if is_address(name) else known_file(name)  # no key is an address
    if row is None:
        rows = find_model(name, revision)
    elif revision is not None:
        raise HubError(
            f"{name} is the name of one known file, and has no revisions",
            hint=f"give the address of its repository: {repository_of(row)}",
        )
    elif row.verifiable:
        rows = (row,)
    else:
        rows = find_model(repository_of(row)) if row.hub_path is None else (stated(row),)
    if rows[0].beside and output is None:
        output = folder_of(rows[0]) if row is None else row.key
    paths = [_target(file, output) for file in rows]
    identities = tuple(
        _fetch_file(file, path, force=force, progress=progress)
        for file, path in zip(rows, paths, strict=True)
    )
    return Fetched(
        path=paths[0].parent if rows[0].beside else paths[0],
        origin=origin_of(rows),
        sha256={identity.name: identity.sha256 for identity in identities},
        identities=identities,
        row=row,
    )


def _fetch_file(row: KnownFile, path: Path, *, force: bool, progress: Checked | None) -> Identity:
    """Download the file of a row with checksums to ``path``; its proven identity."""
    if is_there(path):
        there = _identity(path, progress)
        right = row.is_file(there.size, there.md5, there.sha256)
        if not right and not force:
            raise OutputError(
                f"{path} exists, and is not {row.key}",
                found=f"sha256 {there.sha256} ({there.size:,} bytes)",
                expected=f"sha256 {row.sha256}",
                hint="give another --output, or --force to replace it",
            )
        if right:
            _write_beside(_read_beside(row, path.parent, force=force))
            return there
    part = _part_of(path)
    with explained(part):
        file = os.fdopen(open_own(part), "r+b")
    with _closed_quietly(file):
        if not lock_now(file.fileno()):
            raise OutputError(
                f"another process is downloading {path}",
                hint="wait for it, or give another --output",
            )
        # one that was locked until now has placed its part: the file is no part any more
        if not is_at(part, file.fileno()):
            raise OutputError(
                f"another process was downloading {path} until now", hint="run the same again"
            )
        try:
            if row.size is None and _in_cache(row) is None:
                row = with_stated_size(row)
            check_target(path, force=force, needed=(row.size or 0) - _size(file))
            # what is wrong with the small files is known before the long download
            beside = _read_beside(row, path.parent, force=force)
            identity = _obtain(row, part, file, progress)
            _write_beside(beside)
            with explained(path):
                place(part, path, force=force)
        finally:
            if not _size(file):
                part.unlink(missing_ok=True)
    name = name_of(path)  # it was identified as NAME.part
    return replace(identity, name=name, files=(replace(identity.files[0], name=name),))


def _part_of(path: Path) -> Path:
    """Where an unfinished download is kept: NAME.part, or shorter if that name is too long."""
    name = f"{path.name}.part"
    if len(os.fsencode(name)) > _NAME_BYTES:
        name = f"{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.part"
    return path.with_name(name)


@contextlib.contextmanager
def _closed_quietly(file: BinaryIO) -> Iterator[None]:
    """Close a file; what could not be written has been said by then."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _target(row: KnownFile, output: str | Path | None) -> Path:
    """Where the weights of ``row`` go; a row of several files goes into a folder of its own."""
    path = Path(output if output is not None else row.names[0])
    if row.beside or is_folder(path):
        path = path / row.names[0]
    folder = path.parent.parent if row.beside else path.parent
    if not is_folder(folder):
        raise OutputError(
            f"there is no folder {folder}",
            hint="make the folder first, or write to another one with -o",
        )
    with explained(path.parent):
        path.parent.mkdir(exist_ok=True)
    return path


def _read_beside(row: KnownFile, folder: Path, *, force: bool) -> dict[Path, bytes]:
    """The small files that belong to the weights, by their place in ``folder``, but for those
    that are there already. The client keeps them in its cache.

    Raises OutputError if another file is in the place of one, unless ``force``.
    """
    inside = PurePosixPath(row.hub_path or "").parent
    files: dict[Path, bytes] = {}
    for name in row.beside:
        found = small_file(repository_of(row), str(inside / name), row.revision).read_bytes()
        path = folder / name
        if is_there(path):
            if _holds(path, found):
                continue
            if not force:
                raise OutputError(
                    f"{path} exists, and is not that of {repository_of(row)}",
                    hint="give another --output, or --force to replace it",
                )
        check_target(path, force=force, needed=len(found))
        files[path] = found
    return files


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_regular(path, len(content) + 1) == content
    except (OSError, ValueError):  # it cannot be read, or is a folder, a pipe or a device
        return False


def _write_beside(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        with Draft(path) as draft:
            with draft.open() as copy, explained(path):
                copy.write(content)
            draft.sync()
            draft.rename(force=True)


def _obtain(row: KnownFile, part: Path, file: BinaryIO, progress: Checked | None) -> Identity:
    """Complete ``part`` and prove it; a file that is not the one is not kept.

    What the Hub's cache has is taken, and downloaded instead where it is damaged.
    """
    from huggingface_hub import constants

    cached = _in_cache(row)
    if cached is not None:
        try:
            # before it takes the place of what was downloaded
            _accept(row, cached, progress)
            _copy(cached, part, file)
            return _proven(row, part, file, progress)
        except IdentityError as error:
            if constants.HF_HUB_OFFLINE:
                raise IdentityError(
                    f"{cached} is not {row.key}",
                    found=error.found or error.problem,
                    expected=error.expected,
                    hint=f"remove {cached.resolve()}\nand run the same again without "
                    "HF_HUB_OFFLINE",
                ) from None
    return _downloaded(row, part, file, progress)


def _downloaded(row: KnownFile, part: Path, file: BinaryIO, progress: Checked | None) -> Identity:
    """Complete ``part`` from the Hub and prove it."""
    resumed = _size(file) > 0
    _download(row, part, file)
    try:
        return _proven(row, part, file, progress)
    except IdentityError as error:
        if resumed:  # the part may have been the beginning of something else
            return _downloaded(row, part, file, progress)
        raise IdentityError(
            f"what {repository_of(row)} served is not {row.key}, and was thrown away",
            found=error.found,
            expected=error.expected,
            hint="run the same again; if it fails again, the file has changed at its home, or\n"
            "something between here and there changes what it passes on",
        ) from None


def _copy(cached: Path, part: Path, file: BinaryIO) -> None:
    """Have a file of the Hub's cache in place of what ``file`` holds."""
    with explained(part):
        file.truncate(0)
        file.seek(0)
    try:
        with cached.open("rb") as copy:
            while piece := copy.read(1 << 20):
                with explained(part):
                    file.write(piece)
    except OSError as error:
        raise HubError(
            f"{cached} cannot be read: {error.strerror or error}",
            hint="run the same again; if it fails again, remove that file from the Hub's cache",
        ) from error


def _proven(row: KnownFile, part: Path, file: BinaryIO, progress: Checked | None) -> Identity:
    """What ``file`` is. Raises IdentityError if it is not that of ``row``, and empties it."""
    with explained(part):
        file.flush()
        sync(file.fileno())
    try:
        return _accept(row, part, progress)
    except IdentityError:
        file.truncate(0)
        raise


def _accept(row: KnownFile, path: Path, progress: Checked | None) -> Identity:
    """What the file at ``path`` is. Raises IdentityError if it is not that of ``row``."""
    identity = _identity(path, progress)
    accept(path, identity, expect_md5=row.md5, expect_sha256=row.sha256)
    return identity


def _download(row: KnownFile, part: Path, file: BinaryIO) -> None:
    """Go on from what ``file`` holds, again and again as long as something arrives."""
    if row.size is None:
        row = with_stated_size(row)
    size = row.size or 0
    bounded = _Bounded(file, row, part, size)
    while (before := _size(file)) != size:
        with explained(part):
            if before > size:
                file.truncate(0)
                before = 0
            file.seek(before)
        try:
            _download_from(row, bounded, before)
        except HubError as error:
            with explained(part):
                file.flush()
            answer = getattr(error.__cause__, "response", None)
            if before and getattr(answer, "status_code", None) == _NO_SUCH_RANGE:
                with explained(part):
                    file.truncate(0)
            elif _size(file) <= before:
                raise
        else:
            return


class _Bounded:
    """A file that takes no more than the known file has; the client writes all that is sent.

    What cannot be written is an OutputError: OSErrors of the client are those of its cache.
    """

    def __init__(self, file: BinaryIO, row: KnownFile, path: Path, most: int) -> None:
        self._file = file
        self._row = row
        self._path = path
        self._most = most
        self._turns = 0

    def truncate(self) -> int:
        """As the client does where it begins anew, from the file's position."""
        self._turns += 1
        hub_client.require_few_turns(
            self._turns, repository_of(self._row), self._row.hub_path or ""
        )
        return self._file.truncate()

    def write(self, piece: bytes) -> int:
        if self._file.tell() + len(piece) > self._most:
            # not a byte of it can be the file's
            self._file.truncate(0)
            raise hub_client.endless(repository_of(self._row), self._row.hub_path or "", self._most)
        with explained(self._path):
            return self._file.write(piece)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _download_from(row: KnownFile, file: _Bounded, done: int) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    repo_id = repository_of(row)
    with hub_client.plain_words(repo_id, f"download {row.hub_path} from"):
        http_get(
            hf_hub_url(repo_id, row.hub_path or "", revision=row.revision),
            cast(BinaryIO, file),
            resume_size=done,
            headers=build_hf_headers(library_name="mlx-contentvec"),
            displayed_filename=row.names[0],
        )


def _in_cache(row: KnownFile) -> Path | None:
    """The file in the Hub's cache, where other programs may have put it."""
    from huggingface_hub import try_to_load_from_cache

    repo_id, name = repository_of(row), row.hub_path or ""
    with hub_client.plain_words(repo_id, f"look for {name} of"):
        found = try_to_load_from_cache(repo_id, name, revision=row.revision)
    if not isinstance(found, str):
        return None
    path = Path(found)
    with contextlib.suppress(OSError):  # it may be gone by now
        if row.size in (None, path.stat().st_size):
            return path
    return None


def _identity(path: Path, progress: Checked | None) -> Identity:
    with Identification(path, progress=progress) as identification:
        return identification.result()
