"""Hugging Face folders and files: every form of name and file, and what is said of bad ones."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.conversion import convert
from contentvec_convert.export import export
from contentvec_convert.ledger import Ledger, account
from contentvec_convert.recognition import describe
from contentvec_convert.sources import plan_for
from contentvec_parity.references import open_reference
from mlx_contentvec.config import BASE_CONV_LAYERS
from mlx_contentvec.errors import ConfigError, ContentvecError, MappingError, UnsupportedCheckpoint
from tests.originals import (
    TINY_BASE,
    TINY_LARGE,
    save_transformers,
    transformers_hubert,
)

WITH_HEAD = "HubertModelWithFinalProj"


@pytest.fixture(scope="module")
def model(need: Callable[[str, str], Any]) -> Any:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    return transformers_hubert(TINY_BASE, model_class=WITH_HEAD)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_transformers(model, TINY_BASE, tmp_path_factory.mktemp("hugging-face") / "model")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The folder, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _convert(source: Path, **options: Any) -> Ledger:
    output = source.with_name(f"{source.name}.safetensors")
    return convert(source, output, allow_unknown=True, force=True, **options)


def _digests(ledger: Ledger) -> dict[str, str]:
    return {row.target: row.sha256 for row in ledger.tensors}


def _edit(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del fields[key]
        else:
            fields[key] = value
    path.write_text(json.dumps(fields))


def _rename(folder: Path, names: Callable[[str], str]) -> None:
    """Save the folder's tensors under other names."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    save_file({names(name): array for name, array in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "form",
    [
        {"weights": "bin"},
        {"weights": "bin", "weight_norm": "weight_g"},
        {"weight_norm": "weight_g"},
        {"max_shard_size": "100KB"},
    ],
    ids=["pytorch_model.bin", "bin with weight_g", "weight_g and weight_v", "sharded"],
)
def test_every_form_of_a_folder_converts_to_the_same_tensors(
    model: Any, folder: Path, tmp_path: Path, form: dict[str, str]
) -> None:
    other = save_transformers(model, TINY_BASE, tmp_path / "other", **form)
    assert _digests(_convert(other)) == _digests(_convert(folder))


def test_a_prefix_of_every_name_changes_nothing(folder: Path, copy: Path) -> None:
    _rename(copy, lambda name: f"hubert.{name}")
    assert _digests(_convert(copy)) == _digests(_convert(folder))


def test_a_head_beside_a_prefixed_model_is_found(folder: Path, copy: Path) -> None:
    _rename(copy, lambda name: name if name.startswith("final_proj") else f"hubert.{name}")
    assert _digests(_convert(copy)) == _digests(_convert(folder))


def test_the_model_of_a_recogniser_converts_and_its_head_is_dropped(tmp_path: Path) -> None:
    recogniser = transformers_hubert(TINY_BASE, model_class="HubertForCTC")
    ledger = _convert(save_transformers(recogniser, TINY_BASE, tmp_path / "ctc"))
    assert ledger.config.final_dim is None
    assert {"lm_head.weight", "lm_head.bias", "hubert.masked_spec_embed"} == {
        drop.source.name for drop in ledger.drops
    }


def test_half_precision_converts_losslessly(model: Any, tmp_path: Path) -> None:
    half = save_transformers(model, TINY_BASE, tmp_path / "half", dtype="float16")
    for row in _convert(half).tensors:
        assert row.exact or row.transform == "fold_weight_norm"


def test_a_weight_file_takes_the_configuration_beside_it(folder: Path, copy: Path) -> None:
    assert _digests(_convert(copy / "model.safetensors")) == _digests(_convert(folder))


def test_a_kernel_without_its_weight_norm_is_taken_as_it_is(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = copy / "model.safetensors"
    tensors = load_file(path)
    conv = "encoder.pos_conv_embed.conv"
    parts = [tensors.pop(f"{conv}.parametrizations.weight.original{i}") for i in range(2)]
    tensors[f"{conv}.weight"] = parts[1]
    save_file(tensors, path)
    _convert(copy)
    with open_checkpoint(copy.with_name("copy.safetensors")) as converted:
        kernel = converted.tensors["encoder.pos_conv.weight"].read()
    assert np.array_equal(kernel, parts[1].transpose(0, 2, 1))


def test_the_folder_says_whether_the_input_is_normalised(copy: Path) -> None:
    _edit(copy / "preprocessor_config.json", do_normalize=True)
    assert _convert(copy).config.normalize is True


def test_a_feature_extractor_that_does_not_say_it_normalises(copy: Path) -> None:
    _edit(copy / "preprocessor_config.json", do_normalize=...)
    assert _convert(copy).config.normalize is True


def test_the_feature_extractor_may_lie_inside_a_processor(copy: Path) -> None:
    fields = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(
        json.dumps({"feature_extractor": {**fields, "do_normalize": True}})
    )
    assert _convert(copy).config.normalize is True


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_no_format_holds_are_sent_to_none(copy: Path, dtype: str) -> None:
    from safetensors.numpy import load_file, save_file

    path, name = copy / "model.safetensors", "encoder.layer_norm.bias"
    for value, told in ((1e300, "the checkpoint is damaged"), (1e30, "--dtype float32 holds them")):
        tensors = load_file(path)
        save_file({**tensors, name: np.full(tensors[name].shape, value)}, path)
        if dtype == "float32" and value < float(np.finfo(np.float32).max):
            _convert(copy, dtype=dtype)
            continue
        with pytest.raises(MappingError, match="too large for the output format") as caught:
            _convert(copy, dtype=dtype)
        assert told in str(caught.value)


def test_a_kernel_in_the_order_of_mlx_is_told_from_one_that_fits(copy: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path, name = copy / "model.safetensors", "feature_extractor.conv_layers.0.conv.weight"
    tensors = load_file(path)
    turned = np.ascontiguousarray(tensors[name].transpose(0, 2, 1))
    save_file({**tensors, name: turned}, path)
    out, kernel, inputs = turned.shape
    with pytest.raises(MappingError) as caught:
        _convert(copy)
    assert (
        f"{name} {turned.shape}, which makes {(out, inputs, kernel)}, for {name} {turned.shape}"
        in str(caught.value)
    )


def test_two_files_of_a_feature_extractor_must_agree(copy: Path) -> None:
    fields = json.loads((copy / "preprocessor_config.json").read_text())
    processor = copy / "processor_config.json"
    for change in ({"do_normalize": True}, {"sampling_rate": 8000}):
        processor.write_text(json.dumps({"feature_extractor": {**fields, **change}}))
        with pytest.raises(ConfigError, match="contradict each other") as caught:
            _convert(copy)
        assert f"{processor.name}: do_normalize" in str(caught.value)
    processor.write_text(json.dumps({"feature_extractor": fields}))
    assert _convert(copy).config.normalize is fields["do_normalize"]


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("stated", [{}, {"do_normalize": ...}, {"sampling_rate": ...}])
def test_the_folder_is_read_as_transformers_reads_it(
    copy: Path, file: str, stated: dict[str, Any]
) -> None:
    import transformers

    path = copy / "preprocessor_config.json"
    _edit(path, **{"do_normalize": True, "sampling_rate": 8000, **stated})
    if file != path.name:
        fields = json.loads(path.read_text())
        path.unlink()
        (copy / file).write_text(json.dumps({"feature_extractor": fields}))
    config = _convert(copy).config
    theirs = transformers.Wav2Vec2FeatureExtractor.from_pretrained(copy, local_files_only=True)
    assert config.normalize == theirs.do_normalize
    assert config.sample_rate == theirs.sampling_rate
    reference = open_reference("transformers", copy).config
    assert (reference.normalize, reference.sample_rate) == (config.normalize, config.sample_rate)


@pytest.mark.parametrize("rate", ["16000", None, 16000.5, True])
def test_a_sample_rate_that_is_no_number_is_refused(copy: Path, rate: Any) -> None:
    _edit(copy / "preprocessor_config.json", sampling_rate=rate)
    with pytest.raises(ConfigError, match="does not say sampling_rate"):
        _convert(copy)


@pytest.mark.parametrize("to", ["transformers", "fairseq"])
def test_another_sample_rate_goes_there_and_back(copy: Path, to: str) -> None:
    _edit(copy / "preprocessor_config.json", sampling_rate=8000)
    _convert(copy)
    back = copy.with_name("back")
    export(copy.with_name("copy.safetensors"), back, to=to)
    assert _convert(back).config.sample_rate == 8000


def test_without_a_feature_extractor_the_caller_has_to_say_it(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="wants normalised input") as caught:
        _convert(copy)
    assert "--no-normalize" in str(caught.value)
    assert _convert(copy, normalize=False).config.normalize is False
    assert _convert(copy, normalize=True).config.normalize is True


def test_a_caller_who_contradicts_the_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="normalize is False"):
        _convert(folder, normalize=True)
    with pytest.raises(ConfigError, match="heads is 4"):
        _convert(folder, heads=8)
    assert _convert(folder, heads=4, normalize=False).config.encoder_attention_heads == 4


def test_heads_that_nobody_says_are_not_guessed(copy: Path) -> None:
    _edit(copy / "config.json", num_attention_heads=...)
    with pytest.raises(ConfigError, match="number of attention heads is not known") as caught:
        _convert(copy)
    assert "--heads" in str(caught.value)
    assert _convert(copy, heads=4).config.encoder_attention_heads == 4


@pytest.mark.parametrize("layers", [2, 4])
def test_a_configuration_of_another_depth_is_refused(copy: Path, layers: int) -> None:
    _edit(copy / "config.json", num_hidden_layers=layers)
    with pytest.raises(ConfigError, match="contradicts the tensors") as caught:
        _convert(copy)
    assert "3 encoder layers" in str(caught.value)


def test_a_configuration_of_another_width_is_refused(copy: Path) -> None:
    _edit(copy / "config.json", intermediate_size=144)
    with pytest.raises(MappingError):
        _convert(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("feat_extract_activation", "relu"),
        ("layer_norm_eps", 1e-6),
        ("feat_proj_layer_norm", False),
        ("adapter_attn_dim", 16),
    ],
)
def test_what_the_model_does_not_compute_is_refused(copy: Path, key: str, value: Any) -> None:
    _edit(copy / "config.json", **{key: value})
    with pytest.raises(UnsupportedCheckpoint, match="does not") as caught:
        _convert(copy)
    assert key in str(caught.value)
    assert "every" not in str(caught.value)
    assert ("distilhubert" in str(caught.value)) == (key == "feat_proj_layer_norm")


@pytest.mark.parametrize("key", ["do_stable_layer_norm", "conv_stride"])
def test_an_incomplete_configuration_is_refused(copy: Path, key: str) -> None:
    _edit(copy / "config.json", **{key: ...})
    with pytest.raises(ConfigError, match=r"incomplete") as caught:
        _convert(copy)
    assert key in str(caught.value)


def test_an_unknown_tensor_is_not_ignored(copy: Path) -> None:
    _rename(copy, lambda name: name.replace("masked_spec_embed", "masked_spec_embedding"))
    with pytest.raises(MappingError, match="masked_spec_embedding"):
        _convert(copy)


def test_a_bare_file_is_described_by_its_shapes_when_the_heads_are_given(tmp_path: Path) -> None:
    conv = tuple((32, kernel, stride) for _, kernel, stride in BASE_CONV_LAYERS)
    config = TINY_BASE.from_dict({**TINY_BASE.to_dict(), "conv_layers": conv})
    folder = save_transformers(
        transformers_hubert(config, model_class=WITH_HEAD), config, tmp_path / "model"
    )
    bare = tmp_path / "weights.safetensors"
    shutil.copy(folder / "model.safetensors", bare)
    # what lies in the same folder by chance says nothing of a file by itself
    shutil.copy(folder / "preprocessor_config.json", tmp_path)
    with open_checkpoint(bare) as checkpoint:
        with pytest.raises(ConfigError, match="attention heads"):
            plan_for(checkpoint, normalize=False)
        with pytest.raises(ConfigError, match="normalised input"):
            plan_for(checkpoint, heads=4)
        assert plan_for(checkpoint, heads=4, normalize=False).config == config


def test_a_bare_file_of_the_large_kind_needs_its_configuration(tmp_path: Path) -> None:
    folder = save_transformers(transformers_hubert(TINY_LARGE), TINY_LARGE, tmp_path / "model")
    bare = tmp_path / "weights.safetensors"
    shutil.copy(folder / "model.safetensors", bare)
    with (
        open_checkpoint(bare) as checkpoint,
        pytest.raises(ConfigError, match=r"config.json is missing"),
    ):
        plan_for(checkpoint, heads=4, normalize=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_configuration_whatever_ends_in_anything_but_an_explanation(
    folder: Path, data: st.DataObject
) -> None:
    fields = json.loads((folder / "config.json").read_text())
    extractor = json.loads((folder / "preprocessor_config.json").read_text())
    for stored in (fields, extractor):
        for key in data.draw(st.lists(st.sampled_from(sorted(stored)), max_size=2)):
            stored[key] = data.draw(JSON)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model.safetensors").symlink_to(folder / "model.safetensors")
        (Path(place) / "config.json").write_text(json.dumps(fields))
        (Path(place) / "preprocessor_config.json").write_text(json.dumps(extractor))
        try:
            with open_checkpoint(place) as checkpoint:
                plan = plan_for(checkpoint)
                account(plan, checkpoint.tensors)
        except ContentvecError:
            return
        # what was accepted is what the tensors are
        assert plan.config.encoder_layers == TINY_BASE.encoder_layers
        assert plan.config.encoder_embed_dim == TINY_BASE.encoder_embed_dim


def test_an_unknown_folder_is_described_in_one_line(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        plan = plan_for(checkpoint)
    assert describe(plan.config, plan.naming) == (
        "HuBERT of the form of base, 3 layers, 96 wide, 4 heads, projection 24, Hugging Face names"
    )
