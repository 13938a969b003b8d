"""Tiny originals of fairseq and transformers, and the gate that answers are held to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from contentvec_convert.conversion import convert
from contentvec_parity.compare.metrics import difference, rounding_floor
from contentvec_parity.compare.verdict import CLIP_SLACK, RATIO, ratio
from contentvec_parity.originals import (
    TINY_BASE,
    TINY_LARGE,
    fairseq_hubert,
    save_fairseq,
    save_transformers,
    transformers_hubert,
)
from contentvec_parity.references.truth import true_double
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.rvc import Hubert

#: as deep as RVC's model, so that it has features of v1 and v2
DEEP = dataclasses.replace(TINY_BASE, encoder_layers=12)
#: norms first, normalised input, and biases, which make the scale of the input matter
LARGE = dataclasses.replace(TINY_LARGE, conv_bias=True)


@dataclasses.dataclass
class Original:
    """A model of the original library, the same in float64, and what stands in its place."""

    model: Any
    truth: Any
    weights: Path

    @property
    def hubert(self) -> Hubert:
        """The MLX model of the same weights."""
        return Hubert.load(self.weights)


def fairseq_original(folder: Path, config: ModelConfig) -> Original:
    """fairseq's model, saved as its trainer does and converted."""
    model = fairseq_hubert(config)
    return _converted(model, save_fairseq(model, config, folder / "model.pt"))


def transformers_original(folder: Path, config: ModelConfig) -> Original:
    """transformers' model with ``final_proj``, saved as a folder and converted."""
    model = transformers_hubert(config, model_class="HubertModelWithFinalProj")
    return _converted(model, save_transformers(model, config, folder / "model"))


def _converted(model: Any, checkpoint: Path) -> Original:
    weights = checkpoint.with_name("converted.safetensors")
    convert(checkpoint, weights, allow_unknown=True)
    return Original(model, true_double(model), weights)


def assert_within_gate(answer: Any, reference: Any, truth: Any) -> None:
    """Hold one clip's answer to the parity gate: it is as near the truth as PyTorch is.

    answer, reference: float32, of the MLX model and of the original
    truth:             float64, of the original
    """
    exact = np.asarray(truth)
    assert exact.dtype == np.float64
    candidate = difference(np.asarray(answer), exact)
    original = difference(np.asarray(reference), exact)
    assert candidate.comparable, f"{np.asarray(answer).shape}, not {exact.shape}, or not finite"
    floor = rounding_floor(exact)
    for metric, limit in (("rms", RATIO), ("max_abs", RATIO * CLIP_SLACK)):
        found = ratio(candidate[metric], original[metric], floor[metric])
        assert found <= limit, f"{metric} is {found:.1f} times that of the original"
