"""`hf-mend compare`: compare several editors and methods on one data set in one report."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ..hub.atomic import check_writable
from .common import AsJson, ModelOptions, Report, with_options
from .evaluate import (
    OUTPUT,
    TEACHER_FORCED,
    WILD,
    EvaluationOptions,
    as_given,
    base_words,
    check_measured,
    measure,
    of_a_share,
    switched_off,
    without_folder,
)


@with_options
def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Trained editors (folders or Hub ids) and methods that need none; title=name gives one a title."
        ),
    ],
    *,
    data: Annotated[str, typer.Option(help="Facts: a file, or a data set's Hub id.")],
    output: Annotated[Path, OUTPUT],
    options: EvaluationOptions,
    wild: Annotated[bool, WILD] = True,
    teacher_forced: Annotated[bool, TEACHER_FORCED] = True,
    base: ModelOptions,
    as_json: AsJson = False,
) -> Report:
    """
    Measure several editors and methods as hf-mend eval does one, in the wild and teacher-forced, and write
    results.json, Markdown tables, plots (with the extra `plots`) and report.html, one file that needs no network.

    \b
    Example:
      hf-mend compare trained=my-editor gradient ultraedit --data facts_test.json --edits 1,4 --limit 4 \\
          --output results
    """
    titles = {}
    for name in names:
        title, equals, rest = name.partition("=")
        title, name = (title, rest) if equals and not Path(name).exists() else (without_folder(name), name)
        if not title or not name:
            raise ValueError(f"{title}={name} names no editor; write title=name, or a name alone")
        if title in titles:
            raise ValueError(f"two of the names are called {title!r}; give them titles: title=name")
        titles[title] = name
    check_measured(wild, teacher_forced)
    check_writable(output)
    records, arguments = options.read(data)
    in_the_wild = options.in_the_wild(arguments | {"scope": True}) if wild else None
    from ..evaluation.reports import comparison_table, narrow_table, write_report, write_results

    chosen = _options_of_each(list(titles.values()), options.config or [])
    with options.shared(output) as share:
        results = [
            measure(name, title, records, arguments, chosen[name], base, None, output, in_the_wild, teacher_forced)
            for title, name in titles.items()
        ]
    if not share.is_first:
        raise typer.Exit()
    if share.count > 1 and not share.together:
        return Report({"share": options.share}, of_a_share(options.share, output))
    shown = [f"{title}={as_given(name)}" for title, name in titles.items()]
    off = switched_off(wild=wild, teacher_forced=teacher_forced)
    words = [*options.words(as_given(data)), *off, *base_words(base), "--output", as_given(str(output))]
    command = shlex.join(["hf-mend", "compare", *shown, "--data", *words])
    document = {"data": without_folder(data), "facts": len(records), "command": command, "results": results}
    places = [*write_results(output, document, comparison_table(results)), *write_report(output, document)]
    text = narrow_table(results, shutil.get_terminal_size().columns)
    return Report(document, f"{text}\n\nWritten: {', '.join(map(str, places))}")


def _options_of_each(names: list[str], pairs: list[str]) -> dict[str, list[str]]:
    """
    Return for each method the options that it has. An option that none has stays, to cause an error that names it.
    """
    from ..config import options_of_methods

    methods = options_of_methods()
    found: dict[str, list[str]] = {name: [] for name in names}
    for pair in pairs:
        having = set(methods.get(pair.partition("=")[0], names))
        for name in found:
            if name in having or not having.intersection(names):
                found[name].append(pair)
    return found
