"""What somebody who knows transformers and PEFT types at first, and what the error says."""

from __future__ import annotations

import pytest
from support.models import RECORDS, build_model, editable

from hf_mend import AutoEditableModel, EditableModel, EditorConfig, EditRecord, evaluate, read_edits


PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """An editor, edits and an adapter, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("slips")
    model = editable(build_model("llama"), tokenizer)
    model.edit(PROMPT, TARGET, max_steps=1)
    model.save_pretrained(folder / "editor", edits=False)
    model.save_edits(folder / "edits")
    model.save_lora(folder / "lora")
    return folder


EDITS = {
    "dictionaries": (
        ([{"prompt": PROMPT, "target": TARGET}],),
        {},
        "prompt of request 0 is {'prompt'.*EditRecord.prom",
    ),
    "pairs": (([(PROMPT, TARGET)],), {}, r"prompt of request 0 is \('the.*of type tuple; expected a text"),
    "a number in a record": ((EditRecord(PROMPT, 42),), {}, "target of request 0 is 42, of type int; expected a text"),
    "steps as a text": (
        (PROMPT, TARGET),
        {"max_steps": "3"},
        "max_steps is '3', of type str; expected a whole number",
    ),
    "half a step": ((PROMPT, TARGET), {"max_steps": 2.5}, "max_steps is 2.5, of type float"),
    "a switch as a number": (([PROMPT], [TARGET]), {"batch_size": True}, "batch_size is True, of type bool"),
}


@pytest.mark.parametrize("case", EDITS)
def test_arguments_of_an_edit(llama, tokenizer, case):
    arguments, options, message = EDITS[case]
    model = EditableModel(llama, tokenizer=tokenizer)
    with pytest.raises(TypeError, match=message):
        model.edit(*arguments, **options)
    assert model.edits == []


class Processor:
    """As a model that reads images too has one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_what_is_no_tokenizer(llama, tokenizer, folders):
    for given, message in (
        ("gpt2", r"tokenizer is 'gpt2', a str; expected .*AutoTokenizer.from_pretrained\(name\)"),
        (Processor(tokenizer), r"a Processor; expected .*processor.tokenizer"),
    ):
        for load in (
            lambda given: EditableModel(llama, tokenizer=given),
            lambda given: EditableModel.from_pretrained(llama, folders / "editor", given),
            lambda given: AutoEditableModel.from_pretrained(folders / "editor", tokenizer=given),
        ):
            with pytest.raises(TypeError, match=message):
                load(given)
    model = EditableModel(llama)
    model.tokenizer = "gpt2"
    with pytest.raises(TypeError, match="tokenizer is 'gpt2'"):
        model.edit(PROMPT, TARGET)


def test_an_editor_s_name_where_a_model_is_expected_and_the_reverse(llama, tokenizer, folders):
    editor = folders / "editor"
    for arguments in ((editor,), (str(editor), llama), (llama,)):
        with pytest.raises(TypeError, match=r"base model that is loaded, then .*AutoEditableModel.from_pretrained"):
            EditableModel.from_pretrained(*arguments)
    with pytest.raises(TypeError, match=r"is a LlamaForCausalLM, expected a folder.*EditableModel.from_pretrained"):
        AutoEditableModel.from_pretrained(editor, llama)
    with pytest.raises(TypeError, match="no option 'device_map' here.*AutoEditableModel's"):
        EditableModel.from_pretrained(llama, editor, device_map="auto")
    with pytest.raises(TypeError, match="is an EditableModel already; edit that one"):
        EditableModel(EditableModel(llama, tokenizer=tokenizer))


def test_a_folder_of_another_kind_says_what_it_holds(llama, tokenizer, folders):
    model = editable(llama, tokenizer)
    for load, name, held in (
        (model.load_edits, "editor", "holds an editor, which AutoEditableModel.from_pretrained loads"),
        (model.load_edits, "lora", "holds a PEFT adapter, which load_lora loads"),
        (model.load_lora, "edits", "holds edits, which load_edits loads"),
        (AutoEditableModel.from_pretrained, "edits", "holds edits, which load_edits loads"),
    ):
        with pytest.raises(FileNotFoundError, match=held):
            load(folders / name)


def test_a_file_where_a_folder_is_saved(llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    (tmp_path / "editor.bin").write_text("mine")
    for save in (model.save_pretrained, model.save_edits):
        with pytest.raises(NotADirectoryError, match=r"editor.bin is a file, and what is saved needs a folder"):
            save(tmp_path / "editor.bin")
    assert (tmp_path / "editor.bin").read_text() == "mine"


def test_an_option_that_is_nearly_right():
    with pytest.raises(ValueError, match="no option 'target_module'; did you mean target_modules?"):
        EditorConfig(target_module=["o_proj"])


def test_what_is_no_file_and_no_record(llama, tokenizer):
    with pytest.raises(TypeError, match="path is a list, expected a file.*EditRecord"):
        read_edits([{"prompt": PROMPT, "target": TARGET}])
    with pytest.raises(TypeError, match="item 0 of the data is .*, of type str; expected an EditRecord"):
        evaluate(editable(llama, tokenizer), [PROMPT])
