"""What an edit's scope has to be told apart from: texts that only name what the edit is about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..bases.by_length import wants_few_passes
from ..bases.split import SplitModel
from ..data.encoding import Encoder, Query, bare_prompt
from ..data.forms import writes_chats
from ..edits.edit_scope import EditScope
from ..scope.gate import ScopeGate
from ..scope.network import MEANING_WIDTH, key_scores
from ..scope.words import WordTable, place_within, words_in
from .scoping import keys_of_queries


# Texts that name a subject and ask for nothing in particular, and whether they are a turn of a chat where there are
# chats. Neither training nor measuring has them.
TEXTS: Sequence[tuple[str, bool]] = (
    ("I like {} because it", True),
    ("I like {} because it", False),
    ("The best thing about {} is that it", False),
)
# A text that is as much like one of the edit's own asks for nearly the same, and is none.
MOST_LIKE = 0.8
# Told apart from such texts, an edit may act at scores that are so much lower.
LOWER = 0.02
# Added to the log odds of each word: a name's less sure words belong to it.
_READY = 1.0
# Letters of the longest subject.
_LONGEST = 200
# What may stand around a subject in a prompt.
_MARKS = " \t\n,;:!?\"'\u2018\u2019\u201c\u201d"


@torch.no_grad()
def with_contrasts(  # one argument each for what it reads and what it is for
    gate: ScopeGate,
    split: SplitModel,
    encoder: Encoder,
    scopes: Sequence[EditScope],
    queries: Sequence[Query],
    subjects: Sequence[str | None],
    longest: int | None = None,
) -> list[EditScope]:
    """
    Return scopes of edits that keep what they have to be told apart from, and act at lower scores for that.

    Args:
        gate ([`~hf_mend.scope.gate.ScopeGate`]): The model's scope.
        split ([`SplitModel`]): The model, cut at the block that the scope reads.
        encoder ([`Encoder`]): Tokenises and pads.
        scopes (`Sequence[EditScope]`): The scopes.
        queries (`Sequence[Query]`): Of each edit, its prompt.
        subjects (`Sequence[str]`): What each is about; a scope without one stays as it is.
        longest (`int`, *optional*): The most tokens that the model takes.
    """
    # A turn of a chat is several times as long as the same text, which would be padding for the most part.
    texts: dict[bool, list[tuple[int, Query]]] = {True: [], False: []}
    chats, apart = writes_chats(encoder.tokenizer), not wants_few_passes(split.device)
    for i, (query, subject) in enumerate(zip(queries, subjects, strict=True)):
        for template, chat in TEXTS if subject else ():
            text = replace(query, prompt=template.replace("{}", subject or ""), chat=chat, answer=None, subject=None)
            text = replace(text, context="", ends=False, separator=None)
            text = text if chat else replace(text, turns=(), system=None)
            if (chats or not chat) and _is_taken(text, encoder, longest):
                texts[chat and apart].append((i, text))
    found: dict[int, list[torch.Tensor]] = {}
    for part in texts.values():
        keys = keys_of_queries(gate, split, encoder, [text for _, text in part])
        for (i, _), key in zip(part, keys, strict=True):
            found.setdefault(i, []).append(key)
    made = [*scopes]
    for i, of_edit in found.items():
        made[i] = _with(scopes[i], torch.cat(of_edit), subjects[i])
    return made


def _is_taken(text: Query, encoder: Encoder, longest: int | None) -> bool:
    """Whether the model takes a text, which nobody gave: where it does not, the edit goes without."""
    try:
        tokens, _ = encoder.tokens(text)
    except ValueError:
        return False
    return longest is None or len(tokens) <= longest


def _with(scope: EditScope, keys: torch.Tensor, subject: str | None) -> EditScope:
    """A scope with those of some keys that ask for less than its own do."""
    with torch.autocast(keys.device.type, enabled=False):
        alike = key_scores(keys, scope.keys.float()).amax(-1)
    contrasts = keys[alike < MOST_LIKE, :MEANING_WIDTH].half()
    if not len(contrasts):
        return scope
    return replace(scope, contrasts=contrasts, about=subject, thresholds=(scope.thresholds - LOWER).clamp(min=-1.0))


def subject_of(query: Query, odds: Sequence[float], encoder: Encoder, table: WordTable) -> str | None:
    """
    Return what a text's prompt is about, as it stands there: the run of words that most surely names it. `None` where
    none does, or all of the prompt would be left out with it.

    Args:
        query ([`Query`]): The text, in a chat where there are chats: a text's first token tells nothing of its word.
        odds (`Sequence[float]`): Of each of its tokens, the log odds that the word which ends there is one of these.
        encoder ([`Encoder`]): Tokenises.
        table ([`~hf_mend.scope.words.WordTable`]): Of its tokenizer.
    """
    prompt = bare_prompt(query.prompt)
    fast = encoder.tokenizer.is_fast  # others do not tell where their tokens stand
    found = encoder.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=fast)
    tokens = found["input_ids"]
    words, text = words_in(table, tokens), words_in(table, encoder.tokens(query)[0])
    place = place_within(words, text)
    if place is None:
        return None
    first, stop = _surest_run([odds[word.last] + _READY for word in text[place : place + len(words)]])
    if first == stop:
        return None
    begin, end = words[first].first, words[stop - 1].last
    if fast:
        spans = found["offset_mapping"]
        subject = prompt[spans[begin][0] : spans[end][1]].strip(_MARKS)
    else:
        subject = encoder.decode(tokens[begin : end + 1]).strip(_MARKS)
    return named_in(prompt, re.sub(r"['\u2019]s$", "", subject))


def named_in(prompt: str, subject: str | None) -> str | None:
    """
    Return what a prompt is said to be about, if it names that and asks for something beside; otherwise `None`.

    Args:
        prompt (`str`): The prompt.
        subject (`str`, *optional*): What it is said to be about.
    """
    subject = (subject or "").strip()
    parts = subject, prompt.replace(subject, "", 1)
    is_one = subject in prompt and len(subject) <= _LONGEST and all(re.search(r"\w", part) for part in parts)
    return subject if is_one else None


def _surest_run(odds: Sequence[float]) -> tuple[int, int]:
    """Return where the run of numbers with the largest sum begins and stops; nothing where none is above 0."""
    best, found, total, first = 0.0, (0, 0), 0.0, 0
    for place, one in enumerate(odds):
        if total <= 0.0:
            total, first = 0.0, place
        total += one
        if total > best:
            best, found = total, (first, place + 1)
    return found
