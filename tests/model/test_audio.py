from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import audio
from mlx_contentvec.audio import RESAMPLER, as_waveform, guess_seconds, read_audio, require_decoders
from mlx_contentvec.errors import AudioError, MissingDependency
from tests.optional import ffmpeg_program

pytest.importorskip("av", reason="audio files need PyAV: pip install 'mlx-contentvec[audio]'")
soundfile = pytest.importorskip(
    "soundfile", reason="these tests write files with soundfile: pip install soundfile"
)
soxr = pytest.importorskip(
    "soxr", reason="resampling needs soxr: pip install 'mlx-contentvec[audio]'"
)


def tone(seconds: float, rate: int = 16000, channels: int = 1) -> np.ndarray:
    """(samples,) or (samples, channels): a sine an octave higher in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    sines = [0.3 * np.sin(2 * np.pi * 220 * 2**channel * time) for channel in range(channels)]
    return np.squeeze(np.stack(sines, axis=1)).astype(np.float32)


def written(path: Path, samples: np.ndarray, rate: int = 16000, **options: str) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def test_a_16_khz_mono_file_arrives_sample_for_sample(tmp_path: Path) -> None:
    samples = tone(1.0)
    clip = read_audio(written(tmp_path / "a.wav", samples, subtype="FLOAT"))
    assert clip.waveform.dtype == np.float32
    np.testing.assert_array_equal(clip.waveform, samples)
    assert (clip.source_rate, clip.channels) == (16000, 1)
    assert re.fullmatch(r"PyAV \d+\.\d+\.\d+", clip.decoder)
    assert clip.resampler is None
    assert clip.seconds == 1.0


def test_integer_samples_are_scaled_as_soundfile_scales_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(0.2), subtype="PCM_16")
    integers, _ = soundfile.read(path, dtype="int16")
    clip = read_audio(path)
    np.testing.assert_array_equal(clip.waveform, integers.astype(np.float32) / 32768)
    np.testing.assert_array_equal(as_waveform(integers, 16000), clip.waveform)


def test_channels_are_averaged_and_the_rate_is_changed_by_soxr(tmp_path: Path) -> None:
    # several blocks long, so that the joins of the streamed resampler are in it
    samples = tone(4.0, rate=44100, channels=2)
    clip = read_audio(written(tmp_path / "a.wav", samples, 44100, subtype="FLOAT"))
    whole = soxr.resample(samples.mean(axis=1), 44100, 16000, quality="VHQ")
    np.testing.assert_array_equal(clip.waveform, whole)
    np.testing.assert_array_equal(as_waveform(samples, 44100), whole)
    assert (clip.source_rate, clip.channels, clip.resampler) == (44100, 2, RESAMPLER)


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3", "aiff"])
def test_other_formats_hold_the_same_tone(tmp_path: Path, suffix: str) -> None:
    samples = tone(1.0, rate=22050)
    clip = read_audio(written(tmp_path / f"a.{suffix}", samples, 22050))
    expected = tone(1.0)
    length = min(len(clip.waveform), len(expected))
    assert length > 15900
    inner = slice(800, length - 800)
    assert np.abs(clip.waveform[inner] - expected[inner]).max() < 0.02


def test_an_m4a_of_an_odd_name_is_read(tmp_path: Path) -> None:
    source = written(tmp_path / "a.wav", tone(1.0, rate=44100, channels=2), 44100)
    m4a = tmp_path / "-odd name: 1%.m4a"
    subprocess.run(
        [ffmpeg_program(), "-nostdin", "-v", "error", "-i", source, "-c:a", "aac", f"file:{m4a}"],
        check=True,
    )
    clip = read_audio(m4a)
    assert (clip.source_rate, clip.channels) == (44100, 2)
    assert 15900 < len(clip.waveform) < 17000
    assert 0.2 < np.abs(clip.waveform[4000:12000]).max() < 0.4


def test_text_named_wav_is_refused_and_quoted(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("<!DOCTYPE html> not found")
    with pytest.raises(AudioError, match="begins with b'<!DOCTYPE html> '"):
        read_audio(tmp_path / "a.wav")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(AudioError, match="is empty"):
        read_audio(tmp_path / "a.wav")


def test_a_file_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="holds no audio"):
        read_audio(written(tmp_path / "a.wav", np.zeros(0, np.float32)))


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_not_a_readable_file_is_an_audio_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(AudioError, match=r"cannot be read: No such file|is not a file"):
        read_audio(path)


def test_a_clip_too_short_for_a_frame_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(1.0)[:100])
    assert len(read_audio(path).waveform) == 100
    with pytest.raises(AudioError, match="100 samples"):
        read_audio(path, min_samples=400)
    with pytest.raises(AudioError, match="too short"):
        as_waveform(np.zeros(399, np.float32), 16000, min_samples=400)


#: NaN that a conversion to another width makes numpy warn of
SIGNALLING = np.array([0x7FF0_0000_0000_0001], np.uint64).view(np.float64)[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300, SIGNALLING])
def test_samples_of_other_widths_are_refused_without_a_warning(value: float) -> None:
    samples = np.zeros(1000)
    samples[700] = value
    with pytest.raises(AudioError, match="frame 700"):
        as_waveform(samples, 16000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused_and_found(tmp_path: Path, value: float) -> None:
    samples = tone(6.0)
    samples[70000] = value  # in the second block
    with pytest.raises(AudioError, match="frame 70,000"):
        read_audio(written(tmp_path / "a.wav", samples, subtype="FLOAT"))
    with pytest.raises(AudioError, match="not finite"):
        as_waveform(samples, 16000)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "mp3"])
def test_a_file_cut_on_the_way_is_refused(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=80000)
    path = written(tmp_path / f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"cut short|cannot be decoded to its end"):
        read_audio(path)


def test_a_wav_written_to_a_pipe_has_no_length_and_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(1.0))
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(read_audio(path).waveform) == 16000


def test_a_waveform_of_the_wrong_shape_or_type_is_refused() -> None:
    with pytest.raises(AudioError, match=r"shape \(2, 16000\)"):
        as_waveform(np.zeros((2, 16000), np.float32), 16000)
    with pytest.raises(AudioError, match="dtype complex64"):
        as_waveform(np.zeros(16000, np.complex64), 16000)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(AudioError, match="is not a file"):
        read_audio(path)
    assert guess_seconds(path) == 0.0


def test_a_clip_that_does_not_fit_its_memory_is_refused_with_the_figures(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(20.0, rate=8000), 8000)
    assert len(read_audio(path, max_memory=4 * 16000 * 20).waveform) == 16000 * 20
    with pytest.raises(AudioError, match="too long for the memory") as refused:
        read_audio(path, max_memory=4 * 16000 * 15)
    assert "960,000 bytes (15 s) at most" in str(refused.value)
    assert re.search(r"1[56] s or more: [\d,]+ bytes at 16000 Hz", str(refused.value))


def test_without_a_bound_a_quarter_of_the_memory_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "a.wav", tone(1.0))
    monkeypatch.setattr("mlx_contentvec.audio.physical_memory", lambda: 4 * 4 * 15999)
    with pytest.raises(AudioError, match="too long for the memory"):
        read_audio(path)


def test_a_long_clip_of_a_low_rate_takes_no_memory_before_it_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", np.zeros(1_000_000, np.int16), 1000, subtype="PCM_U8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AudioError, match="too long for the memory"):
        read_audio(path, max_memory=1 << 20)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 32 << 20


@pytest.mark.parametrize("channels", [1, 2, 255])
def test_a_block_of_many_channels_is_no_larger_than_one_of_few(channels: int) -> None:
    frames = [(16000, np.zeros((512, channels), np.float32))] * (600 // channels + 300)
    blocks = list(audio._blocks(frames, 16000, "x.wav"))
    assert sum(map(len, blocks)) == 512 * len(frames)
    assert len(blocks) > 1
    assert max(block.size for block in blocks) < audio.BLOCK + 512 * channels


def test_a_sample_rate_that_would_make_hours_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="impossible sample rate"):
        read_audio(written(tmp_path / "a.wav", tone(1.0), 10))


@pytest.mark.parametrize(
    "rate",
    [0, -16000, float("nan"), float("inf"), "16000", None, True, [16000], 1 << 40, 10, 10**400],
)
def test_a_sample_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(AudioError, match="impossible sample rate"):
        as_waveform(tone(1.0), rate)


@pytest.mark.parametrize(
    "samples",
    [
        np.full(16000, 3000, np.int64),
        [3000] * 16000,
        np.full(16000, 3000, np.uint64),
        np.full(16000, 3000, np.int32),
        np.full(16000, 35000, np.uint32),
        np.ones(16000, bool),
        "samples",
        None,
        [],
        np.zeros((0, 2), np.float32),
        [[0.1, 0.2], [0.3]],
        [None] * 16000,
        np.zeros(16000, "datetime64[s]"),
        object(),
        {"samples": 1},
        0.5,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_waveform_is_an_audio_error(samples: Any) -> None:
    with pytest.raises(AudioError):
        as_waveform(samples, 16000)


def test_sixteen_bit_numbers_in_a_list_are_told_how_to_be_read() -> None:
    with pytest.raises(AudioError, match=r"hint: .*np\.asarray\(samples, np\.int16\)"):
        as_waveform([3000, -3000] * 8000, 16000)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_not_taken_for_samples(kind: Any) -> None:
    """numpy reads a bytearray as 8-bit numbers, whatever was put into it."""
    with pytest.raises(AudioError, match=r"hint: 16-bit samples: np\.frombuffer"):
        as_waveform(kind((tone(1.0) * 32767).astype(np.int16).tobytes()), 16000)


def test_a_view_that_says_what_it_holds_is_read() -> None:
    integers = (tone(1.0) * 32767).astype(np.int16)
    np.testing.assert_array_equal(
        as_waveform(memoryview(integers), 16000), as_waveform(integers, 16000)
    )


def test_masked_values_are_not_heard() -> None:
    samples = tone(1.0)
    masked = np.ma.masked_greater(samples, 0.1)
    with pytest.raises(AudioError, match=f"found     {masked.mask.sum():,} of 16,000"):
        as_waveform(masked, 16000)
    np.testing.assert_array_equal(
        as_waveform(np.ma.masked_greater(samples, 2), 16000), as_waveform(samples, 16000)
    )


def test_integers_of_every_width_hold_the_same_tone() -> None:
    samples = tone(0.1)
    for dtype in (np.int8, np.int16, np.int32):
        integers = np.round(samples * (np.iinfo(dtype).max + 1.0)).astype(dtype)
        np.testing.assert_allclose(as_waveform(integers, 16000), samples, atol=0.005)
    unsigned = np.round(samples * 128 + 128).astype(np.uint8)
    np.testing.assert_allclose(as_waveform(unsigned, 16000), samples, atol=0.005)
    np.testing.assert_array_equal(as_waveform(np.zeros(16000, np.int32), 16000), 0)


def test_a_name_with_escapes_is_printed_harmlessly(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\x1b[31m\n\x82\xa0.wav"))
    path.write_text("text")
    with pytest.raises(AudioError) as refused:
        read_audio(path)
    assert r"\x1b[31m\n\x82\xa0.wav is not audio" in str(refused.value)
    assert str(refused.value).splitlines()[0].isprintable()


def test_lengths_are_guessed_from_headers_and_sizes(tmp_path: Path) -> None:
    assert guess_seconds(written(tmp_path / "a.wav", tone(1.5, rate=8000), 8000)) == 1.5
    lying = bytearray((tmp_path / "a.wav").read_bytes())
    lying[28:32] = b"\xff\xff\xff\xff"
    (tmp_path / "lying.wav").write_bytes(lying)
    # a folder of such files must not become one batch
    assert guess_seconds(tmp_path / "lying.wav") == len(lying) / 10_000_000
    (tmp_path / "b.m4a").write_bytes(bytes(32000))
    assert guess_seconds(tmp_path / "b.m4a") == 2.0
    assert guess_seconds(tmp_path / "missing.wav") == 0.0


def test_samples_in_integer_scale_are_refused(tmp_path: Path) -> None:
    loud = tone(1.0) * 32768
    with pytest.raises(AudioError, match="out of scale"):
        read_audio(written(tmp_path / "a.wav", loud, subtype="FLOAT"))
    with pytest.raises(AudioError, match="divide by 32768"):
        as_waveform(loud, 16000)


@pytest.mark.parametrize("name", ["av", "soxr"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = written(tmp_path / "a.wav", tone(0.1, rate=8000), 8000)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=rf"needs {name}[\s\S]*mlx-contentvec\[audio\]"):
        read_audio(path)
    with pytest.raises(MissingDependency, match=name):
        require_decoders()
