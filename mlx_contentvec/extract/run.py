"""Folders of audio become folders of features: what to do, who does it, what is done already.

    paths -> sources -> plan -> shares -> clips -> outputs -> summary

An output appears under its name only when it is whole, and the manifest beside
the outputs knows it by then: a run may be killed anywhere, and the same command
goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..audio import RESAMPLER, Waveform, guess_seconds
from ..errors import (
    ContentvecError,
    OutputError,
    WeightsError,
    counted,
    name_list,
    printable,
)
from ..files import Draft, appeared, is_file
from .decoding import TURN, Decoded, Request, Workers, decode
from .manifest import (
    Manifest,
    Record,
    State,
    prepared,
    require_files,
)
from .sharding import Ranks, share_of
from .sources import Source
from .windows import Seams

if TYPE_CHECKING:
    from ..features import Features, Padding
    from ..model import ContentvecModel

DTYPES = ("float32", "float16")
#: seconds of audio that may be decoded ahead of the model
DECODED_AHEAD = 120.0
#: threads that decode for a GPU, where processes do not
DECODERS = 8
#: seconds of a clip above which it is decoded by a thread and not by a process, which would
#: send it in one piece
LONGEST_SENT = 60.0
#: outputs that are flushed to the disk by one record, and are open at once: a Mac has
#: 256 open files for a process
KEPT_TOGETHER = 32
#: how many such groups may wait to be written while the next is computed
WRITTEN_BEHIND = 8
#: why a file system refuses one name and would take another
_NAME_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR})


@dataclass(frozen=True)
class Job:
    """One output to be made."""

    source: str
    #: below the output folder
    output: str
    #: of audio, as the header says
    seconds: float
    #: whether something is there already, which may be replaced
    replaces: bool = False


#: a job that is computed: its clip and its features
Made = tuple[Job, Decoded, "Features"]

_Result = TypeVar("_Result")


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


# ---- the plan ---------------------------------------------------------------------


def plan_jobs(
    sources: Sequence[Source],
    outputs: Sequence[str],
    manifest: Manifest,
    settings: Settings,
    *,
    force: bool = False,
) -> tuple[list[Job], int]:
    """What is left to do, and how many outputs are finished already.

    An output that this run would not have made is only replaced with ``force``, and what is
    no file never.

    Raises OutputError naming such outputs.
    """
    wanted = asdict(settings)
    pending: list[Job] = []
    taken: list[str] = []
    finished = 0
    require_files(manifest.folder, outputs)
    for source, output in zip(sources, outputs, strict=True):
        status = manifest.status(output, source.path, wanted)
        if status.state is State.FINISHED:
            finished += 1
            continue
        if status.state is State.TAKEN and not force:
            taken.append(printable(f"{output}: {status.reason}"))
        there = os.path.lexists(manifest.folder / output)
        pending.append(Job(str(source.path), output, guess_seconds(source.path), there))
    if taken:
        raise OutputError(
            f"{counted(len(taken), 'output')} in {manifest.folder} "
            f"{'is' if len(taken) == 1 else 'are'} not of this run",
            found=name_list(taken, limit=3),
            hint="choose another folder, or replace them with --force",
        )
    manifest.note_found_again()
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
        workers: Workers | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.manifest = manifest
        self.max_memory = max_memory
        self.batch_seconds = batch_seconds
        self.workers = workers
        self.summary = Summary()
        #: what has got its name: the job, the bytes and the seconds of audio
        self._named: list[tuple[Job, int, float]] = []

    def run(
        self, jobs: Sequence[Job], progress: Callable[[Job, float], None] = lambda *_: None
    ) -> Summary:
        """Make every output of ``jobs``; ``progress`` gets a job and the part of it done.

        A clip that cannot be used is noted in the summary and the rest goes on.
        Raises OutputError if outputs cannot be written.
        """
        start = time.perf_counter()
        with self._written() as write:
            for batch in self._decoded(self._batches(jobs)):
                good = [(job, result) for job, result in batch if isinstance(result, Decoded)]
                for job, result in batch:
                    if not isinstance(result, Decoded):
                        self._fail(job, result)
                write(list(self._computed(good, progress)))
                for job, _ in batch:
                    progress(job, 1.0)
        self._require_outputs()
        self.summary.wall_seconds = time.perf_counter() - start
        return self.summary

    def _batches(self, jobs: Sequence[Job]) -> list[list[Job]]:
        from ..features import batches, stacks

        if not self.batch_seconds:
            return [[job] for job in jobs]
        rate = self.model.config.sample_rate
        lengths = [round(job.seconds * rate) for job in jobs]
        limit = int(self.batch_seconds * rate)
        stacked = stacks(self.model, self._padding())
        return [[jobs[i] for i in batch] for batch in batches(lengths, limit, stacked=stacked)]

    def _padding(self) -> Padding:
        return "fairseq" if self.settings.padding == "fairseq" else "exact"

    def _decoded(
        self, batched: Iterable[list[Job]]
    ) -> Iterator[list[tuple[Job, Decoded | ContentvecError]]]:
        """Batches with their clips or what is wrong with them, decoded while others compute."""
        from ..backend import device_kind

        waiting: list[tuple[list[Job], list[Future[Decoded | ContentvecError]]]] = []
        stop = threading.Event()
        # a CPU decodes 800 times as fast as it computes, and its cores are busy
        threads = 1 if device_kind() == "cpu" else min(DECODERS, os.cpu_count() or 1)
        if self.workers:
            threads = len(self.workers)
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as decoder:
            try:
                for batch in batched:
                    clips = [decoder.submit(self._read, job, stop) for job in batch]
                    waiting.append((batch, clips))
                    ahead = sum(job.seconds for batch, _ in waiting[1:] for job in batch)
                    while waiting and (ahead > DECODED_AHEAD or len(waiting) > 64):
                        ahead -= sum(job.seconds for job in waiting[0][0])
                        yield _results(waiting.pop(0))
                while waiting:
                    yield _results(waiting.pop(0))
            finally:
                # hours of audio are being decoded, which nobody waits for any more
                stop.set()
                decoder.shutdown(wait=False, cancel_futures=True)

    def _read(self, job: Job, stop: threading.Event) -> Decoded | ContentvecError:
        config = self.model.config
        request = Request(job.source, config.sample_rate, config.receptive_field, self.max_memory)
        if self.workers and job.seconds <= LONGEST_SENT:
            decoded = self.workers.decode(request, stop.is_set)
            if decoded is not None:
                return decoded
        return decode(request, stop.is_set)

    def _computed(
        self, clips: Sequence[tuple[Job, Decoded]], progress: Callable[[Job, float], None]
    ) -> Iterator[Made]:
        if not clips:
            return
        try:
            results = self._features(
                [decoded.clip.waveform for _, decoded in clips],
                lambda part: progress(clips[0][0], part),
            )
        except (ContentvecError, RuntimeError, MemoryError) as error:
            if len(clips) == 1:
                self._fail(clips[0][0], error)
            else:
                for one in clips:
                    yield from self._computed([one], progress)
            return
        for (job, decoded), features in zip(clips, results, strict=True):
            yield job, decoded, features

    def _features(
        self, waveforms: list[Waveform], progress: Callable[[float], None]
    ) -> list[Features]:
        from ..features import FeatureKind, features_of_batch
        from .windows import windowed

        settings = self.settings
        kind = FeatureKind(settings.layer, settings.project)
        if settings.window is None or settings.overlap is None:
            return features_of_batch(
                self.model, waveforms, kind, self._padding(), self.max_memory, progress
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

    @contextlib.contextmanager
    def _written(self) -> Iterator[Callable[[list[Made]], None]]:
        """A function that has outputs written while the next are computed, batch by batch.

        Whatever ends the block, what has been computed is written before it is left.

        Raises OutputError if outputs cannot be written.
        """
        waiting: list[Future[None]] = []
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:

            def write(made: list[Made]) -> None:
                for start in range(0, len(made), KEPT_TOGETHER):
                    part = made[start : start + KEPT_TOGETHER]
                    waiting.append(writer.submit(self._keep, part))
                while len(waiting) > WRITTEN_BEHIND:
                    _result(waiting.pop(0))

            yield write
            while waiting:
                _result(waiting.pop(0))

    def _keep(self, made: Sequence[Made]) -> None:
        """Write outputs: all of them, then their records, then their names.

        Raises OutputError if one cannot be written; those before it are kept.
        """
        from ..features import require_finite

        failed: OutputError | None = None
        with contextlib.ExitStack() as drafts:
            whole: list[tuple[Job, Draft, Record]] = []
            for job, decoded, features in made:
                with np.errstate(over="ignore"):
                    features = features.astype(self.settings.dtype, copy=False)
                try:
                    require_finite(features)
                except WeightsError as error:
                    self._fail(job, error)
                    continue
                path = self.manifest.folder / job.output
                try:
                    with self._unless_of_its_name(job):
                        draft, written = drafts.enter_context(prepared(path, npy_parts(features)))
                        whole.append((job, draft, self._record(job, decoded, features, written)))
                except OutputError as error:
                    failed = error
                    break
            # after they are written, which takes its time: a record says what is ours
            whole = [one for one in whole if self._is_free(one[0])]
            self.manifest.add(*(record for _, _, record in whole))
            for job, draft, record in whole:
                with self._unless_of_its_name(job):
                    draft.rename(force=job.replaces)
                    self._named.append((job, record["bytes"], record["seconds"]))
                    self.summary.extracted += 1
                    self.summary.audio_seconds += record["seconds"]
        if failed is not None:
            raise failed

    def _record(self, job: Job, decoded: Decoded, features: Features, written: Record) -> Record:
        clip = decoded.clip
        return {
            "output": job.output,
            "source": decoded.source,
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

    def _is_in_the_way(self, job: Job) -> bool:
        """Whether something has come to where an output is to be, which it must not replace."""
        return not job.replaces and os.path.lexists(self.manifest.folder / job.output)

    def _is_free(self, job: Job) -> bool:
        """Whether an output's name still is; where not, it has failed."""
        taken = self._is_in_the_way(job)
        if taken:
            self._fail(job, appeared(self.manifest.folder / job.output))
        return not taken

    @contextlib.contextmanager
    def _unless_of_its_name(self, job: Job) -> Iterator[None]:
        """Have an output fail by itself if its name is taken or refused, and no other."""
        try:
            yield
        except OutputError as error:
            of_its_name = getattr(error.__cause__, "errno", None) in _NAME_ERRORS
            if not of_its_name and not self._is_in_the_way(job):
                raise
            self._fail(job, error)

    def _require_outputs(self) -> None:
        """Count as failed what was written and is not there any more."""
        for job, size, seconds in self._named:
            path = self.manifest.folder / job.output
            if not is_file(path) or path.stat().st_size != size:
                self.summary.extracted -= 1
                self.summary.audio_seconds -= seconds
                self._fail(job, OutputError(f"its output {printable(str(path))} has disappeared"))

    def _fail(self, job: Job, error: Exception) -> None:
        if isinstance(error, ContentvecError):
            reason, found = error.problem, error.found
        else:
            said = str(error).partition("\n")[0] or type(error).__name__
            reason, found = "the device could not compute its features", said
        reason = printable(reason.removeprefix(f"{printable(job.source)} "))
        self.summary.failed.append(Failure(job.source, f"{reason} ({found})" if found else reason))


def _results(
    waiting: tuple[list[Job], list[Future[Decoded | ContentvecError]]],
) -> list[tuple[Job, Decoded | ContentvecError]]:
    return [(job, _result(future)) for job, future in zip(*waiting, strict=True)]


def _result(future: Future[_Result]) -> _Result:
    """A future's result, waited for in turns: Ctrl-C is heeded between two at the latest.

    A wait without end goes on after a signal whose handler was set by signal(2), as NVRTC sets
    it after its first compilation. ``backend`` meets that where MLX is imported by the main
    thread; another library may do the same at any time.
    """
    while not future.done():
        wait([future], TURN)
    return future.result()


def npy_parts(array: np.ndarray[Any, Any]) -> list[bytes | memoryview]:
    """The bytes of a ``.npy`` file: header and data, the data not copied."""
    header = io.BytesIO()
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    data: Any = array
    return [header.getvalue(), memoryview(data).cast("B")]


def share_of_rank(jobs: Sequence[Job], ranks: Ranks) -> list[Job]:
    """The part of the first rank's ``jobs`` that this rank does, balanced by duration."""
    everything = [Job(**job) for job in ranks.from_first([asdict(job) for job in jobs])]
    share = share_of([job.seconds for job in everything], ranks.size, ranks.rank)
    return [everything[i] for i in share]
