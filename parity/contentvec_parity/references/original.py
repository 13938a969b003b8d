"""A PyTorch model as a reference: its own forward pass, watched; and its float64 copy."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig, stage_input, stage_names

from ..inputs import Clip
from .truth import true_double

Tensor = Any


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

    def _watch(
        self, model: Any, keep: Callable[[str, Tensor], None]
    ) -> list[Any]:  # pragma: no cover - the subclasses'
        """Hooks that give ``keep`` each stage's output as (batch, frames, channels)."""
        raise NotImplementedError

    def _forward(self, model: Any, source: Tensor, mask: Tensor | None) -> Tensor | None:
        """The original's own forward pass through its last layer; its frame mask."""
        raise NotImplementedError

    def _run(self, model: Any, stage: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """One stage by itself, (batch, frames, channels) in and out."""
        raise NotImplementedError

    # ---- the interface ------------------------------------------------------------

    def model_input(self, clip: Clip) -> NDArray[np.float32]:
        """The waveform as the float32 model is given it, normalised if it was trained so."""
        import torch

        source = torch.from_numpy(clip.waveform)
        if self.config.normalize:
            source = normalized(source, clip.padding_mask)
        given: NDArray[np.float32] = source.numpy()
        return given

    def frame_mask(self, clip: Clip) -> NDArray[np.bool_] | None:
        """The original's own padding mask over frames, (batch, frames)."""
        return frame_mask(clip.padding_mask, self.config)

    def stages(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Every stage in float32, from the audio."""
        return self._stages(self._model, clip)

    def truth(self, clip: Clip) -> dict[str, NDArray[np.float64]]:
        """Every stage in true float64, from the audio."""
        return self._stages(self._double(), clip)

    def local_truth(
        self, clip: Clip, stage: str, stage_input: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """One stage in true float64 on a float32 input."""
        import torch

        mask = self.frame_mask(clip)
        with torch.no_grad():
            result = self._run(
                self._double(),
                stage,
                torch.from_numpy(stage_input.astype(np.float64)),
                None if mask is None else torch.from_numpy(mask),
            )
        exact: NDArray[np.float64] = result.numpy()
        return exact

    def tensors(self) -> tuple[str, Mapping[str, NDArray[Any]]]:
        """Every tensor of the loaded model under its own name."""
        return self.naming, {k: v.numpy() for k, v in self._model.state_dict().items()}

    # ---- how ----------------------------------------------------------------------

    def _double(self) -> Any:
        if self._exact is None:
            self._exact = true_double(self._model)
        return self._exact

    def _stages(self, model: Any, clip: Clip) -> dict[str, NDArray[Any]]:
        import torch

        kept: dict[str, NDArray[Any]] = {}

        def keep(stage: str, output: Tensor) -> None:
            # both originals zero padded frames in place later on: keep a copy
            kept[stage] = output.detach().clone().numpy()

        dtype = next(model.parameters()).dtype
        source = torch.from_numpy(clip.waveform).to(dtype)
        if self.config.normalize:
            source = normalized(source, clip.padding_mask)
        mask = None if clip.padding_mask is None else torch.from_numpy(clip.padding_mask)
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
                with torch.no_grad():
                    kept[stage] = model.final_proj(torch.from_numpy(before)).numpy()
            elif kept[stage].shape[1] > frames and not stage.startswith("conv."):
                # fairseq rounds the number of frames up to an even one inside its encoder
                kept[stage] = kept[stage][:, :frames]
        return {stage: np.ascontiguousarray(kept[stage]) for stage in names}


def normalized(waveforms: Tensor, padding_mask: NDArray[np.bool_] | None) -> Tensor:
    """Each clip at zero mean and unit variance, which fairseq's loader does before it pads.

    waveforms: (batch, samples), float32 or float64
    padding_mask: true for the padding behind a clip, which becomes 0
    Source: fairseq/data/audio/raw_audio_dataset.py, ``postprocess`` and ``collater``.
    """
    import torch
    from torch.nn import functional

    result = torch.zeros_like(waveforms)
    for i, row in enumerate(waveforms):
        count = len(row) if padding_mask is None else int((~padding_mask[i]).sum())
        result[i, :count] = functional.layer_norm(row[:count], (count,))
    return result


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
