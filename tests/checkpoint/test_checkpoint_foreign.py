"""What is no checkpoint is called what it is, in a phrase that a user understands."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from contentvec_convert.checkpoint import foreign_file, is_cut_short, open_checkpoint
from mlx_contentvec.errors import UnsupportedCheckpoint
from tests.checkpoint_files import assemble, safetensors, tensor, torch_legacy, torch_zip


def what(path: Path) -> str | None:
    found = foreign_file(path)
    return None if found is None else found.what


def packed(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def tar(stream: io.BytesIO) -> None:
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def zip_of(*names: str) -> bytes:
    def write(stream: io.BytesIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.writestr(name, b"content" * 9)

    return packed(write)


LFS = b"""version https://git-lfs.github.com/spec/v1
oid sha256:f54b40fd2802423a5643779c4861af1e9ee9c1564dc9d32f54f20b5ffba7db96
size 189507909
"""

VOICE = {"weight": {"enc_p.emb_phone.weight": tensor()}, "config": [1025, 32], "info": "200epoch"}

FOREIGN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "an empty file"),
    "zeros": (bytes(5000), "a file of zeros"),
    "a web page": (b"<!DOCTYPE html>\n<html><head>", "a web page, saved instead of the weights"),
    "a web page after a blank line": (b"\xef\xbb\xbf\r\n  <HTML lang='en'>", "a web page"),
    "a web page with a comment": (b"<!-- x -->\n<html>", "a web page"),
    "an error of a file server": (b"<?xml version='1.0'?><Error><Code>AccessDenied", "an XML text"),
    "a pointer": (LFS, "a Git LFS pointer, the text that stands in for a file of 189,507,909 by"),
    "a message": (b"Entry not found\n", 'a text that begins with "Entry not found"'),
    "a message in JSON": (b'{"error":"Invalid credentials"}', 'a text that begins with "{"error"'),
    "a config": (json.dumps({"a": "ä"}, indent=2).encode(), "a text that begins with"),
    "an ONNX model of PyTorch": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x80\x01", "an ONNX model"),
    "an ONNX model of nobody": (b"\x08\x08:\xb1\x9d\x02\n", "an ONNX model"),
    "a GGUF model": (b"GGUF\x03\x00\x00\x00", "a GGUF model"),
    "a NumPy array": (packed(lambda s: np.save(s, np.zeros(3))), "a NumPy array"),
    "NumPy arrays": (packed(lambda s: np.savez(s, a=np.zeros(3))), "a NumPy .npz archive"),
    "compressed NumPy arrays": (
        packed(lambda s: np.savez_compressed(s, a=np.zeros(3), b=np.zeros(2))),
        "a NumPy .npz archive",
    ),
    "a tar archive": (packed(tar), "a tar archive"),
    "a gzip file": (gzip.compress(b"x" * 99), "a gzip file"),
    "a faiss index": (b"IwFl\x00\x03\x00\x00", "a faiss index"),
    "a plain pickle": (pickle.dumps({"a": 1}, 2), "a plain pickle"),
    "a newer plain pickle": (pickle.dumps({"a": 1}, 5), "a plain pickle"),
    "audio": (b"RIFF\x24\x00\x00\x00WAVEfmt ", "audio"),
    "an archive of a voice": (
        zip_of("voice.pth", "added_IVF256.index"),
        "a zip archive with voice.pth inside",
    ),
    "a document": (zip_of("[Content_Types].xml", "word/document.xml"), "a zip archive of"),
    "an empty zip archive": (packed(lambda s: zipfile.ZipFile(s, "w").close()), "an empty zip"),
    "a vocoder": (torch_zip(assemble({"generator": {"conv.weight": tensor()}})), "a vocoder's"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_checkpoint_is_called_what_it_is(name: str, tmp_path: Path) -> None:
    content, phrase = FOREIGN[name]
    path = tmp_path / "hubert_base.pt"
    path.write_bytes(content)
    described = what(path)
    assert described is not None
    assert described.startswith(phrase)
    with pytest.raises(UnsupportedCheckpoint) as refused:
        open_checkpoint(path)
    assert refused.value.problem == f"hubert_base.pt is not a checkpoint but {described}"
    assert refused.value.hint


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
def test_a_voice_model_is_called_one_and_can_be_looked_into(
    write: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "voice.pth"
    path.write_bytes(write(assemble(VOICE)))
    assert what(path) == "an RVC voice model"
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.tensors) == ["enc_p.emb_phone.weight"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_called_one(torch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    assert what(path) == "a TorchScript program"


@pytest.mark.parametrize(
    "content",
    [
        torch_zip(assemble({"w": tensor()})),
        torch_zip(assemble({"model": {"w": tensor()}, "config": 1})),
        torch_legacy(assemble({"w": tensor()})),
        safetensors(b"{}"),
        torch_zip(assemble({"w": tensor(offset=9)})),
        torch_zip(assemble({"w": tensor()}))[:-9],
        b"\x07\x01\x02\xfe\xff and so on",
    ],
    ids=["zip", "nested", "legacy", "safetensors", "damaged", "cut", "unknown"],
)
def test_a_checkpoint_sound_or_damaged_is_not_foreign(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert foreign_file(path) is None


def test_nothing_is_said_of_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "missing"):
        assert foreign_file(path) is None
        assert not is_cut_short(path)


def test_an_archive_without_its_end_is_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    whole = torch_zip(assemble({"w": tensor()}))
    for content, short in (
        (whole, False), (whole[:-23], True), (whole[:4], True), (whole[:3], False),
        (torch_legacy(assemble({"w": tensor()})), False), (b"", False),
    ):  # fmt: skip
        path.write_bytes(content)
        assert is_cut_short(path) == short


def test_an_unknown_file_is_refused_with_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x07\x01\x02\xfe\xff and so on")
    with pytest.raises(UnsupportedCheckpoint, match="no kind of checkpoint") as refused:
        open_checkpoint(path)
    assert refused.value.found == "15 bytes that begin with 07 01 02 fe ff 20 61 6e"


def test_a_text_with_control_characters_is_shown_without_them(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"{\x1b]0;title\x07 evil \xe2\x80\xae text")
    described = what(path)
    assert described is not None
    assert described.isprintable()
