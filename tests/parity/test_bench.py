"""The benchmark measures what it says, side by side, and reports it."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from contentvec_parity.bench import measure as bench
from contentvec_parity.bench import onnx_file
from contentvec_parity.bench import worker as bench_worker
from contentvec_parity.bench.measure import Engine, Settings, Worker, operations
from contentvec_parity.bench.onnx_file import write_onnx
from contentvec_parity.commands.bench import beside
from mlx_contentvec import memory
from mlx_contentvec.backend import mx
from mlx_contentvec.cli import main
from mlx_contentvec.config import PRESETS, ModelConfig
from mlx_contentvec.errors import MissingDependency, ParityError
from mlx_contentvec.inputs import Normalization
from tests.forks import run_command
from tests.small_models import LARGE, TINY, noise, random_weights_file

SETTINGS = Settings(lengths=(0.2,), repeats=2, starts=1)


def quietly(doing: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def folder(converted_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as transformers reads it."""
    from contentvec_convert.export import export

    output = tmp_path_factory.mktemp("exported") / "hf"
    return export(converted_tiny, output, to="transformers").path


@pytest.fixture(scope="module")
def onnx(folder: Path, shared: Callable[..., Path], need: Any) -> Path:
    """The same as the engines read it that take an ONNX file."""
    need("transformers", "scripts/test installs it")
    need("onnx", "pip install 'mlx-contentvec[engines]'")
    return shared("model.onnx", lambda path: write_onnx(folder, path))


@pytest.fixture(scope="module")
def document(converted_tiny: Path) -> dict[str, Any]:
    """A benchmark of the tiny model, with MLX itself as the yardstick."""
    engines = [
        Engine(bench.YARDSTICK, "mlx", converted_tiny),
        Engine("MLX again", "mlx", converted_tiny),
        Engine("floor", "floor", converted_tiny),
    ]
    config = ModelConfig.from_dict(
        json.loads(bench.read_metadata(converted_tiny)["config"]),
    )
    return {
        "engines": [{"label": engine.label} for engine in engines],
        "settings": {"repeats": 2, "threads": 1, "device": "cpu", "live": False},
        "machine": {"chip": "a chip", "system": "a system", "device": {"kind": "cpu"}},
        "versions": {"mlx": "0"},
        "load_average": 0.0,
        "yardstick": bench.YARDSTICK,
        "stand_in": True,
        "errors": [{"engine": "MLX again", "stage": "layer.3", "max": 2e-5, "rms": 1e-6}],
        **bench.measure(engines, SETTINGS, config, quietly),
    }


# -- what is measured ------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["transformers", "fairseq"])
def test_the_originals_that_are_timed_compute_the_features_that_mlx_does(
    engine: str,
    folder: Path,
    tiny_checkpoint: Path,
    converted_tiny: Path,
    fairseq: Any,
    need: Any,
    speech: Callable[..., Any],
) -> None:
    need("transformers", "scripts/test installs it")
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "normalize_eps": None}
    path = {"transformers": folder, "fairseq": tiny_checkpoint}[engine]
    source = np.stack([speech(4000), speech(4000, 8)])
    original = bench_worker.ENGINES[engine](str(path), settings)(source)
    port = bench_worker.ENGINES["mlx"](str(converted_tiny), settings)(source)
    assert original.shape == port.shape == (2, 12, 96)
    assert np.abs(original - port).max() < 1e-4


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "torch-compile"])
def test_the_engines_that_are_timed_compute_the_features_that_the_original_does(
    engine: str,
    folder: Path,
    need: Any,
    torch: Any,
    monkeypatch: Any,
    speech: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    for name in bench.ENGINES[engine]:
        need(name, "pip install 'mlx-contentvec[engines]'")
    if engine == "torch-compile":
        # traced as it would be, but no minute of C++ compilation
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        path = folder
    else:
        path = request.getfixturevalue("onnx")
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "normalize_eps": 1e-5}
    theirs = bench_worker.ENGINES[engine](str(path), settings)
    original = bench_worker.ENGINES["transformers"](str(folder), settings)
    # at other lengths than were traced
    for source in (np.stack([speech(4000)]), np.stack([speech(5000), speech(5000, 8)])):
        expected = original(source)
        features = theirs(source)
        assert features.shape == expected.shape
        assert np.abs(features - expected).max() < 1e-4


@pytest.fixture
def features(monkeypatch: Any) -> dict[str, Any]:
    """What workers compute, by the kind of their engine."""
    found: dict[str, Any] = {}

    class Recorded:
        def __init__(self, engine: Engine, settings: Settings) -> None:
            self.kind = engine.kind

        def run(self, seconds: float, save: Path) -> None:
            np.save(save, found[self.kind])

        def close(self) -> None:
            """Nothing runs."""

    monkeypatch.setattr(bench, "Worker", Recorded)
    return found


@dataclasses.dataclass
class Process:
    """A worker that computes nothing: how it is started, and answers of the right form."""

    work: dict[str, Any]
    env: dict[str, str]

    def __post_init__(self) -> None:
        self.stdin = self.stdout = self
        self.requests: list[dict[str, Any]] = []

    def write(self, request: str) -> None:
        self.requests.append(json.loads(request))
        if file := self.requests[-1]["save"]:
            np.save(file, np.ones((1, 9, 4), np.float32))

    def flush(self) -> None:
        """Nothing is buffered."""

    def readline(self) -> str:
        return json.dumps({"wall": 1.0, "cpu": 1.0, "memory": 1, "process_peak": 1})


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """The workers that are started."""
    started: list[Process] = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> Process:
        started.append(Process(json.loads(command[-1]), env))
        return started[-1]

    monkeypatch.setattr(bench, "_require_installed", lambda _: None)
    fake = SimpleNamespace(Popen=start, PIPE=subprocess.PIPE)
    monkeypatch.setattr(bench, "subprocess", fake)
    monkeypatch.setattr(Worker, "close", lambda _: 1.0)  # there is no process to end
    return started


def random_weights_of(config: ModelConfig, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A file of random weights, and what the bench reads of a converted one's metadata."""
    metadata = {"config": config.to_json(), "source": "{}"}
    patch.setattr(bench, "read_metadata", lambda _: metadata)
    return random_weights_file(folder / "model.safetensors", config)


@pytest.mark.parametrize(
    ("config", "eps"),
    [
        (TINY, None),
        (dataclasses.replace(LARGE, normalize_eps=1e-5), 1e-5),
        (dataclasses.replace(LARGE, normalize_eps=1e-7), 1e-7),
    ],
)
def test_every_engine_normalises_by_the_epsilon_of_the_configuration(
    config: ModelConfig,
    eps: float | None,
    processes: list[Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = random_weights_of(config, tmp_path, monkeypatch)
    options: dict[str, Any] = {"beside": ["torch-compile"], "with_errors": False}
    bench.bench(tmp_path, [converted], SETTINGS, **options)
    assert {process.work["engine"] for process in processes} == {"mlx", "torch-compile", "floor"}
    assert {process.work["normalize_eps"] for process in processes} == {eps}


@pytest.mark.parametrize(
    ("checkpoint", "others", "written"),
    [
        ("a file", "", ""),
        ("a file", "fairseq", ""),
        ("a file", "transformers", "for transformers"),
        ("a file", "fairseq openvino", "for transformers, onnx"),
        ("a folder", "transformers fairseq torch-compile", ""),
        ("a folder", "onnxruntime", "onnx"),
        ("a folder", "openvino", "onnx"),
    ],
)
def test_weights_are_exported_for_what_cannot_read_the_checkpoint(
    checkpoint: str,
    others: str,
    written: str,
    processes: list[Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exports: list[str] = []
    given = converted = random_weights_of(TINY, tmp_path, monkeypatch)
    if checkpoint == "a folder":
        given = tmp_path

    def export(source: Path, output: Path, to: str) -> Any:
        assert source == converted
        exports.append(f"for {to}")
        output.mkdir()
        return SimpleNamespace(path=output)

    def export_onnx(folder: Path, path: Path) -> None:
        assert (folder == given) == (checkpoint == "a folder")
        exports.append("onnx")
        path.touch()

    monkeypatch.setattr("contentvec_convert.export.export", export)
    monkeypatch.setattr(onnx_file, "write_onnx", export_onnx)
    monkeypatch.setattr("contentvec_parity.references.available", lambda _: True)
    bench.bench(given, [converted], SETTINGS, beside=others.split(), with_errors=False)
    assert exports == (written.split(", ") if written else [])
    started = {process.work["engine"] for process in processes}
    expected = {"mlx", "floor", *others.split()}
    assert started == expected - ({"fairseq"} if checkpoint == "a folder" else set())


@pytest.mark.parametrize("eps", [1e-5, 1e-7])
def test_the_others_are_given_clips_normalised_as_mlx_normalises_them(eps: float) -> None:
    # quiet enough for the epsilon to count
    source = np.stack([noise(4000), noise(4000, 8)]) * np.float32(1e-3)
    given = bench_worker._as_wanted(source, {"normalize_eps": eps})
    expected = np.stack([Normalization.of(clip, eps)(clip) for clip in source])
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
    other = bench_worker._as_wanted(source, {"normalize_eps": eps / 10})
    assert np.abs(given - other).max() > 0.05
    assert bench_worker._as_wanted(source, {"normalize_eps": None}) is source


def test_a_worker_has_the_variables_that_it_is_given(processes: list[Process]) -> None:
    Worker(Engine("MLX", "mlx", Path()), SETTINGS, {"MLX_CONTENTVEC_SUMS": "plain"})
    assert processes[0].env["MLX_CONTENTVEC_SUMS"] == "plain"
    assert processes[0].env["PATH"] == os.environ["PATH"]


def test_an_engine_with_other_features_than_mlx_is_refused(features: dict[str, Any]) -> None:
    engines = [Engine("MLX", "mlx", Path()), Engine("openvino float32", "openvino", Path())]
    features["mlx"] = ours = np.ones((1, 9, 4), np.float32)
    features["openvino"] = ours * np.float32(1 + 5e-5)
    bench.require_same_features(engines, SETTINGS, quietly)
    for off in (ours * np.float32(1 + 2e-4), ours[:, :8], ours * np.float32("nan")):
        features["openvino"] = off
        with pytest.raises(ParityError, match="openvino float32 does not compute") as caught:
            bench.require_same_features(engines, SETTINGS, quietly)
        assert str(off.shape) in str(caught.value.found)


def test_a_live_benchmark_checks_whole_clips_too(features: dict[str, Any]) -> None:
    engines = [Engine("MLX", "live", Path()), Engine("openvino float32", "openvino", Path())]
    features.update(mlx=np.ones((1, 9, 4)), openvino=np.ones((1, 9, 4)), live=np.ones((1, 2, 4)))
    bench.require_same_features(engines, SETTINGS, quietly)


def test_a_model_that_cannot_be_exported_says_why(
    tmp_path: Path, need: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("transformers", "scripts/test installs it")
    monkeypatch.setattr(onnx_file, "subprocess", SimpleNamespace(run=run_command))
    with pytest.raises(ParityError, match="cannot export the model to ONNX") as caught:
        write_onnx(tmp_path / "nothing", tmp_path / "model.onnx")
    assert "nothing" in str(caught.value.found)


def test_an_engine_that_is_not_installed_says_what_to_install(
    tiny_checkpoint: Path, converted_tiny: Path, monkeypatch: Any
) -> None:
    find, lacking = importlib.util.find_spec, ("onnx", "openvino")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in lacking else find(name)
    )
    with pytest.raises(MissingDependency, match="onnx, openvino are not installed") as caught:
        bench.bench(tiny_checkpoint, [converted_tiny], SETTINGS, beside=["openvino"])
    assert "[engines]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("both", "transformers fairseq"),
        ("none", ""),
        ("fairseq", "fairseq"),
        ("onnxruntime,openvino", "transformers fairseq onnxruntime openvino"),
        ("none,torch-compile", "torch-compile"),
        ("openvino, transformers", "transformers openvino"),
    ],
)
def test_beside_adds_engines_to_the_originals_or_chooses_of_them(text: str, names: str) -> None:
    assert beside(text) == tuple(names.split())


def test_the_command_names_what_can_run_beside(
    run_cli: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    done = run_cli("bench", tiny_checkpoint, tiny_checkpoint, "--beside", "openvino,tensorrt")
    assert done.returncode == 2
    assert "'tensorrt' is not one of" in done.stderr and "onnxruntime" in done.stderr


def test_without_transformers_the_first_of_the_others_is_the_yardstick() -> None:
    mlx, fast, other, floor = (
        Engine(kind, kind, Path()) for kind in ("mlx", "onnxruntime", "openvino", "floor")
    )
    original = Engine(bench.YARDSTICK, "transformers", Path())
    assert bench.yardstick([mlx, fast, other, floor]) == "onnxruntime"
    assert bench.yardstick([mlx, fast, original, floor]) == bench.YARDSTICK
    assert bench.yardstick([mlx, floor]) == bench.YARDSTICK
    taken = {"onnxruntime": [{"wall": 1.0}], "mlx": [{"wall": 2.0}]}
    assert bench._yardstick(mlx, [mlx, fast, floor], taken) is taken["onnxruntime"]


def test_operations_are_those_that_torch_counts(folder: Path, need: Any, torch: Any) -> None:
    transformers = need("transformers", "scripts/test installs it")
    flop_counter = need("torch.utils.flop_counter", "torch has it")
    model = transformers.HubertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 16000))
    config = ModelConfig(
        conv_layers=tuple((64, kernel, stride) for _, kernel, stride in ModelConfig().conv_layers),
        encoder_embed_dim=96,
        encoder_ffn_embed_dim=192,
        encoder_layers=3,
        encoder_attention_heads=4,
        final_dim=32,
    )
    # torch computes the frame that the positional convolution then drops
    dropped = 2 * 3 * config.conv_pos * 96 * (96 // config.conv_pos_groups)
    assert operations(config, 16000, 3) == counter.get_total_flops() - dropped


def test_operations_grow_with_batch_and_length() -> None:
    base = PRESETS["base"]
    assert operations(base, 16000, 4) == 4 * operations(base, 16000, 1)
    # attention makes 30 s dearer than thirty times 1 s
    assert operations(base, 480000, 1) > 30 * operations(base, 16000, 1)


def test_every_engine_gets_every_case(document: dict[str, Any]) -> None:
    labels = [engine["label"] for engine in document["engines"]]
    assert [row["engine"] for row in document["cold"]] == labels
    assert [row["engine"] for row in document["steady"]] == labels
    assert [row["engine"] for row in document["memory"]] == labels[:2]
    for row in document["steady"]:
        assert len(row["samples"]) == 2
        assert 0 < row["wall"] < 60
        assert row["cpu"] > 0
    for row in document["cold"]:
        assert 0 < row["loaded"] < row["first_features"]
        assert row["peak"] > 10_000_000
    for row in document["memory"]:
        assert row["above_the_model"] is None or 0 <= row["above_the_model"] < row["peak"]


def test_ratios_are_taken_within_a_turn() -> None:
    ours = [{"wall": 1.0}, {"wall": 20.0}, {"wall": 3.0}]
    theirs = [{"wall": 2.0}, {"wall": 40.0}, {"wall": 1.0}]
    # the busy second turn was busy for both
    assert bench._ratio(ours, theirs, "wall") == 0.5
    assert bench._ratio(ours, None, "wall") is None


def test_half_precision_is_held_against_transformers_in_half_precision_where_that_ran() -> None:
    half = Engine("MLX float16", "mlx", Path("w"), "float16")
    single, double = [{"wall": 1.0}], [{"wall": 2.0}]
    assert bench._yardstick(half, [half], {bench.YARDSTICK: single}) is single
    ran = {bench.YARDSTICK: single, "transformers float16": double}
    assert bench._yardstick(half, [half], ran) is double
    assert bench._yardstick(half, [half], {}) is None


def test_the_yardstick_is_once_itself(document: dict[str, Any]) -> None:
    row = document["steady"][0]
    assert row["wall_ratio"] == row["cpu_ratio"] == 1.0


@pytest.mark.parametrize(("device", "products"), [("cpu", 1), ("gpu", 64)])
def test_the_floor_is_the_product_scaled_to_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, products: int
) -> None:
    rows, inner, columns = bench.PRODUCT
    found = bench._floor({"wall": 1.0, "cpu": 2.0}, PRESETS["base"], 1.0, 2, device)
    scale = operations(PRESETS["base"], 16000, 2) / (2 * rows * inner * columns * products)
    assert found == {"wall": scale, "cpu": 2 * scale}
    # as many are computed as are counted
    computed: list[Any] = []
    monkeypatch.setattr(bench_worker, "PRODUCT", (2, 3, 4))
    monkeypatch.setattr(bench_worker, "_mlx_on", lambda settings: mx)
    (tmp_path / "weights").write_bytes(b"weights")
    run = bench_worker._floor(f"{tmp_path / 'weights'}", {"device": device})
    monkeypatch.setattr(mx, "eval", computed.extend)
    run(np.zeros((1, 16000), np.float32))
    assert [product.shape for product in computed] == [(2, 4)] * products


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_on_a_gpu_the_second_pass_of_a_turn_counts(
    device: str, processes: list[Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = random_weights_of(TINY, tmp_path, monkeypatch)
    monkeypatch.setattr(bench, "_require_possible", lambda *_: None)
    settings = dataclasses.replace(SETTINGS, device=device, starts=1, repeats=2)
    bench.bench(tmp_path, [converted], settings, beside=["torch-compile"], with_errors=False)
    # a start from nothing is of one pass; behind them each of the steady process's
    asked = [
        [request["twice"] for request in process.requests if not request["memory"]]
        for process in processes
    ]
    starts, steady = asked[:3], asked[-3:]
    assert starts == [[False]] * 3
    assert {twice for process in steady for twice in process} == {device == "gpu"}


@pytest.mark.parametrize(("device", "live"), [("cpu", False), ("gpu", False), ("cpu", True)])
def test_a_pass_whose_memory_is_counted_is_not_timed(
    device: str,
    live: bool,
    processes: list[Process],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converted = random_weights_of(TINY, tmp_path, monkeypatch)
    monkeypatch.setattr(bench, "_require_possible", lambda *_: None)
    settings = dataclasses.replace(SETTINGS, device=device, live=live, starts=1, repeats=2)
    found = bench.bench(tmp_path, [converted], settings, beside=["none"], with_errors=False)
    asked = [[request["memory"] for request in process.requests] for process in processes]
    # one to warm up, those that are timed, and on a GPU one more
    apart = device == "cpu" and not live
    # the last process is that of the floor
    assert asked[-1] == [False] * (1 + settings.repeats)
    assert asked[-2] == [False] * (1 + settings.repeats) + [True] * (not apart)
    assert ([False, True] in asked) is apart
    assert [row["above_the_model"] for row in found["memory"]] == [1]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_a_pass_that_counts_is_the_last_one(twice: bool, counts: bool) -> None:
    counted: list[str] = []

    class Memory(bench_worker.ProcessMemory):
        def held(self) -> int:
            counted.append("held")
            return 1

        def peak(self) -> int:
            return 3

    def run(source: bench_worker.Waveform) -> bench_worker.Waveform:
        counted.append("pass")
        return source

    request = {"seconds": 0.1, "batch": 1, "save": None, "twice": twice, "memory": counts}
    answer = bench_worker._answer(run, Memory(), request)
    assert counted == ["pass"] * twice + ["held"] * counts + ["pass"]
    assert answer["memory"] == (2 if counts else None)


def test_the_engines_take_turns_at_being_first() -> None:
    engines = [Engine(name, "mlx", Path()) for name in "abc"]
    orders = ["".join(engine.label for engine in bench._turns(engines, n)) for n in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


def test_threads_are_what_was_asked_for(converted_tiny: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    started: dict[str, str] = {}
    popen = bench.subprocess.Popen

    def remember(*arguments: Any, env: dict[str, str], **options: Any) -> Any:
        started.update(env)
        return popen(*arguments, env=env, **options)

    monkeypatch.setattr(bench.subprocess, "Popen", remember)
    Worker(Engine("MLX", "mlx", converted_tiny), Settings(threads=3)).close()
    assert started["OMP_NUM_THREADS"] == started["OPENBLAS_NUM_THREADS"] == "3"
    assert started["MLX_ENABLE_TF32"] == "0"


def test_an_engine_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="MLX cannot be measured") as caught:
        Worker(Engine("MLX", "mlx", tmp_path / "nothing.safetensors"), SETTINGS)
    assert "nothing.safetensors" in str(caught.value.found)


# -- how it is reported ----------------------------------------------------------------


def test_the_screen_shows_every_engine_and_says_it_was_a_stand_in(document: dict[str, Any]) -> None:
    from rich.console import Console

    from contentvec_parity.bench.report import print_screen

    screen = io.StringIO()
    print_screen(document, Console(file=screen, width=120))
    shown = screen.getvalue()
    assert "stand-in" in shown
    for engine in document["engines"]:
        assert shown.count(engine["label"]) >= 2
    assert "1.00 x" in shown
    assert "2.0e-05" in shown


def test_the_plot_is_drawn(document: dict[str, Any], tmp_path: Path, need: Any) -> None:
    from contentvec_parity.bench.report import plot

    need("matplotlib", "pip install 'mlx-contentvec[report]'")
    plot(document, tmp_path / "bench.svg")
    assert "<svg" in (tmp_path / "bench.svg").read_text(encoding="utf-8")


def test_the_command_measures_and_reports(
    run_cli: Callable[..., Any], tiny_checkpoint: Path, converted_tiny: Path, torch: Any
) -> None:
    few = ("--lengths", "0.2", "--repeats", "1", "--starts", "1", "--beside", "none")
    arguments = ("bench", tiny_checkpoint, converted_tiny, *few, "--json", "-")
    done = run_cli(*arguments, original=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [engine["label"] for engine in report["engines"]] == ["MLX float32", "floor"]
    assert report["schema"] == bench.SCHEMA
    assert report["stand_in"] is True
    assert [row["wall_ratio"] for row in report["steady"]] == [None, None]
    (row,) = report["errors"]
    assert row["stage"] == "layer.3"
    assert 1e-7 < row["rms"] < row["max"] < 1e-4


def test_pytorch_on_a_gpu_is_measured_in_true_float32(
    torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    enabled, threads = torch.is_grad_enabled(), torch.get_num_threads()
    try:
        for setting in settings:
            setting.allow_tf32 = True
        device = bench_worker._torch_device({"threads": threads, "device": "gpu"})
        assert device.type == "cuda"
        assert [setting.allow_tf32 for setting in settings] == [False, False]
    finally:
        torch.set_grad_enabled(enabled)
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def test_live_measures_one_block_beside_a_window_of_the_same_length(
    run_cli: Callable[..., Any], tiny_checkpoint: Path, converted_tiny: Path, need: Any
) -> None:
    need("transformers", "scripts/test installs it")
    beside = ("--live", "--repeats", "2", "--beside", "transformers")
    arguments = ("bench", tiny_checkpoint, converted_tiny, *beside, "--json", "-")
    done = run_cli(*arguments, original=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [engine["kind"] for engine in report["engines"]] == ["live", "transformers", "floor"]
    # 125 frames of context and the 13 that a block of 12.5 hops can complete
    assert report["settings"]["lengths"] == [(137 * 320 + 400) / 16000]
    assert report["cold"] == report["errors"] == []
    live, *_ = report["steady"]
    assert 0 < live["wall"] < 5 and len(live["samples"]) == 2

    from rich.console import Console

    from contentvec_parity.bench.report import print_screen

    screen = io.StringIO()
    print_screen(report, Console(file=screen, width=120))
    assert "250 ms" in screen.getvalue() and "MLX float32" in screen.getvalue()


def test_the_block_that_is_timed_is_computed_every_time(converted_tiny: Path) -> None:
    settings = {"device": "cpu", "dtype": "float32", "threads": 1, "normalize_eps": None}
    run = bench_worker.ENGINES["live"](str(converted_tiny), settings)
    source = np.zeros((1, 137 * 320 + 400), np.float32)
    # the last frame of a block is complete 80 samples into the next
    assert [run(source).shape[1] for _ in range(4)] == [12, 12, 13, 12]


@pytest.mark.parametrize("option", ["--lengths=1", "--batches=2", "--starts=1", "--plot=a.svg"])
def test_live_refuses_what_it_does_not_read(
    option: str, run_cli: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    done = run_cli("bench", tiny_checkpoint, tiny_checkpoint, "--live", option)
    assert done.returncode == 2
    assert f"leave out {option.partition('=')[0]}" in done.stderr


def test_each_file_and_each_original_is_an_engine_of_its_own(
    converted_tiny: Path, tiny_checkpoint: Path, folder: Path, fairseq: Any, need: Any
) -> None:
    need("transformers", "scripts/test installs it")
    engines = bench._engines(
        tiny_checkpoint,
        folder,
        Path("model.onnx"),
        [converted_tiny, converted_tiny],
        ["transformers", "fairseq", "openvino", "torch-compile"],
        ["float32", "float16"],
    )
    assert [engine.label for engine in engines] == [
        "MLX float32",
        f"MLX float32 ({converted_tiny.name})",
        "transformers float32",
        "transformers float16",
        "fairseq float32",
        "openvino float32",
        "torch-compile float32",
        "floor",
    ]
    assert [engine.path for engine in engines[5:7]] == [Path("model.onnx"), folder]
    assert bench.YARDSTICK in [engine.label for engine in engines]
    assert engines[2].size == sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("lengths", ["0", "1,", "a", "-1,2"])
def test_the_command_refuses_lengths_that_are_none(
    lengths: str, run_cli: Callable[..., Any], tiny_checkpoint: Path
) -> None:
    done = run_cli("bench", tiny_checkpoint, tiny_checkpoint, f"--lengths={lengths}")
    assert done.returncode == 2
    assert "positive numbers" in done.stderr


@pytest.mark.parametrize("lengths", ["nan", "1,inf", "0", "-1", "a", ""])
def test_a_length_that_is_none_is_refused(
    run_cli: Callable[..., Any], tiny_checkpoint: Path, converted_tiny: Path, lengths: str
) -> None:
    done = run_cli("bench", tiny_checkpoint, converted_tiny, "--lengths", lengths)
    assert done.returncode == 2
    assert "no list of positive numbers" in done.stderr


def test_a_pipe_is_no_checkpoint(
    run_cli: Callable[..., Any], converted_tiny: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    done = run_cli("bench", tmp_path / "pipe", converted_tiny)
    assert done.returncode == 1
    assert "pipe is not a checkpoint" in done.stderr
    done = run_cli("bench", "nowhere.pt", converted_tiny)
    assert done.returncode == 1
    assert "no such file: nowhere.pt" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--batches", "1,100000000000", "100,000,000,000 x 1 s do not fit into memory"),
        ("--batches", "1" + "0" * 400, "do not fit into memory"),
        ("--lengths", "1,1e8", "1 x 1e+08 s do not fit into memory"),
        ("--lengths", "1e300", "1 x 1e+300 s do not fit into memory"),
        ("--lengths", "1e-9", "too short to give one frame"),
        ("--threads", "1000000", "more threads than this machine"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(
    tiny_checkpoint: Path,
    converted_tiny: Path,
    monkeypatch: Any,
    option: str,
    value: str,
    said: str,
) -> None:
    def worker(*_: object, **__: object) -> None:
        raise AssertionError("something runs")

    monkeypatch.setattr(bench, "Worker", worker)
    command = ["bench", str(tiny_checkpoint), str(converted_tiny), "--beside=none"]
    done = CliRunner().invoke(main, [*command, "--lengths", "1", option, value])
    assert done.exit_code == 1
    assert said in done.output


def test_threads_lengths_and_batches_may_be_as_large_as_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    needed = memory.whole_clip_bytes(TINY, 16000, 3)
    monkeypatch.setattr(memory, "process_memory", lambda: needed)
    frame = TINY.receptive_field / TINY.sample_rate
    possible = Settings(threads=4, lengths=(frame, 1.0), batches=(1, 3))
    bench._require_possible(possible, TINY)
    for changes, said in (
        ({"threads": 5}, "more threads than this machine"),
        ({"lengths": (1.0, frame - 1 / 16000)}, "too short to give one frame"),
        ({"batches": (1, 4)}, "4 x 1 s do not fit into memory"),
        ({"lengths": (frame, 1.1)}, "3 x 1.1 s do not fit into memory"),
        # the samples alone
        ({"batches": (needed // 64000 + 1,)}, "do not fit into memory"),
    ):
        impossible = dataclasses.replace(possible, **changes)
        with pytest.raises(ParityError, match=said):
            bench._require_possible(impossible, TINY)
    # where the system does not tell
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(memory, "process_memory", lambda: None)
    bench._require_possible(Settings(batches=(1000,)), TINY)
    with pytest.raises(ParityError, match="more threads"):
        bench._require_possible(Settings(threads=2), TINY)
