"""The choice among all edits' keys, against a plain loop over them."""

from __future__ import annotations

import math

import pytest
import torch

from hf_mend.edits.edit import Edit
from hf_mend.edits.edit_scope import EditScope
from hf_mend.scope.bank import KeyBank
from hf_mend.scope.network import key_scores, least_cosines, may_ask, may_pass, said_words
from hf_mend.scope.penalties import other_penalty, rival_penalty


def unit(count: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 2, 64), dim=-1).flatten(1)


def scoped_edit(
    number: int,
    keys: torch.Tensor,
    threshold: float,
    excluded: torch.Tensor | None = None,
    target: str | None = None,
    contrasts: torch.Tensor | None = None,
) -> Edit:
    scope = EditScope("scope-x", keys, torch.full((len(keys),), threshold), ["prompt"] * len(keys))
    if excluded is not None:
        scope.excluded, scope.excluded_texts = excluded, ["other"] * len(excluded)
    if contrasts is not None:
        scope.contrasts, scope.about = contrasts.half(), "it"
    return Edit(f"e{number}", f"p{number}", target or f"t{number}", {}, scope=scope)


def margins_by_hand(query: torch.Tensor, edits: list[Edit]) -> dict[int, tuple[float, float]]:
    """Number of edit -> how far the text is past its threshold, and what its rivals add to it."""
    over, thresholds, every = {}, {}, {}
    for i, edit in enumerate(edits):
        nearest, contrast = (
            max([float(key_scores(query[None], one[None])) for one in keys], default=-1.0)
            for keys in (edit.scope.excluded, edit.scope.contrasts.float())
        )
        scores = [float(key_scores(query[None], key[None])) for key in edit.scope.keys]
        margins = [
            score - float(threshold) if score > nearest and score >= contrast else -2.0
            for score, threshold in zip(scores, edit.scope.thresholds, strict=True)
        ]
        every[i] = [*zip(margins, edit.scope.thresholds.tolist(), strict=True)]
        over[i] = max(margins)
        thresholds[i] = float(edit.scope.thresholds[margins.index(over[i])])
    found = {}
    for i in over:
        rivals = [j for j in over if edits[j].target != edits[i].target]
        rival = max((over[j] for j in rivals), default=-2.0)
        room = min(1 - thresholds[i], 0.24)
        near = sum(margin > -min(1 - threshold, 0.24) / 4 for j in rivals for margin, threshold in every[j])
        share = 0.5 * (0.3 + 0.3 * 0.3) * (1 + 0.2 * math.log2(1 + near))  # no words are known
        found[i] = over[i], min(share * max(rival + room, 0.0), 0.8 * room)
    return found


@pytest.mark.parametrize("strictness", [-0.6, 0.0, 0.2])
def test_the_chosen_edit_is_the_one_furthest_past_its_threshold(strictness):
    torch.manual_seed(0)
    edits = [scoped_edit(i, unit(3), 0.4 + 0.01 * i) for i in range(20)]
    excluded = edits[3].scope.keys[:1] + 0.05 * torch.randn(1, 128)
    edits[3] = scoped_edit(3, edits[3].scope.keys, 0.43, excluded)
    for i in (5, 7, 11):
        contrasts = torch.cat([edits[i].scope.keys[:1] + 0.08 * torch.randn(1, 128), unit(2)])
        edits[i] = scoped_edit(i, edits[i].scope.keys, 0.4 + 0.01 * i, contrasts=contrasts)
    near = torch.cat([edit.scope.keys[:1] + 0.12 * torch.randn(1, 128) for edit in edits])
    queries = torch.nn.functional.normalize(torch.cat([near, unit(30)]).unflatten(1, (2, 64)), dim=-1).flatten(1)
    bank = KeyBank(edits)
    found = bank.choose(queries, strictness).tolist()
    own, others = bank.margins(queries, ["e7"] * len(queries))
    alone, _ = bank.margins(queries, ["e7"] * len(queries), alone=True)
    for n, (query, number) in enumerate(zip(queries, found, strict=True)):
        margins = margins_by_hand(query, edits)
        reached = {i: over - penalty for i, (over, penalty) in margins.items()}
        best = max(margins, key=lambda i: margins[i][0])
        assert number == (best if reached[best] >= strictness else -1)
        assert float(own[n]) == pytest.approx(max(reached[7], -2.0), abs=1e-5)
        assert float(alone[n]) == pytest.approx(max(margins[7][0], -2.0), abs=1e-5)
        other = max((i for i in margins if i != 7), key=lambda i: margins[i][0])
        assert float(others[n]) == pytest.approx(max(reached[other], -2.0), abs=1e-5)
        if margins[best][0] > -1:
            scores, needed, contrasts = bank.scores(query)
            if margins[best][0] > -2:
                assert float(scores[best] - needed[best]) == pytest.approx(reached[best], abs=1e-5)
            nearest = [float(key_scores(query[None], one[None])) for one in edits[best].scope.contrasts.float()]
            assert float(contrasts[best]) == pytest.approx(max(nearest, default=-2.0), abs=1e-5)
    if strictness == 0.0:
        assert {3} & {*found} == set() and len({*found}) > 13


def test_a_rival_raises_what_the_best_has_to_reach_unless_it_says_the_same():
    torch.manual_seed(3)
    key = unit(1)
    near = torch.nn.functional.normalize((key + 0.15 * torch.randn(1, 128)).unflatten(1, (2, 64)), dim=-1).flatten(1)
    between = torch.nn.functional.normalize((key + near).unflatten(1, (2, 64)), dim=-1).flatten(1)
    score = float(key_scores(between, key))
    best = scoped_edit(0, key, score - 0.01)  # a little less than the text's score

    def chosen(*rivals: Edit) -> int:
        return int(KeyBank([best, *rivals]).choose(between)[0])

    assert chosen() == 0
    assert chosen(scoped_edit(1, near, score + 0.01)) == -1  # nearly as near, and nearly past its threshold
    assert chosen(scoped_edit(1, near, score + 0.01, target="t0")) == 0
    assert chosen(scoped_edit(1, unit(1), score)) == 0  # too far from acting to matter
    own = KeyBank([best, scoped_edit(1, near, score + 0.01)]).choose(key)
    assert own.tolist() == [0]  # the edit's own text, whatever rivals there are


def test_rivals_speak_against_an_edit_the_more_of_its_words_are_missing_and_the_more_there_are():
    threshold, past = torch.tensor(0.8), torch.tensor(0.1)

    def penalty(missing: float, rival: torch.Tensor = past, count: int = 0) -> float:
        return float(rival_penalty(rival, threshold, torch.tensor(missing), torch.tensor(count)))

    assert penalty(0.0) == penalty(0.0, count=100) == 0.0
    assert penalty(0.5) == pytest.approx(0.25 * 0.3)
    assert penalty(0.2, count=1) == pytest.approx(0.1 * 1.2 * 0.3)
    assert penalty(0.2, count=7) == pytest.approx(0.1 * 1.6 * 0.3)
    assert penalty(1.0, count=3) == pytest.approx(0.8 * 0.2)  # no more than most of what a perfect score has left
    assert penalty(1.0, torch.tensor(-0.1)) == pytest.approx(0.5 * 0.1)
    assert penalty(1.0, torch.tensor(-0.2)) == pytest.approx(0.0, abs=1e-6)  # too far from acting to matter


def test_many_rivals_nearly_as_near_keep_an_edit_out_that_one_does_not():
    torch.manual_seed(3)

    def unit_of(key: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(key.unflatten(1, (2, 64)), dim=-1).flatten(1)

    key = unit(1)
    text = unit_of(key + 0.3 * unit(1))
    score = float(key_scores(text, key))
    rivals = [unit_of(text + 0.4 * unit(1)) for _ in range(12)]
    edits = [scoped_edit(0, key, score - 0.4 * (1 - score))]
    edits += [scoped_edit(i, one, float(key_scores(text, one)) + 0.005) for i, one in enumerate(rivals, 1)]
    chosen = [int(KeyBank(edits[:count]).choose(text)[0]) for count in range(1, 14)]
    assert chosen[0] == chosen[1] == 0 and chosen[-1] == -1
    assert sorted(chosen, reverse=True) == chosen


def test_of_two_edits_alike_a_text_asks_for_the_one_whose_words_it_has():
    torch.manual_seed(7)

    def unit_of(key: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(key.unflatten(1, (2, 64)), dim=-1).flatten(1)

    def words(*numbers: int) -> torch.Tensor:
        return said_words(2 * torch.tensor([numbers]), torch.full((1, len(numbers)), 0.2))

    first = unit(1)
    second = unit_of(first + 0.3 * unit(1))
    between = unit_of(first + second)
    score = min(float(key_scores(between, first)), float(key_scores(between, second)))
    threshold = score - 0.4 * (1 - score)
    edits = [
        scoped_edit(0, torch.cat([first, words(1, 2)], 1), threshold),
        scoped_edit(1, torch.cat([second, words(3, 4)], 1), threshold),
    ]
    for said, found in ((words(1, 2, 3, 4), True), (words(8, 9), False)):
        chosen = int(KeyBank(edits).choose(torch.cat([between, said], 1))[0])
        assert (chosen >= 0) == found
        margins = torch.stack(KeyBank(edits).margins(torch.cat([between, said], 1), [edits[0].id]))
        assert bool((margins >= 0).any()) == found
    # An edit alone is found by any text that has one of its words, or no other in their place.
    alone = KeyBank(edits[:1])
    for said in (words(1, 8, 9), words(1, 2, 8, 9), words(), words(2)):
        assert alone.choose(torch.cat([between, said], 1)).tolist() == [0]
    text = torch.cat([between, words(8, 9)], 1)
    assert alone.choose(text).tolist() == [-1]
    (_, margin), (score, needed, _) = alone.margins(text, [edits[1].id]), alone.scores(text[0])
    assert float(margin) == pytest.approx(float(score - needed), abs=1e-5) and float(margin) < 0
    (own, _) = alone.margins(text, [edits[0].id], alone=True)
    assert float(own) == pytest.approx(float(score - needed), abs=1e-5)


def test_a_text_that_names_something_else_has_more_to_reach():
    threshold = torch.tensor(0.8)

    def penalty(other: float) -> float:
        return float(other_penalty(threshold, torch.tensor(other)))

    assert penalty(0.0) == penalty(0.4) == 0.0
    assert penalty(0.6) == pytest.approx(0.5 * 0.8 * 0.2)
    assert penalty(0.8) == penalty(1.0) == pytest.approx(0.8 * 0.2)


def test_no_key_that_passes_is_left_out_of_the_whole_look():
    torch.manual_seed(1)
    keys, queries = unit(200), unit(50)
    scores = key_scores(queries, keys).max(0).values
    for parts in (keys.chunk(2, 1)[1:], keys.chunk(2, 1)):
        assert may_pass(least_cosines(queries, parts), scores).all()
        assert not may_pass(least_cosines(queries, parts), torch.full((200,), 0.9)).any()
    best = key_scores(queries, keys).max(1).values
    for parts in (keys.chunk(2, 1)[1:], keys.chunk(2, 1)):
        for query, score in zip(queries, best.tolist(), strict=True):
            assert may_ask(least_cosines(query[None], parts), torch.full((200,), score)).all()
        cosines, half = least_cosines(queries, parts), best.median()
        assert may_ask(cosines, torch.full((200,), float(half)))[best >= half].all()
        assert not may_ask(cosines, torch.full((200,), 0.9)).any()
    first, both = (may_pass(least_cosines(queries, keys.chunk(2, 1)[-n:]), scores + 0.1).sum() for n in (1, 2))
    assert both < first / 2  # one look more leaves far fewer


def test_a_text_that_is_near_to_a_key_in_one_part_alone_asks_for_nothing():
    torch.manual_seed(5)
    key, other = unit(1), unit(1)
    bank = KeyBank([scoped_edit(0, key, 0.8)])
    assert bank.choose(torch.cat([key[:, :64], other[:, 64:]], 1)).tolist() == [-1]
    assert bank.choose(torch.cat([other[:, :64], key[:, 64:]], 1)).tolist() == [-1]


@pytest.mark.parametrize("seed", range(40))
def test_a_key_that_is_a_contrast_too_asks_for_the_edit(seed):
    """Their scores come of products of other shapes, and differ in their last digits."""
    torch.manual_seed(seed)
    keys = unit(5).half()
    edit = scoped_edit(0, keys, 0.3, contrasts=torch.cat([unit(2).half(), keys[:1]]))
    assert KeyBank([edit]).choose(keys[:1].float()).tolist() == [0]


def test_a_bank_without_edits_chooses_none():
    assert KeyBank([]).choose(unit(3)).tolist() == [-1, -1, -1]


def test_keys_on_a_device_grow_with_the_bank_s_and_the_host_keeps_its_own():
    """`cpu:0` is the same memory and another device to torch."""
    device = torch.device("cpu:0")
    keys = unit(6)
    bank = KeyBank([scoped_edit(i, keys[i : i + 1], 0.99) for i in range(4)])
    before = bank._on(device)
    wider = bank.extended([scoped_edit(i, keys[i : i + 1], 0.99) for i in range(4, 6)])
    there = wider._on(device)
    assert torch.equal(torch.cat([*there.parts], 1), keys) and there.owner.tolist() == [*range(6)]
    assert torch.equal(torch.cat([*before.parts], 1), keys[:4])
    assert torch.equal(torch.cat([*bank._on(device).parts], 1), keys[:4])
    assert wider._on(keys.device).owner.data_ptr() != there.owner.data_ptr()
    assert wider.choose(keys).tolist() == [*range(6)]


@pytest.mark.parametrize("gone", [3, 15])
def test_a_bank_without_some_edits_chooses_as_one_made_of_the_others(gone):
    torch.manual_seed(2)
    edits = [scoped_edit(i, unit(1 + i % 3), 0.3, unit(1) if i % 4 == 0 else None) for i in range(20)]
    for i in range(0, 20, 3):
        edits[i].scope.contrasts, edits[i].scope.about = unit(1 + i % 2).half(), "it"
    left, later = edits[:2] + edits[2 + gone :], scoped_edit(99, edits[2].scope.keys, 0.3)
    whole = KeyBank(edits)
    bank = whole.without([edit.id for edit in edits[2 : 2 + gone]]).extended([later])
    fresh = KeyBank([*left, later])
    assert len(bank) == len(fresh) == len(left) + 1 and len(whole) == 20
    queries = torch.cat([unit(50), *(edit.scope.keys for edit in edits)])
    for strictness in (-0.3, 0.0):
        found, expected = bank.choose(queries, strictness).tolist(), fresh.choose(queries, strictness).tolist()
        names = [
            [one.ids[i] if i >= 0 else None for i in chosen] for one, chosen in ((bank, found), (fresh, expected))
        ]
        assert names[0] == names[1] and "e99" in names[0] and "e2" not in names[0]
    assert whole.choose(edits[2].scope.keys).tolist() == [2] * len(edits[2].scope.keys)
    assert bank.nearest("e0", queries) == fresh.nearest("e0", queries)


def test_each_edit_is_scored_by_the_key_that_is_nearest_to_passing():
    torch.manual_seed(3)
    edits = [scoped_edit(i, unit(3), 0.4) for i in range(6)]
    for edit in edits:
        edit.scope.thresholds = torch.rand(3)
    bank = KeyBank(edits).without(["e1"])
    (query,) = unit(1)
    scores, thresholds, _ = bank.scores(query)
    assert bank.numbers.keys() == {"e0", "e2", "e3", "e4", "e5"}
    by_hand = margins_by_hand(query, edits[:1] + edits[2:])
    for number, (one, place) in zip(by_hand, bank.numbers.items(), strict=True):
        scope, (over, penalty) = edits[int(one[1:])].scope, by_hand[number]
        best = int((key_scores(query[None], scope.keys)[0] - scope.thresholds).argmax())
        assert float(thresholds[place]) == pytest.approx(float(scope.thresholds[best]) + penalty)
        assert float(scores[place]) == pytest.approx(over + float(scope.thresholds[best]), abs=1e-5)
