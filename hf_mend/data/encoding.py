"""Queries and their encoding: text to token ids, labels and padded batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .chat import chat_end, render_chat
from .joining import end_of_sentence, separator_between
from .places import Places, on_device


IGNORE = -100

# Queries whose tokens an encoder keeps: those of a call, whose texts are looked at several times.
_KEPT = 16384


@dataclass
class EncodedBatch:
    """
    Texts as one padded batch.

    Args:
        inputs (`dict[str, torch.Tensor]`): The model's arguments, `(rows, seq)` each.
        next_tokens (`torch.Tensor` of shape `(rows, seq)`): What each output position must predict, -100 elsewhere.
            Not shifted: position t's own prediction.
        positions (`torch.Tensor` of shape `(rows, seq)`, bool): The output positions that matter, labelled or not.
        subjects (`torch.Tensor` of shape `(rows,)`, *optional*): Where the last token of each prompt's subject is, -1
            where none is known.
        forms (`int`, defaults to 1): How many neighbouring rows ask for one fact, each in another form.
        further ([`EncodedBatch`], *optional*): The same texts with the whole answer as input, and one position more:
            that of what follows the answer.
        answers (`torch.Tensor` of shape `(rows, seq)`, bool, *optional*): The positions that predict the answers,
            where those are others: of texts that ask for what follows an answer.
    """

    inputs: dict[str, torch.Tensor]
    next_tokens: torch.Tensor
    positions: torch.Tensor
    subjects: torch.Tensor | None = None
    forms: int = 1
    further: EncodedBatch | None = None
    answers: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self._places: Places | None = None

    def __len__(self) -> int:
        return self.next_tokens.shape[0]

    @property
    def acting(self) -> torch.Tensor:
        """Where an edit acts that acts at the tokens alone that predict its target's, `(rows, seq)`, bool."""
        return self.positions if self.answers is None else self.answers

    @property
    def facts(self) -> int:
        """The number of facts, in whatever number of forms."""
        return len(self) // self.forms

    @property
    def places(self) -> Places:
        """Where `positions` are, known on the host: of a batch that came from it, without asking the device."""
        if self._places is None:
            mask = None if "decoder_input_ids" in self.inputs else self.inputs.get("attention_mask")
            on_host = self.positions.cpu(), self.next_tokens.cpu(), None if mask is None else mask.cpu()
            answers = None if self.answers is None else self.answers.cpu()
            self._places = Places.of(*on_host, self.positions.device, answers)
        return self._places

    def __getitem__(self, index: slice | torch.Tensor) -> EncodedBatch:
        inputs = {name: value[index] for name, value in self.inputs.items()}
        subjects = None if self.subjects is None else self.subjects[index]
        forms = self.forms if isinstance(index, slice) else 1
        answers = None if self.answers is None else self.answers[index]
        return EncodedBatch(inputs, self.next_tokens[index], self.positions[index], subjects, forms, answers=answers)

    def of_facts(self, facts: torch.Tensor) -> EncodedBatch:
        """
        Return the texts of some of the facts, in all their forms; nothing waits for it.

        Args:
            facts (`torch.Tensor` of shape `(facts,)`): Their numbers, in the host's memory.
        """
        rows = self.rows_of(facts)
        found = self[on_device(rows, self.positions.device)]
        found.forms, found._places = self.forms, self.places.of_rows(rows.tolist(), self.positions.shape[1])
        found.further = None if self.further is None else self.further.of_facts(facts)
        return found

    def rows_of(self, facts: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the rows that ask for some of the facts."""
        return (facts[:, None] * self.forms + torch.arange(self.forms)).reshape(-1)

    def to(self, device: torch.device | str) -> EncodedBatch:
        places = self.places.to(device)
        inputs = {name: on_device(value, device) for name, value in self.inputs.items()}
        subjects = None if self.subjects is None else on_device(self.subjects, device)
        moved = EncodedBatch(
            inputs, on_device(self.next_tokens, device), on_device(self.positions, device), subjects, self.forms
        )
        moved._places = places
        moved.further = None if self.further is None else self.further.to(device)
        moved.answers = None if self.answers is None else on_device(self.answers, device)
        return moved


def bare_prompt(prompt: str) -> str:
    """
    A prompt without spaces around it, which an edit would otherwise hold with alone. A line break is no slip: it
    stands before the answer in many formats of instructions.
    """
    return re.sub(r"\A[^\S\n]+|[^\S\n]+\Z", "", prompt)


@dataclass(frozen=True)
class Query:
    """
    A prompt, and an answer that follows it. White space around either does not count, except for line breaks around
    the prompt.

    Args:
        prompt (`str`): The text.
        answer (`str`, *optional*): What follows; without one, only the next token matters.
        chat (`bool`, defaults to `False`): The prompt is a user's turn and goes through the tokenizer's chat template.
        subject (`str`, *optional*): What the prompt is about, as it stands there.
        context (`str`, defaults to `""`): Text before the prompt, in a chat in the same turn. One space joins the two,
            or the white space that the context ends with.
        turns (`tuple[tuple[str, str], ...]`): Earlier turns of the chat, each a role and what was said.
        system (`str`, *optional*): The chat's system prompt; the template's own when left out.
        after (`str` or `tuple[int, ...]`, *optional*): What follows the answer, as text or as token ids. Where it is
            given, if only as nothing, the positions that matter are those that predict what follows the answer, and
            the answer is only read.
        separator (`str`, *optional*): What stands between prompt and answer. The default is what the chat template
            puts there, and in plain text one space, or nothing where none is written
            ([`~hf_mend.data.joining.separator_between`]).
        ends (`bool`, defaults to `False`): The answer's tokens are followed by the one that ends it: in a chat the
            template's own, otherwise a full stop; an encoder-decoder model's by the tokenizer's end of a text. So its
            last word is whole, and it is said once.
    """

    prompt: str
    answer: str | None = None
    chat: bool = False
    subject: str | None = None
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    after: str | tuple[int, ...] | None = None
    separator: str | None = None
    ends: bool = False

    @property
    def content(self) -> str:
        """The context and the prompt as one text."""
        joint = " " if self.context and not self.context[-1].isspace() else ""
        return self.context + joint + bare_prompt(self.prompt)

    @property
    def chat_turns(self) -> list[tuple[str, str]]:
        """The turns of the chat, each a role and what was said; the last is the prompt."""
        system = [] if self.system is None else [("system", self.system)]
        return [*system, *self.turns, ("user", self.content)]


class Encoder:
    """
    Turns queries into [`EncodedBatch`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
        is_encoder_decoder (`bool`): Whether the prompt goes to an encoder and the answer to a decoder.
        decoder_start_token_id (`int`, *optional*): What an encoder-decoder model starts its answers with.
        pad_to (`int`, defaults to 1): Lengths are padded to a multiple of it.
        forced_bos_token_id (`int`, *optional*): What its `generate` forces after that, before the answer.
        num_embeddings (`int`, *optional*): Number of rows of the model's embedding. Padding, which is masked, is
            within it, whatever the tokenizer says.

    Raises:
        ValueError: An encoder-decoder model without a start of its answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        is_encoder_decoder: bool = False,
        decoder_start_token_id: int | None = None,
        pad_to: int = 1,
        forced_bos_token_id: int | None = None,
        num_embeddings: int | None = None,
    ):
        if is_encoder_decoder and decoder_start_token_id is None:
            raise ValueError(
                "model.config.decoder_start_token_id is not set, and neither is the generation config's; set it to "
                "the id of the token that the model's answers start with"
            )
        self.decoder_prefix = [i for i in (decoder_start_token_id, forced_bos_token_id) if i is not None]
        self.tokenizer = tokenizer
        self.is_encoder_decoder = is_encoder_decoder
        self.decoder_start_token_id = decoder_start_token_id
        self.pad_to = pad_to
        self.num_embeddings = num_embeddings
        padding = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and self._is_known(i)]
        self.pad_token_id: int = padding[0] if padding else 0
        end = tokenizer.eos_token_id
        self._end: int = self.pad_token_id if end is None else end
        self._kept: dict[Query, tuple[list[int], list[int]]] = {}

    def __call__(self, queries: Sequence[Query], forms: int = 1) -> EncodedBatch:
        """
        The queries as one batch, padded on the right.

        Args:
            queries (`Sequence[Query]`): The queries.
            forms (`int`, defaults to 1): How many neighbouring queries ask for one fact.
        """
        pairs = [self.tokens(query) for query in queries]
        rows = self.pad(pairs)
        rows.forms = forms
        if any(query.subject for query in queries):
            places = [self._subject_place(query, prompt) for query, (prompt, _) in zip(queries, pairs, strict=True)]
            rows.subjects = torch.tensor(places)
        if self.is_encoder_decoder:
            for row, query in enumerate(queries):
                if query.after is not None:  # of the decoder's tokens the answer's are only read
                    read = len(self.decoder_prefix) - 1 + len(self._answer_ids(query, "", ""))
                    rows.positions[row, :read], rows.next_tokens[row, :read] = False, IGNORE
        return rows

    def with_further(self, queries: Sequence[Query]) -> EncodedBatch:
        """The queries as one batch, and the same texts with the whole answer as input: its `further`."""
        rows = self(queries)
        pairs = [self.tokens(query) for query in queries]
        rows.further = self.pad([(prompt, [*answer, IGNORE]) for prompt, answer in pairs])
        return rows

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of some tokens, without special ones and without space around it."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    def tokens(self, query: Query) -> tuple[list[int], list[int]]:
        """
        Token ids of the prompt and of the answer. An answer of none gives an empty list. Of a query with `after`, the
        answer belongs to what is read, and what follows it takes its place.

        Raises:
            ValueError: The chat template refuses the chat or leaves the prompt out, or a token is none of the model's
                embedding.
        """
        known = self._kept.get(query)
        if known is None:
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            known = self._kept[query] = self._tokens(query)
        return list(known[0]), list(known[1])

    def _tokens(self, query: Query) -> tuple[list[int], list[int]]:
        text, separator = self._begun(query)
        prompt, answer = self._read_ids(text, special=not query.chat), self._answer_ids(query, text, separator)
        if query.ends and answer:
            answer = answer + self._end_ids(query, text + separator + (query.answer or "").strip())
        unknown = next((i for i in (*prompt, *answer) if not self._is_known(i)), None)
        if unknown is not None:
            token = self.tokenizer.convert_ids_to_tokens(unknown)
            raise ValueError(
                f"{query.prompt[:60]!r} holds the token {token!r} with the id {unknown}, and the model's embedding "
                f"has {self.num_embeddings} rows, the tokenizer {len(self.tokenizer)} tokens; use the tokenizer that "
                "belongs to the model, or call resize_token_embeddings on the base model before it is wrapped"
            )
        if query.after is None:
            return prompt, answer
        after = self._ids(query.after) if isinstance(query.after, str) else list(query.after)
        if self.is_encoder_decoder:  # a decoder predicts what follows from the answer's own last token
            return prompt, answer + (after or [self._end])
        return prompt + answer, after

    def _end_ids(self, query: Query, text: str) -> list[int]:
        """The token that ends an answer, `text` being all up to there; none behind an answer that ends by itself."""
        if self.is_encoder_decoder:  # whose answer is a text
            return [self._end]
        if query.chat:
            ids = self._ids(chat_end(self.tokenizer))
            return ids[:1] or [self._end]
        end = end_of_sentence(text)
        start, whole = self._ids(text), self._ids(text + end)
        return (whole[len(start) :] if whole[: len(start)] == start else self._ids(end))[:1] if end else []

    def text(self, query: Query) -> str:
        """The prompt as the model reads it, up to where the answer begins."""
        return self._begun(query)[0]

    def _is_known(self, token_id: int) -> bool:
        """Whether the model's embedding has a row for a token."""
        return self.num_embeddings is None or token_id < self.num_embeddings

    def shortened(self, query: Query, longest: int | None) -> Query:
        """
        The query without its context, or without its earlier turns and system prompt too, where it would otherwise
        be longer than the model takes.

        Args:
            query ([`Query`]): The texts.
            longest (`int`, *optional*): Most tokens that the model takes.
        """
        if longest is None or not (query.context or query.turns or query.system or query.after):
            return query
        without = replace(query, context="")
        bare = replace(without, turns=(), system=None, after=None if query.after is None else ())
        for candidate in (query, without, bare):
            lengths = [len(ids) for ids in self.tokens(candidate)]
            if (max(lengths) if self.is_encoder_decoder else sum(lengths)) <= longest:
                return candidate
        return replace(bare, chat=False)

    def _answer_ids(self, query: Query, text: str, separator: str) -> list[int]:
        if query.answer is None:
            return []
        answer = query.answer.strip()
        if self.is_encoder_decoder:  # alone behind a decoder's start token
            return self._ids(answer)
        after = separator + answer
        # Some tokenizers begin each text with a space, so that the answer needs something before it: the prompt, or,
        # where that would then end with another token, one character for it.
        for before in (text, "\n", text.rstrip()[-1:]):
            start, whole = self._ids(before), self._ids(before + after)
            if whole[: len(start)] == start:
                return whole[len(start) :]
        return self._ids(after)

    def _ids(self, text: str, special: bool = False) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _read_ids(self, text: str, special: bool) -> list[int]:
        """
        Token ids of a text that the model reads, with the tokenizer's special tokens around it: without those that the
        text begins or ends with already, and before a causal model's answer without those that would end the text.
        """
        plain = self._ids(text)
        if not special:  # a template writes its own
            return plain
        whole = self._ids(text, special=True)
        places = range(len(whole) - len(plain) + 1)
        start = next((i for i in places if whole[i : i + len(plain)] == plain), None)
        if start is None:  # special tokens that change how the text is cut
            return whole
        before, after = whole[:start], whole[start + len(plain) :]
        if plain[: len(before)] == before:
            before = []
        if not self.is_encoder_decoder or plain[len(plain) - len(after) :] == after:
            after = []
        return before + plain + after

    def _begun(self, query: Query) -> tuple[str, str]:
        """The prompt as the model reads it, and what stands between it and the answer."""
        text, separator = render_chat(self.tokenizer, query.chat_turns) if query.chat else (query.content, None)
        if query.separator is not None:
            separator = query.separator
        if separator is None:
            answer = (query.answer or "").strip()
            separator = "" if text[-1:].isspace() else separator_between(text, answer)
        return text, separator

    def _subject_place(self, query: Query, prompt: list[int]) -> int:
        """Where the last token of the subject is among the prompt's, -1 where the prompt does not have it."""
        if not query.subject or query.subject not in query.prompt:
            return -1
        text = self.text(query)
        place = text.rfind(query.prompt.strip())  # behind it a template may have more
        end = len(text) if place < 0 else place + len(query.prompt.strip())
        start = text.rfind(query.subject, 0, end)
        if start < 0:  # the template writes it otherwise
            return -1
        ids = self._read_ids(text[: start + len(query.subject)], special=not query.chat)
        # As far as both agree: a tokenizer may end what it is given with a token of its own.
        same = next((i for i, pair in enumerate(zip(ids, prompt, strict=False)) if pair[0] != pair[1]), len(ids))
        return min(same, len(prompt)) - 1

    def pad(self, pairs: Sequence[tuple[list[int], list[int]]]) -> EncodedBatch:
        """Token ids of prompts and answers as one batch."""
        if self.is_encoder_decoder:
            sources = [prompt for prompt, _ in pairs]
            decoder = [self.decoder_prefix + answer[:-1] for _, answer in pairs]
            skipped = len(self.decoder_prefix) - 1
            labels = [[IGNORE] * skipped + (answer or [IGNORE]) for _, answer in pairs]
            inputs = {
                "input_ids": self._stack(sources, self.pad_token_id),
                "attention_mask": self._stack([[1] * len(ids) for ids in sources], 0),
                "decoder_input_ids": self._stack(decoder, self.pad_token_id),
            }
            positions = self._stack([[0] * skipped + [1] * (len(row) - skipped) for row in labels], 0).bool()
            return EncodedBatch(inputs, self._stack(labels, IGNORE), positions)
        # The answer's last token predicts nothing, so it does not go in.
        texts = [prompt + answer[:-1] for prompt, answer in pairs]
        labels = [[IGNORE] * (len(p) - 1) + (a or [IGNORE]) for p, a in pairs]
        chosen = [[0] * (len(p) - 1) + [1] * max(1, len(a)) for p, a in pairs]
        inputs = {
            "input_ids": self._stack(texts, self.pad_token_id),
            "attention_mask": self._stack([[1] * len(ids) for ids in texts], 0),
        }
        return EncodedBatch(inputs, self._stack(labels, IGNORE), self._stack(chosen, 0).bool())

    def _stack(self, rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
        width = max(len(row) for row in rows)
        width += -width % self.pad_to
        out = torch.full((len(rows), width), fill, dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        return out


def length_batches(lengths: Sequence[int], size: int, tokens: int) -> Iterator[list[int]]:
    """
    Indices in order of length, in batches of at most `size` rows and about `tokens` tokens with padding: little is
    padding, and a batch of long texts takes no more memory than one of short ones.

    Args:
        lengths (`Sequence[int]`): Number of tokens of each row.
        size (`int`): Most rows a batch.
        tokens (`int`): Most tokens a batch; a single row may have more.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) == size or lengths[index] * (len(batch) + 1) > tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """`items` in runs of `size`, the last maybe shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
