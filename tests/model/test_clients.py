"""Programs that embed: each one's calls, made of the original and of what docs/clients.md loads."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import originals
from tests.small_models import noise

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"
CLIP = noise(16240)


def documented(section: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> SimpleNamespace:
    """The functions that a section of docs/clients.md defines, run where its files are."""
    text = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, str(DOCUMENT), "exec"), names)
    monkeypatch.chdir(folder)
    return SimpleNamespace(**names)


def placed(original: originals.Original, name: str = "contentvec_base.safetensors") -> Path:
    """The folder in which the documented code finds ``original``'s weights under ``name``."""
    link = original.weights.with_name(name)
    if not link.exists():
        link.symlink_to(original.weights)
    return link.parent


@pytest.fixture(scope="module")
def transformers(
    tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str], Any]
) -> originals.Original:
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    folder = tmp_path_factory.mktemp("transformers")
    return originals.transformers_original(folder, originals.DEEP)


@pytest.fixture(scope="module")
def fairseq_model(fairseq: Any, tmp_path_factory: pytest.TempPathFactory) -> originals.Original:
    return originals.fairseq_original(tmp_path_factory.mktemp("fairseq"), originals.DEEP)


def hold(client: Callable[[Any, Any], Any], ours: Any, original: originals.Original) -> Any:
    """What ``client(model, dtype)`` gets from ``ours``, held to what it gets from the original."""
    import torch

    with torch.no_grad():
        answer, reference = client(ours, torch.float32), client(original.model, torch.float32)
        truth = client(original.truth, torch.float64)
    originals.assert_within_gate(answer, reference, truth)
    return answer


# RVC since July 2026 ---------------------------------------------------------------


def rvc(torch: Any, model: Any, source: Any, version: str, padding_mask: Any) -> Any:
    """The calls of ``extract_hubert_features``, infer/hubert.py, and of ``run_cuda_graph``."""
    attention_mask = None
    if bool(torch.any(padding_mask).item()):
        attention_mask = (~padding_mask.bool()).long()
    assert getattr(model, "_rvc_cuda_graph_cache", None) is None
    outputs = model(
        input_values=source,
        attention_mask=attention_mask,
        output_hidden_states=version == "v1",
        return_dict=True,
    )
    if version == "v1":
        return model.final_proj(outputs.hidden_states[9])
    return outputs.last_hidden_state


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("padded", [False, True])
def test_rvc(
    torch: Any,
    transformers: originals.Original,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    padded: bool,
) -> None:
    program = documented("RVC since July 2026", monkeypatch, placed(transformers))
    assert program.hubert_audio_requires_normalization() is False
    source = torch.from_numpy(np.stack([CLIP, CLIP[::-1]]) if padded else CLIP[None])
    padding_mask = torch.BoolTensor(source.shape).fill_(False)
    if padded:
        padding_mask[1, 9000:] = True

    def client(model: Any, dtype: Any) -> Any:
        return rvc(torch, model, source.to(dtype), version, padding_mask)

    features = hold(client, program.load_hubert_model("cpu"), transformers)
    # what the pipeline does with them
    feats = torch.nn.functional.interpolate(features.permute(0, 2, 1), scale_factor=2)
    assert feats.permute(0, 2, 1).clone().shape[1] == 2 * features.shape[1]


# classic RVC -----------------------------------------------------------------------


def classic(torch: Any, model: Any, audio: np.ndarray, version: str, dtype: Any) -> Any:
    """The calls of ``Pipeline.vc``, infer/modules/vc/pipeline.py."""
    feats = torch.from_numpy(audio).to(dtype).view(1, -1)
    inputs = {
        "source": feats.to("cpu"),
        "padding_mask": torch.BoolTensor(feats.shape).to("cpu").fill_(False),
        "output_layer": 9 if version == "v1" else 12,
    }
    logits = model.extract_features(**inputs)
    return model.final_proj(logits[0]) if version == "v1" else logits[0]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_classic_rvc(
    torch: Any, fairseq_model: originals.Original, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    program = documented("Classic RVC and its forks", monkeypatch, placed(fairseq_model))
    hold(
        lambda model, dtype: classic(torch, model, CLIP, version, dtype),
        program.load_hubert(SimpleNamespace(device="cpu", is_half=False)),
        fairseq_model,
    )


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_classic_rvc_in_half_precision(
    torch: Any, fairseq_model: originals.Original, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    program = documented("Classic RVC and its forks", monkeypatch, placed(fairseq_model))
    model = program.load_hubert(SimpleNamespace(device="cpu", is_half=True))
    answer = classic(torch, model, CLIP, version, torch.float16)
    assert answer.dtype == torch.float16
    # RVC searches its index for these
    assert answer[0].cpu().numpy().astype("float32").shape[0] == 50
    half = originals.fairseq_hubert(originals.DEEP).half()
    rounded = CLIP.astype(np.float16).astype(np.float32)
    with torch.no_grad():
        reference = classic(torch, half, CLIP, version, torch.float16)
        truth = classic(torch, fairseq_model.truth, rounded, version, torch.float64)
    originals.assert_within_gate(answer, reference, truth)


# Applio ----------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["training", "v1", "v2"])
def test_applio(
    torch: Any, transformers: originals.Original, monkeypatch: pytest.MonkeyPatch, use: str
) -> None:
    """The calls of rvc/train/extract/extract.py and of rvc/infer/pipeline.py."""
    program = documented("Applio", monkeypatch, placed(transformers, "contentvec.safetensors"))
    model = program.load_embedding("contentvec", None).to("cpu").float()
    model.eval()

    def client(model: Any, dtype: Any) -> Any:
        feats = torch.from_numpy(CLIP).to("cpu").to(dtype).view(1, -1)
        feats = model(feats)["last_hidden_state"]
        if use == "training":
            return feats.squeeze(0).to(dtype).cpu().numpy()
        return model.final_proj(feats[0]).unsqueeze(0) if use == "v1" else feats

    features = hold(client, model, transformers)
    if use == "training":
        with ThreadPoolExecutor(3) as pool:  # a worker for every processor
            for answer in pool.map(lambda _: client(model, torch.float32), range(6)):
                np.testing.assert_array_equal(answer, features)
    assert not np.isnan(np.asarray(features)).any()


#: as wide as Applio's training and its index want features
WIDE = dataclasses.replace(
    originals.DEEP, encoder_embed_dim=768, encoder_ffn_embed_dim=64, conv_pos=4, conv_pos_groups=16
)


def test_applios_training_folder(
    torch: Any, tmp_path: Path, need: Callable[[str, str], Any], run_cli: Callable[..., Any]
) -> None:
    """``extract --applio``, read as rvc/train/extract/preparing_files.py and
    rvc/train/process/extract_index.py read a folder, and held to what extract.py writes."""
    soundfile = need("soundfile", "pip install 'mlx-contentvec[audio]'")
    need("transformers", "pip install 'mlx-contentvec[parity]'")
    original = originals.transformers_original(tmp_path, WIDE)
    experiment = tmp_path / "voice"
    sliced = experiment / "sliced_audios_16k"
    sliced.mkdir(parents=True)
    (experiment / "model_info.json").write_text('{"total_dataset_duration": 3.0}')
    clips = {f"{speaker}_0_{n}": noise(9000 + 700 * n, n) for speaker, n in ((0, 0), (1, 1))}
    for name, clip in clips.items():
        soundfile.write(sliced / f"{name}.wav", clip, 16000, subtype="FLOAT")
    (sliced / "1_0_9.wav").write_bytes(b"no sound")
    words = ("extract", sliced, "-o", experiment, "-w", original.weights, "--applio")
    first = run_cli(*words)
    assert first.returncode == 1 and "1_0_9.wav" in first.stderr + first.stdout
    (sliced / "1_0_9.wav").unlink()
    again = run_cli(*words, "--embedder", "contentvec")
    assert again.returncode == 0, again.stderr
    # the index reads every file that is there
    extracted = experiment / "extracted"
    found = sorted(path.name for path in extracted.iterdir())
    read = [np.load(extracted / name) for name in found]
    assert np.concatenate(read, axis=0).shape[1] == 768
    # the list of files pairs names by what stands before their first dot
    slices = {path.name.split(".")[0] for path in sliced.iterdir()}
    assert {name.split(".")[0] for name in found} == slices == set(clips)
    assert json.loads((experiment / "model_info.json").read_text()) == {
        "total_dataset_duration": 3.0,
        "embedder_model": "contentvec",
    }
    for name, clip in clips.items():
        feats = torch.from_numpy(clip).view(1, -1)
        with torch.no_grad():
            reference = original.model(feats)["last_hidden_state"].squeeze(0)
            truth = original.truth(feats.double())["last_hidden_state"].squeeze(0)
        features = np.load(extracted / f"{name}.npy")
        assert features.dtype == np.float32 and not np.isnan(features).any()
        originals.assert_within_gate(features, reference, truth)


# rvc-next --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("kind", ["base", "normalised"])
def test_rvc_next(
    torch: Any,
    transformers: originals.Original,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    version: str,
) -> None:
    """The calls of ``extract_features``, rvc_next/engine/features/hubert.py."""
    original = transformers
    if kind == "normalised":
        original = originals.transformers_original(
            tmp_path, dataclasses.replace(originals.LARGE, encoder_layers=10)
        )
    normalise = kind == "normalised"
    program = documented("rvc-next", monkeypatch, placed(original))
    model = program.load_hubert(Path("folder"), torch.device("cpu"))
    assert model.hubert_normalize is normalise

    def client(model: Any, dtype: Any) -> Any:
        source = torch.from_numpy(CLIP[None]).to(dtype)
        if normalise:
            source = torch.nn.functional.layer_norm(source, source.shape[-1:])
        return rvc(torch, model, source, version, torch.zeros(source.shape, dtype=torch.bool))

    hold(client, model, original)


# mlx-rvc ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_mlx_rvc(
    torch: Any, transformers: originals.Original, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The calls of ``RVCPipeline``, mlx_rvc/pipeline.py."""
    program = documented("mlx-rvc, and other programs on MLX", monkeypatch, placed(transformers))
    contentvec = program.load_contentvec("contentvec_base.safetensors")
    no_mask = torch.zeros(1, len(CLIP), dtype=torch.bool)
    hold(
        lambda model, dtype: (
            np.array(program.extract_contentvec(model, CLIP, version))
            if model is contentvec
            else rvc(torch, model, torch.from_numpy(CLIP[None]).to(dtype), version, no_mask)
        ),
        contentvec,
        transformers,
    )
