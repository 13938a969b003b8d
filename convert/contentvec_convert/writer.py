"""The layout of a safetensors file, and how an output appears together with its ledger.

Source of the format: github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mlx_contentvec.errors import OutputError
from mlx_contentvec.files import (
    Draft,
    check_target,
    explained,
    folder_lock,
    signals_held,
    sync_folder,
)

from .precision import STORED_BYTES


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: its dtype there ("F32"), and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take."""
        return prod(self.shape) * STORED_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a safetensors file.

    ``starts`` are offsets from the start of the file. Tensors lie without gaps,
    wide elements first and then by name, so that each is aligned to its size.
    """

    entries: tuple[Entry, ...]
    starts: dict[str, int]
    header_bytes: int
    size: int


def lay_out(entries: Sequence[Entry], metadata: dict[str, str]) -> Layout:
    """The layout of a file with these tensors and this metadata."""
    ordered = tuple(sorted(entries, key=lambda e: (-STORED_BYTES[e.dtype], e.name)))
    header_bytes = len(_header(ordered, metadata))
    starts, position = {}, header_bytes
    for entry in ordered:
        starts[entry.name] = position
        position += entry.nbytes
    return Layout(ordered, starts, header_bytes, position)


def header(layout: Layout, metadata: dict[str, str]) -> bytes:
    """The head of the file, its length field included, padded to the length laid out.

    OutputError if ``metadata`` needs more room than the one laid out with.
    """
    data = _header(layout.entries, metadata)
    if len(data) > layout.header_bytes:
        raise OutputError(
            "the header grew after the data had been placed",
            found=f"{len(data)} bytes",
            expected=f"at most {layout.header_bytes} bytes",
        )
    body = data[8:].ljust(layout.header_bytes - 8)
    return len(body).to_bytes(8, "little") + body


def _header(ordered: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for entry in ordered:
        end = position + entry.nbytes
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    body = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    # data begins at a multiple of 8, which the format asks for
    body = body.ljust(-(-len(body) // 8) * 8)
    return len(body).to_bytes(8, "little") + body


def publish(output: Draft, ledger: Draft, *, force: bool) -> None:
    """Let an output and its ledger appear under their names.

    An older ledger goes first and the new one comes last. Whenever this is
    interrupted there is an output without a ledger, or one with its own: never
    one beside the ledger of another file. The three steps follow each other at once,
    with signals held back, so that only a kill within some 50 microseconds leaves the
    former. Of two processes that publish into one folder the second waits. Without
    ``force`` both names must be free.
    """
    output.sync()
    ledger.sync()
    with folder_lock(output.final.parent):
        # in the lock: another conversion may have been faster
        check_target(output.final, force=force)
        check_target(ledger.final, force=force)
        # before the older ledger goes
        output.require_kept()
        ledger.require_kept()
        with signals_held():
            with explained(ledger.final):
                ledger.final.unlink(missing_ok=True)
            # not flushed in between: file systems with a journal keep the order of names
            output.rename(force=force)
            ledger.rename(force=force)
        sync_folder(ledger.final.parent)
