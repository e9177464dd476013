"""`hf-mend eval`: evaluate an editor or a method on a data set by the field's metrics."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..hub.atomic import check_writable
from .common import AsJson, ModelOptions, Options, Report, Revision, as_fields, check_file, with_options


if TYPE_CHECKING:
    from ..data.records import EditRecord
    from ..evaluation.sharing import Share
    from ..model import EditableModel

OUTPUT = typer.Option(
    "--output", "-o", help="Folder for the results. A run that is cut off goes on from what is there already."
)
WILD = typer.Option(help="Ask in questions, chats and behind other text, and read what the model answers freely.")
TEACHER_FORCED = typer.Option(help="Measure the field's teacher-forced metrics.")


@dataclass
class EvaluationOptions(Options):
    """The options of the measurements."""

    edits: Annotated[str, typer.Option(help="How many edits are kept at once, with commas: 1,10,100.")] = "1"
    edits_per_call: Annotated[
        int | None,
        # --in-calls-of is the earlier name.
        typer.Option(
            "--edits-per-call",
            "--in-calls-of",
            min=1,
            help="How many edits a call makes, one call after another; left out: all in one.",
        ),
    ] = None
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Names with commas (docs/evaluation.md), or all. Left out: those that the data allows, but for "
            "fluency and in_the_wild, which generate long texts."
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Measure so many facts, drawn by the seed.")] = None
    seed: Annotated[int, typer.Option(help="Of all that is drawn; the same seed gives the same figures.")] = 0
    questions: Annotated[
        Path | None,
        typer.Option(help="Unrelated questions and answers (JSON lines); facts without their own get one each."),
    ] = None
    text: Annotated[
        Path | None, typer.Option(help="Held-out text for perplexity. Left out: Python's documentation.")
    ] = None
    format: Annotated[str | None, typer.Option(help="The data's layout, if it should not be recognised.")] = None
    max_steps: Annotated[int | None, typer.Option(min=1, help="The most gradient steps of an edit.")] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Facts in one pass.")] = 10
    config: Annotated[
        list[str] | None,
        typer.Option(help="An option of a method (hf-mend info METHOD lists them): name=value, in JSON. Repeatable."),
    ] = None

    share: Annotated[
        str | None,
        typer.Option(help="Measure a share on this machine: 2/3 is the second of three. Others measure the rest."),
    ] = None
    join: Annotated[
        list[Path] | None,
        typer.Option(help="A folder (--output) of what another machine has measured of the same. Repeatable."),
    ] = None

    def shared(self, output: Path | None) -> AbstractContextManager[Share]:
        """Return a context in which this process measures its share."""
        from ..evaluation.sharing import share_of, sharing

        if self.share is not None and output is None:
            raise ValueError("--share keeps what it measures for another machine to join; name a folder with --output")
        return sharing(share_of(self.share, self.join or []))

    def read(self, data: str) -> tuple[Sequence[EditRecord], dict[str, Any]]:
        """Return the facts and the other arguments of [`~hf_mend.evaluation.evaluate.evaluate`]."""
        from ..data.readers import read_edits, read_questions
        from ..evaluation.evaluate import choose_metrics

        check_file(self.questions, "questions")
        check_file(self.text, "text")
        arguments: dict[str, Any] = {
            "edits": _counts(self.edits),
            "metrics": None if self.metrics is None else [name.strip() for name in self.metrics.split(",")],
            "text": None if self.text is None else self.text.read_text(encoding="utf-8"),
        }
        names = ("edits_per_call", "limit", "seed", "max_steps", "batch_size")
        asked = read_questions(self.questions) if self.questions else []
        records: Any = read_edits(data, self.format, questions=asked, seed=self.seed, keep_in_memory=False)
        choose_metrics(arguments["metrics"], records)  # raises its errors before a model is loaded
        return records, arguments | {name: getattr(self, name) for name in names}

    def in_the_wild(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of [`~hf_mend.evaluation.wild_states.evaluate_in_the_wild`]."""
        from ..data.readers import read_questions

        names = ("edits", "limit", "seed", "text", "scope")
        calls = {} if self.edits_per_call is None else {"edits_per_call": self.edits_per_call}
        asked = read_questions(self.questions) if self.questions else []
        return {name: arguments[name] for name in names} | calls | {"questions": asked}

    def words(self, data: str) -> list[str]:
        """Return the options that differ from their defaults as words of a shell command."""
        words = [data]
        for item in fields(self):
            if item.name in ("share", "join"):  # how it was measured, not what
                continue
            value = getattr(self, item.name)
            for part in value if isinstance(value, list) else [] if value == item.default else [value]:
                name = as_given(str(part)) if isinstance(part, Path) else str(part)
                words += [f"--{item.name.replace('_', '-')}", name]
        return words


@with_options
def evaluate(
    editor: Annotated[
        str,
        typer.Argument(help="A trained editor (a folder or a Hub id), or a method that needs none, such as gradient."),
    ],
    data: Annotated[
        str, typer.Argument(help="Facts: a file (docs/data_format.md has the layouts) or a data set's Hub id.")
    ],
    *,
    options: EvaluationOptions,
    output: Annotated[Path | None, OUTPUT] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the figures into the editor's card.")] = False,
    wild: Annotated[bool, WILD] = True,
    teacher_forced: Annotated[bool, TEACHER_FORCED] = True,
    scope: Annotated[
        bool, typer.Option(help="Without it, edits act everywhere, as merged and exported ones do.")
    ] = True,
    revision: Revision = None,
    base: ModelOptions,
    as_json: AsJson = False,
) -> Report:
    """
    Measure an editor, or a method that needs no training, for edits made alone or kept together: as people meet them,
    asked in many forms and answered freely, and teacher-forced: success, generality, locality and the other metrics
    that the data allows. With 95 % bootstrap intervals.

    \b
    Example:
      hf-mend eval my-editor facts_test.json --edits 1 --limit 4 --output results
      hf-mend eval gradient facts_test.json --base-model openai-community/gpt2 --edits 1,4 --edits-per-call 2 --limit 4
    """
    if card and not (Path(editor) / "editor_config.json").is_file():
        raise ValueError(f"--card writes into an editor's folder, and {editor} is none here")
    for folder in [*([] if output is None else [output]), *([Path(editor)] if card else [])]:
        check_writable(folder)
    check_measured(wild, teacher_forced)
    records, arguments = options.read(data)
    arguments["scope"] = scope
    in_the_wild = options.in_the_wild(arguments) if wild else None
    with options.shared(output) as share:
        result = measure(
            editor, editor, records, arguments, options.config, base, revision, output, in_the_wild, teacher_forced
        )
    if not share.is_first:
        raise typer.Exit()
    if share.count > 1 and not share.together:
        return Report({"share": options.share}, of_a_share(options.share, output))
    from ..evaluation.reports import metrics_table, write_results

    off = switched_off(wild=wild, teacher_forced=teacher_forced, scope=scope)
    words = [*options.words(as_given(data)), *off, *base_words(base)]
    command = shlex.join(["hf-mend", "eval", as_given(editor), *words])
    document = {"data": without_folder(data), "facts": len(records), "command": command, "results": [result]}
    text = metrics_table(result)
    places = []
    if output is not None:
        places += write_results(output, document, text)
    if card:
        _write_card(Path(editor), without_folder(data), result, command)
        places.append(Path(editor) / "README.md")
    said = [text, "", "Written: " + ", ".join(map(str, places))] if places else [text]
    return Report(document, "\n".join(said))


def check_measured(wild: bool, teacher_forced: bool) -> None:
    """Raise a `ValueError` if nothing is to be measured."""
    if not wild and not teacher_forced:
        raise ValueError("--no-wild --no-teacher-forced leaves nothing to measure; leave one of them out")


def switched_off(**options: bool) -> list[str]:
    """Return the switches that are off as words of a shell command."""
    return [f"--no-{name.replace('_', '-')}" for name, is_on in options.items() if not is_on]


def of_a_share(share: str | None, output: Path | None) -> str:
    """Return what is said of a share that has been measured."""
    return (
        f"The share {share} is measured, and in {output}. When the others are, run the same command without --share, "
        "with --join and the folder of each"
    )


def measure(
    name: str,
    title: str,
    records: Sequence[EditRecord],
    arguments: dict[str, Any],
    config: list[str] | None,
    base: ModelOptions,
    revision: str | None,
    output: Path | None,
    wild: dict[str, Any] | None = None,
    teacher_forced: bool = True,
) -> dict[str, Any]:
    """
    Measure one editor or method on a data set, in the wild with the arguments `wild`, if given; measurements in the
    output folder are not repeated.
    """
    model = load(name, config, base, revision)
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.reports import as_result
    from ..evaluation.wild_states import evaluate_in_the_wild
    from ..hub.cards import machine

    progress = None if output is None else output / "progress.jsonl"
    states = run(model, records, progress_file=progress, **arguments) if teacher_forced else []
    in_the_wild = [] if wild is None else evaluate_in_the_wild(model, records, progress_file=progress, **wild)
    settings = {
        "method": model.editor_config.method,
        "base_model": model.editor_config.base_model_name_or_path,
        "machine": machine(model.device),
        "training_time": _training_time(name, revision) if model.editor.trains else None,
        "settings": {name: value for name, value in arguments.items() if name not in ("text", "edits")},
    }
    return as_result(title, settings, states, in_the_wild)


def _training_time(editor: str, revision: str | None) -> str | None:
    """Return the training time that an editor's card states; a folder or repository may have no card."""
    from ..hub.cards import CARD_NAME, training_time
    from ..hub.transfer import find_files

    try:
        return training_time(find_files(editor, [CARD_NAME], revision=revision)[CARD_NAME])
    except FileNotFoundError:
        return None


def load(name: str, config: list[str] | None, base: ModelOptions, revision: str | None = None) -> EditableModel:
    """
    Load the model with a trained editor, or with a method that needs no training.

    Raises:
        ValueError: The method needs training, or options of a method are given for an editor.
    """
    from dataclasses import replace

    from ..config import EditorConfig
    from ..methods import get_method, training_free_config
    from ..methods.base import registered_methods

    if Path(name).is_dir() or name not in registered_methods():
        if config:
            raise ValueError(f"--config is for methods, and {name} is an editor, which has its configuration")
        return base.load(name, revision)
    if get_method(name).trains:
        raise ValueError(
            f"the method {name} needs a trained editor: make one with hf-mend train --method {name}, and give its "
            "folder in place of the name"
        )
    start = training_free_config()
    fitting = start if start.method == name else EditorConfig(method=name)
    return base.load(config=replace(fitting, **as_fields("--config", config, EditorConfig)))


def without_folder(name: str) -> str:
    """
    Return a local file's name without its folders, which have no meaning on other machines; return other names as is.
    """
    return Path(name).name if Path(name).exists() else name


def as_given(name: str) -> str:
    """
    Return a file's name for a command that is to be run again: a relative path as it is, and of an absolute one, which
    has no meaning on other machines, the name alone.
    """
    return without_folder(name) if Path(name).is_absolute() else name


def base_words(base: ModelOptions) -> list[str]:
    """Return the options of the base model that were given as words of a shell command."""
    words = []
    for item in fields(base):
        value = getattr(base, item.name)
        if value != item.default:
            words += [f"--{item.name.replace('_', '-')}", *([] if value is True else [as_given(str(value))])]
    return words


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"--edits is {text!r}, expected numbers with commas, such as 1,10,100")
    return list(dict.fromkeys(counts))


def _write_card(folder: Path, data: str, result: dict[str, Any], command: str) -> None:
    from ..config import EditorConfig
    from ..hub.cards import CardNotes, write_card

    config = EditorConfig.from_json_file(folder / "editor_config.json")
    layers = list((config.base_fingerprint or {}).get("layers", {}))
    groups: dict[str, dict[str, dict[str, float]]] = {"states": {}, "wild": {}}
    for kind, measured in groups.items():
        for state in result.get(kind, ()):
            kept = "" if state["edits"] == 1 else f", {state['edits']} edits kept at once"
            calls = f" (calls of {state['edits_per_call']})" if state["edits_per_call"] and kept else ""
            where = "" if state.get("scope", True) else ", without their scopes"
            measured[f"{data}{kept}{calls}{where}"] = {**state["metrics"], "edits": float(state["measured"])}
    curves = [state["strictness"] for state in result.get("wild", ()) if state["strictness"]]
    notes = CardNotes(measured=groups["states"], command=command, wild=groups["wild"])
    notes.strictness = curves[-1] if curves else []
    write_card(folder, config, layers, notes)
