"""The marked texts that a scope is trained on, and their keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.encoding import length_batches
from ..scope.network import ScopeNetwork
from ..scope.words import Word, WordTable
from .scope_examples import MarkedText


_TOKENS = 4096


class ScopeTexts:
    """
    The marked texts of all facts, with their hidden states.

    Args:
        texts (`Sequence[Sequence[MarkedText]]`): Of each fact, its texts, the bare prompt first.
        relations (`Sequence[str | None]`): Of each fact, its relation.
        words (`Callable`, *optional*): Gives the numbers of tokens' words; any may be said where it is missing.
        table ([`~hf_mend.scope.words.WordTable`], *optional*): What the tokenizer's tokens are to words.
        subjects (`Sequence[Sequence[Word]]`): Of each fact, the words that name its subject; none where that is not
            known.

    Attributes:
        weights (`list[float]`): Of each fact, how often it is drawn: the root of how many there are of its relation.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[MarkedText]],
        relations: Sequence[str | None],
        words: Callable[[torch.Tensor], torch.Tensor | None] | None = None,
        table: WordTable | None = None,
        subjects: Sequence[Sequence[Word]] = (),
    ):
        self.texts, self.relations, self._words = texts, relations, words
        self.table, self.subjects = table, subjects
        self.alike: dict[str | None, list[int]] = {}  # the facts of each relation
        for fact, relation in enumerate(relations):
            self.alike.setdefault(relation, []).append(fact)
        # Of how many kinds the facts are matters more than how many there are of each.
        self.weights = [len(self.alike[relation]) ** -0.5 for relation in relations]

    def __len__(self) -> int:
        return len(self.texts)

    def keys(self, scope: ScopeNetwork, texts: Sequence[MarkedText]) -> torch.Tensor:
        """Return the keys of some texts at all their marks, one after another, `(marks, KEY_WIDTH)`."""
        found: list[torch.Tensor] = []
        order: list[int] = []
        starts = torch.tensor([0, *(len(text.marks) for text in texts)]).cumsum(0).tolist()
        for batch in length_batches([len(text.tokens) for text in texts], len(texts), _TOKENS):
            hidden = pad_sequence([states_of(texts[i]) for i in batch], batch_first=True)
            words = self.words([texts[i] for i in batch])
            rows = torch.tensor([row for row, i in enumerate(batch) for _ in texts[i].marks])
            places = torch.tensor([mark.position for i in batch for mark in texts[i].marks])
            found.append(scope.keys_at(hidden, rows, places, words))
            order += [starts[i] + k for i in batch for k in range(len(texts[i].marks))]
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(found)[back]

    def words(self, texts: Sequence[MarkedText]) -> torch.Tensor | None:
        """Return the numbers of the words of some texts, padded on the right; `None` where any may be said."""
        if self._words is None:
            return None
        tokens = [torch.tensor(text.tokens[: len(states_of(text))]) for text in texts]
        return self._words(pad_sequence(tokens, batch_first=True))

    @torch.no_grad()
    def bank(self, scope: ScopeNetwork, facts: Sequence[int]) -> torch.Tensor:
        """Return the keys of facts: of all bare prompts, then of all turns of a chat, if there are any."""
        sides = []
        for side in range(self.sides):
            chosen = [MarkedText(t.tokens, t.marks[:1], t.hidden) for t in (self.texts[i][side] for i in facts)]
            sides.append(self.keys(scope, chosen))
        return torch.cat(sides)

    @property
    def sides(self) -> int:
        """How many keys a fact has."""
        return 1 + (len(self.texts[0]) > 1 and self.texts[0][1].marks[0].kind == "chat")


def states_of(text: MarkedText) -> torch.Tensor:
    """Return the hidden states of a text, which were read."""
    assert text.hidden is not None
    return text.hidden
