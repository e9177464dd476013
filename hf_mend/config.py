"""The configuration of an editor: what it edits, how it maps gradients to edits, and which base it was made for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .hub.files import read_json_file, shortened


CONFIG_NAME = "editor_config.json"
# Bounds of what a configuration may hold: characters of a string, entries of a list.
_LONGEST = 2000
_MOST = 10_000
# Options that only the methods that take many steps look at.
STEP_OPTIONS = ("num_steps", "stop_loss", "kl_weight", "kl_texts", "norm_bound", "lora_alpha", "seed")
_TAKE_MANY_STEPS = frozenset({"ft", "ft-kl", "ft-l", "lora", "rome", "memit"})
# What a field is for a method where the user does not say; benchmarks/results/settings.md has the figures.
_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "ft": {"edit_lr": 1e-4},
    "ft-kl": {"edit_lr": 1e-4},
    "ft-l": {"edit_lr": 1e-4},
    "lora": {"edit_lr": 1e-3, "rank": 8},
    "rome": {"edit_lr": 0.1, "whiten_ridge": 0.01, "whiten_rank": 512},
    "ultraedit": {"edit_lr": 1e-4},
    "memit": {"edit_lr": 0.05, "whiten_ridge": 0.01, "whiten_rank": 512, "ridge": 30.0, "margin": 1.25},
}
_DEFAULTS = {"edit_lr": 1e-3, "rank": 256, "whiten_ridge": 0.1, "whiten_rank": 128, "ridge": 1.0, "margin": 2.0}
TRANSFORMS = ("both", "both_separate", "x", "delta", "smaller")


@dataclass
class EditorConfig:
    """
    What an editor is. Field names are PEFT's where PEFT has one.

    The paper is Mitchell et al. 2022, "Fast Model Editing at Scale" (MEND). Where a default differs from the paper's
    choice, the help text says so, and benchmarks/ has the measurement.
    """

    method: str = field(default="mend", metadata={"help": "How factors become an edit; a file in hf_mend/methods/."})
    task_type: str | None = field(
        default=None, metadata={"help": "'CAUSAL_LM' or 'SEQ_2_SEQ_LM'; found from the base model when None."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model that the editor was trained for."}
    )
    revision: str | None = field(default=None, metadata={"help": "The base model's revision."})
    target_modules: str | list[str] | None = field(
        default="default",
        metadata={
            "help": "Layers to edit: 'default' (what measured best for the method, by fraction of depth), 'paper' "
            "(all MLP weights of the last three blocks, or of the last two of encoder and decoder), a regular "
            "expression for whole names, or a list of names or last parts of names."
        },
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks to edit; all that target_modules matches when None."}
    )
    layers_pattern: str | None = field(
        default=None, metadata={"help": "Last part of the name of the block list, if the model has several."}
    )
    rank: int = field(
        default=None,  # type: ignore[assignment]  # set in __post_init__, by the method
        metadata={
            "help": "Rank of the editor networks' weight matrices (paper: 1920; 256 when None), and of 'lora' (8); "
            "width of the networks of 'ke'."
        },
    )
    num_hidden_layers: int = field(
        default=1, metadata={"help": "Hidden layers of an editor network, as in the paper."}
    )
    transform: str = field(
        default="both",
        metadata={
            "help": "Which factors the networks map: 'both' in one network (the paper), 'both_separate' in two, 'x' "
            "only, 'delta' only, or 'smaller', whichever of the two is narrower."
        },
    )
    normalize: bool = field(
        default=True, metadata={"help": "Scale factors to zero mean and unit variance by running statistics (paper)."}
    )
    whiten: bool = field(
        default=True,
        metadata={
            "help": "Multiply the mapped x by the inverse second moment of the layer's inputs, so that an edit acts "
            "on what sets this input apart from text at large. Not in the paper, which has no such step."
        },
    )
    whiten_ridge: float = field(
        default=None,  # type: ignore[assignment]  # set in __post_init__, by the method
        metadata={
            "help": "Ridge of that inverse, as a share of the mean variance of an input: 0.1 when None, 0.01 for "
            "'rome' and 'memit'."
        },
    )
    whiten_rank: int = field(
        default=None,  # type: ignore[assignment]  # set in __post_init__, by the method
        metadata={
            "help": "Eigenvectors of the second moment that are kept; the others count as equal. 128 when None, 512 "
            "for 'rome' and 'memit'."
        },
    )
    init: str = field(default="identity", metadata={"help": "'identity' (paper) or 'xavier'."})
    shared: bool = field(
        default=True,
        metadata={
            "help": "One network for all layers of one shape, with a scale and shift a layer (paper), or one each."
        },
    )
    edit_lr: float = field(
        default=None,  # type: ignore[assignment]  # set in __post_init__, by the method
        metadata={
            "help": "Initial step of an edit, of which each layer learns its own (1e-3 when None, 1e-4 for "
            "'ultraedit'); for methods that take many steps, Adam's learning rate, where None is what measured best."
        },
    )
    num_steps: int = field(
        default=50, metadata={"help": "The most steps of an edit, for methods that take many: 'ft', 'lora' and kin."}
    )
    stop_loss: float = field(
        default=0.1,
        metadata={
            "help": "Those methods stop when every target token is the argmax, with a negative log-likelihood of this "
            "or less, in nats."
        },
    )
    kl_weight: float = field(
        default=10.0, metadata={"help": "Weight of the KL divergence on ordinary text in 'ft-kl'."}
    )
    kl_texts: int = field(default=1, metadata={"help": "Lines of ordinary text that a step of 'ft-kl' looks at."})
    norm_bound: float = field(default=2e-3, metadata={"help": "The most that 'ft-l' changes any weight by."})
    lora_alpha: float = field(default=16, metadata={"help": "'lora' scales its product by this over the rank."})
    seed: int = field(default=0, metadata={"help": "Of what 'lora' draws its first matrix from."})
    ridge: float = field(
        default=None,  # type: ignore[assignment]  # set in __post_init__, by the method
        metadata={
            "help": "Strength of the ridge with which 'malmen', 'ultraedit', 'gradient' and 'memit' merge edits made "
            "together: 1 when None, 30 for 'memit'. 'malmen' learns it from there, a layer at a time."
        },
    )
    margin: float = field(
        default=None,  # type: ignore[assignment]  # set in __post_init__, by the method
        metadata={
            "help": "How far 'gradient' and 'memit' go past the step that suffices for their own prompt, so that "
            "other words lead to the target too: 1 stops there. 2 when None, 1.25 for 'memit'."
        },
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, metadata={"help": "Architecture, shapes and hash of the base's edited weights."}
    )

    def __post_init__(self) -> None:
        # Whatever is read from the Hub comes through here: each value has its type and a bound.
        _check(_is_text(self.method) and self.method, "method", self.method, "the name of a method")
        for name, value in {**_DEFAULTS, **_METHOD_DEFAULTS.get(self.method, {})}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in ("base_model_name_or_path", "revision", "layers_pattern"):
            value = getattr(self, name)
            _check(value is None or _is_text(value), name, value, f"a string of at most {_LONGEST} characters or None")
        _check(
            self.task_type in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"),
            "task_type",
            self.task_type,
            "'CAUSAL_LM', 'SEQ_2_SEQ_LM' or None",
        )
        _check(self.transform in TRANSFORMS, "transform", self.transform, f"one of {TRANSFORMS}")
        _check(self.init in ("identity", "xavier"), "init", self.init, "'identity' or 'xavier'")
        for name, least, largest in (
            ("rank", 1, 65536),
            ("num_hidden_layers", 1, 64),
            ("whiten_rank", 1, 65536),
            ("num_steps", 1, 100_000),
            ("kl_texts", 1, 1000),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            _check(
                type(value) is int and least <= value <= largest,
                name,
                value,
                f"a whole number of at least {least} and at most {largest}",
            )
        positive = ("edit_lr", "whiten_ridge", "ridge", "margin", "stop_loss", "kl_weight", "norm_bound", "lora_alpha")
        for name in positive:
            value = getattr(self, name)
            _check(
                isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e6,
                name,
                value,
                "a positive number of at most a million",
            )
        for name in ("normalize", "whiten", "shared"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        modules = self.target_modules
        _check(
            modules is None or _is_text(modules) or (_is_list_of(modules, str) and all(map(_is_text, modules))),
            "target_modules",
            modules,
            f"a string or a list of strings, each of at most {_LONGEST} characters",
        )
        layers = self.layers_to_transform
        _check(
            layers is None or (_is_list_of(layers, int) and all(0 <= index < _MOST for index in layers)),
            "layers_to_transform",
            layers,
            "a list of block indices",
        )
        fingerprint = self.base_fingerprint
        _check(fingerprint is None or isinstance(fingerprint, dict), "base_fingerprint", fingerprint, "an object")
        if isinstance(modules, (set, tuple)):
            self.target_modules = sorted(modules)

    @property
    def takes_many_steps(self) -> bool:
        """Whether the method finds an edit by many steps of its own, as fine-tuning does."""
        return self.method in _TAKE_MANY_STEPS

    @property
    def unused_options(self) -> tuple[str, ...]:
        """Names of the options that the method does not look at."""
        return () if self.takes_many_steps else STEP_OPTIONS

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EditorConfig:
        """
        A configuration from plain values.

        Raises:
            ValueError: A field is not known or a value is not valid.
        """
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"the editor configuration has unknown fields {shortened(unknown)}; it knows {sorted(known)}. Was it "
                "written by a newer hf_mend? Then upgrade hf_mend"
            )
        return cls(**values)

    def to_json(self) -> str:
        """The configuration as JSON text, as `save_pretrained` writes it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json_file(cls, path: str | Path) -> EditorConfig:
        """
        Reads `editor_config.json`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a JSON object or holds a value that is not valid.
        """
        return cls.from_dict(read_json_file(path))


def _check(ok: Any, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"EditorConfig.{name} is {shortened(value)}, expected {expected}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST


def _is_list_of(value: Any, kind: type) -> bool:
    return (
        isinstance(value, (list, tuple, set))
        and 0 < len(value) <= _MOST
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
