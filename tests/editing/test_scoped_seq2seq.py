"""Edits with a scope in encoder-decoder models, as a user makes, steers, keeps and shares them."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from support.models import RECORDS, all_logits
from support.processes import run_python
from support.scope import scoped

from hf_mend import EditableModel, EditorConfig
from hf_mend.data.encoding import Query


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
OTHER = "the river of kenya is"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(params=["t5", "bart"])
def base(request, _built_models):
    return copy.deepcopy(_built_models[request.param])


@pytest.fixture
def model(base, tokenizer):
    return scoped(base, tokenizer)


def _answer(model):
    """The target's token ids and the one that ends it, and what the decoder reads to predict them."""
    ids = [*model.tokenizer(TARGET)["input_ids"], model.tokenizer.eos_token_id]
    return torch.tensor(ids), torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])


def test_what_the_search_measured_is_what_the_gated_model_says(model):
    result = model.edit(PROMPT, TARGET, max_steps=3)
    answer, read = _answer(model)
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=read).logits[0]
    probability = logits.log_softmax(-1).gather(-1, answer[:, None]).sum().exp()
    assert float(probability) == pytest.approx(result.probability_after, rel=1e-2)
    assert result.probability_after > result.probability_before
    assert result.token_success == (logits.argmax(-1) == answer).tolist()
    assert result.scope.holds and "scope: acts from" in str(result)


def test_a_forced_first_token_is_under_the_edit_too(_built_models, tokenizer):
    base = copy.deepcopy(_built_models["bart"])
    base.generation_config.forced_bos_token_id = 1
    model = scoped(base, tokenizer)
    result = model.edit(PROMPT, TARGET, max_steps=2)
    answer, read = _answer(model)
    read = torch.cat([read[:, :1], torch.tensor([[1]]), read[:, 1:]], 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(PROMPT)["input_ids"]]), decoder_input_ids=read).logits[0, 1:]
    probability = logits.log_softmax(-1).gather(-1, answer[:, None]).sum().exp()
    assert float(probability) == pytest.approx(result.probability_after, rel=1e-2)


def test_the_gradient_is_that_of_the_whole_decoder(model):
    rows = model.encoder([Query(PROMPT, TARGET), Query(OTHER, "kenya")])
    factors, _ = model.context.trace(rows)
    for target in model.targets:
        extra = torch.zeros(2, *target.shape, requires_grad=True)

        def add(module, args, output, extra=extra):
            return output + torch.einsum("bti,bji->btj", args[0], extra)

        handle = target.module.register_forward_hook(add)
        logits = model.base_model(**rows.inputs).logits[rows.positions]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits, rows.next_tokens[rows.positions], reduction="sum")
        (expected,) = torch.autograd.grad(loss, extra)
        x, delta = factors[target.name]
        assert torch.allclose(torch.einsum("bti,btj->bji", x, delta), expected, atol=1e-4)


def test_an_edit_has_one_key_for_each_form(base, tokenizer):
    with_chat = copy.deepcopy(tokenizer)
    with_chat.chat_template = CHAT
    model = scoped(base, with_chat)
    model.edit(PROMPT, TARGET, paraphrases=RECORDS[0].paraphrases, max_steps=1)
    scope = model.edits[0].scope
    assert scope.texts == ["prompt", "chat", *map(repr, RECORDS[0].paraphrases)] and len(scope.keys) == 4
    assert model.which_edits([{"role": "user", "content": PROMPT}])[0].acts
    model.undo()
    model.tokenizer = tokenizer
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    assert model.edits[0].scope.texts == ["prompt"]


def test_edits_beside_one_another_are_each_as_if_alone(model):
    alone = {}
    for record in RECORDS[:3]:
        with model.edited(record.prompt, record.target, max_steps=1, check=False):
            alone[record.prompt] = all_logits(model, model.tokenizer, record.prompt)
    other = all_logits(model, model.tokenizer, OTHER)
    first, *_ = model.edit(RECORDS[:3], max_steps=1, check=False)
    for prompt, logits in alone.items():
        assert torch.allclose(all_logits(model, model.tokenizer, prompt), logits, atol=1e-4)
        assert [one.acts for one in model.which_edits(prompt)] == [True, False, False]
    assert torch.equal(all_logits(model, model.tokenizer, OTHER), other)
    assert not any(one.acts for one in model.which_edits(OTHER))
    model.undo(first.id)
    with model.disable_edits():
        base = all_logits(model, model.tokenizer, PROMPT)
    assert torch.equal(all_logits(model, model.tokenizer, PROMPT), base)


def test_scopes_are_steered(model):
    result = model.edit(PROMPT, TARGET, locality="the far north has", max_steps=1)
    assert model.edits[0].scope.excluded_texts == ["the far north has"] and len(model.edits[0].scope.excluded) == 1
    before = all_logits(model, model.tokenizer, OTHER)
    model.include(result.id, OTHER)
    assert model.which_edits(OTHER)[0].acts
    assert not torch.equal(all_logits(model, model.tokenizer, OTHER), before)
    with pytest.raises(ValueError, match="asks the same as the edit's own prompt"):
        model.exclude(result.id, PROMPT)


def test_an_excluded_text_keeps_the_edit_out(model):
    with torch.no_grad():
        model.scope.threshold.fill_(-1.0)  # whatever the text
    result = model.edit(PROMPT, TARGET, max_steps=1, check=False)
    assert model.which_edits(OTHER)[0].acts
    model.exclude(result.id, OTHER)
    assert not model.which_edits(OTHER)[0].acts and model.which_edits(PROMPT)[0].acts
    with model.disable_edits():
        base = all_logits(model, model.tokenizer, OTHER)
    assert torch.equal(all_logits(model, model.tokenizer, OTHER), base)


def test_another_process_loads_editor_scope_and_edits(model, base, tokenizer, tmp_path):
    model.edit(RECORDS[:2], max_steps=1, check=False)
    model.save_pretrained(tmp_path / "editor", edits=True)
    expected = [all_logits(model, tokenizer, text) for text in (PROMPT, OTHER)]
    model.unload().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code = (
        "import sys, torch\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer\n"
        "from hf_mend import EditableModel\n"
        "from support.models import all_logits\n"
        "folder = sys.argv[1]\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder + '/base')\n"
        "base = AutoModelForSeq2SeqLM.from_pretrained(folder + '/base')\n"
        "model = EditableModel.from_pretrained(base, folder + '/editor', tokenizer=tokenizer).eval()\n"
        "model.load_edits(folder + '/editor')\n"
        f"found = [all_logits(model, tokenizer, text) for text in ({PROMPT!r}, {OTHER!r})]\n"
        "torch.save(found, folder + '/found.pt')\n"
    )
    done = run_python("-c", code, tmp_path, *sys.path)
    assert done.returncode == 0, done.stderr
    for one, other in zip(torch.load(tmp_path / "found.pt"), expected, strict=True):
        assert torch.equal(one, other)


def test_copies_and_pickles_decide_by_themselves(model):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    edited = all_logits(model, model.tokenizer, PROMPT)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.undo_all() if model.edits else None
        assert torch.equal(all_logits(other, model.tokenizer, PROMPT), edited)
        assert other._gate is not model._gate and other._gate.block is other.base_model.get_decoder()


def test_merging_says_that_there_is_no_scope(model, caplog):
    model.edit(PROMPT, TARGET, max_steps=1, check=False)
    merged = model.merge_and_unload()
    assert "in merged weights and LoRA adapters they act everywhere" in caplog.text
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())


def test_edited_layers_are_the_decoders(base, tokenizer):
    def sides(**options):
        return [target.side for target in EditableModel(copy.deepcopy(base), EditorConfig(**options)).targets]

    decoder = sides().count("decoder")
    assert "encoder" in sides() and sides(scope=True) == ["decoder"] * decoder
    assert sides(scope=True, target_modules="paper") == ["decoder"] * sides(target_modules="paper").count("decoder")
    end = "wo" if base.config.model_type == "t5" else "fc2"
    assert sides(scope=True, target_modules=rf".*decoder\..*\.{end}") == ["decoder"] * 4
    with pytest.raises(ValueError, match=r"edits are the decoder's.*is one of the encoder's \(4 are\); name the dec"):
        sides(scope=True, target_modules=[end])
    with pytest.raises(ValueError, match=r"edits are the decoder's.*is one of the encoder's \(4 are\)"):
        sides(scope=True, target_modules=rf".*encoder\..*\.{end}")


def test_a_scope_of_another_width_is_refused(model, base, tokenizer, tmp_path):
    from hf_mend.scope.files import write_scope
    from hf_mend.scope.network import ScopeNetwork

    model.save_pretrained(tmp_path)
    model.unload()
    write_scope(tmp_path, ScopeNetwork(48))
    with pytest.raises(ValueError, match=r"scope\.safetensors.*shape"):
        EditableModel.from_pretrained(base, tmp_path, tokenizer=tokenizer)


def test_an_encoder_of_another_width_than_the_decoder(tokenizer):
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    def config(width, **more):
        return BertConfig(
            vocab_size=160, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **more
        )

    def build(encoder, decoder):
        torch.manual_seed(0)
        both = EncoderDecoderConfig.from_encoder_decoder_configs(config(encoder), config(decoder))
        both.decoder_start_token_id, both.pad_token_id = 1, 0
        return EncoderDecoderModel(config=both).eval()

    with pytest.raises(ValueError, match="enc_to_dec_proj.*by scope=False"):
        EditableModel(build(16, 32), EditorConfig(scope=True), tokenizer)
    assert EditableModel(build(32, 32), EditorConfig(scope=True), tokenizer).scope.width == 32


@pytest.mark.parametrize("method", ["malmen", "memit", "rome", "ft", "gradient", "ultraedit"])
def test_any_method_has_a_scope(_built_models, tokenizer, method):
    model = scoped(copy.deepcopy(_built_models["bart"]), tokenizer, method=method)
    before = all_logits(model, tokenizer, OTHER)
    result = model.edit(PROMPT, TARGET, max_steps=2)
    assert result.scope.holds
    assert result.probability_after > result.probability_before
    assert torch.equal(all_logits(model, tokenizer, OTHER), before)
