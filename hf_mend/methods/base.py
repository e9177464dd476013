"""What every method offers, and the register of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import EditorConfig
from ..data.encoding import EncodedBatch
from ..edits.low_rank import Update


class EditMethod(nn.Module):
    """
    Maps the factors of a gradient to an update. Parameters and buffers are what `editor.safetensors` holds.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.

    Attributes:
        config_class (`type[EditorConfig]`): The class of the method's configuration, which holds its options.
        max_steps (`int`): Gradient steps that an edit may take where the user does not say.
        trains (`bool`): Whether the method has parameters to train; one that has none takes what it needs to know of
            the model from a page of ordinary text, before the first edit.
        reads_ordinary_text (`bool`): Whether it does that.
        takes_texts (`bool`): Whether a user's own text goes beside that page.
        sizes_steps (`bool`): Whether `forward` returns a direction, and the step along it is sized by the edit's own
            loss (see [`~hf_mend.editing.proposals.FromGradient`]).
    """

    config_class: type[EditorConfig] = EditorConfig
    config: Any  # of the method's config_class

    max_steps: int = 3
    trains: bool = True
    reads_ordinary_text: bool = False
    takes_texts: bool = False
    sizes_steps: bool = False

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.config = config
        self.shapes = dict(shapes)

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        """
        The updates of a batch of edits.

        Args:
            factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(x, delta)` of shapes
                `(edits, seq, d_in)` and `(edits, seq, d_out)`; a position without a gradient is zero in both.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Layer name -> `(u, v)` of the same shapes; the weight
            changes by `sum_t v_t u_t^T`.
        """
        raise NotImplementedError

    def base_delta(self) -> dict[str, Update]:
        """
        What acts beside the method's edits, once however many there are: a trained change of the base
        under which gradients are taken and updates act. Layer name -> `(u, v)` of shapes `(rank, d_in)` and
        `(rank, d_out)`; empty for methods that edit the base as it is. A method that joins edits has none.
        """
        return {}

    def join(
        self, updates: Mapping[str, Update], preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, Update]:
        """
        Merges the edits of a group that are made together, so that they leave one another alone. Methods whose
        updates are simply added leave this as it is.

        Args:
            updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> what `forward` returned for the
                edits of each group, side by side: `(groups, positions, d_in)` and `(groups, positions, d_out)`.
            preserved_keys (`Mapping[str, torch.Tensor]`): Layer name -> inputs of earlier edits, `(rows, d_in)`, at
                which the output is to stay.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Layer name -> `(u, v)` of the same shapes, position for
            position, so that an edit of the group is still the pair at its positions.
        """
        return dict(updates)

    @property
    def joins(self) -> bool:
        """
        Whether `join` does anything. Then `forward` returns not updates but inputs and the value residuals
        wanted there, changes of the layer's output, `(x, d)`, and `join` finds the update that gives them.
        """
        return type(self).join is not EditMethod.join

    def key_inputs(
        self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], places: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        The inputs at which edits of a method that joins ask for value residuals.

        Args:
            factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(x, delta)` of the edits.
            places (`Callable`): Layer name -> where each edit's subject ends there, `(edits,)`.

        Returns:
            `dict[str, torch.Tensor]`: Layer name -> `(edits, positions, d_in)`, zero where nothing is asked for.
        """
        return {name: x for name, (x, _) in factors.items()}

    def observe_edits(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes the factors of edits that are about to be made into running statistics, if the method has any."""

    def observe_factors(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Takes the factors of some edits into the method's statistics, before training starts."""

    def observe_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Takes the target layers' inputs on ordinary text, name -> `(tokens, d_in)`, into the statistics."""

    def forget_observed(self) -> None:
        """Forgets what was observed since the statistics were last ended; those stay until they are ended anew."""

    def observe_texts(self, texts: EncodedBatch) -> None:
        """Takes ordinary text itself, for a method that looks at it while it edits."""

    def finish_observing(self) -> None:
        """Ends the statistics."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the statistics are set (or the method has none)."""
        return True

    def scale_steps(self, factor: float) -> None:
        """Makes every edit `factor` times as strong, from now on."""


_METHODS: dict[str, type[EditMethod]] = {}
_Method = TypeVar("_Method", bound=type[EditMethod])


def register_method(name: str, config_class: type[EditorConfig] | None = None) -> Callable[[_Method], _Method]:
    """
    Registers a method under the name that `EditorConfig.method` gives, with the class of its configuration.

    Args:
        name (`str`): The method's name.
        config_class (`type[EditorConfig]`, *optional*): A dataclass whose fields are the method's options; see
            [`~hf_mend.config.option`]. Without it the method has the options of the method that it is a subclass of.

    Returns:
        `Callable`: A decorator for the method's class.

    Raises:
        TypeError: `config_class` is not a subclass of [`EditorConfig`].

    Example:

    ```python
    from dataclasses import dataclass

    from hf_mend import EditorConfig, register_method
    from hf_mend.config import option
    from hf_mend.methods import EditMethod


    @dataclass
    class PlainStepConfig(EditorConfig):
        step: float = option(0.1, help="How far an edit goes down the gradient.", most=10)


    @register_method("plain-step", PlainStepConfig)
    class PlainStep(EditMethod):
        def forward(self, factors):
            return {name: (x, -self.config.step * delta) for name, (x, delta) in factors.items()}


    config = EditorConfig(method="plain-step", step=0.5)
    ```
    """
    if config_class is not None and not (isinstance(config_class, type) and issubclass(config_class, EditorConfig)):
        raise TypeError(f"config_class is {config_class!r}, expected a subclass of EditorConfig")

    def register(cls: _Method) -> _Method:
        if config_class is not None:
            cls.config_class = config_class
        _METHODS[name] = cls
        return cls

    return register


def get_method(name: str) -> type[EditMethod]:
    """
    The method of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in _METHODS:
        raise ValueError(f"EditorConfig.method is {name!r}; the methods are {registered_methods()}")
    return _METHODS[name]


def state_shapes(config: EditorConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of what an editor's file holds, found without taking memory for it: a configuration may ask for an
    editor that its file is not.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.

    Raises:
        ValueError: The method is not known.
    """
    with torch.device("meta"):
        method = get_method(config.method)(config, shapes)
    return {name: tuple(value.shape) for name, value in method.state_dict().items()}


def registered_methods() -> Sequence[str]:
    """Names of all methods."""
    return sorted(_METHODS)


def config_classes() -> dict[str, type[EditorConfig]]:
    """The name of each method -> the class of its configuration, in the order in which they were registered."""
    return {name: method.config_class for name, method in _METHODS.items()}
