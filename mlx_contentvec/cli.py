"""The one command, ``mlx-contentvec``: a table of subcommands that load when they are used."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from . import __version__
from .errors import ContentvecError

#: subcommand -> (module:object, one line for --help). The modules live in
#: three packages; naming them as text keeps ``--help`` from importing any.
COMMANDS: dict[str, tuple[str, str]] = {
    "fetch": ("contentvec_convert.commands.fetch:fetch", "Download a known source checkpoint."),
    "convert": (
        "contentvec_convert.commands.convert:convert",
        "Convert a checkpoint to MLX safetensors.",
    ),
    "export": (
        "contentvec_convert.commands.export:export",
        "Write a converted file for transformers or fairseq.",
    ),
    "models": ("contentvec_convert.commands.models:models", "List the embedders that are known."),
    "extract": ("mlx_contentvec.extract.command:extract", "Extract features from audio files."),
    "inspect": (
        "contentvec_convert.commands.convert:inspect",
        "Say what a file is, without converting.",
    ),
    "parity": (
        "contentvec_parity.commands.parity:parity",
        "Compare the MLX model with the original.",
    ),
    "package": (
        "contentvec_parity.commands.publish:package",
        "Put converted weights and their evidence into a folder.",
    ),
    "publish": (
        "contentvec_parity.commands.publish:publish",
        "Publish such a folder on the Hugging Face Hub.",
    ),
    "verify": (
        "contentvec_parity.commands.publish:verify",
        "Check published weights on this machine.",
    ),
    "bench": (
        "contentvec_parity.commands.bench:bench",
        "Measure speed and memory beside the original.",
    ),
    "doctor": (
        "contentvec_parity.commands.doctor:doctor",
        "Say what this machine has, for an issue.",
    ),
    "standin": (
        "contentvec_parity.commands.standin:standin",
        "Make a checkpoint with synthetic weights.",
    ),
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module when it is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ContentvecError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            # the reader of stdout has gone (`| head`): nothing left to say
            sys.stderr.close()
            ctx.exit(1)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-contentvec")
def main() -> None:
    """Convert ContentVec and HuBERT checkpoints to MLX, prove the result, and run it."""
