"""The project as a package: what is in it, what it imports, and that it is in order."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mlx_contentvec
from contentvec_parity import machine
from mlx_contentvec.cli import COMMANDS
from tests.conftest import LONGEST
from tests.optional import optional
from tests.sources import PROJECT, search_path

WORKFLOWS = PROJECT / ".github" / "workflows"
#: package -> its folder, lowest first: each may import itself and those above it in this table
ROOMS = {
    "mlx_contentvec": PROJECT / "mlx_contentvec",
    "contentvec_convert": PROJECT / "convert" / "contentvec_convert",
    "contentvec_parity": PROJECT / "parity" / "contentvec_parity",
}
MODULES = sorted(path for folder in ROOMS.values() for path in folder.rglob("*.py"))
CACHES = {"__pycache__", ".mypy_cache", ".ruff_cache"}
#: no command needs these to say what it does
HEAVY = ("mlx", "torch", "transformers", "fairseq", "scipy", "matplotlib", "huggingface_hub")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(wheel: Path) -> set[str]:
    """The files in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that ``pip install .`` would install."""
    optional("hatchling", "pip install -r requirements/development.txt")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=PROJECT)
    return next(folder.glob("*.whl"))


# -- packages --------------------------------------------------------------------------


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(wheel: Path) -> None:
    expected = {
        str(Path(package) / path.relative_to(folder))
        for package, folder in ROOMS.items()
        for path in folder.rglob("*")
        if path.is_file() and not CACHES & set(path.parts)
    }
    assert contents(wheel) == expected
    assert "contentvec_parity/standin/config.json" in expected
    assert "mlx_contentvec/py.typed" in expected


def test_the_wheel_installed_elsewhere_runs_from_there(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site-packages"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    program = (
        "import mlx_contentvec, contentvec_convert, contentvec_parity.standin.weights\n"
        "contentvec_parity.standin.weights.checkpoint_config('base')\n"
        "print(mlx_contentvec.__file__, contentvec_convert.__file__, contentvec_parity.__file__)"
    )
    where = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(target))
    assert all(path.startswith(str(target)) for path in where.split())
    version = run(
        sys.executable, "-m", "mlx_contentvec", "--version", cwd=tmp_path, PYTHONPATH=str(target)
    )
    assert version == f"mlx-contentvec, version {mlx_contentvec.__version__}\n"
    assert (target / "bin" / "mlx-contentvec").exists()


def test_a_wheel_made_from_the_source_distribution_is_the_same(wheel: Path, tmp_path: Path) -> None:
    hatchling = (sys.executable, "-m", "hatchling", "build", "-d", tmp_path)
    run(*hatchling, "-t", "sdist", cwd=PROJECT)
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path)
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for needed in ("scripts/test", "requirements/constraints.txt", "tests/conftest.py", "LICENSE"):
        assert (unpacked / needed).exists(), needed
    run(*hatchling, "-t", "wheel", cwd=unpacked)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)


def test_the_changelog_begins_with_this_version() -> None:
    text = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## (.+)", text, flags=re.MULTILINE)[0]
    version = re.escape(mlx_contentvec.__version__)
    assert re.fullmatch(rf"Unreleased \({version}\)|{version}( .*)?", newest)


@pytest.mark.skipif(not WORKFLOWS.is_dir(), reason="needs a clone: a package has no workflows")
def test_the_weekly_tests_take_the_lowest_python_and_extras_that_there_are() -> None:
    weekly = (WORKFLOWS / "versions.yml").read_text(encoding="utf-8")
    package = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    (lowest,) = re.findall(r'^requires-python = ">=(.+)"', package, flags=re.MULTILINE)
    assert f'versions: lowest, python: "{lowest}", resolution: lowest-direct' in weekly
    (extras,) = re.findall(r'--editable "\.\[(.+)\]"', weekly)
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", package, flags=re.MULTILINE), extra
    # what pip installs besides is what the tests of continuous integration ask for
    asked = "".join(path.read_text() for path in (PROJECT / "requirements").glob("*.txt"))
    (tools,) = re.findall(r"pip install (pytest .+)", weekly)
    assert set(tools.split()) <= set(asked.split())


# -- imports ---------------------------------------------------------------------------


def imported(tree: ast.Module) -> Iterator[str]:
    """Top-level packages that a module imports at import time, not in functions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        pending.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize(
    "module",
    [path for path in MODULES if path.is_relative_to(ROOMS["mlx_contentvec"])],
    ids=lambda path: path.name,
)
def test_running_the_model_needs_mlx_and_numpy_only(module: Path) -> None:
    allowed = {"mlx", "numpy", "mlx_contentvec", *sys.stdlib_module_names}
    if module.stem in ("cli", "command", "terminal") or module.parent.name == "commands":
        allowed.add("click")
    if module.stem == "kernels_llvm":  # which numpy's form stands in for
        allowed.add("llvmlite")
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert set(imported(tree)) <= allowed


def modules_loaded_by(*arguments: str) -> set[str]:
    """Top-level packages in memory after the command line ran with these arguments."""
    program = (
        "import sys\n"
        "from mlx_contentvec.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:], prog_name='mlx-contentvec')\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
        "print('LOADED', *sys.modules)"
    )
    output = run(sys.executable, "-c", program, *arguments, cwd=PROJECT, PYTHONPATH=search_path())
    help_text, _, loaded = output.rpartition("LOADED")
    assert "Usage: mlx-contentvec" in help_text
    return {name.split(".")[0] for name in loaded.split()}


def test_help_imports_none_of_the_rooms_above_nor_anything_heavy() -> None:
    loaded = modules_loaded_by("--help")
    assert not loaded & {*HEAVY, "numpy", "contentvec_convert", "contentvec_parity"}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_commands_help_imports_nothing_heavy(command: str) -> None:
    assert not modules_loaded_by(command, "--help") & set(HEAVY)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_the_line_in_the_list_of_commands_fits(command: str) -> None:
    _, line = COMMANDS[command]
    assert line.endswith(".")
    assert len(line) <= 60


def test_the_files_that_are_tested_first_exist() -> None:
    for name in LONGEST:
        assert (PROJECT / "tests" / name).is_file(), name


def test_torch_was_imported_before_mlx(torch: Any) -> None:
    # its BLAS is then its own, see pytest_configure in tests/conftest.py
    import mlx.core

    order = list(sys.modules)
    assert order.index(torch.__name__) < order.index(mlx.core.__name__)


# -- order -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "tool"), [("lint", "ruff"), ("format", "ruff"), ("types", "mypy")]
)
def test_the_code_is_in_order(check: str, tool: str, need: Any) -> None:
    need(tool, "pip install -r requirements/check.txt")
    run("scripts/check", check, cwd=PROJECT, MLX_CONTENTVEC_PYTHON=sys.executable)


def test_an_unknown_check_is_a_usage_error() -> None:
    done = subprocess.run(
        [PROJECT / "scripts" / "check", "lint", "spelling"],
        env={**os.environ, "MLX_CONTENTVEC_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "spelling" in done.stderr


def test_a_failed_check_fails_the_script_and_the_others_still_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n[ "$2 $3" != "ruff check" ]\n', encoding="utf-8")
    python.chmod(0o755)
    done = subprocess.run(
        [PROJECT / "scripts" / "check"],
        env={**os.environ, "MLX_CONTENTVEC_PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("error: failed: lint\n")
    assert done.stdout.splitlines() == ["-m ruff check .", "-m ruff format --check .", "-m mypy"]


@pytest.mark.parametrize(
    "script",
    sorted(path.name for path in (PROJECT / "scripts").iterdir() if path.suffix != ".py"),
)
def test_scripts_are_executable_and_posix(script: str) -> None:
    path = PROJECT / "scripts" / script
    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    run("sh", "-n", path, cwd=PROJECT)


def test_quickstart_skips_what_it_has_done_with_these_very_files(tmp_path: Path) -> None:
    scripts = tmp_path / "project" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(PROJECT / "scripts" / "quickstart", scripts)
    python = tmp_path / "python"
    # the package's own commands are only named, the rest of the script is real
    python.write_text(
        f'#!/bin/sh\n[ "$1" != -m ] || {{ shift 2; echo "ran $1 $2"; exit; }}\n'
        f'exec {sys.executable} "$@"\n'
    )
    (scripts / "environment").write_text(f"#!/bin/sh\necho {python}\n")
    for made in (python, scripts / "environment"):
        made.chmod(0o755)
    (tmp_path / "hubert_base.pt").write_bytes(b"checkpoint")
    report = tmp_path / "contentvec_base.parity.json"

    def ran() -> list[str]:
        said = run(scripts / "quickstart", "hubert_base.pt", cwd=tmp_path, PYTHONPATH=search_path())
        return re.findall(r"^ran (.*)$", said, flags=re.MULTILINE)

    assert ran() == ["convert hubert_base.pt", "parity hubert_base.pt"]
    (tmp_path / "contentvec_base.safetensors").write_bytes(b"weights")
    facts = {
        "source": {"sha256": hashlib.sha256(b"checkpoint").hexdigest()},
        "weights": {"sha256": hashlib.sha256(b"weights").hexdigest()},
        "versions": machine.versions(),
    }
    report.write_text(json.dumps(facts))
    assert ran() == ["parity judge"]
    for key in facts:
        report.write_text(json.dumps({**facts, key: {}}))
        assert ran() == ["parity hubert_base.pt"], key


@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a /usr/bin/python3")
def test_the_stub_of_a_macs_developer_tools_is_not_run(tmp_path: Path) -> None:
    for name, text in (("uname", "echo Darwin"), ("xcode-select", "exit 2")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [PROJECT / "scripts" / "environment"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "PYTHON": "/usr/bin/python3",
            "MLX_CONTENTVEC_VENV": str(tmp_path / "venv"),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "PYTHON=/usr/bin/python3 cannot be used" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    "script", sorted((PROJECT / "scripts").glob("*.py")), ids=lambda path: path.name
)
def test_a_python_script_says_how_it_is_called(script: Path, need: Any) -> None:
    need("torch", "scripts/test installs it")
    assert os.access(script, os.X_OK)
    said = run(sys.executable, script, "--help", cwd=PROJECT)
    assert said.startswith(f"usage: {script.name}")


def test_what_is_said_of_changes_is_said_of_code_that_is_there() -> None:
    """Of the tables of ``scripts/mutate.py``: a row of a line that is gone excuses nothing."""
    mutate = runpy.run_path(str(PROJECT / "scripts" / "mutate.py"))
    for tests in mutate["TESTS"].values():
        assert [name for name in tests if not (PROJECT / name).exists()] == []
    gone = []
    for name, code, about in mutate["EQUIVALENT"]:
        source = mutate["Source"](PROJECT / name)
        changes = (change for change in source.changes() if change.about == about)
        if not any(source.lines[change.line - 1].strip() == code for change in changes):
            gone.append((name, code, about))
    assert gone == []
    assert {name for name, *_ in mutate["EQUIVALENT"]} <= set(mutate["TESTS"])
