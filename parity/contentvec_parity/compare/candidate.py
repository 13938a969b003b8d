"""The MLX model as a parity run sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contentvec_convert.identity import require_plausible_size
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ParityError
from mlx_contentvec.files import open_regular
from mlx_contentvec.json_text import JsonError, parse_object

from ..inputs import Clip


@dataclass(frozen=True)
class Parameter:
    """One parameter as the model holds it."""

    #: its values; numpy has no bfloat16, which comes widened to float32
    values: NDArray[Any]
    #: its dtype in the model: "float32", "float16", "bfloat16", "uint32"
    dtype: str


class MlxCandidate:
    """A converted file, loaded into the MLX model on one device."""

    def __init__(self, model: Any, metadata: Mapping[str, str] | None = None) -> None:
        """``model`` is a ``ContentvecModel`` with its weights."""
        self.model = model
        self.config: ModelConfig = model.config
        self.metadata = dict(metadata or {})

    @classmethod
    def open(cls, path: Path) -> MlxCandidate:
        """Load a converted file.

        Raises WeightsError if it is not one, ParityError if it states another number
        format than its weights have: the limits of a comparison depend on that.
        """
        from mlx_contentvec.model import ContentvecModel

        found = cls(ContentvecModel.from_file(path), read_metadata(path))
        stated = found.metadata.get("dtype", found.precision)
        if stated != found.precision:
            raise ParityError(
                f"{path.name} does not hold what it says",
                found=f"weights in {found.precision}",
                expected=f"{stated[:40]}, as its metadata state",
                hint="convert the checkpoint again: mlx-contentvec convert CHECKPOINT",
            )
        return found

    @cached_property
    def precision(self) -> str:
        """What the weights are stored as: a name in ``contentvec_convert.precision``.

        Where formats are mixed the one that keeps least; found from the weights.
        """
        from mlx.utils import tree_flatten

        from mlx_contentvec.backend import nn

        bits = [m.bits for m in self.model.modules() if isinstance(m, nn.QuantizedLinear)]
        if bits:
            return f"q{min(bits)}"
        dtypes = {_dtype_name(array) for _, array in tree_flatten(self.model.parameters())}
        return next((name for name in ("bfloat16", "float16") if name in dtypes), "float32")

    @cached_property
    def source(self) -> dict[str, Any]:
        """What the file says it was made from; empty if it does not.

        Raises ParityError if that cannot be read.
        """
        try:
            return parse_object(self.metadata.get("source", "{}"))
        except JsonError as error:
            raise ParityError(
                "what the weights say of their source cannot be read", found=str(error)
            ) from error

    def stages(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Every stage from the audio."""
        from mlx_contentvec.backend import mx

        given = self.model.stage_outputs(
            mx.array(clip.waveform), padding_mask=_mask(clip.padding_mask)
        )
        return {name: _array(output) for name, output in given.items()}

    def run_stage(
        self, stage: str, x: NDArray[np.float32], frame_mask: NDArray[np.bool_] | None
    ) -> NDArray[np.float32]:
        """One stage on a given input."""
        from mlx_contentvec.backend import mx

        dtype = mx.float32 if stage == "conv.0" else self._compute_dtype()
        given = mx.array(x).astype(dtype)
        return _array(self.model.run_stage(stage, given, padding_mask=_mask(frame_mask)))

    def _compute_dtype(self) -> Any:
        """The dtype activations have between stages."""
        from mlx_contentvec.ops.mlx import compute_dtype

        return compute_dtype(self.model.layer_norm.weight.dtype)

    def features(
        self, clip: Clip, call: Mapping[str, Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
        """The public call: features and the padding mask over frames that comes with them."""
        from mlx_contentvec.backend import mx

        result = self.model(mx.array(clip.waveform), padding_mask=_mask(clip.padding_mask), **call)
        mask = result["padding_mask"]
        return _array(result["x"]), None if mask is None else np.array(mask).astype(bool)

    def project(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """``final_proj`` on features that were returned, as RVC v1 calls it."""
        from mlx_contentvec.backend import mx

        return _array(self.model.final_proj(mx.array(features).astype(self._compute_dtype())))

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter as it was loaded, by its name."""
        from mlx.utils import tree_flatten

        from mlx_contentvec.backend import mx

        return {
            name: Parameter(
                np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array),
                _dtype_name(array),
            )
            for name, array in tree_flatten(self.model.parameters())
        }


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def _mask(mask: NDArray[np.bool_] | None) -> Any:
    from mlx_contentvec.backend import mx

    return None if mask is None else mx.array(mask)


def _array(array: Any) -> NDArray[np.float32]:
    from mlx_contentvec.backend import mx

    return np.array(array.astype(mx.float32))


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file.

    Raises ParityError if the file is not one, IdentityError if it is too large to be one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        os.close(open_regular(path))  # what is no regular file may block, or never end
        require_plausible_size(path.name, path.stat().st_size)
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ParityError(f"{path.name} cannot be read: {reason or error}") from error
    except SafetensorError as error:
        raise ParityError(
            f"{path.name} is not a whole safetensors file",
            found=str(error),
            hint="give the checkpoint first, then the converted file",
        ) from error
