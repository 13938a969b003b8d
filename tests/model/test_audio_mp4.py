"""The end of an MP4's sound by its tables: the same count of samples with every FFmpeg."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_contentvec.audio import read_audio
from mlx_contentvec.containers import require_whole, stated_end
from mlx_contentvec.errors import AudioError
from tests.optional import ffmpeg_program

av = pytest.importorskip("av", reason="audio files need PyAV: pip install 'mlx-contentvec[audio]'")

#: of the sound that is encoded: 64 frames of AAC and 614 samples, behind one frame of delay
SAMPLES, FRAME = 66150, 1024
FOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"}
MEDIA = (b"moov", b"trak", b"mdia")

#: [name, bytes or boxes] for each box of a file
Boxes = list[list[Any]]
Write = Callable[[Boxes], Path]


def encoded(path: Path, *options: str) -> Path:
    """A tone of ``SAMPLES`` samples at 44.1 kHz as a file."""
    tone = f"sine=frequency=220:sample_rate=44100:duration={SAMPLES / 44100}"
    command = [ffmpeg_program(), "-nostdin", "-v", "error", "-f", "lavfi", "-i", tone]
    subprocess.run([*command, *options, f"{path}"], capture_output=True, check=True)
    return path


def parse(data: bytes) -> Boxes:
    boxes: Boxes = []
    at = 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + size]
        boxes.append([name, parse(content) if name in FOLDERS else content])
        at += size
    return boxes


def joined(boxes: Boxes) -> bytes:
    contents = [(n, joined(inner) if isinstance(inner, list) else inner) for n, inner in boxes]
    return b"".join(struct.pack(">I4s", len(inner) + 8, n) + inner for n, inner in contents)


def find(boxes: Boxes, *names: bytes) -> list[Any]:
    """The first box of each name inside the one before it."""
    for name in names:
        box = next(box for box in boxes if box[0] == name)
        boxes = box[1]
    return box


def set_edits(boxes: Boxes, *edits: tuple[int, int]) -> None:
    """The edit list: (milliseconds, media time in samples or -1 for silence) of each."""
    (scale,) = struct.unpack_from(">I", find(boxes, b"moov", b"mvhd")[1], 12)
    rows = [struct.pack(">IiI", ms * scale // 1000, media, 1 << 16) for ms, media in edits]
    table = struct.pack(">II", 0, len(rows)) + b"".join(rows)
    find(boxes, b"moov", b"trak", b"edts", b"elst")[1] = table


def set_steps(boxes: Boxes, *runs: tuple[int, int]) -> None:
    """The durations of the frames: (how many, samples of each)."""
    rows = [struct.pack(">II", *run) for run in runs]
    table = struct.pack(">II", 0, len(rows)) + b"".join(rows)
    find(boxes, *MEDIA, b"minf", b"stbl", b"stts")[1] = table


def set_duration(boxes: Boxes, *names: bytes, at: int, to: int) -> None:
    box = find(boxes, *names)
    box[1] = box[1][:at] + struct.pack(">I", to) + box[1][at + 4 :]


@pytest.fixture(scope="module")
def aac(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoded(tmp_path_factory.mktemp("mp4") / "a.m4a", "-c:a", "aac")


@pytest.fixture
def boxes(aac: Path) -> Boxes:
    """The boxes of a file, to be changed; its tables come behind its sound."""
    return parse(aac.read_bytes())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(boxes: Boxes) -> Path:
        path = tmp_path / "changed.m4a"
        path.write_bytes(joined(boxes))
        return path

    return write


def count(path: Path) -> int:
    rate = read_audio(path).source_rate
    return len(read_audio(path, sample_rate=rate).waveform)


def decoded(path: Path) -> int:
    """What FFmpeg gives by itself."""
    with av.open(f"{path}") as container:
        return sum(frame.samples for frame in container.decode(audio=0))


def test_a_file_is_what_its_boxes_are(aac: Path, boxes: Boxes, write: Write) -> None:
    assert write(boxes).read_bytes() == aac.read_bytes()
    assert count(aac) == SAMPLES


@pytest.mark.parametrize("second", [FRAME + 22050, FRAME + 44100, FRAME])
def test_nothing_is_taken_off_a_track_of_several_edits(
    boxes: Boxes, write: Write, second: int
) -> None:
    set_edits(boxes, (500, FRAME), (400, second))
    path = write(boxes)
    assert count(path) % FRAME == 0
    # FFmpeg 9 takes a part of the last frame off here too, by the length of both edits
    assert 0 <= count(path) - decoded(path) < FRAME


@pytest.mark.parametrize("whole", [False, True], ids=["the last step short", "all steps alike"])
@pytest.mark.parametrize("delay", [10, 20, 30, 40, 1000])
def test_an_edit_that_delays_a_track_takes_no_sound_off_its_end(
    boxes: Boxes, write: Write, delay: int, whole: bool
) -> None:
    set_edits(boxes, (delay, -1), (1500, FRAME))
    if whole:
        set_steps(boxes, (66, FRAME))
    assert count(write(boxes)) == SAMPLES


@pytest.mark.parametrize("stated", [0, 1, 10_000, 200_000, 0xFFFF_FFFF])
def test_a_wrong_duration_of_the_media_or_the_movie_changes_nothing(
    boxes: Boxes, write: Write, stated: int
) -> None:
    set_duration(boxes, *MEDIA, b"mdhd", at=16, to=stated)
    assert count(write(boxes)) == SAMPLES
    set_duration(boxes, b"moov", b"trak", b"tkhd", at=20, to=stated // 44)
    set_duration(boxes, b"moov", b"mvhd", at=16, to=stated // 44)
    assert count(write(boxes)) == SAMPLES


def test_an_edit_that_ends_earlier_ends_the_sound_within_the_last_frame_only(
    boxes: Boxes, write: Write
) -> None:
    set_edits(boxes, (1490, FRAME))
    assert count(write(boxes)) == round(1.49 * 44100)


@pytest.mark.parametrize("scale", [1, 2], ids=["of the core's rate", "of the whole rate"])
def test_he_aac_that_counts_at_either_rate_ends_where_its_tables_say(
    tmp_path: Path, write: Write, scale: int
) -> None:
    """Its decoder gives two samples for one of the core's, 2048 a frame.

    AAC of 22.05 kHz that is declared to be the core of HE-AAC: few programs can encode that.
    """
    made = parse(encoded(tmp_path / "core.m4a", "-c:a", "aac", "-ar", "22050").read_bytes())
    described = find(made, *MEDIA, b"minf", b"stbl", b"stsd")
    tag = bytes.fromhex("0580808005")  # an AudioSpecificConfig of 5 bytes
    at = described[1].index(tag) + len(tag)
    # SBR of 44.1 kHz, 22.05 kHz, mono, AAC LC. Source: ISO/IEC 14496-3, 1.6.2.1
    described[1] = described[1][:at] + bytes.fromhex("2b8a080000") + described[1][at + 5 :]
    set_duration(made, *MEDIA, b"mdhd", at=12, to=22050 * scale)
    runs = find(made, *MEDIA, b"minf", b"stbl", b"stts")[1][8:]
    set_steps(made, *((n, step * scale) for n, step in struct.iter_unpack(">II", runs)))
    set_edits(made, (1500, FRAME * scale))
    path = write(made)
    assert read_audio(path).source_rate == 44100
    assert count(path) == SAMPLES


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_mp3_in_an_mp4_is_as_long_as_what_was_encoded(tmp_path: Path, name: str) -> None:
    assert count(encoded(tmp_path / name, "-c:a", "libmp3lame")) == SAMPLES


@pytest.mark.parametrize("steps", [(66, 0), (66, FRAME)], ids=["no steps", "steps"])
@pytest.mark.parametrize("names", [(*MEDIA, b"mdhd"), (b"moov", b"mvhd")])
def test_tables_that_count_in_no_time_are_not_gone_by(
    boxes: Boxes, write: Write, names: tuple[bytes, ...], steps: tuple[int, int]
) -> None:
    set_duration(boxes, *names, at=12, to=0)
    set_steps(boxes, steps)
    track = find(boxes, b"moov", b"trak")
    track[1] = [box for box in track[1] if box[0] != b"edts"]
    assert count(write(boxes)) % FRAME == 0


def test_entries_behind_those_that_a_table_counts_are_not_read(boxes: Boxes, write: Write) -> None:
    find(boxes, *MEDIA, b"minf", b"stbl", b"stts")[1] += struct.pack(">II", 5, 1)
    with write(boxes).open("rb") as file:
        end = stated_end(file)
    assert end is not None
    assert (end.end, end.step) == (SAMPLES, FRAME)


def test_a_table_of_more_than_a_megabyte_is_not_gone_by(boxes: Boxes, write: Write) -> None:
    set_steps(boxes, *[(1, FRAME)] * 200_000)
    path = write(boxes)
    with path.open("rb") as file:
        assert stated_end(file) is None


@pytest.mark.parametrize("first", [b"ftyp", b"moov", b"wide", b"free", b"skip", b"pnot"])
def test_a_cut_file_is_known_whatever_box_it_begins_with(tmp_path: Path, first: bytes) -> None:
    path = tmp_path / "cut.mov"
    path.write_bytes(struct.pack(">I4s", 8, first) + struct.pack(">I4s", 100, b"mdat") + bytes(20))
    with path.open("rb") as file, pytest.raises(AudioError, match="cut short"):
        require_whole(file, path.stat().st_size, path.name)
