"""The methods of an [`EditableModel`] that show and steer where its edits act."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..bases.limits import longest_input
from ..bases.split import SplitModel
from ..data.chat import as_turn
from ..data.checks import check_query
from ..data.encoding import Encoder, Query
from ..data.places import joined
from ..edits.active import ActiveEdits
from ..edits.collection import check_known
from ..edits.edit import Edit
from ..scope.encoder_gate import EncoderGate
from ..scope.files import scope_id
from ..scope.gate import ScopeGate, Watch
from ..scope.network import ScopeNetwork
from .scoping import excluded_by, excluding, keys_of, scopes_of


@dataclass(frozen=True)
class ScopedEdit:
    """
    An edit, and how it stands to a text.

    Args:
        id (`str`): The edit's id.
        prompt (`str`): Its prompt.
        target (`str`): Its answer.
        score (`float`): How much the text asks for it, at most 1.
        threshold (`float`): The score from which on it acts.
        acts (`bool`): Whether it acts at the text's end: of several past their thresholds, one does.
    """

    id: str
    prompt: str
    target: str
    score: float
    threshold: float
    acts: bool


class ActsWhereAsked:
    """The methods of [`EditableModel`] that show and steer where its edits act."""

    base_model: Any
    config: Any
    split: SplitModel
    _active: ActiveEdits
    _gate: ScopeGate | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None
    _check_usable: Callable[[], None]

    @property
    def encoder(self) -> Encoder:
        """Return the encoder of texts for this model."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The base model's tokenizer; `edit` needs it."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        if self._gate is not None:
            self._gate.set_tokenizer(tokenizer)

    @property
    def scope(self) -> ScopeNetwork | None:
        """The scope that decides where edits act; `None` in a model whose edits act everywhere."""
        return None if self._gate is None else self._gate.scope

    @property
    def scope_strictness(self) -> float:
        """
        What is added to the threshold of every edit, 0 by default: with more, edits act less often where they should
        not, and are missed more often where they should.
        """
        return self._scoped().strictness

    @scope_strictness.setter
    def scope_strictness(self, value: float) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not -1 <= value <= 1:
            raise ValueError(f"scope_strictness is {value!r}, expected a number from -1 to 1; scores are at most 1")
        self._scoped().strictness = float(value)

    def set_scope(self, scope: ScopeNetwork) -> None:
        """
        Give the model another scope.

        Args:
            scope ([`ScopeNetwork`]): The scope.

        Raises:
            RuntimeError: The model has been merged or unloaded.
            ValueError: The model's edits act everywhere, or it carries edits with keys in its present scope.
        """
        self._check_usable()
        self._scoped()
        if any(edit.scope is not None for edit in self._active.edits):
            raise ValueError("the model carries edits with keys in its present scope; undo_all() before set_scope")
        with self._active.changing():
            gate = self._new_gate(scope)
            gate.strictness = self._scoped().strictness
            self._active.set_gate(gate)
            self._gate = gate

    def _new_gate(self, scope: ScopeNetwork) -> ScopeGate:
        if self.config.is_encoder_decoder:
            return EncoderGate(self.base_model, scope.eval(), scope_id(scope), self.tokenizer)
        block = self.split.blocks[self.split.block]
        return ScopeGate(self.base_model, block, self.split.block, scope.eval(), scope_id(scope), self.tokenizer)

    def numbers_of_words(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """
        Return the numbers of the words of some tokens, by which the scope tells subjects apart; `None` where it reads
        no words, as in encoder-decoder models.

        Args:
            tokens (`torch.Tensor` of shape `(rows, seq)`): Token ids of texts from their beginnings on.

        Raises:
            ValueError: The model's edits act everywhere.
        """
        return self._scoped().words(tokens)

    def which_edits(self, text: str | Sequence[Mapping[str, str]], chat: bool = False) -> list[ScopedEdit]:
        """
        Return the edits that act, those that a text asks for most first, with scores and thresholds.

        Args:
            text (`str` or list of `{"role": ..., "content": ...}`): A text, or a chat whose last turn is the user's.
            chat (`bool`, defaults to `False`): Treat a text as a user's turn in the tokenizer's chat template.

        Raises:
            RuntimeError: The model has been merged or unloaded.
            TypeError: It is neither a text nor a chat.
            ValueError: The model's edits act everywhere, a chat has no user's turn at its end, or the text is empty or
                longer than the model takes.
        """
        self._check_usable()
        gate = self._scoped()
        query = as_query(text, chat)
        self._check_texts("which_edits", [query])
        now = self._active.snapshot
        edits, bank = [*now.scoped.values()], now.bank
        if not edits:
            return []
        rows = self.encoder([query]).to(self.split.device)
        with self._active.cleared_after_error():
            key = keys_of(gate, self.split, rows)[0][0].to(gate.scope.centre.device)
        scores, thresholds, contrasts = bank.scores(key)
        scores, needed = scores.tolist(), torch.maximum(thresholds + gate.strictness, contrasts).tolist()
        acting = self._active.acting.bank  # none while edits are disabled
        chosen = -1 if acting is None else int(acting.choose(key[None], gate.strictness)[0])
        acts, numbers = None if acting is None or chosen < 0 else acting.ids[chosen], bank.numbers
        found = [
            ScopedEdit(edit.id, edit.prompt, edit.target, scores[i], needed[i], edit.id == acts)
            for edit in edits
            for i in [numbers[edit.id]]
        ]
        return sorted(found, key=lambda one: (not one.acts, one.threshold - one.score))

    @contextmanager
    def watching(self, only: Sequence[str] | None = None) -> Iterator[Watch]:
        """
        Watch what the scope decides in the passes within the context, in this thread.

        Args:
            only (`Sequence[str]`, *optional*): Of each row of these passes, the id of the one edit that may act in it.

        Raises:
            ValueError: The model's edits act everywhere, or a pass has another number of rows than `only`.
        """
        with self._scoped().watched(only) as watch:
            yield watch

    def scope_margins(
        self, keys: torch.Tensor, own: Sequence[str], alone: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return how far the texts of some keys are past what they have to reach: for their own edits, and for the
        nearest others.

        Args:
            keys (`torch.Tensor` of shape `(texts, width)`): The keys, as [`watching`] finds them.
            own (`Sequence[str]`): Of each text, the id of its own edit.
            alone (`bool`, defaults to `False`): For its own edit as if that were the only one.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Two of shape `(texts,)`; -2 where there is no such edit, or it is kept
            from the text.
        """
        gate, bank = self._scoped(), self._active.acting.bank
        bank = gate.bank([]) if bank is None else bank
        margins: tuple[torch.Tensor, torch.Tensor] = bank.margins(keys, own, alone)
        return margins

    def include(self, edit_id: str, texts: str | Sequence[str], chat: bool = False) -> Edit:
        """
        Let an edit act for further texts too. The edit keeps its id; `undo` takes it back whole.

        Args:
            edit_id (`str`): The edit's id.
            texts (`str` or `Sequence[str]`): Texts that ask for it, each as far as its answer.
            chat (`bool`, defaults to `False`): Treat them as a user's turns in the tokenizer's chat template.

        Returns:
            [`Edit`]: The edit with its wider scope.

        Raises:
            KeyError: No edit has that id.
            TypeError: One is no text, or the id is none.
            ValueError: The edit has no scope, there is no text, or one asks for the same as what is excluded,
                is empty or longer than the model takes.
        """
        self._check_usable()
        with self._active.changing():
            return self._included(edit_id, _as_texts("include", texts), chat)

    def _included(self, edit_id: str, texts: Sequence[str], chat: bool) -> Edit:
        edit, gate = self._with_scope(edit_id), self._scoped()
        assert edit.scope is not None
        forms = {repr(text): Query(text, edit.target, chat, ends=True) for text in texts}
        self._check_texts("include", [*forms.values()])
        more = scopes_of(gate, self.split, self.encoder, [forms])[0]
        if (taken := excluded_by(edit.scope, more)) is not None:
            text, excluded = taken
            raise ValueError(
                f"the edit {edit_id!r} excludes the text {excluded!r}, and to the scope {text} asks the same; it "
                "cannot be included too"
            )
        scope = replace(
            edit.scope,
            keys=joined([edit.scope.keys, more.keys]),
            thresholds=torch.cat([edit.scope.thresholds, edit.scope.thresholds.min().expand(len(more.texts))]),
            texts=[*edit.scope.texts, *more.texts],
        )
        return self._changed(edit, replace(edit, scope=scope))

    def exclude(self, edit_id: str, texts: str | Sequence[str], chat: bool = False) -> Edit:
        """
        Keep an edit from acting for some texts, and for what is more like them than like the edit's own prompt.

        Args:
            edit_id (`str`): The edit's id.
            texts (`str` or `Sequence[str]`): The texts.
            chat (`bool`, defaults to `False`): Treat them as a user's turns in the tokenizer's chat template.

        Returns:
            [`Edit`]: The edit with its narrower scope.

        Raises:
            KeyError: No edit has that id.
            TypeError: One is no text.
            ValueError: The edit has no scope, there is no text, or one asks for the same as its own prompt, is empty,
                or longer than the model takes.
        """
        self._check_usable()
        with self._active.changing():
            edit, gate = self._with_scope(edit_id), self._scoped()
            assert edit.scope is not None
            queries = [Query(text, None, chat) for text in _as_texts("exclude", texts)]
            self._check_texts("exclude", queries)
            scope = excluding(edit.scope, gate, self.split, self.encoder, queries)
            return self._changed(edit, replace(edit, scope=scope))

    def _changed(self, old: Edit, new: Edit) -> Edit:
        self._active.replace([new if edit is old else edit for edit in self._active.edits])
        return new

    def _with_scope(self, edit_id: str) -> Edit:
        if not isinstance(edit_id, str):
            kind = type(edit_id).__name__
            raise TypeError(f"edit_id is of type {kind}, expected an edit's id: that of a result or of an edit")
        check_known(self._active.edits, [edit_id])
        edit = next(edit for edit in self._active.edits if edit.id == edit_id)
        if edit.scope is None:
            raise ValueError(f"the edit {edit_id!r} has no scope, it acts everywhere; make it again in this model")
        return edit

    def _check_texts(self, where: str, queries: Sequence[Query]) -> None:
        for query in queries:
            check_query(query, self.encoder, longest_input(self.config), where, "text")

    def _scoped(self) -> ScopeGate:
        if self._gate is None:
            raise ValueError(
                "this model's edits act everywhere: its editor has no scope; load one that has, or train one with "
                "EditorConfig(scope=True)"
            )
        return self._gate


def as_query(text: str | Sequence[Mapping[str, str]], chat: bool = False) -> Query:
    """
    Return a text, or a chat whose last turn is the user's, as a query without an answer.

    Raises:
        TypeError: It is neither.
        ValueError: A chat has no user's turn at its end.
    """
    if isinstance(text, str):
        return Query(text, None, chat)
    given: Any = text
    if not isinstance(given, Sequence) or not all(isinstance(turn, Mapping) for turn in given):
        raise TypeError(f"text is {given!r}, expected a text, or a chat as a list of turns with role and content")
    turns = [as_turn(turn, f"the chat's turn {number}") for number, turn in enumerate(given)]
    if not turns or turns[-1][0] != "user":
        raise ValueError(f"a chat ends with a user's turn, got {[role for role, _ in turns]}")
    system = turns[0][1] if turns[0][0] == "system" else None
    return Query(turns[-1][1], None, True, turns=tuple(turns[system is not None : -1]), system=system)


def _as_texts(where: str, texts: str | Sequence[str]) -> list[str]:
    found = [texts] if isinstance(texts, str) or not isinstance(texts, Sequence) else list(texts)
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise TypeError(f"{where}: {wrong[0]!r} is no text; pass a text or a list of texts")
    if not found:
        raise ValueError(f"{where} got no text: the list is empty")
    return found
