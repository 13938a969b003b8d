"""The original, behind one interface: fairseq, transformers, or a recording of either.

A new reference is one module here with an ``open`` function, and a line in ``REFERENCES``.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import MissingDependency, ParityError, install_hint
from mlx_contentvec.files import is_folder, is_there

from ..inputs import Clip

#: how to install fairseq today: its own release neither installs nor imports any more
FAIRSEQ_RECIPE = (
    "pip install torch numpy setuptools wheel cython hydra-core==1.3.2 omegaconf==2.3.0 "
    "regex sacrebleu tqdm bitarray packaging scikit-learn\n"
    "READTHEDOCS=1 pip install --no-build-isolation --no-deps fairseq-fixed==0.12.3.1"
)


class Reference(Protocol):
    """What a parity run needs to know of the original.

    Stage outputs are (batch, frames, channels); stage names are those of
    ``contentvec_parity.compare.naming``.
    """

    #: "fairseq", "transformers" or "recording"
    name: str
    #: what the model was found to be, read from the loaded model itself
    config: ModelConfig
    #: package -> version of whatever computed the reference
    versions: dict[str, str]

    def model_input(self, clip: Clip) -> NDArray[np.float32]:
        """What the float32 original's first stage is given, (batch, samples)."""

    def frame_mask(self, clip: Clip) -> NDArray[np.bool_] | None:
        """The original's own padding mask over frames, (batch, frames)."""

    def stages(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """Every stage of the original in float32, from the audio."""

    def truth(self, clip: Clip) -> dict[str, NDArray[np.float64]]:
        """Every stage of the original in true float64, from the audio."""

    def local_truth(
        self, clip: Clip, stage: str, stage_input: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """One stage in true float64 on the input the float32 original gave it."""

    def tensors(self) -> tuple[str, Mapping[str, NDArray[Any]]]:
        """The naming ("fairseq" or "transformers") and every tensor of the loaded original."""


#: name -> module with ``open(path: Path) -> Reference``
REFERENCES = {"fairseq": ".fairseq", "transformers": ".transformers"}


def available(name: str) -> bool:
    """Whether what the reference ``name`` runs on is installed."""
    needed = ("torch", "fairseq") if name == "fairseq" else ("torch", "transformers")
    return all(importlib.util.find_spec(package) is not None for package in needed)


def choose(path: Path) -> str:
    """The reference to use for ``path`` when none is named.

    fairseq for a fairseq checkpoint, transformers for a Hugging Face folder, and
    transformers in fairseq's place where fairseq is not installed.
    Raises MissingDependency when neither is.
    """
    wanted = ("transformers",) if is_folder(path) else ("fairseq", "transformers")
    for name in wanted:
        if available(name):
            return name
    raise MissingDependency(
        "there is nothing here to compare with: the original needs "
        + " or ".join(f"{name}" for name in wanted)
        + ", and torch",
        hint=f"for transformers: {install_hint('parity')}\n"
        f"for fairseq: {FAIRSEQ_RECIPE}\n"
        "or: --reference recording.safetensors, which needs neither",
    )


def open_reference(name: str, path: Path) -> Reference:
    """Load the original at ``path`` with the implementation called ``name``.

    Raises MissingDependency with the way to install it, and ParityError if the
    implementation refuses the file.
    """
    if not available(name):
        hint = FAIRSEQ_RECIPE if name == "fairseq" else install_hint("parity")
        raise MissingDependency(f"the reference {name} is not installed", hint=hint)
    if not is_there(path):
        raise ParityError(f"no such checkpoint: {path}")
    reference: Reference = importlib.import_module(REFERENCES[name], __name__).open(path)
    return reference
