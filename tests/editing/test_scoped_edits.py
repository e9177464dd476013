"""Edits with a scope, as a user makes, steers, keeps and shares them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.models import RECORDS, EditableModel, all_logits, editable, initialize
from support.scope import scoped

from hf_mend.bases import beginnings
from hf_mend.bases.fingerprint import fingerprint_of
from hf_mend.editing import afterwards
from hf_mend.editing.scoping import own_queries
from hf_mend.edits.edits_file import write_edits_file
from hf_mend.scope import gate
from hf_mend.scope.network import ScopeNetwork, key_scores


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
OTHER = "the river of kenya is"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def model(llama, tokenizer):
    return scoped(llama, tokenizer)


@pytest.fixture
def chat_model(llama, tokenizer):
    with_chat = copy.deepcopy(tokenizer)
    with_chat.chat_template = CHAT
    return scoped(llama, with_chat)


def test_an_edit_raises_its_target_through_the_gate(model):
    before = all_logits(model, model.tokenizer, PROMPT)
    result = model.edit(PROMPT, TARGET, max_steps=4)
    first = model.tokenizer(f" {TARGET}")["input_ids"][0]
    after = all_logits(model, model.tokenizer, PROMPT)
    assert after[0, -1].softmax(-1)[first] > before[0, -1].softmax(-1)[first]
    assert result.scope.holds and result.scope.nearest is None and "scope: acts from" in str(result)


def test_what_the_search_measured_is_what_the_gated_model_says(model):
    result = model.edit(PROMPT, TARGET, max_steps=2)
    ids = model.tokenizer(PROMPT)["input_ids"]
    answer = model.tokenizer(f" {TARGET}.")["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + answer[:-1]])).logits[0, len(ids) - 1 :]
    probability = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().exp()
    assert float(probability) == pytest.approx(result.probability_after, rel=1e-2)
    assert result.token_success == (logits.argmax(-1) == torch.tensor(answer)).tolist()


def test_the_gradient_is_that_of_a_pass_edited_at_the_answers_tokens_alone(model):
    rows = model.encoder([model_query(PROMPT, TARGET)])
    factors, _ = model.context.trace(rows)
    for name, target in ((target.name, target) for target in model.targets):
        weight = target.module.weight
        extra = torch.zeros_like(weight, requires_grad=True)

        def add(module, args, output, extra=extra):
            return output + (args[0] @ extra.T) * rows.positions[..., None]

        handle = target.module.register_forward_hook(add)
        logits = model.base_model(**rows.inputs).logits[rows.positions]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits, rows.next_tokens[rows.positions], reduction="sum")
        (expected,) = torch.autograd.grad(loss, extra)
        x, delta = factors[name]
        assert torch.allclose(torch.einsum("bti,btj->ji", x, delta), expected, atol=1e-4)


def model_query(prompt, target):
    from hf_mend.data.encoding import Query

    return Query(prompt, target)


def test_an_edit_is_made_in_plain_text_and_in_a_chat(chat_model):
    result = chat_model.edit(PROMPT, TARGET, max_steps=1)
    tokens = [len(chat_model.tokenizer(text)["input_ids"]) for text in (f" {TARGET}.", TARGET, "\n")]
    assert result.rank == sum(tokens)  # the chat's answer follows its template without a space, and ends with it
    assert set(chat_model.edits[0].scope.texts) == {"prompt", "chat"}
    shown = chat_model.which_edits([{"role": "user", "content": PROMPT}])
    assert shown[0].acts and shown[0].score == pytest.approx(1.0, abs=1e-3)
    assert chat_model.which_edits(PROMPT, chat=True) == shown


def test_an_untrained_method_makes_its_edits_in_further_forms_of_asking(llama, chat_model):
    base = copy.deepcopy(llama)
    base.config.max_position_embeddings = 512  # or what stands before is left out
    model = scoped(base, chat_model.tokenizer, method="gradient", whiten_ridge=1.0)
    first = model.tokenizer(f" {TARGET}")["input_ids"][0]

    def says(text: str) -> float:
        return float(all_logits(model, model.tokenizer, text)[0, -1].softmax(-1)[first])

    asked = own_queries(model_query(PROMPT, TARGET), model.encoder, further=True)
    assert list(asked) == ["prompt", "chat", "as a question", "behind text"]
    assert asked["as a question"].prompt == PROMPT + "?"
    before, _, after = asked["behind text"].content.partition(PROMPT)
    assert len(before.split()) > 6 and before.endswith("\n") and after == ""
    assert own_queries(model_query(PROMPT, TARGET), model.encoder, further=True) == asked  # the same text each time
    texts = [asked[name].content for name in ("prompt", "as a question", "behind text")]
    unedited = [says(text) for text in texts]
    result = model.edit(PROMPT, TARGET)
    assert set(model.edits[0].scope.texts) == {*asked} and result.scope.holds
    for text, probability in zip(texts, unedited, strict=True):
        assert model.which_edits(text)[0].acts and says(text) > max(0.1, 20 * probability)
    with model.edited(RECORDS[1].prompt, RECORDS[1].target):
        assert model.which_edits(RECORDS[1].prompt + "?")[0].acts


def test_a_text_that_stands_before_is_left_out_where_the_model_would_not_take_it(model):
    query = model_query(PROMPT, TARGET)
    length = sum(map(len, model.encoder.tokens(replace(query, ends=True))))
    asked = own_queries(query, model.encoder, further=True, longest=length)
    assert asked["behind text"].content == PROMPT


def test_edits_beside_one_another_are_each_as_if_alone(model):
    alone = {}
    for record in RECORDS[:3]:
        with model.edited(record.prompt, record.target, max_steps=1, check=False):
            alone[record.prompt] = all_logits(model, model.tokenizer, record.prompt)
    model.edit([record for record in RECORDS[:3]], max_steps=1, check=False)
    for prompt, logits in alone.items():
        assert torch.allclose(all_logits(model, model.tokenizer, prompt), logits, atol=1e-4)


def test_an_undo_is_exact_and_the_order_does_not_count(model):
    before = all_logits(model, model.tokenizer, PROMPT)
    first = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    one = all_logits(model, model.tokenizer, PROMPT)
    second = model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
    assert torch.equal(all_logits(model, model.tokenizer, PROMPT), one)
    model.undo(first.id)
    assert torch.equal(all_logits(model, model.tokenizer, PROMPT), before)
    model.undo(second.id)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.base_model.modules())


def test_which_edits_lists_scores_and_what_acts(model):
    model.edit(RECORDS[:3], max_steps=1, check=False)
    found = model.which_edits(RECORDS[1].prompt)
    assert [one.acts for one in found] == [True, False, False] and found[0].prompt == RECORDS[1].prompt
    assert found[0].score >= found[0].threshold > found[1].score
    assert not any(one.acts for one in model.which_edits(OTHER))


def test_strictness_moves_every_threshold(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    edited, model.scope_strictness = all_logits(model, model.tokenizer, PROMPT), 0.5
    with model.disable_edits():
        base = all_logits(model, model.tokenizer, PROMPT)
    assert torch.equal(all_logits(model, model.tokenizer, PROMPT), base)
    model.scope_strictness = 0.0
    assert torch.equal(all_logits(model, model.tokenizer, PROMPT), edited)
    model.scope_strictness = -1.0
    assert model.which_edits(OTHER)[0].acts
    with pytest.raises(ValueError, match="scope_strictness is 3, expected a number from -1 to 1"):
        model.scope_strictness = 3


def test_include_and_exclude(model):
    result = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    assert not model.which_edits(OTHER)[0].acts
    model.include(result.id, OTHER)
    assert model.which_edits(OTHER)[0].acts and model.edits[0].id == result.id
    model.exclude(result.id, "the far north has")
    assert model.which_edits(OTHER)[0].acts
    with pytest.raises(ValueError, match="'the far north has', and to the scope .* cannot be included"):
        model.include(result.id, "the far north has")
    with pytest.raises(ValueError, match="asks the same as the edit's own prompt"):
        model.exclude(result.id, PROMPT)
    with pytest.raises(KeyError, match="no edit has the id 'nothing'"):
        model.include("nothing", OTHER)


def test_an_excluded_text_keeps_the_edit_out(model):
    result = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    model.scope_strictness = -1.0
    assert model.which_edits(OTHER)[0].acts
    model.exclude(result.id, OTHER)
    assert not model.which_edits(OTHER)[0].acts and model.which_edits(PROMPT)[0].acts


def test_locality_and_paraphrases_shape_the_scope(model):
    said, stays = RECORDS[0].paraphrases[0], OTHER
    result = model.edit(PROMPT, TARGET, paraphrases=said, locality=stays, max_steps=1)
    scope = model.edits[0].scope
    assert repr(said) in scope.texts and scope.excluded_texts == [stays]
    assert model.which_edits(said)[0].acts and result.scope.holds


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ("", ValueError, "has an empty text"),
        ([PROMPT, "  "], ValueError, "has an empty text"),
        ("river " * 400, ValueError, "tokens.*, the model takes .*; shorten the text"),
        ([], ValueError, "got no text: the list is empty"),
        ([7], TypeError, "7 is no text; pass a text or a list of texts"),
        (None, TypeError, "None is no text"),
    ],
)
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_texts_that_no_scope_can_hold_are_refused_and_change_nothing(model, name, texts, error, message):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    before = list(model.edits)
    with pytest.raises(error, match=f"{name}.* {message}" if error is ValueError else f"{name}: {message}"):
        getattr(model, name)(before[0].id, texts)
    assert model.edits == before and model.edits[0] is before[0]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "which_edits has an empty text"),
        ("river " * 400, ValueError, "which_edits has .* tokens, the model takes"),
        (None, TypeError, "text is None, expected a text, or a chat as a list of turns"),
        (["a text"], TypeError, "expected a text, or a chat as a list of turns"),
        ([], ValueError, "a chat ends with a user's turn"),
    ],
)
def test_a_text_that_no_edit_can_be_asked_with_is_refused(model, text, error, message):
    with pytest.raises(error, match=message):
        model.which_edits(text)


def test_two_edits_whose_keys_are_one_are_told_of(model):
    first = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    edit = model.edits[0]
    model._active.replace([])
    model._active.replace([edit])
    second = model.edit(f"{PROMPT}", "lima town", max_steps=1, check=False)
    assert second.superseded == first.id and second.scope.holds  # the same prompt: the earlier one waits


def test_files_and_stores_keep_scopes(model, llama, tokenizer, tmp_path):
    model.edit(RECORDS[:2], max_steps=1, check=False)
    model.exclude(model.edits[0].id, OTHER)
    model.save_pretrained(tmp_path / "editor")
    model.save_edits(tmp_path / "edits")
    expected = all_logits(model, tokenizer, PROMPT)
    edits = list(model.edits)
    model.open_store(tmp_path / "store")
    model.undo_all()
    again = EditableModel.from_pretrained(llama, tmp_path / "editor", tokenizer=tokenizer).eval()
    loaded = again.load_edits(tmp_path / "edits")
    for one, other in zip(edits, loaded, strict=True):
        assert torch.equal(one.scope.keys, other.scope.keys) and one.scope.texts == other.scope.texts
        assert torch.equal(one.scope.excluded, other.scope.excluded) or not len(one.scope.excluded)
    assert torch.equal(all_logits(again, tokenizer, PROMPT), expected)


@pytest.mark.parametrize("architecture", ["llama", "t5", "bart"])
def test_a_store_gives_back_a_changed_scope(_built_models, tokenizer, tmp_path, architecture):
    base = copy.deepcopy(_built_models[architecture])
    model = scoped(base, tokenizer)
    model.save_pretrained(tmp_path / "editor")
    model.open_store(tmp_path / "store")
    result = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    model.include(result.id, OTHER)
    model.close_store()
    model.undo_all()
    again = EditableModel.from_pretrained(base, tmp_path / "editor", tokenizer=tokenizer).eval()
    again.open_store(tmp_path / "store")
    assert again.which_edits(OTHER)[0].acts and len(again.edits) == 1


def test_edits_of_another_scope_are_refused(model, llama, tokenizer, tmp_path):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    model.save_edits(tmp_path)
    model.unload()
    plain = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="acts where the scope 'scope-.*' says, and this model has none"):
        plain.load_edits(tmp_path)
    plain.unload()
    other = scoped(llama, tokenizer)
    scope = copy.deepcopy(other.scope)
    with torch.no_grad():
        scope.values.mul_(2)
    other.set_scope(scope)
    with pytest.raises(ValueError, match="this model's is 'scope-"):
        other.load_edits(tmp_path)
    assert len(other.edits) == 0


def test_keys_of_another_width_than_the_scope_gives_are_refused(model, tokenizer, tmp_path):
    model.edit(PROMPT, TARGET, max_steps=1, force=True)
    scope = model.edits[0].scope
    edit = replace(model.edits[0], scope=replace(scope, keys=scope.keys[:, :64].contiguous()))
    write_edits_file(tmp_path, [edit], fingerprint_of(model.base_model, model.targets))
    model.undo_all()
    plain = all_logits(model, tokenizer)
    with pytest.raises(
        ValueError, match="keys of the edit .* have 64 numbers, this model's scope gives 384; .*altered"
    ):
        model.load_edits(tmp_path)
    assert model.edits == [] and torch.equal(all_logits(model, tokenizer), plain)


@pytest.mark.parametrize("which", ["keys", "excluded"])
def test_keys_that_are_no_unit_vectors_are_refused(model, tokenizer, tmp_path, which):
    model.edit(PROMPT, TARGET, max_steps=1, force=True)
    model.exclude(model.edits[0].id, RECORDS[4].prompt)
    scope, plain_id = model.edits[0].scope, model.edits[0].id
    altered = getattr(scope, which).clone()
    altered[-1, 3] = 6e4  # finite, and its scores are no scores
    edit = replace(model.edits[0], scope=replace(scope, **{which: altered}))
    model.undo_all()
    message = f"these edits: a key of the edit '{plain_id}' has numbers beyond 1.*altered"
    with pytest.raises(ValueError, match=message), model.carrying([edit]):
        pass
    write_edits_file(tmp_path, [edit], fingerprint_of(model.base_model, model.targets))
    with pytest.raises(ValueError, match=f"a key of the edit '{plain_id}' has numbers beyond 1"):
        model.load_edits(tmp_path)
    assert model.edits == []


def test_edits_without_a_scope_act_everywhere_beside_those_with_one(model, llama, tokenizer, tmp_path):
    plain = editable(copy.deepcopy(llama), tokenizer)
    plain.edit(RECORDS[2].prompt, RECORDS[2].target, max_steps=1, check=False)
    plain.save_edits(tmp_path)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    model.load_edits(tmp_path)
    with plain.disable_edits():
        base = all_logits(plain, tokenizer, OTHER)
    assert not torch.equal(all_logits(model, tokenizer, OTHER), base)
    assert torch.allclose(all_logits(model, tokenizer, OTHER), all_logits(plain, tokenizer, OTHER), atol=1e-5)


def test_merging_says_that_there_is_no_scope(model, caplog):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    with pytest.raises(ValueError, match="act only where they are asked for"):
        model.compress_edits(1)
    tokenizer = model.tokenizer
    merged = model.merge_and_unload()
    assert "in merged weights and LoRA adapters they act everywhere" in caplog.text
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert all_logits(merged, tokenizer, OTHER) is not None


def test_some_edits_are_merged_and_exported(model, tokenizer, llama, tmp_path):
    base = copy.deepcopy(llama)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
    wanted, other = model.edits
    model.save_lora(tmp_path / "one", [wanted.id])
    model.save_lora(tmp_path / "same", [wanted])
    one, same = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "same"))
    assert one.keys() == same.keys() and all(torch.equal(one[name], same[name]) for name in one)
    for names, error in ((["none"], KeyError), (wanted.id, TypeError)):
        with pytest.raises(error, match="no edit has the id 'none'|expected a list of edits or of their ids"):
            model.merge_and_unload(edits=names)
        with pytest.raises(error):
            model.save_lora(tmp_path / "x", names)
    assert model.edits.ids == [wanted.id, other.id]
    merged = model.merge_and_unload(edits=[wanted])
    for name, (u, v) in wanted.updates.items():
        base.get_submodule(name).weight.data += v.float().T @ u.float()
    torch.testing.assert_close(all_logits(merged, tokenizer, OTHER), all_logits(base, tokenizer, OTHER))


def test_an_exported_adapter_is_the_open_scope(model, tokenizer, llama, tmp_path):
    from peft import PeftModel

    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    model.save_lora(tmp_path)
    model.unload()
    peft = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    loaded = scoped(llama, tokenizer)
    loaded.load_lora(tmp_path)
    assert torch.allclose(all_logits(peft, tokenizer, OTHER), all_logits(loaded, tokenizer, OTHER), atol=1e-4)


def test_copies_and_pickles_decide_by_themselves(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    edited = all_logits(model, model.tokenizer, PROMPT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.undo_all() if model.edits else None
        assert torch.equal(all_logits(other, model.tokenizer, PROMPT), edited)
        assert other._gate is not model._gate


def test_a_damaged_scope_file_is_refused(model, llama, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "scope.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="scope.safetensors"):
        EditableModel.from_pretrained(llama, tmp_path, tokenizer=tokenizer)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="scope.safetensors"):
        EditableModel.from_pretrained(llama, tmp_path, tokenizer=tokenizer)


def test_a_model_without_a_scope_says_so(llama, tokenizer):
    plain = editable(llama, tokenizer)
    assert plain.scope is None
    for call in (lambda: plain.which_edits(PROMPT), lambda: plain.scope_strictness, lambda: plain.include("x", "y")):
        with pytest.raises((ValueError, KeyError), match="act everywhere|no edit has the id"):
            call()


@pytest.mark.parametrize("method", ["malmen", "memit", "rome", "ft", "lora", "gradient", "ultraedit"])
def test_any_method_has_a_scope(llama, tokenizer, method):
    model = scoped(llama, tokenizer, method=method)
    before = all_logits(model, tokenizer, OTHER)
    result = model.edit(PROMPT, TARGET, max_steps=2)
    assert result.scope.holds
    assert result.probability_after > result.probability_before
    assert torch.equal(all_logits(model, tokenizer, OTHER), before)


def test_keys_in_the_result_are_told_of(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    result = model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
    assert result.scope.nearest == model.edits[0].id
    one, two = (edit.scope.keys for edit in model.edits)
    assert result.scope.nearest_score == pytest.approx(float(key_scores(two, one).max()), abs=1e-4)


def test_the_hub_and_the_command_line_take_the_scope_along(model, llama, tokenizer, hub, tmp_path, monkeypatch):
    from hf_mend.cli.contents import fetch, read_contents

    model.push_to_hub("me/scoped")
    assert "scope.safetensors" in hub.repositories["me/scoped"].files()
    again = EditableModel.from_pretrained(copy.deepcopy(llama), "me/scoped", tokenizer=tokenizer)
    assert again._gate.scope_id == model._gate.scope_id
    folder = fetch("me/scoped")
    assert "scope.safetensors" in read_contents(folder).files
    plain = editable(copy.deepcopy(llama), tokenizer)
    plain.push_to_hub("me/scoped")
    assert "scope.safetensors" not in hub.repositories["me/scoped"].files()


# ---- an edit that acts before its prompt has asked ----


def greedy(model, prompt: str, count: int) -> list[int]:
    """What the model says, each token by a pass over the whole text."""
    ids = model.tokenizer(prompt)["input_ids"]
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.fixture
def eager(model):
    """Edits act at every token from the second on, whatever it asks for."""
    with torch.no_grad():
        model.scope.threshold.fill_(-1.0)
    model.set_scope(model.scope)
    return model


def test_a_result_tells_what_the_model_says_where_an_edit_acts_within_its_own_prompt(eager, monkeypatch):
    monkeypatch.setattr(afterwards, "silent_before", lambda edit, *_: edit)
    answers = {}
    for record in RECORDS[:6]:
        result = eager.edit(record.prompt, record.target, keep_failed=True)
        said = greedy(eager, record.prompt, len(result.token_success))
        wanted = eager.tokenizer(f" {record.target}.")["input_ids"]
        assert result.success == (said == wanted[: len(said)])
        answers[record.prompt] = result.success
        eager.undo_all()
    assert not all(answers.values()), "acting earlier disturbs at least one"


def test_an_edit_is_kept_from_acting_within_its_own_prompt_where_it_would_not_be_said(eager, monkeypatch):
    kept_out = 0
    for record in RECORDS[:4]:
        result = eager.edit(record.prompt, record.target, keep_failed=True)
        wanted = eager.tokenizer(f" {record.target}")["input_ids"]
        assert result.success and greedy(eager, record.prompt, len(wanted)) == wanted
        excluded = eager.edits[0].scope.excluded_texts
        kept_out += len(excluded)
        for number, text in enumerate(excluded):
            ids = eager.tokenizer(record.prompt)["input_ids"][: number + 1]
            assert text == eager.encoder.decode(ids)
            with eager.watching() as watch, torch.no_grad():
                eager(input_ids=torch.tensor([ids]))
            assert not watch.acted
        assert eager.which_edits(record.prompt)[0].acts
        eager.undo_all()
    assert kept_out == 4, "of one prompt, all tokens before the last"


def test_an_edit_in_another_form_of_the_same_prompt_is_what_holds(chat_model):
    """The two have the same keys: what is said last holds, and the call tells of the earlier one."""
    first = chat_model.edit(PROMPT, TARGET, max_steps=4, keep_failed=True)
    second = chat_model.edit(PROMPT, "lima town", chat=True, max_steps=4, keep_failed=True, check_earlier=1)
    for chat in (False, True):
        acting = [one.id for one in chat_model.which_edits(PROMPT, chat=chat) if one.acts]
        assert acting == [second.id]
    assert second.scope.holds and [one.id for one in second.lost] == [first.id]
    chat_model.undo(second.id)
    assert [one.id for one in chat_model.which_edits(PROMPT) if one.acts] == [first.id]


# ---- what is asked of the scope wrongly ----


def test_a_new_scope_keeps_the_strictness(model, tokenizer):
    model.scope_strictness = 0.25
    model.set_scope(ScopeNetwork(model.scope.width))
    assert model.scope_strictness == 0.25


@pytest.mark.parametrize("value", ["x", None, True, [0.1]])
def test_a_strictness_that_is_no_number_is_refused(model, value):
    with pytest.raises(ValueError, match="scope_strictness is .*, expected a number from -1 to 1"):
        model.scope_strictness = value


def test_while_edits_are_disabled_none_acts(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    with model.disable_edits():
        assert [one.acts for one in model.which_edits(PROMPT)] == [False]
    assert [one.acts for one in model.which_edits(PROMPT)] == [True]


@pytest.mark.parametrize(
    "turn", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": None}, {"role": "user", "content": [{}]}]
)
def test_a_turn_that_is_none_is_named(chat_model, turn):
    with pytest.raises(TypeError, match="the chat's turn 0 is .*, expected an object whose 'role' and 'content'"):
        chat_model.which_edits([turn])


def test_an_edit_in_the_place_of_its_id_is_refused(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    with pytest.raises(TypeError, match="edit_id is of type Edit, expected an edit's id"):
        model.include(model.edits[0], OTHER)


def test_what_is_excluded_is_told_by_what_it_asks_for(chat_model):
    result = chat_model.edit(PROMPT, TARGET, max_steps=1, check=False)
    chat_model.exclude(result.id, OTHER)
    with pytest.raises(ValueError, match=f"excludes the text '{OTHER}', and to the scope '{OTHER} ' asks the same"):
        chat_model.include(result.id, OTHER + " ")
    assert chat_model.edits[0].scope.texts.count(f"'{OTHER} '") == 0
    chat_model.include(result.id, OTHER, chat=True)  # which asks otherwise, and is not excluded
    assert chat_model.which_edits(OTHER, chat=True)[0].acts and not chat_model.which_edits(OTHER)[0].acts


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("threshold", 5.0, "a threshold of 5, where scores are from -1 to 1"),
        ("spread", 0.0, "a spread of 0, which has to be above 0"),
        ("mlp.0.weight", 1e30, "a value of 1.*e\\+30 in 'mlp.0.weight'"),
    ],
)
def test_a_scope_of_values_that_no_training_leaves_is_refused(model, llama, tokenizer, tmp_path, name, value, message):
    with torch.no_grad():
        {**dict(model.scope.named_parameters()), **dict(model.scope.named_buffers())}[name].fill_(value)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"scope.safetensors: the scope has {message}; the file was altered"):
        EditableModel.from_pretrained(llama, tmp_path, tokenizer=tokenizer)


def test_an_editor_without_its_scope_s_file_says_so(model, llama, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "scope.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has a scope, and is not whole without that file"):
        EditableModel.from_pretrained(llama, tmp_path, tokenizer=tokenizer)


def test_another_base_s_width_is_told_as_that(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = 48, 16
    other = initialize(type(model.base_model)(config).eval())
    with pytest.raises(ValueError, match="was made for .*, whose edited layers do not fit"):
        EditableModel.from_pretrained(other, tmp_path, tokenizer=tokenizer)


def test_what_a_cache_lacks_is_told_once(model, caplog):
    ids = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, do_sample=False)
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    gate.logger.warning_once.cache_clear()
    caplog.set_level("WARNING")
    model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=6, do_sample=False)
    assert sum("that the scopes of the edits have not seen" in one.message for one in caplog.records) == 1


def test_probes_that_begin_alike_do_not_warn_of_a_cache(model, caplog, monkeypatch):
    """What their texts begin with runs once and alone: no edit can act there, and nothing is decided."""
    monkeypatch.setattr(beginnings, "_SAVED", 1)
    before = "in the far north there is the town of the river and"
    texts = [f"{before} {record.prompt}" for record in RECORDS[:3]]
    model.edit(PROMPT, TARGET, max_steps=1)
    gate.logger.warning_once.cache_clear()
    caplog.set_level("WARNING")
    shared = model.edit(RECORDS[1].prompt, RECORDS[1].target, locality=texts, max_steps=1)
    assert model.split.shares(model.encoder([model_query(texts[0], TARGET)]))
    assert not any("that the scopes of the edits have not seen" in one.message for one in caplog.records)
    with torch.no_grad():
        said = [int(model(**model.tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()) for text in texts]
    assert [probe.after for probe in shared.locality] == [model.encoder.decode([token]) for token in said]


# ---- edits that are one to the scope ----


def alike(model):
    """Two edits of one prompt, in two forms of which each has the keys of both; the later one acts."""
    first = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    second = model.edit(PROMPT, RECORDS[1].target, chat=True, max_steps=1, check=False)
    return first.id, second.id


def acts(model):
    return [one.id for one in model.which_edits(PROMPT) if one.acts]


@pytest.mark.parametrize("change", ["undo", "disable", "include", "exclude", "temporary", "other", "save"])
def test_of_edits_alike_the_later_acts_whatever_comes_and_goes(chat_model, tmp_path, change):
    first, second = alike(chat_model)
    before = all_logits(chat_model, chat_model.tokenizer, PROMPT)
    assert acts(chat_model) == [second]
    if change == "undo":
        chat_model.edit(PROMPT, "lima town", max_steps=1, check=False)
        chat_model.undo()
    elif change == "disable":
        chat_model.disable_edit(first)
        chat_model.enable_edit(first)
    elif change in ("include", "exclude"):
        getattr(chat_model, change)(first, [OTHER])
    elif change == "temporary":
        with chat_model.edited(PROMPT, "lima town", max_steps=1, check=False):
            assert acts(chat_model) != [second]
    elif change == "other":
        chat_model.disable_edit(first)
        chat_model.disable_edit(second)
        chat_model.enable_edit(second)
        chat_model.enable_edit(first)
    else:
        chat_model.include(first, [OTHER])
        chat_model.save_edits(tmp_path)
        chat_model.undo_all()
        chat_model.load_edits(tmp_path)
    assert acts(chat_model) == [second] and [edit.id for edit in chat_model.edits] == [first, second]
    assert torch.equal(all_logits(chat_model, chat_model.tokenizer, PROMPT), before)


# ---- edits that are made in unusual contexts ----


def test_an_edit_that_is_made_while_edits_are_disabled_is_checked_as_ever(llama, tokenizer):
    there, here = (scoped(copy.deepcopy(llama), tokenizer, edit_lr=0.1) for _ in range(2))
    expected = there.edit(PROMPT, TARGET, locality=OTHER)
    with here.disable_edits():
        before = all_logits(here, tokenizer, PROMPT)
        result = here.edit(PROMPT, TARGET, locality=OTHER)
        assert torch.equal(all_logits(here, tokenizer, PROMPT), before), "the edits stay disabled"
        again = here.edit(PROMPT, TARGET)
    assert expected.success and result.success and result.locality == expected.locality
    assert result.probability_after == pytest.approx(expected.probability_after)
    assert again.already_known and [edit.id for edit in here.edits] == [result.id]
    assert torch.equal(all_logits(here, tokenizer, PROMPT), all_logits(there, tokenizer, PROMPT))


def test_while_all_are_disabled_a_temporary_edit_is_too(model):
    before = all_logits(model, model.tokenizer, PROMPT)
    with model.disable_edits(), model.edited(PROMPT, TARGET, max_steps=1, check=False):
        assert torch.equal(all_logits(model, model.tokenizer, PROMPT), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_the_caller_casts_keys_are_those_of_the_model_s_own_passes(model, tmp_path, dtype):
    with torch.autocast("cpu", dtype=dtype):
        result = model.edit(PROMPT, TARGET, locality=OTHER, max_steps=1, check=False)
        model.edit(RECORDS[1].prompt, RECORDS[1].target, max_steps=1, check=False)
        assert model.which_edits(PROMPT)[0].acts and model.edits[0].scope.excluded_texts == [OTHER]
        model.save_edits(tmp_path)
        model.undo_all()
        model.load_edits(tmp_path)
        assert [one.id for one in model.which_edits(PROMPT) if one.acts] == [result.id]


def test_the_default_dtype_is_nobody_s_precision(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    threshold = model.which_edits(PROMPT)[0].threshold
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            model.undo_all()
            model.edit(PROMPT, TARGET, max_steps=1, check=False)
        finally:
            torch.set_default_dtype(torch.float32)
        assert model.which_edits(PROMPT)[0].threshold == threshold


@pytest.mark.parametrize("bare_first", [True, False])
def test_equal_requests_share_their_probes(model, bare_first):
    bare = replace(RECORDS[0], paraphrases=[], neighborhood=[])
    full = replace(bare, paraphrases=["the far north has"], neighborhood=[OTHER])
    results = model.edit([bare, full] if bare_first else [full, bare], max_steps=1)
    (edit,) = model.edits
    assert "'the far north has'" in edit.scope.texts and edit.scope.excluded_texts == [OTHER]
    counts = [(len(result.paraphrases), len(result.locality)) for result in results]
    assert counts == ([(0, 0), (1, 1)] if bare_first else [(1, 1), (0, 0)])
