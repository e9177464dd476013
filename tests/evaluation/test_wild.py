"""Figures in the wild against answers by hand: each edit made by itself, each text read alone and without a cache."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from support.injection import interrupted, lines_of, some_of
from support.models import RECORDS, all_logits, build_model, editable
from support.scope import scoped

from hf_mend import EditRecord
from hf_mend.data.encoding import Query
from hf_mend.data.forms import Surroundings
from hf_mend.data.kinds import FactKinds
from hf_mend.edits.edit import stacked
from hf_mend.edits.low_rank import dense
from hf_mend.evaluation import made_edits, many_texts, wild
from hf_mend.evaluation.asking import Asked, all_asked, ask_in_the_wild, is_repeat, is_right
from hf_mend.evaluation.generation import answer
from hf_mend.evaluation.made_edits import make_in_calls
from hf_mend.evaluation.scores import perplexity
from hf_mend.evaluation.wild import WildSettings, measure_in_the_wild
from hf_mend.evaluation.wild_figures import confusion, strictness_curve, wild_means
from hf_mend.hub.plots import STAYS


CHAT = (
    "<system>you are a helpful town\n{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENS = 2  # fewer than the targets have, behind which four more are read
FACTS = [
    replace(
        record,
        subject=record.prompt.split()[-2],
        questions=[f"what town is the capital of {record.prompt.split()[-2]}?"],
        same_subject=[f"the river of {record.prompt.split()[-2]} is"],
    )
    for record in RECORDS[:3]
]
AROUND = Surroundings(RECORDS[3:], [("what is the colour of grass?", "green")], ["the river of peru is long."])
UNRELATED = ["what is the colour of grass?", "who is the king of kenya?"]


@pytest.fixture
def chatty(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def roomy(llama):
    llama.config.max_position_embeddings = 512
    return llama


@pytest.fixture
def model(roomy, chatty):
    return scoped(roomy, chatty)


@pytest.fixture
def unscoped(roomy, chatty):
    return editable(roomy, chatty)


def measure(*arguments, **named):
    return measure_in_the_wild(*arguments, **named).values


def asked_of(model):
    return all_asked(model, FACTS, AROUND, UNRELATED)


@torch.no_grad()
def says(model, base, query: Query, tokens: int) -> tuple[str, torch.Tensor]:
    """A greedy answer, one whole pass a token, and the logits of the first."""
    ids = model.encoder.tokens(query)[0]
    new: list[int] = []
    for _ in range(tokens):
        logits = base(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        if not new:
            first = logits
        new.append(int(logits.argmax()))
        if new[-1] == model.tokenizer.eos_token_id:
            break
    return model.encoder.decode(new), first


def check_by_hand(model, edited, texts: Asked, values, kinds=None, measured=3):
    """Compares a record's values with what a model says that carries the edits in its own way."""
    length = max(len(model.encoder.tokens(Query(r.prompt, r.target))[1]) for r in FACTS[:measured])
    with model.disable_edits():
        before = {kind: says(model, model.base_model, query, 1)[1] for kind, query in texts.stays.items()}
    for kind, query in texts.said.items():
        answer, _ = says(model, edited, query, length + 4)
        assert values[f"{kind}: answer"] == answer
        assert values[kind] == is_right(answer, query) and values[f"{kind}: repeats"] == is_repeat(answer, query)
    for kind, query in texts.stays.items():
        if kinds is not None and kind not in kinds:
            assert kind not in values
            continue
        _, after = says(model, edited, query, 1)
        assert values[kind] == (after.argmax() == before[kind].argmax())
        assert values[f"{kind}: bits"] == torch.allclose(after, before[kind], atol=1e-6)


def test_each_edit_alone_of_a_model_with_a_scope(model):
    asked = asked_of(model)
    found = measure(model, FACTS, asked, WildSettings(max_new_tokens=TOKENS, batch_size=2))
    assert len(model.edits) == 0
    for record, texts, values in zip(FACTS, asked, found, strict=True):
        with model.edited(record.prompt, record.target):
            check_by_hand(model, model, texts, values)
            margin = next(one for one in model.which_edits(record.prompt))
        assert values["prompt: own"] == pytest.approx(margin.score - margin.threshold, abs=1e-4)
        assert values["prompt: other"] is None


def test_edits_beside_one_another(model):
    asked = asked_of(model)
    found = measure(model, FACTS[:2], asked[:2], WildSettings(3, 2, TOKENS), FACTS[2:])
    model.edit([replace(record, paraphrases=[], neighborhood=[]) for record in FACTS])
    for number in range(2):
        others = {r.subject for r in FACTS} - {FACTS[number].subject}
        kinds = [
            kind
            for kind, query in asked[number].stays.items()
            if kind.startswith("same") or not any(one in query.prompt for one in others)
        ]
        assert 0 < len(kinds) < len(asked[number].stays) or number
        check_by_hand(model, model, asked[number], found[number], kinds, measured=2)
        other = [one for one in model.which_edits(FACTS[number].prompt) if one.prompt != FACTS[number].prompt]
        margin = max(one.score - one.threshold for one in other)
        assert found[number]["prompt: other"] == pytest.approx(margin, abs=1e-4)
    texts = [[5, 6, 7, 8, 9, 10, 11], model.encoder.tokens(Query(FACTS[0].prompt))[0] * 2]
    edited = perplexity(model, texts)
    model.undo_all()
    again = measure_in_the_wild(model, FACTS[:2], asked[:2], WildSettings(3, 2, TOKENS), FACTS[2:], passages=texts)
    expected = {"perplexity_before": pytest.approx(perplexity(model, texts)), "perplexity": pytest.approx(edited)}
    assert again.perplexity == expected and again.values == found


def test_the_last_group_is_filled_up(model):
    asked, settings = asked_of(model), WildSettings(2, max_new_tokens=TOKENS)
    with_another, with_the_first = (
        measure(model, FACTS, asked, settings, RECORDS[4:]),
        measure(model, FACTS, asked, settings),
    )
    assert with_another[:2] == with_the_first[:2]
    for found, prompt in ((with_another, RECORDS[4].prompt), (with_the_first, FACTS[0].prompt)):
        with model.edited([FACTS[2].prompt, prompt], ["lima town", "a town"]):
            other = next(one for one in model.which_edits(FACTS[2].prompt) if one.prompt == prompt)
        assert found[2]["prompt: other"] == pytest.approx(other.score - other.threshold, abs=1e-4)


def test_an_encoder_decoder_is_asked_too(tokenizer):
    model = editable(build_model("t5"), tokenizer)
    asked = asked_of(model)
    (values, *_) = measure(model, FACTS, asked, WildSettings(max_new_tokens=9))
    with model.edited(FACTS[0].prompt, FACTS[0].target):
        for kind in ("prompt", "paraphrase", "question"):
            assert values[f"{kind}: answer"] == answer(model, asked[0].said[kind].prompt, max_new_tokens=9)


def test_edits_without_their_scopes_are_merged_weights(model):
    asked = asked_of(model)
    settings = WildSettings(max_new_tokens=TOKENS, scope=False)
    found = measure(model, FACTS, asked, settings)
    together = measure(model, FACTS, asked, replace(settings, kept=3))
    with model.edited([replace(record, paraphrases=[], neighborhood=[]) for record in FACTS]):
        edits = list(model.edits)
    for number, (record, texts) in enumerate(zip(FACTS, asked, strict=True)):
        check_by_hand(model, _merged(model, edits[number : number + 1]), texts, found[number])
        counted = [kind for kind in texts.stays if f"{kind}: bits" in together[number]]
        check_by_hand(model, _merged(model, edits), texts, together[number], counted)
        assert edits[number].prompt == record.prompt and "prompt: own" not in found[number]


def _merged(model, edits):
    merged = copy.deepcopy(model.base_model)
    for name, (u, v) in stacked(edits).items():
        merged.get_submodule(name).weight.data += dense((u.float(), v.float()))
    return merged


def test_models_without_a_scope(unscoped):
    asked = asked_of(unscoped)
    settings = WildSettings(max_new_tokens=TOKENS, batch_size=2)
    found = measure(unscoped, FACTS, asked, settings)
    for record, texts, values in zip(FACTS, asked, found, strict=True):
        with unscoped.edited(record.prompt, record.target):
            check_by_hand(unscoped, unscoped, texts, values)
    found = measure(unscoped, FACTS, asked, replace(settings, kept=3, edits_per_call=2))
    for first in (0, 2):
        unscoped.edit([replace(record, paraphrases=[], neighborhood=[]) for record in FACTS[first : first + 2]])
    for texts, values in zip(asked, found, strict=True):
        counted = [kind for kind in texts.stays if f"{kind}: bits" in values]
        check_by_hand(unscoped, unscoped, texts, values, counted)


def test_an_interrupted_run_goes_on_and_the_bases_answers_serve_all(model, tmp_path, monkeypatch):
    asked, file, store = asked_of(model), tmp_path / "progress.jsonl", tmp_path / "store"
    settings = WildSettings(max_new_tokens=TOKENS, batch_size=2)
    whole = measure(model, FACTS, asked, settings)
    real, calls = many_texts.answers_to, []

    def counting(*arguments, **named):
        calls.append(len(model.edits))
        if len(calls) == 5 and not store.with_name("again").exists():
            store.with_name("again").touch()
            raise RuntimeError
        return real(*arguments, **named)

    monkeypatch.setattr(wild, "answers_to", counting)
    with pytest.raises(RuntimeError):
        measure(model, FACTS, asked, settings, progress_file=file, store=store)
    assert len(model.edits) == 0
    assert measure(model, FACTS, asked, settings, progress_file=file, store=store) == whole
    parts = [json.loads(line)["part"].split("/")[0] for line in file.read_text().splitlines()]
    assert parts == ["base", "alone", "base", "alone"]
    calls.clear()
    monkeypatch.setattr(model, "edit", lambda *arguments, **named: pytest.fail("the edits are in the store"))
    together = replace(settings, kept=3)
    beside = measure(model, FACTS, asked, together, progress_file=file, store=store)
    # The base is asked once more, to see that this machine rounds as the file's did.
    assert calls == [3] * 5 and beside[0]["prompt: other"] is not None
    altered = [json.loads(line) for line in file.read_text().splitlines()]
    for line in altered:
        if line["part"].startswith("base"):
            line["found"] = [["0", -1] for _ in line["found"]]
    file.write_text("".join(json.dumps(line) + "\n" for line in altered if not line["part"].startswith("3/")))
    assert measure(model, FACTS, asked, together, progress_file=file, store=store) == beside


def test_facts_with_one_prompt_are_made_in_calls_of_their_own(model, tmp_path):
    twice = [FACTS[0], replace(FACTS[0], target="lima town"), FACTS[1]]
    made = make_in_calls(model, twice, 10, tmp_path / "store")
    assert [edits[0].target for edits in made] == ["rome town", "lima town", "paris town"]
    again = make_in_calls(model, twice, 10, tmp_path / "store")
    assert [edits[0].id for edits in again] == [edits[0].id for edits in made] and len(model.edits) == 0
    with torch.no_grad():
        next(model.editor.parameters()).add_(1)
    with pytest.raises(ValueError, match="it holds edits of another editor than this one"):
        make_in_calls(model, twice, 10, tmp_path / "store")
    assert len(model.edits) == 0


@pytest.mark.parametrize("stored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_edits_that_are_measured_are_gone_even_if_a_second_interrupt_comes_while_they_are_taken_back(
    model, tmp_path, stored
):
    model.edit(RECORDS[6].prompt, RECORDS[6].target, max_steps=1)
    own, plain = list(model.edits), all_logits(model, model.tokenizer)

    def made(number=0):
        return make_in_calls(model, FACTS[:2], 1, tmp_path / str(number) if stored else None)

    lines = lines_of(made)
    ours = [number for number, line in enumerate(lines, start=1) if line[0] == made_edits.__file__]
    for number in [*ours[:: len(ours) // 3], *some_of(lines, 3)]:
        where = interrupted(lambda number=number: made(number), number, times=2)
        assert model.edits == own and torch.equal(all_logits(model, model.tokenizer), plain), where
    assert model._active.store is None and len(made()) == 2


def test_what_all_texts_begin_with_is_read_once_and_changes_nothing(model):
    queries = [query for texts in asked_of(model) for query in texts.said.values()]
    assert len(many_texts._shared_start([model.encoder.tokens(q)[0] for q in queries if q.chat])) > 10
    with model.edited(FACTS[0].prompt, FACTS[0].target):
        shared = many_texts.answers_to(model, queries, lambda rows: model.watching(), TOKENS, logits=True)
        apart = many_texts.answers_to(model, queries, lambda rows: model.watching(), TOKENS, logits=True, alike=False)
    for one, other in zip(shared.logits, apart.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for one, other in zip(shared.keys, apart.keys, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert shared.tokens == apart.tokens


@pytest.mark.parametrize(
    ("answer", "chat", "right"),
    [
        ("Lyon.", False, True),
        ("lyon, of course", False, True),
        ("Lyonnais", False, False),
        ("the city of Lyon", False, False),
        ("It is the city of Lyon.", True, True),
        ("It is Lyonnais.", True, False),
        ("", False, False),
    ],
)
def test_what_is_right(answer, chat, right):
    assert is_right(answer, Query("p", "Lyon", chat=chat)) == right


def test_what_is_a_repeat():
    assert is_repeat("Lyon. Lyon, Lyon", Query("p", "Lyon")) and is_repeat("lyon lyon lyon", Query("p", "Lyon"))
    assert not is_repeat("Lyon. Lyonnais Lyon", Query("p", "Lyon"))


def test_texts_are_drawn_by_number_and_chats_need_a_template(model, roomy, tokenizer):
    one, two = (ask_in_the_wild(FACTS[0], AROUND, UNRELATED, 3) for _ in range(2))
    assert one == two and any(one != ask_in_the_wild(FACTS[0], AROUND, UNRELATED, n) for n in range(3))
    plain = all_asked(editable(roomy, tokenizer), FACTS, AROUND, [])[0]
    assert set(plain.said) == {"prompt", "paraphrase", "behind text", "question"}
    assert set(plain.stays) == {"before it asks", "neighbours", "neighbours behind text", "same subject"}


def test_the_plot_of_strictness_tells_what_must_stay_from_forms_of_asking(model):
    drawn = ask_in_the_wild(FACTS[0], AROUND, UNRELATED, 0)
    assert all(kind.startswith(STAYS) for kind in drawn.stays) and len(drawn.stays) > 6
    assert not any(kind.startswith(STAYS) for kind in drawn.said)


@pytest.mark.parametrize(
    ("prompt", "subject", "begun"),
    [
        ("The capital of France is", "France", "The capital of France"),
        ("France, which borders on the", "France", "France, which borders"),
        ("The capital of France, that is ", "France", "The capital of France"),
        ("Who governs France", "France", None),
        ("Who  governs France,", "France", None),
        ("France is", "France", None),
        ("The river is a part of the", None, "The river is a part"),
        ("La capitale de la France est", "France", None),
    ],
)
def test_a_prompt_that_has_not_asked_yet_still_names_its_subject(prompt, subject, begun):
    asked = ask_in_the_wild(EditRecord(prompt, "Lyon", subject=subject), AROUND, [], 0)
    found = asked.stays.get("before it asks")
    assert (None if found is None else found.prompt) == begun
    assert begun is None or asked.counted(["France"]) == ["before it asks"], "its own subject does not hide it"


def test_the_same_prompt_is_asked_about_another_subject_of_its_relation():
    def record(subject, relation="capital"):
        return EditRecord(f"The capital of {subject} is", "Lyon", subject=subject, relation=relation)

    others = [record("France"), record("Spain"), record("Peru"), record("Chile", "river"), record("New France")]
    around = Surroundings(others, [("who", "she")], ["One sentence."])
    drawn = [ask_in_the_wild(record("France"), around, [], number) for number in range(12)]
    prompts = {asked.stays["another subject"].prompt for asked in drawn}
    assert prompts == {"The capital of Spain is", "The capital of Peru is"}
    assert all(asked.stays["another subject in a chat"].prompt in prompts for asked in drawn)
    assert "another subject" not in drawn[0].counted(["France", "Spain", "Peru"]), "another edit is about it"
    for alone in (record("Chile", "river"), record("Italy", None), replace(record("Italy"), subject="Rome")):
        assert "another subject" not in ask_in_the_wild(alone, around, [], 0).stays


def test_the_same_subject_is_asked_something_that_a_training_may_leave_for_measuring():
    record = EditRecord("Marie Curie works as a", "pilot", subject="Marie Curie", relation="P106")
    held_out = FactKinds.load().split()[1].kinds["person"].values()
    expected = {text.replace("{}", "Marie Curie") for one in held_out for text in (*one.statements, *one.questions)}
    drawn = [ask_in_the_wild(record, AROUND, [], number) for number in range(12)]
    prompts = {asked.stays["another question"].prompt for asked in drawn}
    assert len(prompts) > 3 and prompts <= expected
    assert all(asked.stays["another question in a chat"].chat for asked in drawn)
    assert "another question" in drawn[0].counted(["Marie Curie"]), "its own subject does not hide it"
    for unknown in (replace(record, relation="capital"), replace(record, subject=None)):
        assert "another question" not in ask_in_the_wild(unknown, AROUND, [], 0).stays


def test_decisions_and_the_curve_of_strictness_from_margins():
    said = {"prompt: answer": "", "prompt": 1.0, "prompt: repeats": 0.0}
    measured = [
        {**said, "prompt: own": own, "prompt: other": other, "n": 1.0, "n: own": -0.5, "n: other": fired}
        for own, other, fired in ((0.3, 0.1, -0.1), (0.1, 0.2, 0.2), (-0.1, -0.4, -0.3), (0.05, None, -0.3))
    ]
    assert confusion(measured) == {
        "prompt": {"right edit": 0.5, "missed": 0.25, "wrong edit": 0.25},
        "n": {"fired": 0.25},
    }
    curve = strictness_curve(measured, [-0.2, 0.0, 0.25])
    assert [(point["recall"], point["wrong edit"], point["fired"]) for point in curve] == [
        (0.75, 0.25, 0.5), (0.5, 0.25, 0.25), (0.25, 0.0, 0.0),
    ]  # fmt: skip
    assert confusion([said]) == {} and strictness_curve([said], [0.0]) == []
    means = wild_means([{**said, "prompt: repeats": 1.0}, {**said, "prompt": 0.0}, said])
    assert means == {
        "edits": 3,
        "prompt": pytest.approx(2 / 3),
        "prompt: repeats": pytest.approx(1 / 3),
        "repeats": 0.5,
    }


def test_refusals(model):
    asked = asked_of(model)
    with pytest.raises(
        ValueError, match=r"9 edits at once need as many facts, and there are 3 and 1 more with prompts"
    ):
        measure(
            model, FACTS, asked, WildSettings(kept=9), [FACTS[0], *[replace(RECORDS[5], target=t) for t in "abcdef"]]
        )
    model.edit(FACTS[0].prompt, FACTS[0].target)
    with pytest.raises(ValueError, match=r"the model carries 1 edits; undo them first"):
        measure(model, FACTS, asked)
    with pytest.raises(ValueError, match=r"a pass has 1 rows, and edits for 2 were named"), model.watching(["a", "b"]):
        model(input_ids=torch.tensor([[5, 6]]))
