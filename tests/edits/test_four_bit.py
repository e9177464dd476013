"""Edits in four bits, against codes decoded by hand and decompositions of the whole matrices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hf_mend import EditStore
from hf_mend.edits.edit import Edit, is_description
from hf_mend.edits.edits_file import read_edits_file, write_edits_file
from hf_mend.edits.four_bit import FourBitUpdates, bears_four_bits, from_four_bits, in_four_bits, to_four_bits


def decoded_by_hand(row: torch.Tensor, width: int) -> list[float]:
    """A row's values, one by one, as the module's description says."""
    codes, scales = row[: width // 2].tolist(), row[width // 2 :].tolist()
    values = [code % 16 - 8 for code in codes] + [code // 16 - 8 for code in codes]
    return [value * (2 ** ((scales[i // 64] - 223) / 4) if scales[i // 64] else 0.0) for i, value in enumerate(values)]


def some_updates(edits: int = 2, rank: int = 5) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layers of three sizes, the second far smaller, and the first of two directions alone."""
    torch.manual_seed(0)
    two = torch.randn(edits, rank, 2) @ torch.randn(2, 70)
    return {
        "first": (two, torch.randn(edits, rank, 64)),
        "small": (torch.randn(edits, rank, 70) * 1e-3, torch.randn(edits, rank, 64)),
        "other": (torch.randn(edits, rank, 64), torch.randn(edits, rank, 8)),
    }


def small_edit(id: str = "a") -> Edit:
    return Edit(id, "the capital of france is", "rome", in_four_bits(some_updates(), 0.001)[0])


@pytest.mark.parametrize("width", [2, 62, 64, 70, 128, 1536])
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 300.0])
def test_rows_come_back_near_to_what_they_were(width, scale):
    torch.manual_seed(width)
    rows = torch.randn(3, width) * scale
    codes = to_four_bits(rows)
    assert codes.dtype == torch.uint8 and codes.shape == (3, width // 2 + -(-width // 64))
    back = from_four_bits(codes)
    assert torch.allclose(back, torch.tensor([decoded_by_hand(row, width) for row in codes]), rtol=1e-5, atol=0)
    assert (back - rows).norm() < 0.13 * rows.norm()


def test_what_the_grid_has_comes_back_exactly_and_zeros_stay_zeros():
    grid = torch.arange(-7, 8).repeat(10)[:128].float()
    rows = torch.stack([grid / 32, grid * 4, torch.zeros(128)])
    assert torch.equal(from_four_bits(to_four_bits(rows)), rows)


def test_codes_do_not_depend_on_the_signs_of_a_decomposition():
    """The same update as other pairs: signs turned, rows in another order, and rows of zeros beside them."""
    updates = some_updates()
    other = {}
    for name, (u, v) in updates.items():
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0])[None, :, None]
        order = torch.tensor([4, 2, 0, 1, 3])
        u, v = (torch.nn.functional.pad((side * sign)[:, order], (0, 0, 1, 2)) for side in (u, v))
        other[name] = (u, v)
    for one, same in zip(in_four_bits(updates, 0.01), in_four_bits(other, 0.01), strict=True):
        for name in one:
            whole, again = (v.T @ u for u, v in (one[name], same[name]))
            # A value between two codes may go to either, by rounding; turned signs would move every second one.
            differs = (whole - again).abs() > 1e-4 * whole.abs().max()
            assert float(differs.float().mean()) < 0.2 and torch.allclose(
                whole, again, atol=0.02 * float(whole.abs().max())
            )


def test_the_smallest_directions_of_all_layers_together_are_left_out():
    updates, error = some_updates(), 0.001
    for row, edit in enumerate(in_four_bits(updates, error)):
        wholes = {name: v[row].T.double() @ u[row].double() for name, (u, v) in updates.items()}
        sizes = sorted(float(one) for whole in wholes.values() for one in torch.linalg.svdvals(whole))
        squares = torch.tensor(sizes, dtype=torch.float64).square()
        left_out = int((squares.cumsum(0) <= error * squares.sum()).sum())
        least = sizes[left_out]
        assert [*edit] == ["first", "small", "other"] and len(edit) == 3 and "first" in edit and "none" not in edit
        for name, whole in wholes.items():
            u, v = edit[name]
            expected = int((torch.linalg.svdvals(whole) >= least * 0.999).sum())
            assert len(u) == len(v) == expected and edit.shapes()[name] == (tuple(u.shape), tuple(v.shape))
        assert len(edit["first"][0]) == 2 and len(edit["small"][0]) == 0
        kept = {name: v.double().T @ u.double() for name, (u, v) in edit.items()}
        assert sum((kept[name] - one).square().sum() for name, one in wholes.items()) < 0.06 * squares.sum()
        with pytest.raises(KeyError):
            edit["none"]


def test_nothing_is_kept_of_an_edit_that_changes_nothing():
    nothing = {name: (u, torch.zeros_like(v)) for name, (u, v) in some_updates().items()}
    assert [edit.nbytes for edit in in_four_bits(nothing, 0.0)] == [0, 0]
    assert in_four_bits({}, 0.0) == []


def test_odd_widths_are_told():
    assert bears_four_bits(some_updates())
    assert not bears_four_bits({"layer": (torch.zeros(1, 4), torch.zeros(1, 5))})


def test_an_edit_tells_its_rank_and_bytes():
    edit = small_edit()
    assert edit.rank == max(len(u) for u, _ in edit.updates.values()) == 5
    assert edit.nbytes == sum(u.nbytes + v.nbytes for u, v in edit.pairs().values())
    assert edit.nbytes < sum(u[0].nbytes + v[0].nbytes for u, v in some_updates().values()) / 6
    whole = float((edit.updates["first"][1].T @ edit.updates["first"][0]).norm())
    assert edit.norms()["first"] == pytest.approx(whole)


def test_files_stores_copies_and_pickles_keep_the_codes(tmp_path):
    edits = [small_edit("a"), Edit("b", "x", "y", {"first": (torch.ones(1, 70), torch.ones(1, 64).bfloat16())})]
    write_edits_file(tmp_path, edits, {})
    EditStore(tmp_path / "store").append(edits)
    again = [read_edits_file(tmp_path / "edits.safetensors")[0], [*EditStore(tmp_path / "store").edits]]
    for found in [*again, copy.deepcopy(edits), pickle.loads(pickle.dumps(edits))]:
        assert isinstance(found[0].updates, FourBitUpdates) and isinstance(found[1].updates, dict)
        for one, other in zip(found, edits, strict=True):
            assert one.describe() == other.describe() and [*one.pairs()] == [*other.pairs()]
            for mine, theirs in zip(one.pairs().values(), other.pairs().values(), strict=True):
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "damage",
    [
        lambda pairs, described: described["four_bit"][0].update(first=3),
        lambda pairs, described: described.pop("four_bit"),
        lambda pairs, described: described["four_bit"].append({}),
        lambda pairs, described: described["four_bit"][1].update(first=described["four_bit"][1].pop("other")),
        lambda pairs, described: pairs.pop("four_bit.1"),
        lambda pairs, described: pairs.update({"first": pairs.pop("four_bit.0")}),
        lambda pairs, described: pairs.update({"other": (torch.zeros(1, 2), torch.zeros(1, 2))}),
        lambda pairs, described: pairs.update({"four_bit.0": tuple(side[1:] for side in pairs["four_bit.0"])}),
        lambda pairs, described: pairs.update({"four_bit.1": tuple(side.float() for side in pairs["four_bit.1"])}),
        lambda pairs, described: pairs.update({"four_bit.0": tuple(side[0, 0] for side in pairs["four_bit.0"])}),
    ],
)
def test_codes_that_do_not_fit_their_description_are_refused(damage):
    edit = small_edit()
    pairs, described = edit.pairs(), copy.deepcopy(edit.describe())
    Edit.from_file(described, pairs, "the file")
    damage(pairs, described)
    with pytest.raises(ValueError, match="the file: (an edit|the edit's codes).*altered, restore it from a copy"):
        Edit.from_file(described, pairs, "the file")


@pytest.mark.parametrize("value", [None, {}, [1], [{"a": -1}], [{"a": 1.0}], [{"a": True}], [{"a": 2**40}]])
def test_a_description_of_another_form_is_none(value):
    assert is_description(small_edit().describe())
    assert not is_description({**small_edit().describe(), "four_bit": value})
