"""``model_info.json`` of an Applio experiment: what it says of the features in ``extracted``.

Source: Applio, rvc/train/extract/extract.py and preparing_files.py, which read and
write ``embedder_model`` there and leave the file's other entries as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import OutputError, printable
from ..files import is_there
from ..json_text import JsonError, read_object
from .manifest import prepared

FILE = "model_info.json"
#: a file of a few short entries; more is not Applio's
_LARGEST = 1 << 20


def check_model_info(folder: Path, embedder: str, *, force: bool) -> None:
    """Raise OutputError if the experiment's features are another embedder's, unless ``force``."""
    stated = _read(folder).get("embedder_model", embedder)
    if stated != embedder and not force:
        raise OutputError(
            f"{printable(str(folder / FILE))} states another embedder",
            found=printable(str(stated))[:80],
            expected=embedder,
            hint="name it with --embedder, or replace its features with --force",
        )


def write_model_info(folder: Path, embedder: str) -> None:
    """State the embedder; everything else that the file states is kept.

    Raises OutputError if it cannot be written.
    """
    stated = _read(folder)
    if stated.get("embedder_model") != embedder:
        text = json.dumps({**stated, "embedder_model": embedder}, indent=4)
        with prepared(folder / FILE, [text.encode()]) as (draft, _):
            draft.rename(force=True)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not is_there(path):
        return {}
    try:
        return read_object(path, size=_LARGEST)
    except (OSError, JsonError) as error:
        raise OutputError(
            f"{printable(str(path))} is not what Applio writes: {error}",
            expected="a JSON object",
            hint="move it away, or mend it",
        ) from error
