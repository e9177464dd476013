"""What the page does, without the page: one visitor's edits on a model that all visitors share."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from hf_mend import Edit, EditableModel, EditResult
from hf_mend.evaluation.generation import answer, probability


@dataclass
class Row:
    """One prompt before and after: the answers, and the probability of the text that matters there."""

    kind: str  # "prompt", "paraphrase" or "unrelated"
    prompt: str
    before: str
    after: str
    watched: str  # whose probability: the new answer, or what an unrelated prompt was answered with
    probability_before: float
    probability_after: float


@dataclass
class Session:
    """
    One visitor's edits and which of them are on.

    Args:
        edits (`list[Edit]`): Oldest first.
        off (`set[str]`): Ids of those that are switched off.
    """

    edits: list[Edit] = field(default_factory=list)
    off: set[str] = field(default_factory=set)

    @property
    def active(self) -> list[Edit]:
        """The edits that are on."""
        return [edit for edit in self.edits if edit.id not in self.off]

    def labels(self) -> list[tuple[str, str]]:
        """(what the list shows, id) of each edit."""
        return [(f"{edit.prompt} → {edit.target}", edit.id) for edit in self.edits]

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
        max_new_tokens (`int`, defaults to 10): Length of an answer.
    """

    def __init__(self, model: EditableModel, max_new_tokens: int = 10):
        self.model = model
        self.max_new_tokens = max_new_tokens

    def edit(self, session: Session, prompt: str, target: str) -> EditResult:
        """
        Makes an edit for a visitor, on top of those that are on.

        Raises:
            ValueError: Prompt or target cannot be used.
        """
        with self.model.carrying(session.active):
            result = self.model.edit(prompt.strip(), target.strip())
            assert not isinstance(result, list)
            if result.id is not None:
                session.edits.append(self.model.edits[-1])
        return result

    def compare(
        self, session: Session, prompt: str, target: str, paraphrases: list[str], unrelated: list[str]
    ) -> list[Row]:
        """The model without and with the visitor's edits, on the prompt, on other words and on unrelated prompts."""
        probes = [("prompt", prompt)]
        probes += [("paraphrase", text) for text in paraphrases] + [("unrelated", text) for text in unrelated]
        said = [self._answer(text) for _, text in probes]
        watched = [
            before if kind == "unrelated" else target.strip() for (kind, _), before in zip(probes, said, strict=True)
        ]
        asked = list(zip([text for _, text in probes], watched, strict=True))
        was = [self._probability(*pair) for pair in asked]
        with self.model.carrying(session.active):
            says = [self._answer(text) for _, text in probes]
            now = [self._probability(*pair) for pair in asked]
        columns = zip(probes, said, says, watched, was, now, strict=True)
        return [Row(kind, text, *rest) for (kind, text), *rest in columns]

    def adapter(self, session: Session) -> Path | None:
        """A zip of the LoRA adapter that holds the edits that are on; `None` without any."""
        if not session.active:
            return None
        folder = Path(tempfile.mkdtemp(prefix="hf_mend-"))
        self.model.save_lora(folder / "lora-adapter", session.active)
        archive = shutil.make_archive(str(folder / "lora-adapter"), "zip", folder / "lora-adapter")
        shutil.rmtree(folder / "lora-adapter")
        return Path(archive)

    def _answer(self, prompt: str) -> str:
        return answer(self.model, prompt, max_new_tokens=self.max_new_tokens)

    def _probability(self, prompt: str, wanted: str) -> float:
        return probability(self.model, prompt, wanted) if wanted else 0.0
