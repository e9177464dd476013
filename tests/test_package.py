"""The package's public names: imported on first use, and the same for people, type checkers and `import *`."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import hf_mend


def test_every_public_name_is_there_once():
    tree = ast.parse(Path(hf_mend.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert typed == hf_mend._MODULE_OF, "the imports for type checkers and those at run time differ"
    assert sorted(typed) == sorted(hf_mend.__all__)
    for name in hf_mend.__all__:
        assert f"{getattr(hf_mend, name).__module__}.".startswith(f"hf_mend.{typed[name]}.")
    names: dict[str, object] = {}
    exec("from hf_mend import *", names)
    assert set(hf_mend.__all__) <= set(names)


def test_no_public_name_is_a_module_s():
    modules = {module.name for module in pkgutil.iter_modules(hf_mend.__path__)}
    assert not modules & set(hf_mend.__all__), "importing the module would put it in the name's place"


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(hf_mend, "no_such_name")
    assert set(hf_mend.__all__) <= set(dir(hf_mend))
