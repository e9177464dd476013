"""Attributes that transformers, TRL and lm-evaluation-harness expect of a model, delegated to the base model."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import CompileConfig, GenerationConfig
from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

from .compiled import CompiledBlocks, uncompiled


def known_to_pipelines(cls: type) -> None:
    """
    Register a class that wraps a causal language model with `transformers.pipeline("text-generation", ...)`, which
    otherwise logs an error although it works.

    Args:
        cls (`type`): The class.
    """
    names = SUPPORTED_PEFT_TASKS.setdefault("text-generation", [])
    if cls.__name__ not in names:
        names.append(cls.__name__)


# What generation with an assistant asks of the assistant, beside its public methods.
_ASKED_OF_ASSISTANTS = {
    "_maybe_prepare_encoder_kwargs_for_generation",
    "_prepare_model_inputs",
    "_supports_logits_to_keep",
}
_ADAPTERS = (
    "adapters go onto the base model before it is wrapped (a PeftModel can be wrapped), and load_lora adds an adapter "
    "as an edit"
)
_PADDED_BATCHES = (
    "continuous batching lays the tokens of all requests side by side, and its paged cache keeps nothing of what a "
    "scope has read, so that edits with a scope would be missed without a word; call generate with padded batches "
    "instead"
)
# What people know from transformers and PEFT -> what to call in its place.
_INSTEAD = {
    "init_continuous_batching": _PADDED_BATCHES,
    "continuous_batching_context_manager": _PADDED_BATCHES,
    "load_adapter": _ADAPTERS,
    "add_adapter": _ADAPTERS,
    "set_adapter": _ADAPTERS,
    "delete_adapter": _ADAPTERS,
    "enable_adapters": "enable_edit(id) lets an edit act",
    "disable_adapters": "disable_edits() is a context without edits, and disable_edit(id) is for one",
    "disable_adapter": "disable_edits() is a context without edits, and disable_edit(id) is for one",
    "active_adapters": "edits.active has the edits that act",
    "active_adapter": "edits.active has the edits that act",
    "print_trainable_parameters": "model.editor has the parameters that are trained",
    "get_nb_trainable_parameters": "model.editor has the parameters that are trained",
    "get_base_model": "model.base_model is the base model, which unload() gives back as it was",
    "peft_config": "model.editor_config is the editor's configuration",
    "merge_adapter": "merge_and_unload() writes the edits into the weights",
    "unmerge_adapter": "edits are exactly undone by undo(), as they are never in the weights",
}


class _NoGradient(torch.autograd.Function):
    """A loss that says why it has no gradient, where it would otherwise be an error about `grad_fn`."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "the loss of an EditableModel has no gradient, as its base model is frozen; train its editor with "
            "EditorTrainer in place of Trainer or a loop of your own, or fine-tune model.unload()"
        )


def _refusing_backward(outputs: Any) -> Any:
    """Return the outputs of a forward pass whose loss has no gradient with one that says so; others as they are."""
    loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", None)
    if loss is None:
        return outputs
    loss = _NoGradient.apply(loss, torch.zeros((), requires_grad=True))
    if isinstance(outputs, tuple):
        return (loss, *outputs[1:])
    outputs.loss = loss
    return outputs


class DelegatesToBase:
    """
    The methods of [`EditableModel`] that delegate to the base model, under the active edits. Each is defined by name:
    any other is an `AttributeError`, as on any module. A property that the base model lacks is lacking here too.
    """

    base_model: Any
    _compiled: CompiledBlocks | None
    _active: Any  # whose edits a pass reads, from its beginning to its end
    config: Any
    training: bool

    def __getattr__(self, name: str) -> Any:
        """
        Raises:
            AttributeError: There is no such attribute; the message says what to call instead.
        """
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError as error:
            base = self.__dict__.get("_modules", {}).get("base_model")
            if name in _ASKED_OF_ASSISTANTS and base is not None:
                return getattr(base, name)
            instead = _INSTEAD.get(name)
            if instead is None and not name.startswith("_") and hasattr(base, name):
                instead = f"model.base_model.{name} is the base model's"
            raise AttributeError(f"{error}; {instead}" if instead else str(error)) from None

    # The named arguments are those by which `Trainer` knows a data set's columns and its labels.
    @uncompiled
    def forward(
        self, *args: Any, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        """
        Run the base model's forward pass under the active edits.

        Args:
            args, input_ids, attention_mask, labels, kwargs: As for the base model.
        """
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        given = {name: value for name, value in named.items() if value is not None}
        with self._active.reading():
            outputs = self.base_model(*args, **given, **kwargs)
        if labels is not None and self.training and torch.is_grad_enabled():
            # An adapter's parameters, those of a base that was unfrozen, or a prompt's; without any, a loss may have a
            # gradient for the sake of activation checkpointing alone.
            trained = any(parameter.requires_grad for parameter in self.base_model.parameters())
            given_by_peft = kwargs.get("inputs_embeds") is not None or kwargs.get("past_key_values") is not None
            return outputs if trained or given_by_peft else _refusing_backward(outputs)
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        Run the base model's `generate` under the active edits: those of its beginning, to its end. While there are
        edits, nothing is compiled, as transformers does on GPUs with a static cache: a graph sees no later edit.
        """
        with self._active.reading():
            if self._active.is_hooked and hasattr(self.generation_config, "disable_compile"):
                kwargs["disable_compile"] = True
            return self.base_model.generate(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raise an error: edits with a scope do not act where they should in transformers' continuous batching.

        Raises:
            NotImplementedError: Always; the message says what to call instead.
        """
        raise NotImplementedError(
            f"an EditableModel has no generate_batch: {_PADDED_BATCHES}. base_model.generate_batch is right for edits "
            "without a scope, and for the model without edits, which unload() gives back"
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare the inputs of one step of generation, as the base model does."""
        return cast("dict[str, Any]", self.base_model.prepare_inputs_for_generation(*args, **kwargs))

    def can_generate(self) -> bool:
        """Whether the base model can generate; `transformers.pipeline` calls it."""
        return bool(self.base_model.can_generate())

    @property
    def generation_config(self) -> GenerationConfig:
        """The base model's generation configuration. It can be set."""
        return cast("GenerationConfig", self.base_model.generation_config)

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.base_model.generation_config = config

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype."""
        return cast("torch.dtype", self.base_model.dtype)

    @property
    def name_or_path(self) -> str:
        """The base model's origin, where lm-evaluation-harness looks for a tokenizer."""
        return str(self.config.name_or_path)

    @property
    def main_input_name(self) -> str:
        """The name of the base model's main input, such as `"input_ids"`."""
        return str(self.base_model.main_input_name)

    @property
    def loss_type(self) -> str | None:
        """The name of the base model's loss, by which `Trainer` counts labels."""
        return cast("str | None", self.base_model.loss_type)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's forward pass takes a loss's arguments, such as `num_items_in_batch`."""
        if hasattr(self.base_model, "accepts_loss_kwargs"):
            return bool(self.base_model.accepts_loss_kwargs)
        parameters = inspect.signature(self.base_model.forward).parameters.values()
        return any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)

    @property
    def input_modalities(self) -> str | tuple[str, ...]:
        """The base model's input modalities, for a pipeline's description."""
        return cast("str | tuple[str, ...]", self.base_model.input_modalities)

    @property
    def output_modalities(self) -> str | tuple[str, ...]:
        """The base model's output modalities, for a pipeline's description."""
        return cast("str | tuple[str, ...]", self.base_model.output_modalities)

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """The devices of the base model's parts by its device map; an `AttributeError` without one."""
        return cast("dict[str, Any]", self.base_model.hf_device_map)

    def get_input_embeddings(self) -> nn.Module:
        """Return the base model's input embedding."""
        return cast("nn.Module", self.base_model.get_input_embeddings())

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the base model's output layer."""
        return cast("nn.Module | None", self.base_model.get_output_embeddings())

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base model's encoder."""
        return self.base_model.get_encoder(*args, **kwargs)

    def get_decoder(self) -> Any:
        """Return the base model's decoder."""
        return self.base_model.get_decoder()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """
        Return the number of the base model's parameters, without the editor's.

        Args:
            only_trainable (`bool`, defaults to `False`): Count only those that require a gradient; all are frozen.
            exclude_embeddings (`bool`, defaults to `False`): Leave the embeddings out.
        """
        return int(self.base_model.num_parameters(only_trainable, exclude_embeddings))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """
        Return the bytes that the base model's weights take.

        Args:
            return_buffers (`bool`, defaults to `True`): Count buffers too.
        """
        return int(self.base_model.get_memory_footprint(return_buffers))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Have the base model recompute activations in the backward pass, where it is in training mode."""
        self.base_model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Have the base model keep its activations."""
        self.base_model.gradient_checkpointing_disable()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Call `gradient_checkpointing_enable` by its name in newer versions of transformers."""
        self.base_model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Call `gradient_checkpointing_disable` by its newer name."""
        self.base_model.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the base model recomputes activations in the backward pass, by the newer name."""
        return bool(self.base_model.is_activation_checkpointing)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the base model recomputes activations in the backward pass."""
        return bool(self.base_model.is_gradient_checkpointing)

    def enable_input_require_grads(self) -> None:
        """Have the base model's embeddings require a gradient, for adapters that are trained above them."""
        self.base_model.enable_input_require_grads()

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set how the base model computes attention, which leaves its edits as they are."""
        self.base_model.set_attn_implementation(*args, **kwargs)

    def set_compile_config(self, compile_config: CompileConfig | None) -> None:
        """
        Compile the blocks of the base model that no edit changes, for the passes by which `edit` finds and checks
        edits: on a GPU that is fewer kernels, on a CPU it does not pay. Edits are the same to rounding. The first ones
        take as long as the compilation does, and so may a text of another length. `generate` has an argument of its
        own.

        Args:
            compile_config (`CompileConfig`, *optional*): The arguments of `torch.compile`, as `generate` takes them;
                its `mode="reduce-overhead"` replays CUDA graphs. `None` runs all blocks as they are, which is the
                default.

        Raises:
            RuntimeError: `torch.compile` knows no such backend or mode.
            TypeError: It is none.
        """
        if not isinstance(compile_config, CompileConfig | None):
            raise TypeError(
                f"compile_config is {compile_config!r}, expected a transformers.CompileConfig, or None to compile "
                "nothing"
            )
        self._compiled = None if compile_config is None else CompiledBlocks(compile_config)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """
        Add tags to the base model, which writes them into its card.

        Args:
            tags (`list[str]` or `str`): The tags.
        """
        self.base_model.add_model_tags(tags)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """
        Do nothing: the base model's weights were tied when it was loaded, and are not written to.
        lm-evaluation-harness calls it on what it is given.
        """

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """
        Return the input embedding as it is. An editable model's vocabulary has the size that it was wrapped with.

        Args:
            new_num_tokens (`int`, *optional*): The present size, or `None`.

        Raises:
            NotImplementedError: `new_num_tokens` is another size; nothing has changed.
        """
        embedding: Any = self.get_input_embeddings()
        size = int(embedding.weight.shape[0])
        if new_num_tokens not in (None, size):
            raise NotImplementedError(
                f"the vocabulary of an editable model cannot change from {size} to {new_num_tokens} tokens, as its "
                "edits and its editor belong to this base; resize the base model before it is wrapped"
            )
        return cast("nn.Module", embedding)
