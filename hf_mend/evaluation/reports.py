"""Results of an evaluation as a JSON document, as Markdown tables and as an HTML page."""

from __future__ import annotations

import json
import re
import textwrap
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .. import __version__
from ..hub.cards import table
from ..hub.plots import can_draw, draw_comparison
from .evaluate import State
from .wild_figures import figures_table
from .wild_states import WildState


# The most characters of a name in a terminal's table.
_NAME = 24

# The titles of the metrics, in the order of the tables.
TITLES = {
    "edit_success": "edit success",
    "generality": "generality",
    "neighborhood": "neighbourhood",
    "unrelated": "unrelated",
    "score": "mean of these",
    "exact_match": "exact match",
    "neighborhood_kl": "KL neighbourhood",
    "unrelated_kl": "KL unrelated",
    "drawdown": "drawdown (accuracy)",
    "efficacy_score": "efficacy score",
    "paraphrase_score": "paraphrase score",
    "neighborhood_score": "neighbourhood score",
    "counterfact_score": "CounterFact score",
    "efficacy_magnitude": "efficacy magnitude",
    "paraphrase_magnitude": "paraphrase magnitude",
    "neighborhood_magnitude": "neighbourhood magnitude",
    "portability": "portability",
    "multi_hop": "multi-hop",
    "fluency": "fluency",
    "wild_question": "in the wild, question",
    "wild_instruction": "in the wild, instruction",
    "wild_chat": "in the wild, chat",
    "perplexity_before": "perplexity before",
    "perplexity": "perplexity after",
    "perplexity_drawdown": "drawdown (perplexity)",
}


# The figures in the wild that are compared.
WILD_COLUMNS = (
    "prompt", "paraphrase", "behind text", "question", "chat", "later turn", "neighbours", "same subject",
    "unrelated: bits", "repeats",
)  # fmt: skip
# Head and rows.
Table = tuple[list[str], list[list[str]]]


def as_result(
    name: str, settings: Mapping[str, Any], states: Sequence[State], wild: Sequence[WildState] = ()
) -> dict[str, Any]:
    """
    Return the results of one editor or method as JSON values.

    Args:
        name (`str`): The title of the editor or method.
        settings (`Mapping[str, Any]`): Its method, base model and the like. `training_time`, which an editor's card
            may state, becomes a column of the comparison.
        states (`Sequence[State]`): The states that were measured; see [`~hf_mend.evaluation.evaluate.evaluate`].
        wild (`Sequence[WildState]`): Those in the wild; see
            [`~hf_mend.evaluation.wild_states.evaluate_in_the_wild`].
    """
    in_the_wild = {"wild": [asdict(state) for state in wild]} if wild else {}
    return {"name": name, **settings, **in_the_wild, "states": [asdict(state) for state in states]}


def metrics_table(result: Mapping[str, Any]) -> str:
    """
    Return one editor's or method's states as Markdown tables with intervals, one column per state: those in the wild,
    then those that are teacher-forced.
    """
    states, wild = result["states"], result.get("wild", [])
    parts = [wild_tables(wild)] if wild else []
    if states:
        parts += ["Teacher-forced:"] if wild else []
        parts.append(_forced_table(states))
    return "\n\n".join(parts)


def _forced_table(states: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in TITLES if any(name in state["metrics"] for state in states)]
    rows = [[TITLES[name], *(with_interval(state, name) for state in states)] for name in names]
    rows.append(["facts measured", *(str(state["measured"]) for state in states)])
    rows += [[title, *(cell(state) for state in states)] for title, cell in COSTS.items()]
    return table(("", *(_title(state) for state in states)), rows)


def wild_tables(states: Sequence[Mapping[str, Any]]) -> str:
    """
    Return states in the wild as Markdown tables, one column per state: the figures, and for each state with a scope
    what this decides, and how that changes with its strictness.
    """
    names = dict.fromkeys(name for state in states for name in state["metrics"])
    rows = [[name, *(with_interval(state, name) for state in states)] for name in names]
    rows.append(["facts measured", *(str(state["measured"]) for state in states)])
    parts = ["In the wild (free answers, in all forms of asking):", table(("", *map(_title, states)), rows)]
    for state in states:
        if state["decisions"]:
            columns = dict.fromkeys(name for row in state["decisions"].values() for name in row)
            shares = {name: {k: row[name] for k, row in state["decisions"].items() if name in row} for name in columns}
            curve = {f"{point['strictness']:+.2f}": _without_strictness(point) for point in state["strictness"]}
            parts += [f"What the scope decides at a text's end, {_title(state)}:", figures_table(shares)]
            parts += [f"By `scope_strictness`, {_title(state)}:", figures_table(curve)]
    return "\n\n".join(parts)


def _without_strictness(point: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in point.items() if name != "strictness"}


def comparison_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return several editors and methods as Markdown tables, one row per state: in the wild, then teacher-forced."""
    parts = []
    for title, (head, rows) in comparisons(results).items():
        parts.append(title)
        parts.append(table([escaped(cell) for cell in head], [[escaped(cell) for cell in row] for row in rows]))
    return "\n\n".join(part for part in parts if part)


def comparisons(results: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Return the title, the head and the rows of each comparison table as plain text."""
    wild = any(result.get("wild") for result in results)
    forced = any(result["states"] for result in results)
    found = {"In the wild (free answers, in all forms of asking):": wild_comparison(results)} if wild else {}
    return found | ({"Teacher-forced:" if wild else "": comparison(results)} if forced else {})


def wild_comparison(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the head and the rows of the comparison in the wild as plain text."""
    states = [state for result in results for state in result.get("wild", ())]
    names = [name for name in WILD_COLUMNS if any(name in state["metrics"] for state in states)]
    rows = [
        [result["name"], _title(state), str(state["measured"]), *(with_interval(state, name) for name in names)]
        for result in results
        for state in result.get("wild", ())
    ]
    return ["editor or method", "kept", "measured", *names], rows


def comparison(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the head and the rows of the teacher-forced comparison as plain text."""
    states = [state for result in results for state in result["states"]]
    names = [name for name in TITLES if any(name in state["metrics"] for state in states)]
    trained = any(result.get("training_time") for result in results)
    more = ["training"] if trained else []
    head = ["editor or method", "kept", "measured", *(TITLES[name] for name in names), *COSTS, *more]
    rows = [
        [
            result["name"],
            _title(state),
            str(state["measured"]),
            *(with_interval(state, name) for name in names),
            *(cell(state) for cell in COSTS.values()),
            *([result.get("training_time") or ""] if trained else []),
        ]
        for result in results
        for state in result["states"]
    ]
    return head, rows


def narrow_table(results: Sequence[Mapping[str, Any]], width: int) -> str:
    """
    Return as much of the comparisons as a line of a terminal holds, without intervals: the first columns, aligned, and
    a line that names those that are left out.

    Args:
        results (`Sequence[Mapping[str, Any]]`): What [`as_result`] returns, of each editor or method.
        width (`int`): Characters of a line.
    """
    parts = [(title, *_narrowed(*found, width)) for title, found in comparisons(results).items()]
    left = [name for *_, missing in parts for name in missing]
    text = f"With --json, and in the files written: the intervals{', ' if left else ''}{', '.join(left)}"
    lines = [line for title, shown, _ in parts for line in ([title] if title else []) + [shown, ""]]
    return "\n".join([*lines, *textwrap.wrap(text, width)])


def _narrowed(head: list[str], rows: list[list[str]], width: int) -> tuple[str, list[str]]:
    """Return a table as wide as a line, and the names of the columns that are left out."""
    rows = [[re.sub(r" \[.*\]$", "", cell) for cell in row] for row in rows]
    columns = list(zip(head, *rows, strict=True))
    columns[0] = tuple(cell if len(cell) <= _NAME else f"{cell[: _NAME - 3]}..." for cell in columns[0])
    sizes = [max(map(len, column)) for column in columns]
    count, used = 1, sizes[0]
    while count < len(columns) and used + 2 + sizes[count] <= width:
        used += 2 + sizes[count]
        count += 1
    lines = [
        "  ".join(
            [row[0].ljust(sizes[0]), *(cell.rjust(size) for cell, size in zip(row[1:], sizes[1:], strict=False))]
        )
        for row in zip(*columns[:count], strict=True)
    ]
    return "\n".join(line.rstrip() for line in lines), head[count:]


def escaped(text: str) -> str:
    """Return a text escaped for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def shown(value: float) -> str:
    """Format a number with three decimals, or with four significant digits if it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def with_interval(state: Mapping[str, Any], name: str) -> str:
    """Return a state's figure, with its interval if it has one."""
    if name not in state["metrics"]:
        return ""
    interval = state["intervals"].get(name)
    between = f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else ""
    return shown(state["metrics"][name]) + between


def _title(state: Mapping[str, Any]) -> str:
    alone = state["edits"] == 1
    calls = f", calls of {state['edits_per_call']}" if state["edits_per_call"] and not alone else ""
    where = "" if state.get("scope", True) else ", without scopes"
    return f"{state['edits']} edit{'' if alone else 's'}{calls}{where}"


def _memory(state: Mapping[str, Any]) -> str:
    return f"{state['peak_memory'] / 1e6:.0f}" if state["peak_memory"] else ""


COSTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "seconds an edit": lambda state: f"{state['seconds_an_edit']:.3g}",
    "peak memory, MB": _memory,
}


def write_results(folder: str | Path, document: Mapping[str, Any], markdown: str) -> list[Path]:
    """
    Write `results.json` and `results.md` into a folder, which is made if it does not exist.

    Args:
        folder (`str` or `Path`): The folder.
        document (`Mapping[str, Any]`): JSON values, to which the library's version is added.
        markdown (`str`): The tables.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.json", folder / "results.md"]
    content = {"hf_mend": __version__, **document}
    paths[0].write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(f"{markdown}\n\n```bash\n{document['command']}\n```\n", encoding="utf-8")
    return paths


def write_report(folder: str | Path, document: Mapping[str, Any]) -> list[Path]:
    """
    Write `report.html`, one file with all content, and beside it its plots if matplotlib is installed.

    Args:
        folder (`str` or `Path`): The folder, which exists.
        document (`Mapping[str, Any]`): `data`, `facts`, `command` and `results`, a list of what [`as_result`] returns.
    """
    pictures = draw_comparison(folder, document["results"]) if can_draw() else {}
    path = Path(folder) / "report.html"
    path.write_text(report_page(document, {title: file.read_bytes() for title, file in pictures.items()}), "utf-8")
    return [path, *pictures.values()]


def report_page(document: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """
    Return the report as an HTML page that loads no other file.

    Args:
        document (`Mapping[str, Any]`): See [`write_report`].
        pictures (`Mapping[str, bytes]`): Title -> PNG content of each plot.
    """
    tables = [
        part
        for heading, found in comparisons(document["results"]).items()
        for part in ([f"<h2>{escape(heading)}</h2>"] if heading else []) + [_html_table(*found)]
    ]
    figures = [
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{b64encode(png).decode()}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, png in pictures.items()
    ]
    missing = [] if pictures else ["<p>No pictures: pip install 'hf_mend[plots]' and run the command again.</p>"]
    settings = [
        ("data", f"{document['data']}, {document['facts']} facts"),
        *((r["name"], f"{r['method']} on {r['base_model']}; {r['machine']}") for r in document["results"]),
        ("hf_mend", __version__),
    ]
    page = resources.files("hf_mend").joinpath("templates/report.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=escape(f"Model editing on {document['data']}"),
        table="\n".join(tables),
        pictures="\n".join([*figures, *missing]),
        settings=_html_table(("", ""), settings),
        command=escape(document["command"]),
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
