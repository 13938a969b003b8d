"""One good file of every kind that the commands read, to be made wrong in one place."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np

from contentvec_convert.conversion import convert
from contentvec_parity import harness, inputs
from contentvec_parity.publishing.package import package
from contentvec_parity.references import recording
from contentvec_parity.report import document as report
from contentvec_parity.standin.weights import PRESETS, Preset
from contentvec_parity.standin.write import write_standin
from mlx_contentvec.cli import main
from tests.originals import TINY_BASE, save_transformers, transformers_hubert
from tests.small_models import DEEP, random_weights_file

#: half as long to verify as the preset "tiny", with frames as long
LEAST = Preset(
    model={
        **PRESETS["tiny"].model,
        "encoder_layers": 1,
        "encoder_embed_dim": 32,
        "encoder_ffn_embed_dim": 32,
        "encoder_attention_heads": 2,
        "final_dim": 8,
        "conv_feature_layers": "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2",
        "conv_pos": 16,
        "conv_pos_groups": 4,
    },
    classes=4,
)

#: audio file -> ffmpeg's arguments that encode it
AUDIO = {
    "s16.wav": "-c:a pcm_s16le",
    "f32.wav": "-c:a pcm_f32le",
    "adpcm.wav": "-c:a adpcm_ms",
    "alaw.wav": "-c:a pcm_alaw -ac 2",
    "a.flac": "",
    "a.mp3": "",
    "noxing.mp3": "-write_xing 0 -write_id3v2 0",
    "a.ogg": "-c:a libvorbis",
    "a.opus": "",
    "flac.ogg": "-c:a flac",
    "a.aiff": "",
    "a.au": "",
    "a.caf": "",
    "a.w64": "",
    "a.m4a": "",
    "a.mka": "-c:a libvorbis",
    "a.webm": "-c:a libopus",
    "a.aac": "",
    "a.wma": "",
    "a.tta": "",
    "a.wv": "",
    "a.ac3": "",
}


def make_seeds(folder: Path, preset: str = "tiny") -> Path:
    """Write them into ``folder``: models, a package, features, audio.

    preset: of the stand-in that most of them are made of
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_standin(folder / "tiny.pt", preset)
    write_standin(folder / "legacy.pt", preset, legacy=True)
    convert(folder / "tiny.pt", folder / "tiny.safetensors", allow_unknown=True)
    convert(folder / "tiny.pt", folder / "half.safetensors", dtype="float16", allow_unknown=True)
    convert(folder / "tiny.pt", folder / "q8.safetensors", dtype="q8", allow_unknown=True)
    save_transformers(transformers_hubert(TINY_BASE), TINY_BASE, folder / "hub")
    convert(folder / "hub", folder / "hub.safetensors", allow_unknown=True)
    _shard(folder / "hub", folder / "shards")
    _prove(folder)
    package(
        folder / "tiny.safetensors",
        folder / "package",
        variants=[folder / "half.safetensors"],
        allow_stand_in=True,
    )
    _sound(folder)
    return folder


def _shard(hub: Path, shards: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shards.mkdir()
    shutil.copy(hub / "config.json", shards)
    tensors = sorted(load_file(hub / "model.safetensors").items())
    places: dict[str, str] = {}
    for index, part in enumerate((tensors[::2], tensors[1::2])):
        name = f"model-{index}.safetensors"
        save_file(dict(part), shards / name, {"format": "pt"})
        places |= {tensor: name for tensor, _ in part}
    index_file = shards / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def _prove(folder: Path) -> None:
    original = harness.open_reference("transformers", folder / "tiny.pt")
    source = harness.identify_checkpoint(folder / "tiny.pt")
    for name in ("tiny", "half"):
        weights = folder / f"{name}.safetensors"
        candidate = harness.MlxCandidate.open(weights)
        with harness.Identification(weights) as identification:
            document = harness.assemble(
                original,
                candidate,
                inputs.built_in(),
                staged=harness.QUICK_STAGED,
                source=lambda: source,
                weights=lambda: harness.weights_facts(identification, candidate),  # noqa: B023
            )
        (folder / f"{name}.parity.json").write_text(report.to_json(document))
    recording.write(
        original,
        source,
        folder / "tiny.recording.safetensors",
        recording.small(),
    )


def _sound(folder: Path) -> None:
    import soundfile

    audio = folder / "audio"
    audio.mkdir()
    time = np.arange(13_230) / 44_100
    voice = 0.3 * np.sin(2 * np.pi * 220 * time)
    voice += 0.1 * np.random.default_rng(0).standard_normal(len(time))
    soundfile.write(folder / "voice.wav", voice, 44_100)
    for name, options in AUDIO.items():
        subprocess.run(
            ["ffmpeg", "-nostdin", "-v", "error", "-i", folder / "voice.wav", *options.split(),
             audio / name],
            check=True,
        )  # fmt: skip
    random_weights_file(folder / "deep.safetensors", DEEP)
    for layout in ("npy", "safetensors"):
        form = [] if layout == "npy" else [f"--{layout}"]
        main(
            ["extract", str(folder / "voice.wav"), "-w", str(folder / "deep.safetensors"),
             "-o", str(folder / layout), *form],
            standalone_mode=False,
        )  # fmt: skip
