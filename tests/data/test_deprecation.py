"""Names that were changed: the old ones work, warn with the new one, and never hide a mistake."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
from dataclasses import dataclass

import pytest
from support.processes import run_python

import hf_mend
from hf_mend.data.deprecation import renamed_arguments, renamed_in, renamed_method


@renamed_arguments(old="new")
def function(first: int, new: int = 0) -> tuple[int, int]:
    """Some text."""
    return first, new


@renamed_arguments(old="new")
@dataclass
class Settings:
    new: int = 0


class Model:
    def new(self, value: int) -> int:
        return value

    old = renamed_method("old", "new")


def test_an_old_argument_is_the_new_one_and_says_so():
    with pytest.warns(
        FutureWarning, match="^function: old is now called new; the old name goes with the next"
    ) as said:
        assert function(1, old=2) == (1, 2)
    assert said[0].filename == __file__
    assert function(1, new=2) == (1, 2) == function(1, 2)
    assert (function.__name__, function.__doc__) == ("function", "Some text.")
    assert list(inspect.signature(function).parameters) == ["first", "new"]


def test_old_and_new_together_are_refused():
    with pytest.raises(TypeError, match="function got 'old' and 'new', which are one argument; give the latter"):
        function(1, old=2, new=2)


def test_the_fields_of_a_dataclass():
    with pytest.warns(FutureWarning, match="Settings: old is now called new"):
        settings = Settings(old=3)
    assert settings == Settings(new=3) and pickle.loads(pickle.dumps(settings)) == settings
    with pytest.warns(FutureWarning, match="Settings.old is now called new"):
        assert settings.old == 3
    assert renamed_in(Settings) == {"old": "new"} and renamed_in(Model) == {}


def test_a_method():
    with pytest.warns(FutureWarning, match="Model.old is now called new") as said:
        assert Model().old(4) == 4
    assert said[0].filename == __file__
    assert "Deprecated" in inspect.getdoc(Model.old)


@pytest.mark.filterwarnings("error")
def test_the_new_names_warn_of_nothing():
    assert (Settings(new=1).new, Model().new(1), function(1)) == (1, 1, (1, 0))


def test_modules_of_before_are_found_under_their_old_names():
    command = (
        "import warnings; warnings.simplefilter('error')\n"
        "import hf_mend, hf_mend.data\n"
        "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    import hf_mend.generation\n"
        "    from hf_mend.targets import Target\n"
        "    from hf_mend.data import Query\n"
        "import hf_mend.evaluation.generation, hf_mend.data.encoding, hf_mend.bases.targets\n"
        "assert hf_mend.generation.answer is hf_mend.evaluation.generation.answer\n"
        "assert Target is hf_mend.bases.targets.Target and Query is hf_mend.data.encoding.Query\n"
        "assert hf_mend.evaluation.generation.__spec__.name == 'hf_mend.evaluation.generation'\n"
        "print(*{str(one.message): one for one in said if one.category is FutureWarning}, sep='\\n')\n"
    )
    found = run_python("-c", command)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [
        f"{old} is now called {new}; the old name goes with the next release"
        for old, new in (
            ("the module hf_mend.generation", "hf_mend.evaluation.generation"),
            ("the module hf_mend.targets", "hf_mend.bases.targets"),
            ("hf_mend.data.Query", "hf_mend.data.encoding.Query"),
        )
    ]


def test_no_other_name_is_found():
    with pytest.raises(ModuleNotFoundError, match="hf_mend.nothing"):
        importlib.import_module("hf_mend.nothing")
    with pytest.raises(AttributeError, match="module 'hf_mend.data' has no attribute 'Quary'"):
        hf_mend.data.Quary  # noqa: B018
    for new in hf_mend._MOVED.values():
        assert importlib.util.find_spec(f"hf_mend.{new}") is not None
