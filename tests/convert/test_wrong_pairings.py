"""Files and settings that do not belong together: each refusal says what it is and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.checkpoint.pickle_machine import PickleMachine
from contentvec_convert.conversion import convert
from contentvec_convert.recognition import FOREIGN, refuse_foreign
from contentvec_convert.sources import plan_for
from mlx_contentvec import ContentvecModel
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import (
    ConfigError,
    ContentvecError,
    MappingError,
    UnsupportedCheckpoint,
    WeightsError,
)
from tests.checkpoint_files import assemble, tensor, torch_zip
from tests.originals import TINY_BASE, save_transformers, transformers_hubert


def _refusal(path: Path) -> str:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        convert(path, path.with_name("converted.safetensors"), allow_unknown=True)
    assert caught.value.hint
    return str(caught.value)


# ---- models that are not HuBERT ------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "config_class", "what"),
    [
        ("Wav2Vec2Model", "Wav2Vec2Config", "wav2vec 2.0"),
        ("Wav2Vec2ForPreTraining", "Wav2Vec2Config", "wav2vec 2.0"),
        ("WavLMModel", "WavLMConfig", "WavLM"),
        ("Data2VecAudioModel", "Data2VecAudioConfig", "data2vec"),
    ],
)
def test_a_relative_from_transformers_is_refused_by_name(
    tmp_path: Path,
    need: Callable[[str, str], Any],
    model_class: str,
    config_class: str,
    what: str,
) -> None:
    transformers = need("transformers", "pip install 'mlx-contentvec[parity]'")
    config = getattr(transformers, config_class)(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=5 if model_class == "Data2VecAudioModel" else 16,
        num_conv_pos_embedding_groups=2,
    )
    getattr(transformers, model_class)(config).save_pretrained(tmp_path / "relative")
    message = _refusal(tmp_path / "relative")
    assert what in message
    assert "not HuBERT or ContentVec" in message
    assert "RVC voices were not trained on its" in message


@pytest.mark.usefixtures("fairseq")
def test_a_wav2vec_model_of_fairseq_is_refused_by_name(tmp_path: Path, torch: Any) -> None:
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model

    model = Wav2Vec2Model(
        Wav2Vec2Config(
            encoder_layers=1,
            encoder_embed_dim=32,
            encoder_ffn_embed_dim=32,
            encoder_attention_heads=2,
            conv_feature_layers="[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
            conv_pos=16,
            conv_pos_groups=2,
            quantize_targets=True,
            latent_vars=4,
            final_dim=16,
        )
    )
    path = tmp_path / "wav2vec_small.pt"
    torch.save({"cfg": {"model": {"_name": "wav2vec2"}}, "model": model.state_dict()}, path)
    assert "is a wav2vec 2.0 model" in _refusal(path)


@pytest.mark.parametrize(("width", "version"), [(256, "v1"), (768, "v2")])
def test_an_rvc_voice_is_told_from_its_embedder(
    tmp_path: Path, torch: Any, width: int, version: str
) -> None:
    path = tmp_path / "singer.pth"
    weight = {"enc_p.emb_phone.weight": torch.zeros(192, width), "emb_g.weight": torch.zeros(2, 4)}
    torch.save({"weight": weight, "config": [1025], "info": "200epoch", "f0": 1}, path)
    message = _refusal(path)
    assert "an RVC voice model" in message
    assert f"RVC {version}" in message
    assert "mlx-contentvec fetch contentvec" in message


def test_an_onnx_model_is_named_and_its_source_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "vec-768-layer-12.onnx"
    # a ModelProto begins with ir_version = 8 and its producer's name
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.0.1:\x80\x01" + bytes(500))
    message = _refusal(path)
    assert "an ONNX model" in message
    assert "PyTorch or safetensors" in message


@pytest.mark.parametrize("row", FOREIGN, ids=[row.what for row in FOREIGN])
def test_every_mark_of_a_foreign_model_is_recognised(tmp_path: Path, torch: Any, row: Any) -> None:
    for mark in row.marks:
        path = tmp_path / "some.pt"
        torch.save({"model": {mark: torch.zeros(4, 256)}}, path)
        with open_checkpoint(path) as checkpoint, pytest.raises(UnsupportedCheckpoint) as caught:
            refuse_foreign(checkpoint)
        assert row.what in str(caught.value)
        assert mark in str(caught.value)


def test_no_mark_of_a_foreign_model_is_a_tensor_of_hubert() -> None:
    from contentvec_convert.sources import fairseq, first_release, shapes, transformers

    marks = {mark for row in FOREIGN for mark in row.marks}
    for kernel in fairseq.POSITIONAL_KERNELS:
        rules = list(fairseq.rules(shapes.PROBE, kernel=kernel))
        assert not marks & {source for rule in rules for source in rule.sources}
    for kernel in transformers.POSITIONAL_KERNELS:
        for prefix in transformers.PREFIXES:
            rules = list(transformers.rules(shapes.PROBE, prefix=prefix, kernel=kernel))
            assert not marks & {source for rule in rules for source in rule.sources}
    assert not marks & {rule.target for rule in first_release.rules(shapes.PROBE)}


def test_tensors_that_nobody_knows_are_listed(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "unknown.pt"
    torch.save({"model": {f"blocks.{i}.weight": torch.zeros(2) for i in range(20)}}, path)
    message = _refusal(path)
    assert "20 tensors: blocks.0.weight" in message
    assert "and 16 more" in message


# ---- settings that do not fit the file -----------------------------------------


def test_features_of_v1_need_the_projection(
    tmp_path: Path, need: Callable[[str, str], Any]
) -> None:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    folder = save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, tmp_path / "headless")
    ledger = convert(folder, tmp_path / "headless.safetensors", allow_unknown=True)
    assert ledger.config.final_dim is None
    model = ContentvecModel.from_file(tmp_path / "headless.safetensors")
    with pytest.raises(ConfigError, match="no final_proj") as caught:
        model(mx.zeros((1, 1000)), output_layer=3, project=True)
    assert "v1" in str(caught.value)


def test_other_heads_than_the_file_has_are_refused_everywhere(
    tiny_checkpoint: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="heads is 4"):
        convert(tiny_checkpoint, tmp_path / "o.safetensors", allow_unknown=True, heads=8)
    with pytest.raises(ConfigError, match="heads is 4"):
        convert(converted_tiny, tmp_path / "o.safetensors", allow_unknown=True, heads=8)
    right = ContentvecModel.from_file(converted_tiny)
    wrong = ContentvecModel(right.config, encoder_attention_heads=8)
    with pytest.raises(WeightsError, match="encoder_attention_heads 4"):
        wrong.load_weights(converted_tiny)


def test_another_scale_of_input_than_the_file_has_is_refused_everywhere(
    tiny_large_checkpoint: Path, converted_tiny_large: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o.safetensors"
    with pytest.raises(ConfigError, match="normalize is True"):
        convert(tiny_large_checkpoint, output, allow_unknown=True, normalize=False)
    with pytest.raises(ConfigError, match="normalize is True"):
        convert(converted_tiny_large, output, allow_unknown=True, normalize=False)
    right = ContentvecModel.from_file(converted_tiny_large)
    wrong = ContentvecModel(right.config, normalize=False)
    with pytest.raises(WeightsError, match="normalize True"):
        wrong.load_weights(converted_tiny_large)


def test_a_normalising_model_gives_the_same_features_at_any_loudness(
    converted_tiny_large: Path, speech: Callable[..., Any]
) -> None:
    model = ContentvecModel.from_file(converted_tiny_large)
    waveform = speech(4000)[None]
    loud, soft = (np.array(model(mx.array(waveform * gain))["x"]) for gain in (1.0, 0.25))
    # the epsilon of the normalisation keeps them from being equal
    assert np.abs(loud - soft).max() < 1e-2 * np.abs(loud).max()


def test_weights_of_another_architecture_are_refused(
    converted_tiny: Path, converted_tiny_large: Path
) -> None:
    model = ContentvecModel.from_file(converted_tiny)
    with pytest.raises(WeightsError, match="another model") as caught:
        model.load_weights(converted_tiny_large)
    assert "from_file" in str(caught.value)


def test_every_refusal_is_of_the_one_tree() -> None:
    for kind in (UnsupportedCheckpoint, ConfigError, MappingError, WeightsError):
        assert issubclass(kind, ContentvecError)


def test_a_file_of_nothing_but_a_head_is_not_taken_for_a_model(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "head.pt"
    torch.save({"model": {"final_proj.weight": torch.zeros(256, 768)}}, path)
    with open_checkpoint(path) as checkpoint, pytest.raises(UnsupportedCheckpoint):
        plan_for(checkpoint)


@pytest.mark.parametrize("options", [{}, {"expect_md5": "0" * 32}, {"allow_unknown": True}])
def test_a_pickle_is_read_once_even_where_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    source = tmp_path / "hubert_base.pt"
    source.write_bytes(torch_zip(assemble({"generator": {"conv.weight": tensor()}})))
    load, loads = PickleMachine.load, []

    def counted(machine: PickleMachine, start: int = 0) -> Any:
        loads.append(start)
        return load(machine, start)

    monkeypatch.setattr(PickleMachine, "load", counted)
    with pytest.raises(ContentvecError, match="hubert_base") as refused:
        convert(source, tmp_path / "out.safetensors", **options)
    assert "a vocoder's checkpoint" in str(refused.value)
    assert loads == [0]
