"""The one command, ``mlx-contentvec``: a table of subcommands that load when they are used."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import platform
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

import click

from . import __version__
from .errors import (
    MORE_MEMORY,
    ContentvecError,
    did_you_mean,
    is_out_of_memory,
    name_list,
    printable,
)
from .terminal import LINE_EVERY, say

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
        "Write a converted file for transformers, fairseq or rvc-mlx.",
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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from .files import is_there

            hint = did_you_mean(name, COMMANDS)
            if hint is None and is_there(Path(name)):
                hint = f"to convert it: mlx-contentvec convert {name}"
            ctx.fail(f"no such command: {printable(name)}" + (f"; {hint}" if hint else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if sys.stderr is None:  # closed: there is nowhere to complain
            sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        if sys.stdout is None:
            click.echo("error: standard output is closed: results have nowhere to go", err=True)
            sys.exit(1)
        if not sys.stderr.isatty():  # the bars of the Hub's client: lines, and not many
            os.environ.setdefault("TQDM_MININTERVAL", str(LINE_EVERY))
        try:
            try:
                return super().main(*args, **kwargs)
            finally:
                sys.stdout.flush()
                # what cannot be said there changes no exit status
                _close_output(sys.stderr)
        except BrokenPipeError:
            pass  # the reader has gone (`| head`): nothing left to say
        except Exception as error:
            with contextlib.suppress(OSError):  # nowhere to complain
                say(f"error: {_unexpected(error)}", err=True)
        _close_output(sys.stdout, sys.stderr)
        sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ContentvecError as error:
            say(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


def _close_output(*streams: TextIO) -> None:
    """Let what is left in buffers go nowhere: Python would complain of it when it ends."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere.fileno(), stream.fileno())


#: Python's words for a thread that the system does not start, and the system's own
_NO_THREAD = ("start new thread", os.strerror(errno.EAGAIN))


def _is_somewhere() -> bool:
    """Whether the current folder is still there."""
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def _unexpected(error: Exception) -> ContentvecError:
    """What to say of an exception that nothing was prepared for: what a report needs."""
    if os.environ.get("MLX_CONTENTVEC_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, FileNotFoundError) and not _is_somewhere():
        return ContentvecError("the current folder is not there any more", hint="cd to another")
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return ContentvecError(f"results cannot be written: {error.strerror}")
    if is_out_of_memory(error):
        return ContentvecError("there is not enough memory for this", hint=MORE_MEMORY)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_THREAD):
        return ContentvecError(
            "the system starts no further thread",
            hint="a limit of this session (ulimit -u, ulimit -v) or of its container is reached",
        )
    frames = traceback.extract_tb(error.__traceback__)
    if any(f.name == "<module>" and "huggingface_hub" in f.filename for f in frames):
        names = [name for name in sorted(os.environ) if name.startswith(("HF_", "HUGGING"))]
        return ContentvecError(
            "the Hub's client does not begin with the settings of this session",
            found=f"{type(error).__name__}: {error}",
            hint=f"check {name_list(names) or 'its installation: pip install huggingface_hub'}",
        )
    ours = [f for f in frames if "contentvec" in Path(f.filename).parent.as_posix()]
    last = (ours or frames)[-1]
    name = "/".join(Path(last.filename).parts[-3:])
    message = str(error) or "no message"
    return ContentvecError(
        f"a fault in mlx-contentvec: {type(error).__name__}: {printable(message)}",
        found=f"{name}, line {last.lineno}, in {last.name}",
        hint="please report it with the command, these lines and what this prints:\n"
        f"mlx-contentvec {__version__}, Python {platform.python_version()}, "
        f"{platform.platform(terse=True)} {platform.machine()}\n"
        "MLX_CONTENTVEC_TRACEBACK=1 before the command shows the whole traceback",
    )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-contentvec")
def main() -> None:
    """Convert ContentVec and HuBERT checkpoints to MLX, prove the result, and run it.

    Exit status: 0 done, 1 an error or a check that failed, 2 wrong usage, 130
    interrupted with Ctrl-C. Results go to standard output, the rest to
    standard error.
    """
