"""Texts in messages and reports."""

from __future__ import annotations


def shown(text: str, longest: int = 80) -> str:
    """
    A text in quotes, its middle left out where it is long.

    Args:
        text (`str`): The text.
        longest (`int`, defaults to 80): The most characters to show.

    Example:

    ```python
    shown("The guarantee covers material and manufacturing faults", 20)  # "'The guarantee...faults'"
    ```
    """
    if len(text) <= longest:
        return repr(text)
    end = longest // 3
    return repr(f"{text[: longest - end - 3]}...{text[-end:]}")
