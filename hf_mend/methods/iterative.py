"""
Methods that search for their update by repeated passes of the edited model, not from one gradient's factors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..config import EditorConfig, option
from ..data.encoding import EncodedBatch
from ..edits.low_rank import Update
from .base import EditMethod


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
# A layer's parameters of a search, each with the rows in front.
Parameters = dict[str, list[torch.Tensor]]


@dataclass
class Seen:
    """
    The outcome of a pass over some requests, each under its own update.

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
    """The model as a method sees it: it takes requests under candidate updates and returns loss and gradient."""

    wanted: torch.Tensor  # (requests,): numbers of the requests to edit

    def __call__(self, updates: Mapping[str, Update], requests: torch.Tensor) -> Seen:
        """
        Run some requests from the hidden state stored below the lowest edited block.

        Args:
            updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(u, v)` of shapes
                `(requests, rank, d_in)` and `(requests, rank, d_out)`.
            requests (`torch.Tensor` of shape `(requests,)`): Their numbers.
        """
        ...

    def places(self, layer: str) -> torch.Tensor:
        """
        Return the position at which a layer meets the last token of each wanted request's subject, `(requests,)`: of
        the subject if it is given, and of the prompt otherwise; in a decoder that does not see the prompt, the first
        position.
        """
        ...

    def drift(self, updates: Mapping[str, Update], texts: EncodedBatch) -> Factors:
        """
        Return the factors of the gradient of `KL(un-edited || edited)` on other texts, its mean over positions and
        texts, for each request's update by itself: `(requests, texts * seq, width)`.
        """
        ...


@dataclass
class IterativeConfig(EditorConfig):
    """The options of methods that search for an edit in many steps. Each field's help documents it."""

    edit_lr: float = option(1e-4, "Adam's learning rate.")
    num_steps: int = option(50, "The most steps of an edit.", least=1, most=100_000)
    stop_loss: float = option(
        0.1,
        "An edit is found when every target token is the argmax, with a negative log-likelihood of this or less, in "
        "nats.",
    )


class IterativeMethod(EditMethod):
    """
    A method that searches for an update, with `find` in place of `forward`. It edits without training.

    `max_steps` defaults to the configuration's `num_steps`.
    """

    config_class: type[EditorConfig] = IterativeConfig
    config: IterativeConfig
    trains = False

    def __init__(self, config: IterativeConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__(config, shapes)
        self.max_steps = config.num_steps

    def find(self, look: Look, max_steps: int) -> tuple[dict[str, Update], list[int]]:
        """
        Find the updates of a batch of requests, each request's by itself.

        Args:
            look ([`Look`]): The model: loss and gradient of requests under candidate updates.
            max_steps (`int`): The maximum number of steps of a request.

        Returns:
            `tuple`: Layer name -> `(u, v)` of shapes `(requests, rank, d_in)` and `(requests, rank, d_out)`, for the
            requests in `look.wanted`, in their order, or the inputs and residuals that `join` takes where the method
            joins; and the number of steps of each.
        """
        raise NotImplementedError

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        raise TypeError(f"{type(self).__name__} looks for its update by repeated passes; call find instead")


class GradientSearch(IterativeMethod):
    """
    Run Adam (Kingma and Ba 2015) on a parametrisation of the update, for each request by itself, until each token of
    its target has a negative log-likelihood of `stop_loss` or less and is the argmax. Subclasses define the
    parameters.
    """

    def start(self, look: Look, factors: Factors) -> Parameters:
        """
        Return the parameters of a zero update, for as many requests and on the devices of `factors`, the first pass's.
        """
        raise NotImplementedError

    def gradients(self, parameters: Parameters, factors: Factors) -> Parameters:
        """Return the loss's gradients with respect to the parameters, from the loss's factors."""
        raise NotImplementedError

    def updates(self, parameters: Parameters) -> dict[str, Update]:
        """Return the updates that the parameters stand for."""
        raise NotImplementedError

    def more_factors(self, look: Look, updates: Mapping[str, Update], step: int) -> Factors:
        """Return the factors of the loss's further terms, those beside the target's, if there are any."""
        return {}

    def constrain(self, parameters: Parameters) -> None:
        """Project the parameters, in place, onto their constraints."""

    def follow(self, parameters: Parameters, factors: Factors) -> None:
        """Update, in place, the layers' inputs that the parameters hold: steps on lower layers change them."""

    def found(self, parameters: Parameters) -> dict[str, Update]:
        """
        Return the search's result: the updates, or of a method that joins them, inputs and the residuals wanted there.
        """
        return self.updates(parameters)

    def find(self, look: Look, max_steps: int) -> tuple[dict[str, Update], list[int]]:
        requests = look.wanted
        steps = torch.zeros(len(requests), dtype=torch.long)
        still = torch.arange(len(requests))  # places in `requests` of the unfinished ones
        seen = look({}, requests)
        parameters = self.start(look, seen.factors)
        result: Parameters = {name: [p.clone() for p in values] for name, values in parameters.items()}
        updates: dict[str, Update] = {}
        adam = _Adam(parameters, self.config.edit_lr)
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
                    updates = self.updates(parameters)
                for name, (x, delta) in self.more_factors(look, updates, step).items():
                    own_x, own_delta = seen.factors[name]
                    seen.factors[name] = (torch.cat([own_x, x], 1), torch.cat([own_delta, delta], 1))
            adam.move(self.gradients(parameters, seen.factors))
            self.follow(parameters, seen.factors)
            self.constrain(parameters)
            steps[still] += 1
            updates = self.updates(parameters)
        if len(still):
            _put(result, parameters, still, torch.ones(len(still), dtype=torch.bool))
        return self.found(result), steps.tolist()


class _Adam:
    """`torch.optim.Adam` for requests that are optimised side by side and end at different steps."""

    def __init__(self, parameters: Parameters, lr: float):
        self.parameters = parameters
        self.adam = torch.optim.Adam([p for values in parameters.values() for p in values], lr, foreach=False)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop, in place, all rows of the parameters and of their state but these, `(rows,)`, bool."""
        for p, state in self.adam.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name][rows.to(p.device)]
            p.data, p.grad = p.data[rows.to(p.device)], None

    def move(self, gradients: Parameters) -> None:
        """Take one step, in place."""
        for name, values in self.parameters.items():
            for p, gradient in zip(values, gradients[name], strict=True):
                p.grad = gradient
        self.adam.step()


def _put(result: Parameters, parameters: Parameters, places: torch.Tensor, rows: torch.Tensor) -> None:
    """Write chosen rows of `parameters` to their places in `result`."""
    for name, values in parameters.items():
        for whole, part in zip(result[name], values, strict=True):
            whole[places[rows].to(whole.device)] = part[rows.to(part.device)]
