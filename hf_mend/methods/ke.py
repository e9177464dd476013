"""KnowledgeEditor: a recurrent network reads the edit and gates its gradient (De Cao et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from ..config import option
from ..edits.low_rank import Update
from .base import register_method
from .steps import LearnedSteps, LearnedStepsConfig


@dataclass
class KnowledgeEditorConfig(LearnedStepsConfig):
    """
    The configuration of [`KnowledgeEditor`], with the options of [`LearnedStepsConfig`]. Each field's help documents
    it.
    """

    rank: int = option(
        256,
        "Width of the LSTM, in each of its two directions, and of the networks that map its condensed state.",
        least=1,
        most=65536,
    )
    num_hidden_layers: int = option(1, "Hidden layers of the networks that map the LSTM's state.", least=1, most=64)
    init: str = option(
        "identity",
        "'identity': training starts from the gradient's own step; 'xavier': each network's last layer is random.",
        choices=("identity", "xavier"),
    )

    trained_with_scope: ClassVar[bool] = True


@register_method("ke", KnowledgeEditorConfig)
class KnowledgeEditor(LearnedSteps):
    """
    KnowledgeEditor (De Cao, Aziz and Titov 2021, "Editing Factual Knowledge in Language Models"): of each edited
    matrix's gradient `G`, `(d_out, d_in)`, an LSTM that has read the edit makes the update

        `-step * sigmoid(eta) * (softmax(alpha) gamma^T * G + softmax(beta) delta^T)`

    with five predicted parts a matrix: the vectors alpha and beta of `d_out` entries, gamma and delta of `d_in`, and
    the number eta. As `G = sum_t delta_t x_t^T`, the gated gradient is `sum_t (softmax(alpha) * delta_t)(gamma *
    x_t)^T`: the update stays a pair of thin matrices, with one more row for the second term.

    Differences from the paper: the LSTM reads not the words of input and target but the factors of their gradient, the
    lowest edited layer's inputs and output gradients at each position (the target's last token is never an
    input of a teacher-forced pass; its gradient holds it). Both softmaxes are multiplied by their width, so that they
    are 1 on average, and factors are divided by their root mean square: together with gamma 1 and delta 0 at first,
    training starts from a plain gradient step. It is trained with MEND's loss, not under the paper's constraint.

    Args:
        config ([`KnowledgeEditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: KnowledgeEditorConfig
    gates: Any

    def __init__(self, config: KnowledgeEditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self._read = next(iter(self.shapes))  # the lowest layer
        width = config.rank
        self.lstm = nn.LSTM(sum(self.shapes[self._read]), width, batch_first=True, bidirectional=True)
        self.condense = nn.Linear(2 * width, width)
        self.gates = nn.ModuleList(GateNetwork(shape, config) for shape in self.shapes.values())

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        state = self.condensed(factors)
        updates: dict[str, Update] = {}
        for i, (name, (x, delta)) in enumerate(self.unit_factors(factors).items()):
            alpha, beta, gamma, second, eta = self.gates[i](state)  # `second` is the paper's delta
            scale = -self.steps[i] * eta.sigmoid()  # (edits, 1)
            gated = torch.cat([_average_one(alpha).unsqueeze(1) * delta, _average_one(beta).unsqueeze(1)], 1)
            u = torch.cat([gamma.unsqueeze(1) * x, second.unsqueeze(1)], 1)  # (edits, seq + 1, d_in)
            updates[name] = (u, scale.unsqueeze(1) * gated)
        return updates

    def condensed(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """
        Return the LSTM's condensed state of each edit, `(edits, rank)`. Positions without a gradient are not read.

        Args:
            factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): As for `forward`.
        """
        x, delta = (side.to(self.log_step.device) for side in factors[self._read])
        present = (delta != 0).any(-1)  # (edits, seq)
        if self.config.normalize:
            x, delta = self.x_stats[0](x), self.delta_stats[0](delta)
        tokens = torch.cat([x, delta], -1) * present.unsqueeze(-1)  # (edits, seq, d_in + d_out)
        order = (~present).int().argsort(dim=-1, stable=True)  # positions with a gradient first, for packing
        tokens = tokens.take_along_dim(order.unsqueeze(-1), 1)
        lengths = present.sum(-1).clamp(min=1).cpu()
        _, (last, _) = self.lstm(pack_padded_sequence(tokens, lengths, batch_first=True, enforce_sorted=False))
        return self.condense(torch.cat([last[0], last[1]], -1)).tanh()


class GateNetwork(nn.Module):
    """
    Predict the gates of a matrix's gradient: alpha, beta `(edits, d_out)`, gamma, delta `(edits, d_in)` and eta
    `(edits, 1)`, from the condensed state `(edits, rank)`.

    Args:
        shape (`tuple[int, int]`): The matrix's `(d_out, d_in)`.
        config ([`KnowledgeEditorConfig`]): `rank`, `num_hidden_layers`, `init`.
    """

    def __init__(self, shape: tuple[int, int], config: KnowledgeEditorConfig):
        super().__init__()
        d_out, d_in = shape
        self.parts = [d_out, d_out, d_in, d_in, 1]
        hidden = [(nn.Linear(config.rank, config.rank), nn.Tanh()) for _ in range(config.num_hidden_layers)]
        self.hidden = nn.Sequential(*(module for pair in hidden for module in pair))
        self.last = nn.Linear(config.rank, sum(self.parts))
        if config.init == "identity":
            nn.init.zeros_(self.last.weight)
        else:
            nn.init.xavier_uniform_(self.last.weight)
        with torch.no_grad():
            for part, start in zip(self.last.bias.split(self.parts), (0.0, 0.0, 1.0, 0.0, 0.0), strict=True):
                part.fill_(start)

    def forward(self, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.last(self.hidden(state)).split(self.parts, -1)


def _average_one(values: torch.Tensor) -> torch.Tensor:
    return values.softmax(-1) * values.shape[-1]
