"""A PyTorch model as a reference: its own forward pass, watched; and its float64 copy."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig, stage_input, stage_names

from ..inputs import Clip
from .truth import make_copyable, true_double

Tensor = Any


def first_line(error: BaseException) -> str:
    """The beginning of what another library says of an error; it may say nothing."""
    return next(iter(str(error).splitlines()), "")[:200]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter of imports and loaders off the terminal.

    fairseq turns the root logger's level down and gives it a handler as it is
    imported; both are put back, or every other package would chatter from then on.
    """
    root = logging.root
    previous, level, handlers = root.manager.disable, root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(previous)
            root.setLevel(level)
            root.handlers[:] = handlers


class TorchOriginal:
    """What fairseq's and transformers' models have in common.

    A subclass says how its forward pass is called, where each stage can be
    watched, and how one stage is run by itself.
    """

    name: str
    naming: str

    def __init__(self, model: Any, config: ModelConfig, versions: dict[str, str]) -> None:
        self.config = config
        self.versions = versions
        self._model = model.float().eval().requires_grad_(False)
        self._exact: Any = None

    # ---- what a subclass says --------------------------------------------------

    def _forward(self, model: Any, source: Tensor, mask: Tensor | None) -> None:
        """The original's own forward pass through its last layer."""
        raise NotImplementedError

    def _normalized(self, waveforms: Tensor, padding_mask: NDArray[np.bool_] | None) -> Tensor:
        """Each clip at zero mean and unit variance, then padded with zeros.

        waveforms: (batch, samples), float32 or float64
        padding_mask: true for the padding behind a clip
        """
        raise NotImplementedError

    def _projection(self, model: Any) -> Any:
        """The module that ends the projection stage."""
        raise NotImplementedError

    def _project(self, model: Any, x: Tensor) -> Tensor:
        """The projection stage by itself."""
        raise NotImplementedError

    def _positional(self, model: Any, x: Tensor) -> Tensor:
        """The positional convolution and its activation, (batch, frames, channels)."""
        raise NotImplementedError

    def _layer(self, layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """One encoder layer, (batch, frames, channels) in and out."""
        raise NotImplementedError

    def _batch_first(self, hidden: Any) -> Tensor:
        """What an encoder layer takes or returns, as (batch, frames, channels)."""
        raise NotImplementedError

    # ---- the interface ------------------------------------------------------------

    def model_input(self, clip: Clip) -> NDArray[np.float32]:
        """The waveform as the float32 model is given it, normalised if it was trained so."""
        import torch

        source = torch.from_numpy(clip.waveform)
        if self.config.normalize:
            source = self._normalized(source, clip.padding_mask)
        given: NDArray[np.float32] = source.numpy()
        return given

    def frame_mask(self, clip: Clip) -> NDArray[np.bool_] | None:
        """The original's own padding mask over frames, (batch, frames)."""
        return frame_mask(clip.padding_mask, self.config)

    def stages(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Every stage in float32, from the audio."""
        return self.stages_of(self._model, clip)

    def truth(self, clip: Clip) -> dict[str, NDArray[np.float64]]:
        """Every stage in true float64, from the audio."""
        return self.stages_of(self._double(), clip)

    def local_truth(
        self, clip: Clip, stage: str, stage_input: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """One stage in true float64 on a float32 input."""
        return self.run_stage_of(self._double(), clip, stage, stage_input)

    def copy_to(self, device: str, dtype: str) -> Any:
        """The PyTorch model on another device ("cuda") or in another dtype ("float16")."""
        import torch

        make_copyable(self._model)
        model = copy.deepcopy(self._model).to(device, getattr(torch, dtype))
        if device == "cpu" and dtype != "float32":
            _add_up_in_float32(model)
        return model

    def run_stage_of(
        self, model: Any, clip: Clip, stage: str, stage_input: NDArray[Any]
    ) -> NDArray[Any]:
        """One stage of a copy of the model by itself."""
        import torch

        some = next(model.parameters())
        mask = self.frame_mask(clip)
        with torch.no_grad():
            result = self._run(
                model,
                stage,
                torch.from_numpy(stage_input).to(some.device, some.dtype),
                None if mask is None else torch.from_numpy(mask).to(some.device),
            )
        return _to_numpy(result)

    def tensors(self) -> tuple[str, Mapping[str, NDArray[Any]]]:
        """Every tensor of the loaded model under its own name."""
        return self.naming, {k: v.numpy() for k, v in self._model.state_dict().items()}

    # ---- how ----------------------------------------------------------------------

    def _double(self) -> Any:
        if self._exact is None:
            self._exact = true_double(self._model)
        return self._exact

    def _watch(self, model: Any, keep: Callable[[str, Tensor], None]) -> list[Any]:
        """Hooks that give ``keep`` each stage's output as (batch, frames, channels)."""
        encoder = model.encoder
        hooks = [
            block.register_forward_hook(
                lambda _, __, x, stage=f"conv.{i}": keep(stage, x.transpose(1, 2))
            )
            for i, block in enumerate(model.feature_extractor.conv_layers)
        ]
        hooks.append(
            self._projection(model).register_forward_hook(lambda _, __, x: keep("projection", x))
        )
        hooks.append(
            encoder.layers[0].register_forward_pre_hook(
                lambda _, inputs: keep("positional", self._batch_first(inputs))
            )
        )
        hooks += [
            layer.register_forward_hook(
                lambda _, __, x, stage=f"layer.{i + 1}": keep(stage, self._batch_first(x))
            )
            for i, layer in enumerate(encoder.layers)
        ]
        if self.config.layer_norm_first:
            hooks.append(
                encoder.layer_norm.register_forward_hook(lambda _, __, x: keep("final_norm", x))
            )
        return hooks

    def _run(self, model: Any, stage: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """One stage by itself, (batch, frames, channels) in and out."""
        kind, _, number = stage.partition(".")
        encoder = model.encoder
        if kind == "conv":
            block = model.feature_extractor.conv_layers[int(number)]
            return block(x[:, None] if int(number) == 0 else x.transpose(1, 2)).transpose(1, 2)
        if kind == "projection":
            return self._project(model, x)
        if kind == "positional":
            if mask is not None:
                x = x.masked_fill(mask[..., None], 0)
            x = x + self._positional(model, x)
            return x if self.config.layer_norm_first else encoder.layer_norm(x)
        if kind == "layer":
            return self._layer(encoder.layers[int(number) - 1], x, mask)
        # not every model has a projection
        return encoder.layer_norm(x) if kind == "final_norm" else model.final_proj(x)

    def stages_of(self, model: Any, clip: Clip) -> dict[str, NDArray[Any]]:
        """Every stage of a copy of the model, from the audio.

        float64 of a float64 model, float32 of any other
        """
        import torch

        kept: dict[str, NDArray[Any]] = {}

        def keep(stage: str, output: Tensor) -> None:
            # both originals zero padded frames in place later on: keep a copy
            kept[stage] = _to_numpy(output.detach().clone())

        some = next(model.parameters())
        source = torch.from_numpy(clip.waveform)
        if some.dtype == torch.float64:
            source = source.double()
        if self.config.normalize:
            source = self._normalized(source, clip.padding_mask)
        source = source.to(some.device, some.dtype)
        mask = None
        if clip.padding_mask is not None:
            mask = torch.from_numpy(clip.padding_mask).to(some.device)
        hooks = self._watch(model, keep)
        try:
            with torch.no_grad():
                self._forward(model, source, mask)
        finally:
            for hook in hooks:
                hook.remove()
        names = stage_names(self.config)
        frames = kept["projection"].shape[1]
        for stage in names:
            if stage == "final_proj":
                before = kept[stage_input(self.config, stage) or ""]
                kept[stage] = self.run_stage_of(model, clip, stage, before)
            elif kept[stage].shape[1] > frames and not stage.startswith("conv."):
                # fairseq rounds the number of frames up to an even one inside its encoder
                kept[stage] = kept[stage][:, :frames]
        return {stage: np.ascontiguousarray(kept[stage]) for stage in names}


def _to_numpy(x: Tensor) -> NDArray[Any]:
    """float64 as it is, any other dtype as float32."""
    import torch

    array: NDArray[Any] = (x if x.dtype == torch.float64 else x.float()).cpu().numpy()
    return array


def without_padding(waveforms: Tensor, padding_mask: NDArray[np.bool_] | None) -> list[Tensor]:
    """The clips of a batch, (samples,) each, of what stands in front of their padding."""
    if padding_mask is None:
        return list(waveforms)
    counts = (~padding_mask).sum(axis=1)
    return [row[: int(count)] for row, count in zip(waveforms, counts, strict=True)]


def _add_up_in_float32(model: Any) -> None:
    """Let a half-precision model's convolutions add in float32 and round their result.

    That is how a GPU does it. The CPU's own half-precision convolution takes twenty times
    as long, and its error is no smaller.
    """
    from torch import nn

    def rounded(own: Callable[..., Tensor], x: Tensor, *parameters: Tensor | None) -> Tensor:
        wide = (None if parameter is None else parameter.float() for parameter in parameters)
        return own(x.float(), *wide).to(x.dtype)

    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            module._conv_forward = functools.partial(rounded, module._conv_forward)


def valid_frames(stage: str, mask: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Which frames of a stage are compared, (batch, frames); None for all.

    The convolutions and the projection know nothing of the padding.
    """
    return None if mask is None or stage.startswith("conv.") or stage == "projection" else ~mask


def frame_mask(
    padding_mask: NDArray[np.bool_] | None, config: ModelConfig
) -> NDArray[np.bool_] | None:
    """Which frames count as padding, (batch, frames), by fairseq's rule.

    Samples that do not divide evenly among the frames are dropped, and a frame
    is padding if all its samples are.
    Source: fairseq/models/hubert/hubert.py, ``forward_padding_mask``.
    """
    if padding_mask is None:
        return None
    batch, samples = padding_mask.shape
    frames = config.frames(samples)
    whole = padding_mask[:, : samples - samples % frames]
    return np.asarray(whole.reshape(batch, frames, -1).all(axis=-1), np.bool_)
