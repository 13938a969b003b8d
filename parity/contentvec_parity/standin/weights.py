"""The weights and the configuration of a stand-in, from a seed.

The weights come from integers, the four basic operations and square roots
alone, all correctly rounded under IEEE 754: the same seed gives the same
bytes on every platform and with every version of numpy and torch. They are
spread so that every tensor that can matter does: no norm is 1, no bias is 0,
attention is neither uniform nor a single peak, and the positional convolution's
magnitude is not the norm of its direction.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.errors import ConfigError, MissingDependency, import_hint, install_hint

#: Counts up whenever the same seed would give other bytes.
GENERATOR_VERSION = 1

DEFAULT_SEED = 500

DTYPES = ("float16", "bfloat16", "float32", "float64")

Progress = Callable[[int, int], None]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Preset:
    """What a stand-in changes in the configuration of ``hubert_base.pt``."""

    model: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    #: k-means classes that the model was (not) trained to predict
    classes: int = 500


_TINY: dict[str, Any] = {
    "encoder_layers": 3,
    "encoder_embed_dim": 96,
    "encoder_ffn_embed_dim": 192,
    "encoder_attention_heads": 4,
    "final_dim": 32,
    "conv_feature_layers": "[(64,10,5)] + [(64,3,2)] * 4 + [(64,2,2)] * 2",
}
_LARGE: dict[str, Any] = {"extractor_mode": "layer_norm", "layer_norm_first": True}

PRESETS: dict[str, Preset] = {
    "base": Preset(),
    "large": Preset(
        model={
            **_LARGE,
            "encoder_layers": 24,
            "encoder_embed_dim": 1024,
            "encoder_ffn_embed_dim": 4096,
            "encoder_attention_heads": 16,
            "final_dim": 768,
        },
        task={"normalize": True},
    ),
    "tiny": Preset(model=_TINY, classes=20),
    "tiny-large": Preset(model={**_TINY, **_LARGE}, task={"normalize": True}, classes=20),
}


def checkpoint_config(preset: str) -> dict[str, Any]:
    """The ``cfg`` entry: what fairseq made of ContentVec's training run, changed by the preset.

    The recording is ``config.json``; the tests compare it with what
    fairseq's ``add_defaults`` gives. Its ``model`` node has the 44 keys of
    ``hubert_base.pt``, ContentVec's leftovers (``encoder_layers_1: 3``) included.
    Raises ConfigError for a preset that is not in :data:`PRESETS`.
    """
    if preset not in PRESETS:
        raise ConfigError(f"no stand-in preset {preset!r}", expected=", ".join(PRESETS))
    recorded = importlib.resources.files(__package__).joinpath("config.json")
    config: dict[str, Any] = json.loads(recorded.read_text(encoding="utf-8"))
    config["model"].update(PRESETS[preset].model)
    config["task"].update(PRESETS[preset].task)
    return config


# -- weights ---------------------------------------------------------------------------

#: standard deviation of the sum of four uniform 16-bit integers
_BELL_SPREAD = math.sqrt((65536**2 - 1) / 3)


class Draw:
    """The random numbers of one tensor.

    PCG64's raw words and SeedSequence are what numpy promises never to change;
    its ``normal()`` is not, and goes through the platform's logarithm.
    """

    def __init__(self, seed: int, name: str, shape: tuple[int, ...]) -> None:
        self._words = np.random.PCG64(np.random.SeedSequence([seed, *name.encode()]))
        self.shape = shape

    def bell(self, spread: float, *, centred: bool = False) -> Array:
        """A bell curve around 0 with this standard deviation, cut off at 3.5 of them.

        centred: every output row (axis 0) sums to nearly 0.
        """
        words = self._words.random_raw(math.prod(self.shape))
        total = words.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64) - 131070
        if centred:
            rows = total.reshape(self.shape[0], -1)
            total = rows - rows.sum(axis=1, keepdims=True) // rows.shape[1]
        bell: Array = total.reshape(self.shape) * (spread / _BELL_SPREAD)
        return bell

    def uniform(self, low: float, high: float) -> Array:
        """Evenly between low and high."""
        words = self._words.random_raw(math.prod(self.shape)) >> np.uint64(11)
        uniform: Array = words.reshape(self.shape) * ((high - low) / 2.0**53) + low
        return uniform


Values = Callable[[Draw], Array]


def bell(spread: float, around: float = 0.0) -> Values:
    """A bell curve of this standard deviation."""
    return lambda draw: draw.bell(spread) + around


SMALL_BIAS = bell(0.06)


def uniform(low: float, high: float) -> Values:
    """Evenly between low and high."""
    return lambda draw: draw.uniform(low, high)


def spread_over_inputs(gain: float, *, centred: bool = False) -> Values:
    """A kernel or matrix (out, in, ...) that scales unit inputs by about ``gain``.

    centred: an output ignores what all its inputs share. GELU leaves a positive
    mean, which would otherwise grow from layer to layer and make all frames alike.
    """
    return lambda draw: draw.bell(gain / math.sqrt(math.prod(draw.shape[1:])), centred=centred)


def tap_strength(taps: int) -> Array:
    """How strong each tap of the positional kernel is: a hump a little left of the centre."""
    distance = (np.arange(taps, dtype=np.float64) - (taps / 2 - 7)) / (taps / 4)
    strength: Array = 0.15 + 1.0 / (1.0 + distance * distance)
    return strength


def direction(draw: Draw) -> Array:
    """``weight_v`` (out, in / groups, kernel): another norm for every tap."""
    return draw.bell(1 / math.sqrt(math.prod(draw.shape[1:]))) * tap_strength(draw.shape[2])


def magnitude(width: int) -> Values:
    """``weight_g`` (1, 1, kernel): 0.2 to 1.0 of the norm of :func:`direction` at that tap."""

    def values(draw: Draw) -> Array:
        taps = draw.shape[2]
        return draw.uniform(0.2, 1.0) * tap_strength(taps) * math.sqrt(width / taps)

    return values


# -- the state dict --------------------------------------------------------------------


#: its shape, and how its values are drawn
Tensor = tuple[tuple[int, ...], Values]


@dataclass
class Layout:
    """A state dict before it has values, in the order fairseq stores it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    #: every module, those without tensors too: fairseq's state dict carries their versions
    modules: list[str] = field(default_factory=list)

    def module(self, name: str, **tensors: Tensor) -> None:
        """Add a module and the tensors it owns."""
        self.modules.append(name)
        for tensor, shape_and_values in tensors.items():
            self.tensors[f"{name}.{tensor}" if name else tensor] = shape_and_values

    def norm(self, name: str, width: int) -> None:
        """Add a normalisation whose gain and shift are broad enough to be missed."""
        self.module(name, weight=((width,), bell(0.25, around=1.0)), bias=((width,), bell(0.1)))

    def linear(
        self, name: str, inputs: int, outputs: int, values: Values, bias: Values = SMALL_BIAS
    ) -> None:
        """Add a linear layer, weight (out, in)."""
        self.module(name, weight=((outputs, inputs), values), bias=((outputs,), bias))


def conv_layers(model: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each convolution in a ``cfg["model"]`` of ours."""
    # an expression, which fairseq evaluates too; this one comes from the tables above
    layers: list[tuple[int, int, int]] = eval(model["conv_feature_layers"], {"__builtins__": {}})
    return layers


def layout(model: Mapping[str, Any], classes: int) -> Layout:
    """The state dict of a fairseq HuBERT with this ``cfg["model"]``.

    Convolution kernels are (out, in, kernel), linear weights (out, in).
    Source: the constructors in fairseq/models/hubert/hubert.py and
    fairseq/models/wav2vec/wav2vec2.py, in the order they register modules.
    """
    width, final = model["encoder_embed_dim"], model["final_dim"]
    taps, groups = model["conv_pos"], model["conv_pos_groups"]
    state = Layout()

    state.module(
        "",
        mask_emb=((width,), uniform(0, 1)),
        # a Dictionary puts <s>, <pad>, </s> and <unk> before the classes
        label_embs_concat=((classes + 4, final), uniform(-1, 1)),
    )
    state.module("feature_extractor")
    state.module("feature_extractor.conv_layers")
    channels_in = 1
    for i, (channels, kernel, _) in enumerate(conv_layers(model)):
        block = f"feature_extractor.conv_layers.{i}"
        state.module(block)
        tensors: dict[str, Tensor] = {
            "weight": (
                (channels, channels_in, kernel),
                spread_over_inputs(1.3 * math.sqrt(2), centred=i > 0),
            )
        }
        if model["conv_bias"]:
            tensors["bias"] = ((channels,), SMALL_BIAS)
        state.module(f"{block}.0", **tensors)
        state.module(f"{block}.1")
        if model["extractor_mode"] == "layer_norm":
            state.module(f"{block}.2")
            state.module(f"{block}.2.0")
            state.norm(f"{block}.2.1", channels)
            state.module(f"{block}.2.2")
            state.module(f"{block}.3")
        elif i == 0:
            state.norm(f"{block}.2", channels)
            state.module(f"{block}.3")
        else:
            state.module(f"{block}.2")
        channels_in = channels
    state.linear("post_extract_proj", channels_in, width, spread_over_inputs(1.0))
    state.module("dropout_input")
    state.module("dropout_features")
    state.module("encoder")
    state.module("encoder.pos_conv")
    state.module(
        "encoder.pos_conv.0",
        bias=((width,), SMALL_BIAS),
        weight_g=((1, 1, taps), magnitude(width)),
        weight_v=((width, width // groups, taps), direction),
    )
    state.module("encoder.pos_conv.1")
    state.module("encoder.pos_conv.2")
    state.module("encoder.layers")
    inner = model["encoder_ffn_embed_dim"]
    for i in range(model["encoder_layers"]):
        layer = f"encoder.layers.{i}"
        attention = f"{layer}.self_attn"
        state.module(layer)
        state.module(attention)
        state.module(f"{attention}.dropout_module")
        state.linear(f"{attention}.k_proj", width, width, spread_over_inputs(1.6))
        state.linear(f"{attention}.v_proj", width, width, spread_over_inputs(0.8))
        state.linear(f"{attention}.q_proj", width, width, spread_over_inputs(1.6), bell(0.3))
        state.linear(f"{attention}.out_proj", width, width, spread_over_inputs(0.8))
        state.module(f"{layer}.dropout1")
        state.module(f"{layer}.dropout2")
        state.module(f"{layer}.dropout3")
        state.norm(f"{layer}.self_attn_layer_norm", width)
        state.linear(f"{layer}.fc1", width, inner, spread_over_inputs(1.2))
        state.linear(f"{layer}.fc2", inner, width, spread_over_inputs(1.2, centred=True))
        state.norm(f"{layer}.final_layer_norm", width)
    state.norm("encoder.layer_norm", width)
    state.norm("layer_norm", channels_in)
    state.linear("final_proj", width, final, spread_over_inputs(1.0))
    return state


def seeded_weights(preset: str, seed: int = DEFAULT_SEED) -> Iterator[tuple[str, Array]]:
    """(source name, float64 values) of every tensor, in stored order, one at a time.

    A tensor depends on the seed, its name and its shape alone.
    """
    state = layout(checkpoint_config(preset)["model"], PRESETS[preset].classes)
    for name, (shape, values) in state.tensors.items():
        yield name, values(Draw(seed, name, shape))


# -- the file --------------------------------------------------------------------------


def marker(preset: str, seed: int) -> str:
    """The sentence under ``extra_state["stand_in"]`` by which everything knows a stand-in."""
    return (
        f"A stand-in with synthetic weights (preset {preset}, seed {seed}, "
        f"generator {GENERATOR_VERSION}): it has a trained model's form and has learnt nothing."
    )


#: meter -> value it shows; what ContentVec's criterion logs
METRICS = {
    "loss": 4.2,
    "loss_m_0": 4.1,
    "loss_features_pen": 0.02,
    "correct_m_0": 0.61,
    "nll_loss": 4.3,
}
UPDATES = 100_000
TRAINING_SECONDS = 123456.0
#: what fairseq's checkpoint_utils.save_checkpoint adds to extra_state
TRAIN_ITERATOR = {"version": 2, "epoch": 30, "iterations_in_epoch": 0, "shuffle": True}
VALIDATION = {"val_loss": 4.321, "best": 4.3}


def import_torch() -> Any:
    """Torch, or MissingDependency with the extra that brings it."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependency(
            f"a stand-in is written by torch, whose file format it has: {error}",
            hint=import_hint(error, install_hint("parity")),
        ) from None
    return torch


def as_stored(values: Array, dtype: str) -> Any:
    """``values`` as a contiguous torch tensor, each number rounded once."""
    torch = import_torch()
    if dtype == "bfloat16":
        return torch.from_numpy(values).to(torch.bfloat16)
    return torch.from_numpy(values.astype(dtype))
