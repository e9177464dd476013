"""MEND: editor networks on the gradient's factors (Mitchell et al. 2022, "Fast Model Editing at Scale", section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..bases.fused import stacked
from ..config import EditorConfig, option
from ..edits.low_rank import Update
from .base import EditMethod, register_method
from .ridge import SecondMoment, leading_eigenvectors


@dataclass
class MendConfig(EditorConfig):
    """
    The configuration of [`Mend`]: the paper's design choices and, beyond them, whitening. Each field's help documents
    it. Where a default differs from the paper's choice, the help says so, and benchmarks/results/settings.md has the
    measurement.
    """

    rank: int = option(256, "Rank of the editor networks' weight matrices (paper: 1920).", least=1, most=65536)
    num_hidden_layers: int = option(1, "Hidden layers of an editor network, as in the paper.", least=1, most=64)
    transform: str = option(
        "both",
        "Which factors the networks map: 'both' in one network (the paper), 'both_separate' in two, 'x' only, 'delta' "
        "only, or 'smaller', whichever of the two is narrower.",
        choices=("both", "both_separate", "x", "delta", "smaller"),
    )
    normalize: bool = option(True, "Scale factors to zero mean and unit variance by running statistics (paper).")
    whiten: bool = option(
        True,
        "Multiply the mapped x by the inverse second moment of the layer's inputs, so that an edit acts on what sets "
        "this input apart from text at large. Not in the paper, which has no such step.",
    )
    whiten_ridge: float = option(0.1, "Ridge of that inverse, as a share of the mean variance of an input.")
    whiten_rank: int = option(
        128, "Eigenvectors of the second moment that are kept; the others count as equal.", least=1, most=65536
    )
    init: str = option("identity", "'identity' (paper) or 'xavier'.", choices=("identity", "xavier"))
    shared: bool = option(
        True, "One network for all layers of one shape, with a scale and shift a layer (paper), or one each."
    )
    edit_lr: float = option(1e-3, "Initial step of an edit, of which each layer learns its own.")

    trained_with_scope: ClassVar[bool] = True


class FactorStatistics(nn.Module):
    """
    Mean and variance of a factor's components over the edits seen, as buffers (section 3.2: inputs and gradients
    differ in scale by orders of magnitude between layers, so a network needs them normalised).

    Args:
        width (`int`): Number of components.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def observe(self, values: torch.Tensor) -> None:
        """Merge the moments of `values`, `(tokens, width)`, into the running ones (Chan et al. 1979)."""
        added = values.shape[0]
        if added == 0:
            return
        values = values.double()
        mean, variance = values.mean(0), values.var(0, unbiased=False)
        count = self.count.double()
        total = count + added
        difference = mean - self.mean.double()
        old = self.variance.double() * count if count > 0 else torch.zeros_like(variance)
        self.variance.copy_((old + variance * added + difference.square() * count * added / total) / total)
        self.mean.copy_(self.mean.double() + difference * added / total)
        self.count.copy_(total)

    @property
    def size(self) -> torch.Tensor:
        """Root mean square over edits and components, `()`."""
        return (self.mean.square() + self.variance).mean().sqrt() + 1e-8

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Scale `values` to zero mean and unit variance a component."""
        return (values - self.mean) / (self.variance.sqrt() + 1e-8)


class LowRankLayer(nn.Module):
    """
    `z + act(s * (U V z + b) + o)` with a scale `s` and shift `o` for each edited layer that shares it (equations 4,
    5).

    Args:
        width (`int`): Width of `z`.
        rank (`int`): Rank of the weight `U V`.
        layers (`int`): The number of edited layers that share it.
        init (`str`): `"identity"` starts with `U = 0`, so that the layer returns `z`; `"xavier"` draws both.
        activation (`bool`): Whether ReLU is applied.
    """

    def __init__(self, width: int, rank: int, layers: int, init: str, activation: bool):
        super().__init__()
        rank = min(rank, width)
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width))
        self.shift = nn.Parameter(torch.zeros(layers, width))
        self.activation = activation
        self.residual = init == "identity"
        nn.init.xavier_uniform_(self.down)
        if not self.residual:
            nn.init.xavier_uniform_(self.up)

    def forward(self, z: torch.Tensor) -> torch.Tensor:  # (layers, tokens, width) -> the same
        out = nn.functional.linear(nn.functional.linear(z, self.down), self.up, self.bias)
        out = out * self.scale[:, None] + self.shift[:, None]
        if self.activation:
            out = nn.functional.relu(out)
        return z + out if self.residual else out


class EditorNetwork(nn.Module):
    """`num_hidden_layers` low-rank layers with ReLU and one without, for `layers` edited layers at once."""

    def __init__(self, width: int, layers: int, config: MendConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            LowRankLayer(width, config.rank, layers, config.init, activation=i < config.num_hidden_layers)
            for i in range(config.num_hidden_layers + 1)
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:  # (layers, tokens, width) -> the same
        for layer in self.layers:
            z = layer(z)
        return z


class LayerGroup(nn.Module):
    """
    The edited layers that share one network: all of one shape, or a single layer.

    Args:
        names (`list[str]`): The layers.
        shape (`tuple[int, int]`): Their `(d_out, d_in)`.
        config ([`MendConfig`]): The editor's configuration.
    """

    # torch's type of a module's attribute is "tensor or module".
    x_stats: Any
    delta_stats: Any
    networks: Any
    whiten_basis: torch.Tensor
    whiten_shrink: torch.Tensor
    whiten_scale: torch.Tensor

    def __init__(self, names: list[str], shape: tuple[int, int], config: MendConfig):
        super().__init__()
        self.names = names
        self.config = config
        d_out, d_in = shape
        transform = config.transform
        if transform == "smaller":
            transform = "x" if d_in <= d_out else "delta"
        self.transform = transform
        self.x_stats = nn.ModuleList(FactorStatistics(d_in) for _ in names)
        self.delta_stats = nn.ModuleList(FactorStatistics(d_out) for _ in names)
        widths = {"both": [d_in + d_out], "both_separate": [d_in, d_out], "x": [d_in], "delta": [d_out]}[transform]
        self.networks = nn.ModuleList(EditorNetwork(width, len(names), config) for width in widths)
        self.log_step = nn.Parameter(torch.zeros(len(names)))
        if config.whiten:
            rank = min(config.whiten_rank, d_in)
            self.register_buffer("whiten_basis", torch.zeros(len(names), d_in, rank))
            self.register_buffer("whiten_shrink", torch.zeros(len(names), rank))
            self.register_buffer("whiten_scale", torch.ones(len(names)))
            self._moments = [torch.zeros(d_in, d_in, dtype=torch.float64) for _ in names]
            self._tokens = [0 for _ in names]

    def forward(self, x: torch.Tensor, delta: torch.Tensor) -> Update:
        """
        Return the updates of the layers' tokens.

        Args:
            x (`torch.Tensor` of shape `(layers, tokens, d_in)`), delta (`torch.Tensor` of shape `(layers, tokens,
                d_out)`): Factors.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `u`, `v` of the same shapes, the step included.
        """
        if self.config.normalize:
            x, delta = _normalised(self.x_stats, x), _normalised(self.delta_stats, delta)
        if self.transform == "both":
            u, v = self.networks[0](torch.cat([x, delta], -1)).split([x.shape[-1], delta.shape[-1]], -1)
        elif self.transform == "both_separate":
            u, v = self.networks[0](x), self.networks[1](delta)
        elif self.transform == "x":
            u, v = self.networks[0](x), delta
        else:
            u, v = x, self.networks[0](delta)
        if self.config.whiten:
            u = self.whitened(u)
        step = self.config.edit_lr * self.log_step.exp()
        return u, v * -step[:, None, None]  # downhill

    def whitened(self, u: torch.Tensor) -> torch.Tensor:
        """
        Return `M^-1 u` for the layers' `u`, `(layers, tokens, d_in)`, M being the second moment of a layer's inputs
        plus a ridge: then `u . x'` is small for all but inputs like this one.

        M is stored as its leading eigenvectors and one eigenvalue for all others, so that the editor stays small.
        """
        basis = self.whiten_basis
        along = torch.bmm(u, basis) * self.whiten_shrink[:, None]  # (layers, tokens, rank)
        u = (u - torch.bmm(along, basis.transpose(1, 2))) * self.whiten_scale[:, None, None]
        # From normalised components to the layer's own.
        return u / self._input_scale()[:, None] if self.config.normalize else u

    def _input_scale(self) -> torch.Tensor:
        if not self.config.normalize:
            return torch.ones(1, 1, device=self.whiten_scale.device, dtype=torch.float32)
        return torch.stack([stats.variance for stats in self.x_stats]).sqrt() + 1e-8

    def observe_inputs(self, index: int, x: torch.Tensor) -> None:
        """Add a layer's inputs on calibration text, `(tokens, d_in)`, to its second moment."""
        if self.config.whiten:
            self._moments[index] += (x.T @ x).double().cpu()
            self._tokens[index] += x.shape[0]

    @torch.no_grad()
    def finish_observing(self) -> None:
        """Set the buffers that `whitened` uses from the second moments gathered."""
        if not self.config.whiten:
            return
        for index, (moment, tokens) in enumerate(zip(self._moments, self._tokens, strict=True)):
            if tokens == 0:
                continue
            scale = self._input_scale()[min(index, len(self._input_scale()) - 1)].double().cpu()
            moment = moment / tokens / scale[:, None] / scale[None, :]  # in normalised components, as u is
            leading = leading_eigenvectors(moment, self.whiten_shrink.shape[1], self.config.whiten_ridge)
            self.whiten_basis[index].copy_(leading.basis)
            self.whiten_shrink[index].copy_(leading.shrink)
            self.whiten_scale[index].copy_(leading.scale)

    def second_moment(self, index: int) -> SecondMoment | None:
        """Return the second moment that `whitened` inverts, of a layer's unscaled inputs; `None` without `whiten`."""
        if not self.config.whiten:
            return None
        widths = self._input_scale()[index] if self.config.normalize else None
        return SecondMoment(self.whiten_basis[index], self.whiten_shrink[index], self.whiten_scale[index], widths)


@register_method("mend", MendConfig)
class Mend(EditMethod):
    """
    MEND for a set of layers.

    Args:
        config ([`MendConfig`]): All of the paper's design choices.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: MendConfig
    groups: Any

    def __init__(self, config: MendConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        members: dict[object, list[str]] = {}
        for name, shape in self.shapes.items():
            members.setdefault(shape if config.shared else name, []).append(name)
        self.groups = nn.ModuleList(LayerGroup(names, self.shapes[names[0]], config) for names in members.values())

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        tokens = getattr(factors, "tokens", None)  # of a batch with padding, or where an edit acts at few of them
        updates: dict[str, Update] = {}
        for group in self.groups:
            device = group.log_step.device  # the layers may be on several
            pairs = [factors[name] for name in group.names]
            lengths = [x.shape[1] for x, _ in pairs]  # an encoder's layers and a decoder's have other tokens
            x, delta = (_side(pairs, side, max(lengths), device) for side in (0, 1))  # (layers, edits, seq, width)
            present = (delta != 0).any(-1, keepdim=True)  # (layers, edits, seq, 1)
            sides = _at(x, tokens), _at(delta, tokens)  # (layers, tokens, width)
            found = (_in_place(side, tokens, like) for side, like in zip(group(*sides), (x, delta), strict=True))
            # Where no factor is, no update is. Taken apart at once: autograd would fill a whole for each layer.
            us, vs = (torch.where(present, side, 0.0).unbind() for side in found)
            for name, length, u, v in zip(group.names, lengths, us, vs, strict=True):
                updates[name] = (u, v) if length == u.shape[1] else (u[:, :length], v[:, :length])
        return updates

    def observe_factors(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for group in self.groups:
            for index, name in enumerate(group.names):
                x, delta = factors[name]
                present = (delta != 0).any(-1)
                group.x_stats[index].observe(x[present].to(group.log_step.device))
                group.delta_stats[index].observe(delta[present].to(group.log_step.device))

    def observe_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        for group in self.groups:
            for index, name in enumerate(group.names):
                group.observe_inputs(index, inputs[name])

    def finish_observing(self) -> None:
        for group in self.groups:
            group.finish_observing()

    @property
    def is_calibrated(self) -> bool:
        return all(bool(stats.count > 0) for group in self.groups for stats in group.x_stats)

    @torch.no_grad()
    def scale_steps(self, factor: float) -> None:
        for group in self.groups:
            group.log_step += math.log(factor)


def _normalised(stats: Iterable[FactorStatistics], values: torch.Tensor) -> torch.Tensor:
    """Scale each layer's values by its own statistics, `(layers, tokens, width)`."""
    stats = list(stats)
    means, variances = (torch.stack([getattr(one, name) for one in stats])[:, None] for name in ("mean", "variance"))
    return (values - means) / (variances.sqrt() + 1e-8)


def _side(pairs: Sequence[Update], side: int, length: int, device: torch.device) -> torch.Tensor:
    """Return one side of the layers' factors as one tensor, shorter ones with zeros behind."""
    parts = [pair[side].to(device) for pair in pairs]
    return stacked([nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) if x.shape[1] < length else x for x in parts])


def _at(values: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """Return the values of some tokens, `(layers, edits, seq, width)` -> `(layers, tokens, width)`."""
    values = values.flatten(1, 2)
    return values if tokens is None else values.index_select(1, tokens.to(values.device))


def _in_place(values: torch.Tensor, tokens: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Undo [`_at`]; the other tokens get zeros."""
    if tokens is not None:
        whole = torch.zeros(like.flatten(1, 2).shape, dtype=values.dtype, device=values.device)
        values = whole.index_copy(1, tokens.to(values.device), values)
    return values.reshape(like.shape)
