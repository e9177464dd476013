"""Where edits act: their keys in the model's scope, and what an edit's own texts find there."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..bases.fused import fetched
from ..bases.split import HiddenState, SplitModel
from ..data.encoding import EncodedBatch, Encoder, Query, length_batches
from ..data.forms import packaged_texts, writes_chats
from ..data.places import joined
from ..edits.edit import Edit
from ..edits.edit_scope import EditScope
from ..scope.bank import KeyBank
from ..scope.gate import ScopeGate
from ..scope.network import key_scores


# Two keys as alike as this are one to the scope.
_SAME = 0.999
# Tokens that no chat template adds.
_MOST_IN_TEMPLATE = 2048
# Texts and tokens of one pass.
_ROWS, _TOKENS = 64, 4096


@dataclass(frozen=True)
class ScopeReport:
    """
    What an edit's own texts find in the model's scope.

    Args:
        score (`float`): The least score of a form of the prompt with the edit's keys, of those that count as its own.
        threshold (`float`): The score from which on the edit acts.
        missed (`tuple[str, ...]`): The edit's own texts, by form, for which it would not act: `"prompt"`, `"chat"`,
            a paraphrase, or one of the further forms of a method that is not trained, `"as a question"` and `"behind
            text"`.
        taken_by (`str`, *optional*): Id of another edit that acts in its place, as their keys are alike.
        nearest (`str`, *optional*): Id of the other edit whose keys are most alike.
        nearest_score (`float`): How alike they are, at most 1.
        about (`str`, *optional*): What the edit is about, if it is kept apart from texts that only name that: a
            record's `subject`, or what the scope takes for it.
    """

    score: float
    threshold: float
    missed: tuple[str, ...] = ()
    taken_by: str | None = None
    nearest: str | None = None
    nearest_score: float = 0.0
    about: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the edit acts for all of its own texts."""
        return not self.missed

    def __str__(self) -> str:
        text = f"acts from a score of {self.threshold:.2f} on, its own texts have {self.score:.2f} or more"
        if self.about is not None:
            text += f"; kept apart from what only names {self.about!r}"
        if self.nearest is not None:
            text += f"; the nearest other edit is {self.nearest} ({self.nearest_score:.2f})"
        if self.missed:
            by = f": {self.taken_by} acts in its place" if self.taken_by else ""
            text += f"; DOES NOT ACT for {', '.join(self.missed)}{by}"
        return text


@torch.no_grad()
def keys_of(
    gate: ScopeGate, split: SplitModel, rows: EncodedBatch, hidden: HiddenState | None = None
) -> list[torch.Tensor]:
    """
    Return the keys of some texts at the tokens that predict what they are asked for, of each text `(tokens, width)`,
    in the host's memory. An encoder-decoder model's have one key each, that of the encoder's last token.

    Args:
        gate ([`~hf_mend.scope.gate.ScopeGate`]): The model's scope.
        split ([`SplitModel`]): The model, cut at the block that the scope reads.
        rows ([`EncodedBatch`]): The texts.
        hidden ([`HiddenState`], *optional*): Their output of `run_below`; computed when missing.
    """
    (keys,) = fetched([_asked_keys(gate, split, rows, hidden)])
    return list(keys.split(_counts(rows)))


def _asked_keys(
    gate: ScopeGate, split: SplitModel, rows: EncodedBatch, hidden: HiddenState | None = None
) -> torch.Tensor:
    """The keys of some texts at the tokens that predict what they are asked for, one text's behind another's."""
    keys = _all_keys(gate, split, rows, hidden)
    return keys.flatten(0, 1) if _of_two(rows) else rows.places.at(keys)


def _counts(rows: EncodedBatch) -> list[int]:
    """How many such tokens each text has."""
    return [1] * len(rows) if _of_two(rows) else rows.places.counts


def keys_of_queries(
    gate: ScopeGate, split: SplitModel, encoder: Encoder, queries: Sequence[Query]
) -> list[torch.Tensor]:
    """
    Return what [`keys_of`] does, of any number of queries, in passes of like lengths; it waits once for all of them.

    Args:
        gate, split: As for [`keys_of`].
        encoder ([`Encoder`]): Tokenises and pads.
        queries (`Sequence[Query]`): The queries.
    """
    lengths = [sum(map(len, encoder.tokens(query))) for query in queries]
    order: list[int] = []
    counts: list[int] = []
    keys: list[torch.Tensor] = []
    for batch in length_batches(lengths, _ROWS, _TOKENS):
        rows = encoder([queries[k] for k in batch]).to(split.device)
        keys.append(_asked_keys(gate, split, rows))
        counts += _counts(rows)
        order += batch
    if not order:
        return []
    found = dict(zip(order, torch.cat(fetched(keys)).split(counts), strict=True))
    return [found[k] for k in range(len(queries))]


def _of_two(rows: EncodedBatch) -> bool:
    """Whether these are texts of an encoder-decoder model, whose encoder decides once."""
    return "decoder_input_ids" in rows.inputs


def _all_keys(gate: ScopeGate, split: SplitModel, rows: EncodedBatch, hidden: HiddenState | None) -> torch.Tensor:
    """The keys at all tokens of some texts, `(rows, tokens, width)`; an encoder-decoder model's have one each."""
    if hidden is None:
        with gate.suspended():
            hidden = split.state_of(rows)
    read = hidden.hidden if hidden.encoder is None else hidden.encoder
    scope = gate.scope.to(read.device)
    inputs = {name: rows.inputs[name].to(read.device) for name in ("input_ids", "attention_mask")}
    with torch.autocast(read.device.type, enabled=False):  # as in the model's own passes
        states = scope.token_states(read, inputs["attention_mask"], words=gate.words(*inputs.values()))
        return scope.keys(states, last=1 if _of_two(rows) else None)


def own_queries(
    query: Query, encoder: Encoder, paraphrases: Sequence[str] = (), further: bool = False, longest: int | None = None
) -> dict[str, Query]:
    """
    Return the forms of a request in which its edit is made, whose keys it gets: the prompt, the same as a turn of a
    chat (or out of it), and its paraphrases. Their answers end: what follows is the un-edited model's own. A form of
    the prompt that is longer than the model takes is left out.

    Args:
        query ([`Query`]): The prompt with its target.
        encoder ([`Encoder`]): Tokenises.
        paraphrases (`Sequence[str]`, *optional*): The request's paraphrases.
        further (`bool`, defaults to `False`): Two more before these, for a method that nothing has taught what forms
            there are: what looks like a question, and the prompt behind packaged text.
        longest (`int`, *optional*): The most tokens that the model takes.
    """
    query = replace(query, ends=True)
    forms = {"prompt": query}
    if query.chat:
        forms["plain text"] = replace(query, chat=False, turns=(), system=None)
    elif writes_chats(encoder.tokenizer):
        forms["chat"] = replace(query, chat=True)
    if further:
        plain = replace(query, chat=False, turns=(), system=None, subject=None)
        before = " ".join(random.Random(query.prompt).sample(_lines(), 2)) + "\n"
        forms["as a question"] = replace(plain, prompt=query.prompt.rstrip(" ?") + "?")
        forms["behind text"] = encoder.shortened(replace(plain, context=before), longest)
    forms |= {repr(text): replace(query, prompt=text, subject=None) for text in paraphrases}
    if longest is None:
        return forms
    # The prompt and its paraphrases have been checked without the token that ends the answer; other forms are longer.
    fitting = {name: one if _fits(one, encoder, longest) else replace(one, ends=False) for name, one in forms.items()}
    return {name: one for name, one in fitting.items() if one.ends or _fits(one, encoder, longest)}


def _fits(query: Query, encoder: Encoder, longest: int) -> bool:
    said = [query.prompt, query.answer, query.context, query.system, *(text for _, text in query.turns)]
    if _MOST_IN_TEMPLATE + 4 * sum(len(text or "") for text in said) <= longest:
        return True  # a letter has at most four bytes, and a token at least one
    lengths = [len(ids) for ids in encoder.tokens(query)]
    return (max if encoder.is_encoder_decoder else sum)(lengths) <= longest


@cache
def _lines() -> list[str]:
    """The packaged lines behind which edits are made: half of them, so that the others are new to all edits."""
    lines = packaged_texts()
    return lines[: len(lines) // 2]


@dataclass(frozen=True)
class FoundKeys:
    """
    The keys of one fact.

    Args:
        forms (`list[torch.Tensor]`): Of each form, those at the tokens that predict the answer, `(tokens, width)`.
        before (`torch.Tensor` of shape `(tokens, width)`): Of the first form, those at its tokens before these.
        subject_odds (`torch.Tensor` of shape `(forms, tokens)`, *optional*): Of each token of each form, the log odds
            that the word which ends there names what the text is about; `None` where the scope does not know.
    """

    forms: list[torch.Tensor]
    before: torch.Tensor
    subject_odds: torch.Tensor | None = None


@torch.no_grad()
def found_keys(gate: ScopeGate, split: SplitModel, rows: EncodedBatch, hidden: HiddenState) -> list[FoundKeys]:
    """
    Return the keys of some facts, as [`keys_of`] does.

    Args:
        gate, split, rows, hidden: As for [`keys_of`].
    """
    keys, step = _all_keys(gate, split, rows, hidden), rows.forms
    odds = [_subject_odds(gate, hidden)] if gate.knows_subjects else []
    if _of_two(rows):
        keys, *odds = fetched([keys, *odds])
        found = [FoundKeys(list(keys[i : i + step]), keys[i, :0]) for i in range(0, len(rows), step)]
    else:
        at, first, *odds = fetched([rows.places.at(keys), keys[::step], *odds])
        forms, starts = at.split(rows.places.counts), [start for start, _ in rows.places.spans[::step]]
        found = [
            FoundKeys(list(forms[i * step : (i + 1) * step]), first[i, :start].clone())
            for i, start in enumerate(starts)
        ]
    if not odds:
        return found
    return [replace(one, subject_odds=part) for one, part in zip(found, odds[0].split(step), strict=True)]


def _subject_odds(gate: ScopeGate, hidden: HiddenState) -> torch.Tensor:
    read = hidden.hidden if hidden.encoder is None else hidden.encoder
    with torch.autocast(read.device.type, enabled=False):
        return gate.scope.to(read.device).subject_odds(read)


def scopes_of(  # one argument each for what it reads and what it is for
    gate: ScopeGate,
    split: SplitModel,
    encoder: Encoder,
    forms: Sequence[Mapping[str, Query]],
    excluded: Sequence[Sequence[Query]] = (),
    known: Sequence[Sequence[torch.Tensor]] = (),
) -> list[EditScope]:
    """
    Return the scopes of some edits.

    Args:
        gate, split: As for [`keys_of`].
        encoder ([`Encoder`]): Tokenises and pads.
        forms (`Sequence[Mapping[str, Query]]`): Of each edit, name -> what asks for it, with its target.
        excluded (`Sequence[Sequence[Query]]`, *optional*): Of each edit, what must not.
        known (`Sequence[Sequence[torch.Tensor]]`, *optional*): Of each edit, the keys of its first forms.

    Raises:
        ValueError: An excluded text has the key of one that asks for the edit.
    """
    keys = [list(known[i]) if known else [] for i in range(len(forms))]
    names = [list(one) for one in forms]
    missing = [(i, name) for i, one in enumerate(names) for name in one[len(keys[i]) :]]
    queries = [forms[i][name] for i, name in missing]
    found = dict(zip(missing, keys_of_queries(gate, split, encoder, queries), strict=True))
    scopes = []
    for i, one in enumerate(names):
        parts = keys[i] + [found[i, name] for name in one[len(keys[i]) :]]
        texts = [name for name, part in zip(one, parts, strict=True) for _ in part]
        thresholds = gate.threshold.expand(len(texts)).clone()
        scope = EditScope(gate.scope_id, torch.cat(parts).half(), thresholds, texts)
        scopes.append(excluding(scope, gate, split, encoder, excluded[i] if excluded else ()))
    return scopes


def excluding(
    scope: EditScope, gate: ScopeGate, split: SplitModel, encoder: Encoder, queries: Sequence[Query]
) -> EditScope:
    """Return the scope with further texts for which the edit must not act; see [`scope_of`]."""
    if not queries:
        return scope
    last = encoder([replace(query, answer=None) for query in queries]).to(split.device)
    keys = torch.cat(keys_of(gate, split, last)).half()
    with torch.autocast(keys.device.type, enabled=False):
        alike = key_scores(keys, scope.keys).max(-1)
    for query, score, index in zip(queries, alike.values.tolist(), alike.indices.tolist(), strict=True):
        if score > _SAME:
            raise ValueError(
                f"the text {query.prompt!r} cannot be excluded: to the scope it asks the same as the edit's own "
                f"{scope.texts[index]}; leave it out, or word it so that it asks for something else"
            )
    return _with_excluded(scope, keys, [query.prompt for query in queries])


def _with_excluded(scope: EditScope, keys: torch.Tensor, texts: Sequence[str]) -> EditScope:
    excluded = joined([scope.excluded, keys]) if len(scope.excluded) else keys
    return replace(scope, excluded=excluded, excluded_texts=[*scope.excluded_texts, *texts])


def excluded_by(scope: EditScope, more: EditScope) -> tuple[str, str] | None:
    """Return a text of `more` that asks for what an edit excludes, and that; `None` where there is none."""
    if not len(scope.excluded):
        return None
    with torch.autocast(more.keys.device.type, enabled=False):
        alike = key_scores(more.keys, scope.excluded).max(-1)
    for text, score, index in zip(more.texts, alike.values.tolist(), alike.indices.tolist(), strict=True):
        if score > _SAME:
            return text, scope.excluded_texts[index]
    return None


def acts_before(bank: KeyBank, before: Sequence[torch.Tensor], strictness: float = 0.0) -> list[torch.Tensor]:
    """
    Return which edits act at some texts' tokens before the one that asks, by their numbers in the bank, -1 for none.

    Args:
        bank ([`~hf_mend.scope.bank.KeyBank`]): The keys of all edits that act.
        before (`Sequence[torch.Tensor]`): Of each text, the keys at these tokens, `(tokens, width)`.
        strictness (`float`, defaults to 0.0): What is added to every threshold.
    """
    lengths = [len(keys) for keys in before]
    chosen = bank.choose(torch.cat([*before]), strictness) if sum(lengths) else torch.zeros(0, dtype=torch.long)
    return list(chosen.split(lengths))


def silent_before(edit: Edit, keys: torch.Tensor, texts: Sequence[str]) -> Edit:
    """
    Return an edit that leaves alone what its own prompt has said up to some tokens before the one that asks.

    Args:
        edit ([`Edit`]): The edit.
        keys (`torch.Tensor` of shape `(tokens, width)`): The keys at these tokens.
        texts (`Sequence[str]`): The prompt up to each.
    """
    scope = edit.scope
    assert scope is not None
    with torch.autocast(keys.device.type, enabled=False):
        other = key_scores(keys.half().float(), scope.keys.float()).amax(-1) <= _SAME
    named = [text for text, one in zip(texts, other.tolist(), strict=True) if one]
    return replace(edit, scope=_with_excluded(scope, keys[other].half(), named))


@torch.no_grad()
def report(edit: Edit, bank: KeyBank, strictness: float = 0.0) -> ScopeReport:
    """
    Return what an edit's own keys find among all edits.

    Args:
        edit ([`Edit`]): The edit.
        bank ([`~hf_mend.scope.bank.KeyBank`]): The keys of all edits that act.
        strictness (`float`, defaults to 0.0): What is added to every threshold.
    """
    scope = edit.scope
    assert scope is not None
    chosen = [bank.ids[number] if number >= 0 else None for number in bank.choose(scope.keys, strictness).tolist()]
    missed = dict.fromkeys(text for text, one in zip(scope.texts, chosen, strict=True) if one != edit.id)
    taken = next((one for one in chosen if one not in (None, edit.id)), None)
    nearest, nearest_score = bank.nearest(edit.id, scope.keys)
    with torch.autocast(scope.keys.device.type, enabled=False):
        own = key_scores(scope.keys, scope.keys).max(-1).values.min()
    return ScopeReport(
        float(own),
        float(scope.thresholds.max()) + strictness,
        tuple(missed),
        taken,
        nearest,
        nearest_score,
        scope.about,
    )
