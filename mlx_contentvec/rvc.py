"""In the place of RVC's embedder: the same calls, answered by the MLX model.

RVC and the programs around it ask their embedder in one of two ways. Until
July 2026 RVC, and its forks still, load fairseq's model::

    logits = model.extract_features(source=feats, padding_mask=mask, output_layer=9)
    feats = model.final_proj(logits[0])          # version v1; v2 takes layer 12 as it is

RVC since then, Applio, rvc-next and others load transformers' model::

    outputs = model(input_values=feats, attention_mask=None, output_hidden_states=True)
    feats = model.final_proj(outputs.hidden_states[9])     # v1; v2: .last_hidden_state

:class:`Hubert` answers both for torch tensors, numpy arrays and MLX arrays,
each with its own kind, type and device::

    from mlx_contentvec.rvc import Hubert

    model = Hubert.load("contentvec_base.safetensors")

docs/clients.md shows what to change in each program. For the training folders
of RVC there is ``mlx-contentvec extract --rvc``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .audio import as_float32, as_waveform, require_unmasked
from .backend import mx
from .config import ModelConfig
from .errors import AudioError, ConfigError
from .features import FeatureKind, features_of
from .memory import bounded
from .ops.host_copy import to_numpy

if TYPE_CHECKING:
    from .model import ContentvecModel

Array = Any
NumpyArray = np.ndarray[Any, Any]


class Hubert:
    """A :class:`ContentvecModel` behind the calls of fairseq's and transformers' ``HubertModel``.

    model:      the model that answers
    max_memory: bytes beside the model that a clip may take, see ``features.extract``; on a
                GPU the buffers that MLX keeps for a batch or for hidden states as well

    The waveform is used as it is given. Neither original normalises it: a client
    of a model that wants normalised input (``config.do_normalize``) has done so.
    """

    #: there is no dropout, and nothing to turn off
    training = False

    def __init__(self, model: ContentvecModel, *, max_memory: int | None = None) -> None:
        self.model = model
        self.max_memory = max_memory
        self._device: Any = None
        self._dtype: Any = None

    @classmethod
    def load(cls, weights: str | Path, *, max_memory: int | None = None) -> Hubert:
        """From a converted file, a folder that holds one, or a repository on the Hub.

        Raises HubError or WeightsError.
        """
        from .hub import resolve
        from .model import ContentvecModel

        return cls(ContentvecModel.from_file(resolve(weights)), max_memory=max_memory)

    # ---- fairseq's calls ----------------------------------------------------

    def extract_features(
        self,
        source: Array,
        padding_mask: Array | None = None,
        mask: bool = False,
        ret_conv: bool = False,
        output_layer: int | None = None,
    ) -> tuple[Array, Array | None]:
        """Features of one layer and the padding mask of the frames.

        source:       (batch, samples), 16 kHz mono, about -1 to 1, any float type
        padding_mask: (batch, samples), true (or 1) where padded, or None
        mask, ret_conv: False; masking is for training, the output of the
                      convolutions is ``model.stage_outputs(source)["projection"]``
        output_layer: counted from 1; the last by default
        returns:      (batch, frames, width), and (batch, frames), true where
                      padded, or None where no mask was given

        A frame is padded if all of its samples are, as fairseq counts: that can
        be one frame more than the clip alone has. A single clip may be of any
        length: a long one is streamed.
        Raises AudioError for a waveform or a mask that cannot be used,
        ConfigError for a layer that is not there.
        Source: fairseq/models/hubert/hubert.py, ``HubertModel.extract_features``.
        """
        if mask or ret_conv:
            raise ConfigError(
                "only features of whole layers are computed here",
                found=f"mask={mask!r}" if mask else f"ret_conv={ret_conv!r}",
                expected="mask=False, ret_conv=False",
                hint="give the layer by name: output_layer=12",
            )
        waveforms = _numpy(source, "source")
        if padding_mask is None:
            return _like(source, self._features(waveforms, output_layer, None)[0]), None
        padded = _checked_mask(padding_mask, "padding_mask", waveforms) != 0
        x, frame_mask = self._features(waveforms, output_layer, padded if padded.any() else None)
        if frame_mask is None:
            frame_mask = np.zeros(x.shape[:2], bool)
        return _like(source, x), _like_mask(padding_mask, frame_mask)

    def final_proj(self, x: Array) -> Array:
        """The projection that RVC v1 applies to layer 9: (..., width) to (..., 256).

        Raises ConfigError if the model has none, or for features of another width.
        """
        config = self.model.config
        features = _numpy(x, "the features")
        if config.final_dim is None:
            raise ConfigError(
                "this model has no final_proj",
                hint="RVC v1 features need a checkpoint that kept it; v2 features do not",
            )
        width = config.encoder_embed_dim
        if features.ndim < 2 or features.shape[-1] != width or features.dtype.kind != "f":
            raise ConfigError(
                "final_proj cannot read these features",
                found=f"shape {features.shape}, {features.dtype}",
                expected=f"(batch, frames, {width}), floating point",
            )
        shape = (*features.shape[:-1], config.final_dim)
        if not features.size:  # a linear layer of torch gives no frames for none
            return _like(x, np.zeros(shape, np.float32))
        projected = self.model.run_stage("final_proj", features.reshape(1, -1, width))
        return _like(x, projected.reshape(shape))

    # ---- transformers' calls ------------------------------------------------

    def __call__(
        self,
        input_values: Array,
        attention_mask: Array | None = None,
        mask_time_indices: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HubertOutput | tuple[Any, ...]:
        """Features of the last layer, or of all of them.

        input_values:   (batch, samples), 16 kHz mono, about -1 to 1, any float type
        attention_mask: (batch, samples), 1 (or true) for samples and 0 for the
                        padding that follows them, or None
        output_hidden_states: also give ``hidden_states``: what the first layer
                        reads, then the output of each layer, so that
                        ``hidden_states[9]`` is fairseq's layer 9. All come from
                        one pass, and are in memory together.
        return_dict:    False for a plain tuple

        ``last_hidden_state`` is the output of the last layer, behind the final
        norm of a model that has one; ``hidden_states`` stand before it, as in
        transformers 5 (transformers 4 gave the last of them behind the norm).

        A frame is padded if it would not be there without the padding: each clip
        has as many as it has alone. That can be one less than fairseq counts.
        A single clip without hidden states may be of any length.
        Raises AudioError for a waveform or a mask that cannot be used,
        ConfigError for outputs that are not computed here.
        Source: transformers/models/hubert/modeling_hubert.py, ``HubertModel.forward``.
        """
        if output_attentions or mask_time_indices is not None:
            raise ConfigError(
                "attentions are not given and frames are not masked here"
                " (output_attentions, mask_time_indices)",
                hint="leave them out; features need neither",
            )
        waveforms = _numpy(input_values, "input_values")
        padded = None
        if attention_mask is not None:
            checked = _checked_mask(attention_mask, "attention_mask", waveforms)
            padded = _padding_of_frames(checked != 0, self.model.config)
        output = HubertOutput()
        if output_hidden_states:
            config = self.model.config
            hidden = ("positional", *(f"layer.{i + 1}" for i in range(config.encoder_layers)))
            last = "final_norm" if config.layer_norm_first else hidden[-1]
            with bounded(self.max_memory):
                stages = self.model.stage_outputs(
                    waveforms,
                    names={*hidden, last},
                    padding_mask=padded,
                    normalized=True,
                )
                mx.eval(stages)
            output["last_hidden_state"] = _like(input_values, stages[last])
            output["hidden_states"] = tuple(_like(input_values, stages[name]) for name in hidden)
        else:
            x, _ = self._features(waveforms, None, padded)
            output["last_hidden_state"] = _like(input_values, x)
        return output.to_tuple() if return_dict is False else output

    @property
    def config(self) -> SimpleNamespace:
        """The fields of transformers' ``HubertConfig`` that say what this model is.

        ``do_normalize`` and ``sampling_rate`` are those of its feature extractor.
        """
        config = self.model.config
        channels, kernels, strides = zip(*config.conv_layers, strict=True)
        return SimpleNamespace(
            model_type="hubert",
            hidden_size=config.encoder_embed_dim,
            num_hidden_layers=config.encoder_layers,
            num_attention_heads=config.encoder_attention_heads,
            intermediate_size=config.encoder_ffn_embed_dim,
            classifier_proj_size=config.final_dim,
            conv_dim=channels,
            conv_kernel=kernels,
            conv_stride=strides,
            conv_bias=config.conv_bias,
            num_feat_extract_layers=len(channels),
            feat_extract_norm=config.extractor_norm,
            do_stable_layer_norm=config.layer_norm_first,
            num_conv_pos_embeddings=config.conv_pos,
            num_conv_pos_embedding_groups=config.conv_pos_groups,
            conv_pos_batch_norm=config.conv_pos_batch_norm,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            output_hidden_states=False,
            return_dict=True,
            do_normalize=config.normalize,
            sampling_rate=config.sample_rate,
        )

    # ---- torch.nn.Module's calls --------------------------------------------

    @property
    def device(self) -> Any:
        """Where ``to`` last put the model, "cpu" before; answers are where their input is."""
        torch = _torch()
        if torch is None:
            return "cpu"
        return torch.device("cpu") if self._device is None else self._device

    @property
    def dtype(self) -> Any:
        """The type that ``to``, ``half`` or ``float`` last named; answers have that of the input.

        It does not change the model, which computes in the type of its weights.
        """
        torch = _torch()
        if torch is None:
            return mx.float32
        return torch.float32 if self._dtype is None else self._dtype

    def to(self, *arguments: Any, **keywords: Any) -> Hubert:
        """Note a device or a type for ``device``, ``dtype`` and ``parameters``; nothing moves.

        MLX has a device of its own, and computes in the type of the weights.
        """
        torch = _torch()
        for value in (*arguments, *keywords.values()) if torch is not None else ():
            if isinstance(value, torch.dtype):
                self._dtype = value
            elif isinstance(value, (str, torch.device)):
                self._device = torch.device(value)
            elif isinstance(value, torch.Tensor):
                self._device, self._dtype = value.device, value.dtype
        return self

    def half(self) -> Hubert:
        """See :meth:`to`."""
        torch = _torch()
        return self if torch is None else self.to(torch.float16)

    def float(self) -> Hubert:
        """See :meth:`to`."""
        torch = _torch()
        return self if torch is None else self.to(torch.float32)

    def cpu(self) -> Hubert:
        """See :meth:`to`."""
        return self.to("cpu")

    def cuda(self, device: int | str | None = None) -> Hubert:
        """See :meth:`to`."""
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def eval(self) -> Hubert:
        """Nothing to do: the model only ever evaluates."""
        return self

    def train(self, mode: bool = True) -> Hubert:
        """Nothing to do for ``train(False)``. Raises ConfigError for ``train()``."""
        if mode:
            raise ConfigError(
                "this embedder does not train",
                hint="gradients flow through the ContentvecModel in its attribute `model`",
            )
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Hubert:
        """Nothing to do for ``requires_grad_(False)``. Raises ConfigError for True."""
        return self.train(requires_grad)

    def parameters(self) -> Iterator[Array]:
        """The weights: copies as torch tensors where torch is imported, else MLX arrays."""
        from mlx.utils import tree_flatten

        torch = _torch()
        for _, array in tree_flatten(self.model.parameters()):
            if torch is None:
                yield array
                continue
            tensor = torch.from_numpy(np.array(_numpy(array, "a weight")))
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            yield tensor.to(self.device, dtype)

    # ---- the model ----------------------------------------------------------

    def _features(
        self, waveforms: NumpyArray, layer: int | None, padded: NumpyArray | None
    ) -> tuple[Array, Array | None]:
        """Features of ``layer``, None for the model's output, and the frames' padding mask."""
        config = self.model.config
        single = waveforms.ndim == 2 and len(waveforms) == 1 and waveforms.dtype.kind == "f"
        if single and padded is None:
            kind = FeatureKind(config.encoder_layers if layer is None else layer)
            kind.check(config)
            clip = as_waveform(
                waveforms[0],
                config.sample_rate,
                sample_rate=config.sample_rate,
                min_samples=config.receptive_field,
            )
            x: Array = features_of(self.model, clip, kind, self.max_memory, normalized=True)[None]
            if layer is None and config.layer_norm_first:
                x = self.model.run_stage("final_norm", x)
            return x, None
        with bounded(self.max_memory):
            result = self.model(waveforms, padding_mask=padded, output_layer=layer, normalized=True)
            mx.eval(result)
        return result["x"], result["padding_mask"]


class HubertOutput(dict[str, Any]):
    """What a call gives, to be read as transformers' ``BaseModelOutput`` is.

    By attribute (``output.last_hidden_state``), by name
    (``output["last_hidden_state"]``) or by position (``output[0]``). A field that
    was not asked for is None as an attribute and absent otherwise.
    """

    FIELDS = ("last_hidden_state", "hidden_states", "attentions")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self.FIELDS:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}: {', '.join(self.FIELDS)}")

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in the order of ``FIELDS``."""
        return tuple(self.values())


# masks --------------------------------------------------------------------------


def _checked_mask(mask: Array, name: str, waveforms: NumpyArray) -> NumpyArray:
    """A mask as numpy, held to the waveforms it belongs to. Raises AudioError."""
    values = _numpy(mask, name)
    if values.shape != waveforms.shape:
        raise AudioError(
            f"{name} does not belong to this waveform",
            found=f"shape {values.shape}",
            expected=f"one value a sample, {waveforms.shape}",
        )
    if not ((values == 0) | (values == 1)).all():
        raise AudioError(
            f"{name} holds other values than 0 and 1",
            found=f"{values.min()} to {values.max()}, {values.dtype}",
            expected="true and false, or 0 and 1",
        )
    return values


def _padding_of_frames(kept: NumpyArray, config: ModelConfig) -> NumpyArray | None:
    """transformers' rule, as a mask of samples that gives the same frames by fairseq's rule.

    kept:    (batch, samples), true for samples, false for the padding behind them
    returns: (batch, samples), true where padded, or None where no frame is padded

    transformers keeps as many frames as the clip has alone. It only counts: a
    hole or padding in front would leave out frames of the clip at its end, and
    a clip without a frame would keep all of them. Raises AudioError for these.
    Source: modeling_hubert.py, ``_get_feature_vector_attention_mask``.
    """
    if kept.ndim != 2:
        return None  # the model says what is wrong with the waveform
    batch, samples = kept.shape
    lengths = kept.sum(axis=1)
    if (kept != (np.arange(samples) < lengths[:, None])).any():
        raise AudioError(
            "attention_mask has zeros before or between samples",
            expected="1 for the samples of a clip, then 0 for the padding behind them",
            hint="transformers counts the ones and would take these frames for others; pad on\n"
            'the right: Wav2Vec2FeatureExtractor(padding_side="right")',
        )
    if batch and lengths.min() < config.receptive_field:
        raise AudioError(
            "a clip of the batch is too short for a single frame",
            found=f"{lengths.min()} samples that attention_mask keeps",
            expected=f"at least {config.receptive_field}",
        )
    frames = config.frames(samples)
    counts = np.array([config.frames(int(length)) for length in lengths])
    if (counts == frames).all():
        return None
    # fairseq's rule gives each frame an equal share of the samples, and drops the rest
    share = samples // frames
    padded = np.ones((batch, samples), bool)
    padded[:, : frames * share] = np.repeat(np.arange(frames) >= counts[:, None], share, axis=1)
    return padded


# kinds of arrays ----------------------------------------------------------------


def _torch() -> Any:
    """torch, if whoever calls has imported it; a tensor cannot be there without."""
    return sys.modules.get("torch")


def _is_torch(x: Array) -> bool:
    torch = _torch()
    return torch is not None and isinstance(x, torch.Tensor)


def _numpy(x: Array, name: str) -> NumpyArray:
    """A torch tensor, an MLX array or a numpy array as numpy; floats as float32.

    Raises AudioError for anything else, and for what holds no numbers that can be read.
    """
    expected = "a torch tensor, an MLX array or a numpy array, of numbers"
    if _is_torch(x):
        try:
            x = x.detach().cpu()
            array = np.asarray(x.float() if x.is_floating_point() else x)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise AudioError(
                f"{name} cannot be read as an array",
                found=f"a tensor of {x.layout} on {x.device}: {str(error)[:200]}",
                expected="a dense tensor on a device that holds its values",
            ) from error
    elif isinstance(x, mx.array):
        x = x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
        array = to_numpy(x, copy=False)
    elif isinstance(x, np.ndarray):
        require_unmasked(x, name)
        array = np.asarray(x)
    else:
        raise AudioError(f"{name} must be an array", found=type(x).__name__, expected=expected)
    if array.dtype.kind not in "biuf":
        raise AudioError(
            f"{name} must be an array", found=f"values of {array.dtype}", expected=expected
        )
    return as_float32(array) if array.dtype.kind == "f" else array


def _like(original: Array, x: Array) -> Array:
    """``x``, an MLX or numpy array, as the kind, type and device of ``original``."""
    if isinstance(original, mx.array):
        return mx.array(x).astype(original.dtype)
    if _is_torch(original):
        return _torch().from_numpy(_numpy(x, "x")).to(original.device, original.dtype)
    return _numpy(x, "x").astype(original.dtype)


def _like_mask(original: Array, mask: Array) -> Array:
    """``mask`` as the kind and on the device of ``original``, true and false as fairseq's."""
    if isinstance(original, mx.array):
        return mx.array(mask)
    array = np.array(mask)
    return _torch().from_numpy(array).to(original.device) if _is_torch(original) else array
