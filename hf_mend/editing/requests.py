"""Requests for edits, and their results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from ..bases.limits import longest_input
from ..data.chat import is_in
from ..data.checks import check_query
from ..data.display import html_table, shown
from ..data.encoding import Encoder, Query
from ..data.records import EditRecord
from ..edits.edit import Edit, same_prompt
from ..hub.files import shortened
from .scoping import ScopeReport
from .scoring import Answers


@dataclass
class EditRequest:
    """
    The request for one edit. The fields are those of [`~hf_mend.EditableModel.edit`]; each of `messages` is a role and
    what was said, and `where` is the place of its record in a file.
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
        return replace(self._as_query(self.prompt, self.target), subject=self.subject)

    def _as_query(self, prompt: str, answer: str | None) -> Query:
        return Query(prompt, answer, self.chat, turns=self.messages, separator=self.separator)

    @property
    def prompt_key(self) -> tuple[str, bool]:
        """The identity of the prompt, as [`~hf_mend.edits.edit.same_prompt`] gives it."""
        return same_prompt(self.prompt, self.chat, self.metadata.get("messages", ""))

    def is_same(self, other: EditRequest) -> bool:
        """Whether both want the same answer to the same prompt."""
        return self.prompt_key == other.prompt_key and self.target.split() == other.target.split()

    @property
    def probes(self) -> list[Query]:
        """The paraphrases, with the target as their answer, then the locality prompts."""
        said = [self._as_query(prompt, self.target) for prompt in self.paraphrases]
        return said + [self._as_query(prompt, None) for prompt in self.locality]


@dataclass
class Probe:
    """A prompt tried before and after an edit: the model's two answers, and whether the second is as it should be."""

    prompt: str
    before: str
    after: str
    ok: bool


@dataclass
class EditResult:
    """
    The result of an edit.

    Args:
        id (`str`, *optional*): The edit's id; `None` when no edit was necessary, or none was found.
        prompt (`str`): The prompt.
        target (`str`): The answer that the model should give.
        before (`str`): The model's answer before: its greedy choice at each of the target's tokens, teacher-forced.
        after (`str`, *optional*): The answer after; this and the next two are `None` with `check=False`.
        probability_before (`float`): Probability of the whole target before; in a model with a scope, of the target
            with the token that ends it, as a geometric mean over the forms in which the edit is made.
        probability_after (`float`, *optional*): Probability of the whole target after.
        token_success (`list[bool]`, *optional*): For each target token, whether it is the argmax now.
        steps (`int`): Gradient steps that were made; 0 when the model said the target already.
        seconds (`float`): The duration in seconds; in a batch, an equal share.
        rank (`int`): Rank of the update; 0 also of an edit that only supersedes an earlier one, because the model says
            the target without it.
        nbytes (`int`): Bytes of the update's factors, as they are kept, and of the scope's keys.
        update_norms (`dict[str, float]`): Frobenius norm of the update of each layer.
        paraphrases (`list[Probe]`): The request's paraphrases; ok when the model says the target there.
        locality (`list[Probe]`): The request's locality prompts; ok when the greedy next token stayed.
        superseded (`str`, *optional*): Id of the earlier edit of the same prompt, which this one supersedes. It stays
            among the model's edits, without effect, and an undo of this one restores it exactly.
        scope ([`~hf_mend.editing.scoping.ScopeReport`], *optional*): Whether the edit acts for its own texts, and how
            far other edits are; `None` in a model whose edits act everywhere.
    """

    id: str | None
    prompt: str
    target: str
    before: str
    after: str | None
    probability_before: float
    probability_after: float | None
    token_success: list[bool] | None
    steps: int
    seconds: float
    rank: int = 0
    update_norms: dict[str, float] = field(default_factory=dict)
    paraphrases: list[Probe] = field(default_factory=list)
    locality: list[Probe] = field(default_factory=list)
    superseded: str | None = None
    scope: ScopeReport | None = None
    nbytes: int = 0

    @property
    def success(self) -> bool | None:
        """Whether every target token is the argmax now; `None` without a check."""
        return None if self.token_success is None else all(self.token_success)

    @property
    def already_known(self) -> bool:
        """Whether the model said the target before, so that no edit was made."""
        return self.id is None and self.success is not False

    def set_before(self, answers: Answers, row: int, encoder: Encoder) -> None:
        """Set the answers of before the edit."""
        self.before = encoder.decode(answers.tokens[row])
        self.probability_before = math.exp(answers.log_probability[row])

    def set_after(self, answers: Answers, row: int, encoder: Encoder) -> None:
        """Set the answers of the edited model."""
        self.after = encoder.decode(answers.tokens[row])
        self.probability_after = math.exp(answers.log_probability[row])
        self.token_success = answers.correct[row]

    def set_probes(self, request: EditRequest, before: Answers, after: Answers, encoder: Encoder) -> None:
        """Set the answers to the request's probes, before and after."""
        probes = []
        for i, query in enumerate(request.probes):
            ok = before.tokens[i] == after.tokens[i] if query.answer is None else all(after.correct[i])
            probes.append(Probe(query.prompt, encoder.decode(before.tokens[i]), encoder.decode(after.tokens[i]), ok))
        self.paraphrases, self.locality = probes[: len(request.paraphrases)], probes[len(request.paraphrases) :]

    @property
    def _state(self) -> str:
        if self.already_known:
            return "already the model's answer, nothing changed"
        return {True: "took", False: "DID NOT TAKE", None: "not checked"}[self.success]

    def __repr__(self) -> str:
        return f"EditResult({self.id!r}, {shown(self.prompt)} -> {shown(self.target)}: {self._state})"

    def _repr_html_(self) -> str:
        title, *lines = str(self).splitlines()
        return html_table(title, [(line.strip(),) for line in lines])

    def __str__(self) -> str:
        lines = [
            f"Edit {self.id or '(none)'}: {self._state}",
            f"  {shown(self.prompt)} -> {shown(self.target)}",
            f"  before: {shown(self.before)} (probability of the target {self.probability_before:.3g})",
            f"  cost: {self.seconds:.2f} s, {self.steps} step(s), rank {self.rank} in {len(self.update_norms)} layers"
            f", {self.nbytes / 1000:.1f} kB",
        ]
        if self.token_success is not None:
            lines.insert(
                3, f"  after:  {shown(self.after or '')} (probability of the target {self.probability_after:.3g})"
            )
            correct = sum(self.token_success)
            lines.insert(4, f"  tokens that are now the argmax: {correct} of {len(self.token_success)}")
        if self.update_norms:
            norms = ", ".join(f"{name} {norm:.3g}" for name, norm in self.update_norms.items())
            lines.append(f"  update norms: {norms}")
        if self.scope is not None:
            lines.append(f"  scope: {self.scope}")
        if self.superseded is not None:
            lines.insert(2, f"  in place of edit {self.superseded}, which an undo of this one brings back")
        for title, probes in (("paraphrase", self.paraphrases), ("locality", self.locality)):
            lines += [
                f"  {title} {'ok ' if p.ok else 'BAD'} {shown(p.prompt)}: {shown(p.before)} -> {shown(p.after)}"
                for p in probes
            ]
        return "\n".join(lines)


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
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(value, str) for value in fields):
            raise TypeError(
                f"messages[{number}] is {str(message)[:80]!r}, expected an object whose 'role' and 'content' are texts"
            )
        turns.append((str(message["role"]), str(message["content"]).strip()))
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
        ValueError: One of them is below 1.
    """
    for name, value in limits.items():
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
