"""What the two files of a run are: the checkpoint and what was converted from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.conversion import stand_in_of
from contentvec_convert.identity import Identification

from .compare.candidate import MlxCandidate


@contextlib.contextmanager
def checkpoint_being_identified(checkpoint: Path) -> Iterator[SourceFacts]:
    """Hash a checkpoint (a file, or the weight files of a folder) in the background."""
    with open_checkpoint(checkpoint) as opened:
        files, stand_in = list(opened.files), stand_in_of(opened)
    with Identification(checkpoint, files) as identification:
        yield SourceFacts(identification, stand_in)


class SourceFacts:
    """The facts of a checkpoint, once its bytes have been hashed."""

    def __init__(self, identification: Identification, stand_in: str | None) -> None:
        self._identification = identification
        self._stand_in = stand_in

    def result(self) -> dict[str, Any]:
        """``name``, ``size``, ``md5``, ``sha256``, ``known_as``, ``stand_in``; waits for them.

        Raises IdentityError if a file has changed since it was begun to be hashed.
        """
        facts = {**self._identification.result().to_dict(), "stand_in": self._stand_in}
        self._identification.check_unchanged()
        return facts


def identify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The facts of a checkpoint, hashed now.

    Raises IdentityError or a CheckpointError if it cannot be read.
    """
    with checkpoint_being_identified(checkpoint) as facts:
        return facts.result()


def weights_facts(identification: Identification, candidate: MlxCandidate) -> dict[str, Any]:
    """The facts of a converted file: its own, and what its metadata say it was made from.

    Raises IdentityError if the file has changed since it was begun to be hashed.
    """
    identity = identification.result()
    identification.check_unchanged()
    return {
        "name": identity.name,
        "size": identity.size,
        "sha256": identity.sha256,
        "precision": candidate.precision,
        "source": candidate.source,
    }
