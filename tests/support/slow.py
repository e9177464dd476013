"""Parameters that run with the slow tests, as others show in the fast run what they would."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[str], values: Iterable[str]) -> list[Any]:
    """The values, of which all that are not among the fast ones are marked slow."""
    fast = [*fast]
    values = [*values]
    assert {*fast} <= {*values}, f"{[name for name in fast if name not in values]}: none of the values"
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
