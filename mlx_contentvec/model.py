"""The model: 16 kHz mono waveforms in, content features out, about 50 frames a second."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from . import cpu, features, first_release, kernels
from .audio import LOUDEST_PEAK
from .backend import device_kind, mx, nn
from .config import ModelConfig, parameter_shapes
from .errors import AudioError, ConfigError, WeightsError, name_list
from .layers import Encoder, FeatureExtractor, Linear, Norm
from .streaming import whole_clip_bytes

Array = Any

#: the layer that RVC v1 projects; v2 takes the last one unprojected
V1_LAYER = 9


class ContentvecModel(nn.Module):
    """ContentVec, or any HuBERT of the same family.

    ``ContentvecModel(encoder_layers_1=0)`` is the model in RVC's ``hubert_base.pt``;
    other shapes are given as a :class:`ModelConfig` or by its fields.
    :meth:`from_file` takes the shape from a converted file.

    Source: fairseq/models/hubert/hubert.py, ``HubertModel``.
    """

    def __init__(self, config: ModelConfig | None = None, **fields: Any) -> None:
        """Build the model without weights; nothing is initialised or computed.

        Raises ConfigError for an unknown field or an impossible combination.
        """
        super().__init__()
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(
                f"unknown model option: {name_list(unknown)}",
                expected=name_list(sorted(known), limit=len(known)),
            )
        self.config = dataclasses.replace(config or ModelConfig(), **fields)
        self.feature_extractor = FeatureExtractor(self.config)
        self.layer_norm = Norm(self.config.conv_layers[-1][0])
        self.post_extract_proj = Linear(
            self.config.conv_layers[-1][0], self.config.encoder_embed_dim
        )
        self.encoder = Encoder(self.config)
        if self.config.final_dim is not None:
            self.final_proj = Linear(self.config.encoder_embed_dim, self.config.final_dim)
        # ids of the arrays that stand where weights belong, until weights are there
        self._placeholders = {id(array): name for name, array in self._flat_parameters()}
        self.eval()

    def _flat_parameters(self) -> list[tuple[str, Array]]:
        from mlx.utils import tree_flatten

        flat: list[tuple[str, Array]] = tree_flatten(self.parameters())
        return flat

    # ---- weights ------------------------------------------------------------

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ContentvecModel:
        """The model that a converted file describes, with its weights.

        Raises WeightsError if the file is not one that this project converted.
        """
        arrays, metadata = _read_safetensors(path)
        if "config" not in metadata:
            raise WeightsError(
                f"{Path(path).name} does not say what model it holds",
                found="safetensors without a 'config' in its metadata",
                expected="a file written by mlx-contentvec convert",
                hint="build the model yourself and call load_weights, or convert again",
            )
        model = cls(_stored_config(path, metadata))
        model._take(arrays, metadata, Path(path).name)
        return model

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder_or_file: str | os.PathLike[str],
        revision: str | None = None,
        dtype: str | None = None,
    ) -> ContentvecModel:
        """The model in a Hugging Face repository, a folder or a file, with its weights.

        A repository is downloaded once; afterwards it comes from the Hub's cache,
        also offline. Files are held to the SHA-256 that the repository states.

        revision: branch, tag or commit of a repository
        dtype: ``float32``, ``float16``, ``bfloat16``, or the name of a quantised
            variant (``q8``); the repository's own variant if it has one, else its
            main weights converted. By default the main weights as they are.

        Raises HubError if there is nothing of that name, or it is not what it
        should be, and WeightsError if the file is not one that this project wrote.
        """
        from .hub import resolve

        name = repo_or_folder_or_file
        path = resolve(name if isinstance(name, str) else Path(name), revision, dtype)
        model = cls.from_file(path)
        wanted = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
        if dtype in wanted:
            model.set_dtype(wanted[dtype])
        return model

    def load_weights(
        self,
        file_or_weights: str | os.PathLike[str] | Iterable[tuple[str, Array]],
        strict: bool = True,
    ) -> ContentvecModel:
        """Take the weights of a converted file, or of (name, array) pairs.

        Strict by default: a missing, surplus or wrongly shaped tensor, or a file
        whose stored configuration differs from this model's, is an error that
        names it, and nothing is loaded. With ``strict=False`` surplus tensors
        are ignored and missing ones keep what is there; shapes are still checked.

        Raises WeightsError.
        """
        if isinstance(file_or_weights, (str, os.PathLike)):
            arrays, metadata = _read_safetensors(file_or_weights)
            self._take(arrays, metadata, Path(file_or_weights).name, strict)
        else:
            self._take(dict(file_or_weights), {}, "the given weights", strict)
        return self

    def _take(
        self, arrays: dict[str, Array], metadata: dict[str, str], origin: str, strict: bool = True
    ) -> None:
        if "config" in metadata:
            self._require_same_config(_stored_config(origin, metadata), origin)
        if "quantization" in metadata:
            self._quantize(json.loads(metadata["quantization"]), arrays)
        headless = False
        if first_release.is_first_release(arrays):
            arrays = first_release.renamed(arrays)
            # that release had no final_proj: there is nothing to wait for
            headless = not first_release.HEAD & arrays.keys()
        expected = {
            name: array
            for name, array in self._flat_parameters()
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
                hint="ContentvecModel.from_file(path) builds the model that a file describes",
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
                hint="ContentvecModel.from_file(path) builds the model that a file describes",
            )
        if headless:
            self.config = dataclasses.replace(self.config, final_dim=None)
            self.pop("final_proj", None)
        taken = [(name, kernels.arrange(arrays[name])) for name in expected if name in arrays]
        super().load_weights(taken, strict=False)
        # a placeholder that is gone may leave its id to an array made later
        self._placeholders = {
            id(array): name
            for name, array in self._flat_parameters()
            if id(array) in self._placeholders
        }
        self._join()

    def _join(self) -> None:
        if not self._placeholders:
            for layer in self.encoder.layers:
                layer.self_attn.join()

    def set_dtype(self, dtype: Any, *arguments: Any, **keywords: Any) -> None:
        """``nn.Module.set_dtype``, keeping the arrangement of the weights."""
        super().set_dtype(dtype, *arguments, **keywords)
        self._join()

    def _require_same_config(self, stored: ModelConfig, origin: str) -> None:
        differing = [
            f"{field.name} {getattr(stored, field.name)!r} (this model: "
            f"{getattr(self.config, field.name)!r})"
            for field in dataclasses.fields(ModelConfig)
            if getattr(stored, field.name) != getattr(self.config, field.name)
        ]
        if differing:
            raise WeightsError(
                f"{origin} holds another model",
                found="; ".join(differing),
                hint="ContentvecModel.from_file(path) builds the model that a file describes",
            )

    def _quantize(self, quantization: dict[str, int], arrays: dict[str, Array]) -> None:
        """Exchange the linear layers that ``arrays`` quantises for ones that still lack weights."""
        nn.quantize(
            self,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            class_predicate=lambda name, module: (
                isinstance(module, Linear) and f"{name}.scales" in arrays
            ),
        )
        self._placeholders = {id(array): name for name, array in self._flat_parameters()}

    def _require_weights(self) -> None:
        if not self._placeholders:
            return
        left = [name for name, array in self._flat_parameters() if id(array) in self._placeholders]
        if left:
            raise WeightsError(
                "the model has no weights yet",
                found=f"{len(left)} parameters never loaded: {name_list(left, limit=3)}",
                hint='model.load_weights("contentvec_base.safetensors")',
            )
        self._placeholders = {}

    # ---- stages -------------------------------------------------------------

    def stage_names(self) -> list[str]:
        """The stages of a forward pass, in order.

        ``conv.0`` to ``conv.6``, ``projection``, ``positional``, ``layer.1`` to
        ``layer.N``, ``final_norm`` (models with norms first), ``final_proj``
        (RVC v1: the projection of layer 9, or of the last one of a shorter model).
        """
        config = self.config
        names = [f"conv.{i}" for i in range(len(config.conv_layers))]
        names += ["projection", "positional"]
        names += [f"layer.{i + 1}" for i in range(len(self.encoder.layers))]
        if config.layer_norm_first:
            names.append("final_norm")
        if config.final_dim is not None:
            names.append("final_proj")
        return names

    def stage_input(self, name: str) -> str | None:
        """The stage whose output ``name`` reads; None for the first, which reads the waveform."""
        names = self.stage_names()
        if name == "final_proj":
            return f"layer.{min(V1_LAYER, len(self.encoder.layers))}"
        index = names.index(name)
        return names[index - 1] if index else None

    def stage_parameters(self, name: str) -> list[str]:
        """The names of the parameters that stage ``name`` reads."""
        kind, _, number = name.partition(".")
        conditioned = self.config.encoder_layers_1 > 0
        prefixes = {
            "conv": [f"feature_extractor.conv_layers.{number}."],
            "projection": ["layer_norm.", "post_extract_proj."],
            "positional": ["encoder.pos_conv_norm.", "encoder.pos_conv."]
            + ([] if self.config.layer_norm_first else ["encoder.layer_norm."]),
            "layer": [f"encoder.layers.{int(number) - 1 if kind == 'layer' else ''}."],
            "final_norm": ["encoder.cond_layer_norm." if conditioned else "encoder.layer_norm."],
            "final_proj": ["final_proj."],
        }[kind]
        return [
            parameter
            for parameter in parameter_shapes(self.config)
            if any(parameter.startswith(prefix) for prefix in prefixes)
        ]

    def run_stage(
        self,
        name: str,
        x: Array,
        *,
        padding_mask: Array | None = None,
        lengths: Array | None = None,
        spk_emb: Array | None = None,
    ) -> Array:
        """One stage by itself.

        x: what the stage before it gave, (batch, frames, channels); for ``conv.0``
           the waveform, (batch, samples), normalised already if the model wants that
        padding_mask: (batch, frames), true where padded
        lengths: (batch,) samples of each clip that count, for ``conv.0`` and ``positional``
        spk_emb: (batch, speaker_dim), for speaker-conditioned layers

        returns: an array of MLX's, or one of numpy's where ``x`` is and the device is a CPU
        """
        given = kernels.prepared(x)
        try:
            y = self._stage(name, given, padding_mask, lengths, spk_emb)
        except kernels.Traced:
            y = self._stage(name, kernels.mlx(given), padding_mask, lengths, spk_emb)
        return y if isinstance(x, np.ndarray) else kernels.mlx(y)

    def _stage(
        self,
        name: str,
        x: Array,
        padding_mask: Array | None,
        lengths: Array | None,
        spk_emb: Array | None,
    ) -> Array:
        kind, _, number = name.partition(".")
        if kind == "conv":
            block = self.feature_extractor.conv_layers[int(number)]
            if int(number) == 0:
                return block(x[..., None], lengths)
            return block(x)
        if kind == "projection":
            return self.post_extract_proj(self.layer_norm(x))
        if kind == "positional":
            return self.encoder.positional(x, padding_mask, exact=lengths is not None)
        if kind == "layer":
            mask = None if padding_mask is None else ~padding_mask[:, None, None, :]
            return self.encoder.layers[int(number) - 1](x, mask, spk_emb)
        if kind == "final_norm":
            if self.config.encoder_layers_1:
                return self.encoder.cond_layer_norm(x, spk_emb)
            return self.encoder.layer_norm(x)
        if kind == "final_proj":
            return self.final_proj(x)
        raise ValueError(f"no stage {name!r}: one of {', '.join(self.stage_names())}")

    def stages(
        self,
        source: Array,
        *,
        padding_mask: Array | None = None,
        spk_emb: Array | None = None,
    ) -> dict[str, Array]:
        """Every stage's output for ``source``, by name and in order."""
        outputs: dict[str, Array] = {}
        self._run(source, spk_emb, padding_mask, None, None, outputs)
        if "final_proj" in self.stage_names():
            given = outputs[self.stage_input("final_proj") or ""]
            outputs["final_proj"] = self.run_stage("final_proj", given)
        return outputs

    # ---- the forward pass ---------------------------------------------------

    def __call__(
        self,
        source: Array,
        spk_emb: Array | None = None,
        padding_mask: Array | None = None,
        *,
        lengths: Array | None = None,
        output_layer: int | None = None,
        project: bool = False,
    ) -> dict[str, Array | None]:
        """Content features of a batch of clips.

        source: (batch, samples), 16 kHz mono, floating point, about -1 to 1. Models
            trained on normalised input (``config.normalize``) are given the waveform
            as it is: it is brought to zero mean and unit variance here.
        spk_emb: (batch, speaker_dim), only for a model with ``encoder_layers_1 > 0``
        padding_mask: (batch, samples), true where padded. This is the original's
            own treatment of batches: the group norm sees the padding, so a padded
            clip gets other features than it gets alone.
        lengths: (batch,) samples of each clip, the rest of its row being padding
            that must not change anything: each clip gets the features it gets alone.
        output_layer: the layer to return, counted from 1; the last by default
        project: put the result through ``final_proj`` (RVC v1: ``output_layer=9,
            project=True``)

        returns: ``x``, (batch, frames, 768) or the projection's width, and
            ``padding_mask``, (batch, frames) or None

        Raises AudioError for a clip that is too short, of the wrong rank or type,
        or holds NaN; ConfigError for a layer that is not there; WeightsError
        while no weights are loaded.
        Source: fairseq/models/hubert/hubert.py, ``HubertModel.forward``.
        """
        if project and self.config.final_dim is None:
            raise ConfigError(
                "this model has no final_proj",
                hint="RVC v1 features need a checkpoint that kept it; v2 features do not",
            )
        x, frame_mask = self._run(source, spk_emb, padding_mask, lengths, output_layer, None)
        if project:
            x = self.run_stage("final_proj", x)
        return {"x": kernels.mlx(x), "padding_mask": frame_mask}

    def extract_features(
        self,
        source: Array,
        padding_mask: Array | None = None,
        output_layer: int | None = None,
        spk_emb: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """fairseq's own call, as RVC makes it: features and their padding mask."""
        result = self(source, spk_emb, padding_mask, output_layer=output_layer)
        return result["x"], result["padding_mask"]

    #: a clip of any length, and many clips in batches
    extract = features.extract
    extract_many = features.extract_many

    def _run(
        self,
        source: Array,
        spk_emb: Array | None,
        padding_mask: Array | None,
        lengths: Array | None,
        output_layer: int | None,
        outputs: dict[str, Array] | None,
    ) -> tuple[Array, Array | None]:
        self._require_weights()
        layers = len(self.encoder.layers)
        if output_layer is not None and not 1 <= output_layer <= layers:
            raise ConfigError(
                f"no layer {output_layer}", expected=f"1 to {layers}, counted from 1 as in fairseq"
            )
        spk_emb = self._speaker(spk_emb, len(source))
        source = self._waveform(source)
        if lengths is not None:
            if padding_mask is not None:
                raise ValueError("give padding_mask or lengths, not both")
            lengths = self._lengths(lengths, source)
        if self.config.normalize:
            source = normalize_waveform(source, lengths)
        last = "final_norm" if output_layer is None else f"layer.{output_layer}"
        frame_mask = previous = None
        x = kernels.prepared(source)
        for name in self.stage_names():
            if name == "final_proj":
                break
            if name == "positional":
                frame_mask = self._frame_mask(x.shape[1], padding_mask, lengths)
            x = self.run_stage(name, x, padding_mask=frame_mask, lengths=lengths, spk_emb=spk_emb)
            if outputs is not None:
                outputs[name] = kernels.mlx(x)
            if name == last:
                break
            if source.size > kernels.PIPELINED_SAMPLES and not isinstance(x, np.ndarray):
                previous = kernels.pipelined(x, previous)
        return x, frame_mask

    def _waveform(self, source: Array) -> Array:
        """``source`` as a float32 array (batch, samples), or an AudioError."""
        if isinstance(source, np.ndarray):
            if source.dtype == np.float64:
                source = source.astype(np.float32)
            source = mx.array(source)
        if not isinstance(source, mx.array):
            raise AudioError(
                "the waveform must be an array",
                found=type(source).__name__,
                expected="mlx.core.array or numpy.ndarray of shape (batch, samples)",
            )
        if source.ndim != 2:
            raise AudioError(
                "the waveform has the wrong rank",
                found=f"shape {tuple(source.shape)}",
                expected="(batch, samples)",
                hint="for one clip: source[None] or source.reshape(1, -1); "
                "stereo must be mixed to mono first",
            )
        if not mx.issubdtype(source.dtype, mx.floating):
            raise AudioError(
                "the waveform is not floating point",
                found=str(source.dtype),
                expected="float32 samples, about -1 to 1",
                hint="int16 samples: source.astype(mx.float32) / 32768",
            )
        batch, samples = source.shape
        if batch < 1:
            raise AudioError("the batch holds no clip")
        if samples < self.config.receptive_field:
            raise AudioError(
                "the clip is too short for a single frame",
                found=f"{samples} samples",
                expected=f"at least {self.config.receptive_field} "
                f"({1000 * self.config.receptive_field / self.config.sample_rate:g} ms)",
            )
        self._require_room(samples, batch)
        source = source.astype(mx.float32)
        try:
            peak = float(mx.abs(source).max())
        except ValueError:  # being traced by mx.compile or a gradient: nothing to look at yet
            return source
        if not np.isfinite(peak):
            raise AudioError(
                "the waveform holds NaN or infinity",
                hint="find the broken samples with numpy.isfinite; one is enough to spoil a clip",
            )
        if peak > LOUDEST_PEAK:
            raise AudioError(
                "the waveform is out of scale",
                found=f"peak {peak:g}",
                expected="float samples, about -1 to 1",
                hint="samples in int16 scale: divide by 32768",
            )
        return source

    def _require_room(self, samples: int, batch: int) -> None:
        """Refuse what cannot fit: on a CPU, MLX crashes when it is given no memory."""
        there = cpu.memory() if device_kind() == "cpu" else None
        needed = whole_clip_bytes(self.config, samples, batch)
        if there is not None and needed > there:
            raise AudioError(
                "this is too long to be computed in one go here",
                found=f"{batch} x {samples / self.config.sample_rate:.0f} s, about "
                f"{needed / 2**30:.0f} GiB",
                expected=f"less than {there / 2**30:.1f} GiB, which is all that there is",
                hint="model.extract(waveform) computes the same features in pieces",
            )

    def _lengths(self, lengths: Array, source: Array) -> Array:
        batch, samples = source.shape
        counts = np.array(lengths)
        if counts.shape != (batch,) or not np.issubdtype(counts.dtype, np.integer):
            raise AudioError(
                "lengths must be one whole number of samples a clip",
                found=f"shape {counts.shape}, {counts.dtype}",
                expected=f"shape ({batch},), integers",
            )
        if counts.min() < self.config.receptive_field or counts.max() > samples:
            raise AudioError(
                "a clip's length is impossible",
                found=f"{counts.min()} to {counts.max()} samples",
                expected=f"{self.config.receptive_field} to {samples}",
            )
        return mx.array(counts.astype(np.int32))

    def _speaker(self, spk_emb: Array | None, batch: int) -> Array | None:
        if not self.config.encoder_layers_1:
            if spk_emb is not None:
                raise ConfigError(
                    "this model takes no speaker embedding",
                    found="spk_emb=",
                    hint="only a full ContentVec (encoder_layers_1=3) has conditioned layers",
                )
            return None
        expected = (batch, self.config.speaker_dim)
        if spk_emb is None or tuple(spk_emb.shape) != expected:
            raise ConfigError(
                "this model needs a speaker embedding",
                found="none" if spk_emb is None else f"shape {tuple(spk_emb.shape)}",
                expected=f"spk_emb= of shape {expected}",
            )
        return spk_emb

    def _frame_mask(
        self, frames: int, padding_mask: Array | None, lengths: Array | None
    ) -> Array | None:
        """Which frames are padding, (batch, frames).

        From a padding mask by the original's rule, which drops what does not
        divide evenly and calls a frame padded if all its samples are: it can
        count one frame more than the clip alone has.
        Source: fairseq/models/hubert/hubert.py, ``forward_padding_mask``.
        """
        if lengths is not None:
            counts = [self.config.frames(int(n)) for n in lengths.tolist()]
            return mx.arange(frames)[None] >= mx.array(counts)[:, None]
        if padding_mask is None:
            return None
        padding_mask = mx.array(padding_mask).astype(mx.bool_)
        if padding_mask.ndim != 2:
            raise AudioError(
                "the padding mask has the wrong rank",
                found=f"shape {tuple(padding_mask.shape)}",
                expected="(batch, samples)",
            )
        batch, samples = padding_mask.shape
        whole = samples - samples % frames
        mask = padding_mask[:, :whole].reshape(batch, frames, -1).all(axis=-1)
        if bool(mask.all(axis=-1).any()):
            raise AudioError("a clip of the batch is nothing but padding")
        return mask


def normalize_waveform(waveform: Array, lengths: Array | None = None) -> Array:
    """Each clip at zero mean and unit variance, as large models were trained.

    waveform: (batch, samples)    lengths: (batch,) samples that count, or None for all
    Source: fairseq/data/audio/raw_audio_dataset.py, ``postprocess``:
    ``F.layer_norm(feats, feats.shape)``, whose epsilon is 1e-5.
    """
    with mx.stream(mx.cpu):
        exact = waveform.astype(mx.float64)
        if lengths is None:
            inside, count = None, mx.array(waveform.shape[1], mx.float64)
        else:
            inside = mx.arange(waveform.shape[1])[None] < lengths[:, None]
            exact = mx.where(inside, exact, mx.array(0.0, mx.float64))
            count = lengths[:, None].astype(mx.float64)
        centred = exact - exact.sum(axis=1, keepdims=True) / count
        if inside is not None:
            centred = mx.where(inside, centred, mx.array(0.0, mx.float64))
        variance = (centred * centred).sum(axis=1, keepdims=True) / count
        return (centred / mx.sqrt(variance + kernels.EPS)).astype(mx.float32)


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays (lazy) and the metadata of a safetensors file."""
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


def _stored_config(path: str | os.PathLike[str], metadata: dict[str, str]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(json.loads(metadata["config"]))
    except (TypeError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"the configuration stored in {Path(path).name} cannot be read", found=str(error)
        ) from error
