"""Edit records: one correction, and what it must and must not change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import Dataset


@dataclass
class EditRecord:
    """
    One correction, and what it must and must not change.

    Args:
        prompt (`str`): What is asked. Spaces around it do not count.
        target (`str`): What the model should answer. White space around it does not count; one space joins the two, or
            nothing where none is written ([`~hf_mend.data.joining.separator_between`]).
        paraphrases (`list[str]`): The prompt in other words; the answer must be the target there too.
        neighborhood (`list[str]`): Prompts much like this one whose answer must stay.
        unrelated (`list[tuple[str, str]]`): Prompts and answers that have nothing to do with the edit.
        relation (`str`, *optional*): What kind of fact it is.
        id (`str`, *optional*): The record's name in its data set.
        subject (`str`, *optional*): What the fact is about, as the prompt names it.
        ground_truth (`str`, *optional*): What is true, if the edit is counterfactual; the neighbours' answer too.
        portability (`list[tuple[str, str]]`): Questions whose answers follow from the edit.
        generation (`list[str]`): Prompts about the subject, to look at free text.
        group (`str`, *optional*): Neighbouring records of one group belong together: what follows needs all of them.
        questions (`list[str]`): The fact asked as questions; the answer must be the target there too.
        same_subject (`list[str]`): Prompts that ask something else about the same subject; the answer must stay.
        metadata (`dict[str, Any]`): What else its row says: a ticket's number, a date.
        where (`str`, *optional*): Where it stands in the file that it was read from, `"line 4"`; no part of what it
            says, and not compared.
    """

    prompt: str
    target: str
    paraphrases: list[str] = field(default_factory=list)
    neighborhood: list[str] = field(default_factory=list)
    unrelated: list[tuple[str, str]] = field(default_factory=list)
    relation: str | None = None
    id: str | None = None
    subject: str | None = None
    ground_truth: str | None = None
    portability: list[tuple[str, str]] = field(default_factory=list)
    generation: list[str] = field(default_factory=list)
    group: str | None = None
    questions: list[str] = field(default_factory=list)
    same_subject: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    where: str | None = field(default=None, compare=False, repr=False)

    def name(self, number: int) -> str:
        """What to call it in messages: where it stands in its file, or its number in its data set and its id."""
        return self.where or f"record {number} ({self.id or 'no id'})"


class EditDataset(Dataset[EditRecord]):
    """
    A list of [`EditRecord`] as a torch data set.

    Args:
        records (`Iterable[EditRecord]`): The records.
        notes (`Sequence[str]`): What their reader has to say: the layout, and what it left out or changed.
    """

    def __init__(self, records: Iterable[EditRecord], notes: Sequence[str] = ()):
        self.records = list(records)
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        return self.records[index]

    def __iter__(self) -> Iterator[EditRecord]:
        return iter(self.records)
