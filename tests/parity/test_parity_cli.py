"""``mlx-contentvec parity`` from the outside: status, output, files, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_parity import harness, with_tf32
from contentvec_parity.compare.candidate import MlxCandidate
from contentvec_parity.harness import assemble, compare_files
from contentvec_parity.identity import identify_checkpoint
from contentvec_parity.inputs import Clip, speech_like
from contentvec_parity.machine import describe
from contentvec_parity.references import open_reference
from contentvec_parity.report import document as report
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import MissingDependency, ParityError

RunCli = Callable[..., Any]


@pytest.fixture(scope="module")
def passed(
    fairseq: Any,
    run_cli: RunCli,
    tiny_checkpoint: Path,
    converted_tiny: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Any, Path]:
    """A run that passes, with every kind of report in a folder."""
    folder = tmp_path_factory.mktemp("passed")
    done = run_cli(
        *("parity", tiny_checkpoint, converted_tiny, "--quick"),
        *("--json", folder / "run.json", "--markdown", folder / "run.md"),
        *("--html", folder / "run.html"),
    )
    return done, folder


@pytest.fixture(scope="module")
def wrong(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``converted_tiny`` with the queries' and keys' weights of the second layer swapped."""
    tensors, metadata = mx.load(str(converted_tiny), return_metadata=True)
    one, other = (f"encoder.layers.1.self_attn.{p}_proj.weight" for p in "qk")
    tensors[one], tensors[other] = tensors[other], tensors[one]
    path = tmp_path_factory.mktemp("wrong") / "wrong.safetensors"
    mx.save_safetensors(str(path), tensors, metadata=metadata)
    return path


def test_a_run_that_passes_says_so_first_and_exits_with_0(passed: tuple[Any, Path]) -> None:
    done, _ = passed
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PASSED  ")
    for expected in ("layer 3 + projection", "conv.0", "final_proj", "bit for bit", "TF32 off"):
        assert expected in done.stdout
    # progress alone: a line every ten seconds, on a machine that needs so long
    said = re.compile(r"loading \S+|comparing tensors|clip .+, [1-6] of 6")
    assert all(said.fullmatch(line) for line in done.stderr.splitlines())


def test_a_stand_in_is_said_to_be_one_in_every_report(passed: tuple[Any, Path]) -> None:
    done, folder = passed
    for text in (
        done.stdout,
        (folder / "run.json").read_text(),
        (folder / "run.md").read_text(),
        (folder / "run.html").read_text(),
    ):
        assert "stand-in" in text.lower()


def test_the_document_has_what_its_schema_promises(passed: tuple[Any, Path]) -> None:
    document = json.loads((passed[1] / "run.json").read_text())
    assert document["schema"] == report.SCHEMA
    promised = {
        line.split("``")[1] for line in (report.__doc__ or "").splitlines() if line.startswith("``")
    }
    assert set(document) == promised
    assert document["flags"]["tf32"] is False
    assert document["flags"]["torch_blas"] in ("its own", None)
    assert document["source"]["known_as"] is None
    assert document["source"]["sha256"] == document["weights"]["source"]["sha256"]
    assert {row["kind"] for row in document["stages"]} == {"stage", "local", "features"}
    assert {clip["name"] for clip in document["clips"]} >= {"3s", "min", "quiet", "silence"}


@pytest.mark.parametrize("report_file", [None, "run.md", "run.html"])
def test_the_two_figures_that_users_know_stand_at_the_top(
    passed: tuple[Any, Path], report_file: str | None
) -> None:
    """Max absolute difference and cosine similarity by these names, with layer and clip."""
    done, folder = passed
    text = done.stdout if report_file is None else (folder / report_file).read_text()
    if report_file == "run.html":
        text = text.split('<section class="verdict" id="verdict">')[1].split("</section>")[0]
        text = re.sub(r"<[^>]*>", " ", text)
    else:
        text = "\n".join(text.splitlines()[:6])
    said = " ".join(text.split())
    rows = json.loads((folder / "run.json").read_text())["stages"]
    rows = [row for row in rows if row["kind"] == "features"]
    largest = max(rows, key=lambda row: row["apart"]["max_abs"])
    lowest = min(rows, key=lambda row: row["apart"]["cosine"])
    for what, figure, row in (
        ("max absolute difference", f"{largest['apart']['max_abs']:.1e}", largest),
        ("cosine similarity", f"1-{1 - lowest['apart']['cosine']:.1e}", lowest),
    ):
        assert re.search(
            rf"{what}:? {re.escape(figure)} \(?{re.escape(row['name'])}, clip {row['clip']}\b", said
        ), said


def test_a_run_in_which_nothing_can_be_compared_has_no_such_figures() -> None:
    row = {"kind": "features", "name": "layer 3", "clip": "min", "comparable": False}
    assert report.agreement({"stages": [row]}) == []


def test_a_low_cosine_is_written_out() -> None:
    assert report.similarity(0.9412345) == "0.9412"
    assert report.similarity(1 - 3.1e-11) == "1-3.1e-11"
    assert report.similarity(-0.5) == "-0.5000"


def test_the_machine_is_described() -> None:
    found = describe()
    assert found["chip"]
    assert found["system"]
    assert found["device"]["kind"] in ("cpu", "metal", "cuda")


def test_the_markdown_holds_tables_and_the_verdict(passed: tuple[Any, Path]) -> None:
    text = (passed[1] / "run.md").read_text()
    assert text.startswith("**Parity: passed.**")
    assert "| layer 3 + projection | 3s |" in text
    assert "| features | clip | max absolute difference | cosine similarity |" in text
    assert "| conv.0 |" in text


def test_a_wrong_file_fails_with_1_and_the_report_explains_itself(
    fairseq: Any, run_cli: RunCli, tiny_checkpoint: Path, wrong: Path
) -> None:
    done = run_cli("parity", tiny_checkpoint, wrong, "--quick", original=True)
    assert done.returncode == 1
    assert done.stdout.startswith("FAILED  layer.2 is the first stage that is wrong by itself")
    said = " ".join(done.stdout.split())
    assert "encoder.layers.1.self_attn.q_proj.weight: differs from" in said
    assert "it holds the values of encoder.layers.1.self_attn.k_proj.weight" in said
    assert "they are fed its output" in said


def test_a_saved_run_is_judged_again_without_running_it(
    run_cli: RunCli, passed: tuple[Any, Path]
) -> None:
    saved = passed[1] / "run.json"
    again = run_cli("parity", "judge", saved, "--json", "-")
    assert again.returncode == 0
    assert json.loads(again.stdout)["verdict"] == json.loads(saved.read_text())["verdict"]
    stricter = run_cli("parity", "judge", saved, "--ratio", "0.01", "--json", "-")
    assert stricter.returncode == 1
    document = json.loads(stricter.stdout)
    assert document["verdict"]["gates"]["ratio"] == 0.01
    assert document["stages"] == json.loads(saved.read_text())["stages"]
    assert run_cli("parity", "judge", saved, "--max-abs", "1e-9").returncode == 1
    assert run_cli("parity", "judge", saved, "--min-cosine", "0.999").returncode == 0


def test_a_file_that_is_no_saved_run_is_refused(run_cli: RunCli, tmp_path: Path) -> None:
    for name, text in (("a.json", "{}"), ("b.json", "no"), ("c.json", '{"schema": "other/1"}')):
        (tmp_path / name).write_text(text)
        done = run_cli("parity", "judge", tmp_path / name)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert name in done.stderr
    assert "cannot be read" in run_cli("parity", "judge", tmp_path / "none.json").stderr


def test_infinities_survive_the_file() -> None:
    figures = {"ratio": {"rms": float("inf")}, "snr_db": -float("inf"), "name": "inf"}
    text = report.to_json({"summary": [figures]})
    assert "Infinity" not in text
    assert report._undone(json.loads(text)) == {"summary": [figures]}


def test_usage_errors_exit_with_2(run_cli: RunCli, tmp_path: Path) -> None:
    for arguments in (
        (),
        ("one.pt",),
        ("a.pt", "b.safetensors", "c"),
        ("a.pt", "b.safetensors", "--quick", "--thorough"),
        ("a.pt", "b.safetensors", "--ratio", "0"),
        ("a.pt", "b.safetensors", "--ratio", "nan"),
        ("a.pt", "b.safetensors", "--min-snr", "inf"),
        ("a.safetensors", "--reference", "r.safetensors", "--quick"),
    ):
        done = run_cli("parity", *arguments)
        assert done.returncode == 2, arguments
        assert "Usage: " in done.stderr


def test_help_shows_the_run_and_its_subcommands(run_cli: RunCli) -> None:
    done = run_cli("parity", "--help")
    assert done.returncode == 0
    for expected in ("CHECKPOINT CONVERTED", "--reference", "record", "judge", "Exit status"):
        assert expected in done.stdout
    assert "[-1.0<=x<=1.0]" in done.stdout.replace("[-1<=x<=1]", "[-1.0<=x<=1.0]")
    assert "None" not in done.stdout  # of an option without bounds


def test_files_that_are_not_there_are_named(run_cli: RunCli, tiny_checkpoint: Path) -> None:
    done = run_cli("parity", tiny_checkpoint, "nowhere.safetensors")
    assert done.returncode == 1
    assert "no such file: nowhere.safetensors" in done.stderr


def test_a_reference_that_does_not_exist_is_refused(
    run_cli: RunCli, tiny_checkpoint: Path, converted_tiny: Path
) -> None:
    done = run_cli("parity", tiny_checkpoint, converted_tiny, "--reference", "keras")
    assert done.returncode == 1
    assert "fairseq, transformers" in done.stderr


def test_the_files_in_the_wrong_order_are_told_apart(
    fairseq: Any, run_cli: RunCli, tiny_checkpoint: Path, converted_tiny: Path
) -> None:
    done = run_cli("parity", converted_tiny, tiny_checkpoint)
    assert done.returncode == 2
    assert f"{tiny_checkpoint} {converted_tiny}" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_architectures_are_refused_by_the_fields_that_differ(
    fairseq: Any, tiny_checkpoint: Path, converted_tiny_large: Path
) -> None:
    with pytest.raises(ParityError, match="different models") as refused:
        compare_files(tiny_checkpoint, converted_tiny_large, inputs="built-in")
    assert "layer_norm_first" in str(refused.value)


def test_a_head_count_that_differs_is_refused(
    fairseq: Any, tiny_checkpoint: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    tensors, metadata = mx.load(str(converted_tiny), return_metadata=True)
    config = {**json.loads(metadata["config"]), "encoder_attention_heads": 8}
    metadata = {**metadata, "config": json.dumps(config)}
    mx.save_safetensors(str(tmp_path / "heads.safetensors"), tensors, metadata=metadata)
    with pytest.raises(ParityError, match="different models") as refused:
        compare_files(tiny_checkpoint, tmp_path / "heads.safetensors", inputs="built-in")
    assert "encoder_attention_heads 8 in the converted file" in str(refused.value)


def test_an_unreadable_clip_is_refused_by_name(
    fairseq: Any, tiny_checkpoint: Path, converted_tiny: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    pytest.importorskip("soundfile", reason="pip install 'mlx-contentvec[audio]'")
    (tmp_path / "noise.wav").write_bytes(b"this is not audio at all")
    done = run_cli(
        *("parity", tiny_checkpoint, converted_tiny, "--quick", "--audio", tmp_path / "noise.wav")
    )
    assert done.returncode == 1
    assert "noise.wav" in done.stderr


def test_the_users_own_audio_is_compared_and_named(
    fairseq: Any, tiny_checkpoint: Path, converted_tiny: Path, run_cli: RunCli, tmp_path: Path
) -> None:
    soundfile = pytest.importorskip("soundfile", reason="pip install 'mlx-contentvec[audio]'")
    pytest.importorskip("soxr", reason="pip install 'mlx-contentvec[audio]'")
    soundfile.write(tmp_path / "my voice.wav", speech_like(20000, 9), 22050)
    done = run_cli(
        *("parity", tiny_checkpoint, converted_tiny, "--quick", "--json", "-"),
        *("--audio", tmp_path / "my voice.wav"),
        original=True,
    )
    assert done.returncode == 0, done.stderr
    (clip,) = [c for c in json.loads(done.stdout)["clips"] if c["name"] == "my voice.wav"]
    assert clip["origin"]["resampler"] == "soxr VHQ"
    assert str(tmp_path) not in done.stdout


def test_a_report_that_cannot_be_written_is_an_error_not_a_traceback(
    run_cli: RunCli, passed: tuple[Any, Path], tmp_path: Path
) -> None:
    done = run_cli("parity", "judge", passed[1] / "run.json", "--markdown", tmp_path / "no" / "x")
    assert done.returncode == 1
    assert "cannot write x: the folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_never_replaces_what_it_is_about(
    run_cli: RunCli, tiny_checkpoint: Path, passed: tuple[Any, Path], tmp_path: Path
) -> None:
    from contentvec_convert.conversion import convert

    checkpoint, converted = tmp_path / "a.pt", tmp_path / "a.safetensors"
    shutil.copy(tiny_checkpoint, checkpoint)
    convert(checkpoint, converted, allow_unknown=True)
    saved = tmp_path / "run.json"
    shutil.copy(passed[1] / "run.json", saved)
    (tmp_path / "link.html").symlink_to(checkpoint)
    (tmp_path / "hard.md").hardlink_to(converted)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in (
        ("parity", checkpoint, converted, "--json", converted),
        ("parity", checkpoint, converted, "--html", tmp_path / "link.html"),
        ("parity", checkpoint, converted, "--markdown", tmp_path / "hard.md"),
        ("parity", checkpoint, converted, "--markdown", tmp_path / "a.ledger.json"),
        ("parity", checkpoint, converted, "--html", tmp_path / "x", "--json", tmp_path / "x"),
        ("parity", "judge", saved, "--html", saved),
        ("bench", checkpoint, converted, "--json", converted),
        ("bench", checkpoint, converted, "--plot", tmp_path / "a.pt"),
    ):
        done = run_cli(*arguments)
        assert done.returncode == 1, arguments
        assert re.search("is what it is made from|another one goes|cannot draw", done.stderr)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_for_reports_is_looked_at_before_the_run(
    run_cli: RunCli, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for command in (("parity", tiny_checkpoint, tmp_path / "none.safetensors"), ("doctor",)):
        done = run_cli(*command, "--json", tmp_path / "no" / "x.json")
        assert (done.returncode, done.stdout) == (1, "")
        assert "cannot write x.json: the folder" in done.stderr


# ---- Hugging Face folders, other precisions, TF32 ------------------------------------------


def test_a_hugging_face_folder_is_an_original_too(
    torch: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="pip install 'mlx-contentvec[parity]'")
    from contentvec_convert.conversion import convert

    model = open_reference("transformers", tiny_checkpoint)._model
    model.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "out.safetensors", allow_unknown=True, normalize=False)
    document = compare_files(tmp_path / "folder", tmp_path / "out.safetensors", inputs="built-in")
    assert document["verdict"]["passed"], document["verdict"]["reason"]
    assert document["reference"]["name"] == "transformers"
    assert document["tensors"]["failures"] == []


def test_a_hugging_face_folder_that_lacks_a_tensor_is_refused(
    torch: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="pip install 'mlx-contentvec[parity]'")
    from safetensors.numpy import load_file, save_file

    open_reference("transformers", tiny_checkpoint)._model.save_pretrained(tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    del weights["encoder.layers.1.attention.k_proj.bias"]
    save_file(weights, tmp_path / "folder" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match="does not fill") as refused:
        open_reference("transformers", tmp_path / "folder")
    assert "k_proj.bias" in str(refused.value)


def short_clips() -> list[Clip]:
    return [Clip("voice", speech_like(2400, 3)[None], "speech-like")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8"])
def test_weights_in_another_precision_are_measured_and_held_to_their_own_limit(
    fairseq: Any, tiny_checkpoint: Path, tmp_path: Path, dtype: str
) -> None:
    from contentvec_convert.conversion import convert

    convert(tiny_checkpoint, tmp_path / "w.safetensors", dtype=dtype, allow_unknown=True)
    candidate = MlxCandidate.open(tmp_path / "w.safetensors")
    document = assemble(open_reference("fairseq", tiny_checkpoint), candidate, short_clips())
    assert document["weights"]["precision"] == dtype
    assert document["tensors"]["failures"] == []
    features = [row for row in document["stages"] if row["kind"] == "features"]
    noise = min(row["candidate"]["snr_db"] for row in features)
    assert noise < 100  # float32 keeps 110 and more
    assert f"{noise:.1f} dB" in document["verdict"]["reason"]
    assert document["verdict"]["passed"], document["verdict"]["reason"]


def test_half_precision_does_not_excuse_a_wrong_tensor(
    fairseq: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from contentvec_convert.conversion import convert

    convert(tiny_checkpoint, tmp_path / "h.safetensors", dtype="float16", allow_unknown=True)
    tensors, metadata = mx.load(str(tmp_path / "h.safetensors"), return_metadata=True)
    name = "encoder.layers.2.fc1.bias"
    tensors[name] = tensors[name] * mx.array(1.001, mx.float16)
    mx.save_safetensors(str(tmp_path / "h.safetensors"), tensors, metadata=metadata)
    candidate = MlxCandidate.open(tmp_path / "h.safetensors")
    document = assemble(open_reference("fairseq", tiny_checkpoint), candidate, short_clips())
    assert not document["verdict"]["passed"]
    assert document["verdict"]["blame"]["wrong"][0]["stage"] == "layer.3"


def test_the_features_with_tf32_are_measured_in_a_process_of_their_own(
    fairseq: Any, tiny_checkpoint: Path, converted_tiny: Path
) -> None:
    original = open_reference("fairseq", tiny_checkpoint)
    source = identify_checkpoint(tiny_checkpoint)
    found = with_tf32.measure_original(original, source, converted_tiny)
    assert found["flags"]["tf32"] is True
    assert {entry["kind"] for entry in found["summary"]} == {"features"}
    assert found["snr_db"] > 80


def test_the_features_with_tf32_are_measured_on_a_gpu_where_it_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_contentvec import backend

    monkeypatch.setattr(backend, "device_kind", lambda: "cuda")
    monkeypatch.setattr(backend, "tf32_enabled", lambda: False)
    assert harness._tf32_is_off()
    monkeypatch.setattr(backend, "tf32_enabled", lambda: True)
    assert not harness._tf32_is_off()
    monkeypatch.setattr(backend, "device_kind", lambda: "cpu")
    monkeypatch.setattr(backend, "tf32_enabled", lambda: False)
    assert not harness._tf32_is_off()


# ---- the page --------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_holds_the_audio(passed: tuple[Any, Path]) -> None:
    page = (passed[1] / "run.html").read_text()
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in page.replace("http://www.w3.org", "").replace("url(#", "")
    assert page.count("data:audio/wav;base64,") == 6
    assert page.count("<svg") >= 4
    assert "prefers-color-scheme: dark" in page


def test_the_same_run_gives_the_same_page(passed: tuple[Any, Path]) -> None:
    from contentvec_parity.report.page import to_html

    document = report.read(passed[1] / "run.json")
    assert to_html(document) == to_html(document)


def test_the_worst_frame_of_a_clip_in_a_batch_is_drawn_too(passed: tuple[Any, Path]) -> None:
    from contentvec_parity.report.page import worst_frames

    document = report.read(passed[1] / "run.json")
    for row in document["stages"]:
        row["candidate"]["worst_frame_at"] = [1, 3]
    quiet, loud = np.zeros(8000, np.float32), np.ones(8000, np.float32)
    heard = {clip["name"]: np.stack([quiet, loud]) for clip in document["clips"]}
    drawn = worst_frames(document, heard)
    assert drawn and all(entry["outline"].startswith("0.0,2.0 ") for entry in drawn)


def test_without_its_packages_a_page_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    from contentvec_parity.report.page import require_packages

    require_packages()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match="matplotlib") as refused:
        require_packages()
    assert "mlx-contentvec[report]" in str(refused.value)


def test_file_names_cannot_put_markup_into_the_page(passed: tuple[Any, Path]) -> None:
    from contentvec_parity.report.page import to_html

    document = report.read(passed[1] / "run.json")
    document["weights"]["name"] = "<script>alert(1)</script>"
    document["clips"][0]["name"] = "<img src=x onerror=alert(1)>"
    assert "<script>" not in to_html(document)
    assert "<img" not in to_html(document)


def test_the_plot_for_a_model_card_is_a_picture(passed: tuple[Any, Path], tmp_path: Path) -> None:
    from contentvec_parity.report.plots import stage_plot

    stage_plot(report.read(passed[1] / "run.json"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plot.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("needs a headless browser: apt-get install chromium")


def rendered(browser: str, page: Path, tmp_path: Path, *options: str) -> str:
    import subprocess

    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


PROBE = """
<script>
addEventListener("load", () => {
  const audio = document.querySelector("audio");
  audio.addEventListener("loadedmetadata", () => document.body.dataset.heard = audio.duration);
  audio.addEventListener("error", () => document.body.dataset.heard = "error");
  audio.preload = "auto"; audio.load();
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.body.dataset.overflow = wide;
  document.body.dataset.plots = [...document.querySelectorAll("#plots svg")].map(
    svg => Math.round(svg.getBoundingClientRect().width)).join();
  const dot = document.querySelector("#plots svg use, #plots svg path[style*='--mlx']");
  document.body.dataset.paper = getComputedStyle(document.body).backgroundColor;
  document.body.dataset.ink = getComputedStyle(document.body).color;
  const table = document.querySelector(".scroll");
  document.body.dataset.scrolls = table.scrollWidth > table.clientWidth;
  document.body.dataset.told = document.querySelector(".sideways").offsetWidth > 0;
  document.body.dataset.stages = document.querySelectorAll("#stages tbody tr").length;
});
</script>
"""


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(
    browser: str, passed: tuple[Any, Path], tmp_path: Path, width: int
) -> None:
    page = tmp_path / "page.html"
    page.write_text((passed[1] / "run.html").read_text().replace("</body>", PROBE + "</body>"))
    for _ in range(3):  # audio is decoded in real time, which virtual time does not wait for
        dom = rendered(
            browser,
            page,
            tmp_path,
            f"--window-size={width},900",
            "--virtual-time-budget=8000",
            "--dump-dom",
        )
        if 'data-heard="' in dom:
            break
    assert '<p id="reason">Every feature is as near' in dom

    def probed(name: str) -> str:
        return dom.split(f'data-{name}="')[1].split('"')[0]

    # nothing sticks out sideways: wide tables scroll in themselves
    assert int(probed("overflow")) <= 0
    assert probed("scrolls") == probed("told") == ("true" if width < 500 else "false")
    assert all(250 < int(width) < 700 for width in probed("plots").split(","))
    assert float(probed("heard")) == pytest.approx(3.0, abs=0.1)
    assert probed("stages") == "13"


def test_a_browser_shows_the_page_light_and_dark(
    browser: str, passed: tuple[Any, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text((passed[1] / "run.html").read_text().replace("</body>", PROBE + "</body>"))
    papers = []
    for scheme in ("1", "0"):
        dom = rendered(
            browser,
            page,
            tmp_path,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--virtual-time-budget=4000",
            "--dump-dom",
        )
        papers.append(dom.split('data-paper="')[1].split('"')[0])
    assert papers == ["rgb(255, 255, 255)", "rgb(18, 23, 29)"]


def test_a_page_of_a_failed_run_names_the_stage_and_the_tensors(
    fairseq: Any, tiny_checkpoint: Path, wrong: Path, browser: str, tmp_path: Path
) -> None:
    from contentvec_parity.report.page import to_html

    document = compare_files(tiny_checkpoint, wrong, inputs="built-in")
    page = tmp_path / "failed.html"
    page.write_text(to_html(document))
    dom = rendered(browser, page, tmp_path, "--dump-dom")
    assert '<section class="verdict failed" id="verdict">' in dom
    assert "<strong>FAILED</strong>" in dom
    advice = dom.split('<ul class="advice" id="advice">')[1].split("</ul>")[0]
    assert "encoder.layers.1.self_attn.q_proj.weight" in advice
    assert dom.count('class="over"') >= 8


# ---- the full size ---------------------------------------------------------------------------


@pytest.mark.fullsize
def test_on_the_full_size_model_no_stage_is_further_from_the_truth_than_one_and_a_half_pytorchs(
    standin_report: Path,
) -> None:
    from contentvec_parity.compare.verdict import Gates, judge, worst_ratio
    from contentvec_parity.report import document as report

    document = report.read(standin_report)
    assert document["verdict"]["passed"], document["verdict"]["reason"]
    document["verdict"] = judge(document, Gates(ratio=1.5))
    assert document["verdict"]["passed"], document["verdict"]["reason"]
    assert document["tensors"]["sources"] == 214
    assert document["tensors"]["exact"] + document["tensors"]["rounded"] == 211
    ratios = {
        e["name"]: worst_ratio(e) for e in document["verdict"]["summary"] if e["kind"] == "stage"
    }
    assert len(ratios) == 22
    assert max(ratios.values()) < 1.5
    assert np.mean(list(ratios.values())) < 1.2
