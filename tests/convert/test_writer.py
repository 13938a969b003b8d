"""The writer: files that other readers agree with, that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert import writer
from contentvec_convert.writer import Entry, header, lay_out, publish
from mlx_contentvec.errors import OutputError
from mlx_contentvec.files import Draft, check_target, folder_lock
from tests.sources import search_path

METADATA = {"format": "mlx", "note": 'ä "quoted" \n'}


def write(path: Path, arrays: dict[str, np.ndarray[Any, Any]], *, force: bool = False) -> None:
    names = {"float32": "F32", "float16": "F16", "uint32": "U32"}
    entries = [Entry(name, names[str(a.dtype)], a.shape) for name, a in arrays.items()]
    layout = lay_out(entries, METADATA)
    with Draft(path) as draft, Draft(path.with_suffix(".ledger.json")) as paper:
        draft.write(0, header(layout, METADATA))
        for name, array in arrays.items():
            draft.write(layout.starts[name], np.ascontiguousarray(array).data)
        paper.write(0, b"{}")
        publish(draft, paper, force=force)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ARRAYS = {
    "b.odd": np.arange(3, dtype=np.float16),
    "a.wide": np.arange(6, dtype=np.float32).reshape(2, 3),
    "c.packed": np.arange(4, dtype=np.uint32),
    "z.scalar": np.float32(7).reshape(()),
}


# ---- the format


def test_the_safetensors_library_and_mlx_read_what_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file

    path = tmp_path / "out.safetensors"
    write(path, ARRAYS)
    loaded = load_file(path)
    assert set(loaded) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
    with safe_open(path, "numpy") as opened:
        assert opened.metadata() == METADATA

    from mlx_contentvec.backend import mx

    arrays, metadata = mx.load(str(path), return_metadata=True)
    assert metadata["format"] == "mlx"
    assert np.array_equal(np.array(arrays["a.wide"]), ARRAYS["a.wide"])


def test_data_is_aligned_and_without_gaps(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write(path, ARRAYS)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert next(iter(fields)) == "__metadata__"
    del fields["__metadata__"]
    position = 0
    for row in fields.values():
        begin, end = row["data_offsets"]
        size = {"F32": 4, "F16": 2, "U32": 4}[row["dtype"]]
        assert begin == position and begin % size == 0
        position = end
    assert 8 + length + position == len(data)


def test_the_order_of_the_tensors_given_does_not_show(tmp_path: Path) -> None:
    write(tmp_path / "1.safetensors", ARRAYS)
    write(tmp_path / "2.safetensors", dict(reversed(ARRAYS.items())))
    first, second = ((tmp_path / f"{i}.safetensors").read_bytes() for i in (1, 2))
    assert first == second


def test_a_header_may_shrink_after_the_data_was_placed_and_may_not_grow() -> None:
    layout = lay_out([Entry("a", "F32", (1,))], {"k": "x" * 50})
    assert len(header(layout, {"k": "x"})) == layout.header_bytes
    with pytest.raises(OutputError, match="header grew"):
        header(layout, {"k": "x" * 70})


# ---- whole or not at all


def test_nothing_is_visible_before_it_is_published(tmp_path: Path) -> None:
    final = tmp_path / "out.safetensors"
    with Draft(final) as draft:
        draft.write(0, b"half")
        assert not final.exists()
        assert [name.startswith(".") for name in names(tmp_path)] == [True]
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OutputError("no")])
def test_whatever_ends_a_draft_leaves_no_debris(tmp_path: Path, error: Any) -> None:
    final = tmp_path / "out.safetensors"
    final.write_bytes(b"old")
    with pytest.raises(BaseException), Draft(final) as draft:  # noqa: B017
        draft.write(0, b"half")
        raise error
    assert names(tmp_path) == ["out.safetensors"]
    assert final.read_bytes() == b"old"


def test_what_a_killed_run_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    final = tmp_path / "out.safetensors"
    code = (
        "import os, sys, signal; from pathlib import Path\n"
        "from mlx_contentvec.files import Draft\n"
        "draft = Draft(Path(sys.argv[1])).__enter__(); draft.write(0, b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": search_path()}
    subprocess.run([sys.executable, "-c", code, final], env=environment, check=False)
    (leftover,) = names(tmp_path)
    assert leftover.endswith(".partial")
    with Draft(tmp_path / "other.safetensors"):
        (other,) = {*names(tmp_path)} - {leftover}
    (tmp_path / other).touch()
    write(final, ARRAYS)
    assert names(tmp_path) == [
        other,
        "out.ledger.json",
        "out.safetensors",
    ]


def test_a_run_under_way_is_not_mistaken_for_a_leftover(tmp_path: Path) -> None:
    final = tmp_path / "out.safetensors"
    with Draft(final) as first:
        first.write(0, b"first")
        with Draft(final) as second:
            second.write(0, b"second")
            second.rename(force=True)
        first.rename(force=True)
    assert final.read_bytes() == b"first"
    assert names(tmp_path) == ["out.safetensors"]


def test_two_runs_without_force_do_not_replace_each_other(tmp_path: Path) -> None:
    final = tmp_path / "out.safetensors"
    with Draft(final) as draft:
        draft.write(0, b"mine")
        final.write_bytes(b"somebody else's")
        with pytest.raises(OutputError, match="appeared"):
            draft.rename(force=False)
    assert final.read_bytes() == b"somebody else's"
    assert names(tmp_path) == ["out.safetensors"]


def test_a_file_system_without_second_names_is_served_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    write(tmp_path / "out.safetensors", ARRAYS)
    assert names(tmp_path) == ["out.ledger.json", "out.safetensors"]


@pytest.mark.parametrize("steps", range(3))
def test_an_interrupted_publication_never_leaves_a_foreign_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Stop after so many of: old ledger gone, output renamed, ledger renamed."""
    final, ledger = tmp_path / "out.safetensors", tmp_path / "out.ledger.json"
    final.write_bytes(b"old")
    ledger.write_bytes(b"ledger of old")
    done = 0
    rename, unlink = Draft.rename, Path.unlink

    def step() -> None:
        nonlocal done
        if done == steps:
            raise KeyboardInterrupt
        done += 1

    def counted_rename(self: Draft, **options: Any) -> None:
        step()
        rename(self, **options)

    def counted_unlink(self: Path, **options: Any) -> None:
        if self == ledger:
            step()
        unlink(self, **options)

    monkeypatch.setattr(Draft, "rename", counted_rename)
    monkeypatch.setattr(Path, "unlink", counted_unlink)
    with pytest.raises(KeyboardInterrupt), Draft(final) as draft, Draft(ledger) as paper:
        draft.write(0, b"new")
        paper.write(0, b"ledger of new")
        publish(draft, paper, force=True)
    pair = (final.read_bytes(), ledger.read_bytes() if ledger.exists() else None)
    assert pair == [(b"old", b"ledger of old"), (b"old", None), (b"new", None)][steps]
    assert len(names(tmp_path)) == 1 + (pair[1] is not None)


def test_both_files_are_on_the_disk_before_either_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def noted(name: str, act: Callable[..., None]) -> Callable[..., None]:
        def step(draft: Draft, **options: Any) -> None:
            steps.append(f"{name} {draft.final.name}")
            act(draft, **options)

        return step

    for name in ("sync", "rename"):
        monkeypatch.setattr(Draft, name, noted(name, getattr(Draft, name)))
    monkeypatch.setattr(writer, "sync_folder", lambda folder: steps.append(f"sync {folder.name}"))
    final, ledger = tmp_path / "out.safetensors", tmp_path / "out.ledger.json"
    with Draft(final) as draft, Draft(ledger) as paper:
        publish(draft, paper, force=False)
    assert steps == [
        "sync out.safetensors",
        "sync out.ledger.json",
        "rename out.safetensors",
        "rename out.ledger.json",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_seen_before_anything_is_renamed(
    tmp_path: Path, force: bool
) -> None:
    final, ledger = tmp_path / "out.safetensors", tmp_path / "out.ledger.json"
    with Draft(final) as draft, Draft(ledger) as paper:
        ledger.write_bytes(b"another's")
        if force:
            os.mkfifo(final)
        with pytest.raises(OutputError):
            publish(draft, paper, force=force)
    assert ledger.read_bytes() == b"another's"
    assert not final.is_file()


@pytest.mark.parametrize("which", ["output", "ledger"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_temporary_file_that_is_another_is_not_published(
    tmp_path: Path, which: str, how: str
) -> None:
    final, ledger = tmp_path / "out.safetensors", tmp_path / "out.ledger.json"
    for path in (final, ledger):
        path.write_bytes(b"older")
    with Draft(final) as draft, Draft(ledger) as paper:
        temporary = (draft if which == "output" else paper)._temporary
        temporary.unlink()
        if how == "replaced":
            temporary.write_bytes(b"another's")
        with pytest.raises(OutputError, match="moved, removed or replaced"):
            publish(draft, paper, force=True)
    assert (final.read_bytes(), ledger.read_bytes()) == (b"older", b"older")


@pytest.mark.parametrize("force", [False, True])
def test_nor_is_one_by_itself(tmp_path: Path, force: bool) -> None:
    final = tmp_path / "out.json"
    with Draft(final) as draft:
        draft._temporary.unlink()
        draft._temporary.write_bytes(b"another's")
        with pytest.raises(OutputError, match="moved, removed or replaced"):
            draft.rename(force=force)
    assert not final.exists()


# ---- refusals


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    final = tmp_path / "out.safetensors"
    final.write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists"):
        check_target(final, force=False)
    check_target(final, force=True)
    final.unlink()
    final.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="already exists"):
        check_target(final, force=False)


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        check_target(tmp_path / "none" / "out.safetensors", force=False)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        check_target(tmp_path / "file" / "out.safetensors", force=False)


def test_a_folder_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        check_target(tmp_path / "out.safetensors", force=True)


def test_a_disk_too_small_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_target(tmp_path / "out.safetensors", force=False, needed=5000)
    with pytest.raises(OutputError) as caught:
        check_target(tmp_path / "out.safetensors", force=False, needed=5001)
    assert "5,000 bytes free" in str(caught.value) and "5,001 bytes" in str(caught.value)


def test_a_disk_that_fills_up_gives_one_error_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 10
    real = os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(descriptor, data[:room], offset)
        room -= count
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError) as caught:
        write(tmp_path / "out.safetensors", ARRAYS)
    assert "No space left on device" in str(caught.value) and "hint" in str(caught.value)
    assert names(tmp_path) == []


def test_a_disk_that_fails_to_flush_gives_an_error_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "out.safetensors", ARRAYS)
    assert names(tmp_path) == []


def test_a_limit_on_file_size_gives_one_error_and_no_debris(tmp_path: Path) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(OutputError) as caught:
            write(tmp_path / "out.safetensors", ARRAYS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "File too large" in str(caught.value)
    assert names(tmp_path) == []


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder that may not be written to, for root as well (as somebody else)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    somebody = 65534
    root = os.geteuid() == 0
    if root:
        os.seteuid(somebody)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_without_permission_is_said(read_only_folder: Path) -> None:
    with pytest.raises(OutputError) as caught, Draft(read_only_folder / "out.safetensors"):
        pass
    assert "Permission denied" in str(caught.value)
    assert "another folder" in str(caught.value)


def test_what_comes_back_short_is_noticed(tmp_path: Path) -> None:
    with Draft(tmp_path / "out") as draft:
        draft.write(0, b"1234")
        found = bytearray(8)
        with pytest.raises(OutputError, match="shorter"):
            draft.read_into(0, memoryview(found))


def test_large_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda d, data, at: real(d, data[:7], at))
    data = os.urandom(100)
    with Draft(tmp_path / "out") as draft:
        draft.write(3, data)
        found = bytearray(100)
        draft.read_into(3, memoryview(found))
    assert found == data


# ---- names, links and other processes


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    final = tmp_path / ("n" * 253)
    with Draft(final) as draft:
        draft.write(0, b"long")
        draft.rename(force=False)
    assert final.read_bytes() == b"long"


def test_a_planted_link_at_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0000")
    with Draft(tmp_path / "out"):
        (planted,) = set(names(tmp_path)) - {"victim"}
    (tmp_path / planted).symlink_to(victim)
    with pytest.raises(OutputError, match="File exists"), Draft(tmp_path / "out") as draft:
        draft.write(0, b"overwritten")
    assert victim.read_bytes() == b"precious"


def test_a_pipe_at_a_temporary_name_blocks_nothing(tmp_path: Path) -> None:
    with Draft(tmp_path / "out"):
        (temporary,) = names(tmp_path)
    os.mkfifo(tmp_path / temporary)
    signal.alarm(10)
    try:
        with Draft(tmp_path / "out") as draft:
            draft.rename(force=False)
    finally:
        signal.alarm(0)
    assert "out" in names(tmp_path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, 45, 102])
def test_without_second_names_nothing_is_replaced_unasked_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with Draft(tmp_path / "free") as draft:
        draft.rename(force=False)
    final = tmp_path / "out"
    with Draft(final) as draft:
        final.write_bytes(b"somebody else's")
        with pytest.raises(OutputError, match="appeared"):
            draft.rename(force=False)
    assert final.read_bytes() == b"somebody else's"


def test_a_pipe_is_not_replaced_by_an_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="pipe or a device"):
        check_target(tmp_path / "pipe", force=True)


def test_two_publications_to_one_name_never_mix(tmp_path: Path) -> None:
    """Each of two processes publishes its own pair again and again; every pair seen fits."""
    code = (
        "import sys; from pathlib import Path\n"
        "from contentvec_convert.writer import publish\n"
        "from mlx_contentvec.files import Draft\n"
        "folder, mine = Path(sys.argv[1]), sys.argv[2].encode()\n"
        "for _ in range(150):\n"
        "    with Draft(folder / 'out') as output, Draft(folder / 'ledger') as ledger:\n"
        "        output.write(0, mine); ledger.write(0, mine)\n"
        "        publish(output, ledger, force=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": search_path()}
    arguments = [sys.executable, "-c", code, str(tmp_path)]
    workers = [subprocess.Popen([*arguments, name], env=environment) for name in "ab"]
    pairs = set()
    while any(worker.poll() is None for worker in workers):
        with folder_lock(tmp_path):
            if names(tmp_path) and (tmp_path / "out").exists():
                pairs.add(((tmp_path / "out").read_bytes(), (tmp_path / "ledger").read_bytes()))
    assert [worker.returncode for worker in workers] == [0, 0]
    assert pairs <= {(b"a", b"a"), (b"b", b"b")} and pairs
    assert (tmp_path / "out").read_bytes() == (tmp_path / "ledger").read_bytes()


def test_a_publication_that_came_second_leaves_the_first_whole(tmp_path: Path) -> None:
    final = tmp_path / "out.safetensors"
    with Draft(final) as draft, Draft(tmp_path / "out.ledger.json") as paper:
        write(final, ARRAYS)
        before = [path.read_bytes() for path in sorted(tmp_path.glob("out.*"))]
        with pytest.raises(OutputError, match="already exists"):
            publish(draft, paper, force=False)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("out.*"))] == before
