"""Weights into a model: read, matched, quantised, stored as the device reads them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import first_release, ops
from .backend import mx, nn
from .config import ModelConfig
from .errors import WeightsError, name_list
from .hubert import Hubert, Linear
from .json_text import JsonError, parse_object
from .ops.mlx import to_gemm_layout

Arrays = dict[str, mx.array]

_BUILD_FROM_FILE = "ContentvecModel.from_file(path) builds the model that a file describes"


def read_safetensors(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    """The arrays (lazy) and the metadata of a safetensors file.

    Raises WeightsError.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"no such file: {path}",
            hint="convert one: mlx-contentvec convert hubert_base.pt",
        )
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{path.name} is not a readable safetensors file",
            found=str(error),
            hint="a .pt or .bin checkpoint must be converted first: mlx-contentvec convert FILE",
        ) from error
    return arrays, metadata


def stored_config(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> ModelConfig:
    """The configuration in a converted file's metadata.

    Raises WeightsError if it cannot be read, ConfigError if it cannot be.
    """
    try:
        fields = parse_object(metadata["config"])
    except JsonError as error:
        raise WeightsError(
            f"the configuration stored in {Path(path).name} cannot be read", found=str(error)
        ) from error
    return ModelConfig.from_dict(fields)


def flat_parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Every parameter by its name."""
    from mlx.utils import tree_flatten

    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    return flat


class Placeholders:
    """The parameters of a model that no weights have been given yet."""

    def __init__(self, model: nn.Module) -> None:
        self._ids = {id(array) for _, array in flat_parameters(model)}

    def left(self, model: nn.Module) -> list[str]:
        """Their names."""
        if not self._ids:
            return []
        flat = flat_parameters(model)
        # a placeholder that is gone may leave its id to an array made later
        self._ids &= {id(array) for _, array in flat}
        return [name for name, array in flat if id(array) in self._ids]

    def require_none(self, model: nn.Module) -> None:
        """Raise WeightsError while one is left."""
        if left := self.left(model):
            raise WeightsError(
                "the model has no weights yet",
                found=f"{len(left)} parameters never loaded: {name_list(left, limit=3)}",
                hint='model.load_weights("contentvec_base.safetensors")',
            )


def match(
    model: Hubert, arrays: Arrays, metadata: Mapping[str, str], origin: str, strict: bool
) -> Arrays:
    """The weights of ``arrays`` under the model's names, or an error and an unchanged model.

    A model quantised as ``metadata`` says comes with placeholders for it. The first
    release had no ``final_proj``: the model that takes its weights has none either.

    Raises WeightsError.
    """
    if "config" in metadata:
        _require_same_config(model.config, stored_config(origin, metadata), origin)
    if "quantization" in metadata:
        try:
            stored = parse_object(metadata["quantization"])
        except JsonError as error:
            raise WeightsError(
                f"the quantization stored in {origin} cannot be read", found=str(error)
            ) from error
        _quantize(model, stored, arrays)
    headless = False
    if first_release.is_first_release(arrays):
        arrays = first_release.renamed(arrays)
        headless = not first_release.HEAD & arrays.keys()
    expected = {
        name: array
        for name, array in flat_parameters(model)
        if not (headless and name in first_release.HEAD)
    }
    missing = [name for name in expected if name not in arrays]
    surplus = [name for name in arrays if name not in expected]
    if strict and (missing or surplus):
        found = []
        if missing:
            found.append(f"{len(missing)} missing: {name_list(missing)}")
        if surplus:
            found.append(f"{len(surplus)} not in the model: {name_list(surplus)}")
        raise WeightsError(
            f"{origin} does not fit this model",
            found="; ".join(found),
            expected=f"exactly the model's {len(expected)} tensors",
            hint=_BUILD_FROM_FILE,
        )
    wrong = [
        f"{name} {tuple(arrays[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in arrays and tuple(arrays[name].shape) != tuple(expected[name].shape)
    ]
    if wrong:
        raise WeightsError(
            f"{origin} does not fit this model",
            found=f"{len(wrong)} of another shape: {name_list(wrong)}",
            hint=_BUILD_FROM_FILE,
        )
    if headless:
        model.config = dataclasses.replace(model.config, final_dim=None)
        model.pop("final_proj", None)
    return {name: to_gemm_layout(arrays[name]) for name in expected if name in arrays}


def _require_same_config(ours: ModelConfig, stored: ModelConfig, origin: str) -> None:
    differing = [
        f"{field.name} {getattr(stored, field.name)!r} (this model: {getattr(ours, field.name)!r})"
        for field in dataclasses.fields(ModelConfig)
        if getattr(stored, field.name) != getattr(ours, field.name)
    ]
    if differing:
        raise WeightsError(
            f"{origin} holds another model", found="; ".join(differing), hint=_BUILD_FROM_FILE
        )


#: what mlx.core.quantize takes
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)


def _quantize(model: Hubert, quantization: dict[str, Any], arrays: Arrays) -> None:
    """Exchange the linear layers that ``arrays`` quantises for ones that still lack weights."""
    if quantization.get("bits") not in _BITS or quantization.get("group_size") not in _GROUPS:
        raise WeightsError(
            "the weights are quantised in a way that MLX does not compute",
            found=f"{quantization!r:.200}",
            expected=f"bits one of {_BITS}, group_size one of {_GROUPS}",
        )
    nn.quantize(
        model,
        group_size=quantization["group_size"],
        bits=quantization["bits"],
        class_predicate=lambda name, module: (
            isinstance(module, Linear) and f"{name}.scales" in arrays
        ),
    )


def fuse_qkv(model: Hubert) -> ops.FusedQKV | None:
    """Store each layer's queries, keys and values as one matrix, of which they stay views.

    One product of three times the width instead of three: 0.07 ms instead of
    0.12 at 10 s of audio, 0.05 instead of 0.11 at 1 s (H100, float32).

    returns: weight (3 * width, width) and bias (3 * width,) of each layer; None if a
        layer is quantised
    """
    attentions = [layer.self_attn for layer in model.encoder.layers]
    projections = [(a.q_proj, a.k_proj, a.v_proj) for a in attentions]
    if not all(isinstance(part, Linear) for parts in projections for part in parts):
        return None
    fused = []
    for parts in projections:
        weight = to_gemm_layout(mx.concatenate([part.weight for part in parts]))
        bias = mx.concatenate([part.bias for part in parts])
        width = len(bias) // len(parts)
        for index, part in enumerate(parts):
            rows = slice(index * width, (index + 1) * width)
            part.weight, part.bias = weight[rows], bias[rows]
        fused.append((weight, bias))
    mx.eval(fused, [(part.weight, part.bias) for parts in projections for part in parts])
    return fused
