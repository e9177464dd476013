"""Configurations: a class a method, what they accept, where they are read from, and methods from outside."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch
from support.models import RECORDS, EditableModel, all_logits, build_model, make_tokenizer
from support.processes import run_python

import hf_mend
from hf_mend import EditorConfig
from hf_mend.bases.targets import find_targets
from hf_mend.config import option, options_of_methods
from hf_mend.methods import Mend, MendConfig, get_method, register_method
from hf_mend.methods.base import _METHODS, registered_methods


# What version 0.1.0 filled in, by method, where the user said nothing: of each method, what it looks at.
MEND = {
    "rank": 256, "num_hidden_layers": 1, "transform": "both", "normalize": True, "whiten": True, "whiten_ridge": 0.1,
    "whiten_rank": 128, "init": "identity", "shared": True, "edit_lr": 1e-3,
}  # fmt: skip
STEPS = {"num_steps": 50, "stop_loss": 0.1}
DEFAULTS = {
    "mend": MEND,
    "malmen": {**MEND, "ridge": 1.0},
    "ke": {"rank": 256, "num_hidden_layers": 1, "normalize": True, "init": "identity", "edit_lr": 1e-3},
    "enn": {"normalize": True, "edit_lr": 1e-3},
    "ft": {"edit_lr": 1e-4, **STEPS},
    "ft-kl": {"edit_lr": 1e-4, **STEPS, "kl_weight": 10.0, "kl_texts": 1},
    "ft-l": {"edit_lr": 1e-4, **STEPS, "norm_bound": 2e-3},
    "lora": {"edit_lr": 1e-3, **STEPS, "rank": 8, "lora_alpha": 16, "seed": 0},
    "rome": {"edit_lr": 0.1, **STEPS, "whiten_ridge": 0.01, "whiten_rank": 512},
    "memit": {"edit_lr": 0.05, **STEPS, "whiten_ridge": 0.01, "whiten_rank": 512, "ridge": 30.0, "margin": 1.25},
    "gradient": {"whiten_ridge": 0.1, "whiten_rank": 128, "ridge": 1.0, "margin": 2.0},
    "ultraedit": {"edit_lr": 1e-4, "ridge": 1.0},
}
# What its files hold beside the common fields, whatever the method.
OF_0_1_0 = {**MEND, **STEPS, "kl_weight": 10.0, "kl_texts": 1, "norm_bound": 2e-3, "lora_alpha": 16, "seed": 0,
            "ridge": 1.0, "margin": 2.0}  # fmt: skip
COMMON = {item.name for item in dataclasses.fields(EditorConfig)}


def options_of(config: EditorConfig) -> dict[str, object]:
    return {name: value for name, value in config.to_dict().items() if name not in COMMON}


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_method_has_its_own_options_and_defaults(method):
    config = EditorConfig(method=method)
    assert options_of(config) == DEFAULTS[method]
    assert type(config) is get_method(method).config_class is not EditorConfig
    assert type(config)() == EditorConfig(method) == config
    # As 0.1.0 had it, None is the method's own default.
    assert EditorConfig(method, **dict.fromkeys(DEFAULTS[method])) == config
    assert all(item.metadata["help"] for item in dataclasses.fields(config))


def test_all_methods_are_known_above():
    own = [name for name in registered_methods() if get_method(name).__module__.startswith("hf_mend.")]
    assert set(DEFAULTS) == set(own)
    assert options_of_methods()["kl_weight"] == ["ft-kl"]
    assert {name for name, methods in options_of_methods().items() if {*methods} & {*own}} == set(OF_0_1_0)


def test_a_configuration_is_copied_pickled_and_replaced():
    config = EditorConfig(method="memit", num_steps=20, target_modules=["fc1"])
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config and type(other) is type(config)
    assert dataclasses.replace(config, num_steps=3).num_steps == 3
    # MALMEN has MEND's options and more, so that a configuration of the one becomes one of the other.
    malmen = dataclasses.replace(EditorConfig(rank=3), method="malmen")
    assert (malmen.method, malmen.rank, malmen.ridge) == ("malmen", 3, 1.0)
    with pytest.raises(ValueError, match="the method 'mend' takes a MendConfig, not a MemitConfig"):
        dataclasses.replace(config, method="mend")


def test_r_is_the_rank():
    assert EditorConfig(r=64).rank == EditorConfig.from_dict({"method": "mend", "r": 64}).rank == 64
    assert EditorConfig("lora", r=3).to_dict()["rank"] == 3
    with pytest.raises(ValueError, match="r and rank are two names of one option"):
        EditorConfig(r=3, rank=3)
    with pytest.raises(ValueError, match=r"the method 'enn' has no option 'r' \(those that have it: mend, ke, "):
        EditorConfig("enn", r=3)
    with pytest.raises(ValueError, match="rank is 0, expected"):
        EditorConfig(r=0)


def test_an_option_of_another_method_is_refused():
    message = r"the method 'mend' has no option 'kl_weight' \(those that have it: ft-kl\); its options are \['edit_lr'"
    with pytest.raises(ValueError, match=message):
        EditorConfig(kl_weight=1.0)
    with pytest.raises(ValueError, match="the method 'enn' has no option 'size'; its options are"):
        EditorConfig(method="enn", size=3)
    with pytest.raises(ValueError, match="EditorConfig.method is 'magic'; the methods are"):
        EditorConfig(method="magic", rank=3)
    for method in (None, "", 3, "x" * 3000):
        with pytest.raises(ValueError, match="EditorConfig.method is .* expected the name of a method"):
            EditorConfig(method=method)


@pytest.mark.parametrize("method", DEFAULTS)
def test_a_file_of_0_1_0_loads_and_what_the_method_lacks_is_left_out(method, tmp_path):
    written = {**OF_0_1_0, **DEFAULTS[method], "method": method, "target_modules": ["fc1"], "task_type": None}
    (tmp_path / "editor_config.json").write_text(json.dumps(written))
    config = EditorConfig.from_pretrained(tmp_path)
    assert config == EditorConfig(method, target_modules=["fc1"])
    with pytest.raises(ValueError, match=r"unknown fields \['size'\].*newer hf_mend"):
        EditorConfig.from_dict({**written, "size": 3})


def test_a_configuration_is_saved_and_read_as_peft_s(tmp_path):
    config = EditorConfig("ft-l", norm_bound=0.5, layers_to_transform=[1])
    config.save_pretrained(tmp_path / "new" / "folder")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["editor_config.json"]
    for cls in (EditorConfig, type(config)):
        assert cls.from_pretrained(tmp_path / "new" / "folder") == config
    assert EditorConfig.from_pretrained(tmp_path / "new", subfolder="folder") == config
    with pytest.raises(ValueError, match="takes a BoundedFineTuningConfig, not a MendConfig"):
        MendConfig.from_pretrained(tmp_path / "new" / "folder")
    with pytest.raises(FileNotFoundError):
        EditorConfig.from_pretrained(tmp_path)


def test_a_configuration_goes_to_the_hub_and_comes_back(hub):
    first, other = EditorConfig(rank=3), EditorConfig("memit", margin=1.0)
    oid = first.push_to_hub("me/config").oid
    other.push_to_hub("me/config", subfolder="below")
    assert set(hub.repositories["me/config"].files()) >= {"editor_config.json", "below/editor_config.json"}
    assert (
        EditorConfig.from_pretrained("me/config") == EditorConfig.from_pretrained("me/config", revision=oid) == first
    )
    assert EditorConfig.from_pretrained("me/config", subfolder="below") == other
    with pytest.raises(FileNotFoundError, match="has no revision 'none'"):
        EditorConfig.from_pretrained("me/config", revision="none")


def test_the_default_layers_of_a_model_of_thirty_blocks():
    """Those of the shipped editors, of SmolLM2's depth; 'memit' and 'rome' write lower down."""
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"down": torch.nn.Linear(2, 2)}) for _ in range(30))
    model = torch.nn.ModuleDict({"layers": blocks})
    found = {method: [target.block for target in find_targets(model, EditorConfig(method))] for method in DEFAULTS}
    expected = {method: list(range(17, 23)) for method in DEFAULTS}
    assert found == {**expected, "memit": list(range(8, 14)), "rome": [10]}


def test_the_module_of_configurations_imports_no_torch():
    code = "import sys, hf_mend.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(hf_mend.__file__).parents[1])


# ---- a method from outside ----

OUTSIDE = '''
from dataclasses import dataclass
from typing import ClassVar

from hf_mend import EditorConfig, register_method
from hf_mend.config import option
from hf_mend.methods import EditMethod


@dataclass
class PlainStepConfig(EditorConfig):
    """Options of its own, with bounds."""

    step: float = option(0.5, "How far an edit goes down the gradient.", least=0, most=10)
    repeats: int = option(1, "How often.", least=1, most=3)
    sign: str = option("down", "Which way.", choices=("down", "up"))
    name: str = option("", "For people.")
    default_span: ClassVar[tuple[float, float]] = (0.0, 0.5)


@register_method("plain-step", PlainStepConfig)
class PlainStep(EditMethod):
    trains = False

    def forward(self, factors):
        step = -self.config.step * self.config.repeats * (1 if self.config.sign == "down" else -1)
        return {name: (x, step * delta) for name, (x, delta) in factors.items()}
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module of somebody else's that registers a method, which is forgotten at the end."""
    (tmp_path / "plain_step.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(_METHODS)
    yield import_module("plain_step")
    _METHODS.clear()
    _METHODS.update(before)
    del sys.modules["plain_step"]


def test_a_method_from_outside_brings_its_options(outside):
    config = EditorConfig(method="plain-step", step=2, name="mine")
    assert type(config) is outside.PlainStepConfig
    assert config == outside.PlainStepConfig(step=2, name="mine") == EditorConfig.from_dict(config.to_dict())
    assert options_of(config) == {"step": 2, "repeats": 1, "sign": "down", "name": "mine"}
    for values, message in (
        ({"step": 11.0}, "EditorConfig.step is 11.0, expected a number of at least 0 and at most 10"),
        ({"step": float("nan")}, "EditorConfig.step is nan"),
        ({"repeats": 4}, "EditorConfig.repeats is 4, expected a whole number of at least 1 and at most 3"),
        ({"repeats": 1.0}, "EditorConfig.repeats is 1.0"),
        ({"sign": "left"}, "EditorConfig.sign is 'left', expected 'down' or 'up'"),
        ({"name": 3}, "EditorConfig.name is 3, expected a string"),
        ({"rank": 3}, "the method 'plain-step' has no option 'rank'"),
    ):
        with pytest.raises(ValueError, match=message):
            EditorConfig(method="plain-step", **values)


def test_a_method_from_outside_edits_is_saved_and_loads_in_another_process(outside, tmp_path):
    model = EditableModel(build_model("llama"), EditorConfig(method="plain-step", step=0.25), make_tokenizer())
    assert [target.block for target in model.targets] == [0, 1]
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
    edited = all_logits(model, model.tokenizer)
    model.save_pretrained(tmp_path / "editor")
    model.undo_all()
    assert not torch.equal(all_logits(model, model.tokenizer), edited)
    assert "| `step` | `0.25` |" in (tmp_path / "editor" / "README.md").read_text()
    code = textwrap.dedent(f"""
        import sys
        import torch
        torch.set_num_threads(1)
        from hf_mend import EditableModel
        from support.models import RECORDS, all_logits, build_model, make_tokenizer
        try:
            EditableModel.from_pretrained(build_model("llama"), {str(tmp_path / "editor")!r})
        except ValueError as error:
            assert "EditorConfig.method is 'plain-step'; the methods are" in str(error)
        else:
            sys.exit("nobody has registered it yet")
        import plain_step
        model = EditableModel.from_pretrained(build_model("llama"), {str(tmp_path / "editor")!r}, make_tokenizer())
        assert type(model.editor_config) is plain_step.PlainStepConfig and model.editor_config.step == 0.25
        model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1)
        torch.save(all_logits(model, model.tokenizer), {str(tmp_path / "logits.pt")!r})
    """)
    tests = Path(__file__).parent
    paths = f"{tests.parent}:{tests}:{tmp_path}"
    done = run_python("-c", code, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), edited)


def test_a_method_without_options_of_its_own_has_those_of_its_parent(outside):
    @register_method("my-mend")
    class MyMend(Mend):
        pass

    assert EditorConfig("my-mend", rank=3).method == "my-mend"
    assert MendConfig(method="my-mend").method == "my-mend" and MendConfig().method == "mend"


def test_what_cannot_be_registered(outside):
    with pytest.raises(TypeError, match="config_class is .* expected a subclass of EditorConfig"):
        register_method("mine", dict)

    @dataclasses.dataclass
    class Loose(EditorConfig):
        size: int = option(1, "")

    with pytest.raises(ValueError, match="Loose is the configuration of no method; register one with"):
        Loose()


def test_a_method_that_changes_the_base_for_all_texts_takes_no_scope():
    with pytest.raises(
        ValueError, match="scope is True, and method 'enn' changes the base itself .* take another method"
    ):
        EditorConfig(method="enn", scope=True)
    assert EditorConfig(method="mend", scope=True).scope and not EditorConfig(method="enn").scope
