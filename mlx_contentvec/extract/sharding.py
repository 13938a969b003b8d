"""Several processes share one list of jobs, under MLX's own launcher.

``mlx.launch -n 4 mlx-contentvec extract ...`` (or a hostfile) starts the same
command several times; ``mx.distributed`` says which one this is. The first
makes the plan and sends it to the others; at the end all send their summaries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: set for every process by mlx.launch, or by an MPI that starts them
_LAUNCHED_BY = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@dataclass(frozen=True)
class Ranks:
    """One process among those that share the jobs."""

    rank: int = 0
    size: int = 1
    _group: Any = None

    @classmethod
    def launched(cls) -> Ranks:
        """The ranks of this launch; a single one where no launcher was used."""
        if not any(name in os.environ for name in _LAUNCHED_BY):
            return cls()
        from ..backend import mx

        group = mx.distributed.init()
        return cls(group.rank(), group.size(), group)

    def gather(self, message: Any) -> list[Any]:
        """Everybody's JSON ``message``, by rank; waits until all have sent theirs."""
        if self.size == 1:
            return [message]
        data = np.frombuffer(json.dumps(message).encode(), np.uint8)
        lengths = self._all_gather(np.array([len(data)], np.int32))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: len(data)] = data
        rows = self._all_gather(padded).reshape(self.size, -1)
        return [
            json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)
        ]

    def from_first(self, message: Any) -> Any:
        """The first rank's ``message``; what the others pass is not looked at."""
        return self.gather(message if self.rank == 0 else None)[0]

    def _all_gather(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from ..backend import mx

        return np.array(
            mx.distributed.all_gather(mx.array(values), group=self._group, stream=mx.cpu)
        )


def shares(durations: Sequence[float], count: int) -> list[list[int]]:
    """Divide jobs into ``count`` shares of about the same duration.

    The longest first, each to the share that has least so far. Returns indices
    into ``durations``, in their order; every one exactly once.
    """
    totals = [0.0] * count
    divided: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(durations)), key=lambda i: (-durations[i], i)):
        least = min(range(count), key=lambda share: (totals[share], share))
        totals[least] += durations[index]
        divided[least].append(index)
    return [sorted(share) for share in divided]
