"""An edit's description, and the names that its fields had."""

from __future__ import annotations

import pytest
import torch

from hf_mend import Edit


def test_a_description_keeps_the_names_that_files_have_and_comes_back():
    update = {"a": (torch.ones(1, 2), torch.ones(1, 3))}
    delta = Edit("enn-1", "", "", update, is_base_delta=True)
    edit = Edit("one", "who?", "they", update, {"chat": "false"}, enabled=False, replaces=["zero"], requires="enn-1")
    assert delta.describe()["support"] is True and edit.describe()["needs"] == "enn-1"
    assert not {"requires", "is_base_delta"} & (delta.describe().keys() | edit.describe().keys())
    for one in (delta, edit):
        assert Edit.from_file(one.describe(), one.pairs(), "a file") == one


def test_the_former_names_of_the_fields_warn_and_give_the_same():
    edit = Edit("one", "who?", "they", {}, requires="enn-1")
    with pytest.warns(FutureWarning, match="Edit.needs is now called requires"):
        assert edit.needs == "enn-1"
    with pytest.warns(FutureWarning, match="Edit.support is now called is_base_delta"):
        assert edit.support is False
