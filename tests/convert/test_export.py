"""The way back: source -> MLX -> source, for every format, over random small configurations."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.conversion import convert
from contentvec_convert.export import export, split_weight_norm
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import (
    ConfigError,
    IdentityError,
    OutputError,
    UnsupportedCheckpoint,
)
from mlx_contentvec.weight_norm import fold_weight_norm
from tests.checkpoint_files import change_in_place
from tests.originals import (
    TINY_BASE,
    TINY_LARGE,
    fairseq_hubert,
    save_fairseq,
    save_transformers,
    transformers_hubert,
)

DATA = Path(__file__).parents[1] / "data"
QUICK = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Any small model that both libraries can build."""
    heads, groups = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    sizes = st.integers(1, 6)
    layers = draw(
        st.lists(st.tuples(sizes, st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3)
    )
    batch_norm = draw(st.booleans())
    return ModelConfig(
        conv_layers=tuple(layers),
        conv_bias=draw(st.booleans()),
        extractor_norm=draw(st.sampled_from(["group", "layer"])),
        # fairseq has no projection between equal widths
        encoder_embed_dim=8 * draw(st.integers(1, 3)),
        encoder_ffn_embed_dim=draw(sizes),
        encoder_layers=draw(st.integers(1, 3)),
        encoder_attention_heads=heads,
        layer_norm_first=draw(st.booleans()),
        conv_pos=draw(st.integers(1, 9)),
        conv_pos_groups=groups,
        conv_pos_batch_norm=batch_norm,
        final_dim=draw(sizes),
        normalize=draw(st.booleans()),
    )


def _tensors(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        return {name: tensor.read() for name, tensor in checkpoint.tensors.items()}


def _there_and_back(source: Path, to: str, dtype: str = "float32") -> Path:
    converted = source.with_name("converted.safetensors")
    convert(source, converted, allow_unknown=True, dtype=dtype)
    back = source.with_name("back" if to == "transformers" else "back.pt")
    export(converted, back, to=to)
    return back


def _equal_but_for_the_weight_norm(
    before: dict[str, Any], after: dict[str, Any], parts: tuple[str, str], lost: set[str]
) -> None:
    """Bit for bit what was moved; of the weight norm, what it multiplies out to."""
    assert before.keys() - lost == after.keys() - {"mask_emb"}
    for name in after.keys() - {"mask_emb", *parts}:
        assert after[name].dtype == before[name].dtype
        assert after[name].tobytes() == before[name].tobytes(), name
    if parts[0] in before:
        kernels = [fold_weight_norm(t[parts[0]], t[parts[1]]) for t in (before, after)]
        ulps = np.abs(kernels[0].view(np.int32).astype(np.int64) - kernels[1].view(np.int32))
        assert ulps.max() <= 1


@pytest.fixture
def room() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.usefixtures("fairseq")
@given(config=configurations(), seed=st.integers(0, 1000))
@QUICK
def test_fairseq_there_and_back(config: ModelConfig, seed: int) -> None:
    with tempfile.TemporaryDirectory() as room:
        model = fairseq_hubert(config, seed=seed)
        source = save_fairseq(model, config, Path(room) / "model.pt")
        back = _there_and_back(source, "fairseq")
        parts = ("encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v")
        before, after = _tensors(source), _tensors(back)
        before.pop("encoder.pos_conv.0.num_batches_tracked", None)
        after.pop("encoder.pos_conv.0.num_batches_tracked", None)
        lost = {"mask_emb", "label_embs_concat"}
        _equal_but_for_the_weight_norm(before, after, parts, lost)
        with open_checkpoint(back) as checkpoint:
            assert checkpoint.config is not None
            assert checkpoint.config["task"]["normalize"] == config.normalize


@given(config=configurations(), seed=st.integers(0, 1000))
@QUICK
def test_transformers_there_and_back(
    config: ModelConfig, seed: int, need: Callable[[str, str], Any]
) -> None:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    with tempfile.TemporaryDirectory() as room:
        model = transformers_hubert(config, seed=seed, model_class="HubertModelWithFinalProj")
        source = save_transformers(model, config, Path(room) / "model", weight_norm="weight_g")
        back = _there_and_back(source, "transformers")
        conv = "encoder.pos_conv_embed.conv"
        before, after = _tensors(source), _tensors(back)
        counter = "encoder.pos_conv_embed.batch_norm.num_batches_tracked"
        assert (before.pop(counter, None) is None) == (after.pop(counter, None) is None)
        lost = {"masked_spec_embed"}
        _equal_but_for_the_weight_norm(
            before, after, (f"{conv}.weight_g", f"{conv}.weight_v"), lost
        )
        stored, given_back = (json.loads((f / "config.json").read_text()) for f in (source, back))
        for key in given_back.keys() - {"architectures", "apply_spec_augment", "mask_time_prob"}:
            assert given_back[key] == stored[key], key


@pytest.mark.usefixtures("fairseq")
@pytest.mark.parametrize("to", ["fairseq", "transformers"])
def test_a_file_in_the_middle_can_change_its_format(room: Path, to: str) -> None:
    source = save_fairseq(fairseq_hubert(TINY_LARGE), TINY_LARGE, room / "model.pt")
    again = room / "again.safetensors"
    ledger = convert(_there_and_back(source, to), again, allow_unknown=True)
    # each library normalises input in its own way
    assert ledger.config.normalize_eps == (1e-7 if to == "transformers" else 1e-5)
    notes = export(again, room / "once more", to=to).notes
    assert not any("quiet audio" in note for note in notes)
    other = "transformers" if to == "fairseq" else "fairseq"
    notes = export(again, room / "other", to=other).notes
    assert any(note.startswith(f"{other} adds 1e-") for note in notes)
    first, second = _tensors(room / "converted.safetensors"), _tensors(again)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


@pytest.mark.usefixtures("fairseq")
def test_half_precision_comes_back_as_half_precision(room: Path) -> None:
    source = save_fairseq(fairseq_hubert(TINY_BASE), TINY_BASE, room / "half.pt", dtype="float16")
    before, after = _tensors(source), _tensors(_there_and_back(source, "fairseq", "float16"))
    for name in after.keys() - {"mask_emb"}:
        if "pos_conv.0.weight" not in name:
            assert after[name].dtype == np.float16
            assert after[name].tobytes() == before[name].tobytes()
    # rounded to half, the magnitude would scale every tap of the kernel wrongly
    assert after["encoder.pos_conv.0.weight_g"].dtype == np.float32


@pytest.mark.usefixtures("fairseq")
def test_bfloat16_comes_back_as_the_same_numbers(room: Path) -> None:
    source = save_fairseq(fairseq_hubert(TINY_BASE), TINY_BASE, room / "model.pt")
    back = _tensors(_there_and_back(source, "transformers", "bfloat16"))
    bits = _tensors(room / "converted.safetensors")["layer_norm.weight"]
    wide = back["feature_projection.layer_norm.weight"]
    assert np.array_equal(wide.view(np.uint32), bits.astype(np.uint32) << 16)


def test_full_contentvec_goes_back_to_fairseq_and_not_to_transformers(room: Path) -> None:
    converted = room / "full.safetensors"
    convert(DATA / "full_contentvec.pt", converted, allow_unknown=True)
    export(converted, room / "full.pt", to="fairseq")
    before, after = _tensors(DATA / "full_contentvec.pt"), _tensors(room / "full.pt")
    assert before.keys() - after.keys() == {
        "label_embs_concat",
        "layer_proj.weight",
        "layer_proj.bias",
    }
    with pytest.raises(ConfigError, match="no speaker-conditioned layers") as caught:
        export(converted, room / "full", to="transformers")
    assert "--to fairseq" in str(caught.value)


@pytest.mark.usefixtures("fairseq")
@pytest.mark.parametrize("config", [TINY_BASE, TINY_LARGE], ids=["base", "large"])
def test_fairseq_loads_an_export_strictly_and_computes_the_same(
    room: Path, torch: Any, config: ModelConfig
) -> None:
    from fairseq import checkpoint_utils

    model = fairseq_hubert(config)
    back = _there_and_back(save_fairseq(model, config, room / "model.pt"), "fairseq")
    models, cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(back)])
    assert cfg.task.normalize == config.normalize
    waveform = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            m.eval().extract_features(waveform, output_layer=3)[0] for m in (models[0], model)
        )
    # torch multiplies the weight norm out again, in float32
    assert (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("config", [TINY_BASE, TINY_LARGE], ids=["base", "large"])
def test_transformers_loads_an_export_without_a_word(
    room: Path, need: Callable[[str, str], Any], config: ModelConfig
) -> None:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    made = transformers_hubert(config, model_class="HubertModelWithFinalProj")
    back = _there_and_back(save_transformers(made, config, room / "model"), "transformers")
    loaded, report = type(made).from_pretrained(back, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.do_stable_layer_norm == config.layer_norm_first


def test_a_model_without_a_projection_goes_back_to_transformers_only(room: Path) -> None:
    converted = room / "first.safetensors"
    convert(DATA / "first_release.safetensors", converted, allow_unknown=True, heads=4)
    result = export(converted, room / "first", to="transformers")
    fields = json.loads((room / "first" / "config.json").read_text())
    assert fields["architectures"] == ["HubertModel"]
    assert result.tensors == len(_tensors(room / "first"))
    with pytest.raises(ConfigError, match="always has a final_proj"):
        export(converted, room / "first.pt", to="fairseq")


def test_an_export_of_a_stand_in_says_so(converted_tiny: Path, room: Path) -> None:
    for to in ("fairseq", "transformers"):
        export(converted_tiny, room / to, to=to)
        ledger = convert(room / to, room / f"{to}.safetensors", allow_unknown=True)
        assert ledger.source["stand_in"] is True


def test_a_weight_norm_is_split_into_the_kernel_and_its_norm() -> None:
    kernel = np.random.default_rng(0).standard_normal((24, 5, 6)).astype(np.float32)
    magnitude, direction = split_weight_norm(kernel)
    assert magnitude.shape == (1, 1, 5)
    assert np.array_equal(direction, kernel.transpose(0, 2, 1))
    assert np.allclose(magnitude.ravel(), np.linalg.norm(kernel.astype(float), axis=(0, 2)))
    dead = kernel.copy()
    dead[:, 2] = 0
    with pytest.raises(ConfigError, match="no weight norm"):
        split_weight_norm(dead)


# ---- refusals and the file system ----------------------------------------------


def test_what_is_not_a_converted_file_is_refused(tiny_checkpoint: Path, room: Path) -> None:
    with pytest.raises(UnsupportedCheckpoint, match="not a converted file") as caught:
        export(tiny_checkpoint, room / "out", to="transformers")
    assert "convert the file first" in str(caught.value)


def test_quantised_weights_cannot_go_back(tiny_checkpoint: Path, room: Path) -> None:
    convert(tiny_checkpoint, room / "q8.safetensors", allow_unknown=True, dtype="q8")
    with pytest.raises(UnsupportedCheckpoint, match="quantised"):
        export(room / "q8.safetensors", room / "out", to="transformers")
    assert not (room / "out").exists()


@pytest.mark.parametrize("to", ["fairseq", "transformers"])
def test_what_exists_is_replaced_by_force_alone(converted_tiny: Path, room: Path, to: str) -> None:
    first = export(converted_tiny, room / "out", to=to)
    with pytest.raises(OutputError, match="exists"):
        export(converted_tiny, room / "out", to=to)
    assert export(converted_tiny, room / "out", to=to, force=True) == first
    assert [entry.name for entry in room.iterdir()] == ["out"]


def test_a_link_to_itself_is_replaced_by_force(converted_tiny: Path, room: Path) -> None:
    (room / "out").symlink_to(room / "out")
    with pytest.raises(OutputError, match="exists"):
        export(converted_tiny, room / "out", to="fairseq")
    export(converted_tiny, room / "out", to="fairseq", force=True)
    assert (room / "out").is_file()
    assert not (room / "out").is_symlink()


def test_a_name_that_mlx_could_not_read_is_refused(converted_tiny: Path, room: Path) -> None:
    with pytest.raises(OutputError, match=r"suffix[\s\S]*ends in \.safetensors"):
        export(converted_tiny, room / "out.pt", to="rvc-mlx")
    assert list(room.iterdir()) == []


def test_a_folder_with_something_else_in_it_is_never_replaced(
    converted_tiny: Path, room: Path
) -> None:
    export(converted_tiny, room / "out", to="transformers")
    (room / "out" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(OutputError, match="holds more") as caught:
        export(converted_tiny, room / "out", to="transformers", force=True)
    assert "thesis.txt" in str(caught.value)
    assert (room / "out" / "thesis.txt").read_text() == "irreplaceable"


def test_what_finder_leaves_in_an_export_does_not_keep_it(converted_tiny: Path, room: Path) -> None:
    export(converted_tiny, room / "out", to="transformers")
    for name in (".DS_Store", "._config.json"):
        (room / "out" / name).write_bytes(b"Bud1")
    export(converted_tiny, room / "out", to="transformers", force=True)
    assert "config.json" in {path.name for path in (room / "out").iterdir()}


def test_a_missing_folder_is_said(converted_tiny: Path, room: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        export(converted_tiny, room / "nowhere" / "out", to="transformers")


def test_nothing_appears_that_did_not_come_back_as_written(
    converted_tiny: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contentvec_convert.export as module

    write = module.write_torch_file

    def damaged(stream: Any, state: Any) -> None:
        name = "final_proj.bias"
        changed = {**state["model"], name: np.nextafter(state["model"][name], np.float32(9))}
        write(stream, {**state, "model": changed})

    monkeypatch.setattr(module, "write_torch_file", damaged)
    with pytest.raises(OutputError, match="did not come back"):
        export(converted_tiny, room / "out.pt", to="fairseq")
    assert list(room.iterdir()) == []


@pytest.mark.parametrize("to", ["transformers", "fairseq"])
@pytest.mark.parametrize("moment", ["before the tensors", "behind the tensors"])
def test_bytes_changed_in_place_are_noticed(
    converted_tiny: Path, room: Path, monkeypatch: pytest.MonkeyPatch, to: str, moment: str
) -> None:
    import contentvec_convert.export as module

    source = room / "source.safetensors"
    source.write_bytes(converted_tiny.read_bytes())
    write = module._WRITERS[to]

    def changing(*arguments: Any) -> Any:
        if moment == "before the tensors":
            change_in_place(source)
            return write(*arguments)
        written = write(*arguments)
        change_in_place(source)
        return written

    monkeypatch.setitem(module._WRITERS, to, changing)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        export(source, room / "out", to=to)
    assert list(room.iterdir()) == [source]


@pytest.mark.parametrize("to", ["transformers", "fairseq"])
@pytest.mark.parametrize("change", ["moved", "damaged"])
def test_a_draft_that_is_moved_or_damaged_is_not_taken_for_a_bad_download(
    converted_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, change: str
) -> None:
    import contentvec_convert.export as module

    place, write = tmp_path / "place", module._WRITERS[to]
    place.mkdir()

    def changing(*arguments: Any) -> Any:
        written = write(*arguments)
        if change == "moved":
            place.rename(tmp_path / "moved")
        else:
            for path in place.rglob("*"):
                if path.is_file():
                    path.write_bytes(b"another's")
        return written

    monkeypatch.setitem(module._WRITERS, to, changing)
    with pytest.raises(OutputError, match="did not come back from the disk") as refused:
        export(converted_tiny, place / "out", to=to)
    assert refused.value.found and "download" not in str(refused.value)
    assert not (place / "out").exists()


def test_a_file_that_is_cut_short_meanwhile_is_refused(
    converted_tiny: Path, room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that were views of a mapped file would end the process."""
    import contentvec_convert.export as module

    source = room / "source.safetensors"
    source.write_bytes(converted_tiny.read_bytes())
    write = module._write_safetensors

    def cutting(*arguments: Any) -> None:
        os.truncate(source, 4096)
        write(*arguments)

    monkeypatch.setattr(module, "_write_safetensors", cutting)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        export(source, room / "out", to="transformers")
    assert list(room.iterdir()) == [source]


def test_the_command_writes_where_it_says(
    converted_tiny: Path, room: Path, run_cli: Callable[..., Any]
) -> None:
    link = room / "tiny.safetensors"
    link.symlink_to(converted_tiny)
    done = run_cli("export", link, "--to", "transformers", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert Path(document["path"]) == room / "tiny-transformers"
    assert document["tensors"] == len(_tensors(room / "tiny-transformers"))
    done = run_cli("export", link, "--to", "fairseq")
    assert done.returncode == 0, done.stderr
    assert str(room / "tiny.pt") in done.stdout
    again = run_cli("export", link, "--to", "fairseq")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
