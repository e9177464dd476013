"""The package's public names: imported on first use, and the same for people, type checkers and `import *`."""

from __future__ import annotations

import ast
import email
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.paths import ROOT

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


# ---- what is distributed ----


WEIGHTS = {str(path.relative_to(ROOT)) for path in ROOT.glob("model_cards/*/*.safetensors")}


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    """The metadata of a wheel and the names in a source distribution, built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("package")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "cache")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    code = (
        "import setuptools.build_meta as build\n"
        "print(build.prepare_metadata_for_build_wheel('../wheel'))\n"
        "print(build.build_sdist('../sdist'))\n"
    )
    for name in ("wheel", "sdist"):
        (folder / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=folder / "source",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stdout.lower() + done.stderr.lower()
    metadata = next((folder / "wheel").glob("*.dist-info")) / "METADATA"
    with tarfile.open(next((folder / "sdist").glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return email.message_from_string(metadata.read_text(encoding="utf-8")), names


def test_the_metadata_is_whole(distribution):
    metadata, _ = distribution
    assert (metadata["Name"], metadata["Version"]) == ("hf_mend", hf_mend.__version__)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Author"] and metadata["Keywords"] and metadata["Requires-Python"] == ">=3.10"
    classifiers = metadata.get_all("Classifier")
    assert {"Typing :: Typed", "Development Status :: 4 - Beta"} <= set(classifiers)
    assert any(one.startswith("Topic ::") for one in classifiers)
    assert not any(one.startswith("License ::") for one in classifiers), "the licence is an expression"
    needed = [one for one in metadata.get_all("Requires-Dist") if "extra ==" not in one]
    names = [re.split("[<>=]", one)[0] for one in needed]
    assert len(names) == len(set(names)) and {"torch", "transformers", "peft", "safetensors"} <= set(names)
    assert {"demo", "data", "plots", "space", "harness", "quantization", "dev"} == set(
        metadata.get_all("Provides-Extra")
    )


def test_every_link_of_the_description_leads_somewhere_from_anywhere(distribution):
    text = distribution[0].get_payload()
    assert "Exact undo" in text and "Limits" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links), links


def test_a_source_distribution_can_be_tested_and_read(distribution):
    _, names = distribution
    if shutil.which("git"):  # outside of a checkout nothing is listed
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
        assert not {one for one in listed.split() if not one.startswith(".")} - names - WEIGHTS
    assert {
        "tests/conftest.py",
        "tests/support/models.py",
        "docs/api.md",
        "docs/how_it_works.svg",
        "Makefile",
    } <= names
    assert {"examples/demo.py", "examples/data/facts_train.json", "CHANGELOG.md", "LICENSE", "SECURITY.md"} <= names
    assert not names & WEIGHTS, "their licence is another than the package's"
    assert {"hf_mend/py.typed", "hf_mend/model.py", "benchmarks/README.md"} <= names
    assert any(name.startswith("hf_mend/templates/") for name in names)
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)
