"""Training a scope: its examples, its loss, and what it decides afterwards."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace

import pytest
import torch
from support.models import RECORDS, build_model
from support.scope import scoped

from hf_mend import EditableModel, EditorConfig
from hf_mend.bases.split import SplitModel
from hf_mend.cli.scope import scope
from hf_mend.data.records import EditRecord
from hf_mend.edits.edit import Edit
from hf_mend.edits.edit_scope import EditScope
from hf_mend.scope.bank import KeyBank
from hf_mend.scope.network import ScopeNetwork, key_scores
from hf_mend.scope.penalties import other_penalty, rival_penalty
from hf_mend.scope.words import word_table, words_in
from hf_mend.training import scope_training, scope_words
from hf_mend.training.examples import Asking, TrainingExamples
from hf_mend.training.scope_examples import (
    NONE,
    Mark,
    MarkedText,
    marked_texts,
    scope_examples,
    set_others,
    with_further_kinds,
    within,
)
from hf_mend.training.scope_texts import ScopeTexts
from hf_mend.training.scope_training import (
    WRONG_FIRES,
    ScopeTrainingArguments,
    _others,
    scope_loss,
    scope_texts,
    threshold_for,
    train_scope,
)
from hf_mend.training.scope_words import learn_subjects, learn_words


@pytest.fixture(scope="module")
def examples():
    return TrainingExamples(RECORDS, [("what is the colour of grass?", "green")], asking=Asking(texts=["the sea is"]))


def test_marks_stand_where_the_fact_is_asked_for(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    for number, texts in enumerate(marked_texts(scope_examples(examples), model.encoder)):
        record = RECORDS[number]
        prompt = tokenizer(record.prompt)["input_ids"]
        answer = tokenizer(f" {record.target}.")["input_ids"]
        bare = texts[0]
        assert bare.tokens[: len(prompt) + len(answer)] == prompt + answer
        asked = {mark.position for mark in bare.marks if mark.fact == number}
        assert asked == set(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
        behind = [mark.position for mark in bare.marks if mark.kind == "after"]
        assert behind[0] == len(prompt) + len(answer) - 1 and all(mark.fact in (number, NONE) for mark in bare.marks)
        kinds = [text.marks[0].kind for text in texts]
        assert kinds == ["prompt", "said", "said", "said", "neighborhood", "unrelated"]
        near = next(text for text in texts if text.marks[0].kind == "neighborhood").marks[0]
        assert near.fact == NONE and near.near == number
        assert all(mark.position < len(text.tokens) for text in texts for mark in text.marks)


def test_keys_at_a_few_tokens_are_those_of_the_whole_text(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    data = scope_texts(model, examples, ScopeTrainingArguments(max_facts=3))
    texts = [text for one in data.texts for text in one]
    found = data.keys(model.scope, texts)
    expected = []
    for text in texts:
        whole = model.scope.keys(model.scope.token_states(text.hidden[None], words=data.words([text])))[0]
        expected += [whole[mark.position] for mark in text.marks]
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)


def test_the_loss_is_cross_entropy_over_all_keys_and_none(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    data = scope_texts(model, examples, ScopeTrainingArguments())
    torch.manual_seed(0)
    scope = ScopeNetwork(model.scope.width)
    facts = list(range(len(data)))
    bank = data.bank(scope, facts)
    loss = scope_loss(scope, data, facts, bank)
    loss.backward()
    assert all(
        p.grad is not None for name, p in scope.named_parameters() if not name.startswith(("word.", "subject."))
    )
    # With keys that say nothing, each key and "none" are alike.
    with torch.no_grad():
        scope.log_sharpness.fill_(-20.0)
    keys = len(data) + sum(mark.near != NONE for one in data.texts for text in one for mark in text.marks)
    assert float(scope_loss(scope, data, facts, bank).detach()) < 2 * torch.log(torch.tensor(keys + 1.0))


def test_training_finds_facts_in_the_words_of_its_texts(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    result = train_scope(model, examples, ScopeTrainingArguments(steps=150, facts_per_step=8, further_facts=0))
    assert result["loss"] < 0.5
    data = scope_texts(model, examples, ScopeTrainingArguments())
    marks = [mark for one in data.texts for text in one for mark in text.marks]
    queries = data.keys(model.scope, [text for one in data.texts for text in one])
    scores = key_scores(queries, data.bank(model.scope, range(len(data))))
    said = [n for n, mark in enumerate(marks) if mark.kind == "said"]
    right = [int(scores[n].argmax()) == marks[n].fact for n in said]
    assert sum(right) / len(right) > 0.9
    unrelated = [n for n, mark in enumerate(marks) if mark.kind == "unrelated"]
    best = scores[unrelated].amax(1)
    assert (best <= model.scope.threshold + 1e-3).float().mean() > 0.9  # as a bank of all these facts decides
    near = [(n, mark.near) for n, mark in enumerate(marks) if mark.kind == "neighborhood"]
    own = torch.stack([scores[n].unflatten(0, (data.sides, -1)).amax(0)[fact] for n, fact in near])
    # Beside its own fact alone a neighbour has no rival.
    assert own.quantile(1 - WRONG_FIRES["neighborhood"]) <= model.scope.threshold + 1e-3
    again = model.scope.state_dict()
    for name, value in again.items():
        if value.dim() > 1:
            assert torch.equal(value, value.bfloat16().float()), name


def test_a_scope_without_records_learns_from_packaged_facts(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    before = model.scope.values.detach().clone()
    train_scope(model, args=ScopeTrainingArguments(steps=3, facts_per_step=4, further_facts=12))
    assert not torch.equal(model.scope.values, before)
    with pytest.raises(ValueError, match="there are neither examples nor further_facts"):
        train_scope(model, args=ScopeTrainingArguments(further_facts=0))


def test_without_records_a_training_is_that_of_the_command(llama, tokenizer, monkeypatch):
    given: list[ScopeTrainingArguments] = []

    def drawn(model, examples, args):
        given.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(scope_training, "scope_texts", drawn)
    with pytest.raises(KeyboardInterrupt):
        train_scope(scoped(llama, tokenizer))
    defaults = inspect.signature(scope).parameters
    names = {"steps": "steps", "rounds": "rounds", "further_facts": "packaged_facts", "bf16": "bf16", "seed": "seed"}
    assert {ours: getattr(given[0], ours) for ours in names} == {
        ours: defaults[its].default for ours, its in names.items()
    }


def test_without_records_the_threshold_is_lower_as_most_that_is_asked_will_be_of_unknown_kinds(
    llama, tokenizer, examples, monkeypatch
):
    found: list[float] = []
    finish = scope_training._finish

    def finished(scope, data, draw):
        finish(scope, data, draw)
        found.append(float(scope.threshold))

    monkeypatch.setattr(scope_training, "_finish", finished)
    args = ScopeTrainingArguments(steps=2, facts_per_step=4, further_facts=12)
    for records, lower in ((None, 0.23), (examples, 0.0)):
        model = scoped(llama, tokenizer)
        told = train_scope(model, records, args)["threshold"]
        assert told == float(model.scope.threshold) == pytest.approx(found[-1] - lower)


def test_what_is_asked_most_often_is_learned_where_there_are_no_records(examples):
    def asked(records: TrainingExamples | None) -> set[str | None]:
        return {record.relation for record in with_further_kinds(records, 2000).records}

    assert {"person/birthplace", "place/capital"} <= asked(None)
    assert not {"person/birthplace", "place/capital"} & asked(examples)


def test_further_kinds_stand_beside_the_records(examples):
    wider = with_further_kinds(examples, 10)
    assert len(wider) == len(RECORDS) + 10 and wider.questions == examples.questions
    assert [record.prompt for record in wider.records[: len(RECORDS)]] == [record.prompt for record in RECORDS]
    alone = with_further_kinds(None, 10)
    assert len(alone) == 10 and alone.questions
    assert not {question for question, _ in alone.questions} & {q for one in alone.records for q in one.questions}


def test_facts_of_rare_relations_are_drawn_more_often_than_their_share():
    texts = [[MarkedText([1], [Mark(0, fact, "prompt")])] for fact in range(5)]
    assert ScopeTexts(texts, ["a", "a", "b", "a", "a"]).weights == [0.5, 0.5, 1.0, 0.5, 0.5]


def test_a_training_step_leaves_out_a_tenth_of_the_components_and_nothing_else_does():
    torch.manual_seed(0)
    scope, hidden = ScopeNetwork(32), torch.ones(1, 3, 32)
    seen = []
    scope.gates.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    place = torch.tensor([0] * 200), torch.tensor([2] * 200)
    scope.keys_at(hidden.expand(200, 3, 32), torch.arange(200), place[1])
    assert 0.08 < float((seen[-1] == 0).float().mean()) < 0.12
    with torch.no_grad():
        scope.keys_at(hidden, *place)
    scope.eval().keys_at(hidden, *place)
    assert all(bool((one == 1).all()) for one in seen[1:])


def test_texts_that_are_longer_than_the_model_takes_are_cut_at_their_beginning(tokenizer, examples):
    marks = [Mark(1, 0, "inside"), Mark(7, 0, "said"), Mark(8, NONE, "after")]
    cut = within(MarkedText([*range(12)], marks), 5)
    assert cut.tokens == [4, 5, 6, 7, 8] and [mark.position for mark in cut.marks] == [3, 4]
    assert within(MarkedText([*range(12)], marks), None).tokens == [*range(12)]
    model = EditableModel(build_model("gpt2"), EditorConfig(method="ft", scope=True), tokenizer)
    model.config.n_positions = 12
    train_scope(model, examples, ScopeTrainingArguments(steps=2, facts_per_step=4, further_facts=12))
    assert model.scope.is_trained


def test_the_scope_s_weights_are_the_mean_of_its_rounds(llama, tokenizer, examples, monkeypatch):
    ends, starts = [], []
    one_round = scope_training._round

    def watched(scope, *given):
        starts.append({name: value.clone() for name, value in scope.state_dict().items()})
        one_round(scope, *given)
        ends.append({name: value.clone() for name, value in scope.state_dict().items()})

    monkeypatch.setattr(scope_training, "_round", watched)
    model = EditableModel(llama, EditorConfig(method="ft", scope=True), tokenizer)
    options = ScopeTrainingArguments(steps=2, facts_per_step=4, further_facts=0, rounds=2)
    train_scope(model, examples, options)
    first, second = ends
    assert all(torch.equal(first[name], starts[1][name]) for name in first)  # the second goes on from the first
    for name, value in model.scope.state_dict().items():
        if name != "threshold":  # which is set behind
            assert torch.allclose(value, (first[name] + second[name]) / 2, atol=1e-2)
    assert not torch.allclose(first["skip.weight"], second["skip.weight"], atol=1e-4)


def test_an_interrupted_training_goes_on_to_the_same_scope(llama, tokenizer, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(scope_training, "_FRESH_KEYS", 2)
    monkeypatch.setattr(scope_training, "_SAVED", 2)
    options = {"steps": 5, "facts_per_step": 4, "further_facts": 0, "rounds": 2}

    def trained(**more):
        model = EditableModel(llama, EditorConfig(method="ft", scope=True), tokenizer)
        train_scope(model, examples, ScopeTrainingArguments(**options, **more))
        return model.scope.state_dict()

    whole = trained()
    kept = {"checkpoint": str(tmp_path / "scope.pt"), "hidden_states_dir": str(tmp_path / "states")}
    loss, calls = scope_training.scope_loss, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) in (4, 9):
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(scope_training, "scope_loss", interrupted)
    for _ in range(2):  # in the first round and in the second
        with pytest.raises(KeyboardInterrupt):
            trained(**kept)
        assert (tmp_path / "scope.pt").exists()
    with pytest.raises(ValueError, match="is of a scope's training with .*give the same options and facts to go on"):
        trained(**kept, seed=3)
    ran = []
    run_below = SplitModel.run_below
    monkeypatch.setattr(SplitModel, "run_below", lambda *given, **more: ran.append(1) or run_below(*given, **more))
    again = trained(**kept)
    assert len(calls) < 4 + 5 + 9 and len(ran) <= 1  # goes on, and reads no text again
    assert not (tmp_path / "scope.pt").exists()
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("name", ["steps", "facts_per_step", "max_facts", "rounds"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} is 0, expected a whole number of at least 1"):
        ScopeTrainingArguments(**{name: 0})
    with pytest.raises(ValueError, match="further_facts is -1, expected a whole number of at least 0"):
        ScopeTrainingArguments(further_facts=-1)


def test_a_model_whose_edits_act_everywhere_has_no_scope_to_train(llama, tokenizer, examples):
    from support.models import editable

    with pytest.raises(ValueError, match=r"EditorConfig\(scope=True\)"):
        train_scope(editable(llama, tokenizer), examples)


def test_a_step_s_facts_stand_among_others_of_their_relation():
    relations = ["a"] * 30 + ["b"] * 2000
    data = ScopeTexts([[] for _ in relations], relations)
    others = _others(data, [0, 1], random.Random(0))
    assert sum(relations[fact] == "a" for fact in others) >= 40 and len(others) == 440
    assert {*others} - {*range(30)}  # and any


def test_a_text_that_asks_for_another_record_too_is_no_counterexample_of_it():
    def record(subject, relation, **words):
        return EditRecord(f"{subject} {relation}", "x", relation=relation, subject=subject, **words)

    records = [
        record("Ann", "was born in", questions=["Where was Ann born?"]),
        record("Ann", "works in"),
        record("Bob", "was born in"),
        record("Ann", "was born in"),  # the first again, with another target perhaps
    ]
    texts = [
        [MarkedText([1], [Mark(0, 0, "prompt")]), MarkedText([1], [Mark(0, NONE, "unrelated")])],
        [MarkedText([1], [Mark(0, NONE, "same_subject", 1)], prompt="Where was Ann born?")],
        [MarkedText([1], [Mark(0, NONE, "neighborhood", 2)], prompt="It is known that Ann was born in")],
        [MarkedText([1], [Mark(0, NONE, "same_subject", 3)], prompt="The parents of Ann were")],
    ]
    set_others(records, texts)
    assert [[list(text.others) for text in own] for own in texts] == [[[3], []], [[0]], [[0, 3]], [[]]]


def test_the_words_that_matter_are_those_of_the_subject(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    data = scope_texts(model, examples, ScopeTrainingArguments())
    learn_words(model.scope, data)
    assert not model.scope.word.weight.requires_grad
    for record, (bare, *_) in zip(RECORDS, data.texts, strict=True):
        end = bare.marks[0].position + 1
        odds = model.scope.log_odds(bare.hidden[:end])
        country = tokenizer(" " + record.prompt.split()[-2]).input_ids
        of_country = torch.tensor([token in country for token in bare.tokens[:end]])
        assert odds[of_country].mean() > odds[~of_country].mean() + 0.2, record.prompt


def test_no_word_matters_where_there_is_one_form_of_asking(llama, tokenizer, examples):
    model = scoped(llama, tokenizer)
    data = scope_texts(model, examples, ScopeTrainingArguments())
    alone = ScopeTexts([one[:1] for one in data.texts], data.relations, model.numbers_of_words)
    before = model.scope.state_dict()["word.weight"].clone()
    learn_words(model.scope, alone)
    learn_words(model.scope, ScopeTexts(data.texts, data.relations))  # of an encoder-decoder model
    assert torch.equal(model.scope.state_dict()["word.weight"], before)


def test_the_words_that_name_a_subject_are_learned_and_others_of_the_text_are_not(llama, tokenizer, examples):
    """From records whose subjects are known; RECORDS[6] is about three words, one has a subject it does not name."""
    subjects = [record.prompt.removeprefix("the capital of ").removesuffix(" is") for record in RECORDS]
    records = [replace(record, subject=name) for record, name in zip(RECORDS, subjects, strict=True)]
    records[1] = replace(records[1], subject="somewhere")
    model = scoped(llama, tokenizer)
    known = TrainingExamples(records, examples.questions, asking=examples.asking)
    data = scope_texts(model, known, ScopeTrainingArguments())
    table = word_table(tokenizer)
    assert [len(subject) for subject in data.subjects] == [len(name.split()) for name in subjects]
    assert not model.scope.knows_subjects
    learn_subjects(model.scope, data)
    assert model.scope.knows_subjects and not model.scope.subject.weight.requires_grad
    told = []
    for bare, *_ in data.texts:
        words = words_in(table, bare.tokens[: bare.marks[0].position + 1])
        odds = model.scope.subject_odds(bare.hidden)[[word.last for word in words]].tolist()
        told.append(max(odds[3:-1]) > max(*odds[:3], odds[-1]))
    assert sum(told) >= 6, "a random model of few words tells most of eight"
    before = model.scope.subject.weight.clone()
    learn_subjects(model.scope, ScopeTexts(data.texts, data.relations))
    assert torch.equal(model.scope.subject.weight, before), "nothing is known of these facts' subjects"


def _finds(score, rivals, missing, other, threshold: float) -> torch.Tensor:
    """Whether each text finds an edit, all keys having one threshold."""
    over, at = rivals - threshold, torch.full_like(score, threshold)
    near = (over > 0.25 * (threshold - 1)).sum(1)
    return score - at >= torch.maximum(rival_penalty(over.amax(1), at, missing, near), other_penalty(at, other))


def test_the_threshold_is_where_few_enough_texts_find_an_edit():
    torch.manual_seed(4)
    score, *rest = torch.rand(6, 400).mul(1.2).sub(0.2).sort(0, descending=True).values
    missing, rivals = torch.rand(400), torch.stack(rest, 1)[:, torch.randperm(5)]
    other = torch.minimum(missing, torch.rand(400))

    def found(threshold: float) -> float:
        return float(_finds(score, rivals, missing, other, threshold).float().mean())

    for share in (0.02, 0.1, 0.3):
        threshold = float(threshold_for(score, rivals, missing, other, share))
        assert found(threshold) <= share + 1e-6 < found(threshold - 0.02)
        assert all(found(higher) <= share + 1e-6 for higher in torch.linspace(threshold, 1.0, 20).tolist())
    assert float(threshold_for(score, rivals, missing, other, 1.0)) == 0.0


def test_the_threshold_counts_how_many_rivals_are_near():
    torch.manual_seed(6)
    score = torch.rand(300) * 0.5 + 0.5
    rivals, missing = score[:, None] - 0.02 * torch.rand(300, 30), torch.full((300,), 0.3)
    other = torch.zeros(300)
    steps = torch.linspace(0.0, 1.0, 1001)
    shares = torch.tensor([float(_finds(score, rivals, missing, other, float(at)).float().mean()) for at in steps])
    by_hand = steps[int((shares > 0.1).nonzero()[-1]) + 1]
    assert float(threshold_for(score, rivals, missing, other, 0.1)) == pytest.approx(float(by_hand), abs=1.5e-3)
    assert float(threshold_for(score, rivals[:, :1], missing, other, 0.1)) > float(by_hand) + 0.01, "one is not many"


def test_the_words_are_learned_from_facts_drawn_at_random(llama, tokenizer, examples, monkeypatch):
    model = scoped(llama, tokenizer)
    data = scope_texts(model, examples, ScopeTrainingArguments())
    seen: list[int] = []
    monkeypatch.setattr(scope_words, "_shares", lambda texts, _: iter(seen.append(data.texts.index(texts)) or ()))
    monkeypatch.setattr(scope_words, "_FACTS", 3)
    for seed in range(4):
        learn_words(model.scope, data, seed)
    draws = [tuple(seen[start : start + 3]) for start in range(0, 12, 3)]
    assert len(seen) == 12 and all(len({*draw}) == 3 for draw in draws) and len({*draws}) > 2


def test_the_threshold_that_training_sets_is_one_of_a_bank_s_decisions(llama, tokenizer, examples, monkeypatch):
    """What is told of each text that must stay decides, at any threshold, as a bank of the same keys does."""
    model = scoped(llama, tokenizer)
    data = scope_texts(model, examples, ScopeTrainingArguments())
    scope = ScopeNetwork(model.scope.width)
    scope.load_state_dict(model.scope.state_dict())
    with torch.no_grad():
        scope.word.bias.fill_(1.0)  # all words matter alike
    told: list[tuple[torch.Tensor, ...]] = []

    def tell(score, rivals, missing, other, share):
        told.append((score, rivals, missing, other))
        return threshold_for(score, rivals, missing, other, share)

    monkeypatch.setattr(scope_training, "threshold_for", tell)
    scope_training._finish(scope, data, random.Random(0))
    some = random.Random(0).sample(range(len(data)), len(data))
    keys = data.bank(scope, some).unflatten(0, (data.sides, -1)).transpose(0, 1)  # (facts, sides, width)
    texts = [text for fact in some for text in data.texts[fact] if text.marks]
    near = [replace(text, marks=[mark]) for text in texts for mark in text.marks if mark.kind == "neighborhood"]
    queries = data.keys(scope, near)
    score, rivals, missing, other = next(values for values in told if len(values[0]) == len(near))
    assert len({*missing.tolist()}) > 1 and float(other.max()) > 0.4
    plain = torch.tensor([not text.others for text in near])
    decided = set()
    for threshold in torch.linspace(2 * float(score.min()) - 1, float(score.max()), 60).tolist():
        edits = [
            Edit(
                str(i), "", str(i), {}, scope=EditScope("s", one, torch.full((len(one),), threshold), ["x"] * len(one))
            )
            for i, one in enumerate(keys)
        ]
        found = _finds(score, rivals, missing, other, threshold)
        assert torch.equal(found[plain], (KeyBank(edits).choose(queries) >= 0)[plain])
        decided.add(tuple(found.tolist()))
    assert len(decided) > 4


def test_a_scope_trains_on_from_what_it_is(llama, tokenizer, examples):
    model = EditableModel(llama, EditorConfig(method="ft", scope=True), tokenizer)
    options = {"facts_per_step": 4, "further_facts": 0, "seed": 1}
    with pytest.raises(ValueError, match="not trained, so that there is nothing to go on from; leave go_on out"):
        train_scope(model, examples, ScopeTrainingArguments(1, go_on=True, **options))
    train_scope(model, examples, ScopeTrainingArguments(4, **options))
    before = {name: value.clone() for name, value in model.scope.state_dict().items()}
    train_scope(model, examples, ScopeTrainingArguments(1, learning_rate=1e-9, go_on=True, **options))
    after = model.scope.state_dict()
    for name in before.keys() - {"threshold"}:
        torch.testing.assert_close(after[name], before[name], rtol=1e-2, atol=1e-5)
    assert torch.equal(after["centre"], before["centre"]) and torch.equal(after["word.weight"], before["word.weight"])
    train_scope(model, examples, ScopeTrainingArguments(1, learning_rate=1e-2, go_on=True, **options))
    assert not torch.allclose(model.scope.state_dict()["values"], before["values"], rtol=1e-2)


def test_a_model_with_edits_is_refused_before_anything_is_trained(llama, tokenizer, examples, monkeypatch):
    model = scoped(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, check=False)
    monkeypatch.setattr(scope_training, "scope_texts", lambda *_: pytest.fail("texts were drawn"))
    with pytest.raises(ValueError, match=r"carries 1 edits, which would lose their scope; undo_all\(\) before"):
        train_scope(model, examples, ScopeTrainingArguments(steps=2, facts_per_step=4, further_facts=0))


def test_progress_of_another_base_model_is_not_gone_on_from(tokenizer, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(scope_training, "_FRESH_KEYS", 2)
    monkeypatch.setattr(scope_training, "_SAVED", 2)
    loss, calls = scope_training.scope_loss, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*given)

    monkeypatch.setattr(scope_training, "scope_loss", interrupted)

    def train(seed):
        model = EditableModel(build_model("llama", seed), EditorConfig(method="ft", scope=True), tokenizer)
        args = ScopeTrainingArguments(5, 4, further_facts=0, checkpoint=str(tmp_path / "scope.pt"))
        train_scope(model, examples, args)

    with pytest.raises(KeyboardInterrupt):
        train(0)
    with pytest.raises(ValueError, match="is of a scope's training with .*, or remove the file to begin anew"):
        train(1)
    train(0)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
def test_damaged_progress_is_named(llama, tokenizer, examples, tmp_path, damage):
    path = tmp_path / "scope.pt"
    torch.save({"weights": torch.zeros(1000)}, path)
    if damage != "foreign":
        path.write_bytes({"cut": path.read_bytes()[:2000], "empty": b"", "text": b"hello"}[damage])
    model = EditableModel(llama, EditorConfig(method="ft", scope=True), tokenizer)
    args = ScopeTrainingArguments(2, 4, further_facts=0, checkpoint=str(path))
    with pytest.raises(ValueError, match=r"scope\.pt is no whole file of the progress of a scope's training .*remove"):
        train_scope(model, examples, args)
    assert path.exists()
