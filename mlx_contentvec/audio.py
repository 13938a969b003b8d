"""Audio files and arrays become what the models hear: 16 kHz, mono, float32.

Files are decoded block by block by FFmpeg's libraries, which PyAV's packages
bring along. All of a file's audio is used, or the file is refused: its length is
what was decoded, never what a header estimates, and what a container states for
certain (:mod:`.containers`) must be there. Channels are averaged, then the rate
is changed by soxr at its highest quality. Integer samples are scaled to [-1, 1);
nothing else is done to the level. That is what RVC does (infer/modules/train/
extract_feature_print.py, ``readwave``: soundfile, then the mean over channels)
with the 16 kHz files it expects; the resampler is this project's choice.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import numbers
import os
import re
import stat
import struct
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from .containers import StatedEnd, require_whole, stated_end, stated_samples
from .errors import AudioError, MissingDependency, import_hint, install_hint, printable

Waveform = npt.NDArray[np.float32]

SAMPLE_RATE = 16000
#: soxr's quality setting: 28 bits, the best it has
QUALITY = "VHQ"
#: what is recorded beside every result as the way the rate was changed
RESAMPLER = f"soxr {QUALITY}"
#: what a folder is searched for; a file named outright is tried whatever its suffix
AUDIO_SUFFIXES = frozenset(
    {
        *(".wav", ".wave", ".w64", ".rf64", ".flac", ".mp3", ".ogg", ".oga", ".opus"),
        *(".aif", ".aiff", ".aifc", ".au", ".caf", ".m4a", ".m4b", ".mp4", ".aac"),
        *(".wma", ".webm", ".mka", ".amr", ".ac3"),
    }
)
#: a float waveform beyond this is not one in [-1, 1]: int16 samples, most likely
LOUDEST_PEAK = 100.0
#: what a sample rate may be: no less than a quarter of telephony's, so that a few
#: bytes cannot become hours
RATES = (1000.0, 10_000_000.0)
#: samples per decoded block, of all channels: about a second and a half of stereo at 44.1 kHz
BLOCK = 1 << 17
#: bytes that are read from a file at a time
READ_SIZE = 1 << 17
#: compressed bytes per second taken for a file whose container states no duration
GUESSED_BYTES_PER_SECOND = 16000
#: bytes per second that no format exceeds: eight channels of float32 at 192 kHz have 6 MB
MOST_BYTES_PER_SECOND = 10_000_000
#: the part of the machine's memory that one waveform may take when no bound is given
MEMORY_FRACTION = 0.25
#: a playlist or a script of FFmpeg's would have it open other files and addresses
_DEMUXER_OPTIONS = {
    # a 16-bit wav is searched for DTS: in two packets, which hold a few of
    # its frames, not in 2,500 (1.4 ms a clip, not 23)
    "max_probe_packets": "2",
    "protocol_whitelist": "none",
    "format_whitelist": "wav,w64,aiff,au,caf,flac,mp3,ogg,mov,matroska,asf,aac,ac3,eac3,amr,amrnb,"
    "amrwb,mpegts,mpeg,avi,flv,wv,tta,ape,voc,dts,loas",
}
#: of a plain PCM wav, packets of 32 KiB instead of a tenth of a second: a frame's way through
#: Python costs as much as its samples do, and keeps other threads from their work. One such
#: packet is searched for DTS, as much as two of FFmpeg's own at 44.1 kHz
_WAV_OPTIONS = {"max_size": "32768", "max_probe_packets": "1"}
#: integers, floating point, and either with a channel mask
_PCM_TAGS = (1, 3, 0xFFFE)
#: demuxers that read frames of a known size, and mark one that the file's end cut or of which
#: a part was lost
_FLAGS_CUT_PACKETS = frozenset({"amr", "amrnb", "amrwb", "avi", "flv", "mpeg", "mpegts", "voc"})
#: codecs of which each packet is sound; what the begin or the end of a stream skips lies in
#: a packet or two. A damaged page in the middle makes the demuxer skip all that follows
_ALWAYS_SOUND, _MOST_SILENT = frozenset({"opus", "libopus"}), 8
#: demuxers whose duration is a count of samples in the file's header
_COUNTS_SAMPLES = frozenset({"tta", "wv", "ape"})
#: FFmpeg drops what a packet of these holds beyond whole samples: only the last may
_PCM_BITS = re.compile(r"pcm_(?:[suf](\d+)|alaw|mulaw)")
#: codecs whose last frame loses its padding in an MP4; Opus and Vorbis keep theirs, as they
#: do with every FFmpeg
_PADDED = frozenset({"aac", "mp3", "mp3float", "mp2", "mp2float", "ac3", "eac3"})
_MPEG_SYNC = re.compile(rb"\xff[\xe2-\xff]", re.DOTALL)
_KBITS_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_KBITS_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Clip:
    """One decoded piece of audio and how it came to be.

    waveform: (samples,) float32 at ``sample_rate`` Hz
    """

    waveform: Waveform
    sample_rate: int
    source_rate: int
    channels: int
    #: "PyAV" and its version
    decoder: str
    #: :data:`RESAMPLER`, or None when the file had the right rate already
    resampler: str | None

    @property
    def seconds(self) -> float:
        """Length of the waveform in seconds."""
        return len(self.waveform) / self.sample_rate


@dataclass(frozen=True)
class _Stream:
    """A file being decoded: blocks of (frames, channels) float32."""

    rate: int
    channels: int
    blocks: Iterator[npt.NDArray[np.float32]]


def read_audio(
    path: str | Path,
    *,
    sample_rate: int = SAMPLE_RATE,
    min_samples: int = 1,
    max_memory: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Clip:
    """Decode a file, average its channels and bring it to ``sample_rate`` Hz.

    The file goes through in blocks: memory holds the finished waveform and one
    block. A waveform of fewer than ``min_samples`` samples is refused, and so is
    one that needs more than ``max_memory`` bytes (by default a quarter of the
    machine's memory). ``stopped`` is asked from block to block whether to give up.

    Raises AudioError when the file cannot be decoded, is empty, cut short, too
    short, too long or out of scale, or holds samples that are not finite;
    MissingDependency when PyAV or soxr is needed and not installed.
    """
    path = Path(path)
    where = printable(str(path))
    limit = int(MEMORY_FRACTION * physical_memory()) if max_memory is None else max_memory
    with _open_stream(path, where) as stream:
        mono = _checked_mono(stream.blocks, where)
        mono = _bounded(mono, stream.rate, sample_rate, limit, where)
        if stream.rate != sample_rate:
            mono = _resampled(mono, stream.rate, sample_rate)
        blocks = []
        for block in mono:
            if stopped():
                raise AudioError(f"{where} was not read to its end: that was stopped")
            blocks.append(block)
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not len(waveform):
        raise AudioError(f"{where} holds no audio", found="0 samples")
    if len(waveform) < min_samples:
        raise _too_short(where, len(waveform), min_samples, sample_rate)
    return Clip(
        waveform=waveform,
        sample_rate=sample_rate,
        source_rate=stream.rate,
        channels=stream.channels,
        decoder=f"PyAV {_load('av').__version__}",
        resampler=RESAMPLER if stream.rate != sample_rate else None,
    )


def as_waveform(
    samples: Any,
    source_rate: float,
    *,
    sample_rate: int = SAMPLE_RATE,
    min_samples: int = 1,
) -> Waveform:
    """Bring samples already in memory to what the models take.

    samples: (samples,) or (samples, channels) as ``soundfile.read`` gives them;
             anything numpy takes, mlx arrays included; integers of 8, 16 and 32
             bits are scaled by the range of their type
    returns: (samples,) float32 at ``sample_rate`` Hz

    Raises AudioError for another shape or type, a rate that is none, too few
    samples, or samples that are out of scale or not finite.
    """
    where = "the waveform"
    _require_rate(source_rate, where)
    require_unmasked(samples, where)
    if isinstance(samples, (bytes, bytearray, memoryview)) and memoryview(samples).itemsize == 1:
        raise AudioError(
            f"{where} is bytes, which do not say what numbers they hold",
            found=type(samples).__name__,
            expected="an array of samples",
            hint="16-bit samples: np.frombuffer(data, np.int16)\n"
            "8-bit samples: np.frombuffer(data, np.uint8)",
        )
    try:
        array = np.asarray(samples)
    except Exception as error:  # whatever the object raises that is asked to become an array
        raise AudioError(
            f"{where} cannot be read as an array",
            found=f"{type(samples).__name__}: {error}",
            expected="a numpy array of float32",
            hint="a torch tensor: tensor.detach().float().cpu().numpy()\n"
            "an MLX array of bfloat16: array.astype(mx.float32)",
        ) from error
    if array.dtype.kind not in "iuf" or (array.dtype.itemsize > 4 and array.dtype.kind != "f"):
        raise AudioError(
            f"{where} has the wrong type",
            found=f"dtype {array.dtype}",
            expected="floating point in -1 to 1, or integers of 8, 16 or 32 bits",
            hint="16-bit numbers in a list or in wider integers: np.asarray(samples, np.int16)"
            if array.dtype.kind in "iu"
            else None,
        )
    if array.ndim in (1, 2) and not array.size:
        raise AudioError(f"{where} holds no audio", found=f"shape {array.shape}")
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > array.shape[0]):
        raise AudioError(
            f"{where} has the wrong shape",
            found=f"shape {array.shape}",
            expected="(samples,) or (samples, channels)",
            hint="(channels, samples), as torchaudio and librosa give it: pass array.T"
            if array.ndim == 2
            else "one clip at a time, without the axis of the batch",
        )
    if array.dtype.kind in "iu" and array.dtype.itemsize == 4:
        peak = max(int(array.max()), -int(array.min()))
        # unsigned samples lie about the middle of their range
        narrow = np.dtype(f"{array.dtype.kind}2")
        if 0 < peak <= np.iinfo(narrow).max + 1:
            raise AudioError(
                f"{where} is out of scale",
                found=f"{array.dtype} with a peak of {peak:,}",
                expected=f"a peak near {np.iinfo(array.dtype).max:,}",
                hint=f"16-bit numbers: np.asarray(samples, np.{narrow})",
            )
    frames = _scaled(array.reshape(len(array), -1))
    mono = _checked_mono([frames], where)
    if source_rate != sample_rate:
        mono = _resampled(mono, source_rate, sample_rate)
    waveform: Waveform = np.concatenate(list(mono))
    if len(waveform) < min_samples:
        raise _too_short(where, len(waveform), min_samples, sample_rate)
    return waveform


def guess_seconds(path: str | Path) -> float:
    """About how long a file is, to share out work; never raises.

    A file whose container states no duration is taken for 128 kbit/s of audio, and one
    that states hardly any for as much as uncompressed audio of its size has at least.
    """
    path = Path(path)
    with contextlib.suppress(AudioError, OSError), open_regular(path, str(path)) as (file, size):
        return max(_stated_seconds(file, size, str(path)), size / MOST_BYTES_PER_SECOND)
    return 0.0


def _stated_seconds(file: BinaryIO, size: int, where: str) -> float:
    head = file.read(44)
    if head[:4] == b"RIFF" and head[12:16] == b"fmt " and any(head[28:32]):
        # thousands of short clips are a usual plan, and opening each takes longer
        return (size - len(head)) / int.from_bytes(head[28:32], "little")
    with (
        contextlib.suppress(AudioError, OSError),
        _open_container(file, where) as container,
    ):
        if container.duration:
            return float(container.duration) / 1e6
    return size / GUESSED_BYTES_PER_SECOND


def require_decoders() -> None:
    """Raise MissingDependency now if PyAV or soxr is not installed."""
    for name in ("av", "soxr"):
        _load(name)


def physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _load(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"reading audio files needs {name}: {error}",
            hint=import_hint(error, install_hint("audio")),
        ) from error


class _AudioFile(io.FileIO):
    """A file in which an impossible place is its end.

    Demuxers go where a damaged header sends them. PyAV prints the traceback of what a file
    raises meanwhile.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(offset, whence)
        except (OSError, OverflowError, ValueError):
            return super().seek(0, os.SEEK_END)


@contextlib.contextmanager
def open_regular(path: Path, where: str) -> Generator[tuple[BinaryIO, int]]:
    """Open a regular file that is not empty, and its size; a pipe or a device is never waited for.

    Raises AudioError naming ``where``.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{where} cannot be read: {reason}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise AudioError(
            f"{where} is not a file",
            found=_KINDS.get(stat.S_IFMT(status.st_mode), "a special file"),
            expected="a regular file",
        )
    with _AudioFile(descriptor) as file:
        if not status.st_size:
            raise AudioError(f"{where} is empty", found="0 bytes")
        yield cast(BinaryIO, file), status.st_size


@contextlib.contextmanager
def _open_container(file: BinaryIO, where: str) -> Generator[Any]:
    """FFmpeg's view of an open file. It is given no name and no protocol to open others with."""
    av = _load("av")
    file.seek(0)
    wave = _WAV_OPTIONS if _is_plain_wav(file.read(36)) else {}
    file.seek(0)
    try:
        container = _open_with_any_tags(
            av, file, options={**_DEMUXER_OPTIONS, **wave}, buffer_size=READ_SIZE
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        file.seek(0)
        raise AudioError(
            f"{where} is not audio that can be decoded",
            found=f"begins with {file.read(16)!r}",
            expected="wav, flac, mp3, ogg, opus, m4a, aac, aiff, webm, wma or the like",
            hint=f"FFmpeg says: {_reason(error)}",
        ) from error
    with container:
        yield container


def _open_with_any_tags(av: Any, file: BinaryIO, **options: Any) -> Any:
    """``av.open`` of a file whose tags need not be UTF-8.

    Up to PyAV 18 one that is not is an error unless ``metadata_errors`` says otherwise; PyAV 19
    never fails at one, and has no such argument. Its signature cannot be asked: it is compiled.
    """
    try:
        return av.open(file, metadata_errors="ignore", **options)
    except TypeError:  # raised before anything of the file is read
        return av.open(file, **options)


def _is_plain_wav(head: bytes) -> bool:
    """Whether packets of any size are whole frames: PCM whose block alignment is a frame's bytes.

    Of another alignment larger packets would end within a frame, and a packet of ADPCM-SWF
    must be one block.
    """
    if len(head) < 36 or head[:4] + head[8:16] != b"RIFFWAVEfmt ":
        return False
    tag, channels, _, _, alignment, bits = struct.unpack_from("<HHIIHH", head, 20)
    return tag in _PCM_TAGS and 8 * alignment == channels * bits > 0


@contextlib.contextmanager
def _open_stream(path: Path, where: str) -> Generator[_Stream]:
    """Open a file's first audio stream."""
    with open_regular(path, where) as (file, size):
        require_whole(file, size, where)
        stated = stated_samples(file)
        end = stated_end(file)
        with _open_container(file, where) as container:
            if not container.streams.audio:
                kinds = sorted({str(s.type) for s in container.streams})
                raise AudioError(
                    f"{where} has no sound",
                    found=", ".join(kinds) or "no streams",
                    hint="a video without an audio track; leave it out"
                    if "video" in kinds
                    else "what it holds is of no kind that FFmpeg names; convert it first",
                )
            if container.streams.audio[0].codec_context is None:
                raise AudioError(
                    f"{where} is encoded in a way that FFmpeg does not know",
                    hint="it is damaged, or of a kind that has to be converted first",
                )
            frames = _frames(container, stated, end, where)
            first = next(frames, None)
            if first is None:
                raise AudioError(f"{where} holds no audio", found="0 samples")
            rate = first[0]
            _require_rate(rate, where)
            blocks = _blocks(itertools.chain([first], frames), rate, where)
            yield _Stream(rate, first[1].shape[1], blocks)


def _frames(
    container: Any, stated: tuple[int, str] | None, end: StatedEnd | None, where: str
) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Decode all packets: (rate, (samples, channels)) for each frame.

    Raises AudioError where a packet cannot be decoded, or less was there than
    ``stated`` says or the container counts.
    """
    av = _load("av")
    stream = container.streams.audio[0]
    codec = stream.codec_context.codec.name
    size_of = _FRAME_SIZES.get(codec)
    marks_cuts = container.format.name in _FLAGS_CUT_PACKETS
    frame_bytes = _pcm_frame_bytes(codec, stream)
    samples = packets = silent = rest = 0
    last = before = b""
    try:
        is_mov = container.format.name.startswith("mov,")
        for packet, is_last in _packets(container, stream, is_mov):
            if marks_cuts and packet.is_corrupt:
                raise _cut_at(where, samples, stream, "a packet that is not whole")
            data = bytes(packet) if size_of else b""
            packets += bool(packet.size)
            if rest and packet.size:
                raise _cut_at(where, samples, stream, "its blocks end within a sample")
            rest = packet.size % frame_bytes
            if data:
                before, last = last, data
            reached = samples
            whole = packet.size - rest
            for frame in _decoded(av, stream, packet, data, whole, is_last and packets > 1):
                rows = _rows(frame)
                if is_last and end and codec in _PADDED:
                    rows = rows[: _unpadded(frame, packet, end)]
                samples += len(rows)
                yield frame.sample_rate, rows
            if packet.size and reached and samples == reached:
                silent += 1
                if codec in _ALWAYS_SOUND and silent > _MOST_SILENT:
                    raise _cut_at(where, samples, stream, "its packets give no sound any more")
    except IndexError as error:
        # PyAV knows the streams that it found at the beginning, and looks up each packet's
        raise AudioError(
            f"{where} has a stream that begins after its first packets",
            found=f"{samples:,} samples{_seconds(samples, stream)} before it",
            hint="take the sound out of it: ffmpeg -i FILE -map 0:a:0 -c copy NEW.mka",
        ) from error
    # a header that sends the demuxer to an impossible place: the file's own seek refuses
    except (av.error.FFmpegError, OSError, OverflowError, ValueError) as error:
        raise _cut_at(where, samples, stream, _reason(error)) from error
    if size_of and last and (whole := size_of(last, before)) > len(last):
        raise _cut_at(where, samples, stream, f"{len(last)} of the last frame's {whole} bytes")
    expected, unit = stated or (0, "samples")
    if container.format.name in _COUNTS_SAMPLES and stream.duration:
        expected = round(stream.duration * stream.time_base * (stream.rate or 0))
    if container.format.name == "flac" and 0 < expected < samples:
        raise AudioError(
            f"{where} holds more than its header says",
            found=f"{samples:,} samples{_seconds(samples, stream)}",
            expected=f"{expected:,} samples",
            hint="join audio with a program that writes one header, such as ffmpeg or sox",
        )
    decoded = packets if unit == "MPEG frames" else samples
    if decoded < expected:
        raise AudioError(
            f"{where} is cut short",
            found=f"{decoded:,} {unit}{_seconds(samples, stream)}",
            expected=f"{expected:,} {unit}, as its header says",
            hint="copy or download it again",
        )


def _pcm_frame_bytes(codec: str, stream: Any) -> int:
    """Bytes of a sample of every channel, 1 for what is not PCM."""
    pcm = _PCM_BITS.match(codec)
    return int(pcm[1] or 8) * stream.codec_context.channels // 8 or 1 if pcm else 1


def _packets(container: Any, stream: Any, mark_last: bool) -> Iterator[tuple[Any, bool]]:
    """Each packet, and whether it is known to be the last that holds anything."""
    held = None
    for packet in container.demux(stream):
        if not mark_last:
            yield packet, False
            continue
        if held is not None:
            yield held, not packet.size and packet.pts is None
        held = packet
    if held is not None:
        yield held, False


def _unpadded(frame: Any, packet: Any, end: StatedEnd) -> int:
    """How many samples of an MP4's last frame are sound, and no padding up to a whole frame.

    FFmpeg up to version 8 leaves the padding there. Version 9.0 takes it off, but where an edit
    delays the track it may leave the padding, or take sound off with it: which of these follows
    the duration of the media (measured with PyAV 17.1, 18.1 and 19.0.2). So it is done here, by
    the tables alone, whatever the version. Nothing is taken off where the tables are at odds with
    what was decoded: where the frame before has another length, or the end lies outside of this
    frame. At worst a frame less one sample is lost.
    """
    ticks = end.timescale / frame.sample_rate
    samples: int = frame.samples
    if packet.pts is None or (end.step and abs(end.step - samples * ticks) > 1):
        return samples
    rest = round((end.end - max(packet.pts, end.begin)) / ticks)
    return rest if 0 < rest < samples else samples


def _decoded(
    av: Any, stream: Any, packet: Any, data: bytes, whole: int, is_last: bool
) -> Iterator[Any]:
    """Decode one packet. Tags between joined MP3 files come with the frame that follows them.

    The last of an MP4 is decoded without what the demuxer says of its end, see :func:`_unpadded`.
    PCM that ends within a sample is decoded up to there, ``whole`` bytes: FFmpeg does so, but
    PyAV 17 then fails at the rest and loses what was decoded.
    """
    if is_last and not packet.is_discard:
        yield from stream.codec_context.decode(av.Packet(bytes(packet)))
        return
    try:
        yield from packet.decode()
    except av.error.InvalidDataError:
        if 0 < whole < packet.size:
            yield from stream.codec_context.decode(av.Packet(bytes(packet)[:whole]))
            return
        sync = next((m.start() for m in _MPEG_SYNC.finditer(data)), len(data))
        if not data or not sync:
            raise
        if sync < len(data):
            yield from stream.codec_context.decode(av.Packet(data[sync:]))


def _rows(frame: Any) -> npt.NDArray[Any]:
    """A decoded frame as (samples, channels), in the type that it was decoded to."""
    array: npt.NDArray[Any]
    if frame.format.name == "s64":  # PyAV has no array of it
        array = np.frombuffer(frame.planes[0], np.int64)[
            : frame.samples * len(frame.layout.channels)
        ]
    else:
        array = frame.to_ndarray()
    return array.T if frame.format.is_planar else array.reshape(-1, len(frame.layout.channels))


def _blocks(
    frames: Iterable[tuple[int, npt.NDArray[Any]]], rate: int, where: str
) -> Iterator[npt.NDArray[np.float32]]:
    """Frames put together to about :data:`BLOCK` samples of float32; all must have one rate."""
    waiting: list[npt.NDArray[Any]] = []
    count = passed = 0
    for frame_rate, samples in frames:
        if frame_rate != rate:
            raise AudioError(
                f"{where} changes its sample rate on the way",
                found=f"{frame_rate} Hz after {(passed + count) / rate:.2f} s",
                expected=f"{rate} Hz to the end, as it begins",
                hint="rewrite it at one rate: ffmpeg -i FILE -ar 44100 NEW.wav",
            )
        form = samples.shape[1], samples.dtype
        full = count * form[0] >= BLOCK
        if waiting and (full or form != (waiting[0].shape[1], waiting[0].dtype)):
            yield _scaled(np.concatenate(waiting))
            passed += count
            waiting, count = [], 0
        waiting.append(samples)
        count += len(samples)
    if waiting:
        yield _scaled(np.concatenate(waiting))


def _cut_at(where: str, samples: int, stream: Any, reason: str) -> AudioError:
    return AudioError(
        f"{where} cannot be decoded to its end",
        found=f"{samples:,} samples{_seconds(samples, stream)}, then an error: {reason}",
        hint="it is damaged or cut short: copy or download it again",
    )


def _seconds(samples: int, stream: Any) -> str:
    return f" ({samples / stream.rate:.2f} s)" if stream.rate else ""


def _mp3_frame_size(frame: bytes, _: bytes) -> int:
    """Bytes of a Layer III frame by its header; 0 for what is not one or is of free format.

    Source: ISO/IEC 11172-3, 2.4.2.3, and 13818-3.
    """
    if len(frame) < 4 or not _MPEG_SYNC.match(frame) or frame[1] & 6 != 2:
        return 0
    version, rate_code, index = frame[1] >> 3 & 3, frame[2] >> 2 & 3, frame[2] >> 4
    if rate_code == 3 or version == 1:
        return 0
    kbits = (_KBITS_MPEG1 if version == 3 else _KBITS_MPEG2)[index]
    rate = (44100, 48000, 32000)[rate_code] >> {3: 0, 2: 1, 0: 2}[version]
    return (144 if version == 3 else 72) * kbits * 1000 // rate + (frame[2] >> 1 & 1)


def _steady_frame_size(frame: bytes, before: bytes) -> int:
    """AC-3 and Layer II keep one bit rate: frames differ by a padding of two bytes at most."""
    return len(before) if len(frame) < len(before) - 2 else len(frame)


def _eac3_frame_size(frame: bytes, _: bytes) -> int:
    """Bytes of an E-AC-3 frame, and of those of dependent streams in the same packet.

    Source: ETSI TS 102 366, E.1.3.1.3: the number of 16-bit words less one, of 11 bits.
    """
    at = 0
    while frame[at : at + 2] == b"\x0b\x77":
        at += 2 * (int.from_bytes(frame[at + 2 : at + 4].ljust(2, b"\xff"), "big") & 0x7FF) + 2
    return at


#: codec -> the bytes that a frame of it should have, from the frame and the one before
_FRAME_SIZES: dict[str, Callable[[bytes, bytes], int]] = {
    "mp3": _mp3_frame_size,
    "mp3float": _mp3_frame_size,
    "mp2": _steady_frame_size,
    "mp2float": _steady_frame_size,
    "ac3": _steady_frame_size,
    "eac3": _eac3_frame_size,
}


def _require_rate(rate: Any, where: str) -> None:
    if (
        isinstance(rate, bool)
        or not isinstance(rate, numbers.Real)
        or not RATES[0] <= cast(float, rate) <= RATES[1]
    ):
        raise AudioError(
            f"{where} has an impossible sample rate",
            found=f"{rate!r}"[:80],
            expected=f"a number of Hz from {RATES[0]:,.0f} to {RATES[1]:,.0f}",
        )


def _scaled(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Samples as float32: integers by the range of their type, unsigned ones about its middle."""
    scaled: npt.NDArray[np.float32]
    if array.dtype.kind == "u":
        middle = float(np.iinfo(array.dtype).max // 2 + 1)
        scaled = ((array - middle) / middle).astype(np.float32)
    elif array.dtype.kind == "i":
        # by a power of two: nothing is rounded but the conversion
        scaled = array.astype(np.float32) * np.float32(1 / (np.iinfo(array.dtype).max + 1.0))
    else:
        scaled = as_float32(array)
    return np.ascontiguousarray(scaled)


def require_unmasked(array: Any, where: str) -> None:
    """Raise AudioError for a numpy array that declares some of its values invalid."""
    if np.ma.is_masked(array):
        raise AudioError(
            f"{where} has masked values",
            found=f"{int(np.sum(array.mask)):,} of {array.size:,}",
            expected="a value for every one",
            hint="array.filled(0) puts 0 in their place",
        )


def as_float32(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Rounded to nearest, without a warning of infinity or a signalling NaN.

    What is not finite is refused afterwards, with its place.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32, copy=False)


def _checked_mono(blocks: Iterable[npt.NDArray[np.float32]], where: str) -> Iterator[Waveform]:
    """(frames, channels) blocks to (frames,) ones; every sample must be finite and in scale."""
    start = 0
    for block in blocks:
        if not np.isfinite(block).all():
            frame = start + int(np.argwhere(~np.isfinite(block))[0, 0])
            raise AudioError(
                f"{where} holds samples that are not finite numbers",
                found=f"the first NaN or infinity at frame {frame:,}",
            )
        if np.abs(block).max(initial=0.0) > LOUDEST_PEAK:
            raise AudioError(
                f"{where} is out of scale",
                found=f"a peak of {np.abs(block).max():g}",
                expected="floating-point samples of about -1 to 1",
                hint="samples in int16 scale: divide by 32768",
            )
        start += len(block)
        yield block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]


def _bounded(
    blocks: Iterable[Waveform], rate: int, target: int, limit: int, where: str
) -> Iterator[Waveform]:
    """The same blocks, as long as what they become at ``target`` Hz fits ``limit`` bytes."""
    samples = 0
    for block in blocks:
        samples += len(block)
        needed = 4 * math.ceil(samples * target / rate)
        if needed > limit:
            raise AudioError(
                f"{where} is too long for the memory",
                found=f"{samples / rate:,.0f} s or more: {needed:,} bytes at {target} Hz",
                expected=f"{limit:,} bytes ({limit / 4 / target:,.0f} s) at most",
                hint="cut it into shorter files, or allow more with --max-memory",
            )
        yield block


def _resampled(blocks: Iterable[Waveform], rate: float, target: int) -> Iterator[Waveform]:
    """The same through soxr; the result does not depend on where the blocks are cut."""
    soxr = _load("soxr")
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality=QUALITY)
    for block in blocks:
        yield stream.resample_chunk(np.ascontiguousarray(block))
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _too_short(what: str, samples: int, minimum: int, rate: int) -> AudioError:
    return AudioError(
        f"{what} is too short to give one frame",
        found=f"{samples} samples ({1000 * samples / rate:.1f} ms) at {rate} Hz",
        expected=f"{minimum} samples or more ({1000 * minimum / rate:.1f} ms)",
    )


def _reason(error: Exception) -> str:
    """What FFmpeg says, without its number and the name it gave the file."""
    reason = getattr(error, "strerror", None) or str(error) or "no reason given"
    return printable(reason.rstrip("."))
