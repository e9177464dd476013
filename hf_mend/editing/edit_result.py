"""The result of an edit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..data.display import html_table, shown
from ..data.encoding import Encoder
from .requests import EditRequest
from .scoping import ScopeReport
from .scoring import Answers
from .writing import Writer, Writing


@dataclass
class Probe:
    """A prompt tried before and after an edit: the model's two answers, and whether the second is as it should be."""

    prompt: str
    before: str
    after: str
    ok: bool


@dataclass(frozen=True)
class LostEdit:
    """An earlier edit that held before a call and does not any more."""

    id: str
    prompt: str
    target: str


@dataclass
class EditResult:
    """
    The result of an edit.

    Args:
        id (`str`, *optional*): The edit's id; `None` when no edit was necessary, none was found, or it was taken back.
        prompt (`str`): The prompt.
        target (`str`): The answer that the model should give.
        before (`str`): The model's answer before: its greedy choice at each of the target's tokens, teacher-forced.
        after (`str`, *optional*): The answer after; this and the next two are `None` with `check=False`.
        probability_before (`float`): Probability of the whole target before; in a model with a scope, of the target
            with the token that ends it, as a geometric mean over the forms in which the edit is made.
        probability_after (`float`, *optional*): Probability of the whole target after.
        token_success (`list[bool]`, *optional*): For each target token, whether it is the argmax now.
        steps (`int`): Gradient steps that were made; 0 when the model said the target already.
        seconds (`float`): The duration of the call in seconds, with all that it did; of several edits, an equal share.
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
        longer_word (`str`, *optional*): What the model says where the target is only the beginning of a word, such as
            "Lyonnais" for "Lyon".
        taken_back (`bool`): Whether the edit did not take and was taken back; `after` is of when it was tried.
        lost (`list[LostEdit]`): Earlier edits that the call has disturbed, of those that were asked again.
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
    longer_word: str | None = None
    taken_back: bool = False
    lost: list[LostEdit] = field(default_factory=list)

    @property
    def success(self) -> bool | None:
        """
        Whether every target token is the argmax now, and the target's last word is whole; `None` without a check.
        """
        return None if self.token_success is None else all(self.token_success) and self.longer_word is None

    @property
    def written(self) -> list[Writing]:
        """
        What the model writes to the prompt before and after the edit, and to the same in a chat: greedily, to its own
        end or for a few tokens. It is generated when this is read first, or the result printed. Empty where the edit
        was taken back, and where the model is gone or has been edited many times since.
        """
        writer = self.__dict__.get("_writer")
        return [] if writer is None or self.taken_back else writer()

    def set_writer(self, writer: Writer) -> None:
        """Set what writes to the prompt when somebody looks."""
        self.__dict__["_writer"] = writer  # no field: it belongs to the model, and no copy takes it along

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_writer"}

    @property
    def already_known(self) -> bool:
        """Whether the model said the target before, so that no edit was made."""
        return self.id is None and self.success is not False

    def set_before(self, answers: Answers, row: int, encoder: Encoder, length: int) -> None:
        """Set the answers of before the edit, to a target of so many tokens."""
        self.before = encoder.decode(answers.tokens[row][:length])
        self.probability_before = math.exp(answers.log_probability[row])

    def set_after(self, answers: Answers, row: int, encoder: Encoder, length: int) -> None:
        """Set the answers of the edited model, to a target of so many tokens."""
        self.after = encoder.decode(answers.tokens[row][:length])
        self.probability_after = math.exp(answers.log_probability[row])
        self.token_success = answers.correct[row]

    def set_probes(self, request: EditRequest, before: Answers, after: Answers, encoder: Encoder) -> None:
        """Set the answers to the request's probes, before and after."""
        probes = []
        for i, query in enumerate(request.probes):
            ok = before.tokens[i] == after.tokens[i] if query.answer is None else all(after.correct[i])
            probes.append(Probe(query.prompt, encoder.decode(before.tokens[i]), encoder.decode(after.tokens[i]), ok))
        self.paraphrases, self.locality = probes[: len(request.paraphrases)], probes[len(request.paraphrases) :]

    def set_taken_back(self) -> None:
        """Note that the edit did not take and is no longer the model's."""
        self.id, self.superseded, self.taken_back = None, None, True

    @property
    def _state(self) -> str:
        if self.already_known:
            return "already the model's answer, nothing changed"
        if self.taken_back:
            return "DID NOT TAKE, and was taken back"
        return {True: "took", False: "DID NOT TAKE", None: "not checked"}[self.success]

    def __repr__(self) -> str:
        return f"EditResult({self.id!r}, {shown(self.prompt)} -> {shown(self.target)}: {self._state})"

    def _repr_html_(self) -> str:
        title, *lines = str(self).splitlines()
        return html_table(title, [(line.strip(),) for line in lines])

    def __str__(self) -> str:
        lines = [f"Edit {self.id or '(none)'}: {self._state}", f"  {shown(self.prompt)} -> {shown(self.target)}"]
        if self.superseded is not None:
            lines.append(f"  in place of edit {self.superseded}, which an undo of this one brings back")
        lines += self._said()
        if self.token_success is not None:
            lines.append(f"  tokens that are now the argmax: {sum(self.token_success)} of {len(self.token_success)}")
        if self.longer_word is not None:
            lines.append(f"  the target is only the beginning of the word {shown(self.longer_word)}")
        lines.append(
            f"  cost: {self.seconds:.2f} s, {self.steps} step(s), rank {self.rank} in {len(self.update_norms)} layers"
            f", {self.nbytes / 1000:.1f} kB"
        )
        if self.update_norms:
            norms = ", ".join(f"{name} {norm:.3g}" for name, norm in self.update_norms.items())
            lines.append(f"  update norms: {norms}")
        if self.scope is not None:
            lines.append(f"  scope: {self.scope}")
        lines += [
            f"  NO LONGER HOLDS: edit {one.id}, {shown(one.prompt, 60)} -> {shown(one.target, 40)}"
            for one in self.lost
        ]
        for title, probes in (("paraphrase", self.paraphrases), ("locality", self.locality)):
            lines += [
                f"  {title} {'ok ' if p.ok else 'BAD'} {shown(p.prompt)}: {shown(p.before)} -> {shown(p.after)}"
                for p in probes
            ]
        return "\n".join(lines)

    def _said(self) -> list[str]:
        """Return the lines that tell what the model says before and after."""
        written = self.written
        own = written[0] if written else None
        before, after = (own.before, own.after) if own else (self.before, self.after)
        name = "tried: " if self.taken_back else "after: "
        lines = [f"  before: {shown(before)} (probability of the target {self.probability_before:.3g})"]
        if self.probability_after is not None or own is not None:
            chance = self.probability_after
            of = "" if chance is None else f" (probability of the target {chance:.3g})"
            lines.append(f"  {name} {shown(after or '')}{of}")
        for one in written[1:]:
            lines += [f"  in a chat, before: {shown(one.before)}", f"  in a chat, after:  {shown(one.after)}"]
        if any(one.repeats for one in written):
            lines.append("  WARNING: the edited model repeats itself")
        return lines
