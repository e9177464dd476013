"""An edit's description, and the names that its fields had."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_mend import Edit
from hf_mend.edits.edit_scope import EditScope
from hf_mend.edits.four_bit import in_four_bits


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda pairs: pairs.pop("scope.keys"),
        lambda pairs: pairs.update({"scope.keys": (pairs["scope.keys"][0][:1], pairs["scope.keys"][1])}),
        lambda pairs: pairs.update({"scope.keys": tuple(side.to(torch.uint8) for side in pairs["scope.keys"])}),
        lambda pairs: pairs.update({"scope.keys": (pairs["scope.keys"][0], pairs["scope.keys"][1][0])}),
        lambda pairs: pairs.update({"scope.keys": (pairs["scope.keys"][0][..., :4], pairs["scope.keys"][1])}),
        lambda pairs: pairs.update({"scope.excluded": (torch.ones(1, 4), torch.zeros(1, 1))}),
        lambda pairs: pairs.update({"scope.excluded": (pairs["scope.excluded"][0], torch.zeros(0, 1))}),
        lambda pairs: pairs.update({"scope.excluded": (pairs["scope.excluded"][0][0], torch.zeros(1, 1))}),
        lambda pairs: pairs.update(
            {"scope.excluded": (pairs["scope.excluded"][0], torch.ones(1, 1))}
        ),  # stands for none
    ],
)
def test_a_scope_whose_tensors_do_not_fit_is_refused(damage):
    scope = EditScope("scope-x", torch.ones(2, 8), torch.zeros(2), ["a", "b"], torch.ones(1, 8), ["c"])
    edit = Edit("a", "p", "t", {}, scope=scope)
    described, pairs = edit.describe(), edit.pairs()
    assert Edit.from_file(described, pairs, "the file").scope is not None
    damage(pairs)
    with pytest.raises(ValueError, match="the file: the edit's scope has keys .*altered, restore it from a copy"):
        Edit.from_file(described, pairs, "the file")


def scoped_edit(**more) -> Edit:
    """An edit with a scope; each call makes tensors of its own."""
    scope = EditScope("scope-x", torch.ones(2, 8), torch.zeros(2), ["a", "b"], torch.ones(1, 8), ["c"])
    return Edit("one", "who?", "they", {"layer": (torch.ones(2, 4), torch.ones(2, 3))}, scope=scope, **more)


def test_edits_are_equal_if_all_that_a_file_keeps_is():
    edit = scoped_edit()
    assert edit == scoped_edit() and edit != "one" and edit.scope != "scope-x" and [edit] == [scoped_edit()]
    assert edit != scoped_edit(enabled=False) and edit != scoped_edit(metadata={"chat": "true"})
    for change in (
        lambda other: other.updates["layer"][1][0, 0].add_(1e-6),
        lambda other: other.updates.update(layer=(torch.ones(1, 4), torch.ones(1, 3))),
        lambda other: other.updates.update(layer=tuple(side.double() for side in other.updates["layer"])),
        lambda other: other.updates.update(another=other.updates["layer"]),
        lambda other: other.scope.keys[1, 7].add_(1e-6),
        lambda other: other.scope.thresholds[0].add_(1e-6),
        lambda other: other.scope.excluded[0, 0].add_(1e-6),
        lambda other: other.scope.texts.append("d"),
        lambda other: setattr(other, "scope", None),
    ):
        other = scoped_edit()
        change(other)
        assert edit != other


def test_edits_in_four_bits_are_compared_by_their_codes():
    batch = {"layer": (torch.ones(1, 2, 64), torch.ones(1, 2, 64))}
    one, same = (replace(scoped_edit(), updates=in_four_bits(batch, 0.1)[0]) for _ in range(2))
    assert one == same and one != scoped_edit()
    same.updates.parts[0].u[0, 0] += 1
    assert one != same
