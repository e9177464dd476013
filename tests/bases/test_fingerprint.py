"""An editor's id, which is found once and again when a weight has changed."""

from __future__ import annotations

import torch
from support.counting import Counting
from support.methods import SHAPES

from hf_mend import EditorConfig
from hf_mend.bases.fingerprint import editor_id, forget_editor_id
from hf_mend.methods.mend import Mend


def test_an_editor_is_looked_at_once_until_a_weight_changes():
    torch.manual_seed(0)
    method = Mend(EditorConfig(rank=4), SHAPES)
    first = editor_id(method, "mend")
    with Counting(method) as counting:
        assert editor_id(method, "mend") == first
        assert editor_id(method, "malmen").removeprefix("malmen") == first.removeprefix("mend")
    assert counting.waits == counting.kernels == 0
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    sum(parameter.square().sum() for parameter in method.parameters()).backward()
    optimizer.step()
    second = editor_id(method, "mend")
    method.load_state_dict({name: value + 1 for name, value in method.state_dict().items()})
    third = editor_id(method, "mend")
    method.groups[0].log_step = torch.nn.Parameter(torch.full_like(method.groups[0].log_step, 9.0))
    assert len({first, second, third, editor_id(method, "mend")}) == 4


def test_a_change_that_torch_does_not_count_is_seen_once_the_id_is_forgotten():
    method = Mend(EditorConfig(rank=4), SHAPES)
    first = editor_id(method, "mend")
    method.groups[0].log_step.data.add_(1.0)
    forget_editor_id(method)
    assert editor_id(method, "mend") != first


def test_weights_whose_changes_are_not_counted_are_looked_at_each_time():
    with torch.inference_mode():
        method = Mend(EditorConfig(rank=4), SHAPES)
        first = editor_id(method, "mend")
        method.groups[0].log_step.add_(1.0)
        assert editor_id(method, "mend") != first
