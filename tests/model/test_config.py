"""A configuration holds what a model can be made of, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import ContentvecModel, ModelConfig
from mlx_contentvec.config import (
    EPS,
    EXTRACTOR_EPS,
    PRESETS,
    V1_LAYER,
    parameter_shapes,
    require_layer,
    stage_input,
    stage_names,
)
from mlx_contentvec.errors import ConfigError
from tests.small_models import DEEP, LARGE, MULTILINGUAL, TINY

SPEAKER = dataclasses.replace(TINY, encoder_layers_1=2, speaker_dim=8)
CONFIGS = {"base": TINY, "large": LARGE, "batch norm": MULTILINGUAL, "speaker": SPEAKER}

FIELDS = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
#: the whole numbers of a configuration that are one or more
SIZES = [name for name, kind in FIELDS.items() if kind == "int" and name != "encoder_layers_1"]
SWITCHES = [name for name, kind in FIELDS.items() if kind == "bool"]

#: what is changed of a possible configuration -> what is said of it
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    *(
        ({field: value}, f"{field} must be a positive integer below 16,777,216, not ")
        for field in SIZES
        for value in (0, -1, 1.0, True, "1", None, 2**24, 10**5000)
    ),
    *(
        ({field: value}, f"{field} must be true or false, not ")
        for field in SWITCHES
        for value in (0, 1, None, "yes")
    ),
    *(
        ({"normalize_eps": eps}, "normalize_eps must be a number between 0 and 1, not ")
        for eps in (0.0, -1e-7, 1.0, 1e300, float("nan"), "1e-5", True, 0, None)
    ),
    *(
        ({"encoder_layers_1": layers}, "encoder_layers_1 must be 0 or more, not ")
        for layers in (-1, False, 0.0, None, 2**24)
    ),
    *(
        ({"final_dim": width}, "final_dim must be a positive integer or None, not ")
        for width in (0, -1, True, 1.0, 2**24)
    ),
    *(
        ({"conv_layers": layers}, "conv_layers must be (channels, kernel, stride) triples, not ")
        for layers in (
            *((), 7, (7,), ((8, 2),), ((8, 2, 2, 2),)),
            *(((8, 2, 0),), ((8, 2.0, 2),), ((8, 2, 2), (8, 2, True))),
        )
    ),
    ({"conv_layers": ((8, 2, 2),) * 65}, "65 convolutions, at most 64 are possible"),
    ({"extractor_norm": "batch"}, "extractor_norm must be 'group' or 'layer', not 'batch'"),
    ({"encoder_layers": 1001}, "1,001 encoder layers, at most 1,000 are possible"),
    ({"encoder_layers": 1000, "encoder_layers_1": 1}, "1,001 encoder layers, at most 1,000"),
    ({"encoder_attention_heads": 7}, "7 heads do not divide a width of 96"),
    ({"conv_pos_groups": 7}, "7 groups of the positional convolution do not divide a width of 96"),
]


@pytest.mark.parametrize(
    ("fields", "said"), IMPOSSIBLE, ids=lambda v: "" if isinstance(v, str) else next(iter(v))
)
def test_what_cannot_be_is_refused_in_a_few_words(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        dataclasses.replace(TINY, **fields)
    assert refused.value.problem.startswith("impossible model configuration: " + said)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(SIZES, 1),
        {"speaker_dim": 2**24 - 1},
        {"final_dim": 1},
        {"final_dim": None},
        {"encoder_layers": 1000},
        {"encoder_layers": 998, "encoder_layers_1": 2},
        {"conv_layers": [[1, 1, 1]] * 64},
        {"normalize_eps": 1e-300},
        {"normalize_eps": 0.999},
    ],
)
def test_what_is_only_unusual_is_taken(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(TINY, **fields)
    for field, value in fields.items():
        assert json.dumps(getattr(config, field)) == json.dumps(value)


@pytest.mark.parametrize("fields", [{"encoder_layers": 0}, {"colour": "blue"}])
def test_a_model_is_not_built_of_what_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ContentvecModel(**fields)


@pytest.mark.parametrize("config", [*CONFIGS.values(), dataclasses.replace(TINY, final_dim=None)])
def test_the_parameters_of_a_model_are_the_planned_ones(config: ModelConfig) -> None:
    from mlx.utils import tree_flatten

    parameters: Any = tree_flatten(ContentvecModel(config).parameters())
    assert {name: tuple(array.shape) for name, array in parameters} == parameter_shapes(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_survives_json(name: str) -> None:
    assert ModelConfig.from_json(CONFIGS[name].to_json()) == CONFIGS[name]


def test_an_unknown_or_missing_stored_field_is_an_error() -> None:
    fields = TINY.to_dict()
    with pytest.raises(ConfigError, match=r"found +unknown fields \['colour'\]"):
        ModelConfig.from_dict({**fields, "colour": "blue"})
    del fields["normalize"]
    with pytest.raises(ConfigError, match=r"found +missing fields \['normalize'\]"):
        ModelConfig.from_dict(fields)
    with pytest.raises(ConfigError, match=r"unknown fields .*, missing fields"):
        ModelConfig.from_dict({**fields, "colour": "blue"})


def test_a_stored_configuration_that_is_no_json_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="the stored configuration cannot be read"):
        ModelConfig.from_json("{")


def test_the_base_models_frames_are_those_of_fairseq() -> None:
    base = PRESETS["base"]
    assert (base.hop, base.receptive_field) == (320, 400)
    assert {channels for channels, _, _ in base.conv_layers} == {512}
    counts = [base.frames(samples) for samples in (0, 9, 399, 400, 719, 720, 16000)]
    assert counts == [0, 0, 0, 1, 1, 2, 49]
    # a clip that ends in the middle of the convolutions
    assert ModelConfig(conv_layers=((8, 2, 2), (8, 3, 1))).frames(5) == 0


def test_the_epsilons_are_those_of_the_originals() -> None:
    assert (EPS, EXTRACTOR_EPS, ModelConfig().normalize_eps) == (1e-5, 1e-7, 1e-5)


@pytest.mark.parametrize("layer", [1, 3, np.int64(2)])
def test_layers_that_a_model_has_are_taken(layer: Any) -> None:
    require_layer(layer, 3)


def test_layers_that_a_model_lacks_are_refused() -> None:
    for layer in (0, 4, -1, True, 2.0, "2", None, 10**5000):
        with pytest.raises(ConfigError, match=r"this model has no layer .* to take") as refused:
            require_layer(layer, 3)
        assert refused.value.expected == "1 to 3, counted from 1 as in fairseq"
        assert len(str(refused.value)) < 300


def test_a_large_number_is_shown_by_its_length() -> None:
    for layer, shown in ((2**256 - 1, str(2**256 - 1)[:5]), (2**256, "an integer of 257 bits")):
        with pytest.raises(ConfigError, match=f"no layer {shown}"):
            require_layer(layer, 3)


def test_every_stage_reads_the_one_before_it_and_v1_the_ninth_layer() -> None:
    names = stage_names(DEEP)
    assert names[:9] == (*(f"conv.{i}" for i in range(7)), "projection", "positional")
    assert names[9:] == (*(f"layer.{i}" for i in range(1, 13)), "final_proj")
    assert [stage_input(DEEP, stage) for stage in names[:-1]] == [None, *names[:-2]]
    assert stage_input(DEEP, "final_proj") == f"layer.{V1_LAYER}" == "layer.9"
    assert stage_input(SPEAKER, "final_proj") == "layer.5"
    assert stage_names(LARGE)[-3:] == ("layer.3", "final_norm", "final_proj")
    assert stage_names(dataclasses.replace(LARGE, final_dim=None))[-1] == "final_norm"
    with pytest.raises(ValueError, match=r"no stage 'layer\.13': one of conv\.0"):
        stage_input(DEEP, "layer.13")
