"""Files made to break a command: each is one good file of ``hostile_seeds`` made wrong in one way.

``cases(seeds)`` gives a name and a function for each; ``python -m tests.attack_corpus SEEDS
[FIRST]`` runs them, or those from FIRST on, with limits, see :mod:`tests.limited`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import ContentvecError
from mlx_contentvec.extract.applio import check_model_info, write_model_info
from tests.checkpoint_files import safetensors
from tests.limited import Command, Limits, Make, Work, serve

LIMITS = Limits()

# ---- texts that are no JSON, or none that fits

ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e"


def _leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with every part that is no dict and no list exchanged."""
    if isinstance(value, dict):
        return {key: _leaves(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_leaves(part, change) for part in value]
    return change(value)


def _containers(value: Any, kind: type, other: Any, depth: int = 0) -> Any:
    """``value`` with every dict, or every list, below its top exchanged."""
    if depth and isinstance(value, kind):
        return other
    if isinstance(value, dict):
        return {key: _containers(part, kind, other, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_containers(part, kind, other, depth + 1) for part in value]
    return value


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _changed(change: Callable[[Any], Any]) -> Callable[[Any], bytes]:
    return lambda value: json.dumps(change(value)).encode()


#: name -> the bytes made of a good document
TEXTS: dict[str, Callable[[Any], bytes]] = {
    "nothing": lambda v: b"",
    "a null": lambda v: b"null",
    "a number": lambda v: b"7",
    "a string": lambda v: b'"text"',
    "a list": lambda v: b"[1, 2]",
    "an empty object": lambda v: b"{}",
    "half of it": lambda v: json.dumps(v).encode()[: len(json.dumps(v)) // 2],
    "deep lists": lambda v: b"[" * 100_000,
    "deep lists inside": lambda v: b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep objects": lambda v: b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "UTF-16": lambda v: json.dumps(v).encode("utf-16"),
    "not UTF-8": lambda v: b"\xff\xfe" + json.dumps(v).encode(),
    "a byte order mark": lambda v: b"\xef\xbb\xbf" + json.dumps(v).encode(),
    "Latin-1": lambda v: json.dumps({**v, "n\u00e9": 1}, ensure_ascii=False).encode("latin-1"),
    "a long integer": lambda v: b'{"a": ' + b"9" * 5_000 + b"}",
    "NaN": lambda v: json.dumps({**v, "a": float("nan")}).encode(),
    "a name twice": lambda v: json.dumps(v).encode()[:-1] + b', "a": 1, "a": 2}',
    "a lone surrogate": lambda v: json.dumps({**v, "\ud800": "\udfff"}).encode(),
    "surrogates everywhere": _changed(
        lambda v: _leaves(v, lambda x: "\ud800" if isinstance(x, str) else x)
    ),
    "escapes everywhere": _changed(
        lambda v: _leaves(v, lambda x: ESCAPE if isinstance(x, str) else x)
    ),
    "escapes in its names": lambda v: json.dumps({ESCAPE + k: x for k, x in v.items()}).encode(),
    "escapes as new names": lambda v: json.dumps(
        {**v, **{f"{ESCAPE}{i}": 1 for i in range(50)}}
    ).encode(),
    "long strings": _changed(
        lambda v: _leaves(v, lambda x: "x\n" * 3_000 if isinstance(x, str) else x)
    ),
    "long names": lambda v: json.dumps({**v, **{f"{i:03}" * 900: 1 for i in range(90)}}).encode(),
    "strings as numbers": _changed(lambda v: _leaves(v, lambda x: "7" if _number(x) else x)),
    "huge integers": _changed(lambda v: _leaves(v, lambda x: 10**18 if _number(x) else x)),
    "negative numbers": _changed(lambda v: _leaves(v, lambda x: -1 if _number(x) else x)),
    "zeros": _changed(lambda v: _leaves(v, lambda x: 0 if _number(x) else x)),
    "fractions": _changed(lambda v: _leaves(v, lambda x: 0.5 if _number(x) else x)),
    "1e308": _changed(lambda v: _leaves(v, lambda x: 1e308 if _number(x) else x)),
    "nulls": _changed(lambda v: _leaves(v, lambda x: None)),
    "truths": _changed(lambda v: _leaves(v, lambda x: True)),
    "lists as leaves": _changed(lambda v: _leaves(v, lambda x: [x])),
    "objects as leaves": _changed(lambda v: _leaves(v, lambda x: {"a": x})),
    "no lists": _changed(lambda v: _containers(v, list, None)),
    "empty lists": _changed(lambda v: _containers(v, list, [])),
    "lists of lists": _changed(lambda v: _containers(v, list, [[[]]])),
    "numbers as objects": _changed(lambda v: _containers(v, dict, 7)),
    "lists as objects": _changed(lambda v: _containers(v, dict, [])),
    "emptied objects": _changed(lambda v: _containers(v, dict, {})),
    "strings as objects": _changed(lambda v: _containers(v, dict, "x")),
    "half of its names": lambda v: json.dumps(dict(list(v.items())[::2])).encode(),
    "the other half": lambda v: json.dumps(dict(list(v.items())[1::2])).encode(),
    "too many values": lambda v: b'{"a": [' + b"0," * 1_000_001 + b"0]}",
    "too many bytes": lambda v: json.dumps(v).encode()[:-1] + b" " * (17 << 20) + b"}",
}

#: what is no regular file
ODD_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a folder": lambda path: path.mkdir(),
    "a link to its folder": lambda path: path.symlink_to("."),
    "a file of the system": lambda path: path.symlink_to("/proc/self/mem"),
    "a terabyte of nothing": lambda path: _sparse(path, 1 << 40),
}


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


# ---- where such texts are read


class Target:
    """A text inside the seeds: which, what reads it, and how it is exchanged."""

    def __init__(
        self, name: str, copied: tuple[str, ...], file: str, *commands: str, jsonl: bool = False
    ) -> None:
        self.name, self.copied, self.file, self.jsonl = name, copied, file, jsonl
        self.commands = commands

    def lay_out(self, seeds: Path, folder: Path) -> Path:
        for name in self.copied:
            source, target = seeds / name, folder / name
            if source.is_dir():
                # links where nothing is changed: most of it is weights
                shutil.copytree(source, target, copy_function=os.link)
            else:
                target.parent.mkdir(exist_ok=True, parents=True)
                os.link(source, target)
        path = folder / self.file
        content = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    def work(self, folder: Path) -> Work:
        return Work([_words(command) for command in self.commands])


def _words(command: str) -> Command:
    return command.split()


class InHeader(Target):
    """A text in the metadata of a safetensors file."""

    def __init__(self, name: str, copied: tuple[str, ...], file: str, key: str, *commands: str):
        super().__init__(name, copied, file, *commands)
        self.key = key


class ByCall(Target):
    """A text that a function reads, whose command would need a large model."""

    def __init__(
        self, name: str, copied: tuple[str, ...], file: str, call: Callable[[Path], object]
    ) -> None:
        super().__init__(name, copied, file)
        self.call = call

    def work(self, folder: Path) -> Work:
        def check() -> str | None:
            try:
                self.call(folder)
            except ContentvecError as error:
                return None if len(str(error)) < 2_000 else "a long message"
            return None

        return Work(check=check)


def read_applio_notes(folder: Path) -> None:
    check_model_info(folder / "package", "contentvec", force=False)
    write_model_info(folder / "package", "contentvec")


TARGETS = (
    Target("config of a folder", ("hub",), "hub/config.json",
           "inspect hub", "convert hub -o out.safetensors --allow-unknown"),
    Target("config beside a file", ("hub",), "hub/config.json", "inspect hub/model.safetensors"),
    Target("config for the original", ("hub", "hub.safetensors"), "hub/config.json",
           "parity hub hub.safetensors --quick"),
    Target("preprocessor", ("hub",), "hub/preprocessor_config.json",
           "inspect hub", "convert hub -o out.safetensors --allow-unknown"),
    Target("preprocessor for the original", ("hub", "hub.safetensors"),
           "hub/preprocessor_config.json", "parity hub hub.safetensors --quick"),
    Target("index of shards", ("shards",), "shards/model.safetensors.index.json",
           "inspect shards", "convert shards -o out.safetensors --allow-unknown"),
    Target("ledger", ("tiny.safetensors", "tiny.ledger.json"), "tiny.ledger.json",
           "inspect tiny.safetensors"),
    Target("ledger to package",
           ("tiny.safetensors", "tiny.ledger.json", "tiny.parity.json",
            "tiny.recording.safetensors"), "tiny.ledger.json",
           "package tiny.safetensors out --test-only-stand-in"),
    Target("report to judge", ("tiny.parity.json",), "tiny.parity.json",
           "parity judge tiny.parity.json --html out.html --markdown out.md"),
    Target("report to package",
           ("tiny.safetensors", "tiny.ledger.json", "tiny.parity.json",
            "tiny.recording.safetensors"), "tiny.parity.json",
           "package tiny.safetensors out --test-only-stand-in"),
    Target("config of a package", ("package",), "package/config.json",
           "verify package --dtype float16", "verify package",
           "extract audio -w package -o out"),
    Target("config of a package to publish", ("package",), "package/config.json",
           "publish package --repo-id a/b --test-only-stand-in"),
    Target("checksums", ("package",), "package/SHA256SUMS",
           "verify package", "extract audio -w package -o out",
           "publish package --repo-id a/b --test-only-stand-in"),
    Target("ledger of a package", ("package",), "package/ledger.json",
           "publish package --repo-id a/b --test-only-stand-in"),
    Target("card of a package", ("package",), "package/README.md",
           "publish package --repo-id a/b --test-only-stand-in"),
    Target("records of outputs", ("npy", "voice.wav", "deep.safetensors"),
           "npy/.mlx-contentvec.jsonl", "extract voice.wav -w deep.safetensors -o npy", jsonl=True),
    Target("records of a pack", ("safetensors", "voice.wav", "deep.safetensors"),
           "safetensors/.mlx-contentvec.jsonl",
           "extract voice.wav -w deep.safetensors -o safetensors --safetensors", jsonl=True),
    ByCall("Applio's notes", ("package",), "package/model_info.json", read_applio_notes),
    InHeader("stored config", ("tiny.safetensors",), "tiny.safetensors", "config",
             "inspect tiny.safetensors", "export tiny.safetensors --to transformers -o out",
             "extract . -w tiny.safetensors -o out --layer 1"),
    InHeader("stored source", ("tiny.safetensors", "tiny.recording.safetensors"),
             "tiny.safetensors", "source",
             "inspect tiny.safetensors", "convert tiny.safetensors -o out.safetensors "
             "--allow-unknown",
             "parity tiny.safetensors --reference tiny.recording.safetensors"),
    InHeader("stored quantisation", ("q8.safetensors",), "q8.safetensors", "quantization",
             "inspect q8.safetensors", "extract . -w q8.safetensors -o out --layer 1"),
    InHeader("recording", ("tiny.safetensors", "tiny.recording.safetensors"),
             "tiny.recording.safetensors", "recording",
             "parity tiny.safetensors --reference tiny.recording.safetensors"),
    InHeader("header", ("tiny.safetensors",), "tiny.safetensors", "",
             "inspect tiny.safetensors", "convert tiny.safetensors -o out.safetensors "
             "--allow-unknown", "extract . -w tiny.safetensors -o out --layer 1",
             "parity tiny.safetensors --reference tiny.safetensors"),
)  # fmt: skip


def read_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _exchange(target: Target, path: Path, change: Callable[[Any], bytes]) -> None:
    content = path.read_bytes()
    if isinstance(target, InHeader):
        header, data = read_header(content)
        if target.key:
            stored = json.loads(header["__metadata__"][target.key])
            text = change(stored).decode("utf-8", "surrogateescape")
            header["__metadata__"][target.key] = text
            raw = json.dumps(header).encode()
        else:
            raw = change(header)
        path.write_bytes(safetensors(raw, data))
    elif target.jsonl:
        lines = content.splitlines()
        path.write_bytes(b"\n".join([*(change(json.loads(x)) for x in lines), b""]))
    else:
        try:
            document = json.loads(content)
        except ValueError:
            document = {"a": content.decode()}
        path.write_bytes(change(document))


def _text_case(target: Target, change: Callable[[Any], bytes], seeds: Path) -> Make:
    def make(folder: Path) -> Work:
        _exchange(target, target.lay_out(seeds, folder), change)
        return target.work(folder)

    return make


def _odd_case(target: Target, put: Callable[[Path], None], seeds: Path) -> Make:
    def make(folder: Path) -> Work:
        path = target.lay_out(seeds, folder)
        path.unlink()
        put(path)
        return target.work(folder)

    return make


#: what a file or a folder may be called
NAMES = {
    "escapes": f"a{ESCAPE}b",
    "a line break": "a\nhint: run this",
    "bytes that are no UTF-8": os.fsdecode(b"a\x82\xa0b"),
    "as long as can be": "x" * 240,
    "a bracket": "[red] [bold",
    "a dash": "--help",
    "a format": "%s{0}$(x)",
}
#: a source and its suffix, and the commands that print its name
NAMED = (
    ("tiny.pt", ".pt", ["inspect", "convert -o out.safetensors --allow-unknown"]),
    ("tiny.safetensors", ".safetensors", ["inspect", "inspect --json", "export --to fairseq"]),
    ("voice.wav", ".wav", ["extract -o out --layer 1 -w", "inspect", "convert"]),
    ("tiny.parity.json", ".json", ["parity judge", "convert"]),
)


def _named_case(source: str, suffix: str, commands: list[str], name: str, seeds: Path) -> Make:
    def make(folder: Path) -> Work:
        path = folder / f"{name}{suffix}"
        os.link(seeds / source, path)
        given = f"./{path.name}"
        weights = [str(seeds / "tiny.safetensors")]
        lines: list[Command] = [
            [*words, *weights, given] if words[-1] == "-w" else [*words, given]
            for words in map(str.split, commands)
        ]
        return Work(lines)

    return make


def cases(seeds: Path) -> Iterator[tuple[str, Make]]:
    """Every case by its name; where the original itself runs, a few."""
    for target in TARGETS:
        if "original" in target.name:
            for name in ("nothing", "a list", "deep lists", "escapes everywhere"):
                yield f"{target.name}: {name}", _text_case(target, TEXTS[name], seeds)
            continue
        for name, change in TEXTS.items():
            yield f"{target.name}: {name}", _text_case(target, change, seeds)
        if not isinstance(target, InHeader) or not target.key:
            for name, put in ODD_FILES.items():
                yield f"{target.name}: {name}", _odd_case(target, put, seeds)
    for source, suffix, commands in NAMED:
        for what, name in NAMES.items():
            yield f"{source} called {what}", _named_case(source, suffix, commands, name, seeds)


if __name__ == "__main__":
    _seeds, *_first = sys.argv[1:]
    serve([*cases(Path(_seeds))][int(*_first) :], LIMITS)
