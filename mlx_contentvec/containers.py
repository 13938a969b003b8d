"""Whether an audio file is whole, by what its container states about itself.

FFmpeg's demuxers play what is there: of a file that was cut on the way they
give the beginning, of several files joined into one some give the first, and
neither is an error to them. Containers that state the size of their parts, or
mark their end, are walked here before anything is decoded; a few bytes of each
part are read. Headers written to a pipe hold placeholders instead of sizes:
nothing is concluded from those, and the decoder reads to the end of the file.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from .errors import AudioError

#: sizes that programs write where they do not know them, and what is near them
#: (a header's few bytes more or less): 0x7ffff000 by sox, 0xffffffff by ffmpeg
_PLACEHOLDERS = (range(0x7FFFF000 - 64, 0x80001000), range(0xFFFFFFFF - 4096, 0x100000000))
#: RIFF forms and AIFF, by which a second file that follows the first is known
_CHUNKED = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM")
#: the packets of an AVI, groups of them, and a further form
_AVI_LISTS = (b"movi", b"rec ", b"AVIX")
_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
_W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")
_EBML = bytes.fromhex("1a45dfa3")
_SEGMENT = 0x18538067
_CLUSTER = 0x1F43B675
#: what a file, a segment and a cluster hold. Source: RFC 9559, section 5.1, and RFC 8794
_MATROSKA_PARTS = frozenset(
    {
        *(0x1A45DFA3, _SEGMENT, 0xEC, 0xBF),
        *(0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367),
        *(_CLUSTER, 0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF),
    }
)
#: bytes of the longest identity and size
_MOST_EBML_HEAD = 12
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_OGG_END_OF_STREAM = 4
#: each byte with its bits in reverse: zlib's CRC is Ogg's of reversed bits
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
#: sound, pictures, data. Source: Adobe Flash Video File Format Specification 10.1, E.4.1
_FLV_TAGS = (8, 9, 18)
_VOC = b"Creative Voice File\x1a"
#: parts of one file that are looked at; more than hours of audio have
_MOST_PARTS = 4_000_000
#: bytes of the tables of an MP4 that are read
_MOST_TABLE = 1 << 20
#: how an MP4 begins
_MP4_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"})


def require_whole(file: BinaryIO, size: int, where: str) -> None:
    """Raise AudioError if a container's own statements say that audio is missing.

    file:  open for reading, anywhere; left anywhere
    size:  of the file, in bytes
    where: the file's name for the message

    Formats that state nothing (MPEG audio, ADTS, AC-3) pass.
    """
    file.seek(0)
    start = file.read(16)
    for recognised, check in _CHECKS:
        if recognised(start):
            check(file, size, where)
            return


def stated_samples(file: BinaryIO) -> tuple[int, str] | None:
    """How many samples a FLAC or MP3 file says it holds, and in what units.

    Returns (samples, "samples") from FLAC's STREAMINFO, (frames, "MPEG frames")
    from an MP3's Xing or Info frame, or None where the file states no number.
    """
    file.seek(0)
    start = file.read(10)
    at = 0
    if start[:3] == b"ID3" and len(start) == 10:
        at = 10 + sum(
            (byte & 0x7F) << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=True)
        )
        at += 10 * bool(start[5] & 0x10)
    file.seek(at)
    head = file.read(256)
    if head[:4] == b"fLaC" and len(head) >= 26:
        samples = int.from_bytes(head[21:26], "big") & 0xFFFFFFFFF
        return (samples, "samples") if samples else None
    if len(head) > 64 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        for tag in (b"Xing", b"Info"):
            offset = head.find(tag, 4, 64)
            if offset > 0 and head[offset + 7] & 1:
                frames = int.from_bytes(head[offset + 8 : offset + 12], "big")
                return (frames, "MPEG frames") if frames else None
    return None


@dataclass(frozen=True)
class StatedEnd:
    """Where an MP4's sound begins and ends, in ``timescale`` ticks a second as packets count."""

    begin: int
    end: int
    #: ticks of the last sample but one, None where there is only one
    step: int | None
    timescale: int


def stated_end(file: BinaryIO) -> StatedEnd | None:
    """The end of the first sound track of an MP4, M4A or MOV file by its tables; None if unclear.

    It is the sum of the samples' durations, or the end of the edit where that is earlier. Other
    durations (of the movie, the track and the media) are not looked at. Fragmented files, several
    edits and tables of unusual size give None. Source: ISO/IEC 14496-12, 8.6.1.2 and 8.6.6.
    """
    try:
        return _stated_end(file)
    except (struct.error, OverflowError):
        return None


def _stated_end(file: BinaryIO) -> StatedEnd | None:
    file.seek(0)
    if file.read(8)[4:] not in _MP4_BOXES:
        return None
    file.seek(0, 2)
    movie = next(_boxes(file, 0, file.tell(), b"moov"), None)
    if movie is None or next(_boxes(file, *movie, b"mvex"), None):
        return None
    header = _content(file, movie, b"mvhd")
    movie_scale = struct.unpack_from(">I", header, 20 if header[:1] == b"\1" else 12)[0]
    for track in _boxes(file, *movie, b"trak"):
        media = next(_boxes(file, *track, b"mdia"), None)
        if media is None or _content(file, media, b"hdlr")[8:12] != b"soun":
            continue
        header = _content(file, media, b"mdhd")
        timescale = struct.unpack_from(">I", header, 20 if header[:1] == b"\1" else 12)[0]
        if not timescale or not movie_scale:
            return None
        table = _content(file, media, b"minf", b"stbl", b"stts")
        runs = [(n, d) for n, d in _entries(table, ">II") if n]
        total = sum(count * duration for count, duration in runs)
        # the sample before the last
        steps = [duration for count, duration in runs[-2:] for _ in range(min(count, 2))][-2:]
        begin, first, length = _edit(_content(file, track, b"edts", b"elst"), movie_scale)
        if first is None:
            return None
        begin = round(begin * timescale / movie_scale)
        end = (
            total if length is None else min(total, first + round(length * timescale / movie_scale))
        )
        return StatedEnd(
            begin, end - first + begin, steps[0] if len(steps) > 1 else None, timescale
        )
    return None


def _edit(table: bytes, movie_scale: int) -> tuple[int, int | None, int | None]:
    """(empty time before it, its media time, its length or None) of the one edit of a table."""
    if not table:
        return 0, 0, None
    edits = _entries(table, ">QqI" if table[:1] == b"\1" else ">IiI")
    empty = sum(length for length, media, _ in edits if media == -1)
    real = [(length, media) for length, media, _ in edits if media >= 0]
    if len(real) != 1 or edits[-1][1] < 0:
        return 0, None, None
    return empty, real[0][1], real[0][0]


def _entries(table: bytes, form: str) -> list[tuple[int, ...]]:
    """As many entries of a table as it says that it has, and holds."""
    size = struct.calcsize(form)
    (stated,) = struct.unpack_from(">I", table, 4)
    count = min(stated, (len(table) - 8) // size)
    return list(struct.iter_unpack(form, table[8 : 8 + count * size]))


def _box(file: BinaryIO, at: int) -> tuple[bytes, int, int] | None:
    """(name, where its content begins, length) of an MP4's box; a length of 0 is to the end."""
    file.seek(at)
    head = file.read(16)
    if len(head) < 8:
        return None
    length, content = int.from_bytes(head[:4], "big"), at + 8
    if length == 1:
        length, content = int.from_bytes(head[8:], "big"), at + 16
    return head[4:8], content, length


def _boxes(file: BinaryIO, at: int, end: int, wanted: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) of the content of each box of a name."""
    for _ in range(_MOST_PARTS):
        box = _box(file, at)
        if box is None or at + 8 > end:
            return
        name, content, length = box
        if length == 0:
            length = end - at
        if length < content - at or at + length > end:
            return
        if name == wanted:
            yield content, at + length
        at += length


def _content(file: BinaryIO, inside: tuple[int, int], *names: bytes) -> bytes:
    """What a box holds that is found by its names; nothing where it is missing or too large."""
    for name in names:
        found = next(_boxes(file, *inside, name), None)
        if found is None:
            return b""
        inside = found
    if inside[1] - inside[0] > _MOST_TABLE:
        raise OverflowError
    file.seek(inside[0])
    return file.read(inside[1] - inside[0])


def _cut(where: str, found: int, expected: int, what: str = "its header says") -> AudioError:
    return AudioError(
        f"{where} is cut short",
        found=f"{found:,} bytes of audio",
        expected=f"{expected:,} bytes, as {what}",
        hint="copy or download it again",
    )


def _damaged(where: str, at: int, found: str) -> AudioError:
    return AudioError(
        f"{where} is damaged",
        found=f"{found}, at byte {at:,}",
        hint="copy or download it again",
    )


def _joined(where: str, at: int) -> AudioError:
    return AudioError(
        f"{where} holds several files, of which only the first would be decoded",
        found=f"another file's header at byte {at:,}",
        expected="one file",
        hint="join audio with a program that writes one header, such as ffmpeg or sox",
    )


def _is_placeholder(size: int) -> bool:
    return any(size in sizes for sizes in _PLACEHOLDERS)


def _require_riff(file: BinaryIO, size: int, where: str) -> None:
    """Wav, RF64, AIFF and AVI: chunks of a name and a size, padded to even.

    AVI has its packets in lists, which are entered, and goes on in a second form after 1 GB.
    """
    file.seek(0)
    form = file.read(4)
    order: Literal["big", "little"] = "big" if form in (b"FORM", b"RIFX") else "little"
    whole = int.from_bytes(file.read(4), order)
    is_avi = file.read(4) == b"AVI "
    if is_avi and whole + 8 > size and not _is_placeholder(whole):
        raise _cut(where, size, whole + 8)
    wide_size: int | None = None
    at = 12
    for _ in range(_MOST_PARTS):
        file.seek(at)
        head = file.read(12)
        if len(head) < 8:
            return
        name, length = head[:4], int.from_bytes(head[4:8], order)
        body = at + 8
        if is_avi and head[8:] in _AVI_LISTS and name in (b"LIST", b"RIFF"):
            at = body + 4
            continue
        if is_avi and name.strip(b"\0") and not all(0x20 <= letter < 0x7F for letter in name):
            raise _damaged(where, at, f"a chunk named {name!r}")
        if name in _CHUNKED:
            raise _joined(where, at)
        if name == b"ds64":
            wide_size = int.from_bytes(file.read(12)[4:], "little")
        if name in (b"data", b"SSND"):
            if wide_size is not None and length == 0xFFFFFFFF:
                if not wide_size and size > body:
                    raise AudioError(
                        f"{where} does not state how long it is",
                        found=f"a length of 0 before {size - body:,} bytes",
                        hint="rewrite it: ffmpeg -i FILE -c copy NEW.w64",
                    )
                length = wide_size
            elif length == 0 and whole + 8 == size:
                raise AudioError(f"{where} holds no audio", found="0 samples")
            elif length == 0:
                return
            available = size - body
            if length > available:
                if wide_size is None and _is_placeholder(length):
                    return
                raise _cut(where, available, length)
        at = body + length + length % 2


def _require_au(file: BinaryIO, size: int, where: str) -> None:
    file.seek(4)
    offset, length = struct.unpack(">2I", file.read(8).ljust(8, b"\0"))
    if length == 0xFFFFFFFF or _is_placeholder(length):
        return
    if length > size - offset:
        raise _cut(where, max(size - offset, 0), length)
    file.seek(offset + length)
    if file.read(4) == b".snd":
        raise _joined(where, offset + length)


def _require_caf(file: BinaryIO, size: int, where: str) -> None:
    at = 8
    for _ in range(_MOST_PARTS):
        file.seek(at)
        head = file.read(12)
        if head[:4] == b"caff":
            raise _joined(where, at)
        if len(head) < 12:
            return
        length = int.from_bytes(head[4:], "big", signed=True)
        if length < 0:
            return
        if length > size - at - 12:
            raise _cut(where, size - at - 12, length)
        at += 12 + length


def _require_w64(file: BinaryIO, size: int, where: str) -> None:
    at = 40
    for _ in range(_MOST_PARTS):
        file.seek(at)
        head = file.read(24)
        if head[:16] == _W64_RIFF:
            raise _joined(where, at)
        if len(head) < 24:
            return
        length = int.from_bytes(head[16:], "little")
        if length < 24:
            return
        if length > size - at:
            if head[:16] == _W64_DATA:
                raise _cut(where, size - at - 24, length - 24)
            return
        at += (length + 7) // 8 * 8


def _require_ogg(file: BinaryIO, size: int, where: str) -> None:
    """Ogg: pages with a checksum, numbered in each logical stream, the last marked as its end."""
    at = 0
    pages: dict[bytes, tuple[int, bool]] = {}
    for _ in range(_MOST_PARTS):
        file.seek(at)
        head = file.read(27 + 255)
        if head[:4] != b"OggS" or len(head) < 27:
            # tags that other programs append are no part of the stream
            if pages and not (at < size and b"OggS".startswith(head[:4])):
                break
            raise _cut(where, at, at + 27, "its last page begins")
        serial = head[14:18]
        number = int.from_bytes(head[18:22], "little")
        segments = head[27 : 27 + head[26]]
        end = at + 27 + head[26] + sum(segments)
        if len(segments) < head[26] or end > size:
            raise _cut(where, size, max(end, size + 1), "its last page says")
        file.seek(at)
        if not _is_sound_page(file.read(end - at)):
            raise _damaged(where, at, "a page whose checksum differs")
        begins = bool(head[5] & 2)
        if serial in pages and head[27 + head[26] :].startswith(b"OpusHead"):
            # one Opus file after itself: FFmpeg takes the second for what is trimmed at the end
            raise _joined(where, at)
        if serial in pages and not begins and number != pages[serial][0] + 1:
            raise AudioError(
                f"{where} has lost some of its pages",
                found=f"page {number:,} after page {pages[serial][0]:,} at byte {at:,}",
                expected=f"page {pages[serial][0] + 1:,}",
            )
        pages[serial] = (number, bool(head[5] & _OGG_END_OF_STREAM))
        at = end
        if at >= size:
            break
    if not all(ended for _, ended in pages.values()):
        raise AudioError(
            f"{where} is cut short",
            found=f"{size:,} bytes, whose last page is not the stream's last",
            expected="a last page that is marked as the end of the stream",
            hint="if nothing is missing, rewrite it: ffmpeg -i FILE -c copy NEW.ogg",
        )


def _is_sound_page(page: bytes) -> bool:
    """Whether an Ogg page has its checksum: FFmpeg drops one that has not.

    Source: RFC 3533, section 6: polynomial 0x04c11db7, bits not reversed, begun at 0.
    """
    blank = page[:22] + bytes(4) + page[26:]
    reverse = zlib.crc32(blank.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reverse:032b}"[::-1], 2) == int.from_bytes(page[22:26], "little")


def _require_mp4(file: BinaryIO, size: int, where: str) -> None:
    """MP4, M4A and MOV: boxes of a size and a name; a second ftyp begins another file."""
    at = types = 0
    for _ in range(_MOST_PARTS):
        box = _box(file, at)
        if box is None:
            return
        name, _, length = box
        if length < 8:  # 0 is to the end of the file
            return
        types += name == b"ftyp"
        if types > 1:
            raise _joined(where, at)
        if at + length > size:
            raise _cut(where, size, at + length, "its parts say")
        at += length


def _require_matroska(file: BinaryIO, size: int, where: str) -> None:
    """Matroska and WebM: elements of an identity and a size, which may be unknown.

    The segment and its clusters are entered, so that every packet's element is seen: FFmpeg
    passes over a damaged one, and what follows it up to the next cluster.
    """
    at = 0
    for _ in range(_MOST_PARTS):
        if at >= size:
            return
        element = _ebml_element(file, at)
        if element is None and size - at < _MOST_EBML_HEAD:
            raise _cut(where, size, size + 1, "its last part says")
        if element is None or element[0] not in _MATROSKA_PARTS:
            raise _damaged(where, at, "no part of a Matroska file")
        identity, body, length = element
        if length is not None and body + length > size:
            raise _cut(where, size, body + length, "its parts say")
        at = body if length is None or identity in (_SEGMENT, _CLUSTER) else body + length


def _ebml_element(file: BinaryIO, at: int) -> tuple[int, int, int | None] | None:
    """(identity, where its content begins, content's length or None) of the element at ``at``."""
    file.seek(at)
    head = file.read(_MOST_EBML_HEAD)
    if len(head) < 2 or not head[0] & 0xF0:
        return None
    width = 9 - head[0].bit_length()
    if len(head) <= width or not head[width]:
        return None
    bytes_of_length = 9 - head[width].bit_length()
    field = head[width : width + bytes_of_length]
    length = int.from_bytes(field, "big") & ((1 << 7 * bytes_of_length) - 1)
    unknown = length == (1 << 7 * bytes_of_length) - 1
    identity = int.from_bytes(head[:width], "big")
    return identity, at + width + bytes_of_length, None if unknown else length


def _require_asf(file: BinaryIO, size: int, where: str) -> None:
    """ASF (wma): the file properties state the file's size, unless it was broadcast."""
    file.seek(0)
    head = file.read(65536)
    at = head.find(_ASF_FILE_PROPERTIES, 30)
    if at < 0 or len(head) < at + 92:
        return
    stated = int.from_bytes(head[at + 40 : at + 48], "little")
    if head[at + 88] & 1 or not stated:
        return
    if stated > size:
        raise _cut(where, size, stated)
    file.seek(stated)
    if file.read(16) == _ASF:
        raise _joined(where, stated)


def _require_tta(file: BinaryIO, size: int, where: str) -> None:
    """True Audio: a table of the sizes of all frames."""
    file.seek(0)
    rate, samples = struct.unpack("<10x2I", file.read(18).ljust(18, b"\0"))
    frames = -(-samples // max(256 * rate // 245, 1))
    if frames > _MOST_PARTS:
        return
    file.seek(22)
    table = file.read(4 * frames)
    end = 22 + 4 * frames + 4 + sum(struct.unpack(f"<{len(table) // 4}I", table[: len(table) & ~3]))
    if end > size:
        raise _cut(where, size, end)
    file.seek(end)
    # a tag may stand between
    if (at := file.read(1 << 16).find(b"TTA1")) >= 0:
        raise _joined(where, end + at)


def _require_flv(file: BinaryIO, size: int, where: str) -> None:
    """Flash video: tags of a kind and a size, each followed by its whole size."""
    file.seek(5)
    at = int.from_bytes(file.read(4), "big") + 4
    for _ in range(_MOST_PARTS):
        if at >= size:
            break
        file.seek(at)
        head = file.read(4)
        if not head:  # it was shortened meanwhile
            raise _cut(where, at, size)
        if head[:3] == b"FLV":
            raise _joined(where, at)
        if head[0] & 0x1F not in _FLV_TAGS:
            raise _damaged(where, at, f"a tag of kind {head[0]}")
        at += 11 + int.from_bytes(head[1:], "big") + 4
    # some programs leave out what follows the last tag
    if at - 4 > size:
        raise _cut(where, size, at, "its parts say")


def _require_voc(file: BinaryIO, size: int, where: str) -> None:
    """Creative Voice: blocks of a kind and a size, and one byte of 0 as its end."""
    file.seek(20)
    at = int.from_bytes(file.read(2), "little")
    for _ in range(_MOST_PARTS):
        file.seek(at)
        head = file.read(4)
        if not head:
            return
        if not head[0]:
            break
        at += 4 + int.from_bytes(head[1:], "little")
        if at > size:
            raise _cut(where, size, at, "its parts say")
    file.seek(at)
    rest = file.read(1 << 16).lstrip(b"\0\x1a")
    if rest.startswith(_VOC):
        raise _joined(where, size - len(rest))
    if rest:
        raise _damaged(where, at, "an end that more follows")


def _require_mpegts(file: BinaryIO, size: int, where: str) -> None:
    """An MPEG transport stream: packets of 188 bytes, or of 192 on Blu-ray and from cameras."""
    file.seek(0)
    start = file.read(197)
    for length, sync in ((188, 0), (192, 4)):
        if len(start) > sync + length and start[sync] == start[sync + length] == 0x47:
            if size % length:
                whole = size + length - size % length
                raise _cut(where, size, whole, f"its packets of {length} bytes say")
            return


_CHECKS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int, str], None]], ...] = (
    (lambda start: start[:4] in _CHUNKED, _require_riff),
    (lambda start: start[:4] == b".snd", _require_au),
    (lambda start: start[:4] == b"caff", _require_caf),
    (lambda start: start == _W64_RIFF, _require_w64),
    (lambda start: start[:4] == b"OggS", _require_ogg),
    (lambda start: start[4:8] in _MP4_BOXES, _require_mp4),
    (lambda start: start[:4] == _EBML, _require_matroska),
    (lambda start: start == _ASF, _require_asf),
    (lambda start: start[:4] == b"TTA1", _require_tta),
    (lambda start: start[:3] == b"FLV", _require_flv),
    (lambda start: start == _VOC[:16], _require_voc),
    (lambda start: 0x47 in (start[:1] + start[4:5]), _require_mpegts),
)
