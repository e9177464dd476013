"""Long texts in messages."""

from __future__ import annotations

import pytest

from hf_mend.data.display import shown


@pytest.mark.parametrize("text", ["", "short", "with 'quotes'\n", "x" * 80])
def test_a_text_that_fits_is_shown_whole(text):
    assert shown(text) == repr(text)


def test_of_a_long_text_both_ends_are_shown():
    text = "beginning " + "middle " * 500 + "end"
    found = shown(text, 40)
    assert len(found) == 42 and found.startswith("'beginning middle") and found.endswith("middle end'")
    assert "..." in found
