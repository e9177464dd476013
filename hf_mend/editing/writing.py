"""What a model writes to the prompt of an edit, before and after it: generated when somebody looks at it."""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import logging

from ..bases.limits import longest_input
from ..bases.weights import device_of
from ..data.encoding import Encoder, Query
from ..data.forms import writes_chats
from ..data.joining import is_unspaced
from ..edits.snapshot import Snapshot


logger = logging.get_logger(__name__)

# Tokens that are written: so many, or the target's and some more, whichever are more.
_TOKENS, _MORE = 16, 8
# So many of a model's last calls can be looked at; older ones let go of the edits of their time.
_CALLS = 16
# A phrase of at most so many words, said so often in a row, is a repetition; so is the target, said so often at all.
_PHRASE, _TIMES = 4, 3


@dataclass(frozen=True)
class Writing:
    """
    What the model writes to a prompt, greedily, to its own end or for a few tokens.

    Args:
        form (`str`): `"prompt"`, or `"chat"` for the same as a user's turn of a chat.
        before, after (`str`): The text without and with the edit.
        repeats (`bool`): Whether the second text repeats itself and the first does not.
    """

    form: str
    before: str
    after: str
    repeats: bool


class Writer:
    """
    Writes to the prompt of an edit, on the model as it was before and after the call that made it. It keeps the model
    from nothing: when the model is gone, or has been edited many times since, nothing is written any more.

    Args:
        model: The [`EditableModel`].
        encoder ([`Encoder`]): Tokenises.
        query ([`Query`]): The prompt and the target.
        before, after ([`Snapshot`]): The model's edits before and after the call.
    """

    def __init__(self, model: Any, encoder: Encoder, query: Query, before: Snapshot, after: Snapshot):
        self.model, self.encoder, self.query = weakref.ref(model), encoder, query
        self.gate = model._gate
        self.snapshots: tuple[Snapshot, Snapshot] | None = (before, after)
        self.written: list[Writing] | None = None

    def release(self) -> None:
        """Let go of the edits; what was written stays."""
        self.snapshots = None

    def __call__(self) -> list[Writing]:
        """Return what is written in each form; nothing where it cannot be any more."""
        model = self.model()
        if self.written is None and model is not None and self.snapshots is not None:
            usable = model._spent is None and model._gate is self.gate and model.can_generate()
            try:
                # In a context of its own: where somebody looks, all edits may be disabled.
                self.written = Context().run(self._write, model, *self.snapshots) if usable else []
            except Exception as error:  # a result is printed whatever its model can do
                logger.warning(f"what the model writes cannot be shown: {type(error).__name__}: {error}")
                self.written = []
            self.release()
        return self.written or []

    def _write(self, model: Any, before: Snapshot, after: Snapshot) -> list[Writing]:
        query, encoder = replace(self.query, ends=False), self.encoder
        forms = {"chat" if query.chat else "prompt": query}
        if not query.chat and writes_chats(encoder.tokenizer):
            forms["chat"] = replace(query, chat=True, separator=None)
        prompts = [encoder.tokens(replace(one, answer=None))[0] for one in forms.values()]
        count = max(_TOKENS, len(encoder.tokens(query)[1]) + _MORE)
        longest = longest_input(model.config)
        if longest is not None:
            taken = 0 if encoder.is_encoder_decoder else max(map(len, prompts))
            count = max(1, min(count, longest - taken))
        texts = []
        for snapshot in (before, after):
            with model._active.seeing(snapshot):
                said = greedy_tokens(model, encoder, prompts, count)
            texts.append([encoder.decode(tokens) for tokens in said])
        target = query.answer or ""
        return [
            Writing(form, old, new, repeats(new, target) and not repeats(old, target))
            for form, old, new in zip(forms, *texts, strict=True)
        ]


class RecentWriters:
    """A model's last results that can still be written to; the earlier ones let go of the edits of their time."""

    def __init__(self) -> None:
        self._calls: deque[list[weakref.ref[Writer]]] = deque()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model has made nothing

    def add(self, writers: Sequence[Writer]) -> None:
        """Note those of a call."""
        self._calls.append([weakref.ref(writer) for writer in writers])
        while len(self._calls) > _CALLS:
            for one in self._calls.popleft():
                if (writer := one()) is not None:
                    writer.release()


def repeats(text: str, target: str) -> bool:
    """
    Whether a text repeats itself: a phrase of a few words three times in a row, or the target three times at all.

    Args:
        text (`str`): The text.
        target (`str`): The target.

    Example:

    ```python
    repeats("botany, botany is botany", "botany")  # True
    ```
    """
    said, wanted = _words(text), _words(target)
    if wanted and sum(said[i : i + len(wanted)] == wanted for i in range(len(said))) >= _TIMES:
        return True
    return any(
        said[i : i + size] == said[i + size : i + 2 * size] == said[i + 2 * size : i + 3 * size]
        for size in range(1, _PHRASE + 1)
        for i in range(len(said) - _TIMES * size + 1)
    )


def _words(text: str) -> list[str]:
    """Return the words of a text, of a script without spaces the characters."""
    words = re.findall(r"\w+", text.casefold().replace("_", " "))
    return [part for word in words for part in (word if is_unspaced(word[-1]) else [word])]


@torch.no_grad()
def greedy_tokens(model: Any, encoder: Encoder, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """
    Generate greedily after several prompts side by side, each until the model stops by itself.

    Args:
        model ([`EditableModel`] or `PreTrainedModel`): The model; each prompt keeps its row of the batch.
        encoder ([`Encoder`]): The encoder. A decoder's prompts are padded on the left, since `generate` appends on the
            right.
        prompts (`Sequence[list[int]]`): The prompts' token ids.
        max_new_tokens (`int`): The most tokens of an answer.

    Returns:
        `list[list[int]]`: The token ids of each answer, special ones and padding included.
    """
    seq2seq = encoder.is_encoder_decoder
    padded = encoder.pad([(prompt if seq2seq else prompt[::-1], []) for prompt in prompts]).inputs
    inputs = {name: padded[name] if seq2seq else padded[name].flip(1) for name in ("input_ids", "attention_mask")}
    device = device_of(model.get_input_embeddings())  # of an offloaded base, `model.device` is `meta`
    out = model.generate(
        **{name: tensor.to(device) for name, tensor in inputs.items()},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=encoder.pad_token_id,
    )
    answers: list[list[int]] = (out if seq2seq else out[:, inputs["input_ids"].shape[1] :]).tolist()
    return answers
