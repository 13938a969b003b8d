"""Which audio files are meant, and where the features of each belong."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..audio import AUDIO_SUFFIXES
from ..errors import AudioError, OutputError, name_list, printable
from ..files import is_folder, is_there, similar_name

#: the folder of RVC's training experiment that holds features of this width.
#: Source: RVC, infer/modules/train/extract_feature_print.py
RVC_FOLDERS = {256: "3_feature256", 768: "3_feature768"}
#: the same of Applio, and the only width that it trains on.
#: Source: Applio, rvc/train/extract/extract.py and rvc/train/process/extract_index.py
APPLIO_FOLDER = "extracted"
APPLIO_WIDTH = 768


@dataclass(frozen=True)
class Source:
    """An audio file and where its features belong."""

    path: Path
    #: its place among the sources: below the folder it was found in
    place: PurePosixPath


# ---- sources ----------------------------------------------------------------------


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """The audio files that files, folders and glob patterns name, each once.

    A folder is searched through and through for the suffixes of audio files,
    hidden ones left out; a file named outright is taken whatever it is called.

    Raises AudioError for a path that is not there, a pattern or folder without
    audio files.
    """
    found: dict[Path, Source] = {}
    for path in paths:
        try:
            sources = _expanded(Path(path))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AudioError(
                f"{printable(str(path))[:300]} cannot be searched: {reason}"
            ) from error
        for source in sources:
            found.setdefault(source.path, source)
    return list(found.values())


def _expanded(path: Path) -> list[Source]:
    if is_folder(path):
        files = _audio_files(path)
        if files == [path.absolute()]:
            raise AudioError(
                f"the folder {printable(str(path))} cannot be read",
                hint="have its owner allow it: chmod u+rx",
            )
        sources = [Source(file, _place(file, path)) for file in files]
        if not sources:
            raise AudioError(
                f"there is no audio in {printable(str(path))}",
                expected=f"files called {name_list(sorted(AUDIO_SUFFIXES), limit=6)}",
            )
        return sources
    if is_there(path) or not _is_pattern(path):
        if not is_there(path) and not path.is_symlink():
            raise AudioError(
                f"there is no file or folder {printable(str(path))}", hint=similar_name(path)
            )
        return [Source(path.absolute(), PurePosixPath(path.name))]
    anchor = Path(*_before_pattern(path))
    pattern = path.relative_to(anchor)
    matches = sorted(anchor.glob(str(pattern)))
    if not any(part.startswith(".") for part in pattern.parts):
        matches = [match for match in matches if not _is_hidden(match.relative_to(anchor))]
    sources = []
    for match in matches:
        if is_folder(match):
            sources += [Source(file, _place(file, anchor)) for file in _audio_files(match)]
        elif match.suffix.lower() in AUDIO_SUFFIXES:
            sources.append(Source(match.absolute(), _place(match, anchor)))
    if not sources:
        raise AudioError(f"no audio file matches {printable(str(path))}")
    return sources


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_pattern(path: Path) -> bool:
    return any(character in str(path) for character in "*?[")


def _before_pattern(path: Path) -> list[str]:
    parts = []
    for part in path.parts:
        if _is_pattern(Path(part)):
            break
        parts.append(part)
    return parts


def _audio_files(folder: Path) -> list[Path]:
    found = []
    seen: set[str] = set()
    unreadable: list[Path] = []

    def note(error: OSError) -> None:
        unreadable.append(Path(error.filename).absolute())

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=note):
        # a link back up would be walked for ever
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(parent, name).absolute()
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES
        ]
    # a folder that cannot be read is reported as a file that cannot be would be
    return found + unreadable


def _place(file: Path, root: Path) -> PurePosixPath:
    return PurePosixPath(file.absolute().relative_to(root.absolute()).as_posix())


# ---- outputs ----------------------------------------------------------------------


def name_outputs(sources: Sequence[Source], *, ignore_case: bool = False) -> list[str]:
    """Where each source's ``.npy`` belongs, no two at the same place.

    ``a/x.wav`` becomes ``a/x.npy``. Where that is one place for several sources,
    they are told apart by their folders (``speaker1/x.npy``, ``speaker2/x.npy``),
    and files that only their suffix tells apart keep it (``x.wav.npy``,
    ``x.flac.npy``). Names in different Unicode forms are one name, and so are
    ``X`` and ``x`` with ``ignore_case``, as file systems of Macs have it.
    """
    places = [source.place for source in sources]
    for indices in _collisions((str(place) for place in places), ignore_case):
        common = Path(os.path.commonpath([sources[i].path.parent for i in indices]))
        for i in indices:
            places[i] = _place(sources[i].path, common)
    outputs = [str(place.with_suffix(".npy")) for place in places]
    for indices in _collisions(outputs, ignore_case):
        for i in indices:
            outputs[i] = f"{places[i]}.npy"
    if collided := [i for indices in _collisions(outputs, ignore_case) for i in indices]:
        raise OutputError(
            "different files would have one output",
            found=name_list(_shown(sources[i].path) for i in collided),
            hint="extract them in separate runs, each with a folder of its own",
        )
    return outputs


def _shown(path: Path) -> str:
    """A path that shows in which form its letters are: two may look the same."""
    text = str(path)
    return printable(text) if unicodedata.is_normalized("NFC", text) else ascii(text)


def name_rvc_outputs(
    sources: Sequence[Source], width: int, *, ignore_case: bool = False
) -> list[str]:
    """The same in the layout of RVC's training folders: ``3_feature768/x.npy``, flat.

    RVC finds features by the name of the audio file, so names must be unique.

    Raises OutputError if two sources share a name, or RVC knows no such width.
    """
    if width not in RVC_FOLDERS:
        raise OutputError(
            f"RVC has no folder for features {width} wide",
            expected=name_list(f"{w} ({folder})" for w, folder in RVC_FOLDERS.items()),
        )
    return _name_flat(sources, RVC_FOLDERS[width], "RVC", ignore_case)


def name_applio_outputs(
    sources: Sequence[Source], width: int, *, ignore_case: bool = False
) -> list[str]:
    """The same in the layout of Applio's training folders: ``extracted/x.npy``, flat.

    Raises OutputError if two sources share a name, or Applio trains on no such width.
    """
    if width != APPLIO_WIDTH:
        raise OutputError(
            f"Applio trains on no features {width} wide", expected=f"{APPLIO_WIDTH} channels"
        )
    return _name_flat(sources, APPLIO_FOLDER, "Applio", ignore_case)


def _name_flat(
    sources: Sequence[Source], folder: str, program: str, ignore_case: bool
) -> list[str]:
    outputs = [f"{folder}/{source.path.stem}.npy" for source in sources]
    collided = [i for indices in _collisions(outputs, ignore_case) for i in indices]
    if collided:
        raise OutputError(
            f"{program} finds features by the file's name, and these share one",
            found=name_list(printable(str(sources[i].path)) for i in collided),
            hint="rename them, or extract them to different experiments",
        )
    return outputs


def training_root(folder: Path) -> tuple[Path, str]:
    """Where the manifest of ``folder`` belongs, and ``folder`` as seen from there.

    A training program reads every file among its features as an array, so for
    a folder with the name of one of those it is the folder above.

    returns: (``folder``, "") or (the folder above, its name and a slash)
    """
    name = folder.absolute().name
    if name == APPLIO_FOLDER or name in RVC_FOLDERS.values():
        return folder.absolute().parent, f"{name}/"
    return folder, ""


def _collisions(names: Iterable[str], ignore_case: bool) -> list[list[int]]:
    names = [unicodedata.normalize("NFC", name) for name in names]
    if ignore_case:
        names = [unicodedata.normalize("NFC", name.casefold()) for name in names]
    count = Counter(names)
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if count[name] > 1:
            groups.setdefault(name, []).append(i)
    return list(groups.values())
