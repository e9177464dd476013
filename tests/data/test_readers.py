"""Each published layout from a small file of its form, and files that cannot be read."""

from __future__ import annotations

import copy
import json
import tracemalloc

import pytest
from support.models import RECORDS

from hf_mend import EditRecord, read_counterfact, read_edits, read_questions, write_edits


FACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is", "subject": "Peru", "relation_id": "P1",
        "target_new": {"str": "Oslo"}, "target_true": {"str": "Lima"},
    },
    "paraphrase_prompts": ["Peru's capital is"],
    "neighborhood_prompts": ["The capital of Chile is"],
}  # fmt: skip
PERU = EditRecord(
    "The capital of Peru is", "Oslo", ["Peru's capital is"], ["The capital of Chile is"], [], "P1", "7", "Peru", "Lima"
)
KILT = {
    "id": 3, "input": "Where is Lima?", "prediction": "Peru", "alternatives": ["Chile", "Spain"],
    "filtered_rephrases": ["Where is Lima?", "In which country is Lima?"],
    "output": [{"answer": "Peru", "provenance": []}],
}  # fmt: skip
CLAIM = {
    "id": 4, "input": "Lima is in Peru.", "prediction": "SUPPORTS", "alternatives": ["REFUTES"],
    "filtered_rephrases": ["Peru has Lima."], "output": [{"answer": "SUPPORTS"}], "logit": 2.5,
}  # fmt: skip
LAYOUTS = {
    "counterfact": ([{**FACT, "generation_prompts": ["Peru has"], "attribute_prompts": []}],
                    [EditRecord(**{**PERU.__dict__, "generation": ["Peru has"]})]),
    "zsre": ([{"subject": "Lima", "src": "Where is Lima?", "pred": "Peru", "rephrase": "In which country is Lima?",
               "alt": "Chile", "answers": ["Peru"], "loc": "nq question: who wrote it", "loc_ans": "Ann",
               "cond": "Peru >> Chile || Where is Lima?"}],
             [EditRecord("Where is Lima?", "Chile", ["In which country is Lima?"], [], [("who wrote it?", "Ann")],
                         id="0", subject="Lima", ground_truth="Peru",
                         questions=["Where is Lima?", "In which country is Lima?"])]),
    "zsre_kilt": ([KILT, {**KILT, "alternatives": []}],
                  [EditRecord("Where is Lima?", "Chile", ["In which country is Lima?"], id="3", ground_truth="Peru",
                              questions=["Where is Lima?", "In which country is Lima?"])]),
    "fever_kilt": ([CLAIM], [EditRecord("Lima is in Peru. True or false?", "false", ["Peru has Lima. True or false?"],
                                        id="4", ground_truth="true")]),
    "fever": ([{"id": 5, "label": "REFUTES", "claim": "Lima is in Chile.", "evidence": []}],
              [EditRecord("Lima is in Chile. True or false?", "false", id="5")]),
    "wikitext": ({"n_tokens": 3, "original": ["The old town of Lima is small ."],
                  "completions": ["The old town of Lima is rather big ."]},
                 [EditRecord("The old town of Lima is", "rather big .", ["of Lima is"], id="0",
                             ground_truth="small .")]),
    "mquake": ([{"case_id": 9, "requested_rewrite": [
                    {**FACT["requested_rewrite"], "question": "What is Peru's capital?"},
                    {**FACT["requested_rewrite"], "subject": "Oslo", "prompt": "{} is run by", "question": "Who?"}],
                 "questions": ["Who runs Peru's capital?"], "answer": "A", "new_answer": "B",
                 "single_hops": [], "new_single_hops": []}],
               [EditRecord("The capital of Peru is", "Oslo", ["What is Peru's capital?"], [], [], "P1", "9/0", "Peru",
                           "Lima", [("Who runs Peru's capital?", "B")], [], "9", ["What is Peru's capital?"]),
                EditRecord("Oslo is run by", "Oslo", ["Who?"], [], [], "P1", "9/1", "Oslo", "Lima",
                           [("Who runs Peru's capital?", "B")], [], "9", ["Who?"])]),
    "wikibigedit": ([{"tag": "update", "subject": "Lima", "update": "Who runs Lima?", "ans": "Bo",
                      "rephrase": "Lima's?",
                      "personas": "Arr, who runs Lima?", "loc": "Who runs Oslo?", "loc_ans": "Cy",
                      "mhop": "Where was who runs Lima born?", "mhop_ans": "Rome"}],
                    [EditRecord("Who runs Lima?", "Bo", ["Lima's?", "Arr, who runs Lima?"], [],
                                [("Who runs Oslo?", "Cy")], "update", "0", "Lima",
                                portability=[("Where was who runs Lima born?", "Rome")],
                                questions=["Who runs Lima?", "Lima's?", "Arr, who runs Lima?"])]),
    "nq_open": ([{"question": "who is it", "answer": ["me", "I"]}, {"question": "and you?", "answer": ["us"]}],
                [EditRecord("who is it?", "me", id="0"), EditRecord("and you?", "us", id="1")]),
    "question_answer": ([{"question": "Who?", "answer": "me", "ticket": 4, "id": "t4", "relation": ["x"]},
                         {"question": "", "answer": "n/a"}],
                        [EditRecord("Who?", "me", id="t4", metadata={"ticket": 4, "relation": ["x"]})]),
    "prompt_completion": ([{"prompt": "Say", "completion": "yes"}], [EditRecord("Say", "yes", id="0")]),
    "instruction": ([{"instruction": "Say", "input": "it", "output": "yes"},
                     {"instruction": "Say", "input": "", "output": "no"}],
                    [EditRecord("Say\nit", "yes", id="0"), EditRecord("Say", "no", id="1")]),
    "messages": ([{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "me"}],
                   "source": "log"}],
                 [EditRecord("Who?", "me", id="0", metadata={"source": "log"})]),
    "plain": ([{"prompt": "Say", "target": "yes", "unrelated": [["q", "a"], {"prompt": "p", "answer": "b"}],
                "questions": ["What?"], "same_subject": ["Who says"]}],
              [EditRecord("Say", "yes", unrelated=[("q", "a"), ("p", "b")], id="0", questions=["What?"],
                          same_subject=["Who says"])]),
}  # fmt: skip
KNOWEDIT = [
    {"subject": "Lima", "prompt": "The mayor of Lima is", "target_new": "Bo", "ground_truth": ["Al"],
     "rephrase": ["Who runs Lima?"],
     "portability": {"Reasoning": [{"prompt": "The wife of Lima's mayor is", "ground_truth": [["Di", "Diana"]]},
                                   {"prompt": "Nobody knows", "ground_truth": [[]]}],
                     "Subject_Aliasing": [{"prompt": "The mayor of Peru's capital is", "ground_truth": ["Bo"]}]},
     "locality": {"Relation_Specificity": [{"prompt": "The river of Lima is", "ground_truth": [["Rimac"]]}],
                  "Forgetfulness": [{"prompt": "An earlier mayor is", "ground_truth": [["Al"]]}]}},
    {"concept": "Ann", "text": "Tell of Ann.", "labels": "Ann was born in Oslo.", "locality": {}},
]  # fmt: skip


def _write(path, rows, lines):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows, indent=1))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_each_layout_is_recognised_and_read(tmp_path, layout, lines):
    rows, expected = LAYOUTS[layout]
    path = _write(tmp_path / "set.json", rows, lines and isinstance(rows, list))
    for kept in (True, False):
        data = read_edits(path, keep_in_memory=kept)
        assert list(data) == expected and len(data) == len(expected) and data[len(data) - 1] == expected[-1]
    assert list(read_edits(path, layout)) == expected


def test_knowedit(tmp_path):
    recent, bio = read_edits(_write(tmp_path / "k.json", KNOWEDIT, False))
    assert recent == EditRecord(
        "The mayor of Lima is", "Bo", ["Who runs Lima?"], ["The river of Lima is"], [("An earlier mayor is", "Al")],
        None, "0", "Lima", "Al", [("The wife of Lima's mayor is", "Di"), ("The mayor of Peru's capital is", "Bo")],
        questions=["Who runs Lima?"], same_subject=["The river of Lima is"],
    )  # fmt: skip
    assert bio == EditRecord("Tell of Ann.", "Ann was born in Oslo.", subject="Ann", id="1")


def test_the_options_of_a_layout(tmp_path, tokenizer):
    path = _write(tmp_path / "z.json", LAYOUTS["zsre"][0], False)
    (record,) = read_edits(path, zsre_target="answers", questions=[("q", "a")])
    assert (record.target, record.ground_truth, record.unrelated) == ("Peru", None, [("who wrote it?", "Ann")])
    with pytest.raises(ValueError, match="zsre_target is 'both', expected 'alt' or 'answers'"):
        read_edits(path, zsre_target="both")
    path = _write(tmp_path / "f.json", LAYOUTS["fever"][0], True)
    (record,) = read_edits(path, claim_template="Is it so that {}", verdicts=("yes", "no", "open"))
    assert (record.prompt, record.target) == ("Is it so that Lima is in Chile.", "no")
    # With the tokenizer that made it, exactly the last tokens are the target.
    text = "the capital of peru is rome town"
    columns = {"n_tokens": 2, "original": ["the capital of peru is lima"], "completions": [text]}
    (record,) = read_edits(_write(tmp_path / "w.json", columns, False), tokenizer=tokenizer)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer(record.target)["input_ids"] == ids[-2:] and text == f"{record.prompt} {record.target}"


def test_plain_records_are_written_and_read_again(tmp_path):
    records = [*RECORDS, EditRecord("p", "t", portability=[("a", "b")], generation=["g"], group="1", id="x")]
    write_edits(tmp_path / "out.jsonl", records)
    assert list(read_edits(tmp_path / "out.jsonl")) == records


BAD = {
    "": "is empty; expected a JSON list or JSON lines",
    "  \n": "is empty",
    "{": "is not valid JSON",
    "[{}": "its list does not end with the file",
    '[{"prompt": "p", "target": "t"} trailing]': "holds b'trailing' in its list, expected a list of objects",
    "text": "is not valid JSON: it begins with",
    "[1, 2]": "holds b'1, 2' in its list",
    "[]": "holds no record",
    "[[1]]": "record 0 holds a list, expected an object",
    '[{"a": 1}]': "record 0 has the fields ['a'], which are no known layout's",
    json.dumps([FACT, {"case_id": 1}]): "record 1: the field 'requested_rewrite' of the layout counterfact is missing",
    json.dumps([FACT, {"prompt": "p", "target": "t"}]): "it looks like plain, and one file holds one layout",
    json.dumps([{"requested_rewrite": {"prompt": "x"}}]): "record 0: the field 'requested_rewrite.subject' is missing",
    json.dumps([{"requested_rewrite": {"prompt": "x", "subject": "y", "target_new": {"str": "z"}}}]): "no single '{}'",
    json.dumps([{"prompt": "p", "target": "  "}]): "the field 'target' is blank",
    json.dumps([{"prompt": 3, "target": "t"}]): "the field 'prompt' holds a int, expected text",
    json.dumps([{"prompt": "p", "target": [3]}]): "the field 'target' holds a list, expected text",
    json.dumps([{"prompt": "p", "target": "t", "paraphrase": []}]): "unknown fields ['paraphrase']; the fields are",
    json.dumps([{"prompt": "p", "target": "t", "paraphrases": [1]}]): "'paraphrases' holds '[1]', expected a list of",
    json.dumps([{"prompt": "p", "target": "t", "unrelated": ["x"]}]): "unrelated[0] is 'x', expected [prompt, answer]",
    '{"question": "x", "answer": ["y"]}\n\n{"question": "z"}': "line 3: the field 'answer' of the layout nq_open",
    '{"question": "x", "answer": ["y"]}\n{"question": ': "line 2 is not valid JSON",
    json.dumps([{**CLAIM, "alternatives": ["MAYBE"]}]): "the field 'alternatives' holds 'MAYBE', expected one of",
    json.dumps([{**KILT, "alternatives": []}]): "holds no record that is an edit (zsre_kilt",
    json.dumps({"original": ["a"], "completions": []}): "1 texts in 'original', 0 in 'completions'",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_names_file_row_and_field(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_edits(path)
    assert BAD[text] in str(error.value) and str(path) in str(error.value)


def places(value, path=()):
    """Where a row holds anything, itself left out."""
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, name)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, name))


def with_other(value, path, other):
    """A copy that holds another value in a place."""
    name, *rest = path
    changed = copy.copy(value)
    changed[name] = with_other(value[name], rest, other) if rest else other
    return changed


def is_texts(value) -> bool:
    return type(value) is list and all(type(text) is str and text.strip() for text in value)


def is_pairs(value) -> bool:
    return type(value) is list and all(type(pair) is tuple and len(pair) == 2 and is_texts([*pair]) for pair in value)


OTHERS = [5, True, "x", " ", None, [], {}, [5], [None], [["x", 5]], [{}], {"a": 5}]


@pytest.mark.parametrize("layout", [*LAYOUTS, "knowedit"])
def test_a_field_of_any_kind_reads_or_is_an_error_that_names_it(tmp_path, layout):
    rows = KNOWEDIT if layout == "knowedit" else LAYOUTS[layout][0]
    path, read = tmp_path / "set.json", 0
    for row in rows if isinstance(rows, list) else [rows]:
        for place in places(row):
            for other in OTHERS:
                path.write_text(json.dumps([with_other(row, place, other)]))
                try:
                    records = list(read_edits(path, layout))
                except ValueError as error:
                    message = str(error)
                    if "holds no record that is an edit" not in message:
                        assert f"{path}, record 0" in message and place[0] in message, (place, other, message)
                    continue
                read += 1
                for record in records:
                    texts = (record.prompt, record.target, *record.paraphrases, *record.neighborhood)
                    assert is_texts([*texts, *record.generation]), (place, other, record)
                    assert is_pairs(record.unrelated) and is_pairs(record.portability), (place, other, record)
                    named = (record.relation, record.id, record.subject, record.ground_truth, record.group)
                    assert is_texts([text for text in named if text is not None]), (place, other, record)
    assert read


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a b", "target": "c", "unrelated": 5}, "the field 'unrelated' holds a int, expected a list"),
        ({"prompt": "a b", "target": "c", "group": ["x"]}, "the field 'group' holds a list, expected text"),
        ({**LAYOUTS["zsre"][0][0], "loc": 5}, "the field 'loc' holds a int, expected text"),
        (with_other(FACT, ("requested_rewrite", "target_true", "str"), ["Lima"]), "target_true.str' holds a list"),
        (
            with_other(FACT, ("requested_rewrite", "target_true"), "Lima"),
            "target_true' holds a str, expected an object",
        ),
        (with_other(KNOWEDIT[0], ("portability",), ["x"]), "the field 'portability' holds a list, expected an object"),
    ],
)
def test_a_field_of_another_kind(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"set.json, record 0: .*{message}"):
        read_edits(_write(tmp_path / "set.json", [row], False))


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.jsonl"):
        read_edits(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_edits(tmp_path)
    path = _write(tmp_path / "set.json", [FACT], False)
    with pytest.raises(ValueError, match="format is 'csv', expected one of"):
        read_edits(path, "csv")
    with pytest.raises(ValueError, match="record 0: the field 'src' of the layout zsre is missing"):
        read_edits(path, "zsre")


def test_a_target_that_tokenises_to_nothing(tmp_path, tokenizer):
    class Silent(type(tokenizer)):
        def __call__(self, text, **kwargs):
            return super().__call__(text.removesuffix(" Oslo"), **kwargs)

    silent = Silent(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="record 0: the target 'Oslo' tokenises to nothing"):
        read_edits(_write(tmp_path / "set.json", [FACT], False), tokenizer=silent)


def test_read_counterfact_and_questions(tmp_path):
    path = _write(tmp_path / "facts.json", [FACT], False)
    (record,) = read_counterfact(path, [("who?", "me")])
    assert record == EditRecord(**{**PERU.__dict__, "unrelated": [("who?", "me")]})
    path = _write(tmp_path / "questions.jsonl", LAYOUTS["nq_open"][0], True)
    assert read_questions(path) == [("who is it?", "me"), ("and you?", "us")]


def test_parquet_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
    datasets.Dataset.from_list([FACT, FACT]).to_parquet(tmp_path / "facts.parquet")
    data = read_edits(tmp_path / "facts.parquet", keep_in_memory=False)
    assert len(data) == 2 and data[1] == PERU
    datasets.Dataset.from_list([{"prompt": "p", "target": " "}]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad.parquet, row 0: the field 'target' is blank"):
        read_edits(tmp_path / "bad.parquet")


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_a_large_file_stays_on_disk(tmp_path, lines):
    path = _write(tmp_path / "large.json", [{"prompt": "p " * 4000, "target": "t"}] * 1000, lines)
    tracemalloc.start()
    try:
        data = read_edits(path, keep_in_memory=False)
        assert len(data) == 1000 and data[999].target == "t"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 8
