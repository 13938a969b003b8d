"""In RVC's place for ``hubert_base.pt``: the same calls, answered by the MLX model.

RVC's pipeline loads a fairseq model and asks it twice (infer/modules/vc/
pipeline.py, ``Pipeline.vc``)::

    logits = model.extract_features(source=feats, padding_mask=mask, output_layer=9)
    feats = model.final_proj(logits[0])          # version v1; v2 takes layer 12 as it is

:class:`Hubert` answers these calls for torch tensors, numpy arrays and MLX
arrays, each with its own kind. In an RVC on torch, ``load_hubert`` (infer/
modules/vc/utils.py) becomes::

    from mlx_contentvec.rvc import Hubert

    def load_hubert(config):
        return Hubert.load("assets/hubert/contentvec_base.safetensors")

and nothing else changes: the embedder runs on MLX, the rest on torch. A port of
RVC to MLX passes its arrays and gets arrays back::

    hubert = Hubert.load("contentvec_base.safetensors")
    feats, _ = hubert.extract_features(source=audio.reshape(1, -1), output_layer=12)

For RVC's training folders there is ``mlx-contentvec extract --rvc``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .audio import as_waveform
from .backend import mx
from .features import FeatureKind, features_of

if TYPE_CHECKING:
    from .model import ContentvecModel

Array = Any


class Hubert:
    """A :class:`ContentvecModel` behind the calls that RVC makes of fairseq's model.

    model:      the model that answers
    max_memory: bytes beside the model that a clip may take, see ``features.extract``
    """

    def __init__(self, model: ContentvecModel, *, max_memory: int | None = None) -> None:
        self.model = model
        self.max_memory = max_memory

    @classmethod
    def load(cls, weights: str | Path, *, max_memory: int | None = None) -> Hubert:
        """From a converted file, a folder that holds one, or a repository on the Hub.

        Raises HubError or WeightsError.
        """
        from .hub import resolve
        from .model import ContentvecModel

        return cls(ContentvecModel.from_file(resolve(weights)), max_memory=max_memory)

    def extract_features(
        self, source: Array, padding_mask: Array | None = None, output_layer: int | None = None
    ) -> tuple[Array, Array | None]:
        """fairseq's call: features and the frames' padding mask.

        source:       (batch, samples), 16 kHz mono, about -1 to 1, any float type
        padding_mask: (batch, samples), true where padded, or None
        output_layer: counted from 1; the last by default
        returns:      (batch, frames, width) of the kind and type of ``source``, and
                      (batch, frames) or, where nothing is padded, ``None``

        A single clip may be of any length: a long one is streamed.
        Raises AudioError, ConfigError as the model does.
        Source: fairseq/models/hubert/hubert.py, ``HubertModel.extract_features``.
        """
        waveforms = _numpy(source)
        padded = padding_mask is not None and bool(_numpy(padding_mask).any())
        config = self.model.config
        if len(waveforms) == 1 and not padded and output_layer is not None:
            kind = FeatureKind(output_layer)
            kind.check(config)
            clip = as_waveform(
                waveforms[0],
                config.sample_rate,
                sample_rate=config.sample_rate,
                min_samples=config.receptive_field,
            )
            return _like(source, features_of(self.model, clip, kind, self.max_memory)[None]), None
        mask = mx.array(_numpy(padding_mask)) if padded else None
        x, frame_mask = self.model.extract_features(
            mx.array(waveforms), padding_mask=mask, output_layer=output_layer
        )
        if frame_mask is None:
            return _like(source, x), None
        return _like(source, x), _like(padding_mask, frame_mask)

    def final_proj(self, x: Array) -> Array:
        """RVC v1's projection: (batch, frames, width) to (batch, frames, 256)."""
        return _like(x, self.model.final_proj(mx.array(_numpy(x))))

    def to(self, *_: Any, **__: Any) -> Hubert:
        """Nothing to do, as for :meth:`half`, :meth:`float` and :meth:`eval`.

        RVC moves and casts fairseq's model; MLX has its own device, and the type
        is that of the weights.
        """
        return self

    half = float = eval = to


def _numpy(x: Array) -> np.ndarray[Any, Any]:
    """A torch tensor, an MLX array or a numpy array as numpy; floats as float32."""
    if _is_torch(x):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    elif isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating):
        x = x.astype(mx.float32)
    array = np.asarray(x)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _like(original: Array, x: Array) -> Array:
    """``x``, an MLX or numpy array, as the kind, type and device of ``original``."""
    if isinstance(original, mx.array):
        return mx.array(x).astype(original.dtype)
    if _is_torch(original):
        import torch

        return torch.from_numpy(_numpy(x)).to(original.device, original.dtype)
    return _numpy(x).astype(original.dtype)


def _is_torch(x: Array) -> bool:
    # without importing torch: a tensor's module has been imported by whoever made it
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)
