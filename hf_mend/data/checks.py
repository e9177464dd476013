"""Checks of texts before a model sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from .display import shown
from .encoding import Encoder, Query


def check_tokenizer(tokenizer: Any) -> None:
    """
    Raises:
        TypeError: It is no tokenizer, for example a tokenizer's name or a processor.
    """
    if tokenizer is None or isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    has_one = isinstance(getattr(tokenizer, "tokenizer", None), PreTrainedTokenizerBase)
    instead = "its own tokenizer, processor.tokenizer" if has_one else "AutoTokenizer.from_pretrained(name)"
    raise TypeError(
        f"tokenizer is {shown(str(tokenizer))}, a {type(tokenizer).__name__}; expected a tokenizer that transformers "
        f"has loaded, such as {instead}"
    )


def check_query(
    query: Query, encoder: Encoder, longest: int | None, where: str, prompt: str = "prompt", answer: str = "target"
) -> None:
    """
    Args:
        query ([`Query`]): The texts.
        encoder ([`Encoder`]): Tokenises.
        longest (`int`, *optional*): Most tokens that the model takes.
        where (`str`): Whose texts they are, for messages.
        prompt, answer (`str`): What the prompt and the answer are called there.

    Raises:
        ValueError: One is empty or tokenises to nothing, or they are too long; the message names it.
    """
    texts = {prompt: query.prompt} if query.answer is None else {prompt: query.prompt, answer: query.answer}
    for name, text in texts.items():
        if not text.strip():
            raise ValueError(f"{where} has an empty {name} ({text!r}), expected some text")
    tokens = dict(zip(texts, encoder.tokens(query), strict=False))
    for name, ids in tokens.items():
        if not ids:
            raise ValueError(f"{where}: the {name} {texts[name]!r} tokenises to nothing")
    lengths = {name: len(ids) for name, ids in tokens.items()}
    length = max(lengths.values()) if encoder.is_encoder_decoder else sum(lengths.values())
    if longest is not None and length > longest:
        together = f" with its {answer}" if len(lengths) > 1 and not encoder.is_encoder_decoder else ""
        longer = max(lengths, key=lambda name: lengths[name])
        raise ValueError(
            f"{where} has {length} tokens{together}, the model takes {longest}; shorten the {longer} "
            f"{texts[longer][:60]!r}..."
        )


def missing_subjects(pairs: Iterable[tuple[str, str | None]]) -> str | None:
    """
    What to say of subjects that do not stand in their prompts, to somebody whose method edits there.

    Args:
        pairs (`Iterable[tuple[str, str | None]]`): Prompts and their subjects, `None` where none is named.

    Returns:
        `str` or `None`: One sentence, or `None` where all stand there.
    """
    missing = [(prompt, subject) for prompt, subject in pairs if subject and subject not in prompt]
    if not missing:
        return None
    prompt, subject = missing[0]
    more = f" (and those of {len(missing) - 1} more prompts)" if len(missing) > 1 else ""
    return (
        f"the subject {subject[:60]!r} does not stand in its prompt {prompt[:60]!r}{more}, so the edit is made at the "
        "prompt's last token; write the subject as the prompt does"
    )
