"""The page for trying edits: its logic on a tiny model, and the page itself in a browser on the default model."""

from __future__ import annotations

import contextvars
import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from functools import partial

import pytest
import torch
import yaml
from support.models import RECORDS, all_logits, editable
from support.paths import ROOT
from support.reading import at_once
from support.scope import scoped

import hf_mend
from hf_mend import EditorConfig
from hf_mend.evaluation.generation import answer, probability


SPACE = ROOT / "examples" / "space"
PROMPT, TARGET = RECORDS[0].prompt, RECORDS[0].target
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def module(name: str):
    spec = importlib.util.spec_from_file_location(f"space_{name}", SPACE / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


session_module = module("session")


@pytest.fixture
def bench(llama, tokenizer):
    return session_module.Workbench(editable(llama, tokenizer), max_new_tokens=4)


def compare(bench, session):
    return bench.compare(session, PROMPT, TARGET, RECORDS[0].paraphrases, [RECORDS[3].prompt])


def test_a_probability_is_the_product_over_the_target_s_tokens(llama, tokenizer):
    model = editable(llama, tokenizer)
    prompt, target = model.encoder.tokens(session_module_query(PROMPT, TARGET))
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    expected = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(target)).exp()
    assert probability(model, PROMPT, TARGET) == pytest.approx(float(expected), rel=1e-4)
    with pytest.raises(ValueError, match="is empty; write what"):
        answer(model, "")


def session_module_query(prompt, target):
    from hf_mend.data.encoding import Query

    return Query(prompt, target)


def test_visitors_share_the_model_and_not_the_edits(bench, tokenizer):
    mine, theirs = session_module.Session(), session_module.Session()
    plain = all_logits(bench.model, tokenizer)
    before = compare(bench, mine)
    assert [row.kind for row in before] == ["prompt", "paraphrase", "paraphrase", "unrelated"]
    assert all(row.before == row.after and row.probability_before == row.probability_after for row in before)
    result = bench.edit(mine, f" {PROMPT} ", TARGET)
    assert result.prompt == PROMPT and len(mine.edits) == 1
    after = compare(bench, mine)
    assert after[0].probability_after > after[0].probability_before == before[0].probability_before
    assert after[3].probability_before is after[3].probability_after is None, "nothing is wanted of an unrelated one"
    assert compare(bench, theirs) == before
    assert torch.equal(all_logits(bench.model, tokenizer), plain)


def test_edits_are_switched_off_and_undone(bench):
    session = session_module.Session()
    before = compare(bench, session)
    for record in RECORDS[:2]:
        bench.edit(session, record.prompt, record.target)
    assert len(session.edits) == 2
    both = compare(bench, session)
    first, second = session.labels()
    assert first[0] == f"{PROMPT} → {TARGET}"
    session.switch([])
    assert compare(bench, session) == before and bench.adapter(session) is None
    session.switch([first[1]])
    assert [edit.id for edit in session.active] == [first[1]]
    session.switch([first[1], second[1]])
    assert compare(bench, session) == both
    assert session.undo().id == second[1] and session.undo().id == first[1] and session.undo() is None
    assert compare(bench, session) == before


def test_the_download_is_an_adapter_of_what_is_on(bench, tokenizer, tmp_path, _built_models):
    import copy

    from peft import PeftModel

    session = session_module.Session()
    for record in RECORDS[:2]:
        bench.edit(session, record.prompt, record.target)
    session.switch([session.edits[0].id])
    with zipfile.ZipFile(io.BytesIO(bench.adapter(session).read_bytes())) as archive:
        archive.extractall(tmp_path)
    with bench.model.carrying(session.active):
        expected = all_logits(bench.model, tokenizer)
    plain = PeftModel.from_pretrained(copy.deepcopy(_built_models["llama"]), tmp_path)
    torch.testing.assert_close(all_logits(plain, tokenizer), expected, rtol=1e-4, atol=1e-4)


def test_edits_of_another_model_are_not_carried(bench):
    from hf_mend import Edit

    foreign = Edit("x", "a", "b", {"no.such.layer": (torch.zeros(1, 2), torch.zeros(1, 2))})
    session = session_module.Session()
    bench.edit(session, PROMPT, TARGET)
    message = "these edits: edit 'x' changes 'no.such.layer'"
    with bench.model.carrying(session.edits):
        with pytest.raises(ValueError, match=message), bench.model.carrying([foreign]):
            pass
        assert bench.model.edits == session.edits


def test_an_edit_that_does_not_take_is_none_of_the_visitor_s(bench):
    session = session_module.Session()
    bench.model.__class__ = hf_mend.EditableModel  # which keeps no such edit
    result = bench.edit(session, PROMPT, "madrid lima oslo rome " * 4)
    assert result.taken_back and session.edits == [] and bench.adapter(session) is None


def test_in_a_chat_prompts_are_a_user_s_turns(llama, tokenizer):
    import copy

    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    bench, session = session_module.Workbench(editable(llama, chatting), 4), session_module.Session()
    bench.edit(session, PROMPT, TARGET, chat=True)
    assert session.labels()[0][0] == f"{PROMPT} → {TARGET} (in a chat)"
    (row,) = bench.compare(session, PROMPT, TARGET, [], [], chat=True)
    with bench.model.carrying(session.active):
        assert row.after == answer(bench.model, PROMPT, chat=True, max_new_tokens=4)
        assert row.probability_after == probability(bench.model, PROMPT, TARGET, chat=True)


def test_with_a_scope_a_row_names_its_edit_and_strictness_is_the_visitor_s_own(llama, tokenizer):
    bench = session_module.Workbench(scoped(llama, tokenizer), 4)
    mine, strict = session_module.Session(), session_module.Session(strictness=0.5)
    for session in (mine, strict):
        bench.edit(session, PROMPT, TARGET)
    row = compare(bench, mine)[0]
    assert row.answered_by == f"{PROMPT} → {TARGET}" and compare(bench, mine)[3].answered_by is None
    row = compare(bench, strict)[0]
    assert row.answered_by is None and not row.changed and bench.model.scope_strictness == 0
    strict.strictness = 0.0
    assert compare(bench, strict)[0].answered_by == f"{PROMPT} → {TARGET}"


@pytest.fixture
def app(monkeypatch, bench):
    """The page's functions, without a server, on the tiny model."""
    pytest.importorskip("gradio", reason="needs the extra `space`")
    monkeypatch.syspath_prepend(str(SPACE))
    monkeypatch.setitem(sys.modules, "session", session_module)
    loaded = module("app")
    monkeypatch.setattr(loaded, "workbench", lambda editor, base_model: bench)
    return loaded


def last(outputs):
    return list(outputs)[-1]


def test_other_words_of_the_example_go_when_another_prompt_is_typed(app):
    assert app.probes_for(app.PROMPT, app.PARAPHRASES, app.UNRELATED) == (app.PARAPHRASES, app.UNRELATED)
    assert app.probes_for("The sky is", app.PARAPHRASES, app.UNRELATED) == ("", app.UNRELATED)
    assert app.probes_for("The sky is", "my own words", "x\nThe sky is") == ("my own words", "x")


def test_the_page_edits_and_shows_row_after_row(app):
    session = session_module.Session()
    steps = list(app.make_edit(session, "", "", PROMPT, TARGET, "the seat of", "the river", False, 0.0))
    assert steps[0][1].startswith("Editing") and [step[2].count('class="row ') for step in steps[2:-1]] == [1, 2, 3]
    assert "The edit took" in steps[-1][1] or "was taken back" in steps[-1][1]
    page = steps[-1][2]
    assert "same answer" in page or "another answer" in page or f"says {TARGET!r}" in page
    assert " likely</small>" in page and "P(" not in page


def test_four_visitors_at_once_see_what_each_sees_alone(app, bench, tokenizer):
    asked = [(record.prompt, record.target) for record in RECORDS[:4]]
    plain = all_logits(bench.model, tokenizer)

    def visit(number, seen):
        session = session_module.Session()
        prompt, target = asked[number]
        page = last(app.make_edit(session, "", "", prompt, target, PROMPT, "the river", False, 0.0))[2]
        rows = bench.compare(session, *asked[number], [PROMPT], ["the river"])
        seen[number] = page, [(row.before, row.after, row.probability_after) for row in rows]

    alone, together = {}, {}
    for number in range(4):
        visit(number, alone)
    assert len({str(rows) for _, rows in alone.values()}) == 4
    # Each in a copy of its context, as Gradio's handlers run.
    at_once(*(partial(contextvars.copy_context().run, visit, number, together) for number in range(4)))
    assert together == alone
    assert bench.model.edits == [] and torch.equal(all_logits(bench.model, tokenizer), plain)


def test_an_empty_prompt_leaves_results_and_edits_as_they_are(app):
    import gradio as gr

    for prompt, target, name in (("", TARGET, "a prompt"), (PROMPT, " ", "its new answer")):
        step = last(app.make_edit(session_module.Session(), "", "", prompt, target, "", "", False, 0.0))
        assert name in step[1] and "nothing was changed" in step[1] and step[2:] == [gr.skip()] * 3
    step = last(app.undo(session_module.Session(), "", "", "", "", "", "", False, 0.0))
    assert step[1] == "There is no edit to undo." and step[2] == gr.skip()
    refused = last(app.make_edit(session_module.Session(), "", "", "river " * 80, TARGET, "", "", False, 0.0))
    assert refused[1].startswith("Not edited: ") and refused[2:] == [gr.skip()] * 3


@pytest.fixture
def visitor(app):
    """Returns a new visitor of the page on a server: a client whose session is its own."""
    from gradio_client import Client

    page = app.build()
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield lambda: Client(address, verbose=False, download_files=False)
    page.close()


def test_the_page_on_a_server_keeps_visitors_apart(app, visitor, llama, tokenizer, monkeypatch):
    bench = session_module.Workbench(hf_mend.EditableModel(llama, tokenizer=tokenizer))
    monkeypatch.setattr(app, "workbench", lambda editor, base_model: bench)

    def asking(prompt: str) -> tuple[object, ...]:
        return app.NO_EDITOR, "", prompt, TARGET, "", RECORDS[3].prompt, False, 0.0

    ask = asking(PROMPT)
    mine, other = visitor(), visitor()
    job = mine.submit(*ask, api_name="/make_edit")
    message, rows, edits, download = job.result()
    assert "The edit took" in message and rows.count('class="row ') == 2 and rows.count("same answer") < 2
    assert "Editing" in job.outputs()[0][0] and "Asking" in job.outputs()[1][0]
    (number,) = edits["value"]
    assert edits["choices"] == [[f"{PROMPT} → {TARGET}", number]]
    assert download["interactive"] and download["value"]
    # Another visitor has none of it; what is wrong is said and leaves all as it was.
    assert other.predict(*ask, api_name="/undo")[0] == "There is no edit to undo."
    message, *rest = mine.predict(*asking(" "), api_name="/make_edit")
    assert message.startswith("Write a prompt first")
    message, rows, *_ = mine.predict([], *ask, api_name="/switch")
    assert message.startswith("0 of 1") and rows.count("same answer") == 2
    assert mine.predict([number], *ask, api_name="/switch")[0].startswith("1 of 1")
    message, rows, edits, download = mine.predict(*ask, api_name="/undo")
    assert message.startswith(f"Undone: {PROMPT}") and edits["choices"] == [] and not download["interactive"]
    assert bench.model.edits == []


def test_what_an_answer_s_change_means(app):
    row = session_module.Row
    for kind, before, after, words, good in (
        ("unrelated", "cold", "cold", "same answer", True),
        ("unrelated", "cold", "Lisbon", "changed", False),
        ("prompt", "Gothenburg", "Lisbon.", "says &#x27;Lisbon&#x27;", True),
        ("prompt", "Gothenburg", "Lisbonne", "another answer", False),
    ):
        said = app.mark(row(kind, "p", before, after), "Lisbon")
        assert f">{words}<" in said and (" good" in said) is good
    assert "repeats itself" in app.mark(row("prompt", "p", "a", "Lisbon Lisbon Lisbon", repeats=True), "Lisbon")


def test_visitors_see_names_of_editors_whose_bases_are_there(app, monkeypatch, tmp_path):
    assert not any("/" in name for name in [*app.EDITORS, app.EDITOR])
    monkeypatch.setattr(app, "is_here", lambda base: base == "here")
    monkeypatch.setattr(app, "BASE_MODEL", "")
    for name, base in (("a", "here"), ("b", "gone")):
        (tmp_path / name).mkdir()
        EditorConfig(base_model_name_or_path=base).save_pretrained(tmp_path / name)
    monkeypatch.setattr(app, "SHIPPED", [tmp_path / "none", tmp_path / "a"])
    assert app.shipped_editors() == {"a": str(tmp_path / "a")}


def test_a_base_is_here_in_the_package_a_folder_or_the_cache(app, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "is_packaged", lambda: True)
    assert app.is_here(app.SMOLLM2_ID) and app.is_here(str(tmp_path))
    assert not app.is_here("t5-closed-book") and not app.is_here(None) and not app.is_here("me/nowhere")


def test_the_space_s_header_is_what_the_hub_reads():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    fields = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert fields["sdk"] == "gradio" and (SPACE / fields["app_file"]).is_file()
    assert len(fields["short_description"]) <= 60
    assert "hf_mend[space]" in (SPACE / "requirements.txt").read_text()


@pytest.fixture
def page(tmp_path):
    """The page's address; the server is the command that a newcomer runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, str(SPACE / "app.py")], env=environment, stdout=log, stderr=log)
    try:
        until(lambda: server.poll() is not None or "Running on local URL" in (tmp_path / "log").read_text(), 600)
        assert server.poll() is None, (tmp_path / "log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium as wide as a phone."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": {"width": 390, "height": 844}})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def until(condition, seconds: float = 600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Chromium and its driver")
def test_the_page_in_a_browser(page, browser, tmp_path):
    def find(selector: str):
        return browser.find_element("css selector", selector)

    def type_into(selector: str, text: str) -> None:
        field = find(selector)
        field.clear()
        field.send_keys(text)

    def says(text: str):
        return lambda: text in find("#message").text and "Asking" not in find("#message").text

    def side(name: str) -> str:
        return find(f"#rows .row.prompt .{name}").text

    browser.get(page)
    until(lambda: browser.find_elements("css selector", "#prompt textarea, #prompt input"))
    type_into("#prompt textarea, #prompt input", "The capital of France is")
    type_into("#target textarea, #target input", "Lyon")
    find("#edit").click()
    until(says("The edit took"))
    assert "Paris" in side("before") and "Lyon" in side("after")
    assert "Lyon: less than 1 % likely" in side("before") and "% likely" in side("after")
    assert len(browser.find_elements("css selector", "#rows .row")) == 3, "the example's other words are gone"
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), "fits a phone"
    if os.environ.get("HF_MEND_SCREENSHOT"):
        browser.execute_script("window.scrollTo(0, 0)")
        browser.save_screenshot(os.environ["HF_MEND_SCREENSHOT"])

    link = until(lambda: browser.find_elements("css selector", "a#download, #download a, #download"))[0]
    browser.execute_script("arguments[0].scrollIntoView()", link)
    link.click()
    archive = until(lambda: list((tmp_path / "downloads").glob("*.zip")))[0]
    with zipfile.ZipFile(archive) as files:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files.namelist())

    switch = find("#edits input[type=checkbox]")
    switch.click()
    until(says("0 of 1 edits are on"))
    assert "Paris" in side("after")
    find("#edits input[type=checkbox]").click()
    until(says("1 of 1 edits are on"))
    assert "Lyon" in side("after")

    find("#undo").click()
    until(says("Undone: The capital of France is"))
    assert "Paris" in side("after") and not browser.find_elements("css selector", "#edits input[type=checkbox]")
