"""A conversion from beginning to end: checkpoint in, safetensors and ledger out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_contentvec import __version__
from mlx_contentvec.errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    MappingError,
    OutputError,
)
from mlx_contentvec.files import Draft, check_target, is_folder
from mlx_contentvec.json_text import JSON_BYTES

from .checkpoint import Checkpoint, open_checkpoint
from .diagnosis import accept, stand_in_refused
from .identity import Hashed, Identification, Identity, folder_states, is_known_size, name_of
from .known_files import CONTENTVEC, KnownFile
from .ledger import DropRow, Ledger, TensorRow, account, source_facts, source_tensor
from .precision import Precision, precision_named
from .repository import BESIDE, Fetched
from .rules import Plan
from .sources import plan_for
from .sources.shapes import Unstated
from .transfer import Part, Progress, parts_of, read_back, write_tensors
from .writer import header, lay_out, publish

_STAND_IN_CHARACTERS = 300

_LEDGER_SUFFIX = ".ledger.json"


@dataclass(frozen=True)
class Expectation:
    """Which source the caller is content with: a known one, unless told otherwise."""

    allow_unknown: bool = False
    md5: str | None = None
    sha256: str | None = None
    #: what was downloaded for this conversion, and is what was asked for
    fetched: Fetched | None = None

    @property
    def by_checksum(self) -> bool:
        """Whether one particular file is expected, by a checksum of the caller's or the table's."""
        row = self.fetched.row if self.fetched is not None else None
        known = row is not None and row.verifiable
        return known or self.md5 is not None or self.sha256 is not None

    @property
    def stated(self) -> bool:
        """Whether one particular file is expected."""
        return self.by_checksum or self.fetched is not None

    def check(self, source: Path, identity: Identity, problem: Exception | None = None) -> None:
        """Raise IdentityError, with a diagnosis, for another source; see :func:`accept`."""
        if self.fetched is not None:
            self.fetched.check(identity)
        accept(
            source,
            identity,
            allow_unknown=self.allow_unknown or self.fetched is not None,
            expect_md5=self.md5,
            expect_sha256=self.sha256,
            problem=problem,
        )


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str = "float32",
    allow_unknown: bool = False,
    expect_md5: str | None = None,
    expect_sha256: str | None = None,
    force: bool = False,
    heads: int | None = None,
    normalize: bool | None = None,
    identification: Identification | None = None,
    progress: Progress | None = None,
    fetched: Fetched | None = None,
) -> Ledger:
    """Convert a checkpoint to MLX safetensors; the same input always gives the same bytes.

    source: a checkpoint file, or a folder in the Hugging Face layout.
    output: a ``.safetensors`` path; by default :func:`default_output`. The ledger goes
        beside it, see :func:`ledger_path`.
    dtype: a key of PRECISIONS.
    allow_unknown: accept a source that is not in the table of known files.
    expect_md5, expect_sha256: accept exactly the file with this checksum.
    force: replace an output that exists.
    heads, normalize: what no tensor shows, for a source that does not say it.
    identification: the source's, if it is under way already (of a file, not a folder).
    progress: called with ("hashing", "writing" or "checking", bytes done, bytes in all).
    fetched: the download that the source is (``fetch.fetch``), which is accepted as such.

    Returns the ledger that was written. The output appears complete, flushed
    and compared with its source, or not at all. Raises IdentityError,
    CheckpointError, ConfigError, MappingError and OutputError.
    """
    source = Path(source)
    output = Path(output) if output is not None else default_output(source)
    precision = precision_named(dtype)
    expectation = Expectation(allow_unknown, expect_md5, expect_sha256, fetched)
    _check_output(source, output, force)

    with contextlib.ExitStack() as stack:
        checkpoint, identification = stack.enter_context(
            opened(source, expectation, identification, progress)
        )
        with identity_first(source, expectation, identification):
            row = fetched.row if fetched is not None else None
            plan = planned(checkpoint, identification, row, heads=heads, normalize=normalize)
            if fetched is not None:
                fetched.check_model(plan.config)
                plan = replace(plan, notes=(*plan.notes, *fetched.notes))
            account(plan, checkpoint.tensors)
        _check_not_source(output, checkpoint.files)
        stand_in = stand_in_of(checkpoint)
        if stand_in and not (allow_unknown or expectation.by_checksum):
            raise stand_in_refused(identification.result(), stand_in)

        parts = parts_of(plan, checkpoint.tensors, precision)
        promised = _metadata(checkpoint, plan, precision, identification.longest(), stand_in)
        layout = lay_out([part.entry for part in parts.values()], promised)
        check_target(output, force=force, needed=layout.size)

        workers = stack.enter_context(ThreadPoolExecutor(1))
        intact = workers.submit(_verify, checkpoint, expectation)
        draft = stack.enter_context(Draft(output))
        expected = write_tensors(draft, layout, plan, checkpoint.tensors, precision, progress)

        identity = identification.result(hashing(progress))
        expectation.check(source, identity)
        metadata = _metadata(checkpoint, plan, precision, identity, stand_in)
        head = header(layout, metadata)
        draft.write(0, head)
        flushed: Future[None] = workers.submit(draft.sync)
        sha256, digests = read_back(
            draft, layout, head, parts, checkpoint.tensors, precision, expected, progress
        )
        intact.result()
        flushed.result()
        identification.check_unchanged()

        ledger = Ledger(
            identity=identity,
            naming=plan.naming,
            container=checkpoint.container,
            stand_in=stand_in,
            config=plan.config,
            output={
                "name": name_of(output),
                "size": layout.size,
                "sha256": sha256,
                "dtype": precision.name,
            },
            tensors=tuple(_row(part, checkpoint, digests) for part in parts.values()),
            drops=tuple(
                DropRow(source_tensor(checkpoint.tensors[drop.source]), drop.reason)
                for drop in plan.drops
            ),
            notes=_notes(plan, stand_in),
            version=__version__,
        )
        paper = stack.enter_context(Draft(ledger_path(output)))
        paper.write(0, ledger.to_json().encode())
        publish(draft, paper, force=force)
    return ledger


def default_output(source: Path) -> Path:
    """Where a conversion goes that does not say where: the working folder."""
    if source.name in CONTENTVEC.names:
        return Path("contentvec_base.safetensors")
    return Path(f"{source.resolve().stem}.safetensors")


def ledger_path(output: Path) -> Path:
    """Where the ledger of an output lies: beside it, ``<stem>.ledger.json``."""
    return output.with_name(f"{output.stem}{_LEDGER_SUFFIX}")


@contextlib.contextmanager
def opened(
    source: Path,
    expectation: Expectation,
    identification: Identification | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Checkpoint, Identification]]:
    """The checkpoint and its identification under way.

    A file that nobody expects and whose size is no known file's is not opened
    before it has been identified: most likely it is the wrong one.
    """
    with contextlib.ExitStack() as stack:
        if is_folder(source):
            before = folder_states(source)
            checkpoint = stack.enter_context(open_checkpoint(source))
            beside = [source / name for name in BESIDE if source / name in before]
            for path in beside:
                if before[path][0] > JSON_BYTES:
                    raise CorruptCheckpoint(
                        f"{path} is too large for what it should be",
                        found=f"{before[path][0]:,} bytes",
                        expected=f"at most {JSON_BYTES:,}",
                    )
            identification = stack.enter_context(
                Identification(source, checkpoint.files, beside, since=before)
            )
        else:
            identification = stack.enter_context(identification or Identification(source))
            hoped_for = is_known_size(identification.size) or expectation.stated
            if not hoped_for and not expectation.allow_unknown:
                expectation.check(source, identification.result(hashing(progress)))
            with identity_first(source, expectation, identification):
                checkpoint = stack.enter_context(open_checkpoint(source))
        yield checkpoint, identification


@contextlib.contextmanager
def identity_first(
    source: Path, expectation: Expectation, identification: Identification
) -> Iterator[None]:
    """Say that a file is the wrong one before complaining of what is wrong inside it."""
    try:
        yield
    except (CheckpointError, ConfigError, MappingError) as problem:
        expectation.check(source, identification.result(), problem)
        raise


def planned(
    checkpoint: Checkpoint,
    identification: Identification,
    row: KnownFile | None = None,
    *,
    heads: int | None = None,
    normalize: bool | None = None,
) -> Plan:
    """The plan for a checkpoint; how a known file's input is scaled is known here if not to it.

    row: the known file that the source was fetched as, for one that no checksum shows

    Raises what :func:`plan_for` raises.
    """
    try:
        return plan_for(checkpoint, heads=heads, normalize=normalize)
    except Unstated:
        known = identification.result().known or row
        if normalize is not None or known is None or known.normalize is None:
            raise
        plan = plan_for(checkpoint, heads=heads, normalize=known.normalize)
    note = f"the file does not say how its input is scaled; of {known.key} it is known to be " + (
        "normalised" if known.normalize else "taken as it is"
    )
    return replace(plan, notes=(*plan.notes, note))


def hashing(progress: Progress | None) -> Hashed | None:
    """A conversion's progress, for the time that it only waits for checksums."""
    if progress is None:
        return None
    return lambda done, total: progress("hashing", done, total)


def stand_in_of(checkpoint: Checkpoint) -> str | None:
    """The sentence with which a checkpoint, or a file made from it, says that it is a stand-in."""
    state = checkpoint.extra.get("extra_state")
    said = state.get("stand_in") if isinstance(state, dict) else None
    said = said or checkpoint.metadata.get("stand_in")
    if not said:
        return None
    # whatever else it is, it becomes one line that is safe to show and to store
    line = " ".join(str(said)[:_STAND_IN_CHARACTERS].split())
    return "".join(character for character in line if character.isprintable()) or "unnamed"


def _check_output(source: Path, output: Path, force: bool) -> None:
    if output.suffix != ".safetensors":
        raise OutputError(
            f"cannot write {output.name}: MLX tells formats by their suffix",
            expected="a name that ends in .safetensors",
        )
    _check_not_source(output, (source,))
    for path in (output, ledger_path(output)):
        check_target(path, force=force)


def _check_not_source(output: Path, files: Iterable[Path]) -> None:
    """Neither the output nor its ledger may replace a file that the conversion reads."""
    for file in files:
        for path in (output, ledger_path(output)):
            with contextlib.suppress(OSError, ValueError):
                if path.samefile(file):
                    raise OutputError(
                        f"{path} is the source itself", hint="name another file with -o"
                    )


def _verify(checkpoint: Checkpoint, expectation: Expectation) -> None:
    """Hold the tensors of a file that no checksum of ours vouches for against its own."""
    if expectation.allow_unknown and not expectation.stated:
        for tensor in checkpoint.tensors.values():
            tensor.verify()


def _metadata(
    checkpoint: Checkpoint,
    plan: Plan,
    precision: Precision,
    identity: Identity,
    stand_in: str | None,
) -> dict[str, str]:
    """What the output says about itself. ``format`` is what loaders look for."""
    source = source_facts(identity, plan.naming, checkpoint.container, stand_in)
    # what a file is called is not what it is: the ledger says it, and equal sources
    # give equal bytes
    del source["name"]
    metadata = {
        "format": "mlx",
        "config": plan.config.to_json(),
        "source": json.dumps(source, sort_keys=True, ensure_ascii=False),
        "dtype": precision.name,
        "mlx_contentvec_version": __version__,
    }
    if precision.quantization is not None:
        metadata["quantization"] = json.dumps(vars(precision.quantization), sort_keys=True)
    if stand_in is not None:
        metadata["stand_in"] = stand_in
    return metadata


def _row(part: Part, checkpoint: Checkpoint, digests: dict[str, str]) -> TensorRow:
    return TensorRow(
        target=part.entry.name,
        sources=tuple(source_tensor(checkpoint.tensors[name]) for name in part.rule.sources),
        transform=part.rule.transform,
        encoding=part.encoding,
        dtype=part.entry.dtype,
        shape=part.entry.shape,
        sha256=digests[part.entry.name],
        exact=part.exact,
    )


def _notes(plan: Plan, stand_in: str | None) -> tuple[str, ...]:
    return plan.notes if stand_in is None else (f"STAND-IN: {stand_in}", *plan.notes)
