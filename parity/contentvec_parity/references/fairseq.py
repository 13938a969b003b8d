"""The original: fairseq's own HuBERT, loaded the way RVC loads it, run in this process."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.machinery
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ParityError

from .original import TorchOriginal, first_line, quiet, without_padding

Tensor = Any

#: longest list of convolutions a checkpoint may spell out
MOST_CONVOLUTIONS = 64
#: what fairseq's tasks and criterions import and HuBERT does not call
_UNCALLED = ("sklearn", "sklearn.metrics", "scipy", "scipy.stats")
#: what fills a new model's weights
_DRAWS = ("uniform_", "normal_")


def open(path: Path) -> FairseqOriginal:
    """Load a fairseq checkpoint strictly, with fairseq's own loader.

    Nothing in the file is executed: torch reads it with ``weights_only``, the
    one foreign class it names (fairseq's ``Dictionary``) is let through, and the
    one expression that fairseq passes to ``eval`` is checked to be a list of numbers.
    Raises ParityError if torch or fairseq refuses the file.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise ParityError(
            "torch is told to execute whatever a checkpoint contains",
            found="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set",
            hint="unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
        )
    with quiet(), _without_scikit_learn():
        import fairseq
        import torch
        from fairseq import checkpoint_utils
        from fairseq.data.dictionary import Dictionary

        with torch.serialization.safe_globals([Dictionary, argparse.Namespace]):
            try:
                # mapped where it can be: only the configuration is looked at here
                stored = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
                _refuse_expressions(path, stored)
                del stored
                with _without_random_weights():
                    models, cfg, _ = checkpoint_utils.load_model_ensemble_and_task(
                        [os.fspath(path)], suffix=""
                    )
            except ParityError:
                raise
            except Exception as error:
                raise ParityError(
                    f"fairseq cannot load {path.name}",
                    found=f"{type(error).__name__}: {first_line(error)}",
                    hint=f"mlx-contentvec inspect {path.name} says what the file is",
                ) from error
    versions = {"torch": torch.__version__, "fairseq": fairseq.__version__}
    return FairseqOriginal(models[0], _config(models[0], cfg), versions)


@contextlib.contextmanager
def _without_scikit_learn() -> Iterator[None]:
    """Have fairseq import neither scikit-learn nor SciPy, a quarter of the time it takes.

    fairseq imports all its tasks and criterions; those that classify audio and sentences
    take functions of these packages, which they call in training. HuBERT has none of them.
    """
    if {"fairseq", "sklearn", "scipy"} & set(sys.modules):
        yield
        return
    for name in _UNCALLED:
        empty = types.ModuleType(name)
        # others ask by its specification whether a package is there
        empty.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package="." not in name)
        vars(empty)["__getattr__"] = _uncalled
        sys.modules[name] = empty
    try:
        yield
    finally:
        for name in _UNCALLED:
            del sys.modules[name]


def _uncalled(name: str) -> None:
    if name.startswith("__"):
        raise AttributeError(name)


@contextlib.contextmanager
def _without_random_weights() -> Iterator[None]:
    """Leave a new model's weights as they are: drawing them takes a second for 94 million.

    fairseq loads strictly: every one of them is then replaced by the checkpoint's, or the
    file is refused.
    """
    import torch

    def leave(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    for name in _DRAWS:
        setattr(torch.Tensor, name, leave)
    try:
        yield
    finally:
        for name in _DRAWS:  # what they inherit is as it was
            delattr(torch.Tensor, name)


def _refuse_expressions(path: Path, state: Any) -> None:
    """fairseq calls ``eval`` on a string of the checkpoint: let only lists of numbers pass.

    Source: fairseq/models/hubert/hubert.py, ``feature_enc_layers = eval(...)``.
    """
    stored = state.get("cfg") if isinstance(state, dict) else None
    old = state.get("args") if isinstance(state, dict) else None
    if stored:
        model, task = dict(stored["model"]), dict(stored["task"])
    elif old is not None:
        model = {**vars(old), "_name": getattr(old, "arch", "")}
        task = {"_name": getattr(old, "task", "")}
    else:
        raise ParityError(
            f"{path.name} is not a fairseq checkpoint",
            found="no configuration beside the tensors",
            hint="--reference transformers takes a Hugging Face folder",
        )
    if not str(model.get("_name")).startswith("hubert") or task.get("_name") != (
        "hubert_pretraining"
    ):
        raise ParityError(
            f"{path.name} is not a HuBERT",
            found=f"model {model.get('_name')!r}, task {task.get('_name')!r}",
            expected="model 'hubert', task 'hubert_pretraining'",
        )
    layers = model.get("conv_feature_layers")
    if not _is_list_of_numbers(layers):
        raise ParityError(
            f"{path.name} carries code where its convolutions should be listed",
            found=repr(layers)[:120],
            expected="something like [(512,10,5)] + [(512,3,2)] * 4",
        )


def _is_list_of_numbers(expression: Any) -> bool:
    if not isinstance(expression, str) or len(expression) > 1000:
        return False
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False

    def plain(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return plain(node.left) and plain(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            times = node.right
            return (
                isinstance(node.left, ast.List)
                and plain(node.left)
                and isinstance(times, ast.Constant)
                and type(times.value) is int
                and times.value <= MOST_CONVOLUTIONS
            )
        if isinstance(node, (ast.List, ast.Tuple)):
            return all(plain(element) for element in node.elts)
        return isinstance(node, ast.Constant) and type(node.value) is int

    return plain(tree)


def _config(model: Any, cfg: Any) -> ModelConfig:
    """What the loaded model is, read from its modules where they say it."""
    encoder = model.encoder
    convolutions = [block[0] for block in model.feature_extractor.conv_layers]
    norms = [type(module).__name__ for module in model.feature_extractor.conv_layers[-1].modules()]
    positional = encoder.pos_conv
    batch_norm = type(positional[0]).__name__ == "BatchNorm1d"
    kernel = positional[1 if batch_norm else 0]
    final = model.final_proj
    return ModelConfig(
        conv_layers=tuple((c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions),
        conv_bias=convolutions[0].bias is not None,
        extractor_norm="layer" if any("LayerNorm" in name for name in norms) else "group",
        encoder_embed_dim=encoder.embedding_dim,
        encoder_ffn_embed_dim=encoder.layers[0].fc1.out_features,
        encoder_layers=len(encoder.layers),
        encoder_attention_heads=encoder.layers[0].self_attn.num_heads,
        layer_norm_first=bool(encoder.layer_norm_first),
        conv_pos=kernel.kernel_size[0],
        conv_pos_groups=kernel.groups,
        conv_pos_batch_norm=batch_norm,
        final_dim=final.out_features,
        normalize=bool(cfg.task.normalize),
        sample_rate=int(cfg.task.sample_rate),
    )


class FairseqOriginal(TorchOriginal):
    """fairseq's ``HubertModel``."""

    name = "fairseq"
    naming = "fairseq"

    def _forward(self, model: Any, source: Tensor, mask: Tensor | None) -> None:
        import torch

        # RVC passes a mask that masks nothing (infer/modules/vc/pipeline.py)
        given = torch.zeros_like(source, dtype=torch.bool) if mask is None else mask
        model.extract_features(source=source, padding_mask=given)

    def _normalized(self, waveforms: Tensor, padding_mask: NDArray[np.bool_] | None) -> Tensor:
        """By fairseq's own loader (fairseq/data/audio/raw_audio_dataset.py)."""
        from fairseq.data.audio.raw_audio_dataset import RawAudioDataset

        rate = self.config.sample_rate
        loader = RawAudioDataset(rate, pad=True, normalize=True, shuffle=False)
        clips = without_padding(waveforms, padding_mask)
        samples = [{"id": i, "source": loader.postprocess(x, rate)} for i, x in enumerate(clips)]
        return loader.collater(samples)["net_input"]["source"]

    def _projection(self, model: Any) -> Any:
        return model.layer_norm if model.post_extract_proj is None else model.post_extract_proj

    def _project(self, model: Any, x: Tensor) -> Tensor:
        x = model.layer_norm(x)
        return x if model.post_extract_proj is None else model.post_extract_proj(x)

    def _positional(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder.pos_conv(x.transpose(1, 2)).transpose(1, 2)

    def _layer(self, layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        return self._batch_first(layer(x.transpose(0, 1), self_attn_padding_mask=mask))

    def _batch_first(self, hidden: Any) -> Tensor:
        return hidden[0].transpose(0, 1)
