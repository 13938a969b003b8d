"""``mlx-contentvec convert`` and ``mlx-contentvec inspect``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_contentvec.errors import IdentityError, name_list
from mlx_contentvec.files import explained, is_folder, is_there, similar_name
from mlx_contentvec.terminal import NamedPath, labelled, late_bar, say

# Nothing here imports numpy: hashing the source takes longest and begins first.
from ..identity import Identification, Identity
from ..known_files import KNOWN_FILES

if TYPE_CHECKING:
    from ..inspection import Inspection
    from ..ledger import Ledger
    from ..repository import Fetched


def _digits(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """A checksum in lower case; a usage error unless it has as many digits as its kind has."""
    if value is None:
        return None
    digits, wanted = value.strip().lower(), {"expect_md5": 32, "expect_sha256": 64}
    count = wanted[str(parameter.name)]
    if len(digits) != count or set(digits) - set("0123456789abcdef"):
        raise click.BadParameter(f"{value!r} is not {count} hexadecimal digits")
    return digits


_HEADS = click.option(
    "--heads",
    type=click.IntRange(min=1),
    help="Attention heads, for a file that does not say it (no tensor shows it).",
)
_NORMALIZE = click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Whether the model wants normalised input, for a file that does not say it.",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

#: options of mlx-lm's convert that are another command or another option here
_ELSEWHERE = {
    "--quantize": "say --dtype q8 (8 bits) or --dtype q4 (4 bits, far less exact)",
    "--q-bits": "say --dtype q8 or --dtype q4",
    "--q-group-size": "groups are of 64 weights: say --dtype q8 or --dtype q4",
    "--upload-repo": "put what proves the weights beside them and publish both: "
    "mlx-contentvec package, then mlx-contentvec publish",
}


def _elsewhere(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value is not None and value is not False:
        name = parameter.opts[-1]
        raise click.UsageError(f"{name} is an option of mlx-lm; here, {_ELSEWHERE[name]}")


def _words_of_mlx_lm(command: Callable[..., None]) -> Callable[..., None]:
    """Hidden options: mlx-lm's two paths, and an answer to those that are not here."""
    for name in reversed(_ELSEWHERE):
        flag = name == "--quantize"
        option = click.option(
            *(("-q", name) if flag else (name,)),
            is_flag=flag,
            hidden=True,
            expose_value=False,
            callback=_elsewhere,
        )
        command = option(command)
    paths = {"--mlx-path": click.Path(path_type=Path), "--hf-path": str}
    for name, kind in paths.items():
        command = click.option(name, type=kind, hidden=True)(command)
    return command


@click.command()
@click.argument("source", type=NamedPath(), required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The .safetensors file to write. Default: contentvec_base.safetensors for "
    "hubert_base.pt, else the source's name, in the working folder.",
)
@click.option(
    "--dtype",
    metavar="FORMAT",
    default="float32",
    help="float32 (default) holds every bit of any checkpoint; float16 every bit of a float16 "
    "one but in the folded kernel; bfloat16 rounds; q8 and q4 quantise the linear weights to 8 "
    "or 4 bits.",
)
@click.option("--allow-unknown", is_flag=True, help="Convert a file that is not a known one.")
@click.option(
    "--expect-md5", metavar="HEX", callback=_digits, help="Convert only the file with this MD5."
)
@click.option(
    "--expect-sha256",
    metavar="HEX",
    callback=_digits,
    help="Convert only the file with this SHA-256.",
)
@click.option("--revision", help="Branch, tag or commit of a repository.")
@click.option("--force", is_flag=True, help="Replace an output that exists.")
@_HEADS
@_NORMALIZE
@_JSON
@_words_of_mlx_lm
def convert(
    source: Path | None,
    output: Path | None,
    hf_path: str | None,
    mlx_path: Path | None,
    dtype: str,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert the checkpoint SOURCE, a file or a Hugging Face folder, to MLX safetensors.

    SOURCE may also be the name of a known model (see mlx-contentvec models), or
    of a repository on the Hugging Face Hub, OWNER/NAME, or of a folder or file in
    it, OWNER/NAME/PATH. It is fetched into the working folder first, and held to
    the checksum that is known of it or that the Hub states.

    Of files that are there, only a known one, or one of the first release, is
    converted unasked. Every
    tensor is accounted for in a ledger beside the output, and nothing appears
    before it has been written, flushed, read back and compared.
    """
    if hf_path is not None and source is None:
        source = Path(hf_path)
    elif source is None or hf_path is not None:
        raise click.UsageError("name one SOURCE: a file, a folder, or OWNER/NAME on the Hub")
    if mlx_path is not None:
        if output is not None:
            raise click.UsageError("name one output: -o FILE.safetensors")
        output = _file_at(mlx_path)
    source, fetched = _fetched(source, revision)
    with contextlib.ExitStack() as stack:
        options["identification"] = (
            stack.enter_context(Identification(source)) if not is_folder(source) else None
        )
        from .. import conversion
        from ..precision import PRECISIONS

        if dtype not in PRECISIONS:
            raise click.BadParameter(f"not one of {', '.join(PRECISIONS)}", param_hint="--dtype")
        output = output if output is not None else conversion.default_output(source)
        progress = stack.enter_context(late_bar())
        ledger = conversion.convert(
            source, output, dtype=dtype, progress=progress, fetched=fetched, **options
        )
    if as_json:
        click.echo(json.dumps({"path": _shown(output), **ledger.to_dict()}))
    else:
        _show_ledger(ledger, source, output)


@click.command()
@click.argument("path", metavar="FILE", type=NamedPath())
@_HEADS
@_NORMALIZE
@click.option("--tensors", is_flag=True, help="List every tensor.")
@_JSON
def inspect(
    path: Path, heads: int | None, normalize: bool | None, tensors: bool, as_json: bool
) -> None:
    """Say what FILE is, a checkpoint or a converted file: nothing is converted or written."""
    from ..inspection import inspect as inspect_file

    with late_bar() as progress:
        found = inspect_file(path, heads=heads, normalize=normalize, progress=progress)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
    else:
        _show_inspection(found, path, tensors)


def _file_at(path: Path) -> Path:
    """The output for ``--mlx-path``: a file, or one in a folder for ``from_pretrained``."""
    if path.suffix == ".safetensors":
        return path
    from mlx_contentvec.hub import WEIGHTS

    with explained(path):
        path.mkdir(exist_ok=True)
    return path / WEIGHTS[0]


def _fetched(source: Path, revision: str | None) -> tuple[Path, Fetched | None]:
    """``source``; or, where there is no such path, what was downloaded by that name."""
    if is_there(source):
        if revision is not None:
            raise click.BadParameter(f"{source} is no repository", param_hint="--revision")
        return source, None
    from ..fetch import fetch
    from ..repository import is_address

    name, keys = str(source), [row.key for row in KNOWN_FILES]
    # in a folder that is here it is a path of this machine
    if name not in keys and (is_there(Path(source.parts[0])) or not is_address(name)):
        raise IdentityError(
            f"cannot read {_shown(source)}: No such file or directory",
            expected="a checkpoint, a Hugging Face folder, a repository like owner/name, or a name "
            "that `mlx-contentvec models` lists",
            hint=similar_name(source, keys),
        )
    say(f"fetching {name}", err=True)
    fetched = fetch(name, revision=revision)
    return fetched.path, fetched


def _shown(path: Path) -> str:
    """A path as text, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def _line(label: str, text: str) -> None:
    say(labelled(label, text))


def _show_identity(identity: Identity, stand_in: str | None, naming: str) -> None:
    from ..recognition import BY_CONTENT

    known = identity.known
    if stand_in is not None:
        said = "a STAND-IN with synthetic weights, not a trained model"
    elif known is not None:
        said = f"{known.key}: {known.what}"
    else:
        said = BY_CONTENT.get(naming, "not a file that is known here")
    _line("is", said)
    _line("md5", identity.md5)
    _line("sha256", identity.sha256)


def _show_ledger(ledger: Ledger, source: Path, output: Path) -> None:
    from ..conversion import ledger_path
    from ..recognition import describe
    from ..rules import TRANSFORMS

    facts = ledger.to_dict()
    counts, made, origin = facts["counts"], facts["output"], facts["source"]
    say(f"{_shown(source)} -> {_shown(output)}")
    click.echo("source")
    _show_identity(ledger.identity, ledger.stand_in, origin["naming"])
    _line("model", describe(ledger.config, origin["naming"]))
    click.echo("tensors")
    _line("read", f"{counts['source_tensors']} of {origin['naming']} naming, all accounted for")
    _line("written", f"{counts['written']} as {made['dtype']}")
    if counts["exact"]:
        _line("proven", f"{counts['exact']} read back and undone: the source, bit for bit")
    computed = [row for row in ledger.inexact if not TRANSFORMS[row.transform].lossless]
    rounded = [row.target for row in ledger.inexact if TRANSFORMS[row.transform].lossless]
    for row in computed:
        names = name_list(source.name for source in row.sources)
        _line("computed", f"{row.target} from {names} ({row.transform})")
    if rounded:
        _line("rounded", f"{len(rounded)} to {made['dtype']}: {name_list(rounded, 3)}")
    for drop in ledger.drops:
        _line("dropped", f"{drop.source.name}: {drop.reason}")
    for note in ledger.notes:
        _line("note", note)
    click.echo("output")
    _line("size", f"{made['size']:,} bytes")
    _line("sha256", made["sha256"])
    _line("ledger", _shown(ledger_path(output)))


def _show_inspection(found: Inspection, path: Path, tensors: bool) -> None:
    from ..recognition import describe

    say(f"{_shown(path)}  {found.identity.size:,} bytes, {found.container}")
    if found.provenance is None:
        _show_identity(found.identity, found.stand_in, found.naming)
    else:
        _show_provenance(found)
    if found.config is not None:
        _line("naming", found.naming)
        _line("model", describe(found.config, found.naming))
    held = ", ".join(f"{count} {dtype}" for dtype, count in found.dtypes().items())
    _line("tensors", f"{len(found.tensors)} ({held}), {found.elements:,} elements")
    for row in found.tensors:
        if "dropped" in row:
            _line("dropped", f"{row['name']}: {row['dropped']}")
    for note in found.plan.notes if found.plan is not None else ():
        _line("note", note)
    if found.problem is not None:
        _line("refused", f"it cannot be converted{' again' if found.provenance else ''}")
        _line("", str(found.problem))
    for row in found.tensors if tensors else ():
        fate = f" -> {row['target']} ({row['transform']})" if "target" in row else ""
        say(f"    {row['name']} {row['dtype']} {tuple(row['shape'])}{fate}")


def _show_provenance(found: Inspection) -> None:
    """What a converted file says about where it comes from; the ledger can bear it out."""
    from ..checkpoint.tensors import brief

    said = found.provenance or {}
    source = said.get("source")
    source = source if isinstance(source, dict) else {}
    if found.stand_in is not None:
        _line("is", "made from a STAND-IN with synthetic weights, not a trained model")
    else:
        known = source.get("known_as") or "a checkpoint that is not a known one"
        _line("is", f"converted, as it says itself, from {brief(known)}")
    size = source.get("size")
    size = f"{size:,}" if isinstance(size, int) and size < 1 << 64 else brief(size)
    _line("source", f"md5 {brief(source.get('md5'))}, {size} bytes")
    version = brief(said["mlx_contentvec_version"])
    _line("format", f"{brief(said.get('dtype'))}, by mlx-contentvec {version}")
    _line("sha256", found.identity.sha256)
    _line("ledger", str(found.ledger))
