"""Shared parts of the commands: reports, exit codes, one-line errors, and the options that choose a model."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from ..data.deprecation import renamed_in
from ..hub.text import printable


if TYPE_CHECKING:
    from ..config import EditorConfig
    from ..model import EditableModel


FAILED, USER_ERROR = 1, 2

# The errors that a wrong request raises; any other error is a bug and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, LookupError, NotImplementedError)

BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        "-m",
        help="The model to edit: a Hub id or a folder. 'smollm2' is the packaged SmolLM2-135M-Instruct. "
        "Left out: the model that the editor was made for; without an editor, smollm2.",
    ),
]
Editor = Annotated[
    str | None,
    typer.Option(
        "--editor", "-e", help="A trained editor: a Hub id or a folder. Left out: edits without a trained editor."
    ),
]
Revision = Annotated[str | None, typer.Option(help="The editor's revision on the Hub.")]
DeviceMap = Annotated[str | None, typer.Option(help="Where the model goes: auto, cpu, cuda:0, ...")]


def _one_of(what: str, *names: str) -> Callable[[str | None], str | None]:
    """Return a check of an option's value, which is made before anything slow is imported."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise ValueError(f"the {what} is {value!r}, expected {', '.join(names[:-1])} or {names[-1]}")
        return value

    return check


Dtype = Annotated[
    str | None,
    typer.Option(
        help="The model's dtype: auto, float32, bfloat16 or float16.",
        callback=_one_of("dtype", "auto", "float32", "bfloat16", "float16"),
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(help="Load the model quantised: 4bit or 8bit.", callback=_one_of("quantization", "4bit", "8bit")),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own code on this machine.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]


class Options:
    """The base of dataclasses of options, which a command takes by [`with_options`]."""


@dataclass
class ModelOptions(Options):
    """The options that choose a base model and determine how it is loaded."""

    base_model: BaseModel = None
    device_map: DeviceMap = None
    dtype: Dtype = None
    quantization: Quantization = None
    trust_remote_code: TrustRemoteCode = False

    def load(
        self, editor: str | None = None, revision: str | None = None, config: EditorConfig | None = None
    ) -> EditableModel:
        """Load the model with a trained editor, or with a new one of `config`; see [`~hf_mend.auto.load_model`]."""
        from ..auto import load_model

        return load_model(
            editor,
            self.base_model,
            revision=revision,
            config=config,
            device_map=self.device_map,
            dtype=self.dtype,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass
class ColumnOptions(Options):
    """The options that name the columns of a table of facts."""

    prompt_column: Annotated[str | None, typer.Option(help="The facts' column or field of prompts.")] = None
    target_column: Annotated[str | None, typer.Option(help="The facts' column or field of targets.")] = None

    def named(self) -> dict[str, Any]:
        """Return the arguments of [`~hf_mend.read_edits`]."""
        return {"prompt_column": self.prompt_column, "target_column": self.target_column}


def with_options(command: Callable[..., Report]) -> Callable[..., Report]:
    """Replace each parameter of a command that is an [`Options`] by its fields."""
    hints = get_type_hints(command, include_extras=True)
    shared = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Options)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name not in shared:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        options = get_type_hints(shared[parameter.name], include_extras=True)
        for item in fields(shared[parameter.name]):  # type: ignore[arg-type]
            parameters.append(parameter.replace(name=item.name, default=item.default, annotation=options[item.name]))

    @functools.wraps(command)
    def run(**values: Any) -> Report:
        for name, kind in shared.items():
            values[name] = kind(**{item.name: values.pop(item.name) for item in fields(kind)})  # type: ignore[arg-type]
        return command(**values)

    # Typer reads both the signature and the annotations; they must be those with the options.
    del run.__wrapped__
    run.__signature__ = inspect.Signature(parameters, return_annotation=Report)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": Report}
    return run


@dataclass
class Report:
    """
    The output of a command.

    Args:
        document (`dict[str, Any]`): The output with `--json`.
        text (`str`): The output without it; nothing is printed if it is empty.
        ok (`bool`, defaults to `True`): Whether the exit code is 0; it is 1 otherwise.
    """

    document: dict[str, Any]
    text: str
    ok: bool = True


_STDOUT: ContextVar[TextIO | None] = ContextVar("stdout", default=None)


def real_stdout() -> TextIO:
    """Return the stream for the output of a running command, as `sys.stdout` is redirected then."""
    return _STDOUT.get() or sys.stdout


class ReportingCommand(TyperCommand):
    """Print the [`Report`] that the command returns. Output of libraries goes to stderr."""

    def invoke(self, ctx: Any) -> Any:
        _STDOUT.set(sys.stdout)
        with redirect_stdout(sys.stderr):
            report: Report = super().invoke(ctx)
        if ctx.params.get("as_json", False):
            typer.echo(json.dumps(report.document, indent=2, ensure_ascii=False))
        elif report.text:
            typer.echo(printable(report.text))
        if not report.ok:
            raise typer.Exit(FAILED)
        return report


class Commands(TyperGroup):
    """Turn the error of a wrong request into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _EXPECTED as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"hf-mend: {printable(one_line(error))}", err=True)
            raise typer.Exit(USER_ERROR) from None


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, without the quotes that a `KeyError` adds."""
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split()) or type(error).__name__


def check_file(path: Path | None, content: str) -> None:
    """
    Check that a file exists, if one is given.

    Raises:
        FileNotFoundError: The file does not exist; the message names the expected content.
        IsADirectoryError: It is a folder.
    """
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file of {content}")
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of {content}")


def as_fields(option: str, pairs: list[str] | None, kind: type) -> dict[str, Any]:
    """
    Parse the `name=value` pairs of a repeated option as fields of a dataclass; a value that is not JSON is text. For
    `EditorConfig` the fields of all methods are accepted, and its construction checks them for the chosen method.

    Raises:
        ValueError: A pair does not have that form, or names no field.
    """
    from ..config import EditorConfig, options_of_methods

    known = {field.name for field in fields(kind)} | renamed_in(kind).keys()
    if kind is EditorConfig:
        known |= {*options_of_methods(), "r"}
    values = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{option} is {pair!r}, expected name=value with a field of {kind.__name__}")
        try:
            values[name] = json.loads(text)
        except json.JSONDecodeError:
            values[name] = text
    return values


def plural(count: int, noun: str) -> str:
    """Return `1 edit`, `2 edits` and so on."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
