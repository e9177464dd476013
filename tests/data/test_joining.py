"""What a person would write between a prompt and its answer."""

from __future__ import annotations

import pytest

from hf_mend.data.joining import separator_between


WITH_A_SPACE = [
    ("The capital of France is", "Lyon"),
    ("What is the return window?", "30 days"),
    ("The Japanese name of Tokyo is", "東京"),
    ("The river of 京都 is", "Kamo"),
    ("고객센터 번호는", "1234입니다"),  # Korean has spaces
    ("ما هو رقم خدمة العملاء؟", "٠٨٠٠"),
    ('He said "yes" and "no"', "twice"),
    ("the boys'", "room"),
    ("The word 'lima'", "means"),
    ("See https://example.com for the", "prices"),
    ("x =", "5"),
    ("The price (in euros)", "falls"),
    ("The answer -", "short"),
    ("The function f() ->", "int"),
    ("Fruit, e.g.", "apples"),
    ("Label:", "printer"),
    ("a < b and c >", "d"),
]
WITHOUT = [
    ("日本の首都は", "大阪"),
    ("中国的首都是", "Paris"),
    ("営業時間は何時までですか？", "午後6時"),
    ("営業時間は何時までですか?", "午後6時"),
    ("ราคาคือ", "ห้าบาท"),
    ("ລາຄາ", "ຫ້າ"),
    ("The word is '", "lima"),
    ('The word is "', "lima"),
    ("The word is “", "lima"),
    ("Er sagte: „", "Lima"),
    ("Il dit «", "Lima"),
    ("The code is `", "ls"),
    ("The river (", "Seine)"),
    ("print(", "x)"),
    ('{"city": "', 'Lima"}'),
    ('<a href="', 'x">'),
    ("https://www.", "example.com"),
    ("Our shop is at https://", "example.com"),
    ("It listens on http://localhost:", "8080"),
    ("https://example.com/search?q=", "lima"),
    ("The log is in /var/log/", "mend.log"),
    ("Write to support@", "example.com"),
    ("The price is $", "30"),
    ("The name is user_", "name"),
    ("std::", "vector"),
    ("node->", "next"),
    ("open().", "read()"),
    ("<b>", "lima"),
    ("<|assistant|>", "lima"),
]


@pytest.mark.parametrize(("prompt", "answer"), WITH_A_SPACE)
def test_one_space_joins_words(prompt, answer):
    assert separator_between(prompt, answer) == " "


@pytest.mark.parametrize(("prompt", "answer"), WITHOUT)
def test_nothing_stands_where_nobody_writes_a_space(prompt, answer):
    assert separator_between(prompt, answer) == ""


def test_of_nothing_there_is_nothing_to_separate():
    assert separator_between("", "lima") == separator_between("lima", "") == ""


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("the capital is Lyon", "."),
        ("日本の首都は大阪", "。"),
        ("he said no!", ""),
        ("in 1984", "."),
        ("the address is https://example.com/a", ""),
        ("(in Rome)", "."),
        ("", ""),
    ],
)
def test_what_ends_an_answer(text, end):
    from hf_mend.data.joining import end_of_sentence

    assert end_of_sentence(text) == end
