"""
`hf-mend`: the command line. Each command is a small module that imports the library only when it runs, so that
`--help` is instant.

A new command is a function in a module of its own that takes the options of `common` and returns a `Report`, and is
registered below.
"""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from .. import __version__
from .chat import chat
from .common import Commands, ReportingCommand
from .compare import compare
from .edit import edit
from .evaluate import evaluate
from .export import export
from .info import info
from .scope import scope
from .share import pull, push
from .train import train


app = typer.Typer(
    name="hf-mend",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 119},
)
for command in (train, scope, edit, chat, evaluate, compare, info, export, push, pull):
    app.command("eval" if command is evaluate else None, cls=ReportingCommand)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-mend {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="HF_MEND_DEBUG", help="Show an error's traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """
    Edit language models: one correction at a time, in seconds, without retraining.

    \b
    Exit codes:
      0  done
      1  an edit did not take, or a check failed
      2  the request cannot be met; one line on stderr says why and what to do
    """


# Libraries that say at import what they cannot speed up on this machine, which is nothing to a command's user.
_NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def main() -> None:
    """Run `hf-mend` or `python -m hf_mend`."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    app()
