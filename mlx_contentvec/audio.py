"""Audio files and arrays become what the models hear: 16 kHz, mono, float32.

Files are decoded block by block by libsndfile (wav, flac, mp3, ogg, opus, aiff
and more) or, where libsndfile does not know the format (m4a, aac, wma), by an
``ffmpeg`` found on the PATH. Channels are averaged, then the rate is changed by
soxr at its highest quality. Integer samples are scaled to [-1, 1); nothing else
is done to the level. That is RVC's own path (infer/modules/train/
extract_feature_print.py, ``readwave``: soundfile, then the mean over channels),
which expects 16 kHz files; the resampler is this project's choice.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import AudioError, MissingDependency

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
#: frames per decoded block: 64 Ki frames, about a second and a half at 44.1 kHz
BLOCK = 1 << 16
#: compressed bytes per second taken for a file whose header libsndfile cannot read
GUESSED_BYTES_PER_SECOND = 16000
#: MP3 headers may announce a little more than there is to decode
ANNOUNCED_FRACTION = 0.99
_AU_FLOAT = 6
_CHUNK_CUT = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True)
class Clip:
    """One decoded piece of audio and how it came to be.

    waveform: (samples,) float32 at ``sample_rate`` Hz
    """

    waveform: Waveform
    sample_rate: int
    source_rate: int
    channels: int
    #: "libsndfile" or "ffmpeg"
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
    decoder: str
    blocks: Iterator[npt.NDArray[np.float32]]


def read_audio(path: str | Path, *, sample_rate: int = SAMPLE_RATE, min_samples: int = 1) -> Clip:
    """Decode a file, average its channels and bring it to ``sample_rate`` Hz.

    The file goes through in blocks: memory holds the finished waveform and one
    block. A waveform of fewer than ``min_samples`` samples is refused.

    Raises AudioError when the file cannot be decoded, is empty, cut short, too
    short or out of scale, or holds samples that are not finite; MissingDependency
    when soundfile or soxr is needed and not installed.
    """
    path = Path(path)
    with _open_stream(path) as stream:
        mono = _checked_mono(stream.blocks, path)
        if stream.rate != sample_rate:
            mono = _resampled(mono, stream.rate, sample_rate)
        blocks = list(mono)
    waveform = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not len(waveform):
        raise AudioError(f"{path} holds no audio", found="0 samples")
    if len(waveform) < min_samples:
        raise _too_short(str(path), len(waveform), min_samples, sample_rate)
    return Clip(
        waveform=waveform,
        sample_rate=sample_rate,
        source_rate=stream.rate,
        channels=stream.channels,
        decoder=stream.decoder,
        resampler=RESAMPLER if stream.rate != sample_rate else None,
    )


def as_waveform(
    samples: Any,
    source_rate: int,
    *,
    sample_rate: int = SAMPLE_RATE,
    min_samples: int = 1,
) -> Waveform:
    """Bring samples already in memory to what the models hear.

    samples: (samples,) or (samples, channels) as ``soundfile.read`` gives them;
             anything numpy takes, mlx arrays included; integers are scaled by
             the range of their type
    returns: (samples,) float32 at ``sample_rate`` Hz

    Raises AudioError for another shape, too few samples, or samples that are out
    of scale or not finite.
    """
    array = np.asarray(samples)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > array.shape[0]):
        raise AudioError(
            "a waveform has the wrong shape",
            found=f"shape {array.shape}",
            expected="(samples,) or (samples, channels)",
        )
    if array.dtype.kind == "u":
        middle = float(np.iinfo(array.dtype).max // 2 + 1)
        array = (array - middle) / middle
    elif array.dtype.kind == "i":
        array = array / (np.iinfo(array.dtype).max + 1.0)
    elif array.dtype.kind != "f":
        raise AudioError(
            "a waveform has the wrong type", found=f"dtype {array.dtype}", expected="float32"
        )
    frames = array.astype(np.float32).reshape(len(array), -1)
    mono = _checked_mono([frames], "the waveform")
    if source_rate != sample_rate:
        mono = _resampled(mono, source_rate, sample_rate)
    waveform: Waveform = np.concatenate(list(mono))
    if len(waveform) < min_samples:
        raise _too_short("the waveform", len(waveform), min_samples, sample_rate)
    return waveform


def guess_seconds(path: str | Path) -> float:
    """Length of a file in seconds from its header, to share out work; never raises.

    A header that libsndfile cannot read is taken for 128 kbit/s of audio.
    """
    import soundfile

    try:
        info = soundfile.info(str(path))
        return float(info.frames) / float(info.samplerate)
    except (soundfile.SoundFileError, OSError, ZeroDivisionError):
        with contextlib.suppress(OSError):
            return Path(path).stat().st_size / GUESSED_BYTES_PER_SECOND
        return 0.0


def require_decoders() -> None:
    """Raise MissingDependency now if soundfile or soxr is not installed."""
    for name in ("soundfile", "soxr"):
        _load(name)


def _load(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"reading audio files needs {name}: {error}",
            hint="pip install 'mlx-contentvec[audio]'",
        ) from error


@contextlib.contextmanager
def _open_stream(path: Path) -> Generator[_Stream]:
    """Open a file with libsndfile, or with ffmpeg when libsndfile does not know its format."""
    soundfile = _load("soundfile")
    try:
        if path.exists() and not path.is_file():
            raise AudioError(f"{path} is not a file")
        with path.open("rb") as raw:
            beginning = raw.read(16)
        if not beginning:
            raise AudioError(f"{path} is empty", found="0 bytes")
        file = soundfile.SoundFile(str(path))
    except OSError as error:
        raise AudioError(f"{path} cannot be read: {error.strerror or error}") from error
    except soundfile.SoundFileError as error:
        with _open_ffmpeg(path, beginning, str(error)) as stream:
            yield stream
        return
    with file:
        yield _Stream(file.samplerate, file.channels, "libsndfile", _file_blocks(file, path))


def _file_blocks(file: Any, path: Path) -> Iterator[npt.NDArray[np.float32]]:
    soundfile = _load("soundfile")
    # libsndfile shortens a wav or aiff cut on the way to what is there, and only logs it
    cut = _CHUNK_CUT.search(file.extra_info)
    if cut and int(cut[2]) < int(cut[1]) != _UNKNOWN_LENGTH:
        raise AudioError(
            f"{path} is cut short",
            found=f"{int(cut[2]):,} bytes of audio",
            expected=f"{int(cut[1]):,} bytes, as its header says",
        )
    announced, decoded = file.frames, 0
    try:
        while len(block := file.read(BLOCK, dtype="float32", always_2d=True)):
            decoded += len(block)
            yield block
    except soundfile.SoundFileError as error:
        raise AudioError(
            f"{path} cannot be decoded to its end",
            found=f"an error after {decoded / file.samplerate:.2f} s ({_reason(error)})",
        ) from error
    if decoded < announced * ANNOUNCED_FRACTION:
        raise AudioError(
            f"{path} is cut short",
            found=f"{decoded / file.samplerate:.2f} s of audio",
            expected=f"{announced / file.samplerate:.2f} s, as its header says",
        )


@contextlib.contextmanager
def _open_ffmpeg(path: Path, beginning: bytes, refusal: str) -> Generator[_Stream]:
    """Decode through ``ffmpeg``, which writes a float32 .au stream: a header, then frames."""
    ffmpeg = shutil.which("ffmpeg")
    begins = f"begins with {beginning!r}"
    if ffmpeg is None:
        raise AudioError(
            f"{path} is not audio that libsndfile can decode",
            found=begins,
            expected="wav, flac, mp3, ogg, opus, aiff, au or caf",
            hint="m4a, aac, wma and other formats are decoded through ffmpeg: put it on the PATH",
        )
    command = [
        *(ffmpeg, "-nostdin", "-v", "error", "-xerror", "-i", f"file:{path.absolute()}"),
        *("-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"),
    ]
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, stdin=subprocess.DEVNULL
        ) as process,
    ):
        decoded: Any = process.stdout

        def refused() -> AudioError:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            reason = (
                said[-1].replace(f"file:{path.absolute()}: ", "") if said else "no reason given"
            )
            return AudioError(
                f"{path} is not audio that can be decoded",
                found=begins,
                hint=f"libsndfile says: {refusal.split(': ', 1)[-1]}\nffmpeg says: {reason}",
            )

        try:
            header = decoded.read(24)
            if len(header) < 24:
                process.wait()
                raise refused()
            magic, offset, _, encoding, rate, channels = struct.unpack(">4s5I", header)
            if magic != b".snd" or encoding != _AU_FLOAT:
                raise refused()
            decoded.read(offset - 24)
            yield _Stream(rate, channels, "ffmpeg", _pipe_blocks(process, channels, refused))
        finally:
            process.kill()


def _pipe_blocks(
    process: Any, channels: int, refused: Callable[[], AudioError]
) -> Iterator[npt.NDArray[np.float32]]:
    frame = 4 * channels
    while data := process.stdout.read(BLOCK * frame):
        whole = data[: len(data) - len(data) % frame]
        yield np.frombuffer(whole, ">f4").astype(np.float32).reshape(-1, channels)
    if process.wait():
        raise refused()


def _checked_mono(
    blocks: Iterable[npt.NDArray[np.float32]], where: Path | str
) -> Iterator[Waveform]:
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


def _resampled(blocks: Iterable[Waveform], rate: int, target: int) -> Iterator[Waveform]:
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
    return str(error).rstrip(".") or "no reason given"
