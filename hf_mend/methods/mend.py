"""MEND: editor networks on the gradient's factors (Mitchell et al. 2022, "Fast Model Editing at Scale", section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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

    def forward(self, z: torch.Tensor, counts: list[int]) -> torch.Tensor:  # (tokens, width) -> the same
        out = nn.functional.linear(nn.functional.linear(z, self.down), self.up, self.bias)
        parts = zip(out.split(counts), self.scale, self.shift, strict=True)
        out = torch.cat([part * scale + shift for part, scale, shift in parts])
        if self.activation:
            out = nn.functional.relu(out)
        return z + out if self.residual else out


class EditorNetwork(nn.Module):
    """
    `num_hidden_layers` low-rank layers with ReLU and one without, for `layers` edited layers at once: their tokens are
    concatenated layer by layer, and `counts` holds the number of tokens of each.
    """

    def __init__(self, width: int, layers: int, config: MendConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            LowRankLayer(width, config.rank, layers, config.init, activation=i < config.num_hidden_layers)
            for i in range(config.num_hidden_layers + 1)
        )

    def forward(self, z: torch.Tensor, counts: list[int]) -> torch.Tensor:  # (tokens, width) -> the same
        for layer in self.layers:
            z = layer(z, counts)
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

    def forward(self, x: torch.Tensor, delta: torch.Tensor, counts: list[int]) -> Update:
        """
        Return the updates of the layers' tokens, which are concatenated layer by layer.

        Args:
            x (`torch.Tensor` of shape `(tokens, d_in)`), delta (`torch.Tensor` of shape `(tokens, d_out)`): Factors.
            counts (`list[int]`): The number of tokens of each layer.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `u`, `v` of the same shapes, the step included.
        """
        if self.config.normalize:
            x = _each(self.x_stats, x, counts)
            delta = _each(self.delta_stats, delta, counts)
        if self.transform == "both":
            u, v = self.networks[0](torch.cat([x, delta], -1), counts).split([x.shape[-1], delta.shape[-1]], -1)
        elif self.transform == "both_separate":
            u, v = self.networks[0](x, counts), self.networks[1](delta, counts)
        elif self.transform == "x":
            u, v = self.networks[0](x, counts), delta
        else:
            u, v = x, self.networks[0](delta, counts)
        if self.config.whiten:
            u = torch.cat([self.whitened(i, part) for i, part in enumerate(u.split(counts))])
        step = self.config.edit_lr * self.log_step.exp()
        return u, torch.cat([part * -size for part, size in zip(v.split(counts), step, strict=True)])  # downhill

    def whitened(self, index: int, u: torch.Tensor) -> torch.Tensor:
        """
        Return `M^-1 u` for a layer's `u`, `(tokens, d_in)`, M being its inputs' second moment plus a ridge: then `u .
        x'` is small for all but inputs like this one.

        M is stored as its leading eigenvectors and one eigenvalue for all others, so that the editor stays small.
        """
        basis = self.whiten_basis[index]
        along = (u @ basis) * self.whiten_shrink[index]  # (tokens, rank)
        u = (u - along @ basis.T) * self.whiten_scale[index]
        # From normalised components to the layer's own.
        return u / (self.x_stats[index].variance.sqrt() + 1e-8) if self.config.normalize else u

    def _input_scale(self) -> torch.Tensor:
        if not self.config.normalize:
            return torch.ones(1, 1, device=self.whiten_scale.device, dtype=torch.float32)
        return torch.stack([stats.variance.sqrt() + 1e-8 for stats in self.x_stats])

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
        updates: dict[str, Update] = {}
        for group in self.groups:
            device = group.log_step.device  # the layers may be on several
            pairs = [tuple(side.to(device) for side in factors[name]) for name in group.names]
            # Only tokens that have a gradient: of the last block these are few.
            present = [(delta != 0).any(-1).nonzero(as_tuple=True) for _, delta in pairs]
            counts = [len(rows) for rows, _ in present]
            x, delta = (
                torch.cat([pair[side][at] for pair, at in zip(pairs, present, strict=True)]) for side in (0, 1)
            )  # (tokens, d_in), (tokens, d_out)
            u, v = (side.split(counts) for side in group(x, delta, counts))
            for i, name in enumerate(group.names):
                x, delta = pairs[i]
                updates[name] = (
                    torch.zeros_like(x, dtype=u[i].dtype).index_put(present[i], u[i]),
                    torch.zeros_like(delta, dtype=v[i].dtype).index_put(present[i], v[i]),
                )
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


def _each(modules: Iterable[nn.Module], values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Apply each layer's module to that layer's tokens."""
    return torch.cat([module(part) for module, part in zip(modules, values.split(counts), strict=True)])
