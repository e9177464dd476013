"""The interface of an editing method, and the registry of methods."""

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
    Map the factors of a gradient to an update. Parameters and buffers are what `editor.safetensors` holds.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.

    Attributes:
        config_class (`type[EditorConfig]`): The class of the method's configuration, which holds its options.
        max_steps (`int`): Gradient steps that an edit may take where the user does not say.
        trains (`bool`): Whether the method has parameters to train.
        reads_calibration_text (`bool`): Whether the method, which then has no parameters to train, gathers statistics
            of a page of calibration text before the first edit.
        takes_texts (`bool`): Whether a user's own text goes beside that page.
        edits_at_subject (`bool`): Whether the method edits at the last token of the prompt's subject, where a request
            names it.
        sizes_steps (`bool`): Whether `forward` returns a direction, and the edit's own loss sets the length of the
            step along it (see [`~hf_mend.editing.proposals.FromGradient`]).
        in_further_forms (`bool`): Whether edits with a scope are made in further forms of asking than the prompt and a
            turn of a chat, as training has not taught the method what there are.
    """

    config_class: type[EditorConfig] = EditorConfig
    config: Any  # of the method's config_class

    max_steps: int = 3
    trains: bool = True
    reads_calibration_text: bool = False
    takes_texts: bool = False
    edits_at_subject: bool = False
    sizes_steps: bool = False
    in_further_forms: bool = False

    def __init__(self, config: EditorConfig, shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.config = config
        self.shapes = dict(shapes)

    def forward(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Update]:
        """
        Return the updates of a batch of edits.

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
        Return the base delta, layer name -> `(u, v)` of shapes `(rank, d_in)` and `(rank, d_out)`: a trained change of
        the base under which gradients are taken and updates act, once however many edits there are. It is empty for
        methods that edit the base as it is, and for those that join edits.
        """
        return {}

    def join(
        self, updates: Mapping[str, Update], preserved_keys: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, Update]:
        """
        Merge the edits that a group makes together, so that they leave one another alone. Methods whose updates are
        simply added do not override it.

        Args:
            updates (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> what `forward` returned for the
                edits of each group, side by side: `(groups, positions, d_in)` and `(groups, positions, d_out)`.
            preserved_keys (`Mapping[str, torch.Tensor]`): Layer name -> inputs of earlier edits, `(rows, d_in)`, at
                which the layer's output is to stay.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Layer name -> `(u, v)` of the same shapes, position for
            position, so that an edit of the group is still the pair at its positions.
        """
        return dict(updates)

    @property
    def joins(self) -> bool:
        """
        Whether the method overrides `join`. Its `forward` then returns inputs and the value residuals wanted there,
        changes of the layer's output, `(x, d)`, instead of updates, and `join` finds the update that gives them.
        """
        return type(self).join is not EditMethod.join

    def key_inputs(
        self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], places: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Return the inputs at which the edits of a method that joins want value residuals.

        Args:
            factors (`Mapping[str, tuple[torch.Tensor, torch.Tensor]]`): Layer name -> `(x, delta)` of the edits.
            places (`Callable`): Layer name -> the position of each edit's last subject token there, `(edits,)`.

        Returns:
            `dict[str, torch.Tensor]`: Layer name -> `(edits, positions, d_in)`, zero where no residual is wanted.
        """
        return {name: x for name, (x, _) in factors.items()}

    def observe_edits(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the factors of edits that are about to be made to running statistics, if the method has any."""

    def observe_factors(self, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the factors of some edits to the method's statistics, before training starts."""

    def observe_inputs(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Add the target layers' inputs on calibration text, name -> `(tokens, d_in)`, to the statistics."""

    def forget_observed(self) -> None:
        """Discard the statistics gathered since the last `finish_observing`. Finished statistics stay."""

    def observe_texts(self, texts: EncodedBatch) -> None:
        """Keep calibration text itself, for a method that runs the model on it while it edits."""

    def finish_observing(self) -> None:
        """Finish the statistics, which edits use from then on."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the statistics are finished, or the method has none."""
        return True

    def scale_steps(self, factor: float) -> None:
        """Make all further edits `factor` times as strong."""


_MOST_PASSES = 2_000  # of a saved configuration in one edit
_METHODS: dict[str, type[EditMethod]] = {}
_Method = TypeVar("_Method", bound=type[EditMethod])


def register_method(name: str, config_class: type[EditorConfig] | None = None) -> Callable[[_Method], _Method]:
    """
    Register a method under the name that `EditorConfig.method` gives, with the class of its configuration.

    Args:
        name (`str`): The method's name.
        config_class (`type[EditorConfig]`, *optional*): A dataclass whose fields are the method's options; see
            [`~hf_mend.config.option`]. Without it the method has the options of the method that it is a subclass of.

    Returns:
        `Callable`: The decorator of the method's class.

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
    Return the class of a method.

    Raises:
        ValueError: No method has that name.
    """
    if name not in _METHODS:
        raise ValueError(f"EditorConfig.method is {name!r}; the methods are {registered_methods()}")
    return _METHODS[name]


def new_method(config: EditorConfig, shapes: Mapping[str, tuple[int, int]]) -> EditMethod:
    """
    Return a new method, whose tensors are in float32 whatever torch's default dtype is: many scripts set bfloat16 to
    load models in half the memory.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.

    Raises:
        ValueError: No method has the name `config.method`.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return get_method(config.method)(config, shapes)
    finally:
        torch.set_default_dtype(default)


def state_shapes(config: EditorConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """
    Return the names and shapes of the tensors in an editor's file, without allocating them: a configuration may
    describe a larger editor than its file holds.

    Args:
        config ([`EditorConfig`]): The editor's configuration.
        shapes (`Mapping[str, tuple[int, int]]`): Layer name -> `(d_out, d_in)`.

    Raises:
        ValueError: No method has the name `config.method`.
    """
    with torch.device("meta"):
        method = get_method(config.method)(config, shapes)
    return {name: tuple(value.shape) for name, value in method.state_dict().items()}


def check_cost(config: EditorConfig, shapes: Sequence[tuple[int, int]], source: str) -> None:
    """
    Check that a saved configuration asks for no more memory and time in an edit than its base model warrants. What
    the editor's own networks take is bounded by the size of their file.

    Args:
        config ([`EditorConfig`]): The configuration.
        shapes (`Sequence[tuple[int, int]]`): `(d_out, d_in)` of each edited layer.
        source (`str`): Where it came from, for the message.

    Raises:
        ValueError: Its rank is above that of the largest edited weight, or its search has too many passes.
    """
    rank, widest = getattr(config, "rank", 0), max((min(shape) for shape in shapes), default=0)
    method = get_method(config.method)
    if not method.trains and rank > widest:
        raise ValueError(
            f"{source} makes edits of rank {rank}, and no weight that it edits has more than {widest}; the file was "
            f"altered, or is for another base model. EditorConfig(rank={widest}) is the most that has an effect"
        )
    passes = getattr(config, "num_steps", 1) * (1 + getattr(config, "kl_texts", 0))
    if passes > _MOST_PASSES:
        raise ValueError(
            f"{source} asks for up to {passes} passes an edit (num_steps, times one and kl_texts), and a saved editor "
            f"may ask for {_MOST_PASSES}; pass EditorConfig(num_steps=...) to EditableModel if you want so many"
        )


def registered_methods() -> Sequence[str]:
    """Return the names of all methods, sorted."""
    return sorted(_METHODS)


def config_classes() -> dict[str, type[EditorConfig]]:
    """Return each method's name -> the class of its configuration, in the order of registration."""
    return {name: method.config_class for name, method in _METHODS.items()}
