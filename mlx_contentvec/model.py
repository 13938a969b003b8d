"""The model as users call it: 16 kHz mono waveforms in, content features out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from . import features, first_release, inputs, live, ops, weights
from .backend import device_kind, mx, require_no_fork
from .config import ModelConfig, require_layer, stage_input, stage_names
from .errors import ConfigError, WeightsError, name_list
from .hub import how_to_convert, resolve_pretrained
from .hubert import Hubert
from .memory import require_room
from .ops import CpuHubert, MlxHubert
from .streaming import front_end, front_end_step


class _ForkCheck:
    """Stands in a pickle before the arrays, which take memory of a GPU when they are read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return require_no_fork, ()


def _rebuilt(
    _: _ForkCheck | None,
    cls: type[ContentvecModel],
    parts: dict[str, Any],
    private: dict[str, Any],
    left: list[str],
) -> ContentvecModel:
    """A model out of what ``ContentvecModel.__reduce__`` gives."""
    require_no_fork()  # a copy has read no check
    model = cls.__new__(cls)
    model.__dict__.update(private)
    dict.update(model, parts)
    model._placeholders = weights.Placeholders(model, left)
    model._preparation = ops.Preparation()
    # a pickled array is stored by rows; what was only copied is left as it is shared
    if not left and weights.arrange(model):
        model._fuse_qkv()
    return model


class ContentvecModel(Hubert):
    """ContentVec, or any HuBERT of the same family.

    ``ContentvecModel(encoder_layers_1=0)`` is the model in RVC's ``hubert_base.pt``;
    other shapes are given as a :class:`ModelConfig` or by its fields.
    :meth:`from_file` takes the shape from a converted file.
    """

    def __init__(self, config: ModelConfig | None = None, *positional: Any, **fields: Any) -> None:
        """Build the model without weights; nothing is initialised or computed.

        The options of the first release's constructor are taken where they mean the same.

        Raises ConfigError for an unknown field or an impossible combination.
        """
        if positional or not isinstance(config, ModelConfig | None):
            raise ConfigError(
                "the first argument is a ModelConfig, and the only one by position",
                found=", ".join(map(repr, (config, *positional)))[:200],
                hint="name the options: conv_feature_layers=, encoder_layers_1=, ...",
            )
        fields = first_release.config_fields(**fields)
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(
                f"unknown model option: {name_list(unknown)}",
                expected=name_list(sorted(known), limit=len(known)),
            )
        super().__init__(dataclasses.replace(config or ModelConfig(), **fields))
        self._placeholders = weights.Placeholders(self)
        self._preparation = ops.Preparation()
        self._origin = weights.Origin()
        self.eval()

    # ---- weights ------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, lazy: bool = False) -> ContentvecModel:
        """The model that a converted file describes, with its weights.

        The files of :meth:`save` and of rvc-mlx (``hubert.safetensors``) are such files
        too. A file of the first release describes nothing: it holds the one architecture
        that there was (``first_release.config_of``).

        lazy: see :meth:`load_weights`

        Raises WeightsError if the file is not one that this project converted.
        """
        with weights.unchanged(path):
            arrays, metadata = weights.read_safetensors(path)
            if "config" in metadata:
                config = weights.stored_config(path, metadata)
            elif first_release.is_first_release(arrays):
                config = first_release.config_of(arrays, Path(path).name)
            else:
                raise WeightsError(
                    f"{Path(path).name} does not say what model it holds",
                    found="safetensors without a 'config' in its metadata",
                    expected="a file written by mlx-contentvec convert",
                    hint="a checkpoint is converted first:\n" + how_to_convert(path),
                )
            model = cls(config)
            model._load(arrays, metadata, Path(path).name, lazy=lazy)
        return model

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder_or_file: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        *,
        repo_id: str | None = None,
        filename: str | None = None,
        weights_path: str | os.PathLike[str] | None = None,
    ) -> ContentvecModel:
        """The model in a Hugging Face repository, a folder or a file, with its weights.

        A repository is downloaded once; afterwards it comes from the Hub's cache,
        also offline. Files are held to the SHA-256 that the repository states.

        revision: branch, tag or commit of a repository
        dtype: ``float32``, ``float16``, ``bfloat16``, or the name of a quantised
            variant (``q8``); the repository's own variant if it has one, else its
            main weights converted. By default the main weights as they are.
        repo_id, filename, weights_path: the first release's arguments: a repository,
            one file of it, a file of this machine

        Without any of these the first release's own weights, which lack ``final_proj``.

        Raises HubError if there is nothing of that name, or it is not what it
        should be, and WeightsError if the file is not one that this project wrote.
        """
        name, file = (
            Path(given) if isinstance(given, os.PathLike) else given
            for given in (repo_or_folder_or_file, weights_path)
        )
        path = resolve_pretrained(
            name, revision, dtype, repo_id=repo_id, filename=filename, weights_path=file
        )
        model = cls.from_file(path)
        wanted = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
        if dtype in wanted:
            model.set_dtype(wanted[dtype])
        return model

    def load_weights(
        self,
        file_or_weights: str | os.PathLike[str] | Iterable[tuple[str, mx.array]],
        strict: bool = True,
        *,
        lazy: bool = False,
    ) -> ContentvecModel:
        """Take the weights of a converted file, or of (name, array) pairs.

        Strict by default: a missing, surplus or wrongly shaped tensor, or a file
        whose stored configuration differs from this model's, is an error that
        names it, and nothing is loaded. With ``strict=False`` surplus tensors
        are ignored and missing ones keep what is there; shapes are still checked.

        Weights are read and computed here, for a lazy array belongs to the thread that made
        it, and a loaded model is called from any. ``lazy=True`` leaves them in the file,
        which must not change, until they are needed; until its first call is done the model
        then belongs to the thread that loaded it. For 378 MB of float32 (AMD EPYC, processor
        time) loading takes 0.9 s and 550 MB at most, and the first call, of 1 s of audio,
        0.5 s; lazily 0.01 s and nothing, and the first call 1.3 s and 550 MB.

        Raises WeightsError.
        """
        if isinstance(file_or_weights, (str, os.PathLike)):
            with weights.unchanged(file_or_weights):
                arrays, metadata = weights.read_safetensors(file_or_weights)
                self._load(arrays, metadata, Path(file_or_weights).name, strict, lazy)
        else:
            pairs = weights.named_arrays(file_or_weights)
            self._load(pairs, {}, "the given weights", strict, lazy)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the weights and what :meth:`from_file` needs to build the model again.

        Also after ``nn.quantize``, ``set_dtype`` or training. An existing file is
        replaced once the new one is whole.

        Raises OutputError if the file cannot be written, WeightsError for a model
        without weights, or that is no longer what its configuration says.
        """
        require_no_fork()
        self._placeholders.require_none(self)
        weights.save(self, path, self._origin)

    def _load(
        self,
        arrays: dict[str, mx.array],
        metadata: dict[str, str],
        origin: str,
        strict: bool = True,
        lazy: bool = False,
    ) -> None:
        from mlx.utils import tree_unflatten

        require_no_fork()
        require_room(sum(array.nbytes for array in arrays.values()))
        quantized = "quantization" in metadata
        matched = weights.match(self, arrays, metadata, origin, strict)
        if quantized:
            self._placeholders = weights.Placeholders(self)
        arrays.clear()
        computed = () if lazy else matched.values()
        with ops.compiling_for(computed, self.config.head_width):
            # one by one, what was read is freed as soon as it is stored as the device reads it
            for array in computed:
                mx.eval(array)
        super().update(tree_unflatten(list(matched.items())), strict=False)
        self._placeholders.given(matched)
        self._origin = weights.Origin.of(metadata)
        if not lazy:
            self._fuse_qkv()

    def set_dtype(self, dtype: mx.Dtype, *arguments: Any, **keywords: Any) -> None:
        """``nn.Module.set_dtype``, computed at once and stored as before."""
        super().set_dtype(dtype, *arguments, **keywords)
        if not self._placeholders.left(self):
            mx.eval(self.parameters())
            weights.arrange(self)
            self._fuse_qkv()

    def apply(self, *arguments: Any, **keywords: Any) -> ContentvecModel:
        """``nn.Module.apply``; what has no weights yet has none afterwards."""
        left = self._placeholders.left(self)
        super().apply(*arguments, **keywords)
        self._placeholders = weights.Placeholders(self, left)
        return self

    def update(self, parameters: dict[str, Any], strict: bool = True) -> ContentvecModel:
        """``nn.Module.update``, computed at once unless a gradient or compile traces it."""
        from mlx.utils import tree_flatten

        given = dict(tree_flatten(parameters))
        ops.is_traced(*given.values())
        super().update(parameters, strict)
        self._placeholders.given(given)
        return self

    def update_modules(self, modules: dict[str, Any], strict: bool = True) -> ContentvecModel:
        """``nn.Module.update_modules``, by which ``nn.quantize`` works, computed at once."""
        super().update_modules(modules, strict)
        if not self._placeholders.left(self):
            mx.eval(self.parameters())
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For ``pickle`` and ``copy``: all but what is prepared of the weights."""
        if device_kind() == "cuda":
            require_no_fork()
        private = {
            name: value
            for name, value in vars(self).items()
            if name not in ("_placeholders", "_preparation")
        }
        left = self._placeholders.left(self)
        return _rebuilt, (_ForkCheck(), type(self), dict(self), private, left)

    def _fuse_qkv(self) -> None:
        if not self._placeholders.left(self):
            fused = weights.fuse_qkv(self)
            if fused is not None:
                self._preparation.keep_fused(self, fused)

    def walk(self, *traceable: mx.array | None) -> MlxHubert | CpuHubert:
        """What computes a forward pass here and now (``mlx_contentvec.ops``).

        traceable: the inputs that a gradient or ``mx.compile`` may be tracing

        Raises WeightsError while weights are missing, BackendError in a fork of a
        process that has computed.
        """
        require_no_fork()
        self._placeholders.require_none(self)
        return self._preparation.walk(self, *traceable)

    # ---- the forward pass ---------------------------------------------------

    def __call__(
        self,
        source: Any,
        spk_emb: mx.array | None = None,
        padding_mask: Any | None = None,
        *,
        lengths: Any | None = None,
        output_layer: int | None = None,
        project: bool = False,
        normalized: bool = False,
    ) -> dict[str, mx.array | None]:
        """Content features of a batch of clips.

        source: (batch, samples), 16 kHz mono, floating point, about -1 to 1. Models
            trained on normalised input (``config.normalize``) are given the waveform
            as it is: it is brought to zero mean and unit variance here.
        spk_emb: (batch, speaker_dim), only read by a model with ``encoder_layers_1 > 0``
        padding_mask: (batch, samples), true where padded. This is the original's
            own treatment of batches: the group norm sees the padding, so a padded
            clip gets other features than it gets alone. A model trained on normalised
            input normalises each clip without its padding.
        lengths: (batch,) samples of each clip, the rest of its row being padding
            that must not change anything: each clip gets the features it gets alone.
        output_layer: the layer to return, counted from 1; the last by default
        project: put the result through ``final_proj`` (RVC v1: ``output_layer=9,
            project=True``)
        normalized: the waveform has been normalised by the caller, and is used as it is
            also by a model trained on normalised input

        returns: ``x``, (batch, frames, 768) or the projection's width, and
            ``padding_mask``, (batch, frames) or None

        Raises AudioError for a clip that is too short, of the wrong rank or type,
        or holds NaN; ConfigError for a layer that is not there; WeightsError
        while no weights are loaded.
        Source: fairseq/models/hubert/hubert.py, ``HubertModel.forward``.
        """
        layers = len(self.encoder.layers)
        if output_layer is not None:
            require_layer(output_layer, layers)
        if project and self.config.final_dim is None:
            raise ConfigError(
                "this model has no final_proj",
                hint="RVC v1 features need a checkpoint that kept it; v2 features do not",
            )
        walk, waveform, conditions = self._prepare(
            source, spk_emb, padding_mask, lengths, normalized
        )
        chain = [name for name in stage_names(self.config) if name != "final_proj"]
        if output_layer is not None:
            chain = chain[: chain.index(f"layer.{output_layer}") + 1]
        if project:
            chain.append("final_proj")
        stages = dict(walk.stages(**conditions))
        x = walk.waveform(waveform)
        frames = self.config.frames(waveform.shape[1])
        if isinstance(walk, CpuHubert) and (step := front_end_step(frames)) < frames:
            counts = None if conditions["lengths"] is None else conditions["lengths"].tolist()
            x = front_end(walk, self.config, x, step, lengths=counts)
            chain = chain[chain.index("positional") :]
        waits = ops.waits_between_stages(waveform.size, self.layer_norm.weight.dtype)
        pipeline = ops.Pipeline(waits)
        for position, name in enumerate(chain):
            x = stages[name](x)
            if isinstance(walk, MlxHubert) and (waits or position % 2):
                pipeline.add(x)
        return {"x": mx.array(x), "padding_mask": conditions["padding"]}

    def _prepare(
        self,
        source: Any,
        spk_emb: Any | None,
        padding_mask: Any | None,
        lengths: Any | None,
        normalized: bool,
    ) -> tuple[MlxHubert | CpuHubert, mx.array, dict[str, mx.array | None]]:
        """What computes, the waveform it is given, and the conditions of its stages."""
        require_no_fork()  # before anything is computed of what was given
        config = self.config
        waveform = inputs.check_waveform(source, config)
        speaker = inputs.check_speaker(spk_emb, waveform, config)
        walk = self.walk(waveform, speaker)
        if lengths is not None:
            if padding_mask is not None:
                raise ConfigError("give padding_mask or lengths, not both")
            lengths = inputs.check_lengths(lengths, waveform, config)
        if padding_mask is not None:
            padding_mask = inputs.check_padding_mask(padding_mask, waveform)
        padding = inputs.padded_frames(waveform, config, padding_mask, lengths)
        if config.normalize and not normalized:
            counts = lengths if padding_mask is None else inputs.unpadded_lengths(padding_mask)
            waveform = inputs.normalize_waveform(waveform, config.normalize_eps, counts)
        return walk, waveform, {"padding": padding, "lengths": lengths, "speaker": speaker}

    def extract_features(
        self,
        source: Any,
        padding_mask: Any | None = None,
        output_layer: int | None = None,
        spk_emb: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """fairseq's own call, as RVC makes it: features and their padding mask."""
        result = self(source, spk_emb, padding_mask, output_layer=output_layer)
        return result["x"], result["padding_mask"]

    #: a clip of any length, and many clips in batches
    extract = features.extract
    extract_many = features.extract_many
    #: features of sound as it arrives
    live = live.live

    # ---- stages -------------------------------------------------------------

    def stage_outputs(
        self,
        source: Any,
        *,
        names: Collection[str] | None = None,
        padding_mask: Any | None = None,
        spk_emb: mx.array | None = None,
        normalized: bool = False,
    ) -> dict[str, mx.array]:
        """Outputs of stages for ``source``, by name and in order (``config.stage_names``).

        names: the stages wanted; all by default. Others are not kept, and what comes
            behind the last of them is not computed.

        The other arguments are those of a call. Raises ConfigError for a stage that is
        not there.
        """
        known = stage_names(self.config)
        wanted = set(known if names is None else names)
        if unknown := sorted(map(str, wanted - set(known))):
            raise ConfigError(f"no stage {name_list(unknown)}", expected=", ".join(known))
        walk, waveform, conditions = self._prepare(source, spk_emb, padding_mask, None, normalized)
        projected = stage_input(self.config, "final_proj") if "final_proj" in wanted else None
        outputs: dict[str, Any] = {}
        x = to_project = walk.waveform(waveform)
        for name, stage in walk.stages(**conditions):
            if len(outputs) == len(wanted):
                break
            if name == "final_proj":
                x = to_project
            x = stage(x)
            if name in wanted:
                outputs[name] = x
            if name == projected:
                to_project = x
        return {name: mx.array(output) for name, output in outputs.items()}

    def run_stage(
        self,
        name: str,
        x: Any,
        *,
        padding_mask: mx.array | None = None,
        lengths: mx.array | None = None,
        spk_emb: mx.array | None = None,
    ) -> mx.array:
        """One stage by itself.

        x: what the stage before it gave, (batch, frames, channels); for ``conv.0``
           the waveform, (batch, samples), normalised already if the model wants that
        padding_mask: (batch, frames), true where padded
        lengths: (batch,) samples of each clip that count, for ``conv.0`` and ``positional``
        spk_emb: (batch, speaker_dim), for speaker-conditioned layers

        Raises ConfigError if there is no such stage, AudioError for an input that it does
        not read.
        """
        require_no_fork()
        known = stage_names(self.config)
        if name not in known:
            raise ConfigError(f"no stage {name!r}", expected=", ".join(known))
        x = inputs.check_stage_input(name, x, self.config)
        walk = self.walk(x, spk_emb)
        stages = dict(walk.stages(padding=padding_mask, lengths=lengths, speaker=spk_emb))
        return mx.array(stages[name](walk.waveform(x)))
