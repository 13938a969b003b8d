"""What stands in for everything a pickle names that is not plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class GlobalName:
    """A name that a pickle refers to. It is compared with tables and never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class InertRecord:
    """An object of a class that is not known here: what the pickle says of it, and no behaviour.

    ``args`` is what it was to be made from (None for a class or function that
    is only named), ``keywords`` the same by name, ``state`` what it was to be
    given afterwards, ``items`` and ``entries`` what was appended to it or
    stored in it.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    keywords: dict[Any, Any] | None = None
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: list[tuple[Any, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"InertRecord({self.module}.{self.name})"
