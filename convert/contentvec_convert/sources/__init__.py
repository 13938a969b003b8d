"""The namings that a checkpoint can come in, one module each.

A source module has ``NAMING``, ``matches(checkpoint)``, which looks at tensor
names alone, and ``plan(checkpoint, heads=, normalize=)``, which checks the
configuration against the tensors and expands the rules. A new format is one
module and one row here.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from ..checkpoint import Checkpoint
from ..recognition import refuse_foreign, unrecognised
from ..rules import Plan


class Source(Protocol):
    """What a source module offers."""

    NAMING: str

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether the tensors bear this source's names."""

    def plan(
        self, checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
    ) -> Plan:
        """The configuration and the rules for such a checkpoint."""


#: modules of this package, asked in this order, imported when they are asked
SOURCES: tuple[str, ...] = ("fairseq", "transformers", "rvc_mlx", "mlx", "first_release")


def plan_for(
    checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
) -> Plan:
    """The plan of the first source that knows the checkpoint's tensor names.

    heads, normalize: what the caller knows and no tensor shows, for files that
    do not say it. Raises UnsupportedCheckpoint for a model that is none of
    these, ConfigError or MappingError from the source.
    """
    refuse_foreign(checkpoint)
    for module in SOURCES:
        source = cast(Source, importlib.import_module(f".{module}", __name__))
        if source.matches(checkpoint):
            return source.plan(checkpoint, heads=heads, normalize=normalize)
    raise unrecognised(checkpoint)
