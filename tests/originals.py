"""Small checkpoints made by the original libraries' own code, with seeded weights.

A converter is only tested by files that it did not write. Everything here is
built and saved by fairseq or transformers themselves; this module chooses the
sizes, the numbers and the form of the file, and holds answers to the parity
gate. A test is skipped where torch or the library it is asked for is missing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from contentvec_convert.conversion import convert
from contentvec_parity.compare.metrics import difference, rounding_floor
from contentvec_parity.compare.verdict import CLIP_SLACK, RATIO, ratio
from contentvec_parity.references.truth import true_double
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ConfigError
from mlx_contentvec.rvc import Hubert
from tests.optional import optional

#: as deep and as wide as a path needs to be exercised, and no more
TINY_CONV = ((48, 10, 5), *(((48, 3, 2),) * 4), *(((64, 2, 2),) * 2))
TINY_BASE = ModelConfig(
    conv_layers=TINY_CONV,
    encoder_embed_dim=96,
    encoder_ffn_embed_dim=160,
    encoder_layers=3,
    encoder_attention_heads=4,
    conv_pos=32,
    conv_pos_groups=4,
    final_dim=24,
)
TINY_LARGE = ModelConfig(
    **{
        **TINY_BASE.to_dict(),
        "extractor_norm": "layer",
        "layer_norm_first": True,
        "normalize": True,
    }
)
#: as deep as RVC's model, so that it has features of v1 and v2
DEEP = dataclasses.replace(TINY_BASE, encoder_layers=12)
#: norms first, normalised input, and biases, which make the scale of the input matter
LARGE = dataclasses.replace(TINY_LARGE, conv_bias=True)


def randomize(model: Any, seed: int) -> Any:
    """Give every parameter and buffer of ``model`` seeded values under which it matters.

    No norm is 1 and 0, no bias is zero, the magnitude of a weight norm is not
    the norm of its direction and differs from tap to tap, running variances
    are positive. Returns ``model`` in evaluation mode, float32.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Any, scale: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + mean)

    def uniform(tensor: Any, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    model = model.float().eval()
    with torch.no_grad():
        state = model.state_dict(keep_vars=False)
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                tensor.fill_(3)
            elif name.endswith("running_var"):
                uniform(tensor, 0.5, 2.0)
            elif name.endswith(("weight_g", "weight.original0")):
                uniform(tensor, 0.5, 2.5)
            elif tensor.ndim == 1:
                normal(tensor, 0.2, 1.0 if name.endswith("weight") else 0.0)
            elif tensor.ndim == 3:
                normal(tensor, 1.8 / math.sqrt(math.prod(tensor.shape[1:])))
                if tensor.shape[1] > 1:
                    # no answer to the positive mean that a GELU leaves: frames stay different
                    tensor.sub_(tensor.mean(dim=(1, 2), keepdim=True))
            else:
                normal(tensor, 0.9 / math.sqrt(tensor.shape[1]))
    return model


def fairseq_hubert(config: ModelConfig, *, seed: int = 0, classes: int = 11) -> Any:
    """The ``HubertModel`` of fairseq of this configuration (fairseq/models/hubert/hubert.py).

    classes: entries of its one label dictionary, special symbols not counted.
    """
    if config.encoder_layers_1:
        raise ConfigError("fairseq's HubertModel has no speaker-conditioned layers")
    import torch
    from fairseq.data.dictionary import Dictionary
    from fairseq.models.hubert.hubert import HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig

    torch.manual_seed(seed)
    labels = Dictionary()
    for label in range(classes):
        labels.add_symbol(str(label))
    task = HubertPretrainingConfig(normalize=config.normalize)
    model = HubertModel(_fairseq_model_config(config), task, [labels])
    model.labels = labels
    return randomize(model, seed)


def _fairseq_model_config(config: ModelConfig) -> Any:
    from fairseq.models.hubert.hubert import HubertConfig

    return HubertConfig(
        _name="hubert",
        label_rate=50.0,
        extractor_mode="layer_norm" if config.extractor_norm == "layer" else "default",
        encoder_layers=config.encoder_layers,
        encoder_embed_dim=config.encoder_embed_dim,
        encoder_ffn_embed_dim=config.encoder_ffn_embed_dim,
        encoder_attention_heads=config.encoder_attention_heads,
        final_dim=config.final_dim or 0,
        untie_final_proj=True,
        layer_norm_first=config.layer_norm_first,
        conv_feature_layers=str([tuple(layer) for layer in config.conv_layers]),
        conv_bias=config.conv_bias,
        conv_pos=config.conv_pos,
        conv_pos_groups=config.conv_pos_groups,
        conv_pos_batch_norm=config.conv_pos_batch_norm,
    )


def save_fairseq(
    model: Any,
    config: ModelConfig,
    path: Path,
    *,
    form: str = "cfg",
    dtype: str = "float32",
    optimizer_state: bool = False,
    legacy_serialization: bool = False,
) -> Path:
    """Save ``model`` as fairseq's trainer does (fairseq/trainer.py, Trainer.state_dict).

    form: "cfg" for a dict configuration, "args" for the ``argparse.Namespace``
    of fairseq before 0.10. optimizer_state: with two moments per parameter, as
    a file made for resuming has them.
    """
    import torch
    from omegaconf import OmegaConf

    parameters = collections.OrderedDict(
        (name, tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)
        for name, tensor in model.state_dict().items()
    )
    model_config = OmegaConf.to_container(
        OmegaConf.structured(_fairseq_model_config(config)), resolve=False, enum_to_str=True
    )
    task_config = {
        "_name": "hubert_pretraining",
        "data": "metadata",
        "label_dir": "label",
        "labels": ["km"],
        "label_rate": 50.0,
        "sample_rate": config.sample_rate,
        "normalize": config.normalize,
    }
    state: dict[str, Any] = {"args": None, "cfg": None, "model": parameters}
    if form == "cfg":
        state["cfg"] = {"common": {"fp16": True}, "model": model_config, "task": task_config}
    else:
        fields = {**model_config, **task_config}
        del fields["_name"]
        state["args"] = argparse.Namespace(
            arch="hubert", task="hubert_pretraining", criterion="hubert", **fields
        )
    state["criterion"] = {}
    state["optimizer_history"] = [
        {
            "criterion_name": "HubertCriterion",
            "optimizer_name": "FairseqAdam",
            "lr_scheduler_state": {"best": 4.3},
            "num_updates": 100000,
        }
    ]
    state["task_state"] = {"dictionaries": [model.labels]}
    state["extra_state"] = {"train_iterator": {"epoch": 30}, "val_loss": 4.3}
    if optimizer_state:
        state["last_optimizer_state"] = {
            "state": {
                i: {"step": 100000, "exp_avg": torch.zeros_like(p), "exp_avg_sq": p * p}
                for i, p in enumerate(parameters.values())
            },
            "param_groups": [{"lr": 5e-4, "params": list(range(len(parameters)))}],
        }
    torch.save(state, path, _use_new_zipfile_serialization=not legacy_serialization)
    return path


def transformers_hubert(
    config: ModelConfig,
    *,
    seed: int = 0,
    model_class: str = "HubertModel",
    label_vocabulary: int = 9,
) -> Any:
    """The HuBERT of transformers of this configuration.

    model_class: "HubertModel", "HubertForCTC" (its tensors carry the prefix
    ``hubert.``), or "HubertModelWithFinalProj", which voice conversion
    projects define on top of HubertModel for the head of ContentVec.
    Source: transformers/models/hubert/modeling_hubert.py.
    """
    torch = optional("torch", "scripts/test installs it")
    transformers: Any = optional("transformers", "pip install 'mlx-contentvec[parity]'")
    torch.manual_seed(seed)
    channels, kernels, strides = zip(*config.conv_layers, strict=True)
    hubert_config = transformers.HubertConfig(
        hidden_size=config.encoder_embed_dim,
        num_hidden_layers=config.encoder_layers,
        num_attention_heads=config.encoder_attention_heads,
        intermediate_size=config.encoder_ffn_embed_dim,
        conv_dim=channels,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=config.conv_bias,
        feat_extract_norm=config.extractor_norm,
        do_stable_layer_norm=config.layer_norm_first,
        classifier_proj_size=config.final_dim or 256,
        num_conv_pos_embeddings=config.conv_pos,
        num_conv_pos_embedding_groups=config.conv_pos_groups,
        conv_pos_batch_norm=config.conv_pos_batch_norm,
        vocab_size=label_vocabulary,
    )
    if model_class == "HubertModelWithFinalProj":
        projected = config.final_dim or 256

        class HubertModelWithFinalProj(transformers.HubertModel):
            def __init__(self, config: Any) -> None:
                super().__init__(config)
                self.final_proj = torch.nn.Linear(config.hidden_size, projected)

        model = HubertModelWithFinalProj(hubert_config)
    else:
        model = getattr(transformers, model_class)(hubert_config)
    return randomize(model, seed)


def _old_weight_norm_name(name: str) -> str:
    """The name that torch.nn.utils.weight_norm gave what parametrizations now hold."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.replace(f"parametrizations.weight.{new}", old)
    return name


def save_transformers(
    model: Any,
    config: ModelConfig,
    folder: Path,
    *,
    weights: str = "safetensors",
    weight_norm: str = "parametrizations",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
) -> Path:
    """Save ``model`` as a Hugging Face folder, with its preprocessor configuration.

    weights: "safetensors" (``save_pretrained``), or "bin": a
    ``pytorch_model.bin`` as transformers wrote it before safetensors.
    weight_norm: the name pair of the positional convolution,
    "parametrizations" as torch >= 2.1 saves it or "weight_g" as before.
    max_shard_size: as ``save_pretrained`` takes it; small values give an index
    and several files.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(getattr(torch, dtype))
    named = _old_weight_norm_name if weight_norm == "weight_g" else str
    state = collections.OrderedDict(
        (named(name), tensor.contiguous()) for name, tensor in model.state_dict().items()
    )
    # save_pretrained empties the state dict that it is given
    model.save_pretrained(folder, state_dict=dict(state), max_shard_size=max_shard_size)
    if weights == "bin":
        for written in folder.glob("*.safetensors"):
            written.unlink()
        torch.save(state, folder / "pytorch_model.bin")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=config.normalize).save_pretrained(folder)
    model.float()
    return folder


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
