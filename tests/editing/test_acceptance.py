"""Which steps are taken, whole, in part or not at all, on answers that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_mend.data.encoding import EncodedBatch
from hf_mend.editing.acceptance import AcceptByGroup, best_shares
from hf_mend.editing.batch_state import BatchState
from hf_mend.editing.scoring import Answers, score_targets


def made_up(values: list[float], correct: list[bool]) -> Answers:
    return Answers(values, [[i] for i in range(len(values))], [[flag] for flag in correct], values)


def test_each_row_takes_the_share_that_does_best():
    """The whole, a quarter, the eighth that says the target, nothing where none helps or none is wanted."""
    log_probability = [
        {0.0: -5.0, 1.0: -1.0},
        {0.0: -5.0, 1.0: -9.0, 0.5: -4.0, 0.25: -2.0, 0.125: -3.0},
        {0.0: -5.0, 1.0: -1.0, 0.5: -1.5, 0.25: -2.0, 0.125: -2.5},
        {0.0: -5.0, 1.0: -9.0, 0.5: -8.0, 0.25: -7.0, 0.125: -6.0},
        {0.0: -5.0},
    ]
    says_it = {(0, 1.0), (2, 0.125)}
    asked: list[list[int]] = []

    def answers(shares: torch.Tensor, among: torch.Tensor) -> Answers:
        """What is said of rows that are not asked for is of no use."""
        asked.append(among.nonzero()[:, 0].tolist())
        pairs = list(enumerate(shares.tolist()))
        values = [log_probability[i][share] if i in asked[-1] else 0.0 for i, share in pairs]
        return made_up(values, [pair in says_it or pair[0] not in asked[-1] for pair in pairs])

    wanted = torch.tensor([True, True, True, True, False])
    before = made_up([-5.0] * 5, [False] * 5)
    shares, after = best_shares(answers, before, wanted)
    assert shares.tolist() == [1.0, 0.25, 0.125, 0.0, 0.0]
    assert after.log_probability == [-1.0, -2.0, -2.5, -5.0, -5.0]
    assert after.all_correct.tolist() == [True, False, True, False, False]
    # No more looks than there are shares, and at none but the rows that it is not decided for.
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]]


def test_targets_are_scored_at_their_own_tokens():
    torch.manual_seed(0)
    tokens = torch.tensor([[-100, 3, 1, -100], [2, -100, -100, -100]])
    rows = EncodedBatch({"input_ids": torch.zeros(2, 4, dtype=torch.long)}, tokens, tokens != -100)
    logits = torch.randn(3, 5)
    logits[1, 1] = 9.0
    answers = score_targets(rows, logits)
    each = [float(logits[i].softmax(-1)[label].log()) for i, label in enumerate([3, 1, 2])]
    assert answers.log_probability == pytest.approx([each[0] + each[1], each[2]], rel=1e-5)
    assert answers.min_log_probability == pytest.approx([min(each[:2]), each[2]], rel=1e-5)
    assert answers.tokens == [[int(logits[0].argmax()), 1], [int(logits[2].argmax())]]
    assert answers.correct[0][1] and answers.all_correct.tolist() == [all(one) for one in answers.correct]


def rows_of(count: int) -> EncodedBatch:
    tokens = torch.zeros(count, 1, dtype=torch.long)
    return EncodedBatch({"input_ids": tokens}, tokens, tokens == 0)


def by_group(count: int, sizes_steps: bool = True) -> tuple[BatchState, AcceptByGroup]:
    """A group of rows whose targets have a log-probability of -5 before the edit."""
    method = SimpleNamespace(joins=True, sizes_steps=sizes_steps)
    before = made_up([-5.0] * count, [False] * count)
    batch = BatchState(rows_of(count), None, before, torch.ones(count, dtype=torch.bool))
    return batch, AcceptByGroup([batch], SimpleNamespace(context=SimpleNamespace(method=method)), None)


def asked(count: int, size: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {"layer": (torch.ones(count, 1, 2), torch.full((count, 1, 1), size))}


@pytest.mark.parametrize(("sizes_steps", "wanted"), [(True, [False, True, True, True]), (False, [False] * 3 + [True])])
def test_a_target_is_said_for_good_from_a_tenth_of_a_nat_on(sizes_steps, wanted):
    """Rows whose least likely token has less ask for more, also where it is the argmax; others once it is."""
    batch, acceptance = by_group(4, sizes_steps)
    acceptance.accept(0, (asked(4, 1.0), [1] * 4))
    batch.answers = made_up([-0.09, -0.11, -0.9, -0.9], [True, True, True, False])
    acceptance.judge()
    assert batch.wanted.tolist() == wanted and not acceptance.reverted


def test_a_step_that_leads_no_nearer_is_halved_three_times_and_then_taken_back():
    """The second row is nearer with a quarter of the step, and stays there."""
    batch, acceptance = by_group(2)
    acceptance.accept(0, (asked(2, 8.0), [1, 1]))
    seen = []
    for levels in ([-6.0, -6.0], [-5.0, -5.5], [-5.1, -4.0], [-9.0, -4.0]):
        batch.answers = made_up(levels, [False, False])
        acceptance.judge()
        seen.append(batch.residuals["layer"].flatten().tolist())
        assert acceptance.reverted, "a look is due"
    assert seen == [[4.0, 4.0], [2.0, 2.0], [1.0, 2.0], [0.0, 2.0]]
    assert batch.wanted.tolist() == [False, True], "a row whose step is taken back asks for no other"
    assert not acceptance.progress[0].tried.any()


@pytest.mark.parametrize(("forms", "last"), [(1, 3), (2, 6)])
def test_a_step_is_halved_more_often_where_a_target_is_to_be_said_in_several_forms(forms, last):
    batch, acceptance = by_group(1)
    batch.rows.forms = forms
    acceptance.accept(0, (asked(1, 64.0), [1]))
    seen = []
    for _ in range(last + 1):
        batch.answers = made_up([-6.0], [False])
        acceptance.judge()
        seen.append(float(batch.residuals["layer"]))
    assert seen == [*(64.0 / 2**n for n in range(1, last + 1)), 0.0]


def test_halving_starts_from_the_steps_before():
    batch, acceptance = by_group(1)
    acceptance.accept(0, (asked(1, 8.0), [1]))
    batch.answers = made_up([-4.0], [False])
    acceptance.judge()
    acceptance.accept(0, (asked(1, 8.0), [1]))
    batch.answers = made_up([-4.5], [False])
    acceptance.judge()
    assert batch.residuals["layer"].flatten().tolist() == [12.0] and batch.steps == [2]


def test_in_the_end_a_group_goes_back_to_where_it_said_most():
    """Counted by probabilities, over all its rows: one row's gain may be the others' loss."""
    batch, acceptance = by_group(2, sizes_steps=False)
    for size, levels in ((1.0, [-1.0, -1.0]), (1.0, [-0.5, -4.0])):
        acceptance.accept(0, (asked(2, size), [1, 1]))
        batch.answers = made_up(levels, [False, False])
        acceptance.judge()
    # exp(-1) + exp(-1) = 0.74, and 0.62 after the second step.
    corrected = [correct() for correct in acceptance.corrections]
    assert corrected[-1] and batch.residuals["layer"].flatten().tolist() == [1.0, 1.0] and batch.steps == [1, 1]
