"""A LoRA adapter trained on the edit's one example."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..config import option
from ..edits.low_rank import Update
from .base import register_method
from .iterative import Factors, GradientSearch, IterativeConfig, Look, Parameters


@dataclass
class LoraPerEditConfig(IterativeConfig):
    """
    The configuration of [`LoraPerEdit`], with the options of [`IterativeConfig`]. Each field's help documents it.
    """

    edit_lr: float = 1e-3
    rank: int = option(8, "Rank of an edit.", least=1, most=65536)
    lora_alpha: float = option(16.0, "The product of the two matrices is scaled by this over the rank.")
    seed: int = option(0, "Seed of the random first matrix.")


@register_method("lora", LoraPerEditConfig)
class LoraPerEdit(GradientSearch):
    """
    A LoRA adapter for each edit (Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models"), trained with
    Adam on the prompt and its target until the model says the target: `W + lora_alpha / rank * B A`, with B zero at
    first and A drawn as in PEFT, from the configuration's `seed`.

    Args:
        config ([`LoraPerEditConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.
    """

    config: LoraPerEditConfig

    @property
    def scale(self) -> float:
        """The scale of the matrices' product, `lora_alpha / rank`."""
        return self.config.lora_alpha / self.config.rank

    def start(self, look: Look, factors: Factors) -> Parameters:
        generator = torch.Generator().manual_seed(self.config.seed)
        parameters = {}
        for name, (d_out, d_in) in self.shapes.items():
            x = factors[name][0]
            bound = 1 / math.sqrt(d_in)  # kaiming_uniform_(a=sqrt(5)), as in PEFT
            a = torch.empty(self.config.rank, d_in, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            a = a.to(x.device, x.dtype).repeat(len(x), 1, 1)  # every edit starts from the same
            parameters[name] = [a, torch.zeros(len(x), d_out, self.config.rank, dtype=x.dtype, device=x.device)]
        return parameters

    def gradients(self, parameters: Parameters, factors: Factors) -> Parameters:
        found = {}
        for name, (x, delta) in factors.items():
            a, b = parameters[name]  # (requests, rank, d_in), (requests, d_out, rank)
            of_a = (delta @ b).transpose(1, 2) @ x
            of_b = delta.transpose(1, 2) @ (x @ a.transpose(1, 2))
            found[name] = [self.scale * of_a, self.scale * of_b]
        return found

    def updates(self, parameters: Parameters) -> dict[str, Update]:
        return {name: (a, self.scale * b.transpose(1, 2)) for name, (a, b) in parameters.items()}
