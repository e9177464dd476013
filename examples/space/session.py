"""What the page does, without the page: one visitor's edits on a model that all visitors share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_mend import Edit, EditableModel, EditResult
from hf_mend.editing.writing import repeats
from hf_mend.evaluation.generation import answer, probability


@dataclass
class Row:
    """One prompt before and after: what the model writes, and how likely the new answer is where it is asked for."""

    kind: str  # "prompt", "paraphrase" or "unrelated"
    prompt: str
    before: str
    after: str
    # Of the new answer; `None` for an unrelated prompt.
    probability_before: float | None = None
    probability_after: float | None = None
    repeats: bool = False  # the second text repeats itself, and the first does not
    answered_by: str | None = None  # the edit that acts there, in a model whose edits have a scope

    @property
    def changed(self) -> bool:
        """Whether the model writes something else."""
        return self.before != self.after


@dataclass
class Session:
    """
    One visitor's edits and which of them are on.

    Args:
        edits (`list[Edit]`): Oldest first.
        off (`set[str]`): Ids of those that are switched off.
        strictness (`float`): What is added to the thresholds of edits with a scope.
    """

    edits: list[Edit] = field(default_factory=list)
    off: set[str] = field(default_factory=set)
    strictness: float = 0.0

    @property
    def active(self) -> list[Edit]:
        """The edits that are on, as strict as the visitor wants them."""
        return [_stricter(edit, self.strictness) for edit in self.edits if edit.id not in self.off]

    def labels(self) -> list[tuple[str, str]]:
        """(what the list shows, id) of each edit."""
        return [(label(edit), edit.id) for edit in self.edits]

    def switch(self, on: list[str]) -> None:
        """Leaves on only the edits with these ids."""
        self.off = {edit.id for edit in self.edits} - set(on)

    def undo(self) -> Edit | None:
        """Takes back the last edit."""
        if not self.edits:
            return None
        gone = self.edits.pop()
        self.off.discard(gone.id)
        return gone


class Workbench:
    """
    A model that visitors share: each finds it with their own edits and no others, at the same time as the others.

    Args:
        model ([`EditableModel`]): The model; it carries no edits of its own.
        max_new_tokens (`int`, defaults to 16): Length of an answer.
    """

    def __init__(self, model: EditableModel, max_new_tokens: int = 16):
        self.model = model
        self.max_new_tokens = max_new_tokens

    def edit(self, session: Session, prompt: str, target: str, chat: bool = False) -> EditResult:
        """
        Makes an edit for a visitor, on top of those that are on. One that does not take is taken back.

        Raises:
            ValueError: Prompt or target cannot be used.
        """
        with self.model.carrying(session.active):
            result = self.model.edit(prompt.strip(), target.strip(), chat=chat)
            assert not isinstance(result, list)
            if result.id is not None:
                session.edits.append(self.model.edits[-1])
        return result

    def rows(
        self,
        session: Session,
        prompt: str,
        target: str,
        paraphrases: list[str],
        unrelated: list[str],
        chat: bool = False,
    ) -> Iterator[Row]:
        """The model without and with the visitor's edits: on the prompt, in other words, and on unrelated prompts."""
        probes = [("prompt", prompt.strip())]
        probes += [("paraphrase", text) for text in paraphrases] + [("unrelated", text) for text in unrelated]
        for kind, text in probes:
            wanted = target.strip() if kind != "unrelated" else ""
            before, chance = self._answers(text, wanted, chat)
            row = Row(kind, text, before, before, chance, chance)
            with self.model.carrying(session.active):
                row.after, row.probability_after = self._answers(text, wanted, chat)
                if self.model.scope is not None:
                    acting = [one for one in self.model.which_edits(text, chat=chat) if one.acts]
                    row.answered_by = f"{acting[0].prompt} → {acting[0].target}" if acting else None
            row.repeats = repeats(row.after, target) and not repeats(row.before, target)
            yield row

    def compare(
        self,
        session: Session,
        prompt: str,
        target: str,
        paraphrases: list[str],
        unrelated: list[str],
        chat: bool = False,
    ) -> list[Row]:
        """All of the rows."""
        return list(self.rows(session, prompt, target, paraphrases, unrelated, chat))

    def adapter(self, session: Session) -> Path | None:
        """A zip of the LoRA adapter that holds the edits that are on; `None` without any."""
        if not session.active:
            return None
        folder = Path(tempfile.mkdtemp(prefix="hf_mend-"))
        self.model.save_lora(folder / "lora-adapter", session.active)
        archive = shutil.make_archive(str(folder / "lora-adapter"), "zip", folder / "lora-adapter")
        shutil.rmtree(folder / "lora-adapter")
        return Path(archive)

    def _answers(self, prompt: str, wanted: str, chat: bool) -> tuple[str, float | None]:
        said = answer(self.model, prompt, chat=chat, max_new_tokens=self.max_new_tokens)
        return said, probability(self.model, prompt, wanted, chat=chat) if wanted else None


def label(edit: Edit) -> str:
    """An edit as a list shows it."""
    in_chat = " (in a chat)" if edit.metadata.get("chat") == "true" else ""
    return f"{edit.prompt} → {edit.target}{in_chat}"


def _stricter(edit: Edit, by: float) -> Edit:
    """The edit with other thresholds; the visitor's own, as the model is everybody's."""
    if edit.scope is None or not by:
        return edit
    return replace(edit, scope=replace(edit.scope, thresholds=edit.scope.thresholds + by))
