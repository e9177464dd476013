"""MEND's design choices, each against what the paper says it does."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.methods import SHAPES, factors

from hf_mend import EditorConfig
from hf_mend.bases.gradients import Factors
from hf_mend.methods import get_method
from hf_mend.methods.mend import FactorStatistics, Mend


@pytest.mark.parametrize(
    ("transform", "normalize", "init", "shared", "whiten"),
    list(
        itertools.product(
            ["both", "both_separate", "x", "delta", "smaller"],
            [True, False],
            ["identity", "xavier"],
            [True, False],
            [True, False],
        )
    ),
)
def test_every_choice_gives_updates_of_the_right_shape_and_a_gradient(transform, normalize, init, shared, whiten):
    config = EditorConfig(transform=transform, normalize=normalize, init=init, shared=shared, whiten=whiten, rank=4)
    method = Mend(config, SHAPES)
    method.observe_factors(factors(seed=1))
    method.observe_inputs({name: x.flatten(0, 1) for name, (x, _) in factors(seed=1).items()})
    method.finish_observing()
    updates = method(factors())
    total = 0
    for name, (d_out, d_in) in SHAPES.items():
        u, v = updates[name]
        assert u.shape == (2, 5, d_in) and v.shape == (2, 5, d_out)
        assert not u[0, 3:].any() and not v[0, 3:].any(), "no factor, no update"
        total = total + (v.transpose(1, 2) @ u).square().sum()
    total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in method.parameters())


def test_identity_initialisation_is_a_step_down_the_gradient():
    config = EditorConfig(normalize=False, whiten=False, edit_lr=0.5)
    method = Mend(config, SHAPES)
    for name, (u, v) in method(factors()).items():
        x, delta = factors()[name]
        torch.testing.assert_close(v.transpose(1, 2) @ u, -0.5 * delta.transpose(1, 2) @ x)


def test_an_edit_does_not_depend_on_the_others_in_its_batch():
    method = Mend(EditorConfig(rank=4, whiten=False), SHAPES)
    method.observe_factors(factors(seed=1))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    together = method(factors())
    for i in range(2):
        alone = method({name: (x[i : i + 1], delta[i : i + 1]) for name, (x, delta) in factors().items()})
        for name in SHAPES:
            for one, all_ in zip(alone[name], together[name], strict=True):
                torch.testing.assert_close(one[0], all_[i])


def test_layers_of_one_shape_run_together_as_each_does_alone():
    """Equations 3 to 5 with whitening, written out for one layer and one token after the other."""
    method = Mend(EditorConfig(rank=4, edit_lr=0.7), SHAPES)
    method.observe_factors(factors(seed=1))
    method.observe_inputs({name: x.flatten(0, 1) for name, (x, _) in factors(seed=1).items()})
    method.finish_observing()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = method(factors())
    for group in method.groups:
        for i, name in enumerate(group.names):
            x, delta = factors()[name]
            x_stats, delta_stats = group.x_stats[i], group.delta_stats[i]
            for edit, token in itertools.product(range(2), range(5)):
                if not delta[edit, token].any():
                    assert not found[name][0][edit, token].any() and not found[name][1][edit, token].any()
                    continue
                z = torch.cat([x_stats(x[edit, token]), delta_stats(delta[edit, token])])
                for layer in group.networks[0].layers:
                    inner = layer.scale[i] * (layer.up @ (layer.down @ z) + layer.bias) + layer.shift[i]
                    z = z + (inner.relu() if layer.activation else inner)
                u, v = z[: x.shape[-1]], z[x.shape[-1] :] * -0.7 * group.log_step[i].exp()
                basis = group.whiten_basis[i]
                u = (u - basis @ (group.whiten_shrink[i] * (basis.T @ u))) * group.whiten_scale[i]
                u = u / (x_stats.variance.sqrt() + 1e-8)
                torch.testing.assert_close(found[name][0][edit, token], u, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found[name][1][edit, token], v, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_known_to_have_no_gradient_are_left_out_and_change_nothing(monkeypatch):
    method = Mend(EditorConfig(rank=4), SHAPES)
    method.observe_factors(factors(seed=1))
    seen, forward = [], type(method.groups[0]).forward
    monkeypatch.setattr(
        type(method.groups[0]), "forward", lambda self, x, delta: seen.append(x.shape[1]) or forward(self, x, delta)
    )
    given = factors()
    every = method(given)
    known = method(Factors(given, torch.tensor([0, 1, 2, 5, 6, 7, 8, 9])))
    assert seen == [10, 10, 8, 8]
    for name in SHAPES:
        for one, other in zip(every[name], known[name], strict=True):
            torch.testing.assert_close(one, other)


def test_layers_that_see_other_tokens_run_together_too():
    """An encoder's layers and a decoder's."""
    method = Mend(EditorConfig(rank=4), SHAPES)
    method.observe_factors(factors(seed=1))
    given = factors()
    shorter = {name: (x[:, :2], delta[:, :2]) if name == "b.fc1" else (x, delta) for name, (x, delta) in given.items()}
    whole, found = method(given), method(shorter)
    assert found["b.fc1"][0].shape[1] == 2
    for one, other in zip(found["b.fc1"], whole["b.fc1"], strict=True):
        torch.testing.assert_close(one, other[:, :2])


def test_statistics_are_those_of_all_values_at_once():
    stats = FactorStatistics(6)
    values = 3 + 2 * torch.randn(50, 6)
    for part in values.split([7, 1, 30, 12]):
        stats.observe(part)
    stats.observe(values[:0])
    torch.testing.assert_close(stats.mean, values.mean(0))
    torch.testing.assert_close(stats.variance, values.var(0, unbiased=False))
    normalised = stats(values)
    torch.testing.assert_close(normalised.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(0, unbiased=False), torch.ones(6))


@pytest.mark.parametrize("normalize", [True, False])
def test_whitened_keys_meet_inputs_in_the_mahalanobis_product(normalize):
    """What an edit adds at an input `x'` is `v * (u . x')`; whitened, `u . x'` is `x_hat^T (M + ridge)^-1 x'`."""
    config = EditorConfig(normalize=normalize, whiten=True, whiten_ridge=0.2, edit_lr=1.0)
    shapes = {"layer": (4, 6)}
    method = Mend(config, shapes)
    mixing = torch.randn(6, 6)
    text = torch.randn(300, 6) @ mixing
    pair = {"layer": (torch.randn(1, 3, 6), torch.randn(1, 3, 4))}
    method.observe_factors({"layer": (torch.randn(2, 9, 6) * 3, torch.randn(2, 9, 4))})
    for part in text.split(100):
        method.observe_inputs({"layer": part})
    method.finish_observing()
    stats = method.groups[0].x_stats[0]
    scale = stats.variance.sqrt() if normalize else torch.ones(6)
    x_hat = (pair["layer"][0][0] - stats.mean) / scale if normalize else pair["layer"][0][0]
    scaled = text / scale
    moment = scaled.T @ scaled / len(text)
    ridge = 0.2 * moment.diagonal().mean() * torch.eye(6)
    other = torch.randn(6)
    expected = x_hat @ torch.linalg.inv(moment + ridge) @ (other / scale)
    torch.testing.assert_close(method(pair)["layer"][0][0] @ other, expected, rtol=1e-3, atol=1e-4)


def test_layers_of_one_shape_share_a_network_and_differ_by_scale_and_shift():
    shared, apart = Mend(EditorConfig(rank=4), SHAPES), Mend(EditorConfig(rank=4, shared=False), SHAPES)
    assert [group.names for group in shared.groups] == [["a.fc1", "b.fc1"], ["a.fc2"]]
    assert [group.names for group in apart.groups] == [["a.fc1"], ["b.fc1"], ["a.fc2"]]
    assert shared.groups[0].networks[0].layers[0].scale.shape == (2, 20)
    assert shared.groups[0].log_step.shape == (2,)


def test_the_smaller_side_alone_is_mapped():
    method = Mend(EditorConfig(transform="smaller", rank=4, normalize=False, whiten=False, edit_lr=1.0), SHAPES)
    assert [group.transform for group in method.groups] == ["x", "delta"]
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter))
    updates, given = method(factors()), factors()
    assert not torch.allclose(updates["a.fc1"][0], given["a.fc1"][0])
    torch.testing.assert_close(updates["a.fc2"][0], given["a.fc2"][0])


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_the_number_of_hidden_layers(hidden):
    network = Mend(EditorConfig(num_hidden_layers=hidden, rank=4), SHAPES).groups[0].networks[0]
    assert [layer.activation for layer in network.layers] == [True] * hidden + [False]


def test_an_unknown_method():
    known = r"the methods are \[.*'gradient', .*'malmen', 'memit', 'mend'"
    with pytest.raises(ValueError, match=f"method is 'nope'; {known}"):
        get_method("nope")
