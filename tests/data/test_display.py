"""Long texts in messages."""

from __future__ import annotations

import pytest

from hf_mend.data.display import html_table, shown


@pytest.mark.parametrize("text", ["", "short", "with 'quotes'\n", "x" * 80])
def test_a_text_that_fits_is_shown_whole(text):
    assert shown(text) == repr(text)


def test_of_a_long_text_both_ends_are_shown():
    text = "beginning " + "middle " * 500 + "end"
    found = shown(text, 40)
    assert len(found) == 42 and found.startswith("'beginning middle") and found.endswith("middle end'")
    assert "..." in found


def test_a_table_for_notebooks_escapes_what_it_holds():
    found = html_table("<i>title", [("<script>", 1)], ("a&b", "c"))
    assert "<i>" not in found and "<script>" not in found
    assert "&lt;i&gt;title" in found and "&lt;script&gt;" in found and "a&amp;b" in found
    assert found.count("<tr>") == 2 and found.count("<td") == 2 and found.count("<th") == 2
