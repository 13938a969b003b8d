"""Rules: what becomes of fairseq's tensors, and what its configuration may say."""

from __future__ import annotations

import copy
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contentvec_convert.checkpoint import Checkpoint
from contentvec_convert.ledger import account
from contentvec_convert.rules import TRANSFORMS
from contentvec_convert.sources import fairseq, plan_for
from mlx_contentvec.config import PRESETS, ModelConfig, parameter_shapes
from mlx_contentvec.errors import ConfigError, MappingError, UnsupportedCheckpoint
from mlx_contentvec.weight_norm import fold_weight_norm

BASE_MODEL = {
    "_name": "hubert",
    "extractor_mode": "default",
    "encoder_layers": 12,
    "encoder_layers_1": 3,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "final_dim": 256,
    "layer_norm_first": False,
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
}
TASK = {"_name": "hubert_pretraining", "normalize": False, "sample_rate": 16000}


def source_shapes(config: ModelConfig, kernel: str) -> dict[str, tuple[int, ...]]:
    """What fairseq would store for ``config``: the rules read backwards, with shapes undone."""
    targets = parameter_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in fairseq.rules(config, kernel=kernel):
        shape = targets[rule.target]
        if rule.transform == "fold_weight_norm":
            magnitude, direction = rule.sources
            shapes[magnitude] = (1, 1, shape[1])
            shapes[direction] = (shape[0], shape[2], shape[1])
        else:
            (name,) = rule.sources
            shapes[name] = (
                (shape[0], shape[2], shape[1]) if rule.transform == "conv_kernel" else shape
            )
    return shapes


def fairseq_checkpoint(
    config: ModelConfig | None = None,
    *,
    kernel: str = "weight_g",
    extra: tuple[str, ...] = ("mask_emb", "label_embs_concat"),
    stored: dict[str, Any] | None = None,
) -> Checkpoint:
    """A checkpoint without bytes: names, shapes, dtypes and a configuration."""
    shapes = source_shapes(config or ModelConfig(), kernel)
    shapes.update(dict.fromkeys(extra, (8,)))
    tensors: Any = {
        name: SimpleNamespace(name=name, shape=shape, dtype="float16")
        for name, shape in shapes.items()
    }
    if stored is None:
        stored = {"model": dict(BASE_MODEL), "task": dict(TASK)}
    return Checkpoint(Path("a.pt"), (Path("a.pt"),), "torch zip", tensors, config=stored)


def stored_config(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    model = dict(
        BASE_MODEL,
        extractor_mode={"group": "default", "layer": "layer_norm"}[config.extractor_norm],
        encoder_layers=config.encoder_layers,
        encoder_layers_1=config.encoder_layers_1,
        encoder_embed_dim=config.encoder_embed_dim,
        encoder_ffn_embed_dim=config.encoder_ffn_embed_dim,
        encoder_attention_heads=config.encoder_attention_heads,
        layer_norm_first=config.layer_norm_first,
        conv_bias=config.conv_bias,
    )
    return {"model": {**model, **changes}, "task": {**TASK, "normalize": config.normalize}}


# ---- transforms


def test_a_convolution_kernel_is_moved_to_channels_last_and_back() -> None:
    kernel = np.arange(2 * 3 * 5, dtype=np.float16).reshape(2, 3, 5)
    transform = TRANSFORMS["conv_kernel"]
    moved = transform.apply(kernel)
    assert moved.shape == transform.shape(kernel.shape) == (2, 5, 3)
    assert moved[1, 4, 2] == kernel[1, 2, 4]
    (back,) = transform.undo(moved) or ()
    assert np.array_equal(back, kernel)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_folded_kernel_is_torchs_in_float64_rounded_once(torch: Any, dtype: str) -> None:
    random = np.random.default_rng(3)
    direction = random.standard_normal((70, 6, 16)).astype(dtype)
    direction *= np.linspace(0.2, 3, 16).astype(dtype)
    magnitude = random.uniform(0.5, 2, (1, 1, 16)).astype(dtype)
    convolution = torch.nn.Conv1d(6, 70, 16, dtype=torch.float64)
    convolution = torch.nn.utils.parametrizations.weight_norm(convolution, dim=2)
    weights = convolution.parametrizations.weight
    with torch.no_grad():
        weights.original0.copy_(torch.from_numpy(magnitude))
        weights.original1.copy_(torch.from_numpy(direction))
        expected = convolution.weight.numpy()
    folded = fold_weight_norm(magnitude, direction)
    assert folded.dtype == np.float32
    assert folded.shape == (70, 16, 6)
    # the order of a float64 sum may tip a rounding now and then, by one unit
    folded, expected = folded.transpose(0, 2, 1), expected.astype(np.float32)
    np.testing.assert_array_max_ulp(folded, expected, 1)
    assert np.mean(folded != expected) < 1e-3


def test_the_norm_runs_over_out_and_in_and_over_no_other_axes() -> None:
    random = np.random.default_rng(4)
    direction = random.standard_normal((8, 4, 16))
    magnitude = random.uniform(0.5, 2, (1, 1, 16))
    folded = fold_weight_norm(magnitude, direction).transpose(0, 2, 1)
    for k in range(16):
        assert np.linalg.norm(folded[:, :, k]) == pytest.approx(magnitude[0, 0, k], rel=1e-6)
    over_taps = magnitude * direction / np.linalg.norm(direction, axis=2, keepdims=True)
    assert np.abs(folded - over_taps).max() > 0.1


def test_the_parts_of_a_weight_norm_must_go_together() -> None:
    with pytest.raises(MappingError, match="weight norm"):
        TRANSFORMS["fold_weight_norm"].shape((1, 1, 5), (8, 4, 6))
    with pytest.raises(MappingError, match="weight norm"):
        # dim=0, as a plain torch weight norm has it
        TRANSFORMS["fold_weight_norm"].shape((8, 1, 1), (8, 4, 6))


def test_what_only_moves_can_be_undone_and_what_is_computed_says_it_cannot() -> None:
    for name, transform in TRANSFORMS.items():
        kernel = np.arange(24.0).reshape(2, 3, 4)
        if transform.lossless:
            undone = transform.undo(transform.apply(kernel))
            assert undone is not None and np.array_equal(undone[0], kernel), name
        else:
            assert transform.undo(kernel) is None, name


# ---- the plan of each architecture

CONDITIONED = ModelConfig(encoder_layers=3, encoder_layers_1=2, speaker_dim=64)
BATCH_NORM = ModelConfig(encoder_layers=2, conv_pos_batch_norm=True)


@pytest.mark.parametrize(
    ("config", "kernel"),
    [
        (PRESETS["base"], "weight_g"),
        (PRESETS["base"], "parametrizations"),
        (PRESETS["large"], "weight_g"),
        (PRESETS["xlarge"], "weight_g"),
        (ModelConfig(encoder_layers=2, conv_bias=True), "weight_g"),
        (CONDITIONED, "weight_g"),
        (BATCH_NORM, "batch_norm"),
    ],
    ids=["base", "parametrizations", "large", "xlarge", "conv-bias", "conditioned", "batch-norm"],
)
def test_every_architecture_is_planned_without_a_tensor_left(
    config: ModelConfig, kernel: str
) -> None:
    checkpoint = fairseq_checkpoint(config, kernel=kernel, stored=stored_config(config))
    plan = plan_for(checkpoint)
    assert plan.naming == "fairseq"
    assert plan.config == config
    account(plan, checkpoint.tensors)


def test_the_real_file_has_214_tensors_of_which_2_are_dropped() -> None:
    checkpoint = fairseq_checkpoint()
    plan = plan_for(checkpoint)
    assert len(checkpoint.tensors) == 214
    assert [drop.source for drop in plan.drops] == ["mask_emb", "label_embs_concat"]
    assert all(drop.reason for drop in plan.drops)
    assert plan.config == ModelConfig()


def test_a_leftover_of_the_configuration_is_ignored_and_said() -> None:
    plan = plan_for(fairseq_checkpoint())
    assert plan.config.encoder_layers_1 == 0
    assert any("encoder_layers_1: 3" in note for note in plan.notes)


def test_training_leftovers_of_full_contentvec_are_dropped_with_reasons() -> None:
    leftovers = (
        "mask_emb",
        "layer_proj.weight",
        "layer_proj.bias",
        "target_glu.0.weight",
        "target_glu.0.bias",
    )
    checkpoint = fairseq_checkpoint(
        CONDITIONED, extra=leftovers, stored=stored_config(CONDITIONED, _name="contentvec")
    )
    plan = plan_for(checkpoint)
    assert {drop.source for drop in plan.drops} == set(leftovers)
    account(plan, checkpoint.tensors)


def test_layers_are_counted_in_the_tensors_and_a_contradiction_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_for(fairseq_checkpoint(ModelConfig(encoder_layers=11)))
    assert "11 encoder layers" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        plan_for(
            fairseq_checkpoint(CONDITIONED, stored=stored_config(CONDITIONED, encoder_layers_1=3))
        )
    assert "2 speaker-conditioned layers" in str(caught.value)


def test_a_width_that_contradicts_the_tensors_is_refused_by_name() -> None:
    config = ModelConfig(encoder_layers=2)
    checkpoint = fairseq_checkpoint(
        config, stored=stored_config(config, encoder_ffn_embed_dim=3000)
    )
    with pytest.raises(MappingError, match=r"encoder\.layers\.0\.fc1\.weight"):
        account(plan_for(checkpoint), checkpoint.tensors)


def test_the_head_count_comes_from_the_configuration_or_the_caller_and_from_nowhere_else() -> None:
    stored = {"model": dict(BASE_MODEL), "task": TASK}
    del stored["model"]["encoder_attention_heads"]
    with pytest.raises(ConfigError, match="heads"):
        plan_for(fairseq_checkpoint(stored=stored))
    plan = plan_for(fairseq_checkpoint(stored=stored), heads=8)
    assert plan.config.encoder_attention_heads == 8
    with pytest.raises(ConfigError, match="heads"):
        plan_for(fairseq_checkpoint(), heads=8)


def test_a_bare_state_dict_needs_the_caller_for_what_no_tensor_shows() -> None:
    checkpoint = fairseq_checkpoint(stored={})
    with pytest.raises(ConfigError, match="normalis"):
        plan_for(checkpoint, heads=12)
    with pytest.raises(ConfigError, match="heads"):
        plan_for(checkpoint, normalize=False)
    plan = plan_for(checkpoint, heads=12, normalize=False)
    assert plan.config == ModelConfig()
    assert any("no configuration" in note for note in plan.notes)


def test_an_old_namespace_keeps_everything_in_one_place() -> None:
    stored = {"model": {**BASE_MODEL, "arch": "hubert", "normalize": True}}
    del stored["model"]["_name"]
    assert plan_for(fairseq_checkpoint(stored=stored)).config.normalize is True


def test_a_missing_projection_is_said() -> None:
    config = ModelConfig(final_dim=None)
    plan = plan_for(fairseq_checkpoint(config))
    assert plan.config.final_dim is None
    assert any("final_proj" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_name": "wav2vec2"}, "wav2vec2"),
        ({"activation_fn": "gelu_fast"}, "activation_fn"),
        ({"layer_type": "conformer"}, "layer_type"),
        ({"pos_conv_depth": 5}, "pos_conv_depth"),
        ({"extractor_mode": "group_norm_masked"}, "extractor_mode"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(change: Any, said: str) -> None:
    stored = {"model": {**BASE_MODEL, **change}, "task": TASK}
    with pytest.raises(UnsupportedCheckpoint, match=said) as caught:
        plan_for(fairseq_checkpoint(stored=stored))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_embed_dim", "768"),
        ("encoder_layers", None),
        ("conv_pos", 128.0),
        ("layer_norm_first", "False"),
        ("conv_bias", 0),
        ("conv_feature_layers", None),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(key: str, value: Any) -> None:
    stored = copy.deepcopy({"model": {**BASE_MODEL, key: value}, "task": TASK})
    with pytest.raises(ConfigError, match=key):
        plan_for(fairseq_checkpoint(stored=stored))


def test_unknown_names_are_refused_with_a_few_of_them() -> None:
    checkpoint = fairseq_checkpoint()
    checkpoint.tensors = {"enc_p.emb.weight": checkpoint.tensors["mask_emb"]}
    with pytest.raises(UnsupportedCheckpoint) as caught:
        plan_for(checkpoint)
    assert "enc_p.emb.weight" in str(caught.value)


# ---- the expression that describes the convolutions


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        (BASE_MODEL["conv_feature_layers"], ModelConfig().conv_layers),
        ("[(4, 3, 2), (5, 3, 2)]", ((4, 3, 2), (5, 3, 2))),
        ("2 * [(4, 3, 2)]", ((4, 3, 2),) * 2),
        (" [[4, 3, 2]] * 1 ", ((4, 3, 2),)),
    ],
)
def test_the_list_of_convolutions_is_read(text: str, layers: Any) -> None:
    assert fairseq._conv_layers({"conv_feature_layers": text}) == layers


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[(512, 10, 5)] * 10**9",
        "[(512, 10, 5)] * 10000000",
        "([(512, 10, 5)] * 64) * 64",
        "[(512, 10, 5)] * -1",
        "[(512, 10.0, 5)]",
        "[(True, 10, 5)]",
        "[x for x in [(512, 10, 5)]]",
        "[512, 10, 5]",
        "[(512, 10, 5)",
        "",
        "(" * 900,
        "-" * 900 + "1",
        "[(512, 10, 5)] + " * 90 + "x" * 2000,
        "[(1,1,1)]\x00",
    ],
)
def test_nothing_but_lists_of_integers_is_read_as_convolutions(text: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError):
            fairseq._conv_layers({"conv_feature_layers": text})
        assert tracemalloc.get_traced_memory()[1] < 10_000_000, "bytes at the peak"
    finally:
        tracemalloc.stop()
