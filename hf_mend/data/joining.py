"""What stands between a prompt and its answer in plain text: a space, or nothing where nobody would write one."""

from __future__ import annotations

import re


# Scripts that are written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, Chinese and Japanese with
# their full-width punctuation.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3001-\u30ff\u3100-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\ufe30-\ufe4f\uff01-\uffef\U00020000-\U0003ffff]"
)
_OPENING = tuple("([{<«‹„‚“‘¿¡")
# An ASCII quote opens where white space or an opening bracket stands before it, or what it is assigned to.
_OPEN_QUOTE = re.compile(r"(?:^|[\s(\[{<=:,])['\"`]+$")
# The prompt ends within an address, a path or a name of code.
_UNFINISHED_WORD = re.compile(
    r"(?:"
    r"(?:://|\bwww\.)\S*[.:/?#&=@_~-]"  # https://www. | http://localhost: | https://example.com/search?q=
    r"|[/\\]"  # /usr/local/
    r"|(?:^|\s)[@#$£]"  # $ | #
    r"|[^\s=<>!][@_=&]"  # support@ | name= | snake_
    r"|\w-"  # X200-
    r"|\w\(\)\.|\w::|\w->"  # call(). | std:: | pointer->
    r"|<[/|!]?\w[^<>]*>"  # <b> | <|assistant|>
    r")$"
)


def is_unspaced(letter: str) -> bool:
    """Whether a letter's script is written without spaces between words."""
    return bool(_UNSPACED.match(letter))


def ends_word(text: str, more: str) -> bool:
    """
    Whether the last word of a text ends there, where `more` follows: not that of "Lyon" in "Lyonnais".

    Args:
        text (`str`): The text.
        more (`str`): What follows it.
    """
    if not more or not (text[-1:].isalnum() and more[0].isalnum()):
        return True
    return is_unspaced(text[-1]) or is_unspaced(more[0])


def separator_between(prompt: str, answer: str) -> str:
    """
    One space, or nothing: behind a text of a script without spaces, an opening quote or bracket, and within an
    address, a path or a name of code.

    Args:
        prompt (`str`): A text without white space at its end.
        answer (`str`): What follows it, without white space at its beginning.

    Example:

    ```python
    separator_between("The capital of France is", "Lyon")  # " "
    separator_between("日本の首都は", "大阪")  # ""
    ```
    """
    if not prompt or not answer:
        return ""
    if prompt.endswith(_OPENING) or _OPEN_QUOTE.search(prompt) or _UNFINISHED_WORD.search(prompt):
        return ""
    if _UNSPACED.match(prompt[-1]):
        return ""
    # Behind other punctuation, such as the "?" of many Japanese questions, it depends on both sides.
    letters = re.findall(r"\w", prompt)
    if letters and _UNSPACED.match(letters[-1]) and not prompt[-1].isalnum() and _UNSPACED.match(answer[0]):
        return ""
    return " "


def end_of_sentence(text: str) -> str:
    """
    A full stop, in the script of the text's last letter; nothing behind a text that does not end with a letter or a
    digit, or ends within an address or code.

    Args:
        text (`str`): The text.
    """
    if not text or not (text[-1].isalnum() or text[-1] in "\"')]»”’"):
        return ""
    if re.search(r"(?:://|\bwww\.|@|[/\\_=<>])\S*$", text):
        return ""
    return "。" if is_unspaced(text[-1]) else "."
