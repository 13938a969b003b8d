"""What a checkpoint is: a sentence about one that can be converted, a refusal of what cannot.

Several models share most of their tensor names with HuBERT. Each row of
FOREIGN names one of them by a tensor that HuBERT does not have.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from mlx_contentvec.config import PRESETS, ModelConfig
from mlx_contentvec.errors import ForeignCheckpoint, UnsupportedCheckpoint, name_list
from mlx_contentvec.first_release import is_first_release

from .checkpoint import Checkpoint

_NOT_THESE_FEATURES = (
    "its encoder is built like HuBERT's, but RVC voices were not trained on its features;\n"
    "RVC's embedder is hubert_base.pt: mlx-contentvec fetch contentvec"
)
_OTHER_HALF = (
    "this is the other half of a voice converter: it reads what an embedder makes of speech.\n"
    "Convert the embedder (for nearly every RVC voice: mlx-contentvec fetch contentvec)"
)


@dataclass(frozen=True)
class Foreign:
    """A model that is not a HuBERT, and a tensor name or top-level entry that gives it away."""

    what: str
    marks: tuple[str, ...]
    hint: str


FOREIGN: tuple[Foreign, ...] = (
    Foreign(
        "a wav2vec 2.0 model",
        (
            "quantizer.vars",
            "quantizer.codevectors",
            "project_q.weight",
            "project_hid.weight",
            "wav2vec2.feature_projection.projection.weight",
        ),
        _NOT_THESE_FEATURES,
    ),
    Foreign(
        "a WavLM model",
        (
            "encoder.layers.0.self_attn.grep_linear.weight",
            "encoder.layers.0.attention.gru_rel_pos_linear.weight",
            "wavlm.encoder.layers.0.attention.gru_rel_pos_linear.weight",
        ),
        _NOT_THESE_FEATURES,
    ),
    Foreign(
        "a data2vec model",
        ("encoder.pos_conv.0.0.weight", "encoder.pos_conv_embed.layers.0.conv.weight"),
        _NOT_THESE_FEATURES,
    ),
    Foreign(
        "a speech recogniser fine-tuned from wav2vec 2.0 or HuBERT",
        (
            "w2v_encoder.w2v_model.feature_extractor.conv_layers.0.0.weight",
            "encoder.w2v_model.feature_extractor.conv_layers.0.0.weight",
        ),
        "fine-tuning changed its encoder; convert the pre-trained checkpoint it was made from",
    ),
    Foreign(
        "a soft HuBERT of bshall/hubert",
        ("feature_extractor.conv0.weight", "label_embedding.weight"),
        "it has its own architecture and its own features, which RVC does not use",
    ),
    Foreign(
        "an RVC voice model",
        ("enc_p.emb_phone.weight", "weight.enc_p.emb_phone.weight"),
        _OTHER_HALF,
    ),
    Foreign("a so-vits-svc voice model", ("enc_p.proj.weight", "enc_p.pre.weight"), _OTHER_HALF),
    Foreign(
        "a discriminator, which voice training alone needs",
        ("discriminators.0.convs.0.weight_g", "discriminators.0.convs.0.weight_v"),
        _OTHER_HALF,
    ),
    Foreign(
        "RMVPE, a pitch estimator",
        ("unet.encoder.bn.weight",),
        "RVC uses it beside the embedder; the embedder is hubert_base.pt",
    ),
    Foreign(
        "a Whisper model",
        ("decoder.token_embedding.weight", "model.decoder.embed_tokens.weight"),
        "some voice converters take their features from it, RVC does not",
    ),
)


def refuse_foreign(checkpoint: Checkpoint) -> None:
    """Raise ForeignCheckpoint if the tensors are those of a model that is not HuBERT."""
    row = _foreign(checkpoint.tensors)
    if row is None:
        return
    mark = next(mark for mark in row.marks if mark in checkpoint.tensors)
    raise ForeignCheckpoint(
        f"{checkpoint.path.name} is {row.what}, not HuBERT or ContentVec",
        what=row.what,
        found=f"a tensor named {mark}{_voice_width(checkpoint, mark)}",
        hint=row.hint,
    )


#: Plan.naming -> what a file is that bears these names and no known checksum. Only the
#: first release wrote its names, for one model, whose checksum nobody published
BY_CONTENT = {
    "mlx-contentvec 0.1": "a file of the first mlx-contentvec release, by its tensors' names and "
    "shapes; no checksum of it is known",
}


def is_shown_by_content(checkpoint: Checkpoint) -> bool:
    """Whether the tensors alone show which model this is: a row of BY_CONTENT."""
    return is_first_release(checkpoint.tensors)


def unrecognised(checkpoint: Checkpoint) -> UnsupportedCheckpoint:
    """The error for tensors that no source knows."""
    names = list(checkpoint.tensors)
    return UnsupportedCheckpoint(
        f"{checkpoint.path.name} holds no HuBERT or ContentVec that can be recognised",
        found=f"{len(names)} tensors: {name_list(names, 4)}" if names else "no tensors at all",
        expected="tensors named as fairseq, transformers or mlx-contentvec name them",
        hint="RVC's embedder is hubert_base.pt: mlx-contentvec fetch contentvec",
    )


def describe(config: ModelConfig, naming: str) -> str:
    """What a checkpoint holds, in one line.

    ``HuBERT base, 12 layers, 768 wide, 12 heads, projection 256, Hugging Face names``
    """
    layers = f"{config.encoder_layers} layers"
    if config.encoder_layers_1:
        layers += f" and {config.encoder_layers_1} conditioned on the speaker"
    facts = {
        "normalised input": config.normalize,
        "batch norm in the positional convolution": config.conv_pos_batch_norm,
        "biased convolutions": config.conv_bias,
    }
    return ", ".join(
        (
            _architecture(config),
            layers,
            f"{config.encoder_embed_dim} wide",
            f"{config.encoder_attention_heads} heads",
            f"projection {config.final_dim}" if config.final_dim else "no projection",
            *(fact for fact, holds in facts.items() if holds),
            NAMINGS[naming],
        )
    )


#: Plan.naming -> how a user would call it
NAMINGS = {
    "fairseq": "fairseq names",
    "transformers": "Hugging Face names",
    "mlx-contentvec": "converted by mlx-contentvec",
    "rvc-mlx": "written by rvc-mlx",
    "mlx-contentvec 0.1": "names of the first mlx-contentvec release",
}


def _architecture(config: ModelConfig) -> str:
    if config.encoder_layers_1:
        return "full ContentVec"
    for name, preset in PRESETS.items():
        if (config.encoder_layers, config.encoder_embed_dim, config.layer_norm_first) == (
            preset.encoder_layers,
            preset.encoder_embed_dim,
            preset.layer_norm_first,
        ):
            return f"HuBERT {name}"
    return (
        "HuBERT of the form of large" if config.layer_norm_first else "HuBERT of the form of base"
    )


def _foreign(names: Container[str]) -> Foreign | None:
    return next((row for row in FOREIGN if any(mark in names for mark in row.marks)), None)


def _voice_width(checkpoint: Checkpoint, mark: str) -> str:
    """What features an RVC voice reads, which is what tells v1 from v2."""
    if not mark.endswith("enc_p.emb_phone.weight"):
        return ""
    shape = checkpoint.tensors[mark].shape
    version = {256: "v1", 768: "v2"}.get(shape[-1] if shape else 0)
    return f": RVC {version}, it reads features {shape[-1]} wide" if version else ""
