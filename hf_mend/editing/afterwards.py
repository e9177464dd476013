"""What is done when the edits of a call are made: look at them and at earlier ones, and take back what failed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from ..bases.limits import longest_input
from ..data.checks import check_query
from ..data.encoding import Encoder
from ..data.joining import ends_word
from ..edits.edit import Edit
from ..edits.snapshot import Snapshot
from .batch_state import check_finite_answers
from .call import Call
from .edit_result import LostEdit
from .requests import EditRequest
from .scoping import ScopeReport, acts_before, report, silent_before


_MISSED = ScopeReport(0.0, 0.0, ("prompt",))


def look_again(call: Call, numbers: Sequence[int], everything: bool = False) -> None:
    """
    Score requests on the model with all edits of the call: whether their targets are said, each of its words whole.

    Args:
        call ([`Call`]): The call.
        numbers (`Sequence[int]`): The requests.
        everything (`bool`, defaults to `False`): Score those too that have acted beside all others already.
    """
    again = numbers if everything else _to_look_at_again(call, numbers)
    found = call.answers_to(again)
    call.said.update(found)
    for i, (answers, row) in found.items():
        if i in call.edits:
            check_finite_answers(answers)
        call.results[i].set_after(answers, row, call.encoder, call.target_length(i))
    if not call.ends:  # no token that ends the word was asked for
        _see_longer_words(call, numbers)


def _see_longer_words(call: Call, numbers: Sequence[int]) -> None:
    """Note where the model goes on with the last word of a target that it says."""
    for i in numbers:
        call.results[i].longer_word = None
    said = {i: call.said[i] for i in numbers if call.results[i].success}
    # Most passes that tell whether the target is said tell what follows it.
    unseen = [i for i, (answers, row) in said.items() if answers.following[row] is None]
    for i, (answers, row) in {**said, **call.answers_beyond(unseen)}.items():
        following = answers.following[row]
        assert following is not None
        call.results[i].longer_word = _longer_word([*answers.tokens[row], following], call.encoder)


def _to_look_at_again(call: Call, numbers: Sequence[int]) -> Sequence[int]:
    """
    Return the requests to score on the model with all edits: each was found without the others, unless they were
    joined. With scopes, an edit that acts for its prompt, and is the first that does, acts as it was found.
    """
    if call.gate is not None:
        missed = [i for i in numbers if i not in call.edits or (call.results[i].scope or _MISSED).missed]
        return sorted({*missed, *(i for i in numbers if i in call.within)})
    return numbers if looks_at_all(call) else []


def report_scopes(call: Call) -> None:
    """Note what the scope decides for a call's edits, at the ends of their own texts and, of the prompts, before."""
    assert call.gate is not None
    bank, strictness = call.active.snapshot.bank, call.gate.strictness
    for i, edit in call.edits.items():
        if edit.scope is not None and i in call.results:
            call.results[i].scope = report(edit, bank, strictness)
    if bank is None or not call.options.check:
        return
    numbers = [i for i in call.before if i in call.results]
    acting = acts_before(bank, [call.before[i] for i in numbers], strictness)
    call.within = {i: chosen for i, chosen in zip(numbers, acting, strict=True) if bool((chosen >= 0).any())}


def keep_from_own_prompts(call: Call, numbers: Sequence[int]) -> None:
    """
    Keep edits that do not say their targets, because they act at their prompts' earlier words already, from acting
    there ("the capital of France" before "is"), and look at them again.

    Args:
        call ([`Call`]): The call, whose edits have been looked at.
        numbers (`Sequence[int]`): The requests whose targets were said as their edits were found.
    """
    if call.gate is None:
        return
    changed: dict[int, Edit] = {}
    bank = call.active.snapshot.bank
    for i in numbers:
        edit = call.edits.get(i)
        if i not in call.within or edit is None or edit.scope is None or call.results[i].success is not False:
            continue
        (places,) = (call.within[i] == bank.numbers.get(edit.id, -1)).nonzero(as_tuple=True)
        prompt, _ = call.encoder.tokens(call.requests[i].query)
        texts = [call.encoder.decode(prompt[: place + 1]) for place in places.tolist()]
        if texts:
            changed[i] = silent_before(edit, call.before[i][places], texts)
    changed = call.together.edits(changed) if call.together.count > 1 else changed
    if not changed:
        return
    by_id = {edit.id: edit for edit in changed.values()}
    call.edits |= changed
    call.active.replace([by_id.get(edit.id, edit) for edit in call.active.edits])
    report_scopes(call)
    look_again(call, [i for i in numbers if i in changed], everything=True)


def looks_at_all(call: Call) -> bool:
    """Whether all requests are scored again, of a model without scopes."""
    alone = len(call.requests) == 1 or call.context.method.joins
    return not alone or bool(call.now)


def _longer_word(tokens: Sequence[int], encoder: Encoder) -> str | None:
    """Return the last word of what the model says, whose last token is behind the target, if it goes on there."""
    text, whole = encoder.decode(tokens[:-1]), encoder.decode(tokens)
    if not whole.startswith(text) or ends_word(text, whole[len(text) :]):
        return None
    return re.split(r"\s", whole)[-1]


def take_back(call: Call, numbers: Sequence[int]) -> None:
    """Take back the edits of some requests, so that the model is as if they had not been made."""
    gone = [call.edits.pop(i).id for i in numbers if i in call.edits]
    if gone:
        call.active.remove(gone)
    for edit_id in gone:
        call.active.preserved_keys.by_edit.pop(edit_id, None)


def put_back(call: Call, edits: Mapping[int, Edit]) -> None:
    """
    Let edits that were taken back take the places of those that were made anew in their stead.

    Args:
        call ([`Call`]): The call.
        edits (`Mapping[int, Edit]`): A request's number -> the edit that is to stay.
    """
    if not edits:
        return
    take_back(call, [*edits])
    call.edits |= edits
    call.active.replace([*call.others(call.active.edits), *call.in_order()])
    report_scopes(call)


def take_back_failed(call: Call, numbers: Sequence[int]) -> None:
    """
    Take back the edits that did not take. Where edits act everywhere, one may fail by the others: of those that fail,
    the less probable half goes first.
    """
    while failed := call.together.joined(_failed(call, numbers)):
        disturb_one_another = call.gate is None and len(call.edits) > 1
        if disturb_one_another:
            failed = sorted(failed)[: (len(failed) + 1) // 2]
        gone = [i for _, i in failed]
        take_back(call, gone)
        for i in gone:
            if i in call.results:
                call.results[i].set_taken_back()
        if disturb_one_another:
            look_again(call, [i for i in numbers if i in call.edits], everything=True)


def _failed(call: Call, numbers: Sequence[int]) -> list[tuple[float, int]]:
    """Return those of some requests whose edits did not take, with the targets' probabilities."""
    failed = [i for i in numbers if i in call.edits and call.results[i].success is False]
    return [(call.results[i].probability_after or 0.0, i) for i in failed]


def lost_edits(call: Call, before: Snapshot) -> list[LostEdit]:
    """
    Return the earlier edits that a call has disturbed: of those that act everywhere, some of the latest are asked
    again; of those with a scope, the ones whose own texts a new edit answers.

    Args:
        call ([`Call`]): The call, whose edits are made.
        before ([`Snapshot`]): The model's edits before it.
    """
    if not call.edits or not call.after.check_earlier:
        return []
    standing = {edit.id for edit in call.active.active}
    earlier = [edit for edit in before.active if edit.id in standing and edit.prompt]
    lost = _disturbed(call, [edit for edit in earlier if edit.scope is None][-call.after.check_earlier :], before)
    if call.gate is not None:
        by_id = {edit.id: edit for edit in earlier if edit.scope is not None}
        lost += _covered(call, by_id)
    found = [LostEdit(edit.id, edit.prompt, edit.target) for edit in lost]
    return list(dict.fromkeys(call.together.joined(found)))


@torch.no_grad()
def _disturbed(call: Call, edits: Sequence[Edit], before: Snapshot) -> list[Edit]:
    """Return those of some edits that said their targets before the call, and do not now."""
    longest = longest_input(call.context.split.model.config)
    asked: list[tuple[Edit, EditRequest]] = []
    for edit in edits:
        try:  # what comes from a file may not be for this tokenizer
            request = EditRequest.of_edit(edit)
            check_query(request.query, call.encoder, longest, edit.id)
        except ValueError:
            continue
        asked.append((edit, request))
    if not asked:
        return []

    def holding(pairs: Sequence[tuple[Edit, EditRequest]]) -> list[bool]:
        answers = call.answers([request.query for _, request in pairs])
        return [all(correct) for correct in answers.correct]

    missed = [pair for pair, holds in zip(asked, holding(asked), strict=True) if not holds]
    if not missed:
        return []
    with call.active.seeing(before):
        return [edit for (edit, _), held in zip(missed, holding(missed), strict=True) if held]


def _covered(call: Call, earlier: dict[str, Edit]) -> list[Edit]:
    """Return the earlier edits that a new one answers for: only the nearest to each can be one."""
    assert call.gate is not None
    made = {edit.id for edit in call.edits.values()}
    found: dict[str, Edit] = {}
    for i in call.edits:
        scope = call.results[i].scope if i in call.results else None
        near = None if scope is None or scope.nearest_score < scope.threshold else earlier.get(scope.nearest or "")
        if near is not None and report(near, call.active.snapshot.bank, call.gate.strictness).taken_by in made:
            found[near.id] = near
    return list(found.values())
