"""Chats as text, through the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


# Stands in for an answer, to see what the template puts before one.
_ANSWER = "Xq7zAnswerWv3k"


def render_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> tuple[str, str | None]:
    """
    A chat as the model reads it, up to where the answer begins.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Has the template. One that reads a content as a list of parts gets that.
        turns (`Sequence[tuple[str, str]]`): Each a role and what was said; the last is the user's prompt.

    Returns:
        `tuple[str, str | None]`: The text, with a marker of the assistant's turn that the template writes before
        answers alone, and the white space that stands between text and answer; `None` where the template does not
        tell.

    Raises:
        ValueError: The tokenizer has no template, or the template refuses the chat or leaves the prompt out.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True needs a tokenizer with a chat template; this one has none, so leave chat=False")
    refused: Exception | None = None
    for as_parts in (False, True):
        try:
            text = _apply(tokenizer, turns, as_parts, prompt=True)
        except Exception as error:  # a template is foreign code, and fails as it likes
            refused = refused or error
            continue
        if is_in(turns[-1][1], text):
            return _up_to_answer(tokenizer, turns, as_parts, text)
    prompt = turns[-1][1]
    why = f"refuses this chat ({refused})" if refused else f"leaves the prompt out: {prompt[:60]!r} is not in its text"
    raise ValueError(
        f"the tokenizer's chat template {why}; edit without chat=True, or set tokenizer.chat_template to one that "
        "writes the turns"
    )


def chat_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Return what the tokenizer's chat template writes behind an answer, an empty text where that is not known.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with a chat template.
    """
    for as_parts in (False, True):
        try:
            whole = _apply(tokenizer, [("user", "When?"), ("assistant", _ANSWER)], as_parts, prompt=False)
        except Exception:  # foreign code, as above
            continue
        if _ANSWER in whole:
            return whole[whole.rfind(_ANSWER) + len(_ANSWER) :]
    return ""


def is_in(said: str, text: str) -> bool:
    """Whether a chat's text has what was said, white space aside, which templates trim."""
    return "".join(said.split()) in "".join(text.split())


def _up_to_answer(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], as_parts: bool, text: str
) -> tuple[str, str | None]:
    try:
        whole = _apply(tokenizer, [*turns, ("assistant", _ANSWER)], as_parts, prompt=False)
    except Exception:  # foreign code, as above
        return text, None
    place = whole.find(_ANSWER, len(text))
    if not whole.startswith(text) or place < 0:
        return text, None
    lead = whole[len(text) : place]
    if not lead.strip():
        return text, lead
    # A marker of the assistant's turn: read, not said. A space behind it belongs to the answer's first word.
    marker = lead.rstrip(" ")
    return text + marker, lead[len(marker) :]


def _apply(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], as_parts: bool, prompt: bool) -> str:
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": said}] if as_parts else said} for role, said in turns
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def as_turn(message: Any, where: str) -> tuple[str, str]:
    """
    Return a turn of a chat as a role and what was said.

    Args:
        message (`Mapping[str, str]`): An object with `role` and `content`.
        where (`str`): What it is called in the error.

    Raises:
        TypeError: It is none.
    """
    fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
    if not all(isinstance(value, str) for value in fields):
        raise TypeError(f"{where} is {str(message)[:80]!r}, expected an object whose 'role' and 'content' are texts")
    role, content = fields
    return str(role), str(content)
