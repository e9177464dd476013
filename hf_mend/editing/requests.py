"""Requests for edits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from ..bases.limits import longest_input
from ..data.chat import as_turn, is_in
from ..data.checks import check_query
from ..data.encoding import Encoder, Query
from ..data.records import EditRecord
from ..edits.edit import Edit, same_prompt
from ..hub.files import shortened


@dataclass
class EditRequest:
    """
    The request for one edit. The fields are those of [`~hf_mend.EditableModel.edit`]; each of `messages` is a role and
    what was said, `where` is the place of its record in a file, `ends` asks for the token that ends the target too,
    and `in_paraphrases` for the target behind the paraphrases.
    """

    prompt: str
    target: str
    chat: bool = False
    paraphrases: list[str] = field(default_factory=list)
    locality: list[str] = field(default_factory=list)
    subject: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    separator: str | None = None
    where: str | None = field(default=None, compare=False)
    ends: bool = False
    in_paraphrases: bool = False

    @classmethod
    def of_edit(cls, edit: Edit) -> EditRequest:
        """
        Return the request that an edit was made for, without probes.

        Raises:
            ValueError: The messages that the edit notes are none.
        """
        noted = edit.metadata
        try:
            messages = tuple((str(role), str(said)) for role, said in json.loads(noted.get("messages", "[]")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the edit {edit.id!r} notes the messages {noted['messages'][:60]!r}, expected pairs of role and text"
            ) from error
        request = cls(edit.prompt, edit.target, noted.get("chat") == "true", subject=noted.get("subject"))
        return replace(request, messages=messages, separator=noted.get("separator"))

    @property
    def metadata(self) -> dict[str, str]:
        """What an edit notes of its request, beside prompt and target."""
        noted = {"chat": str(self.chat).lower()}
        if self.messages:
            noted["messages"] = json.dumps(self.messages, ensure_ascii=False)
        optional = {"subject": self.subject or None, "separator": self.separator}
        return noted | {name: value for name, value in optional.items() if value is not None}

    @property
    def query(self) -> Query:
        """Prompt and target as the encoder takes them."""
        return replace(self._as_query(self.prompt, self.target), subject=self.subject, ends=self.ends)

    def _as_query(self, prompt: str, answer: str | None) -> Query:
        return Query(prompt, answer, self.chat, turns=self.messages, separator=self.separator)

    @property
    def prompt_key(self) -> tuple[str, bool]:
        """The identity of the prompt, as [`~hf_mend.edits.edit.same_prompt`] gives it."""
        return same_prompt(self.prompt, self.chat, self.metadata.get("messages", ""))

    def is_same(self, other: EditRequest) -> bool:
        """Whether both want the same answer to the same prompt."""
        return self.prompt_key == other.prompt_key and self.target.split() == other.target.split()

    def with_probes_of(self, other: EditRequest) -> EditRequest:
        """Return the request with the probes of another for the same, too."""
        said = [*dict.fromkeys([*self.paraphrases, *other.paraphrases])]
        return replace(self, paraphrases=said, locality=[*dict.fromkeys([*self.locality, *other.locality])])

    @property
    def probes(self) -> list[Query]:
        """The paraphrases, with the target as their answer, then the locality prompts."""
        said = [self._as_query(prompt, self.target) for prompt in self.paraphrases]
        return said + [self._as_query(prompt, None) for prompt in self.locality]


def as_requests(
    prompt: Any,
    target: Any,
    chat: bool,
    paraphrases: str | Sequence[str],
    locality: str | Sequence[str],
    messages: Sequence[Mapping[str, str]] = (),
    separator: str | None = None,
) -> list[EditRequest]:
    """
    Return the requests that the arguments of `edit` stand for.

    Raises:
        ValueError: Lists differ in length, probes come with several edits, or the messages end with a user's turn.
        TypeError: An argument is neither text nor record, or the messages are none.
    """
    if separator is not None and not isinstance(separator, str):
        raise TypeError(f"separator is {separator!r}, expected a text, or None for the usual one")
    turns = _turns(messages)
    requests = _as_requests(prompt, target, chat or bool(turns), paraphrases, locality)
    return [replace(request, messages=turns, separator=separator) for request in requests]


def _turns(messages: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return what stands before the prompt in a chat, each turn as a role and what was said."""
    turns = []
    for number, message in enumerate(messages):
        role, content = as_turn(message, f"messages[{number}]")
        turns.append((role, content.strip()))
    if turns and turns[-1][0] == "user":
        raise ValueError(
            f"the messages end with a user's turn, {turns[-1][1][:60]!r}; they are what stands before the prompt, "
            "which is the last turn: give that as the prompt alone"
        )
    return tuple(turns)


def _as_requests(
    prompt: Any, target: Any, chat: bool, paraphrases: str | Sequence[str], locality: str | Sequence[str]
) -> list[EditRequest]:
    said, stays = _texts(paraphrases, "paraphrases"), _texts(locality, "locality")
    prompts = _listed(prompt, "prompt", (str, EditRecord))
    if not prompts:
        raise ValueError("there is no prompt: the list is empty")
    for number, item in enumerate(prompts):
        texts = {"prompt": item.prompt, "target": item.target} if isinstance(item, EditRecord) else {"prompt": item}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise TypeError(
                    f"the {name} of request {number} is {shortened(text)}, of type {type(text).__name__}; expected a "
                    "text, or an EditRecord with texts: EditRecord(prompt=..., target=...)"
                )
    if all(isinstance(item, EditRecord) for item in prompts):
        if target is not None:
            raise ValueError("records hold their targets; leave `target` out")
        if len(prompts) > 1 and (said or stays):
            raise ValueError(
                f"paraphrases and locality probes go with one edit, got {len(prompts)}; put them into the EditRecords"
            )
        return [
            EditRequest(
                r.prompt,
                r.target,
                chat,
                _texts(r.paraphrases, "paraphrases") + said,
                _texts(r.neighborhood, "neighborhood") + stays,
                r.subject,
                where=r.where,
            )
            for r in prompts
        ]
    targets = [] if target is None else _listed(target, "target", (str,))
    if len(prompts) != len(targets):
        raise ValueError(f"there are {len(prompts)} prompts and {len(targets)} targets; each prompt needs one target")
    for item in [*prompts, *targets]:
        if not isinstance(item, str):
            raise TypeError(f"prompts and targets are strings, or prompts are EditRecords; got {type(item).__name__}")
    if len(prompts) > 1 and (said or stays):
        raise ValueError(
            f"paraphrases and locality probes go with one edit, got {len(prompts)}; pass EditRecords, which hold "
            "their own"
        )
    return [EditRequest(p, t, chat, said, stays) for p, t in zip(prompts, targets, strict=True)]


def _listed(value: Any, name: str, kinds: tuple[type, ...]) -> list[Any]:
    """
    Return a list of values; one alone is a list of one.

    Raises:
        TypeError: It is neither such a value nor a list.
    """
    if isinstance(value, kinds):
        return [value]
    if isinstance(value, (Mapping, bytes)) or not isinstance(value, Iterable):
        texts = "text, EditRecord or list of either" if EditRecord in kinds else "text or list of texts"
        raise TypeError(f"{name} is {shortened(value)}, a {type(value).__name__}; expected a {texts}")
    return list(value)


def _texts(value: str | Sequence[str], name: str) -> list[str]:
    """Return a list of texts; a text alone is a list of one."""
    texts = _listed(value, name, (str,))
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} is a list of texts; it holds a {type(text).__name__}")
    return texts


def check_limits(**limits: int | None) -> None:
    """
    Raises:
        TypeError: One of them is no whole number.
        ValueError: One of them is below 1.
    """
    for name, value in limits.items():
        if value is not None and type(value) is not int:
            raise TypeError(f"{name} is {value!r}, of type {type(value).__name__}; expected a whole number")
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")


def check_requests(requests: Sequence[EditRequest], encoder: Encoder, config: PretrainedConfig) -> None:
    """
    Raises:
        ValueError: A request or one of its probes is empty, tokenises to nothing, or is too long; or a request wants a
            chat template that is missing; or two requests have different targets for one prompt.
    """
    longest = longest_input(config)
    first_of: dict[tuple[str, bool], int] = {}
    for number, request in enumerate(requests):
        where = request.where or (f"request {number}" if len(requests) > 1 else "the request")
        check_query(request.query, encoder, longest, where)
        text = encoder.text(request.query) if request.messages else ""
        for role, said in request.messages:
            if role != "assistant" and not is_in(said, text):  # thoughts of earlier answers are often left out
                raise ValueError(f"the tokenizer's chat template leaves out the {role} message {said[:60]!r}")
        names = [f"paraphrases[{i}]" for i in range(len(request.paraphrases))]
        names += [f"locality[{i}]" for i in range(len(request.locality))]
        for name, query in zip(names, request.probes, strict=True):
            check_query(query, encoder, longest, where, name)
        first = first_of.setdefault(request.prompt_key, number)
        if not request.is_same(requests[first]):
            earlier = requests[first]
            both = f"requests {first} and {number}"
            if earlier.where and request.where:
                both = f"{earlier.where} and {request.where}"
            raise ValueError(
                f"{both} want two answers to one prompt, {request.prompt[:60]!r}: {earlier.target[:60]!r} and "
                f"{request.target[:60]!r}; leave one of them out, or read the file with on_conflict='last'"
            )
