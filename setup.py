"""The part of the package's metadata that is computed; the rest stands in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def without_local_links(text: str) -> str:
    """The README as other sites show it: links to files of the checkout, which lead nowhere there, become text."""
    text = re.sub(r"!\[[^\]]*\]\((?!\w+://)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!\w+://)[^)]*\)", r"\1", text)


setup(
    long_description=without_local_links((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
