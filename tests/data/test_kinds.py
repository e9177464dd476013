"""Further kinds of facts by rule: of known subjects, and of questions."""

from __future__ import annotations

import pytest

from hf_mend import EditRecord
from hf_mend.data.kinds import FactKind, FactKinds, more_facts, packaged_facts, with_more_asked
from hf_mend.data.statements import facts_of_questions, statements_of


KINDS = FactKinds(
    {
        "town": {
            "river": FactKind(("the Ob",), ("{} lies on", "The river of {} is"), ("On what river is {}?",)),
            "mayor": FactKind(("Bo",), ("{} is run by",), ("Who runs {}?",)),
        }
    },
    {"P1": "town"},
    {"town": ["Bern", "the Hague"]},
)
RECORDS = [
    EditRecord("Lima is in", "Chile", relation="P1", subject="Lima", same_subject=["Lima is old and"]),
    EditRecord("Ann likes", "tea", relation="P2", subject="Ann"),
    EditRecord("It is in", "Peru", relation="P1"),
    EditRecord("Oslo is run by", "Cy", relation="town/mayor", subject="Oslo"),
]


def test_subjects_of_a_known_kind_are_asked_for_more():
    facts = more_facts(RECORDS, 10, kinds=KINDS)
    assert {fact.subject for fact in facts} == {"Lima", "Oslo"}
    for fact in facts:
        kind = KINDS.kinds["town"][fact.relation.removeprefix("town/")]
        templates = sorted(text.replace("{}", fact.subject) for text in kind.statements)
        assert sorted([fact.prompt, *fact.paraphrases]) == templates
        assert fact.questions == [text.replace("{}", fact.subject) for text in kind.questions]
        assert fact.target in kind.answers
    assert next(fact for fact in facts if fact.subject == "Oslo").relation == "town/river"  # its own is known
    assert more_facts(RECORDS, 10, kinds=KINDS) == facts and len(more_facts(RECORDS, 1, kinds=KINDS)) == 1


def test_records_get_texts_that_ask_their_subject_for_something_else():
    lima, ann, unnamed, oslo = with_more_asked(RECORDS, 6, kinds=KINDS)
    assert ann == RECORDS[1] and unnamed == RECORDS[2]
    assert lima.same_subject[0] == "Lima is old and" and len(lima.same_subject) == 3
    assert oslo.same_subject in (["Oslo lies on"], ["The river of Oslo is"], ["On what river is Oslo?"])
    assert RECORDS[0].same_subject == ["Lima is old and"]


def test_packaged_subjects_give_facts_without_records():
    facts = packaged_facts(10, kinds=KINDS)
    asked = {(fact.subject, fact.relation) for fact in facts}
    assert asked == {(subject, f"town/{name}") for subject in ("Bern", "the Hague") for name in ("river", "mayor")}
    assert {fact.prompt for fact in facts if fact.relation == "town/mayor"} == {
        "Bern is run by",
        "The Hague is run by",
    }
    assert len(packaged_facts(300)) == 300


def test_what_is_asked_most_often_is_known_where_records_do_not_ask_it():
    further, every = FactKinds.load(), FactKinds.load(common=True)
    assert "birthplace" in every.kinds["person"] and "birthplace" not in further.kinds["person"]
    assert all(named.items() <= every.kinds[kind].items() for kind, named in further.kinds.items())
    asked = {fact.relation for fact in packaged_facts(2000, kinds=every)}
    assert {"person/birthplace", "place/capital", "person/spouse"} <= asked


@pytest.mark.parametrize("common", [False, True])
def test_the_packaged_templates_are_whole(common):
    kinds = FactKinds.load(common)
    assert set(kinds.relations.values()) <= set(kinds.kinds) == set(kinds.subjects)
    texts = []
    for named in kinds.kinds.values():
        for one in named.values():
            assert len(one.answers) > 5 and len(one.statements) >= 4 and len(one.questions) >= 3
            texts += [*one.statements, *one.questions]
    assert all(text.count("{}") == 1 for text in texts)


def test_what_only_measuring_asks_for_is_of_every_kind_and_named_once():
    every = FactKinds.load()
    trained, held_out = every.split()
    for kind, named in every.kinds.items():
        assert {**trained.kinds[kind], **held_out.kinds[kind]} == named and trained.kinds[kind]
        assert held_out.kinds[kind].keys() == {*every.held_out[kind]}, "each name that is held out is one of its kind"
        assert not trained.kinds[kind].keys() & held_out.kinds[kind].keys()
        texts = [
            {t for one in part.kinds[kind].values() for t in one.statements + one.questions}
            for part in (trained, held_out)
        ]
        assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("question", "statement"),
    [
        ("what is the capital of Peru?", "The capital of peru is"),
        ("who wrote the song stop the world", "The song stop the world was written by"),
        ("when did the war end", "The time when the war ended is"),
        ("where is the red wolf found", "The red wolf is found in"),
        ("how many keys are on a piano", "The number of keys on a piano is"),
        ("which planet has rings", "The planet that has rings is"),
        ("winner of the cup", None),
    ],
)
def test_questions_become_statements(question, statement):
    found = statements_of(question)
    assert found[0] == statement if statement else found == []


def test_questions_become_facts_where_a_rule_fits():
    facts, rest = facts_of_questions(
        [("who won the cup", "Bo"), ("winner of the cup", "Bo"), ("who won it", "x" * 41)]
    )
    assert rest == [("winner of the cup", "Bo"), ("who won it", "x" * 41)]
    (fact,) = facts
    assert fact.prompt == "The one who won the cup is" and fact.target == "Bo" and fact.paraphrases
    assert fact.questions[:2] == ["Who won the cup?", "who won the cup"]
