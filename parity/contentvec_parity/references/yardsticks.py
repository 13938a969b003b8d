"""PyTorch's own error where MLX computes: on the same device, and in the same half precision.

PyTorch in float32 on the CPU is one yardstick for the errors of MLX. A GPU adds
in another order, so where PyTorch can use the device that MLX runs on, it is
measured there too; and float16 is measured beside PyTorch's own float16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import stage_input

from ..compare.metrics import ESSENTIAL, difference
from ..inputs import Clip
from . import Reference
from .original import TorchOriginal, valid_frames

#: kind of row ("stage", "local") -> stage -> metrics
Errors = dict[str, dict[str, dict[str, Any]]]

#: number formats that PyTorch computes in as well
HALF = ("float16", "bfloat16")

#: names of the yardsticks, as rows of a report have them
DEVICE, DEVICE_DEFAULTS, HALF_PRECISION = "device", "device_defaults", "half"

#: device of MLX -> device of PyTorch on the same chip
TORCH_DEVICES = {"cuda": "cuda", "metal": "mps"}


class Yardstick(Protocol):
    """The original once more, elsewhere or in another number format."""

    #: ``device`` ("cpu", "cuda", "mps"), ``name`` of the device, ``dtype``, ``tf32``
    about: dict[str, Any]

    def errors(
        self,
        clip: Clip,
        reference: Reference,
        outputs: Mapping[str, NDArray[np.float32]],
        truth: Mapping[str, NDArray[np.float64]],
        *,
        local: bool,
    ) -> Errors:
        """How far it is from the truth: kind -> stage -> metrics.

        outputs, truth: what ``reference`` makes of the clip, in float32 and in float64
        local:          also of each stage by itself, where ``outputs`` hold its input

        A stage with numbers that are not finite is left out. Raises RuntimeError, as
        PyTorch does, where the device or the format cannot run the clip.
        """


class TorchYardstick:
    """A copy of a PyTorch original on ``device`` in ``dtype``."""

    def __init__(
        self, original: TorchOriginal, device: str, dtype: str, *, tf32_off: bool = True
    ) -> None:
        """``tf32_off``: False leaves TF32 as PyTorch's own settings have it."""
        self._original = original
        self._model = original.copy_to(device, dtype)
        self._tf32_off = tf32_off
        self.about = {
            "device": device,
            "name": _device_name(device),
            "dtype": dtype,
            "tf32": None if device != "cuda" else "off" if tf32_off else "PyTorch's own settings",
        }

    def stages(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Every stage from the audio."""
        with self._settings():
            return self._original.stages_of(self._model, clip)

    def run_stage(
        self, clip: Clip, stage: str, stage_input: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """One stage by itself."""
        with self._settings():
            return self._original.run_stage_of(self._model, clip, stage, stage_input)

    def errors(
        self,
        clip: Clip,
        reference: Reference,
        outputs: Mapping[str, NDArray[np.float32]],
        truth: Mapping[str, NDArray[np.float64]],
        *,
        local: bool,
    ) -> Errors:
        """Errors of the stages from the audio, and with ``local`` of each by itself."""
        mask = reference.frame_mask(clip)
        found: Errors = {"stage": {}, "local": {}}

        def keep(kind: str, stage: str, output: NDArray[Any], exact: NDArray[Any]) -> None:
            valid = valid_frames(stage, mask)
            measured = difference(output, exact, valid=valid, metrics=ESSENTIAL)
            if measured.comparable:
                found[kind][stage] = dict(measured.metrics)

        own = self.stages(clip)
        for stage, exact in truth.items():
            keep("stage", stage, own[stage], exact)
            before = stage_input(reference.config, stage)
            if not local or (before is not None and before not in outputs):
                continue
            given = reference.model_input(clip) if before is None else outputs[before]
            exact_alone = reference.local_truth(clip, stage, given)
            keep("local", stage, self.run_stage(clip, stage, given), exact_alone)
        return found

    def _settings(self) -> contextlib.AbstractContextManager[None]:
        return without_tf32() if self._tf32_off else contextlib.nullcontext()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """True float32 in PyTorch's products and convolutions; the latter use TF32 by default."""
    import torch

    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = False
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def torch_device() -> str | None:
    """PyTorch's name of the device that MLX computes on; None if it is a CPU or not PyTorch's."""
    import torch

    from mlx_contentvec.backend import device_kind

    device = TORCH_DEVICES.get(device_kind())
    if device == "cuda" and torch.cuda.is_available():
        return device
    if device == "mps" and torch.backends.mps.is_available():
        return device
    return None


def _device_name(device: str) -> str | None:
    import torch

    return str(torch.cuda.get_device_name()) if device == "cuda" else None


class RecordedYardstick:
    """The errors of a yardstick as a recording has them."""

    def __init__(self, about: dict[str, Any], errors: Mapping[str, Errors]) -> None:
        """``errors``: clip name -> its errors."""
        self.about = about
        self._errors = errors

    def errors(self, clip: Clip, *_: Any, **__: Any) -> Errors:
        """What was recorded of the clip."""
        return self._errors[clip.name]


def yardsticks_for(original: Any, precision: str) -> dict[str, Yardstick]:
    """The further yardsticks that can be had here for weights stored in ``precision``.

    ``half``            PyTorch in the same format, on the same device or else on the CPU
    ``device``          PyTorch in float32 on the device that MLX runs on, TF32 off
    ``device_defaults`` the same with PyTorch's own settings of TF32, for information

    On a CPU there is none for float32.
    """
    if not isinstance(original, TorchOriginal):
        return {}
    device = torch_device()
    if precision in HALF:
        try:
            half = TorchYardstick(original, device or "cpu", precision)
        except (RuntimeError, TypeError):
            # a device without this format, like bfloat16 on an older macOS
            half = TorchYardstick(original, "cpu", precision)
        return {HALF_PRECISION: half}
    found: dict[str, Yardstick] = {}
    if device is not None and precision == "float32":
        found[DEVICE] = TorchYardstick(original, device, "float32")
        if device == "cuda":
            found[DEVICE_DEFAULTS] = TorchYardstick(original, device, "float32", tf32_off=False)
    return found
