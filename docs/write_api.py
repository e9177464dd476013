"""
Writes docs/api.md from the docstrings: `python docs/write_api.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import hf_mend


OUTPUT = Path(__file__).with_name("api.md")
# Beside the package's own names: what README and guides use from its modules.
FURTHER = {
    "evaluation.evaluate": ["evaluate", "State"],
    "evaluation.wild_states": ["evaluate_in_the_wild", "WildState"],
    "evaluation.wild": ["measure_in_the_wild", "WildSettings", "Wild"],
    "evaluation.wild_figures": ["wild_means", "confusion", "strictness_curve"],
    "evaluation.scores": [
        "bootstrap_interval",
        "counterfact_scores",
        "drawdown",
        "harmonic_score",
        "held_out_passages",
        "in_the_wild",
        "n_gram_entropy",
        "perplexity",
        "portability",
    ],
    "evaluation.sharing": ["sharing", "share_of", "Share"],
    "evaluation.generation": ["answer", "probability"],
    "editing.together": ["made_together"],
    "auto": ["load_model", "load_base"],
    "config": ["option"],
    "methods": [
        "MendConfig",
        "MalmenConfig",
        "KnowledgeEditorConfig",
        "EditableNetworkConfig",
        "WhitenedGradientConfig",
        "UltraEditConfig",
        "MemitConfig",
        "RomeConfig",
        "FineTuningConfig",
        "FineTuningWithPenaltyConfig",
        "BoundedFineTuningConfig",
        "LoraPerEditConfig",
        "IterativeConfig",
    ],
    "demo.smollm2": ["load_smollm2"],
    "hub.cards": ["CardNotes", "update_card", "set_metadata"],
}
HEAD = """\
# API reference

Written from the docstrings by `python docs/write_api.py`. Names of the package come first, in alphabetical order,
then those that are imported from its modules. The command line explains itself: `hf-mend --help`.
"""


def write() -> str:
    """The page."""
    parts = [HEAD]
    for name in sorted(hf_mend.__all__, key=str.lower):
        parts.append(section(getattr(hf_mend, name), f"hf_mend.{name}"))
    for module, names in FURTHER.items():
        for name in names:
            parts.append(section(getattr(import_module(f"hf_mend.{module}"), name), f"hf_mend.{module}.{name}"))
    return "\n".join(parts)


def section(thing: Any, name: str) -> str:
    """One class or function, a class with its public methods."""
    if not inspect.isclass(thing):
        return f"## `{name}`\n\n{signature(thing)}\n{prose(thing)}"
    parts = [f"## `{name}`\n"]
    if "__init__" in vars(thing) and not dataclasses.is_dataclass(thing):
        parts.append(signature(thing.__init__, thing.__name__))
    parts.append(prose(thing))
    if "Args:" not in (thing.__doc__ or ""):
        parts.append(fields(thing))
    for method_name, method in methods(thing):
        kind = "property" if isinstance(method, property) else ""
        function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
        if inspect.getdoc(function):
            head = f"### `{thing.__name__}.{method_name}`{f' ({kind})' if kind else ''}\n"
            parts.append(head if kind else f"{head}\n{signature(function, method_name)}")
            parts.append(prose(function))
    return "\n".join(part for part in parts if part)


def methods(thing: type) -> Iterator[tuple[str, Any]]:
    """
    Public methods and properties that this package defines, in the order of the source; those that come from a class
    with a section of its own stand there.
    """
    seen = set()
    elsewhere = [getattr(hf_mend, name) for name in hf_mend.__all__]
    for owner in thing.__mro__:
        if not owner.__module__.startswith("hf_mend") or (owner in elsewhere and owner is not thing):
            continue
        for name, value in vars(owner).items():
            shown = inspect.isroutine(value) or isinstance(value, (property, classmethod, staticmethod))
            if shown and not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, value


def signature(function: Any, name: str | None = None) -> str:
    """A function's signature as code, a parameter a line where it is long."""
    parameters, star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            parameters.append("*")
            star = True
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        star = star or mark == "*"
        text = mark + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}" if ":" in text else f"={parameter.default!r}"
        parameters.append(text)
    returns = inspect.signature(function).return_annotation
    silent = returns is inspect.Signature.empty or function.__name__ == "__init__"
    arrow = "" if silent else f" -> {annotation(returns)}"
    name = name or function.__name__
    line = f"{name}({', '.join(parameters)}){arrow}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {text},\n" for text in parameters) + f"){arrow}"
    return f"```text\n{line}\n```\n"


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", str(value))


def fields(thing: type) -> str:
    """The fields of a configuration that explain themselves in their metadata."""
    if not dataclasses.is_dataclass(thing):
        return ""
    rows = [
        f"| `{item.name}` | `{default(item)}` | {item.metadata['help'].replace('|', chr(92) + '|')} |"
        for item in dataclasses.fields(thing)
        if "help" in item.metadata and item.name in inspect.get_annotations(thing)
    ]
    return "\n".join(["| field | default | |", "|---|---|---|", *rows, ""]) if rows else ""


def default(item: dataclasses.Field[Any]) -> Any:
    return repr(item.default) if item.default is not dataclasses.MISSING else "…"


def prose(thing: Any) -> str:
    """A docstring as Markdown: its sections' entries become lists, references become code."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r"\[`~?([\w.]+)`\]", lambda found: f"`{found[1].removeprefix('hf_mend.')}`", text)
    out: list[str] = []
    listed = fenced = one = taken = False
    for line in text.splitlines():
        fenced ^= line.strip().startswith("```")
        head = re.fullmatch(r"(Args|Arguments|Returns|Raises|Yields|Example):", line)
        if fenced:
            out.append(line)
        elif head:
            listed, taken = head[1] != "Example", False
            one = head[1] in ("Returns", "Yields")  # thing, on as many lines as it takes
            out += [f"**{'Arguments' if head[1] == 'Args' else head[1]}**", *([""] if listed else [])]
        elif listed and re.match(r" {4}\S", line) and not taken:
            entry = re.match(r"([\w*, ]+?)( \(.*?\))?: (.*)", line.strip())
            out.append(f"- `{entry[1]}`{entry[2] or ''}: {entry[3]}" if entry else f"- {line.strip()}")
            taken = one
        elif listed and line.startswith("    "):
            out.append(f"  {line.strip()}")
        else:
            listed = listed and not line.strip()
            out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(write(), encoding="utf-8")
