"""What a package is made of: the names of its files, and the evidence for its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_contentvec import hub
from mlx_contentvec.json_text import parse_object

from ..report.document import Document

LIBRARY = "mlx-contentvec"
MODEL, EARLIER_NAME = hub.WEIGHTS
LEDGER = "ledger.json"
PARITY = "parity.json"
PAGE = "parity.html"
PLOT = "parity.png"
RECORDING = "recording.safetensors"
CARD = "README.md"
LICENSE = "LICENSE"


@dataclass(frozen=True)
class Evidence:
    """One weights file and what was measured of it."""

    #: "float32", "float16", "q8", ...: a key of the converter's precision table
    dtype: str
    weights: Path
    metadata: Mapping[str, str]
    sha256: str
    ledger: Mapping[str, Any]
    parity: Document

    @property
    def source(self) -> dict[str, Any]:
        """What the weights say they were made from, by the name that the ledger gives it."""
        name = (self.ledger.get("source") or {}).get("name")
        return {"name": name, **parse_object(self.metadata["source"])}

    @property
    def size(self) -> int:
        """Bytes of the weights file."""
        return self.weights.stat().st_size

    @property
    def stand_in(self) -> str | None:
        """The sentence that says the weights are synthetic, if anything says so."""
        said = self.metadata.get("stand_in") or self.parity["source"].get("stand_in")
        return str(said) if said else ("a stand-in" if self.source.get("stand_in") else None)


@dataclass(frozen=True)
class Package:
    """A packaged folder that was found whole."""

    folder: Path
    #: file name -> SHA-256, as SHA256SUMS states and as the files have
    checksums: Mapping[str, str]
    config: Mapping[str, Any]
    #: the main file first, then the variants
    evidence: tuple[Evidence, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every file, largest first, SHA256SUMS last."""
        sizes = {name: (self.folder / name).stat().st_size for name in self.checksums}
        # of two names of one blob the one that readers ask for goes first
        order = sorted(sizes, key=lambda name: (-sizes[name], name != MODEL, name))
        return (*order, hub.CHECKSUMS)

    def hash_of(self, name: str) -> str:
        """The SHA-256 of a file of the package."""
        return self.checksums.get(name) or hub.sha256_of(self.folder / name)

    @property
    def stand_in(self) -> str | None:
        """Why the weights are not real, if they are not."""
        return next((e.stand_in for e in self.evidence if e.stand_in), None)

    @property
    def title(self) -> str:
        """What the card is headed by."""
        return str(self.config["title"])

    @property
    def version(self) -> str:
        """The version of this project that made it."""
        return str(self.config["library_version"])
