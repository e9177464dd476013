"""Evaluations against passes by hand with the edits added to the weights, resumed ones against unbroken ones."""

from __future__ import annotations

import copy
import json
import random
import re
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from support.models import RECORDS, build_model, editable
from support.scope import scoped

from hf_mend import EditableModel, EditRecord
from hf_mend.data.encoding import Query
from hf_mend.edits.edit import stacked
from hf_mend.edits.low_rank import dense
from hf_mend.evaluation import run as run_module
from hf_mend.evaluation.evaluate import METRICS, State, choose_metrics, evaluate
from hf_mend.evaluation.metrics import evaluate_records, summarize
from hf_mend.evaluation.reports import as_result, comparison, comparison_table, narrow_table, write_report
from hf_mend.evaluation.resume import Progress
from hf_mend.evaluation.scores import counterfact_scores, held_out_passages, perplexity
from hf_mend.evaluation.units import shuffled_units
from hf_mend.hub.plots import _colored


SHARES = ("edit_success", "generality", "neighborhood", "unrelated", "drawdown")


def said(model, tokenizer, prompt: str, answer: str | None) -> tuple[list[int], list[int]]:
    """A plain model's argmax over an answer's tokens, teacher-forced, and the answer."""
    ids = tokenizer(prompt)["input_ids"]
    wanted = [] if answer is None else tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + wanted[:-1]])).logits[0, len(ids) - 1 :]
    return logits.argmax(-1).tolist(), wanted


def by_hand(model: EditableModel, groups: list[list[EditRecord]], tokenizer) -> dict[str, float]:
    """The metrics of groups of edits, on a copy of the base to whose weights they are added."""
    rows: dict[str, list[float]] = {name: [] for name in SHARES}
    for group in groups:
        model.edit([r.prompt for r in group], [r.target for r in group], force=True)
        edited = copy.deepcopy(model.base_model)
        for name, update in stacked(model.edits).items():
            edited.get_submodule(name).weight.data += dense((update[0].float(), update[1].float()))
        model.undo_all()
        base = model.base_model
        for module in edited.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        for record in group:
            for kind, prompts in (("edit_success", [record.prompt]), ("generality", record.paraphrases)):
                for prompt in prompts:
                    tokens, wanted = said(edited, tokenizer, prompt, record.target)
                    rows[kind].append(float(tokens == wanted))
            for prompt in record.neighborhood:
                rows["neighborhood"].append(
                    float(said(edited, tokenizer, prompt, None) == said(base, tokenizer, prompt, None))
                )
            for prompt, answer in record.unrelated:
                after, wanted = said(edited, tokenizer, prompt, answer)
                before, _ = said(base, tokenizer, prompt, answer)
                rows["unrelated"].append(sum(a == b for a, b in zip(after, before, strict=True)) / len(after))
                rows["drawdown"].append(float(before == wanted) - float(after == wanted))
    return {name: sum(values) / len(values) for name, values in rows.items()}


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """Tokenising all of Python's documentation would take longer than the rest."""
    monkeypatch.setattr("hf_mend.evaluation.scores.topics", {"a": "the river of spain is what grass? " * 200})


@pytest.fixture
def model(llama, tokenizer) -> EditableModel:
    return editable(llama, tokenizer)


def test_the_figures_are_those_of_weights_with_the_edits_in_them(model, tokenizer):
    units = [[i] for i in range(len(RECORDS))]
    random.Random(3).shuffle(units)
    order = [RECORDS[unit[0]] for unit in units]
    alone, four = evaluate(model, RECORDS, edits=(1, 4), seed=3, max_steps=3)
    expected = by_hand(model, [[record] for record in order], tokenizer)
    assert {name: alone.metrics[name] for name in SHARES} == pytest.approx(expected)
    expected = by_hand(model, [order[:4], order[4:]], tokenizer)
    assert {name: four.metrics[name] for name in SHARES} == pytest.approx(expected)
    assert (alone.edits, alone.measured, four.edits, four.measured) == (1, 8, 4, 8)
    assert four.seconds_an_edit > 0 and alone.seconds_an_edit > 0
    assert four.peak_memory is None or four.peak_memory > 1_000_000
    assert not model.edits
    passages = held_out_passages(model)
    assert four.metrics["perplexity_before"] == perplexity(model, passages)
    with model.edited([r.prompt for r in order[:4]], [r.target for r in order[:4]], force=True):
        assert four.metrics["perplexity"] == pytest.approx(perplexity(model, passages), rel=1e-5)
    low, high = alone.intervals["edit_success"]
    assert low <= alone.metrics["edit_success"] <= high


def test_edits_without_their_scopes_are_those_of_merged_weights(llama, tokenizer):
    model = scoped(llama, tokenizer)
    chosen = [name for name in METRICS if name in ("success", "generality", "neighborhood", "unrelated", "drawdown")]
    order = [RECORDS[unit[0]] for unit in shuffled_units(RECORDS, 0)]
    states = evaluate(model, RECORDS, edits=(1, 4), limit=4, metrics=chosen, scope=False)
    for state, groups in zip(states, ([[record] for record in order[:4]], [order[:4]]), strict=True):
        assert {name: state.metrics[name] for name in SHARES} == pytest.approx(by_hand(model, groups, tokenizer))
    within = evaluate(model, RECORDS, edits=(4,), limit=4, metrics=chosen)
    assert within[0].metrics["unrelated_kl"] < states[1].metrics["unrelated_kl"] and not model.edits


def test_more_edits_than_measured_and_calls_one_after_another(model, tokenizer):
    made, subjects = [], set()
    edit = model.edit

    def noting(records, **options):
        made.append([record.prompt for record in records])
        subjects.update(record.subject for record in records)
        return edit(records, **options)

    model.edit = noting
    named = [replace(record, subject="capital") for record in RECORDS]
    (state,) = evaluate(model, named, edits=(8,), limit=2, edits_per_call=4, metrics=["success"])
    units = shuffled_units(RECORDS, 0)
    prompts = [RECORDS[unit[0]].prompt for unit in units]
    # Facts 0 and 1 are measured; the first stands at the beginning of the first half, the second of the second.
    assert made == [[prompts[0], *prompts[2:5]], [prompts[1], *prompts[5:8]]]
    assert state.measured == 2 and state.edits_per_call == 4
    assert subjects == {"capital"}, "for methods that edit at what a fact is about"
    with pytest.warns(FutureWarning, match="in_calls_of is now called edits_per_call"):
        (earlier,) = evaluate(model, named, edits=(8,), limit=2, in_calls_of=4, metrics=["success"])
    with pytest.warns(FutureWarning, match="State.in_calls_of is now called edits_per_call"):
        assert earlier.in_calls_of == 4
    assert made[2:] == made[:2] and same(earlier) == same(state)
    made.clear()
    (state,) = evaluate(model, RECORDS[:5], edits=(3,), metrics=["success"])
    assert [len(call) for call in made] == [3, 3], "the last state is filled up with facts measured before"
    assert state.measured == 5


def test_facts_that_want_different_targets_of_a_prompt_are_not_kept_together(model, tokenizer):
    other, again = replace(RECORDS[0], target="oslo town"), replace(RECORDS[1], id="again")
    records = [*RECORDS[:3], other, again]
    alone, four = evaluate(model, records, edits=(1, 4), metrics=["success"])
    assert (alone.measured, four.measured) == (5, 4)
    with pytest.raises(ValueError, match="the data set has 4 without 1 that want another target of a prompt"):
        evaluate(model, records, edits=(5,))


def test_a_group_is_edited_and_asked_as_one(model, monkeypatch):
    questions = [("where is the seat?", "rome"), ("who?", "paris")]
    records = [replace(r, group=str(i // 2), portability=questions) for i, r in enumerate(RECORDS)]
    asked = []
    monkeypatch.setattr(
        "hf_mend.evaluation.scores.answer", lambda model, prompt, **options: asked.append(len(model.edits)) or "Rome"
    )
    (state,) = evaluate(model, records, metrics=["portability"])
    assert asked == [2] * 8, "once for each of four groups and two questions, with both edits in place"
    assert state.metrics["portability"] == 0.5 and state.metrics["multi_hop"] == 1
    assert state.measured == len(records)


def test_further_metrics_see_one_record_s_edit_alone(model):
    records = [replace(r, ground_truth="lima town") for r in RECORDS[:3]]
    (state,) = evaluate(model, records, metrics=["counterfact"], max_steps=3)
    found = []
    for record in records:
        with model.edited(record.prompt, record.target, force=True, max_steps=3):
            found.append(counterfact_scores(model, record))
    for name in found[0]:
        assert state.metrics[name] == pytest.approx(sum(values[name] for values in found) / 3, abs=1e-4), name
    assert 0 <= state.metrics["counterfact_score"] <= 1
    assert "generality" not in state.metrics


def test_free_generation_is_measured_when_it_is_asked_for(model, monkeypatch):
    monkeypatch.setattr("hf_mend.evaluation.scores.answer", lambda model, prompt, **options: "Rome town.")
    monkeypatch.setattr(run_module, "answer", lambda model, prompt, **options: "a b a b")
    records = [replace(r, generation=["the town is"]) for r in RECORDS[:2]]
    (state,) = evaluate(model, records, metrics=["all"])
    assert state.metrics["wild_question"] == state.metrics["wild_instruction"] == 0.5
    assert state.metrics["fluency"] > 0 and "exact_match" in state.metrics
    (state,) = evaluate(model, records)
    assert not {"wild_question", "fluency"} & set(state.metrics)


def test_statistics_of_one_state_do_not_reach_the_next(llama, tokenizer):
    model = editable(llama, tokenizer, method="ultraedit")
    figures = [evaluate(model, RECORDS, edits=edits, metrics=["generality"])[-1] for edits in ((1, 4), (4,))]
    assert figures[0].metrics == figures[1].metrics


def same(state) -> dict[str, object]:
    """What depends on the seed alone: all but time and memory."""
    return {**state.__dict__, "seconds_an_edit": None, "peak_memory": None}


def test_a_run_that_is_cut_off_goes_on(model, tmp_path, monkeypatch):
    options = {
        "edits": (1, 2),
        "metrics": ["generality", "neighborhood", "perplexity"],
        "batch_size": 3,
        "max_steps": 1,
    }
    whole = evaluate(model, RECORDS, **options)
    assert [same(state) for state in whole] == [same(state) for state in evaluate(model, RECORDS, **options)]
    path = tmp_path / "out" / "progress.jsonl"
    find, found = Progress.part, []

    def part(self, name, measure):
        def once():
            if len(found) in (2, 6):
                found.append(None)
                raise KeyboardInterrupt
            found.append(name)
            return measure()

        return find(self, name, once)

    monkeypatch.setattr(Progress, "part", part)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, RECORDS, **options, progress_file=path)
        assert not model.edits
        path.write_bytes(path.read_bytes()[:-9])  # as if it had been killed while it wrote
    resumed = evaluate(model, RECORDS, **options, progress_file=path)
    assert [same(state) for state in resumed] == [same(state) for state in whole]
    names = [name for name in found if name]
    # Four parts of single edits, four pairs; the two that were torn were measured again.
    assert len(names) == 10 and len(set(names)) == 8
    found[:] = [None] * 9  # no more interruptions
    evaluate(model, RECORDS, **options, progress_file=path)
    assert len(found) == 9, "all was there"
    evaluate(model, RECORDS[:4], **options, progress_file=path)
    assert len(found) > 9, "other data is not mistaken for it"


def test_what_is_torn_or_foreign_in_a_progress_file_is_left_out(tmp_path):
    path = tmp_path / "progress.jsonl"
    assert Progress(path, {"a": 1}).part("x", lambda: 1) == 1
    path.write_bytes(path.read_bytes() + b'[]\n{"key": 3}\n\xff\n{"key": "tor')
    assert Progress(path, {"a": 2}).part("x", lambda: 2) == 2
    assert Progress(path, {"a": 1}).part("x", lambda: 3) == 1
    assert Progress(path, {"a": 2}).part("x", lambda: 3) == 2
    assert json.loads(path.read_text(errors="replace").splitlines()[-1])["found"] == 2


def test_a_data_set_of_one_row(model):
    (state,) = evaluate(model, RECORDS[:1])
    assert state.measured == 1 and state.intervals == {}
    plain = [EditRecord(RECORDS[0].prompt, RECORDS[0].target)]
    (state,) = evaluate(model, plain)
    assert set(state.metrics) == {
        "edit_success", "score", "exact_match", "perplexity", "perplexity_before", "perplexity_drawdown"
    }  # fmt: skip


WRONG = {
    "more edits than facts": ({"edits": (9,)}, "9 edits at once need as many facts, and the data set has 8"),
    "no edits": ({"edits": (0,)}, "edits is 0, expected at least 1"),
    "no facts": ({"limit": 0}, "limit is 0, expected at least 1"),
    "a metric that is none": ({"metrics": ["taste"]}, "there is no metric 'taste'; the metrics are success"),
    "a metric without its field": (
        {"metrics": ["portability"]},
        "the metric portability needs the field 'portability', which no record of the data has; it allows success",
    ),
    "no steps": ({"max_steps": 0}, "max_steps is 0, expected at least 1"),
    "no rows": ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
    "a text of one token": ({"text": "a"}, "the text for perplexity has 1 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request(model, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        evaluate(model, RECORDS, **options)
    assert not model.edits


def test_wrong_records_and_models(model):
    for record, message in (
        (EditRecord("a", " "), r"record 1 \(no id\) has an empty target"),
        (
            EditRecord("a", "\u200b" * 0 + "rome " * 80),
            r"record 1 \(no id\) has \d+ tokens with its target, the model takes 64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, [RECORDS[0], record])
    with pytest.raises(ValueError, match="the data set is empty"):
        evaluate(model, [])
    with model.edited(RECORDS[0].prompt, RECORDS[0].target), pytest.raises(ValueError, match="undo them first"):
        evaluate(model, RECORDS)


LONG = "the " * 70
UNFIT = {
    "an empty paraphrase": ({"paraphrases": ["x", ""]}, r"an empty paraphrases\[1\] \(''\)"),
    "a long paraphrase": ({"paraphrases": [LONG]}, r"tokens with its target, .*shorten the paraphrases\[0\]"),
    "a long neighbour": ({"neighborhood": [LONG]}, r"tokens, the model takes 64; shorten the neighborhood"),
    "a long question": ({"unrelated": [(LONG, "x")]}, r"with its unrelated\[0\]\[1\], .*the unrelated\[0\]\[0\] 'the"),
    "a long truth": ({"ground_truth": LONG}, "with its ground_truth, the model takes 64; shorten the ground_truth"),
    "a neighbour without room for the truth": (
        {"neighborhood": [" the" * 60], "ground_truth": "the " * 6}, r"with its ground_truth, .*the neighborhood\[0\]"
    ),
    "a question that follows": ({"portability": [(LONG, "x")]}, r"shorten the portability\[0\]\[0\] 'the"),
    "an empty answer": ({"portability": [("x", " ")]}, r"an empty portability\[0\]\[1\]"),
    "a long prompt of free text": ({"generation": ["x", LONG]}, r"tokens, .*shorten the generation\[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_text_that_does_not_fit_is_found_before_anything_is_measured(tokenizer, case, monkeypatch):
    model = editable(build_model("gpt2"), tokenizer)
    monkeypatch.setattr(model, "edit", lambda *args, **options: pytest.fail("it has begun"))
    values, message = UNFIT[case]
    records = [*RECORDS[:2], replace(RECORDS[2], **values), RECORDS[3]]
    metrics = [name for name in choose_metrics(["all"], records) if name != "in_the_wild"]
    for edits in ((1,), (2,)):
        with pytest.raises(ValueError, match=rf"record 2 \(2\) has .*{message}"):
            evaluate(model, records, edits=edits, metrics=metrics)


def test_texts_that_no_metric_needs_and_facts_that_are_not_measured_may_be_of_any_length(tokenizer):
    model = editable(build_model("gpt2"), tokenizer)
    records = [replace(record, paraphrases=[LONG]) for record in RECORDS[:2]]
    assert evaluate(model, records, metrics=["neighborhood"])[0].measured == 2
    first = shuffled_units(records, 0)[0][0]
    records[first] = RECORDS[first]
    assert evaluate(model, records, metrics=["generality"], limit=1)[0].measured == 1


def test_free_text_goes_as_far_as_the_context(tokenizer):
    model = editable(build_model("gpt2"), tokenizer)
    prompt = " the" * 60
    records = [replace(record, generation=[prompt], portability=[(prompt, "the")]) for record in RECORDS[:3]]
    full = replace(RECORDS[3], prompt=" the" * (64 - len(tokenizer(f" {RECORDS[3].target}")["input_ids"])))
    metrics = ["fluency", "portability", "exact_match"]
    (state,) = evaluate(model, [*records, full], metrics=metrics, max_steps=1)
    assert state.measured == 4 and {"fluency", "portability"} <= set(state.metrics)
    assert 0 <= state.metrics["exact_match"] <= 1


def test_simple_questions_that_do_not_fit(tokenizer):
    model = editable(build_model("gpt2"), tokenizer)
    with pytest.raises(ValueError, match=r"record 0 \(0\) has \d+ tokens .*shorten the prompt with the instruction"):
        evaluate(model, [replace(RECORDS[0], prompt=" the" * 50)], metrics=["in_the_wild"])


def test_a_group_with_two_targets_of_a_prompt(model, monkeypatch):
    monkeypatch.setattr(model, "edit", lambda *args, **options: pytest.fail("it has begun"))
    records = [replace(r, group=str(i // 2)) for i, r in enumerate(RECORDS)]
    records[3] = replace(records[3], prompt=f" {records[2].prompt}", target="oslo town")
    message = r"record 2 \(2\) and record 3 \(3\) of the group '1' want two answers .*: 'lima town' and 'oslo town'"
    for edits in (1, 2):
        with pytest.raises(ValueError, match=message):
            evaluate(model, records, edits=(edits,), metrics=["success"])


def test_an_encoder_decoder_is_evaluated_without_perplexity(tokenizer):
    model = editable(build_model("t5"), tokenizer)
    states = evaluate(model, RECORDS[:4], edits=(1, 2), max_steps=1)
    for state, size in zip(states, (1, 2), strict=True):
        assert "perplexity" not in state.metrics and state.edits == size
    direct = evaluate_records(model.split, model.targets, model.editor, model.encoder, RECORDS[:4])
    assert states[0].metrics["edit_success"] == summarize(direct)["edit_success"]
    with pytest.raises(ValueError, match="this one is an encoder-decoder"):
        choose_metrics(["perplexity"], RECORDS, model)


def test_the_earlier_name_of_group_size(model):
    parts = (model.split, model.targets, model.editor, model.encoder, RECORDS[:4])
    expected = evaluate_records(*parts, max_steps=1, group_size=2, progress=False)
    with pytest.warns(FutureWarning, match="evaluate_records: edits_together is now called group_size"):
        assert evaluate_records(*parts, max_steps=1, edits_together=2, progress=False) == expected
    assert expected != evaluate_records(*parts, max_steps=1, progress=False)


def test_metrics_are_chosen_by_the_data():
    assert choose_metrics(None, RECORDS) == [
        "success", "generality", "neighborhood", "unrelated", "drawdown", "exact_match", "perplexity"
    ]  # fmt: skip
    assert choose_metrics(["generality"], RECORDS) == ["success", "generality"]
    full = [replace(RECORDS[0], ground_truth="x", portability=[("q", "a")], generation=["t"])]
    assert choose_metrics(["all"], full) == list(METRICS)


def test_a_weighted_interval():
    from hf_mend.evaluation.scores import bootstrap_interval

    values, weights = [0.0, 1.0] * 50, [3, 1] * 50
    low, high = bootstrap_interval(values, weights=weights)
    assert low < 0.25 < high < 0.5
    assert bootstrap_interval(values, weights=[2] * 100) == bootstrap_interval(values)


def test_queries_of_held_out_text_fit_the_model(model):
    passages = held_out_passages(model)
    assert len(passages) == 12 and all(len(ids) == 64 for ids in passages)
    short = held_out_passages(model, "the capital of peru is rome town")
    assert len(short) == 1
    assert perplexity(model, short) == pytest.approx(perplexity(model, ["the capital of peru is rome town"]), rel=1e-5)
    assert model.encoder.tokens(Query("the capital of peru is rome town"))[0] == short[0]


def a_result(name: str) -> dict[str, object]:
    """A result with figures, and names that no table, page or plot may take for its own."""
    states = [
        State(count, None, 8, {"edit_success": 0.5, "neighborhood": 0.25, "unrelated": 0.75, "perplexity": 31.234},
              {"edit_success": (0.25, 0.75)}, 0.5, peak)
        for count, peak in ((1, None), (10, 2_000_000))
    ]  # fmt: skip
    return as_result(name, {"method": "mend", "base_model": "a <b>", "machine": "2 CPU cores"}, states)


def test_a_report_is_one_file_that_loads_nothing_and_takes_no_text_for_markup(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    evil = '<script>alert("1")</script> | $x^'
    document = {"data": "facts & <i>.json", "facts": 8, "command": "hf-mend compare 'a<b'", "results": [
        a_result(evil), a_result("_plain")]}  # fmt: skip
    paths = write_report(tmp_path, document)
    assert [path.name for path in paths] == ["report.html", "success_locality.png", "success_edits.png", "costs.png"]
    page = paths[0].read_text()
    for path in paths[1:]:
        assert b64encode(path.read_bytes()).decode() in page
    outside = re.sub(r'src="data:image/png;base64,[^"]+"', "", page)
    assert not re.search(r"(src|href|url|@import|https?:)", outside)
    assert "<script" not in page and "a &lt;b&gt;" in page and "&lt;i&gt;.json" in page and "'a<b'" not in page
    assert 'name="viewport" content="width=device-width' in page
    parser = Balanced()
    parser.feed(page)
    assert parser.open == [] and parser.cells == {"th": 9 + 2, "td": 9 * 4 + 2 * 4}
    markdown = comparison_table(document["results"])
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines()}) == 1
    assert "| 0.500 [0.250, 0.750] | 0.250 | 0.750 | 31.23 |" in markdown and "<script" not in markdown


def test_a_terminal_s_table_is_no_wider_than_the_terminal():
    results = [a_result("a-very-long-name-of-an-editor-from-the-hub"), a_result("b")]
    wide, narrow = narrow_table(results, 1000), narrow_table(results, 60)
    assert all(len(line) <= 60 for line in narrow.splitlines()) and "[0.250" not in wide
    head, first, *_ = narrow.splitlines()
    assert head.split()[:3] == ["editor", "or", "method"] and first.startswith("a-very-long-name-of-a...")
    assert "0.500" in first and "in the files written: the intervals, " in " ".join(narrow.split())
    left = set(comparison(results)[0]) - {part for part in comparison(results)[0] if part in head}
    assert left and all(name in " ".join(narrow.split()) for name in left)
    assert all(name in wide.splitlines()[0] for name in comparison(results)[0])


def test_a_report_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mend.evaluation.reports.can_draw", lambda: False)
    document = {"data": "facts.json", "facts": 8, "command": "hf-mend compare", "results": [a_result("a")]}
    (path,) = write_report(tmp_path, document)
    assert "hf_mend[plots]" in path.read_text() and "<img" not in path.read_text()


class Balanced(HTMLParser):
    """What is open at the end, and how many cells there were."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.cells: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("th", "td"):
            self.cells[tag] = self.cells.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_dozen_methods_have_a_colour_each():
    pytest.importorskip("matplotlib", reason="needs the extra `plots`")
    colors = [color for _, color in _colored([{"name": str(number)} for number in range(20)])]
    assert len(set(colors)) == 20
