"""Methods that look for their update by repeated passes of the edited model, not from one gradient's factors alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..config import EditorConfig
from ..data.encoding import EncodedBatch
from ..edits.low_rank import Update
from .base import EditMethod


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
# A layer's parameters of a search, each with the rows in front.
Parameters = dict[str, list[torch.Tensor]]


@dataclass
class Seen:
    """
    What a look at some requests shows, each under its own update.

    Args:
        correct (`torch.Tensor` of shape `(requests,)`, bool): Every token of the target is the argmax.
        min_log_probability (`torch.Tensor` of shape `(requests,)`): Log-probability of the target's least likely
            token.
        factors (`dict[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(x, delta)` of the gradient of the
            target's negative log-likelihood, summed over its tokens, of shapes `(requests, seq, d_in)` and
            `(requests, seq, d_out)`: the gradient with respect to the weight is `sum_t delta_t x_t^T`.
    """

    correct: torch.Tensor
    min_log_probability: torch.Tensor
    factors: Factors


class Look(Protocol):
    """The model as a method sees it: requests go in under candidate updates, loss and gradient come out."""

    wanted: torch.Tensor  # (requests,), the numbers of those that are to be edited

    def __call__(self, updates: Mapping[str, Update], requests: torch.Tensor) -> Seen:
        """
        Runs some requests from the hidden state that was kept below the lowest edited block.

        Args:
            updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes
                `(requests, rank, d_in)` and `(requests, rank, d_out)`.
            requests (`torch.Tensor` of shape `(requests,)`): Their numbers.
        """
        ...

    def places(self, layer: str) -> torch.Tensor:
        """
        Where a layer meets the last token of what each wanted request is about: the subject's, if it is known, and the
        prompt's otherwise; in a decoder that does not see the prompt, its first position. `(requests,)`.
        """
        ...

    def drift(self, updates: Mapping[str, Update], texts: EncodedBatch) -> Factors:
        """
        Factors of the gradient of `KL(un-edited || edited)` on other texts, its mean over positions and texts, each
        request's update for itself: `(requests, texts * seq, width)`.
        """
        ...


class IterativeMethod(EditMethod):
    """
    A method that looks for an update: `find` instead of `forward`. It edits as it is, without training.

    `max_steps` is the configuration's `num_steps`, where the caller does not say.
    """

    trains = False

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.max_steps = config.num_steps

    def find(self, look: Look, max_steps: int) -> tuple[dict[str, Update], list[int]]:
        """
        The updates of a batch of requests, each found for itself.

        Args:
            look ([`Look`]): Shows what requests come to under candidate updates.
            max_steps (`int`): The most steps a request may take.

        Returns:
            `tuple`: Layer name -> `(u, v)` of shapes `(requests, rank, d_in)` and `(requests, rank, d_out)`, for the
            requests in `look.wanted`, in their order, or what `join` takes where the method joins; and the steps that
            each took.
        """
        raise NotImplementedError

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        raise TypeError(f"{type(self).__name__} looks for its update by repeated passes; call find instead")


class GradientSearch(IterativeMethod):
    """
    Adam (Kingma and Ba 2015) on some parametrisation of the update, each request for itself, until each token of its
    target has a negative log-likelihood of `stop_loss` or less and is the argmax. Subclasses say what the parameters
    are.
    """

    def start(self, look: Look, factors: Factors) -> Parameters:
        """The parameters of no update, for as many requests and on the devices of `factors`, the first look's."""
        raise NotImplementedError

    def gradients(self, parameters: Parameters, factors: Factors) -> Parameters:
        """Of the loss whose factors are given, with respect to the parameters."""
        raise NotImplementedError

    def updates(self, parameters: Parameters) -> dict[str, Update]:
        """The updates that the parameters stand for."""
        raise NotImplementedError

    def more_factors(self, look: Look, updates: Mapping[str, Update], step: int) -> Factors:
        """Factors of what the loss has beside the target, or none."""
        return {}

    def constrain(self, parameters: Parameters) -> None:
        """Brings parameters back, in place, to where they may be."""

    def follow(self, parameters: Parameters, factors: Factors) -> None:
        """Adapts, in place, what the parameters hold of the layers' inputs, which steps on lower layers move."""

    def found(self, parameters: Parameters) -> dict[str, Update]:
        """What the search returns: the updates, or for a method that joins them, inputs and residuals wanted there."""
        return self.updates(parameters)

    def find(self, look: Look, max_steps: int) -> tuple[dict[str, Update], list[int]]:
        requests = look.wanted
        steps = torch.zeros(len(requests), dtype=torch.long)
        still = torch.arange(len(requests))  # places in `requests` of those that are not done
        seen = look({}, requests)
        parameters = self.start(look, seen.factors)
        result: Parameters = {name: [p.clone() for p in values] for name, values in parameters.items()}
        updates: dict[str, Update] = {}
        adam = Adam(parameters, self.config.edit_lr)
        for step in range(max_steps):
            if step:
                seen = look(updates, requests[still])
                going_on = ~(seen.correct & (seen.min_log_probability >= -self.config.stop_loss))
                if not going_on.all():
                    _put(result, parameters, still, ~going_on)
                    still = still[going_on]
                    if not len(still):
                        break
                    adam.keep(going_on)
                    seen.factors = {
                        name: (x[going_on.to(x.device)], delta[going_on.to(delta.device)])
                        for name, (x, delta) in seen.factors.items()
                    }
                    parameters = {name: _rows(values, going_on) for name, values in parameters.items()}
                    updates = self.updates(parameters)
                for name, (x, delta) in self.more_factors(look, updates, step).items():
                    own_x, own_delta = seen.factors[name]
                    seen.factors[name] = (torch.cat([own_x, x], 1), torch.cat([own_delta, delta], 1))
            adam.step(parameters, self.gradients(parameters, seen.factors))
            self.follow(parameters, seen.factors)
            self.constrain(parameters)
            steps[still] += 1
            updates = self.updates(parameters)
        if len(still):
            _put(result, parameters, still, torch.ones(len(still), dtype=torch.bool))
        return self.found(result), steps.tolist()


class Adam:
    """`torch.optim.Adam` for requests that are optimised side by side and end at different steps."""

    def __init__(self, parameters: Parameters, lr: float, betas: tuple[float, float] = (0.9, 0.999)):
        self.lr, self.betas, self.steps = lr, betas, 0
        self.mean = {name: [torch.zeros_like(p) for p in values] for name, values in parameters.items()}
        self.square = {name: [torch.zeros_like(p) for p in values] for name, values in parameters.items()}

    def keep(self, rows: torch.Tensor) -> None:
        """Forgets all rows but these, `(rows,)`, bool."""
        self.mean = {name: _rows(values, rows) for name, values in self.mean.items()}
        self.square = {name: _rows(values, rows) for name, values in self.square.items()}

    def step(self, parameters: Parameters, gradients: Parameters) -> None:
        """Moves the parameters, in place."""
        self.steps += 1
        first, second = self.betas
        size = self.lr / (1 - first**self.steps)
        for name, values in parameters.items():
            for p, g, mean, square in zip(values, gradients[name], self.mean[name], self.square[name], strict=True):
                mean.lerp_(g, 1 - first)
                square.mul_(second).addcmul_(g, g, value=1 - second)
                p.addcdiv_(mean, (square / (1 - second**self.steps)).sqrt_().add_(1e-8), value=-size)


def _rows(values: Sequence[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    return [value[rows.to(value.device)] for value in values]


def _put(result: Parameters, parameters: Parameters, places: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes chosen rows of `parameters` to their places."""
    for name, values in parameters.items():
        for whole, part in zip(result[name], values, strict=True):
            whole[places[rows].to(whole.device)] = part[rows.to(part.device)]
