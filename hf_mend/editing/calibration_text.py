"""The calibration text that a method which needs no training looks at before the first edit: what must stay."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import resources

from tqdm.auto import tqdm

from ..bases.gradients import record_inputs
from ..data.encoding import Encoder, Query
from .context import EditingContext


def observe_calibration_text(
    context: EditingContext,
    encoder: Encoder,
    texts: Iterable[str | tuple[str, str]] = (),
    batch_size: int = 16,
) -> None:
    """
    Show a method calibration text, some 160 packaged lines and the user's own. What the method saw before is discarded
    when all were shown, and stays on an error.

    Args:
        context ([`EditingContext`]): The model, and the method whose statistics are set then.
        encoder ([`Encoder`]): Tokenises and pads.
        texts (`Iterable[str | tuple[str, str]]`, *optional*): The user's: a text, or a prompt and its answer.
        batch_size (`int`, defaults to 16): Texts in one pass.

    Raises:
        TypeError: One of `texts` is neither.
        ValueError: One of them is empty.
    """
    packaged = resources.files("hf_mend").joinpath("templates/calibration_text.txt").read_text(encoding="utf-8")
    split, method = context.split, context.method
    longest = (getattr(split.model.config, "max_position_embeddings", None) or 512) // 2
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
        method.forget_observed()  # what an error left unfinished


def _as_query(number: int, text: str | tuple[str, str]) -> Query:
    parts = _halves(text) if isinstance(text, str) else text
    if not isinstance(parts, (tuple, list)) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"text {number} is {text!r}, expected a string, or a prompt and its answer")
    if not all(part.strip() for part in parts):
        raise ValueError(f"text {number} is {text!r}, expected at least two characters, or a prompt and its answer")
    return Query(*parts)


def _halves(text: str) -> tuple[str, str]:
    """
    A text in two, at a white space near the middle or, where there is none, at a character. Of an encoder-decoder
    model the decoder sees the second.
    """
    text = text.strip()
    words = list(re.finditer(r"\S+", text))
    middle = words[len(words) // 2].start() if len(words) > 1 else len(text) // 2
    # One space joins them again; any other white space is the first half's.
    return re.sub(r"(?<=\S) $", "", text[:middle]), text[middle:]
