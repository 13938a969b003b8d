"""What the tests share: stand-ins, their conversions, the command line, the originals."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock

from tests.forks import run_python
from tests.optional import optional
from tests.sources import PROJECT, search_path

# Parallel test processes share the cores: each claiming all of them, which on a busy machine
# wait for each other by spinning, costs six times the work. Before any BLAS is loaded, and not
# in the process that starts the others, whose number of threads they would inherit.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_variable, str(max(1, (os.cpu_count() or 1) // _WORKERS)))
    # Hundreds of commands run in processes of their own, and an installed package comes
    # compiled: compiling it in each takes a third of a short command's time. Not where
    # scripts/mutate.py, which exchanges sources faster than their times tell, runs the tests.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False

# Where the Hub is, whether it may be asked and as whom is each test's to say. Before
# huggingface_hub is imported, which reads them once.
for _variable in (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE"),
    *("HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
):
    os.environ.pop(_variable, None)

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
Shared = Callable[[str, Callable[[Path], object]], Path]


def pytest_configure(config: pytest.Config) -> None:
    # Before OpenBLAS is loaded for MLX: whichever is first computes PyTorch's matrix
    # products as well, and the original would no longer be the original. A process that only
    # starts those that test needs neither.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        with contextlib.suppress(ImportError):
            importlib.import_module("torch")


#: files by the time that they take, ten seconds and more: begun first, so that test processes
#: that have only short ones left end together
LONGEST = (
    "test_attacks.py",
    "test_documentation.py",
    "parity/test_parity_cli.py",
    "publishing/test_publish.py",
    "parity/test_bench.py",
    "publishing/test_package.py",
    "parity/test_every_field_of_a_report.py",
    "model/test_hub.py",
    "convert/test_fetch.py",
    "extract/test_extract_cli.py",
    "model/test_threads.py",
    "parity/test_parity_planted.py",
    "convert/test_conversion.py",
    "extract/test_extraction.py",
    "model/test_features.py",
    "test_full_disk.py",
    "test_project.py",
    "checkpoint/test_checkpoint_attacks.py",
    "convert/test_convert_cli.py",
    "parity/test_standin.py",
    "convert/test_fullsize_formats.py",
    "convert/test_repository.py",
    "test_every_field.py",
    "publishing/test_verify.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {PROJECT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    _keep()


def _keep() -> None:
    """Let no later collection of garbage look at the modules that are there by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def need() -> Callable[[str, str], ModuleType]:
    """``need("soundfile", "pip install ...")``: the module, or a skip that says how to get it."""
    return optional


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """The torch module."""
    return optional("torch", "scripts/test installs it")


@pytest.fixture(scope="session")
def fairseq(torch: Any) -> ModuleType:
    """The fairseq module, allowed to load its own checkpoints under torch >= 2.6."""
    module = optional("fairseq", "scripts/test installs fairseq-fixed")
    importlib.import_module("fairseq.checkpoint_utils")
    _allow_dictionary(torch)
    _keep()
    return module


def _allow_dictionary(torch: Any) -> None:
    dictionary = importlib.import_module("fairseq.data.dictionary")
    torch.serialization.add_safe_globals([dictionary.Dictionary])


@pytest.fixture(autouse=True)
def fairseq_may_still_load(request: pytest.FixtureRequest) -> None:
    """Allow its checkpoints again: torch's ``safe_globals`` forgets on leaving what was allowed."""
    if "fairseq" in request.fixturenames:
        request.getfixturevalue("fairseq")
        _allow_dictionary(request.getfixturevalue("torch"))


@pytest.fixture(scope="session")
def speech() -> Callable[..., Any]:
    """``speech(samples, seed=7)``: a speech-like waveform at 16 kHz, (samples,), float32."""
    from contentvec_parity.inputs import speech_like

    return lambda samples, seed=7: speech_like(samples, seed)


@pytest.fixture(scope="session")
def make_standin(torch: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_standin("tiny", dtype="float32", ...)``: a fresh checkpoint, see write_standin."""
    from contentvec_parity.standin.write import write_standin

    folder = tmp_path_factory.mktemp("standins")
    made = 0

    def make(preset: str = "tiny", **options: Any) -> Path:
        nonlocal made
        made += 1
        return write_standin(folder / f"{preset}-{made}.pt", preset, **options)

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """``shared(name, make)``: the temporary file or folder that ``make(path)`` writes.

    The first test process to ask makes it, the others wait for it; nobody changes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder.mkdir(exist_ok=True)
        path, finished = folder / name, folder / f"{name}.finished"
        with FileLock(folder / f"{name}.lock"):
            if not finished.exists():
                make(path)
                finished.touch()
        return path

    return once


@pytest.fixture(scope="session")
def tiny_checkpoint(torch: Any, shared: Shared) -> Path:
    """A stand-in of 3 layers, 96 wide, with hubert_base.pt's conventions (0.8 MB)."""
    from contentvec_parity.standin.write import write_standin

    return shared("tiny.pt", lambda path: write_standin(path, "tiny"))


@pytest.fixture(scope="session")
def tiny_large_checkpoint(make_standin: Callable[..., Path]) -> Path:
    """As small, with HuBERT large's conventions: layer norms, pre-norm, normalised input."""
    return make_standin("tiny-large")


@pytest.fixture(scope="session")
def least_checkpoint(make_standin: Callable[..., Path]) -> Path:
    """As little as has every kind of tensor (60 kB), for what is read hundreds of times."""
    from contentvec_parity.standin.weights import PRESETS, Preset

    model = {
        "encoder_layers": 1,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "final_dim": 8,
        "conv_feature_layers": "[(16,10,5)]",
        "conv_pos": 16,
        "conv_pos_groups": 4,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "least", Preset(model=model, classes=4))
        return make_standin("least")


@pytest.fixture(scope="session")
def made_once() -> Callable[[Path, Callable[[Path], object]], Path]:
    """``made_once(path, make)``: path, made by the first test process to ask; the others wait.

    Each making its own and renaming it would not do: whoever reads the file by
    then is told, rightly, that it changed.
    """

    def once(path: Path, make: Callable[[Path], object]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                make(path)
        return path

    return once


@pytest.fixture(scope="session")
def standin(torch: Any, made_once: Callable[..., Path]) -> Path:
    """The full-size stand-in (189.5 MB), made once and kept for later sessions."""
    from contentvec_parity.standin.weights import DEFAULT_SEED, GENERATOR_VERSION
    from contentvec_parity.standin.write import write_standin

    cache = Path(os.environ.get("MLX_CONTENTVEC_CACHE") or PROJECT / ".cache")
    return made_once(cache / f"standin-{GENERATOR_VERSION}-{DEFAULT_SEED}.pt", write_standin)


def _converted(checkpoint: Path, folder: Path) -> Path:
    from contentvec_convert.conversion import convert

    output = folder / f"{checkpoint.stem}.safetensors"
    convert(checkpoint, output, allow_unknown=True)
    return output


@pytest.fixture(scope="session")
def converted_tiny(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` as MLX safetensors, its ledger beside it."""
    return _converted(tiny_checkpoint, tmp_path_factory.mktemp("converted-tiny"))


@pytest.fixture(scope="session")
def converted_tiny_large(
    tiny_large_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``tiny_large_checkpoint`` as MLX safetensors."""
    return _converted(tiny_large_checkpoint, tmp_path_factory.mktemp("converted-tiny-large"))


@pytest.fixture(scope="session")
def converted_standin(standin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``standin`` as MLX safetensors (379 MB, deleted when the session ends)."""
    output = _converted(standin, tmp_path_factory.mktemp("converted-standin"))
    yield output
    output.unlink()


@pytest.fixture(scope="session")
def standin_report(fairseq: Any, standin: Path, converted_standin: Path, shared: Shared) -> Path:
    """``standin`` beside ``converted_standin``, every stage on every published clip."""
    from contentvec_parity.harness import compare_files
    from contentvec_parity.report import document as report

    def write(path: Path) -> None:
        document = compare_files(standin, converted_standin, inputs="built-in")
        path.write_text(report.to_json(document))

    return shared("standin.parity.json", write)


@pytest.fixture(scope="session")
def evidence_folder(fairseq: Any, tiny_checkpoint: Path, shared: Shared) -> Path:
    """``tiny_checkpoint`` converted to float32 and float16, with all that packaging asks for."""
    return shared("evidence", lambda folder: _write_evidence(tiny_checkpoint, folder))


def _write_evidence(checkpoint: Path, folder: Path) -> None:
    from contentvec_convert.conversion import convert
    from contentvec_parity.harness import compare_files
    from contentvec_parity.references import recording
    from contentvec_parity.report import document as report

    folder.mkdir()
    for dtype in ("float32", "float16"):
        output = folder / f"{dtype}.safetensors"
        convert(checkpoint, output, dtype=dtype, allow_unknown=True)
        document = compare_files(checkpoint, output, inputs="built-in")
        (folder / f"{dtype}.parity.json").write_text(report.to_json(document))
    recording.record(checkpoint, folder / "float32.recording.safetensors")


@pytest.fixture(scope="session")
def run_cli() -> RunCli:
    """``run_cli("convert", path, ...)``: the command line in a process of its own, output as text.

    Keywords: cwd, env (additions), input, timeout in seconds (120), original: whether it has
    imported the original when it begins, see :mod:`tests.forks`.
    """

    def run(
        *arguments: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        input: str | None = None,
        timeout: float = 120,
        original: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": search_path(),
            "COLUMNS": "100",
            **(env or {}),
        }
        return run_python(
            *("-m", "mlx_contentvec", *arguments),
            cwd=cwd,
            env=environment,
            input=input,
            timeout=timeout,
            original=original,
        )

    return run
