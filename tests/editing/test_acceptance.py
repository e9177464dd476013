"""Which share of a step a row takes, on answers that are made up."""

from __future__ import annotations

import pytest
import torch

from hf_mend.data.encoding import EncodedBatch
from hf_mend.editing.acceptance import best_shares
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
    asked: list[list[float]] = []

    def answers(shares: torch.Tensor) -> Answers:
        asked.append(shares.tolist())
        pairs = list(enumerate(shares.tolist()))
        return made_up([log_probability[i][share] for i, share in pairs], [pair in says_it for pair in pairs])

    wanted = torch.tensor([True, True, True, True, False])
    before = made_up([-5.0] * 5, [False] * 5)
    shares, after = best_shares(answers, before, wanted)
    assert shares.tolist() == [1.0, 0.25, 0.125, 0.0, 0.0]
    assert after.log_probability == [-1.0, -2.0, -2.5, -5.0, -5.0]
    assert after.all_correct.tolist() == [True, False, True, False, False]
    assert len(asked) == 4, "no more looks than there are shares"


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
