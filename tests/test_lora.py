"""Exported adapters in plain PEFT."""

from __future__ import annotations

import pytest
import torch
from conftest import RECORDS, all_logits, build_model, editable
from peft import PeftModel


@pytest.mark.parametrize("uniform_rank", [False, True])
def test_plain_peft_gives_the_edited_models_logits(base, tokenizer, tmp_path, architecture, uniform_rank):
    model = editable(base, tokenizer)
    plain = all_logits(model, tokenizer)
    model.edit([r.prompt for r in RECORDS[:2]], [r.target for r in RECORDS[:2]], max_steps=2)
    # A layer of another rank, and one without an update.
    del model._stack.edits[0].updates[model.targets[0].name]
    for edit in model._stack.edits:
        del edit.updates[model.targets[-1].name]
    model._stack.replace(model.edits)
    expected = all_logits(model, tokenizer)
    assert (expected - plain).abs().max() > 1e-3
    model.save_lora(tmp_path, uniform_rank=uniform_rank)
    peft = PeftModel.from_pretrained(build_model(architecture), str(tmp_path)).eval()
    torch.testing.assert_close(all_logits(peft, tokenizer), expected, rtol=1e-3, atol=1e-4)
    with peft.disable_adapter():
        torch.testing.assert_close(all_logits(peft, tokenizer), plain)
    merged = peft.merge_and_unload()
    torch.testing.assert_close(all_logits(merged, tokenizer), expected, rtol=1e-3, atol=1e-4)


def test_some_of_the_edits(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    expected = all_logits(model, tokenizer)
    model.edit(RECORDS[1].prompt, RECORDS[1].target)
    model.save_lora(tmp_path, edits=model.edits[:1])
    peft = PeftModel.from_pretrained(build_model("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(all_logits(peft, tokenizer), expected, rtol=1e-3, atol=1e-4)


def test_no_edit_no_adapter(llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no edit to write as a LoRA adapter"):
        editable(llama, tokenizer).save_lora(tmp_path / "x")
    assert not (tmp_path / "x").exists()
