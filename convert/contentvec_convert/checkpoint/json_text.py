"""The JSON of a checkpoint, counted against the checkpoint's budget."""

from __future__ import annotations

from typing import Any

from mlx_contentvec import json_text

from .source_file import SourceFile


def parse_object(file: SourceFile, raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object that ``raw`` holds; ``what`` names it in messages.

    Raises CorruptCheckpoint if it is no JSON, no object, nested deeper than
    the limit, uses a key twice, or is more than the checkpoint has left.
    """
    file.budget.json_bytes -= len(raw)
    file.budget.json_values -= json_text.count_values(raw)
    try:
        if file.budget.json_bytes < 0 or file.budget.json_values < 0:
            raise json_text.JsonError("it is too large")
        return json_text.parse_object(raw)
    except json_text.JsonError as error:
        raise file.corrupt(f"{what} cannot be read: {error}") from None
