"""What a file is when it is no checkpoint that can be converted.

Users pass whatever a download left them or a folder held. One table says what
the first bytes mean; after that an archive's entries and a pickle's keys tell.
Models of other kinds in a sound checkpoint are not recognised here: see
contentvec_convert.recognition.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_contentvec.errors import ForeignCheckpoint, name_list

from .source_file import SourceFile
from .tensors import TensorView, brief

#: first bytes that are enough to recognise any of the kinds below
HEAD_BYTES = 1024

_GET_THE_FILE = "download the file itself again, and compare its size with the publisher's"
_EMBEDDER = "what is needed is the embedder that turns speech into features, such as hubert_base.pt"
_OTHER_FORM = "get the model as a PyTorch or safetensors file: it cannot be converted from this"


@dataclass(frozen=True)
class Foreign:
    """What a file is ("a web page"), and what to do about it."""

    what: str
    hint: str

    def error(self, file: SourceFile) -> ForeignCheckpoint:
        """The error that says so, to be raised by the caller."""
        return ForeignCheckpoint(
            f"{file.name} is not a checkpoint but {self.what}", what=self.what, hint=self.hint
        )


#: (offset, bytes there, what the file is, what to do)
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"GGUF", "a GGUF model (llama.cpp)", _OTHER_FORM),
    (0, b"ggml", "a GGML model", _OTHER_FORM),
    (0, b"\x93NUMPY", "a NumPy array", _OTHER_FORM),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", _OTHER_FORM),
    (4, b"TFL3", "a TensorFlow Lite model", _OTHER_FORM),
    (0, b"\x08\x01\x12\x0btf", "a TensorFlow graph", _OTHER_FORM),
    (0, b"IxF", "a faiss index, the companion of an RVC voice model", _EMBEDDER),
    (0, b"IwF", "a faiss index, the companion of an RVC voice model", _EMBEDDER),
    (0, b"\x1f\x8b", "a gzip file", "unpack it first"),
    (0, b"BZh", "a bzip2 file", "unpack it first"),
    (0, b"\xfd7zXZ\x00", "a xz file", "unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (257, b"ustar", "a tar archive", "unpack it first; if torch before 0.1.10 wrote it, load it "
     "with torch and save it again"),
    (0, b"PK\x05\x06", "an empty zip archive", _GET_THE_FILE),
    (0, b"RIFF", "audio or video", _EMBEDDER),
    (0, b"fLaC", "audio", _EMBEDDER),
    (0, b"OggS", "audio", _EMBEDDER),
    (0, b"ID3", "audio", _EMBEDDER),
    (4, b"ftyp", "audio or video", _EMBEDDER),
    (0, b"\x89PNG\r\n\x1a\n", "an image", _EMBEDDER),
    (0, b"\xff\xd8\xff", "an image", _EMBEDDER),
    (0, b"%PDF-", "a PDF document", _GET_THE_FILE),
    (0, b"\x7fELF", "a program", _GET_THE_FILE),
    (0, b"MZ", "a program", _GET_THE_FILE),
    (0, b"SQLite format 3\x00", "an SQLite database", _GET_THE_FILE),
)  # fmt: skip

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LFS_SIZE = re.compile(rb"^size ([0-9]{1,15})$", re.MULTILINE)
_WEB_PAGE = re.compile(rb"<(!doctype\s+html|html|head|body)\b", re.IGNORECASE)
#: an ONNX ModelProto begins with its IR version, then its producer or its graph
_ONNX = re.compile(rb"\x08[\x01-\x1e](?:\x12[\x00-\x40][ -~]|:|B|\x1a|\")", re.DOTALL)
_TEXT = frozenset(string.printable.encode())


def foreign_bytes(file: SourceFile, head: bytes) -> Foreign | None:
    """What a file is by its first HEAD_BYTES bytes; None if they do not say.

    Ask only when they are not those of a checkpoint.
    """
    if not head:
        return Foreign("an empty file", _GET_THE_FILE)
    if not any(head):
        return Foreign(
            "a file of zeros", "a download reserved the space and never filled it: repeat it"
        )
    if head.startswith(_LFS_POINTER):
        size = _LFS_SIZE.search(head)
        of = f" for a file of {int(size[1]):,} bytes" if size else ""
        return Foreign(
            f"a Git LFS pointer, the text that stands in{of}",
            "run `git lfs pull` in the repository, or download the file itself",
        )
    for offset, signature, what, hint in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return Foreign(what, hint)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<") and _WEB_PAGE.search(head):
        return Foreign("a web page, saved instead of the weights", _GET_THE_FILE)
    if start.startswith((b"<?xml", b"<Error")):
        return Foreign("an XML text, probably a server's error message", _GET_THE_FILE)
    if _ONNX.match(head):
        return Foreign("an ONNX model", _OTHER_FORM)
    if head[0] == 0x80 and head[1:2] and head[1] <= 5:
        return Foreign(
            "a plain pickle, without the container that torch writes",
            "load it in the program that wrote it, and save its state dict with torch.save",
        )
    if all(byte in _TEXT for byte in head) or (start and start[0] in b"{["):
        begins = " ".join(head[:60].decode("ascii", "replace").split())
        return Foreign(f'a text that begins with "{brief(begins)}"', _GET_THE_FILE)
    return None


def foreign_archive(names: Iterable[str]) -> Foreign | None:
    """What a zip archive is by the names of its entries; None for one that torch wrote."""
    names = list(names)
    tops = [name for name in names if name.count("/") <= 1]
    if any(name.endswith("/constants.pkl") for name in tops):
        return Foreign("a TorchScript program", "get the checkpoint that it was made from")
    if any(name.endswith("/data.pkl") for name in tops):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return Foreign("a NumPy .npz archive", _OTHER_FORM)
    inside = [name for name in names if name.endswith((".pt", ".pth", ".bin", ".safetensors"))]
    if inside:
        return Foreign(
            f"a zip archive with {name_list(map(brief, inside), 3)} inside", "unpack it first"
        )
    if "model.weights.h5" in names:
        return Foreign("a Keras model", _OTHER_FORM)
    return Foreign(
        f"a zip archive of {name_list(map(brief, names), 3) or 'nothing'}", _GET_THE_FILE
    )


def foreign_value(value: Any) -> Foreign | None:
    """What an unpickled value is that keeps its tensors where no checkpoint keeps them."""
    if type(value) is not dict:
        return None
    weight = value.get("weight")
    if (
        type(weight) is dict
        and any(isinstance(part, TensorView) for part in weight.values())
        and ("config" in value or "info" in value or "f0" in value)
    ):
        return Foreign(
            "an RVC voice model", "a voice model speaks and an embedder listens; " + _EMBEDDER
        )
    if type(value.get("generator")) is dict:
        return Foreign("a vocoder's checkpoint (HiFi-GAN)", _EMBEDDER)
    return None
