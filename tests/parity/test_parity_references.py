"""The originals: two implementations that agree, a truth that is true, and what they refuse."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert.conversion import convert
from contentvec_parity import harness, references, with_tf32
from contentvec_parity.compare.naming import outputs, rows, stage_parameters
from contentvec_parity.inputs import (
    BUILT_IN,
    Clip,
    built_in,
    from_files,
    speech_like,
    standard,
    thorough,
)
from contentvec_parity.references import open_reference
from contentvec_parity.references.fairseq import _is_list_of_numbers
from contentvec_parity.references.recording import Recording, record
from mlx_contentvec.backend import mx
from mlx_contentvec.config import PRESETS, ModelConfig, parameter_shapes, stage_input, stage_names
from mlx_contentvec.errors import AudioError, MissingDependency, ParityError
from mlx_contentvec.model import ContentvecModel
from tests.originals import TINY_BASE, TINY_LARGE, save_transformers, transformers_hubert
from tests.small_models import CONFIGS, random_model, random_weights
from tests.sources import search_path


def clip(samples: int = 2400) -> Clip:
    return Clip("clip", speech_like(samples, 3)[None], "speech-like")


def padded() -> Clip:
    waveform, mask = np.zeros((2, 2800), np.float32), np.zeros((2, 2800), bool)
    waveform[0], waveform[1, :1800], mask[1, 1800:] = speech_like(2800, 3), speech_like(1800, 4), 1
    return Clip("padded", waveform, "two clips", {}, mask)


@pytest.fixture(scope="module", params=["tiny_checkpoint", "tiny_large_checkpoint"])
def both(request: pytest.FixtureRequest, fairseq: Any) -> tuple[Any, Any]:
    pytest.importorskip("transformers", reason="pip install 'mlx-contentvec[parity]'")
    path = request.getfixturevalue(request.param)
    return open_reference("fairseq", path), open_reference("transformers", path)


def test_both_originals_find_the_same_model(both: tuple[Any, Any]) -> None:
    assert both[0].config == both[1].config


@pytest.mark.parametrize("make", [clip, padded])
def test_two_independent_implementations_agree_in_float64_at_every_stage(
    both: tuple[Any, Any], make: Any
) -> None:
    given = make()
    one, other = (reference.truth(given) for reference in both)
    assert list(one) == list(other) == list(stage_names(both[0].config))
    mask = both[0].frame_mask(given)
    for stage in one:
        valid = np.ones(one[stage].shape[:2], bool)
        if mask is not None and not stage.startswith("conv"):
            valid = ~mask
        # rounding through float32 anywhere would leave 1e-7 at least
        assert np.abs(one[stage] - other[stage])[valid].max() < 1e-12, stage


def test_a_plain_double_of_fairseq_is_not_float64_and_the_truth_is(
    both: tuple[Any, Any], torch: Any
) -> None:
    import copy

    reference, _ = both
    reference.truth(clip())
    naive = copy.copy(reference)
    naive._exact = copy.deepcopy(reference._model).double()
    off = naive.truth(clip())["layer.3"] - reference.truth(clip())["layer.3"]
    assert 1e-8 < np.abs(off).max() < 1e-4


def test_the_stages_are_what_the_originals_own_call_returns(
    both: tuple[Any, Any], torch: Any
) -> None:
    reference, _ = both
    given = clip()
    stages = reference.stages(given)
    source = torch.from_numpy(reference.model_input(given))
    mask = torch.zeros(source.shape, dtype=torch.bool)
    with torch.no_grad():
        for layer in (1, 2, 3):
            x, _ = reference._model.extract_features(source, mask, output_layer=layer)
            assert np.array_equal(x.numpy(), stages[f"layer.{layer}"])
        projected = reference._model.final_proj(x)
    assert np.array_equal(projected.numpy(), stages["final_proj"])


def test_the_padding_mask_is_the_originals(both: tuple[Any, Any], torch: Any) -> None:
    given = padded()
    source = torch.from_numpy(given.waveform)
    with torch.no_grad():
        _, mask = both[0]._model.extract_features(
            source, torch.from_numpy(given.padding_mask), output_layer=1
        )
    assert np.array_equal(mask.numpy(), both[0].frame_mask(given))
    # one frame more than the clip has alone
    assert (~mask.numpy()).sum(axis=1).tolist() == [8, 6]
    assert both[0].config.frames(1800) == 5


def test_the_local_truth_of_a_stage_is_the_stage_on_that_input(both: tuple[Any, Any]) -> None:
    reference, _ = both
    given = padded()
    truth = reference.truth(given)
    for stage in stage_names(reference.config)[1:]:
        before = truth[stage_input(reference.config, stage)]
        found = reference.local_truth(given, stage, before.astype(np.float32))
        assert np.abs(found - truth[stage]).max() < 1e-4, stage


@pytest.mark.parametrize("preset", PRESETS)
def test_the_name_table_covers_every_parameter_of_the_model(preset: str) -> None:
    config = PRESETS[preset]
    assert [row.target for row in rows(config)] == list(parameter_shapes(config))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_stage_reads_the_parameters_that_the_table_gives_it_and_no_others(kind: str) -> None:
    config = CONFIGS[kind]
    whole, weights = random_model(config), random_weights(config)
    outputs_of = whole.stage_outputs(speech_like(2400, 3)[None])
    assert list(outputs_of) == list(stage_names(config))
    for stage in stage_names(config)[1:]:
        own = stage_parameters(config, stage)
        assert own, stage
        alone = {k: v if k in own else mx.zeros_like(v) for k, v in weights.items()}
        given = outputs_of[stage_input(config, stage) or ""]
        found = ContentvecModel(config).load_weights(alone.items()).run_stage(stage, given)
        assert bool((found == outputs_of[stage]).all()), stage


def test_a_stage_that_the_model_lacks_has_no_input() -> None:
    with pytest.raises(ValueError, match=r"no stage 'layer.13': one of conv.0, .*final_proj"):
        stage_input(PRESETS["base"], "layer.13")


def test_speaker_conditioned_layers_are_stages_after_the_plain_ones() -> None:
    config = dataclasses.replace(PRESETS["base"], encoder_layers_1=3)
    assert stage_names(config)[-4:] == ("layer.13", "layer.14", "layer.15", "final_proj")
    assert stage_input(config, "layer.13") == "layer.12"


def test_rvcs_features_are_layer_9_its_projection_and_layer_12() -> None:
    plain = {output.label: output for output in outputs(PRESETS["base"]) if not output.variant}
    assert list(plain) == ["layer 9", "layer 9 + projection", "layer 12"]
    assert plain["layer 9 + projection"].projected
    assert dict(plain["layer 12"].call) == {"output_layer": 12}


# ---- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "[(512,10,5)] + [(512,3,2)] * 10 ** 9",
        "[(512,10,5)] * 99999999999",
        "[x for x in ()]",
        "[(512, 10, 5)] if 1 else 2",
        "(lambda: [(1, 2, 3)])()",
        "[(512,10,5)] + open('/etc/passwd')",
        "'a' * 99999",
        "[" * 500,
        "",
        None,
    ],
)
def test_an_expression_that_is_not_a_list_of_numbers_never_reaches_eval(expression: Any) -> None:
    assert not _is_list_of_numbers(expression)


def test_the_expressions_of_real_checkpoints_pass() -> None:
    for expression in (
        "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        " [(512, 10, 5), (512, 3, 2)]",
        "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    ):
        assert _is_list_of_numbers(expression)


def test_a_checkpoint_whose_config_is_code_is_refused_before_fairseq_sees_it(
    fairseq: Any, torch: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with torch.serialization.safe_globals([fairseq.data.dictionary.Dictionary]):
        state = torch.load(tiny_checkpoint, weights_only=True)
    witness = tmp_path / "executed"
    state["cfg"]["model"]["conv_feature_layers"] = f"open({str(witness)!r}, 'w') and []"
    torch.save(state, tmp_path / "evil.pt")
    with pytest.raises(ParityError, match="carries code"):
        open_reference("fairseq", tmp_path / "evil.pt")
    assert not witness.exists()


def test_a_pickle_that_names_other_code_is_refused_unexecuted(
    fairseq: Any, torch: Any, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    for name in ("fairseq", "transformers"):
        with pytest.raises(ParityError, match="cannot load"):
            open_reference(name, tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_torch_told_to_execute_pickles_is_refused(
    fairseq: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ParityError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        open_reference("fairseq", tiny_checkpoint)


def test_without_fairseq_the_recipe_is_given(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    monkeypatch.setattr(references, "available", lambda name: False)
    with pytest.raises(MissingDependency) as refused:
        open_reference("fairseq", tiny_checkpoint)
    assert "fairseq-fixed==0.12.3.1" in str(refused.value)
    with pytest.raises(MissingDependency, match="nothing here to compare with") as refused:
        references.choose(tiny_checkpoint)
    assert "recording.safetensors" in str(refused.value)


def test_transformers_stands_in_where_fairseq_is_missing(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert references.choose(tmp_path) == "transformers"
    monkeypatch.setattr(references, "available", lambda name: name == "transformers")
    assert references.choose(tiny_checkpoint) == "transformers"


def test_loading_the_originals_leaves_logging_as_it_was(
    fairseq: Any, tiny_checkpoint: Path
) -> None:
    import logging

    before = logging.root.level, list(logging.root.handlers), logging.root.manager.disable
    open_reference("fairseq", tiny_checkpoint)
    assert (logging.root.level, logging.root.handlers, logging.root.manager.disable) == before


def test_fairseq_is_imported_without_what_hubert_does_not_call(
    fairseq: Any, tiny_checkpoint: Path, need: Any
) -> None:
    need("scipy", "scripts/test installs it with scikit-learn")
    program = """
import sys
from pathlib import Path
from contentvec_parity.references import open_reference
open_reference("fairseq", Path(sys.argv[1]))
assert not {"sklearn", "scipy"} & set(sys.modules), sorted(sys.modules)
import scipy.stats
assert scipy.stats.pearsonr([1, 2, 4], [1, 2, 4]).statistic > 0.99
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_checkpoint)],
        env={**os.environ, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_fairseqs_weights_are_not_drawn_before_they_are_loaded(
    fairseq: Any, torch: Any, tiny_checkpoint: Path
) -> None:
    (plain,), _, _ = fairseq.checkpoint_utils.load_model_ensemble_and_task([str(tiny_checkpoint)])
    before = torch.get_rng_state()
    original = open_reference("fairseq", tiny_checkpoint)
    assert torch.equal(torch.get_rng_state(), before)
    torch.empty(1).uniform_()
    assert not torch.equal(torch.get_rng_state(), before)  # it draws as ever
    assert {name: tensor.tolist() for name, tensor in plain.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in original._model.state_dict().items()
    }


# ---- inputs --------------------------------------------------------------------------------


def test_the_clips_can_be_told_apart_and_say_how_they_were_made() -> None:
    for clips in (built_in(), standard(), thorough()):
        assert len({item.name for item in clips}) == len(clips)
        for item in clips:
            assert item.waveform.dtype == np.float32
            assert np.abs(item.waveform).max() <= 1
            assert item.about
            assert item.origin


def test_the_built_in_clips_never_change() -> None:
    assert tuple(clip.name for clip in built_in()) == BUILT_IN
    sums = {c.name: float(np.abs(c.waveform, dtype=np.float64).sum()) for c in built_in()}
    assert sums == pytest.approx(
        {
            "3s": 4612.08,
            "even": 4076.30,
            "short": 881.025,
            "min": 82.171,
            "quiet": 0.881025,
            "silence": 0,
        },
        rel=1e-3,
    )


def test_every_remainder_of_the_hop_is_tried_thoroughly() -> None:
    assert {item.waveform.shape[1] % 320 for item in thorough()} == set(range(320))


def test_audio_files_come_in_resampled_and_say_how(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="pip install 'mlx-contentvec[audio]'")
    stereo = np.stack([speech_like(44100, 1), speech_like(44100, 2)], axis=1)
    soundfile.write(tmp_path / "voice.flac", stereo, 44100)
    (found,) = from_files([tmp_path / "voice.flac"])
    assert found.waveform.shape == (1, 16000)
    assert found.origin["resampler"] == "soxr VHQ"
    assert found.origin["sample_rate"] == 44100


def test_audio_too_short_for_a_frame_is_refused(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="pip install 'mlx-contentvec[audio]'")
    soundfile.write(tmp_path / "click.wav", speech_like(399, 1), 16000)
    with pytest.raises(AudioError, match="too short"):
        from_files([tmp_path / "click.wav"])


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(TINY_LARGE, final_dim=None),
        # 25 frames per second: one needs 720 samples, more than the shortest clip has
        dataclasses.replace(
            TINY_BASE, conv_layers=((48, 10, 5), *(((48, 3, 2),) * 5), *(((48, 2, 2),) * 2))
        ),
    ],
    ids=["norms first, no projection", "25 Hz"],
)
def test_a_model_of_another_form_is_recorded_and_compared(
    tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, weights = tmp_path / "hub", tmp_path / "m.safetensors"
    save_transformers(transformers_hubert(config), config, folder)
    convert(folder, weights, allow_unknown=True)
    recorded: list[int] = []

    def with_tf32_too(recording: Path, _: Path) -> dict[str, Any]:
        clips = Recording(recording).clips
        recorded.extend(clip.waveform.shape[1] for clip in clips)
        return {"flags": {}, "summary": [], "snr_db": None}

    monkeypatch.setattr(with_tf32, "measure", with_tf32_too)
    document = harness.compare_files(folder, weights, inputs="built-in", compare_tf32=True)
    assert min(recorded) == config.receptive_field
    assert document["verdict"]["passed"], document["verdict"]["reason"]
    shortest = next(clip for clip in document["clips"] if clip["name"] == "min")
    assert shortest["samples"] == config.receptive_field
    record(folder, tmp_path / "m.recording.safetensors")
    document = harness.replay(tmp_path / "m.recording.safetensors", weights)
    assert document["verdict"]["passed"], document["verdict"]["reason"]


def test_the_group_norm_of_a_single_convolution_is_no_layer_norm(
    torch: Any, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY_BASE, conv_layers=((48, 400, 320),))
    save_transformers(transformers_hubert(config), config, tmp_path / "hub")
    assert open_reference("transformers", tmp_path / "hub").config.extractor_norm == "group"


def test_a_model_of_a_single_convolution_is_given_two_windows_at_least(
    torch: Any, tmp_path: Path
) -> None:
    """PyTorch's group norm refuses one, which the shortest clip would be."""
    config = dataclasses.replace(TINY_BASE, conv_layers=((48, 400, 320),))
    folder, weights = tmp_path / "hub", tmp_path / "m.safetensors"
    save_transformers(transformers_hubert(config), config, folder)
    convert(folder, weights, allow_unknown=True)
    document = harness.compare_files(folder, weights, inputs="standard", compare_tf32=False)
    assert min(clip["samples"] for clip in document["clips"]) == 720
