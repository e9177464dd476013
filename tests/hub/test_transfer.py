"""Sharing over the Hub's protocol: huggingface_hub itself against a server on loopback, with faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from support.models import RECORDS, EditableModel, all_logits, build_model, editable, small_config
from support.paths import TESTS

from hf_mend import AutoEditableModel, get_editable_model
from hf_mend.hub.transfer import is_reachable


EDITOR_FILES = {".gitattributes", "README.md", "config.json", "editor_config.json", "editor.safetensors"}


@pytest.fixture
def model(llama, tokenizer):
    torch.manual_seed(3)
    made = get_editable_model(llama, small_config(), tokenizer)
    return randomized(made)


def randomized(model):
    with torch.no_grad():
        for parameter in model.editor.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def load(name, tokenizer, **kwargs):
    return EditableModel.from_pretrained(build_model("llama"), name, tokenizer, **kwargs)


def same_editor(one, other):
    a, b = one.editor.state_dict(), other.editor.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- there and back ----


def test_an_editor_goes_to_the_hub_and_comes_back(hub, model, tokenizer, tmp_path):
    info = model.push_to_hub("me/editor", commit_message="first", commit_description="all of it")
    repository = hub.repositories["me/editor"]
    assert set(repository.files()) == EDITOR_FILES and not repository.private
    assert info.oid == repository.refs["main"] and repository.messages[info.oid] == "first"
    assert info.commit_url == f"{hub.url}/me/editor/commit/{info.oid}"
    model.save_pretrained(tmp_path / "local")
    for name in ("editor_config.json", "editor.safetensors"):
        assert (tmp_path / "local" / name).read_bytes() == repository.files()[name]
    assert 'AutoEditableModel.from_pretrained("me/editor")' in repository.files()["README.md"].decode()
    assert same_editor(load("me/editor", tokenizer), model)


def test_edits_and_tags_go_along_where_asked(hub, llama, tokenizer, caplog):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target, max_steps=60)
    model.push_to_hub("me/editor", card_data={"tags": ["one"]}, tags="two")
    assert set(hub.repositories["me/editor"].files()) == EDITOR_FILES
    assert "carries edits (1), which are not saved" in caplog.text
    assert {"one", "two", "model-editing"} <= set(ModelCard.load("me/editor").data.tags)
    model.push_to_hub("me/editor", edits=True)
    assert set(hub.repositories["me/editor"].files()) == EDITOR_FILES | {"edits.safetensors"}
    other = load("me/editor", tokenizer)
    assert [edit.target for edit in other.load_edits("me/editor")] == [RECORDS[0].target]


def test_saving_and_pushing_in_one_call(hub, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "my-editor", push_to_hub=True, commit_message="both", private=True)
    repository = hub.repositories["me/my-editor"]
    assert repository.private and "both" in repository.messages.values()
    assert same_editor(load(tmp_path / "my-editor", tokenizer), load("me/my-editor", tokenizer))
    model.save_pretrained(tmp_path / "my-editor", push_to_hub=True, repo_id="me/other")
    assert "me/other" in hub.repositories


def test_a_name_without_a_user_is_the_users_own(hub, model):
    model.push_to_hub("editor", private=True)
    assert hub.repositories["me/editor"].private


def test_a_private_editor_needs_the_token(hub, model, tokenizer, monkeypatch):
    model.push_to_hub("me/editor", private=True)
    monkeypatch.delenv("HF_TOKEN")
    for token in (None, False, "hf_reader"):
        with pytest.raises(
            FileNotFoundError, match="me/editor on the Hub does not exist, or is private.*hf auth login"
        ):
            load("me/editor", tokenizer, token=token)
    assert same_editor(load("me/editor", tokenizer, token="hf_owner"), model)


def test_branches_commits_subfolders_and_pull_requests(hub, model, tokenizer):
    first = model.push_to_hub("me/editor")
    other = randomized(get_editable_model(build_model("llama"), small_config(), tokenizer))
    branch = other.push_to_hub("me/editor", revision="dev")
    pull = other.push_to_hub("me/editor", create_pr=True)
    below = other.push_to_hub("me/editor", subfolder="other")
    assert hub.repositories["me/editor"].refs == {"main": below.oid, "dev": branch.oid, "refs/pr/1": pull.oid}
    assert pull.pr_revision == "refs/pr/1"
    assert same_editor(load("me/editor", tokenizer), model)
    assert same_editor(load("me/editor", tokenizer, revision=first.oid), model)
    for where in ({"revision": "dev"}, {"revision": "refs/pr/1"}, {"subfolder": "other"}):
        assert same_editor(load("me/editor", tokenizer, **where), other)
    with pytest.raises(FileNotFoundError, match="has no revision 'nowhere'"):
        load("me/editor", tokenizer, revision="nowhere")
    with pytest.raises(FileNotFoundError, match="has no editor_config.json"):
        load("me/editor", tokenizer, subfolder="nowhere")


def test_another_users_repository_takes_a_pull_request_only(hub, model):
    model.push_to_hub("me/editor")
    with pytest.raises(HfHubHTTPError, match="may not write to me/editor.*create_pr=True"):
        model.push_to_hub("me/editor", token="hf_reader", commit_message="x", dtype=torch.float16)
    model.push_to_hub("me/editor", token="hf_reader", create_pr=True, dtype=torch.float16)
    assert set(hub.repositories["me/editor"].refs) == {"main", "refs/pr/1"}


def test_edits_and_lora_adapters(hub, llama, tokenizer, tmp_path):
    model = editable(llama, tokenizer)
    with pytest.raises(ValueError, match="no edit to write as a LoRA adapter"):
        model.push_lora_to_hub("me/lora")
    assert hub.repositories == {}
    model.edit([r.prompt for r in RECORDS[:3]], [r.target for r in RECORDS[:3]])
    edited = all_logits(model, tokenizer)
    model.push_edits_to_hub("me/edits", private=True)
    model.push_lora_to_hub("me/lora", commit_message="adapter")
    fresh = editable(build_model("llama"), tokenizer)
    fresh.load_edits("me/edits")
    assert torch.equal(all_logits(fresh, tokenizer), edited)
    assert [edit.id for edit in fresh.edits] == [edit.id for edit in model.edits]
    plain = PeftModel.from_pretrained(build_model("llama"), "me/lora")
    torch.testing.assert_close(all_logits(plain, tokenizer), edited, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="me/lora on the Hub has no edits"):
        fresh.load_edits("me/lora")


def test_base_tokenizer_and_editor_by_the_editors_name(hub, llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    api = HfApi()
    api.create_repo("me/base", private=True)
    api.upload_folder(repo_id="me/base", folder_path=tmp_path / "base")
    llama.config._name_or_path = "me/base"
    model = get_editable_model(llama, small_config(), tokenizer)
    model.push_to_hub("me/editor", subfolder="deep", private=True)
    loaded = AutoEditableModel.from_pretrained("me/editor", subfolder="deep")
    assert same_editor(loaded, model)
    assert torch.equal(all_logits(loaded, tokenizer), all_logits(model, tokenizer))


# ---- what is there already ----


def test_a_card_on_the_hub_keeps_its_words(hub, model, tokenizer):
    model.push_to_hub("me/editor")
    card = hub.repositories["me/editor"].files()["README.md"].decode()
    hub.add("me/editor", {"README.md": card.replace("## Training", "My own words.\n\n## Training").encode()})
    other = get_editable_model(build_model("llama"), small_config(rank=5), tokenizer)
    other.push_to_hub("me/editor")
    text = hub.repositories["me/editor"].files()["README.md"].decode()
    assert "My own words." in text
    assert "| `rank` | `5` |" in text and "| `rank` | `8` |" not in text
    hub.add("me/editor", {"README.md": b"---\nlicense: mit\n---\nonly this"})
    model.push_to_hub("me/editor")
    assert hub.repositories["me/editor"].files()["README.md"] == b"---\nlicense: mit\n---\nonly this"


def test_the_same_again_is_no_new_commit(hub, model):
    first = model.push_to_hub("me/editor")
    assert model.push_to_hub("me/editor").oid == first.oid
    assert len(hub.repositories["me/editor"].history) == 2


def test_shards_go_and_come_and_leave_nothing_behind(hub, model, tokenizer):
    hub.multipart_above = 4096
    model.push_to_hub("me/editor", max_shard_size="10KB")
    files = hub.repositories["me/editor"].files()
    shards = [name for name in files if name.startswith("editor-0")]
    assert len(shards) > 2 and "editor.safetensors.index.json" in files and "editor.safetensors" not in files
    assert any("/lfs-complete/" in line for line in hub.requests), "some went in parts"
    assert same_editor(load("me/editor", tokenizer), model)
    hub.add("me/editor", {"notes.txt": b"mine"})
    model.push_to_hub("me/editor")
    assert set(hub.repositories["me/editor"].files()) == EDITOR_FILES | {"notes.txt"}
    assert same_editor(load("me/editor", tokenizer), model)


def test_all_files_are_of_one_commit(hub, model, tokenizer):
    model.push_to_hub("me/editor")
    files = hub.repositories["me/editor"].files()
    hub.fail("HEAD .*editor.safetensors", before=lambda: hub.add("me/editor", {"editor.safetensors": b"newer"}))
    assert same_editor(load("me/editor", tokenizer), model)
    assert hub.repositories["me/editor"].files()["editor.safetensors"] == b"newer" != files["editor.safetensors"]


def test_somebody_commits_in_between(hub, model):
    model.push_to_hub("me/editor")
    words = b"---\nlicense: mit\n---\ntheir words"
    hub.fail("POST .*/commit/", before=lambda: hub.add("me/editor", {"README.md": words}))
    model.push_to_hub("me/editor", dtype=torch.bfloat16)
    files = hub.repositories["me/editor"].files()
    assert files["README.md"] == words
    assert json.loads(files["editor_config.json"])["rank"] == 8


# ---- faults ----

PUSH_FAULTS = [
    ("POST /api/repos/create", {"status": 500}, "push again"),
    (
        "GET /api/models/me/editor/revision|GET /api/models/me/editor$",
        {"status": 404},
        "Nothing was changed on the Hub",
    ),
    ("POST .*/preupload/", {"status": 403}, "may not write to me/editor"),
    ("POST .*/preupload/", {"status": 429, "times": 99}, "limits requests for now; push again later"),
    ("POST .*/preupload/", {"status": 503, "times": 99}, "push again"),
    ("POST .*/objects/batch", {"status": 401}, "hf auth login"),
    ("PUT /lfs/", {"status": 400, "message": "the content's sha256 is not the object's id"}, "sha256"),
    ("PUT /lfs/", {"status": 500, "times": 99}, "push again"),
    ("PUT /lfs/", {"drop_after": 1000, "times": 99}, "push again"),
    ("POST /lfs-verify/", {"status": 404}, "Nothing was changed on the Hub"),
    ("POST .*/commit/", {"status": 409}, "Somebody else is writing"),
    ("POST .*/commit/", {"status": 412, "times": 99}, "Somebody else is writing"),
    ("POST .*/commit/", {"status": 502}, "push again"),
    ("POST .*/commit/", {"drop_after": 10}, "push again"),
    ("POST .*/commit/", {"drop_response": True}, "push again"),
]


@pytest.mark.parametrize(("line", "fault", "advice"), PUSH_FAULTS, ids=[f"{a} {b}" for a, b, _ in PUSH_FAULTS])
def test_a_push_that_fails_loses_nothing(hub, model, tokenizer, caplog, tmp_path, monkeypatch, line, fault, advice):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    earlier = randomized(get_editable_model(build_model("llama"), small_config(), tokenizer))
    earlier.push_to_hub("me/editor")
    editor = {name: value.clone() for name, value in model.editor.state_dict().items()}
    injected = hub.fail(line, **fault)
    with pytest.raises(OSError) as caught:
        model.push_to_hub("me/editor")
    assert advice in str(caught.value)
    assert all(torch.equal(value, editor[name]) for name, value in model.editor.state_dict().items())
    # The folder that the warning names is whole, and the Hub has the earlier editor or the new one, not a mixture.
    folder = re.search(r"whole in (\S+): push again", caplog.text)[1]
    assert same_editor(load(folder, tokenizer), model)
    there = load("me/editor", tokenizer)
    assert same_editor(there, model if fault.get("drop_response") else earlier)
    injected.times = 0
    model.push_to_hub("me/editor")
    assert same_editor(load("me/editor", tokenizer), model)
    assert [path.name for path in tmp_path.iterdir()] == [Path(folder).parent.name]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("POST .*/preupload/", {"status": 503, "times": 2}),
        ("POST .*/preupload/", {"drop_after": 10}),
        ("PUT /lfs/", {"status": 500, "times": 2}),
        ("PUT /lfs/", {"drop_after": 1000, "times": 2}),
        ("PUT /lfs/[0-9a-f]*/2", {"drop_after": 100}),
        ("GET /cdn/", {"drop_after": 1000, "times": 3, "reset": False}),
    ],
)
def test_what_passes_is_tried_again(hub, model, tokenizer, line, fault):
    hub.multipart_above = 40_000
    injected = hub.fail(line, **fault)
    model.push_to_hub("me/editor")
    assert same_editor(load("me/editor", tokenizer), model)
    assert injected.times == 0


PULL_FAULTS = [
    ("HEAD .*editor_config.json", {"status": 401}, "does not exist, or is private"),
    ("HEAD .*editor_config.json", {"status": 403}, "may not be read with this token"),
    ("HEAD .*editor_config.json", {"status": 429, "times": 99}, "could not be fetched .*429"),
    ("HEAD .*editor.safetensors", {"status": 503, "times": 99}, "could not be fetched .*503"),
    ("HEAD .*editor", {"drop_response": True, "times": 99}, "could not be downloaded .*try again"),
    (
        "GET .*editor_config.json",
        {"status": 500, "times": 99},
        "could not be downloaded .*nothing was loaded, try again",
    ),
    ("GET /cdn/", {"status": 404}, "could not be downloaded"),
    ("GET /cdn/", {"drop_after": 0, "times": 99}, "could not be downloaded .*nothing was loaded, try again"),
    ("GET /cdn/", {"corrupt": True}, "editor.safetensors came from the Hub with other bytes"),
    ("GET .*/editor_config.json", {"corrupt": True}, "editor_config.json came from the Hub with other bytes"),
]


@pytest.mark.parametrize(("line", "fault", "message"), PULL_FAULTS, ids=[f"{a} {b}" for a, b, _ in PULL_FAULTS])
def test_a_pull_that_fails_leaves_the_base_as_it_was(hub, model, tokenizer, line, fault, message):
    model.push_to_hub("me/editor")
    base = build_model("llama").train()
    injected = hub.fail(line, **fault)
    with pytest.raises((OSError, ValueError), match=message):
        EditableModel.from_pretrained(base, "me/editor", tokenizer)
    assert base.training and all(p.requires_grad for p in base.parameters())
    injected.times = 0
    assert same_editor(EditableModel.from_pretrained(base, "me/editor", tokenizer), model), "the next try works"


def test_damage_in_the_cache(hub, model, tokenizer, tmp_path):
    model.push_to_hub("me/editor")
    load("me/editor", tokenizer)
    blobs = Path(os.environ["HF_HOME"]) / "hub" / "models--me--editor" / "blobs"
    blob = max(blobs.iterdir(), key=lambda path: path.stat().st_size)
    elsewhere = tmp_path / "ab" / "0123"  # as huggingface_hub shares blobs between repositories
    elsewhere.parent.mkdir()
    for damage in (lambda data: data, lambda data: data[:-1] + b"x"):
        os.rename(blob, elsewhere)
        blob.symlink_to(elsewhere)
        elsewhere.write_bytes(damage(elsewhere.read_bytes()))
        if damage(b"ab") == b"ab":
            assert same_editor(load("me/editor", tokenizer), model)
            blob.unlink()
            os.rename(elsewhere, blob)
        else:
            with pytest.raises(ValueError, match="editor.safetensors came from the Hub with other bytes"):
                load("me/editor", tokenizer)
    assert same_editor(load("me/editor", tokenizer), model)


def test_edits_are_not_lost_either(hub, llama, tokenizer, caplog):
    model = editable(llama, tokenizer)
    model.edit(RECORDS[0].prompt, RECORDS[0].target)
    hub.fail("PUT /lfs/", drop_after=50, times=99)
    with pytest.raises(OSError, match="the push to me/edits failed"):
        model.push_edits_to_hub("me/edits")
    assert len(model.edits) == 1
    folder = re.search(r"whole in (\S+): push again", caplog.text)[1]
    fresh = editable(build_model("llama"), tokenizer)
    fresh.load_edits(folder)
    assert torch.equal(all_logits(fresh, tokenizer), all_logits(model, tokenizer))
    shutil.rmtree(Path(folder).parent)


def test_a_wrong_token(hub, model):
    with pytest.raises(HfHubHTTPError, match="Invalid credentials(.|\n)*hf auth login"):
        model.push_to_hub("me/editor", token="hf_wrong")
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["a/b/c", "me/..", "../me", "me/edi tor", ""])
def test_names_that_are_none(hub, model, name):
    with pytest.raises(ValueError, match="is not a repository's id"):
        model.push_to_hub(name)


def test_a_damaged_index_on_the_hub(hub, model, tokenizer):
    model.push_to_hub("me/editor", max_shard_size="10KB")
    name = "editor.safetensors.index.json"
    index = json.loads(hub.repositories["me/editor"].files()[name])
    tensor = next(iter(index["weight_map"]))
    for bad in ("../editor.safetensors", "/etc/passwd", "config.json", "a/editor-00001-of-00002.safetensors", 3, None):
        index["weight_map"][tensor] = bad
        hub.add("me/editor", {name: json.dumps(index).encode()})
        with pytest.raises(ValueError, match="names the file .*expected one like editor-00001-of-00002.safetensors"):
            load("me/editor", tokenizer)
    index["weight_map"][tensor] = "editor-00001-of-00099.safetensors"
    hub.add("me/editor", {name: json.dumps(index).encode()})
    with pytest.raises(FileNotFoundError, match="has no editor.safetensors"):
        load("me/editor", tokenizer)


# ---- the environment, as another process sees it ----

SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
wanted = {name: os.environ[name] for name in ("HF_HOME", "HF_ENDPOINT")}
from support import hub_server  # starts a server of its own, which is not the one that is asked
os.environ.update(wanted, HF_TOKEN="hf_owner")
from support.models import build_model
from hf_mend import EditableModel
for name in sys.argv[2:]:
    try:
        model = EditableModel.from_pretrained(build_model("llama"), name)
        print("sum", float(sum(value.double().sum() for value in model.editor.state_dict().values())))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_what_is_in_the_cache_needs_no_network(hub, model, tokenizer, monkeypatch):
    """In this process; in another one, which finds the cache and the setting in its environment, in the slow test."""
    model.push_to_hub("me/editor", private=True)
    model.push_to_hub("me/other")
    load("me/editor", tokenizer)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert same_editor(load("me/editor", tokenizer), model)
    with pytest.raises(FileNotFoundError, match="me/other.*is not in the cache.*HF_HUB_OFFLINE"):
        load("me/other", tokenizer)
    assert len(hub.requests) == asked, "offline means offline"


@pytest.mark.slow
def test_another_process_with_its_cache_and_no_network(hub, model, tokenizer, tmp_path):
    model.push_to_hub("me/editor", private=True)
    model.push_to_hub("me/other")
    load("me/editor", tokenizer)
    home = tmp_path / "home"
    os.rename(os.environ["HF_HOME"], home)
    asked = len(hub.requests)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(TESTS), "me/editor", "me/other"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    cached, other = (line for line in said.splitlines() if line)
    assert cached == f"sum {float(sum(value.double().sum() for value in model.editor.state_dict().values()))}"
    assert re.search("^FileNotFoundError .*me/other.*is not in the cache.*HF_HUB_OFFLINE", other)
    assert len(hub.requests) == asked, "offline means offline"


def test_one_short_request_tells_whether_the_hub_answers(hub, monkeypatch):
    assert is_reachable() and len(hub.requests) == 1
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    assert not is_reachable() and len(hub.requests) == 1
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a second try"))
        assert not is_reachable()


# ---- what a stranger's repository may try ----


@pytest.mark.parametrize("name", ["/etc", "../../base", "~/base", ".", "a/b/c", "C:\\base"])
def test_a_file_from_the_hub_chooses_no_path_on_this_machine(hub, llama, tokenizer, tmp_path, name):
    llama.config._name_or_path = name
    get_editable_model(llama, small_config(), tokenizer).push_to_hub("me/editor")
    with pytest.raises(ValueError, match="expected the id of a repository on the Hub; a file from the Hub may not"):
        AutoEditableModel.from_pretrained("me/editor")


def test_a_base_with_code_of_its_own_is_not_run(hub, llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    config["model_type"] = "evil"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    hub.add("me/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    llama.config._name_or_path = "me/base"
    get_editable_model(llama, small_config(), tokenizer).push_to_hub("me/editor")
    config = json.loads(hub.repositories["me/editor"].files()["editor_config.json"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoEditableModel.from_pretrained("me/editor")
    hub.add("me/editor", {"editor_config.json": json.dumps({**config, "trust_remote_code": True}).encode()})
    with pytest.raises(ValueError, match="unknown fields.*trust_remote_code"):
        AutoEditableModel.from_pretrained("me/editor")
    assert not (tmp_path / "ran").exists()
