"""What is said of a file that is not the one it should be: what it is, and what to do.

What a file is by its bytes comes from ``checkpoint.foreign``, which model a
sound checkpoint holds from ``recognition``; this module joins that with the
table of known files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_contentvec.errors import ContentvecError, ForeignCheckpoint, IdentityError
from mlx_contentvec.files import is_file

from .identity import Identity
from .known_files import CONTENTVEC, KnownFile, named

if TYPE_CHECKING:
    from .checkpoint import Foreign


def accept(
    path: Path,
    identity: Identity,
    *,
    allow_unknown: bool = False,
    expect_md5: str | None = None,
    expect_sha256: str | None = None,
    problem: Exception | None = None,
) -> None:
    """Refuse a file that is not the one it should be.

    Accepted are: a file with the checksums expected, when any are given; a
    known file that does not bear another known file's name; a file that shows by
    what it holds which model it is (``recognition.BY_CONTENT``); and anything at
    all with ``allow_unknown``. Raises IdentityError with a diagnosis.

    problem: why the file could not be converted, where that was tried: it is
    then not read again for the diagnosis.
    """
    for kind, expected, found in (
        ("md5", expect_md5, identity.md5),
        ("sha256", expect_sha256, identity.sha256),
    ):
        if expected is not None and expected.strip().lower() != found:
            nature, advice = _judge(path, identity, None, problem)
            raise IdentityError(
                f"{identity.name} is not the file expected",
                found=f"{kind} {found} ({identity.size:,} bytes{nature})",
                expected=f"{kind} {expected.strip().lower()}",
                hint=advice,
            )
    if allow_unknown or expect_md5 is not None or expect_sha256 is not None:
        return
    promised = named(identity.name)
    if identity.known is not None and (not promised or identity.known in promised):
        return
    if not promised and _recognised(path):
        return
    raise diagnosis(path, identity, problem)


def diagnosis(path: Path, identity: Identity, problem: Exception | None = None) -> IdentityError:
    """The error that says what a file that was not accepted is, and what to do about it."""
    promised = named(identity.name)
    wanted = promised[0] if promised else CONTENTVEC
    nature, advice = _judge(path, identity, wanted, problem)
    expected = (f"md5 {wanted.md5}" if wanted.md5 is not None else f"sha256 {wanted.sha256}") + (
        f" ({wanted.size:,} bytes)" if wanted.size is not None else ""
    )
    if promised:
        refusal = f"{identity.name} is not the file it is named after"
    else:
        refusal = f"{identity.name} is not a file that is known here"
        expected = f"one of the known files, such as {wanted.names[0]}: {expected}"
    return IdentityError(
        refusal,
        found=f"md5 {identity.md5} ({identity.size:,} bytes{nature})",
        expected=expected,
        hint=advice,
    )


def stand_in_refused(identity: Identity, sentence: str) -> IdentityError:
    """The error for a stand-in that nobody asked for by checksum or with ``allow_unknown``."""
    return IdentityError(
        f"{identity.name} is a stand-in, not trained weights",
        found=f"md5 {identity.md5}: {sentence}",
        hint="--allow-unknown converts it knowingly; its output says that it is a stand-in",
    )


def _judge(
    path: Path, identity: Identity, wanted: KnownFile | None, problem: Exception | None
) -> tuple[str, str]:
    """What a file is, as a clause with a comma in front, and what to do about it."""
    # numpy comes with it: hashing the source begins before
    from .checkpoint import Foreign, foreign_file, is_cut_short

    again = _download(wanted or CONTENTVEC)
    unknown = "--allow-unknown converts a checkpoint that is not in the table of known files"
    if identity.known is not None:
        return f", which is {identity.known.key}", (
            f"this is {identity.known.what}\n"
            "rename it to what it is, or convert it knowingly with --allow-unknown"
        )
    if not is_file(path):
        return "", unknown
    foreign = None
    if isinstance(problem, ForeignCheckpoint):
        foreign = Foreign(problem.what, problem.hint or "")
    elif problem is None:
        foreign = foreign_file(path) or _model_inside(path)
    if foreign is not None:
        # not every wrong file is a failed download, and some hints say what to do instead
        get = "" if "mlx-contentvec" in foreign.hint else f"\n{_get(wanted or CONTENTVEC)}"
        return f", {foreign.what}", foreign.hint + get
    if is_cut_short(path):
        advice = f"the download stopped early; {again}"
        if wanted is not None and wanted.size is not None and identity.size < wanted.size:
            missing = wanted.size - identity.size
            advice = (
                f"the download stopped early: {missing:,} of the {wanted.size:,} bytes of "
                f"{wanted.names[0]} are missing\n{again}"
            )
        return ", a checkpoint cut short", advice
    if wanted is not None and identity.size == wanted.size:
        return "", f"its size is right and its bytes are not: it was damaged or altered; {again}"
    return "", f"{unknown}\n--expect-md5 or --expect-sha256 accept exactly one file"


def _recognised(path: Path) -> bool:
    """Whether the file shows by what it holds which model it is."""
    from .checkpoint import open_checkpoint
    from .recognition import is_shown_by_content

    if not is_file(path):
        return False
    try:
        with open_checkpoint(path) as checkpoint:
            return is_shown_by_content(checkpoint)
    except ContentvecError:
        return False


def _model_inside(path: Path) -> Foreign | None:
    """What a sound checkpoint holds, if that is no HuBERT or was converted already."""
    from .checkpoint import Foreign, open_checkpoint
    from .recognition import refuse_foreign

    try:
        with open_checkpoint(path) as checkpoint:
            refuse_foreign(checkpoint)
            if "mlx_contentvec_version" in checkpoint.metadata:
                return Foreign(
                    "converted by mlx-contentvec already",
                    "it is ready to be used, by load() and by `mlx-contentvec extract -w`;\n"
                    "--allow-unknown --dtype FORMAT converts it to another number format",
                )
    except ForeignCheckpoint as refusal:
        return Foreign(refusal.what, refusal.hint or "")
    except ContentvecError:
        pass
    return None


def _get(wanted: KnownFile) -> str:
    """Where a file is that is wanted, to somebody who has another."""
    if wanted.fetchable:
        return f"to get {wanted.names[0]}: mlx-contentvec fetch {wanted.key}"
    return f"{wanted.names[0]} is at {wanted.home}"


def _download(wanted: KnownFile) -> str:
    """How to get a file that is wanted."""
    if wanted.fetchable:
        return f"download it again with `mlx-contentvec fetch {wanted.key}`"
    return f"download it again from {wanted.home}"
