"""lm-evaluation-harness on an edited model: what it measures is what a plain model with the same weights says."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from support.models import RECORDS, build_model, editable
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_mend import EditableModel


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'hf_mend[harness]'")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


NEW_TOKENS = 6
CHOICES = ["rome town", "paris town", "the far north"]
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: 0\nmetric_list: [{metric: acc}]",
    # With a space of its own: the harness puts target_delimiter before choices only.
    "answers": "output_type: loglikelihood\ndoc_to_target: ' {{answer}}'\nmetric_list: [{metric: perplexity}]",
    "texts": "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]",
    "generated": (
        "output_type: generate_until\ndoc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
        f"generation_kwargs: {{until: ['never said'], max_gen_toks: {NEW_TOKENS}}}"
    ),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    """The harness adds to its results what the machine is, and runs pip for it: seconds a call."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def manager(tmp_path) -> TaskManager:
    """The four kinds of task, as a user writes them: YAML and JSON lines."""
    rows = [
        {
            "prompt": record.prompt,
            "answer": record.target,
            "choices": [record.target, *(choice for choice in CHOICES if choice != record.target)],
            "text": f"{record.prompt} {record.target}" * (i + 1),  # the last ones are longer than the model's window
        }
        for i, record in enumerate(RECORDS)
    ]
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, rest in TASKS.items():
        text = f"task: {name}{DATA.format(path=data)}{rest}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return TaskManager(include_path=tmp_path, include_defaults=False)


def harness(model: EditableModel, manager: TaskManager, *tasks: str) -> dict[str, Any]:
    """What the harness finds. Rows of different lengths share a batch."""
    return evaluate(HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=8), manager, *tasks)


def evaluate(lm: HFLM, manager: TaskManager, *tasks: str) -> dict[str, Any]:
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, log_samples=True, bootstrap_iters=0)


def said(found: dict[str, Any], task: str) -> list[tuple[tuple[Any, ...], Any]]:
    """The harness' requests of a task, and its answers."""
    return [
        (tuple(request), answer[0])
        for sample in sorted(found["samples"].get(task, []), key=lambda sample: sample["doc_id"])
        for request, answer in zip(sample["arguments"], sample["resps"], strict=True)
    ]


def with_added_weights(base: PreTrainedModel, model: EditableModel) -> PreTrainedModel:
    """The plain model, with the active edits added to its weights by hand."""
    plain = copy.deepcopy(base)
    for edit in model.edits:
        for name, (u, v) in edit.updates.items():
            layer, update = plain.get_submodule(name), v.T @ u  # (d_out, T) @ (T, d_in)
            layer.weight.data += update.T if isinstance(layer, Conv1D) else update
    return plain


@torch.no_grad()
def log_probability(model: PreTrainedModel, before: list[int], after: list[int]) -> float:
    """Of the tokens `after` the tokens `before`, one row at a time."""
    if model.config.is_encoder_decoder:
        decoder = torch.tensor([[model.config.decoder_start_token_id, *after[:-1]]])
        logits = model(input_ids=torch.tensor([before]), decoder_input_ids=decoder).logits[0]
    else:
        logits = model(torch.tensor([before + after[:-1]])).logits[0, len(before) - 1 :]
    return float(logits.double().log_softmax(-1)[range(len(after)), after].sum())


def rolling_log_probability(model: PreTrainedModel, tokens: list[int], start: int) -> float:
    """Of a whole text, in windows as long as the model takes; in the last, tokens have what came before as context."""
    window = model.config.max_position_embeddings
    total, tokens = 0.0, [start, *tokens]
    for first in range(1, len(tokens), window):
        last = min(first + window, len(tokens))
        begin = max(0, last - 1 - window)
        total += log_probability(model, tokens[begin:first], tokens[first:last])
    return total


def generated(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, longest: int) -> str:
    """A greedy answer."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    room = (longest if model.config.is_encoder_decoder else ids.shape[1]) + NEW_TOKENS
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=room, do_sample=False)[0]
    return str(
        tokenizer.decode(out if model.config.is_encoder_decoder else out[ids.shape[1] :], skip_special_tokens=True)
    )


@pytest.mark.parametrize(
    ("architecture", "tasks"),
    [("llama", [*TASKS]), ("gpt2", ["choices", "texts"]), ("t5", ["choices", "generated"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_harness_measures_what_the_plain_model_says(architecture, tasks, tokenizer, manager):
    base = build_model(architecture)
    model = editable(copy.deepcopy(base), tokenizer)
    answers = []
    for edited in (False, True):
        if edited:
            model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=1, force=True)
        plain, found = with_added_weights(base, model), harness(model, manager, *tasks)
        for (before, after), (logs, _) in [*said(found, "choices"), *said(found, "answers")]:
            expected = log_probability(plain, tokenizer.encode(before), tokenizer.encode(after))
            assert logs == pytest.approx(expected, abs=1e-4), (before, after)
        for (text,), logs in said(found, "texts"):
            expected = rolling_log_probability(plain, tokenizer.encode(text), tokenizer.bos_token_id)
            assert logs == pytest.approx(expected, abs=1e-3), text
        prompts = [prompt for (prompt, _), _ in said(found, "generated")]
        # Where encoder and decoder are two, the harness adds the batch's longest prompt to the answer's length.
        longest = max([len(tokenizer.encode(prompt)) for prompt in prompts], default=0)
        for (prompt, _), text in said(found, "generated"):
            assert text == generated(plain, tokenizer, prompt, longest), prompt
        if "answers" in tasks:
            logs = torch.tensor([logs for _, (logs, _) in said(found, "answers")])
            assert found["results"]["answers"]["perplexity,none"] == pytest.approx(float(logs.mean().neg().exp()))
        answers.append([said(found, task) for task in tasks])
    assert all(first != second for first, second in zip(*answers, strict=True))


def test_edits_change_a_task_and_undo_brings_it_back(tokenizer, manager, tmp_path):
    build_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = editable(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tokenizer)
    lm = HFLM(pretrained=model, batch_size=8)  # the tokenizer from where the base model came from
    found = []
    for step in (None, lambda: model.edit(RECORDS, force=True), model.undo_all):
        if step is not None:
            step()
        found.append(evaluate(lm, manager, "choices"))
    before, edited, undone = (one["results"]["choices"]["acc,none"] for one in found)
    assert edited > before + 0.4
    assert undone == before
    assert said(found[2], "choices") == said(found[0], "choices")  # to the bit


def test_an_exported_adapter_is_measured_like_the_edited_model(tokenizer, manager, tmp_path):
    """The harness' own way, from a shell: `--model_args pretrained=...,peft=...`."""
    model = editable(build_model("llama"), tokenizer)
    model.base_model.resize_token_embeddings(len(tokenizer))  # the harness does where an adapter is given
    model.base_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.edit(RECORDS[0].prompt, RECORDS[0].target, force=True)
    model.save_lora(tmp_path / "adapter")
    with_adapter = HFLM(
        pretrained=str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu", dtype="float32", batch_size=8
    )
    expected = said(harness(model, manager, "choices"), "choices")
    for (request, (logs, _)), (_, (own, _)) in zip(
        said(evaluate(with_adapter, manager, "choices"), "choices"), expected, strict=True
    ):
        assert logs == pytest.approx(own, abs=1e-4), request
