"""The account of a conversion: every source tensor used or dropped, every target filled.

:func:`account` checks a plan against the tensors before anything is written.
:class:`Ledger` is what is known afterwards, and is written beside the output.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_contentvec.config import ModelConfig, parameter_shapes
from mlx_contentvec.errors import MappingError, name_list

from .checkpoint import StoredTensor
from .identity import Identity
from .precision import WIDENED
from .rules import TRANSFORMS, Plan, Shape

SCHEMA = 1


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as the checkpoint has it."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the output.

    ``encoding`` says in which form its parameter is stored there ("F32", or the
    part of a quantised weight). ``exact``: read back from the disk and undone,
    it gave the source bit for bit. ``sha256`` is that of its bytes on the disk.
    """

    target: str
    sources: tuple[SourceTensor, ...]
    transform: str
    encoding: str
    dtype: str
    shape: Shape
    sha256: str
    exact: bool


@dataclass(frozen=True)
class DropRow:
    """A source tensor left behind, and why."""

    source: SourceTensor
    reason: str


@dataclass(frozen=True)
class Ledger:
    """What became of a checkpoint. Deterministic: no times, no paths."""

    identity: Identity
    naming: str
    container: str
    #: the sentence with which the source says that it is a stand-in
    stand_in: str | None
    config: ModelConfig
    output: dict[str, Any]
    tensors: tuple[TensorRow, ...]
    drops: tuple[DropRow, ...]
    notes: tuple[str, ...]
    version: str

    @property
    def source_tensors(self) -> int:
        """How many different source tensors are accounted for."""
        used = {source.name for row in self.tensors for source in row.sources}
        return len(used | {row.source.name for row in self.drops})

    @property
    def source(self) -> dict[str, Any]:
        """What the output and the ledger say about the source."""
        return source_facts(self.identity, self.naming, self.container, self.stand_in)

    @property
    def inexact(self) -> tuple[TensorRow, ...]:
        """The rows that are more than moved: computed, or rounded to a narrower format."""
        return tuple(row for row in self.tensors if not row.exact)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "schema": SCHEMA,
            "mlx_contentvec_version": self.version,
            "source": self.source,
            "output": self.output,
            "config": self.config.to_dict(),
            "counts": {
                "source_tensors": self.source_tensors,
                "dropped": len(self.drops),
                "written": len(self.tensors),
                "exact": len(self.tensors) - len(self.inexact),
            },
            "notes": list(self.notes),
            "tensors": [
                {
                    "target": row.target,
                    "sources": [_source_dict(source) for source in row.sources],
                    "transform": row.transform,
                    "encoding": row.encoding,
                    "dtype": row.dtype,
                    "shape": list(row.shape),
                    "sha256": row.sha256,
                    "exact": row.exact,
                }
                for row in self.tensors
            ],
            "drops": [{**_source_dict(row.source), "reason": row.reason} for row in self.drops],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as text, one tensor per line."""
        return _json_lines(self.to_dict())


def _source_dict(source: SourceTensor) -> dict[str, Any]:
    return {"name": source.name, "dtype": source.dtype, "shape": list(source.shape)}


def _json_lines(document: Mapping[str, Any]) -> str:
    """JSON with one line per entry, and per element where the entry is a list of rows."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
            text = f"[\n{rows}\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def source_facts(
    identity: Identity, naming: str, container: str, stand_in: str | None
) -> dict[str, Any]:
    """A source as the output's metadata and the ledger describe it."""
    return {
        **identity.to_dict(),
        "naming": naming,
        "container": container,
        "stand_in": stand_in is not None,
    }


def source_tensor(tensor: StoredTensor) -> SourceTensor:
    """A checkpoint's tensor as the ledger names it."""
    return SourceTensor(tensor.name, tensor.dtype, tensor.shape)


def account(plan: Plan, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that a plan uses or drops every tensor once and makes every parameter once.

    Raises MappingError, which names every tensor that is unmapped, missing,
    used twice, of the wrong shape, or not of a floating-point format.
    """
    targets = parameter_shapes(plan.config)
    uses = Counter(source for rule in plan.rules for source in rule.sources)
    uses.update(drop.source for drop in plan.drops)
    made = Counter(rule.target for rule in plan.rules)
    found: list[str] = []

    def complain(what: str, names: list[str]) -> None:
        if names:
            found.append(f"{len(names)} {what}: {name_list(names)}")

    complain("missing", [name for name in uses if name not in tensors])
    complain("not accounted for", [name for name in tensors if name not in uses])
    complain("used more than once", [name for name, count in uses.items() if count > 1])
    complain("parameters that nothing fills", [name for name in targets if name not in made])
    complain("parameters the model does not have", [name for name in made if name not in targets])
    complain("parameters filled twice", [name for name, count in made.items() if count > 1])
    wrong_shape, wrong_format = [], []
    for rule in plan.rules:
        sources = [tensors[name] for name in rule.sources if name in tensors]
        if len(sources) < len(rule.sources) or rule.target not in targets:
            continue
        wrong_format += [f"{s.name} is {s.dtype}" for s in sources if s.dtype not in WIDENED]
        shapes = [source.shape for source in sources]
        try:
            shape: Shape | None = TRANSFORMS[rule.transform].shape(*shapes)
        except MappingError:
            shape = None
        if shape != targets[rule.target]:
            shown = " and ".join(map(str, shapes))
            # the two libraries order a kernel's axes differently: equal shapes do not fit
            made_of_it = f", which makes {shape}," if shape not in (None, *shapes) else ""
            wrong_shape.append(
                f"{' and '.join(rule.sources)} {shown}{made_of_it} for {rule.target} "
                f"{targets[rule.target]}"
            )
    complain("of the wrong shape", wrong_shape)
    complain("not floating point", wrong_format)
    if found:
        raise MappingError(
            "the tensors do not fit the model that the configuration describes",
            found="\n            ".join(found),
            expected=f"{len(uses)} source tensors in {plan.naming} naming, "
            f"for {len(targets)} parameters",
            hint="a checkpoint of another architecture, or one that was edited or damaged",
        )
