"""The page for trying edits: its logic on a tiny model, and the page itself in a browser on the default model."""

from __future__ import annotations

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

import pytest
import torch
import yaml
from support.models import RECORDS, all_logits, editable
from support.paths import ROOT

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
    assert after[3].watched == after[3].before
    assert compare(bench, theirs) == before
    assert torch.equal(all_logits(bench.model, tokenizer), plain)


def test_edits_are_switched_off_and_undone(bench):
    session = session_module.Session()
    before = compare(bench, session)
    for record in RECORDS[:2]:
        bench.edit(session, record.prompt, record.target)
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
        return lambda: text in find("#message").text

    def side(name: str) -> str:
        return find(f"#rows .row.prompt .{name}").text

    browser.get(page)
    until(lambda: browser.find_elements("css selector", "#prompt textarea, #prompt input"))
    type_into("#prompt textarea, #prompt input", "The capital of France is")
    type_into("#target textarea, #target input", "Lyon")
    find("#edit").click()
    until(says("The edit took"))
    assert "Paris" in side("before") and "Lyon" in side("after")
    chance = [float(text.rsplit("=", 1)[1]) for text in (side("before"), side("after"))]
    assert chance[0] < 0.1 < 0.5 < chance[1]
    assert len(browser.find_elements("css selector", "#rows .row")) == 5
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
