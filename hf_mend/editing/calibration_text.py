"""Calibration text: a method that needs no training sees it before the first edit, as text whose outputs must stay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources

from tqdm.auto import tqdm

from ..bases.gradients import record_inputs
from ..bases.limits import longest_input
from ..data.encoding import Encoder, Query
from .context import EditingContext


def observe_calibration_text(
    context: EditingContext,
    encoder: Encoder,
    texts: Iterable[str | tuple[str, str]] = (),
    batch_size: int = 16,
) -> None:
    """
    Gather a method's statistics of calibration text, some 160 packaged lines and the user's own. They replace the
    method's earlier statistics at the end; on an error those stay.

    Args:
        context ([`EditingContext`]): The model and the method.
        encoder ([`Encoder`]): Tokenises and pads.
        texts (`Iterable[str | tuple[str, str]]`, *optional*): The user's texts, or prompts with their answers.
        batch_size (`int`, defaults to 16): Texts in one pass.

    Raises:
        TypeError: One of `texts` is neither.
        ValueError: One of them is empty.
    """
    packaged = resources.files("hf_mend").joinpath("templates/calibration_text.txt").read_text(encoding="utf-8")
    split, method = context.split, context.method
    longest = (longest_input(split.model.config) or 512) // 2
    queries = [Query(*_halves(line)) for line in packaged.splitlines()]
    queries += [_as_query(number, text) for number, text in enumerate(texts)]
    pairs = [(prompt[:longest], answer[:longest]) for prompt, answer in map(encoder.tokens, queries)]
    try:
        for start in tqdm(range(0, len(pairs), batch_size), desc="Calibration text", disable=len(pairs) < 1000):
            rows = encoder.pad(pairs[start : start + batch_size]).to(split.device)
            method.observe_inputs(record_inputs(split, context.targets, rows))
            method.observe_texts(rows)
        method.finish_observing()
    finally:
        method.forget_observed()  # statistics that an error left unfinished


def _as_query(number: int, text: str | tuple[str, str]) -> Query:
    parts = _halves(text) if isinstance(text, str) else text
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"text {number} is {text!r}, expected a string, or a prompt and its answer")
    if not all(part.strip() for part in parts):
        raise ValueError(f"text {number} is {text!r}, expected at least two characters, or a prompt and its answer")
    return Query(*parts)


def _halves(text: str) -> tuple[str, str]:
    """
    Split a text in two, at a white space near the middle or, where there is none, at a character. The decoder of an
    encoder-decoder model sees the second half.
    """
    text = text.strip()
    words = list(re.finditer(r"\S+", text))
    middle = words[len(words) // 2].start() if len(words) > 1 else len(text) // 2
    # One space joins the halves again; any other white space belongs to the first.
    return re.sub(r"(?<=\S) $", "", text[:middle]), text[middle:]
