"""What computes a forward pass, decided once for each pass.

On Metal and CUDA, and for whatever ``mx.compile``, vmap or a gradient traces, the
modules of ``hubert.Hubert`` compute with MLX arrays (``ops.mlx``). On a CPU one walk
over the same parameters computes with numpy arrays (``ops.cpu_hubert``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..backend import device_kind, memory_limit, mx, nn
from . import kernels
from .blas import data_pointer
from .cpu_hubert import CpuHubert
from .mlx import MlxHubert, compute_dtype, kernels_for

__all__ = [
    "CpuHubert",
    "FusedQKV",
    "MlxHubert",
    "Pipeline",
    "Preparation",
    "Snapshot",
    "compiling_for",
    "is_traced",
    "waits_between_stages",
]

#: weight and bias of each layer's queries, keys and values as one matrix
FusedQKV = Sequence[tuple[mx.array, mx.array]]
#: samples of a batch above which a GPU computes its stages two at a time; of fewer it
#: starts with every second one, and nothing waits
PIPELINED_SAMPLES = 20 * 16000
#: the same in half precision on CUDA, where a stage is done before the next one is described:
#: 30 s of float16 take 8 to 14 % less time without waiting and hold 1.4 instead of 1.0 GB,
#: 16 clips of 5 s 12 to 21 % less, and 3.7 instead of 2.1 GB (H200)
PIPELINED_HALF_SAMPLES = 80 * 16000
#: part of the memory left at the start above which a stage waits for an earlier one in any case: a
#: GPU that falls behind would be sent all of a pass, and MLX looks at its limit behind an
#: operation only. Up to 0.3 GB more than the limit were held (600 clips, H200)
NEARLY_FULL = 2 / 3


def start(*arrays: mx.array) -> bool:
    """Start computing; False if an array depends on what a gradient, vmap or compile traces.

    ``mx.eval`` allows that in a gradient, ``mx.async_eval`` refuses it, but looks
    only at what is not computed yet: hence the new axes.
    Source: mlx/transforms.cpp, ``eval_impl``.
    """
    try:
        mx.async_eval(*(x[None] for x in arrays))
    except ValueError:
        return False
    return True


def is_traced(*arrays: mx.array | None) -> bool:
    """Whether a gradient, vmap or compile traces one of these; computes them if not."""
    given = [x for x in arrays if isinstance(x, mx.array)]
    if given and not start(*given):
        return True
    mx.eval(*given)
    return False


def pointer(weight: mx.array) -> int | None:
    """Where in memory a parameter lies: elsewhere once it was changed in place.

    None for bfloat16 on a GPU: numpy does not know the type, and another view would
    wait for all that is in work.
    """
    if weight.dtype == mx.bfloat16:
        if device_kind() != "cpu":
            return None
        weight = weight.view(mx.uint16)
    return data_pointer(np.asarray(weight))


@contextlib.contextmanager
def compiling_for(weights: Iterable[mx.array], head_width: int) -> Iterator[None]:
    """Compile what a pass with ``weights`` and such heads needs beside what is done within.

    The first pass would wait for it. Whatever goes wrong here is met by that pass again.
    """
    dtypes = [x.dtype for x in weights]
    work = kernels.chosen if device_kind() == "cpu" else kernels_for(dtypes, head_width)
    if not dtypes or work is None:
        yield
        return
    compiler = threading.Thread(target=work, name="compile")
    with contextlib.suppress(RuntimeError):  # no more threads
        compiler.start()
    try:
        yield
    finally:
        if compiler.ident is not None:
            compiler.join()


class Snapshot:
    """Which arrays a module's parameters are, and where they lie."""

    def __init__(self, *modules: nn.Module, held: Sequence[tuple[Any, Any]] = ()) -> None:
        """held: where else something must stay what it is, and under what name or index."""
        #: (where it is held, under what, the array or module itself)
        self._slots: list[tuple[Any, Any, Any]] = [(place, key, place[key]) for place, key in held]
        self._roots = modules
        for module in modules:
            self._visit(module)
        self.arrays = [x for _, _, x in self._slots if isinstance(x, mx.array)]
        self._pointers = [pointer(x) for x in self.arrays]
        # as long as their memory is held, nothing else can come to lie there
        self._held = [x[None] for x in self.arrays]
        mx.eval(self._held)

    def _visit(self, place: Any) -> None:
        named = isinstance(place, dict)
        for key, value in list(place.items() if named else enumerate(place)):
            if named and isinstance(key, str) and key.startswith("_"):
                continue
            if isinstance(value, mx.array):
                self._slots.append((place, key, value))
            elif isinstance(value, (nn.Module, dict, list)):
                self._slots.append((place, key, value))
                self._visit(value)

    def still_holds(self, *modules: nn.Module) -> bool:
        """Whether no parameter or module was replaced, and none changed in place.

        modules: copies to look at in the place of the modules that this was taken of
        """
        copies = dict(zip(map(id, self._roots), modules, strict=False))
        for place, key, value in self._slots:
            if _held(copies.get(id(place), place), key) is not value:
                return False
        return all(
            known is None or pointer(x) == known
            for x, known in zip(self.arrays, self._pointers, strict=True)
        )


def _held(place: Any, key: Any) -> Any:
    if isinstance(place, dict):
        return place.get(key)
    return place[key] if key < len(place) else None


class Preparation:
    """What is prepared of a model's parameters, made anew when one of them is another."""

    def __init__(self) -> None:
        self._cpu: tuple[Snapshot, CpuHubert] | None = None
        self._fused: tuple[Snapshot, FusedQKV] | None = None

    def keep_fused(self, model: nn.Module, qkv: FusedQKV) -> None:
        """Use ``qkv`` as long as the layers' own parameters are its parts."""
        layers = model.encoder.layers
        names = ("q_proj", "k_proj", "v_proj")
        held: list[tuple[Any, Any]] = [(model, "encoder"), (model.encoder, "layers")]
        held += [(layers, index) for index in range(len(layers))]
        held += [(layer, "self_attn") for layer in layers]
        held += [(layer.self_attn, name) for layer in layers for name in names]
        projections = [layer.self_attn[name] for layer in layers for name in names]
        self._fused = Snapshot(*projections, held=held), qkv

    def walk(self, model: nn.Module, *inputs: mx.array | None) -> MlxHubert | CpuHubert:
        """What computes this pass: ``inputs`` are those that may be traced."""
        if device_kind() != "cpu":
            fused = self._fused
            return MlxHubert(model, fused[1] if fused and fused[0].still_holds() else None)
        if is_traced(*inputs):
            return MlxHubert(model)
        prepared = self._cpu
        if prepared is None or not prepared[0].still_holds(model):
            if is_traced(*parameters(model)):
                return MlxHubert(model)
            prepared = self._cpu = Snapshot(model), CpuHubert(model)
        return prepared[1]


def parameters(model: nn.Module) -> list[mx.array]:
    """Every parameter of a model."""
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(model.parameters())]


def waits_between_stages(samples: int, dtype: mx.Dtype) -> bool:
    """Whether a GPU is given the stages of a batch two at a time: ``samples`` in all of it."""
    half = device_kind() == "cuda" and compute_dtype(dtype) != mx.float32
    return samples > (PIPELINED_HALF_SAMPLES if half else PIPELINED_SAMPLES)


class Pipeline:
    """The stages of a pass, each computed as soon as it is described.

    A GPU that is given its work only when all of it is described waits 3 ms for that: 10 s
    of audio take 8.1 instead of 9.4 ms if it begins with the first stages, and hold 1.8
    instead of 2.4 GB (H200). Of longer batches it holds every intermediate of what has
    been started, 10 GB for 60 s on CUDA; two stages at a time hold 1.5 GB.
    """

    def __init__(self, waits: bool) -> None:
        """waits: for each stage before the one behind it is done (``waits_between_stages``)."""
        self._waits = waits
        self._before: mx.array | None = None
        live = mx.get_active_memory()
        self._full = live + NEARLY_FULL * (memory_limit() - live)

    def add(self, x: mx.array) -> None:
        """Start computing the output of a stage; what is traced is left alone."""
        if not start(x):
            return
        if self._before is not None and (self._waits or mx.get_active_memory() > self._full):
            mx.eval(self._before)
        self._before = x
