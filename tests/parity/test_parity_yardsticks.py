"""PyTorch on the device of MLX and in half precision, with a device that is made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_parity.compare.candidate import MlxCandidate
from contentvec_parity.compare.verdict import DEVICE_CAP
from contentvec_parity.harness import assemble, replay
from contentvec_parity.inputs import Clip, speech_like
from contentvec_parity.references import open_reference, yardsticks
from contentvec_parity.references.recording import Recording, record
from contentvec_parity.references.yardsticks import TorchYardstick, without_tf32, yardsticks_for
from contentvec_parity.report import document as report
from contentvec_parity.report.markdown import to_markdown
from contentvec_parity.report.page import to_html
from mlx_contentvec import backend

CLIPS = [
    Clip("voice", speech_like(2400, 3)[None], "speech-like"),
    Clip("min", speech_like(400, 5)[None], "one frame"),
]
SOURCE = {"name": "tiny.pt", "stand_in": None, "sha256": None, "known_as": None}


class MadeUpDevice(TorchYardstick):
    """The CPU, with every output rounded to ``bits`` of its 24: a device that adds worse."""

    def __init__(self, original: Any, bits: int) -> None:
        super().__init__(original, "cpu", "float32")
        self.bits = bits
        self.about = {**self.about, "device": "cuda", "name": "Made-up 100", "tf32": "off"}

    def rounded(self, x: np.ndarray) -> np.ndarray:
        mantissa, exponent = np.frexp(x)
        kept: np.ndarray = np.ldexp(np.round(np.ldexp(mantissa, self.bits)), exponent - self.bits)
        return kept.astype(np.float32)

    def stages(self, clip: Clip) -> dict[str, np.ndarray]:
        return {stage: self.rounded(x) for stage, x in super().stages(clip).items()}

    def run_stage(self, clip: Clip, stage: str, stage_input: np.ndarray) -> np.ndarray:
        return self.rounded(super().run_stage(clip, stage, stage_input))


class BrokenDevice(MadeUpDevice):
    """A device that lacks an operation."""

    def stages(self, clip: Clip) -> dict[str, np.ndarray]:
        raise NotImplementedError("Output channels > 65536 not supported\nat the MPS device")


@pytest.fixture(scope="module")
def original(fairseq: Any, tiny_checkpoint: Path) -> Any:
    return open_reference("fairseq", tiny_checkpoint)


@pytest.fixture(scope="module")
def measured(original: Any, converted_tiny: Path) -> dict[str, Any]:
    """A run with a device whose float32 is a little worse than the CPU's."""
    found = {"device": MadeUpDevice(original, 18), "device_defaults": MadeUpDevice(original, 11)}
    candidate = MlxCandidate.open(converted_tiny)
    return assemble(
        original,
        candidate,
        CLIPS,
        yardsticks=found,
        source=lambda: SOURCE,
        weights=lambda: {"precision": "float32", "name": "tiny.safetensors", "sha256": None},
    )


def test_pytorch_on_the_device_is_in_every_row_and_in_the_verdict(measured: Any) -> None:
    assert all("device" in row and "device_defaults" in row for row in measured["stages"])
    assert measured["yardsticks"]["device"]["name"] == "Made-up 100"
    assert "float32 on this device" in measured["verdict"]["reason"]
    for entry in measured["verdict"]["summary"]:
        assert entry["device"]["rms"] > entry["reference"]["rms"]
        assert entry["yardstick"]["rms"] == "device"
        allowed = min(entry["device"]["rms"], DEVICE_CAP * entry["reference"]["rms"])
        expected = entry["candidate"]["rms"] / max(allowed, entry["floor"]["rms"])
        assert entry["ratio"]["rms"] == pytest.approx(expected, rel=1e-6)


def test_reports_show_pytorch_on_the_cpu_and_on_the_device(measured: Any) -> None:
    line = report.yardstick_line(measured) or ""
    assert line.startswith("PyTorch on this device (Made-up 100, TF32 off): rms error of layer 3")
    assert "on the CPU in float32" in line
    assert "TF32 by PyTorch's own settings" in line
    markdown, page = to_markdown(measured), to_html(measured)
    assert "| PyTorch max | PyTorch on this device max |" in markdown
    assert line in markdown
    assert page.count("PyTorch on this device") >= 3
    entry = report.feature_tables(measured)["layer 3"][0]
    assert report.figure(entry["device"]["rms"]) in page
    table = page.split('<table id="features">')[1].split("</table>")[0]
    rows = [row for row in table.split("<tr>") if row.startswith("<td>")]
    assert {row.count("<td") for row in rows} == {10}


def test_a_device_that_cannot_run_a_clip_is_no_yardstick_and_the_report_says_so(
    original: Any, converted_tiny: Path
) -> None:
    found = {"device": BrokenDevice(original, 24)}
    candidate = MlxCandidate.open(converted_tiny)
    document = assemble(original, candidate, CLIPS[1:], yardsticks=found)
    assert document["verdict"]["passed"]
    assert document["clips"][0]["failed"] == {"device": "Output channels > 65536 not supported"}
    assert "could not run 1 of 1 clips" in (report.yardstick_line(document) or "")


def test_tf32_is_off_while_the_device_is_measured_and_as_it_was_afterwards(
    torch: Any,
) -> None:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for given in (True, False):
            for setting in settings:
                setting.allow_tf32 = given
            with without_tf32():
                assert [setting.allow_tf32 for setting in settings] == [False, False]
            assert [setting.allow_tf32 for setting in settings] == [given, given]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


@pytest.mark.parametrize(
    ("kind", "available", "expected"),
    [("cuda", "cuda", "cuda"), ("metal", "mps", "mps"), ("cpu", "cuda", None), ("cuda", "", None)],
)
def test_pytorch_is_asked_for_the_device_that_mlx_runs_on(
    torch: Any, monkeypatch: pytest.MonkeyPatch, kind: str, available: str, expected: str | None
) -> None:
    monkeypatch.setattr(backend, "device_kind", lambda: kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available == "mps")
    assert yardsticks.torch_device() == expected


def test_on_a_gpu_the_original_is_measured_there_twice(
    original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Made:
        def __init__(self, _: Any, device: str, dtype: str, *, tf32_off: bool = True) -> None:
            if (device, dtype) == ("mps", "bfloat16"):
                raise TypeError("BFloat16 is not supported on MPS")
            made.append((device, dtype, tf32_off))

    monkeypatch.setattr(yardsticks, "TorchYardstick", Made)
    for device, precision, expected in (
        ("cuda", "float32", [("cuda", "float32", True), ("cuda", "float32", False)]),
        ("mps", "float32", [("mps", "float32", True)]),
        ("cuda", "float16", [("cuda", "float16", True)]),
        ("mps", "bfloat16", [("cpu", "bfloat16", True)]),
        (None, "float16", [("cpu", "float16", True)]),
        (None, "float32", []),
        ("cuda", "q8", []),
    ):
        made.clear()
        monkeypatch.setattr(yardsticks, "torch_device", lambda device=device: device)
        yardsticks_for(original, precision)
        assert made == expected


@pytest.mark.parametrize("name", ["fairseq", "transformers"])
def test_half_precision_of_the_cpu_errs_as_its_own_operations_do(
    torch: Any, tiny_checkpoint: Path, name: str
) -> None:
    """Convolutions that add in float32 change the error little (1.11 times on a CPU with AMX)."""
    pytest.importorskip(name, reason="scripts/test installs it")
    reference = open_reference(name, tiny_checkpoint)
    model = reference._model.half()
    plain = reference.stages_of(model, CLIPS[0])["layer.3"]
    reference._model.float()
    exact = reference.truth(CLIPS[0])["layer.3"]
    found = TorchYardstick(reference, "cpu", "float16").stages(CLIPS[0])["layer.3"]  # type: ignore[arg-type]
    errors = [np.sqrt(np.square(x - exact).mean()) for x in (found, plain)]
    assert 0.7 < errors[0] / errors[1] < 1.2
    assert np.abs(found - exact).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_judged_by_a_recording_too(
    fairseq: Any, tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    from contentvec_convert.conversion import convert

    convert(tiny_checkpoint, tmp_path / "w.safetensors", dtype=dtype, allow_unknown=True)
    record(tiny_checkpoint, tmp_path / "r.safetensors", clips=[(CLIPS[1], "every stage")])
    document = replay(tmp_path / "r.safetensors", tmp_path / "w.safetensors")
    assert document["verdict"]["passed"], document["verdict"]["reason"]
    assert f"PyTorch's own {dtype}" in document["verdict"]["reason"]
    assert all("half" in row for row in document["stages"])
    assert Recording(tmp_path / "r.safetensors").yardsticks("q8") == {}
