"""Weights into a model: read, matched, quantised, stored as the device reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import first_release, ops, rvc_mlx
from .backend import mx, nn, require_no_fork
from .config import ModelConfig, parameter_shapes
from .errors import OutputError, WeightsError, name_list
from .files import (
    Draft,
    check_target,
    file_state,
    is_file,
    is_folder,
    is_there,
    require_unchanged,
    similar_name,
)
from .hub import how_to_convert
from .hubert import Hubert, Linear
from .json_text import JsonError, parse_object
from .ops.mlx import in_gemm_layout, to_gemm_layout
from .safetensors_header import HeaderError, UnknownDtype, check_file

Arrays = dict[str, mx.array]

_NO_HEAD = "the model without a projection: ContentvecModel(..., final_dim=None)"
_BUILD_FROM_FILE = "ContentvecModel.from_file(path) builds the model that a file describes"


def read_safetensors(path: str | os.PathLike[str]) -> tuple[Arrays, dict[str, str]]:
    """The arrays (lazy) and the metadata of a safetensors file.

    A file of rvc-mlx comes as one of this project would (``rvc_mlx.translated``).
    Raises WeightsError.
    """
    path = Path(path)
    if is_folder(path):
        raise WeightsError(
            f"{path} is a folder",
            expected="a file that mlx-contentvec convert wrote",
            hint="weights in a folder: ContentvecModel.from_pretrained(folder)\n"
            + how_to_convert(path),
        )
    if not is_file(path):
        if is_there(path):
            raise WeightsError(
                f"{path} is not a regular file",
                expected="a file that mlx-contentvec convert wrote",
            )
        raise WeightsError(
            f"no such file: {path}", hint=similar_name(path) or how_to_convert("hubert_base.pt")
        )
    require_no_fork()
    _check_header(path)
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{path.name} is not a readable safetensors file",
            found=_beginning(path),
            hint=f"a checkpoint is converted first:\n{how_to_convert(path)}\n"
            f"what a file is: mlx-contentvec inspect {shlex.quote(os.fspath(path))}",
        ) from error
    if rvc_mlx.is_rvc_mlx(metadata):
        return rvc_mlx.translated(arrays, metadata, path.name)
    return arrays, metadata


@contextlib.contextmanager
def unchanged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise WeightsError if a file changes while the block reads it: half of it would be another's.

    A file that is not there is for the block to refuse.
    """
    states = {}
    with contextlib.suppress(OSError, ValueError):
        states[Path(path)] = file_state(Path(path))
    yield
    require_unchanged(states, WeightsError)


def _check_header(path: Path) -> None:
    """Raise WeightsError unless every byte of a safetensors file belongs to one tensor."""
    try:
        check_file(path)
    except HeaderError as error:
        what, hint = "damaged", "copy or download the file again, or convert its checkpoint again"
        if isinstance(error, UnknownDtype):
            what, hint = "no converted file", "convert the checkpoint that it is from"
        raise WeightsError(
            f"{path.name} is {what}: {error.problem}",
            found=error.found,
            expected=error.expected,
            hint=hint,
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise WeightsError(f"{path} cannot be read: {reason}") from error


#: how files begin that are taken for weights
_BEGINNINGS = {
    b"PK": "a zip archive, as torch.save writes",
    b"\x80": "a pickle, as torch.save wrote it",
    b"<": "a web page",
}


def _beginning(path: Path) -> str:
    """What the first bytes of a file that is no safetensors say it is."""
    with path.open("rb") as file:
        head = file.read(16)
    what = next((what for start, what in _BEGINNINGS.items() if head.startswith(start)), None)
    return what or f"{path.stat().st_size:,} bytes that begin with {head!r}"


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
    """The parameters of a model that no weights have been given yet.

    names: which ones; all of them by default
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        flat = dict(flat_parameters(model))
        # held, so that no array made later can be taken for one of them
        self._arrays = {name: flat[name] for name in (flat if names is None else names)}

    def given(self, names: Iterable[str]) -> None:
        """Weights have been given for these."""
        for name in names:
            self._arrays.pop(name, None)

    def left(self, model: nn.Module) -> list[str]:
        """Their names."""
        if not self._arrays:
            return []
        flat = dict(flat_parameters(model))
        self._arrays = {
            name: flat[name]
            for name, array in self._arrays.items()
            if name in flat and (flat[name] is array or _is_cast_of(array, flat[name]))
        }
        return list(self._arrays)

    def require_none(self, model: nn.Module) -> None:
        """Raise WeightsError while one is left."""
        if left := self.left(model):
            raise WeightsError(
                "the model has no weights yet",
                found=f"{len(left)} parameters never loaded: {name_list(left, limit=3)}",
                hint='model.load_weights("contentvec_base.safetensors")',
            )


def _is_cast_of(placeholder: mx.array, array: mx.array) -> bool:
    """Whether ``array`` is what ``set_dtype`` or ``apply`` of a layer made of a placeholder."""
    if array.shape != placeholder.shape or (array.ndim == 1 and array.dtype == placeholder.dtype):
        return False
    return bool(mx.array_equal(array, placeholder.astype(array.dtype)).item())


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
        _quantize(model, metadata["quantization"], arrays, origin)
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
            hint=_NO_HEAD if {*missing, *surplus} == first_release.HEAD else _BUILD_FROM_FILE,
        )
    given = {name: (arrays[name], expected[name]) for name in expected if name in arrays}
    wrong = [
        f"{name} {tuple(array.shape)} instead of {tuple(wanted.shape)}"
        for name, (array, wanted) in given.items()
        if tuple(array.shape) != tuple(wanted.shape)
    ]
    if wrong:
        raise WeightsError(
            f"{origin} does not fit this model",
            found=f"{len(wrong)} of another shape: {name_list(wrong)}",
            hint=_BUILD_FROM_FILE,
        )
    wrong = [
        f"{name} {array.dtype}"
        for name, (array, wanted) in given.items()
        if not _is_of_kind(array.dtype, wanted.dtype)
    ]
    if wrong:
        raise WeightsError(
            f"{origin} does not fit this model",
            found=f"{len(wrong)} of another type: {name_list(wrong)}",
            expected="floating point; of a quantised layer's weight uint32",
            hint="convert the checkpoint again",
        )
    if headless:
        model.config = dataclasses.replace(model.config, final_dim=None)
        model.pop("final_proj", None)
    return {
        name: to_gemm_layout(array) if is_weight(name) else mx.contiguous(array)
        for name, (array, _) in given.items()
    }


def _is_of_kind(dtype: mx.Dtype, wanted: mx.Dtype) -> bool:
    """Whether an array of ``dtype`` can stand where the model has one of ``wanted``."""
    if mx.issubdtype(wanted, mx.floating):
        return bool(mx.issubdtype(dtype, mx.floating))
    return bool(dtype == wanted)


def named_arrays(pairs: Any) -> Arrays:
    """(name, array) pairs as a dictionary. Raises WeightsError for anything else."""
    expected = "pairs of a name and an mlx.core.array"
    try:
        arrays = dict(pairs)
    except (TypeError, ValueError) as error:
        raise WeightsError(
            "weights are a file, or names with arrays",
            found=type(pairs).__name__,
            expected=f"the path of a converted file, or {expected}",
        ) from error
    for name, array in arrays.items():
        if not isinstance(name, str) or not isinstance(array, mx.array):
            raise WeightsError(
                "weights are a file, or names with arrays",
                found=f"{name!r:.80}: {type(array).__module__}.{type(array).__name__}",
                expected=expected,
                hint="of numpy: mlx.core.array(array); of torch: mlx.core.array(tensor.numpy())",
            )
    return arrays


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


def _quantize(model: Hubert, stored: str, arrays: Arrays, origin: str) -> None:
    """Exchange the linear layers that ``arrays`` quantises for ones that still lack weights."""
    try:
        settings = parse_object(stored)
        group_size, bits = settings.get("group_size"), settings.get("bits")
        if bits not in _BITS or group_size not in _GROUPS:
            raise ValueError("MLX has no such group size or number of bits")
        nn.quantize(
            model,
            group_size=group_size,
            bits=bits,
            class_predicate=lambda name, module: (
                isinstance(module, Linear) and f"{name}.scales" in arrays
            ),
        )
    except (JsonError, ValueError) as error:
        raise WeightsError(
            f"{origin} is quantised in a way that is not known here",
            found=f"{stored[:200]} ({error})",
            expected=f"bits one of {_BITS}, a group_size of {_GROUPS} that divides the layers",
            hint="convert the original checkpoint again",
        ) from error


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the file that weights were loaded from said about where they come from."""

    #: its ``source``, as JSON
    source: str | None = None
    #: its notice that the weights are a stand-in's
    stand_in: str | None = None

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> Origin:
        """That of a file with this metadata."""
        source = metadata.get("source", metadata.get("derived_from"))
        return cls(source, metadata.get("stand_in"))


def save(model: Hubert, path: str | os.PathLike[str], origin: Origin) -> None:
    """Write a model's parameters and what ``from_file`` needs to build it again.

    The file is written beside ``path``, read back and compared before it gets its name.
    Where the weights were loaded from is kept as ``derived_from``, for what was done
    to them since is not known here.

    Raises OutputError if it cannot be written, WeightsError for parameters that this
    model's configuration does not describe.
    """
    path = Path(path)
    arrays = dict(flat_parameters(model))
    quantization = _quantization(model)
    described = parameter_shapes(model.config)
    extras = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, nn.QuantizedLinear)
        for part in ("scales", "biases")
    }
    if unknown := sorted((arrays.keys() - extras) ^ described.keys()):
        raise WeightsError(
            "the model is not what its configuration says, and could not be loaded again",
            found=f"added or missing: {name_list(unknown)}",
            hint="model.save_weights(path) writes parameters without a description",
        )
    metadata = {
        "format": "mlx",
        "config": model.config.to_json(),
        "dtype": _dtype_name(arrays, quantization),
        # the package imports this module, not the other way round
        "mlx_contentvec_version": sys.modules["mlx_contentvec"].__version__,
    }
    if quantization is not None:
        metadata["quantization"] = json.dumps(quantization, sort_keys=True)
    if origin.source is not None:
        metadata["derived_from"] = origin.source
    if origin.stand_in is not None:
        metadata["stand_in"] = origin.stand_in
    check_target(path, force=True)
    with Draft(path) as draft:
        try:
            with draft.open() as file:
                mx.save_safetensors(file, arrays, metadata)
            draft.sync()
            with draft.open() as file:
                written = mx.load(file, format="safetensors")
                changed = [
                    name
                    for name, array in arrays.items()
                    if name not in written or not _same(written[name], array)
                ]
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"{path} cannot be written", found=getattr(error, "strerror", None) or str(error)
            ) from error
        if changed:
            raise OutputError(f"{path.name} did not read back as written", found=name_list(changed))
        draft.rename(force=True)


def _same(one: mx.array, other: mx.array) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(mx.array_equal(one, other, equal_nan=mx.issubdtype(one.dtype, mx.floating)))


def _quantization(model: nn.Module) -> dict[str, int] | None:
    """Group size and bits of the quantised layers; None where there are none.

    Raises WeightsError if they differ among the layers, or are of another mode than affine.
    """
    found = {
        (layer.group_size, layer.bits, getattr(layer, "mode", "affine"))
        for layer in model.modules()
        if isinstance(layer, nn.QuantizedLinear)
    }
    if not found:
        return None
    (group_size, bits, mode), *others = sorted(found)
    if others or mode != "affine":
        raise WeightsError(
            "the layers are quantised in ways that a file cannot describe",
            found=", ".join(
                f"{mode}, {bits} bits in groups of {size}" for size, bits, mode in found
            ),
            expected="one group size and number of bits, in MLX's affine mode",
        )
    return {"group_size": group_size, "bits": bits}


def _dtype_name(arrays: Arrays, quantization: Mapping[str, int] | None) -> str:
    """The format's name as ``convert --dtype`` has it: of mixed floats the least precise."""
    if quantization is not None:
        return f"q{quantization['bits']}"
    dtypes = {array.dtype for array in arrays.values()}
    formats = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
    return next(name for name, dtype in formats.items() if dtype in dtypes)


def is_weight(name: str) -> bool:
    """Whether a parameter is a layer's weight: a quantised layer's scales are read by rows."""
    return name.rpartition(".")[2] == "weight"


def arrange(model: Hubert) -> bool:
    """Store every weight as :func:`match` does, and say whether one was stored otherwise."""
    from mlx.utils import tree_unflatten

    stray = [
        (name, array)
        for name, array in flat_parameters(model)
        if is_weight(name) and not in_gemm_layout(array)
    ]
    arranged = [(name, to_gemm_layout(array)) for name, array in stray]
    mx.eval([array for _, array in arranged])
    nn.Module.update(model, tree_unflatten(arranged), strict=False)
    return bool(arranged)


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
