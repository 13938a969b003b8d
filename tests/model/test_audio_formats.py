"""Every container and codec against ffmpeg's own count of samples: all of the audio, or refused."""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlx_contentvec import containers
from mlx_contentvec.audio import read_audio
from mlx_contentvec.errors import AudioError
from tests.optional import ffmpeg_program

av = pytest.importorskip("av", reason="audio files need PyAV: pip install 'mlx-contentvec[audio]'")

PYAV = int(av.__version__.partition(".")[0])
#: name -> the arguments that encode it, and ffmpeg's name for the container
FORMATS = {
    "s16.wav": ("-c:a pcm_s16le", "wav"),
    "u8.wav": ("-c:a pcm_u8", "wav"),
    "s24.wav": ("-c:a pcm_s24le", "wav"),
    "s32.wav": ("-c:a pcm_s32le", "wav"),
    "f32.wav": ("-c:a pcm_f32le", "wav"),
    "f64.wav": ("-c:a pcm_f64le", "wav"),
    "s64.wav": ("-c:a pcm_s64le -ac 2", "wav"),
    "alaw.wav": ("-c:a pcm_alaw", "wav"),
    "mulaw.wav": ("-c:a pcm_mulaw -ac 2", "wav"),
    "adpcm.wav": ("-c:a adpcm_ms", "wav"),
    "ima.wav": ("-c:a adpcm_ima_wav", "wav"),
    "g722.wav": ("-c:a g722 -ar 16000", "wav"),
    "stereo.wav": ("-ac 2", "wav"),
    "surround.wav": ("-ac 6", "wav"),
    "8000.wav": ("-ar 8000", "wav"),
    "odd.wav": ("-ar 12347", "wav"),
    "a.rf64": ("-rf64 always", "wav"),
    "a.w64": ("", "w64"),
    "a.aiff": ("", "aiff"),
    "s24.aiff": ("-c:a pcm_s24be", "aiff"),
    "mulaw.aifc": ("-c:a pcm_mulaw", "aiff"),
    "f32.aifc": ("-c:a pcm_f32be -ac 2", "aiff"),
    "a.au": ("", "au"),
    "alaw.au": ("-c:a pcm_alaw", "au"),
    "f64.au": ("-c:a pcm_f64be -ar 11025", "au"),
    "a.caf": ("", "caf"),
    "alac.caf": ("-c:a alac", "caf"),
    "stereo.w64": ("-c:a pcm_s24le -ac 2", "w64"),
    "96000.flac": ("-ar 96000 -ac 6", "flac"),
    "a.flac": ("", "flac"),
    "s24.flac": ("-sample_fmt s32 -ac 2", "flac"),
    "a.mp3": ("", "mp3"),
    "vbr.mp3": ("-q:a 4 -ac 2", "mp3"),
    "noxing.mp3": ("-write_xing 0", "mp3"),
    "cbr.mp3": ("-b:a 64k -write_xing 0 -write_id3v2 0 -ar 22050", "mp3"),
    "a.mp2": ("", "mp2"),
    "a.ogg": ("-c:a libvorbis", "ogg"),
    "flac.ogg": ("-c:a flac", "ogg"),
    "a.opus": ("", "ogg"),
    "a.m4a": ("", "mp4"),
    "fast.m4a": ("-movflags faststart", "mp4"),
    "fragments.m4a": ("-movflags frag_keyframe+empty_moov -frag_duration 250000", "mp4"),
    "alac.m4a": ("-c:a alac", "mp4"),
    "a.mov": ("-c:a pcm_s16le", "mov"),
    "a.mka": ("-c:a libvorbis", "matroska"),
    "flac.mka": ("-c:a flac", "matroska"),
    "aac.mkv": ("-c:a aac -ac 2", "matroska"),
    "a.webm": ("-c:a libopus", "webm"),
    "a.aac": ("", "adts"),
    "a.ts": ("-c:a aac", "mpegts"),
    "blu-ray.ts": ("-c:a ac3 -mpegts_m2ts_mode 1", "mpegts"),
    "a.ac3": ("", "ac3"),
    "a.eac3": ("-ac 6", "eac3"),
    "a.wma": ("", "asf"),
    "v1.wma": ("-c:a wmav1 -ac 2", "asf"),
    "a.tta": ("", "tta"),
    "a.wv": ("", "wv"),
    "a.avi": ("-c:a pcm_s16le", "avi"),
    "a.flv": ("-c:a pcm_s16le -ar 22050", "flv"),
    "mp3.flv": ("-c:a mp3", "flv"),
    "a.voc": ("-c:a pcm_u8", "voc"),
    "stereo.voc": ("-c:a pcm_s16le -ac 2", "voc"),
}
#: written to a pipe, these do not state their length and ffmpeg itself reads none of them
NOT_PIPED = {
    *("a.rf64", "a.w64", "stereo.w64", "a.aiff", "s24.aiff", "mulaw.aifc", "f32.aifc"),
    *("a.m4a", "fast.m4a", "alac.m4a", "a.mov", "alac.caf"),
}
SECONDS = 1.5
#: samples that an encoder puts in front: FFmpeg 7.0 writes into Matroska that they are to be
#: taken off, and leaves them there. FFmpeg 5.1 does neither, 8.1 takes them off
STATED_DELAY = {"aac.mkv": 1024}
#: samples that fill the last frame, which the file states to be none: FFmpeg takes them off since 9
PADDED_END = {"a.m4a": 410, "fast.m4a": 410}


@functools.cache
def ffmpeg(*arguments: str, pass_fds: tuple[int, ...] = ()) -> bytes:
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-y", *arguments]
    return subprocess.run(command, capture_output=True, check=True, pass_fds=pass_fds).stdout


def counted(path: Path) -> int:
    """Samples by ffmpeg's own count, less what its version leaves there and 9 does not.

    Skips where that depends on the version and it is not a number, as of a nightly build.
    """
    if (decoded := Path(f"{path}.u8")).exists():
        count = decoded.stat().st_size
    else:
        count = len(ffmpeg("-i", f"{path}", "-map", "0:a:0", "-f", "u8", "-ac", "1", "pipe:1"))
    delay = STATED_DELAY.get(path.name.removeprefix("piped-"), 0)
    padding = PADDED_END.get(path.name, 0)
    if not delay and not padding:
        return count
    said = ffmpeg("-version").decode()
    version = re.match(r"ffmpeg version n?(\d+)\.(\d+)", said)
    if version is None:
        pytest.skip(f"needs a release of ffmpeg, this is {' '.join(said.split()[:3])}")
    major, minor = int(version[1]), int(version[2])
    return count - (delay if (major, minor) == (7, 0) else 0) - (padding if major < 9 else 0)


def read_count(path: Path) -> int:
    """Samples as decoded: the rate is left as it is."""
    rate = read_audio(path).source_rate
    return len(read_audio(path, sample_rate=rate).waveform)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shared: Callable[..., Path]) -> Path:
    """A recording, ``voice.wav``, and what was made of it; tests write more into it."""
    formats = shared("formats", write_formats)
    return Path(shutil.copytree(formats, tmp_path_factory.mktemp("formats") / "formats"))


def write_formats(folder: Path) -> None:
    folder.mkdir()
    write_voice(folder / "voice.wav")
    try:
        make_all(folder)
    except subprocess.CalledProcessError:
        # an encoder is missing: each test makes its own file, and one says so
        for path in folder.iterdir():
            if path.name != "voice.wav":
                path.unlink()


def write_voice(path: Path) -> None:
    time = np.arange(round(SECONDS * 44100)) / 44100
    voice = 0.3 * np.sin(2 * np.pi * 220 * time)
    # noise at the start misleads an estimate from the first frames' bit rate
    voice += 0.1 * np.random.default_rng(0).standard_normal(len(time)) * (time < 0.3)
    samples = (voice * 32767).astype("<i2").tobytes()
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16,
                         1, 1, 44100, 88200, 2, 16, b"data", len(samples))  # fmt: skip
    path.write_bytes(header + samples)


def make_all(folder: Path) -> None:
    """Write every format as a file and through a pipe, and what ffmpeg decodes of each.

    By two processes of ffmpeg, which takes longer to start than to do one of them.
    """
    arguments = ["-i", f"{folder / 'voice.wav'}"]
    made, pipes = [], []
    with ThreadPoolExecutor(len(FORMATS)) as readers:
        for name, (options, container) in FORMATS.items():
            made.append(folder / name)
            arguments += [*options.split(), "-f", container, f"{made[-1]}"]
            if name not in NOT_PIPED:
                made.append(folder / f"piped-{name}")
                source, sink = os.pipe()
                readers.submit(write_all, source, made[-1])
                pipes.append(sink)
                arguments += [*options.split(), "-f", container, f"pipe:{sink}"]
        try:
            ffmpeg(*arguments, pass_fds=tuple(pipes))
        finally:
            for sink in pipes:
                os.close(sink)
    inputs = [word for path in made for word in ("-i", f"{path}")]
    outputs = [
        word
        for number, path in enumerate(made)
        for word in ("-map", f"{number}:a:0", "-f", "u8", "-ac", "1", f"{path}.u8")
    ]
    ffmpeg(*inputs, *outputs)


def write_all(source: int, path: Path) -> None:
    with os.fdopen(source, "rb") as stream:
        path.write_bytes(stream.read())


def made(folder: Path, name: str, *, piped: bool = False) -> Path:
    options, container = FORMATS[name]
    path = folder / f"{'piped-' if piped else ''}{name}"
    if not path.exists():
        arguments = ["-i", f"{folder / 'voice.wav'}", *options.split(), "-f", container]
        if piped:
            path.write_bytes(ffmpeg(*arguments, "pipe:1"))
        else:
            ffmpeg(*arguments, f"{path}")
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_file_gives_ffmpegs_count_of_samples(folder: Path, name: str) -> None:
    path = made(folder, name)
    assert read_count(path) == counted(path)
    assert counted(path) / read_audio(path).source_rate == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("name", PADDED_END)
def test_the_padding_of_an_mp4s_last_frame_is_no_sound(folder: Path, name: str) -> None:
    """Whatever PyAV's version: FFmpeg 8 and before leave it there."""
    assert read_count(made(folder, name)) == round(SECONDS * 44100)


def test_a_last_frame_is_kept_whole_where_an_mp4s_tables_contradict_it(folder: Path) -> None:
    data = made(folder, "a.m4a").read_bytes()
    at = data.index(b"stts") + 8
    frames = int.from_bytes(data[at + 4 : at + 8], "big") + 1
    # every frame half as long as it is: the last is no shorter than the others
    half = struct.pack(">4I", frames - 1, 512, 1, 200)
    path = folder / "half.m4a"
    path.write_bytes(data[: at + 4] + half + data[at + 20 :])
    # the encoder's delay, which the edit leaves out, is then two frames
    assert read_count(path) == (frames - 2) * 1024


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in NOT_PIPED])
def test_a_piped_file_gives_ffmpegs_count_of_samples(folder: Path, name: str) -> None:
    path = made(folder, name, piped=True)
    assert read_count(path) == counted(path)


@pytest.mark.parametrize("name", ["a.rf64", "a.w64", "a.aiff"])
def test_a_piped_file_that_ffmpeg_does_not_read_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(AudioError):
        read_audio(made(folder, name, piped=True))


@pytest.mark.parametrize("part", [0.35, 0.6, 0.97])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_refused(folder: Path, name: str, part: float) -> None:
    data = made(folder, name).read_bytes()
    path = folder / f"cut-{name}"
    path.write_bytes(data[: int(len(data) * part) // 2 * 2 + 1])
    with pytest.raises(AudioError, match=r"cut short|to its end|lost some of its pages|can be dec"):
        read_audio(path)


@pytest.mark.parametrize("name", FORMATS)
def test_joined_files_give_all_of_their_audio_or_are_refused(folder: Path, name: str) -> None:
    path = made(folder, name)
    joined = folder / f"joined-{name}"
    joined.write_bytes(2 * path.read_bytes())
    try:
        samples = read_count(joined)
    except AudioError as error:
        assert re.search(
            "holds several files|1.50 s., then an error|more than its header", str(error)
        )
        return
    # what frames overlap by at the joint is heard, what encoders pad with may be
    assert samples >= 2 * read_count(path)


@pytest.mark.parametrize(
    "size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF - 36, 2**32 - 1]
)
def test_a_placeholder_for_a_wavs_length_is_no_length(folder: Path, size: int) -> None:
    data = bytearray((folder / "voice.wav").read_bytes())
    data[40:44] = struct.pack("<I", size)
    data[4:8] = struct.pack("<I", min(size + 36, 0xFFFFFFFF) if size else 0)
    (folder / "placeholder.wav").write_bytes(data)
    assert read_count(folder / "placeholder.wav") == round(SECONDS * 44100)


def test_no_samples_stated_in_a_whole_wav_are_none(folder: Path) -> None:
    data = bytearray((folder / "voice.wav").read_bytes()[:44]) + b"LIST" + bytes([4, 0, 0, 0]) * 2
    data[40:44] = bytes(4)
    data[4:8] = struct.pack("<I", len(data) - 8)
    (folder / "none.wav").write_bytes(data)
    with pytest.raises(AudioError, match="holds no audio"):
        read_audio(folder / "none.wav")


def test_a_flac_of_unknown_length_is_read(folder: Path) -> None:
    path = made(folder, "a.flac")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (folder / "unknown.flac").write_bytes(data)
    assert read_count(folder / "unknown.flac") == read_count(path)


def test_a_flac_cut_between_frames_is_known_by_its_count(folder: Path) -> None:
    path = made(folder, "a.flac")
    data = bytearray(path.read_bytes())
    data[22:26] = struct.pack(">I", read_count(path) + 4608)
    (folder / "fewer.flac").write_bytes(data)
    with pytest.raises(AudioError, match="cut short") as refused:
        read_audio(folder / "fewer.flac")
    assert "66,150 samples (1.50 s)" in str(refused.value)
    assert "70,758 samples" in str(refused.value)


def test_a_flac_with_another_file_behind_it_is_not_read_across_both(folder: Path) -> None:
    """Up to PyAV 17 a packet that ends in what is no FLAC fails as a whole."""
    both = made(folder, "a.flac").read_bytes() + made(folder, "flac.ogg").read_bytes()
    (folder / "two.flac").write_bytes(both)
    said = "more than its header says" if PYAV >= 18 else "cannot be decoded to its end"
    with pytest.raises(AudioError, match=said):
        read_audio(folder / "two.flac")


def test_an_mp3_cut_between_frames_is_known_by_its_count(folder: Path) -> None:
    path = made(folder, "a.mp3")
    data = path.read_bytes()
    at = data.index(b"Info")
    frames = int.from_bytes(data[at + 8 : at + 12], "big")
    more = data[: at + 8] + struct.pack(">I", frames + 10) + data[at + 12 :]
    (folder / "fewer.mp3").write_bytes(more)
    with pytest.raises(AudioError, match=f"{frames + 10} MPEG frames, as its header says"):
        read_audio(folder / "fewer.mp3")


def test_tags_around_an_mp3_are_not_audio(folder: Path) -> None:
    path = made(folder, "noxing.mp3")
    tagged = folder / "tagged.mp3"
    tagged.write_bytes(path.read_bytes() + b"TAG" + bytes(125))
    assert read_count(tagged) == read_count(path)


def test_a_lost_page_of_an_ogg_is_noticed(folder: Path) -> None:
    data = made(folder, "flac.ogg").read_bytes()
    pages = data.split(b"OggS")
    (folder / "lost.ogg").write_bytes(b"OggS".join(pages[:3] + pages[4:]))
    with pytest.raises(AudioError, match="lost some of its pages"):
        read_audio(folder / "lost.ogg")


@pytest.mark.parametrize("fill", [b"\0", b"\x9d"])
@pytest.mark.parametrize(
    "name", ["a.ogg", "flac.ogg", "a.opus", "a.mka", "a.webm", "a.flv", "a.voc", "a.avi"]
)
def test_a_file_damaged_in_the_middle_is_refused(folder: Path, name: str, fill: bytes) -> None:
    """FFmpeg leaves out what its containers show to be damaged, and decodes the rest."""
    data = bytearray(made(folder, name).read_bytes())
    middle, length = len(data) // 2, len(data) // 6
    data[middle : middle + length] = fill * length
    path = folder / f"damaged-{name}"
    path.write_bytes(data)
    with pytest.raises(AudioError, match=r"is damaged|cut short|to its end|more follows"):
        read_audio(path)


def test_an_avi_may_hold_a_chunk_of_a_programs_own(folder: Path) -> None:
    """Adobe's programs write their metadata into one called ``_PMX``."""
    data = made(folder, "a.avi").read_bytes()
    own = b"_PMX" + (6).to_bytes(4, "little") + b"<x/>\n\0"
    whole = (int.from_bytes(data[4:8], "little") + len(own)).to_bytes(4, "little")
    with_own = folder / "own.avi"
    with_own.write_bytes(data[:4] + whole + data[8:] + own)
    assert read_count(with_own) == read_count(folder / "a.avi")


def test_an_avi_that_goes_on_in_a_second_form_is_read_whole(folder: Path) -> None:
    """As every AVI of more than 1 GB does. Source: OpenDML AVI File Format Extensions, 1.02."""
    data = made(folder, "a.avi").read_bytes()
    packets = data[data.index(b"movi") - 8 : data.index(b"idx1")]
    more = folder / "more.avi"
    more.write_bytes(data + struct.pack("<4sI4s", b"RIFF", 4 + len(packets), b"AVIX") + packets)
    assert read_count(more) == counted(more) > read_count(folder / "a.avi") + 44100


def test_a_short_opus_joined_to_itself_is_refused_and_to_another_read(folder: Path) -> None:
    """Each is one page of sound; a file of a few pages gives all of both."""
    short = [
        ffmpeg("-i", f"{folder / 'voice.wav'}", "-t", f"{0.3 + i / 1000}", "-f", "ogg", "-c:a",
               "libopus", "-serial_offset", f"{i}", "pipe:1")
        for i in (0, 1)
    ]  # fmt: skip
    (folder / "twice.opus").write_bytes(2 * short[0])
    with pytest.raises(AudioError, match="holds several files"):
        read_audio(folder / "twice.opus")
    (folder / "both.opus").write_bytes(b"".join(short))
    assert read_count(folder / "both.opus") == pytest.approx(0.6 * 48000, abs=100)


def with_its_checksum(page: bytes) -> bytes:
    """An Ogg page with the checksum of RFC 3533, bit by bit."""
    crc = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
    return page[:22] + struct.pack("<I", crc) + page[26:]


def test_opus_that_falls_silent_after_an_unknown_page_is_refused(folder: Path) -> None:
    short = ffmpeg("-i", f"{folder / 'voice.wav'}", "-t", "0.3", "-f", "ogg", "-c:a", "libopus",
                   "pipe:1")  # fmt: skip
    second = bytearray(short)
    second[second.index(b"OpusHead") : second.index(b"OpusHead") + 8] = b"OpusHeat"
    head = second.index(b"OggS", 4)
    (folder / "silent.opus").write_bytes(
        short + with_its_checksum(bytes(second[:head])) + second[head:]
    )
    with pytest.raises(AudioError, match=r"no sound any more|to its end"):
        read_audio(folder / "silent.opus")


def test_an_ogg_without_its_last_page_is_cut_short(folder: Path) -> None:
    data = made(folder, "flac.ogg").read_bytes()
    (folder / "ended.ogg").write_bytes(data[: data.rindex(b"OggS")])
    with pytest.raises(AudioError, match="whose last page is not the stream's last"):
        read_audio(folder / "ended.ogg")


@pytest.mark.parametrize("name", ["a.mp3", "a.ogg", "a.aac"])
def test_joined_files_of_different_rates_are_refused(folder: Path, name: str) -> None:
    options, container = FORMATS[name]
    other = ffmpeg("-i", f"{folder / 'voice.wav'}", *options.split(), "-ar", "32000",
                   "-f", container, "pipe:1")  # fmt: skip
    (folder / f"mixed-{name}").write_bytes(made(folder, name).read_bytes() + other)
    with pytest.raises(AudioError, match=r"changes its sample rate|to its end"):
        read_audio(folder / f"mixed-{name}")


@pytest.mark.parametrize("name", ["u8.wav", "s24.wav", "s32.wav", "f32.wav", "s24.flac", "a.caf"])
def test_samples_are_those_that_ffmpeg_decodes(folder: Path, name: str) -> None:
    path = made(folder, name)
    decoded = ffmpeg("-i", f"{path}", "-f", "f32le", "pipe:1")
    channels = read_audio(path).channels
    expected = np.frombuffer(decoded, "<f4").reshape(-1, channels).mean(axis=1)
    np.testing.assert_array_equal(read_audio(path, sample_rate=44100).waveform, expected)


def decoded(path: Path) -> np.ndarray:
    """ffmpeg's own samples, (samples, channels) as 16-bit numbers of one channel."""
    return np.frombuffer(ffmpeg("-i", f"{path}", "-ac", "1", "-f", "s16le", "pipe:1"), np.int16)


def test_adpcm_of_one_block_a_packet_is_decoded_as_ffmpeg_decodes_it(folder: Path) -> None:
    path = folder / "swf.wav"
    path.write_bytes(
        ffmpeg("-i", f"{folder / 'voice.wav'}", "-c:a", "adpcm_swf", "-ar", "44100", "-ac", "1",
               "-f", "wav", "pipe:1")
    )  # fmt: skip
    got = read_audio(path, sample_rate=44100).waveform
    expected = decoded(path)
    assert len(got) == len(expected)
    assert np.abs(got - expected / 32768).max() < 1e-4


@pytest.mark.parametrize(("channels", "alignment"), [(1, 5), (1, 7), (2, 3), (2, 6)])
def test_a_wav_of_a_wrong_alignment_is_read_whole(
    folder: Path, channels: int, alignment: int
) -> None:
    """FFmpeg drops what a packet holds beyond whole frames; its own packets hold none here."""
    samples = (np.sin(np.arange(160000) / 20) * 9000).astype("<i2").tobytes()
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16,
        1, channels, 16000, 32000 * channels, alignment, 16, b"data", len(samples),
    )  # fmt: skip
    path = folder / "aligned.wav"
    path.write_bytes(head + samples)
    got = read_audio(path).waveform
    expected = np.frombuffer(samples, "<i2").reshape(-1, channels).mean(axis=1) / 32768
    assert np.abs(got - expected).max() < 1e-6


def test_a_transport_stream_with_a_track_that_begins_later_is_read_whole_or_refused(
    folder: Path,
) -> None:
    """As of a broadcast that goes on in two languages.

    Up to PyAV 18 the new one's packets are an IndexError; PyAV 19 passes them over.
    """
    voice = f"{folder / 'voice.wav'}"
    two = ffmpeg("-i", voice, "-i", voice, "-map", "0:a", "-map", "1:a", "-c:a", "mp2",
                 "-f", "mpegts", "pipe:1")  # fmt: skip
    one = ffmpeg("-i", voice, "-c:a", "mp2", "-f", "mpegts", "pipe:1") * 10
    path = folder / "broadcast.ts"
    path.write_bytes(one + two + one)
    if PYAV >= 19:
        assert read_count(path) == counted(path)
        return
    with pytest.raises(AudioError, match="begins after its first packets") as caught:
        read_audio(path)
    hint = re.search(r"ffmpeg (-i .*)", str(caught.value))
    assert hint is not None
    sound = folder / "sound.mka"
    ffmpeg(*hint[1].replace("FILE", f"{path}").replace("NEW.mka", f"{sound}").split())
    assert read_count(sound) == counted(path)


def test_a_flash_video_that_is_shortened_while_it_is_read_is_cut(folder: Path) -> None:
    data = made(folder, "a.flv").read_bytes()
    with pytest.raises(AudioError, match="is cut short"):
        containers._require_flv(io.BytesIO(data[:13]), len(data), "a.flv")


@pytest.mark.parametrize("alignment", [1, 2, 4])
@pytest.mark.parametrize(
    ("tag", "channels", "bits"),
    [(1, 1, 24), (6, 3, 8), (7, 3, 8)],
    ids=["24 bits", "A-law", "mu-law"],
)
def test_a_wav_whose_blocks_end_within_a_sample_is_refused(
    folder: Path, alignment: int, tag: int, channels: int, bits: int
) -> None:
    samples = np.arange(90000, dtype=np.uint8).tobytes()
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16,
        tag, channels, 16000, 48000, alignment, bits, b"data", len(samples),
    )  # fmt: skip
    path = folder / "within.wav"
    path.write_bytes(head + samples)
    with pytest.raises(AudioError, match="end within a sample"):
        read_audio(path)


def test_dts_in_a_wav_that_says_pcm_is_not_noise(folder: Path) -> None:
    dts = ffmpeg("-i", f"{folder / 'voice.wav'}", "-ar", "48000", "-ac", "2", "-strict", "-2",
                 "-c:a", "dca", "-b:a", "1411200", "-f", "dts", "pipe:1")  # fmt: skip
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(dts), b"WAVE", b"fmt ", 16,
                         1, 2, 48000, 192000, 4, 16, b"data", len(dts))  # fmt: skip
    (folder / "dts.wav").write_bytes(header + dts)
    assert read_count(folder / "dts.wav") == counted(folder / "dts.wav")
    assert np.abs(read_audio(folder / "dts.wav").waveform[8000:]).max() < 0.5


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a"])
def test_a_file_whose_tags_are_not_utf_8_is_read(folder: Path, name: str) -> None:
    options, container = FORMATS[name]
    data = ffmpeg("-i", f"{folder / 'voice.wav'}", *options.split(), "-metadata", "title=MARKER",
                  "-f", container, "-movflags", "frag_keyframe+empty_moov", "pipe:1")  # fmt: skip
    assert b"MARKER" in data
    tagged = folder / f"tags-{name}"
    tagged.write_bytes(data.replace(b"MARKER", b"\xff\xfe\xc3(\x80\xe9"))
    plain = folder / f"no-tags-{name}"
    plain.write_bytes(data)
    assert read_count(tagged) == read_count(plain)


@pytest.mark.parametrize("refused", [True, False], ids=["PyAV 19", "PyAV 18"])
def test_pyav_is_asked_to_ignore_bad_tags_where_it_takes_that_argument(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    opened = av.open
    asked = []

    def of_a_version(file: object, **options: object) -> object:
        if "metadata_errors" in options and refused:
            raise TypeError("open() got an unexpected keyword argument 'metadata_errors'")
        asked.append(options.pop("metadata_errors", None))
        return opened(file, **options)

    monkeypatch.setattr(av, "open", of_a_version)
    assert read_count(folder / "voice.wav") == round(SECONDS * 44100)
    assert set(asked) == {None if refused else "ignore"}


def test_a_video_without_sound_is_named_as_one(folder: Path) -> None:
    ffmpeg("-f", "lavfi", "-i", "color=size=32x32:duration=0.2", "-c:v", "mpeg4",
           f"{folder / 'silent.mp4'}")  # fmt: skip
    with pytest.raises(AudioError, match="has no sound") as refused:
        read_audio(folder / "silent.mp4")
    assert "video without an audio track" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile voice.wav\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nvoice.wav\n",
    ],
)
def test_a_playlist_opens_no_other_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "list.wav").write_text(text)
    with pytest.raises(AudioError, match="is not audio that can be decoded"):
        read_audio(folder / "list.wav")
