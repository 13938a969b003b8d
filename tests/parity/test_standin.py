"""The stand-in is what fairseq writes, and no tensor of it could be lost unnoticed."""

from __future__ import annotations

import hashlib
import json
import pickletools
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_parity.standin import weights as standin
from contentvec_parity.standin.write import write_standin
from mlx_contentvec.errors import ConfigError, OutputError
from tests.sources import PROJECT

PRESETS = ["tiny", "tiny-large"]

Make = Callable[..., Path]

# cfg["model"] of hubert_base.pt: a program that builds its own configuration
# class from them (ContentvecConfig(**cfg["model"])) breaks on one more or less
MODEL_KEYS = """
_name label_rate extractor_mode encoder_layers encoder_layers_1 encoder_embed_dim
encoder_ffn_embed_dim encoder_attention_heads activation_fn ctr_layers dropout attention_dropout
activation_dropout encoder_layerdrop dropout_input dropout_features final_dim untie_final_proj
layer_norm_first conv_feature_layers conv_bias logit_temp logit_temp_ctr target_glu
feature_grad_mult mask_length mask_prob mask_selection mask_other no_mask_overlap mask_min_space
mask_channel_length mask_channel_prob mask_channel_selection mask_channel_other
no_mask_channel_overlap mask_channel_min_space num_negatives cross_sample_negatives conv_pos
conv_pos_groups latent_temp skip_masked skip_nomask
""".split()  # noqa: SIM905

TOP_LEVEL = ["args", "cfg", "model", "criterion", "optimizer_history", "task_state", "extra_state"]

# what cannot move a feature: softmax ignores a constant added to every key's
# score, and the other two serve training
INVARIANT = ("k_proj.bias", "mask_emb", "label_embs_concat")


@pytest.fixture(scope="module", params=PRESETS)
def pair(request: pytest.FixtureRequest, make_standin: Make, fairseq: Any) -> tuple[Path, Path]:
    """One preset, written without fairseq and by fairseq."""
    return make_standin(request.param), make_standin(request.param, made_with="fairseq")


def unpickle(path: Path) -> dict[str, Any]:
    """What torch reads: the fixture ``fairseq`` is needed, whose dictionary every file holds."""
    import torch

    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return state


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path and type; tensors by everything but their values."""
    import torch

    yield path, type(value).__name__
    if isinstance(value, torch.Tensor):
        yield path, (value.dtype, tuple(value.shape), value.stride(), value.storage_offset())
        yield path, (value.requires_grad, value.untyped_storage().nbytes())
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{path}/{key}")
        yield from flatten(list(getattr(value, "_metadata", {}).items()), f"{path}@metadata")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from flatten(inner, f"{path}/{i}")
    elif hasattr(value, "__dict__"):
        yield from flatten(vars(value), path)
    else:
        yield path, value


def archive(path: Path) -> list[tuple[str, int, int, int]]:
    """(name, compression, flags, where its bytes begin modulo 64) of every entry, in order."""
    stored = path.read_bytes()
    entries = []
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            header = stored[entry.header_offset : entry.header_offset + 30]
            begins = entry.header_offset + 30 + sum(struct.unpack("<26x2H", header))
            entries.append((entry.filename, entry.compress_type, entry.flag_bits, begins % 64))
    return entries


def entry(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as file:
        return file.read(name)


def named_classes(path: Path) -> set[str]:
    operations = pickletools.genops(entry(path, "archive/data.pkl"))
    return {str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"}


def load_with_fairseq(path: Path) -> Any:
    from fairseq.checkpoint_utils import load_model_ensemble_and_task

    models, _, _ = load_model_ensemble_and_task([str(path)], strict=True)
    return models[0].float().eval()


# -- beside fairseq's own file ---------------------------------------------------------


def test_everything_but_the_tensors_equals_what_fairseq_wrote(pair: tuple[Path, Path]) -> None:
    without_fairseq, with_fairseq = (list(flatten(unpickle(path))) for path in pair)
    assert without_fairseq == with_fairseq
    assert len(without_fairseq) > 1000


def test_the_tensors_equal_those_in_fairseqs_file_bit_for_bit(pair: tuple[Path, Path]) -> None:
    without_fairseq, with_fairseq = (unpickle(path)["model"] for path in pair)
    assert list(without_fairseq) == list(with_fairseq)
    for name, tensor in without_fairseq.items():
        assert tensor.numpy().tobytes() == with_fairseq[name].numpy().tobytes(), name


def test_the_archive_has_fairseqs_entries_in_its_order_all_stored(pair: tuple[Path, Path]) -> None:
    without_fairseq, with_fairseq = map(archive, pair)
    assert without_fairseq == with_fairseq
    assert {compression for _, compression, _, _ in without_fairseq} == {zipfile.ZIP_STORED}
    assert without_fairseq[0][0] == "archive/data.pkl"


def test_the_pickle_names_the_classes_that_fairseqs_names(pair: tuple[Path, Path]) -> None:
    without_fairseq, with_fairseq = map(named_classes, pair)
    assert without_fairseq == with_fairseq
    assert without_fairseq == {
        "collections OrderedDict",
        "torch HalfStorage",
        "torch._utils _rebuild_tensor_v2",
        "fairseq.data.dictionary Dictionary",
    }


@pytest.mark.parametrize("preset", list(standin.PRESETS))
def test_the_recorded_configuration_is_what_fairseq_fills_in(preset: str, fairseq: Any) -> None:
    from omegaconf import OmegaConf

    from contentvec_parity.standin.with_fairseq import CONTENTVEC_LEFTOVERS, training_config

    filled_in = OmegaConf.to_container(training_config(preset))
    recorded = standin.checkpoint_config(preset)
    assert list(recorded["model"]) == MODEL_KEYS
    leftovers = {key: recorded["model"].pop(key) for key in CONTENTVEC_LEFTOVERS}
    assert leftovers == CONTENTVEC_LEFTOVERS
    filled_in["model"] = {key: filled_in["model"][key] for key in recorded["model"]}
    assert recorded == filled_in


def test_the_optimizer_state_has_the_form_of_fairseqs(make_standin: Make, fairseq: Any) -> None:
    ours = unpickle(make_standin("tiny", optimizer_state=True))
    theirs = unpickle(make_standin("tiny", optimizer_state=True, made_with="fairseq"))
    assert list(flatten(ours)) == list(flatten(theirs))
    assert list(ours) == [*TOP_LEVEL, "last_optimizer_state"]


def test_fairseq_loads_it_strictly_and_computes_with_those_weights(
    pair: tuple[Path, Path], fairseq: Any, torch: Any, speech: Callable[..., Any]
) -> None:
    ours, theirs = map(load_with_fairseq, pair)
    stored = unpickle(pair[0])["model"]
    loaded = ours.state_dict()
    assert list(loaded) == list(stored)
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in stored.items())
    waveform = torch.from_numpy(speech(8000))[None]
    with torch.no_grad():
        features = [
            model.extract_features(source=waveform, padding_mask=None, output_layer=2)[0]
            for model in (ours, theirs)
        ]
    assert features[0].shape == (1, 24, 96)
    assert torch.equal(*features)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_fairseqs_loading_is_strict_indeed(
    change: str, tiny_checkpoint: Path, tmp_path: Path, fairseq: Any, torch: Any
) -> None:
    state = unpickle(tiny_checkpoint)
    if change == "missing":
        del state["model"]["encoder.layers.1.fc1.bias"]
    else:
        state["model"]["encoder.layers.3.fc1.bias"] = torch.zeros(192)
    torch.save(state, tmp_path / "changed.pt")
    with pytest.raises(Exception, match=r"encoder.layers..\.fc1.bias"):
        load_with_fairseq(tmp_path / "changed.pt")


# -- without fairseq -------------------------------------------------------------------


def test_it_is_written_where_fairseq_cannot_be_imported(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    program = (
        "import sys; sys.modules['fairseq'] = None\n"
        "from contentvec_parity.standin.write import write_standin\n"
        f"write_standin({str(tmp_path / 'absent.pt')!r}, 'tiny')\n"
    )
    roots = ":".join(str(PROJECT / folder) for folder in ("", "convert", "parity"))
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": roots})
    assert (tmp_path / "absent.pt").read_bytes() == tiny_checkpoint.read_bytes()


def test_fairseqs_presence_is_not_noticed(tmp_path: Path, fairseq: Any) -> None:
    write_standin(tmp_path / "present.pt", "tiny")
    assert "fairseq.data.dictionary Dictionary" in named_classes(tmp_path / "present.pt")
    dictionary = unpickle(tmp_path / "present.pt")["task_state"]["dictionaries"][0]
    assert isinstance(dictionary, sys.modules["fairseq.data.dictionary"].Dictionary)
    assert len(dictionary) == 24
    assert dictionary.index("7") == 11


# -- the weights -----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_file_and_another_seed_other_weights(
    make_standin: Make, tiny_checkpoint: Path
) -> None:
    assert make_standin("tiny").read_bytes() == tiny_checkpoint.read_bytes()
    first, second = (
        dict(standin.seeded_weights("tiny", seed)) for seed in (standin.DEFAULT_SEED, 1)
    )
    assert not any(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("preset", "sha256"),
    [
        ("tiny", "9144161deb801fcfab176f2772933cb4c0df961fae49dbfdecc44f5104e74e12"),
        ("tiny-large", "d5dc1a888d9d0d38191a962a6a60df8b499c5d8681391eca807eba316b75c32e"),
    ],
)
def test_the_weights_are_the_same_on_every_machine(preset: str, sha256: str) -> None:
    """These hashes hold everywhere. If they must change, count up GENERATOR_VERSION."""
    assert standin.GENERATOR_VERSION == 1
    digest = hashlib.sha256()
    for name, values in standin.seeded_weights(preset, seed=7):
        digest.update(name.encode())
        digest.update(values.astype("<f8").tobytes())
    assert digest.hexdigest() == sha256


@pytest.mark.parametrize("preset", PRESETS)
def test_every_tensor_moves_the_features(
    preset: str, make_standin: Make, fairseq: Any, torch: Any, speech: Callable[..., Any]
) -> None:
    model = load_with_fairseq(make_standin(preset))
    waveform = torch.from_numpy(speech(4000))[None]

    def features() -> Any:
        """What the whole model makes of the clip, and its projection."""
        with torch.no_grad():
            last, _ = model.extract_features(source=waveform, padding_mask=None)
            return torch.cat([last.flatten(), model.final_proj(last).flatten()])

    undisturbed = features()
    unmoved = []
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        parameter.data.add_(noise * kept.abs().mean() * 0.05)
        change = float((features() - undisturbed).abs().max())
        parameter.data.copy_(kept)
        if change < 1e-3:
            unmoved.append(name)
            # the float32 noise of these models is about 1e-5
            assert change < 5e-5, f"{name} matters too little to be missed: {change:.1e}"
    assert unmoved == [name for name, _ in model.named_parameters() if name.endswith(INVARIANT)]


# -- the file --------------------------------------------------------------------------


@pytest.mark.usefixtures("fairseq")
@pytest.mark.parametrize("dtype", standin.DTYPES)
def test_each_dtype_holds_the_seeded_values_rounded_once(
    dtype: str, make_standin: Make, torch: Any
) -> None:
    stored = unpickle(make_standin("tiny", dtype=dtype))["model"]
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    step = float(torch.finfo(getattr(torch, dtype)).eps)
    for name, values in standin.seeded_weights("tiny"):
        error = np.abs(stored[name].double().numpy() - values)
        # half a step of the number itself, or of the smallest normal number
        assert np.all(error <= step / 2 * np.maximum(np.abs(values), 2.0**-14)), name


@pytest.mark.usefixtures("fairseq")
def test_the_older_format_holds_the_same(make_standin: Make, tiny_checkpoint: Path) -> None:
    legacy = make_standin("tiny", legacy=True)
    assert not zipfile.is_zipfile(legacy)
    assert list(flatten(unpickle(legacy))) == list(flatten(unpickle(tiny_checkpoint)))


@pytest.mark.usefixtures("fairseq")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float32"},
        {"legacy": True},
        {"optimizer_state": True},
        {"preset": "tiny-large"},
    ],
)
def test_it_always_says_what_it_is(options: dict[str, Any], make_standin: Make) -> None:
    sentence = unpickle(make_standin(**options))["extra_state"]["stand_in"]
    assert "synthetic weights" in sentence
    assert f"seed {standin.DEFAULT_SEED}" in sentence


def test_fairseqs_says_so_too(make_standin: Make, fairseq: Any) -> None:
    path = make_standin("tiny", made_with="fairseq", seed=3)
    assert unpickle(path)["extra_state"]["stand_in"] == standin.marker("tiny", 3)


@pytest.mark.usefixtures("fairseq")
def test_the_converters_reader_sees_the_same_tensors(tiny_checkpoint: Path) -> None:
    from contentvec_convert.checkpoint import open_checkpoint

    stored = unpickle(tiny_checkpoint)["model"]
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        assert list(checkpoint.tensors) == list(stored)
        assert checkpoint.extra["extra_state"]["stand_in"] == standin.marker(
            "tiny", standin.DEFAULT_SEED
        )
        assert checkpoint.config is not None
        assert list(checkpoint.config["model"]) == MODEL_KEYS
        for name, tensor in checkpoint.tensors.items():
            assert np.array_equal(tensor.read(), stored[name].numpy()), name


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path, torch: Any) -> None:
    path = tmp_path / "kept.pt"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"kept\.pt exists"):
        write_standin(path, "tiny")
    assert path.read_bytes() == b"mine"
    write_standin(path, "tiny", force=True)
    assert path.stat().st_size > 700_000


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: Any
) -> None:
    def fail(state: dict[str, Any], path: Path, legacy: bool) -> None:
        path.write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("contentvec_parity.standin.write.save_without_fairseq", fail)
    with pytest.raises(OutputError, match="No space left on device"):
        write_standin(tmp_path / "torn.pt", "tiny")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_or_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stand-in preset 'huge'"):
        write_standin(tmp_path / "x.pt", "huge")
    with pytest.raises(ConfigError, match="no stand-in dtype 'int8'"):
        write_standin(tmp_path / "x.pt", "tiny", dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fairseq")
@pytest.mark.fullsize
def test_the_full_size_one_has_the_size_of_hubert_base(standin: Path) -> None:
    state = unpickle(standin)
    assert list(state) == TOP_LEVEL
    assert len(state["model"]) == 214
    assert sum(tensor.numel() for tensor in state["model"].values()) == 94_697_600
    # the real file: 189,507,909
    assert abs(standin.stat().st_size - 189_507_909) < 20_000


# -- the command -----------------------------------------------------------------------


def test_the_command_writes_one_and_says_what_it_is(
    run_cli: Callable[..., Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    done = run_cli("standin", tmp_path / "a.pt", "--preset", "tiny", original=True)
    assert done.returncode == 0, done.stderr
    assert "synthetic weights (preset tiny, seed 500" in done.stdout
    assert (tmp_path / "a.pt").read_bytes() == tiny_checkpoint.read_bytes()
    again = run_cli("standin", tmp_path / "a.pt", "--preset", "tiny")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert again.stdout == ""


def test_the_command_reports_as_json(
    run_cli: Callable[..., Any], tmp_path: Path, torch: Any
) -> None:
    path = tmp_path / "b.pt"
    done = run_cli("standin", path, "--preset", "tiny", "--seed", "9", "--json", original=True)
    facts = json.loads(done.stdout)
    assert facts["size"] == path.stat().st_size
    assert facts["stand_in"] == standin.marker("tiny", 9)


def test_the_command_refuses_what_it_does_not_know(run_cli: Callable[..., Any]) -> None:
    assert run_cli("standin", "x.pt", "--preset", "huge").returncode == 2
    assert run_cli("standin").returncode == 2


def test_the_full_size_stand_in_is_made_once_for_all_test_processes(
    tmp_path: Path, made_once: Callable[..., Path]
) -> None:
    makers, gate = [], threading.Barrier(4)

    def make(path: Path) -> None:
        makers.append(threading.get_ident())
        time.sleep(0.2)
        path.write_text("whole")

    def ask() -> str:
        gate.wait()
        return made_once(tmp_path / "cache" / "standin.pt", make).read_text()

    with ThreadPoolExecutor(4) as pool:
        seen = [pool.submit(ask) for _ in range(4)]
        assert [one.result() for one in seen] == ["whole"] * 4
    assert len(makers) == 1
