"""The documentation: every block that can run offline runs, and every command and link exists.

A block in ``bash`` or ``python`` that needs more than this says so after its
language, as ``bash skip=network``; SKIPS lists the reasons. Commands in skipped
blocks are still checked: the subcommand and each of its options must exist.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from contentvec_convert.conversion import convert
from mlx_contentvec.cli import COMMANDS
from tests.forks import program
from tests.hub_server import HubServer
from tests.small_models import DEEP, random_weights_file
from tests.sources import PROJECT, search_path

PAGES = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")])
#: what a block that is not run would need
SKIPS = {
    "installs": "packages from an index",
    "network": "a known file from the network, which its checksums tell from any other",
    "minutes": "more time than a test has",
    "hours": "more time than a test has",
    "GPU": "a GPU",
}
FENCE = re.compile(r"^```(\S*)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: these pages work on a checkpoint and what was made of it; the others need layers 9 and 12
WITH_CHECKPOINT = {"docs/parity.md", "docs/embedders.md", "docs/ports.md", "docs/publishing.md"}
#: this one publishes: to a Hub on this machine, what does not say that it is a stand-in
PUBLISHES = "docs/publishing.md"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    language: str
    about: str
    code: str

    @property
    def skip(self) -> str | None:
        """Why it is not run, a key of SKIPS."""
        key, _, value = self.about.partition("=")
        return value if key == "skip" else None


def name_of(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(name_of(page), *found) for found in FENCE.findall(text)]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = {
    name_of(page): runnable
    for page in PAGES
    if (runnable := [b for b in blocks_of(page) if b.language and b.skip is None])
}


def commands_in(block: Block) -> Iterator[list[str]]:
    """The words of each command line of a block, comments left out."""
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", line):
            if words := shlex.split(part, comments=True):
                yield words


# -- blocks ----------------------------------------------------------------------------


def test_every_block_is_of_a_known_kind() -> None:
    assert {block.language for block in BLOCKS} <= {"", "bash", "python"}
    for block in BLOCKS:
        assert not block.about or block.skip in SKIPS, f"{block.page}: {block.about}"


def test_a_block_can_be_pasted_and_read_without_scrolling() -> None:
    for block in BLOCKS:
        for line in block.code.splitlines():
            assert len(line) <= 100, f"{block.page}: {line}"
            # typed at a prompt, zsh takes a comment for arguments
            assert block.language != "bash" or "#" not in line, f"{block.page}: {line}"


@pytest.fixture
def folder(
    tmp_path: Path, request: pytest.FixtureRequest, speech: Callable[..., Any]
) -> Iterator[Path]:
    """Where a page's blocks run: what a reader of that page has by then."""
    soundfile = request.getfixturevalue("need")("soundfile", "pip install '.[audio]'")
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "song.wav", speech(33075), 44100)
    soundfile.write(tmp_path / "audio" / "take.wav", speech(16000, 3), 16000)
    converted = tmp_path / "contentvec_base.safetensors"
    if request.getfixturevalue("page") in WITH_CHECKPOINT:
        request.getfixturevalue("fairseq")
        checkpoint = tmp_path / "hubert_base.pt"
        tiny = request.getfixturevalue("tiny_checkpoint")
        if request.getfixturevalue("page") == PUBLISHES:
            write_unmarked(request.getfixturevalue("torch"), tiny, checkpoint)
            convert(checkpoint, converted, allow_unknown=True)
        else:
            checkpoint.write_bytes(tiny.read_bytes())
            converted.write_bytes(request.getfixturevalue("converted_tiny").read_bytes())
    elif request.getfixturevalue("page") == "README.md":
        # the first release's usage builds the model of full size
        converted.symlink_to(request.getfixturevalue("converted_standin"))
    else:
        random_weights_file(converted, DEEP)
    programs = tmp_path / "bin"
    programs.mkdir()
    launch = Path(sys.executable).with_name("mlx.launch")
    for name, arguments in (
        ("mlx-contentvec", "-m mlx_contentvec"),
        ("python", ""),
        ("mlx.launch", str(launch)),
    ):
        path = programs / name
        path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        path.chmod(0o755)
    with contextlib.ExitStack() as stack:
        if request.getfixturevalue("page") in WITH_CHECKPOINT and sys.platform == "linux":
            # importing the original takes most of the time of these pages' commands
            stack.enter_context(program(programs / "mlx-contentvec", "mlx_contentvec"))
        yield tmp_path


def write_unmarked(torch: Any, standin: Path, path: Path) -> None:
    """A stand-in without the sentence that says so, as a checkpoint that may be published."""
    state = torch.load(standin, weights_only=False)
    del state["extra_state"]["stand_in"]
    torch.save(state, path)


@pytest.fixture
def hub(page: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables by which a page's blocks find the Hub: one on this machine, or none."""
    if page != PUBLISHES:
        yield {"HF_HUB_OFFLINE": "1"}
        return
    with HubServer() as server:
        yield server.environment(tmp_path / "home")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.fullsize] if page == "README.md" else [])
        for page in RUN
    ],
)
def test_the_blocks_of_a_page_run_one_after_the_other(
    page: str, folder: Path, hub: dict[str, str]
) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": search_path(),
        **hub,
    }
    for block in RUN[page]:
        command = ["sh", "-eu", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, block.code.replace("USER/NAME", "someone/name")],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, f"{block.code}\n{done.stdout}{done.stderr}"


# -- commands --------------------------------------------------------------------------


def subcommand(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command that ``mlx-contentvec WORDS`` runs, and the words that are left for it."""
    module, attribute = COMMANDS[words[0]][0].split(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    rest = words[1:]
    if isinstance(command, click.Group) and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    elif isinstance(command, click.Group):
        command = command.commands.get("run", command)
    return command, rest


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            words[words.index("mlx-contentvec") + 1 :], id=f"{block.page}: {' '.join(words)}"
        )
        for block in BLOCKS
        if block.language == "bash"
        for words in commands_in(block)
        if "mlx-contentvec" in words
    ],
)
def test_a_command_and_its_options_exist(words: list[str]) -> None:
    command, rest = subcommand(words)
    options = {name for option in command.params for name in option.opts + option.secondary_opts}
    assert {word for word in rest if re.match(r"--?[a-z]", word)} <= options


@pytest.mark.parametrize(
    ("page", "words"),
    [
        pytest.param(name_of(page), words, id=f"{name_of(page)}: {words}")
        for page in PAGES
        for words in re.findall(r"`mlx-contentvec ([^`]+)`", page.read_text(encoding="utf-8"))
    ],
)
def test_a_command_in_the_text_exists(page: str, words: str) -> None:
    names = re.match(r"([a-z]+)", words)
    if names is None:  # `mlx-contentvec --help`
        return
    command, rest = subcommand(shlex.split(words))
    options = {name for option in command.params for name in option.opts}
    assert {word for word in rest if word.startswith("--")} <= options, page


# -- names -----------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_scripts_that_a_page_names_exist(page: Path) -> None:
    for script in re.findall(r"\bscripts/([\w.-]*\w)", page.read_text(encoding="utf-8")):
        assert (PROJECT / "scripts" / script).exists(), script


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    pending = [PROJECT / "README.md"]
    while pending:
        page = pending.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+\.md)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                pending.append((page.parent / target).resolve())
    assert set(PAGES) <= seen


def test_the_readme_is_short_and_its_way_in_needs_no_torch() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    way_in = text[text.index("## Get features") : text.index("## Prove it")]
    code = "".join(code for _, _, code in FENCE.findall(way_in))
    assert not re.search(r"parity|scripts/|torch", code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_an_install_line_gets_this_package_and_not_the_first_release(page: Path) -> None:
    for line in page.read_text(encoding="utf-8").splitlines():
        if found := re.search(r"pip install ([^`]*)", line):
            assert "mlx-contentvec" not in found[1] or "mlx-contentvec>=" in found[1], line


#: the pages that say which file does what
GUIDES = (PROJECT / "docs" / "architecture.md", PROJECT / "CONTRIBUTING.md")


def test_the_files_that_the_guides_name_exist() -> None:
    files = [f"/{path.relative_to(PROJECT).as_posix()}" for path in PROJECT.rglob("*.py")]
    for guide in GUIDES:
        for name in re.findall(r"`((?:\w+/)*\w+\.py)`", guide.read_text(encoding="utf-8")):
            if "NEW" not in name:
                assert any(path.endswith(f"/{name}") for path in files), f"{guide.name}: {name}"


def test_the_tables_that_the_guides_name_are_in_the_file_of_their_row() -> None:
    rows = [
        re.fullmatch(r"\| `([\w/]+\.py)` \| (.*) \|", line)
        for line in GUIDES[1].read_text(encoding="utf-8").splitlines()
    ]
    named = [
        (row[1], name)
        for row in rows
        if row and "NEW" not in row[1]
        for name in re.findall(r"`([A-Z]\w+|_[A-Z]\w+|\w+)(?:\(\))?`", row[2])
    ]
    assert named
    for file, name in named:
        assert re.search(rf"\b{name}\b", (PROJECT / file).read_text(encoding="utf-8")), (file, name)


def test_no_hint_or_template_sends_its_reader_to_the_first_release() -> None:
    folders = ("mlx_contentvec", "convert", "parity", "scripts")
    files = [f for folder in folders for f in (PROJECT / folder).rglob("*") if f.is_file()]
    lines = [
        (file, line)
        for file in files
        if file.suffix != ".pyc"
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
        if re.search(r"pip install.*mlx-contentvec", line)
    ]
    assert lines
    for file, line in lines:
        assert re.search(r"mlx-contentvec(\[[\w{},]+\])?>=0\.2", line), f"{file}: {line}"
