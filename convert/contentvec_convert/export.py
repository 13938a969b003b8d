"""The way back: a converted file as a checkpoint of transformers or fairseq.

The same rules that brought the tensors in take them out again. What was only
moved comes back bit for bit. The two parts of the weight norm cannot come back,
because the conversion multiplied them out; they are chosen anew such that their
product is the kernel (see :func:`split_weight_norm`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_contentvec import __version__, rvc_mlx
from mlx_contentvec.config import EPS, EXTRACTOR_EPS, ModelConfig
from mlx_contentvec.errors import (
    ConfigError,
    ContentvecError,
    IdentityError,
    OutputError,
    UnsupportedCheckpoint,
    name_list,
)
from mlx_contentvec.files import (
    check_target,
    explained,
    is_file,
    is_folder,
    left_by_the_system,
    require_unchanged,
    sync,
)
from mlx_contentvec.folders import Room

from .checkpoint import Checkpoint, open_checkpoint
from .identity import state_of
from .ledger import account
from .rules import TRANSFORMS, Array, Rule
from .sources import fairseq, mlx, plan_for, transformers
from .torch_writer import write_torch_file
from .writer import Entry, header, lay_out

#: the formats of the way back
FORMATS = ("transformers", "fairseq", "rvc-mlx")

#: of the names of a weight norm, the pair that every version of either library reads
_KERNEL = "weight_g"


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    format: str
    tensors: int
    #: sentences on what could not be given back as it was
    notes: tuple[str, ...]


def split_weight_norm(kernel: Array) -> tuple[Array, Array]:
    """A weight norm that multiplies out to ``kernel``: v is the kernel, g its norm.

    kernel:  (out, kernel, in / groups), channels last
    returns: g (1, 1, kernel) float32 and v (out, in / groups, kernel), one norm
             per tap over out and in, as fairseq's dim=2 has it

    The product is the kernel up to one unit in the last place, because g is
    rounded to float32. Any positive multiple of v would do as well; training
    leaves v longer or shorter than the kernel, and that length is lost.
    Raises ConfigError if a tap is all zero: no finite weight norm gives that.
    """
    direction = kernel.transpose(0, 2, 1)
    wide = direction.astype(np.float64)
    magnitude = np.sqrt(np.einsum("oik,oik->k", wide, wide)).astype(np.float32)
    if not magnitude.all():
        raise ConfigError(
            "the positional convolution has no weight norm",
            found=f"{np.count_nonzero(magnitude == 0)} of its taps are zero",
            hint="a weight norm divides by the norm of each tap",
        )
    return magnitude.reshape(1, 1, -1), direction


#: transforms that lose their sources -> how sources are chosen that give the same target
_CHOSEN: dict[str, Callable[[Array], tuple[Array, ...]]] = {
    "fold_weight_norm": split_weight_norm,
}

#: what a library adds to the variance of a clip that it normalises, where not EPS
_EPS = {"transformers": EXTRACTOR_EPS}


def export(source: str | Path, output: str | Path, *, to: str, force: bool = False) -> Export:
    """Write the converted file ``source`` as a checkpoint of another library.

    to: "transformers", a folder with config.json, preprocessor_config.json and
        model.safetensors; "fairseq", one .pt file; or "rvc-mlx", its hubert.safetensors.
    force: replace what is at ``output``; of a folder, only one that an export wrote.

    Weights keep their precision; bfloat16, which numpy lacks, becomes float32.
    The result appears at ``output`` after it has been read back, recognised,
    and found to hold the same configuration and tensors; each library normalises input
    with an epsilon of its own, which a note says.

    Raises UnsupportedCheckpoint if ``source`` is quantised or not a converted
    file, MappingError if its tensors are not those of its configuration,
    ConfigError for a model that the other library cannot hold,
    IdentityError if ``source`` changes meanwhile, OutputError if ``output`` exists or
    cannot be written.
    """
    source, output = Path(source), Path(output)
    if to not in _WRITERS:
        raise ConfigError(f"there is no export to {to!r}", expected=" or ".join(FORMATS))
    _check_output(source, output, to, force)
    before = {source: state_of(source)} if is_file(source) else {}
    with open_checkpoint(source) as converted:
        if not mlx.matches(converted):
            raise UnsupportedCheckpoint(
                f"{source.name} is not a converted file",
                found=f"{converted.container} without a stored configuration",
                expected="what mlx-contentvec convert writes",
                hint="export is the way back from a conversion; convert the file first",
            )
        plan = mlx.plan(converted)
        account(plan, converted.tensors)
        config = plan.config
        with Room(output, is_own=_is_own) as room:
            draft = room.path / output.name
            with explained(output):
                written, notes = _WRITERS[to](converted, config, draft)
            require_unchanged(before, IdentityError)
            as_there = (
                replace(config, normalize_eps=_EPS.get(to, EPS)) if config.normalize else config
            )
            _verify(draft, as_there, written)
            room.publish(
                draft, force=force, may_replace=lambda: _require_replaceable(source, output)
            )
    if as_there != config:
        notes += (
            f"{to} adds {as_there.normalize_eps:g} to the variance of a clip, not "
            f"{config.normalize_eps:g}: of quiet audio it gives other features",
        )
    return Export(output, to, len(written), notes)


# ---- transformers -------------------------------------------------------------


def _write_transformers(
    converted: Checkpoint, config: ModelConfig, folder: Path
) -> tuple[dict[str, Array], tuple[str, ...]]:
    if config.encoder_layers_1:
        raise ConfigError(
            "transformers has no speaker-conditioned layers",
            found=f"{config.encoder_layers_1} of them in {converted.path.name}",
            hint="--to fairseq keeps them, for the original ContentVec code",
        )
    tensors = _undone(converted, transformers.rules(config, kernel=_kernel(config)))
    if config.conv_pos_batch_norm:
        tensors["encoder.pos_conv_embed.batch_norm.num_batches_tracked"] = np.array(0)
    channels, kernels, strides = zip(*config.conv_layers, strict=True)
    model_class = "HubertModel" if config.final_dim is None else "HubertModelWithFinalProj"
    fields = {
        "architectures": [model_class],
        "model_type": "hubert",
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "num_feat_extract_layers": len(channels),
        **{key: getattr(config, field) for field, key in transformers.FIELDS.items()},
        transformers.HEADS: config.encoder_attention_heads,
        "conv_pos_batch_norm": config.conv_pos_batch_norm,
        **{key: value for key, value in transformers.FIXED.items() if value is not None},
        # without masking, transformers expects no mask embedding
        "apply_spec_augment": False,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    }
    if config.final_dim is not None:
        fields["classifier_proj_size"] = config.final_dim
    preprocessor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "do_normalize": config.normalize,
        "sampling_rate": config.sample_rate,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": config.extractor_norm == "layer",
    }
    folder.mkdir()
    for name, content in (("config.json", fields), ("preprocessor_config.json", preprocessor)):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    metadata = {"format": "pt", "mlx_contentvec_version": __version__}
    metadata |= {key: converted.metadata[key] for key in _CARRIED if key in converted.metadata}
    _write_safetensors(folder / "model.safetensors", tensors, metadata)
    notes = ["masked_spec_embed, which only training reads, is not part of a converted file"]
    if config.final_dim is not None:
        notes.append(
            "final_proj needs the class HubertModelWithFinalProj; plain HubertModel ignores it"
        )
    return tensors, tuple(notes)


#: metadata of the converted file that says where the weights come from
_CARRIED = ("source", "stand_in")

#: numpy dtype -> safetensors dtype
_SAFETENSORS = {"float16": "F16", "float32": "F32", "int64": "I64"}


def _write_safetensors(path: Path, tensors: dict[str, Array], metadata: dict[str, str]) -> None:
    entries = [Entry(name, _SAFETENSORS[a.dtype.name], a.shape) for name, a in tensors.items()]
    layout = lay_out(entries, metadata)
    with path.open("wb") as stream:
        stream.write(header(layout, metadata))
        for entry in layout.entries:
            stream.write(tensors[entry.name].tobytes())
        _flush(stream)


# ---- fairseq ------------------------------------------------------------------


def _write_fairseq(
    converted: Checkpoint, config: ModelConfig, path: Path
) -> tuple[dict[str, Array], tuple[str, ...]]:
    if config.final_dim is None:
        raise ConfigError(
            "fairseq's HuBERT always has a final_proj",
            found=f"none in {converted.path.name}",
            hint="--to transformers does without it",
        )
    kernel = "batch_norm" if config.conv_pos_batch_norm else _KERNEL
    tensors = _undone(converted, fairseq.rules(config, kernel=kernel))
    # what fairseq's strict loading asks for beside the model itself
    tensors["mask_emb"] = np.zeros(config.encoder_embed_dim, np.float32)
    if config.conv_pos_batch_norm:
        tensors["encoder.pos_conv.0.num_batches_tracked"] = np.array(0)
    extractor_modes = {norm: mode for mode, norm in fairseq.EXTRACTOR_NORMS.items()}
    name = "contentvec" if config.encoder_layers_1 else "hubert"
    model = {
        "_name": name,
        "label_rate": 50.0,
        "extractor_mode": extractor_modes[config.extractor_norm],
        "encoder_layers": config.encoder_layers,
        "encoder_embed_dim": config.encoder_embed_dim,
        "encoder_ffn_embed_dim": config.encoder_ffn_embed_dim,
        "encoder_attention_heads": config.encoder_attention_heads,
        "activation_fn": "gelu",
        "final_dim": config.final_dim,
        "untie_final_proj": True,
        "layer_norm_first": config.layer_norm_first,
        "conv_feature_layers": str(list(config.conv_layers)),
        "conv_bias": config.conv_bias,
        "conv_pos": config.conv_pos,
        "conv_pos_groups": config.conv_pos_groups,
    }
    if config.conv_pos_batch_norm:
        model["conv_pos_batch_norm"] = True
    if config.encoder_layers_1:
        model["encoder_layers_1"] = config.encoder_layers_1
    task = {
        "_name": f"{name}_pretraining",
        "data": "",
        "labels": ["km"],
        "label_rate": 50.0,
        "sample_rate": config.sample_rate,
        "normalize": config.normalize,
    }
    extra: dict[str, Any] = {"mlx_contentvec_version": __version__, "train_iterator": {"epoch": 0}}
    if "stand_in" in converted.metadata:
        extra["stand_in"] = converted.metadata["stand_in"]
    state = {
        "args": None,
        "cfg": {"model": model, "task": task},
        "model": tensors,
        "criterion": {},
        "optimizer_history": [
            {
                "criterion_name": f"{name.capitalize()}Criterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        # one label set of unknown labels: no dictionary to pickle, no label embeddings to load
        "task_state": {"dictionaries": [None]},
        "extra_state": extra,
    }
    with path.open("wb") as stream:
        write_torch_file(stream, state)
        _flush(stream)
    notes = (
        "mask_emb, which only training reads, is not part of a converted file: it is all zeros",
        "the label embeddings and dictionaries of pre-training are left out",
    )
    return tensors, notes


# ---- rvc-mlx ------------------------------------------------------------------


def _write_rvc_mlx(
    converted: Checkpoint, config: ModelConfig, path: Path
) -> tuple[dict[str, Array], tuple[str, ...]]:
    metadata = rvc_mlx.metadata_of(config)
    tensors = {
        name: np.ascontiguousarray(tensor.numbers()) for name, tensor in converted.tensors.items()
    }
    notes: tuple[str, ...] = ()
    if config.final_dim is None:
        # rvc-mlx loads strictly, and has a projection whether it is used or not
        tensors["final_proj.weight"] = np.zeros(
            (rvc_mlx.HEAD_WIDTH, config.encoder_embed_dim), np.float32
        )
        tensors["final_proj.bias"] = np.zeros(rvc_mlx.HEAD_WIDTH, np.float32)
        notes = ("there is no final_proj: zeros stand for it, and voices of RVC v1 cannot be used",)
    metadata["converted_by"] = f"mlx-contentvec {__version__}"
    metadata |= {key: converted.metadata[key] for key in _CARRIED if key in converted.metadata}
    _write_safetensors(path, tensors, metadata)
    return tensors, notes


_WRITERS = {
    "transformers": _write_transformers,
    "fairseq": _write_fairseq,
    "rvc-mlx": _write_rvc_mlx,
}


# ---- all ---------------------------------------------------------------------


def _kernel(config: ModelConfig) -> str:
    return "weight" if config.conv_pos_batch_norm else _KERNEL


def _undone(converted: Checkpoint, rules: Iterable[Rule]) -> dict[str, Array]:
    """The source tensors of ``rules`` for the targets in ``converted``, contiguous."""
    tensors: dict[str, Array] = {}
    for rule in rules:
        target = converted.tensors[rule.target].numbers()
        arrays = TRANSFORMS[rule.transform].undo(target)
        if arrays is None:
            arrays = _CHOSEN[rule.transform](target)
        tensors.update(zip(rule.sources, map(np.ascontiguousarray, arrays), strict=True))
    return tensors


def _check_output(source: Path, output: Path, to: str, force: bool) -> None:
    if to == "rvc-mlx" and output.suffix != ".safetensors":
        raise OutputError(
            f"cannot write {output.name}: MLX tells formats by their suffix",
            expected="a name that ends in .safetensors",
        )
    if not is_folder(output.absolute().parent):
        raise OutputError(
            f"cannot write {output}: there is no folder {output.absolute().parent}",
            hint="make the folder first, or name another one with -o",
        )
    if not os.path.lexists(output):
        return
    if not force:
        raise OutputError(f"{output} exists", hint="--force replaces it, -o names another place")
    _require_replaceable(source, output)


def _is_own(name: str) -> bool:
    """Whether a folder that an export wrote has a file of this name."""
    own = ("config.json", "preprocessor_config.json", "model.safetensors")
    return name in own or left_by_the_system(name)


def _require_replaceable(source: Path, output: Path) -> None:
    """OutputError unless what is at ``output`` is a file, or a folder that an export wrote."""
    # unlike Path.resolve, realpath does not fail at a link to itself
    given = Path(os.path.realpath(source))
    if Path(os.path.realpath(output)) in (given, *given.parents):
        raise OutputError(
            f"{output} is the source itself, or holds it", hint="name another place with -o"
        )
    if not is_folder(output):
        check_target(output, force=True)
    else:
        foreign = sorted(entry.name for entry in output.iterdir() if not _is_own(entry.name))
        if foreign:
            raise OutputError(
                f"{output} holds more than an export writes, and is not replaced",
                found=name_list(foreign),
                hint="name another folder with -o",
            )


def _verify(draft: Path, config: ModelConfig, written: dict[str, Array]) -> None:
    """Read ``draft`` back, recognise it, and compare everything with what was to be written."""
    try:
        with open_checkpoint(draft) as back:
            same = plan_for(back).config == config and back.tensors.keys() == written.keys()
            same = same and all(
                back.tensors[name].read().tobytes() == array.tobytes()
                for name, array in written.items()
            )
            found = None
    except ContentvecError as error:
        same, found = False, error.problem
    if not same:
        raise OutputError(
            f"{draft.name} did not come back from the disk as it was written",
            found=found,
            hint="if nothing else moved, removed or changed it meanwhile, the disk or the memory\n"
            "is failing; try again on another one",
        )


def _flush(stream: Any) -> None:
    stream.flush()
    sync(stream.fileno())
