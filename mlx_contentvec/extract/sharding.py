"""Several processes share one list of jobs, under MLX's own launcher or any other.

``mlx.launch -n 4 mlx-contentvec extract ...`` (or a hostfile) starts the same
command several times; ``mx.distributed`` says which one this is. The first
makes the plan and sends it to the others; at the end all send their summaries.

Whatever else starts processes gives each its shard, ``extract ... --shard 0/4``.
They send nothing: each divides the same list of files in the same way.
"""

from __future__ import annotations

import heapq
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError

#: set for every process by mlx.launch, or by an MPI that starts them
_LAUNCHED_BY = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
#: which process of its machine this is, from 0: Open MPI, MPICH and Intel MPI, Slurm
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


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
        if sys.platform == "linux" and "mlx.core" not in sys.modules:
            # CUDA reads it when MLX first looks for a device
            os.environ.update(own_gpu(os.environ))
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

        # on the stream that the backend chooses: ring has the CPU's, nccl the GPU's only
        return np.array(mx.distributed.all_gather(mx.array(values), group=self._group))


def own_gpu(environment: Mapping[str, str], machine: Path = Path("/proc/driver")) -> dict[str, str]:
    """The variable that gives a process one of the NVIDIA GPUs of its machine.

    Empty where there is one at most, or nothing says which process this is. MLX's launcher
    gives each its own with the nccl backend; with ring all would compute on the first.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(i) for i, _ in enumerate((machine / "nvidia/gpus").glob("*"))]
    else:
        gpus = [gpu for gpu in visible.split(",") if gpu]
    local = _local_rank(environment)
    if local is None or len(gpus) < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpus[local % len(gpus)]}


def _local_rank(environment: Mapping[str, str]) -> int | None:
    """Which of the processes on its machine this is, from 0; None where nothing says."""
    for name in _LOCAL_RANKS:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    try:
        rank = int(environment["MLX_RANK"])
        # the addresses of each rank, address:port, as MLX's launcher writes them for ring
        hosts = json.loads(Path(environment["MLX_HOSTFILE"]).read_text())
        machines = [addresses[0].rpartition(":")[0] for addresses in hosts]
        return machines[:rank].count(machines[rank])
    except (KeyError, ValueError, OSError, IndexError, TypeError, AttributeError, RecursionError):
        return None


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal parts of the work, counted from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``2/8``. Raises ConfigError for anything else, or a shard that is not there."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ConfigError(
                "that is no shard",
                found=text,
                expected="INDEX/COUNT, counted from 0: 0/4, 1/4, 2/4 and 3/4",
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, paths: Sequence[Path]) -> list[int]:
        """Indices into ``paths`` of the files in this shard.

        Balanced by the sizes of the files, which every process sees alike, finished or not.
        """
        return share_of([_size(path) for path in paths], self.count, self.index)


def _size(path: Path) -> float:
    try:
        return float(path.stat().st_size)
    except OSError:
        return 0.0


def share_of(durations: Sequence[float], count: int, number: int) -> list[int]:
    """The share ``number``, from 0, of jobs in ``count`` shares of about the same duration.

    The longest first, each to the share that has least so far. Returns indices
    into ``durations``, in their order; every one is in exactly one share.
    """
    share = []
    # a heap of the duration and the number of each share that is not empty for want of jobs
    shares = [(0.0, i) for i in range(min(count, len(durations)))]
    for index in sorted(range(len(durations)), key=lambda i: (-durations[i], i)):
        total, least = shares[0]
        heapq.heapreplace(shares, (total + durations[index], least))
        if least == number:
            share.append(index)
    return sorted(share)
