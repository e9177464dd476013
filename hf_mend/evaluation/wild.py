"""
Edits as people meet them: asked in every form, answered freely to the model's own end, each alone or beside others.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .. import __version__
from ..bases.fingerprint import fingerprint_of
from ..data.encoding import Query, batches
from ..data.records import EditRecord
from ..editing.requests import check_limits
from ..model import EditableModel
from .asking import Asked, is_repeat, is_right, subjects_of
from .made_edits import Made, bare, each_row_under, joined, make_alone, make_in_calls
from .many_texts import Answers, Under, answers_to
from .resume import hash_of, hash_of_editor
from .scores import perplexity
from .sharing import in_shares, progress_of


# Of one record: form or kind -> 1 or 0, `form: repeats`, `form: answer`, `kind: bits`, and, of a model with a scope,
# `form: own` and `form: other`: how far the text is past the thresholds of its own edit and of the nearest other.
Values = dict[str, Any]
# A record's number, the form or kind, and the text.
Text = tuple[int, str, Query]

# The most tokens of a right answer behind its target: what follows must end the word.
_BEHIND_TARGET = 4


@dataclass(frozen=True)
class Wild:
    """
    What was measured.

    Args:
        values (`list[Values]`): Of each record, its figures.
        perplexity (`dict[str, float]`): Of held-out text, `"perplexity_before"` and `"perplexity"`, if measured.
    """

    values: list[Values]
    perplexity: dict[str, float]


@dataclass(frozen=True)
class WildSettings:
    """
    What figures in the wild depend on, beside model and data.

    Args:
        kept (`int`, defaults to 1): Edits beside one another.
        edits_per_call (`int`, defaults to 10): Edits of a call of `edit`.
        max_new_tokens (`int`, defaults to 12): Most tokens of an answer; more where the longest target needs them.
        batch_size (`int`, defaults to 20): Facts that are asked together.
        scope (`bool`, defaults to `True`): Whether edits keep their scopes. Without them they act everywhere, as in
            merged weights and exported adapters.
    """

    kept: int = 1
    edits_per_call: int = 10
    max_new_tokens: int = 12
    batch_size: int = 20
    scope: bool = True


def measure_in_the_wild(
    model: EditableModel,
    records: Sequence[EditRecord],
    asked: Sequence[Asked],
    settings: WildSettings | None = None,
    more: Sequence[EditRecord] = (),
    progress_file: str | Path | None = None,
    store: str | Path | None = None,
    passages: Sequence[Sequence[int]] = (),
) -> Wild:
    """
    Edit records and measure what the model then says, in every form of asking, and what it no longer says.

    Edits of a model with a scope are made once, in calls, and measured alone or beside one another; a text alone is
    decided on by its own edit. Others are made each on the un-edited model, or one call after another.

    Args:
        model ([`EditableModel`]): The model, which carries no edits before and after.
        records (`Sequence[EditRecord]`): The records that are measured.
        asked (`Sequence[Asked]`): Their texts; see [`~hf_mend.evaluation.asking.all_asked`].
        settings ([`WildSettings`], *optional*): How many edits are kept, and so on.
        more (`Sequence[EditRecord]`): Records that fill up the number of edits that are kept.
        progress_file (`str` or `Path`, *optional*): JSON lines of finished measurements, from which an interrupted run
            goes on. The un-edited model's answers in it serve all settings.
        store (`str` or `Path`, *optional*): A store that keeps the edits of a model with a scope, for all settings.
        passages (`Sequence[Sequence[int]]`): Held-out texts as token ids, whose perplexity is measured beside the
            first group of edits that are kept.

    Returns:
        [`Wild`]: The figures of each record, and perplexities.

    Raises:
        ValueError: A limit is below 1, there are fewer records than edits to keep, or the model carries edits already.
    """
    settings = settings or WildSettings()
    check_limits(
        edits=settings.kept, edits_per_call=settings.edits_per_call, batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip
    if model.edits:
        raise ValueError(f"the model carries {len(model.edits)} edits; undo them first, measuring makes its own")
    used = {" ".join(record.prompt.split()) for record in records}
    once = {" ".join(record.prompt.split()): record for record in reversed(more)}  # one target a prompt, the first
    others = [record for prompt, record in reversed(once.items()) if prompt not in used]
    if settings.kept > len(records) + len(others):
        raise ValueError(
            f"{settings.kept} edits at once need as many facts, and there are {len(records)} and {len(others)} more "
            "with prompts of their own; ask for fewer"
        )
    wild = _Wild(model, [*records, *others], asked, settings, progress_file, store, passages)
    found = in_shares(wild.progress, wild.alone if settings.kept == 1 else wild.kept)
    return Wild(found, wild.perplexities())


class _Wild:
    """One measurement, in parts that are kept: a chunk of records each."""

    def __init__(
        self,
        model: EditableModel,
        records: Sequence[EditRecord],
        asked: Sequence[Asked],
        settings: WildSettings,
        progress_file: str | Path | None,
        store: str | Path | None,
        passages: Sequence[Sequence[int]],
    ):
        self.model, self.records, self.asked, self.settings, self.store = model, records, asked, settings, store
        self.passages = passages
        self.numbers = list(range(len(asked)))
        lengths = [len(model.encoder.tokens(Query(r.prompt, r.target))[1]) for r in records[: len(asked)]]
        self.tokens = max([settings.max_new_tokens, *(length + _BEHIND_TARGET for length in lengths)])
        base = {
            "version": __version__,
            "base": hash_of([fingerprint_of(model.base_model, model.targets), str(model.dtype)]),
            "machine": [torch.__version__, platform.machine(), str(model.device), torch.get_num_threads()],
        }
        own = {
            "version": __version__,
            "editor": hash_of_editor(model),
            "data": hash_of(asdict(record) for record in records),
            "asked": hash_of(asdict(texts) for texts in asked),
            "settings": asdict(settings),
        }
        self.base = progress_of(progress_file, base)
        self.base_holds: bool | None = None
        self.progress = progress_of(progress_file, own)

    def alone(self) -> list[Values]:
        """Measure each edit alone."""
        found: list[Values] = []
        parts = list(batches(self.numbers, self.settings.batch_size))
        for part in tqdm(parts, desc="In the wild"):
            found += self.progress.part(f"alone/{part[0]}", partial(self._alone, part))
        return found

    def kept(self) -> list[Values]:
        """Measure edits beside one another, group after group."""
        found: list[Values] = []
        for first in range(0, len(self.numbers), self.settings.kept):
            group = self.numbers[first : first + self.settings.kept]
            own = {*group}
            rest = [i for i in [*range(len(self.asked), len(self.records)), *self.numbers] if i not in own]
            every = [*group, *rest[: self.settings.kept - len(group)]]
            parts = {f"{self.settings.kept}/{part[0]}": part for part in batches(group, self.settings.batch_size)}
            read = self._perplexity_part() if first == 0 and self.passages else None
            missing = [name for name in parts if self.progress.is_missing(name)]
            to_read = read is not None and self.progress.is_missing(read)
            if to_read:
                self._perplexity_before()
            with self._carried(every) if missing or to_read else nullcontext():
                if read is not None and to_read:
                    self.progress.part(read, lambda: perplexity(self.model, self.passages))
                for name in tqdm(missing, desc=f"In the wild, {self.settings.kept} edits"):
                    self.progress.part(name, partial(self._beside, parts[name], every))
            found += [values for name in parts for values in self.progress.parts.get(name, ())]
        return found

    def perplexities(self) -> dict[str, float]:
        """Return the perplexity of the held-out texts without edits, and beside those that were kept."""
        if not self.passages or self.settings.kept == 1:
            return {}
        found = {"perplexity": self.progress.parts[self._perplexity_part()]}
        return {"perplexity_before": self._perplexity_before(), **found}

    def _perplexity_before(self) -> float:
        name = f"perplexity/{hash_of(self.passages)}"
        return float(self.base.part(name, lambda: perplexity(self.model, self.passages)))

    def _perplexity_part(self) -> str:
        return f"{self.settings.kept}/perplexity/{hash_of(self.passages)}"

    # ---- the edits ----

    @cached_property
    def _made(self) -> list[Made]:
        """The edits of a model with a scope."""
        needed = len(self.asked) + -len(self.asked) % self.settings.kept  # so many fill up the last group
        return make_in_calls(
            self.model, self.records[:needed], self.settings.edits_per_call, self.store, len(self.asked)
        )

    @contextmanager
    def _carried(self, numbers: Sequence[int]) -> Iterator[None]:
        """Carry the edits of these records beside one another."""
        model = self.model
        if model.scope is not None:
            with model.carrying(joined([self._made[i] for i in numbers], self.settings.scope)):
                yield
            return
        with model.carrying([]):
            calls = list(batches([bare(self.records[i]) for i in numbers], self.settings.edits_per_call))
            for call in tqdm(calls, desc="Edits", disable=len(calls) < 2):
                model.edit(call, keep_failed=True, check_earlier=0)
            yield

    def _alone(self, part: Sequence[int]) -> list[Values]:
        model = self.model
        if model.scope is None:
            made = dict(zip(part, make_alone(model, [self.records[i] for i in part]), strict=True))
        else:
            made = {i: self._made[i] for i in part}
        if model.scope is None or not self.settings.scope:
            unscoped = {i: joined([edits], scope=False) for i, edits in made.items()}
            return self._values(part, [], lambda rows: each_row_under(model, [unscoped[i] for i in rows]), alike=False)
        ids = {i: edits[-1].id if edits else "" for i, edits in made.items()}
        with model.carrying(joined([*made.values()])):
            return self._values(part, [], lambda rows: model.watching([ids[i] for i in rows]), ids)

    def _beside(self, part: Sequence[int], every: Sequence[int]) -> list[Values]:
        model = self.model
        if model.scope is None or not self.settings.scope:
            return self._values(part, every, lambda rows: nullcontext())
        ids = {i: self._made[i][-1].id if self._made[i] else "" for i in part}
        return self._values(part, every, lambda rows: model.watching(), ids)

    # ---- the figures ----

    def _values(
        self,
        part: Sequence[int],
        every: Sequence[int],
        under: Under,
        ids: Mapping[int, str] | None = None,
        alike: bool = True,
    ) -> list[Values]:
        """
        Return the figures of some records.

        Args:
            part (`Sequence[int]`): The records.
            every (`Sequence[int]`): All whose edits are kept; none where each is alone.
            under (`Callable`): The records of a batch's rows -> the context in which these are under their edits.
            ids (`Mapping[int, str]`, *optional*): Of each record, the id of its edit, where the scope decides.
            alike (`bool`): As for [`~hf_mend.evaluation.many_texts.answers_to`].
        """
        found: dict[int, Values] = {i: {} for i in part}
        said = [(i, kind, query) for i in part for kind, query in self.asked[i].said.items()]
        stay = [(i, kind, query) for i in part for kind, query in self.asked[i].stays.items()]
        answered = self._answers(said, under, self.tokens, alike)
        for (i, kind, query), tokens in zip(said, answered.tokens, strict=True):
            answer = self.model.encoder.decode(tokens)
            found[i] |= {kind: float(is_right(answer, query)), f"{kind}: repeats": float(is_repeat(answer, query))}
            found[i][f"{kind}: answer"] = answer
        still = self._answers(stay, under, 1, alike, logits=True)
        counted = self._counted(part, every)
        for (i, kind, _), new, old in zip(stay, map(_noted, still.logits), self._before(stay, alike), strict=True):
            if kind in counted[i]:
                found[i] |= {kind: float(new[1] == old[1]), f"{kind}: bits": float(new == old)}
        if ids is not None:
            for texts, answers in ((said, answered), (stay, still)):
                for (i, kind, _), (own, other) in zip(
                    texts, self._margins(texts, answers, ids, not every), strict=True
                ):
                    if kind in found[i]:
                        found[i] |= {f"{kind}: own": own, f"{kind}: other": other if every else None}
        return [found[i] for i in part]

    def _answers(self, texts: Sequence[Text], under: Under, tokens: int, alike: bool, logits: bool = False) -> Answers:
        owners, queries = [i for i, _, _ in texts], [query for _, _, query in texts]
        return answers_to(
            self.model, queries, lambda rows: under([owners[row] for row in rows]), tokens, logits, alike
        )

    def _before(self, texts: Sequence[Text], alike: bool) -> list[list[Any]]:
        """Return what [`_noted`] makes of the un-edited model's logits, kept for all settings."""

        def find() -> list[list[Any]]:
            with self.model.disable_edits():
                return [_noted(one) for one in self._answers(texts, lambda rows: nullcontext(), 1, alike, True).logits]

        name = f"base/{alike}/{hash_of(asdict(query) for _, _, query in texts)}"
        if name in self.base.parts and self.base_holds is None:
            # Another machine rounds otherwise.
            self.base_holds = find() == self.base.parts[name]
        if name in self.base.parts and not self.base_holds:
            return find()
        return list(self.base.part(name, find))

    def _counted(self, part: Sequence[int], every: Sequence[int]) -> dict[int, list[str]]:
        """Return the kinds of what must stay that count, of each record."""
        about = Counter(subject for i in every for subject in subjects_of(self.records[i]))
        found = {}
        for i in part:
            own = subjects_of(self.records[i])
            found[i] = self.asked[i].counted([one for one, count in about.items() if count > (one in own)])
        return found

    def _margins(
        self, texts: Sequence[Text], answers: Answers, ids: Mapping[int, str], alone: bool
    ) -> list[tuple[float | None, float | None]]:
        if not all(len(key) for key in answers.keys):  # nothing to decide on
            return [(None, None)] * len(texts)
        own, other = self.model.scope_margins(torch.stack(answers.keys), [ids[i] for i, _, _ in texts], alone)
        return [*zip(own.tolist(), other.tolist(), strict=True)]


def _noted(logits: torch.Tensor) -> list[Any]:
    """Return a digest of some logits' bits, and their argmax."""
    bits = (logits.contiguous() + 0.0).view(torch.uint8).numpy().tobytes()  # zero has one sign
    return [hashlib.blake2b(bits, digest_size=16).hexdigest(), int(logits.argmax())]
