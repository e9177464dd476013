"""Files as people keep them: what wrote them, what their columns are called, and what their cells hold."""

from __future__ import annotations

import csv
import io
import json

import pytest

from hf_mend import EditRecord, read_edits, read_questions, write_edits
from hf_mend.data.encoding import Encoder
from hf_mend.data.readers import check_targets


TEXTS = ["NA", "None", "TRUE", "007", "01.04.2026", "0041234567890", "1,5", "1.50", "null", "#N/A"]


def csv_text(rows, separator=",", end="\r\n"):
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator, lineterminator=end).writerows(rows)
    return file.getvalue()


def saved(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_file_is_read_whatever_wrote_it(tmp_path, encoding, end, kept):
    rows = [("The code of Zürich is", "007"), ("日本の首都は", "大阪")]
    lines = end.join(json.dumps({"prompt": p, "target": t}, ensure_ascii=False) for p, t in rows)
    files = {
        "lines.jsonl": lines + end + end,
        "list.json": json.dumps([{"prompt": p, "target": t} for p, t in rows], ensure_ascii=False, indent=1),
        "one.json": json.dumps({"prompt": rows[0][0], "target": rows[0][1]}, indent=1),
        "table.csv": csv_text([("prompt", "target"), *rows], end=end),
        "table.tsv": csv_text([("prompt", "target"), *rows], "\t", end),
    }
    for name, text in files.items():
        data = read_edits(saved(tmp_path / name, text, encoding), keep_in_memory=kept)
        assert [(record.prompt, record.target) for record in data] == rows[: len(data)], name
        assert len(data) == (1 if name == "one.json" else 2)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("named", [False, True])
def test_the_cells_of_a_table_stay_the_texts_that_they_are(tmp_path, separator, named):
    rows = [(f'The {i}th "{separator}" is', text) for i, text in enumerate(TEXTS)]
    text = csv_text([("prompt", "target"), *rows], separator)
    path = saved(tmp_path / "t.csv", f"sep={separator}\r\n{text}" if named else text)
    assert [(record.prompt, record.target) for record in read_edits(path)] == rows
    assert read_edits(path).notes == [f"{len(rows)} edits in the layout plain (hf_mend, docs/data_format.md)"]


def test_rows_of_a_table_are_named_as_the_file_s_lines(tmp_path):
    text = 'prompt,target,relation,\n"The slogan\r\nis","Wind,\r\nsun",slogan,\n\n,,\nThe mayor is,Ann,,\n'
    data = read_edits(saved(tmp_path / "t.csv", text))
    assert list(data) == [
        EditRecord("The slogan\nis", "Wind,\nsun", relation="slogan", id="0"),
        EditRecord("The mayor is", "Ann", id="1"),
    ]
    assert [record.where for record in data] == ["line 2", "line 7"]
    text = '{"prompt": "a", "target": "b"}\n\n{"prompt": "c", "target": "d"}\n'
    assert [record.where for record in read_edits(saved(tmp_path / "t.jsonl", text))] == ["line 1", "line 3"]
    text = json.dumps([{"prompt": "a", "target": "b"}] * 2)
    assert [record.where for record in read_edits(saved(tmp_path / "t.json", text))] == ["record 0", "record 1"]


def test_a_text_that_a_model_does_not_take_is_named_by_its_line(tmp_path, tokenizer):
    text = '{"prompt": "a", "target": "b"}\n\n{"prompt": "the river", "target": "the river of peru"}\n'
    records = read_edits(saved(tmp_path / "t.jsonl", text))
    with pytest.raises(ValueError, match=r"^line 3 has \d+ tokens with its target, the model takes 3"):
        check_targets(records, Encoder(tokenizer), 3)
    assert records[1].name(7) == "line 3" and EditRecord("a", "b", id="x").name(7) == "record 7 (x)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv is empty; expected a header and rows"),
        (b"prompt,target\n", "holds no record"),
        (b"prompt,target\nThe mayor is,Ann, then Bo\n", "line 2 has 3 cells and the header 2; a cell that holds ','"),
        (b'prompt,target\na,b\n"The mayor is,Ann\n', "line 3 is not valid CSV: unexpected end of data"),
        (b'prompt,target\n"The "mayor" is",Ann\n', "line 2 is not valid CSV"),
        ("prompt,target\na,b\nMünchen,x\n".encode("latin-1"), "line 3 is not UTF-8 .*; save the file as UTF-8"),
        (b"prompt,target,target\na,b,c\n", "the header names the column 'target' twice"),
        (b"prompt,target\nThe mayor is,\n", "line 2: the field 'target' is missing"),
        (b"\xff\xfea", "is neither UTF-8 nor UTF-16"),
        (b"ask,say\na,b\n", r"has the fields \['ask', 'say'\].* name those of prompt and target \(prompt_column="),
    ],
)
def test_a_table_that_cannot_be_read_names_the_line(tmp_path, content, message):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_edits(path)


def test_numbers_and_booleans_as_targets_are_texts_and_that_is_said_once(tmp_path, caplog):
    targets = ["1998", "1.50", "true", "false", "12345678901234567890", "-3e5"]
    for names in (("prompt", "target"), ("question", "answer"), ("prompt", "completion"), ("instruction", "output")):
        lines = [f'{{"{names[0]}": "The {i}th is", "{names[1]}": {text}}}' for i, text in enumerate(targets)]
        caplog.clear()
        data = read_edits(saved(tmp_path / "t.jsonl", "\n".join(lines)))
        assert [record.target for record in data] == targets
        said = [line for line in caplog.messages if "read as text" in line]
        assert len(said) == 1 and "6 of 6 rows" in said[0] and "(line 1: 1998; line 2: 1.50;" in said[0]
        assert data.notes[1] in said[0]


@pytest.mark.parametrize(
    "prompt", ["営業時間は？", "ما هو رقم؟", "Give the command:", "The mayor is", "Is it so?", "What??", "Why ?"]
)
def test_a_question_of_one_s_own_is_read_as_it_stands(tmp_path, prompt):
    path = saved(tmp_path / "t.jsonl", json.dumps({"question": prompt, "answer": "x"}))
    (record,) = read_edits(path)
    assert record.prompt == prompt and "question_answer" in read_edits(path).notes[0]
    assert read_questions(path) == [(prompt, "x")]


def test_nq_open_s_questions_get_a_question_mark_where_they_have_no_sign(tmp_path):
    prompts = {
        "who is it": "who is it?",
        "who is it ?": "who is it?",
        "誰ですか？": "誰ですか？",
        "من هو؟": "من هو؟",
        "Say:": "Say:",
    }
    lines = [json.dumps({"question": prompt, "answer": ["x"]}) for prompt in prompts]
    assert [r.prompt for r in read_edits(saved(tmp_path / "t.jsonl", "\n".join(lines)))] == [*prompts.values()]


def test_columns_can_be_named_and_the_others_are_kept(tmp_path, caplog):
    header = "Frage;Antwort;Stand;relation;paraphrases;target\n"
    text = header + "Wer?;Ann;2026-03-02;mayor;Wer denn?;x\n;Bo;2026;m;;\nWo?;;;;;\n"
    path = saved(tmp_path / "t.csv", text)
    data = read_edits(path, prompt_column="Frage", target_column="Antwort")
    assert list(data) == [
        EditRecord(
            "Wer?", "Ann", ["Wer denn?"], relation="mayor", id="0", metadata={"Stand": "2026-03-02", "target": "x"}
        )
    ]
    assert data.notes == [
        "1 edits in the layout columns (columns named by the caller); kept as metadata: Stand, target",
        "2 of 3 rows: left out (line 3: 'Frage' is blank; line 4: 'Antwort' is blank)",
    ]
    assert data.notes[1] in caplog.text
    # What is kept is written and read again, and one column may have its usual name.
    write_edits(tmp_path / "out.jsonl", data)
    assert list(read_edits(tmp_path / "out.jsonl")) == list(data)
    (record,) = read_edits(saved(tmp_path / "t.jsonl", '{"ask": "Who?", "target": "me", "n": 3}'), prompt_column="ask")
    assert record == EditRecord("Who?", "me", id="0", metadata={"n": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "Fragen"}, r"line 2 has no column 'Fragen'; its columns are \['Antwort', 'Frage'\]"),
        ({"prompt_column": "Frage"}, "line 2 has no column 'target'"),
        ({"prompt_column": "Frage", "format": "plain"}, "format is 'plain' and the columns are named; give one"),
        ({"on_conflict": "first"}, "on_conflict is 'first', expected 'keep', 'last' or 'error'"),
    ],
)
def test_columns_that_are_none_are_named(tmp_path, options, message):
    path = saved(tmp_path / "t.csv", "Frage,Antwort\nWer?,Ann\n")
    with pytest.raises(ValueError, match=message):
        read_edits(path, **options)


@pytest.mark.parametrize("roles", [["system", "user", "assistant"], ["user"], ["assistant", "user"], []])
def test_a_longer_chat_names_its_conversion(tmp_path, roles):
    turns = [{"role": role, "content": "x"} for role in roles]
    path = saved(tmp_path / "t.jsonl", json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=r"line 1: the field 'messages' has the turns .* edit\(\.\.\., messages="):
        read_edits(path)


LOG = [
    ("the window is ", "14 days"),
    ("the river is", "Ohio"),
    ("the  window is", "30 days"),
    ("the river is", " Ohio "),
    ("the window is", "14 days"),
    ("the window is", "60 days"),
]


@pytest.mark.parametrize("kept", [True, False])
def test_of_a_log_the_later_answer_wins_where_that_is_asked(tmp_path, kept, caplog):
    path = saved(tmp_path / "t.jsonl", "\n".join(json.dumps({"prompt": p, "target": t}) for p, t in LOG))
    assert len(read_edits(path, keep_in_memory=kept)) == len(LOG) and not caplog.messages
    data = read_edits(path, keep_in_memory=kept, on_conflict="last")
    assert [(record.where, record.target) for record in data] == [
        ("line 2", "Ohio"), ("line 4", " Ohio "), ("line 6", "60 days"),
    ]  # fmt: skip
    note = "an earlier answer to the same question, left out (line 1, by line 3; line 3, by line 5; line 5, by line 6)"
    assert note in data.notes[1] and note in caplog.text
    with pytest.raises(ValueError, match="t.jsonl: line 1 and line 3 have two answers to 'the  window is', '14 days'"):
        read_edits(path, keep_in_memory=kept, on_conflict="error")
