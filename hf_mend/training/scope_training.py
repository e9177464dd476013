"""Training a scope: the right key of thousands at every token that asks for a fact, and none at the others."""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..bases.limits import longest_input
from ..data.forms import DEFAULT_FORMS, available_forms
from ..model import EditableModel
from ..scope.network import ScopeNetwork, key_scores, key_words, missing_words, other_words
from ..scope.penalties import least_near, penalty_of
from ..scope.words import word_table, words_in
from .cache import HiddenStateCache
from .examples import TrainingExamples
from .scope_checkpoint import ScopeCheckpoint, ScopeProgress
from .scope_examples import (
    NONE,
    WEIGHTS,
    Mark,
    marked_texts,
    read_hidden_states,
    scope_examples,
    set_others,
    with_further_kinds,
    within,
)
from .scope_texts import ScopeTexts, states_of
from .scope_words import learn_subjects, learn_words


logger = logging.get_logger(__name__)

# Steps after which the keys of all facts are computed anew, and those after which progress is kept.
_FRESH_KEYS = 65
_SAVED = 3 * _FRESH_KEYS
# Other facts among whose keys a step's have to be found: any, and for each fact some of its own relation, which only
# their subjects tell apart.
_OTHER_FACTS, _ALIKE = 400, 20
# Kinds of texts that give a fact's keys, in the order of the bank.
_SIDES = ("prompt", "chat")
# Weight of the same texts with their own fact's keys left out, where none must be found.
_ABSENT = 0.5
_NOT_THERE = -1e4
# What is asked for of a kind that training did not have scores less, whether rightly or wrongly. Where training has no
# records of its user's, most will be: the threshold is so much lower then.
UNKNOWN_KINDS = 0.23
# The share of each kind of text that may find an edit, at the threshold that training sets.
WRONG_FIRES: Mapping[str, float] = {"neighborhood": 0.03, "same_subject": 0.05, "unrelated": 0.002, "after": 0.03}


@dataclass
class ScopeTrainingArguments:
    """
    The options of a scope's training.

    Args:
        steps (`int`, defaults to 800): Steps.
        facts_per_step (`int`, defaults to 40): Facts of a step, each with all its texts.
        learning_rate (`float`, defaults to 2e-3): The largest, after a short warm-up and before it falls.
        max_facts (`int`, defaults to 10000): The most facts; their texts' hidden states are in memory, about 0.35 MB a
            fact at a width of 576.
        further_facts (`int`, defaults to 2000): Facts of further kinds, made by rule, beside the given ones: a scope
            learns what questions mean from many kinds of them.
        seed (`int`, defaults to 0): Seed of the draws and of the network.
        bf16 (`bool`, defaults to `False`): Read the hidden states in bfloat16.
        go_on (`bool`, defaults to `False`): Begin with the model's scope as it is, which was trained before, on these
            facts or others, in place of a new one. It forgets at a high `learning_rate`.
        rounds (`int`, defaults to 1): Rounds of so many steps, each from the last one's weights on. The scope's
            weights are their mean, which is better than any of them, most of all for kinds of facts that are new.
        hidden_states_dir (`str`, *optional*): Folder in which hidden states are kept
            ([`~hf_mend.training.cache.HiddenStateCache`]), for a training that is interrupted or made again.
        checkpoint (`str`, *optional*): File in which the training's progress is kept every 195 steps, and from which
            it goes on if the file is there.
    """

    steps: int = 800
    facts_per_step: int = 40
    learning_rate: float = 2e-3
    max_facts: int = 10_000
    further_facts: int = 2000
    seed: int = 0
    bf16: bool = False
    go_on: bool = False
    rounds: int = 1
    hidden_states_dir: str | None = None
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "facts_per_step", "max_facts", "rounds"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
        if type(self.further_facts) is not int or self.further_facts < 0:
            raise ValueError(f"further_facts is {self.further_facts!r}, expected a whole number of at least 0")


# Those of a training without records: of some 360 kinds of facts, a dozen each.
WITHOUT_RECORDS = ScopeTrainingArguments(steps=400, further_facts=4000, bf16=True, rounds=2)


def scope_texts(model: EditableModel, examples: TrainingExamples, args: ScopeTrainingArguments) -> ScopeTexts:
    """
    Draw the texts of a scope's training and run the model below its edited blocks on them, once.

    Args:
        model ([`EditableModel`]): The model.
        examples ([`TrainingExamples`]): An editor's draws.
        args ([`ScopeTrainingArguments`]): The options.
    """
    drawn = scope_examples(examples)
    longest = longest_input(model.config)
    texts = [[within(text, longest) for text in one] for one in marked_texts(drawn, model.encoder)]
    chosen = sorted(random.Random(args.seed).sample(range(len(texts)), min(args.max_facts, len(texts))))
    records = [drawn.records[i] for i in chosen]
    kept = [texts[i] for i in chosen]
    place = {NONE: NONE} | {old: new for new, old in enumerate(chosen)}
    for text in (text for one in kept for text in one):
        text.marks = [replace(mark, fact=place[mark.fact], near=place[mark.near]) for mark in text.marks]
    cache = None if args.hidden_states_dir is None else HiddenStateCache(model.split, args.hidden_states_dir)
    read_hidden_states([text for one in kept for text in one], model.split, model.encoder, args.bf16, cache)
    set_others(records, kept)
    tokenizer = model.encoder.tokenizer
    table = word_table(tokenizer)
    named = [tokenizer(f" {one.subject or ''}", add_special_tokens=False)["input_ids"] for one in records]
    subjects = [words_in(table, tokens) for tokens in named]
    return ScopeTexts(kept, [record.relation for record in records], model.numbers_of_words, table, subjects)


def scope_loss(
    scope: ScopeNetwork, data: ScopeTexts, facts: Sequence[int], bank: torch.Tensor, others: Sequence[int] = ()
) -> torch.Tensor:
    """
    Return the loss of some facts' texts: cross-entropy over the keys of these and other facts and "none".

    At a mark that asks for a fact one of its keys must be found, and "none" where these are left out; at the others
    "none". The texts that must stay serve as keys of others too: what asks for a fact must not ask for them.

    Args:
        scope ([`ScopeNetwork`]): The scope.
        data ([`ScopeTexts`]): The texts.
        facts (`Sequence[int]`): The facts of the step.
        bank (`torch.Tensor` of shape `(sides * all facts, KEY_WIDTH)`): The keys of all facts, a few steps old.
        others (`Sequence[int]`, *optional*): Other facts whose keys may be found too.
    """
    texts = [text for fact in facts for text in data.texts[fact]]
    marked = [(mark, text.others) for text in texts for mark in text.marks]
    marks = [mark for mark, _ in marked]
    queries = data.keys(scope, texts)
    shown = [*dict.fromkeys([*facts, *others])]
    column, count, sides = {fact: i for i, fact in enumerate(shown)}, len(shown), data.sides
    stale = torch.cat([bank[torch.tensor(shown) + side * len(data)] for side in range(sides)])
    own = [n for n, mark in enumerate(marks) if mark.kind in _SIDES]
    fresh = torch.tensor([_SIDES.index(marks[n].kind) * count + column[marks[n].fact] for n in own], dtype=torch.long)
    stays = [n for n, mark in enumerate(marks) if mark.near != NONE]
    keys = torch.cat([stale.index_copy(0, fresh, queries[own]), queries[stays]])
    logits = scope.log_sharpness.exp() * (key_scores(queries, keys) - scope.threshold)  # (marks, keys)
    not_counted = _not_counted(marked, column, sides, stays)
    asked = torch.tensor([column.get(mark.fact, NONE) for mark in marks])
    wanted = asked.clamp(min=0)[:, None] + count * torch.arange(sides)  # (marks, sides)
    own_keys = logits.gather(1, wanted).masked_fill(not_counted.gather(1, wanted), _NOT_THERE).logsumexp(1)
    others_keys = logits.masked_fill(not_counted.scatter(1, wanted, True), _NOT_THERE).logsumexp(1)
    without = torch.logaddexp(others_keys, torch.zeros(()))  # "none" has the logit 0
    whole = torch.logaddexp(without, own_keys)
    weights = torch.tensor([WEIGHTS[mark.kind] for mark in marks])
    found = whole - own_keys + _ABSENT * without
    return (torch.where(asked != NONE, found, whole) * weights).sum() / weights.sum()


def _not_counted(
    marked: Sequence[tuple[Mark, Sequence[int]]], column: Mapping[int, int], sides: int, stays: Sequence[int]
) -> torch.Tensor:
    """Return which keys do not count at a mark, `(marks, keys)`: its own text's, and facts that it may ask for too."""
    count = len(column)
    masked = torch.zeros(len(marked), sides * count + len(stays), dtype=torch.bool)
    for place, n in enumerate(stays):
        masked[n, sides * count + place] = True
    for n, (mark, others) in enumerate(marked):
        for other in others:
            if other in column:
                masked[n, column[other] : sides * count : count] = True
        if mark.kind == "chat":
            masked[n, count + column[mark.fact]] = True
    return masked


def train_scope(
    model: EditableModel, examples: TrainingExamples | None = None, args: ScopeTrainingArguments | None = None
) -> dict[str, float]:
    """
    Train a model's scope on the facts of its editor, or on packaged ones alone, and set it.

    Args:
        model ([`EditableModel`]): A model of `EditorConfig(scope=True)`, without edits.
        examples ([`TrainingExamples`], *optional*): An editor's draws. Without them, the facts are the
            `further_facts` of the options, and any method of any base gets a scope.
        args ([`ScopeTrainingArguments`], *optional*): The options; without examples, when left out, two rounds of 400
            steps on 4,000 packaged facts, whose hidden states are read in bfloat16.

    Returns:
        `dict[str, float]`: The last steps' mean loss, and the threshold.

    Raises:
        ValueError: The model's edits act everywhere, it carries edits, there are no facts, or no scope to go on from.
    """
    args = args or (WITHOUT_RECORDS if examples is None else ScopeTrainingArguments())
    if model.scope is None:
        raise ValueError("the model's edits act everywhere; make it with EditorConfig(scope=True) to train a scope")
    if model.edits:
        raise ValueError(
            f"the model carries {len(model.edits)} edits, which would lose their scope; undo_all() before train_scope"
        )
    if args.go_on and not model.scope.is_trained:
        raise ValueError("the model's scope is not trained, so that there is nothing to go on from; leave go_on out")
    if examples is None and not args.further_facts:
        raise ValueError("there are neither examples nor further_facts to train a scope on; give one of them")
    lower = UNKNOWN_KINDS if examples is None else 0.0
    if examples is None or args.further_facts:
        forms = available_forms(DEFAULT_FORMS, model.encoder.tokenizer)
        examples = with_further_kinds(examples, args.further_facts, args.seed, forms)
    data = scope_texts(model, examples, args)
    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    scope = _as_before(model.scope) if args.go_on else _begun(model.scope.width, data, draw, args.seed)
    checkpoint = None if args.checkpoint is None else _checkpoint(args.checkpoint, args, data, scope, draw)
    now = ScopeProgress() if checkpoint is None else checkpoint.load()
    done = now.round * args.steps + now.step
    with tqdm(total=args.rounds * args.steps, initial=done, desc="Scope") as bar:
        while now.round < args.rounds:
            _round(scope, data, args, draw, bar, now, checkpoint)
    scope.load_state_dict(_mean(now.rounds))
    _finish(scope, data, draw)
    scope.threshold.sub_(lower)
    model.set_scope(scope)
    if checkpoint is not None:
        checkpoint.path.unlink(missing_ok=True)
    return {"loss": sum(now.losses) / len(now.losses), "threshold": float(scope.threshold)}


def _begun(width: int, data: ScopeTexts, draw: random.Random, seed: int) -> ScopeNetwork:
    """Return a new scope that knows what hidden states are like, which words matter, and which name a subject."""
    scope = ScopeNetwork(width)
    sample = [text for one in draw.sample(range(len(data)), min(len(data), 500)) for text in data.texts[one]]
    # The first token's values are no text's.
    scope.standardise(torch.cat([states_of(text)[1:] for text in sample]))
    learn_words(scope, data, seed)
    learn_subjects(scope, data, seed)
    return scope


def _as_before(scope: ScopeNetwork) -> ScopeNetwork:
    """Return a copy of a scope that trains on."""
    found = copy.deepcopy(scope).cpu().float().requires_grad_(True)
    return found.train()


def _checkpoint(
    path: str, args: ScopeTrainingArguments, data: ScopeTexts, scope: ScopeNetwork, draw: random.Random
) -> ScopeCheckpoint:
    """Return the file of a training's progress, with all that it depends on."""
    digest = hashlib.sha256()
    for text in (text for one in data.texts for text in one):
        digest.update(repr((text.tokens, text.marks)).encode())
    # Of another model, or in another precision, the same texts have other states.
    digest.update(states_of(data.texts[0][0])[1:].bfloat16().view(torch.int16).numpy().tobytes())
    names = ("steps", "facts_per_step", "learning_rate", "go_on", "rounds", "seed")
    settings = {name: getattr(args, name) for name in names} | {"texts": digest.hexdigest()[:16]}
    settings["tensors"] = [*scope.state_dict()]  # an earlier version's scope has others
    return ScopeCheckpoint(Path(path), settings, scope, draw)


def _round(  # one argument each for what is trained, on what, how, and how far it is
    scope: ScopeNetwork,
    data: ScopeTexts,
    args: ScopeTrainingArguments,
    draw: random.Random,
    bar: tqdm[Any],
    now: ScopeProgress,
    checkpoint: ScopeCheckpoint | None,
) -> None:
    """Train a scope for the rest of a round, at a rate that rises and falls."""
    optimizer = torch.optim.AdamW(
        scope.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warm_up = min(50, args.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))),
    )
    if now.optimizer is not None and now.schedule is not None:
        optimizer.load_state_dict(now.optimizer)
        schedule.load_state_dict(now.schedule)
    every, bank = range(len(data)), torch.empty(0)
    while now.step < args.steps:
        if now.step % _FRESH_KEYS == 0:
            if checkpoint is not None and now.step and now.step % _SAVED == 0:
                now.optimizer, now.schedule = optimizer.state_dict(), schedule.state_dict()
                checkpoint.save(now)
            bank = data.bank(scope, every)
        if len(now.order) < args.facts_per_step:
            now.order = draw.choices(every, data.weights, k=len(data))
        drawn, now.order = now.order[: args.facts_per_step], now.order[args.facts_per_step :]
        facts = [*dict.fromkeys(drawn)]
        loss = scope_loss(scope, data, facts, bank, _others(data, facts, draw))
        optimizer.zero_grad()
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the scope's loss is {value} at step {now.step}; lower learning_rate")
        nn.utils.clip_grad_norm_(scope.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        now.step, now.losses = now.step + 1, [*now.losses[-49:], value]
        bar.update()
    now.rounds.append({name: value.detach().clone() for name, value in scope.state_dict().items()})
    now.round, now.step, now.order, now.optimizer, now.schedule = now.round + 1, 0, [], None, None


def _mean(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of several networks' weights."""
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


def _others(data: ScopeTexts, facts: Sequence[int], draw: random.Random) -> list[int]:
    """Return further facts among whose keys those of a step have to be found: any, and some of their relations."""
    found = draw.sample(range(len(data)), min(len(data), _OTHER_FACTS))
    for fact in facts:
        alike = data.alike[data.relations[fact]]
        found += draw.sample(alike, min(len(alike), _ALIKE))
    return found


@torch.no_grad()
def _finish(scope: ScopeNetwork, data: ScopeTexts, draw: random.Random) -> None:
    """
    Round the scope's matrices to the bfloat16 of its file, and set its threshold: where of each kind of text that asks
    for no edit only the share in [`WRONG_FIRES`] would find one, among a thousand or where there is no other.
    """
    scope.requires_grad_(False).eval()
    for parameter in scope.parameters():
        if parameter.dim() > 1:
            parameter.copy_(parameter.bfloat16().float())
    some = draw.sample(range(len(data)), min(1000, len(data)))
    keys = data.bank(scope, some)
    texts = [text for fact in some for text in data.texts[fact]]
    texts = [text for text in texts if text.marks]
    # Within an unrelated text a fact may stand that is asked for rightly: at its end it is not.
    texts = [replace(text, marks=text.marks[-1:]) if text.marks[-1].kind == "unrelated" else text for text in texts]
    marks = [(mark, {*text.others}) for text in texts for mark in text.marks]
    queries = data.keys(scope, texts)
    place = {fact: i for i, fact in enumerate(some)}
    least = []
    for kind, share in WRONG_FIRES.items():
        numbers = [n for n, (mark, _) in enumerate(marks) if mark.kind == kind]
        if not numbers:
            continue
        scores = key_scores(queries[numbers], keys)
        for row, n in enumerate(numbers):  # a neighbour's own fact may be among them
            scores[row, [i for i, fact in enumerate(some * data.sides) if fact in marks[n][1]]] = -1.0
        of_facts = scores.unflatten(1, (data.sides, -1)).amax(1)  # (texts, facts)
        best = scores.max(1)
        of_rivals = scores.masked_fill(torch.arange(len(keys)) % len(some) == best.indices[:, None] % len(some), -1.0)
        if kind == "unrelated":  # which has no rivals to rely on, as what stands near an edit that is alone
            of_rivals = torch.full_like(of_rivals, -1.0)
        pairs = queries[numbers], key_words(keys[best.indices])
        least.append(threshold_for(best.values, of_rivals, missing_words(*pairs), other_words(*pairs), share))
        near = [(row, place[marks[n][0].near]) for row, n in enumerate(numbers) if marks[n][0].near != NONE]
        if near:
            least.append(torch.stack([of_facts[one] for one in near]).quantile(1 - share))
    if least:
        scope.threshold.copy_(torch.stack(least).max())


def threshold_for(
    score: torch.Tensor, rivals: torch.Tensor, missing: torch.Tensor, other: torch.Tensor, share: float
) -> torch.Tensor:
    """
    Return the threshold from which on at most a share of texts find an edit.

    Args:
        score (`torch.Tensor` of shape `(texts,)`): Their scores with the nearest edit.
        rivals (`torch.Tensor` of shape `(texts, keys)`): Their scores with its rivals' keys; less than any where there
            is none.
        missing (`torch.Tensor` of shape `(texts,)`): How much their words and the edit's differ.
        other (`torch.Tensor` of shape `(texts,)`): How far they name something else in the place of what it names.
        share (`float`): The share.
    """
    thresholds = torch.linspace(0.0, 1.0, 1001)[:, None]
    in_order = rivals.sort(1).values
    from_there = (thresholds + least_near(thresholds)).T.expand(len(rivals), -1).contiguous()
    count = (rivals.shape[1] - torch.searchsorted(in_order, from_there, right=True)).T  # (thresholds, texts)
    found = score - thresholds >= penalty_of(in_order[:, -1] - thresholds, thresholds, missing, other, count)
    too_many = (found.float().mean(1) > share).nonzero()[:, 0]
    return thresholds[min(int(too_many[-1]) + 1, 1000) if len(too_many) else 0, 0]
