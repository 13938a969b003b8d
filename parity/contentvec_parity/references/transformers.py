"""A second, independent implementation: transformers' HuBERT, under its own names."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import EPS, EXTRACTOR_EPS, ModelConfig
from mlx_contentvec.errors import ParityError, name_list
from mlx_contentvec.files import is_file, is_folder

from ..compare.naming import UNREAD, rows
from .original import TorchOriginal, first_line, frame_mask, quiet, without_padding

Tensor = Any


def open(path: Path) -> TransformersOriginal:
    """Load a Hugging Face folder, or a fairseq checkpoint through parity's own name table.

    Raises ParityError if a tensor of the model would be left at random or one
    of the file would be left over.
    """
    with quiet():
        import torch
        import transformers

        try:
            model, loader = _from_folder(path) if is_folder(path) else _from_fairseq(path)
        except ParityError:
            raise
        except Exception as error:
            raise ParityError(
                f"transformers cannot load {path.name}",
                found=f"{type(error).__name__}: {first_line(error)}",
                hint=f"mlx-contentvec inspect {path.name} says what it is",
            ) from error
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return TransformersOriginal(model, _config(model, loader), versions)


def _model_class() -> Any:
    from torch import nn
    from transformers import HubertModel

    class HubertModelWithFinalProj(HubertModel):
        """The class that ContentVec's Hugging Face folders name, which transformers lacks."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.final_proj = nn.Linear(config.hidden_size, config.classifier_proj_size)

    return HubertModelWithFinalProj, HubertModel


def _from_folder(path: Path) -> tuple[Any, Loader]:
    from transformers import HubertConfig

    projecting, plain = _model_class()
    config = HubertConfig.from_pretrained(path, local_files_only=True)
    options = {"config": config, "local_files_only": True, "output_loading_info": True}
    model, found = projecting.from_pretrained(path, **options)
    lacking = set(found["missing_keys"])
    if lacking and lacking <= {"final_proj.weight", "final_proj.bias"}:
        model, found = plain.from_pretrained(path, **options)
        lacking = set(found["missing_keys"])
    lacking -= set(UNREAD)
    if lacking:
        raise ParityError(
            f"{path.name} does not fill transformers' HuBERT",
            found=f"no tensor for {name_list(sorted(lacking))}",
        )
    loader = _loader(path, config.feat_extract_norm == "layer")
    return model, loader._replace(eps=EXTRACTOR_EPS) if loader.normalize else loader


class Loader(NamedTuple):
    """What is made of audio before the model is given it."""

    normalize: bool
    sample_rate: int
    #: what is added to the variance in that
    eps: float = EPS


def _loader(path: Path, large: bool) -> Loader:
    """That of the folder's feature extractor; without one, what the large models' norms imply."""
    from transformers import Wav2Vec2FeatureExtractor

    if not any(
        is_file(path / name) for name in ("preprocessor_config.json", "processor_config.json")
    ):
        return Loader(large, ModelConfig.sample_rate)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(path, local_files_only=True)
    return Loader(bool(extractor.do_normalize), int(extractor.sampling_rate))


def _from_fairseq(path: Path) -> tuple[Any, Loader]:
    import torch
    from transformers import HubertConfig

    class Dictionary:
        """Stands where fairseq's dictionary of labels is named; nothing reads it."""

    allowed = [argparse.Namespace, (Dictionary, "fairseq.data.dictionary.Dictionary")]
    with torch.serialization.safe_globals(allowed):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ParityError(
            f"{path.name} is not a fairseq checkpoint",
            found="no state dict under 'model'",
            expected="a fairseq .pt file or a Hugging Face folder",
        )
    settings = dict(state["cfg"]["model"]) if state.get("cfg") else vars(state["args"])
    task = dict(state["cfg"]["task"]) if state.get("cfg") else vars(state["args"])
    tensors = state["model"]
    layers = 0
    while f"encoder.layers.{layers}.fc1.weight" in tensors:
        layers += 1
    convolutions = _listed(settings["conv_feature_layers"])
    config = HubertConfig(
        hidden_size=settings["encoder_embed_dim"],
        num_hidden_layers=layers,
        num_attention_heads=settings["encoder_attention_heads"],
        intermediate_size=settings["encoder_ffn_embed_dim"],
        conv_dim=[channels for channels, _, _ in convolutions],
        conv_kernel=[kernel for _, kernel, _ in convolutions],
        conv_stride=[stride for _, _, stride in convolutions],
        conv_bias=bool(settings.get("conv_bias", False)),
        feat_extract_norm="layer" if settings["extractor_mode"] == "layer_norm" else "group",
        do_stable_layer_norm=bool(settings["layer_norm_first"]),
        num_conv_pos_embeddings=settings["conv_pos"],
        num_conv_pos_embedding_groups=settings["conv_pos_groups"],
        conv_pos_batch_norm=bool(settings.get("conv_pos_batch_norm", False)),
        classifier_proj_size=settings["final_dim"],
    )
    loader = Loader(
        bool(task.get("normalize", False)), int(task.get("sample_rate", ModelConfig.sample_rate))
    )
    projecting, _ = _model_class()
    model = projecting(config)
    table = {
        theirs: name
        for row in rows(_config(model, loader))
        for name, theirs in zip(row.fairseq, row.transformers, strict=True)
    }
    table["masked_spec_embed"] = "mask_emb"
    wanted = set(model.state_dict())
    lacking = sorted(
        theirs for theirs in wanted if theirs not in table or table[theirs] not in tensors
    )
    left = sorted(set(tensors) - set(table.values()) - set(UNREAD))
    if lacking or left:
        raise ParityError(
            f"{path.name} does not fit transformers' HuBERT",
            found=f"nothing for {name_list(lacking)}" if lacking else f"also {name_list(left)}",
        )
    model.load_state_dict({theirs: tensors[table[theirs]] for theirs in wanted}, strict=True)
    return model, loader


def _listed(expression: str) -> list[tuple[int, int, int]]:
    """``[(512,10,5)] + [(512,3,2)] * 4`` as a list, without evaluating it."""

    def value(node: ast.AST) -> list[tuple[int, int, int]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            times: int = ast.literal_eval(node.right)
            return value(node.left) * times
        layers: list[tuple[int, int, int]] = ast.literal_eval(node)
        return layers

    return value(ast.parse(expression.strip(), mode="eval").body)


def _config(model: Any, loader: Loader) -> ModelConfig:
    """What the loaded model is, read from its modules where they say it."""
    from torch.nn import LayerNorm

    blocks = model.feature_extractor.conv_layers
    convolutions = [block.conv for block in blocks]
    layer = model.encoder.layers[0]
    positional = model.encoder.pos_conv_embed
    final = getattr(model, "final_proj", None)
    return ModelConfig(
        conv_layers=tuple((c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions),
        conv_bias=convolutions[0].bias is not None,
        # the group norm of the first block goes by the same name
        extractor_norm=(
            "layer" if isinstance(getattr(blocks[-1], "layer_norm", None), LayerNorm) else "group"
        ),
        encoder_embed_dim=layer.attention.embed_dim,
        encoder_ffn_embed_dim=layer.feed_forward.intermediate_dense.out_features,
        encoder_layers=len(model.encoder.layers),
        encoder_attention_heads=layer.attention.num_heads,
        layer_norm_first=type(model.encoder).__name__ == "HubertEncoderStableLayerNorm",
        conv_pos=positional.conv.kernel_size[0],
        conv_pos_groups=positional.conv.groups,
        conv_pos_batch_norm=getattr(positional, "batch_norm", None) is not None,
        final_dim=None if final is None else final.out_features,
        normalize=loader.normalize,
        normalize_eps=loader.eps,
        sample_rate=loader.sample_rate,
    )


class TransformersOriginal(TorchOriginal):
    """transformers' ``HubertModel``."""

    name = "transformers"
    naming = "transformers"

    def _forward(self, model: Any, source: Tensor, mask: Tensor | None) -> None:
        import torch

        if mask is None:
            model(source)
            return
        # transformers counts a padded clip's frames by its length, fairseq by its mask, which
        # can come to one more: the encoder is given fairseq's count, which the port reproduces
        frames = frame_mask(mask.cpu().numpy(), self.config)
        hidden = model.feature_projection(model.feature_extractor(source).transpose(1, 2))
        model.encoder(
            self._batch_first(hidden), attention_mask=~torch.from_numpy(frames).to(source.device)
        )

    def _normalized(self, waveforms: Tensor, padding_mask: NDArray[np.bool_] | None) -> Tensor:
        """By the extractor of transformers, or for a file of fairseq's by its loader's rule."""
        import torch
        from torch.nn.functional import layer_norm
        from torch.nn.utils.rnn import pad_sequence
        from transformers import Wav2Vec2FeatureExtractor

        clips = without_padding(waveforms, padding_mask)
        if self.config.normalize_eps == EPS:
            made = [layer_norm(x, x.shape) for x in clips]
        else:
            given = [x.numpy() for x in clips]
            made = [
                torch.from_numpy(x)
                for x in Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm(given, None)
            ]
        return pad_sequence(made, batch_first=True)

    def _projection(self, model: Any) -> Any:
        return model.feature_projection.projection

    def _project(self, model: Any, x: Tensor) -> Tensor:
        return self._batch_first(model.feature_projection(x))

    def _positional(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder.pos_conv_embed(x)

    def _layer(self, layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        import torch

        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))
            bias = bias[:, None, None].expand(-1, 1, mask.shape[1], -1)
        return self._batch_first(layer(x, attention_mask=bias))

    def _batch_first(self, hidden: Any) -> Tensor:
        # earlier versions of transformers return a layer's hidden states in a tuple
        return hidden[0] if isinstance(hidden, tuple) else hidden
