"""The two passes over the data: tensors into the file, and back out of it against their sources.

Both work on runs of rows of about a megabyte, so that the memory a conversion
takes does not grow with the checkpoint.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_contentvec.config import parameter_shapes
from mlx_contentvec.errors import CorruptCheckpoint, MappingError, OutputError
from mlx_contentvec.files import Draft

from .checkpoint import StoredTensor
from .precision import Precision, all_finite, quantize, widen
from .rules import TRANSFORMS, Plan, Rule, Shape
from .writer import Entry, Layout

Array = npt.NDArray[Any]

#: called with what is being done, the bytes done so far and the bytes there are
Progress = Callable[[str, int, int], None]

#: elements that pass through at a time: 1 MiB of float32, which stays in a core's own cache
BLOCK_ELEMENTS = 1 << 18

_BITS = {"F64": np.uint64, "F32": np.uint32, "U32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


@dataclass(frozen=True)
class Part:
    """One tensor of the output, and the rule it comes from.

    ``encoding`` is "plain" for a parameter stored as it is; a quantised weight
    is three parts.
    """

    entry: Entry
    rule: Rule
    encoding: str
    #: read back and undone, it must give the source bit for bit
    exact: bool


def parts_of(
    plan: Plan, tensors: Mapping[str, StoredTensor], precision: Precision
) -> dict[str, Part]:
    """Every tensor of the output by its name, in the order of the plan."""
    shapes = parameter_shapes(plan.config)
    parts: dict[str, Part] = {}
    for rule in plan.rules:
        shape, how = shapes[rule.target], precision.quantization
        if how is not None and how.applies(shape):
            out, width = shape
            stem = rule.target.removesuffix("weight")
            said = f"{how.bits} bits, groups of {how.group_size}"
            groups = (out, width // how.group_size)
            for name, dtype, part_shape in (
                ("weight", "U32", (out, width * how.bits // 32)),
                ("scales", precision.stored, groups),
                ("biases", precision.stored, groups),
            ):
                entry = Entry(f"{stem}{name}", dtype, part_shape)
                parts[entry.name] = Part(entry, rule, f"{name} of {said}", exact=False)
            continue
        exact = TRANSFORMS[rule.transform].lossless and all(
            tensors[name].dtype in precision.holds for name in rule.sources
        )
        entry = Entry(rule.target, precision.stored, shape)
        parts[entry.name] = Part(entry, rule, "plain", exact)
    return parts


def write_tensors(
    draft: Draft,
    layout: Layout,
    plan: Plan,
    tensors: Mapping[str, StoredTensor],
    precision: Precision,
    progress: Progress | None,
) -> dict[str, str]:
    """Write every tensor to its place; the SHA-256 of those that are more than moved.

    Raises CorruptCheckpoint for a weight that is NaN or infinite, MappingError
    for one too large for ``precision``, OutputError if the file cannot be written.
    """
    shapes = parameter_shapes(plan.config)
    expected: dict[str, str] = {}
    done, total = 0, layout.size - layout.header_bytes
    for rule in plan.rules:
        stored = [tensors[name] for name in rule.sources]
        for name, offset, block, digest in _made(rule, shapes[rule.target], stored, precision):
            data = np.ascontiguousarray(block).data.cast("B")
            draft.write(layout.starts[name] + offset, data)
            if digest is not None:
                digest.update(data)
                expected[name] = digest.hexdigest()
            done += len(data)
            if progress is not None:
                progress("writing", done, total)
    return expected


#: a tensor of the output, bytes from its start, what to write there, and the
#: digest to add it to if reading back cannot be held against the source
_Piece = tuple[str, int, Array, Any]


def _made(
    rule: Rule, shape: Shape, stored: list[StoredTensor], precision: Precision
) -> Iterator[_Piece]:
    """What a rule makes, piece by piece, checked to be numbers."""
    how, dtype = precision.quantization, precision.stored
    if how is not None and how.applies(shape):
        arrays = quantize(_whole(rule, stored), how)
        stem = rule.target.removesuffix("weight")
        for name, array in zip(("weight", "scales", "biases"), arrays, strict=True):
            if name != "weight":  # which are packed integers
                _require_finite(array, dtype, rule, stored)
            yield f"{stem}{name}", 0, array, hashlib.sha256()
        return
    transform, offset = TRANSFORMS[rule.transform], 0
    if transform.lossless:
        for elements in row_blocks(stored[0]):
            block = precision.recode(elements, stored[0].dtype)
            _require_finite(block, dtype, rule, stored)
            yield rule.target, offset, transform.apply(block), None
            offset += block.nbytes
        return
    computed, digest, start = _whole(rule, stored), hashlib.sha256(), 0
    for rows in _row_counts(shape):
        block = precision.narrow(computed[start : start + rows])
        _require_finite(block, dtype, rule, stored)
        yield rule.target, offset, block, digest
        start, offset = start + rows, offset + block.nbytes


def read_back(
    draft: Draft,
    layout: Layout,
    head: bytes,
    parts: Mapping[str, Part],
    tensors: Mapping[str, StoredTensor],
    precision: Precision,
    expected: Mapping[str, str],
    progress: Progress | None,
) -> tuple[str, dict[str, str]]:
    """Read the whole file again, hash it, and hold every tensor against its source.

    What was only moved is undone and compared with the source element by
    element; what was computed must have the checksum it had when it was written.

    Returns the SHA-256 of the file and of each tensor's bytes, all of them of
    what the file gave back. Raises OutputError if anything differs.
    """
    digests: dict[str, str] = {}
    with _Hasher() as hasher:
        found = bytearray(len(head))
        draft.read_into(0, memoryview(found))
        if found != head:
            raise _differs(draft, "the header")
        hasher.whole.update(found)
        done, total = 0, layout.size - layout.header_bytes
        for entry in layout.entries:
            part = parts[entry.name]
            transform = TRANSFORMS[part.rule.transform]
            moved = part.encoding == "plain" and transform.lossless
            source = tensors[part.rule.sources[0]]
            blocks = row_blocks(source) if moved else _row_counts(entry.shape)
            digest, offset = hashlib.sha256(), layout.starts[entry.name]
            for item in blocks:
                rows = item if isinstance(item, int) else len(item)
                shape = (rows, *entry.shape[1:])
                buffer = hasher.free_buffer(entry.nbytes // max(1, entry.shape[0]) * rows)
                draft.read_into(offset, buffer)
                hasher.submit(digest, buffer)
                if not isinstance(item, int):
                    bits = _BITS[entry.dtype]
                    given = np.frombuffer(buffer, bits).reshape(shape)
                    undone = transform.undo(given)
                    wanted = precision.recode(item, source.dtype)
                    if undone is None or not np.array_equal(undone[0], wanted.view(bits)):
                        raise _differs(draft, entry.name)
                offset += len(buffer)
                done += len(buffer)
                if progress is not None:
                    progress("checking", done, total)
            hasher.wait()
            digests[entry.name] = digest.hexdigest()
            if not moved and digests[entry.name] != expected[entry.name]:
                raise _differs(draft, entry.name)
        return hasher.whole.hexdigest(), digests


def row_blocks(tensor: StoredTensor) -> Iterator[Array]:
    """A tensor's stored elements in runs of rows (its first axis) of about BLOCK_ELEMENTS.

    Rows that lie one after the other in the file are read as they are needed;
    others (a tensor stored transposed) are read together, once.
    """
    row = sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.strides[1:], strict=True))
    whole = None if tensor.strides[0] > row else tensor.read()
    start = 0
    for rows in _row_counts(tensor.shape):
        if whole is None:
            yield replace(
                tensor,
                shape=(rows, *tensor.shape[1:]),
                offset=tensor.offset + start * tensor.strides[0],
            ).read()
        else:
            yield whole[start : start + rows]
        start += rows


def _row_counts(shape: Shape) -> Iterator[int]:
    step = max(1, BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield min(step, shape[0] - start)


def _whole(rule: Rule, stored: list[StoredTensor]) -> Array:
    """The target of a rule as one float32 array.

    A transform that computes widens its sources itself, a few rows at a time, but for
    bfloat16, which numpy has not.
    """
    transform = TRANSFORMS[rule.transform]
    if transform.lossless:
        arrays = [widen(stored[0].read(), stored[0].dtype)]
    else:
        arrays = [tensor.numbers() for tensor in stored]
    return np.ascontiguousarray(transform.apply(*arrays))


def _require_finite(block: Array, dtype: str, rule: Rule, stored: list[StoredTensor]) -> None:
    if all_finite(block, dtype):
        return
    for tensor in stored:
        if not np.isfinite(tensor.float64()).all():
            raise CorruptCheckpoint(
                f"{tensor.name} holds weights that are not numbers",
                found="NaN or infinity",
                hint="the checkpoint is damaged, or its training had diverged",
            )
    damage = TRANSFORMS[rule.transform].damage(*(tensor.float64() for tensor in stored))
    if damage is not None:
        raise CorruptCheckpoint(
            f"{' and '.join(rule.sources)} give a kernel with values that are not numbers",
            found=damage,
            hint="the checkpoint is damaged: get it again from where it came from",
        )
    fit = dtype != "F32" and all(np.isfinite(tensor.float32()).all() for tensor in stored)
    raise MappingError(
        f"{rule.target} has weights too large for the output format",
        hint="--dtype float32 holds them"
        if fit
        else "no weights of a model are so large: the checkpoint is damaged, or its training had\n"
        "diverged",
    )


def _differs(draft: Draft, what: str) -> OutputError:
    return OutputError(
        f"{draft.final.name} was not written as it should be",
        found=f"{what} reads back differently",
        hint="the disk or the memory of this machine may be failing; nothing was kept",
    )


class _Hasher:
    """SHA-256 of the whole file and of one tensor at a time, each on a thread of its own."""

    _BUFFERS = 3

    def __init__(self) -> None:
        self.whole = hashlib.sha256()
        self._threads = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
        self._buffers = deque(bytearray() for _ in range(self._BUFFERS))
        self._pending: deque[list[Future[None]]] = deque()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def free_buffer(self, length: int) -> memoryview:
        """A buffer of ``length`` bytes that no thread reads any more."""
        if len(self._pending) >= self._BUFFERS:
            _wait(self._pending.popleft())
        if len(self._buffers[0]) < length:
            self._buffers[0] = bytearray(length)
        buffer = memoryview(self._buffers[0])[:length]
        self._buffers.rotate(-1)
        return buffer

    def submit(self, digest: Any, buffer: memoryview) -> None:
        """Hash ``buffer`` into ``whole`` and into ``digest``, in the background."""
        jobs = zip(self._threads, (self.whole, digest), strict=True)
        self._pending.append([thread.submit(into.update, buffer) for thread, into in jobs])

    def wait(self) -> None:
        """Return when everything submitted has been hashed."""
        while self._pending:
            _wait(self._pending.popleft())


def _wait(jobs: list[Future[None]]) -> None:
    for job in jobs:
        job.result()
