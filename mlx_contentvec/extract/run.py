"""Folders of audio become folders of features: what to do, who does it, what is done already.

    paths -> sources -> plan -> shares -> clips -> outputs -> summary

An output appears under its name only when it is whole, and the manifest beside
the outputs knows it by then: a run may be killed anywhere, and the same command
goes on where it stopped.
"""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audio import AUDIO_SUFFIXES, RESAMPLER, Clip, Waveform, guess_seconds, read_audio
from ..errors import AudioError, ContentvecError, OutputError, name_list
from .manifest import Manifest, State, identity, publish, write_atomically
from .sharding import Ranks, shares
from .windows import Seams

if TYPE_CHECKING:
    from ..features import Features, Padding
    from ..model import ContentvecModel

#: the folder of RVC's training experiment that holds features of this width.
#: Source: RVC, infer/modules/train/extract_feature_print.py
RVC_FOLDERS = {256: "3_feature256", 768: "3_feature768"}
DTYPES = ("float32", "float16")
#: seconds of audio that may be decoded ahead of the model
DECODED_AHEAD = 120.0


@dataclass(frozen=True)
class Source:
    """An audio file and where its features belong."""

    path: Path
    #: its place among the sources: below the folder it was found in
    place: PurePosixPath


@dataclass(frozen=True)
class Work:
    """One output to be made."""

    source: str
    #: below the output folder
    output: str
    #: of audio, as the header says
    seconds: float


@dataclass(frozen=True)
class Settings:
    """Everything beside the audio that decides the numbers of an output."""

    #: SHA-256 of the weights
    weights: str
    layer: int
    project: bool
    dtype: str = "float32"
    #: how clips that share a batch are padded
    padding: str = "exact"
    resampler: str = RESAMPLER
    #: seconds of each window and of what neighbours share; None: the whole clip at once
    window: float | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class Failure:
    """A source without features, and why."""

    source: str
    reason: str


@dataclass
class Summary:
    """What a run did. Seconds of audio are those of the features made."""

    extracted: int = 0
    skipped: int = 0
    failed: list[Failure] = field(default_factory=list)
    audio_seconds: float = 0.0
    wall_seconds: float = 0.0
    ranks: int = 1
    #: cuts between windows, the worst disagreement at one, and the worst clip's rms
    seams: int = 0
    seam_max: float = 0.0
    seam_rms: float = 0.0

    def note_seams(self, seams: Seams) -> None:
        """Count the seams of one clip that was processed in windows."""
        self.seams += seams.count
        self.seam_max = max(self.seam_max, seams.max_abs)
        self.seam_rms = max(self.seam_rms, seams.rms)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def joined(cls, parts: Iterable[dict[str, Any]]) -> Summary:
        """One summary of what several ranks did."""
        total = cls(ranks=0)
        for part in parts:
            total.ranks += 1
            total.extracted += part["extracted"]
            total.skipped += part["skipped"]
            total.failed += [Failure(**failure) for failure in part["failed"]]
            total.audio_seconds += part["audio_seconds"]
            total.wall_seconds = max(total.wall_seconds, part["wall_seconds"])
            total.note_seams(Seams(part["seams"], part["seam_max"], part["seam_rms"]))
        return total


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
        for source in _expanded(Path(path)):
            found.setdefault(source.path, source)
    return list(found.values())


def _expanded(path: Path) -> list[Source]:
    if path.is_dir():
        sources = [Source(file, _place(file, path)) for file in _audio_files(path)]
        if not sources:
            raise AudioError(
                f"there is no audio in {path}",
                expected=f"files called {name_list(sorted(AUDIO_SUFFIXES), limit=6)}",
            )
        return sources
    if path.exists() or not _is_pattern(path):
        if not path.exists() and not path.is_symlink():
            raise AudioError(f"there is no file or folder {path}")
        return [Source(path.absolute(), PurePosixPath(path.name))]
    anchor = Path(*_before_pattern(path))
    matches = sorted(anchor.glob(str(path.relative_to(anchor))))
    sources = []
    for match in matches:
        if match.is_dir():
            sources += [Source(file, _place(file, anchor)) for file in _audio_files(match)]
        elif match.suffix.lower() in AUDIO_SUFFIXES:
            sources.append(Source(match.absolute(), _place(match, anchor)))
    if not sources:
        raise AudioError(f"no audio file matches {path}")
    return sources


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
    for parent, folders, files in os.walk(folder, followlinks=True):
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
    return found


def _place(file: Path, root: Path) -> PurePosixPath:
    return PurePosixPath(file.absolute().relative_to(root.absolute()).as_posix())


# ---- outputs ----------------------------------------------------------------------


def name_outputs(sources: Sequence[Source]) -> list[str]:
    """Where each source's ``.npy`` belongs, no two at the same place.

    ``a/x.wav`` becomes ``a/x.npy``. Where that is one place for several sources,
    they are told apart by their folders (``speaker1/x.npy``, ``speaker2/x.npy``),
    and files that only their suffix tells apart keep it (``x.wav.npy``,
    ``x.flac.npy``).
    """
    places = [source.place for source in sources]
    for indices in _collisions(str(place) for place in places):
        common = Path(os.path.commonpath([sources[i].path.parent for i in indices]))
        for i in indices:
            places[i] = _place(sources[i].path, common)
    outputs = [str(place.with_suffix(".npy")) for place in places]
    for indices in _collisions(outputs):
        for i in indices:
            outputs[i] = f"{places[i]}.npy"
    if collided := [i for indices in _collisions(outputs) for i in indices]:
        raise OutputError(
            "different files would have one output",
            found=name_list(str(sources[i].path) for i in collided),
            hint="extract them in separate runs, each with a folder of its own",
        )
    return outputs


def name_rvc_outputs(sources: Sequence[Source], width: int) -> list[str]:
    """The same in the layout of RVC's training folders: ``3_feature768/x.npy``, flat.

    RVC finds features by the name of the audio file, so names must be unique.

    Raises OutputError if two sources share a name, or RVC knows no such width.
    """
    if width not in RVC_FOLDERS:
        raise OutputError(
            f"RVC has no folder for features {width} wide",
            expected=name_list(f"{w} ({folder})" for w, folder in RVC_FOLDERS.items()),
        )
    outputs = [f"{RVC_FOLDERS[width]}/{source.path.stem}.npy" for source in sources]
    collided = [i for indices in _collisions(outputs) for i in indices]
    if collided:
        raise OutputError(
            "RVC finds features by the file's name, and these share one",
            found=name_list(str(sources[i].path) for i in collided),
            hint="rename them, or extract them to different experiments",
        )
    return outputs


def _collisions(names: Iterable[str]) -> list[list[int]]:
    names = list(names)
    count = Counter(names)
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if count[name] > 1:
            groups.setdefault(name, []).append(i)
    return list(groups.values())


# ---- the plan ---------------------------------------------------------------------


def plan_work(
    sources: Sequence[Source],
    outputs: Sequence[str],
    manifest: Manifest,
    settings: Settings,
    *,
    force: bool = False,
) -> tuple[list[Work], int]:
    """What is left to do, and how many outputs are finished already.

    An output that this run would not have made is only replaced with ``force``.

    Raises OutputError naming such outputs.
    """
    wanted = asdict(settings)
    pending: list[Work] = []
    taken: list[str] = []
    finished = 0
    for source, output in zip(sources, outputs, strict=True):
        standing = manifest.standing(output, source.path, wanted)
        if standing.state is State.FINISHED:
            finished += 1
            continue
        if standing.state is State.TAKEN and not force:
            taken.append(f"{output}: {standing.reason}")
        pending.append(Work(str(source.path), output, guess_seconds(source.path)))
    if taken:
        raise OutputError(
            f"{len(taken)} outputs in {manifest.folder} are not of this run",
            found=name_list(taken, limit=3),
            hint="choose another folder, or replace them with --force",
        )
    return pending, finished


# ---- the run ----------------------------------------------------------------------


class Extraction:
    """One rank's share of the work."""

    def __init__(
        self,
        model: ContentvecModel,
        settings: Settings,
        manifest: Manifest,
        *,
        max_memory: int | None = None,
        batch_seconds: float = 0.0,
    ) -> None:
        self.model = model
        self.settings = settings
        self.manifest = manifest
        self.max_memory = max_memory
        self.batch_seconds = batch_seconds
        self.summary = Summary()

    def run(
        self, work: Sequence[Work], progress: Callable[[Work, float], None] = lambda *_: None
    ) -> Summary:
        """Make every output of ``work``; ``progress`` hears what part of which is done.

        A clip that cannot be used is noted in the summary and the rest goes on.
        Raises OutputError if outputs cannot be written.
        """
        start = time.perf_counter()
        for batch in self._decoded(self._batches(work)):
            good = [(item, clip) for item, clip in batch if isinstance(clip, Clip)]
            for item, clip in batch:
                if not isinstance(clip, Clip):
                    self._fail(item, clip)
            for item, clip, features in self._computed(good, progress):
                self._keep(item, clip, features)
            for item, _ in batch:
                progress(item, 1.0)
        self.summary.wall_seconds = time.perf_counter() - start
        return self.summary

    def _batches(self, work: Sequence[Work]) -> list[list[Work]]:
        from ..features import batches

        if not self.batch_seconds:
            return [[item] for item in work]
        rate = self.model.config.sample_rate
        lengths = [round(item.seconds * rate) for item in work]
        return [
            [work[i] for i in batch] for batch in batches(lengths, int(self.batch_seconds * rate))
        ]

    def _decoded(
        self, batched: Iterable[list[Work]]
    ) -> Iterator[list[tuple[Work, Clip | ContentvecError]]]:
        """Batches with their clips or what is wrong with them, decoded while others compute."""
        waiting: list[tuple[list[Work], list[Future[Clip | ContentvecError]]]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="decode") as decoder:
            try:
                for batch in batched:
                    waiting.append((batch, [decoder.submit(self._read, item) for item in batch]))
                    ahead = sum(item.seconds for batch, _ in waiting[1:] for item in batch)
                    while waiting and (ahead > DECODED_AHEAD or len(waiting) > 64):
                        ahead -= sum(item.seconds for item in waiting[0][0])
                        yield _results(waiting.pop(0))
                while waiting:
                    yield _results(waiting.pop(0))
            finally:
                decoder.shutdown(wait=False, cancel_futures=True)

    def _read(self, item: Work) -> Clip | ContentvecError:
        config = self.model.config
        try:
            return read_audio(
                item.source, sample_rate=config.sample_rate, min_samples=config.receptive_field
            )
        except ContentvecError as error:
            return error
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            return AudioError(f"{item.source} cannot be decoded: {type(error).__name__}: {error}")

    def _computed(
        self, clips: Sequence[tuple[Work, Clip]], progress: Callable[[Work, float], None]
    ) -> Iterator[tuple[Work, Clip, Features]]:
        if not clips:
            return
        try:
            results = self._features(
                [clip.waveform for _, clip in clips], lambda part: progress(clips[0][0], part)
            )
        except (ContentvecError, RuntimeError, MemoryError) as error:
            if len(clips) == 1:
                self._fail(clips[0][0], error)
            else:
                for one in clips:
                    yield from self._computed([one], progress)
            return
        for (item, clip), features in zip(clips, results, strict=True):
            yield item, clip, features

    def _features(
        self, waveforms: list[Waveform], progress: Callable[[float], None]
    ) -> list[Features]:
        from ..features import FeatureKind, features_of_batch
        from .windows import windowed

        settings = self.settings
        kind = FeatureKind(settings.layer, settings.project)
        if settings.window is None or settings.overlap is None:
            padding: Padding = "fairseq" if settings.padding == "fairseq" else "exact"
            return features_of_batch(
                self.model, waveforms, kind, padding, self.max_memory, progress
            )
        results = []
        for waveform in waveforms:
            features, seams = windowed(
                self.model,
                waveform,
                kind,
                settings.window,
                settings.overlap,
                self.max_memory,
                progress,
            )
            results.append(features)
            self.summary.note_seams(seams)
        return results

    def _keep(self, item: Work, clip: Clip, features: Features) -> None:
        with np.errstate(over="ignore"):
            features = features.astype(self.settings.dtype, copy=False)
        if not np.isfinite(features).all():
            self._fail(item, AudioError("its features are not finite numbers"))
            return
        path = self.manifest.folder / item.output
        written = write_atomically(path, npy_parts(features))
        self.manifest.add(
            {
                "output": item.output,
                "source": identity(Path(item.source)),
                "settings": asdict(self.settings),
                "frames": features.shape[0],
                "width": features.shape[1],
                "seconds": clip.seconds,
                "source_rate": clip.source_rate,
                "channels": clip.channels,
                "decoder": clip.decoder,
                "resampler": clip.resampler,
                **written,
            }
        )
        publish(path)
        self.summary.extracted += 1
        self.summary.audio_seconds += clip.seconds

    def _fail(self, item: Work, error: Exception) -> None:
        reason = error.problem if isinstance(error, ContentvecError) else str(error)
        found = getattr(error, "found", None)
        reason = reason.removeprefix(f"{item.source} ")
        self.summary.failed.append(Failure(item.source, f"{reason} ({found})" if found else reason))


def _results(
    waiting: tuple[list[Work], list[Future[Clip | ContentvecError]]],
) -> list[tuple[Work, Clip | ContentvecError]]:
    return [(item, future.result()) for item, future in zip(*waiting, strict=True)]


def npy_parts(array: np.ndarray[Any, Any]) -> list[bytes | memoryview]:
    """The bytes of a ``.npy`` file: header and data, the data not copied."""
    header = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data: Any = array
    return [header.getvalue(), memoryview(data).cast("B")]


def shared_out(work: Sequence[Work], ranks: Ranks) -> list[Work]:
    """What of the first rank's ``work`` this rank does, balanced by duration."""
    items = [Work(**item) for item in ranks.from_first([asdict(item) for item in work])]
    share = shares([item.seconds for item in items], ranks.size)[ranks.rank]
    return [items[i] for i in share]
