"""The MLX model as a parity run sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ParityError
from mlx_contentvec.files import is_file
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

        Raises WeightsError if it is not one.
        """
        from mlx_contentvec.model import ContentvecModel

        return cls(ContentvecModel.from_file(path), read_metadata(path))

    @property
    def precision(self) -> str:
        """What the weights are stored as: a name in ``contentvec_convert.precision``."""
        return self.metadata.get("dtype", "float32")

    @property
    def source(self) -> dict[str, Any]:
        """What the file says it was made from; empty if it does not, or not so that it is read."""
        try:
            return parse_object(self.metadata.get("source", "{}"))
        except JsonError:
            return {}

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
                str(array.dtype).removeprefix("mlx.core."),
            )
            for name, array in tree_flatten(self.model.parameters())
        }


def _mask(mask: NDArray[np.bool_] | None) -> Any:
    from mlx_contentvec.backend import mx

    return None if mask is None else mx.array(mask)


def _array(array: Any) -> NDArray[np.float32]:
    from mlx_contentvec.backend import mx

    return np.array(array.astype(mx.float32))


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file.

    Raises ParityError if the file is not one.
    """
    from safetensors import SafetensorError, safe_open

    if path.exists() and not is_file(path):
        raise ParityError(f"{path} is not a file", expected="a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except OSError as error:
        raise ParityError(f"{path.name} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ParityError(
            f"{path.name} is not a whole safetensors file",
            found=str(error),
            hint="give the checkpoint first, then the converted file",
        ) from error
