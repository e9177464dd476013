"""Edits told apart from texts that only name what they are about."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import RECORDS, EditableModel, all_logits
from support.scope import scoped

from hf_mend.bases.fingerprint import fingerprint_of
from hf_mend.data.encoding import Query
from hf_mend.editing import contrasts, pipeline
from hf_mend.editing.contrasts import subject_of
from hf_mend.editing.scoping import keys_of
from hf_mend.edits.edits_file import write_edits_file
from hf_mend.scope.files import scope_id
from hf_mend.scope.network import MEANING_WIDTH, key_scores
from hf_mend.scope.words import word_table, words_in


FRANCE = replace(RECORDS[0], subject="france", paraphrases=[], neighborhood=[])
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = (("the river of {} is", True), ("the river of {} is", False), ("{} has the", False))


@pytest.fixture(autouse=True)
def texts(monkeypatch):
    """Texts in words that the tests' tokenizer knows."""
    monkeypatch.setattr(contrasts, "TEXTS", TEXTS)
    monkeypatch.setattr(contrasts, "MOST_LIKE", 0.999)


def knowing(base, tokenizer, **options):
    """A model whose scope takes a word for what a text is about, or not, at random."""
    model = scoped(base, tokenizer, **options)
    scope = copy.deepcopy(model.scope)
    torch.nn.init.normal_(scope.subject.weight)
    model.set_scope(scope)
    return model


@pytest.fixture
def model(llama, tokenizer):
    return knowing(llama, tokenizer)


def keys_by_hand(model, text: str, chat: bool = False) -> torch.Tensor:
    return keys_of(model._gate, model.split, model.encoder([Query(text, None, chat)]))[0][:, :MEANING_WIDTH]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_an_edit_keeps_the_keys_of_texts_that_name_what_it_is_about(_built_models, tokenizer, architecture):
    model = knowing(copy.deepcopy(_built_models[architecture]), tokenizer)
    result = model.edit(FRANCE, max_steps=1, check=False)
    scope = model.edits[0].scope
    assert scope.about == result.scope.about == "france" and "only names 'france'" in str(result.scope)
    assert scope.thresholds.tolist() == pytest.approx([0.99 - 0.02] * len(scope.thresholds))
    expected = torch.cat([keys_by_hand(model, text) for text in ("the river of france is", "france has the")])
    alike = key_scores(expected, scope.keys.float()).amax(-1)
    assert torch.allclose(scope.contrasts.float(), expected[alike < 0.999], atol=1e-3)


def test_in_a_chat_there_is_a_turn_of_one_among_them(llama, tokenizer):
    with_chat = copy.deepcopy(tokenizer)
    with_chat.chat_template = CHAT
    model = knowing(llama, with_chat)
    model.edit(FRANCE, max_steps=1, check=False)
    first = keys_by_hand(model, "the river of france is", chat=True)
    assert torch.allclose(model.edits[0].scope.contrasts[:1].float(), first, atol=1e-3)
    assert len(model.edits[0].scope.contrasts) == 3


@pytest.mark.parametrize("strictness", [-1.0, -0.5])
def test_a_text_that_is_more_like_these_than_like_the_edit_s_own_asks_for_nothing(model, strictness):
    model.edit(FRANCE, max_steps=1, check=False)
    model.scope_strictness = strictness  # nearly whatever it asks for
    for text, acts in (("the river of france is", False), ("france has the", False), (FRANCE.prompt, True)):
        (one,) = model.which_edits(text)
        assert one.acts is acts and (one.score >= one.threshold) is acts, "the threshold tells why"


def test_what_is_included_counts_against_them_at_the_edit_s_own_threshold(model):
    result = model.edit(FRANCE, max_steps=1, check=False)
    model.include(result.id, "the river of france is")
    assert model.which_edits("the river of france is")[0].acts
    thresholds = model.edits[0].scope.thresholds
    assert bool((thresholds == thresholds[0]).all())


def test_a_text_that_asks_for_nearly_the_same_is_none_of_them(model, monkeypatch):
    monkeypatch.setattr(contrasts, "TEXTS", (("the capital of {} is", False), ("{} has the", False)))
    model.edit(FRANCE, max_steps=1, check=False)
    assert len(model.edits[0].scope.contrasts) == 1, "the edit's own prompt"
    monkeypatch.setattr(contrasts, "TEXTS", (("the capital of {} is", False),))
    model.edit(replace(RECORDS[1], subject="italy"), max_steps=1, check=False)
    scope = model.edits[1].scope
    assert not len(scope.contrasts) and scope.about is None
    assert scope.thresholds[0] == pytest.approx(0.99), "nothing keeps it apart, so that it acts no earlier"


def test_a_scope_that_knows_no_subjects_has_none(llama, tokenizer):
    model = scoped(llama, tokenizer)
    model.edit(FRANCE, max_steps=1, check=False)
    scope = model.edits[0].scope
    assert not len(scope.contrasts) and scope.about is None and scope.thresholds[0] == pytest.approx(0.99)


def test_texts_longer_than_the_model_takes_are_left_out(model, monkeypatch):
    monkeypatch.setattr(contrasts, "TEXTS", (("the river of {} is " * 60, False), ("{} has the", False)))
    model.edit(FRANCE, max_steps=1, check=False)
    assert len(model.edits[0].scope.contrasts) == 1


def test_a_text_that_the_encoder_refuses_is_left_out(model, monkeypatch):
    """Here it holds a token that the model's embedding does not have."""
    monkeypatch.setattr(contrasts, "TEXTS", (("the river of {} is <new>", False), ("{} has the", False)))
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_tokens([f"<filler{i}>" for i in range(model.config.vocab_size)] + ["<new>"])
    model.tokenizer = tokenizer
    model.edit(FRANCE, max_steps=1, check=False)
    assert len(model.edits[0].scope.contrasts) == 1


def test_a_token_that_is_newer_than_the_scope_s_words_is_a_word_of_its_own(llama, tokenizer):
    """Tokens may be added behind the first edit, and a vocabulary may have gaps."""
    tokenizer = copy.deepcopy(tokenizer)
    model = knowing(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, check=False)
    tokenizer.add_tokens(["zorb"])
    result = model.edit("the capital of zorb is", "rome town", max_steps=1, check=False)
    assert result.id is not None
    table = word_table(tokenizer)
    unknown, known = len(table.hashes) + 3, tokenizer("france is")["input_ids"]
    words = words_in(table, [unknown, *known, unknown])
    assert [(word.first, word.last) for word in words] == [(0, 0), (1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize(
    ("given", "about"),
    [("france", "france"), (" france ", "france"), ("spain", None), (" ", None), ("", None), (FRANCE.prompt, None)],
)
def test_a_subject_that_a_record_gives_is_one_that_its_prompt_names(llama, tokenizer, given, about, monkeypatch):
    monkeypatch.setattr(pipeline, "subject_of", lambda *args: None)
    model = knowing(llama, tokenizer)
    model.edit(replace(FRANCE, subject=given), max_steps=1, check=False)
    assert model.edits[0].scope.about == about


def test_a_threshold_is_none_that_no_file_takes(llama, tokenizer, tmp_path):
    model = knowing(llama, tokenizer)
    with torch.no_grad():
        model.scope.threshold.fill_(-1.0)
    model.edit(FRANCE, max_steps=1, check=False)
    model.save_edits(tmp_path)
    model.undo_all()
    assert len(model.load_edits(tmp_path)) == 1


def test_files_and_stores_keep_them(model, llama, tokenizer, tmp_path):
    model.edit(FRANCE, max_steps=1, check=False)
    model.save_pretrained(tmp_path / "editor")
    model.save_edits(tmp_path / "edits")
    model.open_store(tmp_path / "store")
    model.close_store()
    (edit,) = model.edits
    for read in ("load_edits", "open_store"):
        again = EditableModel.from_pretrained(llama, tmp_path / "editor", tokenizer=tokenizer).eval()
        assert again.scope.knows_subjects
        getattr(again, read)(tmp_path / ("edits" if read == "load_edits" else "store"))
        assert again.edits[0].scope == edit.scope and again.edits[0].scope.about == "france"
        again.scope_strictness = -1.0
        assert not again.which_edits("the river of france is")[0].acts
        again.undo_all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"contrasts": torch.ones(2, 64).half()},
            "contrasts of the edit .* have 64 numbers, this model's scope gives 128",
        ),
        ({"about": None}, "contrasts of shape .* about None; the file was altered"),
        (
            {"contrasts": torch.zeros(0, 0)},
            r"contrasts of shape \(0, 384\) in torch.float16 about 'france'; the file was altered",
        ),
        ({"contrasts": torch.full((1, 128), 6e4).half()}, "a key of the edit .* has numbers beyond 1"),
        ({"contrasts": torch.zeros(2, 128).half()}, "has a key of nothing but zeros"),
        ({"contrasts": torch.ones(2, 128).to(torch.uint8)}, "contrasts of shape .* in torch.uint8 about 'france'"),
    ],
)
def test_damaged_ones_are_refused(model, tokenizer, tmp_path, change, message):
    model.edit(FRANCE, max_steps=1, check=False)
    edit = replace(model.edits[0], scope=replace(model.edits[0].scope, **change))
    write_edits_file(tmp_path, [edit], fingerprint_of(model.base_model, model.targets))
    model.undo_all()
    plain = all_logits(model, tokenizer)
    with pytest.raises(ValueError, match=message):
        model.load_edits(tmp_path)
    assert model.edits == [] and torch.equal(all_logits(model, tokenizer), plain)


def test_a_scope_of_before_loads_and_knows_no_subjects(model, llama, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "scope.safetensors"
    tensors = load_file(path)
    before = {name: value for name, value in tensors.items() if not name.startswith("subject.")}
    assert len(before) == len(tensors) - 2
    save_file(before, path)
    again = EditableModel.from_pretrained(llama, tmp_path, tokenizer=tokenizer).eval()
    assert not again.scope.knows_subjects
    assert scope_id(again.scope) == scope_id(model.scope), "keys are the same, and edits of before go on with it"
    save_file({**before, "subject.bias": tensors["subject.bias"]}, path)
    with pytest.raises(ValueError, match=r"missing tensors \['subject.weight'\]"):
        EditableModel.from_pretrained(llama, tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("prompt", "named", "subject"),
    [
        ("the capital of france is", {"france": 3.0}, "france"),
        ("the seat of the far north is", {"far": 3.0, "north": 2.0}, "far north"),
        ("the seat of the far north is", {"far": 3.0, "north": -1.5}, "far"),
        ("the seat of the far north is", {"the": 1.0, "far": -0.5, "north": 4.0}, "the far north"),
        ("the capital of france is", {}, None),
        ("france has", {"france": 3.0, "has": 2.0}, None),
        ("the capital of the system is", {"capital": 3.0}, "capital"),
    ],
)
def test_a_text_is_about_the_run_of_words_that_most_surely_names_it(tokenizer, llama, prompt, named, subject):
    with_chat = copy.deepcopy(tokenizer)
    with_chat.chat_template = "<system>france has\n" + CHAT
    model = scoped(llama, with_chat)
    query, table = Query(prompt, "rome", chat=True), word_table(with_chat)
    tokens = model.encoder.tokens(query)[0]
    hashes = {words_in(table, with_chat(f" {word}")["input_ids"])[-1].hash: odds for word, odds in named.items()}
    odds = [-4.0] * len(tokens)
    for word in words_in(table, tokens):
        odds[word.last] = hashes.get(word.hash, -4.0)
    assert subject_of(query, odds, model.encoder, table) == subject


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (["peru", "'s", " river"], "peru"),
        (['"', "peru", '",', " river"], "peru"),
        (["peru", "\u2019s", " river"], "peru"),
        (["peru", ",", " river"], "peru"),
    ],
)
def test_what_stands_around_a_subject_is_none_of_it(fast, words, subject):
    class Tokenizer:
        """A tokenizer of words."""

        is_fast = fast

        def __len__(self):
            return len(words)

        def __call__(self, text, **options):
            assert text == "".join(words) and options["return_offsets_mapping"] is fast
            ends = [sum(map(len, words[: i + 1])) for i in range(len(words))]
            return {"input_ids": [*range(len(words))], "offset_mapping": [*zip([0, *ends], ends, strict=False)]}

        def convert_ids_to_tokens(self, ids):
            return [words[i] for i in ids]

    class Encoder:
        tokenizer = Tokenizer()

        def tokens(self, query):
            return [*range(len(words))], []

        def decode(self, tokens):
            return "".join(words[i] for i in tokens)

    odds = [2.0] * (len(words) - 1) + [-9.0]
    assert subject_of(Query("".join(words)), odds, Encoder(), word_table(Tokenizer())) == subject
