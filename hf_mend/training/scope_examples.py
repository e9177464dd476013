"""What a scope learns from: texts with marks at tokens where a fact is asked for, and where none is."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm.auto import tqdm

from ..bases.split import SplitModel
from ..data.encoding import Encoder, Query, length_batches
from ..data.forms import DEFAULT_FORMS, Surroundings, writes_chats
from ..data.kinds import FactKinds, more_facts, packaged_facts, with_more_asked
from ..data.records import EditRecord
from .cache import HiddenStateCache
from .examples import Asking, TrainingExamples


# No fact is asked for at such a mark.
NONE = -1
# How much each kind of mark counts in the loss.
WEIGHTS: Mapping[str, float] = {
    "prompt": 0.0,  # is the key itself
    "chat": 1.0,
    "said": 1.0,
    "answer": 0.6,
    "after": 0.7,
    "inside": 0.3,
    "neighborhood": 1.5,
    "same_subject": 1.0,
    "unrelated": 1.0,
}
# Packaged facts that serve as unrelated questions where there are no others.
_QUESTIONS = 400
# Those that must stay and have to do with a record.
_STAYS = ("neighborhood", "same_subject")
_TAIL_TOKENS = 8
_LONGEST = 400
# Rows and tokens of one pass.
_ROWS, _TOKENS = 64, 2048


@dataclass(frozen=True)
class Mark:
    """
    A token of a text, and what is asked for there.

    Args:
        position (`int`): The token.
        fact (`int`): The number of the record that is asked for, [`NONE`] if none is.
        kind (`str`): One of [`WEIGHTS`].
        near (`int`): The record whose neighbour this is, or whose subject is asked for something else; [`NONE`] if
            there is none.
    """

    position: int
    fact: int
    kind: str
    near: int = NONE


@dataclass
class MarkedText:
    """
    A text with marks.

    Args:
        tokens (`list[int]`): Its tokens.
        marks (`list[Mark]`): The marks.
        hidden (`torch.Tensor` of shape `(tokens, width)`, *optional*): The hidden states that the scope reads.
        prompt (`str`, defaults to `""`): Of a text that must stay, what it asks.
        others (`Sequence[int]`): Further records that the text rightly asks for; see [`set_others`].
    """

    tokens: list[int]
    marks: list[Mark]
    hidden: torch.Tensor | None = None
    prompt: str = ""
    others: Sequence[int] = ()


def scope_examples(examples: TrainingExamples, forms: int = 3, same_subject: int = 2) -> TrainingExamples:
    """
    Return the draws that a scope learns from: as an editor's, with each record's fact in several forms, and texts of
    each kind that must stay.

    Args:
        examples ([`TrainingExamples`]): An editor's draws.
        forms (`int`, defaults to 3): The number of forms of each fact.
        same_subject (`int`, defaults to 2): The number of texts that ask the same subject for something else.
    """
    asking = replace(examples.asking, forms=examples.asking.forms or DEFAULT_FORMS, edit_forms=None)
    return TrainingExamples(
        examples.records, examples.questions, forms, 1, 1, examples.seed, _with_context(asking), same_subject
    )


def with_further_kinds(
    examples: TrainingExamples | None, count: int, seed: int = 0, forms: Mapping[str, float] = DEFAULT_FORMS
) -> TrainingExamples:
    """
    Return draws with further kinds of facts, about the records' subjects where their kind is known and about packaged
    ones, so that a scope knows more kinds of questions than the records have; see [`~hf_mend.data.kinds.FactKinds`].

    Args:
        examples ([`TrainingExamples`], *optional*): An editor's draws; packaged facts alone when missing.
        count (`int`): The number of further facts.
        seed (`int`, defaults to 0): Seed of the draws.
        forms (`Mapping[str, float]`): The forms of asking where no examples have theirs.
    """
    records = [] if examples is None else list(examples.records)
    kinds = FactKinds.load(common=examples is None)
    own = more_facts(records, count // 2 if records else 0, seed, kinds)
    packaged = packaged_facts(count - len(own) + _QUESTIONS, seed, kinds)
    more, rest = packaged[: count - len(own)], packaged[count - len(own) :]
    questions = list(examples.questions) if examples is not None and examples.questions else []
    questions = questions or [(record.questions[0], record.target) for record in rest]
    asking = Asking(forms) if examples is None else examples.asking
    every = with_more_asked([*records, *own, *more], seed=seed, kinds=kinds)
    return TrainingExamples(every, questions, seed=seed, asking=asking)


def _with_context(asking: Asking) -> Asking:
    return asking if asking.context_rate > 0 else replace(asking, context_rate=0.4)


def marked_texts(examples: TrainingExamples, encoder: Encoder, epoch: int = 0) -> Iterator[list[MarkedText]]:
    """
    Yield each record's marked texts, the bare prompt first and the same as a turn of a chat, if there are chats,
    second. An encoder-decoder model's are what its encoder reads, with one mark at the last token.

    Args:
        examples ([`TrainingExamples`]): The draws.
        encoder ([`Encoder`]): Tokenises.
        epoch (`int`, defaults to 0): The epoch whose draws are taken.
    """
    chats = writes_chats(encoder.tokenizer)
    around = Surroundings(examples.records, examples.questions, examples.asking.texts)
    for number in range(len(examples)):
        drawn, draw = examples.texts(number, epoch), random.Random(f"{examples.seed}/{epoch}/{number}/marks")
        texts = [_said(drawn.edit, number, "prompt", encoder, draw, around)]
        if chats:
            texts.append(_said(replace(drawn.edit, chat=True), number, "chat", encoder, draw, around))
        texts += [_said(query, number, "said", encoder, draw, around) for query in drawn.general]
        texts += [_stays(query, number, "neighborhood", encoder, draw) for query in drawn.neighborhood]
        texts += [_stays(query, number, "same_subject", encoder, draw) for query in drawn.same_subject]
        yield texts + [_unrelated(query, encoder, draw) for query in drawn.unrelated]


def _said(
    query: Query, fact: int, kind: str, encoder: Encoder, draw: random.Random, around: Surroundings
) -> MarkedText:
    """The fact asked for, at the prompt's end and within the answer; not before, and not once it is said."""
    prompt, answer = encoder.tokens(replace(query, ends=True))
    if encoder.is_encoder_decoder:
        return _whole(prompt, fact, kind)
    last = len(prompt) - 1
    marks = [Mark(last, fact, kind), *(Mark(last + i, fact, "answer") for i in range(1, len(answer)))]
    marks.append(Mark(last + len(answer), NONE, "after"))
    ids = encoder.tokenizer(around.tail(draw, query.prompt), add_special_tokens=False)["input_ids"]
    tail = list(ids)[:_TAIL_TOKENS]
    tokens = prompt + answer + tail
    later = range(last + len(answer) + 1, len(tokens))
    marks += [Mark(position, NONE, "after") for position in draw.sample(later, min(2, len(later)))]
    if last > 2:
        marks.append(Mark(draw.randrange(max(1, last - 7), last), NONE, "inside"))
    return _cut(tokens, marks)


def _stays(query: Query, near: int, kind: str, encoder: Encoder, draw: random.Random) -> MarkedText:
    prompt, _ = encoder.tokens(replace(query, answer=None))
    if encoder.is_encoder_decoder:
        return replace(_whole(prompt, NONE, kind, near), prompt=query.prompt)
    marks = [Mark(len(prompt) - 1, NONE, kind, near)]
    if len(prompt) > 3:
        marks.append(Mark(draw.randrange(1, len(prompt) - 1), NONE, "inside"))
    return replace(_cut(prompt, marks), prompt=query.prompt)


def _unrelated(query: Query, encoder: Encoder, draw: random.Random) -> MarkedText:
    prompt, _ = encoder.tokens(replace(query, answer=None))
    if encoder.is_encoder_decoder:
        return replace(_whole(prompt, NONE, "unrelated"), prompt=query.prompt)
    places = {len(prompt) - 1, *draw.sample(range(len(prompt)), min(4, len(prompt)))}
    marks = [Mark(place, NONE, "unrelated") for place in sorted(places)]
    return replace(_cut(prompt, marks), prompt=query.prompt)


def _whole(tokens: list[int], fact: int, kind: str, near: int = NONE) -> MarkedText:
    """A text that is decided on as a whole."""
    tokens = tokens[-_LONGEST:]
    return MarkedText(tokens, [Mark(len(tokens) - 1, fact, kind, near)])


def _cut(tokens: list[int], marks: list[Mark]) -> MarkedText:
    return MarkedText(tokens[:_LONGEST], [mark for mark in marks if mark.position < _LONGEST])


def within(text: MarkedText, longest: int | None) -> MarkedText:
    """
    Return the end of a text that is longer than a model takes, with the marks in it.

    Args:
        text ([`MarkedText`]): The text.
        longest (`int`, *optional*): The most tokens; as many as there are when missing.
    """
    if longest is None or len(text.tokens) <= longest:
        return text
    tokens = text.tokens[: max((mark.position for mark in text.marks), default=len(text.tokens) - 1) + 1]
    first = max(0, len(tokens) - longest)
    marks = [replace(mark, position=mark.position - first) for mark in text.marks if mark.position >= first]
    return replace(text, tokens=tokens[first:], marks=marks)


def set_others(records: Sequence[EditRecord], texts: Sequence[Sequence[MarkedText]]) -> None:
    """
    Set of each text the records that it rightly asks for beside its own: the same fact again, another whose words it
    has, or, of a neighbour's prompt, the neighbour's own. Unrelated questions may be about other records, too.

    Args:
        records (`Sequence[EditRecord]`): The records.
        texts (`Sequence[Sequence[MarkedText]]`): Of each record, its texts.
    """
    facts: dict[tuple[str, str | None], list[int]] = {}
    relations: dict[str | None, list[int]] = {}
    wordings: dict[str, set[int]] = {}
    for i, record in enumerate(records):
        facts.setdefault((_subject(record), record.relation), []).append(i)
        relations.setdefault(record.relation, []).append(i)
        for wording in (record.prompt, *record.paraphrases, *record.questions):
            wordings.setdefault(wording, set()).add(i)
    for i, (record, own) in enumerate(zip(records, texts, strict=True)):
        same = [j for j in facts[_subject(record), record.relation] if j != i]
        for text in own:
            kind = text.marks[0].kind if text.marks else ""
            if kind in _STAYS or kind == "unrelated":
                found = wordings.get(text.prompt, set()) - {i}
                if kind == "neighborhood":
                    found |= {j for j in relations[record.relation] if _subject(records[j]) in text.prompt} - {i}
                text.others = sorted(found)
            else:
                text.others = same


def _subject(record: EditRecord) -> str:
    return record.subject or record.prompt


@torch.no_grad()
def read_hidden_states(
    texts: Sequence[MarkedText],
    split: SplitModel,
    encoder: Encoder,
    bf16: bool = False,
    cache: HiddenStateCache | None = None,
) -> None:
    """
    Set the texts' hidden states that a scope reads, in bfloat16: where the model is cut, or the encoder's output.

    Args:
        texts (`Sequence[MarkedText]`): The texts.
        split ([`SplitModel`]): The model.
        encoder ([`Encoder`]): Pads.
        bf16 (`bool`, defaults to `False`): Run the model in bfloat16, several times as fast where the processor has
            such products.
        cache ([`HiddenStateCache`], *optional*): Keeps the states on the disk, and gives those that it has.
    """
    lengths = [len(text.tokens) for text in texts]
    with torch.autocast(split.device.type, torch.bfloat16, enabled=bf16):
        if cache is not None:
            cache.fill_tokens(encoder, [(text.tokens, []) for text in texts], _TOKENS)
        with tqdm(total=len(texts), desc="Hidden states", disable=cache is not None) as bar:
            for batch in length_batches(lengths, _ROWS, _TOKENS):
                rows = encoder.pad([(texts[i].tokens, []) for i in batch]).to(split.device)
                state = split.state_of(rows) if cache is None else cache(rows)
                hidden = state.hidden if state.encoder is None else state.encoder
                for row, i in enumerate(batch):
                    texts[i].hidden = hidden[row, : lengths[i]].to("cpu", torch.bfloat16, copy=True)
                bar.update(len(batch))
