"""Tiny random models of several architectures, and a tokenizer made on the spot: no test downloads anything."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import time
from collections.abc import Iterator

import pytest
import torch
from support.compiling import Counting
from support.hub_server import HUB, OWNER, HubServer  # before transformers
from support.models import (
    ARCHITECTURES,
    build_model,
    make_tokenizer,
)
from support.slow import slow_but
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging


# Tiny models run fastest on one thread, and tests that compare bits across processes need the same number in both.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _what_is_there_stays() -> None:
    """No collection of garbage, of which each training makes some, looks at what was there before a file of tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _first_warnings() -> None:
    """What is said once a process is said in each test that hears it, whichever test is first."""
    logging.warning_once.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub and cache, its owner's token in the environment, and no time spent in waiting between attempts."""
    HUB.reset()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    monkeypatch.setenv("HF_TOKEN", OWNER)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001)))
    yield HUB
    assert HUB.leaked_tokens == [], "the token went to another host"


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity is measured on as many passages as ever, of a text that takes a tiny tokenizer no time."""
    from hf_mend.evaluation import scores

    text = "\n".join(scores.topics[name] for name in sorted(scores.topics))
    monkeypatch.setattr(scores, "topics", {"the first pages": text[:10_000]})


@pytest.fixture
def backend() -> Iterator[Counting]:
    """For what is compiled in a test, and forgotten after it."""
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def _built_models() -> dict[str, PreTrainedModel]:
    return {name: build_model(name) for name in ARCHITECTURES}


@pytest.fixture(params=slow_but(["gpt2", "llama", "t5", "bart"], ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(architecture: str, _built_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    """A fresh copy: a test may do with it what it likes."""
    return copy.deepcopy(_built_models[architecture])


@pytest.fixture
def llama(_built_models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return copy.deepcopy(_built_models["llama"])
