"""``mlx-contentvec export``: a converted file, back to transformers or fairseq."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mlx_contentvec.terminal import NamedPath, say

from ..export import FORMATS
from ..export import export as export_file

#: what the name of an export ends in
_ENDINGS = {"transformers": "-transformers", "fairseq": ".pt", "rvc-mlx": "-rvc-mlx.safetensors"}


@click.command()
@click.argument("converted", type=NamedPath())
@click.option("--to", type=click.Choice(FORMATS), required=True, help="The library to write for.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder (transformers) or file (fairseq, rvc-mlx) to write. "
    "Default: CONVERTED's name with -transformers, .pt or -rvc-mlx.safetensors.",
)
@click.option("--force", is_flag=True, help="Replace what an earlier export wrote there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def export(converted: Path, to: str, output: Path | None, force: bool, as_json: bool) -> None:
    """Write the converted file CONVERTED as a checkpoint of another library.

    Tensors that the conversion only moved come back bit for bit. The weight norm
    of the positional convolution is chosen anew (v is the kernel, g its norm).
    """
    if output is None:
        output = converted.with_name(f"{converted.stem}{_ENDINGS[to]}")
    result = export_file(converted, output, to=to, force=force)
    if as_json:
        document = {
            "path": str(result.path),
            "format": result.format,
            "tensors": result.tensors,
            "notes": list(result.notes),
        }
        click.echo(json.dumps(document, indent=2))
        return
    say(f"{result.path}  {result.tensors} tensors, for {result.format}")
    for note in result.notes:
        say(f"  {note}")
