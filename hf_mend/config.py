"""The configuration of an editor: its method, its edited layers and its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from .data.display import html_table


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


CONFIG_NAME = "editor_config.json"
# Bounds of what a configuration may hold: characters of a string, entries of a list, and numbers without bounds of
# their own.
_LONGEST = 2000
_MOST = 10_000
_LARGEST_INT, _LARGEST_FLOAT = 2**32 - 1, 1e6
# The options that files of 0.1.0 hold for every method, also if it has no such option.
_OPTIONS_OF_0_1_0 = frozenset(
    ("rank", "num_hidden_layers", "transform", "normalize", "whiten", "whiten_ridge", "whiten_rank", "init", "shared")
    + ("edit_lr", "num_steps", "stop_loss", "kl_weight", "kl_texts", "norm_bound", "lora_alpha", "seed", "ridge")
    + ("margin",)
)


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """
    Declare an option of a method in its configuration, together with its valid values, against which a configuration
    from the Hub is checked. `None` stands for the default.

    Args:
        default (`bool`, `int`, `float` or `str`): The default. Its type is the option's; a float may be given as an
            integer.
        help (`str`): The description of the option.
        least (`float`, *optional*): The smallest value. Without it an integer must not be negative, and a float must
            be positive.
        most (`float`, *optional*): The largest value: 2**32 - 1 for an integer and a million for a float if left out.
        choices (`Sequence[str]`, *optional*): All values of a string that is one of a few.

    Returns:
        `dataclasses.Field`: The field of the dataclass.
    """
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": tuple(choices)})


class _ConfigType(type):
    """
    Make `EditorConfig(method="memit", num_steps=20)` a `MemitConfig`. Only calls are changed, so that `copy` and
    `pickle` treat configurations as any dataclass.
    """

    if not TYPE_CHECKING:

        def __call__(cls, *args: Any, **options: Any) -> EditorConfig:
            method = args[0] if args else options.pop("method", MISSING)
            method, kind = _method_and_class(cls, method)
            names = {item.name for item in fields(kind)}
            if "r" in options and "rank" in names - {"r"}:  # PEFT's name
                if "rank" in options:
                    raise ValueError("r and rank are two names of one option; give one of them")
                options["rank"] = options.pop("r")
            for name in options:
                if name not in names:
                    raise ValueError(_no_such_option(method, kind, name))
            return type.__call__(kind, method, *args[1:], **options)


@dataclass
class EditorConfig(metaclass=_ConfigType):
    """
    The configuration of an editor. Field names are PEFT's where PEFT has one.

    A method's own options are fields of its own class, which stands in the method's file:
    [`~hf_mend.methods.MendConfig`], [`~hf_mend.methods.MemitConfig`] and so on. `EditorConfig(method=...)` takes these
    options too and returns an object of that class. `r` is understood for `rank`.

    Args:
        method (`str`, defaults to `"mend"`): The name under which the method is registered.
        task_type (`str`, *optional*): `"CAUSAL_LM"` or `"SEQ_2_SEQ_LM"`; found from the base model if `None`.
        base_model_name_or_path (`str`, *optional*): The base model that the editor was made for.
        revision (`str`, *optional*): The base model's revision.
        target_modules (`str` or `list[str]`, defaults to `"default"`): The layers to edit: `"default"` (what measured
            best for the method, by fraction of depth), `"paper"` (all MLP weights of the last three blocks, or of the
            last two of encoder and decoder), `"all-linear"` (all linear layers of the blocks but routers), a regular
            expression for whole names, or a list of names or last parts of names.
        layers_to_transform (`list[int]`, *optional*): Indices of the blocks to edit; all that `target_modules` matches
            if `None`.
        layers_pattern (`str`, *optional*): Last part of the name of the block list, if the model has several.
        base_fingerprint (`dict[str, Any]`, *optional*): Architecture, shapes and hash of the base's edited weights;
            `save_pretrained` of a model sets it.
        scope (`bool`, defaults to `False`): Whether edits act only at the tokens where a text asks for them, as a
            learned scope decides ([`~hf_mend.scope.network.ScopeNetwork`]); otherwise they act everywhere. With it,
            an encoder-decoder model's edited layers are the decoder's.
        factor_dtype (`str`, defaults to `"int4"`): How edits with a scope keep their factors: `"int4"`
            ([`~hf_mend.edits.four_bit`]), `"bfloat16"` or `"float32"`. An edit that would say its target less surely
            in four bits is kept in bfloat16.
        factor_error (`float`, defaults to 0.0005): What an edit in four bits may leave out for a lower rank, as a
            share of the squared Frobenius norm of all of its layers.
        options: The options of the method.

    Raises:
        ValueError: The method is not registered, it has no such option, or a value is not valid.

    Example:

    ```python
    config = EditorConfig(method="memit", num_steps=20)
    config.save_pretrained("my-config")
    config = EditorConfig.from_pretrained("my-config")
    ```
    """

    method: str = field(default="mend", metadata={"help": "The name under which the method is registered."})
    task_type: str | None = field(
        default=None, metadata={"help": "'CAUSAL_LM' or 'SEQ_2_SEQ_LM'; found from the base model if None."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model that the editor was made for."}
    )
    revision: str | None = field(default=None, metadata={"help": "The base model's revision."})
    target_modules: str | list[str] | None = field(
        default="default",
        metadata={
            "help": "Layers to edit: 'default' (what measured best for the method, by fraction of depth), 'paper' "
            "(all MLP weights of the last three blocks, or of the last two of encoder and decoder), 'all-linear' (all "
            "linear layers of the blocks but routers), a regular expression for whole names, or a list of names or "
            "last parts of names."
        },
    )
    layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks to edit; all that target_modules matches if None."}
    )
    layers_pattern: str | None = field(
        default=None, metadata={"help": "Last part of the name of the block list, if the model has several."}
    )
    base_fingerprint: dict[str, Any] | None = field(
        default=None, repr=False, metadata={"help": "Architecture, shapes and hash of the base's edited weights."}
    )
    scope: bool = option(
        False,
        "Whether edits act only at the tokens where a text asks for them, as a learned scope decides; otherwise they "
        "act everywhere.",
    )
    factor_dtype: str = option(
        "int4",
        "How edits with a scope keep their factors. In four bits only where the target is then said as surely.",
        choices=("int4", "bfloat16", "float32"),
    )
    factor_error: float = option(
        0.0005,
        "What an edit in four bits may leave out for a lower rank, as a share of its squared Frobenius norm.",
        least=0.0,
        most=1.0,
    )

    # The blocks that target_modules="default" means for the method, as fractions of the model's depth: first and end.
    # benchmarks/results/settings.md has the measurements.
    default_span: ClassVar[tuple[float, float]] = (0.567, 0.767)
    # Whether `hf-mend train` gives a new editor of the method a scope if it is not told.
    trained_with_scope: ClassVar[bool] = False
    # Whether edits of the method are all that changes the model, so that a scope can say where.
    takes_scope: ClassVar[bool] = True

    if TYPE_CHECKING:  # the signature of a call, which returns an object of the method's own class

        def __init__(self, method: str = "mend", **options: Any) -> None: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `whiten_rank: int = 512` give an inherited option another default and keep its help and bounds."""
        super().__init_subclass__(**kwargs)
        inherited = {item.name: item for base in cls.__mro__[:0:-1] if _is_config(base) for item in fields(base)}
        for name in get_annotations(cls).keys() & inherited.keys() & vars(cls).keys():
            default = vars(cls)[name]
            if not isinstance(default, Field):
                setattr(cls, name, field(default=default, metadata=inherited[name].metadata))

    def __post_init__(self) -> None:
        # Every configuration from the Hub is checked here: each value has its type and a bound.
        for name in ("base_model_name_or_path", "revision", "layers_pattern"):
            value = getattr(self, name)
            _check(value is None or _is_text(value), name, value, f"a string of at most {_LONGEST} characters or None")
        task, tasks = self.task_type, "'CAUSAL_LM', 'SEQ_2_SEQ_LM' or None"
        _check(task in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"), "task_type", task, tasks)
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
        if self.scope and not self.takes_scope:
            raise ValueError(
                f"scope is True, and method {self.method!r} changes the base itself for all texts, which no scope "
                "holds back; leave scope out, or take another method"
            )
        if isinstance(modules, (set, tuple)):
            self.target_modules = sorted(modules)
        for item in fields(self):
            if "choices" in item.metadata:  # declared by option()
                if getattr(self, item.name) is None:
                    setattr(self, item.name, item.default)
                _check_option(item, getattr(self, item.name))

    # ---- plain values and files ----

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditorConfig:
        """
        Make a configuration from plain values. Options that version 0.1.0 wrote for every method are ignored if the
        method does not have them.

        Raises:
            ValueError: The method is not registered, a field is not known, or a value is not valid.
        """
        _, kind = _method_and_class(cls, values.get("method", MISSING))
        known = {item.name for item in fields(kind)}
        unknown = sorted(set(values) - known - _OPTIONS_OF_0_1_0 - {"r"})
        if unknown:
            raise ValueError(
                f"the editor configuration has unknown fields {_shortened(unknown)}; it knows {sorted(known)}. Was it "
                "written by a newer hf_mend? Then upgrade hf_mend"
            )
        return cls(**{name: value for name, value in values.items() if name in known | {"r"}})

    def _repr_html_(self) -> str:
        rows = [(item.name, repr(getattr(self, item.name))) for item in fields(self) if item.repr]
        return html_table(type(self).__name__, rows, ("option", "value"))

    def to_json(self) -> str:
        """Return the configuration as JSON text, as `save_pretrained` writes it."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json_file(cls, path: str | Path) -> EditorConfig:
        """
        Read `editor_config.json`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a JSON object or holds a value that is not valid.
        """
        from .hub.files import read_json_file

        return cls.from_dict(read_json_file(path))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **hub_kwargs: Any) -> EditorConfig:
        """
        Read the configuration of a saved editor.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): A folder with an `editor_config.json`, or a repository's
                id on the Hub.
            hub_kwargs: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, as in `hf_hub_download`.

        Raises:
            FileNotFoundError: The folder or repository has no `editor_config.json`.
            ValueError: The file is damaged or holds a value that is not valid.
        """
        from .hub.transfer import find_files

        return cls.from_json_file(find_files(pretrained_model_name_or_path, [CONFIG_NAME], **hub_kwargs)[CONFIG_NAME])

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Write `editor_config.json`, whole or not at all.

        Args:
            save_directory (`str` or `Path`): The folder, which is made if it does not exist.
        """
        from .hub.atomic import made_folder, replaced_file

        folder = Path(save_directory)
        made_folder(folder)
        with replaced_file(folder / CONFIG_NAME) as work:
            work.write_text(self.to_json(), encoding="utf-8")

    def push_to_hub(self, repo_id: str, **push_kwargs: Any) -> CommitInfo:
        """
        Upload `editor_config.json`; other files in the repository stay.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            push_kwargs: As for [`~EditableModel.push_to_hub`], whose errors are raised too.
        """
        from .hub.transfer import push_written

        return push_written(self.save_pretrained, "editor configuration", repo_id, replaces=(), **push_kwargs)


# ---- configurations and methods ----


def config_class(method: str) -> type[EditorConfig]:
    """
    Return the class of a method's configuration.

    Raises:
        ValueError: The method is not registered.
    """
    _check(_is_text(method) and method, "method", method, "the name of a method")
    found: type[EditorConfig] = _methods().get_method(method).config_class
    return found


def options_of_methods() -> dict[str, list[str]]:
    """Return the names of all options with the methods that have them."""
    common = {item.name for item in fields(EditorConfig)}
    found: dict[str, list[str]] = {}
    for method, kind in _methods().config_classes().items():
        for item in fields(kind):
            if item.name not in common:
                found.setdefault(item.name, []).append(method)
    return found


def _methods() -> Any:
    # Methods import configurations, so an import statement here would be circular. They are imported by name, and
    # thereby registered, when the first configuration is made.
    return import_module(f"{__package__}.methods.base")


def _method_and_class(cls: type[EditorConfig], method: Any) -> tuple[str, type[EditorConfig]]:
    """Return the method and the class of a configuration; `MISSING` stands for the method of the class."""
    if method is MISSING:
        names = [name for name, kind in _methods().config_classes().items() if kind is cls]
        method = "mend" if cls is EditorConfig else names[0] if names else None
        if method is None:
            raise ValueError(
                f"{cls.__name__} is the configuration of no method; register one with "
                f"@register_method(name, {cls.__name__})"
            )
    kind = config_class(method)
    if not issubclass(kind, cls):
        raise ValueError(f"the method {method!r} takes a {kind.__name__}, not a {cls.__name__}; use EditorConfig")
    return method, kind


def _no_such_option(method: str, kind: type[EditorConfig], name: str) -> str:
    own = sorted({item.name for item in fields(kind)} - {item.name for item in fields(EditorConfig)})
    others = options_of_methods().get("rank" if name == "r" else name)
    which = f" (those that have it: {', '.join(others)})" if others else ""
    near = get_close_matches(name, [item.name for item in fields(kind)], 1)
    meant = f"; did you mean {near[0]}?" if near else f"; its options are {own}"
    return f"the method {method!r} has no option {_shortened(name)}{which}{meant}"


# ---- checks ----


def _check_option(item: Field[Any], value: Any) -> None:
    """Check a value against its declaration by [`option`]."""
    kind, (least, most, choices) = type(item.default), map(item.metadata.get, ("least", "most", "choices"))
    if choices:
        expected = " or ".join(map(repr, choices)) if len(choices) == 2 else f"one of {choices}"
        ok = isinstance(value, str) and value in choices
    elif kind is bool:
        ok, expected = isinstance(value, bool), "True or False"
    elif kind is int:
        least, most = 0 if least is None else least, _LARGEST_INT if most is None else most
        ok = type(value) is int and least <= value <= most
        expected = f"a whole number of at least {least} and at most {most}"
    elif kind is float:
        end = "a million" if most is None else f"{most:g}"
        low = "a positive number of" if least is None else f"a number of at least {least:g} and"
        most = _LARGEST_FLOAT if most is None else most
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        ok = ok and value <= most and (value > 0 if least is None else value >= least)
        expected = f"{low} at most {end}"
    else:
        ok, expected = _is_text(value), f"a string of at most {_LONGEST} characters"
    _check(ok, item.name, value, expected)


def _check(ok: Any, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"EditorConfig.{name} is {_shortened(value)}, expected {expected}")


def _shortened(value: Any) -> str:
    from .hub.files import shortened  # imports torch, which takes long

    return shortened(value)


def _is_config(cls: type) -> bool:
    return "__dataclass_fields__" in vars(cls)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST


def _is_list_of(value: Any, kind: type) -> bool:
    return (
        isinstance(value, (list, tuple, set))
        and 0 < len(value) <= _MOST
        and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
    )
