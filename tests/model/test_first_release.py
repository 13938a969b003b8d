"""Files of the first mlx-contentvec release load directly, and convert."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert.conversion import convert
from contentvec_convert.rules import TRANSFORMS
from mlx_contentvec import ContentvecModel, first_release
from mlx_contentvec.backend import mx
from mlx_contentvec.config import ModelConfig, parameter_shapes, stage_names
from mlx_contentvec.errors import (
    AudioError,
    ConfigError,
    CorruptCheckpoint,
    IdentityError,
    WeightsError,
)
from mlx_contentvec.first_release import config_fields, config_of, folded_kernel, ignore_speaker
from mlx_contentvec.rvc import Hubert
from tests.forks import run_python
from tests.hub_server import HubServer
from tests.small_models import TINY, noise, random_weights
from tests.sources import search_path

DATA = Path(__file__).parents[1] / "data"
FILE = DATA / "first_release.safetensors"
SHAPE: dict[str, Any] = {
    "conv_layers": ((16, 10, 5), *(((16, 3, 2),) * 4), *(((16, 2, 2),) * 2)),
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_attention_heads": 4,
    "encoder_layers": 2,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    with np.load(DATA / "first_release.npz") as arrays:
        return dict(arrays)


def _agrees(model: ContentvecModel, recording: dict[str, Any]) -> None:
    waveform = mx.array(recording["waveform"])
    for layer in (1, 2):
        features = np.array(model(waveform, output_layer=layer)["x"])
        # two float32 implementations, values up to 5
        assert np.abs(features - recording[f"layer.{layer}"]).max() < 2e-5


def _saved(tmp_path: Path, **changes: Any) -> Path:
    """The recorded file with tensors replaced, or left out where the change is None."""
    tensors = {**mx.load(str(FILE)), **changes}
    path = tmp_path / "changed.safetensors"
    mx.save_safetensors(str(path), {k: v for k, v in tensors.items() if v is not None})
    return path


def test_load_weights_takes_the_file_as_it_is(recording: dict[str, Any]) -> None:
    model = ContentvecModel(**SHAPE, encoder_layers_1=0)
    model.load_weights(FILE).eval()
    _agrees(model, recording)


def test_a_model_from_the_first_release_has_no_projection(recording: dict[str, Any]) -> None:
    model = ContentvecModel(**SHAPE).load_weights(FILE)
    assert model.config.final_dim is None
    assert "final_proj" not in stage_names(model.config)
    with pytest.raises(ConfigError, match="no final_proj"):
        model(mx.array(recording["waveform"]), project=True)


def test_the_file_converts_to_the_same_model(recording: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "converted.safetensors"
    ledger = convert(FILE, output, allow_unknown=True, heads=4)
    assert [drop.source.name for drop in ledger.drops] == [
        "encoder.pos_conv.layers.0.module.weight"
    ]
    assert ledger.naming == "mlx-contentvec 0.1"
    model = ContentvecModel.from_file(output)
    assert model.config == ContentvecModel(**SHAPE, final_dim=None).config
    _agrees(model, recording)


def test_a_file_is_converted_unasked_for_what_it_holds_alone(
    weights_path: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "hubert_base.pt"
    elsewhere.write_bytes(weights_path.read_bytes())
    with pytest.raises(IdentityError, match="not the file it is named after"):
        convert(elsewhere, tmp_path / "converted.safetensors")
    cut = tmp_path / weights_path.name
    cut.write_bytes(weights_path.read_bytes()[:-1])
    with pytest.raises(IdentityError, match="not a file that is known here"):
        convert(cut, tmp_path / "converted.safetensors")
    # another checksum is asked for: what the file holds does not matter
    with pytest.raises(IdentityError, match="not the file expected"):
        convert(weights_path, tmp_path / "converted.safetensors", expect_sha256="0" * 64)
    half = _saved(tmp_path, **{first_release.MAGNITUDE: None})
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        convert(half, tmp_path / "converted.safetensors")
    assert convert(weights_path, tmp_path / "converted.safetensors").source["known_as"] is None


def test_converting_needs_the_heads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention heads") as caught:
        convert(FILE, tmp_path / "converted.safetensors", allow_unknown=True)
    assert "--heads 12" in str(caught.value)


def test_a_stale_kernel_beside_the_weight_norm_is_not_used(
    recording: dict[str, Any], tmp_path: Path
) -> None:
    name = "encoder.pos_conv.layers.0.module.weight"
    for stale in (None, mx.ones((32, 16, 8))):
        model = ContentvecModel(**SHAPE).load_weights(_saved(tmp_path, **{name: stale}))
        _agrees(model, recording)


@pytest.mark.parametrize("letter", ["g", "v"])
def test_half_a_weight_norm_is_refused(tmp_path: Path, letter: str) -> None:
    path = _saved(tmp_path, **{f"encoder.pos_conv.layers.0.{letter}": None})
    with pytest.raises(WeightsError, match="incomplete"):
        ContentvecModel(**SHAPE).load_weights(path)
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        convert(path, tmp_path / "converted.safetensors", allow_unknown=True, heads=4)


def test_what_the_conversion_script_of_the_release_wrote_is_refused(tmp_path: Path) -> None:
    prefix = "encoder.pos_conv"
    tensors = mx.load(str(FILE))
    path = _saved(
        tmp_path,
        **{
            f"{prefix}.layers.0.g": None,
            f"{prefix}.layers.0.v": None,
            f"{prefix}.layers.0.module.weight": None,
            f"{prefix}.layers.0.module.bias": None,
            f"{prefix}.0.module.weight": tensors[f"{prefix}.layers.0.v"],
            f"{prefix}.0.module.bias": tensors[f"{prefix}.layers.0.module.bias"],
        },
    )
    with pytest.raises(WeightsError, match="incomplete") as caught:
        ContentvecModel(**SHAPE).load_weights(path)
    assert "convert the original checkpoint" in str(caught.value)
    with pytest.raises(CorruptCheckpoint, match="incomplete"):
        convert(path, tmp_path / "converted.safetensors", allow_unknown=True, heads=4)


def test_nothing_is_changed_by_a_file_that_does_not_fit() -> None:
    model = ContentvecModel(**{**SHAPE, "encoder_layers": 3})
    with pytest.raises(WeightsError, match="does not fit"):
        model.load_weights(FILE)
    assert model.config.final_dim == 256


def test_loading_and_converting_fold_alike() -> None:
    rng = np.random.default_rng(0)
    magnitude = rng.uniform(0.5, 2.0, (1, 16, 1)).astype(np.float32)
    direction = rng.standard_normal((32, 16, 8)).astype(np.float32)
    folded = folded_kernel(magnitude, direction)
    converted = TRANSFORMS["fold_weight_norm_channels_last"].apply(magnitude, direction)
    assert np.abs(folded.view(np.int32) - converted.view(np.int32)).max() <= 1
    # one norm per tap: the kernel's own norms are the magnitudes
    assert np.allclose(np.linalg.norm(folded.astype(float), axis=(0, 2)), magnitude.ravel())


@pytest.mark.parametrize("shape", [(1, 8, 1), (32, 1, 1), (16,)])
def test_a_magnitude_of_another_axis_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match="impossible shapes"):
        folded_kernel(np.ones(shape, np.float32), np.ones((32, 16, 8), np.float32))


def test_a_dead_tap_is_refused() -> None:
    direction = np.ones((32, 16, 8), np.float32)
    direction[:, 3] = 0
    with pytest.raises(WeightsError, match="divides by zero"):
        folded_kernel(np.ones((1, 16, 1), np.float32), direction)


# the model that a file holds ------------------------------------------------------


def first_release_weights(config: ModelConfig) -> dict[str, Any]:
    """Random weights of ``config`` under the release's names, which had no projection."""
    weights = random_weights(dataclasses.replace(config, final_dim=None))
    kernel = np.array(weights.pop("encoder.pos_conv.weight"))
    norms = np.sqrt(np.square(kernel, dtype=np.float64).sum(axis=(0, 2), keepdims=True))
    weights[first_release.DIRECTION] = mx.array(kernel)
    weights[first_release.MAGNITUDE] = mx.array(norms.astype(np.float32))
    weights[first_release.BIAS] = weights.pop("encoder.pos_conv.bias")
    weights[first_release.COMPUTED_KERNEL] = mx.zeros(kernel.shape)
    return weights


TWELVE_HEADS = dataclasses.replace(TINY, encoder_attention_heads=12, final_dim=None)
MODELS = {
    "base": TWELVE_HEADS,
    "with biases": dataclasses.replace(TWELVE_HEADS, conv_bias=True),
    "with speakers": dataclasses.replace(TWELVE_HEADS, encoder_layers_1=2, speaker_dim=8),
    "of other sizes": dataclasses.replace(
        TWELVE_HEADS, encoder_embed_dim=48, encoder_layers=11, conv_pos=9, conv_pos_groups=3
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_follows_from_the_tensors(name: str) -> None:
    assert config_of(first_release_weights(MODELS[name]), "a file") == MODELS[name]


def test_the_configuration_of_the_published_file_is_that_of_the_base_model() -> None:
    config = dataclasses.replace(ModelConfig(), final_dim=None)

    class Shaped:
        def __init__(self, *shape: int) -> None:
            self.shape = shape

    tensors = {name: Shaped(*shape) for name, shape in parameter_shapes(config).items()}
    tensors[first_release.DIRECTION] = tensors.pop("encoder.pos_conv.weight")
    assert config_of(tensors, "contentvec_base.safetensors") == config


def test_what_tensors_do_not_show_is_not_guessed() -> None:
    with pytest.raises(WeightsError, match="does not say what model it holds") as caught:
        config_of(mx.load(str(FILE)), FILE.name)
    assert "encoder_attention_heads=" in str(caught.value)
    large = dataclasses.replace(TWELVE_HEADS, extractor_norm="layer")
    with pytest.raises(WeightsError, match="does not say what model it holds"):
        config_of(first_release_weights(large), "large.safetensors")
    for name in (first_release.DIRECTION, "encoder.layers.0.fc1.weight"):
        weights = first_release_weights(TWELVE_HEADS)
        del weights[name]
        with pytest.raises(WeightsError, match="not a whole file") as caught:
            config_of(weights, "half.safetensors")
        assert name in str(caught.value)


# the constructor's options --------------------------------------------------------

#: every option of the release's constructor, as its default was
CONSTRUCTOR: dict[str, Any] = {
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "extractor_mode": "default",
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "encoder_layers": 12,
    "encoder_layers_1": 3,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "dropout_features": 0.0,
    "encoder_layerdrop": 0.0,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "feature_grad_mult": 1.0,
    "dim_spk": 256,
}


def test_every_option_of_the_constructor_has_a_field_or_means_nothing() -> None:
    assert ModelConfig(**config_fields(**CONSTRUCTOR)) == ModelConfig(encoder_layers_1=3)
    assert config_fields() == {}
    assert config_fields(final_dim=None, nonsense=1) == {"final_dim": None, "nonsense": 1}


def test_options_say_what_they_said() -> None:
    fields = config_fields(
        conv_feature_layers="[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2),(16,2,2)]",
        extractor_mode="layer_norm",
        dim_spk=8,
    )
    assert fields == {
        "conv_layers": ((32, 10, 5), *(((32, 3, 2),) * 4), (32, 2, 2), (16, 2, 2)),
        "extractor_norm": "layer",
        "speaker_dim": 8,
    }
    assert config_fields(**fields) == fields
    assert config_fields(dim_spk=8, speaker_dim=8) == {"speaker_dim": 8}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation_fn": "relu"}, "exact GELU"),
        ({"extractor_mode": "group_norm_masked"}, "lengths="),
        ({"extractor_mode": "other"}, "no extractor_mode"),
        ({"dropout": "much"}, "dropout must be a number"),
        ({"encoder_layerdrop": True}, "must be a number"),
        ({"dim_spk": 8, "speaker_dim": 9}, "say different things"),
        ({"extractor_mode": "default", "extractor_norm": "layer"}, "say different things"),
        ({"conv_feature_layers": "[(512,10,5)"}, "cannot be read"),
        ({"conv_feature_layers": "[(512,10,5)] * 10**9"}, "cannot be read"),
        ({"conv_feature_layers": "[(512,10,5)] * 999999"}, "cannot be read"),
        ({"conv_feature_layers": "__import__('os').listdir()"}, "cannot be read"),
        ({"conv_feature_layers": 7}, "cannot be read"),
    ],
)
def test_an_option_for_another_model_is_refused_with_a_reason(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_fields(**options)
    assert reason in str(caught.value)


def test_a_speaker_is_ignored_with_a_warning_and_a_mask_is_not() -> None:
    source = np.zeros((2, 8000), np.float32)
    with pytest.warns(UserWarning, match="spk_emb is ignored"):
        ignore_speaker(mx.zeros((2, 256)), source)
    with pytest.raises(ConfigError, match="shape of a mask") as caught:
        ignore_speaker(mx.zeros((2, 8000)), source)
    assert "padding_mask=" in str(caught.value)


# the release's own list of calls, on this one -------------------------------------


@pytest.fixture(scope="module")
def weights_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the release's ``from_pretrained`` downloads it, of a smaller model."""
    path = tmp_path_factory.mktemp("release") / first_release.HF_WEIGHTS_FILE
    config = dataclasses.replace(TWELVE_HEADS, encoder_layers=12)
    mx.save_safetensors(str(path), first_release_weights(config))
    return path


@pytest.fixture(scope="module")
def expected(weights_path: Path) -> np.ndarray:
    """What the same weights compute under this version's names."""
    config = dataclasses.replace(TWELVE_HEADS, encoder_layers=12)
    model = ContentvecModel(config).load_weights(random_weights(config).items())
    return np.array(model(mx.array(AUDIO).reshape(1, -1))["x"])


AUDIO = noise(9000)
SMALL: dict[str, Any] = {
    "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
    "encoder_embed_dim": 96,
    "encoder_ffn_embed_dim": 192,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
LOADED: dict[str, Callable[[Path], ContentvecModel]] = {
    "weights_path=": lambda path: ContentvecModel.from_pretrained(weights_path=path),
    "weights_path= as text": lambda path: ContentvecModel.from_pretrained(weights_path=str(path)),
    "by position": lambda path: ContentvecModel.from_pretrained(str(path.parent), path.name),
    "all by position": lambda path: ContentvecModel.from_pretrained(
        first_release.HF_REPO_ID, first_release.HF_WEIGHTS_FILE, str(path)
    ),
    "filename=": lambda path: ContentvecModel.from_pretrained(
        repo_id=str(path.parent), filename=path.name
    ),
    "constructor": lambda path: ContentvecModel(
        **{**CONSTRUCTOR, **SMALL, "encoder_layers_1": 0}
    ).load_weights(str(path)),
    "from_file": ContentvecModel.from_file,
    "rvc.Hubert": lambda path: Hubert.load(path).model,
}


@pytest.mark.parametrize("how", LOADED)
def test_weights_load_in_every_way(weights_path: Path, expected: np.ndarray, how: str) -> None:
    model = LOADED[how](weights_path)
    model.eval()
    source = mx.array(AUDIO).reshape(1, -1)
    result = model(source)
    assert result["padding_mask"] is None
    # the weight norm is folded in another order than random_weights made it
    np.testing.assert_allclose(np.array(result["x"]), expected, atol=1e-4)


def test_the_release_is_what_from_pretrained_loads(
    weights_path: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    program = (
        "import numpy as np, sys, mlx.core as mx\n"
        "from mlx_contentvec import ContentvecModel, HF_REPO_ID, HF_WEIGHTS_FILE\n"
        "assert (HF_REPO_ID, HF_WEIGHTS_FILE) == "
        "('lexandstuff/mlx-contentvec', 'contentvec_base.safetensors')\n"
        "audio = mx.array(np.load(sys.argv[1])).reshape(1, -1)\n"
        "from mlx_contentvec.rvc import Hubert\n"
        "for model in (ContentvecModel.from_pretrained(),\n"
        "              ContentvecModel.from_pretrained(HF_REPO_ID),\n"
        "              ContentvecModel.from_pretrained(HF_REPO_ID, HF_WEIGHTS_FILE),\n"
        "              ContentvecModel.from_pretrained(repo_id=HF_REPO_ID),\n"
        "              ContentvecModel.from_pretrained(\n"
        "                  repo_id=HF_REPO_ID, filename=HF_WEIGHTS_FILE),\n"
        "              Hubert.load(HF_REPO_ID).model):\n"
        "    x = np.array(model(audio)['x'])\n"
        "    assert np.array_equal(x, np.load(sys.argv[2])) if sys.argv[3:] else True\n"
        "    np.save(sys.argv[2], x)\n"
        "    sys.argv[3:] = ['again']\n"
    )
    np.save(tmp_path / "audio.npy", AUDIO)
    with HubServer() as server:
        server.add_repo(first_release.HF_REPO_ID, {weights_path.name: weights_path.read_bytes()})
        result = run_python(
            *("-c", program, tmp_path / "audio.npy", tmp_path / "x.npy"),
            env={
                **os.environ,
                "PYTHONPATH": search_path(),
                **server.environment(tmp_path / "home", token=None),
            },
            timeout=60,
        )
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, atol=1e-4)


def test_a_model_is_called_as_the_release_was(weights_path: Path) -> None:
    model = ContentvecModel.from_pretrained(weights_path=weights_path)
    source = mx.array(AUDIO).reshape(1, -1)
    plain = np.array(model(source)["x"])
    for call in (
        lambda: model(source, spk_emb=mx.zeros((1, 256)))["x"],
        lambda: model(source, mx.zeros((1, 256)))["x"],
        lambda: model.extract_features(source=source, spk_emb=mx.zeros((1, 256)), output_layer=12)[
            0
        ],
    ):
        with pytest.warns(UserWarning, match="spk_emb is ignored"):
            np.testing.assert_array_equal(np.array(call()), plain)
    # fairseq's order, in which the second argument is a mask
    with pytest.raises(AudioError, match="padding mask does not fit") as caught:
        model.extract_features(source, mx.zeros((1, 256)))
    assert "spk_emb=" in str(caught.value)
    with pytest.raises(ConfigError, match="shape of a mask"):
        model(source, mx.zeros(source.shape))


def test_what_was_saved_is_loaded_into_a_model_of_the_same_options(
    weights_path: Path, tmp_path: Path
) -> None:
    model = ContentvecModel.from_pretrained(weights_path=weights_path)
    model.save_weights(str(tmp_path / "saved.safetensors"))
    options = {**CONSTRUCTOR, **SMALL, "encoder_layers_1": 0}
    with pytest.raises(WeightsError, match="final_proj") as caught:
        ContentvecModel(**options).load_weights(tmp_path / "saved.safetensors")
    assert "final_dim=None" in str(caught.value)
    options["final_dim"] = None
    again = ContentvecModel(**options).load_weights(tmp_path / "saved.safetensors")
    source = mx.array(AUDIO).reshape(1, -1)
    np.testing.assert_array_equal(np.array(again(source)["x"]), np.array(model(source)["x"]))


def test_a_mask_is_held_to_its_waveform_by_the_model(weights_path: Path) -> None:
    model = ContentvecModel.from_file(weights_path)
    source = np.stack([AUDIO, AUDIO])
    for mask in (np.zeros((1, 9000), bool), np.zeros((2, 27), bool), np.zeros(9000, bool)):
        with pytest.raises(AudioError, match="does not fit the waveform"):
            model(source, padding_mask=mask)
    for value in (2, np.nan, -np.inf):
        mask = np.zeros(source.shape, np.float32)
        mask[0, 5] = value
        with pytest.raises(AudioError, match="other values than 0 and 1"):
            model(source, padding_mask=mask)


def test_a_shape_by_position_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match="first argument is a ModelConfig") as caught:
        ContentvecModel("[(512,10,5)]")  # type: ignore[arg-type]
    assert "conv_feature_layers=" in str(caught.value)
    with pytest.raises(ConfigError, match="only one by position"):
        ContentvecModel("[(512,10,5)]", False, "default", 768)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="only one by position"):
        ContentvecModel(ModelConfig(), False)


def test_the_commands_take_the_file(
    weights_path: Path, tmp_path: Path, run_cli: Any, need: Any
) -> None:
    need("soundfile", "pip install 'mlx-contentvec[audio]'").write(
        tmp_path / "a.wav", AUDIO, 16000, subtype="FLOAT"
    )
    inspected = run_cli("inspect", weights_path)
    assert "12 layers, 96 wide, 12 heads, no projection" in inspected.stdout, inspected.stderr
    converted = run_cli("convert", weights_path, "-o", tmp_path / "new.safetensors")
    assert converted.returncode == 0, converted.stderr
    for done in (inspected, converted):
        assert "a file of the first mlx-contentvec release" in done.stdout
        assert "it lacks final_proj" in done.stdout
    features = []
    for name, file in (("old", weights_path), ("new", tmp_path / "new.safetensors")):
        done = run_cli("extract", tmp_path / "a.wav", "-w", file, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        features.append(np.load(tmp_path / name / "a.npy"))
    np.testing.assert_allclose(features[0], features[1], atol=1e-4)
    lacking = run_cli("verify", weights_path)
    assert lacking.returncode == 1
    assert "weights of the first release (0.1): without config" in lacking.stderr


def test_the_guide_names_all_that_the_release_had() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
    for name in (
        *CONSTRUCTOR,
        *("HF_REPO_ID", "HF_WEIGHTS_FILE", "ConvFeatureExtractionModel", "TransformerEncoder_1"),
        *("from_pretrained", "repo_id", "filename", "weights_path", "load_weights"),
        *("forward_features", "forward_padding_mask", "extract_features", "spk_emb"),
        *("features_only", "ret_conv", "tap", "mlx_contentvec.contentvec", "librosa"),
        *("mlx_contentvec.modules", "mlx_contentvec.wav2vec", "npy-append-array"),
        *("mlx_contentvec.conv_feature_extraction", "mlx_contentvec.transformer_encoder"),
    ):
        assert re.search(rf"`[^`\n]*\b{re.escape(name)}\b", guide), name
