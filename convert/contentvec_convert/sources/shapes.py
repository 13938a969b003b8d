"""A configuration for files that bring none, from the shapes of their tensors.

Shapes show depth and widths. They cannot show the number of attention heads
or how the input must be scaled, so the caller has to know these; and they
cannot show strides or the order of norms, so only the one family of HuBERT
base, whose strides are known, is accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from mlx_contentvec.config import BASE_CONV_LAYERS, ModelConfig
from mlx_contentvec.errors import ConfigError

from ..checkpoint import StoredTensor
from ..rules import TRANSFORMS, Rule

#: bigger than any model in every count, so that its rules name every tensor
#: that a file of the naming can hold
PROBE = ModelConfig(
    conv_layers=((1, 1, 1),) * 16,
    conv_bias=True,
    extractor_norm="layer",
    encoder_layers=64,
    conv_pos_batch_norm=True,
    final_dim=1,
)

Told = TypeVar("Told", int, bool)


class Unstated(ConfigError):
    """Neither the file nor the caller says something that no tensor shows."""


_QUESTIONS = {
    "heads": (
        "the number of attention heads is not known",
        "no tensor shows it, and the file does not say it",
        "pass --heads 12 for HuBERT base, --heads 16 for large and xlarge;\n"
        "a wrong number gives wrong features and no other sign",
    ),
    "normalize": (
        "it is not known whether this model wants normalised input",
        "no tensor shows it, and there is no preprocessor_config.json beside the weights",
        "pass --no-normalize for ContentVec and RVC's other base models, --normalize for large\n"
        "and xlarge; a wrong scale gives wrong features and no other sign",
    ),
}


def told(question: str, by_caller: Told | None, by_file: Told | None) -> Told:
    """The answer of the caller or of the file, which must not contradict each other.

    question: "heads" or "normalize". Raises Unstated if neither says it,
    ConfigError if they differ.
    """
    if by_caller is not None and by_file is not None and by_caller != by_file:
        raise ConfigError(
            f"the file says otherwise: {question} is {by_file}",
            found=f"{question} {by_caller} was asked for",
            expected=f"{question} {by_file}, as stored with the weights",
            hint=f"leave {question} out; if the stored configuration is wrong, correct it there",
        )
    answer = by_file if by_caller is None else by_caller
    if answer is None:
        problem, found, hint = _QUESTIONS[question]
        raise Unstated(problem, found=found, hint=hint)
    return answer


def config_from_shapes(
    tensors: Mapping[str, StoredTensor],
    probe: Iterable[Rule],
    *,
    missing: str,
    heads: int | None,
    normalize: bool,
) -> ModelConfig:
    """The HuBERT base of whatever depth and width whose tensors these are.

    probe: the rules of PROBE in the naming of the file; missing: what would
    have told the configuration. Raises ConfigError if the heads are not given,
    or for an architecture that shapes do not determine.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in probe:
        if all(source in tensors for source in rule.sources):
            found = (tensors[source].shape for source in rule.sources)
            shapes[rule.target] = TRANSFORMS[rule.transform].shape(*found)
    blocks = [f"feature_extractor.conv_layers.{i}" for i in range(len(PROBE.conv_layers))]
    kernels = [shapes[f"{b}.conv.weight"] for b in blocks if f"{b}.conv.weight" in shapes]
    strides = {layer[1]: layer[2] for layer in BASE_CONV_LAYERS}
    if [kernel[1] for kernel in kernels] != [
        layer[1] for layer in BASE_CONV_LAYERS
    ] or f"{blocks[1]}.norm.weight" in shapes:
        raise ConfigError(
            f"the shapes do not determine this model, and {missing} is missing",
            found=f"{len(kernels)} convolutions of kernels {[kernel[1] for kernel in kernels]}",
            expected="the seven of HuBERT base with one group norm, whose strides are known",
            hint=f"put {missing} beside the weights",
        )
    positional = shapes["encoder.pos_conv.weight"]
    layers = [f"encoder.layers.{i}" for i in range(PROBE.encoder_layers)]
    final_proj = shapes.get("final_proj.weight")
    return ModelConfig(
        conv_layers=tuple((out, width, strides[width]) for out, width, _ in kernels),
        conv_bias=f"{blocks[0]}.conv.bias" in shapes,
        encoder_embed_dim=positional[0],
        encoder_ffn_embed_dim=shapes[f"{layers[0]}.fc1.weight"][0],
        encoder_layers=sum(f"{layer}.fc1.weight" in shapes for layer in layers),
        encoder_attention_heads=told("heads", heads, None),
        conv_pos=positional[1],
        conv_pos_groups=positional[0] // positional[2],
        conv_pos_batch_norm="encoder.pos_conv_norm.weight" in shapes,
        final_dim=None if final_proj is None else final_proj[0],
        normalize=normalize,
    )
