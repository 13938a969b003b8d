"""What a file is and what converting it would do, without doing it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ConfigError, ContentvecError
from mlx_contentvec.json_text import JsonError, parse_object, read_object

from .checkpoint import Checkpoint
from .conversion import Expectation, hashing, ledger_path, opened, planned, stand_in_of
from .identity import Identity
from .ledger import account, source_tensor
from .rules import Plan
from .sources import mlx
from .transfer import Progress


@dataclass(frozen=True)
class Inspection:
    """What a file says about itself, and what is known of it.

    ``problem`` is why it cannot be converted, None if it can.
    ``provenance`` is the metadata of a file that this project converted.
    """

    identity: Identity
    container: str
    tensors: tuple[dict[str, Any], ...]
    plan: Plan | None
    problem: ContentvecError | None
    stand_in: str | None
    provenance: dict[str, Any] | None
    ledger: str | None

    @property
    def elements(self) -> int:
        """Elements of all tensors together."""
        return sum(prod(row["shape"]) for row in self.tensors)

    @property
    def config(self) -> ModelConfig | None:
        """The model's configuration, planned or, in a converted file, stored."""
        if self.plan is not None:
            return self.plan.config
        stored = (self.provenance or {}).get("config")
        try:
            return ModelConfig.from_dict(stored) if isinstance(stored, dict) else None
        except (ConfigError, TypeError):
            return None

    @property
    def naming(self) -> str:
        """Whose tensor names these are; "" where that is not known."""
        if self.plan is not None:
            return self.plan.naming
        return "" if self.provenance is None else mlx.NAMING

    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each dtype."""
        return dict(Counter(row["dtype"] for row in self.tensors))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        known = self.identity.known
        return {
            "source": self.identity.to_dict(),
            "known": None if known is None else {"what": known.what, "home": known.home},
            "stand_in": self.stand_in,
            "container": self.container,
            "naming": self.naming or None,
            "config": None if self.config is None else self.config.to_dict(),
            "convertible": self.problem is None,
            "problem": None if self.problem is None else str(self.problem),
            "notes": [] if self.plan is None else list(self.plan.notes),
            "converted": self.provenance,
            "ledger": self.ledger,
            "elements": self.elements,
            "tensors": list(self.tensors),
        }


def inspect(
    path: str | Path,
    *,
    heads: int | None = None,
    normalize: bool | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Identity, configuration, tensors and drops of a checkpoint or of a converted file.

    heads, normalize, progress: as for a conversion. A file that can be read but not
    converted is described all the same. Raises IdentityError or
    CheckpointError for one that cannot be read.
    """
    path = Path(path)
    with opened(path, Expectation(allow_unknown=True)) as (checkpoint, identification):
        plan: Plan | None = None
        problem: ContentvecError | None = None
        try:
            plan = planned(checkpoint, identification, heads=heads, normalize=normalize)
            account(plan, checkpoint.tensors)
        except ContentvecError as error:
            problem = error
        provenance = _provenance(checkpoint)
        identity = identification.result(hashing(progress))
        return Inspection(
            identity=identity,
            container=checkpoint.container,
            tensors=_tensor_rows(checkpoint, plan),
            plan=plan,
            problem=problem,
            stand_in=stand_in_of(checkpoint),
            provenance=provenance,
            ledger=None if provenance is None else _ledger_state(path, identity),
        )


def _tensor_rows(checkpoint: Checkpoint, plan: Plan | None) -> tuple[dict[str, Any], ...]:
    """Every tensor with what becomes of it: a target, a reason to drop it, or neither."""
    fates: dict[str, dict[str, Any]] = {}
    for rule in plan.rules if plan else ():
        for name in rule.sources:
            fates[name] = {"target": rule.target, "transform": rule.transform}
    for drop in plan.drops if plan else ():
        fates[drop.source] = {"dropped": drop.reason}
    rows = []
    for tensor in checkpoint.tensors.values():
        source = source_tensor(tensor)
        row = {"name": source.name, "dtype": source.dtype, "shape": list(source.shape)}
        rows.append({**row, **fates.get(source.name, {})})
    return tuple(rows)


def _provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What a converted file says it was made from; None for any other file."""
    if not mlx.matches(checkpoint):
        return None
    decoded: dict[str, Any] = dict(checkpoint.metadata)
    for key in ("config", "source", "quantization"):
        try:
            decoded[key] = parse_object(decoded[key])
        except (KeyError, JsonError):
            continue
    return decoded


def _ledger_state(path: Path, identity: Identity) -> str:
    """Whether the ledger beside a converted file is there, and is this file's."""
    paper = ledger_path(path)
    try:
        said = read_object(paper)["output"]["sha256"]
    except FileNotFoundError:
        return f"none: there is no {paper.name}"
    except (OSError, JsonError, KeyError, TypeError):
        return f"unreadable: {paper.name}"
    return "matches" if said == identity.sha256 else f"of another file: {paper.name}"
